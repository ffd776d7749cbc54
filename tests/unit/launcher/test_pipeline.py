"""Pipelines: what their file says, what is submitted in which order, and what goes with a stage that fails.

The scheduler is a table of jobs; `submit` does with the run directories what `trimtab submit` does.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launcher.pipelines.record import read_record
from launcher.pipelines.stages import Stage, in_order, is_pipeline, read_pipeline
from launcher.run_directory import read_outcome
from launcher.slurm.history import Job, append_begin
from launcher.slurm.pipeline import cancel_after, submit_pipeline
from launcher.slurm.site import SiteConfig
from launcher.slurm.submission import Submission, write_submission
from launcher.start import Request, entered
from launcher.status import status_of
from launcher.words import closing
from tests.unit.launcher.conftest import small_config
from trainer.config.files import RunFiles
from trainer.errors import ConfigError, LaunchError, RunDirectoryError

EXAMPLE = Path(__file__).parents[3] / "configs" / "pipelines" / "small.yaml"


@dataclass
class Cluster:
    """Jobs by id, and what was asked of the scheduler."""

    jobs: dict[str, str] = field(default_factory=dict)
    """Id → PENDING, RUNNING; gone when it has ended."""
    asked: list[tuple[str, list[str], list[str]]] = field(default_factory=list)
    """(stage, names of its runs, ids of the jobs it waits for)"""
    refuses: str = ""
    """A stage that cannot be submitted."""

    def submit(self, stage: Stage, requests: Sequence[Request], after: Sequence[str]) -> str:
        if stage.name == self.refuses:
            raise LaunchError("no such partition")
        job = str(100 + len(self.asked))
        self.asked.append((stage.name, [request.root.name for request in requests], list(after)))
        for index, request in enumerate(requests):
            own = job if len(requests) == 1 else f"{job}_{index}"
            self.jobs[own] = "PENDING"
            with entered(request, False, print):
                write_submission(submission(request.root, own))
        return job

    def states(self, ids: Sequence[str]) -> dict[str, str]:
        return {job: state for job, state in self.jobs.items() if {job, job.partition("_")[0]} & set(ids)}

    def cancel(self, ids: Sequence[str]) -> None:
        for job in list(self.jobs):
            if {job, job.partition("_")[0]} & set(ids):
                del self.jobs[job]


def submission(root: Path, job: str) -> Submission:
    return Submission(
        name="x", root=str(root), script="/s", workdir="/", nodes=(1, 1), ranks_per_node=1, device="cpu", python="p",
        site=SiteConfig(), job=job,
    )  # fmt: skip


class Ground:
    """A folder with a config, a pipeline of it, and a cluster."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.cluster = Cluster()
        self.said: list[str] = []
        (folder / "small.yaml").write_text(json.dumps(small_config(folder)))
        model = {"model": {"pretrained": "gpt2"}, "name": "more"}
        (folder / "more.yaml").write_text(json.dumps(small_config(folder, **model)))

    @property
    def root(self) -> Path:
        return self.folder / "runs" / "line"

    def write(self, *stages: dict[str, Any], **top: Any) -> Path:
        path = self.folder / "line.yaml"
        given = [{"config": "small.yaml"} | stage for stage in stages]
        path.write_text(json.dumps({"name": "line", "runs": str(self.folder / "runs"), "stages": given} | top))
        return path

    def submit(self, path: Path, **more: Any) -> dict[str, str]:
        self.said.clear()
        cluster = self.cluster
        pipeline = read_pipeline(path)
        return submit_pipeline(pipeline, cluster.submit, cluster.states, cluster.cancel, say=self.said.append, **more)

    def end(self, name: str, reason: str, *, trained: bool = True) -> Path:
        """The run ends, and its job with it."""
        run = self.root / name
        (run / "outcome.json").write_text(json.dumps({"reason": reason, "exit_code": 0, "message": "", "start": 0}))
        if trained:
            RunFiles(run).ledger.touch()
        if reason == "completed":
            RunFiles(run).export.mkdir(exist_ok=True)
        self.cluster.jobs.pop(json.loads(RunFiles(run).submission.read_text())["job"], None)
        return run


@pytest.fixture
def ground(tmp_path: Path) -> Ground:
    return Ground(tmp_path)


def problems(path: Path) -> list[tuple[str, str]]:
    with pytest.raises(ConfigError) as caught:
        read_pipeline(path)
    assert caught.value.source == str(path)
    return caught.value.problems


def test_the_example_is_what_its_comments_say() -> None:
    assert is_pipeline(EXAMPLE)
    assert not is_pipeline(EXAMPLE.parents[1] / "quickstart.yaml")
    pipeline = read_pipeline(EXAMPLE)
    first, second = pipeline.stages
    assert (first.name, first.after, first.source, len(first.requests)) == ("pretrain", (), None, 1)
    assert (second.name, second.after, len(second.requests)) == ("continue", ("pretrain",), 4)
    assert second.source == pipeline.root / "pretrain" / "export"
    assert {request.config.model.pretrained for request in second.requests} == {str(second.source)}
    assert [warning for stage in pipeline.stages for each in stage.requests for warning in each.warnings] == []


def test_the_example_of_a_distillation_names_its_student_and_its_teacher() -> None:
    pipeline = read_pipeline(EXAMPLE.with_name("distil.yaml"), here=True)
    assert [(stage.name, stage.after) for stage in pipeline.stages] == [
        ("pretrain", ()), ("prose", ("pretrain",)), ("student", ("prose",)),
    ]  # fmt: skip
    *_, student = pipeline.stages
    assert student.source == student.teacher == pipeline.root / "prose" / "export"
    assert [warning for stage in pipeline.stages for each in stage.requests for warning in each.warnings] == []


def test_the_example_of_an_encoder_goes_from_its_texts_to_their_classes() -> None:
    pipeline = read_pipeline(EXAMPLE.with_name("sentiment-zh.yaml"), here=True)
    assert len(pipeline.stages) == 2
    pretrain, classify = pipeline.stages
    assert (pretrain.after, classify.after) == ((), (pretrain.name,))
    assert classify.source == pipeline.root / pretrain.name / "export"
    assert [request.config.objective.kind for stage in pipeline.stages for request in stage.requests[:1]] == [
        "masked", "classification"
    ]  # fmt: skip
    assert {path.name for path in EXAMPLE.parent.glob("*.yaml")} == {"small.yaml", "distil.yaml", "sentiment-zh.yaml"}


def test_a_stage_is_a_run_with_its_own_options(ground: Ground) -> None:
    path = ground.write(
        {"name": "a", "set": ["schedule.duration=20"], "ranks": 2, "nodes": 2, "time": "1:00:00"},
        {"name": "b", "config": "more.yaml", "from": "a", "nodes": "1-3", "seeds": 2},
    )
    a, b = read_pipeline(path, ["optim.lr=0.5"]).stages
    [request] = a.requests
    assert (a.root, request.root, request.config.name) == (ground.root / "a", ground.root / "a", "a")
    cluster = request.config.cluster
    assert (cluster.nodes, cluster.ranks_per_node, request.config.schedule.duration) == (2, 2, 20)
    assert (a.nodes, a.time, b.nodes, b.time) == ((2, 2), "1:00:00", (1, 3), None)
    assert [each.root.name for each in b.requests] == ["seed=0", "seed=1"]
    # batches of 8 in micro-batches of 2 do not divide over three
    assert {each.config.cluster.nodes for each in b.requests} == {2}
    assert {each.config.optim.lr for stage in (a, b) for each in stage.requests} == {0.5}
    assert not ground.root.exists()


@pytest.mark.parametrize(
    ("stages", "after"),
    [
        ([{}, {}, {}], [(), ("a",), ("b",)]),
        ([{}, {"after": []}, {"after": ["a", "b"]}], [(), (), ("a", "b")]),
        ([{}, {}, {"from": "a"}], [(), ("a",), ("a",)]),
        ([{}, {}, {"from": "a", "after": ["b"]}], [(), ("a",), ("b", "a")]),
    ],
)
def test_what_a_stage_waits_for(ground: Ground, stages: list[dict[str, Any]], after: list[tuple[str, ...]]) -> None:
    named = [
        {"name": name, "config": "more.yaml" if "from" in stage else "small.yaml"} | stage
        for name, stage in zip("abc", stages, strict=True)
    ]
    assert [stage.after for stage in read_pipeline(ground.write(*named)).stages] == after


def test_everything_that_is_wrong_is_said_at_once(ground: Ground) -> None:
    path = ground.write(
        {"name": "$(touch x)", "set": ["optim.lrr=1", "name=x"]},
        {"name": "b", "config": "gone.yaml", "after": ["nobody"]},
        {"name": "c", "config": "more.yaml", "from": "d", "after": []},
        {"name": "d", "after": [], "sweep": {"optim.lr": [1, 1]}},
        {"name": "d", "config": "more.yaml", "from": "b", "set": ["model.pretrained=gpt2"]},
        name="a/b",
    )
    small, gone = ground.folder / "small.yaml", ground.folder / "gone.yaml"
    names = "a directory: up to 100 letters, digits and _.+=,@-, a letter or digit first"
    assert problems(path) == [
        ("name", f"is 'a/b', but names {names}"),
        ("stages.0.name", f"is '$(touch x)', but names {names}"),
        ("stages.0.set", "sets `name`, which the pipeline does; use `name`, `nodes` and `ranks` of it"),
        ("stages.1.after", "names 'nobody', and there is no such stage; there are $(touch x), b, c, d, d"),
        ("stages.2.from", "names 'd', which is no earlier stage; before it there are $(touch x), b"),
        ("stages.4.name", "is 'd', as an earlier stage is; give each its own"),
        ("stages.4.set", "sets `model.pretrained`, and `from` does too; leave one out"),
        ("stages.0", f"{small}: optim.lrr: is not an option; did you mean `optim.lr`?"),
        ("stages.1", f"{gone}: there is no such file; did you mean {ground.folder / 'more.yaml'}?"),
        ("stages.3", "optim.lr: has the value 1 twice; leave one out"),
    ]
    assert not (ground.folder / "x").exists()


def test_stages_that_wait_for_each_other_are_refused(ground: Ground) -> None:
    path = ground.write({"name": "a", "after": ["c"]}, {"name": "b"}, {"name": "c"})
    assert problems(path) == [("stages", "wait for each other in a circle: a → c → b → a")]
    path = ground.write({"name": "a", "after": ["a"]})
    assert problems(path) == [("stages", "wait for each other in a circle: a → a")]


def test_options_of_the_file_have_sentences_too(ground: Ground) -> None:
    path = ground.write({"name": "a", "form": "x", "nodes": "4-2", "sweep": {"seed": 1}}, {"name": "b", "from": {}})
    assert problems(path) == [
        ("stages.0.nodes", "must be a number of nodes, or a range of them (`2-4`), but is the text '4-2'"),
        ("stages.0.sweep.seed", "must be a list (`[a, b]`), but is 1"),
        ("stages.0.form", "is not an option; did you mean `from`?"),
        ("stages.1.from", "must be text, but is a group of options"),
    ]
    assert problems(ground.write()) == [("stages", "must have at least 1 element, but has none")]
    assert problems(ground.folder / "none.yaml") == [
        ("", f"there is no such file; did you mean {ground.folder / 'more.yaml'}?")
    ]
    path.write_text("a: [")
    assert problems(path)[0][1].startswith("line 1")


def test_a_stage_goes_on_with_one_run(ground: Ground) -> None:
    tune = {"name": "tune", "sweep": {"optim.lr": [0.1, 0.2]}}
    more = {"name": "more", "config": "more.yaml"}
    path = ground.write(tune, more | {"from": "tune"})
    assert problems(path) == [
        ("stages.1.from", "names 'tune', which is a sweep of several runs; name the one to go on with: tune/POINT")
    ]
    path = ground.write(tune, more | {"from": "tune/lr=0.3"})
    assert problems(path) == [("stages.1.from", "names 'lr=0.3', which is no point of tune; did you mean lr=0.2?")]
    path = ground.write({"name": "tune"}, more | {"from": "tune/lr=0.1"})
    assert problems(path) == [("stages.1.from", "is 'tune/lr=0.1', but 'tune' is one run; write tune")]
    path = ground.write(tune, more | {"from": "tune/lr=0.2"})
    stage = read_pipeline(path).stages[1]
    assert (stage.source, stage.after) == (ground.root / "tune" / "lr=0.2" / "export", ("tune",))


def test_a_stage_is_taught_by_an_earlier_one(ground: Ground) -> None:
    taught: dict[str, Any] = {"stage": "distill", "distill": {"teacher": {"pretrained": "gpt2"}}}
    more = {"model": {"pretrained": "gpt2"}, "name": "taught"} | taught
    (ground.folder / "taught.yaml").write_text(json.dumps(small_config(ground.folder, **more)))
    a, b, x = {"name": "a"}, {"name": "b", "config": "more.yaml", "from": "a"}, {"name": "x", "after": []}
    path = ground.write(a, b, x, {"name": "c", "config": "taught.yaml", "from": "a", "teacher": "b"})
    *_, c = read_pipeline(path).stages
    [request] = c.requests
    assert (c.after, c.source, c.teacher) == (("a", "b"), ground.root / "a/export", ground.root / "b/export")
    assert request.config.model.pretrained == str(c.source)
    assert request.config.distill is not None
    assert request.config.distill.teacher.pretrained == str(c.teacher)
    ground.submit(path, dry_run=True)
    assert "  4. c would be submitted after a and b, going on with a/export, taught by b/export" in ground.said
    # what teaches must be exported too
    ground.submit(path)
    for name in ("a", "b"):
        ground.end(name, "completed")
    RunFiles(ground.root / "b").export.rmdir()
    ground.cluster.asked.clear()
    ground.submit(path)
    assert [name for name, *_ in ground.cluster.asked] == ["b", "c"]

    student = {"name": "c", "config": "taught.yaml", "teacher": "b"}
    path = ground.write(a, b, x, student)
    assert read_pipeline(path).stages[-1].after == ("b",)
    assert problems(ground.write(a, student)) == [
        ("stages.1.teacher", "names 'b', which is no earlier stage; before it there are a")
    ]
    swept = b | {"name": "swept", "seeds": 2}
    assert problems(ground.write(a, swept, student | {"teacher": "swept/seed=7"})) == [
        ("stages.2.teacher", "names 'seed=7', which is no point of swept; did you mean seed=1?")
    ]
    assert problems(ground.write(a, b, student | {"set": ["distill.teacher.pretrained=gpt2"]})) == [
        ("stages.2.set", "sets `distill.teacher.pretrained`, and `teacher` does too; leave one out")
    ]


@given(st.lists(st.sets(st.integers(0, 9)), max_size=10))
def test_the_order_is_that_of_the_file_but_for_what_must_wait(waits: list[set[int]]) -> None:
    graph = {
        f"s{place}": [f"s{other}" for other in sorted(after) if other < len(waits) and other != place]
        for place, after in enumerate(waits)
    }
    try:
        order = in_order(graph)
    except ValueError:  # a circle: following what waits never ends
        left = dict(graph)
        while ready := [name for name, after in left.items() if not set(after) & left.keys()]:
            for name in ready:
                del left[name]
        assert left
        return
    assert sorted(order) == sorted(graph)
    for name, after in graph.items():
        assert all(order.index(other) < order.index(name) for other in after)
    for place, name in enumerate(order):
        ready = [other for other in order[place:] if set(graph[other]) <= set(order[:place])]
        assert name == min(ready, key=list(graph).index)


CHAIN: tuple[dict[str, Any], ...] = (
    {"name": "a"},
    {"name": "b", "config": "more.yaml", "from": "a", "seeds": 2, "nodes": 2},
    {"name": "c", "after": ["a", "b"]},
    {"name": "d", "after": []},
)


def test_a_dry_run_says_what_would_be_and_touches_nothing(ground: Ground) -> None:
    assert ground.submit(ground.write(*CHAIN), dry_run=True) == {}
    assert ground.said == [
        f"pipeline line in {ground.root}",
        "  1. a would be submitted",
        "  2. b would be submitted (an array of 2 runs, 2 nodes each) after a, going on with a/export",
        "  3. c would be submitted after a and b",
        "  4. d would be submitted",
    ]
    assert ground.cluster.asked == []
    assert not (ground.folder / "runs").exists()


def test_every_stage_waits_for_the_jobs_before_it(ground: Ground) -> None:
    assert ground.submit(ground.write(*CHAIN)) == {"a": "100", "b": "101", "c": "102", "d": "103"}
    assert ground.cluster.asked == [
        ("a", ["a"], []),
        ("b", ["seed=0", "seed=1"], ["100"]),
        ("c", ["c"], ["100", "101"]),
        ("d", ["d"], []),
    ]
    assert ground.said[-3:] == [
        "b: job 101, when 100 ended well",
        "c: job 102, when 100 and 101 ended well",
        "d: job 103",
    ]
    record = read_record(ground.root)
    assert record is not None
    assert [(stage.name, stage.job, len(stage.runs)) for stage in record.stages] == [
        ("a", "100", 1), ("b", "101", 2), ("c", "102", 1), ("d", "103", 1),
    ]  # fmt: skip


def test_the_same_command_submits_only_what_has_not_ended_well(ground: Ground) -> None:
    path = ground.write(*CHAIN)
    ground.submit(path)
    asked = ground.cluster.asked
    asked.clear()
    ground.cluster.jobs["100"] = "RUNNING"
    assert ground.submit(path) == {"a": "100", "b": "101", "c": "102", "d": "103"}
    assert asked == [], "all have a job"
    ground.end("a", "completed")
    ground.end("d", "crashed")
    assert ground.submit(path)["b"] == "101"
    assert asked == [("d", ["d"], [])]
    assert ground.said[1:5] == [
        "  1. a is complete",
        "  2. b goes on in job 101",
        "  3. c goes on in job 102",
        "  4. d is submitted",
    ]
    # one point of the sweep fails: it alone is done again, and c waits for that
    ground.end("b/seed=0", "completed")
    ground.end("b/seed=1", "crashed")
    asked.clear()
    ground.submit(path)
    assert asked == [("b", ["seed=1"], []), ("c", ["c"], ["100"])]
    assert "102" not in ground.cluster.jobs, "it waited in vain"
    assert "     job 102, which waits in vain, is cancelled" in ground.said
    for name in ("b/seed=1", "c", "d"):
        ground.end(name, "completed")
    asked.clear()
    assert ground.submit(path) == {}
    assert asked == []
    assert all("is complete" in line for line in ground.said[1:])


def test_a_stage_without_its_export_is_not_complete_where_another_goes_on_with_it(ground: Ground) -> None:
    path = ground.write(*CHAIN)
    ground.submit(path)
    for name in ("a", "d"):
        RunFiles(ground.end(name, "completed")).export.rmdir()
    ground.cluster.asked.clear()
    ground.submit(path)
    assert [name for name, *_ in ground.cluster.asked] == ["a", "b", "c"]


def test_a_job_that_waits_for_what_will_never_be_is_replaced(ground: Ground) -> None:
    path = ground.write({"name": "a"}, {"name": "b"})
    ground.submit(path)
    ground.end("a", "completed")
    ground.cluster.jobs["101"] = "NEVER"
    assert ground.submit(path) == {"b": "102"}
    assert list(ground.cluster.jobs) == ["102"]


def test_what_was_submitted_before_a_refusal_is_noted(ground: Ground) -> None:
    path = ground.write({"name": "a"}, {"name": "b"})
    ground.cluster.refuses = "b"
    with pytest.raises(LaunchError, match="no such partition"):
        ground.submit(path)
    ground.cluster.refuses = ""
    ground.cluster.asked.append(("", [], []))
    assert ground.submit(path) == {"a": "100", "b": "102"}
    assert ground.cluster.asked[-1] == ("b", ["b"], ["100"])


def test_of_chained_jobs_the_newest_is_waited_for(ground: Ground) -> None:
    path = ground.write({"name": "a"}, {"name": "b"})
    ground.submit(path)
    write_submission(submission(ground.root / "a", "500"))
    ground.cluster.jobs = {"500": "RUNNING"}
    assert ground.submit(path) == {"a": "100", "b": "102"}
    assert ground.cluster.asked[-1] == ("b", ["b"], ["500"])
    assert "  1. a goes on in job 500" in ground.said


def test_fresh_submits_everything_that_has_no_job(ground: Ground) -> None:
    path = ground.write({"name": "a"}, {"name": "b"})
    ground.submit(path)
    ground.end("a", "completed")
    with pytest.raises(LaunchError, match=r"^b has job 101; end it before --fresh$"):
        ground.submit(path, fresh=True)
    ground.end("b", "completed")
    assert ground.submit(path, fresh=True) == {"a": "102", "b": "103"}


def test_a_stage_that_was_trained_with_other_options_is_refused_before_anything_is_submitted(ground: Ground) -> None:
    ground.submit(ground.write({"name": "a"}, {"name": "b"}))
    ground.end("b", "completed")
    ground.cluster.asked.clear()
    with pytest.raises(RunDirectoryError) as caught:
        ground.submit(ground.write({"name": "a"}, {"name": "b", "set": ["optim.lr=0.5"]}))
    assert str(caught.value).splitlines()[:2] == [
        f"{ground.root / 'b'} holds a run with another config:",
        "  optim.lr: 0.001 → 0.5",
    ]
    assert ground.cluster.asked == []


def test_the_folder_of_a_pipeline_is_not_mistaken(ground: Ground) -> None:
    ground.submit(ground.write({"name": "a", "seeds": 2}))
    with pytest.raises(ConfigError, match=r"line/a is the folder of a sweep; use another name for the stage"):
        read_pipeline(ground.write({"name": "a"}))
    with pytest.raises(RunDirectoryError, match=r"line/a exists and is not the folder of a pipeline \(it holds no pip"):
        ground.submit(ground.write({"name": "b"}, name="a", runs=str(ground.root)))
    with pytest.raises(RunDirectoryError, match=r"seed=0 is the directory of a run; use another name for the pipeline"):
        ground.submit(ground.write({"name": "b"}, name="seed=0", runs=str(ground.root / "a")))
    (ground.root / "pipeline.json").write_text("{")
    with pytest.raises(RunDirectoryError, match=r"pipeline.json cannot be read \(ValidationError\); restore it"):
        ground.submit(ground.write({"name": "a", "seeds": 2}))


def test_a_stage_that_is_no_more_is_said(ground: Ground) -> None:
    ground.submit(ground.write({"name": "a"}, {"name": "b"}))
    ground.submit(ground.write({"name": "a"}))
    assert ground.said[-1] == "  b is no longer a stage; its run and its job 101 stay"


def test_what_waits_for_a_failed_stage_is_cancelled_with_the_reason(ground: Ground) -> None:
    path = ground.write(*CHAIN)
    ground.submit(path)
    run = ground.end("a", "halted")
    why = 'halted: the loss is $(touch x)\'\n"not" finite'
    assert cancel_after(run, why, ground.cluster.cancel) == ["b", "c"]
    assert ground.cluster.jobs == {"103": "PENDING"}
    for name in ("b/seed=0", "b/seed=1", "c"):
        outcome = read_outcome(ground.root / name)
        assert outcome is not None
        assert (outcome["reason"], outcome["exit_code"]) == ("cancelled", 2)
        assert outcome["message"] == f"not started: stage 'a' {why}"
        assert status_of(ground.root / name, 0.0, {}).state == "cancelled"
        assert "cancelled: not started: stage 'a' halted" in closing(ground.root / name, outcome)
    assert read_outcome(ground.root / "d") is None
    assert cancel_after(run, why, ground.cluster.cancel) == [], "once is enough"
    # once what was wrong is put right they are submitted again, and nothing is left of it
    ground.submit(path)
    assert [name for name, *_ in ground.cluster.asked[4:]] == ["a", "b", "c"]
    assert [read_outcome(ground.root / name) for name in ("b/seed=0", "b/seed=1", "c")] == [None, None, None]


def test_an_outcome_of_its_own_stays(ground: Ground) -> None:
    ground.submit(ground.write({"name": "a"}, {"name": "b", "after": []}, {"name": "c", "after": ["a", "b"]}))
    ground.end("c", "stopped", trained=False)
    ground.cluster.jobs["102"] = "PENDING"
    assert cancel_after(ground.end("a", "crashed"), "crashed: x", ground.cluster.cancel) == ["c"]
    outcome = read_outcome(ground.root / "c")
    assert outcome is not None
    assert outcome["reason"] == "stopped"
    assert "102" not in ground.cluster.jobs


def test_a_stage_that_runs_is_not_cancelled(ground: Ground) -> None:
    ground.submit(ground.write({"name": "a"}, {"name": "b"}))
    begun = Job(job="101", restart=0, began=1.0, nodes=("n",), position=0, submitted=0.0)
    append_begin(RunFiles(ground.root / "b"), begun)
    assert cancel_after(ground.end("a", "crashed"), "crashed: x", ground.cluster.cancel) == []
    assert list(ground.cluster.jobs) == ["101"]
    assert read_outcome(ground.root / "b") is None


def test_a_failure_goes_through_to_the_last_stage(ground: Ground) -> None:
    ground.submit(ground.write(*({"name": name} for name in "abcd")))
    assert cancel_after(ground.end("a", "crashed"), "crashed: x", ground.cluster.cancel) == ["b", "c", "d"]
    assert ground.cluster.jobs == {}


def test_one_point_of_a_sweep_takes_along_what_waits_for_all(ground: Ground) -> None:
    ground.submit(ground.write({"name": "a", "seeds": 3}, {"name": "b"}))
    assert cancel_after(ground.root / "a" / "seed=1", "halted: x", ground.cluster.cancel) == ["b"]
    assert cancel_after(ground.root / "a" / "seed=2", "halted: x", ground.cluster.cancel) == []
    assert list(ground.cluster.jobs) == ["100_0", "100_1", "100_2"]


def test_what_waits_for_a_sweep_that_lost_a_run_is_held_until_the_others_have_ended(ground: Ground) -> None:
    path = ground.write({"name": "a", "seeds": 3}, {"name": "b"}, {"name": "c"}, {"name": "d", "after": []})
    ground.submit(path)
    assert cancel_after(ground.end("a/seed=1", "crashed"), "crashed: x", ground.cluster.cancel) == ["b", "c"]
    ground.end("a/seed=0", "completed")
    ground.cluster.asked.clear()
    assert ground.submit(path) == {"a": "100", "d": "103"}
    assert ground.said[1:] == [
        "  1. a goes on in job 100, without 1 of its 3 runs; then submit it again",
        "  2. b is not submitted before that",
        "  3. c is not submitted before that",
        "  4. d goes on in job 103",
    ]
    ground.end("a/seed=2", "completed")
    ground.cluster.asked += [("", [], [])] * 4
    assert ground.submit(path) == {"a": "104", "b": "105", "c": "106", "d": "103"}
    assert ground.cluster.asked[4:] == [("a", ["seed=1"], []), ("b", ["b"], ["104"]), ("c", ["c"], ["105"])]


def test_a_stage_that_waits_for_others_now_is_submitted_again_unless_it_runs(ground: Ground) -> None:
    ground.submit(ground.write({"name": "a"}, {"name": "b"}, {"name": "c"}))
    ground.cluster.jobs["101"] = "RUNNING"
    path = ground.write({"name": "a"}, {"name": "b", "after": []}, {"name": "c", "after": ["a"]})
    assert ground.submit(path) == {"a": "100", "b": "101", "c": "103"}
    assert ground.cluster.asked[3:] == [("c", ["c"], ["100"])]
    assert "102" not in ground.cluster.jobs


def test_a_run_of_no_pipeline_takes_nothing_along(ground: Ground) -> None:
    (ground.folder / "runs" / "alone").mkdir(parents=True)
    assert cancel_after(ground.folder / "runs" / "alone", "halted", ground.cluster.cancel) == []
