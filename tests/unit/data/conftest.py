import json

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from trainer.config.schema import CleanConfig, DataConfig, SourceConfig, TokenizerConfig
from trainer.data.prepare import prepare
from trainer.data.samples import Samples, SourceTokens

EOS, MASK, VOCABULARY = 0, 1, 100


@pytest.fixture
def make_samples(tmp_path):
    """Samples over sources given as lists of document lengths (end-of-text included); tokens are 2 … 99."""

    def make(*lengths, sequence_length=8, boundaries="positions", weights=None, seed=0, dtype=np.uint16):
        generator = np.random.default_rng(seed)
        sources = []
        for index, documents in enumerate(lengths):
            offsets = np.concatenate([[0], np.cumsum(np.array(documents, dtype=np.int64))]).astype(np.int64)
            tokens = generator.integers(2, VOCABULARY, offsets[-1]).astype(dtype)
            tokens[offsets[1:] - 1] = EOS
            names = tmp_path / f"names-{index}"
            names.write_text("".join(f"document {index}.{n}\n" for n in range(len(documents))))
            weight = weights[index] if weights else 1.0
            sources.append(SourceTokens(f"source {index}", weight, tokens, offsets, names))
        return Samples(
            sources,
            sequence_length=sequence_length,
            boundaries=boundaries,
            eos_id=EOS,
            mask_id=MASK,
            ordinary_ids=np.arange(2, VOCABULARY),
            decode=lambda ids: " ".join(map(str, ids)),
        )

    return make


TASK_TEXT = "the film is a very good long bad dull story of two rivers and one house who where what yes no"


@pytest.fixture
def word_pieces(tmp_path):
    """A tokenizer as BERT's, [CLS] … [SEP] … [SEP] with kinds of segments; words beyond it are spelled in letters."""
    letters = "abcdefghijklmnopqrstuvwxyz0123456789.,?!'éñ"
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *TASK_TEXT.split(), *letters, *(f"##{c}" for c in letters)]
    names = list(dict.fromkeys(names))
    backend = Tokenizer(models.WordPiece({name: n for n, name in enumerate(names)}, unk_token="[UNK]"))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    roles = {f"{role}_token": f"[{role.upper()}]" for role in ("pad", "unk", "cls", "sep", "mask")}
    options = {"model_input_names": ["input_ids", "token_type_ids", "attention_mask"]}
    PreTrainedTokenizerFast(tokenizer_object=backend, **roles, **options).save_pretrained(tmp_path / "pieces")
    return tmp_path / "pieces"


@pytest.fixture
def prepare_rows(tmp_path):
    """Prepared data of records: `prepare_rows(kind, tokenizer, rows | [(rows, options), …], source options, …)`."""

    def make(kind, tokenizer, rows, *, clean=None, **options):
        given = rows if rows and isinstance(rows[0], tuple) else [(rows, {})]
        fields = {name: options.pop(name) for name in list(options) if name in SourceConfig.model_fields}
        sources = []
        for number, (own, more) in enumerate(given):
            path = tmp_path / f"rows-{number}.jsonl"
            path.write_text("".join(json.dumps(row) + "\n" for row in own))
            sources.append(SourceConfig(**{"files": (path.name,), **fields, **more}))
        config = DataConfig(
            sources=tuple(sources),
            **{
                "clean": clean or CleanConfig(min_characters=1, min_letters=0, near_duplicates=None),
                "tokenizer": (
                    tokenizer if isinstance(tokenizer, TokenizerConfig) else TokenizerConfig(path=str(tokenizer))
                ),
                "held_out": 0.3,
                "prepared": str(tmp_path / "cache"),
                **options,
            },
        )
        return prepare(config, base=tmp_path, tokenizer_fallback=None, trust_remote_code=False, kind=kind)

    return make
