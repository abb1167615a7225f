"""`wrap`: a module in memory becomes a model whose loop is known."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, cast
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
    read_spec,
    rounds_by_batch,
    trace,
    with_mixing,
    with_producers,
)
from loopscope.models.native import Layout
from loopscope.models.wrapped.addresses import addresses
from loopscope.models.wrapped.count_search import with_needed_counts
from loopscope.models.wrapped.families import fitting, known_spec
from loopscope.models.wrapped.inputs import (
    Arguments,
    Inputs,
    checked_module,
    example_arguments,
    input_device,
    learn,
    tokenizer_for,
)
from loopscope.models.wrapped.loop_count import (
    Setting,
    as_arguments,
    attempts_for,
    counts_of,
    looping,
    refusal,
    settings_for,
    settings_of_one_run,
    with_effective,
    without_effect,
)
from loopscope.models.wrapped.run_context import (
    buffers_kept,
    controlled,
    uncompiled,
    without_checkpointing,
)
from loopscope.models.wrapped.shape import config_of, regrouped, vocabulary_of
from loopscope.models.wrapped.taps import get, schedule
from loopscope.models.wrapped.token_places import TARGETS
from loopscope.models.wrapped.wrapped_model import WrappedModel


@dataclass(frozen=True, kw_only=True)
class Causality:
    """Whether a token's logits depend on earlier tokens alone.

    Attributes:
        causal: Whether they do; None where it cannot be told.
        why_not: Why it cannot; empty where it can.
        restless: Whether a second run on the same input gave something else.
        rounds: Whether the range of later tokens moves them, by rounding.
    """

    causal: bool | None = None
    why_not: str = ""
    restless: bool = False
    rounds: bool = False


ROUNDED = 0.1
"""Part of the change of later logits that rounding may change earlier ones by."""


@torch.no_grad()
def is_causal(
    run: Callable[[Arguments], Any],
    arguments: Arguments,
    inputs: Inputs,
    result: Any,
    where: tuple[Step, ...],
    module: nn.Module,
) -> Causality:
    """Whether the first half of the logits stays when the second half of the tokens changes.

    Targets that are passed along change in all places, since logits must not depend on them.

    Args:
        run: Runs the model on arguments.
        arguments: The example's arguments.
        inputs: Where the token ids and targets stand among them.
        result: What the model returned for them.
        where: Where the logits are in it.
        module: The model, for the precision it computes in.

    Returns:
        What was seen.
    """
    if inputs.tokens is None:
        return Causality(why_not="the model was wrapped without token ids, so it predicts none")
    logits = get(result, where).detach()
    tokens = inputs.tokens_in(*arguments)
    half = tokens.shape[1] // 2
    if logits.shape[:2] != tokens.shape:
        return Causality(
            why_not="the model returns no logits for each token: on the example of "
            f"{tokens.shape[1]} tokens it returns them at {logits.shape[1]} positions"
            + (_hint(inputs) if logits.shape[1] == 1 else "")
        )
    if half == 0:
        return Causality(
            why_not="the example has one token, on which it cannot be seen whether the model "
            "predicts the next; wrap it with a longer example="
        )
    changed = inputs.with_tokens(arguments, _changed(tokens, half), _changed(tokens, 0))
    later_changed = get(run(changed), where)
    if _alike(logits[:, :half], later_changed[:, :half], module):
        return Causality(causal=True)
    if rounds_by_batch(module):
        moved = (logits - later_changed).abs().amax((0, 2))
        if moved[:half].max() <= ROUNDED * moved[half:].max():
            return Causality(causal=True, rounds=True)
    again = get(run(arguments), where)
    if not _alike(logits, again, module):
        return Causality(why_not="two runs on the same input give different logits", restless=True)
    return Causality(causal=False)


def _hint(inputs: Inputs) -> str:
    """How to ask for the logits of every token, where forward takes targets."""
    names = [name for name in TARGETS if name in inputs.keywords and name not in inputs.copies]
    if not names or inputs.tokens is None:
        return ""
    place = inputs.tokens[1]
    first = inputs.names[place] if isinstance(place, int) else place
    return (
        f"; if it gives them at all with {names[0]}, wrap it with "
        f'example={{"{first}": tokens, "{names[0]}": tokens}}'
    )


def _changed(tokens: Tensor, half: int) -> Tensor:
    """The tokens, each of the second half another one of the example's."""
    values = tokens.unique()
    if len(values) == 1:
        values = torch.cat([values, torch.where(values == 0, 1, 0)]).sort().values
    later = values[(torch.searchsorted(values, tokens[:, half:].contiguous()) + 1) % len(values)]
    return torch.cat([tokens[:, :half], later], dim=1)


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
            is returned as it is; one that is wrapped already is wrapped again where something else
            is asked for.
        example: What its forward is given: token ids (batch, pos), a tuple of positional arguments,
            or a dict of keyword arguments; what is no tensor is passed on in every later call.
            Random token ids when not given.
        spec: Corrects what finding gets wrong: a TOML file or a dict (docs/your-own-model.md).
        layout: Groups the layers of a plain stack into virtual blocks, such as `4+8+8+4`.
        loops: Number of iterations, where the model allows it; by loop name for several.
        name: Name in tables and figures; the class when not given.
        tokenizer: For text input: a `tokenizers.Tokenizer`, a tokenizer of transformers, a tiktoken
            `Encoding`, a sentencepiece processor, an object with `encode` and `decode`, or a
            function from a text to its ids. Special tokens are never added unless asked for. The
            module's attribute `tokenizer` when not given.
        provenance: Where the weights come from.

    Returns:
        The wrapped model, which capture, measure, compare and the figures take.

    Raises:
        InputError: if the model cannot be run on the example, is on the meta device, does not fit
            the specification or the layout, or its number of iterations cannot be set.
    """
    if isinstance(module, NamedHooks):
        given = {"example": example, "spec": spec, "tokenizer": tokenizer}
        return _again(module, given, name=name, layout=layout, loops=loops)
    module = checked_module(module)
    tokenizer = tokenizer_for(module, tokenizer)
    example = example_arguments(module, example, tokenizer)
    args, kwargs = with_needed_counts(module, example, loops)
    checked_spec = known_spec(module) if spec is None else _checked_spec(spec, module)
    recipe = Recipe(
        args=args,
        kwargs=kwargs,
        spec=checked_spec,
        layout=layout,
        loops=loops,
        name=name or type(module).__name__,
        tokenizer=tokenizer,
        provenance=provenance or {},
    )
    return recipe.build(module)


def _checked_spec(spec: Any, module: nn.Module) -> Spec:
    """A user's specification, read."""
    if not isinstance(spec, str | Path | Mapping):
        raise InputError(
            f"spec must be a TOML file or a dict, given {type(spec).__name__} {spec!r}."
        )
    return read_spec(spec, module)


def _again(model: Any, given: dict[str, Any], *, name: Any, layout: Any, loops: Any) -> Any:
    """A model that is wrapped already, or a native one, with what else is asked for."""
    given = {key: value for key, value in given.items() if value is not None}
    if isinstance(model, WrappedModel):
        changes: dict[str, Any] = {"layout": layout, "loops": loops, "name": name}
        if "tokenizer" in given:
            changes["tokenizer"] = tokenizer_for(model.module, given["tokenizer"])
        if "spec" in given:
            changes["spec"] = _checked_spec(given["spec"], model.module)
        if "example" in given:
            text = changes.get("tokenizer", model.tokenizer)
            example = example_arguments(model.module, given["example"], text)
            example = with_needed_counts(model.module, example, loops)
            changes["args"], changes["kwargs"] = example
        changes = {key: value for key, value in changes.items() if value is not None}
        if changes.keys() - {"name", "tokenizer"}:
            return model.recipe.build(model.module, **changes)
        model.recipe = replace(cast(Recipe, model.recipe), **changes)
    else:
        if "spec" in given:
            raise InputError("a native model takes no spec: its loop is known; leave it out.")
        model = model if loops is None else model.with_loops(loops)
        model = model if layout is None else model.with_layout(layout)
    if name is not None:
        model.name = name
    if "tokenizer" in given:
        model.tokenizer = given["tokenizer"]
    return model


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
            **changes: What shall be otherwise: `loops`, `layout`, the example (`args`, `kwargs`)
                and other fields.

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
    inputs = inputs.targeted(needed=True) or inputs
    look = _look(module, inputs, recipe.spec, ())
    inputs, look = _with_targets(module, inputs, look)
    if recipe.loops is not None:
        look = _look_with_loops(module, inputs, look, recipe.loops)
    arguments = inputs.example(as_arguments(look.settings))
    loop_map = _with_causality(module, inputs, look, arguments)
    for doubt in loop_map.doubts:
        warn(f"{type(module).__name__}: {doubt}", stacklevel=4)
    if recipe.layout is not None:
        loop_map = regrouped(loop_map, recipe.layout, recipe.name)
    loop_map = with_producers(look.trace, loop_map)
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
        logits_at=loop_map.logits,
        plan=schedule(look.trace, loop_map),
        recipe=replace(recipe, spec=look.spec),
    )


def _look(module: nn.Module, inputs: Inputs, spec: Spec, settings: tuple[Setting, ...]) -> _Look:
    """One traced forward pass and its map."""
    arguments = inputs.example(as_arguments(settings))
    with torch.enable_grad():  # tracing needs gradients
        traced = _run(module, inputs, settings, arguments, trace)
    streams = Streams(*example_shape(*arguments))
    loop_map = with_mixing(traced, fitting(traced, streams, spec))
    with looping(module, settings):
        counts = counts_of(module, loop_map, spec, arguments)
    loop_map = replace(loop_map, counts=counts)
    return _Look(trace=traced, loop_map=loop_map, settings=settings, spec=spec)


def _with_targets(module: nn.Module, inputs: Inputs, look: _Look) -> tuple[Inputs, _Look]:
    """Another look, with targets, at a model that without them gives the last token's logits only.

    Args:
        module: The model.
        inputs: How it is called.
        look: What it does without targets.

    Returns:
        How it is called, and the look with targets if then it gives logits for each token.
    """
    targeted = inputs.targeted()
    if targeted is None or not _gives_last_only(look, inputs):
        return inputs, look
    (name,) = set(targeted.copies) - set(inputs.copies)
    try:
        second = _look(module, targeted, look.spec, look.settings)
    except InputError:  # other targets than tokens
        second = look
    scores = second.loop_map
    tokens = inputs.tokens_in(inputs.args, inputs.kwargs)
    where = None if scores.why_no_logits else scores.logits
    if where is not None and get(second.trace.result, where).shape[:2] == tokens.shape:
        note = (
            f"without {name} the model gives the last token's logits only, so every call passes "
            f"its own tokens along as {name}"
        )
        scores = replace(scores, notes=(*scores.notes, note))
        return targeted, replace(second, loop_map=scores)
    why = (
        f"the model returns no logits for each token, only the last one's, and with tokens as "
        f"{name} none either; if other arguments ask for them, give all in example={{...}}"
    )
    return inputs, replace(look, loop_map=replace(look.loop_map, why_no_logits=why))


def _gives_last_only(look: _Look, inputs: Inputs) -> bool:
    """Whether a model returns scores of the vocabulary at one position, or at none."""
    tokens = inputs.tokens_in(inputs.args, inputs.kwargs)
    vocabulary = vocabulary_of(look.trace, *tokens.shape)
    shapes = [tuple(item.tensor.shape) for item in look.trace.root.outputs]
    batch, pos = tokens.shape
    if pos == 1 or any(shape[:2] == (batch, pos) and shape[-1] == vocabulary for shape in shapes):
        return False
    return any(shape in ((batch, 1, vocabulary), (batch, vocabulary)) for shape in shapes)


def _look_with_loops(module: nn.Module, inputs: Inputs, look: _Look, loops: Any) -> _Look:
    """Another look, with the number of iterations that was asked for.

    What has no effect is followed by the next that may set the number, where the user named none.

    Raises:
        InputError: if the model does not allow it, or ran otherwise.
    """
    loop_map, spec = look.loop_map, look.spec
    example = inputs.example({})
    if loop_map.main is None:
        attempts = settings_of_one_run(module, spec, example, loops)
        attempts = attempts or [settings_for(loop_map, loops)]  # which raises
    else:
        attempts = attempts_for(module, loop_map, spec, example, loops)
        if len(loop_map.loops) == 1 and attempts[0][0].value == 1:
            spec = replace(spec, core=_body(look.trace, loop_map))  # what runs once shows no loop
    failure = None
    for settings in attempts:
        second = _look(module, inputs, spec, settings)
        wrong = without_effect(loop_map, second.loop_map, settings)
        if not wrong:
            return replace(second, loop_map=with_effective(second.loop_map, settings))
        failure = failure or refusal(module, loop_map, wrong, example)
    assert failure is not None
    raise failure


def _with_causality(
    module: nn.Module,
    inputs: Inputs,
    look: _Look,
    arguments: Arguments,
) -> LoopMap:
    """The map with what further forward passes tell: whether the model looks at later tokens.

    Args:
        module: The model.
        inputs: How it is called.
        look: The traced forward pass.
        arguments: Its arguments.

    Returns:
        The map, with a doubt where two runs differ.
    """
    loop_map = look.loop_map
    if loop_map.why_no_logits or loop_map.logits is None:
        return loop_map
    run = partial(_run, module, inputs, look.settings)
    seen = is_causal(run, arguments, inputs, look.trace.result, loop_map.logits, module)
    if seen.restless:
        doubt = (
            "two runs on the same input differ: random numbers from a generator of its own, which "
            "no seed here reaches; states of two runs cannot be compared"
        )
        loop_map = replace(loop_map, doubts=(*loop_map.doubts, doubt))
    if seen.rounds:
        note = (
            "activations are rounded by the range of the whole batch (dynamic quantisation): a "
            "token's states and logits depend a little on later tokens and on the other samples"
        )
        loop_map = replace(loop_map, notes=(*loop_map.notes, note))
    return replace(loop_map, causal=seen.causal, why_no_logits=seen.why_not)


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
