"""The frozen records that travel between rooms. Floats and tuples only: no torch, no I/O."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

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
class Classes:
    """What a classifier tells apart, and what fills up its texts."""

    names: tuple[str, ...]
    """In the order of their numbers in `labels`."""
    pad_id: int
    """Token behind a text that is shorter than others of its micro-batch."""
    rates: tuple[float, ...] = ()
    """Where a text may be of several: the share of the training texts that are of each (add-one smoothing)."""


PARTNER = "partner_"
"""Begins the names of the arrays of mixup's partners in a micro-batch: `partner_input_ids`, `partner_labels`, …, row by
row beside the samples' own."""
SHARE = "mixup_share"
"""Array of a micro-batch, [n] float32: λ, how much of a mixed sample is its own."""
DRAWS = "draw_keys"
"""Array of a micro-batch, [n] int64 ≥ 0: one seed a sample, of its place in the data."""


@dataclass(frozen=True, slots=True)
class Batch:
    """This rank's part of one global batch.

    `micro_batches` holds one dict of arrays a micro-batch, each array [micro_batch, sequence_length] (int64):
    `input_ids`, `labels` (−100 where there is nothing to predict), and where the config asks for them `position_ids`
    and `attention_mask`. Labels are already shifted: `labels[t]` is the target of the logits at `t`. A teacher's
    annotations stand beside them, each [micro_batch, …] of a type of its own.
    """

    batch_index: int
    epoch: int
    samples: IntArray
    """Ids of the samples of the *global* batch, [global_batch], in the order in which they are computed."""
    num_targets: int
    """Predicted tokens in the *global* batch: the denominator of its loss, known to every rank without a message."""
    micro_batches: tuple[dict[str, NDArray[Any]], ...]
    seconds_waiting: float = 0.0
    """Time that the consumer waited for this batch."""


def _no_ranks() -> FloatArray:
    return np.zeros(0)


@dataclass(frozen=True, slots=True)
class RankStats:
    """What each rank brought to an attempt, each [ranks]; tells whose hardware is at fault. Empty: not measured."""

    seconds: FloatArray = field(default_factory=_no_ranks)
    """That the rank computed for the *previous* attempt: who is slow."""
    losses: FloatArray = field(default_factory=_no_ranks)
    """The rank's share of the global mean loss: their sum is the loss."""
    grad_norms: FloatArray = field(default_factory=_no_ranks)
    """L2 norm of what the rank itself computed, before anything was reduced: √Σ over micro-batches of its squares."""
    reduced_norms: FloatArray = field(default_factory=_no_ranks)
    """ZeRO 0: L2 norm of the reduced gradient that the rank holds, equal on all ranks; elsewhere 0, each has its own
    part."""
    digests: FloatArray = field(default_factory=_no_ranks)
    """Of the rank's previous decision and of its guard: equal on all ranks."""
    checksums: FloatArray = field(default_factory=_no_ranks)
    """Of the weights that all ranks hold alike; 0 where it was not taken on this attempt."""
    impossible: FloatArray = field(default_factory=_no_ranks)
    """Values in the rank's newest snapshot that training cannot have produced."""


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
    ranks: RankStats = field(default_factory=RankStats)
    """What each rank brought to it."""
    loss_scale: float = 1.0
    """fp16 loss scale in force; 1 otherwise. Norms and loss are already unscaled."""
    measures: dict[str, float] = field(default_factory=dict)
    """What is watched and not minimised, by name: means over the targets."""


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What a model makes of held-out data."""

    loss: float
    """Mean of the task's loss over all targets, in nats; NaN without targets."""
    num_targets: int
    scores: dict[str, float] = field(default_factory=dict)
    """Further means over the targets by name: `accuracy`."""
    closely: dict[str, Any] | None = None
    """What a person looks at, plain JSON, on the first rank: `classes` and their `confusion`, the worst `errors`."""


@dataclass(frozen=True, slots=True)
class Examination:
    """What forward passes without a gradient tell about an alarm that a replay reproduced; equal on all ranks."""

    known: tuple[tuple[float, float], ...] = ()
    """(loss then, loss now) of batches that were accepted lately: with unharmed weights they are about as well
    predicted as before."""
    sample_ids: IntArray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    """Samples of the alarming batch, [global_batch]."""
    sample_losses: FloatArray = field(default_factory=lambda: np.zeros(0))
    """Mean loss of each of them, [global_batch], in nats a target."""


@dataclass(frozen=True, slots=True)
class Step:
    """Apply the update."""

    clip: float
    """Largest global gradient norm (0: no clipping)."""
    scales: tuple[float, ...] | None = None
    """Factor ≤ 1 on the gradient of each parameter, before the global clipping (AdaGC); None: none."""
    lr_scale: float = 1.0
    """Factor on the learning rate: cooled after a rollback."""


@dataclass(frozen=True, slots=True)
class Skip:
    """Drop this gradient; weights and step count stay."""

    reason: str
    quarantine: bool = True
    """Leave the batch out from now on."""


@dataclass(frozen=True, slots=True)
class Replay:
    """Drop this gradient and compute it once more from the same data with the same randomness."""

    reason: str


@dataclass(frozen=True, slots=True)
class Examine:
    """Drop this gradient and look closer, by forward passes, before deciding: `Guard.weigh` tells how it goes on."""

    reason: str


@dataclass(frozen=True, slots=True)
class Rollback:
    """Put back an earlier state and go on from there."""

    reason: str
    to_step: int
    """The newest state of at most this step."""
    quarantine: tuple[int, int] | None = None
    """Batches first … last to leave out from now on; None: do the same steps again, with the same data."""
    reset_moments: bool = False
    """Start the optimizer's moments anew."""


@dataclass(frozen=True, slots=True)
class Halt:
    """Stop the run; the reason is the diagnosis."""

    reason: str


Verdict = Step | Skip | Replay | Examine | Rollback | Halt


@dataclass(frozen=True, slots=True)
class Rewind:
    """A rollback that was carried out."""

    incident: int
    from_step: int
    to_step: int
    attempt: int
    """The attempt whose verdict it was."""
    next_batch: int
    quarantine: tuple[int, int] | None
    source: str
    """memory · checkpoint · start"""
    seconds: float
    """From the verdict to the state being back."""
    reason: str


@dataclass(frozen=True, slots=True)
class IncidentEvent:
    """One line of an incident's timeline."""

    incident: int
    """Counts from 1 over the whole run."""
    phase: str
    """opened · replayed · examined · acted · recovered · halted; `notice` for what belongs to no incident (number 0)"""
    attempt: int
    step: int
    batch_index: int
    text: str
    """One sentence for a person."""
    numbers: dict[str, float] = field(default_factory=dict)
    """What the decision was made from, by name."""


@dataclass(frozen=True, slots=True)
class Evidence:
    """What is kept of the moment of an alarm, for the incident's folder."""

    incident: int
    attempt: int
    step: int
    batch_index: int
    sample_ids: IntArray
    """[global_batch]"""
    sample_losses: FloatArray
    """[global_batch], in nats a target; empty where they were not measured."""
    parameter_norms: FloatArray
    """Gradient norm of each parameter at the alarm, [parameters]."""
    usual_norms: FloatArray
    """What was usual before (the guard's average), [parameters]; empty: not known yet."""


@dataclass(frozen=True, slots=True)
class Structure:
    """Slow signs of a run that will fail, equal on all ranks; measured every `telemetry.weights_every` steps."""

    attention_logits: FloatArray
    """Bound of the largest attention logit of each layer, [layers]: max‖q‖·max‖k‖/√d. Empty: this model's attention
    is not recognised."""
    output_logits: float
    """Largest absolute output logit of the batch; NaN: not measured."""
    parameter_norms: FloatArray
    """L2 norm of each parameter, [parameters]."""
    update_ratios: FloatArray
    """‖update‖ / ‖weight‖ of each parameter, [parameters]; NaN where the weight is all zero."""


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
    """completed · stopped · halted · crashed · refused · superseded"""
    exit_code: int
    message: str
    """One sentence for a person."""
    step: int
    steps: int
    """The last step of the whole run."""
    checkpoint: str | None
    """Name of the newest committed checkpoint directory, relative to the run directory."""
    held_out_loss: float | None = None
    start: int = 0
    """Which start of the run this was, from 1; 0: it ended before it took a number."""


@dataclass(frozen=True, slots=True)
class Saved:
    """A committed checkpoint."""

    step: int
    name: str
    num_bytes: int
    """Of all its files, of all ranks."""
    seconds: float
    """From the request to the commit."""


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
    frozen_parameters: int = 0
    """Elements of weights that are not trained: they have no gradient and no optimizer state."""

    @property
    def num_parameters(self) -> int:
        return sum(parameter.num_elements for parameter in self.parameters)

    def flops_per_token(self, sequence_length: int) -> float:
        """FLOPs of forward and backward per token: 6·N for the matrix products plus 12·layers·hidden·length for
        attention (PaLM, appendix B: https://arxiv.org/abs/2204.02311)."""
        return 6.0 * self.matmul_parameters + 12.0 * self.num_layers * self.hidden_size * sequence_length
