"""The drill's faults: possible where they are offered, in the run, named, chosen by name or by sentence."""

from __future__ import annotations

import pytest

from trainer.errors import ConfigError
from trainer.faults import Kind, parse_fault
from trainer.faults.catalogue import MIN_STEPS, catalogue, choose, process_catalogue, random_faults, save_every
from trainer.faults.sentence import OF_PROCESS


@pytest.mark.parametrize("steps", [MIN_STEPS, 80, 1000])
@pytest.mark.parametrize(("ranks", "stage"), [(1, 0), (2, 3), (4, 2)])
@pytest.mark.parametrize("before", [0, 100])
def test_every_fault_can_happen_in_the_run(steps: int, ranks: int, stage: int, before: int) -> None:
    exercises = catalogue(steps, ranks, stage, before, with_teacher=stage == 2)
    assert len({exercise.name for exercise in exercises}) == len(exercises)
    for exercise in exercises:
        assert parse_fault(str(exercise.fault)) == exercise.fault
        for strike in exercise.fault.strikes:
            assert before < strike.first <= (strike.last or 0) < before + steps - 10
            assert strike.rank is None or strike.rank < ranks
    kinds = {strike.kind for exercise in exercises for strike in exercise.fault.strikes}
    assert (Kind.FLIP_BIT_IN_REPLICA in kinds) == (ranks > 1 and stage < 3)
    assert (Kind.DISAGREE in kinds) == (ranks > 1)
    assert (Kind.FLIP_BIT_IN_TEACHER in kinds) == (stage == 2)
    assert kinds >= set(Kind) - OF_PROCESS - {Kind.FLIP_BIT_IN_REPLICA, Kind.DISAGREE, Kind.FLIP_BIT_IN_TEACHER}
    assert not any(exercise.of_processes for exercise in exercises)


@pytest.mark.parametrize("steps", [MIN_STEPS, 60, 61, 1000])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_every_fault_of_the_processes_strikes_between_two_checkpoints(steps: int, ranks: int) -> None:
    exercises = process_catalogue(steps, ranks)
    every = save_every(steps)
    assert len({exercise.name for exercise in exercises}) == len(exercises)
    assert {kind for exercise in exercises for kind in exercise.fault.kinds} == OF_PROCESS
    for exercise in exercises:
        assert exercise.of_processes
        assert parse_fault(str(exercise.fault)) == exercise.fault
        (strike,) = exercise.fault.strikes
        assert strike.first - 1 > 3 * every, "two checkpoints lie before it, so that the older one can be used"
        assert (strike.first - 1) % every != 0
        assert (strike.last or 0) < steps - every, "what could not be saved meanwhile is saved afterwards"
        assert strike.rank is None or strike.rank < ranks


def test_what_is_asked_to_end_is_to_stop() -> None:
    chosen = choose(process_catalogue(60, 2), ["warn", "at(step=3).terminate()", "at(step=3).kill()"])
    assert [(exercise.ends, exercise.of_processes) for exercise in chosen] == [
        ("stopped", True),
        ("stopped", True),
        ("completed", True),
    ]


def test_faults_are_chosen_by_name_and_by_sentence() -> None:
    exercises = catalogue(80, 2, 2)
    assert choose(exercises, []) == exercises
    sentence = "batches(3, 5).one_token()"
    chosen = choose(exercises, ["drift,weight-bit", sentence])
    assert [exercise.name for exercise in chosen] == ["drift", "weight-bit", sentence]
    assert chosen[2].fault == parse_fault(sentence)


def test_what_is_no_fault_is_said_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        choose(catalogue(80, 2, 3), ["weight-bits", "replica-bit", "at(step=3).nothing()", "drift"])
    text = str(caught.value)
    assert "has 3 problems" in text
    assert "did you mean weight-bit?" in text
    assert "'replica-bit' is no fault that can happen here" in text
    assert "'nothing' is not known here" in text


def test_random_faults_depend_on_the_seed_alone() -> None:
    first, again, other = (random_faults(seed, 1000, 4, 2) for seed in (1, 1, 2))
    assert first == again != other
    assert len(first) == len(range(25, 975, 25))
    assert {strike.kind for fault in first for strike in fault.strikes} >= {Kind.RANDOM_TOKENS, Kind.FLIP_BIT_IN_WEIGHT}
