"""Places: where in a looped model something can be replaced, by name.

| name | kind | what stands there |
|---|---|---|
| `loop1` | iteration | h_m(1), what iteration 1 gives (`loopH0.L2` in nested loops) |
| `loop1.attn`, `loop1.layer0.attn` | attention | what attention gives, in all layers or in one |
| `loop1.mlp`, `loop1.layer0.mlp` | mlp | the same of the MLP |
| `loop1.layer0.head3` | head | what a head hands to the output projection |
| `m2@1` | slot | slot 2 of the memory after iteration 1's write; `@-1`: after the transition's |
| `write m2@1`, `read m2@1` | write, read | the router's weight of slot 2 at iteration 1 |
| `h_m0>h2` | edge | what h_m(0) adds to h(2): α·h_m(0) (MeSH Eq. 7), or its term of the sum |
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from loopscope.errors import unknown_name
from loopscope.models import Hooked, Trajectory
from loopscope.names import MAIN_LOOP, state_name
from loopscope.probes.update_terms import prelude_is_written, update_terms

KINDS = ("iteration", "attention", "mlp", "slot", "write", "read", "edge", "head")
"""What can be intervened on."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """A place at which something can be replaced.

    Attributes:
        name: See the module's table.
        kind: One of `KINDS`.
        t: The iteration; -1 is MeSH's transitional cycle. Of an edge the one that makes the state:
            t of h(t + 1), as in the table `routing`.
        loop: Name of the loop.
        path: Where the iteration stands; empty for the transition.
        layer: The layer of the iteration, None for all of them.
        head, slot: Which one.
        heads: Of a head, how many lie side by side in the last axis; 0 where they have an axis.
        source: Of an edge: `h_emb`, `prelude`, `h0`, `h_m0` …
        hooks: Where it is replaced; several for the parts of several layers.
    """

    name: str
    kind: str
    t: int
    loop: str = MAIN_LOOP
    path: str = ""
    layer: int | None = None
    head: int | None = None
    slot: int | None = None
    heads: int = 0
    source: str = ""
    hooks: tuple[str, ...] = ()

    @property
    def state(self) -> str:
        """Of an edge, the state that it leads to."""
        return state_name(self.t + 1)


def places(
    model: Hooked, trajectory: Trajectory, kinds: Sequence[str] = KINDS
) -> tuple[list[Place], list[str]]:
    """List the places of a model.

    Args:
        model: A native or wrapped model.
        trajectory: One of its passes, with memory where it has slots.
        kinds: Which kinds; see `KINDS`.

    Returns:
        The places, kind by kind in order of execution, and a line for each reason why the
        model has not some kinds, or not everywhere.

    Raises:
        UnknownNameError: for a kind that does not exist.
    """
    for kind in kinds:
        if kind not in KINDS:
            raise unknown_name("kind of place", kind, KINDS)
    found: list[Place] = []
    why: dict[str, list[str]] = {}
    for kind in dict.fromkeys(kinds):
        of_kind, note = _FINDERS[kind](model, trajectory, kind)
        found += of_kind
        if note:
            why.setdefault(note, []).append(kind)
    return found, [f"{', '.join(kinds)}: {note}" for note, kinds in why.items()]


def place_named(model: Hooked, trajectory: Trajectory, name: str) -> Place:
    """Find a place by its name.

    Args:
        model: A native or wrapped model.
        trajectory: One of its passes, with memory where it has slots.
        name: Such as `loop1`, `loop1.attn`, `m2@1`, `read m2@1`, `h_m0>h2`, `loop1.layer0.head3`.

    Returns:
        The place.

    Raises:
        UnknownNameError: if the model has no such place; near matches are listed.
    """
    named = [place for place in places(model, trajectory, [_kind(name)])[0] if place.name == name]
    if not named:
        every, notes = places(model, trajectory)
        hint = " ".join(f"({note})" for note in notes)
        raise unknown_name("place", name, [place.name for place in every], hint=hint)
    return named[0]


def _kind(name: str) -> str:
    """The kind that a name looks like."""
    if ">" in name:
        return "edge"
    if "@" in name:
        first = name.partition(" ")[0]
        return first if first in ("write", "read") else "slot"
    last = name.rpartition(".")[2]
    return {"attn": "attention", "mlp": "mlp"}.get(
        last, "head" if last.startswith("head") else "iteration"
    )


def has_hook(model: Hooked, name: str) -> bool:
    """Whether a model has a hook of that name, alias or canonical.

    Args:
        model: The model.
        name: The name.

    Returns:
        Whether it has.
    """
    return name in model.hook_dict or name in model.aliases


Found = tuple[list[Place], str]

NO_LOOP = "the model has no loop"


def _iterations(model: Hooked, trajectory: Trajectory, kind: str) -> Found:
    found: list[Place] = []
    for name, loop in trajectory.loops.items():
        for t, path in enumerate(loop.path):
            hook = f"loop.{path}.hook_out"
            if has_hook(model, hook):
                place = Place(
                    name=f"loop{path}", kind=kind, t=t, loop=name, path=path, hooks=(hook,)
                )
                found.append(place)
    return found, "" if found else NO_LOOP


def _sublayers(model: Hooked, trajectory: Trajectory, kind: str) -> Found:
    """Attention or MLP: of all layers of an iteration together, then of each."""
    short = {"attention": "attn", "mlp": "mlp"}[kind]
    found: list[Place] = []
    missing: list[str] = []
    for name, loop in trajectory.loops.items():
        for t, path in enumerate(loop.path):
            layers = [getattr(parts, kind) for parts in model.layer_parts(path)]
            hooks = tuple(hook for layer in layers for hook in layer)
            if not hooks:
                missing.append(f"loop{path}")
                continue
            at: dict[str, Any] = {"kind": kind, "t": t, "loop": name, "path": path}
            found.append(Place(name=f"loop{path}.{short}", hooks=hooks, **at))
            found += [
                Place(name=f"loop{path}.layer{i}.{short}", layer=i, hooks=layer, **at)
                for i, layer in enumerate(layers)
                if layer
            ]
    if not trajectory.K:
        return found, NO_LOOP
    what = {"attention": "attention", "mlp": "MLP"}[kind]
    return found, _missing(f"no {what} was found by name in", missing)


def _heads(model: Hooked, trajectory: Trajectory, kind: str) -> Found:
    found: list[Place] = []
    missing: list[str] = []
    for name, loop in trajectory.loops.items():
        for t, path in enumerate(loop.path):
            parts = model.layer_parts(path)
            if not any(layer.heads for layer in parts):
                missing.append(f"loop{path}")
            found += [
                Place(
                    name=f"loop{path}.layer{i}.head{head}", kind=kind, t=t, loop=name, path=path,
                    layer=i, head=head, heads=0 if layer.shaped else layer.heads,
                    hooks=(layer.z,),
                )
                for i, layer in enumerate(parts)
                for head in range(layer.heads)
            ]  # fmt: skip
    if not trajectory.K:
        return found, NO_LOOP
    return found, _missing("no attention with a known output projection was found in", missing)


def _missing(what: str, paths: Sequence[str]) -> str:
    rest = f" and {len(paths) - 3} more" if len(paths) > 3 else ""
    return f"{what} {', '.join(paths[:3])}{rest}" if paths else ""


def _slots(model: Hooked, trajectory: Trajectory, kind: str) -> Found:
    """Slots, and write and read weights of them."""
    why = why_no_slots(model, trajectory)
    if why:
        return [], why
    point = {"slot": "hook_memory"}.get(kind, f"{kind}.hook_weights")
    prefix = "" if kind == "slot" else f"{kind} "
    weights = trajectory.w_write
    assert weights is not None
    first, note = -1, ""
    if kind == "write" and not model.slots_take_hooks and not prelude_is_written(trajectory):
        first, note = 0, "what the transition writes is not known, so its weights are left out"
    return [
        Place(
            name=f"{prefix}m{slot}@{t}", kind=kind, t=t, loop=trajectory.loop, path=path,
            slot=slot, hooks=(f"{cycle_name(trajectory, t)}.{point}",),
        )
        for t, path in [*enumerate(("", *trajectory.path), start=-1)][first + 1 :]
        for slot in range(weights[0].shape[-1])
    ], note  # fmt: skip


def why_no_slots(model: Hooked, trajectory: Trajectory) -> str:
    """Why slots and their weights cannot be replaced; empty where they can.

    Args:
        model: A native or wrapped model.
        trajectory: One of its passes, with memory where it has slots.

    Returns:
        A reason.
    """
    if trajectory.memory is None or trajectory.transition is None:
        return "the model has no memory slots (or they are not at hand on this input)"
    steps = range(trajectory.K + 1)
    lacking = [] if model.slots_take_hooks else [
        state_name(t) for t in steps if not state_hook(model, trajectory, t)
    ]  # fmt: skip
    return _missing("what is read of the memory cannot be replaced at", lacking)


def cycle_name(trajectory: Trajectory, t: int) -> str:
    """The hooks' prefix of a cycle of the memory.

    Args:
        trajectory: A pass of the model.
        t: The iteration, -1 for the transition.

    Returns:
        `transition` or `loop.{path}`.
    """
    return "transition" if t < 0 else f"loop.{trajectory.path[t]}"


def state_hook(model: Hooked, trajectory: Trajectory, t: int) -> str:
    """The hook at which h(t) is replaced for all that reads it; empty where there is none.

    Args:
        model: A native or wrapped model.
        trajectory: One of its passes.
        t: 0 … K; h(K) is replaced where the coda reads it.

    Returns:
        A name.
    """
    if t == trajectory.K:
        name = model.coda_hook if trajectory.K else ""
    else:
        name = f"loop.{trajectory.path[t]}.hook_state"
    return name if has_hook(model, name) else ""


def _edges(model: Hooked, trajectory: Trajectory, kind: str) -> Found:
    if not trajectory.K:
        return [], NO_LOOP
    terms, why = update_terms(model, trajectory)
    if terms is None:
        return [], why
    found: list[Place] = []
    missing: list[str] = []
    for t in range(-1, trajectory.K):
        hook = state_hook(model, trajectory, t + 1)
        sources = terms.sources(t)
        if sources and not hook:
            missing.append(state_name(t + 1))
            continue
        found += [
            Place(
                name=f"{source}>{state_name(t + 1)}", kind=kind, t=t, loop=trajectory.loop,
                path=trajectory.path[t] if t >= 0 else "", source=source, hooks=(hook,),
            )
            for source in sources
        ]  # fmt: skip
    return found, _missing("a state cannot be replaced for all that reads it:", missing)


_FINDERS: dict[str, Callable[[Hooked, Trajectory, str], Found]] = {
    "iteration": _iterations,
    "attention": _sublayers,
    "mlp": _sublayers,
    "slot": _slots,
    "write": _slots,
    "read": _slots,
    "edge": _edges,
    "head": _heads,
}
