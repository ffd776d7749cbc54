"""A run on this machine from beginning to end: data, ranks, export; and the run that it is compared with."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from launcher import comparison, local, start, words
from trainer.errors import ExitCode

if TYPE_CHECKING:
    from rich.console import RenderableType

Outcome = dict[str, Any]
Say = Callable[[str], None]
Show = Callable[["str | RenderableType"], None]
"""For the results, where what is said beside them is not."""


@dataclass(frozen=True, slots=True)
class Ended:
    """How a run ended."""

    outcome: Outcome
    before: bool = False
    """It was complete already."""


def run(
    request: start.Request,
    say: Say,
    show: Show,
    *,
    fresh: bool = False,
    exported: bool = False,
    requests: local.Requests | None = None,
) -> Ended:
    """Train, export, show how it ended, and after a distillation with `distill.compare` do the same without a teacher
    and show both beside each other. What was done before is left.

    Args:
        fresh: begin anew; what an earlier run left is moved aside.
        exported: whether it counts as complete only with its export.
        requests: to stop; held back by the caller for longer than this lasts.

    Returns:
        How the run ended; if that was well, how the one that it is compared with did.

    Raises:
        TrimtabError: it cannot be started.
        SystemExit: preparing failed, and has said why.
    """
    if not comparison.is_wanted(request.config):
        return _run(request, say, show, fresh, exported, requests)
    plain = comparison.plain(request)
    if fresh:
        start.put_aside(plain.root, say)
    with contextlib.ExitStack() as stack:
        requests = requests or stack.enter_context(local.Requests())
        ended = _run(request, say, show, fresh, exported, requests)
        if ended.outcome["reason"] != "completed":
            return ended
        if (stop := requests.wait(0)) is not None:
            return Ended(_stopped(f"stopped by {local.words_of(stop)} before the comparison; the same command goes on"))
        say(f"distill.compare: the same student on the same tokens without the teacher, in {plain.root}")
        beside = _run(plain, say, show, False, False, requests)
    if beside.outcome["reason"] != "completed":
        say("the comparison is still to be made: the same command goes on with it")
        return beside
    found = comparison.compare(request, plain)
    comparison.write(request.root, found)
    show(comparison.table(found))
    return Ended(ended.outcome, ended.before and beside.before)


def _run(
    request: start.Request, say: Say, show: Show, fresh: bool, exported: bool, requests: local.Requests | None
) -> Ended:
    root = request.root
    earlier = None if fresh else start.completed_before(root)
    if earlier is None:
        start.require_startable(request.config)
    with start.entered(request, fresh, say) as lock:
        if earlier is None:
            plan = start.make_ready(request, lock, say, requests)
            outcome = start.train(request, plan, lock, say, requests)
        else:
            outcome = earlier
        wanted = exported if earlier is not None else outcome["reason"] == "completed"
        failed = wanted and not start.is_exported(root) and start.export(root, requests=requests) != 0
    if failed:
        say(f"the run is complete, but was not exported; see above, then: trimtab export {root}")
    show(words.closing(root, outcome))
    if failed and exported:
        return Ended({"reason": "crashed", "exit_code": int(ExitCode.CRASHED), "message": "it was not exported"})
    return Ended(outcome, before=earlier is not None)


def _stopped(message: str) -> Outcome:
    return {"reason": "stopped", "exit_code": int(ExitCode.STOPPED), "message": message}
