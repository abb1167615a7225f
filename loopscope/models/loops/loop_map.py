"""LoopMap: what a forward pass consists of, by role, loop and iteration (needs no torch)."""

from dataclasses import dataclass
from typing import Any, Literal

Step = str | int
"""One step from a call's arguments or result to a tensor in it: a key, a position, a field."""


@dataclass(frozen=True, kw_only=True)
class Port:
    """A tensor that goes into or comes out of one call of one module.

    Attributes:
        module: The module's canonical name.
        call: Which of its calls in one forward pass, from 0.
        side: `in` (an argument) or `out` (the result).
        where: How to get from the arguments (`("args", 0)`, `("kwargs", "hidden_states")`) or the
            result (`()` for a bare tensor, `(0,)`, `("last_hidden_state",)`) to the tensor.
        columns: The part of the last axis that is meant, first and last + 1; None means all.
        shape: Its shape on the example.
        operand: For what a tensor was made of: by which functions (name, which argument), from the
            tensor back to what is meant; empty for the tensor itself. Such a port is only read.
    """

    module: str
    call: int
    side: Literal["in", "out"]
    where: tuple[Step, ...]
    columns: tuple[int, int] | None = None
    shape: tuple[int, ...] = ()
    operand: tuple[tuple[str, int], ...] = ()


@dataclass(frozen=True, kw_only=True)
class Producer:
    """What makes a tensor: a call of a module, or a torch function between two calls.

    Attributes:
        port: What the call gives; of a function, the beginning or end of a call that it follows.
        function: Which torch function after that, from 1; 0 where the call gives the tensor.
        item: Which of the function's results; None where it has a single one.
    """

    port: Port
    function: int = 0
    item: int | None = None


@dataclass(frozen=True, kw_only=True)
class Unit:
    """One call that a role consists of.

    Attributes:
        module: The module's canonical name.
        call: Which of its calls in one forward pass, from 0.
        shared: Canonical name of the module whose parameters it uses: its own name, or the first
            of those that are tied to it.
        layers: Names of the layers it runs, one after the other: those in its list of layers, or
            the module itself; empty for a bare matrix (an adapter).
        orders: Place of each layer's call among all calls of a forward pass.
        order: Its place among all calls of a forward pass.
        h, h_m: The stream that enters it and the one that leaves it.
    """

    module: str
    call: int
    shared: str
    layers: tuple[str, ...]
    orders: tuple[int, ...]
    order: int
    h: Port
    h_m: Port


@dataclass(frozen=True, kw_only=True)
class Iteration:
    """One pass through a loop's body.

    Attributes:
        path: Where it stands: `2`, or `H0.L2` in nested loops.
        units: The calls it consists of, those of inner loops among them.
        h: The state that enters it.
        h_m: Its raw output.
        span: The calls it consists of, light ones too: first and last + 1 in the order of calls.
        grad: Whether gradients flow through all of it.
        own: Names of parameters that only this iteration uses.
        read_before: Whether its state was read before it began (by another's update), so that it
            cannot be replaced where it was made.
        producer: What makes the state that enters it; None where that cannot be told.
    """

    path: str
    units: tuple[Unit, ...]
    h: Port
    h_m: Port
    span: tuple[int, int] = (0, 0)
    grad: bool = True
    own: tuple[str, ...] = ()
    read_before: bool = False
    producer: Producer | None = None


@dataclass(frozen=True, kw_only=True)
class NamedState:
    """One of several states that a loop carries.

    Attributes:
        name: As the model's own code calls it, or `z_` and the name of the loop that updates it.
        h: The state before each iteration.
        h_m: The state after each iteration, as the module gave it that updated it last.
        after: The state after the last.
    """

    name: str
    h: tuple[Port, ...]
    h_m: tuple[Port, ...]
    after: Port


@dataclass(frozen=True, kw_only=True)
class Loop:
    """A loop, seen through all its iterations in execution order.

    Attributes:
        name: `core` for the only one; otherwise a short name from its modules, or a letter.
        iterations: In execution order, over all runs of the enclosing loop.
        after: The state that enters whatever follows its last iteration.
        parent: Name of the enclosing loop.
        shared: Names of parameters that more than one iteration uses.
        mechanic: `module` where the same modules are called again, `parameters` where distinct
            modules share parameters, `none` where the iterations share nothing (a regrouped stack).
        named: Its states where it carries several, or updates one of several; the first is the main
            one, which iterations and `after` give.
        mixing: What h(t+1) is, where it is a sum of h_m(t) and other states; else empty.
    """

    name: str
    iterations: tuple[Iteration, ...]
    after: Port
    parent: str | None = None
    shared: tuple[str, ...] = ()
    mechanic: Literal["module", "parameters", "none"] = "module"
    named: tuple[NamedState, ...] = ()
    mixing: str = ""

    @property
    def K(self) -> int:
        """Number of iterations, over all runs of the enclosing loop."""
        return len(self.iterations)


@dataclass(frozen=True, kw_only=True)
class Router:
    """A module whose output says where something is written, read, or whether to go on.

    Attributes:
        kind: `write`, `read` (softmax over memory slots) or `gate` (a probability per token).
        name: What it is called in tables: the kind, or the gate's module.
        loop: Name of the loop it belongs to.
        outputs: Its output at each iteration, None where it is not called.
        activation: What turns its output into weights: `softmax`, `sigmoid`, or `none` where the
            module does so itself.
        transition: Its output before the first iteration, if it has one there.
        query: What it looks at there.
    """

    kind: Literal["write", "read", "gate"]
    name: str
    loop: str
    outputs: tuple[Port | None, ...]
    activation: Literal["softmax", "sigmoid", "none"]
    transition: Port | None = None
    query: Port | None = None


@dataclass(frozen=True, kw_only=True)
class LoopCount:
    """How a model is told its number of iterations.

    Attributes:
        kind: `argument` of forward, `attribute` of a module, or `config` entry.
        name: The argument, `module.path.attribute`, or the entry.
        loop: Name of the loop it counts.
    """

    kind: Literal["argument", "attribute", "config"]
    name: str
    loop: str


@dataclass(frozen=True, kw_only=True, repr=False)
class LoopMap:
    """Roles, loops and iterations of one forward pass.

    Attributes:
        embed: h_emb, the embeddings that enter the first layer.
        prelude: Calls before the first loop.
        loops: In order of execution, an outer loop before its inner ones; empty for a plain stack.
        between: Calls between one loop and the next.
        coda: Calls after the last loop.
        h_out: The coda's output, before the final norm.
        norm: Name of the final norm after the coda, if there is one.
        head: Name of the unembedding, if a module is one.
        head_weight: Name of the parameter that gives the logits where no module does (a functional
            unembedding), if it is known.
        logits: Where the logits stand in what the model returns, or else the first tensor there of
            three axes; None where there is none.
        vocabulary: How many logits are kept of a padded vocabulary; None where all are.
        why_no_logits: Why what stands there is not taken for scores of tokens, or why it cannot be
            told whether it is causal; empty where it is.
        routers: Routers and gates.
        mesh_cycle: Whether the states follow from the routers by MeSH Eqs. 2-5, on the example.
        written: What the transitional cycle writes, where they do: the prelude's output.
        counts: How the number of iterations is set, for each loop where that is known.
        random: Whether a forward pass draws random numbers (an initial state, noise).
        mutates: Whether it changes states in place, so that keeping one takes a copy.
        causal: Whether a token's logits depend on earlier tokens alone; None where there are none.
        notes: What a user should know, such as a gradient that is cut.
        doubts: What may have been read wrongly, such as another candidate for the core.
        state_notes: Where states are not what their names say; notes of tables say it too.
        calls: How often each module is called.
        source: Who says so: `found`, `spec`, `family`, or `layout`.
    """

    embed: Port
    prelude: tuple[Unit, ...]
    loops: tuple[Loop, ...]
    coda: tuple[Unit, ...]
    between: tuple[Unit, ...] = ()
    h_out: Port
    norm: str | None = None
    head: str | None = None
    head_weight: str | None = None
    logits: tuple[Step, ...] | None = None
    vocabulary: int | None = None
    why_no_logits: str = ""
    routers: tuple[Router, ...] = ()
    mesh_cycle: bool = False
    written: Port | None = None
    counts: tuple[LoopCount, ...] = ()
    random: bool = False
    mutates: bool = False
    causal: bool | None = None
    notes: tuple[str, ...] = ()
    doubts: tuple[str, ...] = ()
    state_notes: tuple[str, ...] = ()
    calls: dict[str, int]
    source: str = "found"

    @property
    def unembedding(self) -> str | None:
        """What gives the logits: a module, or `functional, ` and a parameter; None for nothing."""
        if self.head is not None or self.why_no_logits or self.logits is None:
            return self.head
        return f"functional, {self.head_weight or 'outside of all modules'}"

    @property
    def main(self) -> Loop | None:
        """The outermost loop that runs first; None for a plain stack."""
        return self.loops[0] if self.loops else None

    @property
    def K(self) -> int:
        """Iterations of the main loop; 0 for a plain stack."""
        return self.main.K if self.main else 0

    def units(self) -> list[Unit]:
        """All calls with a role, in execution order."""
        looped = [
            u for loop in self.loops if not loop.parent for i in loop.iterations for u in i.units
        ]
        return sorted(
            [*self.prelude, *looped, *self.between, *self.coda], key=lambda unit: unit.order
        )

    @property
    def n_layers(self) -> int:
        """The unrolled depth: layers that are run."""
        return sum(len(unit.layers) for unit in self.units())

    def loop(self, name: str) -> Loop:
        """A loop by its name.

        Args:
            name: The name of a loop that the map has.

        Returns:
            The loop.
        """
        return next(loop for loop in self.loops if loop.name == name)

    def to_dict(self) -> dict[str, Any]:
        """Roles, loops and iterations as JSON values, for provenance."""
        return {
            "source": self.source,
            "layout": str(self),
            "prelude": [unit.module for unit in self.prelude],
            "loops": [
                {
                    "name": loop.name,
                    "parent": loop.parent,
                    "K": loop.K,
                    "paths": [it.path for it in loop.iterations],
                    "core": list(dict.fromkeys(u.shared for i in loop.iterations for u in i.units)),
                    "mechanic": loop.mechanic,
                    **({"mixing": loop.mixing} if loop.mixing else {}),
                    **({"states": [state.name for state in loop.named]} if loop.named else {}),
                }
                for loop in self.loops
            ],
            "coda": [unit.module for unit in self.coda],
            "unembedding": self.unembedding,
            "routers": [f"{router.kind} {router.name}" for router in self.routers],
            "random": self.random,
            "causal": self.causal,
            "notes": [*self.doubts, *self.state_notes, *self.notes],
            "state_notes": [*self.doubts, *self.state_notes],
        }

    def __repr__(self) -> str:
        loops = ", ".join(f"{loop.name} × {loop.K}" for loop in self.loops) or "no loop"
        routers = "".join(f", {r.kind} {r.name}" for r in self.routers)
        return f"LoopMap {self} ({self.source}): {loops}{routers}"

    def __str__(self) -> str:
        """The layout: `2+4R8+2`; nested loops as `0+(1R3+1)R2+0`, several one after the other."""
        parts = [self._shape(loop) for loop in self.loops if loop.parent is None]
        if not parts:
            return str(_depth(self.prelude) + _depth(self.coda))
        return "+".join([str(_depth(self.prelude)), *parts, str(_depth(self.coda))])

    def _shape(self, loop: Loop, within: str = "") -> str:
        """A loop as `4R8`, or `(1R3+1)R2`; within an iteration of the enclosing loop, that run."""
        run = [it for it in loop.iterations if it.path.rpartition(".")[0] == within]
        depths = [_depth(iteration.units) for iteration in run]
        inner = [child for child in self.loops if child.parent == loop.name]
        if not inner:
            if not within and (loop.mechanic == "none" or len(set(depths)) > 1):
                return "+".join(map(str, depths))
            return f"{depths[0]}R{len(run)}"
        path, rest, shapes = run[0].path, depths[0], []
        for child in inner:
            parts = [i for i in child.iterations if i.path.rpartition(".")[0] == path]
            if parts:
                rest -= sum(_depth(i.units) for i in parts)
                shapes.append(self._shape(child, path))
        body = "+".join([*shapes, str(rest)] if rest else shapes)
        return f"({body})R{len(run)}"


def _depth(units: tuple[Unit, ...]) -> int:
    return sum(len(unit.layers) for unit in units)
