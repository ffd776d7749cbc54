"""Whether prepared data is what a run began with, and if not, what changed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from trainer.data.prepared import Prepared
from trainer.errors import DataError

_NAMED = 3


def check_unchanged(prepared: Prepared, expected_fingerprint: str, accept_changed: bool) -> str | None:
    """Refuse data that is not what the run began with.

    What changed is found out from the manifest of the earlier data, where that still lies beside the present one.

    Returns:
        None where nothing changed; a sentence to show where it did and `accept_changed` allows it.

    Raises:
        DataError: the data changed; names the sources and files.
    """
    if prepared.fingerprint == expected_fingerprint:
        return None
    earlier = _manifest_of(expected_fingerprint, prepared.path.parent)
    changes = describe(earlier, prepared.manifest) if earlier else "what it was is no longer there to compare"
    problem = f"the data is not what it was when this run began ({changes})"
    if accept_changed:
        return f"{problem}; going on because data.accept_changed is set"
    raise DataError(f"{problem}: restore it, start another run, or go on with data.accept_changed=true")


def _manifest_of(fingerprint: str, root: Path) -> dict[str, Any] | None:
    for path in sorted(root.glob("*/manifest.json")):
        try:
            manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if manifest.get("fingerprint") == fingerprint:
            return manifest
    return None


def describe(earlier: dict[str, Any], later: dict[str, Any]) -> str:
    """What differs between two manifests, in words."""
    before, after = ({source["name"]: dict(source["files"]) for source in m["sources"]} for m in (earlier, later))
    changes = [f"source {name} is gone" for name in before if name not in after]
    changes += [f"source {name} is new" for name in after if name not in before]
    for name in before:
        if name in after and (files := _file_changes(before[name], after[name])):
            changes.append(f"source {name}: {files}")
    options = {"clean": "data.clean", "held_out": "data.held_out", "tokenizer": "the tokenizer"}
    changes += [f"{words} changed" for option, words in options.items() if earlier[option] != later[option]]
    return "; ".join(changes) or "the same files gave other tokens: a column, a template or a library changed"


def _file_changes(before: dict[str, str], after: dict[str, str]) -> str:
    changed = {
        "changed": [name for name in before if name in after and before[name] != after[name]],
        "added": [name for name in after if name not in before],
        "removed": [name for name in before if name not in after],
    }
    parts = []
    for what, names in changed.items():
        if names:
            more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
            parts.append(f"{what} {', '.join(names[:_NAMED])}{more}")
    return ", ".join(parts)
