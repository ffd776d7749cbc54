"""A wheel carries the template of the batch script beside the code that fills it; here it is in `slurm/`."""

from setuptools import setup
from setuptools.command.build_py import build_py

TEMPLATE = "slurm/train.sbatch.j2"


class BuildWithTemplate(build_py):
    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            self.copy_file(TEMPLATE, f"{self.build_lib}/launcher/{TEMPLATE}")


setup(cmdclass={"build_py": BuildWithTemplate})
