import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from trainer.model.writing import write_ends

VOCABULARY = 31


def models() -> dict[str, PreTrainedModel]:
    torch.manual_seed(0)
    small = {
        "vocab_size": VOCABULARY,
        "initializer_range": 0.5,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "use_cache": False,
    }
    llama = LlamaConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, pad_token_id=None, **small
    )
    gpt2 = GPT2Config(n_embd=16, n_layer=2, n_head=2, n_positions=16, **small)
    return {"llama": LlamaForCausalLM(llama), "gpt2": GPT2LMHeadModel(gpt2)}


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("with_positions", [False, True])
def test_what_is_written_is_drawn_from_the_models_own_predictions(name: str, with_positions: bool) -> None:
    """Token by token, without a cache, from whole forward passes."""
    model, tokens, temperature, end = models()[name], 5, 0.7, 3
    model.train()
    ids = torch.randint(VOCABULARY, (3, 12))
    positions = torch.arange(12).expand(3, 12).clone() if with_positions else None
    torch.manual_seed(4)
    found = write_ends(model, model, ids, tokens=tokens, temperature=temperature, end=end, positions=positions)
    assert model.training
    assert torch.equal(found[:, :7], ids[:, :7])

    model.eval()
    torch.manual_seed(4)
    expected = ids.clone()
    for column in range(7, 12):
        extra = {}
        if positions is not None:
            extra["position_ids"] = positions[:, :column]
        with torch.no_grad():
            seen = expected[:, :column]
            logits = model(input_ids=seen, attention_mask=torch.ones_like(seen), **extra).logits[:, -1]
        expected[:, column : column + 1] = torch.multinomial(torch.softmax(logits / temperature, -1), 1)
        if positions is not None:
            positions[:, column] = torch.where(expected[:, column - 1] == end, 0, positions[:, column - 1] + 1)
    assert torch.equal(found, expected)
    assert len(set(found[:, 7:].flatten().tolist())) > 3, "a draw, not a repetition"
