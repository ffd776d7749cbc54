"""Scores of runs and of model directories: `python -m trainer.evaluate MODEL…`, by one process or by ranks.

Each rank (`torchrun --nproc-per-node N -m trainer.evaluate …`) predicts a share of the texts; rank 0 scores and prints.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from trainer.config.files import RunFiles
from trainer.config.load import load_config, read_run_config
from trainer.config.objective import Kind
from trainer.config.schema import RunConfig
from trainer.errors import ConfigError, DataError, ExitCode, LaunchError, TrimtabError

if TYPE_CHECKING:
    from trainer.stages.any_model import AnyModel
    from trainer.stages.evaluating import Material, Options

NOISES = ("typos", "delete", "swap")
_MICRO = 16
_YAML = {".yaml", ".yml"}


def main(arguments: Sequence[str]) -> int:
    """Evaluate as the command line says; the exit code of the process."""
    options = _parser().parse_args(arguments)
    try:
        return _evaluate(options)
    except TrimtabError as error:
        text = error.problems[0][1] if isinstance(error, ConfigError) and len(error.problems) == 1 else str(error)
        print(f"trimtab: {text}", file=sys.stderr)
        return error.exit_code


def _evaluate(options: argparse.Namespace) -> int:
    noise = parse_noise(options.noise)
    check(options)
    from trainer.__main__ import quieten

    quieten()
    with ExitStack() as stack:
        temporary = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="trimtab-")))
        rank, ranks, device = _join(options.device, stack)
        from trainer.stages.evaluating import Options

        models = [_Model(path, options, temporary / str(number)) for number, path in enumerate(options.models)]
        # with the run's own micro-batches: the digits of its evaluations
        run = models[0].run
        micro = options.batch or (_MICRO if run is None else run.batch.micro)
        how = Options(options.seed, options.resamples, micro, options.samples, noise, options.tokens, rank, ranks)
        first = models[0].load(device)
        material = _material(options, models[0], first, temporary)
        return _report(options, models, first, material, how, device)


def _report(
    options: argparse.Namespace,
    models: Sequence[_Model],
    loaded: AnyModel,
    material: Material,
    how: Options,
    device: str,
) -> int:
    from trainer.stages.evaluating import compared, evaluate
    from trainer.stages.evaluation_tables import as_json, comparison, disagreement, notes, tables, without_nan

    found: list[Any] = []
    for number, model in enumerate(models):
        loaded = loaded if number == 0 else model.load(device)
        found.append(evaluate(material, loaded, model.title, how))
    written: dict[str, Any] = {"seed": how.seed, "resamples": how.resamples, "noise": how.noise}
    if how.rank == 0:
        from rich.console import Console

        console = Console(highlight=False, markup=False, emoji=False, width=None if sys.stdout.isatty() else 160)
        for result in found:
            for table in tables(result, material, options.errors):
                console.print(table)
            for note in notes(result):
                console.print(f"  {note}")
        written["models"] = [as_json(result, material, options.errors) for result in found]
        for one, other in combinations(found, 2):
            differences = compared(one, other, material.names, how)
            console.print(comparison(one, other, differences))
            entry = {name: _of(difference) for name, difference in differences.items()}
            written.setdefault("comparisons", []).append({"first": one.title, "second": other.title, "scores": entry})
        if len(found) > 1:
            table, matrix = disagreement(found, material.names)
            console.print(table)
            written["flips"] = matrix
        if options.look is not None:
            board = RunFiles(models[0].root).tensorboard if models[0].run is not None else None
            _look(options, models[0].load(device), found[0], material, board)
            console.print(f"  looked into: {options.look}" + (f", and in {board}" if board else ""))
        if options.json is not None:
            options.json.write_text(json.dumps(without_nan(written), indent=1, ensure_ascii=False), encoding="utf-8")
    if options.lm_eval and how.rank == 0:
        return _lm_eval(models, options.lm_eval, how.micro)
    return ExitCode.COMPLETED


def _look(options: argparse.Namespace, model: AnyModel, result: Any, material: Material, board: Path | None) -> None:
    """A page about the worst errors of the first model, and the texts that are given; of a run in TensorBoard too."""
    from trainer.stages.evaluation_tables import worst
    from trainer.stages.looking import look

    given = [(f"given: {text}", text) for text in options.sentence]
    wrong = worst(result, material, options.errors, whole=True)
    known = [(f"{one['where']}: is {one['truth']}, predicted {one['prediction']}", one["text"]) for one in wrong]
    look(model, [*given, *known], options.look, f"Inside {result.title}", board)


def _of(difference: Any) -> dict[str, Any]:
    from dataclasses import asdict

    return asdict(difference)


class _Model:
    """A model as it was named: the directory of one, or a run, whose best or newest checkpoint is exported."""

    def __init__(self, path: Path, options: argparse.Namespace, temporary: Path):
        self.root, self.options = path, options
        self.run = read_run_config(path) if is_run(path) else None
        self.title = path.name or str(path.absolute().name)
        self.folder = path if self.run is None else temporary

    def load(self, device: str) -> AnyModel:
        from trainer.stages.any_model import AnyModel

        kind: Kind | None = self.options.kind
        if self.run is not None:
            kind = self.run.objective.kind
            if not self.folder.exists():
                from trainer.stages.export import export_run

                exported = export_run(RunFiles(self.root.absolute()), self.folder, checkpoint=self.options.checkpoint)
                print(f"{self.title}: {exported}", file=sys.stderr, flush=True)
        return AnyModel.load(self.folder, kind, self.options.length, device)


def _material(options: argparse.Namespace, first: _Model, model: AnyModel, temporary: Path) -> Material:
    from trainer.stages.evaluating import FileMaterial, HeldOutMaterial
    from trainer.stages.examples import Columns, read_examples

    if options.data is None:
        from trainer.stages.prepare import open_run

        assert first.run is not None
        prepared, _ = open_run(RunFiles(first.root.absolute()), first.run)
        return HeldOutMaterial(first.run, prepared)
    if options.data.suffix in _YAML:
        return _configured(load_config(options.data), model, temporary)
    if model.kind == "masked":
        raise DataError(
            f"{model.path} is a masked model, whose score needs masks: evaluate its run, or --data CONFIG.yaml"
        )
    if options.label is None and model.kind != "causal":
        raise DataError(f"{model.path} is a {model.kind} model: say with --label which column holds what it should say")
    columns = Columns(options.text, options.label, options.second)
    examples = read_examples(options.data, model.kind, columns, model.names)
    if model.kind == "causal" and options.label is not None:
        from trainer.data.chat import Chat

        examples.chat = Chat(model.tokenizer, model.tokenizer.eos_token or "")
    return FileMaterial(examples)


def _configured(config: RunConfig, model: AnyModel, temporary: Path) -> Material:
    """The held-out split of a config's data, in the tokens of the model."""
    from trainer.data.prepare import prepare
    from trainer.stages.evaluating import HeldOutMaterial

    data = config.data.model_copy(
        update={
            "tokenizer": config.data.tokenizer.model_copy(update={"path": str(model.path.absolute()), "train": None}),
            "sequence_length": min(config.data.sequence_length, model.length),
        }
    )
    objective = config.objective.model_copy(update={"kind": model.kind})
    config = config.model_copy(update={"data": data, "objective": objective})
    prepared = prepare(data, base=temporary, tokenizer_fallback=None, trust_remote_code=False, kind=model.kind)
    return HeldOutMaterial(config, prepared)


def check(options: argparse.Namespace) -> None:
    """Refuse what cannot be evaluated, before anything heavy is imported.

    Raises:
        DataError, ConfigError, LaunchError: with what to do.
    """
    for path in options.models:
        if not path.is_dir():
            raise DataError(f"{path} is no directory: name a run, or a model that transformers loads")
        if not is_run(path) and not (path / "config.json").is_file():
            raise DataError(f"{path} is neither a run (it has no config.yaml) nor a model (it has no config.json)")
    if len({path.resolve() for path in options.models}) < len(options.models):
        raise DataError("the same model is named twice: a comparison needs two")
    if options.compare and len(options.models) < 2:
        raise DataError("--compare needs at least two models or runs")
    if options.data is None and not is_run(options.models[0]):
        raise DataError(
            f"{options.models[0]} is a model, which brings no data: add --data CONFIG.yaml, or --data FILE.jsonl "
            "--text COLUMN --label COLUMN"
        )
    if options.data is not None and not options.data.is_file():
        raise DataError(f"--data {options.data} is no file")
    if options.sentence and options.look is None:
        raise DataError("--sentence is looked into, and no page is asked for: add --look FILE.html")
    if options.checkpoint is not None and not any(map(is_run, options.models)):
        raise DataError("--checkpoint names one of a run, and no run is given")
    if options.lm_eval and importlib.util.find_spec("lm_eval") is None:
        raise LaunchError("lm-eval is not installed: `pip install lm-eval` installs it beside Trimtab")


def is_run(path: Path) -> bool:
    """Whether a directory is that of a run."""
    return RunFiles(path).config.is_file()


def parse_noise(text: str | None) -> dict[str, float]:
    """`typos=0.05,delete=0.1` by name.

    Raises:
        DataError: another name, or a rate that is none.
    """
    result = {}
    for part in (text or "").split(","):
        if not part.strip():
            continue
        name, _, rate = part.partition("=")
        try:
            value = float(rate)
        except ValueError:
            value = -1.0
        if name.strip() not in NOISES or not 0 < value < 1:
            raise DataError(
                f"--noise {part.strip()!r} is none: give {', '.join(f'{one}=RATE' for one in NOISES)}, 0 < RATE < 1"
            )
        result[name.strip()] = value
    return result


def _join(device: str, stack: ExitStack) -> tuple[int, int, str]:
    """(rank, ranks, device); the process group where there are several."""
    import torch

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return 0, 1, device
    from trainer.engine.ranks import join, leave

    ranks = join("cuda" if device == "cuda" else "cpu")
    stack.callback(leave)
    return ranks.rank, ranks.world_size, device


def _lm_eval(models: Sequence[_Model], tasks: str, batch: int) -> int:
    for model in models:
        argv = [sys.executable, "-m", "lm_eval", "--model", "hf", "--model_args", f"pretrained={model.folder}"]
        argv += ["--tasks", tasks, "--batch_size", str(batch)]
        done = subprocess.run(argv, check=False)  # noqa: S603 (a list, no shell)
        if done.returncode:
            raise LaunchError(f"lm-eval ended with exit code {done.returncode} on {model.title}; what it said is above")
    return ExitCode.COMPLETED


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not at least 1")
    return number


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m trainer.evaluate", description=__doc__)
    parser.add_argument("models", type=Path, nargs="+", metavar="MODEL")
    parser.add_argument("--compare", action="store_true")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--text", default="text")
    parser.add_argument("--label")
    parser.add_argument("--second")
    parser.add_argument("--kind", choices=get_args(Kind))
    parser.add_argument("--checkpoint")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resamples", type=_positive, default=1000)
    parser.add_argument("--noise")
    parser.add_argument("--batch", type=_positive)
    parser.add_argument("--length", type=_positive)
    parser.add_argument("--samples", type=_positive)
    parser.add_argument("--tokens", type=_positive, default=64)
    parser.add_argument("--errors", type=int, default=5)
    parser.add_argument("--look", type=Path, metavar="FILE.html")
    parser.add_argument("--sentence", action="append", default=[])
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--lm-eval", metavar="TASKS")
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
