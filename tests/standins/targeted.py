"""Models of the nanoGPT family: logits of all tokens only with targets."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.standins.blocks import VOCAB, Block, D, through


class Targeted(nn.Module):
    """A looped decoder that without targets gives the last token's logits only.

    Args:
        last: How it gives them then: `kept` as (batch, 1, vocabulary), `dropped` as (batch,
            vocabulary).
        given: What it returns with targets: `both` logits and loss, or the `loss` alone.
    """

    name = "targets"

    def __init__(self, last: str = "kept", given: str = "both") -> None:
        torch.manual_seed(50)
        super().__init__()
        self.last, self.given = last, given
        self.embed, self.core = nn.Embedding(VOCAB, D), nn.ModuleList([Block(), Block()])
        self.norm, self.head = nn.LayerNorm(D), nn.Linear(D, VOCAB, bias=False)
        self.eval()

    def run(self, idx: Tensor, targets: Tensor | None):
        """Logits and loss, as nanoGPT gives them."""
        x = self.embed(idx)
        for _ in range(3):
            x = through(self.core, x)
        x = self.norm(x)
        if targets is None:
            logits = self.head(x[:, [-1]])
            return (logits if self.last == "kept" else logits[:, 0]), None
        logits = self.head(x)
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)
        return (logits, loss) if self.given == "both" else loss

    def forward(self, idx: Tensor, targets: Tensor | None = None):
        return self.run(idx, targets)


class Labelled(Targeted):
    """The same, called with labels by name, beside a mask and positions."""

    def forward(self, tokens, attention_mask=None, position_ids=None, *, labels=None):
        if attention_mask is not None:
            assert attention_mask.unique().tolist() == [1]
        if position_ids is not None:
            assert torch.equal(position_ids[0], torch.arange(tokens.shape[1]))
        return self.run(tokens, labels)


class Needed(Targeted):
    """The same, with targets that forward needs."""

    def forward(self, idx: Tensor, targets: Tensor):
        return self.run(idx, targets)
