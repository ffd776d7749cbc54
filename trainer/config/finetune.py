"""What is for fine-tuning: augmented texts, adapters."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from trainer.config.section import Fraction, PositiveFloat, PositiveInt, Section


class AugmentConfig(Section):
    """Training texts changed at run time: a pure function of (seed, sample, visit), the same after a resume."""

    fraction: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Of the samples, those that are changed."""
    delete: Fraction = 0.0
    """Fraction of the words that are left out."""
    swap: Fraction = 0.0
    """Fraction of the words that change places with the next one, at most 0.5."""
    mask: Fraction = 0.0
    """Fraction of the tokens that become the mask token (or the unknown token)."""
    typos: Fraction = 0.0
    """Fraction of the characters that are dropped, doubled, replaced, or swapped with the next one."""
    synonyms: Fraction = 0.0
    """Fraction of the words known to `lexicon` that become one of their synonyms there."""
    lexicon: str | None = None
    """File with a group of synonyms a line, separated by tabs or commas; or WordNet's folder of `data.*` files."""


class LoraConfig(Section):
    """Low-rank adapters (Hu et al. 2021) by peft: the pretrained weights stay as they are."""

    rank: PositiveInt = 8
    """Of both factors."""
    alpha: PositiveFloat = 16.0
    """The product is scaled by alpha / rank."""
    dropout: Fraction = 0.0
    """Before the first factor."""
    targets: tuple[str, ...] = ("all-linear",)
    """Names of linear modules, or `all-linear`: all but the head."""
    train: tuple[str, ...] = ()
    """Names of further modules that are trained whole. A new head always is."""
