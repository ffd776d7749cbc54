"""Contradictions within a distillation, and options of it without effect. The rules of `trainer.config.check`."""

from __future__ import annotations

import os
from collections.abc import Iterator

from trainer.config.distill import DistillConfig
from trainer.config.schema import RunConfig
from trainer.config.section import is_set
from trainer.config.sparse import SparseForm, sparse_problem

Problem = tuple[str, str]
Rule = tuple[str, bool, str]
"""(option, whether it is idle, why)"""

PLAIN_SUFFIX = "-plain"
"""Of the name of the run that a distillation is compared with."""

_SMALLEST_VOCABULARY = 256
"""No tokenizer of bytes has fewer tokens."""
_HERE = ("replica", "zero3")
"""Places at which the model itself is asked."""
_LEARNED = ("causal", "masked", "classification")
"""Kinds of objectives that there is a teacher for."""


def problems(config: RunConfig) -> Iterator[Problem]:
    """What contradicts what."""
    distill = config.distill
    if config.stage == "finetune" and config.model.pretrained is None:
        yield "stage", "is finetune, which begins with a pretrained model; give `model.pretrained`, or use pretrain"
    if config.stage == "distill" and distill is None:
        yield "distill", "is missing: stage distill learns from a teacher; name it in `distill.teacher`"
    if distill is None:
        return
    if config.stage != "distill":
        yield "stage", f"is {config.stage}, but `distill` is given; set stage=distill, or leave `distill` out"
    yield from _place(config, distill)
    yield from _objective(config, distill)
    yield from _loss(config, distill)
    yield from _on_policy(config, distill)
    yield from _vocabulary(config, distill)
    name = config.name + PLAIN_SUFFIX
    if distill.compare and (len(name) > 100 or len(os.fsencode(name)) > 200):
        yield "name", f"is too long to be followed by {PLAIN_SUFFIX!r}, the run that distill.compare makes; shorten it"


def _place(config: RunConfig, distill: DistillConfig) -> Iterator[Problem]:
    teacher, place = distill.teacher, distill.teacher.place
    if place in _HERE and teacher.pretrained is None:
        yield "distill.teacher.pretrained", f"is missing: teacher.place is {place}, which loads the teacher"
    if place in _HERE and teacher.server is not None:
        text = f"is given, but teacher.place is {place}; set distill.teacher.place=server, or leave it out"
        yield "distill.teacher.server", text
    if place == "server" and teacher.server is None:
        yield "distill.teacher.server", "is missing: teacher.place is server; give its `url` and `model`"
    if place == "server" and teacher.pretrained is not None:
        text = "is given, but teacher.place is server: the server has its model; leave one of them out"
        yield "distill.teacher.pretrained", text
    if place == "server" and config.data.boundaries == "positions":
        text = "a server cannot let attention cross documents while positions restart; use `join`, or `block`"
        yield "data.boundaries", text
    if teacher.within_node and place != "zero3":
        yield "distill.teacher.within_node", f"needs teacher.place zero3, but that is {place}, which shards nothing"
    for option in ("hidden", "relations"):
        if getattr(distill, option) is not None and place not in _HERE:
            text = f"needs the teacher itself: teacher.place {' or '.join(_HERE)}, but it is {place}"
            yield f"distill.{option}", text


def _objective(config: RunConfig, distill: DistillConfig) -> Iterator[Problem]:
    place, kind = distill.teacher.place, config.objective.kind
    if kind not in _LEARNED:
        yield "objective.kind", f"a distillation learns {', '.join(_LEARNED[:-1])} or {_LEARNED[-1]}, not {kind}"
    for name in ("label_smoothing", "class_weights", "r_drop", "mixup", "adversarial"):
        if is_set(config.objective, name):
            yield f"objective.{name}", "does not go together with `distill`, which has losses of its own; leave it out"
    if place == "server" and kind != "causal":
        yield "distill.teacher.place", f"a server predicts next tokens, but objective.kind is {kind}; use replica"
    if place == "cache" and kind == "masked":
        text = "a cache cannot hold what depends on the tokens that are masked, at every visit others; use replica"
        yield "distill.teacher.place", text


def _loss(config: RunConfig, distill: DistillConfig) -> Iterator[Problem]:
    loss = distill.loss
    weights = [loss.weight, loss.cross_entropy]
    weights += [part.weight for part in (distill.hidden, distill.relations) if part is not None]
    if not any(weights):
        yield "distill.loss", "nothing is minimised: `weight` and `cross_entropy` are 0; raise one of them"
    if loss.weight and (form := sparse_form(config)) and (why := sparse_problem(loss.kind, form, loss.temperature)):
        yield ("distill.loss.temperature" if "temperature" in why.partition(" ")[0] else "distill.loss.kind"), why


def sparse_form(config: RunConfig) -> SparseForm | None:
    """In which form a run learns of a few tokens of each position only; None: of all, or it is not known yet."""
    distill = config.distill
    if distill is None or distill.vocabulary == "uld" or config.objective.kind == "classification":
        return None
    if distill.teacher.place == "server":
        return "top"
    if distill.teacher.place != "cache":
        return None
    if distill.cache.targets == "sampled":
        return "sampled"
    return "top" if distill.cache.top < _vocabulary_at_least(config) else None


def _vocabulary_at_least(config: RunConfig) -> int:
    train, given = config.data.tokenizer.train, (config.model.config or {}).get("vocab_size")
    if train is not None:
        return train.vocabulary
    # what the tokenizer has is at most that, but most models have no more rows than a few
    return given if isinstance(given, int) else _SMALLEST_VOCABULARY


def _on_policy(config: RunConfig, distill: DistillConfig) -> Iterator[Problem]:
    if distill.on_policy is None:
        return
    tokens, length = distill.on_policy.tokens, config.data.sequence_length
    if distill.teacher.place == "cache":
        yield "distill.on_policy", "needs a teacher that can be asked: what the student writes is in no cache"
    if config.objective.kind != "causal":
        yield "distill.on_policy", f"needs the causal objective, but objective.kind is {config.objective.kind}"
    if config.data.boundaries == "block":
        text = "is block, but what the student writes goes on from the whole sample: use `positions` or `join`"
        yield "data.boundaries", text
    if tokens >= length:
        text = f"{tokens} tokens leave no prompt in samples of {length} (data.sequence_length); write fewer"
        yield "distill.on_policy.tokens", text


def _vocabulary(config: RunConfig, distill: DistillConfig) -> Iterator[Problem]:
    if distill.vocabulary != "uld":
        return
    place, kind = distill.teacher.place, config.objective.kind
    clashes = [
        (place not in _HERE, f"needs the teacher itself: teacher.place {' or '.join(_HERE)}, but it is {place}"),
        (kind != "causal", f"compares predicted tokens of a causal objective, but objective.kind is {kind}"),
        (distill.hidden is not None, "and `hidden` do not go together: the tokens of both models are others"),
        (distill.relations is not None, "and `relations` do not go together: the tokens of both models are others"),
        (distill.on_policy is not None, "and `on_policy` do not go together: what is written is in one tokenizer"),
    ]
    yield from (("distill.vocabulary", f"uld {text}") for clash, text in clashes if clash)


def without_effect(config: RunConfig) -> list[Rule]:
    """Options of the distillation that may be idle."""
    distill = config.distill
    if distill is None:
        return []
    loss, teacher, cache = distill.loss, distill.teacher, distill.cache
    is_uld, classifies = distill.vocabulary == "uld", config.objective.kind == "classification"
    held_out = config.data.held_out > 0 or any(source.use == "held_out" for source in config.data.sources)
    kind = "distill.vocabulary is uld" if is_uld else f"distill.loss.kind is {loss.kind}"
    off = "distill.loss.weight is 0"
    rules: list[Rule] = [
        ("distill.loss.kind", is_uld or not loss.weight, kind if is_uld else off),
        ("distill.loss.beta", is_uld or loss.kind != "js", kind),
        ("distill.loss.alpha", is_uld or not loss.kind.startswith("skew"), kind),
        ("distill.loss.temperature", not loss.weight, off),
        ("distill.loss.chunk", classifies, "objective.kind is classification: its logits are few"),
        ("distill.teacher.within_node", config.cluster.nodes == 1, "cluster.nodes is 1"),
        ("distill.cache.top", cache.targets == "sampled", "distill.cache.targets is sampled"),
        ("distill.cache.draws", cache.targets == "top", "distill.cache.targets is top"),
        ("distill.compare", not held_out, "there is no held-out text to compare by (data.held_out)"),
    ]
    if classifies:
        rules += [
            ("objective.z_loss", True, "a distillation of classes has no z-loss"),
            *(
                (f"distill.cache.{name}", True, "objective.kind is classification: its logits are kept whole")
                for name in ("targets", "top", "draws", "precision")
            ),
        ]
    if teacher.place == "server":
        rules += [
            (f"distill.teacher.{name}", True, "teacher.place is server")
            for name in ("overrides", "precision", "attention", "trust_remote_code")
        ]
    return rules


def warnings(config: RunConfig) -> Iterator[Problem]:
    """What is allowed, and should be known."""
    distill = config.distill
    if distill is None or sparse_form(config) != "top" or distill.loss.temperature == 1 or not distill.loss.weight:
        return
    yield (
        "distill.loss.temperature",
        f"is {distill.loss.temperature:g}, but of the teacher only the most probable tokens are known: how much of its "
        "distribution lies on the others at this temperature is an estimate; 1 is exact",
    )
