"""What every rank of a drill runs: `accelerate launch … -m trainer.drill RUN`."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from trainer.__main__ import quieten, settle, use_cpu
from trainer.config.files import RunFiles
from trainer.config.load import read_run_config
from trainer.errors import SUPERVISED, ExitCode, TrimtabError
from trainer.faults.catalogue import REPORT, REQUEST, catalogue, choose
from trainer.stop import StopRequest


def main(arguments: Sequence[str]) -> int:
    """Run this rank of the drill in the prepared directory RUN; the exit code of the process.

    RUN/request.json says which faults; rank 0 writes RUN/drill.json.
    """
    if len(arguments) != 1:
        print("name the directory of a drill: accelerate launch … -m trainer.drill RUN", file=sys.stderr)
        return ExitCode.USAGE
    files = RunFiles(Path(arguments[0]).absolute())
    try:
        return _drill(files)
    except TrimtabError as error:
        print(error, file=sys.stderr, flush=True)
        return error.exit_code


def _drill(files: RunFiles) -> int:
    quieten()
    config = read_run_config(files.root)
    request = json.loads((files.root / REQUEST).read_text(encoding="utf-8"))
    device, precision = settle(config)
    from trainer.engine.ranks import join, leave

    ranks = join(device)
    if device == "cpu":
        use_cpu(files, config)
    from trainer.stages.build import Setting
    from trainer.stages.drill import drill
    from trainer.stages.prepare import open_run, write_whole

    prepared, facts = open_run(files, config)
    setting = Setting(files, config, ranks, device, precision, prepared, facts, StopRequest())
    before, steps = request["before"], request["steps"]
    taught = config.distill is not None and config.distill.teacher.is_here
    every = catalogue(steps, ranks.world_size, config.zero.stage, before, with_teacher=taught)
    exercises = choose(every, request["faults"])
    clean, results = drill(setting, exercises, before=before, show=ranks.is_first)
    if ranks.is_first:
        report = {
            "before": before,
            "steps": steps,
            "ranks": ranks.world_size,
            "stage": config.zero.stage,
            "clean": {
                "held_out_loss": clean.held_out_loss,
                "seconds": clean.seconds,
                "alarms": [str(alarm.verdict) for alarm in clean.alarms],
            },
            "results": [asdict(result) for result in results],
        }
        write_whole(files.root / REPORT, json.dumps(report, indent=1, ensure_ascii=False))
    leave()
    passed = not clean.alarms and all(result.passed for result in results)
    return ExitCode.COMPLETED if passed or SUPERVISED in os.environ else ExitCode.CRASHED


if __name__ == "__main__":
    code = main(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    # all is written and closed; threads of torch and gloo that are still alive could abort an ordinary exit
    os._exit(code)
