"""What the pages say exists: files that they link to, verbs and options that they name, code that they show."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from typer.main import get_command

from launcher.cli import app
from trainer.config.options import options

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^ *```(\w*)\n(.*?)^ *```", re.MULTILINE | re.DOTALL)
OPTION = re.compile(
    r"(?<![\w/.])((?:data|model|objective|batch|optim|schedule|zero|cluster|telemetry|guard|checkpoint|supervision|snapshots|evaluation|distill)(?:\.\w+)+)="
)


@pytest.fixture(params=PAGES, ids=lambda page: page.name)
def page(request: pytest.FixtureRequest) -> Path:
    path: Path = request.param
    return path


def test_links_lead_to_files(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), target


def test_commands_have_verbs_that_exist(page: Path) -> None:
    verbs = set(get_command(app).commands)  # type: ignore[attr-defined]
    for verb in re.findall(r"(?:^|`| )trimtab ([a-z]+)\b(?= [A-Za-z./-]|`|$)", page.read_text(), re.MULTILINE):
        assert verb in verbs | {"is", "and", "signals", "exits"}, verb


def test_options_on_command_lines_exist(page: Path) -> None:
    known = {option.path for option in options()}
    for path in OPTION.findall(page.read_text()):
        general = re.sub(r"\.\d+\b", ".0", path)
        assert general in known or general.startswith("model.config."), path


def test_recipes_named_on_a_page_exist(page: Path) -> None:
    for name in re.findall(r"configs/([\w.-]+\.yaml)", page.read_text()):
        assert (ROOT / "configs" / name).exists(), name


def test_python_on_a_page_compiles(page: Path) -> None:
    for language, code in FENCE.findall(page.read_text()):
        if language == "python":
            compile(code, str(page), "exec")
