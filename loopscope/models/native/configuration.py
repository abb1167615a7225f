"""Configuration of a native model: widths, layout, variant."""

import math
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

from loopscope.errors import InputError, unknown_name
from loopscope.models.native.layout import Layout

if TYPE_CHECKING:
    LayoutLike = Layout
else:  # a layout string is parsed when the configuration is made
    LayoutLike = Layout | str

SUPPLEMENTS = ("residual", "anchor", "anchor_emb")
SINGLE_VARIANTS = ("vanilla", "base", *SUPPLEMENTS, "static", "dynamic", "mesh")
TRANSITION_QUERIES = ("prelude", "embedding")
ACTIVATIONS = ("gelu", "gelu_tanh", "relu", "silu")


def parse_variant(text: str) -> str:
    """Bring a variant name into its canonical form.

    `anchor*` is an alias of `anchor_emb`; sums of supplements (MeSH Table 4) may be written in any
    order and are sorted; a leading `+` is dropped.

    Raises:
        UnknownNameError: if a term is no variant, or cannot be part of a sum.
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
        self._check_variant()

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
        """A copy with some fields changed; all checks run again."""
        return replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, the layout as its string."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {**values, "layout": str(self.layout)}

    @classmethod
    def from_dict(cls, values: dict[str, Any], *, source: str = "configuration") -> "LoopConfig":
        """Build a configuration from JSON values; unknown and missing keys raise."""
        known = [f.name for f in fields(cls)]
        for key in values:
            if key not in known:
                raise unknown_name(f"key in {source}", key, known, hint="Remove or rename it.")
        required = ("variant", "layout", "d_model", "n_heads", "d_vocab")
        missing = [key for key in required if key not in values]
        if missing:
            raise InputError(f"{source} lacks {', '.join(missing)}; add them.")
        try:
            return cls(**values)
        except TypeError as err:
            raise InputError(f"{source} has a value of the wrong type: {err}.") from err
