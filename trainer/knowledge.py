"""What a teacher knows of a text: the frozen records that travel from it to the losses."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Literal, Protocol

from numpy.typing import NDArray
from torch import Tensor

from trainer.records import IntArray

TEACHER_IDS = "teacher_ids"
"""Array of a micro-batch, [n, L, K] int64: tokens that the teacher says something of; −1: none."""
TEACHER_LOG_PROBABILITIES = "teacher_log_probabilities"
"""Array of a micro-batch, [n, L, K] float32, beside `TEACHER_IDS`."""
WRITTEN = "written"
"""Array of a micro-batch, [n, L] bool: labels that the student writes itself instead of reading them from the data."""
DATA_SHARE = "data_share"
"""Array of a micro-batch, [n, 1] float32, one number for the whole global batch: the share of its targets that are
the data's."""
TEACHER_INPUT_IDS = "teacher_input_ids"
"""Of a teacher with another tokenizer: [n, Lt] int64, the sample's text in its tokens, padded behind."""
TEACHER_ATTENTION_MASK = "teacher_attention_mask"
"""[n, Lt] int64: 0 where padded. Not with `data.boundaries=block`, whose mask transformers makes of the positions."""
TEACHER_POSITION_IDS = "teacher_position_ids"
"""[n, Lt] int64, from 0 in each document; not with `data.boundaries=join`."""
TEACHER_PLACE = "teacher_place"
"""[n, L] int64: index into Lt of the teacher's prediction that the student's is compared with; −1: none."""
BESIDE_INPUTS = (
    TEACHER_IDS,
    TEACHER_LOG_PROBABILITIES,
    TEACHER_INPUT_IDS,
    TEACHER_ATTENTION_MASK,
    TEACHER_POSITION_IDS,
    TEACHER_PLACE,
    WRITTEN,
    DATA_SHARE,
)
"""Arrays that are not for the student."""


@dataclass(frozen=True, slots=True)
class Head:
    """The last map of a language model: logits = cap(scale · (hidden · weightᵀ + bias)), cap(x) = c·tanh(x / c)."""

    weight: Tensor
    """[V, H]"""
    bias: Tensor | None = None
    """[V]"""
    scale: float = 1.0
    """Cohere's `logit_scale`, Granite's 1 / `logits_scaling`."""
    softcap: float | None = None
    """c: Gemma's `final_logit_softcapping`. None: no cap."""


@dataclass(frozen=True, slots=True)
class DenseTargets:
    """Predictions as the state before the head: its logits never exist whole."""

    hidden: Tensor
    """[B, T, H], without gradient: what goes into the head."""
    head: Head
    whole: Callable[[], AbstractContextManager[None]] = nullcontext
    """Within it the head's weights hold their values: a sharded teacher gathers them. A collective there."""
    known: Tensor | None = None
    """[B, T] bool: places at which it says something. None: all."""


@dataclass(frozen=True, slots=True)
class LogitTargets:
    """Predictions as whole logits, or as log-probabilities of the whole vocabulary: for few classes, and for caches
    that leave nothing out."""

    logits: Tensor
    """[B, T, V]; of a classifier [B, C]."""


@dataclass(frozen=True, slots=True)
class SparseTargets:
    """What is known of some tokens of each position."""

    ids: Tensor
    """[B, T, K] int64; −1: no token."""
    log_probabilities: Tensor
    """[B, T, K] fp32, at temperature 1. `top`: log p of each token; what they lack to 1 lies on all others. `sampled`:
    log of the share of the draws that fell on the token. −inf where there is no token."""
    kind: Literal["top", "sampled"]


Targets = DenseTargets | LogitTargets | SparseTargets


@dataclass(frozen=True, slots=True)
class AttentionStates:
    """Queries, keys and values of one layer, each [B, T, heads · size], before any rotary embedding; keys and values
    of grouped-query attention have fewer heads."""

    query: Tensor
    key: Tensor
    value: Tensor


@dataclass(frozen=True, slots=True)
class Knowledge:
    """Everything of one micro-batch, without gradient."""

    targets: Targets | None
    states: Mapping[int, Tensor] = field(default_factory=dict)
    """Hidden states by layer, [B, T, H]: 0 the embeddings, n the output of layer n before a last norm."""
    attention: AttentionStates | None = None


class Teacher(Protocol):
    """One interface, four places."""

    def annotate(self, ids: IntArray, arrays: Mapping[str, IntArray]) -> dict[str, NDArray]:  # type: ignore[type-arg]
        """What can be known before the ranks compute, in the thread that reads data: further arrays [n, L, …].

        Args:
            ids: [n], of the samples.
            arrays: theirs, [n, L].
        """
        ...

    def knowledge(self, tensors: Mapping[str, Tensor]) -> Knowledge:
        """What it knows of a micro-batch. A collective where the teacher is sharded.

        Args:
            tensors: the arrays of the micro-batch on the device, those of :meth:`annotate` among them.
        """
        ...

    def mend(self) -> str | None:
        """Look whether this rank's part is what was loaded, and load it again where it is not. A collective.

        Returns:
            What was found, in one sentence for a person; None: nothing. Equal on all ranks.
        """
        ...

    def close(self) -> None: ...
