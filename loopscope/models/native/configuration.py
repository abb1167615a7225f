"""Configuration of a native model: layout strings, widths, variant; needs no torch."""

import math
import re
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

from loopscope.errors import InputError, unknown_name
from loopscope.names import block_name

SUPPLEMENTS = ("residual", "anchor", "anchor_emb")
SINGLE_VARIANTS = ("vanilla", "base", *SUPPLEMENTS, "static", "dynamic", "mesh")
TRANSITION_QUERIES = ("prelude", "embedding")
ACTIVATIONS = ("gelu", "gelu_tanh", "relu", "silu")

_ALLOWED = (
    "Allowed are 'N' (a plain stack), 'P+CRK+Q' (a C-layer core looped K times, such as 3+6R3+3) "
    "and 'P+C1+...+CK+Q' (unshared cores, such as 4+8+8+4)."
)


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Depths of the prelude, of each core iteration and of the coda.

    Attributes:
        prelude: Layers before the loop (P).
        cores: Layers of each iteration, K entries; empty for a plain stack.
        coda: Layers after the loop (Q).
        shared: Whether all iterations run the same layers (the `CRK` form).

    Raises:
        InputError: for depths that cannot be.
    """

    prelude: int
    cores: tuple[int, ...] = ()
    coda: int = 0
    shared: bool = False

    def __post_init__(self) -> None:
        if self.prelude < 0 or self.coda < 0 or any(c < 1 for c in self.cores):
            raise InputError(
                f"layout {self} has a core of no layers or a negative depth. {_ALLOWED}"
            )
        if self.n_layers < 1:
            raise InputError(f"a layout needs at least one layer, given {self}. {_ALLOWED}")
        if self.shared and len(set(self.cores)) != 1:
            raise InputError(f"a shared core has one depth, given {self.cores}. {_ALLOWED}")

    @classmethod
    def parse(cls, text: "str | Layout") -> "Layout":
        """Read a layout string.

        Args:
            text: `N`, `P+CRK+Q` or `P+C1+...+CK+Q`; P and Q may be 0.

        Returns:
            The layout; `str()` of it gives the canonical string back.

        Raises:
            InputError: if the string has another form, naming the allowed ones.
        """
        if isinstance(text, Layout):
            return text
        compact = re.sub(r"\s*\+\s*", "+", str(text).strip())
        if re.fullmatch(r"\d{1,4}", compact):
            return cls(prelude=int(compact))
        match = re.fullmatch(r"(\d{1,4})\+(\d{1,4})[Rr](\d{1,4})\+(\d{1,4})", compact)
        if match:
            p, c, k, q = map(int, match.groups())
            if k < 1 or c < 1:
                raise InputError(
                    f"layout {text!r} loops {c} layers {k} times; both must be at least 1. "
                    + _ALLOWED
                )
            return cls(prelude=p, cores=(c,) * k, coda=q, shared=True)
        if re.fullmatch(r"\d{1,4}(\+\d{1,4}){2,}", compact):
            p, *cores, q = map(int, compact.split("+"))
            return cls(prelude=p, cores=tuple(cores), coda=q)
        raise InputError(f"layout {text!r} cannot be read. {_ALLOWED}")

    def __str__(self) -> str:
        if not self.cores:
            return str(self.prelude)
        middle = f"{self.cores[0]}R{self.K}" if self.shared else "+".join(map(str, self.cores))
        return f"{self.prelude}+{middle}+{self.coda}"

    @property
    def K(self) -> int:
        """Number of core iterations (N_loop); 0 for a plain stack."""
        return len(self.cores)

    @property
    def n_layers(self) -> int:
        """Layers of compute: the unrolled depth."""
        return self.prelude + sum(self.cores) + self.coda

    @property
    def n_core_params(self) -> int:
        """Core layers that own parameters."""
        return self.cores[0] if self.shared else sum(self.cores)

    @property
    def n_param_layers(self) -> int:
        """Layers of parameters."""
        return self.prelude + self.n_core_params + self.coda

    @property
    def unshared(self) -> "Layout":
        """The same compute without a loop: every iteration has layers of its own."""
        return Layout(prelude=self.prelude, cores=self.cores, coda=self.coda)

    def core_start(self, t: int) -> int:
        """Give the first virtual layer of an iteration.

        Args:
            t: The iteration, 0 … K - 1; K gives the first layer of the coda.

        Returns:
            The layer's number.
        """
        return self.prelude + sum(self.cores[:t])

    def core_layers(self, t: int) -> range:
        """Give the core's layers that an iteration runs.

        Args:
            t: The iteration, 0 … K - 1.

        Returns:
            Indices into the layers of the core that own parameters.
        """
        if self.shared:
            return range(self.cores[0])
        start = sum(self.cores[:t])
        return range(start, start + self.cores[t])

    def roles(self) -> list[tuple[str, int, int]]:
        """Name each part that has layers.

        Returns:
            (`prelude`, `core1` … `coreK` or `coda`, its first virtual layer, its depth), in order.
        """
        parts = [("prelude", 0, self.prelude)]
        parts += [(block_name(t), self.core_start(t), self.cores[t]) for t in range(self.K)]
        parts.append(("coda", self.core_start(self.K), self.coda))
        return [part for part in parts if part[2]]


if TYPE_CHECKING:
    LayoutLike = Layout
else:  # a layout string is parsed when the configuration is made
    LayoutLike = Layout | str


def parse_variant(text: str) -> str:
    """Bring a variant name into its canonical form.

    `anchor*` is an alias of `anchor_emb`; sums of supplements (MeSH Table 4) may be written in any
    order and are sorted; a leading `+` is dropped.

    Args:
        text: A variant, or a sum of supplements.

    Returns:
        The canonical name.

    Raises:
        UnknownNameError: if a term is no variant, or cannot be part of a sum.
        InputError: if a supplement is named twice.
    """
    terms = [
        "anchor_emb" if term == "anchor*" else term
        for term in str(text).strip().removeprefix("+").split("+")
    ]
    if len(terms) == 1 and terms[0] in SINGLE_VARIANTS:
        return terms[0]
    for term in terms:
        if term not in SUPPLEMENTS:
            allowed = [*SINGLE_VARIANTS, "residual+anchor", "anchor*"]
            raise unknown_name(
                "variant", text, allowed, hint=f"Only {', '.join(SUPPLEMENTS)} may be summed."
            )
    if len(set(terms)) != len(terms):
        raise InputError(f"variant {text!r} names a supplement twice; name each once.")
    return "+".join(s for s in SUPPLEMENTS if s in terms)


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """Everything that defines a native model except its weights.

    Attributes:
        variant: `vanilla`, `base`, `residual`, `anchor`, `anchor_emb`, their sums, `static`,
            `dynamic`, `mesh` (PAPER: MeSH Section 2, Table 4, Eqs. 2-5).
        layout: Depths, as a `Layout` or a layout string.
        d_model: Width D.
        n_heads: Attention heads; must divide `d_model`.
        d_mlp: Width of the MLP; 4 D when not given.
        d_vocab: Vocabulary size V (rows of the embedding).
        n_ctx: Tokens seen in training; longer inputs run, outside what was trained.
        rotary_pct: Fraction of each head that is rotated.
        rotary_base: Base of the rotary frequencies.
        ln_eps: Epsilon of every layer norm.
        parallel_residual: `x + attn(ln1(x)) + mlp(ln2(x))`; otherwise attention first, then MLP.
        tied_embeddings: Whether the unembedding is the embedding.
        attn_bias: Whether attention projections have biases.
        act_fn: `gelu` (exact), `gelu_tanh`, `relu` or `silu`.
        embed_scale: Whether h_emb is scaled by sqrt(D), as in the paper.
        slots: Memory slots B of `mesh`; K + 3 when not given; None for other variants.
        transition_query: What the transitional routers of `mesh` look at: `prelude` (f_pre's
            output) or `embedding`. Not stated in the paper; `prelude` is this project's default.
        bos_token_id: Token put first when a BOS is asked for.
        init_std: Standard deviation of initial weights.

    Raises:
        UnknownNameError: for an unknown variant, activation or transition query.
        InputError: for a value that cannot be, or that does not go with the others.
    """

    variant: str
    layout: LayoutLike
    d_model: int
    n_heads: int
    d_vocab: int
    d_mlp: int | None = None
    n_ctx: int = 2048
    rotary_pct: float = 0.25
    rotary_base: float = 10000.0
    ln_eps: float = 1e-5
    parallel_residual: bool = True
    tied_embeddings: bool = False
    attn_bias: bool = True
    act_fn: str = "gelu"
    embed_scale: bool = True
    slots: int | None = None
    transition_query: str = "prelude"
    bos_token_id: int | None = 0
    init_std: float = 0.02

    def __post_init__(self) -> None:
        put = object.__setattr__
        put(self, "layout", Layout.parse(self.layout))
        put(self, "variant", parse_variant(self.variant))
        if self.d_mlp is None and isinstance(self.d_model, int):
            put(self, "d_mlp", 4 * self.d_model)
        self._check_types()
        self._check_values()
        self._check_variant()

    def _check_values(self) -> None:
        """What is of the right type and yet cannot be."""
        if self.d_model % self.n_heads:
            raise InputError(
                f"n_heads must divide d_model, given {self.n_heads} heads for width "
                f"{self.d_model}; choose a divisor of {self.d_model}."
            )
        rotated = int(self.d_head * self.rotary_pct)
        if rotated % 2 and rotated == self.d_head:
            raise InputError(
                f"rotary_pct {self.rotary_pct} rotates all {rotated} dimensions of a head, an odd "
                "number; pairs are rotated, so choose less or an even head width."
            )
        if self.act_fn not in ACTIVATIONS:
            raise unknown_name("act_fn", self.act_fn, ACTIVATIONS)
        if self.transition_query not in TRANSITION_QUERIES:
            raise unknown_name("transition_query", self.transition_query, TRANSITION_QUERIES)

    def _check_types(self) -> None:
        """Values from a JSON file may be of any type; each must be one this field can have."""
        for name in ("d_model", "n_heads", "d_vocab", "n_ctx", "d_mlp", "slots"):
            value = getattr(self, name)
            optional = name == "slots" and value is None
            if not optional and (type(value) is not int or value < 1):
                raise InputError(f"{name} must be a positive integer, given {value!r}.")
        for name in ("rotary_base", "ln_eps", "init_std"):
            value = getattr(self, name)
            if type(value) not in (int, float) or not 0 < value < math.inf:
                raise InputError(f"{name} must be a positive number, given {value!r}.")
        if type(self.rotary_pct) not in (int, float) or not 0 <= self.rotary_pct <= 1:
            raise InputError(f"rotary_pct must lie in [0, 1], given {self.rotary_pct!r}.")
        for name in ("parallel_residual", "tied_embeddings", "attn_bias", "embed_scale"):
            if not isinstance(getattr(self, name), bool):
                raise InputError(f"{name} must be true or false, given {getattr(self, name)!r}.")
        if self.bos_token_id is not None and type(self.bos_token_id) is not int:
            raise InputError(f"bos_token_id must be an integer, given {self.bos_token_id!r}.")

    def _check_variant(self) -> None:
        layout = self.layout
        if self.variant == "vanilla":
            if layout.shared:
                raise InputError(
                    f"variant 'vanilla' has no loop, given layout {layout}; use 'N' or unshared "
                    "cores 'P+C1+...+CK+Q', or variant 'base' for a loop."
                )
        elif layout.K == 0:
            raise InputError(
                f"variant {self.variant!r} needs core iterations, given layout {layout}; use "
                "'P+CRK+Q' or 'P+C1+...+CK+Q'."
            )
        if self.variant == "mesh":
            if self.slots is None:
                object.__setattr__(self, "slots", layout.K + 3)
        elif self.slots is not None:
            raise InputError(
                f"only variant 'mesh' has memory slots, given slots={self.slots} for "
                f"{self.variant!r}; leave slots out."
            )

    @property
    def d_head(self) -> int:
        """Width of one attention head."""
        return self.d_model // self.n_heads

    @property
    def K(self) -> int:
        """Number of core iterations."""
        return self.layout.K

    @property
    def supplements(self) -> tuple[str, ...]:
        """What is added to h_m(t), for `base` and the fixed sums."""
        terms = tuple(self.variant.split("+"))
        return terms if set(terms) <= set(SUPPLEMENTS) else ()

    @property
    def mixes(self) -> bool:
        """Whether the next state is anything but the core's raw output."""
        return self.variant not in ("vanilla", "base")

    def replace(self, **changes: Any) -> "LoopConfig":
        """Copy the configuration with some fields changed; all checks run again.

        Args:
            **changes: New values by field.

        Returns:
            The copy.
        """
        return replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, the layout as its string."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {**values, "layout": str(self.layout)}

    @classmethod
    def from_dict(cls, values: dict[str, Any], *, source: str = "configuration") -> "LoopConfig":
        """Build a configuration from JSON values.

        Args:
            values: Values by field, as `to_dict` gives them.
            source: Where they stand, for messages.

        Returns:
            The configuration.

        Raises:
            UnknownNameError: for an unknown key, with near matches.
            InputError: for a missing key, or a value that cannot be.
        """
        names = [f.name for f in fields(cls)]
        for key in values:
            if key not in names:
                raise unknown_name(f"key in {source}", key, names, hint="Remove or rename it.")
        required = ("variant", "layout", "d_model", "n_heads", "d_vocab")
        missing = [key for key in required if key not in values]
        if missing:
            raise InputError(f"{source} lacks {', '.join(missing)}; add them.")
        try:
            return cls(**values)
        except TypeError as err:
            raise InputError(f"{source} has a value of the wrong type: {err}.") from err
