"""`trimtab evaluate` on model directories, over files: every kind of model, and every way in which they do not fit."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from sklearn.metrics import accuracy_score
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, pipeline

from trainer.errors import DataError
from trainer.evaluate import main, parse_noise
from trainer.stages.any_model import AnyModel
from trainer.stages.looking import look

TEXT = "the film is a very good long bad dull story of two rivers and one house"
WORDS = TEXT.split()
SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}


def tokenizer(folder: Path, *, padding: bool = True) -> int:
    """As BERT's; returns the size of its vocabulary."""
    letters = "abcdefghijklmnopqrstuvwxyz0123456789.,"
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    names += [each for each in letters if each not in WORDS] + [f"##{each}" for each in letters]
    backend = Tokenizer(models.WordPiece({name: n for n, name in enumerate(names)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    pair = "[CLS] $A [SEP] $B:1 [SEP]:1"
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair=pair, special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    roles = {f"{role}_token": f"[{role.upper()}]" for role in ("unk", "cls", "sep", "mask") + ("pad",) * padding}
    PreTrainedTokenizerFast(tokenizer_object=backend, **roles).save_pretrained(folder)
    return len(names)


def save(folder: Path, model: str, seed: int = 0, *, padding: bool = True, **options: Any) -> Path:
    torch.manual_seed(seed)
    size = tokenizer(folder, padding=padding)
    if model.startswith("Bart"):
        sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2}
        sizes |= {"decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24}
        roles = {"bos_token_id": 2, "eos_token_id": 3, "decoder_start_token_id": 2, "forced_eos_token_id": None}
        config = transformers.BartConfig(vocab_size=size, pad_token_id=0, init_std=0.5, **sizes, **roles)
    elif model.startswith("Llama"):
        config = transformers.LlamaConfig(vocab_size=size, num_key_value_heads=2, eos_token_id=3, **SIZES)
    else:
        config = transformers.BertConfig(vocab_size=size, max_position_embeddings=48, **SIZES, **options)
        config.initializer_range = 0.5
    getattr(transformers, model)(config).save_pretrained(folder)
    return folder


def labels(*names: str) -> dict[str, Any]:
    return {"id2label": dict(enumerate(names)), "label2id": {name: n for n, name in enumerate(names)}}


def classifier(folder: Path, seed: int = 3, names: tuple[str, ...] = ("bad", "dull", "good"), **options: Any) -> Path:
    return save(folder, "BertForSequenceClassification", seed, **labels(*names), **options)


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def reviews(number: int = 21) -> list[dict[str, Any]]:
    generator = np.random.default_rng(0)
    names = ("bad", "dull", "good")
    texts = [" ".join(generator.choice(WORDS, generator.integers(2, 9))) for _ in range(number)]
    return [{"text": text, "label": names[n % 3]} for n, text in enumerate(texts)]


def evaluated(tmp_path: Path, *arguments: object) -> dict[str, Any]:
    out = tmp_path / "out.json"
    options = ("--device=cpu", "--resamples=50", f"--json={out}")
    assert main([*map(str, arguments), *options]) == 0
    found: dict[str, Any] = json.loads(out.read_text())
    return found


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """One sentence, exit code 2, nothing printed."""
    assert main([*map(str, arguments), "--device=cpu", "--resamples=20"]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    (line,) = [line for line in said.err.splitlines() if line.startswith("trimtab:")]
    return line


def test_a_classifier_beside_its_pipeline(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, rows = classifier(tmp_path / "model"), reviews()
    data = write(tmp_path / "rows.jsonl", rows)
    (found,) = evaluated(tmp_path, model, "--data", data, "--label", "label", "--batch=4")["models"]
    told = pipeline("text-classification", model=str(model), device="cpu")([row["text"] for row in rows])
    assert found["scores"]["accuracy"] == accuracy_score([r["label"] for r in rows], [one["label"] for one in told])
    assert found["classes"] == ["bad", "dull", "good"]
    assert np.sum(found["confusion"]) == found["texts"] == 21
    assert set(found["intervals"]) == set(found["scores"])
    wrong = found["worst"][0]
    assert wrong["truth"] != wrong["prediction"]
    number = int(wrong["where"].split()[-1]) - 1
    assert wrong["text"] == rows[number]["text"]
    shown = capsys.readouterr().out
    assert "Confusion" in shown
    assert "Worst errors" in shown


def test_models_are_compared_and_their_classes_matched_by_name(tmp_path: Path) -> None:
    """The second model is the first with its classes in another order: nothing differs but rounding."""
    first, second = classifier(tmp_path / "one"), classifier(tmp_path / "two", names=("good", "bad", "dull"))
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(first)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(second)
    model.load_state_dict(theirs.state_dict())
    with torch.no_grad():
        # good, bad, dull of the second are rows 2, 0, 1 of the first
        model.classifier.weight.copy_(theirs.classifier.weight[[2, 0, 1]])
        model.classifier.bias.copy_(theirs.classifier.bias[[2, 0, 1]])
    model.save_pretrained(second)
    other = classifier(tmp_path / "other", seed=6)
    data = write(tmp_path / "rows.jsonl", reviews())
    found = evaluated(tmp_path, first, second, other, "--compare", "--data", data, "--label=label")
    assert [(one["first"], one["second"]) for one in found["comparisons"]] == [
        ("one", "two"), ("one", "other"), ("two", "other")
    ]  # fmt: skip
    same, apart, _ = (one["scores"]["accuracy"] for one in found["comparisons"])
    assert (same["difference"], same["p_value"], same["test"]) == (0, 1, "mcnemar")
    assert apart["p_value"] <= 1
    flips = np.array(found["flips"])
    assert flips[0, 1] == 0
    assert (flips == flips.T).all()
    assert flips[0, 2] == flips[1, 2] > 0


def test_noise_is_seeded_and_changes_predictions(tmp_path: Path) -> None:
    model, data = classifier(tmp_path / "model"), write(tmp_path / "rows.jsonl", reviews())
    arguments = (model, "--data", data, "--label=label", "--noise=typos=0.3,delete=0.2")
    found, again, other = (evaluated(tmp_path, *arguments, f"--seed={seed}") for seed in (1, 1, 2))
    assert found == again
    noisy = found["models"][0]["noisy"]
    assert 0 < noisy["flips"] < 1
    assert noisy != other["models"][0]["noisy"]
    assert found["models"][0]["scores"] == other["models"][0]["scores"]


def test_numbers_and_several_labels(tmp_path: Path) -> None:
    rows = [{"text": row["text"], "score": n / 7, "topics": ["a", "c"][: n % 3]} for n, row in enumerate(reviews())]
    data = write(tmp_path / "rows.jsonl", rows)
    number = save(tmp_path / "number", "BertForSequenceClassification", num_labels=1, problem_type="regression")
    (found,) = evaluated(tmp_path, number, "--data", data, "--label=score")["models"]
    assert set(found["scores"]) == {"pearson", "spearman", "mse", "mae"}
    options = labels("a", "b", "c") | {"problem_type": "multi_label_classification"}
    several = save(tmp_path / "several", "BertForSequenceClassification", **options)
    (found,) = evaluated(tmp_path, several, "--data", data, "--label=topics")["models"]
    assert [one["support"] for one in found["by_class"]] == [14, 0, 7]
    assert "leaves out" in "".join(found["notes"])


def test_words(tmp_path: Path) -> None:
    names = ("O", "B-X", "I-X")
    model = save(tmp_path / "model", "BertForTokenClassification", **labels(*names))
    rows = [{"text": ["the", "film", "unknown"], "tags": ["O", "B-X", "I-X"]}, {"text": ["good"], "tags": ["O"]}]
    (found,) = evaluated(tmp_path, model, "--data", write(tmp_path / "r.jsonl", rows), "--label=tags")["models"]
    assert found["kind"] == "token_classification"
    assert {"accuracy", "f1", "precision", "recall"} <= set(found["scores"])
    assert found["by_class"][0]["support"] == 1


def test_questions_over_windows_of_a_long_text(tmp_path: Path) -> None:
    model = save(tmp_path / "model", "BertForQuestionAnswering")
    long = " ".join(WORDS * 8)
    rows = [{"text": long, "question": "the house ?", "answers": {"text": ["two rivers"]}}]
    rows += [{"text": "a good film", "question": "is it ?", "answers": "good"}]
    data = write(tmp_path / "rows.jsonl", rows)
    arguments = (model, "--data", data, "--label=answers", "--second=question")
    (found,) = evaluated(tmp_path, *arguments)["models"]
    assert set(found["scores"]) == {"exact_match", "f1"}
    assert "1 × longer than the model takes, and read in windows" in found["notes"]
    assert all(one["prediction"] in long + " a good film" for one in found["worst"])


@pytest.mark.parametrize("model", ["BartForConditionalGeneration", "LlamaForCausalLM"])
def test_generated_texts(tmp_path: Path, model: str) -> None:
    rows = [{"text": row["text"], "answer": row["text"][:20]} for row in reviews(5)]
    folder, data = save(tmp_path / "model", model), write(tmp_path / "rows.jsonl", rows)
    (found,) = evaluated(tmp_path, folder, "--data", data, "--label=answer", "--tokens=6", "--batch=2")["models"]
    assert {"loss", "perplexity", "bleu", "chrf", "rouge1", "rouge_l"} <= set(found["scores"])
    assert found["scores"]["perplexity"] == pytest.approx(np.exp(found["scores"]["loss"]))
    assert len(found["generated"]) == 3
    assert any(note.startswith("bleu: nrefs:1") for note in found["notes"])


@pytest.mark.parametrize("role", ["eos_token", "sep_token"])
def test_a_text_to_be_written_ends_once(tmp_path: Path, role: str) -> None:
    folder = save(tmp_path / "model", "BartForConditionalGeneration")
    words = transformers.AutoTokenizer.from_pretrained(folder)
    # which the tokenizer puts behind a text itself, or does not
    words.eos_token = "[SEP]" if role == "sep_token" else "[MASK]"
    words.save_pretrained(folder)
    model = AnyModel.load(folder, None, 6, "cpu")
    end = model.tokenizer.eos_token_id
    found = model._targets(["a good film", "it is a very long story of two rivers"])
    for row in found:
        tokens = row[row >= 0]
        assert tokens[-1] == end
        assert (tokens == end).sum() == 1
        assert len(tokens) <= 6


TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}] {{ m.content }} [SEP]{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


@pytest.mark.parametrize("template", [None, TEMPLATE])
def test_a_language_model_is_asked_as_it_has_learned(tmp_path: Path, template: str | None) -> None:
    folder = save(tmp_path / "model", "LlamaForCausalLM")
    words = transformers.AutoTokenizer.from_pretrained(folder)
    words.chat_template = template
    words.save_pretrained(folder)
    rows = [{"text": "is it good", "answer": "a very long story"}, {"text": "who", "answer": "two"}]
    data = write(tmp_path / "rows.jsonl", rows)
    (found,) = evaluated(tmp_path, folder, "--data", data, "--label=answer", "--tokens=5", "--batch=2")["models"]
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    total, targets, written = 0.0, 0, []
    for row in rows:
        begins, ends = (
            (f"{row['text']}\n", "") if template is None else (f"[user] {row['text']} [SEP][assistant]", "[SEP]")
        )
        asked, right = (
            words(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
            for text in (begins, f"{row['answer']} {ends}")
        )
        whole = torch.cat([asked, right], dim=1)
        with torch.no_grad():
            logits = model(whole).logits[0, asked.shape[1] - 1 : -1].double()
            out = model.generate(asked, max_new_tokens=5, do_sample=False)
        total += float(torch.nn.functional.cross_entropy(logits, right[0], reduction="sum"))
        targets += right.shape[1]
        written.append(words.decode(out[0, asked.shape[1] :], skip_special_tokens=True).strip())
    assert found["scores"]["loss"] == pytest.approx(total / targets, rel=1e-5)
    assert found["generated"] == written


def test_a_page_about_the_worst_errors_and_a_given_text(tmp_path: Path) -> None:
    model, data, page = classifier(tmp_path / "model"), write(tmp_path / "rows.jsonl", reviews()), tmp_path / "in.html"
    options = ("--label=label", "--errors=2", f"--look={page}", "--sentence=a <b>good</b> house")
    (found,) = evaluated(tmp_path, model, "--data", data, *options)["models"]
    html = page.read_text()
    assert html.count("<h2>") == html.count("data:image/png;base64,") == 3
    assert "given: a &lt;b&gt;good&lt;/b&gt; house" in html
    assert "<b>" not in html
    for error in found["worst"]:
        assert f"is {error['truth']}, predicted {error['prediction']}" in html


def test_a_look_inside_is_refused_where_there_is_nothing_to_see(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write(tmp_path / "rows.jsonl", reviews(3))
    model = classifier(tmp_path / "model")
    assert "add --look FILE.html" in refused(capsys, model, "--data", data, "--label=label", "--sentence=x")


def test_what_was_looked_into_is_in_tensorboard_too(tmp_path: Path) -> None:
    model = AnyModel.load(classifier(tmp_path / "model"), None, None, "cpu")
    for texts in (["old", "older", "oldest"], ["a good | house", "a bad film"]):
        look(model, [(f"given: {text}", text) for text in texts], tmp_path / "in.html", "Inside", tmp_path / "board")
    events = EventAccumulator(str(tmp_path / "board" / "inside"), size_guidance={"images": 0, "tensors": 0}).Reload()
    assert sorted(events.Tags()["images"]) == ["5 inside/1 attention", "5 inside/2 attention"]
    assert sorted(events.Tags()["tensors"]) == ["5 inside/1", "5 inside/2"]
    card = events.Tensors("5 inside/1")[0].tensor_proto.string_val[0].decode()
    assert card.startswith("**given: a good \\| house**")
    rows = [line.split(" | ") for line in card.splitlines() if line.startswith("| ") and "---" not in line][1:]
    # in its note stands what all of them add together
    (said,) = re.findall(r"the tokens add ([+-][0-9.]+)", card)
    assert sum(float(row[1]) for row in rows) == pytest.approx(float(said), abs=1e-3)


def test_what_a_model_should_say_is_to_be_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, data = save(tmp_path / "model", "BartForConditionalGeneration"), write(tmp_path / "r.jsonl", reviews(3))
    assert "is a seq2seq model: say with --label which column" in refused(capsys, folder, "--data", data)


def test_long_texts_and_missing_padding_are_counted(tmp_path: Path) -> None:
    model = classifier(tmp_path / "model", padding=False)
    rows = [*reviews(4), {"text": " ".join(WORDS * 5), "label": "bad"}, {"text": "good", "label": 2}]
    (found,) = evaluated(tmp_path, model, "--data", write(tmp_path / "r.jsonl", rows), "--label=label")["models"]
    assert set(found["notes"]) >= {
        "1 × longer than the model takes, and cut",
        "1 × no padding token: texts are evaluated one at a time",
        "1 × labels given as numbers, taken as places among the model's",
    }


@pytest.mark.parametrize(
    ("rows", "text"),
    [
        ([{"text": "a", "label": "great"}], "holds 'great', which is no label of the model; it knows bad, dull, good"),
        ([{"text": "a", "label": 3}], "holds the label 3, and the model has 3: 0 … 2"),
        ([{"text": " ", "label": "bad"}], "record 1: the text in column 'text' is empty"),
        ([{"body": "a", "label": "bad"}], "has no column 'text', only 'body', 'label': name it with --text"),
        ([{"text": "a"}], "has no column 'label'"),
        ([], "holds no record"),
    ],
)
def test_a_file_that_does_not_fit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], rows: list[dict[str, Any]], text: str
) -> None:
    model, data = classifier(tmp_path / "model"), write(tmp_path / "rows.jsonl", rows)
    assert text in refused(capsys, model, "--data", data, "--label", "label")


def test_commands_that_make_no_sense(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, data = classifier(tmp_path / "model"), write(tmp_path / "rows.jsonl", reviews(3))
    assert "is no directory" in refused(capsys, tmp_path / "none")
    (tmp_path / "empty").mkdir()
    assert "neither a run" in refused(capsys, tmp_path / "empty")
    assert "brings no data: add --data" in refused(capsys, model)
    assert "is no file" in refused(capsys, model, "--data", tmp_path / "none.jsonl")
    assert "at least two" in refused(capsys, model, "--compare", "--data", data)
    assert "named twice" in refused(capsys, model, model, "--data", data)
    assert "--checkpoint" in refused(capsys, model, "--data", data, "--checkpoint=x")
    assert "`pip install lm-eval`" in refused(capsys, model, "--data", data, "--lm-eval=arc_easy")
    other = classifier(tmp_path / "other", names=("no", "yes"))
    said = refused(capsys, model, other, "--data", data, "--label=label")
    assert "the data has the label bad, dull, good" in said
    tags = save(tmp_path / "tags", "BertForTokenClassification", **labels("O", "B-X"))
    rows = write(tmp_path / "tags.jsonl", [{"text": ["a", "b"], "tags": ["O"]}])
    assert "2 words and 1 tags" in refused(capsys, tags, "--data", rows, "--label=tags")


@pytest.mark.parametrize("text", ["typos", "typos=0", "typos=1.5", "shout=0.1", "typos=a"])
def test_noise_that_is_none(text: str) -> None:
    with pytest.raises(DataError, match="--noise"):
        parse_noise(text)


def test_noise_by_name() -> None:
    assert parse_noise("typos=0.05, delete=0.1") == {"typos": 0.05, "delete": 0.1}
    assert parse_noise(None) == {}
