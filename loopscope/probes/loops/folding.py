"""Folding: a sequence of calls back into the nested loops that made it (pure Python)."""

from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from typing import Any


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

    Equal neighbours become a run; symbols that always follow each other become one symbol; and so
    on until nothing changes. `LLLHLLLH` gives one run of two bodies, each a run of three L and an
    H. Runs of one body count as the same symbol whatever their length, so inner loops may vary.

    Args:
        symbols: One per call, in the order of the calls.
        indices: What to number the calls with; 0, 1, … when not given.

    Returns:
        What is left at the top: runs, and calls that no loop explains.
    """
    numbers = range(len(symbols)) if indices is None else indices
    nodes: list[Node] = [Leaf(s, i) for s, i in zip(symbols, numbers, strict=True)]
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
    """The runs directly inside a body, not those inside other runs."""
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
