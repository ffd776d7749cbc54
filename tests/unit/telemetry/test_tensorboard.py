"""The event files, read back by TensorBoard's own reader."""

import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2, metadata

from trainer.config.schema import TelemetryConfig
from trainer.errors import RunDirectoryError
from trainer.records import Outcome, Position, Saved, Skip, Step, StepStats, Structure, Timing
from trainer.telemetry import scalars as tb
from trainer.telemetry import tensorboard
from trainer.telemetry.confusion import confusion_picture
from trainer.telemetry.recorder import RunFacts, Telemetry

NAMES = (
    "model.embed_tokens.weight",
    "model.layers.0.self_attn.q_proj.weight",
    "model.layers.0.mlp.up_proj.weight",
    "model.layers.1.self_attn.q_proj.weight",
    "model.layers.1.mlp.up_proj.weight",
    "model.norm.weight",
)
NORMS = np.array([1.0, 3.0, 4.0, 5.0, 12.0, 0.5])
FACTS = RunFacts(
    "run", 2, "cpu", "fp32", NAMES, 8, 64, {"torch": "2|3"}, "name: run\n", {"parameters": 6}, parts=("loss", "z_loss")
)
CONFIG = TelemetryConfig(console="quiet")


def open_run(run_dir: Path, resumed: Position | None = None) -> Telemetry:
    return Telemetry.open(run_dir, CONFIG, FACTS, resumed)


def attempt(telemetry: Telemetry, number: int, step: int, loss: float, finite: bool = True) -> None:
    norms = NORMS * loss
    if not finite:
        norms[2] = math.nan
    stats = StepStats(
        attempt=number,
        batch_index=number - 1,
        step=step,
        loss=loss if finite else math.nan,
        parts={"z_loss": loss / 8},
        measures={"teacher entropy": loss / 4},
        num_targets=63,
        grad_norm=float(np.sqrt(np.square(norms).sum())),
        num_nonfinite=0 if finite else 7,
        parameter_norms=norms,
    )
    timing = Timing(0.25, 0.0625, 256.0, 0.5, 1 << 30)
    verdict = Step(16.0) if finite else Skip("not finite")
    telemetry.record_attempt(stats, verdict, timing, 1e-3 * step, 0, finite, {"loss": loss})


def close(telemetry: Telemetry) -> None:
    assert telemetry.close(Outcome("stopped", 75, "Asked to stop.", 8, 8, None)) is None


def read(folder: Path) -> EventAccumulator:
    everything = {"scalars": 0, "tensors": 0}
    return EventAccumulator(str(folder), size_guidance=everything).Reload()


def curve(reader: EventAccumulator, tag: str) -> list[tuple[int, float]]:
    return [(event.step, event.value) for event in reader.Scalars(tag)]


def text(reader: EventAccumulator, tag: str) -> dict[int, str]:
    return {event.step: event.tensor_proto.string_val[0].decode() for event in reader.Tensors(tag)}


def same(found: list[tuple[int, float]], expected: list[tuple[int, float]]) -> bool:
    """Equal steps and values, as float32; a NaN equals a NaN."""
    return [step for step, _ in found] == [step for step, _ in expected] and np.array_equal(
        np.array([value for _, value in found], dtype=np.float32),
        np.array([value for _, value in expected], dtype=np.float32),
        equal_nan=True,
    )


def test_every_value_is_read_back(tmp_path: Path) -> None:
    telemetry = open_run(tmp_path)
    losses = [8.0, 4.0, 2.0, 1.0]
    for step, loss in enumerate(losses, 1):
        attempt(telemetry, step, step, loss)
    ratios = np.array([0.1, 0.3, 0.4, 0.0, 0.0, 0.2])
    telemetry.record_structure(4, Structure(np.array([3.0, 7.0]), 12.0, NORMS, ratios))
    telemetry.record_snapshot(4, 0.0625, 1000)
    telemetry.record_evaluation(2, math.log(7.0), 100, 1.5, {"perplexity": 7.0})
    telemetry.record_evaluation(4, math.nan, 100, 1.5, {"accuracy": 0.25})
    telemetry.record_part_norms(4, {"loss": 5.0})
    telemetry.record_checkpoint(Saved(4, "step-00000004", 1000, 2.5), 0.75)
    close(telemetry)
    main = read(tmp_path / "tensorboard" / "main")
    whole = float(np.sqrt(np.square(NORMS).sum()))

    def of_loss(factor: float) -> list[tuple[int, float]]:
        return [(step, factor * loss) for step, loss in enumerate(losses, 1)]

    def constant(value: float) -> list[tuple[int, float]]:
        return [(step, value) for step in range(1, 5)]

    clipped = [(step, float(sum(whole * loss > 16 for loss in losses[:step]))) for step in range(1, 5)]
    expected = {
        "1 stability/loss": of_loss(1),
        "1 stability/loss: z_loss": of_loss(1 / 8),
        "2 distillation/teacher entropy": of_loss(1 / 4),
        "2 held-out/accuracy": [(4, 0.25)],
        "3 gradients by part of the loss/loss": [(4, 5)],
        "1 stability/gradient norm": of_loss(whole),
        "1 stability/gradient norm: limit": constant(16),
        "1 stability/non-finite gradient elements": constant(0),
        "1 stability/skipped attempts": constant(0),
        "1 stability/updates clipped": clipped,
        "1 stability/updates clipped: share of the last 100": [(step, count / step) for step, count in clipped],
        "1 stability/incident": constant(0),
        "1 stability/rollbacks": constant(0),
        "1 stability/quarantined batches": constant(0),
        "1 stability/spike score: loss": of_loss(1),
        "4 largest attention logits/layer 00": [(4, 3)],
        "4 largest attention logits/layer 01": [(4, 7)],
        "4 largest output logit/all": [(4, 12)],
        "2 held-out/loss": [(2, math.log(7.0)), (4, math.nan)],
        "2 held-out/perplexity": [(2, 7.0)],
        "3 gradients by layer/embedding": of_loss(1),
        "3 gradients by layer/layer 00": of_loss(5),
        "3 gradients by layer/layer 01": of_loss(13),
        "3 gradients by layer/norm": of_loss(0.5),
        "3 gradients by part/embedding": of_loss(1),
        "3 gradients by part/attention": of_loss(34**0.5),
        "3 gradients by part/mlp": of_loss(160**0.5),
        "3 gradients by part/norm": of_loss(0.5),
        "4 weight norms/embedding": [(4, 1)],
        "4 weight norms/layer 00": [(4, 5)],
        "4 weight norms/layer 01": [(4, 13)],
        "4 weight norms/norm": [(4, 0.5)],
        "4 update-to-weight ratios/embedding": [(4, 0.1)],
        "4 update-to-weight ratios/layer 00": [(4, math.hypot(0.9, 1.6) / 5)],
        "4 update-to-weight ratios/layer 01": [(4, 0)],
        "4 update-to-weight ratios/norm": [(4, 0.2)],
        "5 throughput/tokens per second": constant(256),
        "5 throughput/FLOP utilisation": constant(0.5),
        "5 throughput/seconds of a step": constant(0.25),
        "5 throughput/seconds of a step: waiting for data": constant(0.0625),
        "5 throughput/memory in GiB": constant(1),
        "5 throughput/seconds of an evaluation": [(2, 1.5), (4, 1.5)],
        "5 throughput/seconds that a checkpoint blocks": [(4, 0.75)],
        "5 throughput/seconds until a checkpoint is whole": [(4, 2.5)],
        "5 throughput/seconds that a snapshot blocks": [(4, 0.0625)],
        "6 schedule/learning rate": [(step, 1e-3 * step) for step in range(1, 5)],
        "6 schedule/epoch": constant(0),
        "6 schedule/batch": [(step, step - 1) for step in range(1, 5)],
    }
    accounts = {tag for tag in main.Tags()["scalars"] if tag.startswith((tb.GOODPUT, tb.SHARE))}
    assert len(accounts) == 10, "they are of the clock: test_goodput.py reads them back"
    assert set(main.Tags()["scalars"]) - accounts == set(expected)
    wrong = {tag: curve(main, tag) for tag in expected if not same(curve(main, tag), expected[tag])}
    assert wrong == {}
    assert not (tmp_path / "tensorboard" / "skipped").exists()


def run_with_skips_and_a_resume(run_dir: Path) -> None:
    first = open_run(run_dir)
    attempt(first, 1, 1, 8.0)
    attempt(first, 2, 2, 7.0, finite=False)
    attempt(first, 3, 2, 6.0)
    attempt(first, 4, 3, 99.0)
    first.record_evaluation(3, 99.0, 100, 1.0)
    attempt(first, 5, 4, 99.0)
    close(first)
    second = open_run(run_dir, Position(2, 3, 3))
    attempt(second, 6, 3, 5.0)
    second.record_evaluation(3, 5.0, 100, 1.0)
    second.message("warning", "a | b")
    close(second)


def test_a_resume_supersedes_and_a_rebuild_shows_the_same(tmp_path: Path) -> None:
    run_with_skips_and_a_resume(tmp_path)
    folder = tmp_path / "tensorboard"
    live = [read(folder / name) for name in ("main", "skipped")]
    assert curve(live[0], tb.LOSS) == [(1, 8.0), (2, 6.0), (3, 5.0)]
    assert curve(live[0], tb.HELD_OUT_LOSS) == [(3, 5.0)]
    assert dict(curve(live[0], tb.SKIPPED)) == {1: 0, 2: 1, 3: 1}

    command = [sys.executable, "-W", "ignore", "-m", "trainer.telemetry.tensorboard", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert str(folder) in done.stderr
    assert sorted(path.name for path in folder.iterdir()) == ["main", "skipped"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ledger.jsonl", "tensorboard"]
    rebuilt = [read(folder / name) for name in ("main", "skipped")]
    for before, after in zip(live, rebuilt, strict=True):
        assert before.Tags()["scalars"] == after.Tags()["scalars"]
        for tag in before.Tags()["scalars"]:
            assert same(curve(before, tag), curve(after, tag)), tag
            assert [event.wall_time for event in before.Scalars(tag)] == [
                event.wall_time for event in after.Scalars(tag)
            ]


def test_a_skipped_attempt_shows_its_nan_beside_the_curve_and_only_in_its_layer(tmp_path: Path) -> None:
    run_with_skips_and_a_resume(tmp_path)
    skipped = read(tmp_path / "tensorboard" / "skipped")
    assert same(curve(skipped, tb.LOSS), [(2, math.nan)])
    assert same(curve(skipped, tb.GRADIENT_NORM), [(2, math.nan)])
    assert same(curve(skipped, tb.NONFINITE), [(2, 7)])
    assert same(curve(skipped, f"{tb.BY_LAYER}/layer 00"), [(2, math.nan)])
    assert same(curve(skipped, f"{tb.BY_LAYER}/layer 01"), [(2, 91)])
    assert same(curve(skipped, f"{tb.BY_PART}/mlp"), [(2, math.nan)])


def test_cards_tell_the_run_its_config_and_what_was_said(tmp_path: Path) -> None:
    run_with_skips_and_a_resume(tmp_path)
    main = read(tmp_path / "tensorboard" / "main")
    assert "| versions | torch 2\\|3 |" in text(main, "1 run")[0]
    assert text(main, "3 config")[0] == "```yaml\nname: run\n\n```"
    messages = text(main, "2 messages")
    assert messages[2] == "- **warning** skipped batch 1 (attempt 2): not finite"
    assert messages[3] == "- **warning** a | b\n- **info** stopped: Asked to stop."


def test_predictions_are_a_picture_and_a_table(tmp_path: Path) -> None:
    telemetry = open_run(tmp_path)
    wrong = {"document": "a|b.csv:7", "truth": "good", "prediction": ["bad", "dull"], "text": "<b>so *so* | film"}
    names = ["good", "bad", "dull"]
    telemetry.record_predictions(
        3, {"errors": [wrong], "classes": names, "confusion": [[5, 1, 0], [0, 4, 2], [0, 0, 9]]}
    )
    telemetry.record_predictions(4, {"errors": []})
    close(telemetry)
    main = read(tmp_path / "tensorboard" / "main")
    (image,) = main.Images("2 held-out/confusion")
    assert (image.step, image.encoded_image_string[1:4]) == (3, b"PNG")
    assert image.width == image.height + 60
    assert text(main, "4 worst errors")[3].splitlines()[2:] == [
        r"| a\|b.csv:7 | good | bad, dull | \<b\>so \*so\* \| film |"
    ]


def test_confusion_is_shown_as_fractions_of_the_true_class(monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.axes import Axes

    shown: list[Any] = []
    draw = Axes.imshow
    monkeypatch.setattr(Axes, "imshow", lambda self, data, **options: shown.append(data) or draw(self, data, **options))
    confusion_picture([[3, 1, 0], [0, 0, 0], [1, 1, 2]], ["a", "b", "c"])
    assert shown[0].tolist() == [[0.75, 0.25, 0.0], [0.0, 0.0, 0.0], [0.25, 0.25, 0.5]]


def test_each_chart_of_the_layout_finds_its_curves(tmp_path: Path) -> None:
    telemetry = open_run(tmp_path)
    attempt(telemetry, 1, 1, 8.0)
    telemetry.record_structure(1, Structure(np.ones(2), 1.0, NORMS, NORMS))
    telemetry.record_evaluation(1, 5.0, 100, 1.0)
    telemetry.record_part_norms(1, {"loss": 1.0, "z_loss": 2.0})
    close(telemetry)
    main = read(tmp_path / "tensorboard" / "main")
    (event,) = main.Tensors(metadata.CONFIG_SUMMARY_TAG)
    layout: Any = layout_pb2.Layout.FromString(event.tensor_proto.string_val[0])
    # TensorBoard matches each expression from the start of the tag
    found = {
        chart.title: {
            tag for tag in main.Tags()["scalars"] for pattern in chart.multiline.tag if re.compile(pattern).match(tag)
        }
        for category in layout.category
        for chart in category.chart
    }
    layers = ("embedding", "layer 00", "layer 01", "norm")
    assert found["loss and held-out loss"] == {tb.LOSS, tb.HELD_OUT_LOSS}
    assert found["gradient norm and its limit"] == {tb.GRADIENT_NORM, tb.CLIP}
    assert found["gradient norm of each layer"] == {f"{tb.BY_LAYER}/{label}" for label in layers}
    assert found["update-to-weight ratio of each layer"] == {f"{tb.UPDATE_RATIOS}/{label}" for label in layers}
    assert found["seconds of a step, and of it waiting for data"] == {tb.SECONDS, tb.SECONDS_DATA}
    assert found["parts of the loss"] == {tb.LOSS, f"{tb.LOSS}: z_loss"}
    assert found["gradient norm of each part"] == {f"{tb.PART_NORMS}/loss", f"{tb.PART_NORMS}/z_loss"}
    assert all(found.values())


def test_rebuilding_what_never_ran_says_so_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(RunDirectoryError, match="no ledger"):
        tensorboard.rebuild(tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert tensorboard.main([]) == tensorboard.main([str(tmp_path)]) == 2


def test_rebuilding_needs_neither_torch_nor_tensorflow() -> None:
    program = "import sys, trainer.telemetry.tensorboard; print(sorted({'torch', 'tensorflow'} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
