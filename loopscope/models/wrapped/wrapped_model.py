"""WrappedModel: somebody else's model, every tensor of every iteration by name."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from html import escape
from typing import TYPE_CHECKING, Any
from warnings import warn

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformer_lens.utilities import get_act_name

from loopscope.errors import InputError
from loopscope.models.cache import LoopCache
from loopscope.models.hooks import NamedHooks, Point
from loopscope.models.loops.identity import example_shape
from loopscope.models.loops.loop_map import LoopMap, Port, Step
from loopscope.models.native.layout import Layout
from loopscope.models.tokenization import TextMixin
from loopscope.models.wrapped.addresses import PATTERN, Addresses
from loopscope.models.wrapped.inputs import Inputs, input_device
from loopscope.models.wrapped.loop_count import Setting, arguments
from loopscope.models.wrapped.run_context import (
    alone,
    as_wanted,
    eager_attention,
    only_read,
    uncompiled,
    without_checkpointing,
)
from loopscope.models.wrapped.shape import LensConfig, WrappedConfig
from loopscope.models.wrapped.taps import Schedule, Tap, get, tapped

if TYPE_CHECKING:
    from loopscope.models.wrapped.wrapping import Recipe


class WrappedCache(LoopCache):
    """An `ActivationCache` of a wrapped model.

    `cache["loop.1.layer.0.hook_out"]`, `cache["blocks.3.hook_resid_post"]` and
    `cache["resid_post", -1]` are the same tensor. What a foreign block adds to its stream is not
    known, so decompositions raise.
    """

    def _name(self, key: Any) -> str:
        if isinstance(key, tuple) and len(key) > 1 and isinstance(key[1], int) and key[1] < 0:
            key = (key[0], self.model.cfg.n_layers + key[1], *key[2:])
        name = key if isinstance(key, str) else get_act_name(*key)
        plain = name.removesuffix("_grad")
        return self.model.resolve(plain) + name[len(plain) :]

    def _refuse_across_iterations(self, what: str, layer: int | None) -> None:
        raise InputError(
            f"{what} needs to know what each block adds to its stream, which a wrapped model does "
            "not tell. Compare states with cache['resid_post', v] or the loop's hooks instead."
        )

    def apply_ln_to_stack(self, residual_stack: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Refused: the norms of a wrapped model are its own."""
        self._refuse_across_iterations("apply_ln_to_stack", None)
        raise AssertionError

    def accumulated_resid(self, layer: int | None = None, *args: Any, **kwargs: Any) -> Any:
        """Refused: read `cache["resid_pre", v]` of the layers wanted."""
        self._refuse_across_iterations("accumulated_resid", layer)

    def apply_slice_to_batch_dim(self, batch_slice: Any) -> "WrappedCache":
        """A cache of some batch entries."""
        cut = super(LoopCache, self).apply_slice_to_batch_dim(batch_slice)
        return WrappedCache(cut.cache_dict, self.model, has_batch_dim=cut.has_batch_dim)


class Running:
    """How a wrapped model runs its original."""

    module: nn.Module
    map: LoopMap
    inputs: Inputs
    name: str | None
    seed: int | None
    settings: tuple[Setting, ...]
    logits_at: tuple[Step, ...] | None
    plan: Schedule
    ports: dict[str, Port]
    _live: dict[str, Point]
    _originals: dict[str, nn.Module]
    _as_tokens: Callable[..., Tensor]

    def prepare(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple, dict]:
        """Arguments of the original's forward for those of a call."""
        alone = len(args) == 1 and not isinstance(args[0], Mapping | tuple)
        if alone and (self.inputs.tokens is not None or not isinstance(args[0], Tensor)):
            args = (self._read_tokens(args[0]),)
        return self.inputs.complete(args, kwargs, arguments(self.settings))

    def _read_tokens(self, given: Any) -> Tensor:
        try:
            return self._as_tokens(given)
        except InputError:
            raise
        except (TypeError, ValueError, RuntimeError) as error:
            raise InputError(
                f"{type(given).__name__} cannot be read as token ids ({error}); give integers "
                "(batch, pos), text, or the arguments of forward as a tuple or dict."
            ) from error

    def run(
        self, given: tuple[tuple, dict], taps: list[Tap], *, eager: bool = False
    ) -> tuple[Any, list[int]]:
        """One forward pass of the original with functions at some of its tensors.

        Args:
            given: Its arguments, from `prepare`.
            taps: Tensors and what to do with them.
            eager: Compute attention step by step, so that its pattern exists.

        Returns:
            What the original returns, and the numbers of the taps that were not reached.

        Raises:
            InputError: for more or fewer iterations than on the example, or a run within a hook.
        """
        args, kwargs = given
        with self._as_wanted(given), eager_attention(self.module, wanted=eager):
            if not taps:
                return self.module(*args, **kwargs), []
            with (
                uncompiled(),
                without_checkpointing(self.module),
                tapped(self._originals, taps, self.plan) as missed,
            ):
                output = self.module(*args, **kwargs)
            return output, missed

    def _run_live(self, given: tuple[tuple, dict], more: Mapping[Any, Tap]) -> tuple[Any, set[Any]]:
        """A forward pass with the hooks that are there, then further taps; what was not reached."""
        used = {name: point for name, point in self._live.items() if _used(point)}
        taps: list[Tap] = [
            (self.ports[name], only_read(point) if name.endswith(PATTERN) else point)
            for name, point in used.items()
        ]
        eager = any(name.endswith(PATTERN) for name in used)
        output, missed = self.run(given, [*taps, *more.values()], eager=eager)
        names = [*used, *more]
        if unseen := [names[n] for n in missed if n < len(used)]:
            rest = f" and {len(unseen) - 3} more" if len(unseen) > 3 else ""
            warn(
                f"{self.name!r} did not call what {', '.join(unseen[:3])}{rest} belong to in that "
                "iteration on this input, so their hooks saw nothing.",
                stacklevel=4,
            )
        return output, {names[n] for n in missed}

    @contextmanager
    def _as_wanted(self, given: tuple[tuple, dict]) -> Iterator[None]:
        """Number of iterations, random numbers, key-value cache and compilation as they must be."""
        seed: int | None = None
        shape: tuple[int | None, int | None] = (None, None)
        if self.map.random or self.module.training:
            seed = self.seed
            shape = example_shape(*given) if self.map.random else shape
        with (
            alone(self.module, str(self.name)),
            as_wanted(self.module, self.inputs, self.settings, seed, *shape),
        ):
            yield

    def logits_in(self, output: Any) -> Any:
        """The logits in what the original returned; all of it where there are none."""
        return output if self.logits_at is None else get(output, self.logits_at)

    def why_no_loss(self, logits: Any) -> str | None:
        """Why a next-token loss makes no sense; None where it does."""
        if self.map.causal is None or not isinstance(logits, Tensor):
            return "the model gives no logits per token, or none that two runs agree on"
        if not self.map.causal:
            return "the model looks at later tokens, so it predicts no next token"
        return None

    def _loss(self, logits: Any, args: tuple, kwargs: dict) -> Tensor:
        if reason := self.why_no_loss(logits):
            raise InputError(f"there is no loss: {reason}.")
        tokens = self.inputs.tokens_in(args, kwargs)
        if tokens.shape[1] < 2:
            raise InputError(f"a loss needs at least 2 tokens, given {tokens.shape[1]}.")
        targets = tokens[:, 1:].flatten().to(logits.device)
        return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), targets)

    def read(
        self, given: tuple[tuple, dict], ports: Mapping[Any, Port]
    ) -> tuple[Any, dict[Any, Tensor]]:
        """One forward pass that keeps some tensors; permanent hooks run before.

        Args:
            given: Arguments, from `prepare`.
            ports: What to keep, under any keys.

        Returns:
            What the original returned, and the tensors by key; what this input does not reach is
            missing.
        """
        kept: dict[Any, Tensor] = {}

        def keep(key: Any) -> Callable[[Tensor], None]:
            if self.map.mutates:
                return lambda tensor: kept.__setitem__(key, tensor.detach().clone())
            return lambda tensor: kept.__setitem__(key, tensor.detach())

        output, _ = self._run_live(given, {key: (port, keep(key)) for key, port in ports.items()})
        return output, kept


def _used(point: Point) -> bool:
    return bool(point.fwd_hooks or point.bwd_hooks)


RETURNS = ("logits", "loss", "both", "output", None)


class WrappedModel(Running, TextMixin, NamedHooks):
    """A model made by `wrap`: the original module plus names for every iteration.

    It is called, hooked and cached as a native model: `model(tokens)` gives logits,
    `run_with_cache` and `run_with_hooks` take addresses that carry the iteration. Nothing of the
    original is changed; its modules carry hooks only while a run with hooks lasts.

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
        found: LoopMap,
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
        recipe: "Recipe",
    ) -> None:
        super().__init__()
        self.setup()  # before the original is there: its modules get no names from TransformerLens
        self.module = module
        self.map = found
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
        self.ports, self.cut = names.ports, names.cut
        for name in names.ports:
            point = Point()
            point.name = name
            self.hook_dict[name] = point
        self.mod_dict = {**self.hook_dict}
        self.mod_dict |= {alias: self.hook_dict[n] for alias, n in names.aliases.items()}
        first = {id(m): n for n, m in self._originals.items()}
        self._other_names = {
            n: first[id(m)]
            for n, m in self.module.named_modules(remove_duplicate=False)
            if n != first[id(m)]
        }

    def resolve(self, name: str) -> str:
        """The canonical form of a name: aliases, and modules registered under several names."""
        if name in self.hook_dict:
            return name
        if name in self.aliases:
            return self.aliases[name]
        for other, first in self._other_names.items():
            if f".{other}." in f".{name.replace(':', '.')}.":
                plain = name.replace(other, first, 1)
                if plain in self.hook_dict:
                    return plain
        return name

    def canonical(self, name: str) -> str:
        """The canonical name of a hook.

        Raises:
            UnknownNameError: if there is no such hook; near matches are listed.
        """
        return super().canonical(self.resolve(name))

    def select(self, names_filter: Any) -> set[str]:
        """Canonical names that a filter means; None means all but the attention patterns.

        A pattern makes the attention run step by step, so it takes being asked for.

        Raises:
            UnknownNameError: if a given name does not exist.
            InputError: if nothing is selected.
        """
        if names_filter is None:
            return {name for name in self.hook_dict if not name.endswith(PATTERN)}
        return super().select(names_filter)

    @property
    def copies(self) -> bool:
        """Whether what is kept must be copied, since the model changes it in place later."""
        return self.map.mutates

    def hook_points(self) -> Any:
        """The points that have, or had, hooks; thousands of others need no cleaning up."""
        return list(self._live.values())

    def _enable_hook(self, name: Any, hook: Callable, dir: Any) -> None:
        self._touch(name, dir)
        super()._enable_hook(name, hook, dir)

    def add_hook(self, name: Any, hook: Callable, *args: Any, **kwargs: Any) -> None:
        """Add a hook that stays until `reset_hooks()`; names as in `run_with_hooks`."""
        self._touch(name, kwargs.get("dir", args[0] if args else "fwd"))
        super().add_hook(name, hook, *args, **kwargs)

    def _touch(self, name: Any, dir: str) -> None:
        chosen = self.select(name)
        self._live |= {one: self.hook_dict[one] for one in sorted(chosen)}
        if dir == "bwd" and (cut := sorted(chosen & self.cut)):
            warn(
                f"the model runs {cut[0]}{' and others' if len(cut) > 1 else ''} without gradients "
                "(torch.no_grad in its forward), so a backward hook there never fires.",
                stacklevel=4,
            )

    def get_caching_hooks(self, names_filter: Any = None, *args: Any, **kwargs: Any) -> Any:
        """TransformerLens's caching hooks, for the points a filter means."""
        if isinstance(names_filter, str):
            names_filter = [names_filter]
        return super().get_caching_hooks(names_filter, *args, **kwargs)

    def reaches(self, name: str, stop_at_layer: int) -> bool:
        """Refused: a wrapped model runs to its end."""
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
        given = self.prepare(args, kwargs)
        output, _ = self._run_live(given, {})
        if return_type in ("output", None):
            return output if return_type else None
        logits = self.logits_in(output)
        if return_type == "logits":
            return logits
        loss = self._loss(logits, given[0], given[1])
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

        Raises:
            InputError: for models that do not allow it, or where it has no effect.
        """
        return self.recipe.build(self.module, loops=loops)

    def with_layout(self, layout: str | Layout) -> "WrappedModel":
        """The layers of a plain stack grouped into virtual blocks; weights are shared, not hooks.

        Raises:
            InputError: if the model has a loop, or the depths do not add up.
        """
        return self.recipe.build(self.module, layout=layout)

    @property
    def input_device(self) -> torch.device:
        """Where token ids are looked up."""
        return input_device(self.module)

    def __repr__(self) -> str:
        n = sum(p.numel() for p in self.module.parameters())
        loops = ", ".join(f"{loop.name} × {loop.K}" for loop in self.map.loops) or "no loop"
        return (
            f"WrappedModel {self.name!r}: {self.config.architecture} {self.map}, {loops}, "
            f"d_model={self.config.d_model}, {n:,} parameters"
        )

    def _repr_html_(self) -> str:
        from loopscope.models.description import to_html
        from loopscope.models.wrapped.description import describe_wrapped, map_tree

        tree = escape("\n".join(map_tree(self.module, self.map).lines()))
        return f"{to_html(describe_wrapped(self))}<pre>{tree}</pre>"
