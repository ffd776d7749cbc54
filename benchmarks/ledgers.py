"""The stored curves in `benchmarks/ledgers`: how each was made, what is true of it, writing and reading. No torch."""

from __future__ import annotations

import gzip
import io
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

FOLDER = Path(__file__).with_name("ledgers")

Kind = Literal["clean", "sudden", "own", "drift", "debatable"]


@dataclass(frozen=True)
class Recipe:
    """One run. `fault` is a name in `curves.FAULTS`, done before or in the steps `onset` … `onset + length - 1`."""

    name: str
    kind: Kind
    """clean; sudden or drift: by a fault; own: the run breaks by itself; debatable: neither clean nor a failure."""
    seed: int = 0
    steps: int = 500
    schedule: str = "cosine"
    warmup: int = 40
    lr: float = 3e-3
    batch: int = 16
    tokens: int = 64
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    qk_norm: bool = False
    mix: str = "code"
    fault: str | None = None
    onset: int | None = None
    length: int = 1
    strength: float = 0.0

    @property
    def shown(self) -> int | None:
        """The first step whose loss or norm can show harm: a rate that is too high shows after its update, what was
        learned by heart from one batch on the next one."""
        if self.onset is None:
            return None
        return self.onset + {"learning rate": 1, "duplicates": self.length}.get(self.fault or "", 0)


@dataclass(frozen=True)
class Curve:
    """A stored run. Of each step, before its update: the loss in nats and the norm of the gradient before clipping."""

    recipe: Recipe
    losses: tuple[float, ...]
    norms: tuple[float, ...]


def recipes() -> list[Recipe]:
    """Every run that is stored."""
    clean = [Recipe(f"clean-cosine-{seed}", "clean", seed) for seed in range(8)]
    clean += [Recipe(f"clean-constant-{seed}", "clean", seed, schedule="constant") for seed in range(10, 14)]
    clean += [Recipe(f"clean-wsd-{seed}", "clean", seed, schedule="wsd") for seed in range(20, 24)]
    clean += [Recipe(f"clean-noisy-{seed}", "clean", seed, batch=4) for seed in (30, 31)]
    clean += [Recipe(f"clean-calm-{seed}", "clean", seed, batch=64, tokens=16) for seed in (40, 41)]
    clean += [Recipe(f"clean-large-{seed}", "clean", seed, batch=64) for seed in range(70, 74)]
    clean += [Recipe(f"clean-qk-norm-{seed}", "clean", seed, qk_norm=True, schedule="wsd") for seed in (50, 51)]
    for mix in ("to prose", "to tables", "a tenth tables"):
        clean += [Recipe(f"clean-{mix.replace(' ', '-')}-{s}", "clean", s, schedule="wsd", mix=mix) for s in (60, 61)]
    faults: list[tuple[str, str, int, int, float]] = [
        ("random-1", "random tokens", 120, 1, 0),
        ("random-early", "random tokens", 45, 5, 0),
        ("random-5", "random tokens", 200, 5, 0),
        ("shuffled-1", "shuffled labels", 90, 1, 0),
        ("shuffled-5", "shuffled labels", 200, 5, 0),
        ("token-5", "one token", 200, 5, 0),
        ("gradient-early", "huge gradient", 30, 1, 1000),
        ("gradient-1000", "huge gradient", 200, 1, 1000),
        ("update-30", "huge update", 200, 1, 30),
        ("update-300", "huge update", 150, 1, 300),
        ("bit-30", "flipped bit", 200, 1, 30),
        ("bit-30-norm", "flipped bit of a norm", 200, 1, 30),
        ("rate-30", "learning rate", 200, 5, 30),
        ("rate-early", "learning rate", 70, 5, 30),
        ("duplicates", "duplicates", 150, 40, 0),
    ]
    sudden = [
        Recipe(f"sudden-{name}", "sudden", 100 + i, 260, warmup=20, fault=fault, onset=at, length=n, strength=strength)
        for i, (name, fault, at, n, strength) in enumerate(faults)
    ]
    own = [
        Recipe("own-growing-rate-200", "own", 200, 380, "growing"),
        Recipe("own-growing-rate-201", "own", 201, 380, "growing"),
        Recipe("own-growing-rate-small-eps", "own", 202, 380, "growing", betas=(0.9, 0.999), eps=1e-15),
        Recipe("own-growing-rate-qk-norm", "own", 203, 380, "growing", qk_norm=True),
    ]
    noise: dict[str, Any] = {"fault": "label noise", "onset": 300, "length": 120, "strength": 0.0006}
    drift = [Recipe(f"drift-labels-{seed}", "drift", seed, 420, **noise) for seed in (300, 301, 302)]
    drift += [Recipe("drift-labels-large", "drift", 304, 380, batch=64, **noise)]
    debatable = [
        Recipe("debatable-prose-at-once", "debatable", 400, 400, mix="prose at once", onset=201),
        Recipe("debatable-code-at-once", "debatable", 401, 400, mix="code at once", onset=201),
        Recipe("debatable-bit-25", "debatable", 402, 260, fault="flipped bit", onset=200, strength=25),
        Recipe("debatable-bit-28", "debatable", 403, 260, fault="flipped bit", onset=200, strength=28),
        Recipe("debatable-rate-0.1", "debatable", 404, 400, "constant", lr=0.1),
        Recipe("debatable-rate-1", "debatable", 204, 200, "constant", lr=1.0),
        Recipe("debatable-weights", "debatable", 303, 420, fault="weight noise", onset=300, length=120, strength=0.05),
        Recipe("debatable-small-eps", "debatable", 405, 500, "constant", lr=0.02, betas=(0.9, 0.9999), eps=1e-15),
    ]
    return [*clean, *sudden, *own, *drift, *debatable]


def first_rise(losses: Sequence[float], window: int = 20, rise: float = 0.1) -> int | None:
    """Where an instability that nobody injected begins: the first step (from 1) whose log loss is above all of the
    `window` before, and from which on the mean of ten is `rise` above the mean of that window."""
    logs = [math.log(loss) if loss > 0 and math.isfinite(loss) else 50.0 for loss in losses]
    for index in range(window, len(logs)):
        before, after = logs[index - window : index], logs[index : index + 10]
        if logs[index] > max(before) and fmean(after) > fmean(before) + rise:
            return index + 1
    return None


def write(folder: Path, chosen: Sequence[Recipe]) -> None:
    """Train every recipe; one `NAME.jsonl.gz` each, and `index.json` with all that is true of them."""
    from curves import Text, train

    folder.mkdir(parents=True, exist_ok=True)
    index = {entry["name"]: entry for entry in _index(folder)} if (folder / "index.json").exists() else {}
    text = Text()
    for recipe in chosen:
        points = train(recipe, text)
        if recipe.kind == "own":
            recipe = replace(recipe, onset=first_rise([point["loss"] for point in points]))
        packed = io.BytesIO()
        with gzip.GzipFile(fileobj=packed, mode="wb", mtime=0) as file:
            file.writelines(json.dumps(_rounded(point)).encode() + b"\n" for point in points)
        (folder / f"{recipe.name}.jsonl.gz").write_bytes(packed.getvalue())
        index[recipe.name] = asdict(recipe)
        first, last = points[0]["loss"], points[-1]["loss"]
        print(f"{recipe.name}: {len(points)} steps, loss {first:.2f} → {last:.2f}, onset {recipe.onset}", flush=True)
    lines = ",\n".join(json.dumps(entry) for entry in index.values())
    (folder / "index.json").write_text(f"[\n{lines}\n]\n", encoding="utf-8")


def read(folder: Path = FOLDER) -> list[Curve]:
    """All stored curves, in the order of the index."""
    curves = []
    for entry in _index(folder):
        recipe = Recipe(**entry | {"betas": tuple(entry["betas"])})
        with gzip.open(folder / f"{recipe.name}.jsonl.gz", "rt", encoding="utf-8") as file:
            points = [json.loads(line) for line in file]
        losses, norms = (tuple(float(point[name]) for point in points) for name in ("loss", "grad_norm"))
        curves.append(Curve(recipe, losses, norms))
    return curves


def _index(folder: Path) -> list[dict[str, Any]]:
    entries: list[dict[str, Any]] = json.loads((folder / "index.json").read_text(encoding="utf-8"))
    return entries


def _rounded(point: dict[str, float]) -> dict[str, float]:
    return {name: value if isinstance(value, int) else float(f"{value:.6g}") for name, value in point.items()}
