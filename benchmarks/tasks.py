"""What fine-tuning gives on real tasks: the recipes of `configs/`, run once a seed, and what is compared with them.

    python benchmarks/corpora.py corpora
    python benchmarks/tasks.py NAME [--runs DIR] [--seeds 1 2 3] [--write FILE] [a.b=c …]

- sentiment-zh: a small encoder that has learned from Chinese reviews only, and the same without that.
- tags: which of 135 tags a package has; beside it the tags that most packages have.
- translation: English into Italian from nothing; BLEU and chrF of what is written, beside copying the English text.
- answers: SmolLM2 on questions about Python; held-out loss before and after, and three answers.
- several: film reviews and newsgroups in one model.

Runs that are complete in DIR are not made again.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from trainer.config.load import read_run_config  # noqa: E402
from trainer.config.scores import smaller_is_better  # noqa: E402

CORPORA = ROOT / "corpora"
TRANSLATED = 1000
"""Held-out texts that are translated."""


def trimtab(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "launcher.cli", *arguments], check=True, cwd=ROOT)


def run(config: str, root: Path, *options: str) -> dict[str, float]:
    """Scores and loss of the best evaluation of a run, or of the last one where none is better than another."""
    if not (root / "export").is_dir():
        trimtab("run", f"configs/{config}.yaml", f"runs={root.parent}", f"name={root.name}", *options)
    records = [json.loads(line) for line in (root / "ledger.jsonl").read_text().splitlines()]
    evaluations = [{"loss": each["loss"], **each["scores"]} for each in records if each["kind"] == "evaluation"]
    score = read_run_config(root).evaluation.best
    if score is None:
        return evaluations[-1]
    return (min if smaller_is_better(score) else max)(evaluations, key=lambda each: each[score])


def each_seed(config: str, options: Any, *more: str, called: str | None = None) -> list[tuple[Path, dict[str, float]]]:
    """Run directory and scores of each seed."""
    roots = [options.runs / f"{called or Path(config).name}-{seed}" for seed in options.seeds]
    pairs = zip(roots, options.seeds, strict=True)
    return [(root, run(config, root, f"seed={seed}", *more, *options.overrides)) for root, seed in pairs]


def table(rows: dict[str, Sequence[dict[str, float]]], scores: Sequence[str]) -> list[str]:
    """A row a method: the mean of each score over the seeds, and the first score of each seed."""
    lines = [f"|  | {' | '.join(scores)} | {scores[0]} by seed |", "| --- |" + " ---: |" * len(scores) + " --- |"]
    for name, found in rows.items():
        means = (f"{statistics.fmean(one[score] for one in found):.4f}" for score in scores)
        by_seed = ", ".join(f"{one[scores[0]]:.4f}" for one in found)
        lines.append(f"| {name} | {' | '.join(means)} | {by_seed} |")
    return lines


def sentiment_zh(options: Any) -> list[str]:
    pretrained = options.runs / "pretrain-zh"
    before = run("pipelines/sentiment-zh/pretrain", pretrained, *options.overrides)
    plain = json.dumps(
        {name: value for name, value in json.loads((pretrained / "export/config.json").read_text()).items()
         if name in ("model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                     "max_position_embeddings")}
    )  # fmt: skip
    config = "pipelines/sentiment-zh/classify"
    ours = each_seed(config, options, f"model.pretrained={pretrained / 'export'}", called="sentiment-zh")
    tokenizer = f"data.tokenizer.path={pretrained / 'export'}"
    none = ("stage=pretrain", "model.pretrained=null", f"model.config={plain}", tokenizer)
    scratch = each_seed(config, options, *none, called="sentiment-zh-scratch")
    rows = {"pretrained on the reviews": [found for _, found in ours], "from nothing": [found for _, found in scratch]}
    return [
        f"Masked tokens of held-out reviews, after pretraining: loss {before['loss']:.3f}.",
        "",
        *table(rows, ("accuracy", "f1_macro", "matthews", "auc", "loss")),
    ]


def tags(options: Any) -> list[str]:
    found = [each for _, each in each_seed("finetune-tags", options)]
    truths = [set(json.loads(line)["labels"]) for line in (CORPORA / "tags-held-out.jsonl").open()]
    counts: dict[str, int] = {}
    for line in (CORPORA / "tags-train.jsonl").open():
        for label in json.loads(line)["labels"]:
            counts[label] = counts.get(label, 0) + 1
    common = sorted(counts, key=lambda label: -counts[label])

    def f1(number: int) -> float:
        chosen = set(common[:number])
        hits = sum(len(chosen & truth) for truth in truths)
        return 2 * hits / (len(chosen) * len(truths) + sum(map(len, truths)))

    best = max(f1(number) for number in range(1, 20))
    rows = table({"MiniLM": found}, ("f1_micro", "f1_macro", "f1_samples", "exact_match", "mean_average_precision"))
    return [*rows, "", f"The same most frequent tags for every package: f1_micro {best:.4f}."]


def translation(options: Any) -> list[str]:
    import sacrebleu

    data = CORPORA / "translation-held-out.jsonl"
    found = []
    for root, scores in each_seed("translate-en-it", options):
        written = root / "translated.json"
        if not written.exists():
            argv = ["--data", str(data), "--text", "en", "--label", "it", "--samples", str(TRANSLATED)]
            trimtab("evaluate", str(root / "export"), *argv, "--json", str(written))
        (one,) = json.loads(written.read_text())["models"]
        found.append({**one["scores"], "loss": scores["loss"], "generated": one["generated"]})
    records = [json.loads(line) for line in data.open()]
    chosen = [records[number * len(records) // TRANSLATED] for number in range(TRANSLATED)]
    texts, right = ([each[name] for each in chosen] for name in ("en", "it"))
    copied = {
        "bleu": sacrebleu.corpus_bleu(texts, [right]).score,
        "chrf": sacrebleu.corpus_chrf(texts, [right]).score,
        "loss": float("nan"),
    }
    rows = table({"translated": found, "the English text": [copied]}, ("bleu", "chrf", "loss"))
    examples = [f"- {each['en']} → {text}" for each, text in zip(chosen, found[0]["generated"], strict=False)]
    return [*rows, "", *examples]


def answers(options: Any) -> list[str]:
    found, generated = [], []
    data = ["--data", str(CORPORA / "answers-held-out.jsonl"), "--text", "question", "--label", "answer"]
    for root, scores in each_seed("instruct-smollm2", options):
        written = root / "answers.json"
        if not written.exists():
            trimtab("evaluate", str(root / "export"), *data, "--samples", "3", "--json", str(written))
        (one,) = json.loads(written.read_text())["models"]
        generated.append(one["generated"])
        found.append(scores)
    before = run("instruct-smollm2", options.runs / "instruct-before", *options.overrides, "optim.lr=1e-12",
                 "schedule.duration=1", "schedule.warmup=0")  # fmt: skip
    records = [json.loads(line) for line in (CORPORA / "answers-held-out.jsonl").open()]
    chosen = [records[number * len(records) // 3] for number in range(3)]
    rows = table({"tuned": found, "as it was": [before]}, ("loss", "perplexity", "accuracy"))
    for record, text in zip(chosen, generated[0], strict=True):
        rows += ["", f"> **{record['question']}**", ">", f"> right: {record['answer']}", ">", f"> written: {text}"]
    return rows


def several(options: Any) -> list[str]:
    found = [each for _, each in each_seed("finetune-several", options)]
    return table({"both in one model": found}, ("films/accuracy", "topics/accuracy", "films/f1_macro", "loss"))


TASKS: dict[str, Callable[[Any], list[str]]] = {
    "sentiment-zh": sentiment_zh,
    "tags": tags,
    "translation": translation,
    "answers": answers,
    "several": several,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "tasks")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--write", type=Path)
    options = parser.parse_intermixed_args()
    options.runs = options.runs.absolute()
    head = f"{date.today()}, {options.task} {' '.join(options.overrides)}".rstrip()
    text = "\n".join([head, "", *TASKS[options.task](options), ""])
    print(text)
    if options.write:
        options.write.write_text(text)


if __name__ == "__main__":
    main()
