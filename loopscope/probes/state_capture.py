"""Capture: every state of the loop, by the paper's names."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from html import escape
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from loopscope.models.native.loop_model import LoopModel
from loopscope.models.wrapped.wrapped_model import WrappedModel

Stream = Float[Tensor, "batch pos d_model"]
Slots = Float[Tensor, "batch slot pos d_model"]
Weights = Float[Tensor, "batch pos slot"]


@dataclass(frozen=True, kw_only=True)
class Transition:
    """MeSH's transitional cycle, which turns the prelude's output into h(0).

    Attributes:
        query: What its routers look at, (batch, pos, d_model).
        memory: The buffer after its write, (batch, slot, pos, d_model); None when not asked for.
        w_write, w_read: Router weights, (batch, pos, slot).
    """

    query: Stream
    memory: Slots | None
    w_write: Weights
    w_read: Weights


@dataclass(frozen=True, kw_only=True)
class Trajectory:
    """All states of one forward pass, under the paper's symbols.

    Attributes:
        h_emb: Embeddings after scaling, (batch, pos, d_model).
        h: h(0) … h(K), the state entering each iteration and, last, the coda; K + 1 tensors.
        h_m: h_m(0) … h_m(K-1), the core's raw output before any mixing; K tensors.
        memory: The buffer after each iteration's write, (batch, slot, pos, d_model); K tensors, or
            None where there are no slots (or they were not asked for).
        w_write, w_read: Router weights of each iteration, (batch, pos, slot); K tensors or None.
        transition: The transitional cycle of MeSH, or None.
        h_out: The coda's output, before the final layer norm.
        blocks: `prelude`, `core1` … `coreK`, `coda` to (input, raw output); parts without layers
            are left out.
        logits: (batch, token, d_vocab) if asked for.
        tokens: The tokens, (batch, token); a position each, but in loops over something else.
        loop: Name of the loop.
        path: Where each iteration stands, such as `H0.L2`; `0` … `K-1` for the only loop.
        gates: Each gate's probability (an exit gate, a token router) at each iteration, None where
            it was not evaluated.
        mesh_cycle: Whether the states follow from memory and routers by MeSH Eqs. 2-5, so that α
            (Eq. 7) is exact.
        others: The model's further loops, each as a trajectory of the same forward pass.
    """

    h_emb: Float[Tensor, "batch pos d_emb"]
    h: tuple[Stream, ...]
    h_m: tuple[Stream, ...]
    memory: tuple[Slots, ...] | None
    w_write: tuple[Weights, ...] | None
    w_read: tuple[Weights, ...] | None
    transition: Transition | None
    h_out: Float[Tensor, "batch pos d_out"]
    blocks: dict[str, tuple[Tensor, Tensor]]
    logits: Float[Tensor, "batch token d_vocab"] | None = None
    tokens: Int[Tensor, "batch token"] | None = None
    loop: str = "core"
    path: tuple[str, ...] = ()
    gates: Mapping[str, tuple[Float[Tensor, "batch pos"] | None, ...]] = field(default_factory=dict)
    mesh_cycle: bool = True
    others: Mapping[str, "Trajectory"] = field(default_factory=dict)

    @property
    def loops(self) -> dict[str, "Trajectory"]:
        """All loops of the model by name, this one first."""
        return {self.loop: self, **self.others}

    @property
    def K(self) -> int:
        """Number of core iterations."""
        return len(self.h_m)

    @property
    def states(self) -> dict[str, Tensor]:
        """`h_emb`, `h0` … `hK`, `h_out` in the order in which they arise."""
        loop = {f"h{t}": state for t, state in enumerate(self.h)}
        return {"h_emb": self.h_emb, **loop, "h_out": self.h_out}

    def __repr__(self) -> str:
        batch, pos, width = self.h[0].shape
        slots = f", {self.w_write[0].shape[-1]} slots" if self.w_write else ""
        loop = "" if self.loop == "core" else f"{self.loop}: "
        return f"Trajectory: {batch} × {pos} tokens, d_model {width}, {loop}K={self.K}{slots}"

    def _repr_html_(self) -> str:
        head = "".join(f"<th>{c}</th>" for c in ("state", "shape", "‖·‖ per token"))
        rows = "".join(
            f"<tr><td>{escape(name)}</td><td>{tuple(state.shape)}</td>"
            f"<td>{state.float().norm(dim=-1).mean().item():.3g}</td></tr>"
            for name, state in self.states.items()
        )
        return f"<p>{escape(repr(self))}</p><table><tr>{head}</tr>{rows}</table>"


def capture_names(model: LoopModel, *, memory: bool = True) -> list[str]:
    """The hooks that a trajectory is read from."""
    layout = model.config.layout
    names = ["hook_embed", "coda.hook_in", "hook_h_out"]
    if layout.prelude:
        names.append(f"blocks.{layout.prelude - 1}.hook_resid_post")
    for t in range(model.config.K):
        names += [f"loop.{t}.hook_in", f"loop.{t}.hook_out"]
    if model.config.variant == "mesh":
        points = ["write.hook_weights", "read.hook_weights", *(["hook_memory"] if memory else [])]
        places = ["transition", *(f"loop.{t}" for t in range(model.config.K))]
        names += ["transition.hook_in", *(f"{at}.{point}" for at in places for point in points)]
    return names


@torch.no_grad()
def capture(
    model: LoopModel | WrappedModel,
    tokens: Any,
    *,
    memory: bool = True,
    logits: bool = False,
    loops: Any = None,
) -> Trajectory:
    """Run a model once and keep the states of every iteration.

    Args:
        model: A native or wrapped model.
        tokens: Token ids (batch, pos), or text for a model with a tokenizer.
        memory: Keep MeSH's buffer after each write: K + 1 tensors of (batch, slot, pos, d_model),
            by far the largest part.
        logits: Keep the logits too; otherwise a native model does not compute them.
        loops: Number of iterations, where the model allows another than its own; a dict by loop.

    Returns:
        The trajectory; its tensors carry no gradients.

    Raises:
        InputError: for tokens the model cannot take, or a number of iterations it cannot run.
    """
    if loops is not None:
        model = model.with_loops(loops)
    if isinstance(model, WrappedModel):
        from loopscope.probes.wrapped_capture import capture_wrapped

        return capture_wrapped(model, tokens, logits=logits)
    ids = model._as_tokens(tokens)
    stop = None if logits else model.config.layout.n_layers
    out, cache = model.run_with_cache(
        ids,
        names_filter=capture_names(model, memory=memory),
        return_cache_object=False,
        stop_at_layer=stop,
    )
    assert isinstance(cache, dict)
    layout, steps = model.config.layout, range(model.config.K)
    h = (*(cache[f"loop.{t}.hook_in"] for t in steps), cache["coda.hook_in"])
    h_m = tuple(cache[f"loop.{t}.hook_out"] for t in steps)
    blocks: dict[str, tuple[Tensor, Tensor]] = {}
    if layout.prelude:
        pre = cache[f"blocks.{layout.prelude - 1}.hook_resid_post"]
        blocks["prelude"] = (cache["hook_embed"], pre)
    blocks |= {f"core{t + 1}": (h[t], h_m[t]) for t in steps}
    if layout.coda:
        blocks["coda"] = (h[-1], cache["hook_h_out"])

    def each(point: str) -> tuple[Tensor, ...] | None:
        return tuple(cache[f"loop.{t}.{point}"] for t in steps)

    mesh = model.config.variant == "mesh"
    return Trajectory(
        h_emb=cache["hook_embed"],
        h=h,
        h_m=h_m,
        memory=each("hook_memory") if mesh and memory else None,
        w_write=each("write.hook_weights") if mesh else None,
        w_read=each("read.hook_weights") if mesh else None,
        transition=Transition(
            query=cache["transition.hook_in"],
            memory=cache.get("transition.hook_memory"),
            w_write=cache["transition.write.hook_weights"],
            w_read=cache["transition.read.hook_weights"],
        )
        if mesh
        else None,
        h_out=cache["hook_h_out"],
        blocks=blocks,
        logits=out if logits else None,
        tokens=ids,
        path=tuple(str(t) for t in steps),
    )


@torch.no_grad()
def shortened(model: LoopModel, longer: Trajectory, *, logits: bool = False) -> Trajectory:
    """The trajectory of a model from one with more iterations of the same core.

    Both pass through the same states up to h(K), since nothing in the core knows K; only the coda
    is run anew.

    Args:
        model: A native model that `with_loops` can change, without hooks.
        longer: What `capture` gives for `model.with_loops(T)`, T ≥ K.
        logits: Keep the logits too.

    Returns:
        What `capture(model, longer.tokens, logits=logits)` gives.
    """
    K = model.config.K
    h, h_m = longer.h[: K + 1], longer.h_m[:K]
    h_out = model.read_out(h[K])
    blocks = {name: block for name, block in longer.blocks.items() if name == "prelude"}
    blocks |= {f"core{t + 1}": (h[t], h_m[t]) for t in range(K)}
    if model.config.layout.coda:
        blocks["coda"] = (h[K], h_out)
    return Trajectory(
        h_emb=longer.h_emb, h=h, h_m=h_m, memory=None, w_write=None, w_read=None,
        transition=None, h_out=h_out, blocks=blocks,
        logits=model.unembed(model.ln_final(h_out)) if logits else None,
        tokens=longer.tokens, path=longer.path[:K],
    )  # fmt: skip
