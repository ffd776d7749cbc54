import numpy as np
import pytest

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
