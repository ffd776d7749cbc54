"""Which runs have a teacher whose knowledge can be kept, and who predicts it. Free of torch."""

from __future__ import annotations

from trainer.config.distill import DistillConfig, TeacherConfig
from trainer.config.schema import RunConfig
from trainer.errors import ConfigError


def distill_of(config: RunConfig) -> DistillConfig:
    """
    Raises:
        ConfigError: there is no teacher, or none whose knowledge can be kept.
    """
    if config.distill is None:
        raise ConfigError([("distill", "is not given: name a teacher, as in distill.teacher.pretrained=PATH")])
    if config.objective.kind == "masked":
        text = "what a teacher knows depends on which tokens are masked, at every visit others: no cache; use replica"
        raise ConfigError([("objective.kind", text)])
    if config.distill.vocabulary == "uld":
        text = "a teacher with another tokenizer reads other tokens than the samples have: no cache; use replica"
        raise ConfigError([("distill.vocabulary", text)])
    return config.distill


def writing(config: RunConfig, *, sharded: bool) -> RunConfig:
    """The config with the teacher at the place at which it predicts: a replica where the run will read the cache.

    Args:
        sharded: over the ranks, as `zero3`.

    Raises:
        ConfigError: there is no teacher, none whose knowledge can be kept, or no place for it.
    """
    distill = distill_of(config)
    teacher = distill.teacher
    place = "zero3" if sharded else teacher.place
    if place == "cache":
        place = "server" if teacher.pretrained is None and teacher.server is not None else "replica"
    if place != "server" and teacher.pretrained is None:
        raise ConfigError([("distill.teacher.pretrained", "is not given: who is to teach?")])
    if place == "server":
        if teacher.server is None:
            raise ConfigError([("distill.teacher.server", "is not given: where is it?")])
        if distill.cache.targets == "sampled":
            text = "a server tells its most probable tokens, from which nothing can be drawn without bias; use top"
            raise ConfigError([("distill.cache.targets", text)])
        if distill.cache.top > teacher.server.top:
            text = f"{distill.cache.top} tokens are to be kept, and distill.teacher.server.top asks for fewer"
            raise ConfigError([("distill.cache.top", f"{text} ({teacher.server.top}): make them equal")])
    chosen = TeacherConfig(**{**teacher.model_dump(), "place": place, "server": teacher.server})
    # only predictions are kept
    changed = distill.model_copy(update={"teacher": chosen, "hidden": None, "relations": None})
    return config.model_copy(update={"distill": changed})
