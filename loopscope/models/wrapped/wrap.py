"""`wrap`: a module in memory becomes a model whose loop is known."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any
from warnings import warn

import torch
from torch import Tensor, nn

from loopscope.errors import InputError
from loopscope.models.layout import Layout
from loopscope.models.model import LoopModel
from loopscope.models.wrapped.config import config_of, regrouped
from loopscope.models.wrapped.families import family_spec
from loopscope.models.wrapped.inputs import Inputs, is_tokens, learn
from loopscope.models.wrapped.loopcount import Setting, known_counts, looping, settings
from loopscope.models.wrapped.model import WrappedModel
from loopscope.models.wrapped.noise import same_for_every_sample
from loopscope.models.wrapped.points import addresses
from loopscope.models.wrapped.runner import get
from loopscope.probes.loops.finding import find
from loopscope.probes.loops.identity import Streams, example_shape
from loopscope.probes.loops.loopmap import LoopMap
from loopscope.probes.loops.ports import logits_of
from loopscope.probes.loops.routers import with_routers
from loopscope.probes.loops.spec import Spec, read_spec
from loopscope.probes.loops.trace import Trace, trace

SpecLike = str | Path | Mapping[str, Any] | None


def wrap(
    module: Any,
    example: Any = None,
    *,
    spec: SpecLike = None,
    layout: str | Layout | None = None,
    loops: int | Mapping[str, int] | None = None,
    name: str | None = None,
    tokenizer: Any = None,
    provenance: dict[str, Any] | None = None,
) -> Any:
    """Find the loop of any model and give every iteration a name.

    The model runs twice on the example: once traced, once to see whether it is causal.

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
    if isinstance(module, LoopModel | WrappedModel):
        if loops is not None:
            module = module.with_loops(loops)
        return module if layout is None else module.with_layout(layout)
    module = _module(module)
    args, kwargs = _example(module, example, tokenizer)
    given = read_spec(spec, module)
    if spec is None:
        given = read_spec(family_spec(module), module, source="family")

    def again(
        *, loops: int | Mapping[str, int] | None = None, layout: str | Layout | None = layout
    ) -> WrappedModel:
        return _wrap(
            module, args, kwargs, given, layout, loops,
            name=name, tokenizer=tokenizer, provenance=provenance,
        )  # fmt: skip

    return again(loops=loops)


def _wrap(
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    spec: Spec,
    layout: str | Layout | None,
    loops: int | Mapping[str, int] | None,
    **told: Any,
) -> WrappedModel:
    inputs = learn(module, args, kwargs)
    chosen: tuple[Setting, ...] = ()
    traced, found = _look(module, inputs, args, kwargs, spec, chosen)
    if loops is not None:
        chosen = settings(found, loops)
        if found.K and len(found.loops) == 1 and chosen[0].value == 1:
            spec = replace(spec, core=_body(traced, found))  # what runs once shows no loop
        traced, found = _look(module, inputs, args, kwargs, spec, chosen)
        _check_effect(found, chosen)
    logits = logits_of(traced)
    where = None if logits is None else logits.where
    for doubt in found.doubts:
        warn(f"{type(module).__name__}: {doubt}", stacklevel=4)
    batch, pos = example_shape(args, kwargs)
    names = addresses(traced, Streams(batch, pos), found)
    name = told.pop("name") or type(module).__name__
    found = replace(
        found, causal=_causal(module, inputs, args, kwargs, traced, where, found, chosen)
    )
    if layout is not None:
        found = regrouped(found, layout, name)
        names = addresses(traced, Streams(batch, pos), found)
    told["tokenizer"] = _tokenizer(told.pop("tokenizer") or getattr(module, "tokenizer", None))

    def again(
        *,
        loops: int | Mapping[str, int] | None = loops,
        layout: str | Layout | None = layout,
    ) -> WrappedModel:
        return _wrap(module, args, kwargs, spec, layout, loops, name=name, **told)

    return WrappedModel(
        module,
        found,
        names,
        inputs,
        config=config_of(module, found, traced, batch, pos),
        name=name,
        settings=chosen,
        logits_at=where,
        again=again,
        **told,
    )


def _body(traced: Trace, found: LoopMap) -> tuple[str, ...]:
    """The modules that the first iteration calls by itself."""
    a, b = found.loops[0].iterations[0].span
    inside = [call for call in traced.calls if a <= call.index < b]
    outermost = [c for c in inside if c.parent is None or not a <= c.parent.index < b]
    return tuple(dict.fromkeys(call.module for call in outermost))


def _look(
    module: nn.Module,
    inputs: Inputs,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    spec: Spec,
    chosen: tuple[Setting, ...],
) -> tuple[Trace, LoopMap]:
    """One traced forward pass and its map."""
    with (
        looping(module, chosen) as more,
        same_for_every_sample(module, 0),
        inputs.running(module),
    ):
        full_args, full_kwargs = inputs.complete(args, {**more, **kwargs})
        traced = trace(module, full_args, full_kwargs)
    streams = Streams(*example_shape(args, kwargs))
    found = find(traced, streams, spec)
    found = replace(found, counts=known_counts(module, found, spec))
    return traced, with_routers(traced, streams, found, spec)


def _module(module: Any) -> nn.Module:
    """The module itself, checked."""
    if not isinstance(module, nn.Module):
        raise InputError(
            f"wrap takes a torch module, given {type(module).__name__}; ls.load opens names, "
            "folders and files."
        )
    original = getattr(module, "_orig_mod", None)
    if isinstance(original, nn.Module):
        warn(
            "this model was compiled; hooks in compiled code are ignored, so the original is "
            "wrapped and runs uncompiled.",
            stacklevel=3,
        )
        module = original
    meta = [n for n, p in module.named_parameters() if p.device.type == "meta"]
    placed = any(hasattr(m, "_hf_hook") for m in module.modules())
    if meta and not placed:
        raise InputError(
            f"{len(meta)} parameters have no values (they are on the meta device), such as "
            f"{meta[0]}; load the weights first."
        )
    return module


def _example(
    module: nn.Module, example: Any, tokenizer: Any
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The example as arguments of forward."""
    if example is None:
        tables = [m for m in module.modules() if isinstance(m, nn.Embedding)]
        get_table = getattr(module, "get_input_embeddings", None)
        try:
            table = get_table() if get_table is not None else None
        except (NotImplementedError, AttributeError):
            table = None
        rows = getattr(table, "num_embeddings", None) or min(
            (t.num_embeddings for t in tables), default=0
        )
        if not rows:
            raise InputError(
                "the model has no embedding table, so no example can be made up; give example=: "
                "what its forward takes (a tensor, a tuple, or a dict of arguments)."
            )
        drawn = torch.randint(rows, (2, 8), generator=torch.Generator().manual_seed(0))
        example = drawn.to(Inputs(tokens=None).device(module))
    if isinstance(example, str):
        read = _tokenizer(tokenizer or getattr(module, "tokenizer", None))
        if read is None:
            raise InputError("the example is text, and there is no tokenizer; give token ids.")
        example = torch.tensor([read.encode(example, add_special_tokens=False).ids])
    if isinstance(example, Mapping):
        return (), dict(example)
    if isinstance(example, tuple | list):
        return tuple(example), {}
    if not isinstance(example, Tensor):
        raise InputError(
            "example must be a tensor, a tuple of positional arguments or a dict of keyword "
            f"arguments, given {type(example).__name__}."
        )
    if is_tokens(example):  # two samples: one cannot be told from what is made for all
        example = example[:2] if len(example) > 1 else example.repeat(2, 1)
    return (example,), {}


def _tokenizer(tokenizer: Any) -> Any:
    """A `tokenizers.Tokenizer`, from itself or from a fast tokenizer of transformers."""
    return getattr(tokenizer, "backend_tokenizer", tokenizer)


def _check_effect(found: LoopMap, chosen: tuple[Setting, ...]) -> None:
    """Raise if a number of iterations that was set is not what came out."""
    for one in chosen:
        loop = next((loop for loop in found.loops if loop.name == one.count.loop), None)
        runs = 1
        if loop is not None and loop.parent is not None:
            runs = found.loop(loop.parent).K
        got = (loop.K if loop else 1) / runs
        if got != one.value and not (loop is None and one.value == 1):
            raise InputError(
                f"{one.count.kind} {one.count.name} was set to {one.value}, and {one.count.loop} "
                f"ran {got:g} times; it does not set the number of iterations. Name what does in a "
                "spec: [loops] argument = ..., attribute = ... or config = ..."
            )


@torch.no_grad()
def _causal(
    module: nn.Module,
    inputs: Inputs,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    traced: Trace,
    where: tuple[Any, ...] | None,
    found: LoopMap,
    chosen: tuple[Setting, ...],
) -> bool | None:
    """Whether earlier logits stay as they are when the last token changes."""
    if where is None or inputs.tokens is None or found.head is None:
        return None
    logits = get(traced.result, where)
    side, place = inputs.tokens
    tokens = (args if side == "args" else kwargs)[place]  # type: ignore[index]
    if logits.shape[:2] != tokens.shape or tokens.shape[1] < 2:
        return None
    changed = tokens.clone()
    changed[:, -1] = tokens[:, -2] if not torch.equal(tokens[:, -1], tokens[:, -2]) else 0
    if side == "args":
        args = tuple(changed if i == place else value for i, value in enumerate(args))
    else:
        kwargs = {**kwargs, str(place): changed}
    with (
        looping(module, chosen) as more,
        same_for_every_sample(module, 0),
        inputs.running(module),
    ):
        full_args, full_kwargs = inputs.complete(args, {**more, **kwargs})
        other = get(module(*full_args, **full_kwargs), where)
    moved = (other - logits.detach())[:, :-1].abs().max()
    return bool(moved <= 1e-3 * logits.detach().abs().max())
