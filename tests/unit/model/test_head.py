"""The head that is found is the model's own: its map, scale and soft cap."""

from typing import Any

import pytest
import torch
from model_configs import TINY, run_config
from torch import Tensor, nn

from trainer.errors import ConfigError
from trainer.knowledge import Head
from trainer.model.build import build_model
from trainer.model.head import find_head, logits_of

_LLAMA = {key: value for key, value in TINY["llama"].items() if key not in ("model_type", "head_dim")}
SCALED: dict[str, tuple[dict[str, Any], float, float | None]] = {
    "cohere": ({**_LLAMA, "logit_scale": 0.25}, 0.25, None),
    "granite": ({**_LLAMA, "logits_scaling": 8.0}, 0.125, None),
    "hyperclovax": ({**_LLAMA, "logits_scaling": 8.0}, 8.0, None),
    "falcon_h1": ({**_LLAMA, "lm_head_multiplier": 0.5, "mamba_d_ssm": 16, "mamba_n_heads": 2}, 0.5, None),
    "gemma2": ({**_LLAMA, "final_logit_softcapping": 30.0}, 1.0, 30.0),
    "gemma3_text": ({**_LLAMA, "final_logit_softcapping": 20.0}, 1.0, 20.0),
    "recurrent_gemma": ({**_LLAMA, "num_hidden_layers": 3, "logits_soft_cap": 10.0, "lru_width": 16}, 1.0, 10.0),
}


def build(name: str, dtype: torch.dtype = torch.float32) -> Any:
    model = build_model(run_config(name), vocabulary=260, zero3=None, dtype=dtype)
    return model.eval()


def logits_inside(model: Any, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return find_head(model).run(model, {"input_ids": ids}, logits_of)


IDS = torch.randint(0, 260, (2, 7), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", TINY)
def test_what_the_head_makes_of_its_input_is_the_models_logits(name: str) -> None:
    model = build(name)
    with torch.no_grad():
        expected = model(input_ids=IDS).logits
    torch.testing.assert_close(logits_inside(model, IDS), expected)
    assert "forward" not in model.get_output_embeddings().__dict__


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", SCALED)
def test_scale_and_soft_cap_are_those_of_the_model(
    name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    fields, scale, softcap = SCALED[name]
    monkeypatch.setitem(TINY, name, {"model_type": name, **fields})
    model = build(name, dtype)
    head = find_head(model)
    assert (head.scale, head.softcap) == (scale, softcap)
    if dtype == torch.float32:
        with torch.no_grad():
            # weights of a new model are small: a cap would not show
            head.weights().weight.mul_(100)
            expected = model(input_ids=IDS).logits
        torch.testing.assert_close(logits_inside(model, IDS), expected)


def test_the_gradient_is_that_of_the_plain_forward() -> None:
    model = build("llama-tied")
    gradients = []
    for inside in (True, False):
        model.zero_grad()
        if inside:
            loss = find_head(model).run(model, {"input_ids": IDS}, lambda h, head: logits_of(h, head).square().sum())
        else:
            loss = model(input_ids=IDS).logits.square().sum()
        loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.equal(ours, plain) for ours, plain in zip(*gradients, strict=True))


def test_a_model_that_does_something_else_to_its_logits_is_refused() -> None:
    model = build("llama")

    def shift(_module: nn.Module, _inputs: Any, outputs: Any) -> Any:
        outputs.logits = outputs.logits + 1.0
        return outputs

    model.register_forward_hook(shift)
    with pytest.raises(ConfigError, match="LlamaForCausalLM changes its logits in a way that is not known"):
        find_head(model)


def test_a_scale_that_the_configuration_does_not_tell_is_refused() -> None:
    model = build("llama")
    model.config.logit_scale = 0.5
    assert find_head(model).scale == 1.0, "it is not applied"
    model.register_forward_hook(lambda _m, _i, outputs: type(outputs)(logits=outputs.logits * 3))
    with pytest.raises(ConfigError, match="changes its logits"):
        find_head(model)


def test_a_head_that_is_no_linear_map_is_refused() -> None:
    class Squared(nn.Linear):
        def forward(self, *inputs: Tensor) -> Tensor:
            return super().forward(*inputs) ** 2

    model = build("llama")
    model.lm_head = Squared(16, 260)
    with pytest.raises(ConfigError, match="makes its logits in a way that is not known"):
        find_head(model)


def test_a_model_without_a_head_is_refused() -> None:
    with pytest.raises(ConfigError, match="LlamaModel has no output embeddings"):
        find_head(build("llama").model)


def test_a_failed_forward_leaves_the_model_as_it_was() -> None:
    model = build("llama")
    head = find_head(model)

    def fail(_hidden: Tensor, _head: Head) -> Tensor:
        raise ValueError("no loss")

    with pytest.raises(ValueError, match="no loss"):
        head.run(model, {"input_ids": IDS}, fail)
    assert model(input_ids=IDS).logits.shape == (2, 7, 260)
    assert not head.module._forward_hooks
