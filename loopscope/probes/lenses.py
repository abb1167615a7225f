"""Lenses: what the model would predict next if it read out a state now.

Logit lens: W_U · ln_f(s). Coda lens: W_U · ln_f(coda(s)), where the coda reads s in place of h(K)
(arXiv:2507.02199; the two disagree). Of every lens, against what the model predicts in the end:

* loss: −ln q(true next token), in nats;
* kl_final: KL(p_final ‖ q) = Σ p_final (ln p_final − ln q), in this direction;
* kl_next: KL(p_next ‖ q), p_next the same lens of the next state;
* entropy: −Σ q ln q;
* rank of the final and of the true token: 1 + the number of tokens with a larger logit, so that
  tied tokens share the best rank;
* top: the token with the largest logit, of tied ones the one with the lowest number.

Log-probabilities are torch's `log_softmax` in float32 (float64 for models in float64); sums over
the vocabulary are torch's pairwise sums in that type.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from loopscope.errors import InputError
from loopscope.models import Hooked, Trajectory
from loopscope.names import state_name, state_number

KINDS = ("logit", "coda")
"""The lenses that need no fitting."""

VALUES = ("loss", "kl_final", "kl_next", "entropy", "rank_final", "rank_true", "top")
"""What `lens_values` gives of each token."""

OWN = ("", "")
"""The key of the model's own prediction in what `lens_values` gives."""

MAPPED_LAST = ("tuned", "h_out")
"""What follows h(K) under the tuned lens: no map is needed, it is the model's own prediction."""

CHUNK = 2**19
"""Log-probabilities worked on at a time on a CPU, so that they stay in its cache."""

DEVICE_CHUNK = 2**25
"""The same on another device, which needs much to do at once."""

FEWEST = 64
"""Tokens of a chunk at least: a matrix product of fewer rows wastes its time."""

WHOLE_RUNS = 2**28
"""Logits held at a time where each state takes a run of the whole model."""


@dataclass(frozen=True, kw_only=True)
class LensState:
    """A lens on a state, and what is before and after it in the order of computation.

    Attributes:
        kind: `logit`, `coda` or `tuned`.
        state: `h_emb`, `h0` …, `h_out`, or a layer: `prelude.0` …, `core1.0` …, `coda.0` ….
        previous: The state before it; None for the first.
        following: The state after it; None for the last.
        final: Whether it is the model's own prediction: h_out under the logit lens, h(K) under
            the coda lens.
        beyond: Whether it takes more iterations than the model runs.
    """

    kind: str
    state: str
    previous: str | None
    following: str | None
    final: bool = False
    beyond: bool = False

    @property
    def key(self) -> tuple[str, str]:
        """Kind and state."""
        return self.kind, self.state


def lens_states(
    kinds: Sequence[str], K: int, *, more: Sequence[int] = (), layers: Sequence[str] = ()
) -> list[LensState]:
    """List the states of each lens in the order of computation, those beyond K last.

    Args:
        kinds: Any of `KINDS`, and `tuned`.
        K: Iterations of the main loop.
        more: The t > K at which the state is read too.
        layers: Layers whose output is read too, as `Hooked.layer_hooks` names them.

    Returns:
        The states; the coda lens ends at h(K), since it would run the coda twice after that.
    """
    listed: list[LensState] = []
    for kind in kinds:
        course = ["h_emb", *_of_block(layers, "prelude"), "h0"]
        for t in range(1, K + 1):
            course += [*_of_block(layers, f"core{t}"), state_name(t)]
        if kind != "coda":
            course += [*_of_block(layers, "coda"), "h_out"]
        final = state_name(K) if kind == "coda" else "h_out"
        beyond = [state_name(t) for t in more]
        for name, before, after in _neighbours(course):
            if kind == "coda" and name == final and beyond:
                after = beyond[0]
            listed.append(
                LensState(
                    kind=kind, state=name, previous=before, following=after, final=name == final
                )
            )
        for name, before, after in _neighbours(beyond):
            previous = before or state_name(K)
            listed.append(
                LensState(kind=kind, state=name, previous=previous, following=after, beyond=True)
            )
    return [lens for lens in listed if not (lens.kind == "tuned" and lens.final)]


def _of_block(layers: Sequence[str], block: str) -> list[str]:
    return [name for name in layers if name.rpartition(".")[0] == block]


def _neighbours(course: Sequence[str]) -> Iterator[tuple[str, str | None, str | None]]:
    for i, name in enumerate(course):
        after = course[i + 1] if i + 1 < len(course) else None
        yield name, course[i - 1] if i else None, after


# -- which lenses a model allows -------------------------------------------------------------------


@torch.no_grad()
def why_no_logit_lens(model: Hooked, trajectory: Trajectory) -> str:
    """Tell why a model's states cannot be unembedded by themselves; tried on h_out.

    Args:
        model: The model.
        trajectory: A trajectory of it, with logits.

    Returns:
        The reason; empty where h_out gives the model's own logits bit for bit, and others not.
    """
    h_out, logits, tokens = trajectory.h_out, trajectory.logits, trajectory.tokens
    if logits is None:
        return "the model returns no logits for each token"

    def unembed(state: Tensor) -> Tensor:
        if model.unembeds_alone(tokens):  # as many rows at once as in the model, for equal bits
            rows = next(iter(model.unembed_state(state.flatten(0, 1)[None], tokens)))
            return rows.view(*state.shape[:2], -1)
        return torch.stack(list(model.unembed_state(state, tokens)))

    try:
        again = unembed(h_out)
        if not _same(again, logits):
            return "what follows h_out gives other logits than the model does"
        if _same(unembed(_elsewhere(h_out)), logits):
            return "what gives the logits does not read h_out where it could be replaced"
    except InputError as error:
        return str(error).rstrip(".")
    except Exception as error:  # somebody else's forward pass
        return f"the model fails with another state as h_out ({type(error).__name__}: {error})"
    return ""


@torch.no_grad()
def why_no_coda_lens(model: Hooked, trajectory: Trajectory) -> str:
    """Tell why the coda cannot read another state than h(K), or why that shows nothing new.

    Args:
        model: The model.
        trajectory: A trajectory of it, with logits.

    Returns:
        The reason; empty where it can.
    """
    logits, tokens, h_K = trajectory.logits, trajectory.tokens, trajectory.h[-1]
    if logits is None or tokens is None:
        return "the model returns no logits for each token"
    if trajectory.K == 0:
        return "the model has no loop"
    if "coda" not in trajectory.blocks and _same(h_K, trajectory.h_out):
        return "no layers follow the loop, so the coda lens is the logit lens"
    try:
        deaf = _same(torch.stack(list(model.read_out_logits(_elsewhere(h_K), tokens))), logits)
    except InputError as error:
        return str(error).rstrip(".")
    except Exception as error:  # somebody else's forward pass
        return f"the model fails with another state as h(K) ({type(error).__name__}: {error})"
    return "what follows the loop does not read h(K) where it could be replaced" if deaf else ""


def _elsewhere(state: Tensor) -> Tensor:
    """A state that no model leaves: noise."""
    noise = torch.randn(state.shape, generator=torch.Generator().manual_seed(0))
    return noise.to(state)


def _same(a: Tensor, b: Tensor) -> bool:
    """Whether tensors are equal bit for bit; NaN is equal to itself."""
    return a.shape == b.shape and torch.equal(a.nan_to_num(), b.to(a.device).nan_to_num())


# -- what is read ----------------------------------------------------------------------------------


class LensReader:
    """Reads the logits of lenses out of some samples, a few tokens at a time.

    Args:
        model: The model.
        trajectory: The trajectory of these samples, with logits.
        states: Further states by name, (batch, pos, d_model): layers, and those beyond K.
        longer: The model that runs on beyond K, for the coda lens of those states.
        maps: For the tuned lens: gives what h_out is taken to be, from a state and its name.
        unembeds: Whether the model's states can be unembedded by themselves.
    """

    def __init__(
        self,
        model: Hooked,
        trajectory: Trajectory,
        states: Mapping[str, Tensor] | None = None,
        *,
        longer: Hooked | None = None,
        maps: Callable[[Tensor, str], Tensor] | None = None,
        unembeds: bool = True,
    ) -> None:
        assert trajectory.logits is not None and trajectory.tokens is not None
        self.model, self.longer, self.maps = model, longer, maps
        self.own, self.tokens = trajectory.logits, trajectory.tokens
        self.states = {**trajectory.states, **(states or {})}
        self.h_K, self.h_out = trajectory.h[-1], trajectory.h_out
        self.K = trajectory.K
        self.alone = unembeds and model.unembeds_alone(self.tokens)
        self._read: dict[tuple[str, str], Tensor] = {}

    def fits(self, lens: LensState) -> bool:
        """Whether a state has the shape of what it would stand for.

        Args:
            lens: The lens and the state.

        Returns:
            Whether it can be read; for the tuned lens, whether it has the positions of h_out.
        """
        state = self.states.get(lens.state)
        if state is None:
            return False
        if lens.kind == "tuned":
            return state.shape[:2] == self.h_out.shape[:2]
        return state.shape == (self.h_K if lens.kind == "coda" else self.h_out).shape

    def logits(self, lens: LensState, rows: slice) -> Float[Tensor, "row d_vocab"]:
        """Give the logits of some tokens.

        Args:
            lens: The lens and the state.
            rows: Which tokens, counted through the samples.

        Returns:
            (row, d_vocab); the model's own where that is what the lens is.
        """
        if lens.final:
            return self.own.flatten(0, 1)[rows]
        if not self.alone:
            return self._of_whole_run(lens).flatten(0, 1)[rows]
        read = self._before_unembedding(lens).flatten(0, 1)[None, rows]
        return next(iter(self.model.unembed_state(read, self.tokens))).to(self.own.device)

    def _before_unembedding(self, lens: LensState) -> Tensor:
        """What the final norm reads, (batch, pos, d_out)."""
        if lens.key not in self._read:
            state = self.states[lens.state]
            if lens.kind == "coda":
                state = self._coda_model(lens).read_out(state, self.tokens)
            elif lens.kind == "tuned":
                assert self.maps is not None
                state = self.maps(state, lens.state)
            self._read[lens.key] = state.to(self.h_out)
        return self._read[lens.key]

    def _of_whole_run(self, lens: LensState) -> Tensor:
        """The logits of the whole batch."""
        if lens.key not in self._read:
            state = self.states[lens.state]
            if lens.kind == "coda":
                logits = self._coda_model(lens).read_out_logits(state, self.tokens)
            else:
                logits = self.model.unembed_state(state, self.tokens)
            self._read[lens.key] = torch.stack(list(logits)).to(self.own.device)
        return self._read[lens.key]

    def _coda_model(self, lens: LensState) -> Hooked:
        t = state_number(lens.state)
        return self.longer if self.longer is not None and (t or 0) > self.K else self.model

    def chunks(self) -> Iterator[slice]:
        """Share the tokens between chunks that fit into the cache."""
        count, most = self.tokens.numel(), CHUNK if self.own.device.type == "cpu" else DEVICE_CHUNK
        size = max(FEWEST, most // self.own.shape[-1])
        for begin in range(0, count, size):
            yield slice(begin, min(begin + size, count))


def samples_at_once(model: Hooked, trajectory: Trajectory, states: int, *, unembeds: bool) -> int:
    """Tell for how many samples a reader may hold what it reads.

    Args:
        model: The model.
        trajectory: A batch, with logits.
        states: Number of lenses and states.
        unembeds: As of `LensReader`.

    Returns:
        Samples; all where the unembedding runs by itself, since then no logits are held.
    """
    logits = trajectory.logits
    assert logits is not None
    if unembeds and model.unembeds_alone(trajectory.tokens):
        return len(logits)
    return max(1, min(len(logits), WHOLE_RUNS // (states * logits[0].numel())))


# -- what is computed of it ------------------------------------------------------------------------


@dataclass(frozen=True)
class Prediction:
    """What is predicted at some tokens.

    Attributes:
        log_p: Log-probabilities, (row, d_vocab).
        p: Probabilities.
        negentropy: Σ p ln p, (row,).
        top: The likeliest token, (row,); −1 where it is not a number.
    """

    log_p: Tensor
    p: Tensor
    negentropy: Tensor
    top: Tensor


class Comparer:
    """Compares predictions over the vocabulary; its room for intermediate values is used again."""

    def __init__(self) -> None:
        self._room: Tensor | None = None
        self._kept: Tensor | None = None

    def prediction(self, logits: Float[Tensor, "row d_vocab"]) -> Prediction:
        """Give the distributions of some tokens.

        Args:
            logits: Any float dtype.

        Returns:
            The prediction, in float32 (float64 where the logits are).
        """
        x = logits if logits.dtype == torch.float64 else logits.float()
        log_p, p = x.log_softmax(-1), x.softmax(-1)
        negentropy = self.expected(p, log_p)
        top = self._top(log_p).where(~negentropy.isnan(), -1)
        return Prediction(log_p, p, negentropy, top)

    def expected(self, p: Tensor, log_q: Tensor) -> Float[Tensor, " row"]:
        """Give Σ p ln q of each row; 0 · ln 0 is 0.

        Args:
            p: Probabilities, (row, d_vocab).
            log_q: Log-probabilities.

        Returns:
            The sums.
        """
        sums = torch.mul(p, log_q, out=self._scratch(p)).sum(-1)
        if bool(sums.isnan().any()):  # 0 · −∞ where logits are masked, or a NaN, which stays
            sums = torch.where(p == 0, 0, p * log_q).sum(-1)
        return sums

    def rank(self, log_p: Tensor, token: Int[Tensor, " row"]) -> Float[Tensor, " row"]:
        """Give the rank of a token in each row: 1 + the number of likelier ones.

        Args:
            log_p: Log-probabilities, (row, d_vocab).
            token: Its number; of a negative one the rank is NaN.

        Returns:
            The ranks; NaN where a log-probability is.
        """
        own = log_p.gather(-1, token.clamp(min=0)[:, None])
        above = torch.gt(log_p, own, out=self._scratch(log_p)).mv(self._weights(log_p)[0])
        lost = own[:, 0].isnan() | (token < 0)
        return (above + 1).masked_fill(lost, torch.nan)

    def _top(self, log_p: Tensor) -> Int[Tensor, " row"]:
        """The likeliest token; by two matrix products, which a CPU does faster than `argmax`."""
        if log_p.device.type != "cpu" or log_p.shape[-1] > 2**24:
            return log_p.argmax(-1)
        at_top = torch.eq(log_p, log_p.amax(-1, keepdim=True), out=self._scratch(log_p))
        ones, numbers = self._weights(log_p)
        count, top = at_top.mv(ones), at_top.mv(numbers).long()
        if len(ties := (count != 1).nonzero()[:, 0]):  # or NaN
            top[ties] = log_p[ties].argmax(-1)
        return top

    def _scratch(self, like: Tensor) -> Tensor:
        room = self._room
        if room is None or room.shape != like.shape or room.dtype != like.dtype:
            self._room = room = torch.empty_like(like)
        return room

    def _weights(self, like: Tensor) -> Tensor:
        """Ones and the numbers of the tokens, (2, d_vocab)."""
        size, weights = like.shape[-1], self._kept
        if weights is None or weights.shape[1] != size or weights.dtype != like.dtype:
            numbers = torch.arange(size, dtype=like.dtype, device=like.device)
            self._kept = weights = torch.stack([torch.ones_like(numbers), numbers])
        return weights


@torch.no_grad()
def lens_values(
    reader: LensReader, lenses: Sequence[LensState]
) -> dict[tuple[str, str], Float[Tensor, "value batch pos"]]:
    """Compare what lenses predict with what the model predicts in the end, token by token.

    Args:
        reader: Reads the logits of a batch.
        lenses: What to read, as `lens_states` lists it.

    Returns:
        (kind, state) → `VALUES` of each token, in float64 on the CPU (of MPS in float32), and
        `OWN` → those of the model's own prediction. `kl_next` is NaN for the last state, loss and
        the rank of the true token for the last token. States that do not fit are left out.
    """
    batch, pos = reader.tokens.shape
    truth = torch.nn.functional.pad(reader.tokens[:, 1:], (0, 1), value=-1).flatten()
    truth = truth.to(reader.own.device)
    read = [lens for lens in lenses if reader.fits(lens)]
    parts: dict[tuple[str, str], list[Tensor]] = {key: [] for key in (OWN, *(r.key for r in read))}
    awaited = {(lens.kind, lens.following) for lens in read}
    comparer = Comparer()
    for rows in reader.chunks():
        final = comparer.prediction(reader.own.flatten(0, 1)[rows])
        parts[OWN].append(_compared(comparer, final, final, None, truth[rows]))
        waiting: dict[tuple[str, str], Prediction] = {}
        for lens in reversed(read):
            q = final if lens.final else comparer.prediction(reader.logits(lens, rows))
            after = (lens.kind, lens.following or "")
            following = final if after == MAPPED_LAST else waiting.pop(after, None)
            if lens.key in awaited:
                waiting[lens.key] = q
            if lens.final and following is None:
                parts[lens.key].append(parts[OWN][-1])
            else:
                parts[lens.key].append(_compared(comparer, q, final, following, truth[rows]))
    whole = {key: torch.cat(values, 1).cpu() for key, values in parts.items()}
    return {key: values.unflatten(1, (batch, pos)) for key, values in whole.items()}


def _compared(
    comparer: Comparer,
    q: Prediction,
    final: Prediction,
    following: Prediction | None,
    truth: Tensor,
) -> Float[Tensor, "value row"]:
    """`VALUES` of some tokens."""
    nothing = torch.full_like(q.negentropy, torch.nan)
    to_truth = q.log_p.gather(-1, truth.clamp(min=0)[:, None])[:, 0]
    to_next = nothing
    if following is not None:
        to_next = following.negentropy - comparer.expected(following.p, q.log_p)
    values = [
        (-to_truth).masked_fill(truth < 0, torch.nan),
        final.negentropy - comparer.expected(final.p, q.log_p),
        to_next,
        -q.negentropy,
        comparer.rank(q.log_p, final.top),
        comparer.rank(q.log_p, truth),
        q.top.to(nothing),
    ]
    wide = torch.float32 if nothing.device.type == "mps" else torch.float64
    return torch.stack([value.to(wide) for value in values])


@torch.no_grad()
def top_tokens(
    reader: LensReader, lens: LensState, sample: int, k: int
) -> tuple[Float[Tensor, "pos k"], Int[Tensor, "pos k"]]:
    """Give the likeliest next tokens at every position of a sample.

    Args:
        reader: Reads the logits of a batch.
        lens: The lens and the state.
        sample: Which sample of the batch.
        k: How many tokens; all where the vocabulary has fewer.

    Returns:
        Their probabilities and numbers, the likeliest first.
    """
    pos = reader.tokens.shape[1]
    logits = reader.logits(lens, slice(sample * pos, (sample + 1) * pos))
    x = logits if logits.dtype == torch.float64 else logits.float()
    values, tokens = x.softmax(-1).topk(min(k, x.shape[-1]), dim=-1)
    return values.cpu(), tokens.cpu()


def layer_states(model: Hooked, inputs: Any) -> dict[str, Tensor]:
    """Give the stream after every layer of every iteration of a batch.

    Args:
        model: The model; it is run once more.
        inputs: What it takes.

    Returns:
        `prelude.0` …, `core1.0` …, `coda.0` … → (batch, pos, d_model).
    """
    hooks = model.layer_hooks()
    with torch.no_grad():
        _, cache = model.run_with_cache(inputs, names_filter=list(hooks.values()))
    return {name: cache[hook] for name, hook in hooks.items() if hook in cache}


__all__ = [
    "KINDS", "MAPPED_LAST", "OWN", "VALUES", "Comparer", "LensReader", "LensState", "Prediction",
    "layer_states", "lens_states", "lens_values", "samples_at_once", "top_tokens",
    "why_no_coda_lens", "why_no_logit_lens",
]  # fmt: skip
