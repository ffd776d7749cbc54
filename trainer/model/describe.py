"""What a model is, without having it: `python -m trainer.model.describe CONFIG_OR_RUN [a.b=c …]` prints it as JSON;
after `--teacher` that of its teacher.

The launcher runs this in a process of its own, since it never imports torch itself.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from torch import nn
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedModel

from trainer.config.facts import facts_to_json
from trainer.config.load import load_config, read_run_config
from trainer.config.resolve import loads_teacher, tokenizer_reference
from trainer.config.schema import ModelConfig, RunConfig, TokenizerConfig
from trainer.errors import ConfigError, ExitCode, TrimtabError
from trainer.model.build import meta_model
from trainer.model.configuration import first_line, max_positions
from trainer.model.groups import parameter_facts, shape_of
from trainer.records import Classes, IntArray, ModelFacts


def describe(
    config: RunConfig,
    vocabulary: int | None = None,
    classes: Classes | None = None,
    kept: IntArray | None = None,
) -> ModelFacts:
    """The facts of the model of `config`. No weights are read and no memory is taken.

    Args:
        vocabulary: tokens of the run's tokenizer; None: as many as :func:`expected_vocabulary` says.
        classes: of a classifier; None: not known yet, two are counted.
        kept: as for :func:`trainer.model.build.build_model`; None: all tokens, or not known yet.

    Raises:
        ConfigError: as :func:`trainer.model.build.build_model`.
    """
    model = meta_model(config, expected_vocabulary(config) if vocabulary is None else vocabulary, classes, kept)
    text_config = model.config.get_text_config()
    hidden = _first_int(text_config, ("hidden_size", "d_model", "n_embd"))
    return ModelFacts(
        model_type=model.config.model_type,
        parameters=parameter_facts(model, decay_embeddings=config.optim.decay_embeddings),
        num_layers=_first_int(text_config, ("num_hidden_layers", "n_layer", "num_layers")),
        hidden_size=hidden,
        # state-space models have no heads
        num_attention_heads=_first_int(text_config, ("num_attention_heads", "n_head", "num_heads"), 1),
        intermediate_size=_first_int(
            text_config,
            ("intermediate_size", "ffn_dim", "n_inner", "hidden_dim", "d_ff", "ffn_hidden_size"),
            4 * hidden,
        ),
        vocabulary=text_config.vocab_size,
        max_positions=max_positions(model.config),
        matmul_parameters=_matmul_parameters(model),
        frozen_parameters=sum(each.numel() for each in model.parameters() if not each.requires_grad),
    )


def describe_teacher(config: RunConfig) -> ModelFacts:
    """The facts of the teacher of a distillation. No weights are read.

    Raises:
        ConfigError: there is none that the ranks load, or it cannot be read.
    """
    if config.distill is None or not loads_teacher(config):
        raise ConfigError([("distill.teacher", "is not loaded by this run")])
    teacher = config.distill.teacher
    model = ModelConfig(
        pretrained=teacher.pretrained,
        overrides=teacher.overrides,
        attention=teacher.attention,
        trust_remote_code=teacher.trust_remote_code,
    )
    # whatever tokenizer the run has: both may pad their vocabularies, and a teacher may have another altogether
    data = config.data.model_copy(update={"tokenizer": TokenizerConfig()})
    optim = config.optim.model_copy(update={"freeze": ()})
    try:
        return describe(config.model_copy(update={"model": model, "data": data, "distill": None, "optim": optim}))
    except ConfigError as error:
        problems = [
            (f"distill.teacher{path.removeprefix('model')}" if path.split(".")[0] == "model" else path, text)
            for path, text in error.problems
        ]
        raise ConfigError(problems, error.source) from error


def expected_vocabulary(config: RunConfig) -> int | None:
    """Tokens of the tokenizer that the run will use, before any data is prepared; None: that of the pretrained model.

    Raises:
        ConfigError: the tokenizer cannot be read.
    """
    tokenizer = config.data.tokenizer
    if tokenizer.train is not None:
        return tokenizer.train.vocabulary
    name = tokenizer_reference(config)
    if name is None or (tokenizer.path is None and config.model.pretrained is not None):
        return None
    path = Path(name)
    try:
        if path.suffix == ".json" and path.is_file():
            from tokenizers import Tokenizer

            return int(Tokenizer.from_file(str(path)).get_vocab_size())
        if path.suffix == ".gguf":
            return len(AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name))
        return len(AutoTokenizer.from_pretrained(name, trust_remote_code=config.model.trust_remote_code))
    except Exception as error:  # `tokenizers` raises bare Exception
        where = "distill.teacher.pretrained" if tokenizer.path is None else "data.tokenizer.path"
        raise ConfigError([(where, f"{name} is no tokenizer that can be read: {first_line(error)}")]) from error


def main(arguments: Sequence[str]) -> int:
    """Print the facts of CONFIG_OR_RUN with overrides; the exit code of the process."""
    wants_teacher = list(arguments[:1]) == ["--teacher"]
    arguments = arguments[wants_teacher:]
    if not arguments:
        print("name a config file or a run directory: python -m trainer.model.describe CONFIG_OR_RUN", file=sys.stderr)
        return ExitCode.USAGE
    path, *overrides = arguments
    try:
        if Path(path).is_dir():
            if overrides:
                raise ConfigError(
                    [("", "the config of a run directory is fixed; overrides go with a config file")], path
                )
            config = read_run_config(Path(path))
        else:
            config = load_config(Path(path), overrides)
        print(facts_to_json(describe_teacher(config) if wants_teacher else describe(config)))
    except TrimtabError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return ExitCode.COMPLETED


def _matmul_parameters(model: PreTrainedModel) -> int:
    """Elements of the weights that each token is multiplied with: of the experts, those that are chosen."""
    config = model.config.get_text_config()
    num_experts = _first_int(config, ("num_experts", "num_local_experts", "n_routed_experts"), 0)
    chosen = _first_int(config, ("num_experts_per_tok", "moe_top_k"), num_experts)
    look_ups = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    head = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    if head is not None and getattr(head, "weight", None) is not None:
        look_ups.discard(id(head.weight))
    total = 0
    for parameter in model.parameters():
        shape = shape_of(parameter)
        if len(shape) < 2 or id(parameter) in look_ups:
            continue
        is_expert = num_experts > 0 and len(shape) == 3 and shape[0] == num_experts
        total += parameter.numel() * chosen // num_experts if is_expert else parameter.numel()
    return total


def _first_int(config: PreTrainedConfig, names: tuple[str, ...], default: int | None = None) -> int:
    for name in names:
        value = getattr(config, name, None)
        if isinstance(value, int) and value > 0:
            return value
    if default is None:
        raise ConfigError([("model", f"a configuration of type {config.model_type} does not say its {names[0]}")])
    return default


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
