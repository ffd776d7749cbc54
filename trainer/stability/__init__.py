"""What keeps a run on course: floats only, no torch, no I/O. For any loop: `from trainer.stability import Guard`."""

from trainer.stability.guard import Guard

__all__ = ["Guard"]
