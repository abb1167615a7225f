"""Hooked: what every model offers, loopscope's own and anybody else's alike.

Whoever measures, compares or draws a model knows nothing else of it.
"""

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from html import escape
from typing import Any, Protocol, runtime_checkable

from jaxtyping import Float, Int
from torch import Tensor, nn

from loopscope.models.trajectory import Trajectory


@dataclass(frozen=True, kw_only=True)
class ParameterCount:
    """Parameters of a model.

    Attributes:
        total: All parameters, shared ones once.
        non_embedding: Without the embedding and the unembedding, with the final layer norm.
        router: Those of routers and gates; of MeSH (K + 1) · 2 · B · (D + 1).
    """

    total: int
    non_embedding: int
    router: int

    def to_dict(self) -> dict[str, int]:
        """Plain JSON values."""
        return asdict(self)


@dataclass
class Branch:
    """A line of an outline, and those below it."""

    text: str
    below: list["Branch"] = field(default_factory=list)

    def add(self, text: str, lines: Iterable[str] = ()) -> "Branch":
        """Put a line under this one.

        Args:
            text: The line.
            lines: Lines below it.

        Returns:
            The new branch.
        """
        branch = Branch(text, [Branch(line) for line in lines])
        self.below.append(branch)
        return branch

    def lines(self, depth: int = 0) -> Iterable[str]:
        """Write this line and all below it, each level indented by two spaces.

        Args:
            depth: Level of this line.

        Returns:
            The lines.
        """
        yield "  " * depth + self.text
        for branch in self.below:
            yield from branch.lines(depth + 1)


@runtime_checkable
class Hooked(Protocol):
    """A model whose every iteration has a name; `LoopModel` and `WrappedModel` are.

    Attributes:
        name: In tables and figures.
        config: Has at least `variant`, `layout`, `d_model`, `d_vocab`, `n_ctx`, `slots` and
            `to_dict()`.
        tokenizer: A `tokenizers.Tokenizer`, or None.
        provenance: Where the weights come from.
        hook_dict: Canonical hook name → its HookPoint.
        aliases: Further hook names → canonical ones.
        seed: Of the random numbers that a forward pass draws; None where it draws none.
        reads_out_cheaply: Whether reading out a state runs no more than the coda.
        why_no_routing: Why a model without routers and gates has no rows in the table `routing`.
    """

    name: Any
    config: Any
    tokenizer: Any
    provenance: dict[str, Any]
    hook_dict: dict[str, Any]
    aliases: dict[str, str]
    seed: int | None
    reads_out_cheaply: bool
    why_no_routing: str

    @property
    def K(self) -> int:
        """Iterations of the main loop, 0 for a plain stack."""

    @property
    def loops(self) -> dict[str, int]:
        """Iterations of each loop by name, the main one first; empty for a plain stack."""

    @property
    def is_plain(self) -> bool:
        """Whether no layer runs twice, so that a layout may group them into virtual blocks."""

    def twin_key(self) -> Hashable:
        """Equal for models that have the same untrained twin; None where there is none."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model; see its `forward`."""

    def parameters(self) -> Any:
        """As of a torch module; so are the next ones."""

    def named_parameters(self) -> Any: ...

    def named_buffers(self) -> Any: ...

    def modules(self) -> Any: ...

    def named_modules(self) -> Any: ...

    def hook_points(self) -> Any:
        """The HookPoints that may have hooks."""

    def to_tokens(self, input: Any) -> Any:
        """Token ids (batch, pos) of text."""

    def run_with_hooks(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model with hooks for this call."""

    def run_with_cache(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model and keep activations by name."""

    def capture(self, tokens: Any, *, memory: bool = True, logits: bool = False) -> Trajectory:
        """Run the model once and keep the states of every iteration (see `probes.capture`)."""

    def shortened(self, longer: Trajectory, *, logits: bool = False) -> Trajectory:
        """What `capture(longer.tokens)` gives, from the trajectory of `with_loops(T)`, T ≥ K."""

    def read_out(self, h: Any, tokens: Any = None) -> Float[Tensor, "batch pos d_out"]:
        """What the coda makes of a state: h_out if h(K) were `h`, (batch, pos, d_model)."""

    def read_out_logits(
        self, h: Float[Tensor, "batch pos d_model"], tokens: Int[Tensor, "batch pos"]
    ) -> Iterable[Tensor]:
        """Logits if h(K) were `h`: (pos, d_vocab) of each sample, one after the other."""

    def with_loops(self, loops: int | Mapping[str, int]) -> "Hooked":
        """The same weights with another number of iterations."""

    def with_layout(self, layout: Any) -> "Hooked":
        """The layers of a plain stack grouped into virtual blocks."""

    def untrained(self, seed: int = 0) -> "Hooked":
        """The untrained twin, where `twin_key` says that there is one."""

    def why_no_loss(self) -> str:
        """Why the model predicts no next token; empty where it does."""

    def counts(self) -> ParameterCount:
        """Parameters."""

    def describe(self) -> dict[str, Any]:
        """Facts for a reader: layout, widths, parameters, states, training."""

    def structure(self) -> dict[str, Any]:
        """What was found out about the loop, as JSON values; empty where it is the configuration's.

        Of a wrapped model its `map`.
        """

    def specification(self) -> str:
        """`structure` as TOML, to be corrected and given as spec; empty where that is."""

    def outline(self) -> Branch | None:
        """`structure` as a tree of lines; None where that is empty."""

    def hook_patterns(self) -> dict[str, int]:
        """Hook names with indices written {v} and {t}, and how many each stands for."""

    def hook_listing(self, *, every: bool = False) -> list[str]:
        """Hook names as lines: each of them, or patterns."""

    def code_entries(self) -> Sequence[tuple[nn.Module, str]]:
        """The methods through which all of the model's own code is entered."""


def facts_to_html(facts: Mapping[str, Any]) -> str:
    """Write facts as an HTML table of two columns.

    Args:
        facts: What `Hooked.describe` gives.

    Returns:
        The table.
    """
    rows = "".join(
        f"<tr><th style='text-align:left'>{escape(str(name))}</th>"
        f"<td style='text-align:left'>{escape(str(fact))}</td></tr>"
        for name, fact in facts.items()
    )
    return f"<table>{rows}</table>"
