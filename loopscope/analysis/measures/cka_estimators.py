"""Centred kernel alignment between all states of a sample (MeSH Figures 1b and 4).

One pass gives the biased and the debiased estimator of all pairs: the kernel matrices K_a are never
centred, only their products P_ab = Σ_ij K_a,ij·K_b,ij, row sums and totals are.
"""

from collections.abc import Sequence
from itertools import combinations_with_replacement, product
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Float64
from torch import Tensor

from loopscope.analysis.flags import Flag, Flagged
from loopscope.analysis.measures.filling import LoopRows, LoopStates, Setup
from loopscope.analysis.tables import Rows
from loopscope.errors import InputError, unknown_name
from loopscope.models import Trajectory
from loopscope.names import MIN_TOKENS

KERNELS = ("rbf", "linear")
ESTIMATORS = ("biased", "debiased")

# A state's spread below this share of its size is rounding: the state is constant.
_CONSTANT = 2.0**-22
# Float32 distances are good to about 1e-7 of the squared norms. Where the median distance is below
# this share of the median squared norm, they are computed again in float64 …
_CROWDED = 1e-2
# … in which smaller ones are the rounding of zero (repeated tokens).
_SAME = 2.0**-44


class PairwiseCKA(NamedTuple):
    """CKA of all pairs of states, (state, state) each, by both estimators.

    Attributes:
        biased: By HSIC_0.
        debiased: By HSIC_1.
    """

    biased: Flagged
    debiased: Flagged


def cka(
    states: Float[Tensor, "state pos d_model"] | Sequence[Float[Tensor, "pos _"]],
    *,
    kernels: Sequence[str] = ("rbf",),
    bandwidth: float = 1.0,
    grams: Sequence[Float64[Tensor, "pos pos"]] | None = None,
) -> dict[str, PairwiseCKA]:
    """Measure the CKA of all pairs of states of one sample; the tokens are the examples.

    `CKA = HSIC(K, L) / sqrt(HSIC(K, K)·HSIC(L, L))` (Kornblith et al. 2019), biased with HSIC_0 and
    debiased with HSIC_1 (Song et al. 2007). RBF kernel exp(−d² / (2·t²·median(d²))), the median
    over all n² squared distances, zero diagonal included; linear kernel X Xᵀ of the centred state.
    MeSH names the RBF kernel only; estimator, bandwidth and centring are our choices.

    Args:
        states: The states, (pos, d_model) each, of the same tokens; widths may differ. Float64 is
            kept, every other dtype is computed in float32.
        kernels: Any of `KERNELS`.
        bandwidth: t, the RBF bandwidth as a fraction of sqrt(median(d²)).
        grams: X Xᵀ of each state in float64, centred or not, if they are at hand (from
            `gram_matrices.gram`, where there are fewer tokens than dimensions).

    Returns:
        For each kernel the values and flags of all pairs. NaN with `ZERO` where a state is
        constant, with `NONFINITE` where it is not finite, with `NONPOSITIVE_HSIC` where its own
        HSIC_1 is not positive; sound but flagged `ZERO_MEDIAN` where more than half of a state's
        squared distances are 0 and the median of the others was taken.

    Raises:
        UnknownNameError: for a kernel that does not exist, with near matches.
        InputError: on fewer than 4 tokens, or a bandwidth that is not positive.
    """
    check(states[0].shape[0], kernels, bandwidth)
    with torch.autocast(states[0].device.type, enabled=False):  # it would round the products
        return _cka(list(states), kernels, bandwidth, grams)


def _cka(
    states: list[Tensor],
    kernels: Sequence[str],
    bandwidth: float,
    grams: Sequence[Tensor] | None,
) -> dict[str, PairwiseCKA]:
    matrices, norms, flags = _centred_grams(states, grams)
    results: dict[str, PairwiseCKA] = {}
    if "linear" in kernels:  # first, as the other one overwrites the Gram matrices
        results["linear"] = _align(matrices, norms, flags)
    if "rbf" in kernels:
        diagonal = torch.ones_like(norms, dtype=torch.float64)
        for s, state in enumerate(states):
            if flags[s] == Flag.NONE:
                gram = None if grams is None else grams[s]
                flags[s] = _rbf(matrices[s], norms[s], bandwidth, state, gram)
                diagonal[s] -= 2 * _level(matrices[s])
        results["rbf"] = _align(matrices, diagonal, flags)
    return {kernel: results[kernel] for kernel in kernels}


def check(tokens: int, kernels: Sequence[str], bandwidth: float) -> int:
    """Refuse what CKA is not defined for.

    Args:
        tokens: Tokens of a sample.
        kernels: As of `cka`.
        bandwidth: As of `cka`.

    Returns:
        The number of tokens.

    Raises:
        UnknownNameError: for a kernel that does not exist, with near matches.
        InputError: on fewer than 4 tokens, or a bandwidth that is not positive.
    """
    for kernel in kernels:
        if kernel not in KERNELS:
            raise unknown_name("kernel", kernel, KERNELS)
    if not (np.isfinite(bandwidth) and bandwidth > 0):
        raise InputError(f"bandwidth is {bandwidth}; it must be a positive number (default 1).")
    if tokens < MIN_TOKENS:
        raise InputError(
            f"CKA needs at least {MIN_TOKENS} tokens per sample, got {tokens}; give longer samples."
        )
    return tokens


def _centred_grams(
    states: list[Tensor], grams: Sequence[Tensor] | None
) -> tuple[Tensor, Tensor, np.ndarray]:
    """Centred Gram matrices (state, pos, pos), their diagonals (state, pos), and flags (state,)."""
    n = states[0].shape[0]
    exact = any(state.dtype == torch.float64 for state in states)
    dtype = torch.float64 if exact else torch.float32
    device = states[0].device
    matrices = torch.empty(len(states), n, n, dtype=dtype, device=device)
    flags = np.full(len(states), int(Flag.NONE), dtype=np.int8)
    norms = torch.empty(len(states), n, dtype=dtype, device=device)
    for s, state in enumerate(states):
        if grams is not None:
            flags[s] = _centre_gram(grams[s], matrices[s])
        else:
            flags[s] = _centred_gram(state.to(dtype), matrices[s])
        norms[s] = matrices[s].diagonal()
    return matrices, norms, flags


def _centred_gram(x: Tensor, out: Tensor) -> Flag:
    """Gram matrix of a state moved to its bulk, of mean squared norm about 1; 0 where it has none.

    Both kernels are the same wherever the origin is; float32 is best off with it among the tokens,
    outliers aside: a single one of large norm (an attention sink) carries the mean away.
    """
    size = float(torch.linalg.vector_norm(x))
    x = x - x.mean(0)
    spread = float(torch.linalg.vector_norm(x))
    flag = _flag_of_spread(size, spread)
    if flag != Flag.NONE:
        out.zero_()
        return flag
    x.mul_(len(x) ** 0.5 / spread)
    x.sub_(_bulk(torch.linalg.vecdot(x, x)) @ x)
    torch.mm(x, x.mT, out=out)
    return flag


def _centre_gram(gram: Tensor, out: Tensor) -> Flag:
    """The same from the float64 Gram matrix of the state as it is."""
    means = gram.mean(1)
    squares = gram.diagonal() - 2 * means + means.mean()
    size, spread = float(gram.diagonal().sum()), float(squares.sum())
    flag = _flag_of_spread(max(size, 0) ** 0.5, max(spread, 0) ** 0.5)
    if flag != Flag.NONE:
        out.zero_()
        return flag
    weights = _bulk(squares)
    a = gram @ weights
    a -= (weights @ a) / 2
    out.copy_((gram - a[:, None]).sub_(a).mul_(len(gram) / spread))
    return flag


def _flag_of_spread(size: float, spread: float) -> Flag:
    """`NONFINITE`, `ZERO` for a state that is constant up to rounding, `NONE` where all is well."""
    if not np.isfinite(size + spread):
        return Flag.NONFINITE
    return Flag.ZERO if spread <= _CONSTANT * size else Flag.NONE


def _bulk(squares: Tensor) -> Tensor:
    """Weights of a mean that outliers do not move, from squared distances to the plain mean."""
    weights = 1 / (squares + squares.median() + 1e-12 * squares.max())
    return weights / weights.sum()


def _rbf(
    matrix: Tensor, norms: Tensor, bandwidth: float, state: Tensor, gram: Tensor | None
) -> Flag:
    """Turn a state's centred Gram matrix into its RBF kernel matrix, in place."""
    distances = _squared_distances(matrix, norms)
    median = _median(distances.view(-1))
    flag = Flag.NONE
    if matrix.dtype == torch.float64 or median < _CROWDED * float(norms.median()):
        exact = _exact_distances(state, gram)
        median = _median(exact.view(-1))
        if median == 0:
            flag = Flag.ZERO_MEDIAN
            median = _median(exact[exact > 0])
        distances.copy_(exact.div_(median))
        median = 1.0
    distances.mul_(-0.5 / (bandwidth**2 * median)).exp_()
    return flag


def _exact_distances(state: Tensor, gram: Tensor | None) -> Tensor:
    """Squared distances in float64, exactly 0 between equal tokens."""
    if gram is None:
        x = state.to(torch.float64)
        x = x - x.mean(0)
        gram = x @ x.mT
    norms = gram.diagonal().clone()
    exact = _squared_distances(gram.clone(), norms)
    exact[exact <= _SAME * (norms[:, None] + norms)] = 0
    return exact


def _squared_distances(gram: Tensor, norms: Tensor) -> Tensor:
    """n_i + n_j − 2 G_ij, at least 0, exactly 0 on the diagonal; overwrites the Gram matrix."""
    return gram.mul_(-2).add_(norms[:, None]).add_(norms).clamp_(min=0).fill_diagonal_(0)


def _level(kernel: Tensor) -> Tensor:
    """Subtract a_i + a_j, which changes neither estimator, so that rows sum to about 0, in place.

    What is left is of the size of the differences that count; without this step float32 sums cost
    two digits, and two more where one token is far from all others. Returns a, (token,).
    """
    a = kernel.mean(1)
    a -= a.mean() / 2
    kernel.sub_(a[:, None]).sub_(a)
    return a


def _median(values: Tensor) -> float:
    """The median as numpy defines it: the mean of the middle two of an even number."""
    middle = len(values) // 2
    if values.is_cuda:
        ordered = values.sort().values
        upper, lower = float(ordered[middle]), float(ordered[middle - 1])
    else:
        # One pivot: numpy partitions around a single index ten times faster than around two.
        partitioned = np.partition(values.numpy(), middle)
        upper, lower = float(partitioned[middle]), float(partitioned[:middle].max())
    return upper if len(values) % 2 else (lower + upper) / 2


def _align(kernels: Tensor, diagonal: Tensor, flags: np.ndarray) -> PairwiseCKA:
    """Both estimators of all pairs from kernel matrices that need no centring.

    With P_ab = Σ_ij K_a,ij K_b,ij, row sums R and totals t, HSIC_0 ∝ P − (2/n) R Rᵀ + t tᵀ/n².
    HSIC_1 ∝ P̃ − 2/(n−2) R̃ R̃ᵀ + t̃ t̃ᵀ/((n−1)(n−2)) takes the same of the matrices without their
    diagonals d. We sum these and add the diagonals for HSIC_0: the other way round a few tokens of
    large norm would cost all digits.
    """
    n = kernels.shape[1]
    kernels.diagonal(dim1=1, dim2=2).zero_()
    by_row = kernels.transpose(0, 1)  # sums over j in the kernels' dtype, over i in float64
    products = torch.bmm(by_row, by_row.mT).sum(0, dtype=torch.float64).cpu().numpy()
    rows = kernels.sum(-1).to(torch.float64).cpu().numpy()
    totals = rows.sum(1)
    outer = np.outer(totals, totals) / ((n - 1) * (n - 2))
    debiased = products - 2 / (n - 2) * rows @ rows.T + outer
    # A difference of this size is rounding.
    noise = np.finfo(np.float64 if kernels.dtype == torch.float64 else np.float32).eps
    unsure = noise * np.diag(products)

    d = diagonal.to(torch.float64).cpu().numpy()
    products, rows, totals = products + d @ d.T, rows + d, totals + d.sum(1)
    biased = products - 2 / n * rows @ rows.T + np.outer(totals, totals) / n**2
    return PairwiseCKA(
        _normalised(biased, noise * np.diag(products), flags, Flag.ZERO),
        _normalised(debiased, unsure, flags, Flag.NONPOSITIVE_HSIC),
    )


def _normalised(hsic: np.ndarray, noise: np.ndarray, flags: np.ndarray, undefined: Flag) -> Flagged:
    """HSIC_ab / sqrt(HSIC_aa·HSIC_bb), NaN where a state's own HSIC does not exceed the noise."""
    self_hsic = np.diag(hsic)
    states = np.where((flags == Flag.NONE) & (self_hsic <= noise), undefined, flags).astype(np.int8)
    states = np.where((flags == Flag.ZERO_MEDIAN) & (self_hsic <= noise), undefined, states)
    broken = (states != Flag.NONE) & (states != Flag.ZERO_MEDIAN)
    self_hsic = np.where(broken, np.nan, self_hsic)
    flag = np.where(broken[:, None] | (states == Flag.NONE), states[:, None], states)
    return Flagged(hsic / np.sqrt(np.outer(self_hsic, self_hsic)), flag.astype(np.int8))


class CkaRows(LoopRows):
    """The table `cka`: all pairs of states of a loop, by each kernel and estimator."""

    table = "cka"
    by_sample = True

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        self.options = setup.options

    def keys(self, loop: Trajectory, setup: Setup) -> list[tuple[Any, ...]]:
        return [
            (*pair, *estimate)
            for estimate in product(setup.options.kernels, ESTIMATORS)
            for pair in combinations_with_replacement(loop.states, 2)
        ]

    def fill_sample(self, rows: Rows, sample: int, loop: LoopStates) -> None:
        kernels = self.options.kernels
        by_kernel = cka(
            loop.states, kernels=kernels, bandwidth=self.options.bandwidth, grams=loop.grams
        )
        matrices = [getattr(by_kernel[kernel], name) for kernel in kernels for name in ESTIMATORS]
        a, b = np.triu_indices(len(loop.states))
        rows.values["value"][sample] = np.concatenate([cka_ab.value[a, b] for cka_ab in matrices])
        rows.flag[sample] = np.concatenate([cka_ab.flag[a, b] for cka_ab in matrices])
