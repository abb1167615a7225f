"""Hooks by name: points, aliases, near matches for unknown names, one HookPoint per iteration."""

from collections.abc import Callable, Hashable, Iterable, Sequence
from functools import partial
from typing import Any
from warnings import warn

from torch import Tensor, nn
from transformer_lens import HookedRootModule
from transformer_lens.hook_points import HookPoint
from transformer_lens.utilities import Slice

from loopscope.errors import InputError, unknown_name
from loopscope.models.cache import LoopCache


class Point(HookPoint):
    """A `HookPoint` that hands a copy to hooks that might write into it.

    One state has several names (h(t) is also the first layer's `hook_resid_pre`, and MeSH's buffer
    keeps h_emb), and TransformerLens's own patching tools write in place. A copy keeps such a write
    to the point it was meant for. Hooks that only read, marked `reads_only`, cost no copy.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Hand a tensor on to the hooks.

        Args:
            x: Any activation.

        Returns:
            The same tensor, or a copy where a hook might write into it.
        """
        if self.fwd_hooks and not all(
            getattr(handle.user_hook, "reads_only", False) for handle in self.fwd_hooks
        ):
            return x.clone()
        return x


NamesFilter = str | Iterable[str] | Callable[[str], bool] | None


def _store_compact(
    hook_fn: Callable, positions: Slice | None, copies: bool, tensor: Tensor, hook: HookPoint
) -> None:
    """Cache a copy where the tensor is a view that would keep a larger buffer alive, or if told."""
    if positions is not None:
        tensor = positions.apply(tensor, dim=1)
    if copies or tensor.untyped_storage().nbytes() > tensor.numel() * tensor.element_size():
        tensor = tensor.detach().clone()
    hook_fn(tensor, hook=hook)


def _reader(hook_fn: Callable, positions: Slice | None = None, copies: bool = False) -> Callable:
    """A caching hook, marked as one that writes nothing into its tensor."""
    return reading(partial(_store_compact, hook_fn, positions, copies))


def reading(hook: Callable) -> Callable:
    """Mark a hook as one that writes nothing into its tensor.

    Args:
        hook: Any function, or a `partial`.

    Returns:
        The same.
    """
    hook.reads_only = True  # type: ignore[attr-defined]  # a function takes any attribute
    return hook


class NamedHooks(HookedRootModule):
    """A `HookedRootModule` whose points may have aliases and whose names are checked.

    `loop.{t}.layer.{l}.X` is an alias of `blocks.{v}.X`: accepted wherever a name is, never a
    second point, so a filter or a patch touches each point once.

    Attributes:
        aliases: Further names of hooks → canonical ones.
    """

    aliases: dict[str, str]

    @property
    def copies(self) -> bool:
        """Whether what is cached must be copied, since the model changes it in place later."""
        return False

    def code_entries(self) -> list[tuple[nn.Module, str]]:
        """The methods through which all of the model's own code is entered."""
        return [(self, "forward")]

    def calls_on(self, inputs: Any) -> Hashable:
        """Tell how often the model loops on an input: as often on each.

        Args:
            inputs: What it takes.

        Returns:
            Equal values where it loops as often.
        """
        return ()

    def wrapped_on(self, inputs: Any) -> Any:
        """Give the model with the iterations that it runs on an input: itself.

        Args:
            inputs: What it takes.

        Returns:
            The model.
        """
        return self

    def checkpoint_hooks(self) -> list[str]:
        """Name the hooks whose tensors of one pass let `resume` begin anywhere in another: none.

        Returns:
            Canonical names.
        """
        return []

    def resume(
        self, tokens: Any, kept: Any, fwd_hooks: Sequence[tuple[str, Callable]], first: Any
    ) -> Any:
        """Run with hooks; a model that knows no better runs whole.

        Args:
            tokens: The tokens, (batch, pos).
            kept: `checkpoint_hooks` → their tensors in a pass over the same tokens.
            fwd_hooks: As in `run_with_hooks`.
            first: Hooks at which the pass may differ from the earlier one.

        Returns:
            The logits.
        """
        return self.run_with_hooks(tokens, fwd_hooks=list(fwd_hooks))

    def setup(self) -> None:
        """Name all modules; call last in `__init__`."""
        super().setup()
        self.aliases = {}

    def _alias_prefix(self, alias: str, target: str) -> None:
        """Make every HookPoint below `target` known below `alias` too."""
        for name in list(self.hook_dict):
            if name.startswith(target + "."):
                synonym = alias + name.removeprefix(target)
                self.aliases[synonym] = name
                self.mod_dict[synonym] = self.hook_dict[name]

    def canonical(self, name: str) -> str:
        """Give the canonical name of a hook.

        Args:
            name: The name or an alias.

        Returns:
            A key of `hook_dict`.

        Raises:
            UnknownNameError: if there is no such hook; near matches are listed.
        """
        name = self.aliases.get(name, name)
        if name not in self.hook_dict:
            hint = "`loopscope inspect MODEL --hooks` or model.hook_dict lists all."
            raise unknown_name("hook name", name, [*self.hook_dict, *self.aliases], hint=hint)
        return name

    def select(self, names_filter: NamesFilter) -> set[str]:
        """Give the canonical names that a filter means.

        Args:
            names_filter: None for all; a name or an alias; several of them; or a predicate, which
                is asked about the canonical names (`blocks.{v}.…`, not their aliases).

        Returns:
            Keys of `hook_dict`, at least one.

        Raises:
            UnknownNameError: if a name does not exist; near matches are listed.
            InputError: if nothing is selected.
        """
        if names_filter is None:
            return set(self.hook_dict)
        if isinstance(names_filter, str):
            return {self.canonical(names_filter)}
        if not callable(names_filter):
            chosen = {self.canonical(name) for name in names_filter}
        else:
            chosen = {name for name in self.hook_dict if names_filter(name)}
        if not chosen:
            raise InputError(
                "names_filter selects no hook, so the cache would be empty; give None for all, a "
                "name, a list of names or a predicate that is true for some canonical name (the "
                "layers of an iteration are blocks.{v}; loop.{t}.layer.{l} are aliases of them)."
            )
        return chosen

    def _enable_hook(self, name: str | Callable, hook: Callable, dir: Any) -> None:
        if getattr(self, "_compiled_call_impl", None) is not None:
            warn(
                "this model was compiled before the hook was added; torch.compile may ignore it. "
                "Add hooks to an uncompiled model.",
                stacklevel=5,
            )
        for point in sorted(self.select(name)):
            super()._enable_hook(point, hook, dir)

    def add_hook(self, name: str | Callable, hook: Callable, *args: Any, **kwargs: Any) -> None:
        """Add a hook that stays until `reset_hooks()`.

        Args:
            name: A name, an alias, or a predicate of canonical names.
            hook: A function of (tensor, hook); what it returns, if anything, replaces the tensor.
            *args: As in TransformerLens.
            **kwargs: As in TransformerLens.
        """
        for point in sorted(self.select(name)):
            super().add_hook(point, hook, *args, **kwargs)

    def get_caching_hooks(
        self, names_filter: NamesFilter = None, *args: Any, pos_slice: Any = None, **kwargs: Any
    ) -> Any:
        """Give TransformerLens's caching hooks for the points a filter means.

        Args:
            names_filter: As in `select`.
            *args: As in TransformerLens.
            pos_slice: Positions to keep; all when not given.
            **kwargs: As in TransformerLens.

        Returns:
            The cache to be filled, forward hooks and backward hooks.
        """
        chosen = self.select(names_filter)
        # TransformerLens slices the heads of rotated queries and keys; we cut their positions
        rotated = {name for name in chosen if name.endswith(("hook_rot_q", "hook_rot_k"))}
        positions = Slice.unwrap(pos_slice)
        cache, fwd, bwd = super().get_caching_hooks(
            lambda name: name in chosen - rotated, *args, pos_slice=positions, **kwargs
        )
        kwargs["cache"] = cache
        _, rotated_fwd, rotated_bwd = super().get_caching_hooks(
            lambda name: name in rotated, *args, **kwargs
        )
        readers = [(name, _reader(fn, copies=self.copies)) for name, fn in fwd]
        readers += [(name, _reader(fn, positions, self.copies)) for name, fn in rotated_fwd]
        return cache, readers, bwd + rotated_bwd

    def _check_reached(self, names: Iterable[Any], stop_at_layer: int | None) -> None:
        """Refuse hooks by name that a run stopped early would never reach.

        Raises:
            InputError: naming the first of them.
        """
        if stop_at_layer is None:
            return
        for name in names:
            if isinstance(name, str) and not self.reaches(self.canonical(name), stop_at_layer):
                raise InputError(
                    f"{name} is not reached with stop_at_layer={stop_at_layer}; stop later or "
                    "leave it out."
                )

    def reaches(self, name: str, stop_at_layer: int) -> bool:
        """Tell whether a run with this `stop_at_layer` gets to a hook.

        Args:
            name: The hook's canonical name.
            stop_at_layer: As in the model's `forward`.

        Returns:
            Whether the hook is called.
        """
        raise NotImplementedError  # only a model knows the order in which its hooks are reached

    def run_with_hooks(
        self, *model_args: Any, fwd_hooks: Any = (), bwd_hooks: Any = (), **kwargs: Any
    ) -> Any:
        """Run the model with hooks for this call; as in TransformerLens, names checked.

        Args:
            *model_args: What the model takes.
            fwd_hooks: Pairs (name or predicate, function of (tensor, hook)).
            bwd_hooks: The same for gradients.
            **kwargs: As in TransformerLens, and the model's own arguments.

        Returns:
            The model's output.

        Raises:
            UnknownNameError: if a name does not exist; near matches are listed.
            InputError: if `stop_at_layer` ends the run before a hook given by name.
        """
        names = [name for name, _ in (*fwd_hooks, *bwd_hooks)]
        self._check_reached(names, kwargs.get("stop_at_layer"))
        return super().run_with_hooks(
            *model_args, fwd_hooks=list(fwd_hooks), bwd_hooks=list(bwd_hooks), **kwargs
        )

    def run_with_cache(
        self,
        *model_args: Any,
        names_filter: NamesFilter = None,
        return_cache_object: bool = True,
        remove_batch_dim: bool = False,
        **kwargs: Any,
    ) -> tuple[Any, LoopCache | dict[str, Tensor]]:
        """Run the model and keep activations by name, every iteration's own.

        Args:
            *model_args: What the model takes: tokens (batch, pos), or text.
            names_filter: Which points; None for all, a name, names, or a predicate. Aliases
                `loop.{t}.layer.{l}.…` are accepted.
            return_cache_object: Give a TransformerLens `ActivationCache`; otherwise a plain dict.
            remove_batch_dim: Drop a batch dimension of 1.
            **kwargs: `device`, `incl_bwd`, `pos_slice`, `reset_hooks_end` as in TransformerLens,
                and the model's own arguments.

        Returns:
            The model's output and the cache.

        Raises:
            UnknownNameError: if a name does not exist; near matches are listed.
            InputError: if `stop_at_layer` ends the run before a point given by name.
        """
        named = [names_filter] if isinstance(names_filter, str) else names_filter
        if named is not None and not callable(named):
            self._check_reached(named, kwargs.get("stop_at_layer"))
        out, cache = super().run_with_cache(
            *model_args, names_filter=names_filter, remove_batch_dim=remove_batch_dim, **kwargs
        )
        if not return_cache_object:
            return out, cache
        return out, LoopCache(cache, self, has_batch_dim=not remove_batch_dim)
