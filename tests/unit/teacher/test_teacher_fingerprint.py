"""What tells a teacher from others."""

from __future__ import annotations

from pathlib import Path

import pytest

from trainer.config.distill import ServerConfig, TeacherConfig
from trainer.errors import DataError
from trainer.stages.caching import agreed, fingerprint_of, name_of


def folder_with(folder: Path, **files: bytes) -> Path:
    folder.mkdir()
    for name, data in files.items():
        (folder / name.replace("__", ".")).write_bytes(data)
    return folder


@pytest.fixture
def memory(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "hashes.json"


def of(path: Path, memory: Path, **options: object) -> str | None:
    return fingerprint_of(TeacherConfig.model_validate({"pretrained": str(path), **options}), memory)


def test_it_follows_configuration_weights_and_overrides(tmp_path: Path, memory: Path) -> None:
    first = folder_with(tmp_path / "a", config__json=b"{}", model__safetensors=b"w", generation_config__json=b"1")
    moved = folder_with(tmp_path / "b", config__json=b"{}", model__safetensors=b"w", README__md=b"hello")
    others = [
        folder_with(tmp_path / "c", config__json=b"{ }", model__safetensors=b"w"),
        folder_with(tmp_path / "d", config__json=b"{}", model__safetensors=b"v"),
        folder_with(tmp_path / "e", config__json=b"{}", model__safetensors=b"w", more__safetensors=b""),
    ]
    found = of(first, memory)
    assert found == of(first, memory) == of(moved, memory) == of(moved, memory, precision="bf16", place="zero3")
    all_of_them = {found, of(first, memory, overrides={"a": 1}), *(of(other, memory) for other in others)}
    assert len(all_of_them) == 5
    assert of(first, memory, overrides={"a": 1, "b": 2}) == of(first, memory, overrides={"b": 2, "a": 1})


def test_a_single_file_may_have_any_name(tmp_path: Path, memory: Path) -> None:
    one, other = tmp_path / "one.gguf", tmp_path / "other.gguf"
    one.write_bytes(b"GGUF")
    other.write_bytes(b"GGUF")
    assert of(one, memory) == of(other, memory)
    other.write_bytes(b"GGUG")
    assert of(one, memory) != of(other, memory)
    assert name_of(TeacherConfig(pretrained=str(one))) == "one.gguf"


def test_behind_a_server_it_is_its_name(memory: Path) -> None:
    def server(url: str, model: str) -> TeacherConfig:
        return TeacherConfig(place="server", server=ServerConfig(url=url, model=model))

    assert fingerprint_of(server("http://a/v1", "big"), memory) == fingerprint_of(server("http://b/v1", "big"), memory)
    assert fingerprint_of(server("http://a/v1", "big"), memory) != fingerprint_of(server("http://a/v1", "x"), memory)
    assert name_of(server("http://a/v1", "big")) == "big"


def test_none_is_named(memory: Path) -> None:
    assert fingerprint_of(TeacherConfig(place="cache"), memory) is None


def test_a_teacher_that_cannot_be_read(tmp_path: Path, memory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match="holds no weights"):
        of(folder_with(tmp_path / "a", config__json=b"{}"), memory)
    with pytest.raises(DataError, match=r"model\.safetensors|config\.json.*leave it out"):
        of(folder_with(tmp_path / "b", model__safetensors=b"w"), memory)

    def unknown(_: TeacherConfig) -> str:
        raise OSError("it is not in the cache\nand more")

    monkeypatch.setattr("trainer.stages.caching._revision_of", unknown)
    with pytest.raises(
        DataError, match=r"nobody/nothing-of-this-name cannot be read: it is not in the cache; .*leave it out"
    ):
        fingerprint_of(TeacherConfig(pretrained="nobody/nothing-of-this-name"), memory)


def test_without_other_ranks_everyone_decides_alone() -> None:
    assert agreed(lambda: 3) == 3
