"""From predictions to what is kept of them, beside plain fp64 formulas."""

import numpy as np
import pytest
import torch

from trainer.errors import DataError
from trainer.knowledge import DenseTargets, Head, LogitTargets, SparseTargets
from trainer.teacher.forms import Form, log_shares
from trainer.teacher.sparse import entries_of, sparse_targets, vocabulary_of

VOCABULARY, LENGTH = 40, 6


def logits_of(samples: int, seed: int = 0, spread: float = 2.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(samples, LENGTH, VOCABULARY, generator=generator) * spread


def form(kind="top", width=5, vocabulary=VOCABULARY, precision="fp32") -> Form:
    return Form(kind, LENGTH, width, vocabulary, precision)


def top_by_definition(logits: torch.Tensor, width: int) -> np.ndarray:
    rows = logits.flatten(0, 1).double().numpy()
    return np.array([sorted(range(len(row)), key=lambda token: (-row[token], token))[:width] for row in rows])


@pytest.mark.parametrize("chunk", [1, 4, 7, 1000])
@pytest.mark.parametrize("coarse", [False, True])
def test_the_most_probable_in_order_and_ties_by_id(chunk, coarse):
    logits = logits_of(3)
    if coarse:  # many equal ones, as in low precision
        logits = logits.round()
    found = entries_of(LogitTargets(logits), form(), np.arange(3), 0, chunk)
    assert np.array_equal(found.ids, top_by_definition(logits, 5))
    log_p = torch.log_softmax(logits.double(), -1).flatten(0, 1)
    torch.testing.assert_close(found.values.double(), log_p.gather(1, found.ids), rtol=0, atol=1e-6)
    torch.testing.assert_close(found.entropy, -(log_p.exp() * log_p).sum(-1), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.mass, log_p.gather(1, found.ids).exp().sum(-1), rtol=1e-5, atol=1e-6)


def test_all_tokens_are_the_log_probabilities_in_the_order_of_their_ids():
    logits = logits_of(2)
    found = entries_of(LogitTargets(logits), form("complete", VOCABULARY), np.arange(2), 0, 5)
    assert found.ids is None
    assert torch.equal(found.values, torch.log_softmax(logits, -1).flatten(0, 1))
    raw = entries_of(LogitTargets(logits[:, 0]), Form("logits", 1, VOCABULARY, VOCABULARY, "fp32"), np.arange(2), 0, 5)
    assert torch.equal(raw.values, logits[:, 0])


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_from_the_state_before_the_head(softcap):
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(2, LENGTH, 8, generator=generator)
    weight, bias = torch.randn(VOCABULARY, 8, generator=generator), torch.randn(VOCABULARY, generator=generator)
    logits = (hidden @ weight.T + bias) * 0.5
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    dense = DenseTargets(hidden, Head(weight, bias, 0.5, softcap))
    found = entries_of(dense, form(), np.arange(2), 0, 4)
    plain = entries_of(LogitTargets(logits), form(), np.arange(2), 0, 4)
    assert torch.equal(found.ids, plain.ids)
    torch.testing.assert_close(found.values, plain.values)


def test_tokens_that_only_pad_the_vocabulary_are_left_out():
    logits = logits_of(2)
    logits[..., 30:] += 100
    assert vocabulary_of(LogitTargets(logits)) == VOCABULARY
    assert vocabulary_of(DenseTargets(torch.zeros(1, 2, 8), Head(torch.zeros(20, 8)))) == 20
    found = entries_of(LogitTargets(logits), form(vocabulary=30), np.arange(2), 0, 4)
    plain = entries_of(LogitTargets(logits[..., :30]), form(vocabulary=30), np.arange(2), 0, 4)
    assert torch.equal(found.ids, plain.ids)
    assert torch.equal(found.values, plain.values)


def test_impossible_tokens_are_none():
    logits = torch.full((1, LENGTH, VOCABULARY), -torch.inf)
    logits[..., 7], logits[..., 3] = 1.0, 2.0
    found = entries_of(LogitTargets(logits), form(), np.arange(1), 0, 4)
    assert found.ids[0].tolist() == [3, 7, -1, -1, -1]
    assert found.values[0, 2:].eq(-torch.inf).all()
    assert entries_of(LogitTargets(logits), form("sampled", 20), np.arange(1), 0, 4).ids.unique().tolist() == [-1, 3, 7]


def test_the_smallest_number_draws_no_impossible_token(monkeypatch):
    monkeypatch.setattr("trainer.teacher.sparse._uniform", lambda draws, where, seed: np.zeros((LENGTH, draws)))
    logits = torch.zeros(1, LENGTH, VOCABULARY)
    logits[..., :4] = -torch.inf
    found = entries_of(LogitTargets(logits), form("sampled", 3), np.arange(1), 0, 100)
    assert found.ids[:, 0].tolist() == [4] * LENGTH
    assert found.values[:, 0].tolist() == [3] * LENGTH


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_predictions_that_are_not_finite_are_refused(value):
    logits = logits_of(3)
    logits[1, 2, 9] = value
    with pytest.raises(DataError, match="predictions of sample 71 are not finite"):
        entries_of(LogitTargets(logits), form(), np.array([70, 71, 72]), 0, 4)


def test_draws_are_a_function_of_seed_and_sample():
    logits, kept = logits_of(4), form("sampled", 50)
    ids = np.array([9, 4, 1_000_000, 2])
    found = sparse_targets(LogitTargets(logits), kept, ids, 3, 7)
    order = [2, 0, 3, 1]
    other = sparse_targets(LogitTargets(logits[order]), kept, ids[order], 3, 4)
    assert torch.equal(other.ids, found.ids[order])
    assert torch.equal(other.log_probabilities, found.log_probabilities[order])
    alone = sparse_targets(LogitTargets(logits[2:3]), kept, ids[2:3], 3, 1000)
    assert torch.equal(alone.ids, found.ids[2:3])
    assert not torch.equal(sparse_targets(LogitTargets(logits), kept, ids, 4, 7).ids, found.ids)
    same = sparse_targets(LogitTargets(logits[:1].expand(4, -1, -1)), kept, ids, 3, 7)
    assert len({tuple(row.flatten().tolist()) for row in same.ids}) == 4


def test_drawn_tokens_are_different_ones_in_order_and_all_draws_are_counted():
    found = entries_of(LogitTargets(logits_of(5)), form("sampled", 50), np.arange(5), 0, 8)
    known = found.ids >= 0
    assert (found.values.sum(-1) == 50).all()
    assert torch.equal(found.values > 0, known)
    assert (known[:, 1:] <= known[:, :-1]).all(), "what is not known stands last"
    assert ((found.ids[:, 1:] > found.ids[:, :-1]) | ~known[:, 1:]).all()


def test_shares_of_draws_are_unbiased():
    """Mean of the shares over many samples, token by token, against p: a χ² test."""
    logits = logits_of(1)[:, :1].expand(1, LENGTH, -1)
    samples, draws = 400, 25
    found = entries_of(LogitTargets(logits.expand(samples, -1, -1)), form("sampled", draws), np.arange(samples), 0, 512)
    counts = torch.zeros(VOCABULARY, dtype=torch.int64)
    counts.scatter_add_(0, found.ids.clamp(min=0).flatten(), found.values.flatten())
    expected = torch.softmax(logits[0, 0].double(), -1) * samples * LENGTH * draws
    assert counts.sum() == samples * LENGTH * draws
    statistic = float(((counts - expected) ** 2 / expected).sum())
    # 39 degrees of freedom: mean 39, standard deviation 8.8
    assert 10 < statistic < 80


def test_what_a_server_tells_is_put_in_order():
    ids = torch.tensor([[[7, 3, -1], [5, 50, 2]]])
    log_p = torch.log(torch.tensor([[[0.2, 0.5, 0.0], [0.3, 0.3, 0.3]]]))
    kept = Form("top", 2, 4, VOCABULARY, "fp32")
    found = entries_of(SparseTargets(ids, log_p, "top"), kept, np.arange(1), 0, 8)
    assert found.ids.tolist() == [[3, 7, -1, -1], [2, 5, -1, -1]]
    torch.testing.assert_close(found.values.exp(), torch.tensor([[0.5, 0.2, 0, 0], [0.3, 0.3, 0, 0]]))
    assert found.entropy.isnan().all()
    torch.testing.assert_close(found.mass, torch.tensor([0.7, 0.6]).double())


def test_shares_as_logarithms():
    np.testing.assert_allclose(np.exp(log_shares(4)), [0, 0.25, 0.5, 0.75, 1])
