"""A student narrower than its teacher: maps that are trained, counted and checkpointed, and not exported."""

from pathlib import Path

import pytest
import torch
from model_configs import VOCABULARY, run_config
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from trainer.config.distill import DistillConfig, HiddenConfig, RelationsConfig, TeacherConfig
from trainer.config.schema import RunConfig
from trainer.errors import ConfigError
from trainer.model.build import build_model, meta_model
from trainer.model.describe import describe
from trainer.model.groups import parameter_groups
from trainer.model.inner import Shape, Wanted, hidden_pairs, teacher_shape, wanted_of_student, wanted_of_teacher
from trainer.model.projections import NAME, projector
from trainer.model.save import save_model

WIDE = 40


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("teacher")
    sizes = {"num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 24}
    LlamaConfig(vocab_size=VOCABULARY, hidden_size=WIDE, **sizes).save_pretrained(folder)  # no weights are needed
    return str(folder)


def distill(teacher: str, **options) -> DistillConfig:
    return DistillConfig(teacher=TeacherConfig(pretrained=teacher), **options)


def student(teacher: str, pairs=((1, 2), (2, 3)), seed: int = 0, **model) -> RunConfig:
    config = run_config(seed=seed, **model)
    hidden = HiddenConfig(layers=pairs)
    return config.model_copy(update={"stage": "distill", "distill": distill(teacher, hidden=hidden)})


def build(config: RunConfig, dtype: torch.dtype = torch.float32):
    return build_model(config, vocabulary=VOCABULARY, zero3=None, dtype=dtype)


NAMES = [f"{NAME}.student_1_teacher_2.weight", f"{NAME}.student_2_teacher_3.weight"]


def test_they_are_parameters_like_others(teacher):
    config = student(teacher)
    model = build(config)
    found = {name: p for name, p in model.named_parameters() if NAME in name}
    assert list(found) == NAMES
    assert all(p.shape == (WIDE, 16) and p.requires_grad for p in found.values())
    facts = describe(config, VOCABULARY)
    assert [f.name for f in facts.parameters] == [name for name, _ in model.named_parameters()]
    assert [(f.shape, f.decay) for f in facts.parameters if NAME in f.name] == [((WIDE, 16), True)] * 2
    grouped = [p for group in parameter_groups(model, config) for p in group["params"]]
    assert {id(p) for p in found.values()} <= {id(p) for p in grouped}
    assert all(p.is_meta for p in meta_model(config, VOCABULARY).parameters())
    plain = describe(run_config(), VOCABULARY)
    assert facts.num_parameters - plain.num_parameters == 2 * WIDE * 16


def test_values_follow_from_seed_and_name(teacher):
    def values(*arguments, **options) -> dict[str, torch.Tensor]:
        return {n: p.detach() for n, p in build(*arguments, **options).named_parameters() if NAME in n}

    torch.manual_seed(1)
    first = values(student(teacher))
    torch.manual_seed(2)
    again, other_pairs = values(student(teacher)), values(student(teacher, pairs=((2, 3), (0, 0))))
    assert all(torch.equal(first[name], again[name]) for name in NAMES)
    assert torch.equal(first[NAMES[1]], other_pairs[NAMES[1]])
    assert not torch.equal(first[NAMES[0]], first[NAMES[1]])
    assert not torch.equal(first[NAMES[0]], values(student(teacher, seed=1))[NAMES[0]])
    assert first[NAMES[0]].std().item() == pytest.approx(16**-0.5, rel=0.1)
    rounded = values(student(teacher), torch.bfloat16)
    assert all(torch.equal(rounded[name], first[name].bfloat16()) for name in NAMES)
    rest = dict(build(run_config()).named_parameters())
    assert all(torch.equal(p, rest[n]) for n, p in build(student(teacher)).named_parameters() if NAME not in n)


def test_pairs_are_projected_in_their_order(teacher):
    model = build(student(teacher, pairs=((2, 3), (1, 2))))
    project = projector(model)
    state = torch.randn(2, 5, 16)
    for place, name in enumerate(reversed(NAMES)):
        weight = model.get_parameter(name)
        assert torch.equal(project(place, state), state @ weight.T)
        assert project(place, state.bfloat16()).dtype == torch.float32


def test_equal_widths_and_other_runs_have_none(teacher):
    sizes = {"hidden_size": WIDE, "num_attention_heads": 4, "head_dim": 10}
    assert projector(build(student(teacher, fields=sizes))) is None
    config = student(teacher)
    for other in (
        {"stage": "pretrain"},
        {"distill": None},
        {"distill": distill(teacher, relations=RelationsConfig(heads=2))},
    ):
        assert projector(build(config.model_copy(update=other))) is None


def test_a_student_from_layers_has_them_too(teacher, tmp_path):
    sizes = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 24}
    LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, **sizes)).save_pretrained(tmp_path)
    config = student(teacher, pretrained=str(tmp_path), layers="every:2")
    model = build(config)
    assert [n for n, _ in model.named_parameters() if NAME in n] == NAMES
    assert {n for n, _ in model.named_parameters()} == {f.name for f in describe(config).parameters}


def test_an_export_does_without_them_and_without_the_teacher(teacher, tmp_path):
    config = student(teacher)
    model = build(config).eval()
    gone = config.model_copy(update={"distill": distill(str(tmp_path / "gone"), hidden=config.distill.hidden)})
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0})))
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    save_model(
        gone,
        model.state_dict().items(),
        tmp_path / "export",
        tokenizer_path=Path(tmp_path / "tokenizer"),
        vocabulary=VOCABULARY,
        dtype=torch.float32,
    )
    loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path / "export", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    ids = torch.arange(10)[None]
    assert torch.equal(loaded(input_ids=ids).logits, model(input_ids=ids).logits)


def test_the_shape_of_a_teacher_needs_no_weights(teacher, tmp_path):
    config = student(teacher)
    assert teacher_shape(config) == Shape(layers=3, width=WIDE)
    missing = config.model_copy(update={"distill": distill(str(tmp_path / "none"))})
    with pytest.raises(ConfigError) as raised:
        teacher_shape(missing)
    assert raised.value.problems[0][0] == "distill.teacher.pretrained"
    wrong = TeacherConfig(pretrained=teacher, overrides={"hiden_size": 3})
    with pytest.raises(ConfigError, match=r"distill\.teacher\.overrides\.hiden_size: .* did you mean hidden_size"):
        teacher_shape(config.model_copy(update={"distill": DistillConfig(teacher=wrong)}))


def test_what_is_looked_into(teacher):
    last = distill(teacher, hidden=HiddenConfig(), relations=RelationsConfig(heads=2))
    assert hidden_pairs(last, 2, 3) == ((2, 3),)
    assert wanted_of_student(last, 2) == Wanted((2,), 2)
    assert wanted_of_teacher(last, 3) == Wanted((3,), 3)
    options = RelationsConfig(heads=2, student_layer=1, teacher_layer=2)
    some = distill(teacher, hidden=HiddenConfig(layers=((1, 3), (0, 0), (1, 2))), relations=options)
    assert hidden_pairs(some, 2, 3) == ((1, 3), (0, 0), (1, 2))
    assert wanted_of_student(some, 2) == Wanted((0, 1), 1)
    assert wanted_of_teacher(some, 3) == Wanted((0, 2, 3), 2)
    assert wanted_of_student(distill(teacher), 2) == Wanted((), None)
    assert hidden_pairs(distill(teacher), 2, 3) == ()
    with pytest.raises(ConfigError, match=r"distill\.hidden\.layers\.0: names layer 3 of the teacher, .* to 2"):
        hidden_pairs(some, 2, 2)
    with pytest.raises(ConfigError, match=r"distill\.relations\.teacher_layer: is layer 2, .* has layers 1 to 1"):
        wanted_of_teacher(some, 1)
    with pytest.raises(ConfigError, match="has a pair twice"):
        hidden_pairs(distill(teacher, hidden=HiddenConfig(layers=((1, 1), (1, 1)))), 2, 3)
