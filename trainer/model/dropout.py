"""One dropout rate for a whole model."""

from __future__ import annotations

from collections.abc import Collection

from transformers import PreTrainedConfig

from trainer.errors import ConfigError


def set_dropout(config: PreTrainedConfig, rate: float, but: Collection[str] = ()) -> tuple[str, ...]:
    """Set every dropout rate of a configuration and of those within it. Rates that are not set, as that of a head which
    then has the model's own, and rates at which whole layers are left out (`layerdrop`) stay.

    Args:
        but: fields that stay as they are.

    Returns:
        Names of the fields that were set.

    Raises:
        ConfigError: it has none.
    """
    changed = _set(config, rate, frozenset(but))
    if not changed:
        text = f"a configuration of type {config.model_type} has no dropout rate; leave it out"
        raise ConfigError([("model.dropout", text)])
    return changed


def _set(config: PreTrainedConfig, rate: float, but: frozenset[str]) -> tuple[str, ...]:
    changed: list[str] = []
    for name, value in list(vars(config).items()):
        if isinstance(value, PreTrainedConfig):
            changed += _set(value, rate, but)
        elif _is_rate(name, value) and name not in but:
            setattr(config, name, rate)
            changed.append(name)
    return tuple(changed)


def _is_rate(name: str, value: object) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and ("dropout" in name or name.endswith("pdrop"))
