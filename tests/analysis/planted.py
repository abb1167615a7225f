"""Models with a known fault: a trained one whose core was altered so that it must collapse."""

from collections.abc import Callable
from copy import deepcopy

import torch
from torch import Tensor, nn

import loopscope as ls
from loopscope.models.native.block import Block, VirtualBlock, rotary_tables
from loopscope.models.native.loop_model import LoopModel

Alter = Callable[[Tensor, Tensor, Tensor, int], Tensor]
"""h(t), f_core(h(t)), where the trained model would end, t → what the altered core returns."""


class Layer(nn.Module):
    """A trained layer as a module of its own."""

    def __init__(self, block: Block) -> None:
        super().__init__()
        self.block, self._points = block, (VirtualBlock(block),)

    def forward(self, x: Tensor, rotary) -> Tensor:
        return self.block(x, self._points[0], rotary)


class Core(nn.Module):
    """The trained core, its output altered."""

    def __init__(self, blocks, alter: Alter) -> None:
        super().__init__()
        self.blocks, self.alter = nn.ModuleList(map(Layer, blocks)), alter

    def forward(self, h: Tensor, rotary, end: Tensor, t: int) -> Tensor:
        f_h = h
        for block in self.blocks:
            f_h = block(f_h, rotary)
        return self.alter(h, f_h, end, t)


class Planted(nn.Module):
    """A trained base model as a plain module, its core altered."""

    def __init__(self, trained: LoopModel, alter: Alter) -> None:
        super().__init__()
        self._trained = (trained,)  # no submodule: its own forward is no part of this one
        trained = deepcopy(trained)
        self.embed, self.ln_final, self.unembed = trained.embed, trained.ln_final, trained.unembed
        self.prelude = nn.ModuleList(map(Layer, trained.prelude))
        self.coda = nn.ModuleList(map(Layer, trained.coda))
        self.core = Core(trained.core, alter)
        self.n_loops = trained.config.K

    def forward(self, tokens: Tensor) -> Tensor:
        (trained,) = self._trained
        x = self.embed(tokens)
        if trained.config.embed_scale:
            x = x * trained.config.d_model**0.5
        rotary = rotary_tables(trained.config, tokens.shape[1], x)
        for block in self.prelude:
            x = block(x, rotary)
        end = ls.capture(trained, tokens, memory=False).h[-1]
        for t in range(self.n_loops):
            x = self.core(x, rotary, end, t)
        for block in self.coda:
            x = block(x, rotary)
        return self.unembed(self.ln_final(x))


def plant(trained: LoopModel, alter: Alter, name: str):
    """The altered model, wrapped like any foreign one."""
    module = Planted(trained, alter).eval()
    tokens = torch.arange(24).reshape(2, 12) % trained.config.d_vocab
    model = ls.wrap(module, example=tokens, name=name)
    model.tokenizer = trained.tokenizer
    return model


def identity(pull: float) -> Alter:
    """Pulled towards the identity: only a part `pull` of the update is left."""
    return lambda h, f_h, end, t: h + pull * (f_h - h)


def fixed_point(rate: float) -> Alter:
    """Contracted to where the trained model would end, by `rate` in each iteration."""
    return lambda h, f_h, end, t: end + rate * (h - end) + 1e-4 * (f_h - h)


def rank_one(seed: int) -> Alter:
    """Every token's state on one line."""

    def alter(h: Tensor, f_h: Tensor, end: Tensor, t: int) -> Tensor:
        line = torch.randn(h.shape[-1], generator=torch.Generator().manual_seed(seed))
        line = line / line.norm()
        return (f_h @ line)[..., None] * line

    return alter


def diverging(gain: float) -> Alter:
    """Each update larger than it was trained to be, and growing."""
    return lambda h, f_h, end, t: h + gain ** (t + 1) * (f_h - h)


def first_loop_only(rest: float) -> Alter:
    """All work left to the first loop."""
    return lambda h, f_h, end, t: h + (1.0 if t == 0 else rest) * (f_h - h)
