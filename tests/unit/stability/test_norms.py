"""What is usual for the gradient of each parameter."""

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from trainer.stability.norms import ParameterNorms

ROWS = st.lists(arrays(np.float64, 3, elements=st.floats()), max_size=8)


def test_nothing_is_known_before_the_first_step() -> None:
    norms = ParameterNorms(2)
    assert norms.usual().size == norms.growth().size == 0


def test_the_usual_norm_is_that_of_steady_steps_and_growth_names_the_one_that_grew() -> None:
    norms = ParameterNorms(2)
    for _ in range(300):
        norms.accept(np.array([0.5, 2.0]))
    assert norms.usual() == pytest.approx([0.5, 2.0])
    assert norms.growth() == pytest.approx([1.0, 1.0])
    for i in range(60):
        norms.accept(np.array([0.5, 2.0 * 1.03**i]))
    assert norms.growth()[0] == pytest.approx(1.0)
    assert norms.growth()[1] > 2.5


def test_a_parameter_without_a_gradient_keeps_what_was_known_of_it() -> None:
    norms = ParameterNorms(3)
    norms.accept(np.array([1.0, 0.0, math.inf]))
    assert norms.usual()[0] == 1.0
    assert np.isnan(norms.usual()[1:]).all()
    norms.accept(np.array([math.nan, 4.0, 1.0]))
    assert norms.usual() == pytest.approx([1.0, 4.0, 1.0])
    norms.accept(np.array([0.0, 4.0, 1.0]))
    assert norms.usual() == pytest.approx([1.0, 4.0, 1.0])


@settings(deadline=None, max_examples=60)
@given(ROWS, ROWS)
def test_any_norms_are_taken_and_a_restored_state_goes_on_the_same(before, after) -> None:
    norms, copy = ParameterNorms(3), ParameterNorms(3)
    for row in before:
        norms.accept(np.abs(row))
    copy.restore(json.loads(json.dumps(norms.state(), allow_nan=False)))
    for row in after:
        norms.accept(row)
        copy.accept(row)
    assert copy.usual().tobytes() == norms.usual().tobytes()
    assert copy.growth().tobytes() == norms.growth().tobytes()
    assert copy.fingerprint() == norms.fingerprint()
    assert not np.isinf(norms.usual()).any()


def test_another_number_of_parameters_is_refused() -> None:
    with pytest.raises(ValueError, match="2 parameters"):
        ParameterNorms(2).accept(np.ones(3))
    with pytest.raises(ValueError, match="saved averages are of 3"):
        ParameterNorms(2).restore(ParameterNorms(3).state())
