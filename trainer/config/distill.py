"""The options of a distillation: who teaches, what of it is learned, and where its knowledge is kept."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from trainer.config.section import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, Section


class ServerConfig(Section):
    """An endpoint in the OpenAI format (vLLM, SGLang) that gives log-probabilities of a prompt's tokens."""

    url: str
    """Base address, as in `http://node7:8000/v1`."""
    model: str
    """Name of the model there."""
    dialect: Literal["vllm", "openai"] = "vllm"
    """`vllm`: `prompt_logprobs`, with token ids; `openai`: `echo` with `logprobs`, where tokens come as text or as
    `token_id:N`."""
    top: PositiveInt = 20
    """Most probable tokens asked for at each position; servers limit it (vLLM: `--max-logprobs`)."""
    key_variable: str | None = None
    """Environment variable that holds the key of the server. The key itself never stands in a config."""
    timeout_seconds: PositiveFloat = 60.0
    """Wait for one answer."""
    retries: NonNegativeInt = 5
    """Further tries of a request that failed or was refused for now, each after twice the wait; then the run ends."""
    requests: PositiveInt = 4
    """Requests of a rank under way at once."""


class CacheConfig(Section):
    """Knowledge of the teacher on disk: written by `trimtab teach`, read by `teacher.place: cache`."""

    folder: str = "teacher-cache"
    """Where, relative to the working directory; each teacher, data and form has a folder of its own below."""
    targets: Literal["top", "sampled"] = "top"
    """`top`: the most probable tokens and the mass of the rest. `sampled`: tokens drawn from the teacher, an unbiased
    estimate of the forward KL with about 12 different tokens a position (https://arxiv.org/abs/2503.16870)."""
    top: PositiveInt = 64
    """`top`: tokens kept at each position. At the size of the vocabulary nothing is left out."""
    draws: PositiveInt = 50
    """`sampled`: tokens drawn at each position; equal ones are stored once, with their number."""
    precision: Literal["fp16", "fp32"] = "fp16"
    """Of the stored log-probabilities."""


class TeacherConfig(Section):
    """The model that is learned from. Frozen: no gradient, no dropout."""

    place: Literal["replica", "zero3", "cache", "server"] = "replica"
    """`replica`: whole on every rank. `zero3`: sharded over the ranks, never whole anywhere. `cache`: its knowledge was
    written before. `server`: somewhere else, asked over HTTP."""
    pretrained: str | None = None
    """Directory, hub id, path to a .gguf file, or `package:NAME/PATH` of an installed package. `server` needs none."""
    overrides: dict[str, Any] = {}
    """Configuration fields to change."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """auto: bf16 on GPUs that have it, fp32 elsewhere."""
    attention: Literal["auto", "eager", "sdpa", "flash_attention_2", "flash_attention_3"] = "auto"
    """Attention implementation of transformers."""
    trust_remote_code: bool = False
    """Run code that comes with a hub model. Leave off unless you have read it."""
    within_node: bool = False
    """`zero3`: shard over the ranks of each node only, so that gathering never crosses the network."""
    server: ServerConfig | None = None
    """`server`: where it is."""

    @property
    def is_here(self) -> bool:
        """Whether its weights are in the memory of the ranks."""
        return self.place in ("replica", "zero3")


class DistillLossConfig(Section):
    """What is minimised at each predicted token: `cross_entropy` · CE + `weight` · T² · D(teacher, student)."""

    kind: Literal["forward_kl", "reverse_kl", "js", "skew_forward_kl", "skew_reverse_kl", "total_variation"] = (
        "forward_kl"
    )
    """The divergence D of the teacher's p and the student's q. `forward_kl`: KL(p‖q). `reverse_kl`: KL(q‖p). `js`:
    β·KL(p‖m) + (1−β)·KL(q‖m), m = β·p + (1−β)·q (GKD). `skew_forward_kl`: KL(p‖α·p + (1−α)·q); `skew_reverse_kl`:
    KL(q‖(1−α)·p + α·q) (DistiLLM). `total_variation`: ½·Σ|p − q|."""
    beta: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """`js`: β."""
    alpha: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """The skewed divergences: α."""
    temperature: PositiveFloat = 1.0
    """T, which the logits of both are divided by within D. T² keeps the size of the gradient (Hinton et al., 2015)."""
    weight: NonNegativeFloat = 1.0
    """Of the divergence."""
    cross_entropy: NonNegativeFloat = 0.0
    """Weight of the cross-entropy with the data's labels. It is measured in any case."""
    chunk: PositiveInt = 1024
    """Positions whose logits are in memory at once."""


LayerPair = tuple[NonNegativeInt, NonNegativeInt]


class HiddenConfig(Section):
    """Hidden states of the student drawn to those of the teacher, at every token."""

    kind: Literal["cosine", "mse"] = "cosine"
    """`cosine`: 1 − cos (DistilBERT). `mse`: mean squared difference (TinyBERT)."""
    weight: NonNegativeFloat = 1.0
    """Of the mean over tokens and pairs."""
    layers: tuple[LayerPair, ...] | None = None
    """[student, teacher] pairs; 0 is the embeddings, n the output of layer n. None: the last of both."""


class RelationsConfig(Section):
    """Relations between tokens, made from queries, keys and values of one layer (MiniLMv2)."""

    weight: NonNegativeFloat = 1.0
    """Of the sum over the three relations."""
    heads: PositiveInt = 12
    """Relation heads, which the widths of both models divide into."""
    student_layer: PositiveInt | None = None
    """From 1. None: the last."""
    teacher_layer: PositiveInt | None = None
    """From 1. None: the last."""


class OnPolicyConfig(Section):
    """The student writes, the teacher scores what it wrote (GKD, https://arxiv.org/abs/2306.13649)."""

    fraction: Annotated[float, Field(gt=0, le=1)] = 0.5
    """λ: of the samples, chosen by seed and place in the data."""
    tokens: PositiveInt = 64
    """Written at the end of each chosen sample; what comes before is the prompt."""
    temperature: PositiveFloat = 1.0
    """Of the writing."""


class DistillConfig(Section):
    """Distillation: a teacher's knowledge into the run's model."""

    teacher: TeacherConfig
    """Who teaches."""
    loss: DistillLossConfig = DistillLossConfig()
    """What is learned from its predictions."""
    hidden: HiddenConfig | None = None
    """And from its hidden states (`replica` and `zero3`)."""
    relations: RelationsConfig | None = None
    """And from its attention (`replica` and `zero3`)."""
    on_policy: OnPolicyConfig | None = None
    """Learn on the student's own text too (not with a cache)."""
    vocabulary: Literal["same", "uld"] = "same"
    """`same`: both use one tokenizer; padded vocabularies are cut to the shorter. `uld`: another tokenizer, by the
    universal logit distance of sorted probabilities (https://arxiv.org/abs/2402.12030)."""
    cache: CacheConfig = CacheConfig()
    """Where the teacher's knowledge is kept."""
    compare: bool = False
    """Train the same student on the same tokens without the teacher too (as the run NAME-plain), and show teacher and
    both students side by side at the end."""
