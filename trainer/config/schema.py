"""The options of a run, in the order in which data flows through it. Frozen, strict and free of torch.

The text under a field is its documentation; `docs/config.md` is generated from it.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from trainer.config.distill import DistillConfig
from trainer.config.finetune import AugmentConfig, LoraConfig
from trainer.config.guard import GuardConfig, SnapshotConfig
from trainer.config.objective import ObjectiveConfig
from trainer.config.section import Fraction, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, Section


class SourceConfig(Section):
    """One source of text. Exactly one of `stdlib`, `files` and `hub` is given."""

    name: str | None = None
    """Name in reports; by default made from the source itself."""
    stdlib: bool = False
    """Source files of the running Python's standard library: real text that every machine has."""
    files: tuple[str, ...] = ()
    """Paths and globs (`**` allowed), or `package:NAME/PATH`: txt, md, rst, py, jsonl, json, csv, tsv, tab (of Orange),
    parquet; also .gz, .bz2, .xz, .zst."""
    hub: str | None = None
    """Dataset id on the Hugging Face hub, or a directory in its layout."""
    hub_config: str | None = None
    """Configuration name of the hub dataset."""
    split: str = "train"
    """Split of the hub dataset."""
    column: str | None = None
    """Column of a record that holds the text (jsonl, csv, parquet, hub). Default: `text`."""
    template: str | None = None
    """Jinja2 template that makes the text from a record, instead of `column`: `"{{ title }}\\n\\n{{ body }}"`."""
    label: str | None = None
    """Column that holds the class of a record, a name or a whole number; of several labels a list, or names between
    commas; of a regression a number; of token classification a list of tags (beside a list of words) or of spans
    `{start, end, label}` in characters."""
    label_from_folder: bool = False
    """The class of a text is the name of the folder that its file lies in."""
    pair: str | None = None
    """Column of a second text that is classified together with the first."""
    messages: str | None = None
    """Column of a conversation, a list of `{role, content}`: the model learns what the assistant says."""
    prompt: str | None = None
    """Column of what is asked: with `answer` one turn of a conversation, the text to be translated or summarised, or
    the question about the text."""
    answer: str | None = None
    """Column of what is answered: a text, or of question answering `{text, answer_start}` (SQuAD) or a passage of the
    text."""
    classes: tuple[str, ...] = ()
    """With `label`: only records of these classes; others are left out, and counted. Empty: all."""
    task: str | None = None
    """Of several tasks (`objective.tasks`): the one that its labels are of."""
    use: Literal["both", "train", "held_out"] = "both"
    """`both`: `data.held_out` of the documents are kept for evaluation; `train`, `held_out`: none or all of them."""
    weight: PositiveFloat = 1.0
    """How often each sample of this source is seen in one epoch: 2 is twice, 0.5 is one half in each epoch (another
    half in the next)."""


class CleanConfig(Section):
    """What is repaired and what is left out before tokenising; every removal is counted in the report."""

    unicode: bool = True
    """Repair mis-decoded text (mojibake), normalise to NFC, drop control characters other than tab and newline."""
    min_characters: NonNegativeInt = 32
    """Shorter documents are left out."""
    max_characters: PositiveInt | None = None
    """Longer documents are left out. None: no limit."""
    max_repetition: Annotated[float, Field(gt=0, le=1)] = 0.9
    """Documents in which more than this fraction of the lines are repeats of another line of the document are left
    out (only where there are ≥ 10 lines)."""
    min_letters: Fraction = 0.2
    """Documents in which fewer than this fraction of the non-space characters are letters (of any script) are left
    out."""
    exact_duplicates: bool = True
    """Leave out documents equal to an earlier one."""
    near_duplicates: Annotated[float, Field(gt=0, le=1)] | None = 0.85
    """Leave out documents whose estimated Jaccard similarity (word 5-grams, MinHash) to an earlier one is at least
    this. None: off."""


class TrainTokenizerConfig(Section):
    """A byte-level BPE tokenizer trained on the run's own text."""

    vocabulary: Annotated[int, Field(ge=260)] = 4096
    """Size of the vocabulary, special tokens included."""
    max_characters: PositiveInt = 50_000_000
    """Text to train on, taken evenly over the documents."""


class TokenizerConfig(Section):
    """At most one of `path` and `train`. None: the tokenizer of `model.pretrained`, else that of the teacher."""

    path: str | None = None
    """Directory, `tokenizer.json` or hub id."""
    train: TrainTokenizerConfig | None = None
    """Train one here."""
    keep: Literal["all", "used"] = "all"
    """`used`: of a WordPiece tokenizer, and of the embeddings of a pretrained model, only the tokens of the training
    data, special tokens and single characters stay. For small classifiers."""


class DataConfig(Section):
    """From text to fixed-length samples."""

    sources: tuple[SourceConfig, ...] = Field(min_length=1)
    """Where the text comes from."""
    clean: CleanConfig = CleanConfig()
    """Repairs and limits."""
    tokenizer: TokenizerConfig = TokenizerConfig()
    """How text becomes tokens."""
    sequence_length: Annotated[int, Field(ge=8)] = 1024
    """Tokens in a sample."""
    boundaries: Literal["join", "positions", "block"] = "positions"
    """Documents within a sample: `join` ignores them; `positions` restarts the positions at each; `block` also
    keeps attention inside each document and predicts nothing across."""
    too_long: Literal["cut", "window", "leave_out"] = "cut"
    """Labelled texts that are longer than a sample: cut at the end, cut into windows that overlap by `stride`, or left
    out; counted in the report."""
    stride: NonNegativeInt = 0
    """Tokens that neighbouring windows share."""
    balance: Literal["none", "classes"] = "none"
    """`classes`: an epoch sees each class equally often."""
    temperature: Annotated[float, Field(ge=1)] = 1.0
    """Of several tasks: each fills a part of an epoch in proportion to (its samples)^(1/temperature). 1: as they are;
    the higher, the more alike."""
    augment: AugmentConfig | None = None
    """Changes of the training texts. None: none."""
    held_out: Fraction = 0.01
    """Fraction of the documents kept for evaluation (by a hash of the text, so that it does not move when data is
    added)."""
    shuffle: bool = True
    """Seeded permutation of the samples in every epoch. False: in the order of the sources."""
    exclude_batches: tuple[tuple[NonNegativeInt, NonNegativeInt], ...] = ()
    """Ranges [first, last] of batch indices that are left out from the start."""
    prepared: str = "data-cache"
    """Folder for prepared data, relative to the working directory; shared by runs."""
    accept_changed: bool = False
    """Go on although the data is not what it was when this run began."""
    workers: NonNegativeInt | None = None
    """Processes that prepare data. None: one a core."""
    prefetch: NonNegativeInt = 2
    """Batches read ahead in a thread of each rank. 0: read when asked."""


class ModelConfig(Section):
    """Any causal or masked language model, or classifier of sequences, of transformers. Exactly one of `config` and
    `pretrained`."""

    config: dict[str, Any] | None = None
    """From scratch: fields of the transformers configuration, `model_type` among them. `vocab_size` is taken from
    the tokenizer where it is not given."""
    pretrained: str | None = None
    """Directory, hub id, path to a .gguf file, or `package:NAME/PATH`, a file or folder of an installed package."""
    layers: str | None = None
    """With `pretrained`: keep only these of its layers: numbers from 0 (`"0, 5, 11"`), `first:N`, `last:N`, `every:K`
    (the first and each K-th after it), `spread:N` (N of them evenly, the first and the last among them). None: all."""
    overrides: dict[str, Any] = {}
    """With `pretrained`: configuration fields to change (dropout, attention soft-capping, …)."""
    dropout: Fraction | None = None
    """Set every dropout rate of its configuration. None: as they are."""
    lora: LoraConfig | None = None
    """With `pretrained`: train low-rank adapters only. None: all weights."""
    initialisation: Literal["default", "residual-scaled"] = "default"
    """From scratch: `residual-scaled` divides the standard deviation of the layers that write to the residual
    stream by √(2·layers) (GPT-2)."""
    attention: Literal["auto", "eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention"] = "auto"
    """Attention implementation of transformers."""
    activation_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    trust_remote_code: bool = False
    """Run code that comes with a hub model. Leave off unless you have read it."""


class BatchConfig(Section):
    """global batch = micro-batch × accumulation × ranks; accumulation follows."""

    samples: PositiveInt
    """Samples that one optimizer step consumes over all ranks (the global batch)."""
    micro: PositiveInt
    """Samples in one forward pass of one rank."""
    alike: bool = True
    """Of texts that are samples of their own: compute those of a batch that are alike in length together, which saves
    padding; the batch holds the same texts either way."""


class OptimConfig(Section):
    """AdamW (torch; fused on a GPU; DeepSpeed's CPU Adam with offload)."""

    lr: PositiveFloat
    """Peak learning rate."""
    betas: tuple[Fraction, Fraction] = (0.9, 0.95)
    """Decay of the first and second moment."""
    eps: PositiveFloat = 1e-8
    """Added to the denominator."""
    weight_decay: NonNegativeFloat = 0.1
    """Decoupled weight decay; norms, biases and embeddings are spared."""
    decay_embeddings: bool = False
    """Decay embeddings too."""
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Factor on the learning rate from each layer to the one below it; the head has the full rate, the embeddings the
    least (ELECTRA, BERT fine-tuning: 0.65 to 0.95)."""
    freeze: tuple[str, ...] = ()
    """Parameters that are not trained: patterns of their names (`bert.embeddings.*`), or `layers:3`, the embeddings and
    the first three layers."""
    ema: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Keep an exponential moving average of the weights with this decay; evaluations and exports use it. None: none."""
    clip: NonNegativeFloat = 1.0
    """Largest global gradient norm. 0: no limit."""
    clipping: Literal["norm", "zclip", "adagc"] = "norm"
    """How gradients are clipped: `norm`, the global norm to `clip`; `zclip`, the global norm to what was usual lately
    (ZClip), at most `clip`; `adagc`, each tensor's norm to what was usual for it (AdaGC), then the global norm to
    `clip`."""


class ScheduleConfig(Section):
    """Learning rate over time, and the length of the run, in one unit."""

    unit: Literal["steps", "tokens"] = "steps"
    """What the numbers below count: optimizer steps, or tokens (samples × sequence length)."""
    duration: PositiveInt
    """Length of the run."""
    kind: Literal["cosine", "linear", "wsd", "constant"] = "cosine"
    """After warm-up: cosine or linear decay to the floor; warm-up–stable–decay; constant."""
    warmup: NonNegativeInt = 0
    """Linear rise from 0 to the peak."""
    decay: PositiveInt | None = None
    """`wsd`: length of the final linear decay. Default: a fifth of the duration."""
    floor: Annotated[float, Field(ge=0, le=1)] = 0.1
    """Lowest learning rate at the end of the decay, as a fraction of the peak."""


class ZeroConfig(Section):
    """How DeepSpeed shards the training state."""

    stage: Literal[0, 1, 2, 3] = 2
    """0: replicated; 1: optimizer sharded; 2: gradients too; 3: weights too."""
    offload: Literal["none", "optimizer", "all"] = "none"
    """Keep the optimizer (`optimizer`), and under stage 3 the weights too (`all`), in host memory."""
    overlap: bool = True
    """Reduce gradients while the backward pass goes on (GPU only)."""
    bucket_elements: PositiveInt = 50_000_000
    """Elements in one reduction or gathering."""


class ClusterConfig(Section):
    """Where it runs."""

    nodes: PositiveInt = 1
    """Machines."""
    ranks_per_node: PositiveInt = 1
    """Processes on each, one a GPU where there are GPUs."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: GPUs where every rank of the node can have one, else CPU."""
    threads_per_rank: PositiveInt | None = None
    """Compute threads of a rank on CPU. None: cores over ranks."""


class EvaluationConfig(Section):
    """Held-out loss and perplexity, exact over all ranks."""

    every: PositiveInt | None = 500
    """Steps between evaluations; there is always one at the end. None: only at the end."""
    best: str | None = None
    """Score by which evaluations are compared: `loss`, or one that the task has, such as `accuracy`, `f1_macro`,
    `matthews`. The best checkpoint is kept and exported. None: the last one is."""
    patience: PositiveInt | None = None
    """With `best`: end after so many evaluations without a better one. None: never."""
    max_samples: PositiveInt | None = None
    """Evaluate on so many held-out samples, taken evenly over the split. None: all."""


class CheckpointConfig(Section):
    """Saving to disk."""

    every: PositiveInt | None = 500
    """Steps between checkpoints; there is always one at the end and when asked to stop. None: only then."""
    keep: PositiveInt = 2
    """Newest checkpoints kept; beyond them the newest healthy one, the next that is to be proven healthy, and with
    `evaluation.best` the best."""
    keep_every: PositiveInt | None = None
    """Steps between checkpoints that stay for good (a multiple of `every`). None: none does."""
    background: bool = True
    """Train on while a checkpoint is written, from a copy in host memory (12 bytes a parameter over the ranks, shared
    with the snapshot where one was just taken)."""
    max_failures: NonNegativeInt = 3
    """Saves in a row that may fail; after one more the run ends, everything saved before stays."""
    memory_every: PositiveInt | None = None
    """Steps between copies in the memory of the node (`/dev/shm`): a crashed process goes on from there without the
    shared disk. None: none."""


class SupervisionConfig(Section):
    """When `trimtab run` starts ranks again, and when it gives up."""

    restarts: NonNegativeInt = 3
    """Restarts in a row without a new checkpoint; then the run ends as crashed. 0: never start again."""
    backoff_seconds: NonNegativeFloat = 5.0
    """Wait before the second start in a row without progress; doubles each time, at most 5 minutes. After progress
    there is no wait."""
    hang_seconds: PositiveFloat | None = 600.0
    """A rank that shows no sign of life (micro-batch, file) for so long hangs: the stacks of all ranks are written
    down, they are ended, and the run is started again. None: never."""


class TelemetryConfig(Section):
    """What is recorded. None of it changes the training."""

    norms_every: PositiveInt = 1
    """Steps between records of every parameter's gradient norm in the ledger (they are measured on every step)."""
    weights_every: PositiveInt | None = 50
    """Steps between records of parameter norms and update-to-weight ratios. None: never."""
    part_norms_every: PositiveInt | None = 200
    """Steps between measurements of the gradient norm of each part of a compound loss (z-loss, distillation); each part
    costs one more pass over the batch. None: never."""
    stragglers: bool = True
    """Name ranks that compute longer than the others in most of the last steps: all wait for them."""
    tensorboard: bool = True
    """Write TensorBoard events."""
    console: Literal["auto", "live", "lines", "quiet"] = "auto"
    """Live display on a terminal, one line a record elsewhere."""


class RunConfig(Section):
    """One run.

    Paths to text, tokenizers and models are relative to the config file (in an override: to the working directory);
    `runs` and `data.prepared` are relative to the working directory. `load_config` makes all of them absolute.
    """

    name: Annotated[str, Field(min_length=1, max_length=100)]
    """Name of the run and, under `runs`, of its directory."""
    stage: Literal["pretrain", "finetune", "distill"] = "pretrain"
    """What kind of run it is: `finetune` begins with `model.pretrained`, `distill` learns from `distill.teacher`."""
    seed: NonNegativeInt = 0
    """Seed of everything: initialisation, data order, dropout, masking."""
    runs: str = "runs"
    """Folder of run directories, relative to the working directory."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """auto: bf16 on GPUs that have it, fp32 elsewhere."""
    data: DataConfig
    """Data."""
    model: ModelConfig
    """Model."""
    objective: ObjectiveConfig = ObjectiveConfig()
    """Objective."""
    distill: DistillConfig | None = None
    """Distillation."""
    batch: BatchConfig
    """Batch."""
    optim: OptimConfig
    """Optimizer."""
    schedule: ScheduleConfig
    """Schedule."""
    zero: ZeroConfig = ZeroConfig()
    """Sharding."""
    guard: GuardConfig = GuardConfig()
    """Guard."""
    snapshots: SnapshotConfig = SnapshotConfig()
    """Snapshots."""
    evaluation: EvaluationConfig = EvaluationConfig()
    """Evaluation."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """Checkpoints."""
    supervision: SupervisionConfig = SupervisionConfig()
    """Supervision."""
    telemetry: TelemetryConfig = TelemetryConfig()
    """Telemetry."""
    cluster: ClusterConfig = ClusterConfig()
    """Cluster."""
    faults: tuple[str, ...] = ()
    """Faults to put into this run on purpose, one sentence each, to see how it recovers:
    `batches(300, 305).random_tokens()`, `at(step=40, rank=1).gradient_is_nan()` (docs/drill.md)."""
