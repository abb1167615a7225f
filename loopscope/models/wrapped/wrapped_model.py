"""WrappedModel: somebody else's model, every tensor of every iteration by name."""

from collections.abc import Callable
from html import escape
from typing import Any, Protocol, runtime_checkable
from warnings import warn

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from loopscope.errors import InputError
from loopscope.models.hooked import Branch, LayerParts, facts_to_html
from loopscope.models.hooks import NamedHooks, Point
from loopscope.models.loops import Loop, LoopMap, Step, to_toml
from loopscope.models.native import Layout
from loopscope.models.tokenization import TextMixin
from loopscope.models.trajectory import Trajectory
from loopscope.models.wrapped import unembedded_states
from loopscope.models.wrapped.addresses import PATTERN, STATE, Addresses
from loopscope.models.wrapped.capturing import calls_on, captured, wrapped_on
from loopscope.models.wrapped.description import (
    WrappedCount,
    address_listing,
    address_patterns,
    count_wrapped,
    describe_wrapped,
    map_tree,
)
from loopscope.models.wrapped.direct_calls import Address, DirectCalls
from loopscope.models.wrapped.generating import Generating
from loopscope.models.wrapped.inputs import Inputs, input_device
from loopscope.models.wrapped.layer_parts import layer_parts
from loopscope.models.wrapped.loop_count import Setting
from loopscope.models.wrapped.running import SEES_AHEAD, Running
from loopscope.models.wrapped.shape import LensConfig, WrappedConfig
from loopscope.models.wrapped.taps import Schedule, Tap
from loopscope.models.wrapped.wrapped_cache import WrappedCache

RETURNS = ("logits", "loss", "both", "output", None)


@runtime_checkable
class Recipe(Protocol):
    """What a model was wrapped with, to wrap it again (see `wrapping.Recipe`)."""

    def build(self, module: nn.Module, **changes: Any) -> "WrappedModel":
        """Wrap a module.

        Args:
            module: The module, or a copy of it.
            **changes: What shall be otherwise: `loops`, `layout`, the example (`args`, `kwargs`).

        Returns:
            The wrapped model.
        """


class WrappedModel(Generating, Running, TextMixin, NamedHooks):
    """A model made by `wrap`: the original module plus names for every iteration.

    It is called, hooked and cached as a native model: `model(tokens)` gives logits,
    `run_with_cache` and `run_with_hooks` take addresses that carry the iteration. Nothing of the
    original is changed; its modules carry hooks only while hooks are asked for, and then they act
    whoever calls it. A patch of `loop.{t}.hook_in` is one of what the core is given;
    `loop.{t}.hook_state` is h(t) for all that reads it, as in native models.

    Attributes:
        module: The original.
        map: Its roles, loops and iterations.
        name: Name in tables and figures.
        tokenizer: A `tokenizers.Tokenizer`, or None.
        provenance: Where the weights come from.
        seed: Of the random numbers that a forward pass draws, where it draws any, and of dropout in
            training mode; None (to train the model) leaves them to torch.
        recipe: What it was wrapped with.
    """

    map: LoopMap

    def __init__(
        self,
        module: nn.Module,
        loop_map: LoopMap,
        names: Addresses,
        inputs: Inputs,
        *,
        config: WrappedConfig,
        name: str,
        tokenizer: Any = None,
        provenance: dict[str, Any] | None = None,
        settings: tuple[Setting, ...] = (),
        logits_at: tuple[Step, ...] | None = None,
        plan: Schedule,
        recipe: Recipe,
    ) -> None:
        super().__init__()
        self.setup()  # before the original is there: its modules get no names from TransformerLens
        self.module = module
        self.map = loop_map
        self.inputs = inputs
        self.config = config
        self.tokenizer = tokenizer
        self.provenance = provenance or {}
        self.settings = settings
        self.logits_at = logits_at
        self.seed: int | None = 0
        self.plan = plan
        self.recipe = recipe
        self._originals = dict(module.named_modules())
        self._live: dict[str, Point] = {}
        self.direct_calls = DirectCalls(self)
        self._name(names)
        self.name = name
        self.cfg = LensConfig(module, config, name)

    @property
    def training(self) -> bool:
        """Whether the original is in training mode."""
        module = self.__dict__.get("_modules", {}).get("module")
        return False if module is None else module.training

    @training.setter
    def training(self, mode: bool) -> None:
        """Nothing to keep: `train` and `eval` set the original's own."""

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile the original; runs with hooks use its uncompiled code."""
        self.module.compile(*args, **kwargs)

    # -- names -----------------------------------------------------------------------------------

    def _name(self, names: Addresses) -> None:
        """Make a HookPoint for each address."""
        self.hook_dict, self.aliases = {}, names.aliases
        self.names, self.ports, self.cut = names, names.ports, names.cut
        for name in names.names():
            part = names.ports[name].module if name in names.ports else ""
            self.hook_dict[name] = Address(name, part, self.direct_calls)
        self.mod_dict = {**self.hook_dict}
        self.mod_dict |= {alias: self.hook_dict[n] for alias, n in names.aliases.items()}
        first = {id(m): n for n, m in self._originals.items()}
        self._further_names = {
            n: first[id(m)]
            for n, m in self.module.named_modules(remove_duplicate=False)
            if n != first[id(m)]
        }

    def resolve(self, name: str) -> str:
        """The canonical form of a name: aliases, and modules registered under several names.

        Args:
            name: Any name of a hook.

        Returns:
            The canonical one; an unknown name as it is.
        """
        if name in self.hook_dict:
            return name
        if name in self.aliases:
            return self.aliases[name]
        for further, first in self._further_names.items():
            if f".{further}." in f".{name.replace(':', '.')}.":
                plain = name.replace(further, first, 1)
                if plain in self.hook_dict:
                    return plain
        return name

    def canonical(self, name: str) -> str:
        """The canonical name of a hook.

        Args:
            name: Any of its names.

        Returns:
            The canonical one.

        Raises:
            UnknownNameError: if there is no such hook; near matches are listed.
        """
        return super().canonical(self.resolve(name))

    def select(self, names_filter: Any) -> set[str]:
        """Canonical names that a filter means; None means all but patterns and `hook_state`.

        A pattern makes the attention run step by step, so it takes being asked for; `hook_state`
        takes its name, as in native models.

        Args:
            names_filter: None, a name, names, or a predicate.

        Returns:
            The names.

        Raises:
            UnknownNameError: if a given name does not exist.
            InputError: if nothing is selected.
        """
        if names_filter is None:
            return {name for name in self.hook_dict if not name.endswith((PATTERN, STATE))}
        if callable(names_filter):
            asked = names_filter
            return super().select(lambda name: not name.endswith(STATE) and asked(name))
        return super().select(names_filter)

    @property
    def copies(self) -> bool:
        """Whether what is kept must be copied, since the model changes it in place later."""
        return self.map.mutates

    def hook_points(self) -> Any:
        """The points that have, or had, hooks; thousands of others need no cleaning up."""
        return list(self._live.values())

    def _enable_hook(self, name: Any, hook: Callable, dir: Any) -> None:
        super()._enable_hook(self._touch(name, dir), hook, dir)

    def add_hook(self, name: Any, hook: Callable, *args: Any, **kwargs: Any) -> None:
        """Add a hook that stays until `reset_hooks()`.

        Args:
            name: As in `run_with_hooks`.
            hook: Called with the tensor and `hook=`; what it returns takes the tensor's place.
            *args: As in TransformerLens; the first is the direction, `fwd` or `bwd`.
            **kwargs: Likewise.
        """
        name = self._touch(name, kwargs.get("dir", args[0] if args else "fwd"))
        super().add_hook(name, hook, *args, **kwargs)

    def _touch(self, name: Any, dir: str) -> Any:
        """Note the points of a filter as used; gives the filter, for `bwd` without others."""
        chosen = self.select(name)
        if dir == "bwd":
            name = self.names.with_gradients(name, chosen)
        self._live |= {address: self.hook_dict[address] for address in sorted(chosen)}
        if dir == "bwd" and (cut := sorted(chosen & self.cut)):
            warn(
                f"the model runs {cut[0]}{' and others' if len(cut) > 1 else ''} without gradients "
                "(torch.no_grad in its forward), so a backward hook there never fires.",
                stacklevel=4,
            )
        return name

    def get_caching_hooks(self, names_filter: Any = None, *args: Any, **kwargs: Any) -> Any:
        """TransformerLens's caching hooks, for the points a filter means.

        Args:
            names_filter: None, a name, names, or a predicate.
            *args: As in TransformerLens.
            **kwargs: Likewise.

        Returns:
            The cache, and the hooks that fill it.
        """
        if isinstance(names_filter, str):
            names_filter = [names_filter]
        cache, fwd, bwd = super().get_caching_hooks(names_filter, *args, **kwargs)
        if names_filter is None or callable(names_filter):
            bwd = [pair for pair in bwd if pair[0] not in self.names.no_tensor()]
        return cache, fwd, bwd

    def reaches(self, name: str, stop_at_layer: int) -> bool:
        """Refused: a wrapped model runs to its end.

        Args:
            name: A hook.
            stop_at_layer: Where a native model may be stopped.

        Returns:
            Nothing.

        Raises:
            InputError: always.
        """
        raise InputError("a wrapped model cannot be stopped at a layer; leave stop_at_layer out.")

    # -- running ---------------------------------------------------------------------------------

    def forward(self, *args: Any, return_type: str | None = "logits", **kwargs: Any) -> Any:
        """Run the model.

        Args:
            *args: Tokens (batch, pos) or text, or what the original's forward takes.
            return_type: `logits` (what the original returns where it gives none), `loss` (mean
                next-token cross-entropy, nats), `both`, `output` (what the original returns, in its
                own form) or None.
            **kwargs: Arguments of the original's forward.

        Returns:
            What `return_type` says.

        Raises:
            InputError: for tokens it cannot take, or a loss of a model that predicts no next token.
        """
        if return_type not in RETURNS:
            raise InputError(
                f"return_type must be one of {', '.join(map(repr, RETURNS))}, given "
                f"{return_type!r}."
            )
        arguments = self.prepare(args, kwargs)
        output, _ = self._run_live(arguments, {})
        if return_type in ("output", None):
            return output if return_type else None
        logits = self.logits_in(output)
        if return_type == "logits":
            return logits
        loss = self._loss(logits, *arguments)
        return (logits, loss) if return_type == "both" else loss

    def run_with_cache(self, *model_args: Any, **kwargs: Any) -> Any:
        """Run the model and keep activations by name, every iteration's own.

        Args:
            *model_args: What the model takes: tokens (batch, pos), or text.
            **kwargs: `names_filter` (None for all, a name, names, or a predicate), `device`,
                `incl_bwd`, `pos_slice`, `remove_batch_dim`, `return_cache_object` as for native
                models, and arguments of the model.

        Returns:
            The model's output and the cache.

        Raises:
            UnknownNameError: if a name does not exist; near matches are listed.
        """
        keep = kwargs.pop("return_cache_object", True)
        squeezed = kwargs.get("remove_batch_dim", False)
        out, cache = super().run_with_cache(*model_args, return_cache_object=False, **kwargs)
        return out, WrappedCache(cache, self, has_batch_dim=not squeezed) if keep else cache

    # -- other views -----------------------------------------------------------------------------

    def with_loops(self, loops: Any) -> "WrappedModel":
        """The same module with another number of iterations; weights are shared, hooks are not.

        Args:
            loops: Iterations of the main loop, or of each loop by name (of an inner loop: per run).

        Returns:
            A model of its own around the same module.

        Raises:
            InputError: for models that do not allow it, or where it has no effect.
        """
        return self.recipe.build(self.module, loops=loops)

    def with_layout(self, layout: str | Layout) -> "WrappedModel":
        """The layers of a plain stack grouped into virtual blocks; weights are shared, not hooks.

        Args:
            layout: Unshared depths that add up to the layers, such as `4+8+8+4`.

        Returns:
            A model of its own around the same module.

        Raises:
            InputError: if the model has a loop, or the depths do not add up.
        """
        return self.recipe.build(self.module, layout=layout)

    @property
    def input_device(self) -> torch.device:
        """Where token ids are looked up."""
        return input_device(self.module)

    # -- what a trajectory is made of ------------------------------------------------------------

    @torch.no_grad()
    def capture(
        self, tokens: Any, *, memory: bool = True, logits: bool = False, output: bool = False
    ) -> Trajectory:
        """Run the model once and keep the states of every iteration of every loop.

        Args:
            tokens: Token ids (batch, pos), text, or what its forward takes.
            memory: Keep the memory slots of a MeSH port.
            logits: Keep the logits too.
            output: Keep what the original returns, in its own form.

        Returns:
            The trajectory of the main loop, those of further loops in `others`.

        Raises:
            InputError: for input it cannot take, or that makes it loop otherwise than the example
                did.
        """
        arguments = self.prepare((tokens,), {})
        return captured(self, arguments, memory=memory, logits=logits, output=output)

    calls_on = calls_on
    wrapped_on = wrapped_on

    def shortened(self, longer: Trajectory, *, logits: bool = False) -> Trajectory:
        """The trajectory on the tokens of another; the model is run anew.

        Args:
            longer: What `with_loops(T).capture` gives.
            logits: Keep the logits too.

        Returns:
            What `capture(longer.tokens, logits=logits)` gives.
        """
        return self.capture(longer.tokens, logits=logits)

    @torch.no_grad()
    def read_out(
        self, h: Float[Tensor, "batch pos d_model"], tokens: Any = None
    ) -> Float[Tensor, "batch _ d_out"]:
        """What the coda makes of a state: h_out if h(K) were `h`; the model runs whole.

        Args:
            h: Any state of the main loop, (batch, pos, d_model).
            tokens: The tokens, (batch, pos), or what its forward takes.

        Returns:
            h_out, before the final norm.

        Raises:
            InputError: if the model has no loop, or no tokens are given.
        """
        loop = self._read_loop()
        if tokens is None:
            raise InputError("a wrapped model runs whole to read out a state; give its tokens too.")
        kept: list[Tensor] = []
        taps: dict[str, Tap] = {
            "h": (loop.after, lambda state: h.to(state)),
            "h_out": (self.map.h_out, lambda h_out: kept.append(h_out.detach().clone())),
        }
        self._run_live(self.prepare((tokens,), {}), taps)
        return kept[0]

    def read_out_logits(
        self, h: Float[Tensor, "batch pos d_model"], tokens: Int[Tensor, "batch token"]
    ) -> Float[Tensor, "batch token d_vocab"]:
        """Logits if h(K) were `h`; the model runs whole.

        Args:
            h: Any state of the main loop, (batch, pos, d_model).
            tokens: The tokens, (batch, pos).

        Returns:
            The logits.

        Raises:
            InputError: if the model has no loop.
        """
        self._read_loop()
        return self.run_with_hooks(
            tokens, fwd_hooks=[(self.coda_hook, lambda state, hook: h.to(state))]
        )

    unembed_state = unembedded_states.unembed_state
    unembeds_alone = unembedded_states.unembeds_alone
    layer_hooks = unembedded_states.layer_hooks
    output_type = "output"

    @property
    def coda_hook(self) -> str:
        """The hook at which h(K) is read; empty without a loop."""
        return "" if self.map.main is None else f"loop.{self.map.main.name}.after.hook_in"

    def coda_parameters(self) -> dict[str, nn.Parameter]:
        """The parameters of the modules after the last loop, by name; not those used before it."""
        after = [unit.module for unit in self.map.coda]
        after += [self.map.norm] if self.map.norm is not None else []
        before = {
            id(value)
            for unit in self.map.units()
            if unit.module not in after
            for value in self._originals[unit.module].parameters()
        }
        return {
            f"module.{name}.{key}": value
            for name in dict.fromkeys(after)
            for key, value in self._originals[name].named_parameters()
            if id(value) not in before
        }

    slots_take_hooks = False

    def layer_parts(self, path: str) -> tuple[LayerParts, ...]:
        """Name the hooks of attention, MLP and heads of each layer in one iteration.

        Args:
            path: Where the iteration stands.

        Returns:
            The parts of each layer, in order; empty for what was not found.
        """
        return layer_parts(self.hook_dict, self.aliases, self._originals, path)

    def _read_loop(self) -> Loop:
        if self.map.main is None:
            raise InputError(f"{self.name!r} has no loop, so there is no state to read out.")
        return self.map.main

    # -- what its map says of it -----------------------------------------------------------------

    reads_out_cheaply = False
    why_no_routing = "no routers and no gates were found in the model or named in its spec"

    @property
    def K(self) -> int:
        """Iterations of the main loop, 0 for a plain stack."""
        return self.map.K

    @property
    def loops(self) -> dict[str, int]:
        """Iterations of each loop by name, the main one first."""
        return {loop.name: loop.K for loop in self.map.loops}

    @property
    def is_plain(self) -> bool:
        """Whether it is a stack without a loop, whose layers a layout may group."""
        return self.map.main is None

    def twin_key(self) -> None:
        """Nothing: only its weights are known, not how they began."""

    def untrained(self, seed: int = 0) -> "WrappedModel":
        """Refused: only the weights of a wrapped model are known, not how they began.

        Args:
            seed: Of weights that cannot be drawn.

        Returns:
            Nothing.

        Raises:
            InputError: always.
        """
        raise InputError(f"{self.name!r} is wrapped in memory, where only its weights are known.")

    def why_no_loss(self) -> str:
        """Why the model predicts no next token; empty where it does."""
        if self.map.causal is None:
            return self.map.why_no_logits
        return "" if self.map.causal else SEES_AHEAD

    def counts(self) -> WrappedCount:
        """Count the parameters, each once however often it is named.

        Returns:
            All, those outside token embedding and unembedding, those of routers and gates, and
            those that iterations share.
        """
        return count_wrapped(self.module, self.map, self.config.d_vocab)

    def describe(self) -> dict[str, Any]:
        """Facts for a reader.

        Returns:
            Name, class, layout, widths, parameter counts, states, tokenizer, and where it came
            from.
        """
        return describe_wrapped(self)

    def structure(self) -> dict[str, Any]:
        """The map, as JSON values."""
        return {"map": self.map.to_dict()}

    def specification(self) -> str:
        """The map as TOML, to be corrected and given as spec."""
        return to_toml(self.map)

    def outline(self) -> Branch:
        """The map as a tree of lines."""
        return map_tree(self.module, self.map)

    def hook_patterns(self) -> dict[str, int]:
        """Addresses with the iteration written {t}, and how many each stands for."""
        return address_patterns(self.map, self.hook_dict)

    def hook_listing(self, *, every: bool = False) -> list[str]:
        """Addresses as lines.

        Args:
            every: Each of them; otherwise patterns, with how many they stand for.

        Returns:
            A heading and a line for each.
        """
        return address_listing(self.map, self.hook_dict, self.aliases, every=every)

    def code_entries(self) -> list[tuple[nn.Module, str]]:
        """The method through which all of the model's own code is entered."""
        return [(self.module, "forward")]

    def __repr__(self) -> str:
        n = sum(p.numel() for p in self.module.parameters())
        loops = ", ".join(f"{loop.name} × {loop.K}" for loop in self.map.loops) or "no loop"
        return (
            f"WrappedModel {self.name!r}: {self.config.architecture} {self.map}, {loops}, "
            f"d_model={self.config.d_model}, {n:,} parameters"
        )

    def _repr_html_(self) -> str:
        tree = escape("\n".join(self.outline().lines()))
        return f"{facts_to_html(self.describe())}<pre>{tree}</pre>"
