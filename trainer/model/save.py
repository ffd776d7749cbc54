"""Writes a model that `from_pretrained` loads, from a stream of tensors: one shard in memory at a time."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import (
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.core_model_loading import revert_weight_conversion

from trainer.config.objective import EACH_ALONE
from trainer.config.schema import RunConfig
from trainer.errors import CheckpointError, RunDirectoryError
from trainer.model.build import meta_model
from trainer.model.configuration import max_positions, pretrained_reference
from trainer.model.projections import is_projection
from trainer.records import Classes, IntArray

MAX_SHARD_BYTES = 2_000_000_000
"""A single tensor that is larger has a file of its own."""

_INDEX = "model.safetensors.index.json"


def save_model(
    config: RunConfig,
    tensors: Iterable[tuple[str, Tensor]],
    output: Path,
    *,
    tokenizer_path: Path,
    vocabulary: int,
    dtype: torch.dtype,
    classes: Classes | None = None,
    kept: IntArray | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write configuration, generation configuration, safetensors and tokenizer to the directory `output`.

    `output` appears whole or not at all, and replaces an earlier export. Tied weights are written once, under their
    first name; mixtures of experts are written in the layout that they were published with.

    Args:
        tensors: (name, whole tensor) of every parameter and persistent buffer, in any order; tied weights once or more.
        tokenizer_path: directory of the run's tokenizer, or a `tokenizer.json`.
        vocabulary: tokens of the run's tokenizer, as given to `build_model`.
        dtype: type of the floating-point weights in the files.
        classes, kept: as given to `build_model`.

    Raises:
        CheckpointError: a tensor is missing, unknown, of another shape or there twice.
        RunDirectoryError: `output` holds something that is not an export.
    """
    if output.exists() and not (output.is_dir() and (_is_export(output) or not any(output.iterdir()))):
        raise RunDirectoryError(f"{output} is in the way: it is not an earlier export; move it, or export elsewhere")
    model = meta_model(_plain(config), vocabulary, classes, kept)
    partial = output.with_name(f".{output.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        _write_weights(_expected(model, tensors, dtype), model, partial, max_shard_bytes)
        tokenizer = _tokenizer(tokenizer_path, config.model.trust_remote_code)
        if config.objective.kind in EACH_ALONE and (limit := max_positions(model.config)) is not None:
            # who works with `truncation=True` gets what the model can take
            tokenizer.model_max_length = min(tokenizer.model_max_length, limit)
        if classes is not None and tokenizer.pad_token is None:
            # texts of several lengths at once need one
            tokenizer.pad_token = tokenizer.convert_ids_to_tokens(classes.pad_id)
        tokenizer.save_pretrained(partial)
        _write_configuration(config, model, tokenizer, partial, dtype)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    if output.exists():
        shutil.rmtree(output)
    partial.rename(output)


def _plain(config: RunConfig) -> RunConfig:
    """Without projections to a teacher, whose files may be gone by now, without adapters, and nothing frozen."""
    changes = {
        "distill": None,
        "model": config.model.model_copy(update={"lora": None}),
        "optim": config.optim.model_copy(update={"freeze": ()}),
    }
    return config.model_copy(update=changes)


def _is_export(folder: Path) -> bool:
    return (folder / "config.json").is_file() and any(folder.glob("model*.safetensors"))


def _expected(
    model: PreTrainedModel, tensors: Iterable[tuple[str, Tensor]], dtype: torch.dtype
) -> Iterator[tuple[str, Tensor]]:
    """Each tensor of the model once, in the type of the file; what only distillation needed is left out."""
    everything = model.state_dict()
    parameters = {name for name, _ in model.named_parameters()}
    aliases = {name for name, _ in model.named_parameters(remove_duplicate=False)} - parameters
    missing = set(everything) - aliases
    seen: set[str] = set()
    for name, tensor in tensors:
        if is_projection(name):
            continue
        if name not in everything:
            raise CheckpointError(f"the checkpoint has a tensor {name}, which {type(model).__name__} does not have")
        if tensor.shape != everything[name].shape:
            raise CheckpointError(
                f"{name} is {list(tensor.shape)} in the checkpoint and {list(everything[name].shape)} in the model"
            )
        if name in seen:
            raise CheckpointError(f"the checkpoint has the tensor {name} twice")
        seen.add(name)
        if name not in aliases:
            missing.discard(name)
            yield name, tensor.detach().to("cpu", dtype if tensor.is_floating_point() else tensor.dtype).contiguous()
    if missing:
        raise CheckpointError(f"the checkpoint lacks {len(missing)} tensors of the model: {', '.join(sorted(missing))}")


def _write_weights(
    tensors: Iterable[tuple[str, Tensor]], model: PreTrainedModel, folder: Path, max_shard_bytes: int
) -> None:
    files: list[Path] = []
    where: list[dict[str, int]] = []

    def flush(shard: dict[str, Tensor]) -> None:
        shard = {name: _alone(tensor) for name, tensor in revert_weight_conversion(model, shard).items()}
        files.append(folder / f"shard-{len(files)}")
        where.append({name: tensor.nbytes for name, tensor in shard.items()})
        save_file(shard, files[-1], {"format": "pt"})

    shard: dict[str, Tensor] = {}
    size = 0
    for name, tensor in tensors:
        if shard and size + tensor.nbytes > max_shard_bytes:
            flush(shard)
            shard, size = {}, 0
        shard[name] = tensor
        size += tensor.nbytes
    flush(shard)

    if len(files) == 1:
        files[0].rename(folder / "model.safetensors")
        return
    weight_map: dict[str, str] = {}
    for index, (file, sizes) in enumerate(zip(files, where, strict=True), start=1):
        final = f"model-{index:05d}-of-{len(files):05d}.safetensors"
        file.rename(folder / final)
        weight_map |= dict.fromkeys(sizes, final)
    total = sum(sum(sizes.values()) for sizes in where)
    text = json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2, sort_keys=True)
    (folder / _INDEX).write_text(text + "\n", encoding="utf-8")


def _alone(tensor: Tensor) -> Tensor:
    """The tensor, in memory of its own: experts that were cut out of one stack share its, which safetensors refuses."""
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


def _tokenizer(path: Path, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    if path.is_file():
        return PreTrainedTokenizerFast(tokenizer_file=os.fspath(path))  # type: ignore[no-untyped-call]
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    return tokenizer


def _write_configuration(
    config: RunConfig, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, dtype: torch.dtype
) -> None:
    written = model.config
    written.dtype = str(dtype).removeprefix("torch.")
    written.architectures = [type(model).__name__]
    # off in training; for generation the architecture's own default stands
    written.use_cache = getattr(type(written), "use_cache", True)
    if config.model.pretrained is None:
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            token = getattr(tokenizer, name)
            if name not in (config.model.config or {}) and token is not None:
                setattr(written, name, token)
        if written.is_encoder_decoder:
            _set_ends(config, written)
    if hasattr(written, "quantization_config"):
        del written.quantization_config
    written.save_pretrained(folder)
    if model.can_generate():
        _generation(config, model).save_pretrained(folder)


def _set_ends(config: RunConfig, written: PreTrainedConfig) -> None:
    """The tokens that a decoder begins and ends with: those that the architecture was published with count in another
    vocabulary."""
    given = config.model.config or {}
    if "decoder_start_token_id" not in given:
        written.decoder_start_token_id = written.pad_token_id
    if "forced_eos_token_id" not in given and getattr(written, "forced_eos_token_id", None) is not None:
        written.forced_eos_token_id = written.eos_token_id


def _generation(config: RunConfig, model: PreTrainedModel) -> GenerationConfig:
    """That of the pretrained model where it has one: it may hold several end tokens, and sampling defaults."""
    if config.model.pretrained is not None and not config.model.pretrained.endswith(".gguf"):
        name, _ = pretrained_reference(config.model)
        try:
            return GenerationConfig.from_pretrained(name)
        except OSError:
            pass
    return GenerationConfig.from_model_config(model.config)
