"""Adversarial training against autograd on `inputs_embeds` in double precision, and what must not happen."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoModelForSequenceClassification

from trainer.config.objective import ObjectiveConfig
from trainer.model.embeddings import find_embeddings
from trainer.objectives import make_objective
from trainer.objectives.adversarial import Adversarial, real_tokens, unit, within_ball, wrap
from trainer.records import DRAWS
from trainer.terms import Terms

WIDTH = 16
BERT = {"hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
LLAMA = {**BERT, "num_key_value_heads": 1}
T5 = {"d_model": WIDTH, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2, "decoder_start_token_id": 0}
BART = {"d_model": WIDTH, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2}
BART |= {"decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "max_position_embeddings": 32}
MODELS: dict[str, tuple[str, Any, dict[str, Any]]] = {
    "bert": ("classification", AutoModelForSequenceClassification, BERT),
    "distilbert": (
        "classification",
        AutoModelForSequenceClassification,
        {"dim": WIDTH, "n_layers": 2, "n_heads": 2, "hidden_dim": 24},
    ),
    "roberta": ("classification", AutoModelForSequenceClassification, BERT),
    "gpt2": ("causal", AutoModelForCausalLM, {"n_embd": WIDTH, "n_layer": 2, "n_head": 2}),
    "llama": ("causal", AutoModelForCausalLM, {**LLAMA, "tie_word_embeddings": True}),
    "t5": ("seq2seq", AutoModelForSeq2SeqLM, T5),
    "bart": ("seq2seq", AutoModelForSeq2SeqLM, BART),
    "marian": ("seq2seq", AutoModelForSeq2SeqLM, {**BART, "scale_embedding": True}),
}
METHODS: dict[str, dict[str, Any]] = {
    "fgm": {"kind": "fgm", "epsilon": 0.5, "weight": 0.7},
    "pgd": {"kind": "pgd", "epsilon": 0.5, "steps": 2},
    "freelb": {"kind": "freelb", "epsilon": 0.5, "steps": 3},
}


def model_of(name: str, *, dropout: float = 0.0, dtype: torch.dtype = torch.float64, **fields: Any) -> nn.Module:
    torch.manual_seed(0)
    _, auto, options = MODELS[name]
    config = AutoConfig.for_model(name, vocab_size=50, pad_token_id=1, bos_token_id=0, eos_token_id=0, **options)
    for key, value in ({"num_labels": 3, "use_cache": False} | fields).items():
        setattr(config, key, value)
    model = auto.from_config(config).to(dtype).train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = dropout
        for key in ("dropout", "attention_dropout", "activation_dropout"):
            if isinstance(getattr(module, key, None), float):
                setattr(module, key, dropout)
    return model


def tensors_of(kind: str, rows: int = 3, length: int = 6) -> dict[str, Tensor]:
    """Samples of 6, 5, 4 … tokens."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(2, 50, (rows, length), generator=generator)
    mask = (torch.arange(length) < length - torch.arange(rows)[:, None]).long()
    ids = ids.where(mask != 0, 1)
    keys = torch.tensor([11, 22, 33, 44])[:rows]
    if kind == "classification":
        return {"input_ids": ids, "attention_mask": mask, "labels": torch.arange(rows) % 3, DRAWS: keys}
    labels = ids.roll(-1, 1).where(mask != 0, -100)
    if kind == "causal":
        return {"input_ids": ids, "attention_mask": mask, "labels": labels, DRAWS: keys}
    target = torch.randint(2, 50, (rows, 4), generator=generator)
    start = torch.zeros(rows, 1, dtype=torch.long)
    shifted = torch.cat([start, target[:, :-1]], 1)
    return {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": shifted, "labels": target, DRAWS: keys}


def attached(model: nn.Module, kind: str, method: dict[str, Any], **options: Any) -> Adversarial:
    config = ObjectiveConfig(kind=kind, adversarial=method, **options)
    objective = wrap(make_objective(config), config)
    assert isinstance(objective, Adversarial)
    objective.attach(model, find_embeddings(model))
    return objective


def run(objective: Adversarial, model: nn.Module, tensors: dict[str, Tensor]) -> Terms:
    return objective(model, tensors, lambda _: None)


def reference(model: nn.Module, kind: str, tensors: dict[str, Tensor], options: Any) -> tuple[Tensor, Tensor]:
    """(clean loss, adversarial part), as the papers write them; perturbed by `inputs_embeds` alone."""
    stack = model.get_encoder() if kind == "seq2seq" else model
    table, mask = stack.get_input_embeddings(), (tensors["attention_mask"] != 0)[..., None]
    inputs = {k: v for k, v in tensors.items() if k not in ("input_ids", "labels", DRAWS)}
    objective = make_objective(ObjectiveConfig(kind=kind))

    # Marian scales what it looked up, and not what it is given
    scale = stack.embed_scale if type(stack).__name__ == "MarianEncoder" else 1.0

    def loss(delta: Tensor) -> Tensor:
        embedded = (table(tensors["input_ids"]) + delta) * scale
        logits = model(inputs_embeds=embedded, **inputs).logits
        return objective.sums(logits, tensors["labels"])["loss"]

    def norms(delta: Tensor) -> Tensor:
        return delta.flatten(1).norm(dim=1)[:, None, None]

    def ascended(delta: Tensor, length: float) -> Tensor:
        delta = delta.detach().requires_grad_()
        slope = torch.autograd.grad(loss(delta), delta)[0] * mask
        moved = delta.detach() + length * slope / norms(slope)
        return moved * (options.epsilon / norms(moved)).clamp(max=1)

    rows, columns = tensors["input_ids"].shape
    delta = torch.zeros(rows, columns, WIDTH, dtype=table.weight.dtype)
    clean = loss(delta)
    if options.kind != "freelb":
        steps = 1 if options.kind == "fgm" else options.steps
        for _ in range(steps):
            delta = ascended(delta, options.epsilon if steps == 1 else 1.5 * options.epsilon / steps)
        return clean, options.weight * loss(delta)
    for row, key in enumerate(tensors[DRAWS].tolist()):
        size = int(mask[row].sum())
        drawn = torch.rand(size, WIDTH, generator=torch.Generator().manual_seed(key))
        delta[row, :size] = ((2 * drawn - 1) * options.epsilon / (size * WIDTH) ** 0.5).to(delta.dtype)
    total = torch.zeros(())
    for _ in range(options.steps):
        total = total + loss(delta) / options.steps
        delta = ascended(delta, 1.5 * options.epsilon / options.steps)
    return clean, total


def gradients(model: nn.Module, total: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    total.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", MODELS)
def test_gradients_are_those_of_moved_input_embeddings(name: str, method: str) -> None:
    kind = MODELS[name][0]
    model, tensors = model_of(name), tensors_of(kind)
    if name == "roberta":
        # its places follow from the tokens, which `inputs_embeds` does not tell
        mask = tensors["attention_mask"]
        tensors["position_ids"] = (mask.cumsum(1) * mask) + 1
    objective = attached(model, kind, METHODS[method])
    clean, part = reference(model, kind, tensors, objective._config)
    expected = gradients(model, part if method == "freelb" else clean + part)
    terms = run(objective, model, tensors)
    found = gradients(model, terms.total)
    assert terms.sums["loss"].item() == pytest.approx(clean.item(), rel=1e-6)
    assert terms.sums["adversarial"].item() == pytest.approx(part.item(), rel=1e-6)
    assert part.item() > (0.7 if method == "fgm" else 1.0) * clean.item()
    assert found.keys() == expected.keys()
    largest = max(value.abs().max() for value in expected.values())
    for key, value in expected.items():
        # the losses are computed in fp32
        torch.testing.assert_close(found[key], value, rtol=1e-4, atol=1e-6 * largest.item())


@pytest.mark.parametrize("method", METHODS)
def test_no_gradient_of_a_parameter_is_made_before_the_backward_pass(method: str) -> None:
    model, tensors = model_of("bert"), tensors_of("classification")
    seen: list[str] = []
    for name, parameter in model.named_parameters():
        parameter.register_hook(lambda _, name=name: seen.append(name))
    terms = run(attached(model, "classification", METHODS[method]), model, tensors)
    assert seen == []
    assert all(parameter.grad is None for parameter in model.parameters())
    terms.total.backward()
    assert sorted(seen) == sorted(name for name, _ in model.named_parameters())


@pytest.mark.parametrize("method", METHODS)
def test_frozen_embeddings_are_moved_all_the_same(method: str) -> None:
    model, tensors = model_of("bert"), tensors_of("classification")
    objective = attached(model, "classification", METHODS[method])
    trained = run(objective, model, tensors).sums
    for parameter in model.bert.embeddings.parameters():
        parameter.requires_grad_(False)
    frozen = run(objective, model, tensors)
    assert {k: v.item() for k, v in frozen.sums.items()} == {k: v.item() for k, v in trained.items()}
    assert "bert.embeddings.word_embeddings.weight" not in gradients(model, frozen.total)


@pytest.mark.parametrize("method", METHODS)
def test_a_sample_is_moved_as_if_it_were_alone(method: str) -> None:
    model, tensors = model_of("bert"), tensors_of("classification")
    objective = attached(model, "classification", METHODS[method])
    together = run(objective, model, tensors).sums["adversarial"]
    each = []
    for row in range(3):
        length = int(tensors["attention_mask"][row].sum())
        alone = {k: v[row : row + 1, :length] if v.dim() == 2 else v[row : row + 1] for k, v in tensors.items()}
        each.append(run(objective, model, alone).sums["adversarial"].item())
    assert together.item() == pytest.approx(sum(each), rel=1e-6)


class Everywhere(nn.Module):
    """Reads its padding too."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(50, WIDTH), nn.Linear(WIDTH, 3)

    def get_input_embeddings(self) -> nn.Module:
        return self.table

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self.head(self.table(input_ids).tanh().mean(1)))


@pytest.mark.parametrize("method", METHODS)
def test_padding_is_never_moved(method: str) -> None:
    model, tensors = Everywhere(), tensors_of("classification")
    found: list[Tensor] = []
    looked_up = model.table(tensors["input_ids"])
    objective = attached(model, "classification", METHODS[method])
    moved = objective._embeddings.moved

    @contextmanager
    def watched(delta: Tensor | None) -> Iterator[list[Tensor]]:
        with moved(delta) as seen:
            yield seen
        found.extend(seen)

    objective._embeddings.moved = watched
    run(objective, model, tensors)
    there = tensors["attention_mask"] != 0
    for embedded in found:
        assert torch.equal(embedded[~there], looked_up[~there])
    assert (found[-1][there] != looked_up[there]).any()
    distances = (found[-1] - looked_up).flatten(1).norm(dim=1)
    assert (distances <= objective._config.epsilon * 1.0001).all()


@pytest.mark.parametrize("method", METHODS)
def test_all_passes_of_a_step_have_the_same_dropout(method: str) -> None:
    model, tensors = model_of("bert", dropout=0.5), tensors_of("classification")
    objective = attached(model, "classification", METHODS[method] | {"epsilon": 1e-7, "weight": 1.0})
    torch.manual_seed(3)
    terms = run(objective, model, tensors)
    assert terms.sums["adversarial"].item() == pytest.approx(terms.sums["loss"].item(), rel=1e-5)
    torch.manual_seed(3)
    plain = objective._objective(model, {k: v for k, v in tensors.items() if k != DRAWS}, lambda _: None)
    assert torch.equal(plain.sums["loss"], terms.sums["loss"])
    torch.manual_seed(4)
    assert run(objective, model, tensors).sums["loss"] != terms.sums["loss"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", METHODS)
def test_nothing_to_learn_moves_nothing(method: str, dtype: torch.dtype) -> None:
    model, tensors = model_of("gpt2", dtype=dtype), tensors_of("causal")
    tensors["labels"] = torch.full_like(tensors["labels"], -100)
    tensors["attention_mask"][2] = 0
    terms = run(attached(model, "causal", METHODS[method]), model, tensors)
    assert {name: value.item() for name, value in terms.sums.items()} == {"loss": 0.0, "adversarial": 0.0}
    assert all((value == 0).all() for value in gradients(model, terms.total).values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_direction_does_not_depend_on_the_scale_of_the_loss(dtype: torch.dtype) -> None:
    model, tensors = model_of("gpt2", dtype=dtype), tensors_of("causal")
    objective = attached(model, "causal", METHODS["pgd"])
    inner = objective._objective
    parts = []
    for scale in (1.0, 2.0**-3, 2.0**3):
        inner._total = lambda terms, scale=scale: terms["loss"] * scale
        parts.append(run(objective, model, tensors).sums["adversarial"].item() / scale)
    assert parts[1:] == parts[:1] * 2


def test_without_gradients_the_loss_is_the_clean_one() -> None:
    model, tensors = model_of("bert"), tensors_of("classification")
    for method in METHODS.values():
        objective = attached(model, "classification", method)
        expected = run(objective, model, tensors).sums["loss"]
        with torch.no_grad():
            found = run(objective, model, tensors)
        assert {k: v.item() for k, v in found.sums.items()} == {"loss": expected.item(), "adversarial": 0.0}


def test_scores_are_those_of_the_objective_within() -> None:
    model, tensors = model_of("bert"), tensors_of("classification")
    objective = attached(model, "classification", METHODS["freelb"])
    inner, plain = objective._objective, {k: v for k, v in tensors.items() if k != DRAWS}
    assert torch.equal(objective.targets(tensors), inner.targets(plain))
    assert torch.equal(objective.sample_losses(model, tensors), inner.sample_losses(model, plain))
    for found, expected in (
        (objective.evaluate(model, tensors), inner.evaluate(model, plain)),
        (objective.predict(model, tensors), inner.predict(model, plain)),
    ):
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_parts_alone_add_up() -> None:
    model, tensors = model_of("gpt2", dtype=torch.float32), tensors_of("causal")
    objective = attached(model, "causal", METHODS["pgd"], z_loss=0.1)
    assert objective.minimised == ("loss", "z_loss", "adversarial")
    whole = gradients(model, run(objective, model, tensors).total)
    parts = [gradients(model, run(objective.alone(name), model, tensors).total) for name in objective.minimised]
    for name, value in whole.items():
        torch.testing.assert_close(sum(part[name] for part in parts), value, rtol=1e-5, atol=1e-5)
    free = attached(model, "causal", METHODS["freelb"], z_loss=0.1)
    assert (free.minimised, free.parts) == (("adversarial",), ("z_loss", "adversarial"))


def test_samples_that_go_through_twice_are_moved_alike() -> None:
    model, tensors = model_of("bert"), tensors_of("classification")
    once = run(attached(model, "classification", METHODS["freelb"]), model, tensors)
    twice = run(attached(model, "classification", METHODS["freelb"], r_drop=1.0), model, tensors)
    # without dropout both passes are the same, and nothing diverges
    assert twice.total.item() == pytest.approx(once.total.item(), rel=1e-6)


class Halves(Everywhere):
    """Reads one half of what is looked up in the first half of the samples, the other in the second."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> SimpleNamespace:
        looked_up = self.table(input_ids)
        first = torch.arange(WIDTH) < WIDTH // 2
        kept = torch.cat([part * mask for part, mask in zip(looked_up.chunk(2), (first, ~first), strict=True)])
        return SimpleNamespace(logits=self.head(kept.tanh().mean(1)))


def test_what_moves_a_sample_that_goes_through_twice_is_the_slope_of_both_passes() -> None:
    model, tensors = Halves(), tensors_of("classification")
    passes: list[Tensor] = []
    model.head.register_forward_pre_hook(lambda _, inputs: passes.append(inputs[0].detach()))
    run(attached(model, "classification", METHODS["fgm"], r_drop=1.0), model, tensors)
    clean, moved = passes
    for half, (before, after) in enumerate(zip(clean.chunk(2), moved.chunk(2), strict=True)):
        read = slice(0, WIDTH // 2) if half == 0 else slice(WIDTH // 2, None)
        assert (before[:, read] != after[:, read]).all()


def test_freelb_without_draws_is_refused() -> None:
    model, tensors = model_of("bert"), tensors_of("classification")
    del tensors[DRAWS]
    with pytest.raises(ValueError, match="`draw_keys`"):
        run(attached(model, "classification", METHODS["freelb"]), model, tensors)


def test_off_changes_nothing() -> None:
    config = ObjectiveConfig()
    objective = make_objective(config)
    assert wrap(objective, config) is objective


def test_real_tokens_without_a_mask() -> None:
    assert real_tokens({"input_ids": torch.zeros(2, 3, dtype=torch.long)}).tolist() == [[True] * 3] * 2


@given(exponent=st.integers(-126, 120), zero=st.booleans())
def test_unit_has_length_one_at_any_size(exponent: int, zero: bool) -> None:
    slope = torch.ones(2, 3, 4) * 2.0**exponent
    slope[1] *= not zero
    found = unit(slope).flatten(1).norm(dim=1)
    assert found.tolist() == pytest.approx([1.0, 0.0 if zero else 1.0])


@given(radius=st.floats(0.01, 100.0), size=st.floats(0.0, 1e4))
def test_within_ball_is_the_nearest_point(radius: float, size: float) -> None:
    delta = torch.full((1, 2, 2), size, dtype=torch.float64)
    found = within_ball(delta, radius)
    assert found.norm().item() <= radius * (1 + 1e-12)
    if 2 * size <= radius:
        assert torch.equal(found, delta)
    else:
        assert found.norm().item() == pytest.approx(radius)
