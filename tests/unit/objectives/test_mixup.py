"""Mixup against one pass over `inputs_embeds` in double precision."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForSequenceClassification

from trainer.config.objective import ObjectiveConfig
from trainer.errors import ConfigError
from trainer.model.embeddings import find_embeddings
from trainer.objectives import make_objective
from trainer.objectives.adversarial import real_tokens
from trainer.objectives.mixup import Mixup, wrap
from trainer.records import DRAWS, PARTNER, SHARE

PAD, CLASSES = 1, 3
BERT = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
SMALL = {
    "bert": BERT,
    "roberta": BERT,
    "gpt2": {"n_embd": 16, "n_layer": 2, "n_head": 2},
    "llama": {**BERT, "num_key_value_heads": 1},
}
LENGTHS = {"": (6, 2, 4), PARTNER: (3, 5, 4)}


def model_of(name: str, **fields: Any) -> nn.Module:
    torch.manual_seed(0)
    config = AutoConfig.for_model(name, vocab_size=50, pad_token_id=PAD, bos_token_id=0, eos_token_id=0, **SMALL[name])
    for key, value in ({"num_labels": CLASSES} | fields).items():
        setattr(config, key, value)
    model = AutoModelForSequenceClassification.from_config(config).double().train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def tensors_of(kind: str = "classification", *, segments: bool = False) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    result = {SHARE: torch.tensor([0.3, 0.9, 0.55])}
    for prefix, lengths in LENGTHS.items():
        present = torch.arange(6) < torch.tensor(lengths)[:, None]
        ids = torch.randint(2, 50, (3, 6), generator=generator)
        result[prefix + "input_ids"] = ids.where(present, PAD)
        result[prefix + "attention_mask"] = present.long()
        if segments:
            result[prefix + "token_type_ids"] = (torch.arange(6) >= len(prefix) % 5).long() * present
        result[prefix + "labels"] = {
            "classification": torch.randint(CLASSES, (3,), generator=generator),
            "multi_label": torch.randint(2, (3, CLASSES), generator=generator).float(),
            "regression": torch.randn(3, generator=generator),
        }[kind]
    return result


def attached(model: nn.Module, **options: Any) -> Mixup:
    config = ObjectiveConfig(mixup=0.4, **{"kind": "classification", **options})
    counts = torch.tensor([5.0, 2.0, 3.0]) if config.class_weights == "balanced" else None
    objective = wrap(make_objective(config, class_counts=counts), config)
    assert isinstance(objective, Mixup)
    objective.attach(find_embeddings(model))
    return objective


def loss_of(kind: str, logits: Tensor, labels: Tensor, options: dict[str, Any]) -> Tensor:
    """Of each sample, [B]."""
    if kind == "multi_label":
        return F.binary_cross_entropy_with_logits(logits, labels.double(), reduction="none").mean(1)
    if kind == "regression":
        return (logits.squeeze(-1) - labels).square()
    losses = F.cross_entropy(logits, labels, label_smoothing=options.get("label_smoothing", 0.0), reduction="none")
    return losses * (10 / (3 * torch.tensor([5.0, 2.0, 3.0])))[labels] if "class_weights" in options else losses


def reference(model: nn.Module, tensors: dict[str, Tensor], kind: str, options: dict[str, Any]) -> Tensor:
    table = model.get_input_embeddings()
    share = tensors[SHARE].to(table.weight.dtype)
    both = [table(tensors[prefix + "input_ids"]) for prefix in LENGTHS]
    mixed = share[:, None, None] * both[0] + (1 - share)[:, None, None] * both[1]
    lengths = torch.tensor([max(each) for each in zip(*LENGTHS.values(), strict=True)])
    mask = (torch.arange(6) < lengths[:, None]).long()
    inputs: dict[str, Tensor] = {"attention_mask": mask}
    name = model.config.model_type
    if name == "roberta":
        inputs["position_ids"] = (mask.cumsum(1) * mask) + PAD
    if "token_type_ids" in tensors:
        own = tensors["attention_mask"] != 0
        inputs["token_type_ids"] = tensors["token_type_ids"].where(own, tensors[PARTNER + "token_type_ids"])
    if name in ("gpt2", "llama"):
        hidden = model.base_model(inputs_embeds=mixed, **inputs).last_hidden_state
        logits = model.score(hidden[torch.arange(3), lengths - 1])
    else:
        logits = model(inputs_embeds=mixed, **inputs).logits
    losses = [loss_of(kind, logits, tensors[prefix + "labels"], options) for prefix in LENGTHS]
    return (share * losses[0] + (1 - share) * losses[1]).sum()


def gradients(model: nn.Module, total: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    total.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    **{name: (name, "classification", {}) for name in SMALL},
    "segments": ("bert", "classification", {}),
    "smoothed and balanced": ("bert", "classification", {"label_smoothing": 0.1, "class_weights": "balanced"}),
    "multi_label": ("bert", "multi_label", {}),
    "regression": ("bert", "regression", {}),
}


@pytest.mark.parametrize("case", CASES)
def test_gradients_are_those_of_mixed_embeddings_and_targets(case: str) -> None:
    name, kind, options = CASES[case]
    model = model_of(name, num_labels=1 if kind == "regression" else CLASSES)
    if options:
        # that loss is not made for double precision
        model = model.float()
    tensors = tensors_of(kind, segments=case == "segments")
    expected_total = reference(model, tensors, kind, options)
    expected = gradients(model, expected_total)
    seen: list[Tensor] = []
    terms = attached(model, kind=kind, **options)(model, tensors, seen.append)
    assert terms.sums["loss"].item() == pytest.approx(expected_total.item(), rel=1e-6)
    found = gradients(model, terms.total)
    assert found.keys() == expected.keys()
    largest = max(value.abs().max().item() for value in expected.values())
    for key, value in expected.items():
        # the losses are computed in fp32
        torch.testing.assert_close(
            found[key], value, rtol=1e-4, atol=1e-6 * largest, msg=lambda text, key=key: key + text
        )
    assert [len(logits) for logits in seen] == [3]


def test_the_model_looks_up_its_own_tokens_afterwards() -> None:
    model, tensors = model_of("bert"), tensors_of()
    plain = {name: tensors[name] for name in ("input_ids", "attention_mask")}
    before = model(**plain).logits
    attached(model)(model, tensors, lambda _: None)
    assert torch.equal(model(**plain).logits, before)
    assert "forward" not in model.get_input_embeddings().__dict__


def test_all_of_itself_is_the_text_alone() -> None:
    model, tensors = model_of("bert"), tensors_of()
    for name in ("input_ids", "attention_mask"):
        # padding of a longer partner would be attended to
        tensors[PARTNER + name] = tensors[name].roll(0)
    tensors[SHARE] = torch.ones(3)
    objective = attached(model)
    mixed = objective(model, tensors, lambda _: None)
    own = {name: tensors[name] for name in ("input_ids", "attention_mask", "labels")}
    alone = objective._objective(model, own, lambda _: None)
    assert mixed.total.item() == pytest.approx(alone.total.item(), rel=1e-6)


def test_scores_and_parts_are_those_of_the_objective_within() -> None:
    model, tensors = model_of("bert").float(), tensors_of()
    objective = attached(model, z_loss=0.1)
    inner = objective._objective
    own = {name: tensors[name] for name in ("input_ids", "attention_mask", "labels")}
    assert torch.equal(objective.targets(tensors), inner.targets(own))
    assert torch.equal(objective.sample_losses(model, tensors), inner.sample_losses(model, own))
    for found, expected in (
        (objective.evaluate(model, tensors), inner.evaluate(model, own)),
        (objective.predict(model, tensors), inner.predict(model, own)),
    ):
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert objective.minimised == ("loss", "z_loss")
    terms = objective(model, tensors, lambda _: None)
    for name in objective.minimised:
        only = objective.alone(name)(model, tensors, lambda _: None)
        assert only.total.item() == pytest.approx(terms.sums[name].item())
        assert only.sums["loss"].item() == terms.sums["loss"].item()


def test_tokens_of_a_mixed_sample_are_those_of_either() -> None:
    tensors = tensors_of() | {DRAWS: torch.arange(3)}
    assert real_tokens(tensors).sum(1).tolist() == [6, 5, 4]


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"kind": "token_classification"}, "targets of whole texts"),
        ({"kind": "causal"}, "targets of whole texts"),
        ({"kind": "classification", "r_drop": 1.0}, "R-Drop"),
    ],
)
def test_what_cannot_be_mixed_is_refused(options: dict[str, Any], match: str) -> None:
    config = ObjectiveConfig(mixup=0.4, **options)
    with pytest.raises(ConfigError, match=match):
        wrap(make_objective(config), config)


def test_off_changes_nothing() -> None:
    config = ObjectiveConfig()
    objective = make_objective(config)
    assert wrap(objective, config) is objective
