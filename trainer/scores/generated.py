"""Scores of generated texts: BLEU and chrF by sacrebleu, ROUGE by rouge_score."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence

import numpy as np

from trainer.records import FloatArray
from trainer.scores.scores import Scores, make_scores, mean, ratio

_ORDERS = 4
"""Longest word sequence of BLEU."""
_HAN = r"\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_CHINESE = re.compile(f"[{_HAN}]")
_ALONE = r"\u3040-\u30ff" + _HAN
_WORDS = re.compile(rf"[{_ALONE}]|[^\W_{_ALONE}]+")
_ROUGE = {"rouge1": "rouge1", "rouge2": "rouge2", "rougeL": "rouge_l"}


def generation(predictions: Sequence[str], truths: Sequence[str], _: Sequence[str] = ()) -> Scores:
    """
    `bleu` and `chrf`, 0 … 100, of all texts together (their signatures are in the notes; where a tenth of the
    references' characters are Chinese, BLEU takes each for a word); `rouge1`, `rouge2`, `rouge_l`, 0 … 1: F1 of words,
    pairs of words and of the longest common subsequence, without stemming, mean over texts. On ASCII they are those of
    rouge_score's own tokenizer, which drops all other letters.

    Args:
        predictions, truths: one text each.
    """
    import sacrebleu
    from rouge_score.rouge_scorer import RougeScorer

    hypotheses, references = [*predictions], [*truths]
    if len(hypotheses) != len(references):
        raise ValueError(f"{len(hypotheses)} texts and {len(references)} references")
    logging.getLogger("sacrebleu").setLevel(logging.ERROR)
    bleu, chrf = sacrebleu.BLEU(tokenize="zh" if _is_chinese(references) else "13a"), sacrebleu.CHRF()
    scorer = RougeScorer([*_ROUGE], tokenizer=_Words())
    rouge = [scorer.score(true, text) for text, true in zip(hypotheses, references, strict=True)]
    values = {new: np.array([one[old].fmeasure for one in rouge]) for old, new in _ROUGE.items()}
    # by text: what sacrebleu's own bootstrap adds up
    parts = [
        np.array(metric._extract_corpus_statistics(hypotheses, [references]), dtype=np.float64)
        for metric in (bleu, chrf)
    ]

    def measure(counts: FloatArray) -> dict[str, FloatArray]:
        return {
            "bleu": _bleu(counts @ parts[0]),
            "chrf": _chrf(counts @ parts[1], chrf.beta),
            **{name: mean(counts, value) for name, value in values.items()},
        }

    notes = {"bleu": str(bleu.get_signature()), "chrf": str(chrf.get_signature())}
    return make_scores("generation", len(hypotheses), measure, notes=notes)


def _bleu(sums: FloatArray) -> FloatArray:
    """BLEU with sacrebleu's exponential smoothing; `sums` [resamples, 10]: length, length of the references, matches
    and numbers of sequences of 1 … 4 words."""
    length, true_length = sums[:, 0], sums[:, 1]
    matches, numbers = sums[:, 2 : 2 + _ORDERS], sums[:, 2 + _ORDERS :]
    missed = (matches == 0) & (numbers > 0)
    halved = 0.5 ** np.cumsum(missed, axis=1)
    precision = ratio(np.where(missed, halved, matches), numbers)
    with np.errstate(divide="ignore"):
        logarithm = np.log(precision).mean(axis=1)
    penalty = np.where(length < true_length, np.exp(np.minimum(0, 1 - ratio(true_length, length, np.inf))), 1.0)
    return np.where(matches.any(axis=1), 100 * penalty * np.exp(logarithm), 0.0)


def _chrf(sums: FloatArray, beta: int) -> FloatArray:
    """`sums` [resamples, 3 × orders]: sequences of the text, of the reference, and in both, of each length."""
    own, true, both = (sums[:, first::3] for first in range(3))
    counted = (own > 0) & (true > 0)
    number = counted.sum(axis=1).astype(float)
    precision = ratio(np.where(counted, ratio(both, own), 0).sum(axis=1), number)
    recall = ratio(np.where(counted, ratio(both, true), 0).sum(axis=1), number)
    return 100 * ratio((1 + beta**2) * precision * recall, beta**2 * precision + recall)


def _is_chinese(texts: Sequence[str]) -> bool:
    whole = "".join(texts)
    return len(_CHINESE.findall(whole)) > len(whole) / 10


class _Words:
    """Words in lower case; each Chinese or Japanese character is one."""

    def tokenize(self, text: str) -> list[str]:
        return _WORDS.findall(text.lower())
