"""Passes resumed from the middle give the bits of a whole pass, whatever changes from there on."""

import pytest
import torch

from loopscope.models.native.loop_model import LoopModel
from tests.conftest import make_model

MODELS = [
    ("vanilla", "1+2+1+1"), ("base", "1+1R2+1"), ("residual+anchor", "0+1R2+0"),
    ("anchor_emb", "1+1R2+0"), ("static", "1+1R2+0"), ("dynamic", "1+1R2+1"), ("mesh", "1+2R2+1"),
    ("mesh", "0+1R2+0"),
]  # fmt: skip


def kept(model: LoopModel, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    _, cache = model.run_with_cache(tokens, names_filter=model.checkpoint_hooks())
    return {name: cache[name] for name in model.checkpoint_hooks()}


def louder(x, hook):
    return 1.1 * x


@pytest.mark.parametrize(("variant", "layout"), MODELS)
def test_a_pass_resumed_at_any_hook_gives_the_bits_of_a_whole_one(variant, layout, tokens):
    model = make_model(variant, layout, noise=0.2, parallel_residual=variant != "static")
    states = kept(model, tokens)
    plain = model(tokens)
    for name in model.hook_dict:
        hooks = [(name, louder)]
        whole = model.run_with_hooks(tokens, fwd_hooks=hooks)
        assert torch.equal(model.resume(tokens, states, hooks, [name]), whole), name
        neutral = name.endswith(("ln1.hook_scale", "ln2.hook_scale", "ln_final.hook_scale"))
        assert neutral or not torch.equal(whole, plain), name


@pytest.mark.parametrize("name", ["loop.1.hook_out", "blocks.4.hook_mlp_out", "coda.hook_in"])
def test_nothing_before_the_first_changed_hook_runs(name, tokens):
    model = make_model("mesh")
    states = kept(model, tokens)
    ran: list[str] = []

    def note(x, hook):
        ran.append(hook.name)

    points = ["hook_embed", "loop.0.hook_in", "loop.1.hook_in", "blocks.2.hook_resid_pre"]
    model.resume(tokens, states, [*((p, note) for p in points), (name, louder)], [name])
    assert not ran


def test_a_pass_is_resumed_at_the_earliest_of_several_hooks(tokens):
    model = make_model("mesh", noise=0.2)
    hooks = [("loop.2.hook_in", louder), ("loop.0.hook_out", louder)]
    whole = model.run_with_hooks(tokens, fwd_hooks=hooks)
    names = [name for name, _ in hooks]
    assert torch.equal(model.resume(tokens, kept(model, tokens), hooks, names), whole)


def test_with_hooks_that_stay_a_model_runs_whole(tokens):
    model = make_model("mesh", noise=0.2)
    states = kept(model, tokens)
    with model.hooks(fwd_hooks=[("loop.0.hook_out", louder)]):
        whole = model.run_with_hooks(tokens, fwd_hooks=[("loop.2.hook_out", louder)])
        resumed = model.resume(tokens, states, [("loop.2.hook_out", louder)], ["loop.2.hook_out"])
    assert torch.equal(resumed, whole)
    later = model.run_with_hooks(tokens, fwd_hooks=[("loop.2.hook_out", louder)])
    assert not torch.equal(whole, later)


@pytest.mark.parametrize("parallel", [True, False])
@pytest.mark.parametrize(
    "points",
    [
        ["hook_attn_out", "hook_mlp_out"], ["attn.hook_z", "hook_mlp_out"],
        ["attn.hook_z", "hook_attn_out"], ["hook_mlp_out", "mlp.hook_post"],
    ],
)  # fmt: skip
def test_several_parts_of_the_first_layer_give_the_bits_of_a_whole_pass(points, parallel, tokens):
    model = make_model("mesh", "1+2R2+1", noise=0.2, parallel_residual=parallel)
    names = [f"blocks.2.{point}" for point in points]
    hooks = [(name, louder) for name in names]
    whole = model.run_with_hooks(tokens, fwd_hooks=hooks)
    assert torch.equal(model.resume(tokens, kept(model, tokens), hooks, names), whole)
    single = model.run_with_hooks(tokens, fwd_hooks=hooks[:1])
    assert not torch.equal(single, whole)
