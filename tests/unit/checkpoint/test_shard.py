"""A rank's files: every bit comes back, the safetensors library reads them, and nothing runs when they are read."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_checkpoints import bits, same

from trainer.checkpoint.manifest import CHUNK_BYTES, FileEntry, entry_of
from trainer.checkpoint.shard import State, read_shard, write_shard
from trainer.errors import CheckpointError, DamagedError

DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
]


def write(directory: Path, state: State, moments: list[tuple[str, str, int]] | None = None) -> list[FileEntry]:
    def moment(name: str, path: Path) -> None:
        if moments is not None:
            moments.append((name, path.name, path.stat().st_size))

    return write_shard(directory, 3, state, moment=moment, count=lambda num_bytes: None)


@st.composite
def tensors(draw: st.DrawFn) -> torch.Tensor:
    dtype = draw(st.sampled_from(DTYPES))
    shape = draw(st.lists(st.integers(0, 5), max_size=3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    num_bytes = int(torch.Size(shape).numel()) * dtype.itemsize
    raw = torch.randint(0, 2 if dtype is torch.bool else 256, (num_bytes,), dtype=torch.uint8, generator=generator)
    tensor = raw.view(dtype).reshape(shape) if num_bytes else torch.empty(shape, dtype=dtype)
    return tensor.transpose(0, -1) if len(shape) > 1 and draw(st.booleans()) else tensor


numbers = st.dictionaries(st.text(max_size=8), st.integers() | st.floats(allow_nan=False) | st.text(max_size=9))


@settings(max_examples=40, deadline=None)
@given(
    st.dictionaries(st.text(min_size=1, max_size=12).filter(lambda name: name != "__metadata__"), tensors()), numbers
)
def test_every_bit_comes_back(tmp_path_factory: Any, values: dict[str, torch.Tensor], plain: dict[str, Any]) -> None:
    directory = tmp_path_factory.mktemp("shard")
    entries = write(directory, (values, plain))
    assert entries == [entry_of(directory / entry.name) for entry in entries]
    assert same(read_shard(directory, entries, 3), (values, plain))
    library = safetensors.torch.load_file(directory / "rank-00003.safetensors")
    assert {name: bits(value) for name, value in library.items()} == {n: bits(value) for n, value in values.items()}


def test_tensors_of_many_chunks_and_views_of_shared_memory(tmp_path: Path) -> None:
    flat = torch.randn(CHUNK_BYTES // 4 * 2 + 7, requires_grad=True)
    state: State = {"all": flat, "part": flat[5:-3], "every second": flat[::2], "tied": flat}, {}
    entries = write(tmp_path, state)
    assert same(read_shard(tmp_path, entries, 3), ({name: t.detach() for name, t in state[0].items()}, {}))


@pytest.mark.parametrize("padding", range(4))
def test_a_tensor_need_not_begin_at_a_multiple_of_its_size(tmp_path: Path, padding: int) -> None:
    """As other programs may write it."""
    odd = {"a": torch.tensor([1], dtype=torch.uint8), "b": torch.randn(3), "c": torch.randn(2, 2).bfloat16()}
    header, data = {}, b""
    for name, tensor in odd.items():
        raw = bits(tensor)[2]
        kind = {torch.uint8: "U8", torch.float32: "F32", torch.bfloat16: "BF16"}[tensor.dtype]
        header[name] = {"dtype": kind, "shape": list(tensor.shape), "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    text = json.dumps(header | {"__metadata__": {"format": "pt"}}).encode() + b" " * padding
    (tmp_path / "rank-00000.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data)
    (tmp_path / "rank-00000.json").write_text("{}")
    entries = [entry_of(tmp_path / f"rank-00000.{kind}") for kind in ("safetensors", "json")]
    assert same(read_shard(tmp_path, entries, 0), (odd, {}))


def test_a_type_that_a_checkpoint_cannot_hold_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"spin is of type torch.complex64"):
        write(tmp_path, ({"spin": torch.zeros(2, dtype=torch.complex64)}, {}))


def test_there_is_a_moment_in_the_middle_of_every_file(tmp_path: Path) -> None:
    moments: list[tuple[str, str, int]] = []
    for entry in write(tmp_path, ({"w": torch.randn(CHUNK_BYTES)}, {"a": 1}), moments):
        sizes = [size for name, file, size in moments if (name, file) == ("chunk", entry.name)]
        assert any(0 < size < entry.num_bytes for size in sizes)
        assert moments.count(("written", entry.name, entry.num_bytes)) == 1


class Run:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize(
    "header",
    [
        b"not json",
        b"[1]",
        b"[" * 100_000,
        b'{"w": 1}',
        b'{"w": {"dtype": "F32", "shape": [2]}}',
        b'{"w": {"dtype": "OBJECT", "shape": [1], "data_offsets": [0, 4]}}',
        b'{"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}',
        b'{"w": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}',
        b'{"w": {"dtype": "F32", "shape": [1.0], "data_offsets": [0, 4]}}',
        b'{"w": {"dtype": "F32", "shape": [true], "data_offsets": [0, 4]}}',
        b'{"w": {"dtype": "F32", "shape": [100], "data_offsets": [0, 400]}}',
        b'{"w": {"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}}',
        b'{"w": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}}',
        None,
    ],
)
def test_anything_else_in_place_of_tensors_is_refused_and_not_run(tmp_path: Path, header: bytes | None) -> None:
    content = pickle.dumps(Run(tmp_path / "ran"))
    if header is not None:
        content = len(header).to_bytes(8, "little") + header + bytes(4)
    (tmp_path / "rank-00000.safetensors").write_bytes(content)
    (tmp_path / "rank-00000.json").write_text("{}")
    entries = [entry_of(tmp_path / f"rank-00000.{kind}") for kind in ("safetensors", "json")]
    with pytest.raises(DamagedError, match=r"rank-00000.safetensors is no safetensors file, which is refused"):
        read_shard(tmp_path, entries, 0)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("content", [b"[1]", b"{", b"[" * 100_000, b"\xff"])
def test_anything_else_in_place_of_numbers_is_refused(tmp_path: Path, content: bytes) -> None:
    write_shard(tmp_path, 0, ({}, {}), moment=lambda name, path: None, count=lambda num_bytes: None)
    (tmp_path / "rank-00000.json").write_bytes(content)
    entries = [entry_of(tmp_path / f"rank-00000.{kind}") for kind in ("safetensors", "json")]
    with pytest.raises(DamagedError, match=r"rank-00000.json of rank 0 is no JSON object"):
        read_shard(tmp_path, entries, 0)
