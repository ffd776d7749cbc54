"""What every rank runs: `accelerate launch … -m trainer RUN` (or torchrun, deepspeed, srun)."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import traceback
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from trainer.config.files import RunFiles
from trainer.config.load import read_run_config
from trainer.config.resolve import Device, Precision, choose_device, choose_precision
from trainer.config.schema import RunConfig
from trainer.errors import (
    SUPERVISED,
    ExitCode,
    LaunchError,
    RunDirectoryError,
    RunHaltedError,
    SupersededError,
    TrimtabError,
)
from trainer.heartbeat import Heartbeat, die_with_parent, open_heartbeat, watch_yourself
from trainer.records import Outcome
from trainer.starts import RunFence, begin
from trainer.stop import StopRequest

if TYPE_CHECKING:
    from trainer.engine.ranks import Ranks

_MOST_MAPPINGS, _TRIM_THRESHOLD = -4, -1
"""M_MMAP_MAX and M_TRIM_THRESHOLD of malloc.h."""


@dataclass(slots=True)
class Place:
    """This rank in the run, as far as it has got."""

    files: RunFiles
    rank: str
    stop: StopRequest
    heartbeat: Heartbeat
    fence: RunFence | None = None
    """None: the start has no number yet."""


def main(arguments: Sequence[str]) -> int:
    """Run this rank of RUN to its end; the exit code of the process."""
    die_with_parent()
    arguments = [argument for argument in arguments if not argument.startswith("--local_rank")]
    if len(arguments) != 1:
        print("name a run directory: accelerate launch … -m trainer RUN", file=sys.stderr)
        return ExitCode.USAGE
    rank = os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0"))
    place = Place(RunFiles(Path(arguments[0]).absolute()), rank, StopRequest().listen(), open_heartbeat(rank))
    try:
        try:
            return _start(place)
        except Exception as error:  # noqa: BLE001 - the outcome must say why, whatever it was
            return _end(place, error)
    except SupersededError as error:
        print(f"rank {rank}: {error}", file=sys.stderr, flush=True)
        return error.exit_code


def _end(place: Place, error: Exception) -> int:
    """Say and note why this rank failed; its exit code.

    Raises:
        SupersededError: the run is a newer start's by now, whatever the error was.
    """
    files = place.files
    if isinstance(error, SupersededError):
        raise error
    if not isinstance(error, TrimtabError):
        text = f"rank {place.rank}: {type(error).__name__}: {error}"
        outcome = Outcome("crashed", ExitCode.CRASHED, text, 0, 0, newest_checkpoint(files))
        note_end(files, outcome, place.fence)
        print(f"rank {place.rank}:\n{''.join(traceback.format_exception(error))}", file=sys.stderr, flush=True)
        return ExitCode.CRASHED
    reason = "halted" if isinstance(error, RunHaltedError) else "refused"
    if error.exit_code == ExitCode.CRASHED:
        reason = "crashed"
    outcome = Outcome(reason, error.exit_code, str(error), 0, 0, newest_checkpoint(files))
    first = note_end(files, outcome, place.fence)
    if first or (place.rank == "0" and not files.outcome.exists()):
        print(error, file=sys.stderr, flush=True)
    return orderly(error.exit_code) if reason == "halted" else error.exit_code


def _start(place: Place) -> int:
    quieten()
    files = place.files
    config = read_run_config(files.root)
    device, precision = settle(config)
    from trainer.engine.ranks import join, leave

    ranks = join(device)
    if device == "cpu":
        use_cpu(files, config)
    if ranks.is_first:
        files.outcome.unlink(missing_ok=True)
    from trainer.faults.parse import parse_faults
    from trainer.stages.build import Setting
    from trainer.stages.prepare import open_run, prepare_run
    from trainer.stages.training import Training

    if ranks.is_first and not files.data.exists():
        prepare_run(files, config)
    import torch.distributed as dist

    dist.barrier()
    heartbeat = watch_yourself(place.heartbeat, config.supervision.hang_seconds, files.root / "hangs", ranks.rank)
    prepared, facts = open_run(files, config)
    faults = parse_faults(config.faults)
    # not before: a start that was refused must not end one that is alive
    fence = place.fence = take_over(files, ranks)
    place.stop.when(lambda: fence.noticed)
    setting = Setting(files, config, ranks, device, precision, prepared, facts, place.stop, fence, heartbeat)
    stage = Training(setting, faults)
    try:
        ending = stage.run()
    except BaseException as error:
        outcome = stage.outcome_of(error)
        with contextlib.suppress(SupersededError):
            note_end(files, outcome, fence)
        stage.telemetry.close(outcome)
        if ranks.is_first:
            _report(files, config, outcome)
        raise
    outcome = stage.outcome(ending)
    if missing := stage.telemetry.close(outcome):
        raise RunDirectoryError(f"{files.ledger} lacks records of this run: {missing}; free space on its disk")
    if ranks.is_first:
        _report(files, config, outcome)
        note_end(files, outcome, fence)
    leave()
    return orderly(outcome.exit_code)


def _report(files: RunFiles, config: RunConfig, outcome: Outcome) -> None:
    """The page of a run that learned a task. What fails is said and costs nothing."""
    if config.stage != "finetune" and config.objective.kind in ("causal", "masked"):
        return
    from trainer.report.task import write

    try:
        write(files, config.name, outcome.message)
    except Exception as error:  # noqa: BLE001 - telling must never stop a run
        print(f"{files.report} could not be written: {error!r}", file=sys.stderr, flush=True)


def take_over(files: RunFiles, ranks: Ranks) -> RunFence:
    """Begin a start of the run: rank 0 takes the next number and tells it to all. A collective.

    Raises:
        RunDirectoryError: on all ranks; rank 0 could not.
    """
    import torch.distributed as dist

    from trainer.telemetry.ledger import last_start

    box: list[tuple[int, str] | str] = [""]
    if ranks.is_first:
        try:
            begun = begin(files, after=last_start(files.ledger))
            box = [(begun.number, begun.run)]
        except RunDirectoryError as error:
            box = [str(error)]
    dist.broadcast_object_list(box, src=0)
    if isinstance(box[0], str):
        raise RunDirectoryError(box[0])
    return RunFence(files, *box[0])


def orderly(exit_code: int) -> int:
    """Exit code of a rank whose run ended in order on all ranks, and whose outcome is written."""
    return ExitCode.COMPLETED if SUPERVISED in os.environ else exit_code


def settle(config: RunConfig) -> tuple[Device, Precision]:
    """What `auto` means on this node.

    Raises:
        LaunchError: GPUs are asked for and there is not one for each rank.
    """
    if config.cluster.device == "cpu":
        return "cpu", choose_precision(config, "cpu", has_bf16=False)
    import torch

    num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    device = choose_device(config, num_gpus)
    wanted = int(os.environ.get("LOCAL_WORLD_SIZE", config.cluster.ranks_per_node))
    if device == "cuda" and num_gpus < wanted:
        raise LaunchError(f"{wanted} ranks on this node need a GPU each, and there are {num_gpus}; lower the ranks")
    return device, choose_precision(config, device, device == "cuda" and torch.cuda.is_bf16_supported())


def set_threads(files: RunFiles, config: RunConfig) -> None:
    """Compute with as many threads as planned, whatever launcher set OMP_NUM_THREADS: sums depend on it to the bit."""
    import torch

    threads = config.cluster.threads_per_rank
    if threads is None:
        with contextlib.suppress(OSError, ValueError, LookupError):
            threads = int(json.loads(files.plan.read_text())["threads_per_rank"])
    if threads is not None:
        torch.set_num_threads(threads)


def use_cpu(files: RunFiles, config: RunConfig) -> None:
    """What a rank on CPU sets before it computes."""
    set_threads(files, config)
    keep_memory()


def keep_memory() -> None:
    """Let the C library keep what it got from the kernel: an activation as large as the last one would otherwise be
    mapped and zeroed anew, page by page, in every micro-batch. A fifth faster on CPU, for more memory held; settings
    in the environment (`MALLOC_…`, `GLIBC_TUNABLES`) stay in force."""
    if any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ):
        return
    import ctypes

    set_option = getattr(ctypes.CDLL(None), "mallopt", None)
    if set_option is not None:
        set_option(_MOST_MAPPINGS, 0)
        set_option(_TRIM_THRESHOLD, -1)


def note_end(files: RunFiles, outcome: Outcome, fence: RunFence | None = None) -> bool:
    """Write `outcome.json` unless this start already has one: the first rank to fail knows best. What an older start
    left there is replaced.

    Args:
        fence: of this start; None: it has no number yet.

    Returns:
        Whether it was written.

    Raises:
        SupersededError: the outcome of the run is a newer start's.
    """
    partial = files.root / f".outcome.{os.getpid()}"
    try:
        if fence is not None:
            fence.check()
            outcome = replace(outcome, start=fence.number)
        partial.write_text(json.dumps(asdict(outcome), indent=1))
        try:
            os.link(partial, files.outcome)
        except FileExistsError:
            if _start_that_noted(files.outcome) >= outcome.start:
                return False
            partial.replace(files.outcome)
    except OSError:
        return False
    finally:
        partial.unlink(missing_ok=True)
    return True


def _start_that_noted(path: Path) -> int:
    try:
        return int(json.loads(path.read_text())["start"])
    except (OSError, ValueError, LookupError, TypeError):
        return 0


def newest_checkpoint(files: RunFiles) -> str | None:
    """Of a run that has ended early, relative to its directory."""
    from trainer.checkpoint.manifest import name_of
    from trainer.checkpoint.store import committed_steps

    steps = committed_steps(files.checkpoints)
    return f"checkpoints/{name_of(steps[-1])}" if steps else None


def quieten() -> None:
    """Keep other libraries' chatter off the console; their warnings and errors stay."""
    import logging

    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "warning")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # bars of several ranks overwrite each other and the display
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "warning")
    # DeepSpeed calls what torch 2.13 has renamed
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # what a pretrained model lacks is said by `trainer.model.build`, in one line
    reports = logging.getLogger("transformers.modeling_utils")
    reports.addFilter(lambda record: "LOAD REPORT" not in record.getMessage())


if __name__ == "__main__":
    code = main(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    # all is written and closed; threads of torch and gloo that are still alive could abort an ordinary exit
    os._exit(code)
