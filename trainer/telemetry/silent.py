"""The recorder of every rank but the first."""

from __future__ import annotations


class NoTelemetry:
    """Records nothing; a :class:`trainer.telemetry.recorder.Recorder`."""

    def record_attempt(self, *_: object, **__: object) -> None:
        pass

    def record_rewind(self, *_: object, **__: object) -> None:
        pass

    def record_incident(self, *_: object, **__: object) -> None:
        pass

    def record_snapshot(self, *_: object, **__: object) -> None:
        pass

    def record_structure(self, *_: object, **__: object) -> None:
        pass

    def record_part_norms(self, *_: object, **__: object) -> None:
        pass

    def record_evaluation(self, *_: object, **__: object) -> None:
        pass

    def record_predictions(self, *_: object, **__: object) -> None:
        pass

    def record_checkpoint(self, *_: object, **__: object) -> None:
        pass

    def message(self, *_: object, **__: object) -> None:
        pass

    def flush(self) -> None:
        pass

    def close(self, *_: object, **__: object) -> OSError | None:
        return None
