"""Trajectories made by hand: nested loops, states of several widths, routers and gates."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch

from loopscope.models.hooked import Hooked
from loopscope.models.native.loop_model import LoopModel
from loopscope.models.trajectory import Trajectory, Transition
from loopscope.models.wrapped.wrapped_model import WrappedModel

SAMPLES, POS, SLOTS, VOCABULARY = 5, 12, 4, 9


def random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def tokens() -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(VOCABULARY, (SAMPLES, POS), generator=generator)


def loop(name: str, K: int, width: int, *, seed: int, d_emb: int = 8, **fields: Any) -> Trajectory:
    """One loop; prelude and coda change the width where `d_emb` differs from it."""
    h = [random(SAMPLES, POS, width, seed=seed + t) for t in range(K + 1)]
    h_m = [random(SAMPLES, POS, width, seed=seed + 50 + t) for t in range(K)]
    h_emb = random(SAMPLES, POS, d_emb, seed=900)
    h_out = random(SAMPLES, POS, d_emb, seed=901)
    blocks = {"prelude": (h_emb, h[0])}
    blocks |= {f"core{t + 1}": (h[t], h_m[t]) for t in range(K)}
    blocks["coda"] = (h[-1], h_out)
    settings = {
        "memory": None, "w_write": None, "w_read": None, "transition": None,
        "logits": random(SAMPLES, POS, VOCABULARY, seed=902), "tokens": tokens(),
        "path": tuple(f"{name}{t}" for t in range(K)), **fields,
    }  # fmt: skip
    return Trajectory(
        h_emb=h_emb, h=tuple(h), h_m=tuple(h_m), h_out=h_out, blocks=blocks, loop=name, **settings
    )


def nested() -> Trajectory:
    """Two cycles of H, each with three of L, of another width; h_emb and h_out are the same."""
    outer = loop("H", 2, 8, seed=100)
    paths = tuple(f"H{a}.L{b}" for a in (0, 1) for b in (0, 1, 2))
    inner = loop("L", 6, 10, seed=200, path=paths)
    inner = replace(inner, h_emb=outer.h_emb, h_out=outer.h_out, logits=None)
    return replace(outer, others={"L": inner})


def weights(K: int, *, seed: int) -> tuple[torch.Tensor, ...]:
    return tuple((2 * random(SAMPLES, POS, SLOTS, seed=seed + t)).softmax(-1) for t in range(K))


def transition() -> Transition:
    write, read = weights(2, seed=600)
    return Transition(
        query=random(SAMPLES, POS, 8, seed=7), memory=None, w_write=write, w_read=read
    )


def part(trajectory: Trajectory, here: slice) -> Trajectory:
    """Some samples of a trajectory."""

    def cut(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return value[here]
        if isinstance(value, tuple) and value and not isinstance(value[0], str):
            return tuple(cut(x) for x in value)
        if isinstance(value, dict):
            return {key: cut(x) for key, x in value.items()}
        if isinstance(value, Trajectory):
            return part(value, here)
        if isinstance(value, Transition):
            return Transition(**{key: cut(x) for key, x in vars(value).items()})
        return value

    return Trajectory(**{key: cut(value) for key, value in vars(trajectory).items()})


class Played:
    """Stands for a model whose forward passes are the samples of a trajectory, in order."""

    name, tokenizer, seed, reads_out_cheaply = "played", None, None, True
    why_no_routing, output_type = LoopModel.why_no_routing, LoopModel.output_type
    slots_take_hooks = False

    def __init__(self, trajectory: Trajectory, *, d_vocab: int | None = VOCABULARY) -> None:
        self.trajectory, self.done, self.asked = trajectory, 0, []
        self.config = SimpleNamespace(d_vocab=d_vocab, n_ctx=None, to_dict=lambda: {"K": 2})
        self.provenance: dict[str, Any] = {}
        self.hook_dict, self.aliases = {}, {}

    @property
    def K(self) -> int:
        return self.trajectory.K

    def parameters(self) -> Any:
        return iter([torch.zeros(1)])

    def structure(self) -> dict[str, Any]:
        return {}

    def why_no_loss(self) -> str:
        return ""

    def capture(self, batch: torch.Tensor, **options: Any) -> Trajectory:
        here = slice(self.done, self.done + len(batch))
        self.done += len(batch)
        self.asked.append(options)
        found = part(self.trajectory, here)
        return found if options["logits"] else replace(found, logits=None)


def refuse(self: Played, *given: Any, **options: Any) -> Any:
    raise AssertionError("a trajectory that is played back has nothing else to offer")


for member in {*dir(Hooked), "__call__"} - {*dir(Played)}:
    if not member.startswith("_") or member == "__call__":
        setattr(Played, member, refuse)


class Wrapped(Played):
    """The same for a model that was wrapped: it has a map."""

    why_no_routing, why_no_loss = WrappedModel.why_no_routing, WrappedModel.why_no_loss

    def __init__(self, trajectory: Trajectory, *, causal: bool | None = True, **options: Any):
        super().__init__(trajectory, **options)
        why = "" if causal is not None else "the model returns no logits for each token"
        self.map = SimpleNamespace(
            causal=causal, why_no_logits=why, to_dict=lambda: {"loops": [{"name": "H"}]}
        )

    def structure(self) -> dict[str, Any]:
        return {"map": self.map.to_dict()}
