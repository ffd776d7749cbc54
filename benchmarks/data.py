"""Preparing text beside a plain `datasets.map` script, and fetching a batch.

    python benchmarks/data.py [--rounds 3] [--files 'GLOB' …]

Both sides get the same files, the same tokenizer and two processes, start from nothing and end with token files on
disk. Ours also repairs, filters, removes exact and near-duplicates, counts and fingerprints; the plain script tokenises
and cuts blocks, as most training scripts do. Each run is a process of its own, timed after its imports; the sides take
turns.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from glob import glob
from itertools import chain
from pathlib import Path

LENGTH, BATCH, PROCESSES = 256, 16, 2


def paths(files: list[str]) -> list[str]:
    from trainer.data.corpus import standard_library

    if files:
        found = {path for pattern in files for path in glob(pattern, recursive=True)}  # noqa: PTH207
        return sorted(path for path in found if Path(path).is_file())
    return [str(path) for _, path in standard_library()]


def processor_seconds() -> float:
    """Of this process and those of its children that have ended."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def ours(files: list[str], tokenizer: str, folder: str) -> tuple[float, float]:
    import transformers  # noqa: F401 - timed after imports, like the other side

    from trainer.config.schema import DataConfig, SourceConfig, TokenizerConfig
    from trainer.data.prepare import prepare

    source = SourceConfig(files=tuple(files)) if files else SourceConfig(stdlib=True)
    config = DataConfig(
        sources=(source,), tokenizer=TokenizerConfig(path=tokenizer), prepared=folder, workers=PROCESSES
    )
    start, before = time.perf_counter(), processor_seconds()
    prepare(config, base=Path.cwd(), tokenizer_fallback=None, trust_remote_code=False)
    return time.perf_counter() - start, processor_seconds() - before


def plain(files: list[str], tokenizer: str, folder: str) -> tuple[float, float]:
    import datasets
    from transformers import AutoTokenizer

    datasets.disable_progress_bars()
    names = paths(files)
    start, before = time.perf_counter(), processor_seconds()
    encode = AutoTokenizer.from_pretrained(tokenizer)
    encode.model_max_length = 10**12

    def tokenise(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        return {"input_ids": [[*ids, encode.eos_token_id] for ids in encode(batch["text"])["input_ids"]]}

    def group(batch: dict[str, list[list[int]]]) -> dict[str, list[list[int]]]:
        joined = list(chain.from_iterable(batch["input_ids"]))
        end = len(joined) // LENGTH * LENGTH
        return {"input_ids": [joined[begin : begin + LENGTH] for begin in range(0, end, LENGTH)]}

    text = datasets.load_dataset("text", data_files=names, sample_by="document", split="train", cache_dir=folder)
    # its default of 1,000 documents a batch would leave the second process idle
    options = {"batched": True, "batch_size": 64, "num_proc": PROCESSES}
    tokens = text.map(tokenise, remove_columns=text.column_names, **options)
    tokens.map(group, **options)
    return time.perf_counter() - start, processor_seconds() - before


def fetch(folder: str) -> dict[str, float]:
    """Median milliseconds to assemble one batch, by objective and boundaries."""
    from trainer.config.objective import ObjectiveConfig
    from trainer.data.order import Order
    from trainer.data.prepared import Prepared
    from trainer.data.stream import Stream

    (manifest,) = Path(folder).glob("*/manifest.json")
    prepared = Prepared.open(manifest.parent)
    result = {}
    for kind, boundaries in [("causal", "join"), ("causal", "positions"), ("causal", "block"), ("masked", "positions")]:
        samples = prepared.samples("train", LENGTH, boundaries)
        order = Order(0, samples.sizes, samples.weights)
        options = {"batch": BATCH, "micro": BATCH, "rank": 0, "ranks": 1, "seed": 0, "prefetch": 0}
        stream = Stream(samples, order, objective=ObjectiveConfig(kind=kind), **options)
        result[f"{kind}, {boundaries}"] = statistics.median(next(stream).seconds_waiting for _ in range(300)) * 1000
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--files", nargs="*", default=[])
    parser.add_argument("--one", nargs=3, metavar=("SIDE", "TOKENIZER", "FOLDER"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        side, tokenizer, folder = arguments.one
        print(json.dumps({"ours": ours, "plain": plain}[side](arguments.files, tokenizer, folder)))
        return

    from trainer.config.schema import DataConfig, SourceConfig, TokenizerConfig, TrainTokenizerConfig
    from trainer.data.prepare import prepare

    megabytes = sum(Path(path).stat().st_size for path in paths(arguments.files)) / 1e6
    with tempfile.TemporaryDirectory() as scratch:
        source = SourceConfig(files=tuple(arguments.files)) if arguments.files else SourceConfig(stdlib=True)
        train = TokenizerConfig(train=TrainTokenizerConfig(max_characters=5_000_000))
        config = DataConfig(sources=(source,), tokenizer=train, prepared=f"{scratch}/tokenizer")
        tokenizer = prepare(config, base=Path.cwd(), tokenizer_fallback=None, trust_remote_code=False).tokenizer_path
        wall: dict[str, list[float]] = {"ours": [], "plain": []}
        processor: dict[str, list[float]] = {"ours": [], "plain": []}
        for turn in range(arguments.rounds):
            for side in ("ours", "plain") if turn % 2 == 0 else ("plain", "ours"):
                folder = f"{scratch}/{side}-{turn}"
                command = [sys.executable, __file__, "--one", side, str(tokenizer), folder]
                command += ["--files", *arguments.files] if arguments.files else []
                done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
                seconds, of_processor = json.loads(done.stdout.splitlines()[-1])
                wall[side].append(seconds)
                processor[side].append(of_processor)
                speed = f"{megabytes / seconds:.2f} MB/s, {megabytes / of_processor:.2f} MB per processor second"
                print(f"round {turn + 1}: {side} {speed}", flush=True)
        print(f"{megabytes:.1f} MB")
        for what, seconds_of in [("wall", wall), ("processor", processor)]:
            speeds = {side: megabytes / statistics.median(values) for side, values in seconds_of.items()}
            ratio = statistics.median(p / o for o, p in zip(seconds_of["ours"], seconds_of["plain"], strict=True))
            print(f"{what}: ours {speeds['ours']:.2f}, plain {speeds['plain']:.2f} MB/s; ratio {ratio:.2f} (bar 1.0)")
        for name, milliseconds in fetch(f"{scratch}/ours-0").items():
            print(f"batch of {BATCH} × {LENGTH}, {name}: {milliseconds:.2f} ms")


if __name__ == "__main__":
    main()
