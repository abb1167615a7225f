"""A looped language model of somebody else's, with dropout, and a training of its own."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

VOCABULARY, POS = 96, 12


class Block(nn.Module):
    """Mixes what came before into each token."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.mix = nn.Linear(width, width)
        self.drop = nn.Dropout(0.2)

    def forward(self, x: Tensor) -> Tensor:
        steps = torch.arange(1, x.shape[1] + 1, device=x.device)[:, None]
        return x + self.drop(torch.tanh(self.mix(self.norm(x.cumsum(1) / steps))))


class Looped(nn.Module):
    """One layer before, two that run three times, one after; counts its calls in a buffer."""

    calls: Tensor

    def __init__(self, width: int = 16, n_loops: int = 3) -> None:
        super().__init__()
        self.n_loops = n_loops
        self.embed = nn.Embedding(VOCABULARY, width)
        self.prelude = Block(width)
        self.core = nn.ModuleList([Block(width), Block(width)])
        self.coda = Block(width)
        self.head = nn.Linear(width, VOCABULARY, bias=False)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        self.calls += 1
        state = self.prelude(self.embed(input_ids))
        for _ in range(self.n_loops):
            for block in self.core:
                state = block(state)
        logits = self.head(self.coda(state))
        if labels is None:
            return {"logits": logits}
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return {"loss": loss, "logits": logits}


def make(seed: int = 0, **settings: int) -> Looped:
    torch.manual_seed(seed)
    return Looped(**settings)


def windows(count: int, seed: int = 1) -> Tensor:
    """Token ids with something to learn: each is a little more than the one before."""
    generator = torch.Generator().manual_seed(seed)
    steps = torch.randint(1, 4, (count, POS), generator=generator)
    return (torch.randint(VOCABULARY, (count, 1), generator=generator) + steps.cumsum(1)) % 96


def train(model: nn.Module, steps: int, after=lambda step: None) -> None:
    """A plain loop of one's own; `after` is called with the number of steps done."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    torch.manual_seed(7)  # of dropout
    model.train()
    after(0)
    for step in range(steps):
        batch = windows(4, seed=step)
        model(input_ids=batch, labels=batch)["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
        after(step + 1)


def weights(model: nn.Module) -> Tensor:
    return torch.cat([value.detach().flatten().double() for value in model.state_dict().values()])
