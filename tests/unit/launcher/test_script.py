"""The batch script: exact texts by case, and what it executes when it runs, whatever the user's texts are."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from launcher.accelerate import accelerate_argv
from launcher.slurm.script import log_path, quote, render, sbatch_arguments
from launcher.slurm.site import SiteConfig
from launcher.slurm.submission import Submission
from trainer.errors import LaunchError

ROOT = Path(__file__).parents[3]
GOLDEN = Path(__file__).parent / "golden"
WRITE = "TRIMTAB_WRITE_GOLDEN"
BASH = shutil.which("bash") or "/bin/bash"

HOSTILE = "a b'c\"d $(touch x) `touch y` ;touch z; #SBATCH --wait\r\n#SBATCH --nodes=9 \\ 100% é中 ${HOME} * ~"


def submission(site: dict[str, Any] | None = None, **changes: Any) -> Submission:
    root = changes.pop("root", "/runs/demo")
    values: dict[str, Any] = {
        "name": "demo",
        "root": root,
        "script": f"{root}/train.sbatch",
        "workdir": "/home/me",
        "nodes": (2, 2),
        "ranks_per_node": 2,
        "device": "cpu",
        "python": "/opt/venv/bin/python",
        "site": SiteConfig(**(site or {})),
    }
    return Submission(**(values | changes))


PYXIS = {"kind": "pyxis", "image": "/images/trimtab 1.sqsh", "mounts": ("/runs", "/data:/data:ro"), "python": "python3"}
APPTAINER = {"kind": "apptainer", "image": "/images/trimtab.sif", "mounts": ("/runs", "/data:/data:ro")}

CASES: dict[str, list[Submission]] = {
    "cpu": [submission()],
    "shared-nodes": [submission({"exclusive": False, "memory": "8G"}, threads_per_rank=3, time="30")],
    "gpu-elastic": [
        submission(
            {
                "partition": "gpu",
                "account": "lab-1",
                "qos": "normal",
                "gpu_type": "a100",
                "time": "24:00:00",
                "exclude": ("node7", "node9"),
                "modules": ("cuda/12.8", "openmpi"),
                "setup": ("source /opt/site/env.sh",),
                "environment": {"NCCL_SOCKET_IFNAME": "ib0", "GREETING": "it's $HOME"},
                "directives": {"switches": 1, "contiguous": True, "overcommit": False, "constraint": "nvlink&ib"},
            },
            nodes=(2, 4),
            ranks_per_node=4,
            device="cuda",
        )
    ],
    "gres": [
        submission({"gpu_option": "gres", "directives": {"gres": "nvme:1"}}, device="cuda", after=("/runs/before",))
    ],
    "array": [
        submission(root=f"/runs/sweep/lr-{number}", script="/runs/sweep/train.sbatch", name=f"lr-{number}")
        for number in range(3)
    ],
    "chain": [submission({"continue_by": "chain", "signal_seconds": 300}, time="1:00:00")],
    "pyxis": [submission({"container": PYXIS, "modules": ("slurm",)}, device="cuda")],
    "apptainer": [submission({"container": APPTAINER, "modules": ("apptainer",)}, device="cuda")],
    "hostile": [submission(root=f"/runs/{HOSTILE}", name=HOSTILE, python="/opt/my env/bin/python")],
}


def shown(submissions: list[Submission]) -> str:
    """The script, and the arguments that go with it."""
    arguments = "".join(f"{argument!r}\n" for argument in sbatch_arguments(submissions))
    return f"{render(submissions)}\n=== arguments of sbatch\n{arguments}"


@pytest.mark.parametrize("name", CASES)
def test_scripts_are_these(name: str) -> None:
    path = GOLDEN / f"{name}.sbatch"
    if os.environ.get(WRITE):
        path.write_text(shown(CASES[name]), encoding="utf-8")
    assert shown(CASES[name]) == path.read_text(encoding="utf-8"), (
        f"if it is meant to be: {WRITE}=1 python -m pytest {__file__}"
    )


def test_every_golden_text_has_its_case() -> None:
    assert {path.stem for path in GOLDEN.glob("*.sbatch")} == set(CASES)


@pytest.mark.parametrize("name", CASES)
def test_lines_for_sbatch_are_plain_words(name: str) -> None:
    lines = [line for line in render(CASES[name]).splitlines() if line.startswith("#SBATCH")]
    assert lines
    for line in lines:
        assert len(line.split()) == 2, line
        assert not set(line) & set("'\"\\$`;&|<>(){}*?"), line
    # sbatch reads lines up to the first command
    text = render(CASES[name])
    assert text.rindex("\n#SBATCH") < text.index("\nset -eE")


def test_the_signal_must_not_come_at_once() -> None:
    with pytest.raises(
        LaunchError, match="a job of 2 would be asked to stop as soon as it starts, since that is due 120 s"
    ):
        render([submission(time="2")])
    render([submission(time="2:01")])


def test_runs_that_need_no_cores_by_number_get_whole_nodes() -> None:
    assert "--cpus-per-task" not in render([submission(device="cuda")])
    text = render([submission({"exclusive": False}, device="cuda")])
    # of the job, and of the step, which does not take it over
    assert text.count("--cpus-per-task=8") == 2
    assert "--exclusive" not in text


# what it executes

RECORDER = f"""#!{BASH}
printf '%s\\0' "${{0##*/}}" "$@" >> "$RECORD"
printf '\\n' >> "$RECORD"
"""


class Sandbox:
    """A folder in which a script finds nothing but recorders."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.bin, self.cwd, self.record = folder / "bin", folder / "cwd", folder / "record"
        self.bin.mkdir()
        self.cwd.mkdir()
        for name in ("python", "apptainer", "touch", "ln"):
            (self.bin / name).write_text(RECORDER)
            (self.bin / name).chmod(0o755)

    def run(self, script: str, *arguments: str, **environment: str) -> list[list[str]]:
        """The commands that it ran, each an argv."""
        path = self.folder / "script"
        path.write_bytes(script.encode())
        self.record.unlink(missing_ok=True)
        variables = {"PATH": str(self.bin), "RECORD": str(self.record), "LC_ALL": "C.UTF-8", **environment}
        done = subprocess.run([BASH, path, *arguments], cwd=self.cwd, env=variables, capture_output=True, check=False)
        assert done.stderr == b""
        assert done.returncode == 0
        assert list(self.cwd.iterdir()) == []
        commands = self.record.read_bytes().split(b"\0\n")[:-1]
        return [[word.decode() for word in command.split(b"\0")] for command in commands]


@pytest.fixture(scope="module")
def sandbox(tmp_path_factory: pytest.TempPathFactory) -> Sandbox:
    return Sandbox(tmp_path_factory.mktemp("sandbox"))


NODE = {"SLURM_NODEID": "1", "TRIMTAB_MASTER": "node1", "TRIMTAB_PORT": "4711"}


def ranks_argv(root: str, *python: str) -> list[str]:
    """What `accelerate launch` is everywhere else, with what only the node knows."""
    argv = accelerate_argv(Path(root), "python")[1:]
    where = ["--machine_rank", "1", "--main_process_ip", "node1", "--main_process_port", "4711"]
    module = argv.index("trainer") - 1
    return [*python, *argv[:module], *where, *argv[module:]]


# a path or a name may hold whatever Linux allows
ANY = st.text(st.characters(exclude_characters="\0/", exclude_categories=["Cs"]), min_size=1, max_size=40)
TEXT = ANY.filter(lambda text: text not in (".", ".."))
SHELL = st.text(st.sampled_from("ab '\"$(){}`\\;&|<>*?~!#%=-\n\r\t\x07é"), min_size=1, max_size=30)


@settings(max_examples=60, deadline=None)
@given(name=TEXT | SHELL, folder=TEXT | SHELL, variable=TEXT | SHELL)
@example(name=HOSTILE, folder=HOSTILE, variable="$(touch x)")
@example(name="-n", folder="-e \\", variable="\\'")
@example(name="$'", folder="\x01a", variable="\x7f")
def test_texts_stay_texts(sandbox: Sandbox, name: str, folder: str, variable: str) -> None:
    root = f"{sandbox.folder}/{folder}"
    one_line = "".join(variable.split("\n")).replace("\r", "") or "x"
    run = submission({"environment": {"A_TEXT": one_line}}, root=root, name=name, python=f"{sandbox.bin}/python")
    text = render([run])
    checked = subprocess.run([BASH, "-n"], input=text.encode(), capture_output=True, check=False)
    assert (checked.returncode, checked.stderr) == (0, b"")
    srun = ["srun", "--ntasks-per-node=1", "--kill-on-bad-exit=1", "--label", "--export=ALL"]
    commands = sandbox.run(text, SLURM_JOB_ID="12")
    # a path with a backslash needs the link to its log
    assert [command for command in commands if command[0] != "ln"] == [
        ["python", "-m", "launcher.slurm.job", root, "--", *srun, "bash", f"{root}/train.sbatch", "ranks"]
    ]
    assert [command for command in commands if command[0] == "ln"] == (
        [["ln", "-sfn", f"{root}/logs/jobs.log", f"{root}/logs/12.log"]] if "\\" in root else []
    )
    assert sandbox.run(text, "ranks", **NODE) == [ranks_argv(root, "python")]


def test_variables_reach_the_ranks(sandbox: Sandbox) -> None:
    (sandbox.bin / "show").write_text(f'#!{BASH}\nprintf "%s" "$A_TEXT" > "$RECORD.text"\n{RECORDER}')
    (sandbox.bin / "show").chmod(0o755)
    run = submission({"environment": {"A_TEXT": "it's $HOME `x` é"}}, python=f"{sandbox.bin}/show")
    sandbox.run(render([run]), "ranks", **NODE)
    assert Path(f"{sandbox.record}.text").read_text() == "it's $HOME `x` é"


def test_each_task_of_an_array_has_its_run(sandbox: Sandbox) -> None:
    roots = [f"/runs/s/{name}" for name in ("a b", "$(touch x)", "c\nd")]
    python = f"{sandbox.bin}/python"
    text = render([submission(root=root, script="/runs/s/train.sbatch", python=python) for root in roots])
    for index, root in enumerate(roots):
        task = {"SLURM_ARRAY_JOB_ID": "12", "SLURM_ARRAY_TASK_ID": str(index), "SLURM_JOB_ID": "12"}
        link, job = sandbox.run(text, **task)
        assert link == [
            "ln",
            "-sfn",
            f"/runs/s/logs/12_{index}.log",
            str(log_path(submission(root=root), f"12_{index}")),
        ]
        assert job[3] == root
        assert sandbox.run(text, "ranks", **NODE, **task) == [ranks_argv(root, "python")]


def test_a_run_of_an_array_is_chained_with_the_options_of_the_array() -> None:
    odd = [submission(root=f"/runs/a b/{number}", script="/runs/a b/train.sbatch") for number in range(3)]
    assert sbatch_arguments(odd[1:2]) == sbatch_arguments(odd) == ["--output=/runs/a b/logs/%A_%a.log"]


def test_apptainer_stands_in_front_of_the_ranks_alone(sandbox: Sandbox) -> None:
    container = {"kind": "apptainer", "image": "/i m.sif", "mounts": ("/a b:/a b:ro",), "python": "py"}
    run = submission({"container": container}, device="cuda", python=f"{sandbox.bin}/python")
    text = render([run])
    [job] = sandbox.run(text)
    assert "apptainer" not in job
    prefix = ["apptainer", "exec", "--nv", "--bind=/a b:/a b:ro", "/i m.sif", "py"]
    assert sandbox.run(text, "ranks", **NODE) == [ranks_argv("/runs/demo", *prefix)]


def test_pyxis_is_options_of_srun(sandbox: Sandbox) -> None:
    (sandbox.bin / "python3").write_text(RECORDER)
    (sandbox.bin / "python3").chmod(0o755)
    # modules are the node's: in the container there is no `module`, and the script must not fail for that
    run = submission({"container": PYXIS, "setup": ("python setup",)}, python=f"{sandbox.bin}/python")
    text = render([run])
    setup, job = sandbox.run(text)
    assert setup == ["python", "setup"]
    assert job[job.index("srun") :] == [
        *("srun", "--ntasks-per-node=1", "--kill-on-bad-exit=1", "--label", "--export=ALL"),
        *("--container-image=/images/trimtab 1.sqsh", "--container-mounts=/runs,/data:/data:ro"),
        *("bash", "/runs/demo/train.sbatch", "ranks"),
    ]
    assert sandbox.run(text, "ranks", **NODE) == [ranks_argv("/runs/demo", "python3")]


@pytest.mark.parametrize(
    ("site", "place", "said"),
    [
        ({"setup": ("false", "true")}, "false", "line {} of the batch script failed: false"),
        ({"setup": ("f() { false; }", "f", "true")}, "f() { false; }", "line {} of the batch script failed: false"),
        ({"modules": ("no such",)}, "module load 'no such'", "line {}: module: command not found"),
    ],
)
def test_a_setup_that_fails_ends_the_job_and_says_where(
    sandbox: Sandbox, site: dict[str, Any], place: str, said: str
) -> None:
    path, text = sandbox.folder / "failing", render([submission(site, python="/bin/echo")])
    path.write_text(text)
    done = subprocess.run([BASH, path], env={"PATH": "/usr/bin:/bin"}, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert done.stdout == ""
    assert said.format(text.splitlines().index(place) + 1) in done.stderr


@given(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"])))
def test_a_quoted_word_is_one_line(text: str) -> None:
    assert not set(quote(text)) & {"\n", "\r"}


@pytest.mark.slow
def test_a_wheel_renders_without_the_repository(tmp_path: Path) -> None:
    """Built of a copy, so that the build leaves nothing here; unpacked, as an installer does."""
    build_meta = pytest.importorskip("setuptools.build_meta", reason="builds a wheel")
    source = tmp_path / "source"
    for name in ("launcher", "trainer"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "README.md", "slurm/train.sbatch.j2"):
        (source / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, source / name)
    build = f"import {build_meta.__name__} as b; b.build_wheel({str(tmp_path)!r})"
    built = subprocess.run([sys.executable, "-c", build], cwd=source, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    [wheel] = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "installed")
    shutil.rmtree(source)
    code = (
        "import sys; from launcher.slurm import script; from launcher.slurm.submission import Submission\n"
        "print(script.__file__, file=sys.stderr)\n"
        "print(script.render([Submission.model_validate_json(sys.stdin.read(), strict=False)]), end='')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        input=CASES["cpu"][0].model_dump_json(),
        env=os.environ | {"PYTHONPATH": str(tmp_path / "installed")},
        cwd=tmp_path / "installed",
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stderr == f"{tmp_path}/installed/launcher/slurm/script.py\n"
    assert done.stdout == render(CASES["cpu"])
