"""Trajectories: the paper's names, shapes, and where each value comes from."""

import dataclasses

import pytest
import torch

from loopscope.models.native.loop_model import LoopModel
from loopscope.probes.state_capture import capture
from tests.conftest import make_model


def test_a_trajectory_has_K_plus_1_states_and_K_outputs(tokens):
    tr = capture(make_model("mesh", "2+1R4+1"), tokens)
    assert (tr.K, len(tr.h), len(tr.h_m), len(tr.memory), len(tr.w_write)) == (4, 5, 4, 4, 4)
    assert list(tr.states) == ["h_emb", "h0", "h1", "h2", "h3", "h4", "h_out"]
    assert list(tr.blocks) == ["prelude", "core1", "core2", "core3", "core4", "coda"]
    assert tr.memory[0].shape == (2, 7, 11, 32)
    assert tr.transition.w_read.shape == (2, 11, 7)
    with pytest.raises(dataclasses.FrozenInstanceError):
        tr.h_emb = None


def test_blocks_hold_the_raw_output_not_the_mixed_state(tokens):
    tr = capture(make_model("residual"), tokens)
    before, after = tr.blocks["core1"]
    assert before is tr.h[0] and after is tr.h_m[0]
    torch.testing.assert_close(after + before, tr.h[1])
    assert not torch.allclose(after, tr.h[1])
    assert tr.blocks["coda"][0] is tr.h[-1] and tr.blocks["coda"][1] is tr.h_out


def test_parts_without_layers_are_left_out(tokens):
    tr = capture(make_model("base", "0+1R3+0"), tokens)
    assert list(tr.blocks) == ["core1", "core2", "core3"]
    assert torch.equal(tr.h[0], tr.h_emb) and torch.equal(tr.h[-1], tr.h_out)


def test_a_plain_stack_has_embedding_prelude_and_output(tokens):
    tr = capture(make_model("vanilla", "3"), tokens)
    assert (tr.K, list(tr.blocks), list(tr.states)) == (0, ["prelude"], ["h_emb", "h0", "h_out"])


def test_models_without_slots_have_no_memory(tokens):
    tr = capture(make_model("anchor"), tokens)
    assert (tr.memory, tr.w_write, tr.w_read, tr.transition) == (None, None, None, None)


def test_the_buffer_is_kept_only_when_asked_for(tokens):
    model = make_model("mesh")
    tr = capture(model, tokens, memory=False)
    assert tr.memory is None and tr.transition.memory is None
    assert torch.equal(tr.w_write[2], capture(model, tokens).w_write[2])


def test_router_weights_are_distributions_over_slots(tokens):
    tr = capture(make_model("mesh", noise=0.2), tokens)
    for weights in (*tr.w_write, *tr.w_read, tr.transition.w_write, tr.transition.w_read):
        torch.testing.assert_close(weights.sum(-1), torch.ones(2, 11))
        assert weights.min() > 0 and weights.std() > 0.01


def test_capture_carries_no_gradients_and_leaves_no_hooks(tokens):
    model = make_model("mesh")
    tr = capture(model, tokens)
    assert not any(state.requires_grad for state in tr.states.values())
    assert not model.list_hooks()


def test_captured_states_in_bfloat16_and_under_inference_mode(tokens):
    model = make_model("mesh").to(torch.bfloat16)
    with torch.inference_mode():
        tr = capture(model, tokens)
    assert tr.h[2].dtype == torch.bfloat16 and tr.h[2].isfinite().all()


def test_a_trajectory_shows_itself(tokens):
    html = capture(make_model("mesh"), tokens)._repr_html_()
    assert "2 × 11 tokens, d_model 32, K=3, 6 slots" in html
    assert html.count("<tr>") == 7


def test_a_model_shows_itself_briefly():
    model = make_model("mesh")
    assert repr(model).startswith("LoopModel 'mesh': mesh 1+2R3+1, K=3")
    html = model._repr_html_()
    assert "6 slots" in html and "core2: blocks 3…4" in html
    assert isinstance(model, LoopModel)
