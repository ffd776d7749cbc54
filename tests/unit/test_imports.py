"""The house as DESIGN says it: who may import whom, what is free of torch, and how long a file may be. Read from the
source, so that an import inside a function counts too."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MAX_LINES = 400
HEAVY = {"torch", "transformers", "datasets", "deepspeed", "accelerate"}

ROOMS = ("data", "model", "optim", "objectives", "engine", "telemetry", "stability", "checkpoint", "evaluation")
"""Siblings: none imports another."""

GROUND = ("trainer.records", "trainer.errors")
TENSORS = ("trainer.terms", "trainer.knowledge", "trainer.attention")
"""What rooms share that hold tensors."""

ALLOWED: dict[str, tuple[str, ...]] = {
    "trainer.errors": (),
    "trainer.records": (),
    "trainer.terms": (),
    "trainer.knowledge": ("trainer.records",),
    "trainer.attention": (),
    "trainer.stop": (),
    "trainer.heartbeat": GROUND,
    "trainer.exclusive": (),
    "trainer.starts": ("trainer.config.files", "trainer.exclusive", *GROUND),
    "trainer.config": GROUND,
    **{
        f"trainer.{room}": ("trainer.config", "trainer.starts", "trainer.exclusive", *GROUND, *TENSORS)
        for room in ROOMS
    },
    "trainer.scores": GROUND,
    "trainer.insight": GROUND,
    "trainer.teacher": ("trainer.config", "trainer.model", *GROUND, *TENSORS),
    "trainer.faults": ("trainer.engine", "trainer.config.files", *GROUND),
    "trainer.report": ("trainer.config", "trainer.telemetry.ledger", "trainer.telemetry.names", *GROUND),
    "trainer.recovery": ("trainer.config", "trainer.saving", *GROUND, *(f"trainer.{room}" for room in ROOMS)),
    "trainer.saving": ("trainer.config", "trainer.starts", *GROUND, *(f"trainer.{room}" for room in ROOMS)),
    "trainer.best": ("trainer.config",),
    "trainer.loop": (
        "trainer.config",
        "trainer.best",
        "trainer.stop",
        "trainer.recovery",
        "trainer.saving",
        "trainer.heartbeat",
        *GROUND,
        *(f"trainer.{room}" for room in ROOMS),
    ),
    "trainer.stages": (
        "trainer.config",
        "trainer.stop",
        "trainer.starts",
        "trainer.heartbeat",
        "trainer.best",
        "trainer.loop",
        "trainer.recovery",
        "trainer.saving",
        "trainer.report",
        "trainer.faults",
        "trainer.teacher",
        "trainer.scores",
        "trainer.insight",
        *GROUND,
        *TENSORS,
        *(f"trainer.{room}" for room in ROOMS),
    ),
    "trainer.meeting": ("trainer.heartbeat", *GROUND),
    "trainer.__main__": ("trainer",),
    "trainer.drill": ("trainer",),
    "trainer.teach": ("trainer",),
    "trainer.evaluate": ("trainer",),
    "launcher": (
        "trainer.config",
        "trainer.telemetry.ledger",
        "trainer.telemetry.console",
        "trainer.telemetry.goodput",
        "trainer.telemetry.books",
        "trainer.exclusive",
        "trainer.faults",
        "trainer.report",
        "trainer.stability",
        "trainer.heartbeat",
        "trainer.starts",
        "trainer.checkpoint.manifest",
        "trainer.checkpoint.verify",
        *GROUND,
    ),
}
"""What a module or a package may import of this project besides itself."""

TORCH_FREE = (
    "launcher",
    "trainer.config",
    "trainer.records",
    "trainer.errors",
    "trainer.stop",
    "trainer.starts",
    "trainer.telemetry.ledger",
    "trainer.telemetry.console",
    "trainer.telemetry.goodput",
    "trainer.telemetry.books",
    "trainer.data.order",
    "trainer.report",
    "trainer.stability",
    "trainer.scores",
)


@dataclass(frozen=True)
class Import:
    line: int
    name: str
    """The module, or a name in it."""
    at_import: bool
    """Carried out when the importing module is imported: not in a function, not for the type checker only."""
    types_only: bool


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def sources() -> dict[str, Path]:
    return {module_of(path): path for house in ("launcher", "trainer") for path in sorted((ROOT / house).rglob("*.py"))}


def imports_of(tree: ast.AST, *, in_function: bool = False, types_only: bool = False) -> Iterator[Import]:
    for node in ast.iter_child_nodes(tree):
        inside = in_function or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            for child in node.body:
                yield from imports_of(ast.Module([child], []), in_function=inside, types_only=True)
            for child in node.orelse:
                yield from imports_of(ast.Module([child], []), in_function=inside, types_only=types_only)
            continue
        else:
            yield from imports_of(node, in_function=inside, types_only=types_only)
            continue
        for name in names:
            yield Import(node.lineno, name, not inside and not types_only, types_only)


@cache
def imports(module: str) -> tuple[Import, ...]:
    return tuple(imports_of(ast.parse(sources()[module].read_text(encoding="utf-8"))))


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def internal(name: str) -> str | None:
    """The module of this project that an imported name is or lies in."""
    while name and name not in sources():
        name = name.rpartition(".")[0]
    return name or None


def rule_of(module: str) -> str | None:
    return max((rule for rule in ALLOWED if within(module, rule)), key=len, default=None)


def test_the_walk_sees_imports_wherever_they_stand() -> None:
    code = (
        "import a\nfrom b.c import d\nif TYPE_CHECKING:\n    import e\nelse:\n    import f\n"
        "try:\n    import g\nexcept ImportError:\n    pass\ndef x():\n    import h\n"
    )
    found = {item.name: (item.at_import, item.types_only) for item in imports_of(ast.parse(code))}
    now, later, types = (True, False), (False, False), (False, True)
    assert found == {"a": now, "b.c.d": now, "e": types, "f": now, "g": now, "h": later}
    assert {"launcher.cli", "trainer.config.schema", "trainer.errors"} <= set(sources())


def test_every_module_has_its_place() -> None:
    homeless = [module for module in sources() if rule_of(module) is None and module != "trainer"]
    assert homeless == [], "say in ALLOWED what these may import"


@pytest.mark.parametrize("rule", ALLOWED)
def test_arrows_point_one_way(rule: str) -> None:
    wrong = []
    for module, path in sources().items():
        if rule_of(module) != rule:
            continue
        for item in imports(module):
            target = internal(item.name)
            if target is None or target == "trainer" or within(target, rule):
                continue
            if not any(within(target, allowed) for allowed in ALLOWED[rule]):
                wrong.append(f"{path.relative_to(ROOT)}:{item.line} imports {target}")
    assert wrong == []


def test_there_are_no_cycles() -> None:
    graph = {
        module: {target for item in imports(module) if not item.types_only and (target := internal(item.name))}
        - {module}
        for module in sources()
    }
    # peel off whatever imports nothing that is left; a cycle never goes
    while leaves := [module for module, targets in graph.items() if not targets & graph.keys()]:
        for module in leaves:
            del graph[module]
    assert graph == {}


def path_to_heavy(module: str, seen: set[str]) -> list[str] | None:
    """How importing `module` comes to import a heavy package, step by step."""
    seen.add(module)
    for item in imports(module):
        if not item.at_import:
            continue
        if item.name.partition(".")[0] in HEAVY:
            return [module, item.name]
        target = internal(item.name)
        if target and target not in seen and (rest := path_to_heavy(target, seen)):
            return [module, *rest]
    return None


@pytest.mark.parametrize("module", [name for name in sources() if any(within(name, free) for free in TORCH_FREE)])
def test_free_of_torch(module: str) -> None:
    assert path_to_heavy(module, set()) is None


def test_the_launcher_never_imports_torch_not_even_later() -> None:
    wrong = [
        f"{module}:{item.line} imports {item.name}"
        for module in sources()
        if within(module, "launcher")
        for item in imports(module)
        if item.name.partition(".")[0] in HEAVY
    ]
    assert wrong == []


def test_importing_the_launcher_imports_none_of_them() -> None:
    """The same at run time, through the libraries that it uses."""
    modules = ", ".join(module for module in sources() if within(module, "launcher"))
    code = f"import sys, {modules}; print(sorted({HEAVY!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("path", sources().values(), ids=lambda path: str(path.relative_to(ROOT)))
def test_files_are_short(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MAX_LINES
