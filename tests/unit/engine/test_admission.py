"""What a saved state may put into a live engine, judged on numbers and tensors alone."""

import copy
import json
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.engine.admission import admit, restored_hyperparameters
from trainer.errors import CheckpointError

LIVE = {
    "params": [object()],
    "lr": 0.1,
    "betas": (0.9, 0.95),
    "eps": 1e-8,
    "weight_decay": 0,
    "amsgrad": False,
    "name": "decay",
    "fused": True,
    "foreach": None,
}
NUMBERS: dict[str, Any] = {
    "stage": 2,
    "flats": [{"num_elements": 4, "group": 0, "tensors": ["master", "exp_avg"]}],
    "scalars": {"0": {"step": 3.0}},
    "groups": [{key: value for key, value in LIVE.items() if key not in ("params", "foreach")}],
    "loss_scaler": {"cur_scale": 1.0},
    "counters": {"micro_steps": 6},
    "accumulation": 2,
}
TENSORS = {
    "flat.0.master": torch.ones(4),
    "flat.0.exp_avg": torch.ones(4),
    "buffer.table": torch.ones(2, 3, dtype=torch.int64),
}


def judge(tensors: dict[str, torch.Tensor], numbers: dict[str, Any]) -> None:
    admit(
        tensors,
        json.loads(json.dumps(numbers)),
        expected={"stage": 2},
        flats=[torch.zeros(4)],
        flat_groups=[0],
        known=[set()],
        buffers={"table": torch.zeros(2, 3, dtype=torch.int64)},
        groups=[LIVE],
        counters=("micro_steps",),
    )


def test_what_was_read_is_admitted() -> None:
    judge(TENSORS, NUMBERS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stage": 3}, "another ZeRO stage"),
        ({"flats": [{"num_elements": 5, "group": 0, "tensors": []}]}, "another ZeRO stage"),
        ({"flats": [{"num_elements": 4, "group": 1, "tensors": []}]}, "another ZeRO stage"),
        ({"accumulation": 0}, "the accumulation 0"),
        ({"accumulation": "2"}, "the accumulation '2'"),
        ({"groups": []}, "has 0 optimizer groups and this start has 1"),
        ({"groups": [{"lr": 0.1}]}, "lacks the hyperparameter 'betas'"),
        ({"scalars": {"0": {"exp_avg": 1.0}}}, "the optimizer state 'exp_avg'"),
        ({"scalars": {"0": {"step": [1]}}}, "the optimizer state 'step'"),
        ({"counters": {}}, "the counters"),
    ],
)
def test_numbers_that_do_not_belong_are_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        judge(TENSORS, NUMBERS | change)


@pytest.mark.parametrize("name", ["scalars", "groups", "loss_scaler", "counters", "accumulation", "flats", "stage"])
def test_numbers_that_are_missing_are_named(name: str) -> None:
    with pytest.raises(CheckpointError, match=f"lack '{name}'"):
        judge(TENSORS, {key: value for key, value in NUMBERS.items() if key != name})


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("flat.0.master", torch.ones(5), "'flat.0.master' .* does not fit"),
        ("flat.0.exp_avg", torch.ones(4, dtype=torch.bfloat16), "'flat.0.exp_avg' .torch.bfloat16"),
        ("buffer.table", torch.ones(3, 2, dtype=torch.int64), "'buffer.table' .* does not fit"),
        ("flat.1.master", torch.ones(4), "the tensor 'flat.1.master'"),
        ("flat.0.step", torch.ones(4), "the tensor 'flat.0.step'"),
        ("weights", torch.ones(4), "the tensor 'weights'"),
    ],
)
def test_tensors_that_do_not_belong_are_named(name: str, tensor: torch.Tensor, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        judge(TENSORS | {name: tensor}, NUMBERS)


@pytest.mark.parametrize("name", ["flat.0.master", "buffer.table"])
def test_tensors_that_are_missing_are_named(name: str) -> None:
    with pytest.raises(CheckpointError, match=f"lacks the tensor '{name}'"):
        judge({key: value for key, value in TENSORS.items() if key != name}, NUMBERS)


CPU_ADAM = {"lr": 0.2, "betas": (0.8, 0.9), "eps": 1e-8, "weight_decay": 0.1, "amsgrad": False, "name": "decay"}
TORCH_ADAM = CPU_ADAM | {"maximize": False, "fused": True, "foreach": None, "decoupled_weight_decay": True}


def test_implementations_of_adam_go_on_with_each_other() -> None:
    cpu = CPU_ADAM | {"bias_correction": True}
    for ours, saved in ((cpu, TORCH_ADAM), (TORCH_ADAM, cpu)):
        assert restored_hyperparameters({"params": [], **ours, "lr": 0.0}, saved) == CPU_ADAM
    with pytest.raises(CheckpointError, match="the hyperparameter 'maximize' = True"):
        restored_hyperparameters(cpu, TORCH_ADAM | {"maximize": True})
    with pytest.raises(CheckpointError, match="lacks the hyperparameter 'maximize'"):
        restored_hyperparameters(TORCH_ADAM | {"maximize": True}, cpu)


VALUES = (
    st.none()
    | st.booleans()
    | st.text()
    | st.floats()
    | st.lists(st.floats(), max_size=3)
    | st.dictionaries(st.text(), st.integers(), max_size=1)
)


@settings(deadline=None)
@given(key=st.sampled_from(sorted(LIVE)) | st.text(max_size=12), value=VALUES)
def test_a_group_gets_known_names_and_kinds_only(key: str, value: Any) -> None:
    saved = copy.deepcopy(NUMBERS["groups"][0]) | {key: value}
    try:
        restored = restored_hyperparameters(LIVE, saved)
    except CheckpointError:
        return
    assert restored.keys() <= LIVE.keys() - {"params", "fused", "foreach"}
    for name, given_ in restored.items():
        live = LIVE[name]
        number = isinstance(live, int | float) and not isinstance(live, bool)
        assert type(given_) in (int, float) if number else type(given_) is type(live)
