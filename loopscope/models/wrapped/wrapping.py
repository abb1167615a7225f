"""`wrap`: a module in memory becomes a model whose loop is known."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any
from warnings import warn

import torch
from torch import Tensor, nn

from loopscope.errors import InputError
from loopscope.models.hooks import NamedHooks
from loopscope.models.loops import (
    LoopMap,
    Spec,
    Step,
    Streams,
    Trace,
    example_shape,
    find,
    logits_of,
    read_spec,
    trace,
    with_routers,
)
from loopscope.models.native import Layout
from loopscope.models.wrapped.addresses import addresses
from loopscope.models.wrapped.families import family_spec
from loopscope.models.wrapped.inputs import (
    Arguments,
    Inputs,
    Place,
    checked_module,
    example_arguments,
    input_device,
    learn,
    plain_tokenizer,
)
from loopscope.models.wrapped.loop_count import Setting, as_arguments, counts_of, settings_for
from loopscope.models.wrapped.run_context import (
    buffers_kept,
    controlled,
    uncompiled,
    without_checkpointing,
)
from loopscope.models.wrapped.shape import config_of, regrouped
from loopscope.models.wrapped.taps import get, schedule
from loopscope.models.wrapped.wrapped_model import WrappedModel


@torch.no_grad()
def is_causal(
    run: Callable[[Arguments], Any],
    arguments: Arguments,
    place: Place | None,
    result: Any,
    where: tuple[Step, ...] | None,
    module: nn.Module,
) -> tuple[bool | None, bool]:
    """Whether the first half of the logits stays when the second half of the tokens changes.

    Args:
        run: Runs the model on arguments.
        arguments: The example's arguments.
        place: Where the token ids stand among them.
        result: What the model returned for them.
        where: Where the logits are in it.
        module: The model, for the precision it computes in.

    Returns:
        Whether it is causal (None where it gives no logits per token), and whether a second run on
        the same input gave something else.
    """
    if where is None or place is None:
        return None, False
    logits = get(result, where).detach()
    args, kwargs = arguments
    tokens = args[int(place[1])] if place[0] == "args" else kwargs[str(place[1])]
    half = tokens.shape[1] // 2
    if logits.shape[:2] != tokens.shape or half == 0:
        return None, False
    later_changed = get(run(_with(arguments, place, _changed(tokens, half))), where)
    if _alike(logits[:, :half], later_changed[:, :half], module):
        return True, False
    again = get(run(arguments), where)
    if not _alike(logits, again, module):
        return None, True
    return False, False


def _changed(tokens: Tensor, half: int) -> Tensor:
    """The tokens, each of the second half another one of the example's."""
    values = tokens.unique()
    if len(values) == 1:
        values = torch.cat([values, torch.where(values == 0, 1, 0)]).sort().values
    later = values[(torch.searchsorted(values, tokens[:, half:].contiguous()) + 1) % len(values)]
    return torch.cat([tokens[:, :half], later], dim=1)


def _with(arguments: Arguments, place: Place, tokens: Tensor) -> Arguments:
    args, kwargs = arguments
    side, where = place
    if side == "args":
        return tuple(tokens if i == where else v for i, v in enumerate(args)), kwargs
    return args, {**kwargs, str(where): tokens}


def _alike(a: Tensor, b: Tensor, module: nn.Module) -> bool:
    """Whether two results are equal but for the order of sums."""
    if a.shape != b.shape:
        return False
    kinds = {a.dtype, *(p.dtype for p in module.parameters() if p.is_floating_point())}
    if torch.is_autocast_enabled(a.device.type):
        kinds.add(torch.get_autocast_dtype(a.device.type))
    eps = max(torch.finfo(kind).eps for kind in kinds)
    part = 1e-5 if eps < 1e-4 else 4 * eps
    moved = (a.double() - b.double()).abs().max()
    return bool(moved <= part * a.double().abs().max())


def wrap(
    module: Any,
    example: Any = None,
    *,
    spec: Any = None,
    layout: str | Layout | None = None,
    loops: Any = None,
    name: str | None = None,
    tokenizer: Any = None,
    provenance: dict[str, Any] | None = None,
) -> Any:
    """Find the loop of any model and give every iteration a name.

    The model runs twice on the example: once traced, once to see whether it is causal (a model that
    is not runs once more, to tell that from randomness of its own).

    Args:
        module: A torch module: a Hugging Face model, a TransformerBridge, one's own. A native model
            is returned as it is.
        example: What its forward is given: token ids (batch, pos), a tuple of positional arguments,
            or a dict of keyword arguments; what is no tensor is passed on in every later call.
            Random token ids when not given.
        spec: Corrects what finding gets wrong: a TOML file or a dict (docs/your-own-model.md).
        layout: Groups the layers of a plain stack into virtual blocks, such as `4+8+8+4`.
        loops: Number of iterations, where the model allows it; by loop name for several.
        name: Name in tables and figures; the class when not given.
        tokenizer: A `tokenizers.Tokenizer` or a fast tokenizer of transformers, for text input.
        provenance: Where the weights come from.

    Returns:
        The wrapped model, which capture, measure, compare and the figures take.

    Raises:
        InputError: if the model cannot be run on the example, is on the meta device, does not fit
            the specification or the layout, or its number of iterations cannot be set.
    """
    if isinstance(module, NamedHooks):
        if loops is not None:
            module = module.with_loops(loops)
        return module if layout is None else module.with_layout(layout)
    module = checked_module(module)
    args, kwargs = example_arguments(module, example, tokenizer)
    if not (spec is None or isinstance(spec, str | Path | Mapping)):
        raise InputError(
            f"spec must be a TOML file or a dict, given {type(spec).__name__} {spec!r}."
        )
    if spec is None:
        checked_spec = read_spec(family_spec(module), module, source="family")
    else:
        checked_spec = read_spec(spec, module)
    recipe = Recipe(
        args=args,
        kwargs=kwargs,
        spec=checked_spec,
        layout=layout,
        loops=loops,
        name=name or type(module).__name__,
        tokenizer=plain_tokenizer(tokenizer or getattr(module, "tokenizer", None)),
        provenance=provenance or {},
    )
    return recipe.build(module)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What a model was wrapped with, to wrap it again with other iterations or another layout."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    spec: Spec
    layout: str | Layout | None
    loops: Any
    name: str
    tokenizer: Any
    provenance: dict[str, Any] = field(default_factory=dict)

    def build(self, module: nn.Module, **changes: Any) -> WrappedModel:
        """Wrap a module.

        Args:
            module: The module, or a copy of it.
            **changes: What shall be otherwise: `loops`, `layout`, the example (`args`, `kwargs`).

        Returns:
            The wrapped model.

        Raises:
            InputError: as `wrap`.
        """
        recipe = replace(self, **changes) if changes else self
        device = input_device(module)
        inputs = learn(
            module,
            tuple(_placed(value, device) for value in recipe.args),
            {key: _placed(value, device) for key, value in recipe.kwargs.items()},
        )
        with buffers_kept(module):
            return _wrap_once(module, inputs, recipe)


def _placed(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value


@dataclass(frozen=True, kw_only=True)
class _Look:
    """A traced forward pass of the example, and what it shows.

    Attributes:
        trace: The pass.
        loop_map: Its map.
        settings: Numbers of iterations that were set for it.
        spec: The specification that the map follows.
    """

    trace: Trace
    loop_map: LoopMap
    settings: tuple[Setting, ...]
    spec: Spec


def _wrap_once(module: nn.Module, inputs: Inputs, recipe: Recipe) -> WrappedModel:
    look = _look(module, inputs, recipe.spec, ())
    if recipe.loops is not None:
        look = _look_with_loops(module, inputs, look, recipe.loops)
    logits = logits_of(look.trace)
    where = None if logits is None else logits.where
    arguments = inputs.example(as_arguments(look.settings))
    loop_map = _with_causality(module, inputs, look, arguments, where)
    for doubt in loop_map.doubts:
        warn(f"{type(module).__name__}: {doubt}", stacklevel=4)
    if recipe.layout is not None:
        loop_map = regrouped(loop_map, recipe.layout, recipe.name)
    batch, pos = example_shape(*arguments)
    return WrappedModel(
        module,
        loop_map,
        addresses(look.trace, Streams(batch, pos), loop_map),
        inputs,
        config=config_of(module, loop_map, look.trace, batch, pos),
        name=recipe.name,
        tokenizer=recipe.tokenizer,
        provenance=recipe.provenance,
        settings=look.settings,
        logits_at=where,
        plan=schedule(look.trace, loop_map),
        recipe=replace(recipe, spec=look.spec),
    )


def _look(module: nn.Module, inputs: Inputs, spec: Spec, settings: tuple[Setting, ...]) -> _Look:
    """One traced forward pass and its map."""
    arguments = inputs.example(as_arguments(settings))
    with torch.enable_grad():  # tracing needs gradients
        traced = _run(module, inputs, settings, arguments, trace)
    streams = Streams(*example_shape(*arguments))
    loop_map = find(traced, streams, spec)
    loop_map = replace(loop_map, counts=counts_of(module, loop_map, spec))
    loop_map = with_routers(traced, streams, loop_map, spec)
    return _Look(trace=traced, loop_map=loop_map, settings=settings, spec=spec)


def _look_with_loops(module: nn.Module, inputs: Inputs, look: _Look, loops: Any) -> _Look:
    """Another look, with the number of iterations that was asked for.

    Raises:
        InputError: if the model does not allow it, or ran otherwise.
    """
    loop_map, spec = look.loop_map, look.spec
    settings = settings_for(loop_map, loops)
    if loop_map.K and len(loop_map.loops) == 1 and settings[0].value == 1:
        spec = replace(spec, core=_body(look.trace, loop_map))  # what runs once shows no loop
    second = _look(module, inputs, spec, settings)
    _check_effect(second.loop_map, settings)
    return second


def _with_causality(
    module: nn.Module,
    inputs: Inputs,
    look: _Look,
    arguments: Arguments,
    where: tuple[Step, ...] | None,
) -> LoopMap:
    """The map with what further forward passes tell: whether the model looks at later tokens.

    Args:
        module: The model.
        inputs: How it is called.
        look: The traced forward pass.
        arguments: Its arguments.
        where: Where the logits are in what it returned.

    Returns:
        The map, with a doubt where two runs differ.
    """
    loop_map = look.loop_map
    if loop_map.head is None:
        return loop_map
    run = partial(_run, module, inputs, look.settings)
    causal, restless = is_causal(run, arguments, inputs.tokens, look.trace.result, where, module)
    if restless:
        doubt = (
            "two runs on the same input differ: random numbers from a generator of its own, which "
            "no seed here reaches; states of two runs cannot be compared"
        )
        loop_map = replace(loop_map, doubts=(*loop_map.doubts, doubt))
    return replace(loop_map, causal=causal)


def _body(traced: Trace, loop_map: LoopMap) -> tuple[str, ...]:
    """The modules that the first iteration calls by itself."""
    a, b = loop_map.loops[0].iterations[0].span
    inside = [call for call in traced.calls if a <= call.index < b]
    outermost = [c for c in inside if c.parent is None or not a <= c.parent.index < b]
    return tuple(dict.fromkeys(call.module for call in outermost))


def _run(
    module: nn.Module,
    inputs: Inputs,
    settings: tuple[Setting, ...],
    arguments: Arguments,
    call: Any = None,
) -> Any:
    """A forward pass as the wrapped model's later ones, or what is called instead of it."""
    args, kwargs = arguments
    with (
        controlled(module, inputs, settings, 0, *example_shape(args, kwargs)),
        uncompiled(),
        without_checkpointing(module),
    ):
        return module(*args, **kwargs) if call is None else call(module, args, kwargs)


def _check_effect(loop_map: LoopMap, settings: tuple[Setting, ...]) -> None:
    """Raise if a number of iterations that was set is not what came out."""
    for setting in settings:
        count = setting.count
        loop = next((loop for loop in loop_map.loops if loop.name == count.loop), None)
        runs = 1
        if loop is not None and loop.parent is not None:
            runs = loop_map.loop(loop.parent).K
        iterations = (loop.K if loop else 1) / runs
        if iterations != setting.value and not (loop is None and setting.value == 1):
            raise InputError(
                f"{count.kind} {count.name} was set to {setting.value}, and {count.loop} "
                f"ran {iterations:g} times; it does not set the number of iterations. Name what "
                "does in a spec: [loops] argument = ..., attribute = ... or config = ..."
            )
