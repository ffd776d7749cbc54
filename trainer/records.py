"""The frozen records that travel between rooms. Floats and tuples only: no torch, no I/O."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Position:
    """Where a run stands. Restored from a checkpoint, these integers resume it exactly."""

    step: int = 0
    """Optimizer updates that stand in the present weights."""
    attempt: int = 0
    """Attempts made so far; never goes back."""
    next_batch: int = 0
    """`batch_index` of the next batch to consume (before quarantine is applied)."""


@dataclass(frozen=True, slots=True)
class Batch:
    """This rank's part of one global batch.

    `micro_batches` holds one dict of arrays a micro-batch, each array [micro_batch, sequence_length] (int64):
    `input_ids`, `labels` (−100 where there is nothing to predict), and where the config asks for them `position_ids`
    and `attention_mask`. Labels are already shifted: `labels[t]` is the target of the logits at `t`.
    """

    batch_index: int
    epoch: int
    samples: IntArray
    """Ids of the samples of the *global* batch, [global_batch], in the order of the data."""
    num_targets: int
    """Predicted tokens in the *global* batch: the denominator of its loss, known to every rank without a message."""
    micro_batches: tuple[dict[str, NDArray[np.int64]], ...]
    seconds_waiting: float = 0.0
    """Time that the consumer waited for this batch."""


@dataclass(frozen=True, slots=True)
class StepStats:
    """What all ranks know, equally, about one attempt before anything is applied."""

    attempt: int
    batch_index: int
    step: int
    """The step that this attempt becomes when it is applied (updates so far + 1)."""
    loss: float
    """Mean of the objective's main loss over the global batch's targets, in nats. May be NaN."""
    parts: dict[str, float]
    """Further loss terms by name (z_loss, l2, …), each as it enters the total."""
    num_targets: int
    grad_norm: float
    """L2 norm of the whole gradient, before clipping. May be NaN or inf."""
    num_nonfinite: int
    """Gradient elements that are NaN or infinite."""
    parameter_norms: FloatArray
    """L2 norm of the gradient of each parameter, in the order of the run's parameter names; before clipping."""
    stop_votes: int = 0
    """Ranks that were asked to stop (signals)."""
    agree: bool = True
    """False when the ranks' digests of the previous decision differ."""
    rank_seconds: FloatArray = field(default_factory=lambda: np.zeros(0))
    """Seconds that each rank computed for the *previous* attempt, [ranks]: who is slow."""
    loss_scale: float = 1.0
    """fp16 loss scale in force; 1 otherwise. Norms and loss are already unscaled."""


@dataclass(frozen=True, slots=True)
class Step:
    """Apply the update with the gradient clipped to this global norm (0: no clipping)."""

    clip: float


@dataclass(frozen=True, slots=True)
class Skip:
    """Drop this gradient; weights and step count stay."""

    reason: str


@dataclass(frozen=True, slots=True)
class Halt:
    """Stop the run; the reason is the diagnosis."""

    reason: str


Verdict = Step | Skip | Halt


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds of one attempt on rank 0, and what follows from them."""

    seconds: float
    """Wall time of the whole attempt, from asking for the batch to the end of upkeep before it."""
    seconds_data: float
    """Of these, waiting for data."""
    tokens_per_second: float
    """Input tokens of the global batch over wall time."""
    flop_utilisation: float | None
    """Model FLOPs over the devices' peak; None where the peak is unknown."""
    memory_bytes: int
    """Peak device memory on GPU, resident memory of the process on CPU."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """Why a start of a run ended: the content of `outcome.json`."""

    reason: str
    """completed · stopped · halted · crashed · refused"""
    exit_code: int
    message: str
    """One sentence for a person."""
    step: int
    steps: int
    """The last step of the whole run."""
    checkpoint: str | None
    """Name of the newest committed checkpoint directory, relative to the run directory."""
    held_out_loss: float | None = None


@dataclass(frozen=True, slots=True)
class ParameterFacts:
    """One trainable parameter, as the plan, the optimizer groups and the ledger know it."""

    name: str
    shape: tuple[int, ...]
    decay: bool
    """Whether weight decay and the L1 and L2 penalties act on it."""

    @property
    def num_elements(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64))


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What a model is, without having it: the content of `model.json` in the run directory."""

    model_type: str
    parameters: tuple[ParameterFacts, ...]
    """Trainable parameters in `named_parameters` order; tied weights once."""
    num_layers: int
    hidden_size: int
    num_attention_heads: int
    intermediate_size: int
    vocabulary: int
    max_positions: int | None
    """Longest sequence that the positions allow; None: no limit."""
    matmul_parameters: int
    """Parameters that take part in matrix products for each token: all 2-D weights but look-up embeddings; a tied
    output head counts."""

    @property
    def num_parameters(self) -> int:
        return sum(parameter.num_elements for parameter in self.parameters)

    def flops_per_token(self, sequence_length: int) -> float:
        """FLOPs of forward and backward per token: 6·N for the matrix products plus 12·layers·hidden·length for
        attention (PaLM, appendix B: https://arxiv.org/abs/2204.02311)."""
        return 6.0 * self.matmul_parameters + 12.0 * self.num_layers * self.hidden_size * sequence_length
