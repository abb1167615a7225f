"""The same weights with another number of iterations, against a loop written by hand."""

import pytest
import torch

from loopscope.errors import InputError, UnknownNameError
from loopscope.models.native.block import rotary_tables
from loopscope.models.opening.loading import load
from tests.conftest import VARIANTS, make_model

FREE = [variant for variant in VARIANTS if variant != "mesh"]


def unrolled(model, tokens, loops):
    """The logits of `loops` iterations of a 1+2RK+1 model, its recurrence spelled out."""
    h_emb = model.embed(tokens) * model.config.d_model**0.5
    rotary = rotary_tables(model.config, tokens.shape[1], h_emb)
    first, one, two, *_, last = model.blocks
    h = start = first(h_emb, rotary)
    for _ in range(loops):
        new = two(one(h, rotary), rotary)
        if model.config.variant == "static":
            a = model.recurrence.coefficients
            h = a[0] * new + a[1] * start + a[2] * h_emb
        elif model.config.variant == "dynamic":
            a = model.recurrence.coefficients(h)
            h = a[..., :1] * new + a[..., 1:2] * start + a[..., 2:] * h_emb
        else:
            added = {"base": 0.0, "residual": h, "anchor": start, "anchor_emb": h_emb}
            h = new + sum(added[term] for term in model.config.variant.split("+"))
    return model.unembed(model.ln_final(last(h, rotary)))


@pytest.mark.parametrize("variant", FREE)
@pytest.mark.parametrize("loops", [1, 2, 7])
def test_with_loops_runs_the_same_core_so_often(variant, loops, tokens):
    model = make_model(variant, "1+2R3+1")
    again = model.with_loops(loops)
    assert str(again.config.layout) == f"1+2R{loops}+1"
    assert torch.allclose(again(tokens), unrolled(model, tokens, loops), atol=1e-5)
    assert model.config.K == 3


def test_weights_are_shared_and_stay_as_trainable_as_they_were(tokens):
    model = make_model("static", "1+2R3+1", tied_embeddings=True)
    model.core.requires_grad_(False)
    again = model.with_loops(5)
    assert {id(p) for p in again.parameters()} == {id(p) for p in model.parameters()}
    assert not any(p.requires_grad for p in again.core.parameters())
    assert all(p.requires_grad for p in again.coda.parameters())
    assert again.unembed.weight is again.embed.weight
    assert again.name == model.name and not again.training


def test_load_takes_loops(tokens):
    model = load("base", loops=4)
    assert torch.equal(model(tokens), load("base").with_loops({"core": 4})(tokens))


@pytest.mark.parametrize(
    ("variant", "layout", "loops", "message"),
    [
        ("mesh", "1+2R3+1", 4, "routers of its own for each of its 3 iterations"),
        ("vanilla", "4", 4, "has no loop"),
        ("vanilla", "1+1+1+1", 4, "has unshared cores"),
        ("base", "1+1+1+1", 4, "has unshared cores"),
        ("base", "1+2R3+1", 0, "at least 1, given 0"),
        ("base", "1+2R3+1", True, "at least 1, given True"),
        ("base", "1+2R3+1", "4", "at least 1, given '4'"),
    ],
)
def test_models_that_do_not_allow_it_say_why(variant, layout, loops, message):
    with pytest.raises(InputError, match=message):
        make_model(variant, layout).with_loops(loops)


def test_unknown_loops_are_named():
    with pytest.raises(UnknownNameError, match="unknown loop 'H'; there are: core"):
        make_model("base", "1+2R3+1").with_loops({"H": 2})
