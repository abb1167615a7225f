"""Unembedding: whether what a model returns are scores of tokens, and what gives them."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from loopscope.errors import InputError
from loopscope.models.loops.identity import Streams
from loopscope.models.loops.matrices import named_weights
from loopscope.models.loops.ports import equal
from loopscope.models.loops.tracing import Call, CallTensor, Lookup, Trace

LOGITS = ("logits", "prediction_logits", "prediction_scores")

HEAD = 3
"""An unembedding may be so many matrices deep, however small the model is."""

SAY_SO = (
    "; if those are logits, return them under the name `logits`, or name what gives them in a "
    'spec: head = "…" (a module or a parameter)'
)


@dataclass(frozen=True, kw_only=True)
class Unembedding:
    """What in a model's result can be scores of tokens, and what gives it.

    Attributes:
        logits: The tensor (batch, ·, ·) that are the scores, or what comes nearest to them; None
            where the model returns no such tensor.
        width: Its width, where a change to that width tells the unembedding from the layers.
        call: The call that gives the scores, where a module does.
        weight: Name of the parameter that gives them outside of all modules.
        vocabulary: How many scores are kept of a padded vocabulary; None where all are.
        why_none: Why it is not taken for scores of tokens; empty where it is.
    """

    logits: CallTensor | None = None
    width: int | None = None
    call: Call | None = None
    weight: str | None = None
    vocabulary: int | None = None
    why_none: str = ""


def find_unembedding(trace: Trace, streams: Streams, head: str | None = None) -> Unembedding:
    """Decide whether a model returns scores of tokens: by their name, widths, the last matrix.

    States and scores look alike where the vocabulary is as large as the state is wide. Then what
    tells them apart is a matrix that follows the last layer: that of the token embedding, or one
    by itself where the tokens have as many embeddings as the result has columns.

    Args:
        trace: The traced forward pass.
        streams: What a stream looks like.
        head: The module or the parameter that gives the scores, where a specification names it.

    Returns:
        What was found.

    Raises:
        InputError: if the module that the specification names is not called.
    """
    three = [item for item in trace.root.outputs if item.tensor.ndim == 3]
    if not three:
        shapes = ", ".join(str(tuple(item.tensor.shape)) for item in trace.root.outputs) or "none"
        return Unembedding(
            why_none="the model returns no logits for each token, (batch, pos, vocabulary): the "
            f"shapes of what it returns are {shapes}"
        )
    end = _End(trace, streams)
    judged = [end.judge(item) for item in sorted(three, key=end.order)]
    found = next((each for each in judged if not each.why_none), judged[0])
    return found if head is None else _named(trace, found, head)


def _named(trace: Trace, found: Unembedding, head: str) -> Unembedding:
    """What was found, given by the module or parameter that a specification names."""
    if head == found.weight or (found.call is not None and head == found.call.module):
        return found
    calls = [call for call in trace.calls if call.module == head]
    if head in trace.modules and not calls:
        raise InputError(
            f"head = {head!r} of the specification is never called; name the module or the "
            "parameter that gives the logits."
        )
    return replace(
        found, width=None, call=calls[-1] if calls else None, weight=None if calls else head,
        why_none="",
    )  # fmt: skip


@dataclass(frozen=True)
class _End:
    """How a forward pass ends: which matrix is used last, and in which table tokens are."""

    trace: Trace
    streams: Streams

    @cached_property
    def table(self) -> Lookup | None:
        """The first table in which numbers of the tokens' shape were looked up."""
        ids = (self.streams.batch, self.streams.pos)
        return next((lookup for lookup in self.trace.lookups if lookup.ids == ids), None)

    @cached_property
    def rows(self) -> frozenset[int]:
        """What the vocabulary's size may be."""
        config = getattr(self.trace.modules[""], "config", None)
        sizes = [getattr(config, "vocab_size", None)]
        sizes += [] if self.table is None else [self.table.rows]
        return frozenset(size for size in sizes if type(size) is int)

    @cached_property
    def held(self) -> dict[str, frozenset[Any]]:
        """Keys of the matrices in each module, its parts' and embeddings among them."""
        named = named_weights(self.trace.modules[""])
        keys: dict[str, set[Any]] = {}
        for name, weight in named.items():
            tensor = self.trace.tensors.get(name)
            if tensor is not None and tensor.ndim < 2:
                continue
            while name:
                name = name.rpartition(".")[0]
                keys.setdefault(name, set()).add(weight.key)
        return {name: frozenset(of_module) for name, of_module in keys.items()}

    @cached_property
    def last(self) -> list[tuple[Call, Call]]:
        """Calls of matrices, the last first: the innermost, and the outermost around it."""
        leaves = [
            call
            for call in sorted(self.trace.calls, key=lambda call: -call.end)
            if not call.children and _widths(call.inputs) and _widths(call.outputs)
        ]
        return [(leaf, self._around(leaf)) for leaf in leaves if self.held.get(leaf.module)]

    def _around(self, call: Call) -> Call:
        """The widest call around a call that is given a stream and looks up no tokens.

        What gives the state back beside the scores (a segment of an outer loop) is wider than that.
        """
        while (parent := call.parent) is not None and parent.parent is not None:
            state = set(_widths(parent.inputs)) & set(_widths(parent.outputs))
            if not _widths(parent.inputs) or self._looks_up(parent):
                break
            if state and len(set(_widths(parent.outputs))) > 1:
                break
            call = parent
        return call

    def _looks_up(self, call: Call) -> bool:
        table = self.table
        return table is not None and call.start <= table.tick < call.end

    def order(self, item: CallTensor) -> tuple[bool, ...]:
        """What makes a tensor of the result likelier than another to be the logits.

        Args:
            item: The tensor.

        Returns:
            A key for sorting.
        """
        last = self.last[0][1].outputs if self.last else []
        return (
            not _is_named(item),
            not self.streams.is_stream(item),
            item.tensor.shape[-1] not in self.rows,
            not any(equal(item.tensor, output.tensor) for output in last),
        )

    def judge(self, item: CallTensor) -> Unembedding:
        """Whether a tensor of the result are scores of tokens.

        Args:
            item: The tensor.

        Returns:
            What was found.
        """
        width, above = item.tensor.shape[-1], _ancestors(item.node)
        leaf, call = next(
            (pair for pair in self.last if self._leads(pair[1], item, above)), (None, None)
        )
        given = set() if call is None else _widths(call.inputs)
        gives = set() if call is None else _widths(call.outputs)
        if call is not None and width in gives and width not in given:
            layers = self._is_embedded(width) or self._is_stack(call)
            if width in self.rows or not layers:
                return Unembedding(logits=item, width=width, call=call)
        start = 0 if call is None else call.end
        weight, within = self._weight_after(start, width, given | gives, item, above)
        cut = self._cut(width, weight, gives)
        functional = Unembedding(
            logits=item, call=within, weight=None if within else weight, vocabulary=cut
        )
        named = _is_named(item)
        if width not in gives:  # not the width of the last state
            if weight is not None:
                return functional
            if cut is not None and not gives & given:
                return Unembedding(logits=item, width=max(gives), vocabulary=cut)
            if cut is not None and leaf is not None and self._is_bare_head(leaf, call, max(gives)):
                return Unembedding(logits=item, call=leaf, vocabulary=cut)
            if named or width in self.rows:
                return functional
            return Unembedding(logits=item, why_none=self._unseen(width, "another width than"))
        if weight is not None and (
            named
            or ((self._is_table(weight) or width in self.rows) and not self._is_given(item, within))
        ):
            return functional
        if leaf is not None and self._is_bare_head(leaf, call, None if named else width):
            return Unembedding(logits=item, call=leaf)
        if named:
            return Unembedding(logits=item)
        return Unembedding(logits=item, why_none=self._unseen(width, "the width of"))

    def _is_embedded(self, width: int) -> bool:
        """Whether embeddings have a width, so that it is one of the states'."""
        return self.table is not None and width == self.table.width

    def _is_stack(self, call: Call) -> bool:
        """Whether a call makes most of all calls of matrices: layers, and not what follows them."""
        inside = sum(around is call for _, around in self.last)
        return inside > HEAD and 2 * inside > len(self.last)

    def _unseen(self, width: int, relation: str) -> str:
        """Why a tensor of some width is not taken for logits."""
        why = (
            "the model returns no logits for each token that can be told from states: (batch, "
            f"pos, {width}) has {relation} its state, and no unembedding was seen to give it"
        )
        return why + (SAY_SO if not self.rows or width in self.rows else "")

    def _leads(self, call: Call, item: CallTensor, above: set[Any]) -> bool:
        """Whether a tensor depends on what a call gave; true where gradients do not tell."""
        nodes = [output.node for output in call.outputs if output.tensor.ndim == 3]
        return item.node is None or any(node is None or node in above for node in nodes)

    def _weight_after(
        self, start: int, width: int, around: set[int], item: CallTensor, above: set[Any]
    ) -> tuple[str | None, Call | None]:
        """The matrix used after the last call of one: its name, and the call in which it is."""
        for tick, name in reversed(self.trace.uses):
            if tick < start:
                break
            shape = tuple(self.trace.tensors[name].shape) if name in self.trace.tensors else ()
            if len(shape) != 2:
                continue
            sides = (shape, shape[::-1])
            within = self._call_at(tick)
            if any(b in around and a >= width for a, b in sides) and (
                within is None or self._leads(within, item, above)
            ):
                return name, within
        return None, None

    def _call_at(self, tick: int) -> Call | None:
        """The outermost call at some time that is given a stream and looks up no tokens."""
        for call in self.trace.calls[1:]:
            if call.start <= tick < call.end and _widths(call.inputs) and not self._looks_up(call):
                return call
        return None

    def _cut(self, width: int, weight: str | None, gives: set[int]) -> int | None:
        """The width of logits that are cut to a vocabulary; None where they are whole."""
        if weight is not None:
            wider = [n for n in self.trace.tensors[weight].shape if n in self.rows and n > width]
        else:
            wider = [n for n in gives if n > width]
        return width if wider and 2 * width > max(wider) else None

    def _is_given(self, item: CallTensor, but: Call | None) -> bool:
        """Whether a module gave a tensor as it is, so that nothing follows that module."""
        return any(
            equal(item.tensor, output.tensor)
            for call in self.trace.calls[1:]
            if call is not but and _widths(call.inputs)
            for output in call.outputs
        )

    def _is_bare_head(self, leaf: Call, call: Call | None, width: int | None) -> bool:
        """Whether a call of one matrix that keeps the width is an unembedding.

        Args:
            leaf: The call.
            call: The widest around it that is given a stream.
            width: What must be the vocabulary's size; None where the result is called logits.

        Returns:
            True where it is.
        """
        alone = call is leaf and len(self.held[leaf.module]) == 1
        fits = self._ties(leaf) or (alone and (width is None or width in self.rows))
        return fits and not self._is_carried(leaf)

    def _is_table(self, name: str) -> bool:
        return self.table is not None and name == self.table.name

    def _ties(self, call: Call) -> bool:
        """Whether a call uses the table in which tokens were looked up."""
        if self.table is None or self.table.name is None:
            return False
        uses = [name for tick, name in self.trace.uses if call.start <= tick < call.end]
        return self.table.name in uses

    def _is_carried(self, call: Call) -> bool:
        """Whether what an earlier call of the same module gave is given to another module."""
        earlier = [c for c in self.trace.calls if c.module == call.module and c is not call]
        return any(
            equal(entering.tensor, output.tensor)
            for c in earlier
            for output in c.outputs
            for other in self.trace.calls
            if other.start > c.end
            for entering in other.inputs
        )


def _is_named(item: CallTensor) -> bool:
    return bool(item.where) and item.where[-1] in LOGITS


def _widths(items: Iterable[CallTensor]) -> set[int]:
    return {item.tensor.shape[-1] for item in items if item.tensor.ndim == 3}


def _ancestors(node: Any) -> set[Any]:
    """A node of the gradients' graph, and all that it depends on."""
    seen: set[Any] = set()
    left = [node]
    while left:
        node = left.pop()
        if node is not None and node not in seen:
            seen.add(node)
            left += [above for above, _ in node.next_functions]
    return seen
