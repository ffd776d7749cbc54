"""The promises, bit for bit, in every ZeRO stage, and what all ranks saw of it, on real text and through the real loop.

Transient faults leave the bits of the clean run. After poisoned data the bits are those of a run from whose data the
quarantined batches were left out from the start.
"""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pool import RankPool

from trainer.config.files import RunFiles
from trainer.config.schema import RunConfig
from trainer.engine.ranks import Ranks
from trainer.faults import parse_fault
from trainer.faults.catalogue import random_faults
from trainer.stages.build import Setting
from trainer.stages.exercise import exercise, rungs
from trainer.stages.prepare import open_run, prepare_run
from trainer.stop import StopRequest

STEPS = 34
SENTENCES = (
    "the trim tab is a small surface on a rudder",
    "a large ship is kept on course by a small force",
    "every gradient is looked at before it is applied",
    "what was never seen cannot be learned from",
)


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory whose data and model are ready."""
    root = tmp_path_factory.mktemp("drill")
    texts = root / "texts"
    texts.mkdir()
    for index in range(60):
        lines = random.Random(index).choices(SENTENCES, k=12)
        (texts / f"{index:02d}.txt").write_text("\n".join(lines))
    files = RunFiles(root / "run")
    files.root.mkdir()
    prepare_run(files, make_config(root))
    return root


def make_config(root: Path, stage: int = 2, **sections: Any) -> RunConfig:
    options: dict[str, Any] = {
        "name": "drill",
        "seed": 3,
        "precision": "fp32",
        "data": {
            "sources": [{"files": [str(root / "texts/*.txt")]}],
            "tokenizer": {"train": {"vocabulary": 300}},
            "sequence_length": 32,
            "held_out": 0.1,
            "prepared": str(root / "data"),
            "clean": {"near_duplicates": None},
        },
        "model": {
            "config": {
                "model_type": "gpt2",
                "n_embd": 32,
                "n_layer": 2,
                "n_head": 2,
                "n_positions": 32,
                "resid_pdrop": 0.1,
            }
        },
        "batch": {"samples": 8, "micro": 4},
        "optim": {"lr": 8e-3},
        "schedule": {"duration": STEPS, "warmup": 5},
        "zero": {"stage": stage},
        "guard": {"cool": 1.0, "verify": 5, "checksum_every": 1},
        "snapshots": {"every": 5, "keep": 4},
        "evaluation": {"every": None},
        "checkpoint": {"every": None},
        "telemetry": {"tensorboard": False, "console": "quiet", "weights_every": 10},
        "cluster": {"device": "cpu"},
    }
    for name, value in sections.items():
        options[name] = {**options[name], **value}
    return RunConfig.model_validate_json(json.dumps(options))


def runs(rank: int, world_size: int, config: RunConfig, root: Path, sentences: list[list[str]], reference: bool) -> Any:
    """A run for each list of faults and, with `reference`, one for each without what was quarantined in it."""
    files = RunFiles(root / "run")
    data, facts = open_run(files, config)
    setting = Setting(files, config, Ranks(rank, world_size, rank), "cpu", "fp32", data, facts, StopRequest())
    told = []
    for index, faults in enumerate(sentences):
        run = exercise(setting, [parse_fault(fault) for fault in faults], name=f"{world_size}-{index}")
        excluded = None
        if reference and run.quarantine:
            data = config.data.model_copy(update={"exclude_batches": run.quarantine})
            without = replace(setting, config=config.model_copy(update={"data": data}))
            excluded = exercise(without, name=f"{world_size}-excluded").digest
        told.append(
            {
                "ended": run.ended,
                "message": run.message,
                "digest": run.digest,
                "excluded": excluded,
                "quarantine": run.quarantine,
                "rungs": rungs(run),
                "struck": run.struck,
                "lost": run.lost,
                "loss": run.held_out_loss,
                "decisions": run.decisions(),
            }
        )
    return told


def together(pool: RankPool, **arguments: Any) -> list[dict[str, Any]]:
    """What rank 0 tells, after a look at whether the others tell the same."""
    of_ranks = pool(runs, **arguments)
    for other in of_ranks[1:]:
        assert other == of_ranks[0]
    result: list[dict[str, Any]] = of_ranks[0]
    return result


TRANSIENT = {
    "at(step=24, rank=1).gradient_is_nan()": ("replay",),
    "at(step=24, rank=1).gradient_times(1000)": ("replay",),
    "at(step=24).flip_bit_in_gradient()": ("replay",),
    "at(step=24).flip_bit_in_weight()": ("rollback",),
    "at(step=24).flip_bit_in_moment()": ("rollback",),
    "at(step=24).flip_bit_in_second_moment()": ("rollback",),
    "at(step=24, rank=1).flip_bit_in_replica()": ("rollback",),
    "at(step=24, rank=1).disagree()": ("rollback",),
    "at(step=24).learning_rate_times(30, steps=3)": ("rollback",),
    "all_of(at(step=24).flip_bit_in_weight(), at(step=22, rank=1, visit=2).gradient_is_nan())": ("rollback", "replay"),
    "all_of(at(step=12).corrupt_snapshot(), at(step=24).flip_bit_in_weight())": ("rollback",),
}


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_transient_fault_never_happened(two_ranks: RankPool, prepared: Path, stage: int) -> None:
    faults = [fault for fault in TRANSIENT if stage < 3 or "replica" not in fault]
    clean, *others = together(
        two_ranks,
        config=make_config(prepared, stage),
        root=prepared,
        sentences=[[], *([fault] for fault in faults)],
        reference=False,
    )
    assert clean["rungs"] == ()
    for fault, found in zip(faults, others, strict=True):
        assert found["ended"] == "completed", (fault, found["message"])
        assert found["struck"] is not None, fault
        assert found["quarantine"] == (), fault
        assert set(TRANSIENT[fault]) <= set(found["rungs"]), (fault, found["rungs"])
        assert found["digest"] == clean["digest"], fault


def test_a_bit_in_a_gradient_that_all_ranks_hold_alike_is_found_on_each(four_ranks: RankPool, prepared: Path) -> None:
    """ZeRO 0: each parameter's norm is told by one rank, but the flip may be in the memory of another."""
    flips = ", ".join(f"at(step={12 + 3 * rank}, rank={rank}).flip_bit_in_gradient()" for rank in range(4))
    clean, flipped = together(
        four_ranks,
        config=make_config(prepared, 0, batch={"micro": 2}),
        root=prepared,
        sentences=[[], [f"all_of({flips})"]],
        reference=False,
    )
    assert flipped["rungs"] == ("replay",)
    assert flipped["lost"] == 4
    assert flipped["digest"] == clean["digest"]


DATA = {
    "at(batch=26).data_is_nan()": 1,
    "batches(26, 28).random_tokens()": 3,
}


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_bad_data_was_never_seen(two_ranks: RankPool, prepared: Path, stage: int) -> None:
    found = together(
        two_ranks,
        config=make_config(prepared, stage),
        root=prepared,
        sentences=[[fault] for fault in DATA],
        reference=True,
    )
    for (fault, count), each in zip(DATA.items(), found, strict=True):
        assert each["ended"] == "completed", (fault, each["message"])
        left_out = {index for first, last in each["quarantine"] for index in range(first, last + 1)}
        assert left_out >= set(range(26, 26 + count)), (fault, each["quarantine"], each["rungs"])
        assert each["digest"] == each["excluded"], fault


def test_a_soak_in_random_faults_keeps_the_ranks_together(four_ranks: RankPool, prepared: Path) -> None:
    config = make_config(prepared, 2, schedule={"duration": 72}, batch={"micro": 2}, guard={"max_incidents": 1000})
    faults = [str(fault) for fault in random_faults(9, 72, 4, 2, every=10)]
    (found,) = together(four_ranks, config=config, root=prepared, sentences=[faults], reference=False)
    assert found["ended"] == "completed", found["message"]
    assert {"replay", "skip", "rollback"} <= set(found["rungs"])
    assert found["lost"] > len(faults)
