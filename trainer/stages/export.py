"""A checkpoint as a model that `from_pretrained` loads: `python -m trainer.stages.export RUN [--checkpoint NAME] …`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from trainer.checkpoint.assemble import whole_parameters
from trainer.checkpoint.manifest import name_of
from trainer.checkpoint.store import committed_steps
from trainer.config.files import RunFiles
from trainer.config.load import read_run_config
from trainer.errors import CheckpointError, ExitCode, TrimtabError
from trainer.model.save import save_model
from trainer.stages.prepare import open_run

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def export_run(files: RunFiles, checkpoint: str | None, output: Path, dtype: torch.dtype) -> str:
    """Write the weights of a committed checkpoint (None: the newest), one parameter at a time.

    Returns:
        The checkpoint's name.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    steps = committed_steps(files.checkpoints)
    names = [name_of(step) for step in steps]
    if not names:
        raise CheckpointError(f"{files.root} has no checkpoint yet; train it first")
    name = checkpoint or names[-1]
    if name not in names:
        raise CheckpointError(f"{files.root} has no checkpoint {name!r}; it has {', '.join(names)}")
    config = read_run_config(files.root)
    prepared, _ = open_run(files, config)
    save_model(
        config,
        whole_parameters(files.checkpoints / name),
        output,
        tokenizer_path=prepared.tokenizer_path,
        vocabulary=prepared.vocabulary,
        dtype=dtype,
    )
    return name


def main(arguments: Sequence[str]) -> int:
    """Export as the command line says; the exit code of the process."""
    parser = argparse.ArgumentParser(prog="python -m trainer.stages.export", description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--checkpoint", help="name below checkpoints/; by default the newest")
    parser.add_argument("--output", type=Path, help="by default RUN/export")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="fp32")
    options = parser.parse_args(arguments)
    files = RunFiles(options.run.absolute())
    output = options.output or files.export
    try:
        name = export_run(files, options.checkpoint, output, DTYPES[options.dtype])
    except TrimtabError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    print(f"exported {name} to {output}")
    return ExitCode.COMPLETED


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
