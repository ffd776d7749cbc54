"""Memory and time of the distillation loss beside whole logits and beside TRL's.

    python benchmarks/distill_loss.py [--write] [--trl FOLDER] [--quick]

`--trl` is a folder with an unpacked TRL (`pip download trl --no-deps`, unzip): its `generalized_jsd_loss` is taken
beside ours and checked to give the same value. Liger's needs a GPU with triton and is taken where there is one.

Each contestant gets the same last hidden states of student and teacher and the same heads, and makes the gradient of
the student's hidden states and head. `dense` is what one writes with torch: logits of both models whole, one
log-softmax each, divergence and cross-entropy from them, autograd.

Memory is the kernel's high-water mark of a fresh process, less what was there when the inputs were (on a GPU: torch's
peak). glibc gives back what is freed, so that it is the live tensors. Time is the processor time of one thread, which
other jobs on the machine disturb least; contestants take turns, medians.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from trainer.config.distill import DistillLossConfig  # noqa: E402
from trainer.knowledge import DenseTargets, Head  # noqa: E402
from trainer.objectives.fused import fused_distillation  # noqa: E402

GIB = 2**30
GIVES_BACK = {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072"}
FULL = 8192
"""Tokens at which memory is compared."""
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@dataclass(frozen=True)
class Case:
    tokens: int
    vocabulary: int
    hidden: int = 256
    dtype: str = "float32"
    kind: str = "forward_kl"
    temperature: float = 1.0
    cross_entropy: float = 0.5
    chunk: int = 1024

    @property
    def options(self) -> DistillLossConfig:
        return DistillLossConfig(
            kind=self.kind,
            temperature=self.temperature,
            weight=1.0,
            cross_entropy=self.cross_entropy,
            chunk=self.chunk,
        )


class Inputs:
    def __init__(self, case: Case) -> None:
        torch.manual_seed(0)
        kind = {"dtype": getattr(torch, case.dtype), "device": DEVICE}
        self.student = torch.randn(case.tokens, case.hidden, **kind).requires_grad_()
        self.teacher = torch.randn(case.tokens, case.hidden, **kind)
        self.weight = torch.randn(case.vocabulary, case.hidden, **kind).mul_(0.1).requires_grad_()
        self.of_teacher = torch.randn(case.vocabulary, case.hidden, **kind).mul_(0.1)
        self.labels = torch.randint(0, case.vocabulary, (case.tokens,), device=DEVICE)

    def logits(self) -> tuple[Tensor, Tensor]:
        x = F.linear(self.student, self.weight).float()
        with torch.no_grad():
            return x, F.linear(self.teacher, self.of_teacher).float()

    def clear(self) -> None:
        self.student.grad = self.weight.grad = None


def ours(inputs: Inputs, case: Case) -> Tensor:
    targets = DenseTargets(inputs.teacher, Head(inputs.of_teacher))
    return fused_distillation(inputs.student, Head(inputs.weight), inputs.labels, targets, case.options).total


def dense(inputs: Inputs, case: Case) -> Tensor:
    x, y = inputs.logits()
    t = case.temperature
    with torch.no_grad():
        log_p = F.log_softmax(y if t == 1.0 else y / t, -1)
        del y
    log_q = F.log_softmax(x if t == 1.0 else x / t, -1)
    total = t * t * dense_divergence(case.kind, log_p, log_q)
    if case.cross_entropy:
        at_one = log_q if t == 1.0 else F.log_softmax(x, -1)
        total = total + case.cross_entropy * F.nll_loss(at_one, inputs.labels, reduction="sum")
    return total


def dense_divergence(kind: str, log_p: Tensor, log_q: Tensor) -> Tensor:
    match kind:
        case "forward_kl":
            return F.kl_div(log_q, log_p, log_target=True, reduction="sum")
        case "reverse_kl":
            return F.kl_div(log_p, log_q, log_target=True, reduction="sum")
        case "total_variation":
            return 0.5 * (log_p.exp() - log_q.exp()).abs().sum()
        case "js":
            log_m = torch.logaddexp(log_p, log_q) - 0.6931471805599453
            return 0.5 * dense_divergence("forward_kl", log_p, log_m) + 0.5 * dense_divergence(
                "forward_kl", log_q, log_m
            )
    raise ValueError(kind)


def trl(inputs: Inputs, case: Case) -> Tensor:
    from trl.experimental.gkd import GKDTrainer  # type: ignore[import-not-found]

    beta = {"forward_kl": 0.0, "js": 0.5, "reverse_kl": 1.0}[case.kind]
    loss: Tensor = GKDTrainer.generalized_jsd_loss(
        *inputs.logits(), inputs.labels, beta=beta, temperature=case.temperature, reduction="sum"
    )
    return loss * case.temperature**2


def liger(inputs: Inputs, case: Case) -> Tensor:
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss  # type: ignore[import-not-found]

    beta = {"forward_kl": 0.0, "js": 0.5, "reverse_kl": 1.0}[case.kind]
    loss = LigerFusedLinearJSDLoss(
        weight_hard_loss=case.cross_entropy, weight_soft_loss=1.0, beta=beta, temperature=case.temperature
    )
    result: Tensor = loss(inputs.student, inputs.weight, inputs.teacher, inputs.of_teacher, inputs.labels)
    return result * case.temperature**2 * case.tokens


CONTESTANTS: dict[str, Callable[[Inputs, Case], Tensor]] = {"ours": ours, "dense": dense, "trl": trl, "liger": liger}


def step(name: str, inputs: Inputs, case: Case) -> float:
    total = CONTESTANTS[name](inputs, case)
    total.backward()  # type: ignore[no-untyped-call]
    inputs.clear()
    return float(total.detach())


def status(key: str) -> int:
    """A line of /proc/self/status in bytes (VmRSS: resident now; VmHWM: its high-water mark)."""
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{key}:")]
    return int(line.split()[1]) * 1024


def peak_here(name: str, case: Case) -> int:
    """Bytes above the inputs, in this process."""
    # what libraries load with their first use
    step(name, Inputs(Case(8, 64, 16, case.dtype, case.kind, case.temperature)), case)
    inputs = Inputs(case)
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step(name, inputs, case)
        return int(torch.cuda.max_memory_allocated() - before)
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    step(name, inputs, case)
    return status("VmHWM") - before


def peak(name: str, case: Case, folder: str | None) -> int:
    """The same, in a process of its own."""
    argv = [sys.executable, __file__, "--measure", json.dumps([name, asdict(case)])]
    argv += ["--trl", folder] if folder else []
    done = subprocess.run(argv, env={**os.environ, **GIVES_BACK}, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{name} at {case}: {done.stderr[-2000:]}")
    return int(done.stdout.split()[-1])


def line_at(tokens: int, points: dict[int, int]) -> float:
    """Least squares through (tokens, bytes)."""
    slope, intercept = statistics.linear_regression(list(points), list(points.values()))
    return slope * tokens + intercept


def seconds(names: list[str], case: Case, rounds: int) -> dict[str, float]:
    """Median processor seconds of each; on a GPU the time of the device."""
    inputs = Inputs(case)
    taken: dict[str, list[float]] = {name: [] for name in names}
    totals = {name: step(name, inputs, case) for name in names}
    reference = totals["dense"]
    for name, total in totals.items():
        # TRL's has no cross-entropy
        assert name == "trl" or abs(total - reference) < 2e-3 * abs(reference), totals
    for _ in range(rounds):
        for name in names:
            if DEVICE == "cuda":
                torch.cuda.synchronize()
                began = time.perf_counter()
            else:
                began = time.process_time()
            step(name, inputs, case)
            if DEVICE == "cuda":
                torch.cuda.synchronize()
            taken[name].append((time.perf_counter() if DEVICE == "cuda" else time.process_time()) - began)
    return {name: statistics.median(values) for name, values in taken.items()}


def memory_table(quick: bool, folder: str | None) -> list[str]:
    vocabulary = 8192 if quick else 131_072
    rows = [
        f"Vocabulary {vocabulary:,}, width 256, chunk 1,024, GiB above the inputs (the weight's gradient of "
        f"{vocabulary * 256 * 4 / GIB:.3f} GiB in fp32 among them).",
        "",
        "| | tokens | ours | dense | dense / ours | TRL | TRL / ours |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for dtype, kind, temperature in (
        ("float32", "forward_kl", 1.0),
        ("float32", "js", 1.0),
        ("bfloat16", "forward_kl", 1.0),
    ):
        # the mixture of the Jensen–Shannon divergence takes TRL 9 GiB at 1,024 tokens
        small = (128, 256) if quick else (256, 512, 1024) if kind == "js" else (512, 1024, 2048)
        others = ["dense", *(["trl"] if folder and kind == "js" else [])]
        points: dict[str, dict[int, int]] = {name: {} for name in others}
        label = f"{'fp32' if dtype == 'float32' else 'bf16'}, {kind}, T = {temperature:g}"
        for tokens in (*small, FULL):
            case = Case(tokens, vocabulary, dtype=dtype, kind=kind, temperature=temperature)
            mine = peak("ours", case, folder)
            found: dict[str, float] = {}
            for name in others:
                if tokens in small:
                    found[name] = points[name][tokens] = peak(name, case, folder)
                else:
                    found[name] = line_at(tokens, points[name])
            mark = "" if tokens in small else " (line)"
            cells = [f"{found['dense'] / GIB:.2f}{mark}", f"{found['dense'] / mine:.1f}"]
            cells += [f"{found['trl'] / GIB:.2f}{mark}", f"{found['trl'] / mine:.1f}"] if "trl" in found else ["", ""]
            rows.append(f"| {label} | {tokens:,} | {mine / GIB:.2f} | {' | '.join(cells)} |")
            print(rows[-1], flush=True)
    return rows


def time_table(quick: bool, folder: str | None) -> list[str]:
    tokens, vocabulary = (128, 4096) if quick else (2048, 32_000)
    cases = [
        Case(tokens, vocabulary, kind=kind, temperature=temperature)
        for kind, temperature in (
            ("forward_kl", 1.0),
            ("forward_kl", 2.0),
            ("reverse_kl", 1.0),
            ("js", 1.0),
            ("total_variation", 1.0),
        )
    ]
    cases.append(Case(tokens, vocabulary, dtype="bfloat16"))
    cases.append(Case(tokens // 2, vocabulary, hidden=1024))
    cases.append(Case(tokens // 2, 4 * vocabulary))
    rows = [
        "| divergence | T | tokens | vocabulary | width | type | ours, s | dense, s | **ours / dense** | TRL, s "
        "| ours / TRL |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for case in cases:
        names = ["ours", "dense"]
        names += ["trl"] if folder and case.kind in ("js", "forward_kl", "reverse_kl") else []
        taken = seconds(names, case, 2 if quick else 5)
        cells = (
            f"{case.kind} | {case.temperature:g} | {case.tokens:,} | {case.vocabulary:,} | {case.hidden:,} "
            f"| {'fp32' if case.dtype == 'float32' else 'bf16'} | {taken['ours']:.2f} | {taken['dense']:.2f} "
            f"| **{taken['ours'] / taken['dense']:.2f}**"
        )
        cells += f" | {taken['trl']:.2f} | {taken['ours'] / taken['trl']:.2f}" if "trl" in taken else " | |"
        rows.append(f"| {cells} |")
        print(rows[-1], flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/distill_loss.md")
    parser.add_argument("--trl", help="folder with an unpacked TRL")
    parser.add_argument("--only", choices=["time", "memory"], help="one of the two tables, printed")
    parser.add_argument("--quick", action="store_true", help="small sizes, to see that it runs")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.trl:
        sys.path.append(options.trl)
    if options.measure:
        name, case = json.loads(options.measure)
        print(peak_here(name, Case(**case)))
        return
    of_trl: Any = "not taken"
    if options.trl:
        import trl

        of_trl = trl.__version__
    about = (
        f"{datetime.date.today()}, {platform.machine()}, {os.cpu_count()} cores shared with other jobs, one thread, "
        f"{'GPU ' + torch.cuda.get_device_name() if DEVICE == 'cuda' else 'no GPU'}, torch {torch.__version__}, "
        f"TRL {of_trl}; Liger {'not taken' if DEVICE == 'cuda' else 'not taken: its kernels need a GPU'}."
    )
    times = time_table(options.quick, options.trl) if options.only != "memory" else []
    memory = memory_table(options.quick, options.trl) if options.only != "time" else []
    text = "\n".join(
        [
            "# The distillation loss: memory and time",
            "",
            about,
            "Command: `python benchmarks/distill_loss.py --write --trl FOLDER`.",
            "",
            "Gradient of the student's hidden states and head included. Cross-entropy with weight 0.5 beside the",
            "divergence, which TRL's function does not have; ours also measures the teacher's entropy, agreement and",
            "the student's mass. `dense`: logits of both models whole, autograd.",
            "",
            "## Memory",
            "",
            "`(line)`: not run at this size, but read from the line through the sizes above it.",
            "",
            *memory,
            "",
            "## Time",
            "",
            "Processor seconds of one thread, contestants in turns, medians of five.",
            "",
            *times,
            "",
        ]
    )
    if options.write and not options.only:
        (ROOT / "benchmarks/results/distill_loss.md").write_text(text)


if __name__ == "__main__":
    main()
