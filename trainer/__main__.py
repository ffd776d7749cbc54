"""What every rank runs: `accelerate launch … -m trainer RUN` (or torchrun, deepspeed, srun)."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import traceback
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from trainer.config.files import RunFiles
from trainer.config.load import read_run_config
from trainer.config.resolve import Device, Precision, choose_device, choose_precision
from trainer.config.schema import RunConfig
from trainer.errors import SUPERVISED, ExitCode, LaunchError, RunDirectoryError, RunHaltedError, TrimtabError
from trainer.records import Outcome
from trainer.stop import StopRequest


def main(arguments: Sequence[str]) -> int:
    """Run this rank of RUN to its end; the exit code of the process."""
    arguments = [argument for argument in arguments if not argument.startswith("--local_rank")]
    if len(arguments) != 1:
        print("name a run directory: accelerate launch … -m trainer RUN", file=sys.stderr)
        return ExitCode.USAGE
    stop = StopRequest().listen()
    files = RunFiles(Path(arguments[0]).absolute())
    rank = os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0"))
    try:
        return _start(files, stop)
    except TrimtabError as error:
        reason = "halted" if isinstance(error, RunHaltedError) else "refused"
        if error.exit_code == ExitCode.CRASHED:
            reason = "crashed"
        first = note_end(files, Outcome(reason, error.exit_code, str(error), 0, 0, newest_checkpoint(files)))
        if first or (rank == "0" and not files.outcome.exists()):
            print(error, file=sys.stderr, flush=True)
        return orderly(error.exit_code) if reason == "halted" else error.exit_code
    except Exception as error:  # noqa: BLE001 - the outcome must say why, whatever it was
        text = f"rank {rank}: {type(error).__name__}: {error}"
        note_end(files, Outcome("crashed", ExitCode.CRASHED, text, 0, 0, newest_checkpoint(files)))
        print(f"rank {rank}:\n{traceback.format_exc()}", file=sys.stderr, flush=True)
        return ExitCode.CRASHED


def _start(files: RunFiles, stop: StopRequest) -> int:
    quieten()
    config = read_run_config(files.root)
    device, precision = settle(config)
    from trainer.engine.ranks import join, leave

    ranks = join(device)
    if device == "cpu":
        set_threads(files, config)
    if ranks.is_first:
        files.outcome.unlink(missing_ok=True)
    from trainer.faults.parse import parse_faults
    from trainer.stages.build import Setting
    from trainer.stages.prepare import open_run, prepare_run
    from trainer.stages.pretrain import Pretraining

    if ranks.is_first and not files.data.exists():
        prepare_run(files, config)
    import torch.distributed as dist

    dist.barrier()
    prepared, facts = open_run(files, config)
    stage = Pretraining(
        Setting(files, config, ranks, device, precision, prepared, facts, stop), parse_faults(config.faults)
    )
    try:
        ending = stage.run()
    except BaseException as error:
        outcome = stage.outcome_of(error)
        note_end(files, outcome)
        stage.telemetry.close(outcome)
        raise
    outcome = stage.outcome(ending)
    if missing := stage.telemetry.close(outcome):
        raise RunDirectoryError(f"{files.ledger} lacks records of this run: {missing}; free space on its disk")
    if ranks.is_first:
        note_end(files, outcome)
    leave()
    return orderly(outcome.exit_code)


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


def note_end(files: RunFiles, outcome: Outcome) -> bool:
    """Write `outcome.json` unless this start already has one: the first rank to fail knows best.

    Returns:
        Whether it was written.
    """
    partial = files.root / f".outcome.{os.getpid()}"
    try:
        partial.write_text(json.dumps(asdict(outcome), indent=1))
        os.link(partial, files.outcome)
    except OSError:
        return False
    finally:
        partial.unlink(missing_ok=True)
    return True


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
    os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "warning")
    # DeepSpeed calls what torch 2.13 has renamed
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)


if __name__ == "__main__":
    code = main(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    # all is written and closed; threads of torch and gloo that are still alive could abort an ordinary exit
    os._exit(code)
