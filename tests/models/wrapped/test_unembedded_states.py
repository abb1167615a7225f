"""States unembedded by a wrapped model: by its norm and head, bit for bit, or by a whole run."""

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import loopscope as ls
from loopscope.errors import InputError
from tests.models.wrapped.small import TOKENS, Small
from tests.standins.heads import Scores
from tests.standins.registry import CASES

MECHANICS = (
    "depth", "gated", "recurring", "two_clocks", "tied_but_norms", "relaxed", "lora_per_loop",
    "mesh_port", "token_routed", "plain", "formed_named", "fused",
)  # fmt: skip
WITH_LOGITS = [case for case in CASES if case.name in MECHANICS]


def noise(like):
    return torch.randn(like.shape, generator=torch.Generator().manual_seed(1)).to(like)


def unembedded(model, state, tokens=TOKENS):
    with torch.no_grad():
        return torch.stack(list(model.unembed_state(state, tokens)))


@pytest.mark.parametrize("case", WITH_LOGITS, ids=lambda case: case.name)
def test_h_out_gives_the_models_own_logits_bit_for_bit_and_another_state_does_not(case):
    model = ls.wrap(case.make(), example=TOKENS, **({"spec": case.spec} if case.spec else {}))
    trajectory = model.capture(TOKENS, logits=True)
    with torch.no_grad():
        if model.unembeds_alone(TOKENS):
            [rows] = model.unembed_state(trajectory.h_out.flatten(0, 1)[None], TOKENS)
            assert torch.equal(rows, trajectory.logits.flatten(0, 1))
        else:
            assert torch.equal(unembedded(model, trajectory.h_out), trajectory.logits)
        other = unembedded(model, noise(trajectory.h_out))
        assert other.shape == trajectory.logits.shape
        assert not torch.allclose(other, trajectory.logits)


def hugging_face(kind):
    torch.manual_seed(0)
    if kind == "gpt2":
        model = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=32, n_layer=3, n_head=2)).eval()
        return model, model.transformer.ln_f
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=3,
            num_attention_heads=2, num_key_value_heads=2,
        )
    ).eval()  # fmt: skip
    return model, model.model.norm


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_a_state_is_read_by_the_final_norm_and_the_head(kind):
    module, norm = hugging_face(kind)
    with torch.no_grad():
        for gain in (norm.weight, getattr(norm, "bias", None)):
            if gain is not None:
                gain.add_(0.3 * noise(gain))
        model = ls.wrap(module, example=TOKENS)
        trajectory = model.capture(TOKENS, logits=True)
        for state in (trajectory.h_emb, trajectory.h_out, noise(trajectory.h_out)):
            wanted = module.lm_head(norm(state))
            torch.testing.assert_close(unembedded(model, state), wanted, rtol=1e-5, atol=1e-6)
    assert model.unembeds_alone(TOKENS)


BY_HAND = {
    "capped": lambda m, x: 5 * torch.tanh(m.norm(x) @ m.embed.weight.T / 5),
    "soft_module": lambda m, x: m.unembed(m.norm(x)).log_softmax(-1),
    "method": lambda m, x: 0.5 * (m.norm(x) @ m.embed.weight.T),
    "cropped": lambda m, x: m.norm(x) @ m.embed.weight[:61].T,
    "parameter": lambda m, x: m.norm(x) @ m.matrix,
}


@pytest.mark.parametrize("head", BY_HAND)
def test_what_follows_the_head_is_part_of_it(head):
    module = Scores(head, rows=64 if head == "cropped" else 61)
    model = ls.wrap(module, example=TOKENS)
    state = noise(model.capture(TOKENS).h_out)
    with torch.no_grad():
        wanted = BY_HAND[head](module, state)
    torch.testing.assert_close(unembedded(model, state), wanted, rtol=1e-5, atol=1e-5)
    assert model.unembeds_alone(TOKENS) == (head in ("cropped", "parameter"))


def test_hooks_of_the_final_norm_are_called():
    module = Small()
    model = ls.wrap(module, example=TOKENS)
    state = noise(model.capture(TOKENS).h_out)
    plain = unembedded(model, state)
    with torch.no_grad():
        wanted = module.head(2 * module.norm(state))
    model.add_hook("norm.hook_out", lambda x, hook: 2 * x)
    assert not model.unembeds_alone(TOKENS)
    torch.testing.assert_close(unembedded(model, state), wanted)
    model.reset_hooks()
    assert torch.equal(unembedded(model, state), plain)


def test_a_model_that_changed_its_weights_is_read_by_the_new_ones():
    module = Small()
    model = ls.wrap(module, example=TOKENS)
    state = noise(model.capture(TOKENS).h_out)
    before = unembedded(model, state)
    with torch.no_grad():
        module.head.weight.mul_(2)
        wanted = module.head(module.norm(state))
    found = unembedded(model, state)
    torch.testing.assert_close(found, wanted)
    assert not torch.allclose(found, before)


def test_a_model_without_logits_says_so():
    model = ls.wrap(Scores("none"), example=TOKENS)
    state = noise(torch.empty(2, 8, 32))
    with pytest.raises(InputError, match="has no logits: the model returns no logits"):
        model.unembed_state(state, TOKENS)
    with pytest.raises(InputError, match="give the model's tokens"):
        ls.wrap(Small(), example=TOKENS).unembed_state(state)


def test_layers_are_named_by_block_and_place():
    model = ls.wrap(Small(), example=TOKENS)
    assert list(model.layer_hooks()) == [
        "prelude.0", "core1.0", "core2.0", "core3.0", "core4.0", "coda.0",
    ]  # fmt: skip
    _, cache = model.run_with_cache(TOKENS, names_filter=list(model.layer_hooks().values()))
    trajectory = model.capture(TOKENS)
    assert torch.equal(cache[model.layer_hooks()["core2.0"]], trajectory.h_m[1])
    assert torch.equal(cache[model.layer_hooks()["coda.0"]], trajectory.h_out)
