"""Faults as sentences: built, said and read again; everything else is refused in one sentence."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.errors import ConfigError
from trainer.faults import Fault, Kind, Strike, all_of, at, batches, from_batch, parse_fault, parse_faults

EVERY = {
    "at(step=40, rank=1).gradient_is_nan()": at(step=40, rank=1).gradient_is_nan(),
    "at(step=40, rank=0).gradient_times(1000)": at(step=40).gradient_times(1000),
    "at(step=2, rank=3).flip_bit_in_weight()": at(step=2, rank=3).flip_bit_in_weight(),
    "at(step=2, rank=0).flip_bit_in_moment()": at(step=2).flip_bit_in_moment(),
    "at(step=2, rank=0).flip_bit_in_second_moment()": at(step=2).flip_bit_in_second_moment(),
    "at(step=2, rank=0, visit=2).flip_bit_in_gradient()": at(step=2, visit=2).flip_bit_in_gradient(),
    "at(step=2, rank=0).flip_bit_in_replica().every_time()": at(step=2).flip_bit_in_replica().every_time(),
    "at(step=2, rank=1).flip_bit_in_teacher()": at(step=2, rank=1).flip_bit_in_teacher(),
    "at(step=2).learning_rate_times(30, steps=3)": at(step=2).learning_rate_times(30, steps=3),
    "at(step=2, rank=0).corrupt_snapshot()": at(step=2).corrupt_snapshot(),
    "at(step=2, rank=1).disagree()": at(step=2, rank=1).disagree(),
    "batches(50, 50).data_is_nan()": at(batch=50).data_is_nan(),
    "batches(50, 57).random_tokens()": batches(50, 57).random_tokens(),
    "batches(50, 57).one_token()": batches(50, 57).one_token(),
    "batches(50, 57).shuffled_labels()": batches(50, 57).shuffled_labels(),
    "from_batch(60).drift(0.02)": from_batch(60).drift(0.02),
    "at(step=2, rank=0, start=3).disagree()": at(step=2, start=3).disagree(),
    "at(step=40, rank=1).kill()": at(step=40, rank=1).kill(),
    "at(step=40).kill_everything()": at(step=40).kill_everything(),
    "at(step=40, rank=0, start=2).kill_while_saving(2)": at(step=40, start=2).kill_while_saving(),
    "at(step=40, rank=1).kill_everything_while_saving(5)": at(step=40, rank=1).kill_everything_while_saving(5),
    "at(step=40, rank=0, visit=2).stop()": at(step=40, visit=2).stop(),
    "at(step=40, rank=0).terminate()": at(step=40).terminate(),
    "at(step=40, rank=0).warn()": at(step=40).warn(),
    "at(step=40, rank=0).damage_checkpoint()": at(step=40).damage_checkpoint(),
    "at(step=40, rank=0).truncate_checkpoint()": at(step=40).truncate_checkpoint(),
    "at(step=40, rank=0).delete_checkpoint_file()": at(step=40).delete_checkpoint_file(),
    "at(step=40).disk_is_full(steps=30)": at(step=40).disk_is_full(30),
    "at(step=40).checkpoints_are_read_only(steps=3)": at(step=40).checkpoints_are_read_only(steps=3),
    "at(step=40, rank=1).data_worker_dies()": at(step=40, rank=1).data_worker_dies(),
    "at(step=40, rank=0).warn_while_saving(3)": at(step=40).warn_while_saving(3),
    "at(step=40, rank=1, start=2).slow(0.5, steps=30)": at(step=40, rank=1, start=2).slow(0.5, steps=30),
    "all_of(at(step=2, rank=0).gradient_is_nan(), batches(1, 2).one_token())": all_of(
        at(step=2).gradient_is_nan(), batches(1, 2).one_token()
    ),
}


@pytest.mark.parametrize("sentence", EVERY)
def test_a_sentence_and_its_fault(sentence: str) -> None:
    assert parse_fault(sentence) == EVERY[sentence]
    assert str(EVERY[sentence]) == sentence


def test_every_kind_has_a_sentence_here() -> None:
    assert {strike.kind for fault in EVERY.values() for strike in fault.strikes} == set(Kind)


def test_what_a_sentence_says() -> None:
    assert parse_fault(" at(step=40).learning_rate_times(30, 3) ") == Fault(
        (Strike(Kind.LEARNING_RATE_TIMES, 40, 42, None, 30.0),)
    )
    assert at(step=4).gradient_is_nan().strikes[0].rank == 0, "one rank's hardware"
    assert at(step=4).kill().strikes[0].start == 1, "the process after it has no memory of it"
    assert at(step=4).disk_is_full(30).strikes[0].last == 33
    assert at(step=4).disk_is_full(30).strikes[0].rank is None
    assert from_batch(6).one_token().strikes[0].covers(10**9)
    assert not batches(6, 8).one_token().strikes[0].covers(9)


@given(
    first=st.integers(0, 10**6),
    more=st.integers(0, 100),
    rank=st.integers(0, 1000),
    visit=st.integers(1, 9),
    start=st.none() | st.integers(1, 9),
    factor=st.floats(-1e30, 1e30),
    stays=st.booleans(),
)
def test_saying_and_reading_are_inverse(
    first: int, more: int, rank: int, visit: int, start: int | None, factor: float, stays: bool
) -> None:
    fault = all_of(
        at(step=first + 1, rank=rank, visit=visit).gradient_times(factor),
        at(step=first + 1).learning_rate_times(factor, steps=more + 1),
        batches(first, first + more).drift(0.25),
        at(step=first + 1, rank=rank, visit=visit, start=start).kill_while_saving(more + 1),
        at(step=first + 1, start=start).checkpoints_are_read_only(steps=more + 1),
    )
    fault = fault.every_time() if stays else fault
    assert parse_fault(str(fault)) == fault


@pytest.mark.parametrize(
    ("sentence", "says"),
    [
        ("", "is no sentence such as at(step=40"),
        ("at(step=4", "is no sentence"),
        ("at(step=4)", "says when and not what"),
        ("at(step=4).gradient_is_nann()", "did you mean gradient_is_nan?"),
        ("att(step=4).gradient_is_nan()", "did you mean at?"),
        ("at(step=4).gradient_is_nan", "is no part of a sentence"),
        ("at(step=4).gradient_is_nan().disagree()", "it may be every_time"),
        ("at(step=4, batch=4).gradient_is_nan()", "either step or batch"),
        ("at().gradient_is_nan()", "either step or batch"),
        ("at(4).gradient_is_nan()", "at: too many positional arguments"),
        ("at(step=0).gradient_is_nan()", "step must be a whole number of at least 1, but is 0"),
        ("at(step=4.5).gradient_is_nan()", "step must be a whole number"),
        ("at(step=4, rank=-1).gradient_is_nan()", "rank must be a whole number of at least 0, but is -1"),
        ("at(step=True).gradient_is_nan()", "'True' must be a number"),
        ("at(step=4, where=1).gradient_is_nan()", "unexpected keyword argument 'where'"),
        ("at(**4).gradient_is_nan()", "one by one"),
        ("at(step=4).gradient_times()", "missing a required argument: 'factor'"),
        ("at(step=4).learning_rate_times(3, steps=0)", "steps must be a whole number of at least 1"),
        ("at(step=4, start=0).kill()", "start must be a whole number of at least 1, but is 0"),
        ("at(step=4).kill_while_saving(0)", "moment must be a whole number of at least 1, but is 0"),
        ("at(step=4).disk_is_full()", "missing a required argument: 'steps'"),
        ("at(step=4).disk_is_full(steps=2.5)", "steps must be a whole number of at least 1, but is 2.5"),
        ("at(batch=4).kill()", "place it with at(step=…)"),
        ("at(batch=4, start=2).one_token()", "the data is the same in every start"),
        ("at(batch=4).gradient_is_nan()", "place it with at(step=…)"),
        ("at(step=4).random_tokens()", "place it with batches(first, last)"),
        ("at(batch=4, rank=1).random_tokens()", "place it with batches(first, last)"),
        ("batches(9, 4).one_token()", "is empty"),
        ("from_batch(4).drift(0)", "must lie in (0, 1]"),
        ("all_of()", "at least one fault"),
        ("all_of(at(step=4))", "says what goes wrong"),
        ("all_of(4)", "is no part of a sentence"),
        ("__import__('os').system('true')", "'__import__' is not known here"),
        ("at(step=__import__('os')).gradient_is_nan()", "must be a number"),
        ("at(step=4).__class__()", "is not known here"),
        ("(lambda: 0)()", "is no word of it"),
        ("at(step=4)[0]()", "is no word of it"),
        ("[at(step=4).disagree()]", "is no part of a sentence"),
    ],
)
def test_anything_else_is_refused_in_one_sentence(sentence: str, says: str) -> None:
    with pytest.raises(ValueError, match=r"^['\"]") as caught:
        parse_fault(sentence)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_all_problems_of_the_option_are_said_at_once() -> None:
    good = "batches(1, 2).one_token()"
    with pytest.raises(ConfigError) as caught:
        parse_faults([good, "nonsense", "at(step=4)"], "the command line")
    assert [path for path, _ in caught.value.problems] == ["faults.1", "faults.2"]
    assert parse_faults([good, good]) == (batches(1, 2).one_token(),) * 2
