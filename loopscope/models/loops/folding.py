"""Folding: a sequence of calls back into the nested loops that made it (needs no torch)."""

from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Leaf:
    """One call."""

    symbol: Hashable
    index: int

    @property
    def key(self) -> Hashable:
        """What makes two calls calls of the same thing."""
        return self.symbol

    def leaves(self) -> Iterator["Leaf"]:
        """The calls in it, in order."""
        yield self


@dataclass(frozen=True)
class Sequence_:
    """Calls and loops that follow each other, always the same; the last may lack its end."""

    key: Hashable
    parts: tuple["Node", ...]

    def leaves(self) -> Iterator[Leaf]:
        """The calls in it, in order."""
        for part in self.parts:
            yield from part.leaves()


@dataclass(frozen=True)
class Run:
    """A loop that is run once: its iterations, alike except for their inner loops' lengths."""

    bodies: tuple["Node", ...]

    @property
    def key(self) -> Hashable:
        """That of its body: loops of one body are the same, however often they run."""
        return ("run", self.bodies[0].key)

    def leaves(self) -> Iterator[Leaf]:
        """The calls in it, in order."""
        for body in self.bodies:
            yield from body.leaves()


Node = Leaf | Sequence_ | Run


def fold(symbols: Sequence[Hashable], indices: Sequence[int] | None = None) -> list[Node]:
    """Find the loops that a sequence of symbols consists of.

    Two readings are made. Kept is the one that leaves fewer calls of a loop's parts outside of it,
    then the shorter one. One looks for the longest exact repetition,
    and then inside and around it (`abacabac`: two of abac). The other joins what always stands
    together: equal neighbours become a run, symbols that always follow each other one symbol, runs
    of one body count as the same whatever their length, and the last iteration may lack its end
    (`LHLLLHLLH`: three of a run of L and an H; `cicic`: ci, ci, c).

    Args:
        symbols: One per call, in the order of the calls.
        indices: What to number the calls with; 0, 1, … when not given.

    Returns:
        What is left at the top: runs, and calls that no loop explains.
    """
    numbers = range(len(symbols)) if indices is None else indices
    return _fold([Leaf(s, i) for s, i in zip(symbols, numbers, strict=True)])


def _fold(leaves: list[Leaf]) -> list[Node]:
    joined = _fold_by_joining(list(leaves))
    exact = _fold_exactly(leaves)
    if exact is None:
        return joined
    return min((joined, exact), key=lambda nodes: (_left_over(nodes), _length(nodes)))


def _left_over(nodes: Sequence[Node]) -> int:
    """Calls outside of all loops of what some loop calls too."""
    looped = {leaf.symbol for node in nodes if isinstance(node, Run) for leaf in node.leaves()}
    outside = [leaf for node in nodes if not isinstance(node, Run) for leaf in node.leaves()]
    return sum(leaf.symbol in looped for leaf in outside)


def _length(nodes: Iterable[Node]) -> int:
    """Length of a reading: symbols to write down, one more for each loop and irregularity."""
    total = 0
    for node in nodes:
        if isinstance(node, Leaf):
            total += 1
        elif isinstance(node, Sequence_):
            total += _length(node.parts)
        else:
            sizes = [len(list(body.leaves())) for body in node.bodies]
            fullest = node.bodies[sizes.index(max(sizes))]
            total += 1 + _length([fullest]) + _irregular(node)
    return total


def _irregular(run: Run) -> int:
    """One for a last iteration that lacks its end, one for inner loops of different lengths."""
    parts = [len(_parts(body)) for body in run.bodies]
    lengths = [[len(r.bodies) for r in runs_in(body)] for body in run.bodies]
    whole = [inner for inner, n in zip(lengths, parts, strict=True) if n == max(parts)]
    return (len(set(parts)) > 1) + any(inner != whole[0] for inner in whole)


def _fold_exactly(leaves: list[Leaf]) -> list[Node] | None:
    """The reading by the longest exact repetition; None where nothing repeats side by side."""
    code = {key: n for n, key in enumerate(dict.fromkeys(leaf.key for leaf in leaves))}
    row = np.array([code[leaf.key] for leaf in leaves])
    best = (0, 0, 0, 0)  # symbols saved, minus the period, minus the start, iterations
    for period in range(1, len(row) // 2 + 1):
        apart = np.flatnonzero(row[:-period] != row[period:])
        edges = np.concatenate([[-1], apart, [len(row) - period]])
        same = np.diff(edges) - 1
        place = int(same.argmax())
        times = (int(same[place]) + period) // period
        if times > 1:
            best = max(best, ((times - 1) * period, -period, -int(edges[place] + 1), times))
    saved, period, start, times = best[0], -best[1], -best[2], best[3]
    if not saved:
        return None
    end = start + times * period
    bodies = [leaves[i : i + period] for i in range(start, end, period)]
    folded = [_fold(body) for body in bodies]
    run = Run(tuple(nodes[0] if len(nodes) == 1 else _sequence(nodes) for nodes in folded))
    return [*_fold(leaves[:start]), run, *_fold(leaves[end:])]


def _sequence(nodes: list[Node]) -> "Sequence_":
    return Sequence_(("then", *(node.key for node in nodes)), tuple(nodes))


def _fold_by_joining(nodes: list[Node]) -> list[Node]:
    while True:
        for step in (_fold_runs, _merge_always, _merge_but_once):
            shorter = step(nodes)
            if shorter is not None:
                nodes = shorter
                break
        else:
            return nodes


def _fold_runs(nodes: list[Node]) -> list[Node] | None:
    """Equal neighbours become runs; what stands alone elsewhere becomes a run of one."""
    repeated = {a.key for a, b in pairwise(nodes) if a.key == b.key}
    if not repeated:
        return None
    folded: list[Node] = []
    for key, group in groupby(nodes, lambda node: node.key):
        same = list(group)
        if key in repeated and not (len(same) == 1 and isinstance(same[0], Run)):
            folded.append(Run(tuple(body for node in same for body in _bodies(node))))
        else:
            folded += same
    return folded


def _bodies(node: Node) -> tuple[Node, ...]:
    return node.bodies if isinstance(node, Run) else (node,)


def _merge_always(nodes: list[Node]) -> list[Node] | None:
    """Join a and b where every a is followed by b and every b preceded by a."""
    count = Counter(node.key for node in nodes)
    pairs = Counter((a.key, b.key) for a, b in pairwise(nodes))
    for (a, b), n in pairs.items():
        if a != b and n >= 2 and count[a] == count[b] == n:
            return _join(nodes, a, b)
    return None


def _merge_but_once(nodes: list[Node]) -> list[Node] | None:
    """Join a and b in `a b a b a`: the last iteration lacks its end."""
    count = Counter(node.key for node in nodes)
    pairs = Counter((a.key, b.key) for a, b in pairwise(nodes))
    for (a, b), n in pairs.items():
        turns = a != b and n >= 2 and count[b] == n == pairs[b, a] and count[a] == n + 1
        if turns:
            return _join(nodes, a, b)
    return None


def _join(nodes: list[Node], first: Hashable, second: Hashable) -> list[Node]:
    key = ("then", first, second)
    joined: list[Node] = []
    place = 0
    while place < len(nodes):
        node = nodes[place]
        if node.key != first:
            joined.append(node)
            place += 1
            continue
        full = place + 1 < len(nodes) and nodes[place + 1].key == second
        parts = nodes[place : place + 1 + full]
        joined.append(Sequence_(key, tuple(p for part in parts for p in _parts(part))))
        place += len(parts)
    return joined


def _parts(node: Node) -> tuple[Node, ...]:
    return node.parts if isinstance(node, Sequence_) else (node,)


def runs_in(node: Node) -> Iterator[Run]:
    """The runs directly inside a body, not those inside other runs.

    Args:
        node: The body.

    Returns:
        The runs, in order; the body itself where it is one.
    """
    if isinstance(node, Run):
        yield node
    elif isinstance(node, Sequence_):
        for part in node.parts:
            yield from runs_in(part)


def split_gaps(
    gaps: Sequence[Sequence[Any]],
    before: Sequence[Any],
    after: Sequence[Any],
    same: Callable[[Any, Any], bool],
) -> tuple[int, int]:
    """Decide what stands between iterations: does it end one, or begin the next?

    What also follows the last iteration ends an iteration; what also precedes the first begins
    one. The rest only ever stands between two and counts to the first of them.

    Args:
        gaps: What stands between the first and second iteration, the second and third, ….
        before: What stands before the first iteration.
        after: What stands after the last.
        same: Whether two things are alike.

    Returns:
        How many of them end each iteration (the last one too), and how many begin each (the first
        too).
    """
    if not gaps:
        return 0, 0
    end = 0
    while all(end < len(gap) for gap in gaps) and end < len(after):
        if not all(same(gap[end], after[end]) for gap in gaps):
            break
        end += 1
    begin = 0
    while all(begin < len(gap) - end for gap in gaps) and begin < len(before):
        if not all(same(gap[-1 - begin], before[-1 - begin]) for gap in gaps):
            break
        begin += 1
    return end, begin
