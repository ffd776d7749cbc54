"""`docs/site.md`, made from the schema: `python -m launcher.slurm.document > docs/site.md`."""

from __future__ import annotations

from launcher.slurm.scheduler import OF_THE_USER
from launcher.slurm.site import SiteConfig
from launcher.slurm.texts import ELSEWHERE
from trainer.config.document import page
from trainer.config.options import walk

HEAD = """\
# Options of a site

What a cluster is like, once for all runs that are submitted there, in YAML as runs are written: given by `--site FILE`,
or named by `TRIMTAB_SITE`, or `site.yaml` in the working directory, or `~/.config/trimtab/site.yaml`. Without one
everything is left to the scheduler. `slurm/site.example.yaml` is one to start from. Every problem of the file is
reported at once, with its path.

The options become `#SBATCH` lines of `RUN/train.sbatch`, made from `slurm/train.sbatch.j2`. Texts that such a line
cannot hold (spaces, quotes) are handed to `sbatch` as arguments, never through a shell. Of the submitting shell's
variables for sbatch these count, where the script does not say the same: {kept}.

This page is made from `launcher/slurm/site.py` by `python -m launcher.slurm.document > docs/site.md`.
"""

TAIL = """
## What `directives` refuses

Options of sbatch that something else sets:

| option | |
| --- | --- |
"""


def document() -> str:
    """The page, as Markdown."""
    kept = ", ".join(f"`SBATCH_{name}`" for name in OF_THE_USER)
    elsewhere = "".join(f"| `{name}` | {where} |\n" for name, where in ELSEWHERE.items())
    return page(HEAD.format(kept=kept), "The cluster", tuple(walk(SiteConfig))) + TAIL + elsewhere


if __name__ == "__main__":
    print(document(), end="")
