"""Tiny models by architecture, and run configs around them."""

from typing import Any

from trainer.config.objective import ObjectiveConfig
from trainer.config.schema import (
    BatchConfig,
    DataConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    ScheduleConfig,
    SourceConfig,
    TokenizerConfig,
    TrainTokenizerConfig,
    ZeroConfig,
)

VOCABULARY = 260
LENGTH = 16

_LLAMA_LIKE = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 24,
    "head_dim": 8,
}
_BERT_LIKE = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}

TINY: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", **_LLAMA_LIKE},
    "llama-tied": {"model_type": "llama", **_LLAMA_LIKE, "tie_word_embeddings": True},
    "gpt2": {"model_type": "gpt2", "n_embd": 16, "n_layer": 2, "n_head": 2},
    "qwen3": {"model_type": "qwen3", **_LLAMA_LIKE},
    "olmo2": {"model_type": "olmo2", **{k: v for k, v in _LLAMA_LIKE.items() if k != "head_dim"}},
    "gemma2": {"model_type": "gemma2", **_LLAMA_LIKE, "final_logit_softcapping": 1.5, "attn_logit_softcapping": 2.0},
    "mixtral": {"model_type": "mixtral", **_LLAMA_LIKE, "num_local_experts": 4, "num_experts_per_tok": 2},
    "mamba": {"model_type": "mamba", "hidden_size": 16, "num_hidden_layers": 2, "state_size": 4},
    "gpt_neox": {"model_type": "gpt_neox", **_BERT_LIKE},
    "bert": {"model_type": "bert", **_BERT_LIKE},
    "modernbert": {"model_type": "modernbert", **_BERT_LIKE},
    "roberta": {"model_type": "roberta", **_BERT_LIKE},
}
MASKED = frozenset({"bert", "modernbert", "roberta"})


def run_config(
    name: str = "llama",
    *,
    kind: str | None = None,
    seed: int = 0,
    length: int = LENGTH,
    stage: int = 0,
    decay_embeddings: bool = False,
    boundaries: str = "positions",
    fields: dict[str, Any] | None = None,
    **model: Any,
) -> RunConfig:
    """A run of the tiny model `name`, with `fields` on top of its configuration and further options of the model."""
    if "pretrained" not in model:
        model["config"] = TINY[name] | (fields or {})
    return RunConfig(
        name="tiny",
        seed=seed,
        data=DataConfig(
            sources=(SourceConfig(stdlib=True),),
            sequence_length=length,
            boundaries=boundaries,
            tokenizer=TokenizerConfig(train=TrainTokenizerConfig(vocabulary=VOCABULARY)),
        ),
        model=ModelConfig(**model),
        objective=ObjectiveConfig(kind=kind or ("masked" if name in MASKED else "causal")),
        batch=BatchConfig(samples=2, micro=1),
        optim=OptimConfig(lr=1e-3, decay_embeddings=decay_embeddings),
        schedule=ScheduleConfig(duration=2),
        zero=ZeroConfig(stage=stage),
    )
