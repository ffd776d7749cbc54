"""A part of the state, copied together from the shards of any other ranks and stage: every element once, or refused."""

import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from cuts import KEYS, Parameter, cut, make_whole, write_checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.checkpoint.assemble import averaged_parameters, whole_parameters
from trainer.checkpoint.elastic import refuse_unconvertible, reshard
from trainer.checkpoint.layout import covers
from trainer.errors import CheckpointError, DamagedError

SHAPES = st.lists(st.lists(st.integers(1, 7), max_size=3).map(tuple), min_size=1, max_size=6)
CUTS = st.tuples(st.sampled_from([0, 1, 2, 3]), st.integers(1, 5), st.sampled_from([10**9, 6]))
PARAMETERS = [Parameter("a", (3, 5), 0), Parameter("b", (7,), 1), Parameter("c", (2, 2, 4), 0), Parameter("d", (), 1)]


@settings(deadline=None, max_examples=60)
@given(shapes=SHAPES, groups=st.lists(st.integers(0, 2), min_size=6, max_size=6), source=CUTS, target=CUTS)
def test_any_shape_becomes_any_other_and_every_element_arrives_once(
    shapes: list[tuple[int, ...]], groups: list[int], source: tuple[int, int, int], target: tuple[int, int, int]
) -> None:
    groups[0] = 0
    used = sorted(set(groups[: len(shapes)]))
    parameters = [Parameter(f"p{i}", shape, used.index(groups[i])) for i, shape in enumerate(shapes)]
    whole = make_whole(parameters)
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder) / "step-00000003"
        manifest = write_checkpoint(directory, whole, cut(parameters, *source))
        held = {key: {p.name: torch.full((p.numel,), math.nan) for p in parameters} for key in KEYS}
        for shape in cut(parameters, *target):
            tensors, numbers = reshard(directory, manifest, shape)
            assert numbers["fragments"] == list(shape.fragments)
            assert numbers["guard"] == {"of": "rank 0"}
            assert torch.equal(tensors.pop("buffer.table"), torch.arange(5))
            for index, (size, group) in enumerate(zip(shape.flats, shape.groups, strict=True)):
                assert numbers["scalars"][str(index)] == {"step": 3.0 + group}
                assert numbers["flats"][index]["group"] == group
                for key in KEYS:
                    flat = tensors.pop(f"flat.{index}.{key}")
                    padding = torch.ones(size, dtype=torch.bool)
                    for own in (own for own in shape.fragments if own["flat"] == index):
                        here, there = slice(own["offset"], own["offset"] + own["num_elements"]), held[key][own["name"]]
                        there[own["start"] : own["start"] + own["num_elements"]] = flat[here]
                        padding[here] = False
                    assert not flat[padding].any()
            assert not tensors
        for key in KEYS:
            for parameter in parameters:
                assert torch.equal(held[key][parameter.name], whole[key][parameter.name])


def test_before_the_first_step_there_are_no_moments(tmp_path: Path) -> None:
    whole = {"master": make_whole(PARAMETERS)["master"]}
    manifest = write_checkpoint(tmp_path / "step-00000003", whole, cut(PARAMETERS, 2, 3))
    tensors, numbers = reshard(tmp_path / "step-00000003", manifest, cut(PARAMETERS, 3, 2)[0])
    assert sorted(tensors) == ["buffer.table", "flat.0.master", "flat.1.master"]
    assert numbers["scalars"] == {}


@settings(deadline=None)
@given(data=st.data(), total=st.integers(1, 30))
def test_what_covers_a_parameter(data: st.DataObject, total: int) -> None:
    ends = sorted(data.draw(st.sets(st.integers(1, total - 1), max_size=5)) if total > 1 else set())
    runs = [(begin, end - begin) for begin, end in zip([0, *ends], [*ends, total], strict=True)]
    shuffled = data.draw(st.permutations(runs))
    assert covers(shuffled, 0, total) is None
    lost = data.draw(st.sampled_from(runs))
    assert "missing" in (covers([run for run in runs if run != lost], 0, total) or "")
    assert "twice" in (covers([*runs, lost], 0, total) or "")


Change = Callable[[dict[str, Any]], object]


def changed(directory: Path, rank: int, change: Change) -> None:
    path = directory / f"rank-{rank:05d}.json"
    numbers = json.loads(path.read_text())
    change(numbers)
    path.write_text(json.dumps(numbers))


REFUSED: list[tuple[str, int, Change, str]] = [
    ("a lost fragment", 1, lambda n: n["fragments"].pop(0), r"does not hold \w whole and once .* are missing"),
    ("a fragment twice", 1, lambda n: n["fragments"].append(n["fragments"][0]), "are there twice"),
    ("another shape", 0, lambda n: n["fragments"][0].update(shape=[5, 3]), r"a is \[5, 3\] in the checkpoint"),
    ("other counters", 1, lambda n: n["counters"].update(global_steps=4), "counters of rank 1 and of rank 0 differ"),
    ("other hyperparameters", 1, lambda n: n["groups"][1].update(weight_decay=0.3), "groups of rank 1 and of rank 0"),
    ("another step of Adam", 1, lambda n: n["scalars"]["0"].update(step=9.0), "flat.0 of rank 1 is not that of the re"),
    ("other moments", 1, lambda n: n["flats"][0].update(tensors=["master"]), "flat.0 of rank 1 is not that of the re"),
    ("out of its tensor", 0, lambda n: n["fragments"][0].update(offset=10**6), "a reaches over the end of flat.0"),
    ("out of its parameter", 0, lambda n: n["fragments"][0].update(start=10**6), "a has more elements than its shape"),
    ("no such tensor", 0, lambda n: n["fragments"][0].update(flat=7), "a lies in the tensor flat.7"),
    ("a negative place", 0, lambda n: n["fragments"][0].update(offset=-4), "fragments.0.offset"),
    ("a foreign field", 0, lambda n: n["fragments"][0].update(path="/etc/passwd"), "fragments.0.path"),
    ("no fragments", 0, lambda n: n.pop("fragments"), "rank-00000.json is not what a rank writes .fragments"),
    ("a longer tensor", 0, lambda n: n["flats"][0].update(num_elements=64) or n["fragments"][0].update(offset=40),
     "holds only"),
    ("a tensor that is not there", 0, lambda n: [f.update(tensors=["master", "x"]) for f in n["flats"]], "of rank 1"),
]  # fmt: skip


@pytest.mark.parametrize(("rank", "change", "message"), [pytest.param(*rest, id=name) for name, *rest in REFUSED])
def test_shards_that_contradict_themselves_are_refused(tmp_path: Path, rank: int, change: Change, message: str) -> None:
    directory = tmp_path / "step-00000003"
    manifest = write_checkpoint(directory, make_whole(PARAMETERS), cut(PARAMETERS, 2, 2))
    changed(directory, rank, change)
    with pytest.raises(CheckpointError, match=message):
        reshard(directory, manifest, cut(PARAMETERS, 0, 1)[0])


def test_a_parameter_in_another_group_is_refused(tmp_path: Path) -> None:
    manifest = write_checkpoint(tmp_path / "step-00000003", make_whole(PARAMETERS), cut(PARAMETERS, 2, 2))
    moved = [replace(PARAMETERS[0], group=1), *PARAMETERS[1:]]
    with pytest.raises(CheckpointError, match="a is in optimizer group 0 in the checkpoint and in group 1"):
        reshard(tmp_path / "step-00000003", manifest, cut(moved, 3, 1)[0])
    more = [replace(PARAMETERS[3], group=2)]
    with pytest.raises(CheckpointError, match="has no optimizer group 2"):
        reshard(tmp_path / "step-00000003", manifest, replace(cut(more, 3, 1)[0], fragments=(), parameters=()))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"parameters": ("a", "b", "c")}, r"of another model \(d is only in the checkpoint\)"),
        ({"parameters": ("a", "b", "c", "d", "e")}, r"of another model \(e is only in this config's model\)"),
        ({"optimizer": "Muon"}, "optimizer Adam and this start has Muon"),
        ({"precision": "bf16"}, "precision fp32 and this start has bf16"),
    ],
)
def test_what_cannot_be_converted_is_refused_before_a_file_is_opened(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    directory = tmp_path / "step-00000003"
    manifest = write_checkpoint(directory, make_whole(PARAMETERS), cut(PARAMETERS, 2, 2))
    for file in directory.iterdir():
        file.unlink()
    shape = replace(cut(PARAMETERS, 3, 2)[0], **change)
    with pytest.raises(CheckpointError, match=message):
        refuse_unconvertible(manifest, shape)
    with pytest.raises(CheckpointError, match=message):
        reshard(directory, manifest, shape)


def tampered(path: Path, change: Callable[[bytes], bytes]) -> None:
    path.write_bytes(change(path.read_bytes()))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content[:-4], "has no valid safetensors header"),
        (lambda content: content[:4], "is not a safetensors file, or is cut off"),
        (lambda content: b"\x80\x04cposix\nsystem\n.", "is not a safetensors file, or is cut off"),
        (lambda content: content.replace(b'"F32"', b'"I32"'), "holds no fp32 tensor flat.0.exp_avg;"),
        (
            lambda content: content.replace(b"flat.0.exp_avg_sq", b"flat.0.exp_avg_qs"),
            "holds no fp32 tensor flat.0.exp_avg_sq;",
        ),
    ],
)
def test_a_file_that_is_not_what_it_should_be_is_named(
    tmp_path: Path, change: Callable[[bytes], bytes], message: str
) -> None:
    directory = tmp_path / "step-00000003"
    manifest = write_checkpoint(directory, make_whole(PARAMETERS), cut(PARAMETERS, 2, 2))
    tampered(directory / "rank-00001.safetensors", change)
    with pytest.raises(CheckpointError, match=f"rank-00001.safetensors {message}"):
        reshard(directory, manifest, cut(PARAMETERS, 3, 1)[0])


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    directory = tmp_path / "step-00000003"
    manifest = write_checkpoint(directory, make_whole(PARAMETERS), cut(PARAMETERS, 2, 2))
    shard = directory / "rank-00001.safetensors"
    shard.rename(tmp_path / "elsewhere")
    shard.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(DamagedError, match=r"rank-00001.safetensors cannot be opened"):
        reshard(directory, manifest, cut(PARAMETERS, 3, 1)[0])


def test_whole_parameters_of_any_key_and_their_average(tmp_path: Path) -> None:
    one, two = make_whole(PARAMETERS, 1), make_whole(PARAMETERS, 2)
    write_checkpoint(tmp_path / "step-00000003", one, cut(PARAMETERS, 3, 3))
    for key in KEYS:
        found = dict(whole_parameters(tmp_path / "step-00000003", key=key))
        for parameter in PARAMETERS:
            assert found[parameter.name].shape == parameter.shape
            assert torch.equal(found[parameter.name].view(-1), one[key][parameter.name])
        assert ("table" in found) == (key == "master")
    other = tmp_path / "other" / "step-00000003"
    write_checkpoint(other, two, cut(PARAMETERS, 1, 2))
    mean = dict(averaged_parameters([tmp_path / "step-00000003", other, other]))
    for parameter in PARAMETERS:
        name = parameter.name
        expected = (one["master"][name].double() + 2 * two["master"][name].double()) / 3
        assert torch.equal(mean[name].view(-1), expected.float())
    assert torch.equal(mean["table"], torch.arange(5))
    write_checkpoint(tmp_path / "less" / "step-00000003", one, cut(PARAMETERS[:3], 1, 2))
    with pytest.raises(CheckpointError, match="are of different models"):
        list(averaged_parameters([other, tmp_path / "less" / "step-00000003"]))


def test_an_element_that_no_rank_holds_is_no_export(tmp_path: Path) -> None:
    directory = tmp_path / "step-00000003"
    write_checkpoint(directory, make_whole(PARAMETERS), cut(PARAMETERS, 2, 2))
    changed(directory, 1, lambda numbers: numbers["fragments"].pop(0))
    with pytest.raises(CheckpointError, match="does not hold c whole and once"):
        list(whole_parameters(directory, verify=False))


MEASURE = """
import json, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from cuts import Parameter, cut
from trainer.checkpoint.assemble import averaged_parameters
from trainer.checkpoint.elastic import reshard
from trainer.checkpoint.manifest import read_manifest

def status(key):
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key + ":")]
    return int(line.split()[1]) * 1024

def read():
    return int(Path("/proc/self/io").read_text().split("rchar: ")[1].split()[0])

def measure(work, directory, num):
    parameters = [Parameter(f"p{i}", (1024, 64), i % 2) for i in range(num)]
    shape, manifest = cut(parameters, 3, 2)[1], read_manifest(directory)
    Path("/proc/self/clear_refs").write_text("5")
    before, bytes_before = status("VmRSS"), read()
    held = work(directory, manifest, shape)
    return status("VmHWM") - before - held, read() - bytes_before - held

def convert(directory, manifest, shape):
    return sum(tensor.nbytes for tensor in reshard(directory, manifest, shape)[0].values())

def export(directory, manifest, shape):
    for name, tensor in averaged_parameters([directory, directory]):
        assert tensor.sum() != 0.25
    return 0

# the first call loads libraries
for work in (convert, export):
    print(json.dumps([measure(work, Path(path), int(num)) for path, num in zip(sys.argv[2::2], sys.argv[3::2])]))
"""


def test_memory_and_bytes_read_are_those_of_the_own_part(tmp_path: Path) -> None:
    """In a process of its own, by the kernel's high-water mark: pages of a mapped file would count."""
    mib = 1 << 20
    places: list[str] = []
    for num in (2, 8, 64):
        parameters = [Parameter(f"p{i}", (1024, 64), i % 2) for i in range(num)]
        directory = tmp_path / f"of-{num}" / "step-00000003"
        write_checkpoint(directory, make_whole(parameters), cut(parameters, 2, 4))
        places += [str(directory), str(num)]
    argv = [sys.executable, "-c", MEASURE, str(Path(__file__).parent), *places]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=120, check=True)
    converted, exported = map(json.loads, done.stdout.splitlines())
    for memory, bytes_read in converted[1:]:
        # its own part: 3 MiB, 24 MiB; a mapped file of the larger one: 12 MiB
        assert memory < 2 * mib, converted
        assert bytes_read < mib // 4, converted
    for memory, _ in exported[1:]:
        # two checkpoints of 6 MiB, 48 MiB; held: a parameter in fp64, one in fp32, a chunk that is hashed
        assert memory < 4 * mib, exported
