"""Scores of numbers, words, answers and generated texts, beside scipy, seqeval, sacrebleu and rouge_score."""

from __future__ import annotations

import random

import numpy as np
import pytest
import sacrebleu
import scipy.stats
from rouge_score.rouge_scorer import RougeScorer

from trainer.scores.answers import Window, best_span, normalised, overlap, question_answering
from trainer.scores.generated import generation
from trainer.scores.numbers import likelihood, regression
from trainer.scores.scores import Scores
from trainer.scores.spans import mark_spans, spans, token_classification

TAGS = ("O", "B-PER", "I-PER", "B-LOC", "I-LOC")


def resampled(found: Scores, predictions: list, truths: list, make: object, seed: int = 2) -> None:
    """A text that counts k times is k texts."""
    counts = np.random.default_rng(seed).integers(0, 4, (4, len(truths)))
    values = found.measure(counts.astype(float))
    for row, each in enumerate(counts.tolist()):
        again = make(  # type: ignore[operator]
            [p for p, n in zip(predictions, each, strict=True) for _ in range(n)],
            [t for t, n in zip(truths, each, strict=True) for _ in range(n)],
        )
        assert {name: value[row] for name, value in values.items()} == pytest.approx(again.values, rel=1e-9)


def test_numbers_as_scipy() -> None:
    generator = np.random.default_rng(0)
    truths = generator.integers(0, 6, 80).astype(float)
    values = (truths + generator.normal(size=80)).round(1)
    found = regression(values, truths)
    assert found.values == pytest.approx(
        {
            "pearson": scipy.stats.pearsonr(values, truths).statistic,
            "spearman": scipy.stats.spearmanr(values, truths).statistic,
            "mse": ((values - truths) ** 2).mean(),
            "mae": abs(values - truths).mean(),
        },
        rel=1e-12,
    )
    resampled(found, values.tolist(), truths.tolist(), lambda p, t: regression(np.array(p), np.array(t)))


def test_correlation_with_a_constant_is_not_defined() -> None:
    found = regression(np.full(7, 0.1), np.arange(7.0))
    assert np.isnan(found.values["pearson"])
    assert np.isnan(found.values["spearman"])
    assert found.notes["pearson"] == "is not defined: all predictions are equal"


def test_likelihood_is_over_targets_not_texts() -> None:
    found = likelihood(np.array([3.0, 1.0, 0.0]), np.array([3, 1, 0]))
    assert found.values == pytest.approx({"loss": 1.0, "perplexity": np.e})
    assert found.measure(np.array([[1.0, 2.0, 5.0]]))["loss"] == pytest.approx([1.0])


def words() -> tuple[list[list[int]], list[list[int]]]:
    """The same as were given to seqeval 1.2.2."""
    generator = random.Random(7)
    true = [[generator.choice(TAGS) for _ in range(generator.randint(1, 9))] for _ in range(40)]
    chosen = [[tag if generator.random() < 0.7 else generator.choice(TAGS) for tag in text] for text in true]
    return [[TAGS.index(tag) for tag in text] for text in chosen], [[TAGS.index(tag) for tag in text] for text in true]


def test_spans_as_seqeval_strict() -> None:
    chosen, true = words()
    found = token_classification(chosen, true, TAGS)
    assert found.values == pytest.approx(
        {
            "accuracy": 0.7183908045977011,
            "precision": 0.6428571428571429,
            "recall": 0.6818181818181818,
            "f1": 0.6617647058823529,
            "f1_macro": 0.6621241617996971,
        },
        rel=1e-12,
    )
    assert np.mean([one.precision for one in found.by_class]) == pytest.approx(0.6583333333333334)
    assert np.mean([one.recall for one in found.by_class]) == pytest.approx(0.690121155638397)
    resampled(found, chosen, true, lambda p, t: token_classification(p, t, TAGS))


def test_hard_spans_as_seqeval_strict() -> None:
    true = [["B-PER", "I-PER", "O", "I-LOC"], ["B-PER", "I-LOC", "I-LOC"], ["I-PER", "I-PER", "B-PER"]]
    true += [["B-LOC", "B-LOC", "I-LOC"]]
    chosen = [["B-PER", "I-PER", "O", "I-LOC"], ["B-PER", "I-LOC", "O"], ["O", "O", "B-PER"]]
    chosen += [["B-LOC", "I-LOC", "I-LOC"]]
    numbers = [[[TAGS.index(tag) for tag in text] for text in texts] for texts in (chosen, true)]
    found = token_classification(*numbers, TAGS).values
    assert (found["precision"], found["recall"], found["f1"]) == pytest.approx((0.75, 0.6, 2 / 3))
    assert spans(["I-PER", "B-PER", "I-LOC", "B-LOC", "I-LOC"]) == {("PER", 1, 2), ("LOC", 3, 5)}


def test_words_whose_classes_are_no_tags() -> None:
    names = ("noun", "verb", "other")
    assert not mark_spans(names)
    found = token_classification([[0, 1], [1]], [[0, 1], [0]], names)
    assert found.values == pytest.approx({"accuracy": 2 / 3, "f1_macro": 2 / 3})
    with pytest.raises(ValueError, match="text 0 has 1 words, and 2 predictions"):
        token_classification([[0, 1]], [[0]], names)


def test_answers_as_squad() -> None:
    assert normalised("  The Cat's  hat, a mat! ") == "cats hat mat"
    assert overlap("the black cat", "a cat") == pytest.approx(2 / 3)
    assert (overlap("", ""), overlap("", "cat"), overlap("cat cat", "cat")) == (1, 0, pytest.approx(2 / 3))
    found = question_answering(["the cat", "1999", "", "dog"], [["a cat", "x"], ["in 1999"], [], ["hen", "the dog"]])
    assert found.values == pytest.approx({"exact_match": 0.75, "f1": (1 + 2 / 3 + 1 + 1) / 4})
    assert found.hits["exact_match"].tolist() == [True, False, True, True]


def test_the_best_span_over_windows() -> None:
    def window(starts: list[float], ends: list[float], first: int) -> Window:
        # the first token stands for no character
        places = [None, *((first + n, first + n + 1) for n in range(len(starts) - 1))]
        return Window(np.array(starts), np.array(ends), places)

    assert best_span([window([9, 0, 5, 0], [9, 6, 0, 4], 10)]) == (11, 13)
    both = [window([0, 1, 0], [0, 0, 1], 0), window([0, 0, 3], [0, 0, 2], 5)]
    assert best_span(both) == (6, 7)
    assert best_span([window([0, 7, 0, 0, 0], [0, 0, 0, 1, 7], 0)], longest=3) == (0, 3)
    assert best_span([]) == (0, 0)


TEXTS = [
    ("the cat sat on the mat .", "the cat sat on the red mat ."),
    ("a dog barks loudly", "the dog barked loudly at night"),
    ("nothing in common here", "entirely different words"),
    ("", "an empty answer"),
    ("it rains in spain , mostly in the plain", "the rain in spain stays mainly in the plain"),
]


def test_generated_texts_as_sacrebleu_and_rouge_score() -> None:
    hypotheses, references = [list(each) for each in zip(*TEXTS, strict=True)]
    found = generation(hypotheses, references)
    bleu, chrf = sacrebleu.BLEU(), sacrebleu.CHRF()
    expected = {
        "bleu": bleu.corpus_score(hypotheses, [references]).score,
        "chrf": chrf.corpus_score(hypotheses, [references]).score,
    }
    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"])
    rouge = [scorer.score(true, text) for text, true in TEXTS]
    for own, name in (("rouge1", "rouge1"), ("rouge2", "rouge2"), ("rouge_l", "rougeL")):
        expected[own] = np.mean([one[name].fmeasure for one in rouge])
    assert found.values["bleu"] > 0
    assert found.values == pytest.approx(expected, rel=1e-9)
    assert found.notes == {"bleu": str(bleu.get_signature()), "chrf": str(chrf.get_signature())}
    assert "tok:13a" in found.notes["bleu"]


@pytest.mark.parametrize("chosen", [[0], [2], [3], [1, 3], [0, 0, 2], [1, 4, 4]])
def test_bleu_and_chrf_of_resamples(chosen: list[int]) -> None:
    """Few texts: no match at some order, none at all, nothing generated."""
    hypotheses, references = [list(each) for each in zip(*TEXTS, strict=True)]
    counts = np.bincount(chosen, minlength=len(TEXTS))[None].astype(float)
    found = generation(hypotheses, references).measure(counts)
    part = [TEXTS[number][0] for number in chosen], [[TEXTS[number][1] for number in chosen]]
    assert found["bleu"][0] == pytest.approx(sacrebleu.BLEU().corpus_score(*part).score, rel=1e-9)
    assert found["chrf"][0] == pytest.approx(sacrebleu.CHRF().corpus_score(*part).score, rel=1e-9)


def test_chinese_texts() -> None:
    found = generation(["今天天气好"], ["今天天气很好"])
    assert "tok:zh" in found.notes["bleu"]
    assert found.values["rouge1"] == pytest.approx(10 / 11)
