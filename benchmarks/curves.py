"""Loss curves of real small language models, clean ones and truly unstable ones. Written by `detector.py --generate`.

A byte-level decoder (two layers, width 64) learns the source of Python's own standard library on one thread: AdamW,
weight decay 0.1, gradients clipped to norm 1. A curve holds what a guard would see of each step, before the update:
the loss and the norm of the gradient before clipping. Faults act on the real run, so that what follows them is real.
"""

# ruff: noqa: ARG001 - faults have one signature

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from ledgers import Recipe
from torch import Tensor, nn
from torch.nn import functional as F

from trainer.data.corpus import standard_library

VOCABULARY, WIDTH, HEADS, LAYERS = 256, 64, 4, 2


class Block(nn.Module):
    def __init__(self, qk_norm: bool):
        super().__init__()
        self.first, self.second = nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.out = nn.Linear(WIDTH, WIDTH, bias=False)
        self.up = nn.Linear(WIDTH, 4 * WIDTH, bias=False)
        self.down = nn.Linear(4 * WIDTH, WIDTH, bias=False)
        self.norms = nn.ModuleList(nn.RMSNorm(WIDTH // HEADS) for _ in range(2)) if qk_norm else None

    def forward(self, hidden: Tensor) -> Tensor:
        samples, length, _ = hidden.shape
        shape = (samples, length, HEADS, WIDTH // HEADS)
        query, key, value = (part.view(shape) for part in self.qkv(self.first(hidden)).chunk(3, dim=-1))
        if self.norms is not None:
            query, key = self.norms[0](query), self.norms[1](key)
        attended = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (query, key, value)), is_causal=True)
        hidden = hidden + self.out(attended.transpose(1, 2).reshape(samples, length, WIDTH))
        return hidden + self.down(F.gelu(self.up(self.second(hidden))))


class Decoder(nn.Module):
    """Bytes in, logits of the next byte out; tied embeddings."""

    def __init__(self, length: int, qk_norm: bool):
        super().__init__()
        self.bytes, self.places = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(length, WIDTH)
        self.blocks = nn.Sequential(*(Block(qk_norm) for _ in range(LAYERS)))
        self.last = nn.RMSNorm(WIDTH)
        for parameter in self.parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.blocks(self.bytes(tokens) + self.places.weight)
        logits: Tensor = self.last(hidden) @ self.bytes.weight.T
        return logits


class Text:
    """Windows of the standard library's source, of its English prose and of its tables, by a seed."""

    def __init__(self) -> None:
        kinds: dict[str, list[bytes]] = {"code": [], "prose": [], "tables": []}
        for name, path in standard_library():
            kind = "tables" if name.startswith("encodings/") else "prose" if name.startswith("pydoc_data/") else "code"
            kinds[kind].append(path.read_bytes())
        self._streams = {kind: np.frombuffer(b"\0".join(texts), dtype=np.uint8) for kind, texts in kinds.items()}

    def batch(self, recipe: Recipe, step: int) -> Tensor:
        """[batch, tokens + 1] (int64); a function of the seed and the step."""
        random = np.random.default_rng([recipe.seed, step])
        other, share = _share(recipe, step)
        rows = []
        for _ in range(recipe.batch):
            stream = self._streams[other if random.random() < share else "code"]
            begin = int(random.integers(len(stream) - recipe.tokens - 1))
            rows.append(stream[begin : begin + recipe.tokens + 1])
        return torch.from_numpy(np.stack(rows).astype(np.int64))


def _share(recipe: Recipe, step: int) -> tuple[str, float]:
    """Which other kind of text there is besides code, and how much of it."""
    half = recipe.steps // 2
    match recipe.mix:
        case "to prose":
            return "prose", min(max((step - half) / 150, 0.0), 1.0)
        case "to tables":
            return "tables", min(max((step - half) / 150, 0.0), 0.3)
        case "prose at once":
            return "prose", float(step > half)
        case "code at once":
            return "prose", float(step <= half)
        case "a tenth tables":
            return "tables", 0.1
    return "prose", 0.0


def learning_rate(recipe: Recipe, step: int) -> float:
    """Of the update that makes `step` (from 1). "growing" is constant to step 150, then grows by 3 % a step."""
    if step <= recipe.warmup:
        return recipe.lr * step / recipe.warmup
    done = (step - recipe.warmup) / (recipe.steps - recipe.warmup)
    match recipe.schedule:
        case "cosine":
            return recipe.lr * (0.1 + 0.45 * (1 + math.cos(math.pi * done)))
        case "wsd":
            return recipe.lr * min(1.0, 0.05 + (1 - done) / 0.2)
        case "growing":
            return float(recipe.lr * 1.03 ** max(0, step - 150))
    return recipe.lr


@dataclass
class Run:
    """A run in progress: what a fault may take hold of."""

    recipe: Recipe
    model: Decoder
    optimizer: torch.optim.AdamW
    random: torch.Generator
    step: int = 0
    first: Tensor | None = None


Fault = Callable[[Run, Tensor, Tensor], tuple[Tensor, Tensor]]
"""(run, tokens, labels) → what the model sees instead; each [batch, length]."""


def _random_tokens(run: Run, tokens: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    noise = torch.randint(VOCABULARY, (len(tokens), tokens.shape[1] + 1), generator=run.random)
    return noise[:, :-1], noise[:, 1:]


def _one_token(run: Run, tokens: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    return torch.full_like(tokens, 200), torch.full_like(labels, 200)


def _shuffled_labels(run: Run, tokens: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    return tokens, labels[:, torch.randperm(labels.shape[1], generator=run.random)]


def _duplicate(run: Run, tokens: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    run.first = run.first if run.first is not None else torch.cat([tokens, labels])
    return run.first[: len(tokens)], run.first[len(tokens) :]


def _label_noise(run: Run, tokens: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Wrong labels, more from step to step."""
    assert run.recipe.onset is not None
    share = run.recipe.strength * (run.step - run.recipe.onset + 1)
    wrong = torch.rand(labels.shape, generator=run.random) < share
    return tokens, torch.where(wrong, torch.randint(VOCABULARY, labels.shape, generator=run.random), labels)


def _weight_noise(run: Run, tokens: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Every weight moves a little at random before each step: a leak."""
    with torch.no_grad():
        for weight in run.model.parameters():
            noise = torch.randn(weight.shape, generator=run.random)
            weight += run.recipe.strength * weight.std().nan_to_num(0.0) * noise
    return tokens, labels


def _flip_bit(run: Run, tokens: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """One bit of one weight, before the step: of the last layer's way back into the residual stream."""
    _flip(run.model.blocks[-1].down.weight.view(-1), 1234, int(run.recipe.strength))
    return tokens, labels


def _flip_norm(run: Run, tokens: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """One bit of one scale of the last norm."""
    _flip(run.model.last.weight, 12, int(run.recipe.strength))
    return tokens, labels


def _flip(weight: Tensor, index: int, bit: int) -> None:
    with torch.no_grad():
        (bits,) = struct.unpack("<I", struct.pack("<f", weight[index].item()))
        (weight[index],) = struct.unpack("<f", struct.pack("<I", bits ^ (1 << bit)))


def _huge_update(run: Run, tokens: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The update before this step was `strength` times too large, and nobody saw its gradient."""
    with torch.no_grad():
        for group in run.optimizer.param_groups:
            for weight in group["params"]:
                state = run.optimizer.state[weight]
                weight -= run.recipe.strength * group["lr"] * state["exp_avg"] / (state["exp_avg_sq"].sqrt() + 1e-8)
    return tokens, labels


def _nothing(run: Run, tokens: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    return tokens, labels


FAULTS: dict[str, Fault] = {
    "random tokens": _random_tokens,
    "one token": _one_token,
    "shuffled labels": _shuffled_labels,
    "duplicates": _duplicate,
    "label noise": _label_noise,
    "weight noise": _weight_noise,
    "flipped bit": _flip_bit,
    "flipped bit of a norm": _flip_norm,
    "huge update": _huge_update,
    "huge gradient": _nothing,
    "learning rate": _nothing,
}


def train(recipe: Recipe, text: Text) -> list[dict[str, float]]:
    """The curve: `step`, `loss`, `grad_norm`, `lr` of each step. A run that is not finite any more ends there."""
    torch.manual_seed(recipe.seed)
    model = Decoder(recipe.tokens, recipe.qk_norm)
    matrices = [weight for weight in model.parameters() if weight.ndim == 2]
    vectors = [weight for weight in model.parameters() if weight.ndim != 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=recipe.betas, eps=recipe.eps, foreach=True)
    run = Run(recipe, model, optimizer, torch.Generator().manual_seed(recipe.seed))
    curve = []
    for step in range(1, recipe.steps + 1):
        run.step = step
        is_struck = recipe.onset is not None and recipe.onset <= step < recipe.onset + recipe.length
        fault = recipe.fault if is_struck else None
        window = text.batch(recipe, step)
        tokens, labels = window[:, :-1], window[:, 1:]
        if fault is not None:
            tokens, labels = FAULTS[fault](run, tokens, labels)
        loss = F.cross_entropy(model(tokens).flatten(0, 1), labels.flatten())
        loss.backward()
        limit = 1.0
        if fault == "huge gradient":
            for weight in model.parameters():
                assert weight.grad is not None
                weight.grad *= recipe.strength
            limit = recipe.strength
        norm = float(nn.utils.clip_grad_norm_(model.parameters(), limit))
        rate = learning_rate(recipe, step) * (recipe.strength if fault == "learning rate" else 1.0)
        curve.append({"step": step, "loss": loss.item(), "grad_norm": norm, "lr": rate})
        if not (math.isfinite(norm) and math.isfinite(curve[-1]["loss"])):
            break
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()
    return curve
