"""Faults as sentences, put into live steps and into data on purpose. Free of torch but for :mod:`.inject`."""

from trainer.faults.parse import parse_fault, parse_faults
from trainer.faults.poison import Poisoned, poisoned
from trainer.faults.sentence import Fault, Kind, Moment, Strike, all_of, at, batches, from_batch

__all__ = [
    "Fault",
    "Kind",
    "Moment",
    "Poisoned",
    "Strike",
    "all_of",
    "at",
    "batches",
    "from_batch",
    "parse_fault",
    "parse_faults",
    "poisoned",
]
