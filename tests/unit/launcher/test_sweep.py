"""Sweeps: points, their names, their folder, and going on with them."""

import json
import math
import string
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launcher.pipelines.points import MAX_NAME, Axis, as_yaml, points_of, read_axes, read_axis
from launcher.pipelines.sweep import enter_sweep, expand, read_points, read_sweep
from launcher.run_directory import create
from launcher.start import Request, entered
from tests.unit.launcher.conftest import small_config
from trainer.config import yamltext
from trainer.config.check import check_config
from trainer.config.schema import RunConfig
from trainer.errors import ConfigError, LaunchError, RunDirectoryError

SAFE = set(string.ascii_letters + string.digits + "._+=,-")

scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
)
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("ab", min_size=1), inner)
)
axes_of_three = st.lists(st.lists(values, min_size=1, max_size=3, unique_by=as_yaml), min_size=1, max_size=3).map(
    lambda lists: [Axis(f"model.config.x{number}", tuple(each)) for number, each in enumerate(lists)]
)


def sweep(config_file: Path, *axes: str, overrides: tuple[str, ...] = (), **more: Any) -> list[Request]:
    return expand(
        config_file, overrides, axes, more.pop("seeds", None), more.pop("ranks", None), dry_run=False, say=print
    )


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("optim.lr=1e-3,3e-4", (0.001, 0.0003)),
        ("data.sources.0.files=[a,b],[c]", (["a", "b"], ["c"])),
        ("model.overrides={a: 1, b: 2},{}", ({"a": 1, "b": 2}, {})),
        ("data.sources.0.template='a, b',\"c,\"", ("a, b", "c,")),
        ("precision = bf16, fp32", ("bf16", "fp32")),
        ("checkpoint.every=null,5", (None, 5)),
        ("guard.replay=true,no", (True, "no")),
        ("model.pretrained=https://x/y,it's", ("https://x/y", "it's")),
    ],
)
def test_values_are_yaml_between_commas(text: str, values: tuple[Any, ...]) -> None:
    assert read_axis(text) == Axis(text.partition("=")[0].strip(), values)


@given(st.lists(values, min_size=1, max_size=4))
def test_values_that_were_written_are_read_back(written: list[Any]) -> None:
    assert read_axis(f"x={','.join(map(as_yaml, written))}").values == tuple(written)
    assert [yamltext.parse(as_yaml(value)) for value in written] == written


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("optim.lr", "the sweep 'optim.lr' must have the form option=value,value, as in optim.lr=1e-3,3e-4"),
        ("=1,2", "the sweep '=1,2' must have the form option=value,value, as in optim.lr=1e-3,3e-4"),
        ("seed=", "seed: has no values; give them with commas between, as in seed=1,2,3"),
        ("seed=1,,2", "the values '1,,2' are not YAML"),
        ("seed=1],[2", "the values '1],[2' are not YAML"),
        ("data.sources.0.files=[a,b", "are not YAML"),
    ],
)
def test_another_form_is_refused_with_what_it_is(text: str, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_axis(text)
    assert says in str(caught.value)


def test_all_that_is_wrong_is_said_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        read_axes(["optim.lr", "seed="])
    assert len(caught.value.problems) == 2


@given(axes_of_three)
def test_points_are_every_combination_under_names_that_are_safe_bounded_and_unique(axes: list[Axis]) -> None:
    points = points_of(axes)
    names = [point.name for point in points]
    assert len(points) == math.prod(len(axis.values) for axis in axes)
    assert len(set(names)) == len({point.overrides for point in points}) == len(points)
    for name in names:
        assert set(name) <= SAFE
        assert 0 < len(name) <= MAX_NAME
        assert name[0] not in ".-"
    for point, chosen in zip(points, product(*(axis.values for axis in axes)), strict=True):
        alone = [Axis(axis.option, (value,)) for axis, value in zip(axes, chosen, strict=True)]
        assert points_of(alone) == [point], "a name depends on its point only, not on the others"


def test_a_name_reads_as_what_sets_the_point_apart() -> None:
    axes = [Axis("optim.lr", (1e-3, 3e-4)), Axis("seed", (1, 2))]
    assert [(point.name, point.overrides) for point in points_of(axes)] == [
        ("lr=0.001,seed=1", ("optim.lr=0.001", "seed=1")),
        ("lr=0.001,seed=2", ("optim.lr=0.001", "seed=2")),
        ("lr=0.0003,seed=1", ("optim.lr=0.0003", "seed=1")),
        ("lr=0.0003,seed=2", ("optim.lr=0.0003", "seed=2")),
    ]
    long = points_of([Axis(f"model.config.an_option_{letter}", (1.2345678901234567,)) for letter in "abcd"])
    assert (len(long[0].name), long[0].name[:24]) == (MAX_NAME, "an_option_a=1.2345678901")
    both = points_of([Axis("data.tokenizer.train.max_characters", (5,)), Axis("data.clean.max_characters", (6,))])
    assert both[0].name == "train.max_characters=5,clean.max_characters=6"
    assert points_of([Axis("data.exclude_batches.0", ([1, 2],))])[0].name.startswith("exclude_batches.0=1-2-")


@pytest.mark.parametrize("value", ["$(touch x)", "a'b\"c", "a\nb", "../../x", "a b", "1,b=2", "", "é", "-rf"])
def test_a_hostile_value_is_no_part_of_a_name_but_is_the_value(value: str, tmp_path: Path) -> None:
    [point] = points_of([Axis("model.config.note", (value,))])
    assert set(point.name) <= SAFE
    assert "/" not in point.name
    file = tmp_path / "a.yaml"
    file.write_text(json.dumps(small_config(tmp_path)))
    [request] = read_sweep(file, (), [Axis("model.config.note", (value,))]).requests
    assert request.config.model.config is not None
    assert request.config.model.config["note"] == value
    assert request.root == tmp_path / "runs" / "small" / point.name
    assert check_config(request.config) == []


def test_a_text_that_reads_as_a_number_is_another_point_than_the_number() -> None:
    names = [point.name for point in points_of([Axis("model.config.x", (1, "1", True, "true"))])]
    assert len(set(names)) == 4
    assert names[0] == "x=1"


@pytest.mark.parametrize(
    ("axes", "says"),
    [
        ([Axis("seed", (1,)), Axis("seed", (2,))], "seed: is swept twice; give all its values at once"),
        ([Axis("seed", (1, 2, 1))], "seed: has the value 1 twice; leave one out"),
        ([Axis("name", ("a",))], "name: cannot be swept: each point of a sweep is named by what sets it apart"),
        (
            [Axis("optim", ({"lr": 1},)), Axis("optim.lr", (2,))],
            "optim.lr: is swept, and `optim`, of which it is a part, too; sweep one of them",
        ),
        ([Axis("optim.lr", (math.inf,))], "optim.lr: has a value that is not finite; leave it out"),
        ([Axis("optim.lr", ())], "optim.lr: has no values; give some, or leave it out"),
        (
            [Axis("seed", tuple(range(40))), Axis("optim.lr", tuple(range(1, 41)))],
            "it has 1600 points, and 1000 is the most; split it, each with its own name",
        ),
    ],
)
def test_axes_that_contradict_each_other_are_refused(axes: list[Axis], says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        points_of(axes)
    assert str(caught.value).splitlines()[1:] == [f"  {says}"]


def test_each_point_is_a_run_of_its_own(config_file: Path, tmp_path: Path) -> None:
    requests = sweep(config_file, "optim.lr=1e-3,3e-4", overrides=("seed=7",), seeds=2, ranks=2)
    root = tmp_path / "runs" / "small"
    assert [request.root for request in requests] == [
        root / name for name in ("lr=0.001,seed=7", "lr=0.001,seed=8", "lr=0.0003,seed=7", "lr=0.0003,seed=8")
    ]
    assert [(request.config.optim.lr, request.config.seed) for request in requests] == [
        (0.001, 7), (0.001, 8), (0.0003, 7), (0.0003, 8),
    ]  # fmt: skip
    assert {request.config.cluster.ranks_per_node for request in requests} == {2}
    for request in requests:
        with entered(request, False, print):
            assert (request.root / "config.yaml").exists()


def test_what_is_wrong_in_many_points_is_said_once(config_file: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        sweep(config_file, "optim.lrr=1,2", "batch.samples=8,-8,-16")
    assert caught.value.problems == [
        ("optim.lrr", "is not an option; did you mean `optim.lr`?"),
        ("batch.samples", "must be greater than 0, but is −8"),
        ("batch.samples", "must be greater than 0, but is −16"),
    ]
    with pytest.raises(ConfigError, match=r"the points lr=1 and lr=1\.0 are the same run; leave one out"):
        sweep(config_file, "optim.lr=1,1.0")
    with pytest.raises(ConfigError, match="seed: is swept, and a number of seeds is given too; give one of them"):
        sweep(config_file, "seed=1,2", seeds=2)


def test_a_required_option_may_come_from_the_sweep_alone(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text(json.dumps(small_config(tmp_path, optim={})))
    assert [request.config.optim.lr for request in sweep(file, "optim.lr=1,2")] == [1, 2]


def test_the_same_command_goes_on_with_the_same_points_whatever_their_order(config_file: Path, tmp_path: Path) -> None:
    first = sweep(config_file, "optim.lr=1,2", "seed=1,2")
    written = (tmp_path / "runs" / "small" / "sweep.json").read_bytes()
    assert sweep(config_file, "optim.lr=1,2", "seed=1,2") == first
    assert sweep(config_file, "seed=2,1", "optim.lr=2,1") == first
    assert (tmp_path / "runs" / "small" / "sweep.json").read_bytes() == written


def test_points_may_be_added_behind_those_that_there_are(config_file: Path, tmp_path: Path) -> None:
    root = tmp_path / "runs" / "small"
    sweep(config_file, "optim.lr=1,2", "seed=5")
    said: list[str] = []

    def again(*axes: str) -> list[str]:
        found = read_sweep(config_file, (), read_axes(axes))
        enter_sweep(found, said.append)
        assert [point.name for point in read_points(root) or ()] == [request.root.name for request in found.requests]
        return [request.root.name for request in found.requests]

    assert again("optim.lr=2,1", "seed=5") == ["lr=1,seed=5", "lr=2,seed=5"]
    assert said == []
    assert again("optim.lr=3,2,1", "seed=5") == ["lr=1,seed=5", "lr=2,seed=5", "lr=3,seed=5"]
    assert said == [f"the point lr=3,seed=5 is added to the 2 of {root}"]
    before = (root / "sweep.json").read_bytes()
    with pytest.raises(RunDirectoryError) as caught:
        again("optim.lr=3", "seed=5,6")
    assert str(caught.value) == (
        f"{root} is a sweep with other points: lr=1,seed=5 and 1 more of its 3 points would no longer be in it; give "
        "its values too, or use another `name`"
    )
    assert (root / "sweep.json").read_bytes() == before


def test_nothing_is_written_by_a_dry_run(config_file: Path, tmp_path: Path) -> None:
    assert len(expand(config_file, (), ["seed=1,2"], None, None, dry_run=True, say=print)) == 2
    assert not (tmp_path / "runs").exists()


def test_a_sweep_and_a_run_are_not_mistaken_for_each_other(
    config_file: Path, make_config: Callable[..., RunConfig], tmp_path: Path
) -> None:
    root = tmp_path / "runs" / "small"
    with entered(Request(make_config(), root, ()), False, print):
        pass
    with pytest.raises(RunDirectoryError, match=r"small is the directory of a run; use another name for the sweep"):
        sweep(config_file, "seed=1,2")
    with pytest.raises(LaunchError, match=r"a sweep is made from a config file, and .*small is a directory"):
        sweep(root, "seed=1,2")
    sweep(config_file, "seed=1,2", overrides=("name=other",))
    with pytest.raises(RunDirectoryError, match=r"other exists and is not a run directory"):
        create(tmp_path / "runs" / "other")
    (tmp_path / "runs" / "mine").mkdir()
    (tmp_path / "runs" / "mine" / "thesis.tex").touch()
    with pytest.raises(
        RunDirectoryError, match=r"mine exists and is not the folder of a sweep \(it holds no sweep.json"
    ):
        sweep(config_file, "seed=1,2", overrides=("name=mine",))


def test_a_damaged_record_is_refused(config_file: Path, tmp_path: Path) -> None:
    sweep(config_file, "seed=1,2")
    path = tmp_path / "runs" / "small" / "sweep.json"
    path.write_text(path.read_text()[:-20])
    with pytest.raises(RunDirectoryError, match=r"sweep.json cannot be read \(ValidationError\); restore it"):
        sweep(config_file, "seed=1,2")
