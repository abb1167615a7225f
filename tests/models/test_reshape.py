"""The same weights with another number of iterations, against a loop written by hand."""

import pytest
import torch

from loopscope.errors import InputError, UnknownNameError
from loopscope.models.block import rotary_tables
from loopscope.models.load import load
from tests.conftest import VARIANTS, make_model

FREE = [variant for variant in VARIANTS if variant != "mesh"]


def unrolled(model, tokens, loops):
    """The logits of `loops` iterations, the recurrence spelled out."""
    h_emb = model.embed(tokens) * model.config.d_model**0.5
    rotary = rotary_tables(model.config, tokens.shape[1], h_emb)

    def through(stack, x):
        for layer in stack:
            x = layer(x, rotary)
        return x

    h = start = through(model.prelude, h_emb)
    terms = model.config.variant.split("+")
    for _ in range(loops):
        new = through(model.core, h)
        if terms == ["static"]:
            a = model.recurrence.coefficients
            new = a[0] * new + a[1] * start + a[2] * h_emb
        elif terms == ["dynamic"]:
            a = model.recurrence.coefficients(h)
            new = a[..., :1] * new + a[..., 1:2] * start + a[..., 2:] * h_emb
        else:
            added = {"residual": h, "anchor": start, "anchor_emb": h_emb}
            new = new + sum(added[term] for term in terms if term != "base")
        h = new
    return model.unembed(model.ln_final(through(model.coda, h)))


def plain_block(block):
    """A layer of parameters as a function of the stream and the rotary tables."""
    from loopscope.models.block import VirtualBlock

    return VirtualBlock(block)


@pytest.mark.parametrize("variant", FREE)
@pytest.mark.parametrize("loops", [1, 2, 7])
def test_with_loops_runs_the_same_core_so_often(variant, loops, tokens):
    model = make_model(variant, "1+2R3+1")
    again = model.with_loops(loops)
    assert again.config.K == loops and str(again.config.layout) == f"1+2R{loops}+1"
    for stack in ("prelude", "core", "coda"):
        setattr(model, f"_{stack}", [plain_block(block) for block in getattr(model, stack)])
    wanted = unrolled(_Parts(model), tokens, loops)
    assert torch.allclose(again(tokens), wanted, atol=1e-5)


class _Parts:
    """A model's parts, its layers ready to be called."""

    def __init__(self, model):
        self.config, self.recurrence = model.config, model.recurrence
        self.embed, self.ln_final, self.unembed = model.embed, model.ln_final, model.unembed
        for stack in ("prelude", "core", "coda"):
            setattr(self, stack, [plain_block(block) for block in getattr(model, stack)])
