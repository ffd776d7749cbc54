"""YAML as configs use it."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.config.yamltext import YamlError, dump, parse

SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text(st.characters(exclude_categories=["Cs"]))
    | st.sampled_from(
        ["yes", "on", "no", "1e-3", "1_0", "010", "0x1f", "1:30", "~", "null", "2001-01-01", "<<", "=", ""]
    )
)
DATA = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text(st.characters(exclude_categories=["Cs"]), max_size=8), inner, max_size=4)
    ),
    max_leaves=12,
)


@given(st.dictionaries(st.text(st.characters(exclude_categories=["Cs"]), max_size=8), DATA, max_size=4))
def test_what_is_written_is_read_back_equal_and_of_the_same_type(data):
    back = parse(dump(data) or "{}")
    assert back == data
    assert repr(back) == repr(data)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 0.001),
        ("1E5", 1e5),
        (".5", 0.5),
        ("5.", 5.0),
        ("-.inf", -math.inf),
        ("1_000_000", 1_000_000),
        ("010", 10),
        ("0x1F", 31),
        ("0o17", 15),
        ("-3", -3),
        ("yes", "yes"),
        ("no", "no"),
        ("on", "on"),
        ("off", "off"),
        ("1:30", "1:30"),
        ("2001-01-01", "2001-01-01"),
        ("true", True),
        ("null", None),
        ("", None),
        ("'1'", "1"),
        ("1e", "1e"),
        ("e3", "e3"),
    ],
)
def test_scalars_follow_yaml_1_2(text, value):
    assert parse(text) == value
    assert type(parse(text)) is type(value)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("a: 1\nb: 2\na: 3\n", "`a` is given twice, on lines 1 and 3"),
        ("x:\n  a: 1\n  a: 1\n", "`a` is given twice, on lines 2 and 3"),
        ("a: [1, 2\nb: 3", "line 2, column 2: expected ',' or ']', but got ':'"),
        ("a: *nothing", "line 1, column 4: found undefined alias 'nothing'"),
        ("a: &x [*x]", "line 1: this contains an alias of itself"),
        ("a: !!python/name:os.system ''", "line 1: the tag !!python/name:os.system is not allowed; only plain data is"),
        ("a: !!timestamp 2001-01-01", "line 1: the tag !!timestamp is not allowed; only plain data is"),
        ("a: !!int x", "line 1: 'x' cannot be read as int"),
        ("[a, b]: 1", "line 1: a name must be text, not a list or a mapping"),
        ("a: 1\nb: \x07", "line 2: the character U+0007 is not allowed in YAML"),
        ("a: 1\n---\nb: 1", "line 2, column 1: but found another document"),
        ("[" * 5000, "it is nested too deeply"),
    ],
)
def test_what_is_not_plain_yaml_is_refused_with_its_place(text, sentence):
    with pytest.raises(YamlError) as refused:
        parse(text)
    assert str(refused.value) == sentence


def test_an_anchor_stands_for_an_equal_value():
    assert parse("a: &x {b: 1}\nc: *x") == {"a": {"b": 1}, "c": {"b": 1}}


def test_short_lists_stay_on_a_line_and_groups_stand_apart():
    text = dump({"a": 1, "b": {"c": [1, [2, 3]], "d": []}, "e": 2})
    assert text == "a: 1\n\nb:\n  c: [1, [2, 3]]\n  d: []\n\ne: 2\n"
