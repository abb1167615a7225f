"""Hooked: what every model offers, loopscope's own and anybody else's alike.

Whoever measures, compares or draws a model knows nothing else of it.
"""

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from html import escape
from typing import Any, Protocol, runtime_checkable

import torch
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
    """A line of an outline, and those below it.

    Attributes:
        text: The line.
        below: The branches one level deeper.
    """

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


@dataclass(frozen=True, kw_only=True)
class LayerParts:
    """The hooks of a layer's parts in one iteration.

    Attributes:
        attention: Of what its attention gives, a name for each attention that it has.
        mlp: Of what its MLP gives, likewise.
        z: Of what the attention's output projection is given, heads side by side in the last axis,
            or heads × d_head in the last two; empty where that is not known.
        heads: How many heads are in `z`.
        shaped: Whether `z` has an axis of heads.
    """

    attention: tuple[str, ...] = ()
    mlp: tuple[str, ...] = ()
    z: str = ""
    heads: int = 0
    shaped: bool = False


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
        input_device: Where its inputs belong.
        coda_hook: The hook at which h(K) is read.
        output_type: The `return_type` of what it returns in its own form.
        copies: Whether what a hook keeps must be copied, since the model changes it in place.
        slots_take_hooks: Whether hooks may change memory slots (`hook_memory`) and give any router
            weights; otherwise slots are rebuilt after the pass, and a change of them or of weights
            that no longer sum to one is made in the states that are read from them (`hook_state`).
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
    output_type: str
    slots_take_hooks: bool

    @property
    def copies(self) -> bool:
        """Whether what a hook keeps must be copied, since the model changes it in place."""

    @property
    def input_device(self) -> torch.device:
        """Where its inputs belong."""

    @property
    def coda_hook(self) -> str:
        """The hook at which h(K) is read; of a model without a loop it may be none."""

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
        """Run the model.

        Args:
            *args: Token ids (batch, pos), text, or what its `forward` takes.
            **kwargs: Its further arguments.

        Returns:
            Logits (batch, pos, d_vocab), unless an argument asks for something else.
        """

    def parameters(self) -> Any:
        """Parameters, as of a torch module."""

    def named_parameters(self) -> Any:
        """Parameters with their names, as of a torch module."""

    def named_buffers(self) -> Any:
        """Buffers with their names, as of a torch module."""

    def modules(self) -> Any:
        """Modules, as of a torch module."""

    def named_modules(self) -> Any:
        """Modules with their names, as of a torch module."""

    def hook_points(self) -> Any:
        """The HookPoints that may have hooks."""

    def to_tokens(self, input: Any) -> Any:
        """Give the token ids of text.

        Args:
            input: One text, or several of equal token length.

        Returns:
            Ids (batch, pos).
        """

    def hooks(self, *args: Any, **kwargs: Any) -> Any:
        """Keep hooks within a `with` block.

        Args:
            *args: As of `run_with_hooks`.
            **kwargs: Likewise.

        Returns:
            The context.
        """

    def run_with_hooks(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model with hooks for this call.

        Args:
            *args: What the model takes.
            **kwargs: `fwd_hooks` and `bwd_hooks`, pairs (name or predicate, function of (tensor,
                hook)), and the model's own arguments.

        Returns:
            The model's output.
        """

    def run_with_cache(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model and keep activations by name.

        Args:
            *args: What the model takes.
            **kwargs: `names_filter` and others as in TransformerLens, and the model's own.

        Returns:
            The model's output and the cache.
        """

    def checkpoint_hooks(self) -> list[str]:
        """Hooks whose tensors of one pass let `resume` begin anywhere in another; may be none."""

    def resume(
        self,
        tokens: Any,
        kept: Mapping[str, Tensor],
        fwd_hooks: Sequence[tuple[str, Any]],
        first: Iterable[str],
    ) -> Any:
        """Run with hooks from the first place that they change on, where the model allows.

        A native model begins at that layer or cycle; a wrapped one runs whole.

        Args:
            tokens: The tokens, (batch, pos).
            kept: `checkpoint_hooks` → their tensors in a pass over the same tokens.
            fwd_hooks: As in `run_with_hooks`; those before that place may not be called.
            first: Hooks at which the pass may differ from the earlier one.

        Returns:
            The logits, bit-equal to those of `run_with_hooks`.
        """

    def layer_parts(self, path: str) -> tuple[LayerParts, ...]:
        """Name the hooks of attention, MLP and heads of each layer in one iteration.

        Args:
            path: Where the iteration stands, as in a trajectory's `path`.

        Returns:
            The parts of each layer, in order; empty names for what was not found.
        """

    def generate(self, *args: Any, **kwargs: Any) -> Int[Tensor, "batch length"]:
        """Go on with tokens, with hooks at every step (see `GenerationMixin`).

        Args:
            *args: Token ids (batch, pos) or text, and how many tokens to add.
            **kwargs: How each is chosen.

        Returns:
            Token ids, the given ones included.
        """

    def capture(
        self, tokens: Any, *, memory: bool = True, logits: bool = False, output: bool = False
    ) -> Trajectory:
        """Run the model once and keep the states of every iteration (see `probes.capture`).

        Args:
            tokens: Token ids (batch, pos), or text for a model with a tokenizer.
            memory: Keep MeSH's buffer after each write.
            logits: Keep the logits too.
            output: Keep what the model returns, in its own form.

        Returns:
            The trajectory; its tensors carry no gradients.
        """

    def calls_on(self, inputs: Any) -> Hashable:
        """Tell how often it loops on an input.

        Args:
            inputs: What the model takes.

        Returns:
            Equal values where it loops as often.
        """

    def wrapped_on(self, inputs: Any) -> "Hooked":
        """Give the model with the iterations that it runs on an input.

        Args:
            inputs: What the model takes.

        Returns:
            A model on the same parameters.
        """

    def shortened(self, longer: Trajectory, *, logits: bool = False) -> Trajectory:
        """Make the trajectory of this model from one with more iterations.

        Args:
            longer: What `with_loops(T).capture` gives, T ≥ K.
            logits: Keep the logits too.

        Returns:
            What `capture(longer.tokens, logits=logits)` gives.
        """

    def read_out(self, h: Any, tokens: Any = None) -> Float[Tensor, "batch _ d_out"]:
        """Tell what the coda makes of a state: h_out if h(K) were `h`.

        Args:
            h: Any state of the main loop, (batch, pos, d_model).
            tokens: The tokens, (batch, pos); a native model needs none.

        Returns:
            h_out, before the final norm, (batch, pos, d_out).
        """

    def read_out_logits(
        self, h: Float[Tensor, "batch pos d_model"], tokens: Int[Tensor, "batch token"]
    ) -> Iterable[Tensor]:
        """Give the logits if h(K) were `h`.

        Args:
            h: Any state of the main loop, (batch, pos, d_model).
            tokens: The tokens, (batch, pos).

        Returns:
            (pos, d_vocab) of each sample, one after the other.
        """

    def unembed_state(
        self, state: Float[Tensor, "batch _ d_out"], tokens: Any = None
    ) -> Iterable[Float[Tensor, "_ d_vocab"]]:
        """Give the logits if h_out were a state: the final norm and the unembedding alone.

        Args:
            state: Any state of the shape of h_out, (batch, pos, d_model).
            tokens: What the model was given; a native model needs none.

        Returns:
            (pos, d_vocab) of each sample, one after the other.
        """

    def unembeds_alone(self, tokens: Any) -> bool:
        """Whether `unembed_state` runs no more than the final norm and the unembedding.

        Args:
            tokens: What the model takes; a wrapped model may be run on it to find out.

        Returns:
            Whether it does; then the state may be of any number of samples and positions.
        """

    def layer_hooks(self) -> Mapping[str, str]:
        """Name the stream after every layer of every iteration, and the hook at which it is.

        Returns:
            `prelude.0` …, `core1.0` …, `coda.0` … → hook, in the order in which they run.
        """

    def coda_parameters(self) -> Mapping[str, nn.Parameter]:
        """The parameters that only what follows the main loop uses, the unembedding aside."""

    def with_loops(self, loops: int | Mapping[str, int]) -> "Hooked":
        """Run the same weights another number of iterations.

        Args:
            loops: Iterations of the main loop, or of several loops by name.

        Returns:
            A model on the same parameters.
        """

    def with_layout(self, layout: Any) -> "Hooked":
        """Group the layers of a plain stack into virtual blocks.

        Args:
            layout: A layout string or `Layout` without a loop.

        Returns:
            A model on the same parameters.
        """

    def untrained(self, seed: int = 0) -> "Hooked":
        """Make the untrained twin, where `twin_key` says that there is one.

        Args:
            seed: Of its weights.

        Returns:
            The twin.
        """

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
        """List the hook names as lines.

        Args:
            every: Each of them; otherwise patterns.

        Returns:
            A heading and the lines.
        """

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
