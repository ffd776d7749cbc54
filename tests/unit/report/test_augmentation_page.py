"""The page that shows augmented texts."""

from __future__ import annotations

import json

from trainer.report.augmentation import Example, page, to_json


def test_examples_by_kind_of_change() -> None:
    found = {"delete": [Example(3, "a *b* | c", "a\n<i>c</i>"), Example(9, "x" * 400, "y")], "typos": []}
    text = page("augmentation of 50% of the training samples: delete 0.1 of the words", found)
    assert "## delete" in text
    assert r"| 3 | a \*b\* \| c | a &lt;i&gt;c&lt;/i&gt; |" in text
    assert f"| 9 | {'x' * 300}… | y |" in text
    assert text.index("## typos") > text.index("## delete")
    assert "(none of the texts looked at was changed)" in text
    note = json.loads(json.dumps(to_json("said", "digest", found)))
    assert note["examples"]["delete"][0] == {"sample": 3, "before": "a *b* | c", "after": "a\n<i>c</i>"}
    assert (note["said"], note["lexicon"], note["examples"]["typos"]) == ("said", "digest", [])
