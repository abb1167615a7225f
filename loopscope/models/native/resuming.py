"""Resuming: a forward pass from any layer or cycle on, given what an earlier pass left behind."""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor, nn

from loopscope.models.hooks import Point
from loopscope.models.native.block import FinalNorm, Rotary, Stack, VirtualBlock, rotary_tables
from loopscope.models.native.configuration import LoopConfig
from loopscope.models.native.recurrence import LoopPoints

_BEFORE_ALL = (-1, 0)
_PARTS = {"attn.hook_z": "z", "hook_attn_out": "attn_out", "hook_mlp_out": "mlp_out"}


class StreamMixin:
    """The stream of a native model from the embedding, or from anything later, to h_out."""

    config: LoopConfig
    embed: nn.Embedding
    hook_embed: Point
    hook_h_out: Point
    blocks: nn.ModuleList
    coda: Stack
    recurrence: Any
    hook_dict: dict[str, Any]
    canonical: Callable[[str], str]
    hook_points: Callable[[], Iterable[Any]]
    hooks: Any
    run_with_hooks: Any
    unembed: nn.Linear
    ln_final: FinalNorm
    _loop_points: Callable[[], list[LoopPoints]]

    def _stream(
        self, tokens: Int[Tensor, "batch pos"], stop: int | None
    ) -> Float[Tensor, "batch pos d_model"]:
        """h_out, or the stream entering virtual layer `stop`."""
        layout = self.config.layout
        x = self.embed(tokens)
        if self.config.embed_scale:
            x = x * self.config.d_model**0.5
        h_emb = x = self.hook_embed(x)
        rotary = rotary_tables(self.config, tokens.shape[1], x)
        last = layout.n_layers if stop is None else stop
        for v in range(layout.prelude):
            if v == last:
                return x
            x = self.blocks[v](x, rotary)
        return self._cycles(h_emb, x, rotary, last)

    def _cycles(self, h_emb: Tensor, prelude: Tensor, rotary: Rotary, last: int) -> Tensor:
        """Go on from the prelude's output."""
        if not self.config.K:
            return self._coda(prelude, rotary, last)
        h, carry = self.recurrence.start(h_emb, prelude, getattr(self, "transition", None))
        return self._enter(0, h, carry, rotary, last)

    def _enter(self, t: int, h: Tensor, carry: Any, rotary: Rotary, last: int) -> Tensor:
        """Go on from h(t)."""
        if t == self.config.K:
            return self._coda(h, rotary, last)
        h = self._loop_points()[t].hook_in(h)
        return self._iterate(t, self.config.layout.core_start(t), h, h, carry, rotary, last)

    def _iterate(
        self, t: int, first: int, x: Tensor, h: Tensor, carry: Any, rotary: Rotary, last: int
    ) -> Tensor:
        """Go on in iteration t from virtual layer `first`, which is entered by `x`."""
        at, end = self._loop_points()[t], self.config.layout.core_start(t + 1)
        for v in range(first, end):
            if v == last:
                return x
            x = self.blocks[v](x, rotary)
        h, carry = self.recurrence.step(t, h, at.hook_out(x), carry, at)
        return self._enter(t + 1, h, carry, rotary, last)

    def _coda(self, h: Tensor, rotary: Rotary, last: int) -> Tensor:
        """Go on from the state after the loop."""
        layout = self.config.layout
        return self._coda_layers(layout.n_layers - layout.coda, self.coda.hook_in(h), rotary, last)

    def _coda_layers(self, first: int, x: Tensor, rotary: Rotary, last: int) -> Tensor:
        for v in range(first, self.config.layout.n_layers):
            if v == last:
                return x
            x = self.blocks[v](x, rotary)
        return self.hook_h_out(x)

    # -- from the middle -------------------------------------------------------------------------

    def checkpoint_hooks(self) -> list[str]:
        """Name the hooks whose tensors of one pass let `resume` begin anywhere in another.

        Returns:
            Canonical names: the stream before each layer and what its parts give, each iteration's
            states and memory.
        """
        layout, K = self.config.layout, self.config.K
        names = ["hook_embed", "coda.hook_in"]
        names += [f"blocks.{v}.hook_resid_pre" for v in range(layout.prelude, layout.n_layers)]
        names += [
            f"blocks.{v}.{point}"
            for v in range(layout.prelude, layout.core_start(K))
            for point in _PARTS
        ]
        names += [f"blocks.{v}.hook_resid_post" for v in range(layout.prelude)[-1:]]
        names += [f"loop.{t}.{point}" for t in range(K) for point in ("hook_in", "hook_out")]
        if self.config.variant == "mesh":
            names += [f"{cycle}.hook_memory" for cycle in self._cycle_names()]
        return names

    def _cycle_names(self) -> list[str]:
        return ["transition", *(f"loop.{t}" for t in range(self.config.K))]

    def resume(
        self,
        tokens: Any,
        kept: Mapping[str, Tensor],
        fwd_hooks: Sequence[tuple[str, Callable]],
        first: Iterable[str],
    ) -> Float[Tensor, "batch pos d_vocab"]:
        """Run with hooks from the first place that they change on.

        Args:
            tokens: The tokens, (batch, pos), or text.
            kept: `checkpoint_hooks` → their tensors in a pass over the same tokens.
            fwd_hooks: As in `run_with_hooks`; those before the place where the pass begins are
                not called.
            first: Hooks at which the pass may differ from the earlier one: it begins no later than
                the earliest of them. With hooks that stay (`add_hook`) the model runs whole.

        Returns:
            The logits, bit-equal to those of `run_with_hooks`.
        """
        changed = {self.canonical(name) for name in first}
        start = min((self._stage(name) for name in changed), default=_BEFORE_ALL)
        staying = any(point.fwd_hooks for point in self.hook_points())
        if start == _BEFORE_ALL or staying:
            return self.run_with_hooks(tokens, fwd_hooks=list(fwd_hooks))
        with self.hooks(fwd_hooks=list(fwd_hooks)):
            return self.unembed(self.ln_final(self._resumed(start, kept, changed)))

    def _stage(self, name: str) -> tuple[int, int]:
        """Where a hook stands: virtual layer, and 0 before its state enters, 1 in it, 2 after it.

        What comes after an iteration stands after its last layer.
        """
        layout = self.config.layout
        part, _, place = name.partition(".")
        index, _, point = place.partition(".")
        if part == "blocks":
            v = int(index)
            return _BEFORE_ALL if v < layout.prelude else (v, 1)
        if part == "transition":
            return (layout.prelude - 1, 2)
        if part == "loop":
            t = int(index)
            entering = point == "hook_in"
            return (layout.core_start(t), 0) if entering else (layout.core_start(t + 1) - 1, 2)
        return _BEFORE_ALL if part == "hook_embed" else (layout.core_start(layout.K), 0)

    def _resumed(
        self, start: tuple[int, int], kept: Mapping[str, Tensor], changed: Collection[str]
    ) -> Tensor:
        """h_out of a pass that begins at a stage."""
        layout, last = self.config.layout, self.config.layout.n_layers
        v, side = start
        h_emb = kept["hook_embed"]
        rotary = rotary_tables(self.config, h_emb.shape[1], h_emb)
        if v < layout.prelude:  # the transition
            pre = kept[f"blocks.{v}.hook_resid_post"] if layout.prelude else h_emb
            return self._cycles(h_emb, pre, rotary, last)
        if v >= layout.core_start(layout.K):
            if side == 0:
                return self._coda(kept["coda.hook_in"], rotary, last)
            x = self.blocks[v](kept[f"blocks.{v}.hook_resid_pre"], rotary)
            return self._coda_layers(v + 1, x, rotary, last)
        t = next(t for t in range(layout.K) if v < layout.core_start(t + 1))
        h, carry = kept[f"loop.{t}.hook_in"], self.recurrence.resumed(t, kept)
        if side == 0:
            return self._enter(t, h, carry, rotary, last)
        x = self._layer(v, kept, changed, rotary) if side == 1 else kept[f"loop.{t}.hook_out"]
        return self._iterate(t, v + 1, x, h, carry, rotary, last)

    def _layer(
        self, v: int, kept: Mapping[str, Tensor], changed: Collection[str], rotary: Rotary
    ) -> Tensor:
        """What leaves the layer in which a pass begins; what is known of its parts is not run."""
        prefix, x = f"blocks.{v}.", kept[f"blocks.{v}.hook_resid_pre"]
        points = {name.removeprefix(prefix) for name in changed if name.startswith(prefix)}
        block = self.blocks[v]
        assert isinstance(block, VirtualBlock)
        if not points <= _PARTS.keys():
            return block(x, rotary)
        given = {part: kept[prefix + point] for point, part in _PARTS.items()}
        if "attn.hook_z" not in points:
            del given["z"]
        if not self.config.parallel_residual and points != {"hook_mlp_out"}:
            del given["mlp_out"]
        return block.weights.resumed(x, block, given)
