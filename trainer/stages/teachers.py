"""The teacher of a run: opened at its place, scored once, looked after."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from numpy.typing import NDArray

from trainer.config.distill import DistillLossConfig
from trainer.knowledge import DenseTargets, LogitTargets, Teacher
from trainer.objectives.fused import fused_distillation
from trainer.objectives.logits import logit_distillation
from trainer.records import Evaluation
from trainer.stages.build import Setting, held_out_batches
from trainer.stages.caching import open_knowledge
from trainer.stages.distill import cross_entropy_only
from trainer.stages.prepare import write_whole
from trainer.teacher.across import AcrossTokenizers
from trainer.teacher.build import build_teacher
from trainer.teacher.model import TeacherModel
from trainer.teacher.retokenise import Retokeniser
from trainer.teacher.server import ServerTeacher


def open_teacher(setting: Setting) -> Teacher:
    """The teacher of the config, ready to be asked. A collective.

    Raises:
        ConfigError: it does not fit the run.
        DataError: its cache is not there, or another's.
    """
    config, prepared = setting.config, setting.prepared
    assert config.distill is not None
    match config.distill.teacher.place:
        case "cache":
            return open_knowledge(setting)
        case "server":
            assert config.distill.teacher.server is not None
            return ServerTeacher(
                config.distill.teacher.server,
                tokenizer=prepared.tokenizer_path,
                vocabulary=prepared.vocabulary,
                boundaries=config.data.boundaries,
            )
        case "replica" | "zero3":
            model = build_teacher(
                config,
                ranks=setting.ranks,
                device=setting.device,
                vocabulary=prepared.vocabulary,
                classes=prepared.classes,
                kept=prepared.kept,
                alive=partial(setting.heartbeat.beat, "loading"),
            )
            if config.distill.vocabulary == "same":
                return model
            assert config.distill.teacher.pretrained is not None
            retokeniser = Retokeniser(
                prepared.tokenizer_path,
                config.distill.teacher.pretrained,
                boundaries=config.data.boundaries,
                eos_id=prepared.eos_id,
                longest=model.max_positions,
                trust_remote_code=config.distill.teacher.trust_remote_code,
            )
            return AcrossTokenizers(model, retokeniser)


class TeacherCare:
    """Compares the teacher with what was loaded, at its turn and whenever there is an alarm.

    Args:
        every: steps between comparisons; None: only at alarms.
        step: of the state that the run goes on from.
    """

    def __init__(self, teacher: Teacher, every: int | None, step: int):
        self._teacher, self._every = teacher, every
        self.verified_step = step

    def look(self, step: int, *, alarming: bool) -> str | None:
        if not alarming and (self._every is None or step % self._every):
            return None
        found = self._teacher.mend()
        if found is None and not alarming:
            self.verified_step = step
        return found

    def went_back(self, step: int) -> None:
        self.verified_step = min(self.verified_step, step)


def note_scores(setting: Setting, teacher: Teacher, micro: int) -> str | None:
    """Measure the teacher on the held-out data, once in a run, and note it in the run directory. A collective.

    Of a teacher that answers for the training data only (cache, server) nothing is noted.

    Returns:
        The scores for a person; None: nothing was measured now.
    """
    assert setting.config.distill is not None
    options, ranks = cross_entropy_only(setting.config.distill.loss), setting.ranks
    box = [setting.files.teacher_scores.exists()]
    dist.broadcast_object_list(box, src=0)
    if box[0] or not isinstance(teacher, TeacherModel):
        return None
    device = torch.device(setting.device, ranks.local_rank) if setting.device == "cuda" else torch.device("cpu")
    found = score(
        teacher, held_out_batches(setting, micro), device, options, partial(setting.heartbeat.beat, "evaluating")
    )
    if ranks.is_first:
        about: dict[str, Any] = {"loss": found.loss, **found.scores, "parameters": teacher.num_parameters}
        write_whole(setting.files.teacher_scores, json.dumps(about, indent=1))
    return f"loss {found.loss:.4f}, accuracy {found.scores['accuracy']:.1%}"


@torch.no_grad()
def score(
    teacher: Teacher,
    batches: Iterable[Mapping[str, NDArray[Any]]],
    device: torch.device,
    options: DistillLossConfig,
    alive: Callable[[], None] = lambda: None,
) -> Evaluation:
    """Mean cross-entropy of the teacher with the labels, and its accuracy, over all ranks. A collective.

    Args:
        options: of :func:`cross_entropy_only`.
    """
    sums = torch.zeros(3, dtype=torch.float64, device=device)
    for arrays in batches:
        alive()
        tensors = {name: torch.from_numpy(array).to(device) for name, array in arrays.items()}
        labels, targets = tensors["labels"], teacher.knowledge(tensors).targets
        match targets:
            case DenseTargets(hidden=hidden, head=head):
                with targets.whole():
                    found = fused_distillation(hidden, head, labels, None, options)
            case LogitTargets(logits=logits):
                found = logit_distillation(logits, labels, None, options)
            case _:
                raise AssertionError("only a model can be scored")
        sums += torch.stack([found.cross_entropy.sum(), found.right, (labels >= 0).sum()]).to(sums)
    dist.all_reduce(sums)
    loss, right, count = sums.tolist()
    return Evaluation(loss / count, int(count), {"accuracy": right / count})
