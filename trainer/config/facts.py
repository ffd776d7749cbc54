"""`ModelFacts` as JSON: what `python -m trainer.model.describe` prints and `model.json` holds. Free of torch."""

from __future__ import annotations

import json
from dataclasses import MISSING, asdict, fields

from trainer.records import ModelFacts, ParameterFacts


def facts_to_json(facts: ModelFacts) -> str:
    """One JSON object; `facts_from_json` reads it back equal."""
    return json.dumps(asdict(facts), indent=1, ensure_ascii=False)


def facts_from_json(text: str) -> ModelFacts:
    """
    Raises:
        ValueError: not JSON, or not the fields of `ModelFacts`; the message names what is missing or unknown.
    """
    data = json.loads(text)
    names = {field.name for field in fields(ModelFacts)}
    found = set(data) if isinstance(data, dict) else set()
    # what has a default was not written by earlier versions
    if not {field.name for field in fields(ModelFacts) if field.default is MISSING} <= found <= names:
        raise ValueError(
            f"these are not the facts of a model: missing {sorted(names - found)}, unknown {sorted(found - names)}"
        )
    parameters = tuple(
        ParameterFacts(name=entry["name"], shape=tuple(entry["shape"]), decay=entry["decay"])
        for entry in data.pop("parameters")
    )
    return ModelFacts(parameters=parameters, **data)
