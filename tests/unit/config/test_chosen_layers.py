"""What `model.layers` may say."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.config.layers import chosen_layers


@pytest.mark.parametrize(
    ("text", "layers", "chosen"),
    [
        ("0, 5, 11", 12, (0, 5, 11)),
        ("3", 4, (3,)),
        (" first : 2 ", 4, (0, 1)),
        ("last:2", 4, (2, 3)),
        ("every:2", 12, (0, 2, 4, 6, 8, 10)),
        ("every:3", 10, (0, 3, 6, 9)),
        ("every:99", 3, (0,)),
        ("spread:2", 12, (0, 11)),
        ("spread:3", 12, (0, 6, 11)),
        ("spread:6", 12, (0, 2, 4, 7, 9, 11)),
        ("spread:12", 12, tuple(range(12))),
    ],
)
def test_layers(text, layers, chosen):
    assert chosen_layers(text, layers) == chosen


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "is ''; give numbers from 0"),
        ("0, x", "is '0, x'; give numbers"),
        ("0,,1", "give numbers"),
        ("-1", "give numbers"),
        ("evry:2", "first:N, last:N, every:K or spread:N"),
        ("every:", "give numbers"),
        ("٣", "give numbers"),
        ("every:0", "is 'every:0'; every needs at least 1"),
        ("spread:1", "spread needs at least 2"),
        ("first:5", "asks for 5 layers of a model that has 4"),
        ("1, 4", "names layer 4, but the model has layers 0 to 3"),
        ("2, 1", "names layer 1 after 2; give each once, in their order"),
        ("1, 1", "names layer 1 after 1"),
    ],
)
def test_what_names_no_layers_is_refused(text, sentence):
    with pytest.raises(ValueError, match=r"give|needs|asks|names") as raised:
        chosen_layers(text, 4)
    assert sentence in str(raised.value)


@given(st.integers(2, 200), st.data())
def test_a_spread_is_even_and_keeps_both_ends(layers, data):
    number = data.draw(st.integers(2, layers))
    chosen = chosen_layers(f"spread:{number}", layers)
    assert len(chosen) == number
    assert (chosen[0], chosen[-1]) == (0, layers - 1)
    gaps = {b - a for a, b in itertools.pairwise(chosen)}
    assert min(gaps) >= 1
    assert max(gaps) - min(gaps) <= 1
