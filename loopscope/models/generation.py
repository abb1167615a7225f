"""Generation: a model goes on with its tokens, one at a time, with its hooks at every step."""

from dataclasses import dataclass
from numbers import Real
from typing import Any
from warnings import warn

import torch
from jaxtyping import Float, Int
from torch import Tensor

from loopscope.errors import InputError, whole_number


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen from the logits.

    Attributes:
        do_sample: Draw it; otherwise it is the likeliest.
        temperature: What the logits are divided by; None for 1.
        top_k: Only the k likeliest tokens (and those as likely as the last of them); None for all.
        top_p: Only the fewest likeliest tokens whose probabilities add up to p; None for all.
        seed: Of the draws.
    """

    do_sample: bool = False
    temperature: float | int | None = None
    top_k: int | None = None
    top_p: float | int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        options = {name: getattr(self, name) for name in ("temperature", "top_k", "top_p")}
        given = {name: value for name, value in options.items() if value is not None}
        if given and not self.do_sample:
            raise InputError(
                f"{', '.join(given)} would change nothing: without do_sample=True the likeliest "
                "token is taken. Give do_sample=True, or leave it out."
            )
        whole_number("seed", self.seed, 0)
        for name in ("temperature", "top_p"):
            if not isinstance(options[name], Real | None):
                raise InputError(f"{name} must be a number, given {options[name]!r}.")
        if self.temperature is not None and not 0 < self.temperature < float("inf"):
            raise InputError(
                f"temperature must be above 0, given {self.temperature!r}; for the likeliest token "
                "leave do_sample out."
            )
        if self.top_k is not None:
            whole_number("top_k", self.top_k, 1)
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise InputError(f"top_p must be above 0 and at most 1, given {self.top_p!r}.")

    def generator(self) -> torch.Generator:
        """A generator of its own, so that torch's global random numbers stay as they are."""
        return torch.Generator().manual_seed(self.seed)

    def probabilities(
        self, logits: Float[Tensor, "batch d_vocab"]
    ) -> Float[Tensor, "batch d_vocab"]:
        """The distribution that the next token is drawn from: p ∝ exp(logits / temperature).

        As in transformers: first top_k, then top_p of what is left.

        Args:
            logits: Those of the last position.

        Returns:
            Probabilities in float32.
        """
        scores = logits.float() / (1.0 if self.temperature is None else self.temperature)
        if self.top_k is not None and self.top_k < scores.shape[-1]:
            least = scores.topk(self.top_k, dim=-1).values[:, -1:]
            scores = scores.masked_fill(scores < least, -torch.inf)
        if self.top_p is not None and self.top_p < 1:
            ascending, order = scores.sort(dim=-1)
            out = ascending.softmax(-1).cumsum(-1) <= 1 - self.top_p
            out[:, -1] = False
            scores = scores.masked_fill(out.scatter(-1, order, out), -torch.inf)
        return scores.softmax(-1)

    def next_tokens(
        self, logits: Float[Tensor, "batch d_vocab"], generator: torch.Generator
    ) -> Int[Tensor, "batch 1"]:
        """Choose the next token of each row.

        Args:
            logits: Those of the last position.
            generator: From `generator`, for the draws.

        Returns:
            Token ids.
        """
        if not self.do_sample:
            return logits.argmax(-1, keepdim=True)
        drawn = torch.multinomial(self.probabilities(logits).cpu(), 1, generator=generator)
        return drawn.to(logits.device)


class GenerationMixin:
    """`generate` for a model that gives logits for each token.

    Attributes:
        name: What messages call it.
        config: Its `n_ctx` is the longest input it was made for; None where unknown.
    """

    name: Any
    config: Any
    _as_tokens: Any
    hook_points: Any

    @torch.no_grad()
    def generate(
        self,
        input: Any,
        max_new_tokens: int = 10,
        *,
        do_sample: bool = False,
        temperature: float | int | None = None,
        top_k: int | None = None,
        top_p: float | int | None = None,
        seed: int = 0,
        eos_token_id: int | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> Int[Tensor, "batch length"]:
        """Go on with tokens; hooks (of `hooks` and `add_hook`) act in every step's forward pass.

        Args:
            input: Token ids (batch, pos), or text.
            max_new_tokens: Tokens to add, at least 1.
            do_sample: Draw each token; otherwise the likeliest is taken.
            temperature: With `do_sample`: what the logits are divided by, above 0; 1 when not
                given.
            top_k: With `do_sample`: only the k likeliest tokens.
            top_p: With `do_sample`: only the fewest likeliest whose probabilities add up to p.
            seed: Of the draws; torch's global random numbers stay as they are.
            eos_token_id: A row that has this token is finished and filled up with it; generation
                ends when all rows are. When not given, what a `generation_config` of transformers
                says, and nothing in other models.
            use_cache: Keep keys and values, so that a step after the first runs its new position
                only, and hooks see only that. Only models with the `generate` of transformers have
                such a cache. When not given, as the model does by itself, but without one where
                first states are drawn.
            **kwargs: Further arguments of the model (or of its own `generate` in transformers).

        Returns:
            Token ids (batch, pos + new), the given ones included; new is `max_new_tokens`, less
            where all rows were finished before. `to_string` gives their text.

        Raises:
            InputError: for options that make no sense, input that is no token ids, a cache where
                there is none, or a model that gives no logits to choose a next token from.
        """
        whole_number("max_new_tokens", max_new_tokens, 1)
        if eos_token_id is not None:
            whole_number("eos_token_id", eos_token_id, 0)
        sampling = Sampling(
            do_sample=do_sample, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed
        )
        tokens, further = self._prompt(input)
        length, context = tokens.shape[1] + max_new_tokens, self.config.n_ctx
        if context is not None and length > context:
            warn(
                f"{length} tokens (given and new) are longer than n_ctx = {context} of "
                f"{self.name!r}.",
                stacklevel=3,
            )
        if any(point.bwd_hooks for point in self.hook_points()):
            warn("generation has no gradients, so backward hooks never fire in it.", stacklevel=3)
        further |= kwargs
        return self._generate(
            tokens, max_new_tokens, sampling, eos=eos_token_id, use_cache=use_cache, **further
        )

    def _prompt(self, input: Any) -> tuple[Tensor, dict[str, Any]]:
        """Token ids, and further arguments that come with them."""
        return self._as_tokens(input), {}

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
        """A forward pass over all tokens for each new one."""
        if use_cache:
            raise InputError(
                f"{self.name!r} has no `generate` of transformers, so there is no cache of keys "
                "and values to use; leave use_cache out."
            )
        generator = sampling.generator()
        finished = tokens.new_zeros(len(tokens), 1, dtype=torch.bool)
        for _ in range(new):
            logits = self._next_logits(tokens, **kwargs)
            chosen = sampling.next_tokens(logits, generator).to(tokens)
            if eos is not None:
                chosen = chosen.masked_fill(finished, eos)
                finished = finished | (chosen == eos)
            tokens = torch.cat([tokens, chosen], dim=1)
            if isinstance(mask := kwargs.get("attention_mask"), Tensor):
                kwargs["attention_mask"] = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
            if finished.all():
                break
        return tokens

    def _next_logits(self, tokens: Tensor, **kwargs: Any) -> Float[Tensor, "batch d_vocab"]:
        """The logits of the last position."""
        raise NotImplementedError  # only a model knows where its logits are


def last_logits(logits: Any, tokens: Tensor, name: Any) -> Float[Tensor, "batch d_vocab"]:
    """Take the logits of the last position.

    Args:
        logits: What a model gave: (batch, pos, d_vocab), or (batch, 1, d_vocab) of models that give
            the last alone.
        tokens: What it was given, (batch, pos).
        name: What the error calls it.

    Returns:
        Those of the last position.

    Raises:
        InputError: for anything else.
    """
    batch, pos = tokens.shape
    given = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
    if len(given) == 3 and given[:2] in ((batch, pos), (batch, 1)):
        return logits[:, -1]
    raise InputError(
        f"{name!r} gave {given} for tokens {tuple(tokens.shape)}, not logits (batch, pos, d_vocab) "
        "to choose a next token from. Hooks must return the shape that they are given."
    )
