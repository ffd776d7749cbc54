"""Models from options: what is built, what its first weights are, what is refused."""

import logging
import math

import pytest
import torch
from model_configs import LENGTH, TINY, VOCABULARY, run_config
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM, RobertaForMaskedLM

from trainer.errors import ConfigError
from trainer.model.build import build_model, position_offset, takes_positions
from trainer.model.configuration import max_positions, model_configuration


def build(config, **options):
    return build_model(config, **{"vocabulary": VOCABULARY, "zero3": None, "dtype": torch.float32, **options})


def weights(model) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.named_parameters()}


def some_ids(batch: int = 2) -> torch.Tensor:
    return torch.randint(0, VOCABULARY, (batch, LENGTH), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", sorted(TINY))
@pytest.mark.parametrize("activation_checkpointing", [False, True])
def test_every_architecture_takes_a_step(name, activation_checkpointing):
    model = build(run_config(name, activation_checkpointing=activation_checkpointing))
    assert model.training
    assert model.config.vocab_size == VOCABULARY
    assert model.config.use_cache is False
    logits = model(input_ids=some_ids(), position_ids=torch.arange(LENGTH).expand(2, -1)).logits
    assert logits.shape == (2, LENGTH, VOCABULARY)
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), some_ids().flatten()).backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())


def test_checkpointed_activations_give_the_same_gradient():
    gradients = []
    for on in (False, True):
        model = build(run_config("llama", activation_checkpointing=on))
        model(input_ids=some_ids()).logits.square().mean().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


class TestFirstWeights:
    @pytest.mark.parametrize("name", sorted(TINY))
    def test_depend_on_nothing_but_seed_and_name(self, name):
        first = weights(build(run_config(name, seed=3)))
        torch.manual_seed(123)
        state = torch.get_rng_state()
        again = weights(build(run_config(name, seed=3)))
        assert torch.equal(torch.get_rng_state(), state)
        other = weights(build(run_config(name, seed=4)))
        assert all(torch.equal(first[key], again[key]) for key in first)
        drawn = [key for key in first if first[key].numel() > 1 and first[key].std() > 0]
        # what is not drawn has a formula: ones, zeros, Mamba's A_log
        assert all(not torch.equal(first[key], other[key]) for key in drawn if "A_log" not in key)
        assert len(drawn) > 5

    def test_of_two_layers_differ(self):
        first = weights(build(run_config("llama")))
        a, b = (first[f"model.layers.{layer}.self_attn.q_proj.weight"] for layer in (0, 1))
        assert not torch.equal(a, b)

    def test_are_the_same_for_a_layer_in_a_deeper_model(self):
        shallow = weights(build(run_config("llama")))
        deep = weights(build(run_config("llama", fields={"num_hidden_layers": 3})))
        assert all(torch.equal(shallow[key], deep[key]) for key in shallow)
        assert len(deep) > len(shallow)

    def test_of_another_type_are_those_of_fp32_rounded(self):
        full = weights(build(run_config("gemma2")))
        half = weights(build(run_config("gemma2"), dtype=torch.bfloat16))
        assert all(torch.equal(half[key], full[key].bfloat16()) for key in full)

    @pytest.mark.parametrize(("name", "std"), [("llama", 0.02), ("gpt2", 0.02), ("bert", 0.02), ("modernbert", 0.02)])
    def test_residual_scaled_divides_the_writers_only(self, name, std):
        fields = {"gpt2": {"n_embd": 128, "n_head": 2}}.get(name, {"hidden_size": 128, "intermediate_size": 128})
        scaled = weights(build(run_config(name, fields=fields, initialisation="residual-scaled")))
        default = weights(build(run_config(name, fields=fields)))
        ends = ("o_proj.weight", "down_proj.weight", "c_proj.weight", "output.dense.weight", "Wo.weight")
        writers = [key for key in scaled if key.endswith(ends)]
        assert len(writers) == 4  # attention and MLP of two layers
        for key in writers:
            assert scaled[key].std().item() == pytest.approx(std / math.sqrt(4), rel=0.05)
        assert all(torch.equal(scaled[key], default[key]) for key in scaled if key not in writers)

    def test_no_row_of_the_embedding_is_frozen(self):
        model = build(run_config("bert"))
        model(input_ids=torch.zeros(1, LENGTH, dtype=torch.long)).logits.square().sum().backward()
        rows = model.get_input_embeddings().weight
        assert rows[0].abs().max() > 0
        assert rows.grad[0].abs().max() > 0


class TestStability:
    def test_logit_soft_capping_bounds_the_logits(self):
        model = build(run_config("gemma2", fields={"initializer_range": 5.0}))
        logits = model(input_ids=some_ids()).logits
        assert 1.0 < logits.abs().max() <= 1.5

    @pytest.mark.parametrize("name", ["qwen3", "olmo2"])
    def test_qk_norm_makes_attention_blind_to_the_scale_of_queries(self, name):
        model = build(run_config(name)).eval()

        @torch.no_grad()
        def logits_with_queries_times(factor: float) -> torch.Tensor:
            for key, parameter in model.named_parameters():
                if "q_proj" in key:
                    parameter.mul_(factor)
            return model(input_ids=some_ids()).logits

        # the first factor lifts the queries far above the norm's epsilon
        before = logits_with_queries_times(1e4)
        torch.testing.assert_close(logits_with_queries_times(50.0), before, rtol=1e-4, atol=1e-5)

    def test_dropout_from_the_fields_is_active_in_training_only(self):
        model = build(run_config("gpt2", fields={"embd_pdrop": 0.5}))
        assert not torch.equal(model(input_ids=some_ids()).logits, model(input_ids=some_ids()).logits)
        model.eval()
        assert torch.equal(model(input_ids=some_ids()).logits, model(input_ids=some_ids()).logits)


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory) -> str:
    torch.manual_seed(7)
    folder = tmp_path_factory.mktemp("pretrained")
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    LlamaForCausalLM(LlamaConfig(vocab_size=300, max_position_embeddings=64, **sizes)).save_pretrained(folder)
    return str(folder)


class TestPretrained:
    def test_weights_are_those_of_the_files(self, pretrained):
        model = build(run_config(pretrained=pretrained, seed=5))
        reference = LlamaForCausalLM.from_pretrained(pretrained)
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), reference.parameters(), strict=True))
        assert model.training
        assert model.config.use_cache is False

    def test_overrides_reach_the_model(self, pretrained):
        model = build(run_config(pretrained=pretrained, overrides={"attention_dropout": 0.5}))
        assert model.model.layers[0].self_attn.attention_dropout == 0.5

    def test_an_unknown_override_is_answered_with_the_nearest(self, pretrained):
        with pytest.raises(ConfigError, match=r"overrides\.attention_dropuot: .* did you mean attention_dropout"):
            build(run_config(pretrained=pretrained, overrides={"attention_dropuot": 0.5}))

    def test_an_override_that_does_not_fit_the_weights_is_refused(self, pretrained):
        with pytest.raises(ConfigError, match="cannot be loaded"):
            build(run_config(pretrained=pretrained, overrides={"intermediate_size": 32}))

    def test_a_larger_tokenizer_is_refused(self, pretrained):
        with pytest.raises(ConfigError, match="has 301 tokens and the model's vocabulary only 300"):
            build(run_config(pretrained=pretrained), vocabulary=301)

    def test_a_directory_that_is_no_model_is_refused(self, tmp_path):
        with pytest.raises(ConfigError, match=r"model\.pretrained: .*cannot be read"):
            build(run_config(pretrained=str(tmp_path)))

    def test_a_head_that_the_files_lack_is_drawn_from_the_seed_and_said(self, tmp_path, caplog):
        sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        BertModel(BertConfig(vocab_size=300, **sizes)).save_pretrained(tmp_path)
        heads = []
        for seed in (1, 1, 2):
            model = build(run_config(pretrained=str(tmp_path), kind="masked", seed=seed))
            heads.append(model.cls.predictions.transform.dense.weight.detach().clone())
        assert torch.equal(heads[0], heads[1])
        assert not torch.equal(heads[0], heads[2])
        said = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING and r.name.startswith("trainer")]
        assert len(said) == 3 + 3  # lacks the head; does not use the pooler
        assert "cls.predictions.transform.dense.weight" in said[0]


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        (run_config(fields={"hidden_sise": 3}), r"model\.config\.hidden_sise: .* did you mean hidden_size\?"),
        (run_config(fields={"model_type": "lama"}), r"'lama' is no architecture of transformers; did you mean llama\?"),
        (run_config(fields={"model_type": None}), r"model\.config\.model_type: is needed"),
        (run_config(fields={"hidden_size": "16"}), "'hidden_size' expected int, got str"),
        (run_config(fields={"num_attention_heads": 3, "head_dim": None}), "not a multiple of the number of attention"),
        (run_config(fields={"vocab_size": 100}), "has 260 tokens and the model's vocabulary only 100"),
        (run_config(length=4096), "4096 tokens are more than the 2048 positions"),
        (run_config("roberta", length=511), "511 tokens are more than the 510 positions"),
        (run_config("llama", kind="masked"), r"no masked language model of type llama \(it has a causal one"),
        (run_config("modernbert", kind="causal"), r"no causal language model of type modernbert \(it has a masked one"),
        (run_config("bert", kind="causal"), r"is_decoder: bert sees the tokens that it is to predict"),
        (run_config("mamba", initialisation="residual-scaled", fields={"initializer_range": 0.0}), "initializer_range"),
        (run_config(attention="flash_attention_2"), r"model\.attention: .*[Ff]lash"),
    ],
)
def test_bad_input_is_refused_in_one_sentence(config, sentence):
    with pytest.raises(ConfigError, match=sentence) as raised:
        build(config)
    assert len(raised.value.problems) == 1


def test_a_bert_decoder_sees_no_future():
    model = build(run_config("bert", kind="causal", fields={"is_decoder": True})).eval()
    ids = some_ids()
    changed = ids.clone()
    changed[:, -1] = (ids[:, -1] + 1) % VOCABULARY
    before, after = model(input_ids=ids).logits, model(input_ids=changed).logits
    assert torch.equal(before[:, :-1], after[:, :-1])
    assert not torch.equal(before[:, -1], after[:, -1])


def test_ids_of_another_tokenizer_are_dropped_and_given_ones_kept():
    assert model_configuration(run_config("gpt2"), VOCABULARY).eos_token_id is None
    assert model_configuration(run_config("gpt2", fields={"eos_token_id": 5}), VOCABULARY).eos_token_id == 5


def test_legacy_rope_fields_and_synonyms_of_the_architecture_are_known():
    assert model_configuration(run_config(fields={"rope_theta": 5e5}), None).rope_parameters["rope_theta"] == 5e5
    assert model_configuration(run_config("gpt2", fields={"max_position_embeddings": 99}), None).n_positions == 99


def test_positions_of_roberta_begin_behind_its_padding():
    roberta = build(run_config("roberta")).eval()
    assert position_offset(roberta) == 2
    ids = some_ids().clamp(min=2)  # 1 is what it calls padding
    given = roberta(input_ids=ids, position_ids=torch.arange(LENGTH).expand(2, -1)).logits
    assert torch.equal(roberta(input_ids=ids).logits, given)
    plain = RobertaForMaskedLM(roberta.config).eval()
    plain.load_state_dict(roberta.state_dict())
    assert torch.equal(plain(input_ids=ids).logits, given)
    assert max_positions(roberta.config) == 510
    assert all(position_offset(build(run_config(name))) == 0 for name in ("llama", "gpt2", "bert"))


def test_boundaries_that_a_model_cannot_see_are_said_or_refused(caplog):
    assert not takes_positions(build(run_config("mamba")))
    assert "data.boundaries=positions has no effect: MambaForCausalLM takes no positions" in caplog.text
    with pytest.raises(ConfigError, match="block needs positions, and MambaForCausalLM takes none"):
        build(run_config("mamba", boundaries="block"))
