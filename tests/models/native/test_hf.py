"""Hugging Face's GPTNeoXForCausalLM as the oracle of block, rotary, import."""

import json

import pytest
import torch
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from loopscope.errors import InputError
from loopscope.models.native.gpt_neox import config_from_hf
from loopscope.models.opening.loading import load

SETTINGS = {
    "vocab_size": 53,
    "hidden_size": 48,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "intermediate_size": 100,
    "max_position_embeddings": 64,
    "attention_dropout": 0.0,
    "hidden_dropout": 0.0,
    "initializer_range": 0.2,
    "tie_word_embeddings": False,
}


def hf_model(rotary_pct: float = 0.25, base: float = 10000.0, **changes) -> GPTNeoXForCausalLM:
    torch.manual_seed(0)
    rope = {"rope_type": "default", "rope_theta": base, "partial_rotary_factor": rotary_pct}
    model = GPTNeoXForCausalLM(GPTNeoXConfig(**{**SETTINGS, "rope_parameters": rope, **changes}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return model.eval()


@pytest.fixture
def ids():
    return torch.randint(53, (2, 40), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"use_parallel_residual": False},
        {"tie_word_embeddings": True},
        {"rotary_pct": 1.0, "base": 5000.0},
        {"rotary_pct": 0.5, "use_parallel_residual": False, "tie_word_embeddings": True},
        {"rotary_pct": 0.3},
        {"attention_bias": False},
        {"hidden_act": "gelu_new"},
        {"hidden_act": "relu"},
    ],
)
def test_logits_equal_hugging_faces(tmp_path, ids, changes):
    hf = hf_model(**changes)
    hf.save_pretrained(tmp_path / "m")
    ours = load(tmp_path / "m")
    with torch.no_grad():
        theirs, mine = hf(ids).logits, ours(ids)
    assert (mine - theirs).abs().max() / theirs.abs().max() < 1e-5


def test_float64_differs_only_by_hugging_faces_float32_rotary_tables(tmp_path, ids):
    hf = hf_model().double()
    hf.save_pretrained(tmp_path / "m")
    ours = load(tmp_path / "m", dtype="float64")
    with torch.no_grad():
        theirs, mine = hf(ids).logits, ours(ids)
        scale = theirs.abs().max()
        assert 1e-12 < (mine - theirs).abs().max() / scale < 1e-6

        def exact(x, position_ids):
            freq = 1.0 / 10000.0 ** (torch.arange(0, 3, 2, dtype=torch.float64) / 3)
            angle = torch.cat([position_ids[..., None].double() * freq] * 2, dim=-1)
            return angle.cos(), angle.sin()

        hf.gpt_neox.rotary_emb.forward = exact
        assert (ours(ids) - hf(ids).logits).abs().max() / scale < 1e-13


def test_every_layer_state_equals_hugging_faces(tmp_path, ids):
    hf = hf_model()
    hf.save_pretrained(tmp_path / "m")
    ours = load(tmp_path / "m")
    with torch.no_grad():
        states = hf(ids, output_hidden_states=True).hidden_states
    _, cache = ours.run_with_cache(ids)
    for v in range(5):
        torch.testing.assert_close(
            cache[f"blocks.{v}.hook_resid_pre"], states[v], rtol=1e-5, atol=1e-5
        )
    torch.testing.assert_close(cache["ln_final.hook_normalized"], states[5], rtol=1e-5, atol=1e-5)


def test_attention_patterns_equal_hugging_faces(tmp_path, ids):
    hf = hf_model()
    hf.save_pretrained(tmp_path / "m")
    ours = load(tmp_path / "m")
    hf.set_attn_implementation("eager")
    with torch.no_grad():
        theirs = hf(ids, output_attentions=True).attentions
    _, cache = ours.run_with_cache(ids, names_filter=lambda n: n.endswith("hook_pattern"))
    for v in range(5):
        torch.testing.assert_close(cache["pattern", v], theirs[v], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("layout", ["2+1+1+1", "0+5R1+0", "0+2+3+0", "5"])
def test_regrouping_layers_leaves_the_model_unchanged(tmp_path, ids, layout):
    hf_model().save_pretrained(tmp_path / "m")
    plain, grouped = load(tmp_path / "m"), load(tmp_path / "m", layout=layout)
    assert str(grouped.config.layout) == layout
    with torch.no_grad():
        assert torch.equal(plain(ids), grouped(ids))


def test_regrouping_leaves_frozen_weights_frozen_and_shared(tmp_path):
    hf_model().save_pretrained(tmp_path / "m")
    model = load(tmp_path / "m")
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    twin = model.with_layout("1+3+1")
    assert not any(p.requires_grad for m in (model, twin) for p in m.parameters())
    assert twin.core[0].mlp.up.weight is model.prelude[1].mlp.up.weight


@pytest.mark.parametrize("layout", ["2+1+1", "1+2R2+0", "6"])
def test_a_layout_that_does_not_fit_is_refused(tmp_path, layout):
    hf_model().save_pretrained(tmp_path / "m")
    with pytest.raises(InputError, match=r"does not fit: 'm' has 5"):
        load(tmp_path / "m", layout=layout)


def test_sharded_and_pickled_weights_load(tmp_path, ids):
    hf = hf_model()
    hf.save_pretrained(tmp_path / "shards", max_shard_size="100KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    hf.save_pretrained(tmp_path / "bin")
    (tmp_path / "bin" / "model.safetensors").unlink()
    torch.save(hf.state_dict(), tmp_path / "bin" / "pytorch_model.bin")
    with torch.no_grad():
        one, two = load(tmp_path / "shards")(ids), load(tmp_path / "bin")(ids)
        assert torch.equal(one, two)
        torch.testing.assert_close(one, hf(ids).logits, rtol=1e-4, atol=1e-4)
    (tmp_path / "shards" / "model-00002-of-00003.safetensors").unlink(missing_ok=True)
    next((tmp_path / "shards").glob("*.safetensors")).unlink(missing_ok=True)
    with pytest.raises(InputError, match="lacks weight files"):
        load(tmp_path / "shards")


class Payload:
    def __reduce__(self):
        return (exec, ("raise SystemExit('code of a checkpoint was run')",))


def test_code_in_a_pickle_is_never_run(tmp_path):
    hf_model().save_pretrained(tmp_path / "m")
    (tmp_path / "m" / "model.safetensors").unlink()
    torch.save({"x": Payload()}, tmp_path / "m" / "pytorch_model.bin")
    with pytest.raises(InputError, match="cannot be read as plain tensors"):
        load(tmp_path / "m")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_act": "mish"}, "hidden_act 'mish'"),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, "'linear'"),
        (
            {"rope_scaling": {"type": "linear"}, "rope_parameters": {"rope_type": "default"}},
            "'linear'",
        ),
        ({"hidden_size": 0}, "d_model must be a positive"),
    ],
)
def test_settings_that_cannot_be_computed_are_refused(change, message):
    values = {**SETTINGS, "model_type": "gpt_neox", **change}
    with pytest.raises(InputError, match=message):
        config_from_hf(values, "config.json")


def test_old_configuration_keys_are_understood():
    values = {**SETTINGS, "rotary_pct": 0.75, "rotary_emb_base": 500, "rope_scaling": None}
    config = config_from_hf(values, "config.json")
    assert (config.rotary_pct, config.rotary_base) == (0.75, 500.0)


def test_missing_and_extra_tensors_are_named(tmp_path):
    hf = hf_model()
    hf.save_pretrained(tmp_path / "m")
    values = json.loads((tmp_path / "m" / "config.json").read_text())
    (tmp_path / "m" / "config.json").write_text(json.dumps({**values, "num_hidden_layers": 6}))
    with pytest.raises(InputError, match=r"missing: prelude\.5\.ln1\.weight.* and \d+ more"):
        load(tmp_path / "m")
    (tmp_path / "m" / "config.json").write_text(json.dumps({**values, "num_hidden_layers": 4}))
    with pytest.raises(InputError, match=r"not expected: prelude\.4\."):
        load(tmp_path / "m")
