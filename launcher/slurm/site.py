"""What a cluster is like, in one YAML for all runs that are submitted there."""

from __future__ import annotations

import difflib
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, ValidationError

from launcher.slurm.texts import WRONG, Mount, Option, SignalSeconds, Time
from trainer.config.load import read_mapping
from trainer.config.options import walk
from trainer.config.problems import describe, sentence
from trainer.config.section import NonNegativeFloat, PositiveFloat, PositiveInt, Section
from trainer.errors import ConfigError

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

ENVIRONMENT_VARIABLE = "TRIMTAB_SITE"
FILE_NAME = "site.yaml"

Text = Annotated[str, Field(min_length=1, pattern=r"^[^\n\r\x00]*$")]
"""One line."""
Name = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]
"""Of an environment variable."""


class ContainerConfig(Section):
    """Ranks run in a container; the batch script itself, and what watches over them, do not."""

    kind: Literal["pyxis", "apptainer"] = "pyxis"
    """pyxis: options of srun (NVIDIA enroot). apptainer: `apptainer exec` in front of the command."""
    image: Text
    """A path or a URL that it knows."""
    mounts: tuple[Mount, ...] = ()
    """`/from:/to` or `/from:/to:ro`. The folder of runs and the data must be among them, at the same path."""
    python: Text = "python3"
    """Python in the image, with trimtab installed."""


class PreflightConfig(Section):
    """What a node must be able to do before ranks are started on it."""

    enabled: bool = True
    """Look at the nodes before the ranks start."""
    memory_gib: NonNegativeFloat = 1.0
    """Host memory that must be available."""
    disk_gib: NonNegativeFloat = 1.0
    """Space that must be free where the run is written."""
    disk_megabytes_per_second: NonNegativeFloat = 1.0
    """Speed at which a synced file must be written there."""
    shared_memory_gib: NonNegativeFloat = 0.0
    """Space that must be free in /dev/shm."""
    clock_seconds: PositiveFloat = 5.0
    """How far the clocks of two nodes may be apart."""
    gbit_per_second: NonNegativeFloat = 0.0
    """Bandwidth that each node must reach with the next."""
    timeout_seconds: PositiveFloat = 180.0
    """A node that has not answered by then fails."""


class SiteConfig(Section):
    """A cluster. What is not given is left to the scheduler."""

    partition: Text | None = None
    """Partition (or several, with commas)."""
    account: Text | None = None
    """Account that is charged."""
    qos: Text | None = None
    """Quality of service."""
    time: Time | None = None
    """Time limit of one job, as sbatch knows it: `24:00:00`, `2-00:00:00`. None: the partition's."""
    exclusive: bool = True
    """Whole nodes."""
    memory: Text | None = None
    """Host memory a node: `64G`; `0` is all."""
    cpus_per_task: PositiveInt | None = None
    """Cores for the ranks of one node. None: with whole nodes all; else the ranks' threads, on GPUs 4 a rank where the
    run does not say."""
    gpu_type: Text | None = None
    """Type of GPU, where a partition has several."""
    gpu_option: Literal["gpus-per-node", "gres"] = "gpus-per-node"
    """How the site wants to be asked for GPUs."""
    directives: dict[Option, Text | int | bool] = Field(default={})
    """Further options of sbatch: `{constraint: a100, switches: 1, contiguous: true}`. What is set elsewhere is
    refused with the place to set it."""
    modules: tuple[Text, ...] = ()
    """Environment modules that are loaded first. Where they are unknown, /etc/profile is read before."""
    setup: tuple[Text, ...] = ()
    """Lines of shell, as they are, run on every node after that and before anything else: `source /opt/site/env.sh`.
    One that fails ends the job."""
    environment: dict[Name, Text] = Field(default={})
    """Variables for ranks (network, NCCL, caches): `{NCCL_SOCKET_IFNAME: ib0, HF_HUB_OFFLINE: "1"}`."""
    container: ContainerConfig | None = None
    """Container for the ranks. None: none."""
    python: Text | None = None
    """Python with trimtab installed, on every node. None: the one that submits."""
    continue_by: Literal["requeue", "chain"] = "requeue"
    """requeue: the same job again. chain: where the site forbids that, a job that depends on the one before."""
    signal_seconds: SignalSeconds = 120
    """Time before the limit at which the run is asked to stop and save. Where saves were measured to take longer, it is
    asked earlier."""
    max_jobs: PositiveInt = 100
    """Jobs, requeued ones counted each, that one submission may use."""
    max_hours: PositiveFloat | None = None
    """Hours that its jobs may run together. None: no limit."""
    max_fruitless: PositiveInt = 3
    """Jobs in a row without a new checkpoint; then it ends."""
    exclude: tuple[Text, ...] = ()
    """Nodes that are never used."""
    exclude_hours: PositiveFloat = 24.0
    """How long a node is left out that failed the look before a start."""
    preflight: PreflightConfig = PreflightConfig()
    """The look at the nodes before a start."""


def site_path(given: Path | None) -> Path | None:
    """The site file: the given one, else $TRIMTAB_SITE, else `site.yaml` in the working directory, else
    `~/.config/trimtab/site.yaml`; None: there is none."""
    if given is not None:
        return given
    if named := os.environ.get(ENVIRONMENT_VARIABLE):
        return Path(named)
    places = Path(FILE_NAME), Path.home() / ".config" / "trimtab" / FILE_NAME
    return next((place for place in places if place.is_file()), None)


def load_site(path: Path | None) -> SiteConfig:
    """The site file at `site_path(path)`; without one everything is left to the scheduler.

    Raises:
        ConfigError: with every problem of the file.
    """
    found = site_path(path)
    if found is None:
        return SiteConfig()
    data = read_mapping(found, may_be_empty=True)
    try:
        # JSON is where pydantic's strict mode takes a list for a tuple.
        return SiteConfig.model_validate_json(json.dumps(data))
    except ValidationError as error:
        # a value that may be of several types has an error for each of them
        problems = dict(_problem(item) for item in error.errors())
        raise ConfigError(list(problems.items()), str(found)) from None


def _problem(error: ErrorDetails) -> tuple[str, str]:
    """Path and sentence."""
    place = [str(part) for part in error["loc"] if part != "[key]"]
    if place[0] in ("directives", "environment") and len(place) > 1:
        place = place[:2]
    return ".".join(place), _sentence(error, place)


def _sentence(error: ErrorDetails, place: list[str]) -> str:
    kind, value, is_name = error["type"], error["input"], error["loc"][-1] == "[key]"
    if kind == WRONG:
        return error["msg"]
    if kind == "extra_forbidden":
        return _unknown(".".join(place))
    if kind == "string_pattern_mismatch" and is_name:
        noun = "an option of sbatch, without dashes" if place[0] == "directives" else "a variable of the environment"
        return f"is not the name of {noun}"
    if place[0] == "directives" and len(place) > 1 and not isinstance(value, str):
        return f"must be text, a whole number, or true or false, but is {describe(value)}"
    if kind in ("string_pattern_mismatch", "string_too_short") or (place[0] == "directives" and len(place) > 1):
        return f"must be one line of text, but is {describe(value)}"
    return sentence(error)


def _unknown(path: str) -> str:
    paths = [option.path for option in walk(SiteConfig)]
    parent, _, name = path.rpartition(".")
    siblings = [each for each in paths if each.rpartition(".")[0] == parent]
    if close := difflib.get_close_matches(path, siblings, n=1) or difflib.get_close_matches(name, paths, n=1):
        return f"is not an option; did you mean `{close[0]}`?"
    names = ", ".join(each.rpartition(".")[2] for each in siblings)
    return f"is not an option; here are {names}"
