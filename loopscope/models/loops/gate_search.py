"""Gates: modules that give one number for each position in each iteration."""

import re
from collections import defaultdict

from loopscope.errors import InputError
from loopscope.models.loops.identity import Streams
from loopscope.models.loops.loop_map import Loop, LoopMap, Router
from loopscope.models.loops.ports import port
from loopscope.models.loops.router_outputs import activation, by_iteration
from loopscope.models.loops.spec import Spec
from loopscope.models.loops.tracing import Call, CallTensor, Trace

NUMBERS = (
    "one number per position: (batch, positions, 1), (batch, positions) or (batch·positions, 1)"
)
"""What a gate gives."""

_DIGITS = re.compile(r"(?<=\.)\d+(?=\.|$)")
_Outputs = dict[str, list[tuple[Call, CallTensor]]]


class GateSearch:
    """Finds the gates of one loop.

    Without a specification a gate is a module without parts that turns the stream, or the state of
    a loop over other positions, into one number for each position in each iteration. What does so
    on yet other positions (registers, a routed part of the tokens) raises a doubt; a specification
    takes it.

    Args:
        trace: The traced forward pass.
        streams: What a stream looks like.
        loop: The loop.
        loop_map: The map, for the loops within this one.
        spec: What the user says.

    Attributes:
        notes: What a user should know.
        doubts: What may be a gate and was left out.
    """

    def __init__(
        self, trace: Trace, streams: Streams, loop: Loop, loop_map: LoopMap, spec: Spec
    ) -> None:
        self.trace, self.loop, self.spec = trace, loop, spec
        self.batch, self.pos = streams.batch or 1, streams.pos
        state = loop.iterations[0].h.shape
        self.lengths = {streams.pos, *(state[1:2] if state[:1] == (streams.batch,) else ())}
        inner = [child for child in loop_map.loops if child.parent == loop.name]
        self.inside = [iteration.span for child in inner for iteration in child.iterations]
        self.notes: list[str] = []
        self.doubts: list[str] = []

    def routers(self) -> list[Router]:
        """The gates: those that the specification names, or those found.

        Raises:
            InputError: if one that is named gives something else.
        """
        taken, left = self._outputs()
        routers = []
        for name, fits in taken.items():
            outputs = by_iteration(fits, self.loop)
            called = [output for output in outputs if output is not None]
            if not self._often(called):
                continue
            routers.append(
                Router(
                    kind="gate",
                    name=_last(name),
                    loop=self.loop.name,
                    outputs=tuple(None if x is None else port(x[0], "out", x[1]) for x in outputs),
                    activation=activation(self.trace, called, "sigmoid"),
                )
            )
            self._note_flat(called)
        if "gates" not in self.spec.given:
            for name, fits in left.items():
                self._doubt(name, [x for x in by_iteration(fits, self.loop) if x is not None])
        return routers

    def _often(self, called: list[tuple[Call, CallTensor]]) -> bool:
        """Whether a gate is called in enough iterations: the last may go without."""
        return len(called) >= (1 if self.spec.gates else max(1, self.loop.K - 1))

    def _outputs(self) -> tuple[_Outputs, _Outputs]:
        """Outputs by name without numbers, not of inner loops: of gates, and of what may be one."""
        taken: _Outputs = defaultdict(list)
        left: _Outputs = defaultdict(list)
        first, last = self.loop.iterations[0].span[0], self.loop.iterations[-1].span[1]
        for call in self.trace.calls:
            named = call.module in self.spec.gates
            if any(a <= call.index < b for a, b in self.inside) or not call.outputs:
                continue
            if self.spec.gates and not (named and first <= call.index < last):
                continue
            out = call.outputs[0]
            found = taken if named or self._is_gate(call, out) else left
            if named:
                self._check(call, out)
            if named or found is taken or _per_row(call, out):
                found[_DIGITS.sub("*", call.module)].append((call, out))
        return taken, left

    def _is_gate(self, call: Call, out: CallTensor) -> bool:
        """Whether a call without parts gives a number for each position of the stream or state."""
        shape = tuple(out.tensor.shape)
        return not call.children and any(
            shape in ((self.batch, n, 1), (self.batch, n))
            and any(_is_stream(item, self.batch, n) for item in call.inputs)
            for n in self.lengths
        )

    def _check(self, call: Call, out: CallTensor) -> None:
        """Raise for a gate that is named and gives something else than numbers per position."""
        shape = tuple(out.tensor.shape)
        flat = len(shape) == 1 or (len(shape) == 2 and shape[1] == 1)
        if flat and shape[0] % self.batch == 0:
            return
        if len(shape) == 3 and shape[0] == self.batch and shape[2] == 1:
            return
        positions = [(self.batch, self.pos), *(tuple(x.tensor.shape[:-1]) for x in call.inputs)]
        if len(shape) == 2 and shape[0] == self.batch and shape in positions:
            return
        raise InputError(
            f"gates of the specification names {call.module}, which gives {shape} on the example; "
            f"a gate gives {NUMBERS}, as many for each of the {self.batch} samples."
        )

    def _note_flat(self, called: list[tuple[Call, CallTensor]]) -> None:
        call, out = called[0]
        rows = out.tensor.shape[0]
        if rows != self.batch:
            self.notes.append(
                f"{call.module} gives {tuple(out.tensor.shape)}; its rows are read as "
                f"{rows // self.batch} of the first sample, then those of the next"
            )

    def _doubt(self, name: str, called: list[tuple[Call, CallTensor]]) -> None:
        if not self._often(called):
            return
        call, out = called[0]
        rows = out.tensor.numel()
        way = f'a spec takes it: gates = ["{name}"]'
        if rows % self.batch:
            way = "it cannot be shown, since samples do not have equally many"
        self.doubts.append(
            f"{call.module} gives one number for each of {rows} rows in the iterations of "
            f"{self.loop.name}, not one for each of the {self.batch} × {self.pos} tokens, and is "
            f"left out; if it is a gate, {way}"
        )


def _last(name: str) -> str:
    return next(part for part in reversed(name.split(".")) if part != "*")


def _is_stream(item: CallTensor, batch: int, pos: int | None) -> bool:
    shape = item.tensor.shape
    return len(shape) == 3 and shape[0] == batch and shape[1] == pos and shape[-1] > 1


def _per_row(call: Call, out: CallTensor) -> bool:
    """Whether a call without parts turns rows, (…, width), into one number for each."""
    shape = tuple(out.tensor.shape)
    rows = [
        tuple(x.tensor.shape[:-1])
        for x in call.inputs
        if x.tensor.ndim in (2, 3) and x.tensor.shape[-1] > 1
    ]
    return not call.children and any(shape in ((*lead, 1), lead) for lead in rows)
