"""What a few tokens of a teacher can teach, said without torch."""

import subprocess
import sys

import pytest

from trainer.config.distill import DistillLossConfig
from trainer.config.sparse import sparse_problem

KINDS = DistillLossConfig.model_fields["kind"].annotation.__args__
CAN_BE_LEARNED = {("forward_kl", "top", 1.0), ("forward_kl", "top", 2.0), ("forward_kl", "sampled", 1.0)} | {
    ("skew_forward_kl", "top", 1.0),
    ("skew_forward_kl", "top", 2.0),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", ["top", "sampled"])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_every_combination_is_answered(kind, form, temperature):
    problem = sparse_problem(kind, form, temperature)
    if (kind, form, temperature) in CAN_BE_LEARNED:
        assert problem is None
    else:
        assert problem
        assert problem.split()[0] in (kind, "temperature")


def test_the_reason_is_given():
    assert sparse_problem("reverse_kl", "top", 1.0) == (
        "reverse_kl cannot be learned from the most probable tokens: it is weighted by the student's probability, "
        "which may lie on tokens that were not kept; what the teacher thinks of those is unknown, and their penalty "
        "would be arbitrary. Use forward_kl, or a teacher that is present"
    )


def test_needs_no_torch():
    code = "import sys, trainer.config.sparse; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
