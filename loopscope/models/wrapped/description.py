"""What a wrapped model is made of: counts, facts, and its map as a tree of lines."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

from loopscope.models.hooked import Branch, ParameterCount
from loopscope.models.loops import (
    Iteration,
    Loop,
    LoopMap,
    Port,
    Router,
    Unit,
    Weight,
    named_weights,
)
from loopscope.names import state_names


@dataclass(frozen=True, kw_only=True)
class WrappedCount(ParameterCount):
    """Parameters of a wrapped model.

    Attributes:
        shared: Those that more than one iteration of a loop uses.
    """

    shared: int


def count_wrapped(module: nn.Module, loop_map: LoopMap, d_vocab: int | None) -> WrappedCount:
    """Count the parameters of a wrapped model, each once however often it is named.

    Args:
        module: The original.
        loop_map: Its map.
        d_vocab: Its vocabulary; None where unknown.

    Returns:
        All, those outside token embedding and unembedding, those of routers and gates, and those
        that iterations share.
    """
    named = named_weights(module)
    total = _size(named.values())
    ends = [named[name] for name in _ends(module, d_vocab, loop_map) if name in named]
    routers = {port.module for router in loop_map.routers for port in router.outputs if port}
    routers |= {router.transition.module for router in loop_map.routers if router.transition}
    return WrappedCount(
        total=total,
        non_embedding=total - _size(ends),
        router=_size(
            weight
            for name, weight in named.items()
            if any(name.startswith(f"{router}.") for router in routers)
        ),
        shared=_size(
            named[name] for loop in loop_map.loops for name in loop.shared if name in named
        ),
    )


def _ends(module: nn.Module, d_vocab: int | None, loop_map: LoopMap) -> list[str]:
    """Names of the weights of the token embedding and of the unembedding (not its bias)."""
    tables = {
        name: part.num_embeddings
        for name, part in module.named_modules()
        if isinstance(part, nn.Embedding)
    }
    rows = d_vocab
    if loop_map.vocabulary is not None:  # of a padded one
        rows = min((n for n in tables.values() if n >= loop_map.vocabulary), default=None)
    ends = [name for name, n in tables.items() if n == rows]
    ends += [] if loop_map.head is None else [loop_map.head]
    weights = [f"{name}.weight".lstrip(".") for name in ends]
    return weights if loop_map.head_weight is None else [*weights, loop_map.head_weight]


def _size(weights: Iterable[Weight]) -> int:
    return sum({weight.key: weight.size for weight in weights}.values())


READERS = "all that reads it (routers, residual, injections too)"
"""Whom a patch of `hook_state` reaches."""

SHOWN, PATTERNS = 6, 16
"""Lines of one kind, and patterns of addresses, that are shown before the rest is counted."""


def describe_wrapped(model: Any) -> dict[str, Any]:
    """Facts about a wrapped model, as plain data.

    Args:
        model: A wrapped model.

    Returns:
        Name, class, layout, widths, parameter counts, states, tokenizer, and where it came from.
    """
    loop_map, counts = model.map, model.counts()
    facts: dict[str, Any] = {
        "name": model.name,
        "class": type(model.module).__name__,
        "layout": f"{loop_map} ({_source(loop_map)})",
        "iterations K": loop_map.K
        if len(loop_map.loops) < 2
        else ", ".join(f"{loop.name} {loop.K}" for loop in loop_map.loops),
        "layers": f"{loop_map.n_layers} of compute",
        "width": f"d_model {model.config.d_model}",
        "vocabulary": _or_unknown(model.config.d_vocab),
        "context": _or_unknown(model.config.n_ctx),
        "parameters": f"{counts.total:,} ({counts.non_embedding:,} non-embedding, "
        f"{counts.shared:,} shared by iterations)",
    }
    if counts.router:
        facts["routers"] = f"{counts.router:,} parameters"
    if loop_map.loops:
        facts["states"] = ", ".join(["h_emb", *state_names(loop_map.K), "h_out"])
    else:
        facts["states"] = "h_emb, h_out (no loop; --layout groups the layers into virtual blocks)"
    facts["dtype, device"] = f"{str(model.cfg.dtype).removeprefix('torch.')}, {model.cfg.device}"
    facts["tokenizer"] = "yes" if model.tokenizer is not None else "none: token ids only"
    if model.provenance.get("untrained"):
        facts["training"] = f"none (untrained twin, seed {model.provenance.get('seed')})"
    if unused := model.provenance.get("unused_weights"):
        more = f" and {len(unused) - SHOWN} more" if len(unused) > SHOWN else ""
        facts["weights not used"] = ", ".join(unused[:SHOWN]) + more
    return facts


def map_tree(module: nn.Module, loop_map: LoopMap) -> Branch:
    """A map as a tree: roles, loops, iterations, parameters, routers, notes.

    Args:
        module: The model.
        loop_map: Its map.

    Returns:
        The root, whose line is the layout.
    """
    sizes = {name: weight.size for name, weight in named_weights(module).items()}
    root = Branch(f"{loop_map}  ({_source(loop_map)}, unrolled depth {loop_map.n_layers})")
    root.add(f"h_emb: {_port(loop_map.embed)}")
    _role(root, "prelude", loop_map.prelude)
    for loop in loop_map.loops:
        if loop.parent is None:
            _loop(root, loop, loop_map, sizes)
    if loop_map.between:
        _role(root, "between the loops", loop_map.between)
    _role(root, "coda", loop_map.coda)
    root.add(f"h_out: {_port(loop_map.h_out)}")
    ends = {"final norm": loop_map.norm, "unembedding": loop_map.unembedding}
    for title, name in ends.items():
        if name:
            root.add(f"{title}: {name}")
    if not loop_map.loops:
        root.add("no loop: a layout string such as 4+8+8+4 groups the layers into virtual blocks")
    if loop_map.random:
        root.add("random numbers are drawn in each forward pass; capture seeds them")
    for note in (*loop_map.doubts, *loop_map.state_notes, *loop_map.notes):
        root.add(f"note: {note}")
    return root


def address_patterns(loop_map: LoopMap, names: Iterable[str]) -> dict[str, int]:
    """Addresses with the iteration written {t}, and how many each stands for.

    Args:
        loop_map: The map whose iterations the addresses carry.
        names: Addresses, such as `loop.H0.L2.layers.0.hook_in`.

    Returns:
        Patterns, such as `loop.H{t}.L{t}.layers.0.hook_in`, in order of first appearance.
    """
    paths = {iteration.path for loop in loop_map.loops for iteration in loop.iterations}
    groups: dict[str, int] = {}
    for name in names:
        parts = name.split(".")
        # the longest path: H0.L2 and not H0
        ends = [n for n in range(2, len(parts)) if ".".join(parts[1:n]) in paths]
        if parts[0] == "loop" and ends:
            path = _pattern(".".join(parts[1 : ends[-1]]))
            name = ".".join(["loop", path, *parts[ends[-1] :]])
        groups[name] = groups.get(name, 0) + 1
    return groups


def address_listing(
    loop_map: LoopMap, addresses: Iterable[str], aliases: Iterable[str], *, every: bool
) -> list[str]:
    """The addresses of a wrapped model as lines.

    Args:
        loop_map: Its map.
        addresses: Canonical names.
        aliases: Further names; those of states are listed too.
        every: Each of them; otherwise patterns, with how many they stand for.

    Returns:
        A heading and a line for each.
    """
    names = list(addresses)
    states = [name for name in aliases if not name.startswith("blocks.") and ".layer." not in name]
    lines = [f"{len(names)} addresses{'' if every else '; t: iteration, --hooks lists all'}"]
    if every:
        lines += [f"  {name}" for name in (*states, *names)]
    else:
        patterns = list(address_patterns(loop_map, [*states, *names]).items())
        lines += [
            f"  {name:<52}{f'× {n}' if n > 1 else ''}".rstrip() for name, n in patterns[:PATTERNS]
        ]
        if len(patterns) > PATTERNS:
            lines.append(f"  … and {len(patterns) - PATTERNS} more")
    also = ["loop.{t}.layer.{l}.…"] if loop_map.loops else []
    lines += [f"  {_reach(loop)}" for loop in loop_map.loops[:1]]
    return [*lines, f"  {' and '.join([*also, 'blocks.{v}.hook_resid_pre|post'])} are aliases"]


def compact(names: Iterable[str]) -> list[str]:
    """Names, runs of consecutive numbers written once: `a.0.x`, `a.1.x` as `a.0…1.x`.

    Args:
        names: Names with parts between dots; repeated ones count once.

    Returns:
        The shorter list, in the same order.
    """
    runs: list[tuple[str, int, int, str] | str] = []
    for name in dict.fromkeys(names):
        digits = list(re.finditer(r"(?<=\.)\d+(?=\.|$)", f".{name}"))
        if not digits:
            runs.append(name)
            continue
        last = digits[-1]
        head, n, tail = f".{name}"[1 : last.start()], int(last[0]), f".{name}"[last.end() :]
        before = runs[-1] if runs else ""
        if isinstance(before, tuple) and (before[0], before[2] + 1, before[3]) == (head, n, tail):
            runs[-1] = (head, before[1], n, tail)
        else:
            runs.append((head, n, n, tail))
    return [
        run if isinstance(run, str) else f"{run[0]}{_span(run[1], run[2])}{run[3]}" for run in runs
    ]


def _span(first: int, last: int) -> str:
    return str(first) if first == last else f"{first}…{last}"


def _role(root: Branch, title: str, units: tuple[Unit, ...]) -> None:
    depth = sum(len(unit.layers) for unit in units)
    if not depth:
        root.add(f"{title}: none")
        return
    names = compact(layer for unit in units for layer in unit.layers)
    root.add(f"{title}: {_count(depth, 'layer')}", names)


def _loop(parent: Branch, loop: Loop, loop_map: LoopMap, sizes: dict[str, int]) -> None:
    inner = [nested for nested in loop_map.loops if nested.parent == loop.name]
    first = loop.iterations[0]
    runs = len({it.path.rpartition(".")[0] for it in loop.iterations})
    times = f"K = {loop.K}" + (f" ({loop.K // runs} in each of {runs} runs)" if runs > 1 else "")
    branch = parent.add(f"loop {loop.name}: {times}, {_MECHANICS[loop.mechanic]}")
    units = first.units if loop.mechanic == "module" else _every_unit(loop)
    names = compact(layer for unit in units for layer in unit.layers)
    branch.add(f"core: {_count(sum(len(u.layers) for u in first.units), 'layer')}", names)
    branch.add(f"h(t): {_port(first.h)}")
    branch.add(f"h_m(t): {_port(first.h_m)}")
    if loop.mixing:
        branch.add(f"h(t+1) = {loop.mixing}")
    branch.add(f"h(K): {_port(loop.after)}")
    branch.add(_reach(loop), _no_state(loop))
    for state in loop.named if len(loop.named) > 1 else ():
        main = ", the main one" if state is loop.named[0] else ""
        lines = [f"before an iteration: {_port(state.h[0])}", f"after it: {_port(state.h_m[0])}"]
        branch.add(f"state {state.name}{main}", lines)
    if inner or len(loop.iterations) > 1:
        branch.add(f"iterations: {_paths(loop.iterations)}")
    _parameters(branch, loop, sizes)
    cut = [it for it in loop.iterations if not it.grad]
    if cut:
        branch.add(f"gradients are cut in {_paths(cut)}")
    for router in loop_map.routers:
        if router.loop == loop.name:
            _router(branch, router)
    for count in loop_map.counts:
        if count.loop == loop.name:
            branch.add(f"number of iterations: {_COUNTS[count.kind]} {count.name} (loops=n)")
    for nested in inner:
        _loop(branch, nested, loop_map, sizes)


def _reach(loop: Loop) -> str:
    """Whom a patch of a state reaches."""
    path = f"loop.{_pattern(loop.iterations[0].path)}"
    if loop.iterations[-1].h.side == "out":  # what a module gave last, of several states
        return f"{path}.hook_in and {path}.hook_state: h(t) for {READERS}"
    return f"{path}.hook_in: h(t) for the core alone; {path}.hook_state: for {READERS}"


def _no_state(loop: Loop) -> list[str]:
    """In which iterations the state cannot be replaced where it is made."""
    without = [it for it in loop.iterations if it.producer is None]
    if not without:
        return []
    which = "any iteration" if len(without) == loop.K else f"iteration {_paths(without)}"
    return [
        f"no hook_state in {which}: h(t) is a part of another tensor there, read before the "
        "iteration too, or made by code that cannot be seen"
    ]


def _pattern(path: str) -> str:
    return re.sub(r"\d+", "{t}", path)


def _parameters(branch: Branch, loop: Loop, sizes: dict[str, int]) -> None:
    """Lines on the parameters that iterations share, and on those that only one of them uses."""
    total = sum(sizes.get(name, 0) for name in loop.shared)
    if loop.shared:
        text = f"shared by iterations: {total:,} parameters in {_count(len(loop.shared), 'tensor')}"
        branch.add(text)
    else:
        branch.add("shared by iterations: no parameters")
    private = [it for it in loop.iterations if it.own]
    if private:
        lines = [
            f"{it.path}: {sum(sizes.get(n, 0) for n in it.own):,} in {', '.join(compact(it.own))}"
            for it in private[:SHOWN]
        ]
        if len(private) > SHOWN:
            lines.append(f"… and {len(private) - SHOWN} more iterations")
        branch.add("of one iteration only", lines)


def _router(branch: Branch, router: Router) -> None:
    ports = [port for port in (router.transition, *router.outputs) if port is not None]
    what = "gate" if router.kind == "gate" else f"{router.kind} router"
    branch.add(f"{what}: {', '.join(compact(port.module for port in ports))}")


def _every_unit(loop: Loop) -> tuple[Unit, ...]:
    return tuple(unit for it in loop.iterations for unit in it.units)


def _paths(iterations: Iterable[Iteration]) -> str:
    paths = [it.path for it in iterations]
    if len(paths) > 2 and all(path.isdigit() for path in paths):
        numbers = [int(path) for path in paths]
        if numbers == list(range(numbers[0], numbers[-1] + 1)):
            return f"{numbers[0]} … {numbers[-1]}"
    if len(paths) > 12:
        return ", ".join(paths[:5]) + f" … {paths[-1]}"
    return ", ".join(paths)


def _port(port: Port) -> str:
    phrase = "what {} is given" if port.side == "in" else "what {} gives"
    if port.operand:
        phrase = "what is added up to be given to {}"
    part = f", columns {port.columns[0]}…{port.columns[1] - 1}" if port.columns else ""
    nth = f" at its call {port.call + 1}" if port.call else ""
    width = f", width {port.shape[-1]}" if port.shape and not port.columns else ""
    return phrase.format(port.module or "the model") + nth + part + width


def _count(n: int, what: str) -> str:
    return f"{n} {what}{'' if n == 1 else 's'}"


def _source(loop_map: LoopMap) -> str:
    return _SOURCES.get(loop_map.source, loop_map.source)


def _or_unknown(value: Any) -> Any:
    return "unknown" if value is None else value


_MECHANICS = {
    "module": "the same modules are called again",
    "parameters": "distinct modules share parameters",
    "none": "the iterations share nothing",
}
_COUNTS = {
    "argument": "argument of forward",
    "attribute": "attribute",
    "config": "entry of the configuration",
}
_SOURCES = {
    "found": "found in a traced forward pass",
    "spec": "as the spec says",
    "family": "a known family",
    "layout": "grouped by a layout",
}
