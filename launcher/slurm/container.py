"""Python as the ranks have it: in the site's container, where there is one."""

from __future__ import annotations

from launcher.slurm.submission import Submission


def contained(submission: Submission) -> tuple[str, ...]:
    """The command that runs Python on this node where the ranks run; empty: it is the Python of this process."""
    container = submission.site.container
    if container is None:
        return ()
    if container.kind == "pyxis":
        mounts = (f"--container-mounts={','.join(container.mounts)}",) if container.mounts else ()
        step = ("srun", "--nodes=1", "--ntasks=1", "--overlap", f"--container-image={container.image}", *mounts)
        return (*step, container.python)
    binds = tuple(f"--bind={mount}" for mount in container.mounts)
    gpus = ("--nv",) if submission.device == "cuda" else ()
    return ("apptainer", "exec", *gpus, *binds, container.image, container.python)
