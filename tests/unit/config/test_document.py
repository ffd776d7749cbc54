"""The page of options is made from the schema."""

from pathlib import Path

from trainer.config.document import document
from trainer.config.options import options

PAGE = Path(__file__).parents[3] / "docs" / "config.md"


def test_the_page_is_current():
    assert PAGE.read_text(encoding="utf-8") == document(), "run: python -m trainer.config.document > docs/config.md"


def test_every_option_is_documented():
    undocumented = [option.path for option in options() if not option.field.description]
    assert undocumented == []
    page = document()
    for option in options():
        assert (f"## `{option.path}`" if option.section else f"| `{option.name}` |") in page
