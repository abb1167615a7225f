"""Every stand-in, with what a person reading its code would say of it."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

from tests.standins import counted, injected, per_loop, repeated, tied, traps


def numbered(name: str, first: int, last: int) -> tuple[str, ...]:
    """`name.first` … `name.(last - 1)`."""
    return tuple(f"{name}.{i}" for i in range(first, last))


@dataclass(frozen=True, kw_only=True)
class Core:
    """One loop.

    Attributes:
        name: Its name, None where the choice is free.
        layers: Layers of each iteration (inner loops' among them).
        parent: Place of the enclosing loop among the loops.
        mechanic: `module` or `parameters`.
    """

    name: str | None = "core"
    layers: tuple[tuple[str, ...], ...]
    parent: int | None = None
    mechanic: str = "module"


@dataclass(frozen=True, kw_only=True)
class Case:
    """A stand-in and its map as written by hand.

    Attributes:
        name: For test ids.
        make: Builds it.
        layout: The layout string.
        prelude, coda: Their layers.
        cores: Loops, outer ones before inner ones.
        head: The unembedding's name.
        causal: Whether tokens see earlier ones only; None where there are no logits.
        random: Whether the forward draws random numbers.
        norm: The final norm's name.
        spec: What a user must say before `h_emb` is the embedding.
    """

    name: str
    make: Callable
    layout: str
    prelude: tuple[str, ...] = ()
    cores: tuple[Core, ...] = ()
    coda: tuple[str, ...] = ()
    head: str | None = "unembed"
    norm: str | None = "norm"
    causal: bool | None = True
    random: bool = False
    spec: dict | None = None


def same(layers: tuple[str, ...], K: int, **more) -> Core:
    """A loop whose iterations run the same layers."""
    return Core(layers=(layers,) * K, **more)


def stack(name: str, prelude: int, core: int, steps: int, coda: int, **more) -> dict:
    """One list of distinct layers that share parameters across iterations."""
    cut = [prelude + t * core for t in range(steps + 1)]
    return {
        "prelude": numbered(name, 0, prelude),
        "cores": (
            Core(
                layers=tuple(numbered(name, a, b) for a, b in pairwise(cut)),
                mechanic="parameters",
                **more,
            ),
        ),
        "coda": numbered(name, cut[-1], cut[-1] + coda),
    }


LOW, HIGH = numbered("model.L_module.layers", 0, 2), numbered("model.H_module.layers", 0, 1)
SEGMENT = ("start", *(*("L_level",) * 3, "H_level") * 2)
INNER = ("cycle.first", "cycle.body", "cycle.body", "cycle.last")

CASES = [
    Case(
        name="depth",
        make=repeated.Depth,
        layout="2+3R4+1",
        prelude=numbered("trunk.prelude", 0, 2),
        cores=(same(numbered("trunk.core_block", 0, 3), 4),),
        coda=numbered("trunk.coda", 0, 1),
        head="lm_head",
        norm="trunk.ln_f",
        random=True,
    ),
    Case(
        name="gated",
        make=repeated.Gated,
        layout="0+3R4+0",
        cores=(same(numbered("model.layers", 0, 3), 4),),
        head="lm_head",
        norm=None,
    ),
    Case(
        name="recurring",
        make=injected.Recurring,
        layout="1+2R4+1",
        prelude=("transformer.prelude.0",),
        cores=(same(numbered("transformer.recur", 0, 2), 4),),
        coda=("transformer.coda.0",),
        head="lm_head",
        norm="norm_final",
    ),
    Case(
        name="nano_fork",
        make=repeated.NanoFork,
        layout="1+2R3+0",
        prelude=("transformer.start.0",),
        cores=(same(numbered("transformer.h", 0, 2), 3),),
        head="lm_head",
        norm="transformer.ln_f",
    ),
    Case(
        name="two_clocks",
        make=repeated.TwoClocks,
        layout="0+(2R3+1)R2+0",
        cores=(
            same((*LOW * 3, *HIGH), 2, name="H"),
            same(LOW, 6, name="L", parent=0),
        ),
        head="lm_head",
        norm="model.norm",
    ),
    Case(
        name="layer_major",
        make=repeated.LayerMajor,
        layout="0+1R3+1R3+1",
        cores=(same(("layers.0",), 3, name="A"), same(("layers.1",), 3, name="B")),
        coda=("last",),
        head="unembed",
    ),
    Case(
        name="cycle_in_cycle",
        make=repeated.CycleInCycle,
        layout="1+(1R2+2)R3+1",
        prelude=("before",),
        cores=(same(INNER, 3, name=None), same(("cycle.body",), 6, name=None, parent=0)),
        coda=("after",),
    ),
    Case(
        name="segments",
        make=counted.Segments,
        layout="0+((1R3+1)R2+1)R2+0",
        cores=(
            same(SEGMENT, 2, name="start"),
            same((*("L_level",) * 3, "H_level"), 4, name="H", parent=0),
            same(("L_level",), 12, name="L", parent=1),
        ),
    ),
    Case(
        name="interleaved",
        make=repeated.Interleaved,
        layout="1+2R3+0",
        prelude=("layers.0",),
        cores=(Core(layers=tuple(("shared", f"layers.{t + 1}") for t in range(3))),),
    ),
    Case(name="tied_stack", make=tied.TiedStack, layout="1+2R3+2", **stack("layers", 1, 2, 3, 2)),
    Case(
        name="tied_but_norms",
        make=lambda: tied.TiedStack(prelude=2, core=1, steps=4, coda=1, own="norm"),
        layout="2+1R4+1",
        **stack("layers", 2, 1, 4, 1),
    ),
    Case(name="relaxed", make=tied.Relaxed, layout="0+2R3+0", **stack("layers", 0, 2, 3, 0)),
    Case(name="tied_head", make=tied.TiedHead, layout="3", prelude=numbered("layers", 0, 3)),
    Case(
        name="aliased",
        make=tied.Aliased,
        layout="2+2R3+1",
        prelude=numbered("model.layers", 0, 2),
        cores=(same(numbered("model.layers", 2, 4), 3),),
        coda=("model.layers.4",),
        head="lm_head",
        norm="model.norm",
    ),
    Case(name="shared_relu", make=tied.SharedRelu, layout="4", prelude=numbered("layers", 0, 4)),
    Case(
        name="lora_per_loop",
        make=per_loop.LoraPerLoop,
        layout="1+2R3+1",
        prelude=("prelude.0",),
        cores=(same(numbered("core", 0, 2), 3),),
        coda=("coda.0",),
    ),
    Case(
        name="timed",
        make=per_loop.Timed,
        layout="0+2R4+0",
        cores=(same(numbered("transformer.h.blocks", 0, 2), 4),),
        head="lm_head",
        norm="transformer.norm_f",
    ),
    Case(
        name="norm_per_loop",
        make=per_loop.NormPerLoop,
        layout="1+2R3+1",
        prelude=("prelude.0",),
        cores=(same(numbered("core", 0, 2), 3),),
        coda=("coda.0",),
    ),
    *(
        Case(
            name=name,
            make=lambda early=early: per_loop.MeshPort(early=early),
            layout="1+2R3+2",
            prelude=("model.layers.0",),
            cores=(same(numbered("model.layers", 1, 3), 3),),
            coda=numbered("model.layers", 3, 5),
            head="lm_head",
            norm="model.norm",
        )
        for name, early in [("mesh_port", False), ("mesh_port_early", True)]
    ),
    Case(
        name="token_routed",
        make=per_loop.TokenRouted,
        layout="1+2R3+1",
        prelude=("first",),
        cores=(
            Core(
                layers=tuple(numbered(f"recursions.{t}.block", 0, 2) for t in range(3)),
                mechanic="parameters",
            ),
        ),
        coda=("last",),
        causal=False,
    ),
    Case(name="plain", make=traps.Plain, layout="5", prelude=numbered("layers", 0, 5)),
    *(
        Case(
            name=f"formed_{form}",
            make=lambda form=form: traps.Formed(form),
            layout="1+2R3+1",
            prelude=("prelude.0",),
            cores=(same(numbered("core", 0, 2), 3),),
            coda=("coda.0",),
        )
        for form in traps.Wrapped.FORMS
    ),
    Case(
        name="adaptive",
        make=traps.Adaptive,
        layout="1+2R3+0",
        prelude=("start",),
        cores=(same(numbered("core", 0, 2), 3),),
    ),
    Case(
        name="encoder",
        make=traps.Encoder,
        layout="1+2R3+0",
        prelude=("start",),
        cores=(same(numbered("core", 0, 2), 3),),
        head=None,
        norm=None,
        causal=None,
    ),
    Case(
        name="partial",
        make=traps.Partial,
        layout="0+2R3+0",
        cores=(same(numbered("core", 0, 2), 3),),
    ),
    Case(name="twice_linear", make=traps.TwiceLinear, layout="3", prelude=numbered("layers", 0, 3)),
    Case(
        name="fused",
        make=traps.Fused,
        layout="0+2R3+0",
        cores=(same(numbered("layers", 0, 2), 3),),
        norm=None,
    ),
    Case(
        name="chained",
        make=traps.Chained,
        layout="2+3R2+1",
        prelude=numbered("prelude", 0, 2),
        cores=(same(numbered("core", 0, 3), 2),),
        coda=("coda.0",),
    ),
]

LOOPED = [case for case in CASES if case.cores]
