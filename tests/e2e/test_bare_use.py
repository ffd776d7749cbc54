"""The example of docs/stability.md: the guard in a plain accelerate loop, run as it stands on the page."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

BEFORE = """
import math
import torch
from types import SimpleNamespace
from accelerate import Accelerator

class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.line = torch.nn.Linear(4, 1)

    def forward(self, x, y):
        return SimpleNamespace(loss=((self.line(x) - y) ** 2).mean())

torch.manual_seed(0)
accelerator = Accelerator(cpu=True)
model = Model()
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
loader = []
for index in range(80):
    x = torch.randn(256, 4)
    loader.append({"x": x, "y": x.sum(1, keepdim=True) + 3 + 0.1 * torch.randn(256, 1)})
loader[40]["y"] = loader[40]["y"] * math.nan
loader[60]["y"] = loader[60]["y"] * 100
steps = []
optimizer.register_step_post_hook(lambda *_: steps.append(1))
model, optimizer = accelerator.prepare(model, optimizer)
"""
AFTER = """
assert all(torch.isfinite(p).all() for p in model.parameters())
print(f"updates {len(steps)} loss {mean.item():.4f}")
"""


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_the_example_on_the_page_leaves_out_what_is_bad(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "stability.md").read_text()
    example = re.search(r"```python\n(.*?)```", page, flags=re.DOTALL)
    assert example is not None
    script = tmp_path / "loop.py"
    script.write_text(BEFORE + example.group(1) + AFTER)
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    assert "updates 78 " in done.stdout
