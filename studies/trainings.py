"""How a training differs from a usual one: faults that make a loop fail, and sound recipes.

A fault is part of the model (a hook, a frozen parameter) or of its training (the loss, the text,
the learning rate): it is there from the first step. `failing_loops.py` trains and measures them.
"""

from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from loopscope.models.native.block import Block
from loopscope.models.native.loop_model import LoopModel

LEARNING_RATE, CLIP = 6e-3, 1.0
CLOSED = -1e4
"""A router's bias at which the softmax is exactly 0, and so is its gradient."""

Windows = Tensor
"""Ids, (batch, pos + 1): inputs are all but the last, targets all but the first."""


def cross_entropy(logits: Tensor, windows: Windows) -> Tensor:
    """Mean next-token cross-entropy.

    Args:
        logits: (batch, pos, d_vocab).
        windows: Ids, one more than positions.

    Returns:
        Nats per token.
    """
    return F.cross_entropy(logits.float().flatten(0, 1), windows[:, 1:].flatten())


def keep(states: dict[str, Tensor], tensor: Tensor, hook: nn.Module) -> None:
    """A hook that keeps what it sees, gradients included.

    Args:
        states: Filled by name of the point.
        tensor: What passes the point.
        hook: The point.
    """
    states[str(hook.name)] = tensor


def core_outputs(model: LoopModel) -> Iterator[nn.Linear]:
    """The core's output projections: W_O with b_O, W_out with b_out.

    Args:
        model: A model with a loop.

    Yields:
        The projections of each layer.
    """
    for block in model.core:
        assert isinstance(block, Block)
        yield from (block.attn.out, block.mlp.down)


class Training:
    """A usual training; subclasses say how theirs differs."""

    rate = LEARNING_RATE
    clip: float | None = CLIP
    windows: int | None = None
    """How many different windows are seen; None for as many as there are."""

    def install(self, model: LoopModel) -> None:
        """Put into an untrained model what it has in training and when it is measured.

        Args:
            model: Changed in place: hooks, frozen or further parameters.
        """

    def loss(self, model: LoopModel, windows: Windows, drawn: torch.Generator) -> Tensor:
        """The loss of a step.

        Args:
            model: The model.
            windows: The step's batch.
            drawn: Of the random numbers of this training.

        Returns:
            What is minimised.
        """
        return cross_entropy(model(windows[:, :-1]), windows)

    def after_step(self, model: LoopModel) -> None:
        """Change the weights once the optimiser has.

        Args:
            model: The model.
        """


class DeadCore(Training):
    """The core's output projections are zero and stay so; their biases may be trained.

    Args:
        biases: Whether the biases are trained.
    """

    def __init__(self, *, biases: bool = False) -> None:
        self.biases = biases

    def install(self, model: LoopModel) -> None:
        for projection in core_outputs(model):
            nn.init.zeros_(projection.weight).requires_grad_(False)
            nn.init.zeros_(projection.bias).requires_grad_(self.biases)


class DecayedCore(Training):
    """The core's output projections lose a share in every step, until nothing is left.

    Args:
        share: Of each weight and bias, after each step.
    """

    def __init__(self, share: float) -> None:
        self.share = share

    @torch.no_grad()
    def after_step(self, model: LoopModel) -> None:
        for projection in core_outputs(model):
            projection.weight.mul_(1 - self.share)
            projection.bias.mul_(1 - self.share)


class Bottleneck(Training):
    """h_m(t) passes a learned map to `rank` numbers and back, in every iteration.

    Args:
        rank: How many.
    """

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def install(self, model: LoopModel) -> None:
        D = model.config.d_model
        down, up = nn.Linear(D, self.rank, bias=False), nn.Linear(self.rank, D, bias=False)
        for layer, width in ((down, D), (up, self.rank)):
            numbers = torch.Generator().manual_seed(self.rank)
            nn.init.normal_(layer.weight, std=width**-0.5, generator=numbers)
        model.add_module("bottleneck", nn.Sequential(down, up))
        for t in range(model.config.K):
            model.add_hook(f"loop.{t}.hook_out", partial(self._pass, model))

    @staticmethod
    def _pass(model: LoopModel, h_m: Tensor, hook: nn.Module) -> Tensor:
        bottleneck: nn.Module = model.get_submodule("bottleneck")
        return bottleneck(h_m)


class AttentionAlone(Training):
    """h_m(t) is what attention puts out: no skip connection, no MLP (Dong et al. 2021)."""

    def install(self, model: LoopModel) -> None:
        for t in range(model.config.K):
            states: dict[str, Tensor] = {}
            point = f"blocks.{model.config.layout.core_start(t)}.hook_attn_out"
            model.add_hook(point, partial(keep, states))
            model.add_hook(f"loop.{t}.hook_out", partial(self._replace, states, point))

    @staticmethod
    def _replace(states: dict[str, Tensor], point: str, h_m: Tensor, hook: nn.Module) -> Tensor:
        return states.pop(point)


class Contraction(Training):
    """The loss grows with each step of the state: + weight · mean ‖h(t+1) − h(t)‖²/‖h(t)‖².

    Args:
        weight: Nats for a mean of 1.
    """

    def __init__(self, weight: float) -> None:
        self.weight = weight

    def loss(self, model: LoopModel, windows: Windows, drawn: torch.Generator) -> Tensor:
        logits, h = with_states(model, windows)
        steps = [(b - a).square().sum(-1) / a.square().sum(-1) for a, b in pairwise(h)]
        return cross_entropy(logits, windows) + self.weight * torch.stack(steps).mean()


def with_states(model: LoopModel, windows: Windows) -> tuple[Tensor, list[Tensor]]:
    """Run the model, and keep h(0) … h(K) with their gradients.

    Args:
        model: The model.
        windows: The batch.

    Returns:
        The logits and the states.
    """
    names = [*(f"loop.{t}.hook_in" for t in range(model.config.K)), "coda.hook_in"]
    states: dict[str, Tensor] = {}
    hooks = [(name, partial(keep, states)) for name in names]
    return model.run_with_hooks(windows[:, :-1], fwd_hooks=hooks), [states[n] for n in names]


def close(router: nn.Linear, slots: range) -> None:
    """Keep a router's softmax from some slots for good.

    Args:
        router: Write or read router; changed in place.
        slots: Which get exactly nothing.
    """
    with torch.no_grad():
        router.weight[slots.start : slots.stop] = 0
        router.bias[slots.start : slots.stop] = CLOSED


class FirstSlotAlone(Training):
    """Every read is of slot 0, where the loop never writes: what it computes is lost."""

    def install(self, model: LoopModel) -> None:
        mesh = model.recurrence
        for router in (mesh.transition, *mesh.iterations):
            close(router.read, range(1, mesh.slots))
        for router in mesh.iterations:
            close(router.write, range(1))


class UnreadWrites(Training):
    """What the iterations after the first write goes to two slots that nobody reads."""

    def install(self, model: LoopModel) -> None:
        mesh = model.recurrence
        first = mesh.slots - 2
        for router in (mesh.transition, *mesh.iterations):
            close(router.read, range(first, mesh.slots))
        for router in (mesh.transition, mesh.iterations[0]):
            close(router.write, range(first, mesh.slots))
        for router in mesh.iterations[1:]:
            close(router.write, range(first))


class FirstStateAlone(Training):
    """Trained with one iteration, whatever K it is run with."""

    def loss(self, model: LoopModel, windows: Windows, drawn: torch.Generator) -> Tensor:
        return cross_entropy(model.with_loops(1)(windows[:, :-1]), windows)


class FewWindows(Training):
    """Trained on a handful of windows.

    Args:
        windows: How many.
    """

    def __init__(self, windows: int) -> None:
        self.windows = windows


class HighRate(Training):
    """Trained with far too high a learning rate, gradients not clipped.

    Args:
        rate: Its peak.
    """

    clip = None

    def __init__(self, rate: float) -> None:
        self.rate = rate


class LoopDropout(Training):
    """Each sample leaves out each iteration at random: h(t+1) = h(t).

    Args:
        share: Of the samples, in each iteration.
    """

    def __init__(self, share: float) -> None:
        self.share = share

    def loss(self, model: LoopModel, windows: Windows, drawn: torch.Generator) -> Tensor:
        states: dict[str, Tensor] = {}
        hooks: list[tuple[str, Callable]] = []
        for t in range(model.config.K):
            left_out = torch.rand(len(windows), 1, 1, generator=drawn) < self.share
            point = f"loop.{t}.hook_in"
            hooks.append((point, partial(keep, states)))
            hooks.append((f"loop.{t}.hook_out", partial(self._skip, states, point, left_out)))
        return cross_entropy(model.run_with_hooks(windows[:, :-1], fwd_hooks=hooks), windows)

    @staticmethod
    def _skip(
        states: dict[str, Tensor], point: str, left_out: Tensor, h_m: Tensor, hook: nn.Module
    ) -> Tensor:
        return torch.where(left_out, states[point], h_m)


class RandomLoops(Training):
    """Each batch runs another number of iterations, 1 … 2K."""

    def loss(self, model: LoopModel, windows: Windows, drawn: torch.Generator) -> Tensor:
        loops = int(torch.randint(1, 2 * model.config.K + 1, (), generator=drawn))
        return cross_entropy(model.with_loops(loops)(windows[:, :-1]), windows)


class EveryLoop(Training):
    """The coda reads h(1) … h(K), and the loss is the mean over them."""

    def loss(self, model: LoopModel, windows: Windows, drawn: torch.Generator) -> Tensor:
        logits, h = with_states(model, windows)
        losses = [cross_entropy(logits, windows)]
        for state in h[1:-1]:
            logits = model.unembed(model.ln_final(model.read_out(state)))
            losses.append(cross_entropy(logits, windows))
        return torch.stack(losses).mean()
