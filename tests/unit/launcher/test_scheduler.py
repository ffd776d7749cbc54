"""Slurm's commands as programs: their argv, their environment, their time, their words. The real ones: tests/slurm."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import pytest

from launcher.slurm import scheduler
from launcher.slurm.fitting import refuse_unfitting, refuse_unmounted
from launcher.slurm.scheduler import SchedulerError, is_alive, is_gone
from launcher.slurm.site import ContainerConfig, SiteConfig
from trainer.errors import LaunchError

RECORDER = """\
import json, os, sys
print(json.dumps({"argv": sys.argv[1:], "environment": dict(os.environ)}), file=open(os.environ["RECORD"], "w"))
"""


@pytest.fixture
def commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is the whole PATH."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.setenv("RECORD", str(tmp_path / "record"))
    return folder


def program(commands: Path, name: str, code: str) -> None:
    (commands / name).write_text(f"#!{sys.executable} -I\n{code}\n")
    (commands / name).chmod(0o755)


def test_without_slurm_it_says_so(commands: Path) -> None:
    assert not scheduler.available()
    with pytest.raises(SchedulerError, match="there is no sbatch on the PATH: submit from a login node"):
        scheduler.require()
    with pytest.raises(SchedulerError, match="there is no squeue on the PATH, which is needed to say how jobs stand"):
        scheduler.job("1")
    program(commands, "sbatch", "")
    scheduler.require()


def test_a_controller_that_does_not_answer_holds_nobody_up(commands: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program(commands, "scontrol", "import time; time.sleep(60)")
    monkeypatch.setattr(scheduler, "TIMEOUT_SECONDS", 0.2)
    began = time.monotonic()
    with pytest.raises(SchedulerError, match=r"Slurm did not answer within 0.2 s when asked to requeue job 12; "):
        scheduler.requeue("12")
    assert time.monotonic() - began < 30


def test_what_slurm_says_becomes_one_sentence(commands: Path, tmp_path: Path) -> None:
    said = "sbatch: error: invalid partition specified: x\\nallocation failure: Invalid partition name specified\\n"
    program(
        commands, "sbatch", f"import sys; sys.stderr.write('{said}' + 'sbatch: fatal: no\\xff\\n' * 2); sys.exit(1)"
    )
    script = tmp_path / "a b.sbatch"
    script.write_text("#!/bin/bash\n")
    with pytest.raises(SchedulerError) as refused:
        scheduler.submit(script)
    assert str(refused.value) == (
        f"Slurm was asked to submit {script}, and said: invalid partition specified: x; "
        "Invalid partition name specified; no\xff"
    )


@pytest.mark.parametrize(("printed", "job"), [("123", "123"), ("123;cluster", "123"), ("hello from a plugin\n7", "7")])
def test_the_id_of_a_job(commands: Path, tmp_path: Path, printed: str, job: str) -> None:
    program(commands, "sbatch", f"print({printed!r})")
    (tmp_path / "s").write_text("")
    assert scheduler.submit(tmp_path / "s") == job


def test_an_answer_without_an_id_is_no_job(commands: Path, tmp_path: Path) -> None:
    program(commands, "sbatch", "print('queued')")
    (tmp_path / "s").write_text("")
    with pytest.raises(SchedulerError, match="answered 'queued' instead of a job's id"):
        scheduler.submit(tmp_path / "s")


def test_what_sbatch_gets(commands: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A job that submits the next one hands nothing of itself on; the user's choices count where the script is open."""
    program(commands, "sbatch", RECORDER + "print(5)")
    dropped = {
        *("SLURM_RESTART_COUNT", "SLURM_JOB_ID", "SLURM_EXPORT_ENV", "SLURMD_NODENAME", "PMI_RANK"),
        *("SBATCH_WAIT", "SBATCH_TIMELIMIT", "SBATCH_SIGNAL", "SBATCH_PARTITION", "SBATCH_QOS", "SQUEUE_STATES"),
    }
    kept = {"SLURM_CONF", "SLURM_CLUSTERS", "SLURM_JWT", "SBATCH_ACCOUNT", "SBATCH_RESERVATION", "CUDA_HOME"}
    for name in dropped | kept:
        monkeypatch.setenv(name, "1")
    script = tmp_path / "x.sbatch"
    script.write_text("#!/bin/bash\n#SBATCH --partition=gpu\n#SBATCH --exclusive\necho SBATCH --account=no\n")
    arguments = ["--job-name=a 'b' $(touch x)\n", "--qos=high", "--output=é"]
    assert scheduler.submit(script, arguments) == "5"
    record = json.loads((tmp_path / "record").read_text())
    assert record["argv"] == ["--parsable", *arguments, str(script)]
    assert set(record["environment"]) & (dropped | kept) == kept


def test_a_users_filters_do_not_hide_jobs(commands: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program(commands, "squeue", RECORDER)
    for name in ("SQUEUE_STATES", "SQUEUE_PARTITION", "SLURM_TIME_FORMAT"):
        monkeypatch.setenv(name, "relative")
    assert scheduler.jobs(["7", "12_3", "7"]) == {}
    record = json.loads((tmp_path / "record").read_text())
    assert record["argv"][:5] == ["--noheader", "--all", "--array", "--states=all", "--jobs=12_3,7"]
    assert {
        name: value for name, value in record["environment"].items() if name.startswith(("SQUEUE", "SLURM_TIME"))
    } == {"SLURM_TIME_FORMAT": "%s"}
    assert scheduler.jobs([]) == {}


def test_jobs_are_read_as_slurm_writes_them(commands: Path) -> None:
    lines = [
        "12_3|RUNNING|2|1795349444|1795349456|n7|(null)|None|",
        "13|PENDING|0|N/A|N/A||afterok:12_*(unfulfilled)|Nodes required for job are DOWN, or reserved|",
        "slurm_load: a line of something else",
    ]
    program(commands, "squeue", f"print({chr(10).join(lines)!r})")
    states = scheduler.jobs(["12_3", "13"])
    assert set(states) == {"12_3", "13"}
    runs, waits = states["12_3"], states["13"]
    assert (runs.state, runs.restarts, runs.start, runs.end) == ("RUNNING", 2, 1795349444.0, 1795349456.0)
    assert (runs.nodes, runs.dependency) == (("n7",), "")
    assert (waits.start, waits.end, waits.nodes) == (None, None, ())
    assert waits.reason == "Nodes required for job are DOWN, or reserved"
    assert scheduler.waiting_for("12").keys() == {"13"}
    assert scheduler.waiting_for("1") == {}
    assert scheduler.end_time("12_3") == 1795349456.0
    assert scheduler.job("99") is None


def test_what_waits_for_a_job_waits_for_its_successor(commands: Path, tmp_path: Path) -> None:
    waiting = "afterok:12_*(unfulfilled),afterok:123(unfulfilled),afterany:12_3(failed),afterok:12(unfulfilled)"
    program(commands, "squeue", f"print('40|PENDING|0|N/A|N/A||{waiting}|Dependency|')")
    program(commands, "scontrol", RECORDER)
    [state] = scheduler.waiting_for("12").values()
    scheduler.redirect(state, "12", "90")
    argv = json.loads((tmp_path / "record").read_text())["argv"]
    assert argv == ["update", "JobId=40", "Dependency=afterok:90,afterok:123,afterany:12_3,afterok:90"]


@pytest.mark.parametrize(
    ("gres", "kind", "count"),
    [
        ("gpu:a100:4(S:0-1),nvme:1", None, 4),
        ("gpu:2", None, 2),
        ("gpu", None, 1),
        ("gpu:a100:4(S:0,1),gpu:v100:2", None, 6),
        ("gpu:a100:4(S:0,1),gpu:v100:2", "v100", 2),
        ("gpu:2", "a100", 0),
        ("(null)", None, 0),
        ("shard:8,mps:100", None, 0),
    ],
)
def test_gpus_of_a_node(commands: Path, gres: str, kind: str | None, count: int) -> None:
    program(commands, "sinfo", f"print('n1|{gres}|batch*|'); print('n2|gpu:9|other|')")
    assert scheduler.gpus_by_node(None, kind) == {"n1": count}
    assert scheduler.gpus_by_node("other").keys() == {"n1", "n2"}


@pytest.mark.parametrize("state", ["PENDING", "RUNNING", "COMPLETING", "CONFIGURING", "REQUEUED", "SUSPENDED"])
def test_jobs_that_live(state: str) -> None:
    assert is_alive(state)


@pytest.mark.parametrize("state", ["COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "DEADLINE"])
def test_jobs_that_do_not(state: str) -> None:
    assert not is_alive(state)


@pytest.mark.parametrize(
    ("state", "gone"),
    [
        *(("idle", False), ("allocated", False), ("mixed+drain", False), ("allocated+maint", False)),
        *(("down", True), ("idle+not_responding", True), ("down+drain", True), ("allocated+powered_down", True)),
    ],
)
def test_nodes_that_serve_no_more(state: str, gone: bool) -> None:
    assert is_gone(state) is gone


# fitting


@pytest.mark.parametrize(
    ("gpus", "nodes", "wanted"),
    [({"a": 4, "b": 4, "c": 0}, (2, 3), 4), ({"a": 8, "b": 4}, (1, 2), 8), ({"a": 0}, (1, 1), 0)],
)
def test_different_nodes_will_do_if_enough_of_them_do(
    gpus: dict[str, int], nodes: tuple[int, int], wanted: int
) -> None:
    refuse_unfitting(SiteConfig(), nodes, wanted, gpus)


def test_too_few_nodes_with_enough_gpus_are_refused() -> None:
    with pytest.raises(LaunchError) as refused:
        refuse_unfitting(
            SiteConfig(partition="gpu", exclude=("b",)), (2, 4), 4, {"a": 4, "b": 4, "c": 2, "d": 0, "e": 2}
        )
    assert str(refused.value) == (
        "2 nodes with 4 GPUs each are asked for, and partition gpu has 1 "
        "(1 node with 4, 2 nodes with 2, 1 node with none): "
        "lower cluster.ranks_per_node or --nodes, or name another partition in the site file"
    )
    with pytest.raises(
        LaunchError, match=r"1 node with 1 GPU each is asked for, and the default partition has none \(it"
    ):
        refuse_unfitting(SiteConfig(), (1, 1), 1, {})


def test_a_container_must_show_the_run_where_it_is() -> None:
    container = ContainerConfig(image="x", mounts=("/runs", "/data:/inside", "/home:/home:ro"))
    site = SiteConfig(container=container)
    refuse_unmounted(site, {"the run": Path("/runs/a"), "the config": Path("/home/me/x")})
    refuse_unmounted(SiteConfig(), {"the run": Path("/elsewhere")})
    refuse_unmounted(
        SiteConfig(container=ContainerConfig(kind="apptainer", image="x")), {"the run": Path("/elsewhere")}
    )
    for path in ("/data/prepared", "/runs2/a"):
        with pytest.raises(
            LaunchError, match=f"none of them shows {path} .prepared data. at the same path inside; add "
        ):
            refuse_unmounted(site, {"prepared data": Path(path)})
