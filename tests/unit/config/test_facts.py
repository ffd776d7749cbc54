"""The facts of a model travel as JSON."""

import json

import pytest

from trainer.config.facts import facts_from_json, facts_to_json
from trainer.records import ModelFacts, ParameterFacts

FACTS = ModelFacts(
    model_type="llama",
    parameters=(ParameterFacts("a.weight", (3, 4), True), ParameterFacts("ä", (5,), False)),
    num_layers=2,
    hidden_size=4,
    num_attention_heads=1,
    intermediate_size=8,
    vocabulary=16,
    max_positions=None,
    matmul_parameters=12,
)


def test_facts_survive_json():
    assert facts_from_json(facts_to_json(FACTS)) == FACTS


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"hidden_size": ...}, r"missing \['hidden_size'\], unknown \[\]"),
        ({"colour": 1}, r"missing \[\], unknown \['colour'\]"),
    ],
)
def test_facts_of_another_version_are_refused(change, sentence):
    data = {key: value for key, value in (json.loads(facts_to_json(FACTS)) | change).items() if value is not ...}
    with pytest.raises(ValueError, match=sentence):
        facts_from_json(json.dumps(data))


@pytest.mark.parametrize("text", ["", "[]", "{}"])
def test_what_is_no_facts_is_refused(text):
    with pytest.raises(ValueError, match=r"Expecting value|not the facts of a model"):
        facts_from_json(text)
