"""Tuned lens: an affine map per state, fitted so that its unembedding predicts what the model does.

p_tuned(s) = softmax(W_U · ln_f(W s + b)), W and b least Σ KL(p_final ‖ p_tuned) over the tokens of
the training samples (Belrose et al., arXiv:2303.08112). The ridge map s → h_out is where Adam
starts. Samples are in two folds; each is read by maps that were fitted on the other.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from loopscope.errors import InputError
from loopscope.files import whole_file
from loopscope.models import Hooked
from loopscope.probes.ridge_maps import RidgeSums

STEPS = 300
"""Steps of Adam."""

RATE = 2e-3
"""Learning rate at the first step, in units of the ridge map's; it falls to 0 in a line."""

TOKENS = 2**14
"""Tokens that the maps of a fold are fitted on, at most."""

MEMORY = 2**30
"""Bytes that the states of these tokens may take; of more, fewer tokens are taken."""

ROWS = 512
"""Tokens of a step."""

HELD_BACK = 8
"""The last of so many parts of the training tokens chooses the step at which a map is kept."""

FORMAT = "loopscope tuned lens 1"


@dataclass(frozen=True)
class TunedMap:
    """An affine map s ↦ W s + b, from a state to where h_out would be.

    Attributes:
        weight: W, (d_in, d_out); applied from the right.
        bias: b, (d_out,).
    """

    weight: Float[Tensor, "d_in d_out"]
    bias: Float[Tensor, " d_out"]

    def __call__(self, state: Float[Tensor, "*row d_in"]) -> Float[Tensor, "*row d_out"]:
        """Bring a state to where h_out would be.

        Args:
            state: The state, any float dtype.

        Returns:
            The mapped state, in float32 (float64 where the state is).
        """
        dtype = torch.promote_types(state.dtype, torch.float32)
        weight, bias = (part.to(state.device, dtype) for part in (self.weight, self.bias))
        return state.to(dtype) @ weight + bias


@dataclass(frozen=True)
class TunedFold:
    """The maps fitted on some samples.

    Attributes:
        maps: State → its map.
        fitted_on: Hashes of those samples, and of their documents.
        losses: State → KL(p_final ‖ p_tuned), nats per token, on the tokens held back from the
            steps: of the ridge map, and of the map that was kept.
    """

    maps: Mapping[str, TunedMap]
    fitted_on: frozenset[str]
    losses: Mapping[str, tuple[float, float]]


@dataclass(frozen=True)
class TunedLens:
    """The maps of a model's states.

    Attributes:
        folds: Maps fitted on disjoint samples.
        model: What tells the model that they were fitted to.
        provenance: Where they come from, as JSON values.
    """

    folds: tuple[TunedFold, ...]
    model: str
    provenance: Mapping[str, Any]

    @property
    def states(self) -> list[str]:
        """The states that have a map in every fold."""
        first, *rest = self.folds
        return [name for name in first.maps if all(name in fold.maps for fold in rest)]

    def fold_for(self, hashes: frozenset[str]) -> TunedFold | None:
        """Choose maps that were fitted on other samples than this one.

        Args:
            hashes: Of the sample and its document, from `sample_hashes`.

        Returns:
            The first fold that knows neither; None where each knows one of them.
        """
        return next((fold for fold in self.folds if not hashes & fold.fitted_on), None)

    def save(self, path: Path) -> None:
        """Write the maps and their provenance.

        Args:
            path: The file; its folder is made.

        Raises:
            InputError: if it cannot be written.
        """
        tensors = {
            f"{number}.{state}.{part}": tensor.contiguous()
            for number, fold in enumerate(self.folds)
            for state, of_state in fold.maps.items()
            for part, tensor in (("weight", of_state.weight), ("bias", of_state.bias))
        }
        facts = {
            "model": self.model,
            "provenance": self.provenance,
            "fitted_on": [sorted(fold.fitted_on) for fold in self.folds],
            "losses": [fold.losses for fold in self.folds],
        }
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with whole_file(path) as part:
                save_file(tensors, part, {"format": FORMAT, "facts": json.dumps(facts)})
        except OSError as error:
            raise InputError(f"cannot write {path}: {error.strerror or error}.") from error

    @classmethod
    def load(cls, path: Path, model: Hooked) -> "TunedLens":
        """Read what `save` wrote.

        Args:
            path: The file.
            model: The model that is to be read.

        Returns:
            The maps.

        Raises:
            InputError: if it is no such file, or was fitted to another model.
        """
        try:
            with safe_open(path, framework="pt") as file:
                told = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no dict)
        except Exception as error:
            raise InputError(f"cannot read {path} as a tuned lens: {error}.") from error
        if told.get("format") != FORMAT:
            raise InputError(f"{path} is no tuned lens of loopscope; remove it, or name another.")
        facts = json.loads(told["facts"])
        if facts["model"] != fingerprint(model):
            raise InputError(
                f"{path} was fitted to other weights than those of {model.name!r}; remove it to "
                "fit it again, or give another folder."
            )
        maps: list[dict[str, TunedMap]] = [{} for _ in facts["fitted_on"]]
        for name, weight in tensors.items():
            number, _, rest = name.partition(".")
            state, _, part = rest.rpartition(".")
            if part == "weight":
                bias = tensors[f"{number}.{state}.bias"]
                maps[int(number)][state] = TunedMap(weight, bias)
        folds = tuple(
            TunedFold(of_fold, frozenset(known), {s: (a, b) for s, (a, b) in losses.items()})
            for of_fold, known, losses in zip(
                maps, facts["fitted_on"], facts["losses"], strict=True
            )
        )
        return cls(folds, facts["model"], facts["provenance"])


def fingerprint(model: Hooked) -> str:
    """Tell a model from others: by its configuration, and some values of each parameter.

    Args:
        model: The model.

    Returns:
        A hash.
    """
    facts = [model.K, model.config.to_dict()]
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode())
    for name, parameter in model.named_parameters():
        some = parameter.detach().flatten()[:: max(1, parameter.numel() // 64)]
        digest.update(f"{name} {tuple(parameter.shape)};".encode())
        digest.update(some.float().cpu().numpy().tobytes())
    return digest.hexdigest()


def sample_hashes(key: object, document: str | None) -> frozenset[str]:
    """Hash a sample and its document.

    Args:
        key: Something of the sample that is equal for equal ones.
        document: Its document; None where unknown.

    Returns:
        One or two hashes.
    """
    content = key if isinstance(key, bytes) else repr(key).encode()
    hashes = {f"sample {hashlib.sha256(content).hexdigest()}"}
    if document is not None:
        hashes.add(f"document {hashlib.sha256(document.encode()).hexdigest()}")
    return frozenset(hashes)


def training_tokens(width: int, states: int) -> int:
    """Tell how many tokens a fold's maps are fitted on, at most.

    Args:
        width: D.
        states: Number of states.

    Returns:
        Tokens.
    """
    return max(ROWS, min(TOKENS, MEMORY // (4 * width * (states + 1))))


def fit_maps(
    model: Hooked,
    states: Mapping[str, Float[Tensor, "row _"]],
    h_out: Float[Tensor, "row d_out"],
    tokens: Any,
    *,
    steps: int = STEPS,
) -> tuple[dict[str, TunedMap], dict[str, tuple[float, float]]]:
    """Fit the map of each state to what the model predicts from h_out.

    Args:
        model: A model whose states can be unembedded by themselves.
        states: Each state at the training tokens.
        h_out: h_out at the same tokens.
        tokens: What the model takes; a native model needs none.
        steps: Steps of Adam after the ridge map.

    Returns:
        State → its map, and the KL on tokens held back, of the ridge map and of what was kept.
        States without a ridge map (not finite) are left out.
    """
    fits = {name: _Fit.begin(state, h_out) for name, state in states.items()}
    kept = {name: fit for name, fit in fits.items() if fit is not None}
    count = len(h_out)
    fewer = max(1, count - max(1, count // HELD_BACK))
    rest, held = torch.arange(count).tensor_split([fewer])  # the last samples: others differ more
    held = held if len(held) else rest

    def divergences(
        rows: Tensor, maps: Mapping[str, Callable[[Tensor], Tensor]] | None = None
    ) -> dict[str, Tensor]:
        """KL(p_final ‖ p_tuned) of each state, mean over some tokens."""
        final = _log_p(model, h_out[rows], tokens)
        p, negentropy = final.exp(), (final.exp() * final).sum(-1)
        mean = {}
        for name, bring in (maps or {n: fit.mapped for n, fit in kept.items()}).items():
            q = _log_p(model, bring(states[name][rows]).to(h_out.dtype), tokens)
            mean[name] = (negentropy - (p * q).sum(-1)).mean()
        return mean

    def on_held(
        maps: Mapping[str, Callable[[Tensor], Tensor]] | None = None,
    ) -> dict[str, float]:
        with torch.no_grad():
            parts = [divergences(rows, maps) for rows in held.split(ROWS)]
        sizes = [len(rows) for rows in held.split(ROWS)]
        return {
            name: sum(float(d[name]) * n for d, n in zip(parts, sizes, strict=True)) / len(held)
            for name in maps or kept
        }

    began = on_held()
    best = {name: (began[name], fit.finished()) for name, fit in kept.items()}
    # on few tokens a map may be worse than none: then the tuned lens is the logit lens
    plain = {
        name: TunedMap(
            torch.eye(h_out.shape[-1], device=states[name].device),
            torch.zeros(h_out.shape[-1], device=states[name].device),
        )
        for name in kept
        if states[name].shape[-1] == h_out.shape[-1]
    }
    for name, value in (on_held(plain) if plain else {}).items():
        if value < best[name][0]:
            best[name] = value, plain[name]
    every = max(1, steps // 6)
    with torch.enable_grad():
        parameters = [part.requires_grad_() for fit in kept.values() for part in fit.parameters]
        adam = torch.optim.Adam(parameters, lr=RATE)
        for step, rows in enumerate(_batches(rest, steps), start=1):
            adam.param_groups[0]["lr"] = RATE * (1 - (step - 1) / steps)
            loss = torch.stack(list(divergences(rows).values())).sum()
            # not backward(): the model's own parameters would keep gradients
            gradients = torch.autograd.grad(loss, parameters)
            for part, gradient in zip(parameters, gradients, strict=True):
                part.grad = gradient
            adam.step()
            if step % every == 0 or step == steps:
                for name, value in on_held().items():
                    if value < best[name][0]:
                        best[name] = value, kept[name].finished()
    maps = {name: of_state for name, (_, of_state) in best.items()}
    return maps, {name: (began[name], best[name][0]) for name in kept}


@dataclass(frozen=True)
class _Fit:
    """A map on its way: the ridge map, and a correction of it in units of the states' sizes."""

    ridge: TunedMap
    mean: Tensor
    scale: float
    parameters: tuple[Tensor, Tensor]

    @classmethod
    def begin(cls, state: Tensor, h_out: Tensor) -> "_Fit | None":
        sums = RidgeSums()
        sums.add(state[None], h_out[None])
        if (solved := sums.solve()) is None:
            return None
        solved = solved.kept()
        weight, bias = solved.weight, solved.mean_K - solved.mean_h @ solved.weight
        ridge = TunedMap(weight.to(state.device), bias.to(state.device))
        mean = solved.mean_h.to(state.device)
        spread = (state.float() - mean).square().mean().sqrt().clamp(min=1e-12)
        scale = float(h_out.float().square().mean().sqrt() / spread)
        zeros = torch.zeros_like(ridge.weight), torch.zeros_like(ridge.bias)
        return cls(ridge, mean, scale, zeros)

    def mapped(self, state: Tensor) -> Tensor:
        return self.finished(detach=False)(state)

    def finished(self, *, detach: bool = True) -> TunedMap:
        turn, shift = (part.detach() if detach else part for part in self.parameters)
        weight = self.ridge.weight + self.scale * turn
        bias = self.ridge.bias + self.scale * (shift - self.mean @ turn)
        return TunedMap(weight, bias)


def _log_p(model: Hooked, read: Tensor, tokens: Any) -> Tensor:
    """Log-probabilities when the final norm reads something, (row, d_vocab)."""
    logits = next(iter(model.unembed_state(read[None], tokens)))
    return (logits if logits.dtype == torch.float64 else logits.float()).log_softmax(-1)


def _batches(rows: Tensor, steps: int) -> Iterator[Tensor]:
    """Training tokens of each step, drawn with a seed of their own."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        yield rows[torch.randint(len(rows), (min(ROWS, len(rows)),), generator=generator)]


def brought(
    lens: TunedLens, state: Float[Tensor, "batch pos _"], name: str, hashes: Sequence[frozenset]
) -> Float[Tensor, "batch pos _"]:
    """Bring a state to where h_out would be, each sample by maps that were fitted on others.

    Args:
        lens: The maps.
        state: The state, (batch, pos, d_model).
        name: Which state it is.
        hashes: Of each sample, from `sample_hashes`.

    Returns:
        (batch, pos, d_out); NaN in samples that every map was fitted on.
    """
    mapped = []
    for sample, known in zip(state, hashes, strict=True):
        fold = lens.fold_for(known)
        some = lens.folds[0].maps[name](sample) if fold is None else fold.maps[name](sample)
        mapped.append(torch.full_like(some, torch.nan) if fold is None else some)
    return torch.stack(mapped)


__all__ = [
    "STEPS", "TunedFold", "TunedLens", "TunedMap", "brought", "fingerprint", "fit_maps",
    "sample_hashes", "training_tokens",
]  # fmt: skip
