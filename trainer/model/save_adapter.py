"""Writes adapters as peft does: a folder that `PeftModel.from_pretrained` loads beside the pretrained model."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel

from trainer.config.schema import RunConfig
from trainer.errors import ConfigError, RunDirectoryError
from trainer.model.adapters import ADAPTER, is_adapter, lora_layers, peft_config, plain_name, trained_modules
from trainer.model.configuration import pretrained_reference

_CONFIG = "adapter_config.json"
_PREFIX = "base_model.model."
"""Of all names in peft's files."""
_TASKS = {
    "causal": "CAUSAL_LM",
    "classification": "SEQ_CLS",
    "multi_label": "SEQ_CLS",
    "regression": "SEQ_CLS",
    "several": "SEQ_CLS",
    "token_classification": "TOKEN_CLS",
    "question_answering": "QUESTION_ANS",
    "seq2seq": "SEQ_2_SEQ_LM",
}


def save_adapter(
    config: RunConfig, model: PreTrainedModel, output: Path, *, tokenizer_path: Path, dtype: torch.dtype
) -> None:
    """Write the adapters of `model`, the modules that were trained whole, peft's configuration and the tokenizer.

    `output` appears whole or not at all, and replaces an earlier adapter.

    Args:
        model: as `build_model` makes it, with the trained values in it.
        dtype: type of the weights in the file.

    Raises:
        ConfigError: the run has no adapters.
        RunDirectoryError: `output` holds something that is not an adapter.
    """
    if config.model.lora is None:
        raise ConfigError([("model.lora", "is not set: this run has no adapter to export; leave --adapter out")])
    if output.exists() and not (output.is_dir() and ((output / _CONFIG).is_file() or not any(output.iterdir()))):
        raise RunDirectoryError(f"{output} is in the way: it is no earlier adapter; move it, or export elsewhere")
    whole = trained_modules(model, config)
    written = peft_config(model, config, list(lora_layers(model)), whole)
    name, _ = pretrained_reference(config.model)
    written.base_model_name_or_path = str(Path(name).absolute()) if Path(name).exists() else name
    written.task_type = _TASKS.get(config.objective.kind)
    written.inference_mode = True
    tensors: dict[str, Tensor] = {}
    for key, tensor in model.state_dict().items():
        if is_adapter(key) or any(key.startswith(f"{module}.") for module in whole):
            plain = plain_name(key).replace(f".{ADAPTER}.", ".")
            tensors[f"{_PREFIX}{plain}"] = tensor.detach().to("cpu", dtype).contiguous()
    partial = output.with_name(f".{output.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        save_file(tensors, partial / "adapter_model.safetensors", {"format": "pt"})
        written.save_pretrained(partial)
        if tokenizer_path.is_dir():
            trust = config.model.trust_remote_code
            AutoTokenizer.from_pretrained(tokenizer_path, trust_remote_code=trust).save_pretrained(partial)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    if output.exists():
        shutil.rmtree(output)
    partial.rename(output)
