"""Checkpoints as a model that `from_pretrained` loads: `python -m trainer.stages.export RUN [--checkpoint NAME] …`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from trainer.checkpoint.assemble import averaged_parameters, whole_parameters
from trainer.checkpoint.layout import AVERAGE, MASTER, read_layout
from trainer.checkpoint.manifest import best_score, is_healthy, name_of, read_manifest, shard_files
from trainer.checkpoint.store import committed_steps
from trainer.config.files import RunFiles
from trainer.config.load import read_run_config
from trainer.config.schema import RunConfig
from trainer.data.prepared import Prepared
from trainer.data.several import SeveralPrepared
from trainer.errors import CheckpointError, ConfigError, ExitCode, TrimtabError
from trainer.model.freezing import is_partly_frozen
from trainer.model.save import save_model
from trainer.stages.prepare import open_run
from trainer.starts import read_starts

TASKS = "tasks"
"""Folder of an export: of several tasks, each as a model of its own."""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, slots=True)
class Exported:
    """What was written."""

    names: tuple[str, ...]
    """Of the checkpoints; more than one: their average."""
    dtype: str

    def __str__(self) -> str:
        if len(self.names) == 1:
            return f"{self.names[0]} in {self.dtype}"
        return f"the average of {len(self.names)} checkpoints ({', '.join(self.names)}) in {self.dtype}"


def export_run(
    files: RunFiles,
    output: Path,
    *,
    checkpoint: str | None = None,
    dtype: str | None = None,
    average: int | None = None,
    adapter: bool = False,
    ema: bool = True,
) -> Exported:
    """Write the weights of a committed checkpoint, or of the average of several, one parameter at a time; where some
    weights were not trained, the whole model is in memory. Adapters are added to the weights that they lie beside. Of
    several tasks each is a model of its own in the folder TASKS beside the whole.

    Args:
        checkpoint: its name; None: where evaluations were compared (`evaluation.best`) the best, else the newest of the
            run's history.
        dtype: fp32, bf16 or fp16; None: what the model was trained in.
        average: so many healthy checkpoints, the newest up to `checkpoint`.
        adapter: write the adapters alone, as peft does.
        ema: write the moving average of the weights, where the run keeps one and no `average` is asked for.

    Raises:
        CheckpointError: there is none or there are too few, or one is damaged.
        ConfigError: there are no adapters to write, or none that would fit the pretrained model.
    """
    # DeepSpeed, which transformers imports, would say which device it has found
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    config = read_run_config(files.root)
    chosen = choose(files, checkpoint, average, best=config.evaluation.best)
    directories = [files.checkpoints / name for name in chosen]
    dtype = dtype or read_manifest(directories[-1]).precision or "fp32"
    prepared, _ = open_run(files, config)
    if adapter:
        _check_adapter(config, prepared)
    if len(directories) == 1:
        uses_ema = ema and config.optim.ema is not None
        tensors = whole_parameters(directories[0], key=AVERAGE if uses_ema else MASTER)
    elif config.model.lora is not None:
        raise CheckpointError("the average of adapters is not that of the models they make; export one checkpoint")
    else:
        tensors = averaged_parameters(directories)
    manifest = read_manifest(directories[-1])
    origin = read_layout(shard_files(directories[-1], manifest)[0][1])[1].get("origin", "")
    if _lacks_weights(config, prepared, origin):
        # peft and what builds models take seconds to import, which other exports need not wait for
        from trainer.model.adapters import merged
        from trainer.model.quiet import without_bars
        from trainer.stages.trained import trained_model

        with without_bars():
            computed = DTYPES[manifest.precision or "fp32"]
            model = trained_model(config, prepared, tensors, dtype=computed, origin=origin)
        if adapter:
            from trainer.model.save_adapter import save_adapter

            save_adapter(config, model, output, tokenizer_path=prepared.tokenizer_path, dtype=DTYPES[dtype])
            return Exported(chosen, dtype)
        tensors = merged(model)
    save_model(
        config,
        tensors,
        output,
        tokenizer_path=prepared.tokenizer_path,
        vocabulary=prepared.vocabulary,
        dtype=DTYPES[dtype],
        classes=prepared.classes,
        kept=prepared.kept,
    )
    if isinstance(prepared, SeveralPrepared):
        from trainer.model.save_task import save_task

        for task in prepared.outputs:
            save_task(output, output / TASKS / task.name, task)
    return Exported(chosen, dtype)


def _lacks_weights(config: RunConfig, prepared: Prepared, origin: str) -> bool:
    """Whether a checkpoint is without some weights of its model: those that the config does not train, or that the
    architecture never trains, as Marian its positions.

    Args:
        origin: digest in the checkpoint, of these weights; where the run is drawn to its start, of all.
    """
    if not origin or is_partly_frozen(config) or not config.objective.l2_start:
        return bool(origin)
    from trainer.model.build import meta_model

    model = meta_model(config, prepared.vocabulary, prepared.classes, prepared.kept)
    return not all(parameter.requires_grad for parameter in model.parameters())


def _check_adapter(config: RunConfig, prepared: Prepared) -> None:
    """
    Raises:
        ConfigError: the run has no adapters, or they fit no published model.
    """
    if config.model.lora is None:
        raise ConfigError([("model.lora", "is not set: this run has no adapter to export; leave --adapter out")])
    for path, differs in (("model.layers", config.model.layers), ("data.tokenizer.keep", prepared.kept)):
        if differs is not None:
            text = f"leaves out a part of {config.model.pretrained}, beside which the adapter would not fit"
            raise ConfigError([(path, f"{text}; export without --adapter")])


def choose(files: RunFiles, checkpoint: str | None, average: int | None, *, best: str | None = None) -> tuple[str, ...]:
    """Names of the checkpoints to export, oldest first: one, or `average` healthy ones of the run's history.

    Args:
        best: score by which evaluations were compared; None: they were not.

    Raises:
        CheckpointError: there is none, or there are fewer.
    """
    committed = [name_of(step) for step in committed_steps(files.checkpoints)]
    if not committed:
        raise CheckpointError(f"{files.root} has no checkpoint yet; train it first")
    if checkpoint is not None and checkpoint not in committed:
        raise CheckpointError(f"{files.root} has no checkpoint {checkpoint!r}; it has {', '.join(committed)}")
    if checkpoint is not None and average is None:
        return (checkpoint,)
    history = read_starts(files).history
    manifests = {name: read_manifest(files.checkpoints / name) for name in committed}
    ours = [name for name in committed if history.admits(manifests[name].start, manifests[name].step)]
    if not ours:
        raise CheckpointError(f"{files.root} has no checkpoint of its present history; it has {', '.join(committed)}")
    if average is None:
        # each was better than all before it
        better = [name for name in ours if best is not None and best_score(files.checkpoints / name) == best]
        return ((better or ours)[-1],)
    last = manifests[checkpoint or ours[-1]].step
    healthy = [name for name in ours if is_healthy(files.checkpoints / name) and manifests[name].step <= last]
    if len(healthy) < average:
        raise CheckpointError(
            f"an average of {average} checkpoints was asked for, and {files.root} has {len(healthy)} healthy ones "
            f"({', '.join(healthy) or 'none'}); ask for fewer, or raise checkpoint.keep"
        )
    return tuple(healthy[-average:])


def main(arguments: Sequence[str]) -> int:
    """Export as the command line says; the exit code of the process."""
    parser = argparse.ArgumentParser(prog="python -m trainer.stages.export", description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--checkpoint", help="name below checkpoints/; by default the best, else the newest")
    parser.add_argument("--average", type=_positive, metavar="N", help="average the last N healthy checkpoints")
    parser.add_argument("--output", type=Path, help="by default RUN/export, for --adapter RUN/adapter")
    parser.add_argument("--dtype", choices=sorted(DTYPES), help="by default what the model was trained in")
    parser.add_argument("--adapter", action="store_true", help="the adapters alone, as peft writes them")
    parser.add_argument("--no-ema", action="store_true", help="the weights themselves, not their moving average")
    options = parser.parse_args(arguments)
    files = RunFiles(options.run.absolute())
    output = options.output or (files.root / "adapter" if options.adapter else files.export)
    try:
        exported = export_run(
            files,
            output,
            checkpoint=options.checkpoint,
            dtype=options.dtype,
            average=options.average,
            adapter=options.adapter,
            ema=not options.no_ema,
        )
    except TrimtabError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    print(f"exported {exported} to {output}")
    return ExitCode.COMPLETED


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not at least 1")
    return number


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
