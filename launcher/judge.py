"""Where the guard would have acted on a saved loss curve."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rich.table import Table
from rich.text import Text

from launcher.curve import Curve
from trainer.stability.replay import Action, judge_curve

_STYLES = {"leave out": "yellow", "roll back": "bold red", "accept level": "cyan"}


def judge(curve: Curve, spike: float, drift: float) -> list[Action]:
    """What the guard would have done, in the order of the curve. `spike`, `drift`: `guard.spike`, `guard.drift`."""
    return judge_curve(curve.losses, curve.grad_norms, curve.steps, spike=spike, drift=drift)


def summary(curve: Curve, actions: Sequence[Action]) -> str:
    """One sentence about what was judged, and how it came out."""
    what = "loss and gradient norm" if curve.grad_norms is not None else "loss alone"
    span = f"steps {min(curve.steps)} to {max(curve.steps)}"
    outcome = "would not have acted" if not actions else f"would have acted {_times(len(actions))}"
    return f"{curve.source}: {len(curve.losses)} values ({what}), {span}; the guard {outcome}"


def table(actions: Sequence[Action]) -> Table:
    """The actions as a table."""
    result = Table(box=None, header_style="bold", pad_edge=False)
    result.add_column("step", justify="right", no_wrap=True)
    result.add_column("action", no_wrap=True)
    result.add_column("score", justify="right", no_wrap=True)
    result.add_column("why", overflow="fold")
    for action in actions:
        since = f", since step {action.since_step}" if action.since_step != action.step else ""
        score = "–" if math.isnan(action.score) else f"{action.score:.1f}"
        result.add_row(
            Text(str(action.step)),
            Text(action.action, style=_STYLES.get(action.action, "")),
            Text("not finite" if math.isinf(action.score) else score),
            Text(f"{action.text}{since}"),
        )
    return result


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count} times"
