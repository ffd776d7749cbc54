"""Tensors of a published checkpoint by name, read as they are needed: from safetensors, or from .bin files."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from zipfile import is_zipfile

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from safetensors import safe_open
from torch import Tensor

_FILES = (("model.safetensors", "model.safetensors.index.json"), ("pytorch_model.bin", "pytorch_model.bin.index.json"))


def read_tensors(source: str, rename: Callable[[str], str | None], *, with_values: bool = True) -> dict[str, Tensor]:
    """The tensors of a checkpoint under new names. Values stay in the mapped file until something touches them; files
    of a hub model that hold none of the wanted are not fetched.

    Args:
        source: directory or hub id.
        rename: name in the checkpoint → name in the result; None: left out.
        with_values: False: on the meta device.

    Raises:
        OSError: there is no such checkpoint, or it cannot be fetched.
    """
    result: dict[str, Tensor] = {}
    for path in _files(source, rename):
        for name, tensor in _mapped(path, rename):
            if (new := rename(name)) is not None:
                result[new] = tensor if with_values else tensor.to("meta")
    return result


def _mapped(path: Path, rename: Callable[[str], str | None]) -> Iterator[tuple[str, Tensor]]:
    if path.suffix == ".bin":
        # files from before torch 1.6 are no zip archives and cannot be mapped
        yield from torch.load(path, map_location="cpu", weights_only=True, mmap=is_zipfile(path)).items()
        return
    with safe_open(path, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 - it is no mapping
            if rename(name) is not None:
                yield name, file.get_tensor(name)


def _files(source: str, rename: Callable[[str], str | None]) -> list[Path]:
    missing: Exception | None = None
    for whole, index in _FILES:
        try:
            return [_file(source, whole)]
        except (EntryNotFoundError, FileNotFoundError):
            pass
        try:
            places = json.loads(_file(source, index).read_text(encoding="utf-8"))["weight_map"]
        except (EntryNotFoundError, FileNotFoundError) as error:
            missing = error
            continue
        return [_file(source, name) for name in sorted({places[name] for name in places if rename(name) is not None})]
    raise FileNotFoundError(f"it has no weights in safetensors or .bin files ({missing})") from missing


def _file(source: str, name: str) -> Path:
    folder = Path(source)
    if not folder.is_dir():
        return Path(hf_hub_download(source, name))
    if not (folder / name).is_file():
        raise FileNotFoundError(f"{folder / name} is not there")
    return folder / name
