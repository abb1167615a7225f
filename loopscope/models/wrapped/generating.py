"""Generating: a wrapped model goes on with tokens, by the `generate` of transformers if it can."""

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any
from warnings import warn

import torch
from jaxtyping import Float
from torch import Tensor, nn

from loopscope.errors import InputError
from loopscope.models.generation import GenerationMixin, Sampling, last_logits
from loopscope.models.hooks import NamedHooks
from loopscope.models.loops import LoopMap, seeded
from loopscope.models.wrapped.direct_calls import DirectCalls
from loopscope.models.wrapped.inputs import Arguments, Inputs
from loopscope.models.wrapped.loop_count import Setting, as_arguments, looping
from loopscope.models.wrapped.run_context import same_for_every_sample
from loopscope.models.wrapped.running import SEES_AHEAD


class Generating(GenerationMixin, NamedHooks):
    """How a wrapped model generates, and runs its original when somebody else calls that."""

    module: nn.Module
    map: LoopMap
    inputs: Inputs
    settings: tuple[Setting, ...]
    direct_calls: DirectCalls
    prepare: Callable[..., Arguments]
    logits_in: Callable[[Any], Any]
    _run_live: Callable[..., Any]
    _run_tapped: Callable[..., Any]
    _seeding: Callable[[Arguments], Any]

    def remove_all_hook_fns(self, *args: Any, **kwargs: Any) -> None:
        """Remove hooks, and from the original what they needed.

        Args:
            *args: As in TransformerLens.
            **kwargs: Likewise.
        """
        super().remove_all_hook_fns(*args, **kwargs)
        self.direct_calls.tidy()

    def direct_pass(
        self, forward: Callable[..., Any], arguments: Arguments, *, generating: bool
    ) -> Any:
        """A forward pass that somebody else has asked for, with the hooks of this model.

        Args:
            forward: The original's forward.
            arguments: What it is given; what it is not given of a number of iterations that was
                set, and in generation of the example's settings, is added.
            generating: Whether `generate` has asked for it: then random numbers are those of
                `capture`. Otherwise they are left to whoever called.

        Returns:
            What the original returns.
        """
        arguments = self._completed(*arguments, constants=generating)
        seeding = self._seeding(arguments) if generating else (None, None, None)

        def run(given: Arguments, taps: Any, **how: Any) -> Any:
            return self._run_tapped(forward, given, taps, **how)

        with (
            looping(self.module, self.settings),
            same_for_every_sample(self.module, *seeding),
        ):
            output, _ = self._run_live(arguments, {}, step=True, run=run)
        return output

    def _completed(self, args: tuple[Any, ...], kwargs: Any, *, constants: bool) -> Arguments:
        """Arguments of a direct call, and what they lack."""
        more: dict[str, Any] = {}
        if constants:
            named = dict(zip(self.inputs.names, self.inputs.args, strict=False))
            named |= self.inputs.kwargs
            more = {k: v for k, v in named.items() if isinstance(v, str | int | float)}
        more |= as_arguments(self.settings)
        by_place = self.inputs.names[: len(args)]
        return args, {**{k: v for k, v in more.items() if k not in by_place}, **kwargs}

    def _prompt(self, input: Any) -> tuple[Tensor, dict[str, Any]]:
        if not isinstance(input, Mapping):
            return super()._prompt(input)
        name = self._token_name()
        if name not in input:
            raise InputError(f"a dict to go on with needs {name}, given {', '.join(input)}.")
        return self._as_tokens(input[name]), {k: v for k, v in input.items() if k != name}

    def _token_name(self) -> str:
        """What forward calls its tokens."""
        side, place = self.inputs.tokens or ("kwargs", "input_ids")
        if side == "kwargs":
            return str(place)
        names = self.inputs.names
        return names[int(place)] if int(place) < len(names) else "input_ids"

    def _generate(
        self,
        tokens: Tensor,
        new: int,
        sampling: Sampling,
        *,
        eos: int | None,
        use_cache: bool | None,
        **kwargs: Any,
    ) -> Tensor:
        if not _has_generate(self.module):
            return super()._generate(tokens, new, sampling, eos=eos, use_cache=use_cache, **kwargs)
        module: Any = self.module
        options: dict[str, Any] = {"max_new_tokens": new, "do_sample": sampling.do_sample}
        if sampling.do_sample:  # where nothing is said, transformers would take its own
            options["temperature"] = float(sampling.temperature or 1)
            options["top_k"] = sampling.top_k or 0
            options["top_p"] = float(sampling.top_p or 1)
        if eos is not None:
            options |= {"eos_token_id": eos, "pad_token_id": eos}
        if self.map.random:
            if use_cache:
                warn(
                    f"{self.name!r} draws its first states; with a cache each step draws those of "
                    "its new position alone, so they are not what a pass over all tokens has. "
                    "Leave use_cache out for the states that capture shows.",
                    stacklevel=4,
                )
            options["use_cache"] = bool(use_cache)
        elif use_cache is not None:
            options["use_cache"] = use_cache
        if "attention_mask" in self.inputs.keywords:  # or padding would be guessed from the tokens
            options["attention_mask"] = torch.ones_like(tokens)
        with (
            looping(self.module, self.settings),
            seeded(self.module, sampling.seed) if sampling.do_sample else nullcontext(),
            self.direct_calls.in_generation(),
        ):
            try:
                output = module.generate(tokens, **{**options, **kwargs})
            except IndexError as error:
                if not self.settings or use_cache is False:
                    raise
                raise InputError(
                    f"{self.name!r} failed in generation ({error}), maybe since its cache has no "
                    "place for as many iterations as were set; give use_cache=False."
                ) from error
        return getattr(output, "sequences", output)

    def _next_logits(self, tokens: Tensor, **kwargs: Any) -> Float[Tensor, "batch d_vocab"]:
        if self.map.causal is False:
            raise InputError(f"{self.name!r} cannot go on with tokens: {SEES_AHEAD}.")
        output, _ = self._run_live(self.prepare((tokens,), kwargs), {}, step=True)
        logits = last_logits(self.logits_in(output), tokens, self.name)
        width, vocabulary = self.config.d_model, self.config.d_vocab
        if self.map.head is None and logits.shape[-1] == width != vocabulary:
            raise InputError(
                f"{self.name!r} gave a state of width {width} for each token, not logits to choose "
                "a next token from."
            )
        return logits


def _has_generate(module: nn.Module) -> bool:
    """Whether a module has the `generate` of transformers."""
    from transformers import GenerationMixin as GenerationOfTransformers

    return isinstance(module, GenerationOfTransformers)
