"""Slurm's programs: where they are, and how they get there."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys

from plan import ClusterError, UnavailableError

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "sinfo")

_SBIN = ("/usr/sbin", "/usr/local/sbin", "/sbin")  # daemons live there, and a user's PATH may lack it
_APT = ("slurm-wlm", "munge", "iproute2", "util-linux")


def find(program: str) -> str | None:
    return shutil.which(program, path=os.pathsep.join([os.environ.get("PATH", os.defpath), *_SBIN]))


def ensure(*, install: bool = True) -> tuple[int, int]:
    """Installs what is missing where that can be done. Returns the version of Slurm."""
    missing = [program for program in PROGRAMS if not find(program)]
    if missing and install and os.geteuid() == 0 and shutil.which("apt-get"):
        print(f"cluster: {', '.join(missing)} not found: installing {' '.join(_APT)} with apt-get", file=sys.stderr)
        _apt("update")
        _apt("install", "-y", "--no-install-recommends", *_APT)
        missing = [program for program in PROGRAMS if not find(program)]
    if missing:
        raise UnavailableError(
            f"{', '.join(missing)} not found: install Slurm and munge"
            " (Debian, Ubuntu: apt-get install slurm-wlm munge; Fedora: dnf install slurm-slurmctld slurm-slurmd munge)"
        )
    said = subprocess.run([str(find("slurmd")), "-V"], capture_output=True, text=True, check=False).stdout  # noqa: S603
    match = re.search(r"(\d+)\.(\d+)", said)
    if match is None:
        raise ClusterError(f"`slurmd -V` says {said.strip()!r}, which is no version of Slurm")
    return int(match[1]), int(match[2])


def _apt(*arguments: str) -> None:
    environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    done = subprocess.run(  # noqa: S603 (a list, no shell)
        ["apt-get", "-q", *arguments],  # noqa: S607
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        reason = (done.stderr.strip() or done.stdout.strip()).splitlines()[-1:]
        raise UnavailableError(f"`apt-get {' '.join(arguments)}` failed: {' '.join(reason)}")
