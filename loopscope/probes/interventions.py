"""Interventions: what a model's output would be if something stood at a place.

Everything before the place is the clean pass's, bit for bit: a native model begins at the layer or
cycle of the first place, a wrapped one runs whole. With `frozen` routers (MeSH's write and read
weights, the weights of `dynamic`) the effect is the direct one; recomputed, as they are by
themselves, the total one.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any
from warnings import warn

import torch
from jaxtyping import Float
from torch import Tensor

from loopscope.errors import InputError, LoopCountError, unknown_name
from loopscope.models import Hooked, Trajectory, reading
from loopscope.probes.intervention_places import Place, cycle_name, state_hook
from loopscope.probes.target_names import HOWS
from loopscope.probes.update_terms import Terms, prelude_output, update_terms

GIVEN = ("mean", "resample", "patch")
"""Ways that put a given value."""

SKIPPED = ("iteration", "attention", "mlp", "head")
"""Kinds that can be skipped."""

ROUTERS = ".hook_weights"
"""What hooks of router weights end in."""

Value = Tensor | Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Intervention:
    """What is put at a place.

    `skip` of an iteration: h_m(t) := h(t) of the same pass; of an attention, MLP or head: it adds
    nothing, as with `zero`. `zero`: 0. `mean`, `resample`, `patch`: the given value, whatever it is
    called after. `erase`: what a function makes of the value.

    Attributes:
        place: Where.
        how: One of `HOWS`.
        value: A tensor that broadcasts to the place's (see `CleanRun.value`), or, to erase, a
            function of one; None for `skip` and `zero`.

    Raises:
        InputError: for a way that does not exist, that does not apply to the place, or without the
            value that it takes.
    """

    place: Place
    how: str
    value: Value | None = None

    def __post_init__(self) -> None:
        if self.how not in HOWS:
            raise unknown_name("way to intervene", self.how, HOWS)
        if self.how == "skip" and self.place.kind not in SKIPPED:
            raise InputError(
                f"{self.place.name} cannot be skipped: iterations, attentions, MLPs and heads can. "
                "Use how='zero'."
            )
        if self.how in GIVEN and not isinstance(self.value, Tensor):
            raise InputError(f"how={self.how!r} puts a given value: give value= a tensor.")
        if self.how == "erase" and (isinstance(self.value, Tensor) or not callable(self.value)):
            raise InputError("how='erase' takes value= a function from tensor to tensor.")
        if self.how in ("skip", "zero") and self.value is not None:
            raise InputError(f"how={self.how!r} takes no value; leave it out.")

    def answer(self, old: Tensor, part: int | None = None) -> Tensor:
        """Give what takes the place of a tensor.

        Args:
            old: What stands at the place.
            part: Which of the place's hooks it is from, where it has several.

        Returns:
            A tensor of the same shape, dtype and device.

        Raises:
            InputError: if the given value does not broadcast to it.
        """
        if self.how in ("skip", "zero"):
            return torch.zeros_like(old)
        if self.how == "erase":
            assert callable(self.value)
            new = self.value(old)
            if not isinstance(new, Tensor) or new.shape != old.shape:
                shape = tuple(new.shape) if isinstance(new, Tensor) else type(new).__name__
                raise InputError(
                    f"the function to erase at {self.place.name} gave {shape} for "
                    f"{tuple(old.shape)}; it must keep the shape."
                )
            return new.to(old)
        assert isinstance(self.value, Tensor)
        value = self.value if part is None else self.value[..., part, :]
        try:
            return value.to(old).expand_as(old)
        except RuntimeError:
            raise InputError(
                f"the value for {self.place.name} is {tuple(value.shape)}; what stands there is "
                f"{tuple(old.shape)}."
            ) from None


class CleanRun:
    """A pass without interventions: what they are held against and start from.

    Attributes:
        model: The model.
        tokens: Its input.
        trajectory: All states, with logits and, where there are slots, memory.
        kept: Hook → tensor, what is needed to go on from the middle, and router weights: of a
            native model four tensors (batch, pos, d_model) a layer besides the trajectory's.
    """

    def __init__(
        self, model: Hooked, tokens: Any, trajectory: Trajectory, kept: Mapping[str, Tensor]
    ) -> None:
        self.model, self.tokens, self.trajectory = model, tokens, trajectory
        self.kept = dict(kept)
        states = {f"loop.{path}": t for t, path in enumerate(trajectory.path)}
        for prefix, t in states.items():
            self.kept.setdefault(f"{prefix}.hook_in", trajectory.h[t])
            self.kept.setdefault(f"{prefix}.hook_out", trajectory.h_m[t])

    @property
    def logits(self) -> Tensor:
        """(batch, pos, d_vocab)."""
        assert self.trajectory.logits is not None
        return self.trajectory.logits

    @cached_property
    def terms(self) -> Terms:
        """What the states are sums of.

        Raises:
            InputError: where they are none.
        """
        terms, why = update_terms(self.model, self.trajectory)
        if terms is None:
            raise InputError(f"there are no edges: {why}.")
        return terms

    def value(self, place: Place) -> Tensor:
        """What stands at a place in this pass: the reference for mean, resample and patch.

        Args:
            place: A place of the model.

        Returns:
            (batch, pos, d_model); of an attention or MLP of several layers (batch, pos, layer,
            d_model); of a head (batch, pos, d_head); of a weight (batch, pos).
        """
        loop = self.trajectory.loops[place.loop]
        if place.kind == "iteration":
            return loop.h_m[place.t]
        if place.kind == "slot":
            return _memory(loop, place.t)[:, place.slot]
        if place.kind in ("write", "read"):
            return _weights(loop, place.kind, place.t)[..., place.slot]
        if place.kind == "edge":
            part = self.terms.part(place.source, place.t, self.kept.__getitem__)
            return part.to(loop.h[place.t + 1].dtype)
        if not set(place.hooks) <= self.kept.keys():
            self._keep_parts()
        tensors = [self.kept[hook] for hook in place.hooks]
        if place.kind == "head":
            return _of_head(place, tensors[0])
        return tensors[0] if len(tensors) == 1 else torch.stack(tensors, dim=2)

    @torch.no_grad()
    def _keep_parts(self) -> None:
        """Run once more, for what attentions, MLPs and heads give."""
        layers = [
            layer
            for loop in self.trajectory.loops.values()
            for path in loop.path
            for layer in self.model.layer_parts(path)
        ]
        hooks = [hook for layer in layers for hook in (*layer.attention, *layer.mlp, layer.z)]
        seen = _Seen(self.model)
        names = [name for name in dict.fromkeys(hooks) if name]
        self.model.run_with_hooks(self.tokens, fwd_hooks=[seen.keep(name) for name in names])
        self.kept |= seen.tensors


class _Seen:
    """What stood at hooks in a pass."""

    def __init__(self, model: Hooked) -> None:
        self.copies = model.copies
        self.tensors: dict[str, Tensor] = {}

    def keep(self, name: str) -> tuple[str, Callable]:
        """A hook that keeps what it sees under the name that was asked for."""

        def keep(x: Tensor, hook: Any) -> None:
            self.tensors[name] = x.detach().clone() if self.copies else x.detach()

        return name, reading(keep)


@torch.no_grad()
def clean_run(model: Hooked, tokens: Any, *, anew: bool = True) -> CleanRun:
    """Run a model once and keep what interventions are held against and start from.

    Args:
        model: A native or wrapped model that gives logits.
        tokens: Token ids (batch, pos), or text for a model with a tokenizer.
        anew: Wrap the model anew for a single text over which it loops otherwise than over its
            example.

    Returns:
        The pass; its `model` is wrapped anew for a single text over which the given one loops
        otherwise than over its example.

    Raises:
        InputError: for tokens the model cannot take, or a model without logits.
        LoopCountError: for tokens over which it loops otherwise, where it is not wrapped anew.
    """
    try:
        return _clean_run(model, tokens)
    except LoopCountError:
        if not anew or any(point.fwd_hooks for point in model.hook_points()):
            raise  # they would not be those of the model that is wrapped anew
        clean = _clean_run(model.wrapped_on(tokens), tokens)
        if len(clean.logits) > 1:  # each of several texts may run its own number
            raise
        return clean


def _clean_run(model: Hooked, tokens: Any) -> CleanRun:
    seen = _Seen(model)
    weights = [name for name in model.hook_dict if name.endswith(ROUTERS)]
    names = dict.fromkeys([*model.checkpoint_hooks(), *weights])
    with model.hooks(fwd_hooks=[seen.keep(name) for name in names]):
        trajectory = model.capture(tokens, memory=True, logits=True)
    return CleanRun(model, tokens, trajectory, seen.tensors)


@torch.no_grad()
def intervened(
    clean: CleanRun, interventions: Sequence[Intervention], *, frozen: bool = False
) -> Float[Tensor, "batch pos d_vocab"]:
    """Give the logits that a model has when something is put at places, several at once.

    Args:
        clean: A pass without interventions over the same tokens.
        interventions: What is put where; a later place sees what earlier ones changed.
        frozen: Keep the routers at their clean weights (direct effect) rather than recompute them
            (total effect). A weight that is intervened on is replaced either way. A model without
            routers gives the same for both.

    Returns:
        The logits. Where the value put at a place of the stream differs and the logits do not, a
        warning says so.

    Raises:
        InputError: for two interventions at one place, a value that does not fit, or a place that
            this input does not reach or that cannot be changed.
    """
    names = [intervention.place.name for intervention in interventions]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise InputError(f"two interventions at {twice}; give one for each place.")
    if not interventions:
        return clean.logits
    return _Pass(clean, interventions, frozen).run()


class _Pass:
    """One pass with interventions."""

    def __init__(
        self, clean: CleanRun, interventions: Sequence[Intervention], frozen: bool
    ) -> None:
        self.clean, self.model, self.trajectory = clean, clean.model, clean.trajectory
        self.interventions, self.frozen = interventions, frozen
        self.seen = _Seen(self.model)
        self.reached: set[str] = set()
        self.differs: set[str] = set()

    def run(self) -> Tensor:
        """The logits."""
        shadowed = () if self.model.slots_take_hooks else ("slot", "write", "read", "edge")
        memory = self.trajectory.transition is not None and self.trajectory.memory is not None
        in_states = [i for i in self.interventions if memory and i.place.kind in shadowed]
        direct = [i for i in self.interventions if i not in in_states]
        changes = [pair for i in direct for pair in self._changes(i)]
        if in_states:
            changes += SlotsInStates(self, in_states).hooks()
        first = [hook for hook, _ in changes]
        hooks = [*self._freezing(), *changes, *map(self.seen.keep, self._readings(in_states))]
        logits = self.model.resume(self.clean.tokens, self.clean.kept, hooks, first)
        self._check(logits)
        return logits

    def now(self, hook: str) -> Tensor:
        """What stands at a hook in this pass; before the first change, what the clean one had."""
        return self.seen.tensors[hook] if hook in self.seen.tensors else self.clean.kept[hook]

    def answer(self, intervention: Intervention, old: Tensor, part: int | None = None) -> Tensor:
        """What takes the place of a tensor; noted."""
        new = intervention.answer(old, part)
        self.note(intervention, old, new)
        return new.clone() if self.model.copies else new

    def note(self, intervention: Intervention, old: Tensor, new: Tensor) -> None:
        """Note that a place was reached, and whether its value differs."""
        name = intervention.place.name
        self.reached.add(name)
        if name not in self.differs and not torch.equal(old, new):
            self.differs.add(name)

    def _freezing(self) -> list[tuple[str, Callable]]:
        """Hooks that keep routers at their clean weights."""
        if not self.frozen:
            return []

        def at(name: str) -> Callable:
            return lambda w, hook: self.clean.kept[name].clone()  # others may write into it

        return [(name, at(name)) for name in self.clean.kept if name.endswith(ROUTERS)]

    def _readings(self, in_states: Sequence[Intervention]) -> list[str]:
        """Hooks whose tensors of this pass are needed."""
        names: list[str] = []
        for intervention in self.interventions:
            place = intervention.place
            if intervention.how == "skip" and place.kind == "iteration":
                names.append(f"loop.{place.path}.hook_in")
            if place.kind == "edge":
                names += self.clean.terms.hooks(place.source, place.t)
        if in_states:
            for t in range(self.trajectory.K):
                cycle = cycle_name(self.trajectory, t)
                names += [f"{cycle}.hook_out", f"{cycle}.write.hook_weights"]
                names += [f"{cycle}.read.hook_weights"]
            names += ["transition.write.hook_weights", "transition.read.hook_weights"]
        return list(dict.fromkeys(names))

    def _changes(self, intervention: Intervention) -> list[tuple[str, Callable]]:
        """Hooks that put something at a place."""
        place = intervention.place
        several = len(place.hooks) > 1
        return [
            (hook, self._change(intervention, i if several else None))
            for i, hook in enumerate(place.hooks)
        ]

    def _change(self, intervention: Intervention, part: int | None) -> Callable:
        place = intervention.place

        def whole(x: Tensor, hook: Any) -> Tensor:
            return self.answer(intervention, x, part)

        def skip(x: Tensor, hook: Any) -> Tensor:
            h = self.now(f"loop.{place.path}.hook_in")
            try:
                h = h.to(x).expand_as(x)  # an initial vector is the same at every position
            except RuntimeError:
                raise InputError(
                    f"{place.name} cannot be skipped: h({place.t}) is {tuple(h.shape)}, what the "
                    f"iteration gives {tuple(x.shape)}."
                ) from None
            self.note(intervention, x, h)
            return h

        def slot(memory: Tensor, hook: Any) -> Tensor:
            memory[:, place.slot] = self.answer(intervention, memory[:, place.slot])
            return memory

        def weight(w: Tensor, hook: Any) -> Tensor:
            w[..., place.slot] = self.answer(intervention, w[..., place.slot])
            return w

        def head(z: Tensor, hook: Any) -> Tensor:
            old = _of_head(place, z)
            old.copy_(self.answer(intervention, old))
            return z

        def edge(state: Tensor, hook: Any) -> Tensor:
            return self.with_part(intervention, state, self.now)

        if place.kind == "iteration" and intervention.how == "skip":
            return skip
        kinds = {"slot": slot, "write": weight, "read": weight, "head": head, "edge": edge}
        return kinds.get(place.kind, whole)

    def with_part(
        self, intervention: Intervention, state: Tensor, read: Callable[[str], Tensor]
    ) -> Tensor:
        """A state with another contribution of a source."""
        place = intervention.place
        part = self.clean.terms.part(place.source, place.t, read).to(state.device)
        old = part.to(state.dtype)
        new = self.answer(intervention, old)
        wide = (state.to(part) - part + new.to(part)).to(state.dtype)
        return torch.where((new == old) | (new.isnan() & old.isnan()), state, wide)

    def _check(self, logits: Tensor) -> None:
        """Notice what changed nothing.

        Raises:
            InputError: if a place was not reached.
        """
        missed = [i.place.name for i in self.interventions if i.place.name not in self.reached]
        if missed:
            raise InputError(
                f"{', '.join(missed)} was not reached on this input, so nothing was put there; "
                "leave it out, or wrap the model again with this input as example=."
            )
        stream = {i.place.name for i in self.interventions if i.place.kind not in _MAY_BE_UNREAD}
        if stream & self.differs and torch.equal(logits, self.clean.logits):
            warn(
                f"{', '.join(sorted(stream & self.differs))}: another value was put there and the "
                "logits are the same to the bit; nothing that leads to them reads it.",
                stacklevel=4,
            )


_MAY_BE_UNREAD = ("slot", "write", "read")


class SlotsInStates:
    """Changes of slots, weights and edges of a port, made in the states that are read (Eqs. 4, 5).

    Where hooks cannot change the slots, h(t+1) := Σ_b w_read_b(t)·m_b(t) with the slots and weights
    as they are to be. A token at which nothing differs keeps the state that the model made.
    """

    def __init__(self, run: _Pass, interventions: Sequence[Intervention]) -> None:
        self.run, self.trajectory = run, run.trajectory
        self.at: dict[tuple[str, int], list[Intervention]] = {}
        for intervention in interventions:
            place = intervention.place
            self.at.setdefault((place.kind, place.t), []).append(intervention)
        self.first = min(intervention.place.t for intervention in run.interventions)
        self.put: Tensor | None = None  # what interventions added to the slots
        self.drift: Tensor | None = None  # what the model wrote otherwise than in the clean pass
        self.weights: dict[str, Tensor] = {}

    def hooks(self) -> list[tuple[str, Callable]]:
        """Hooks at the states after the first place of any kind."""
        steps = range(self.first, self.trajectory.K)
        return [(state_hook(self.run.model, self.trajectory, t + 1), self._at(t)) for t in steps]

    def _at(self, t: int) -> Callable:
        def at(state: Tensor, hook: Any) -> Tensor | None:
            return self._state(t, state)

        return at

    def _read(self, name: str) -> Tensor:
        return self.weights[name] if name in self.weights else self.run.now(name)

    def _state(self, t: int, made: Tensor) -> Tensor | None:
        """h(t + 1)."""
        cycle = cycle_name(self.trajectory, t)
        memory = _memory(self.trajectory, t).to(made.device)
        wide = torch.promote_types(memory.dtype, torch.float32)
        value = self._written(t).to(made.device, wide)
        weights = self._read(f"{cycle}.write.hook_weights").to(made.device)
        if self.put is None:
            self.put = torch.zeros_like(memory, dtype=wide)
            self.drift = torch.zeros_like(memory, dtype=wide)
        assert self.drift is not None
        if t >= 0:  # nothing before the transition's read can be changed
            clean = _outer(self.trajectory.h_m[t].to(value), _weights(self.trajectory, "write", t))
            self.drift = self.drift.to(value) + (_outer(value, weights) - clean)
        self.put = self.put.to(value)
        written = self._changed("write", t, weights)
        if written is not weights:
            self.weights[f"{cycle}.write.hook_weights"] = written
            self.put = self.put + _outer(value, written.to(wide) - weights.to(wide))
        for intervention in self.at.get(("slot", t), ()):
            slot = intervention.place.slot
            old = (memory[:, slot].to(wide) + self.drift[:, slot]) + self.put[:, slot]
            shown = old.to(memory.dtype)
            new = self.run.answer(intervention, shown)
            self.put[:, slot] += torch.where(new == shown, 0, new.to(wide) - old)
        read = self._read(f"{cycle}.read.hook_weights").to(made.device)
        reading = self._changed("read", t, read)
        if reading is not read:
            self.weights[f"{cycle}.read.hook_weights"] = reading
        state = self._reading(made, memory, read, reading)
        for intervention in self.at.get(("edge", t), ()):
            state = self.run.with_part(intervention, state, self._read)
        return state

    def _reading(self, made: Tensor, memory: Tensor, read: Tensor, reading: Tensor) -> Tensor:
        """What is read of the slots as they are to be; what was made where nothing differs."""
        assert self.put is not None and self.drift is not None
        unread = (self.put == 0).all(-1).mT | (reading == 0)  # of each token and slot
        same = (unread & (read == reading)).all(-1)
        if bool(same.all()):
            return made
        slots = (memory.to(self.put) + self.drift) + self.put
        state = torch.einsum("bspd,bps->bpd", slots, reading.to(slots)).to(made.dtype)
        return torch.where(same[..., None], made, state)

    def _written(self, t: int) -> Tensor:
        """What is written at a step in this pass."""
        if t < 0:
            return prelude_output(self.trajectory)
        return self.run.now(f"{cycle_name(self.trajectory, t)}.hook_out")

    def _changed(self, kind: str, t: int, weights: Tensor) -> Tensor:
        """Weights with what interventions put; the same tensor without any."""
        for intervention in self.at.get((kind, t), ()):
            weights = weights.clone()
            slot = intervention.place.slot
            weights[..., slot] = self.run.answer(intervention, weights[..., slot])
        return weights


def _outer(value: Tensor, weights: Tensor) -> Tensor:
    """(batch, slot, pos, d_model) of what is written."""
    return value.unsqueeze(1) * weights.to(value).transpose(1, 2).unsqueeze(-1)


def _memory(trajectory: Trajectory, t: int) -> Tensor:
    transition = trajectory.transition
    memory = trajectory.memory[t] if t >= 0 and trajectory.memory else None
    memory = transition.memory if t < 0 and transition is not None else memory
    if memory is None:
        raise InputError("there are no memory slots on this input.")
    return memory


def _weights(trajectory: Trajectory, kind: str, t: int) -> Tensor:
    holder = trajectory.transition if t < 0 else trajectory
    weights = getattr(holder, f"w_{kind}", None)
    weights = weights if t < 0 or weights is None else weights[t]
    if weights is None:
        raise InputError(f"there are no {kind} weights on this input.")
    return weights


def _of_head(place: Place, z: Tensor) -> Tensor:
    """The part of `z` that is a head's, as a view."""
    assert place.head is not None
    if not place.heads:
        return z[..., place.head, :]
    width = z.shape[-1] // place.heads
    return z[..., place.head * width : (place.head + 1) * width]


__all__ = ["GIVEN", "CleanRun", "Intervention", "clean_run", "intervened"]
