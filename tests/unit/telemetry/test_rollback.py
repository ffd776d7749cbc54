"""What a rollback does to the ledger's views: the curve that stands is clean, what was taken back is kept beside it."""

import io
import math
from pathlib import Path

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.unit.telemetry.test_console import shown, view_of
from trainer.config.schema import TelemetryConfig
from trainer.records import (
    IncidentEvent,
    Outcome,
    Position,
    RankStats,
    Replay,
    Rewind,
    Rollback,
    Skip,
    Step,
    StepStats,
    Timing,
    Verdict,
)
from trainer.telemetry import scalars as tb
from trainer.telemetry import tensorboard
from trainer.telemetry.heatmap import HeatMap
from trainer.telemetry.ledger import (
    FILE_NAME,
    Record,
    last_incident,
    notice,
    read_ledger,
    standing,
    surviving,
)
from trainer.telemetry.recorder import RunFacts, Telemetry

NAMES = ("model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight")
FACTS = RunFacts("run", 2, "cpu", "fp32", NAMES, 20, 64, {}, "name: run\n", {})
CONFIG = TelemetryConfig(console="quiet")
TIMING = Timing(0.25, 0.0625, 256.0, None, 1 << 30)


class Run:
    """Tells a telemetry what a loop would."""

    def __init__(self, run_dir: Path, resumed: Position | None = None, attempt: int = 0):
        self.telemetry = Telemetry.open(run_dir, CONFIG, FACTS, resumed)
        self.attempt, self.step = attempt, resumed.step if resumed else 0

    def steps(self, count: int, loss: float = 4.0) -> None:
        for _ in range(count):
            self.attempted(Step(clip=1.0), loss)

    def attempted(self, verdict: Verdict, loss: float, incident: int = 0) -> None:
        self.attempt += 1
        applied = isinstance(verdict, Step)
        stats = StepStats(
            attempt=self.attempt,
            batch_index=self.attempt - 1,
            step=self.step + 1,
            loss=loss,
            parts={},
            num_targets=63,
            grad_norm=loss,
            num_nonfinite=0,
            parameter_norms=np.array([1.0, 2.0, loss]),
            ranks=RankStats(losses=np.array([loss / 2, loss / 2]), grad_norms=np.array([1.0, loss])),
        )
        self.telemetry.record_attempt(stats, verdict, TIMING, 1e-3, 0, applied, {"loss": loss / 3}, incident)
        self.step += applied

    def told(self, phase: str, text: str = "the loss is too high", step: int | None = None) -> None:
        event = IncidentEvent(1, phase, self.attempt, step or self.step, self.attempt - 1, text, {"loss": math.nan})
        self.telemetry.record_incident(event)

    def rewind(self, to_step: int, quarantine: tuple[int, int] | None = None) -> None:
        self.telemetry.record_rewind(
            Rewind(1, self.step, to_step, self.attempt, self.attempt, quarantine, "memory", 0.05, "the loss is 99")
        )
        self.step = to_step

    def close(self) -> None:
        assert self.telemetry.close(Outcome("completed", 0, "Done.", 20, 20, None)) is None


def incident(run: Run) -> None:
    """8 steps, the last 2 of them harmed, an alarm, back to step 6, on to step 10."""
    run.steps(6)
    run.steps(2, loss=9.0)
    run.attempted(Replay("high"), 99.0)
    run.attempted(Rollback("high", 6), 99.0, incident=1)
    run.rewind(6, (6, 8))
    run.told("opened", step=9)
    run.told("acted", "back from step 8 to step 6", step=6)
    run.steps(4, loss=3.0)
    run.told("recovered", "back on its trajectory")
    run.steps(1, loss=3.0)


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    run = Run(tmp_path)
    incident(run)
    run.close()
    return tmp_path


def records(run_dir: Path, kind: str) -> list[Record]:
    return [record for record in read_ledger(run_dir / FILE_NAME) if record["kind"] == kind]


def read(folder: Path) -> EventAccumulator:
    return EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0, "images": 0}).Reload()


def curve(reader: EventAccumulator, tag: str) -> list[tuple[int, float]]:
    return [(event.step, round(event.value, 3)) for event in reader.Scalars(tag)]


def standing_attempts(run_dir: Path) -> list[tuple[int, int]]:
    return [(found["step"], found["attempt"]) for found in standing(read_ledger(run_dir / FILE_NAME))]


def test_steps_that_were_rolled_back_do_not_stand_and_do_not_survive(run_dir: Path) -> None:
    path = run_dir / FILE_NAME
    assert standing_attempts(run_dir) == [(n, n) for n in range(1, 7)] + [(n, n + 4) for n in range(7, 12)]
    survived = [record["attempt"] for record in surviving(path) if record["kind"] == "attempt"]
    assert survived == [*range(1, 7), *range(11, 16)]
    assert [record["to_step"] for record in surviving(path) if record["kind"] == "rewind"] == [6]
    assert last_incident(path) == 1


def test_a_run_that_ends_after_a_rollback_stands_where_it_went_back_to(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.steps(5)
    run.rewind(3)
    run.close()
    assert standing_attempts(tmp_path) == [(1, 1), (2, 2), (3, 3)]


def test_a_resume_from_before_a_rollback_undoes_it(tmp_path: Path) -> None:
    first = Run(tmp_path)
    first.steps(8)  # the checkpoint of step 8 is here
    first.steps(1, loss=99.0)
    first.rewind(5)
    first.steps(2, loss=3.0)
    first.telemetry.flush()
    second = Run(tmp_path, Position(8, 8, 8), attempt=first.attempt)
    second.steps(2)
    second.close()
    first.close()
    expected = [(n, n) for n in range(1, 9)] + [(9, 12), (10, 13)]
    assert standing_attempts(tmp_path) == expected
    path = tmp_path / FILE_NAME
    assert [(r["step"], r["attempt"]) for r in surviving(path) if r["kind"] == "attempt"] == expected
    assert [record for record in surviving(path) if record["kind"] == "rewind"] == []
    assert records(tmp_path, "attempt")[-1]["num_rollbacks"] == 0


def test_counts_are_of_the_history_and_go_on_over_a_rollback_and_a_resume(tmp_path: Path) -> None:
    first = Run(tmp_path)
    first.steps(3)
    first.attempted(Skip("not finite"), math.nan)
    first.steps(1)
    first.rewind(2, (3, 4))
    first.steps(1)
    first.telemetry.flush()
    second = Run(tmp_path, Position(3, first.attempt, 7), attempt=first.attempt)
    second.steps(1)
    for run in (second, first):
        run.close()
    before, after = (found for found in records(tmp_path, "attempt")[-2:])
    # the skipped batch 3 lies in the window that the rollback left out: it counts once
    expected = {"num_skipped": 1, "num_clipped": 5, "num_rollbacks": 1, "num_quarantined": 2, "num_incidents": 0}
    assert {name: before[name] for name in expected} == expected
    assert {name: after[name] for name in expected} == expected | {"num_clipped": 6}


def test_ranks_and_scores_are_recorded(run_dir: Path) -> None:
    alarm, first = records(run_dir, "attempt")[9], records(run_dir, "attempt")[0]
    assert (alarm["verdict"], alarm["incident"], alarm["scores"]) == ("rollback", 1, {"loss": 33.0})
    assert (alarm["rank_losses"], alarm["rank_grad_norms"]) == ([49.5, 49.5], [1.0, 99.0])
    assert "rank_losses" not in first
    assert first["scores"] == {"loss": 1.3333}
    (rewind,) = records(run_dir, "rewind")
    assert (rewind["from_step"], rewind["to_step"], rewind["quarantine"], rewind["attempt"]) == (8, 6, [6, 8], 10)
    assert rewind["num_quarantined"] == 3


def test_adagc_clips_where_any_factor_is_below_one(tmp_path: Path) -> None:
    run = Run(tmp_path)
    for scales, clip in (((1.0, 1.0), 0.0), ((1.0, 0.5), 0.0), (None, 0.0), ((1.0, 1.0), 3.0), ((1.0, 1.0), 5.0)):
        run.attempted(Step(clip, scales), 4.0)
    run.close()
    assert [found["clipped"] for found in records(tmp_path, "attempt")] == [False, True, False, True, False]


def test_an_incident_is_told_in_one_line_each(run_dir: Path) -> None:
    told = [heard for record in read_ledger(run_dir / FILE_NAME) if (heard := notice(record))]
    assert told == [
        ("warning", "computes once more batch 8 (attempt 9): high"),
        ("warning", "incident 1 opened: the loss is too high"),
        ("warning", "incident 1 acted: back from step 8 to step 6"),
        ("info", "incident 1 recovered: back on its trajectory"),
        ("info", "completed: Done."),
    ]
    halted = {"kind": "incident", "incident": 2, "phase": "halted", "text": "no way on"}
    assert notice(halted) == ("error", "incident 2 halted: no way on")
    assert notice({**halted, "incident": 0, "phase": "notice"}) == ("warning", "guard: no way on")


def test_the_standing_curve_is_clean_and_the_abandoned_one_is_kept(run_dir: Path) -> None:
    main = read(run_dir / "tensorboard" / "main")
    stands = [(n, 4.0) for n in range(1, 7)] + [(n, 3.0) for n in range(7, 12)]
    assert curve(main, tb.LOSS) == stands
    assert curve(main, f"{tb.BY_LAYER}/layer 01") == stands
    abandoned = read(run_dir / "tensorboard" / "abandoned" / "incident-0001")
    assert curve(abandoned, tb.LOSS) == [(7, 9.0), (8, 9.0), (9, 99.0), (9, 99.0)]
    assert curve(abandoned, f"{tb.BY_LAYER}/layer 01") == curve(abandoned, tb.LOSS)
    assert curve(abandoned, tb.LEARNING_RATE) == [(7, 0.001), (8, 0.001)]
    assert dict(curve(main, tb.ROLLBACKS)) == {n: float(n > 6) for n in range(1, 12)}
    assert dict(curve(main, tb.QUARANTINED)) == {n: 3.0 * (n > 6) for n in range(1, 12)}
    assert curve(main, f"{tb.SCORE}: loss")[-1] == (11, 1.0)
    assert curve(main, tb.CLIP_RATE)[-1] == (11, 1.0)
    assert dict(curve(main, tb.INCIDENT)) == {n: float(n in (6, 10)) for n in range(1, 12)}


def test_incidents_have_cards_and_pictures_that_no_rollback_hides(run_dir: Path) -> None:
    incidents = read(run_dir / "tensorboard" / "incidents")
    cards = {tag: incidents.Tensors(tag)[0].tensor_proto.string_val[0].decode() for tag in incidents.Tags()["tensors"]}
    assert sorted(cards) == [
        "incident 0001/02 rolled back",
        "incident 0001/03 opened",
        "incident 0001/04 acted",
        "incident 0001/05 recovered",
    ]
    assert (
        "from step 8 back to step **6** (memory, 0.05 s); batches 6–8 left out" in cards["incident 0001/02 rolled back"]
    )
    assert "the loss is too high" in cards["incident 0001/03 opened"]
    assert "| loss | nan |" in cards["incident 0001/03 opened"]
    from matplotlib.image import imread

    (picture,) = incidents.Images("incident 0001/01 gradient norms")
    assert imread(io.BytesIO(picture.encoded_image_string)).shape == (picture.height, picture.width, 4)
    (last,) = read(run_dir / "tensorboard" / "main").Images(tb.HEAT)
    assert last.step == 11


def test_a_rebuild_gives_the_same(run_dir: Path) -> None:
    runs = ["main", "skipped", "incidents", "abandoned/incident-0001"]

    def everything() -> dict[str, object]:
        found: dict[str, object] = {}
        for run in runs:
            if not (run_dir / "tensorboard" / run).exists():
                continue
            reader = read(run_dir / "tensorboard" / run)
            for tag in reader.Tags()["scalars"]:
                found[f"{run} {tag}"] = dict(curve(reader, tag))
            for tag in reader.Tags()["tensors"]:
                cards = [(event.step, event.tensor_proto.string_val[0]) for event in reader.Tensors(tag)]
                found[f"{run} {tag}"] = dict(cards)
            for tag in reader.Tags()["images"]:
                found[f"{run} {tag}"] = [(event.step, event.encoded_image_string) for event in reader.Images(tag)]
        # a tag of which nothing is left is still a tag
        return {tag: points for tag, points in found.items() if points}

    before = everything()
    tensorboard.rebuild(run_dir)
    after = everything()
    assert sorted(after) == sorted(before)
    # the notices of attempts that were taken back are left out
    assert {tag for tag in before if before[tag] != after[tag]} == {"main 2 messages"}


def test_a_second_rollback_of_an_incident_has_a_run_of_its_own(tmp_path: Path) -> None:
    run = Run(tmp_path)
    for _ in range(2):
        run.steps(4)
        run.rewind(run.step - 2)
    run.close()
    folder = tmp_path / "tensorboard" / "abandoned"
    assert curve(read(folder / "incident-0001"), tb.LOSS) == [(3, 4.0), (4, 4.0)]
    assert curve(read(folder / "incident-0001-2"), tb.LOSS) == [(5, 4.0), (6, 4.0)]


def test_the_share_that_was_clipped_is_of_what_stands(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.steps(2, loss=0.5)
    run.steps(2)
    run.rewind(2)
    run.steps(1, loss=0.5)
    run.close()
    main = read(tmp_path / "tensorboard" / "main")
    assert curve(main, tb.CLIP_RATE) == [(1, 0.0), (2, 0.0), (3, 0.0)]


def test_the_heat_map_goes_back_and_keeps_spikes_in_bounded_memory() -> None:
    heat = HeatMap(num_columns=4)
    for step in range(1, 6):
        heat.add(step, {"a": float(step), "b": 99.0 if step == 2 else 1.0})
    assert heat.norms.tolist() == [[2.0, 4.0, 5.0], [99.0, 1.0, 1.0]]
    heat.add(6, {"a": math.nan, "b": 1.0})
    assert np.isnan(heat.norms[0, 2])
    heat.rewind(4)
    assert heat.norms.tolist() == [[2.0, 4.0], [99.0, 1.0]]
    assert heat.picture() is not None
    heat.rewind(1)
    assert heat.picture() is None


def test_the_picture_of_a_run_forgets_what_was_rolled_back(run_dir: Path) -> None:
    same = HeatMap()
    for step in range(1, 12):
        norm = 4.0 if step <= 6 else 3.0
        same.add(step, {"embedding": 1.0, "layer 00": 2.0, "layer 01": norm})
    (last,) = read(run_dir / "tensorboard" / "main").Images(tb.HEAT)
    expected = same.picture()
    assert expected is not None
    assert last.encoded_image_string == expected.png


def test_the_console_goes_back_and_counts(run_dir: Path) -> None:
    seen = list(read_ledger(run_dir / FILE_NAME))
    at = next(number for number, record in enumerate(seen) if record["kind"] == "rewind")
    view = view_of(*seen[: at + 1])
    assert view.step == 6
    page = shown(view_of(*seen[:-4]))
    assert "1, 1 rollback " in page
    assert "3 batches" in page
    assert "warning: incident 1 opened: the loss is too high" in page
    assert "1, now open" in shown(view_of(*(record for record in seen[:at])))
