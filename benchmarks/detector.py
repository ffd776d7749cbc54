"""Our detector beside the rules of other trainers, on curves of real small runs: false alarms, delay, misses.

    python benchmarks/detector.py [--markdown] [--each]
    python benchmarks/detector.py --generate DIR        train the runs again (some ten minutes on one core)

Every rule sees the same stored curves (`benchmarks/ledgers`, see `ledgers.py`), step by step. A curve does not change
with what a rule does about it: this measures who notices what, and when. `benchmarks/recovery.py` measures what it is
good for.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import linear_regression, median

from ledgers import FOLDER, Curve, read, recipes, write
from rules import RULES, Rule

from trainer.config.guard import GuardConfig
from trainer.stability.watch import Watch

OURS = "Trimtab"
RAMP = 0.002
"""Of the log loss, a step: the slow drift that must be noticed within 40. As a *rise* it is what the loss does; as a
*ramp* it is what is added to a loss that goes on falling by itself."""
RAMP_STARTS = (250, 350)
WITHIN = {"sudden": 20, "own": 50, "drift": 100}
"""Steps from the onset within which an alarm is not a miss."""
EARLY = 20
"""Steps that an alarm may come before the *estimated* onset of a run that breaks by itself."""
ROLLBACK_SPIKES = 3
CALM = 0.04
"""Noise of the log loss below which a rise of 0.08 in 40 steps is over two standard deviations of one step."""


@dataclass(frozen=True)
class Noticed:
    """Steps (from 1) of a curve that a rule alarmed at, and those at which it would have gone back or stopped."""

    alarms: tuple[int, ...]
    acts: tuple[int, ...]


def watch(losses: Sequence[float], norms: Sequence[float]) -> Noticed:
    """Ours, as the guard drives it: what alarms is left out of the history, until a new level is plain.

    Three spikes in a row or a drift would lead to a rollback; one that goes on counts once.
    """
    settings = GuardConfig()
    detector = Watch(spike=settings.spike, drift=settings.drift)
    alarms: list[int] = []
    acts: list[int] = []
    spikes, acting = 0, False
    for step, (loss, norm) in enumerate(zip(losses, norms, strict=True), start=1):
        found = detector.look(step, loss, norm)
        if not found:
            detector.accept(step, loss, norm)
            spikes, acting = 0, False
            continue
        alarms.append(step)
        detector.reject(step, loss, norm)
        drifts = any(alarm.kind == "drift" for alarm in found)
        spikes += 1
        if not acting and (drifts or spikes >= ROLLBACK_SPIKES):
            acts.append(step)
            acting = True
        if detector.new_level:
            detector.accept_level()
            spikes, acting = 0, False
    return Noticed(tuple(alarms), tuple(acts))


def follow(rule: Rule, losses: Sequence[float], norms: Sequence[float]) -> Noticed:
    """Another rule. It acts where it stops the run; a stopped run goes on here as if it had been started again."""
    alarms, acts = [], []
    for step, (loss, norm) in enumerate(zip(losses, norms, strict=True), start=1):
        verdict = rule.judge(loss, norm)
        if rule.alarmed:
            alarms.append(step)
        if verdict == "stop":
            acts.append(step)
    return Noticed(tuple(alarms), tuple(acts))


def judges() -> dict[str, Callable[[Sequence[float], Sequence[float]], Noticed]]:
    """Ours and the others, by name."""

    def other(name: str) -> Callable[[Sequence[float], Sequence[float]], Noticed]:
        return lambda losses, norms: follow(RULES[name](total_steps=len(losses)), losses, norms)

    return {OURS: watch} | {name: other(name) for name in RULES if name != "clipping alone"}


@dataclass(frozen=True)
class Case:
    """What a rule made of one curve with something to find. `delay` None: missed."""

    curve: str
    kind: str
    delay: int | None
    noise: float = math.nan
    """Of the log loss; only of ramps."""


@dataclass(frozen=True)
class Measured:
    clean_steps: int
    false_alarms: int
    false_acts: int
    where: tuple[tuple[str, int], ...]
    """(curve, step) of each false alarm."""
    cases: tuple[Case, ...]


def measure(judge: Callable[[Sequence[float], Sequence[float]], Noticed], curves: Iterable[Curve]) -> Measured:
    """One rule on all curves. What comes before the onset of an injected fault is clean, too."""
    clean_steps, false_acts = 0, 0
    where: list[tuple[str, int]] = []
    cases: list[Case] = []
    for curve in curves:
        recipe = curve.recipe
        noticed = judge(curve.losses, curve.norms)
        if recipe.kind in ("clean", "sudden", "drift"):
            clean = (recipe.onset or len(curve.losses) + 1) - 1
            clean_steps += clean
            where += [(recipe.name, step) for step in noticed.alarms if step <= clean]
            false_acts += sum(step <= clean for step in noticed.acts)
        if recipe.kind in ("sudden", "own", "drift") and recipe.onset is not None and recipe.shown is not None:
            first = recipe.onset - (EARLY if recipe.kind == "own" else 0)
            cases.append(Case(recipe.name, recipe.kind, _delay(noticed, first, recipe.shown, WITHIN[recipe.kind])))
        if recipe.kind == "clean":
            for start in RAMP_STARTS:
                for kind, rate in (("rise", RAMP - fall(curve.losses, start)), ("ramp", RAMP)):
                    found = judge(ramp(curve.losses, start, rate), curve.norms)
                    # what it also says without the ramp was not said because of it
                    because = Noticed(tuple(sorted(set(found.alarms) - set(noticed.alarms))), ())
                    delay = _delay(because, start, start, WITHIN["drift"])
                    cases.append(Case(f"{recipe.name}, {kind} from {start}", kind, delay, noise(curve.losses)))
    return Measured(clean_steps, len(where), false_acts, tuple(where), tuple(cases))


def ramp(losses: Sequence[float], start: int, rate: float) -> list[float]:
    """The curve with its log loss raised by `rate` a step from step `start` on."""
    return [loss * math.exp(rate * max(0, step - start + 1)) for step, loss in enumerate(losses, start=1)]


def fall(losses: Sequence[float], around: int, width: int = 75) -> float:
    """Least-squares slope of the log loss, in the steps around one; 0 where it does not fall."""
    logs = [math.log(loss) for loss in losses[around - width : around + width]]
    return min(0.0, linear_regression(range(len(logs)), logs).slope)


def noise(losses: Sequence[float], around: int = 300, width: int = 100) -> float:
    """Standard deviation of the log loss from one step to the next, over √2."""
    logs = [math.log(loss) for loss in losses[around - width : around + width]]
    return math.sqrt(sum((b - a) ** 2 for a, b in pairwise(logs)) / (2 * (len(logs) - 1)))


def _delay(noticed: Noticed, first: int, shown: int, within: int) -> int | None:
    """Steps from `shown` to the first alarm at or after `first`; negative: before."""
    step = next((step for step in noticed.alarms if first <= step <= shown + within), None)
    return None if step is None else step - shown


def summary(results: dict[str, Measured]) -> list[list[str]]:
    """Measures down, rules across."""
    rows = [
        ["", *results],
        ["alarms in 10,000 clean steps", *(_rate(one.false_alarms, one) for one in results.values())],
        ["rollbacks or stops in 10,000 clean steps", *(_rate(one.false_acts, one) for one in results.values())],
    ]
    for kind, title in (("sudden", "sudden harm"), ("own", "breaks by itself"), ("drift", "real drift")):
        cases = [[case for case in one.cases if case.kind == kind] for one in results.values()]
        rows.append([f"{title}: missed", *map(_missed, cases)])
        rows.append(["  delay, steps", *map(_delays, cases)])
    for kind in ("rise", "ramp"):
        for noise_level, low, high in ((f"noise < {CALM}", 0.0, CALM), (f"noise ≥ {CALM}", CALM, math.inf)):
            cases = [
                [case for case in one.cases if case.kind == kind and low <= case.noise < high]
                for one in results.values()
            ]
            rows.append([f"exact {kind}, {noise_level}: missed", *map(_missed, cases)])
            rows.append(["  delay, steps", *map(_delays, cases)])
            rows.append(["  within 40", *map(_within_40, cases)])
    return rows


def _rate(count: int, measured: Measured) -> str:
    return f"{count * 10_000 / measured.clean_steps:.1f}"


def _missed(cases: list[Case]) -> str:
    return f"{sum(case.delay is None for case in cases)} of {len(cases)}"


def _within_40(cases: list[Case]) -> str:
    return f"{sum(case.delay is not None and case.delay <= 40 for case in cases)} of {len(cases)}"


def _delays(cases: list[Case]) -> str:
    delays = sorted(case.delay for case in cases if case.delay is not None)
    return f"{median(delays):g} ({delays[0]} to {delays[-1]})" if delays else "–"


def every_curve(curves: Sequence[Curve], results: dict[str, Measured]) -> list[list[str]]:
    """The delay of every rule on every curve with something to find; for debatable ones, what each said."""
    rows = [["delay in steps", *results]]
    for index, case in enumerate(next(iter(results.values())).cases):
        delays = [measured.cases[index].delay for measured in results.values()]
        rows.append([case.curve, *("missed" if delay is None else str(delay) for delay in delays)])
    rules = judges()
    for curve in curves:
        if curve.recipe.kind == "debatable":
            found = [rules[name](curve.losses, curve.norms) for name in results]
            rows.append([curve.recipe.name, *(f"{len(one.alarms)} alarms, {len(one.acts)} acts" for one in found)])
    return rows


def show(rows: list[list[str]], markdown: bool) -> None:
    header, *body = rows
    if markdown:
        for cells in [header, ["---"] * len(header), *body]:
            print("| " + " | ".join(cells) + " |")
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(*header)
    for cells in body:
        table.add_row(*cells)
    Console().print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--generate", type=Path, metavar="DIR", help="train the runs and write their curves there")
    parser.add_argument("--only", nargs="*", default=[], metavar="NAME", help="with --generate: runs named like this")
    parser.add_argument("--ledgers", type=Path, default=FOLDER, metavar="DIR", help="the curves to measure on")
    parser.add_argument("--markdown", action="store_true", help="print for a results file")
    parser.add_argument("--each", action="store_true", help="every curve too")
    arguments = parser.parse_args()
    if arguments.generate:
        chosen = [one for one in recipes() if not arguments.only or any(name in one.name for name in arguments.only)]
        write(arguments.generate, chosen)
        return
    curves = read(arguments.ledgers)
    results = {name: measure(judge, curves) for name, judge in judges().items()}
    ours = results[OURS]
    levels = sorted(noise(curve.losses) for curve in curves if curve.recipe.kind == "clean")
    print(
        f"{len(curves)} curves; {ours.clean_steps:,} clean steps; noise of the log loss "
        f"{levels[0]:.3f} to {levels[-1]:.3f}, median {median(levels):.3f}\n"
    )
    show(summary(results), arguments.markdown)
    for name, step in ours.where:
        print(f"{OURS}: false alarm on {name} at step {step}")
    if arguments.each:
        print()
        show(every_curve(curves, results), arguments.markdown)


if __name__ == "__main__":
    main()
