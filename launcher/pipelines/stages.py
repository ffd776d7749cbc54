"""A pipeline as its YAML asks for it: stages, each a run or a sweep, that begin when others have ended well."""

from __future__ import annotations

import contextlib
import difflib
import heapq
import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field, PlainValidator, ValidationError

from launcher.pipelines.points import Axis, as_yaml
from launcher.pipelines.sweep import Sweep, read_points, read_sweep
from launcher.start import Request, read_request
from trainer.config import yamltext
from trainer.config.files import RunFiles
from trainer.config.load import load_config, read_mapping
from trainer.config.problems import describe, sentence
from trainer.config.section import PositiveInt, Section
from trainer.errors import ConfigError, RunDirectoryError, TrimtabError

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

Problem = tuple[str, str]
Text = Annotated[str, Field(min_length=1, pattern=r"^[^\n\r\x00]*$")]
"""One line."""

_NAME = re.compile(r"\w[\w.+=,@-]{0,99}")
_RESERVED = ("pipeline.json", "sweep.json", "train.sbatch", "config.yaml", "logs")
_OF_THE_PIPELINE = ("name", "runs", "cluster.nodes", "cluster.ranks_per_node")
_SETS = {"from": "model.pretrained", "teacher": "distill.teacher.pretrained"}
"""Option of a stage that names an earlier one → the option of its run that becomes that one's export."""


def _nodes(value: object) -> tuple[int, int] | None:
    if value is None:
        return None
    fewest, dash, most = str(value).partition("-")
    if not isinstance(value, bool) and re.fullmatch(r"[1-9]\d{0,5}(-[1-9]\d{0,5})?", str(value)):
        number = int(fewest), int(most if dash else fewest)
        if number[0] <= number[1]:
            return number
    raise ValueError(f"must be a number of nodes, or a range of them (`2-4`), but is {describe(value)}")


class StageConfig(Section):
    """One stage: a run, or a sweep of runs."""

    name: str
    """Of the stage and of its directory."""
    config: str
    """YAML of its run, relative to the file of the pipeline."""
    set: tuple[str, ...] = ()
    """Overrides, as on the command line."""
    from_: str | None = Field(default=None, alias="from")
    """An earlier stage whose model this one goes on with; of a sweep `STAGE/POINT`."""
    teacher: str | None = None
    """An earlier stage whose model teaches this one; of a sweep `STAGE/POINT`."""
    after: tuple[str, ...] | None = None
    """Stages that must have ended well. None: those of `from` and `teacher`, else the one before; [] is none."""
    nodes: Annotated[tuple[int, int] | None, PlainValidator(_nodes)] = None
    """Fewest and most; None: `cluster.nodes` of the config. On this machine it is one."""
    ranks: PositiveInt | None = None
    """Processes on each node; None: `cluster.ranks_per_node` of the config."""
    time: Text | None = None
    """Time limit of one job; None: the site's. On this machine there is none."""
    sweep: dict[str, tuple[Any, ...]] = Field(default={})
    """Option → values: a run for each combination."""
    seeds: PositiveInt | None = None
    """A run for each of so many seeds."""


class PipelineConfig(Section):
    """The file."""

    name: str
    """Of the pipeline and, under `runs`, of its folder."""
    runs: str = "runs"
    """Folder of pipelines and runs, relative to the working directory."""
    stages: tuple[StageConfig, ...] = Field(min_length=1)
    """In any order that `from` and `teacher` allow."""


@dataclass(frozen=True, slots=True)
class Stage:
    """A stage that can be started or submitted."""

    name: str
    root: Path
    """Its run directory, or the folder of its sweep."""
    requests: tuple[Request, ...]
    """One, or those of the sweep in the order of the array."""
    sweep: Sweep | None
    after: tuple[str, ...]
    """Names of the stages that must have ended well."""
    source: Path | None
    """Where the model will be that it goes on with: until then its model and tokenizer cannot be looked at. None: it
    waits for none."""
    teacher: Path | None
    """Where the model will be that teaches it. None: it waits for none."""
    nodes: tuple[int, int] | None
    time: str | None


@dataclass(frozen=True, slots=True)
class Pipeline:
    """A checked pipeline."""

    name: str
    file: Path
    root: Path
    """RUNS/NAME, absolute."""
    stages: tuple[Stage, ...]
    """Each after those that it waits for."""


def is_pipeline(path: Path) -> bool:
    """Whether the file describes a pipeline, rather than one run."""
    try:
        data = yamltext.parse(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(data, dict) and "stages" in data


def read_pipeline(path: Path, overrides: Sequence[str] = (), *, here: bool = False) -> Pipeline:
    """The pipeline of the file, the configs of all its stages loaded and checked.

    What needs the model of an earlier stage is left to the start of the one that goes on with it.

    Args:
        overrides: of every stage, on top of its own.
        here: for this machine alone: a range of nodes that begins with 1 is one node.

    Raises:
        ConfigError: with everything that is wrong, in the file and in the configs of its stages.
    """
    config = _validated(path)
    root = Path(os.path.normpath(Path(config.runs).expanduser().absolute() / config.name))
    problems = list(_problems(config))
    stages: dict[str, Stage] = {}
    for index, stage in enumerate(config.stages):
        try:
            stages[stage.name] = _stage(path, root, config, index, overrides, here)
        except ConfigError as error:
            where = "" if error.source == "the sweep" else f"{error.source}: "
            problems += [
                (f"stages.{index}", f"{where}{option}: {text}" if option else f"{where}{text}")
                for option, text in error.problems
            ]
        except TrimtabError as error:
            problems.append((f"stages.{index}", str(error)))
    problems += _sources_that_are_no_run(config, stages)
    if problems:
        raise ConfigError(list(dict.fromkeys(problems)), str(path))
    return Pipeline(config.name, path.absolute(), root, tuple(stages[name] for name in in_order(_waits(config))))


def _validated(path: Path) -> PipelineConfig:
    try:
        data = read_mapping(path)
        return PipelineConfig.model_validate_json(json.dumps(data))
    except ValidationError as error:
        # stages that are there and are all wrong are none to pydantic
        errors = [item for item in error.errors() if item["type"] != "too_short" or not item["input"]]
        found = [(".".join(map(str, item["loc"])), _sentence(item)) for item in errors]
        raise ConfigError(found, str(path)) from None


def _sentence(error: ErrorDetails) -> str:
    if error["type"] == "value_error":
        return str(error["ctx"]["error"])
    if error["type"] != "extra_forbidden":
        return sentence(error)
    name, section = str(error["loc"][-1]), PipelineConfig if len(error["loc"]) == 1 else StageConfig
    names = [field.alias or key for key, field in section.model_fields.items()]
    if close := difflib.get_close_matches(name, names, n=1):
        return f"is not an option; did you mean `{close[0]}`?"
    return f"is not an option of a {'pipeline' if section is PipelineConfig else 'stage'}; here are {', '.join(names)}"


def _problems(config: PipelineConfig) -> Iterator[Problem]:
    if why := _bad_name(config.name):
        yield "name", why
    names = [stage.name for stage in config.stages]
    for index, stage in enumerate(config.stages):
        here = f"stages.{index}"
        if why := _bad_name(stage.name):
            yield f"{here}.name", why
        if stage.name in names[:index]:
            yield f"{here}.name", f"is {stage.name!r}, as an earlier stage is; give each its own"
        for option, source in _sources(stage).items():
            if why := _bad_source(config, index, source):
                yield f"{here}.{option}", why
        for name in stage.after or ():
            if name not in names:
                yield f"{here}.after", f"names {name!r}, and there is no such stage; there are {', '.join(names)}"
        for override in stage.set:
            option = override.partition("=")[0].strip()
            if option in _OF_THE_PIPELINE:
                yield f"{here}.set", f"sets `{option}`, which the pipeline does; use `name`, `nodes` and `ranks` of it"
            for given in _sources(stage):
                if option == _SETS[given]:
                    yield f"{here}.set", f"sets `{option}`, and `{given}` does too; leave one out"
    waits = _waits(config)
    try:
        in_order({name: [other for other in after if other in names] for name, after in waits.items()})
    except CycleError as error:
        yield "stages", f"wait for each other in a circle: {' → '.join(reversed(error.args[1]))}"


def _bad_name(name: str) -> str | None:
    if name in _RESERVED:
        return f"is {name!r}, which a file of its folder is named; use another"
    if not _NAME.fullmatch(name):
        return f"is {name!r}, but names a directory: up to 100 letters, digits and _.+=,@-, a letter or digit first"
    return None


def _sources(stage: StageConfig) -> dict[str, str]:
    """The earlier stages whose models it needs, as it names them, by option."""
    given = {"from": stage.from_, "teacher": stage.teacher}
    return {option: source for option, source in given.items() if source is not None}


def _bad_source(config: PipelineConfig, index: int, source: str) -> str | None:
    name, slash, _ = source.partition("/")
    earlier = {stage.name: stage for stage in config.stages[:index]}
    if name not in earlier:
        return f"names {name!r}, which is no earlier stage; {_earlier(list(earlier))}"
    is_sweep = bool(earlier[name].sweep or earlier[name].seeds)
    if is_sweep and not slash:
        return f"names {name!r}, which is a sweep of several runs; name the one to go on with: {name}/POINT"
    if slash and not is_sweep:
        return f"is {source!r}, but {name!r} is one run; write {name}"
    return None


def _earlier(names: Sequence[str]) -> str:
    return f"before it there are {', '.join(names)}" if names else "there is none before it"


def _sources_that_are_no_run(config: PipelineConfig, stages: dict[str, Stage]) -> Iterator[Problem]:
    """`STAGE/POINT` where the sweep has no such point."""
    for index, stage in enumerate(config.stages):
        for option, source in _sources(stage).items():
            name, _, point = source.partition("/")
            if not point or name not in stages or (sweep := stages[name].sweep) is None:
                continue
            points = [each.name for each in sweep.points]
            if point not in points:
                close = difflib.get_close_matches(point, points, n=1, cutoff=0)
                text = f"names {point!r}, which is no point of {name}; did you mean {close[0]}?"
                yield f"stages.{index}.{option}", text


def _waits(config: PipelineConfig) -> dict[str, list[str]]:
    """Stage → those that it waits for."""
    waits: dict[str, list[str]] = {}
    before: str | None = None
    for stage in config.stages:
        sources = [source.partition("/")[0] for source in _sources(stage).values()]
        default = sources or ([] if before is None else [before])
        waits[stage.name] = list(dict.fromkeys([*(default if stage.after is None else stage.after), *sources]))
        before = stage.name
    return waits


def in_order(waits: dict[str, list[str]]) -> list[str]:
    """The stages, each after those that it waits for, otherwise in the order of the file.

    Raises:
        CycleError: there is none.
    """
    places = {name: place for place, name in enumerate(waits)}
    names = list(waits)
    sorter = TopologicalSorter(waits)
    sorter.prepare()
    ready: list[int] = []
    result = []
    while sorter.is_active():
        for name in sorter.get_ready():
            heapq.heappush(ready, places[name])
        result.append(names[heapq.heappop(ready)])
        sorter.done(result[-1])
    return result


def _stage(path: Path, root: Path, config: PipelineConfig, index: int, overrides: Sequence[str], here: bool) -> Stage:
    stage = config.stages[index]
    if here and stage.nodes is not None and stage.nodes[0] == 1:
        stage = stage.model_copy(update={"nodes": (1, 1)})
    exports = {option: RunFiles(root / source).export for option, source in _sources(stage).items()}
    given = [*stage.set, *overrides, f"name={as_yaml(stage.name)}", f"runs={as_yaml(str(root))}"]
    given += [f"{_SETS[option]}={as_yaml(str(export))}" for option, export in exports.items()]
    file = Path(os.path.normpath(path.absolute().parent / Path(stage.config).expanduser()))
    sweep, requests = _for_some_nodes(stage, file, given)
    return Stage(
        name=stage.name,
        root=root / stage.name,
        requests=tuple(requests),
        sweep=sweep,
        after=tuple(_waits(config)[stage.name]),
        source=exports.get("from"),
        teacher=exports.get("teacher"),
        nodes=stage.nodes,
        time=stage.time,
    )


def _for_some_nodes(stage: StageConfig, file: Path, given: Sequence[str]) -> tuple[Sweep | None, Sequence[Request]]:
    """For the most nodes that the config fits; the problems are those with the most of all."""
    if stage.nodes is None:
        return _read(stage, file, given)
    fewest, most = stage.nodes
    try:
        return _read(stage, file, [*given, f"cluster.nodes={most}"])
    except ConfigError as error:
        if any(option != "batch.samples" for option, _ in error.problems):
            raise
        first = [f"{option}={as_yaml(values[0])}" for option, values in stage.sweep.items()]
        batch = load_config(file, [*given, *first]).batch
        # a batch that does not divide over all of them may over fewer
        for nodes in range(most - 1, fewest - 1, -1):
            if batch.samples % (batch.micro * nodes) == 0:
                with contextlib.suppress(ConfigError):
                    return _read(stage, file, [*given, f"cluster.nodes={nodes}"])
        raise


def _read(stage: StageConfig, file: Path, overrides: Sequence[str]) -> tuple[Sweep | None, Sequence[Request]]:
    if not stage.sweep and stage.seeds is None:
        request = read_request(file, overrides, stage.ranks)
        if read_points(request.root) is not None:
            raise RunDirectoryError(f"{request.root} is the folder of a sweep; use another name for the stage")
        return None, [request]
    axes = [Axis(option, values) for option, values in stage.sweep.items()]
    sweep = read_sweep(file, overrides, axes, seeds=stage.seeds, ranks=stage.ranks)
    return sweep, sweep.requests
