"""What is minimised."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from trainer.config.section import Fraction, NonNegativeFloat, PositiveFloat, PositiveInt, Section, is_set

Kind = Literal[
    "causal",
    "masked",
    "classification",
    "multi_label",
    "regression",
    "token_classification",
    "question_answering",
    "seq2seq",
    "several",
]


class TaskConfig(Section):
    """One of several tasks."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+$")]
    """What sources, scores and the model's outputs call it."""
    kind: Literal["classification", "multi_label", "regression"]
    """What is predicted of a text."""
    weight: PositiveFloat = 1.0
    """Of the task's loss."""


class AdversarialConfig(Section):
    """Training on input embeddings that are moved, within a ball, to where the loss is higher."""

    kind: Literal["fgm", "pgd", "freelb"]
    """`fgm`: one step along the gradient, clean and moved loss together (Miyato et al. 2017). `pgd`: `steps` steps with
    projection, clean and last loss together (Madry et al. 2018). `freelb`: the mean of the losses along `steps` steps
    from a random start (Zhu et al. 2020)."""
    epsilon: PositiveFloat = 1.0
    """Radius: L2 norm of what is added to the embeddings of one sample."""
    step: PositiveFloat | None = None
    """Length of one step. None: for `fgm` the radius, else 1.5 × radius / steps."""
    steps: PositiveInt = 3
    """Of `pgd` and `freelb`; each costs one more pass."""
    weight: PositiveFloat = 1.0
    """Of the moved loss beside the clean one (`fgm`, `pgd`)."""


class ObjectiveConfig(Section):
    """What is minimised."""

    kind: Kind = "causal"
    """Next token (of answers only, where sources have `messages`, or `prompt` and `answer`); masked tokens; the class
    of a whole text, any number of classes of it, or a number (`data.sources.0.label`); the class of each word; the span
    of a text that answers a question; another text (encoder–decoder models); several tasks at once, see `tasks`."""
    tasks: tuple[TaskConfig, ...] = ()
    """Of `several`: which; each source says of which one it is (`data.sources.0.task`). They share the model but the
    last layer, of which each has outputs of its own; the loss is the mean over the texts of their task's loss times its
    weight."""
    mask_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.15
    """Masked objective: fraction of each sample's tokens that are predicted (80 % masked, 10 % random, 10 % kept)."""
    label_smoothing: Fraction = 0.0
    """Fraction of the target's probability that is spread evenly over all classes (or tokens). Held-out loss is without
    it."""
    class_weights: Literal["none", "balanced"] = "none"
    """`balanced`: texts of a class weigh N / (classes × texts of it) in the training loss."""
    r_drop: NonNegativeFloat = 0.0
    """Weight of the symmetric KL divergence between two passes with different dropout (R-Drop, Liang et al. 2021)."""
    mixup: NonNegativeFloat = 0.0
    """α of the Beta distribution by which embeddings and targets of two texts are mixed (Zhang et al. 2018). 0: off."""
    adversarial: AdversarialConfig | None = None
    """Adversarial training. None: off."""
    z_loss: NonNegativeFloat = 0.0
    """Weight of the mean squared log-partition (PaLM: 1e-4); keeps the logits from drifting."""
    l1: NonNegativeFloat = 0.0
    """Weight of the sum of absolute decayed parameters, added to the loss."""
    l2: NonNegativeFloat = 0.0
    """Weight of half the sum of squared decayed parameters, added to the loss (unlike decoupled weight decay it
    passes through Adam)."""
    l2_start: NonNegativeFloat = 0.0
    """The same of what decayed parameters are away from where the run began (L2-SP, Li et al. 2018)."""


TEXTS = ("classification", "multi_label", "regression", "several")
"""Kinds with one target a text."""
EACH_ALONE = (*TEXTS, "token_classification", "question_answering", "seq2seq")
"""Kinds whose samples are one text each, not packed."""
MEANINGLESS: dict[Kind, tuple[str, ...]] = {
    "causal": ("class_weights",),
    "masked": ("class_weights",),
    "classification": (),
    "multi_label": ("class_weights", "z_loss"),
    "regression": ("class_weights", "z_loss", "label_smoothing", "r_drop"),
    "token_classification": (),
    "question_answering": ("class_weights", "label_smoothing"),
    "seq2seq": ("class_weights",),
    "several": ("class_weights", "z_loss", "r_drop"),
}
"""Options of an objective that say nothing for its kind."""


def meaningless(config: ObjectiveConfig) -> list[tuple[str, str]]:
    """Those that are set all the same, each with a sentence."""
    return [
        (f"objective.{name}", f"has no meaning where objective.kind is {config.kind}; leave it out")
        for name in MEANINGLESS[config.kind]
        if is_set(config, name)
    ]


@dataclass(frozen=True, slots=True)
class Outputs:
    """What belongs to one of several tasks."""

    name: str
    kind: Kind
    weight: float
    """Of its loss."""
    columns: slice
    """Of the model's outputs: its own."""
    classes: tuple[str, ...]
    """Their names within the task."""


def output_name(task: str, name: str) -> str:
    """What an output is called among those of several tasks."""
    return f"{task}/{name}"


NUMBER = "value"
"""Name of the one output of a regression."""


def outputs_of(tasks: Sequence[TaskConfig], names: Sequence[str]) -> tuple[Outputs, ...]:
    """The tasks in the order of their outputs.

    Args:
        names: of all outputs, as :func:`output_name` makes them, those of a task next to each other.

    Raises:
        ValueError: a task without outputs, or outputs without a task.
    """
    found: dict[str, list[int]] = {}
    for number, name in enumerate(names):
        found.setdefault(name.partition("/")[0], []).append(number)
    known = {task.name: task for task in tasks}
    if found.keys() != known.keys():
        raise ValueError(f"the outputs are of the tasks {', '.join(found)}, and the tasks are {', '.join(known)}")
    return tuple(
        Outputs(
            name,
            known[name].kind,
            known[name].weight,
            slice(places[0], places[-1] + 1),
            tuple(names[place].partition("/")[2] for place in places),
        )
        for name, places in found.items()
    )
