"""Augmented samples on several ranks, after a resume and after a rollback: the same arrays, to the bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pool import RankPool
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from trainer.config.finetune import AugmentConfig
from trainer.config.objective import ObjectiveConfig
from trainer.config.schema import CleanConfig, DataConfig, SourceConfig, TokenizerConfig

TEXT = "the film is a very good long bad dull story of two rivers and one house"
WORDS = TEXT.split()
BATCH, LENGTH, SEED = 8, 32, 5
AUGMENT = AugmentConfig(fraction=0.8, delete=0.1, swap=0.1, mask=0.1, typos=0.05, synonyms=0.3, lexicon="words.txt")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    from transformers import PreTrainedTokenizerFast

    from trainer.data.prepare import prepare

    folder = tmp_path_factory.mktemp("texts")
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    names += [mark + letter for letter in "abcdefghijklmnopqrstuvwxyz0123456789" for mark in ("", "##")]
    backend = Tokenizer(models.WordPiece({name: n for n, name in enumerate(dict.fromkeys(names))}, unk_token="[UNK]"))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    special = [("[CLS]", 2), ("[SEP]", 3)]
    backend.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=special)
    roles = {f"{role}_token": f"[{role.upper()}]" for role in ("pad", "unk", "cls", "sep", "mask")}
    PreTrainedTokenizerFast(tokenizer_object=backend, **roles).save_pretrained(folder / "tokenizer")
    generator = np.random.default_rng(2)
    with (folder / "rows.jsonl").open("w") as file:
        for n in range(50):
            text = f"{n} " + " ".join(generator.choice(WORDS, int(generator.integers(2, 25))))
            file.write(json.dumps({"text": text, "label": "no" if n % 2 else "yes"}) + "\n")
    (folder / "words.txt").write_text("good,bad,dull\nriver,stream\nfilm,story\n")
    config = DataConfig(
        sources=(SourceConfig(files=(str(folder / "rows.jsonl"),), label="label"),),
        clean=CleanConfig(min_characters=1, min_letters=0, near_duplicates=None),
        tokenizer=TokenizerConfig(path=str(folder / "tokenizer")),
        sequence_length=LENGTH,
        held_out=0.2,
        augment=AUGMENT.model_copy(update={"lexicon": str(folder / "words.txt")}),
        prepared=str(folder / "cache"),
    )
    prepare(config, base=folder, tokenizer_fallback=None, trust_remote_code=False, kind="classification")
    return config


def stream_of(data: DataConfig, rank: int, ranks: int, micro: int, next_batch: int = 0, *, on: bool = True) -> Any:
    from trainer.data.augment import Augmentation
    from trainer.data.order import Order
    from trainer.data.prepare import prepare
    from trainer.data.stream import Stream

    prepared = prepare(data, base=Path(), tokenizer_fallback=None, trust_remote_code=False, kind="classification")
    samples = prepared.samples("train", LENGTH, "join")
    assert data.augment is not None
    return Stream(
        samples,
        Order(SEED, samples.sizes, samples.weights),
        batch=BATCH,
        micro=micro,
        rank=rank,
        ranks=ranks,
        objective=ObjectiveConfig(kind="classification"),
        seed=SEED,
        next_batch=next_batch,
        augment=Augmentation.open(data.augment, prepared, SEED) if on else None,
        # in the order of the data, whatever the number of ranks
        alike=False,
    )


def arrays_of(batch: Any) -> list[dict[str, Any]]:
    return [{name: array.tolist() for name, array in sorted(arrays.items())} for arrays in batch.micro_batches]


def read(rank: int, world_size: int, data: DataConfig) -> dict[str, Any]:
    """Twelve batches at a stretch; with a stop after the fifth; with a rollback from the ninth to the third."""
    whole = stream_of(data, rank, world_size, 2)
    expected = [arrays_of(next(whole)) for _ in range(12)]
    whole.close()
    first = stream_of(data, rank, world_size, 2)
    found = [arrays_of(next(first)) for _ in range(5)]
    first.close()
    second = stream_of(data, rank, world_size, 2, next_batch=first.next_batch)
    found += [arrays_of(next(second)) for _ in range(4)]
    second.seek(3)
    again = [arrays_of(next(second)) for _ in range(9)]
    second.close()
    return {"expected": expected, "resumed": found == expected[:9], "rolled back": again == expected[3:]}


def rows(parts: list[list[list[dict[str, Any]]]]) -> list[list[list[int]]]:
    """The samples of each batch in the order of the data, padding apart, from the micro-batches of each rank."""
    return [
        [
            [token for token, seen in zip(ids, mask, strict=True) if seen]
            for steps in zip(*batches, strict=True)
            for micro in steps
            for ids, mask in zip(micro["input_ids"], micro["attention_mask"], strict=True)
        ]
        for batches in zip(*parts, strict=True)
    ]


def test_resumed_and_rolled_back_runs_read_the_same_bits(two_ranks: RankPool, data: DataConfig) -> None:
    results = two_ranks(read, data=data)
    for result in results:
        assert result["resumed"]
        assert result["rolled back"]
    found = rows([result["expected"] for result in results])
    alone, plain = stream_of(data, 0, 1, 8), stream_of(data, 0, 1, 8, on=False)
    unchanged, total = 0, 0
    visits: dict[int, set[tuple[int, ...]]] = {}
    for ours in found:
        batch, before = next(alone), next(plain)
        (one,) = rows([[arrays_of(batch)]])
        (was,) = rows([[arrays_of(before)]])
        # other ranks, other micro-batches
        assert one == ours
        assert [a["labels"].tolist() for a in batch.micro_batches] == [
            b["labels"].tolist() for b in before.micro_batches
        ]
        total += len(ours)
        unchanged += sum(a == b for a, b in zip(ours, was, strict=True))
        for sample, ids in zip(batch.samples.tolist(), ours, strict=True):
            visits.setdefault(sample, set()).add(tuple(ids))
    alone.close()
    plain.close()
    assert 0.1 * total < unchanged < 0.4 * total
    assert np.mean([len(seen) > 1 for seen in visits.values()]) > 0.7
