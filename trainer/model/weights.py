"""The weights of a pretrained model, one at a time: whatever the size of the model, one tensor of it is in memory."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    GgufConfig,
    PreTrainedConfig,
    PreTrainedModel,
    core_model_loading,
    modeling_gguf_pytorch_utils,
    modeling_utils,
)
from transformers.integrations.gguf.reader import read_gguf_metadata
from transformers.integrations.gguf.utils import is_gguf_arch_supported
from transformers.utils import logging as transformers_logging

from trainer.config.schema import RunConfig
from trainer.errors import ConfigError
from trainer.model.configuration import first_line, pretrained_reference
from trainer.model.heads import auto_class
from trainer.model.quiet import without_bars

Take = Callable[[str, Tensor], None]
"""Given the name of a parameter or buffer in the model, and its value on the CPU. The value goes when it returns."""


def read_weights(config: RunConfig, model_config: PreTrainedConfig, dtype: torch.dtype, take: Take) -> None:
    """Read `config.model.pretrained` through transformers, which renames, converts and dequantises as it always does.

    Raises:
        ConfigError: it cannot be read, or a weight has another shape than in the model.
    """
    name, arguments = pretrained_reference(config.model)
    load = partial(auto_class(config).from_pretrained, name, **arguments)
    try:
        if "gguf_file" in arguments:
            file = Path(name, arguments["gguf_file"])
            if is_gguf_arch_supported(read_gguf_metadata(str(file))[0]["general.architecture"]):
                load = partial(load, quantization_config=GgufConfig(dequantize=True))
            else:
                # transformers would dequantise all of it before it hands out the first
                kind, tensors = _gguf_tensors(file, config, model_config)
                load = partial(kind.from_pretrained, None, state_dict=tensors)
        with _one_at_a_time(take):
            # what has another shape is told below
            _, report = load(config=model_config, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True)
    except (OSError, ValueError, RuntimeError, ImportError, SafetensorError) as error:
        text = f"{config.model.pretrained} cannot be loaded: {first_line(error)}"
        raise ConfigError([("model.pretrained", text)]) from error
    for key, theirs, ours in sorted(report["mismatched_keys"]):
        text = f"{key} is {list(theirs)} in {config.model.pretrained} and {list(ours)} in the model"
        raise ConfigError([("model.overrides", text)])


@contextmanager
def _one_at_a_time(take: Take) -> Iterator[None]:
    """Within it transformers hands each weight to `take` as soon as it is made, and the model stays without memory."""
    place = core_model_loading.set_param_for_module

    def place_and_take(model: PreTrainedModel, name: str, value: Any, info: Any, quantizer: Any) -> None:
        place(model, name, value, info, quantizer)
        path, _, last = name.rpartition(".")
        owner = model.get_submodule(path)
        held = getattr(owner, last, None)
        if not isinstance(held, Tensor) or held.device.type == "meta":
            return
        take(name, held.detach())
        empty = torch.empty_like(held, device="meta")
        if last in owner._parameters:
            empty = nn.Parameter(empty, requires_grad=False)
        empty._is_hf_initialized = True  # type: ignore[attr-defined]
        setattr(owner, last, empty)

    def open_to_read(*args: Any, **options: Any) -> Any:
        # pages of a mapped file stay resident until it is closed: in the end all of it
        return open_file(*args, **{**options, "backend": "pread"})

    library: Any = modeling_utils
    open_file = library.safe_open
    before = os.environ.get("HF_DEACTIVATE_ASYNC_LOAD")
    verbosity = transformers_logging.get_verbosity()
    core_model_loading.set_param_for_module = place_and_take  # type: ignore[assignment]
    library.safe_open = open_to_read
    # its threads would read ahead without bound
    os.environ["HF_DEACTIVATE_ASYNC_LOAD"] = "1"
    # what is missing is told by who takes
    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    try:
        with without_bars():
            yield
    finally:
        core_model_loading.set_param_for_module = place
        library.safe_open = open_file
        transformers_logging.set_verbosity(verbosity)
        if before is None:
            del os.environ["HF_DEACTIVATE_ASYNC_LOAD"]
        else:
            os.environ["HF_DEACTIVATE_ASYNC_LOAD"] = before


class _GgufTensor:
    """A weight that is dequantised when it is indexed."""

    def __init__(self, make: Callable[[], Tensor]):
        self._make = make

    def __getitem__(self, _: Any) -> Tensor:
        return self._make()


def _gguf_tensors(
    file: Path, config: RunConfig, model_config: PreTrainedConfig
) -> tuple[type[PreTrainedModel], dict[str, _GgufTensor]]:
    """The class of the model in a .gguf file, and its weights by their names there; experts are several in one."""
    import gguf

    parsed = modeling_gguf_pytorch_utils.load_gguf_checkpoint(str(file))  # type: ignore[no-untyped-call]
    reader = gguf.GGUFReader(file)
    (architecture,) = modeling_gguf_pytorch_utils.read_field(reader, "general.architecture")  # type: ignore[no-untyped-call]
    default = modeling_gguf_pytorch_utils.TensorProcessor
    kind: Any = modeling_gguf_pytorch_utils.TENSOR_PROCESSORS.get(architecture, default)
    processor = kind(config=parsed["config"])
    with torch.device("meta"):
        model = auto_class(config).from_config(model_config)
    names = modeling_gguf_pytorch_utils.get_gguf_hf_weights_map(model, processor)
    sources: dict[str, list[Any]] = {}
    for tensor in reader.tensors:
        target = names.get(tensor.name) or names.get(tensor.name.removesuffix(".weight"))
        if target is not None:
            sources.setdefault(target, []).append(tensor)

    def make(target: str) -> Tensor:
        values: dict[str, Tensor] = {}
        for tensor in sources[target]:
            result = processor.process(
                weights=gguf.dequantize(tensor.data, tensor.tensor_type),
                name=tensor.name,
                tensor_key_mapping=names,
                parsed_parameters={"config": parsed["config"], "tensors": values},
            )
            if result.name in names:
                values[names[result.name]] = torch.from_numpy(result.weights.copy())
        return values[target]

    return type(model), {target: _GgufTensor(partial(make, target)) for target in sources}
