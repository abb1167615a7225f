"""Unembeddings that are no module, or that nothing but their use tells from a layer."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.standins.blocks import Block, D, Norm, Standin, States, through, walk

PADDED, VOCAB = 64, 61


@dataclass
class Out:
    """A result with its states before its logits."""

    states: Tensor
    scores: Tensor


class TiedScores(nn.Module):
    """A module without a matrix of its own: scores by the table that it is given."""

    def __init__(self, table: nn.Embedding) -> None:
        super().__init__()
        self.table = table

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.table.weight.T


class Scores(Standin):
    """A looped decoder whose logits are made in a certain way.

    Args:
        head: How: a key of `HEADS`.
        width: Of the state.
        rows: Of the embedding table.
        form: What is returned: the logits, or the states beside them.
        causal: Whether tokens see earlier ones only.
    """

    def __init__(self, head, width=D, rows=VOCAB, form="tensor", causal=True, steps=3, seed=40):
        torch.manual_seed(seed)
        super().__init__()
        self.head, self.form, self.steps, self.rows = head, form, steps, rows
        self.embed = nn.Embedding(rows, width)
        self.pre = Block(width, causal=causal)
        self.core = nn.ModuleList(Block(width, causal=causal) for _ in range(2))
        self.norm = Norm(width)
        if head in ("module", "cropped_module", "soft_module", "projected"):
            self.unembed = nn.Linear(width, width if head == "projected" else rows, bias=False)
        elif head == "tied_module":
            self.unembed = nn.Linear(width, rows, bias=False)
        elif head == "table_module":
            self.unembed = TiedScores(self.embed)
        elif head == "parameter":
            self.matrix = nn.Parameter(torch.randn(width, rows))
        elif head == "buffer":
            self.register_buffer("matrix_weight", torch.randn(width, rows))
        self.finish(seed)
        if head == "tied_module":
            self.unembed.weight = self.embed.weight
        self.plain = torch.randn(width, rows, generator=torch.Generator().manual_seed(seed))

    def scores(self, x: Tensor) -> Tensor:
        """The logits of a normed state."""
        W = self.embed.weight
        ways = {
            "linear": lambda: F.linear(x, W),
            "transposed": lambda: x @ W.T,
            "method": lambda: torch.matmul(x, W.t()) * 0.5,
            "einsum": lambda: torch.einsum("bpd,vd->bpv", x, W),
            "cropped": lambda: (x @ W.T)[..., :VOCAB],
            "rows": lambda: x @ W[:VOCAB].T,
            "capped": lambda: 5 * torch.tanh(F.linear(x, W) / 5),
            "cropped_module": lambda: self.unembed(x)[..., :VOCAB],
            "soft_module": lambda: self.unembed(x).log_softmax(-1),
            "parameter": lambda: x @ self.matrix,
            "buffer": lambda: x @ self.matrix_weight,
            "plain": lambda: x @ self.plain,
            "none": lambda: x,
            "half": lambda: x[..., : x.shape[-1] // 2],
            "added": lambda: x + x.mean(-1, keepdim=True),
            "doubled": lambda: torch.cat([x, x.flip(-1)], -1),
        }
        return ways[self.head]() if self.head in ways else self.unembed(x)

    def forward(self, tokens):
        x = self.pre(self.embed(tokens))
        for _ in range(self.steps):
            x = through(self.core, x)
        x = self.norm(x)
        y = self.scores(x)
        forms = {
            "tensor": lambda: y,
            "tuple": lambda: (y, x),
            "states_first": lambda: (x, y),
            "dict": lambda: {"hidden": x, "scores": y},
            "named": lambda: {"hidden": x, "logits": y},
            "dataclass": lambda: Out(x, y),
        }
        return forms[self.form]()

    def states(self, tokens):
        h_emb = self.embed(tokens)
        x, found = walk(lambda x, _: through(self.core, x), self.pre(h_emb), self.steps)
        return States(h_emb, [found], x, self.scores(self.norm(x)))
