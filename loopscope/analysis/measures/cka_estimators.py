"""Centred kernel alignment between all states of a sample (MeSH Figures 1b and 4).

One pass gives the biased and the debiased estimator of all pairs: the kernel matrices K_a are never
centred, only their products P_ab = Σ_ij K_a,ij·K_b,ij, row sums and totals are.
"""

import math
from collections.abc import Sequence
from itertools import combinations_with_replacement, product
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Float64
from torch import Tensor

from loopscope.analysis.flags import Flag, Flagged
from loopscope.analysis.measures.filling import LoopRows, LoopStates, Setup
from loopscope.analysis.measures.gram_matrices import to_unit_scale, within_range
from loopscope.analysis.tables import Rows
from loopscope.errors import InputError, unknown_name
from loopscope.models import Trajectory
from loopscope.names import MIN_TOKENS

KERNELS = ("rbf", "linear")
ESTIMATORS = ("biased", "debiased")

# A state's spread below this share of its size is rounding: the state is constant.
_CONSTANT = {torch.float32: 2.0**-22, torch.float64: 2.0**-46}
# Float32 distances are good to about 1e-7 of the squared norms. Where the median distance is below
# this share of the median squared norm, they are computed again in float64; …
_CROWDED = 1e-2
# … also where the rounding of distances between tokens whose squared norms are this many times the
# median distance is more than a share of the sum over all pairs.
_FAR = 64
_SHOWS = 1e-7
# In float64 smaller ones are the rounding of zero (repeated tokens).
_SAME = 2.0**-44
# A float64 Gram matrix whose tokens lie closer than this share of their squared norms (a large
# offset) has lost digits of float32: the state is multiplied again, from an origin among them.
_COARSE = 2.0**-26
# Sums of kernels are good to this many roundings.
_SUMS = 32
# Squared norms outside 2**±_RANGE are next to over- or underflow in float64.
_RANGE = 600
# An origin among the tokens is sought in at most so many rounds, as long as each lowers the median
# squared distance to it to this share; the last rounds square what is left of a distant token's
# distance. Squared distances below _TINY of the largest are lost in float64.
_ROUNDS = 16
_NEARER = 0.9
_TINY = 2.0**-1000
# Squares of float64 below this are not sound.
_ROOT = 2.0**-480


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
        states: The states, (pos, d_model) each, of the same tokens; widths may differ, and scales
            may be any. Float64 is kept; of every other dtype the RBF kernel is computed in float32
            (distances in float64 where that loses digits), the linear one in float64.
        kernels: Any of `KERNELS`.
        bandwidth: t, the RBF bandwidth as a fraction of sqrt(median(d²)).
        grams: X Xᵀ of each state in float64, centred or not, if they are at hand (from
            `gram_matrices.gram`, where there are fewer tokens than dimensions).

    Returns:
        For each kernel the values and flags of all pairs. NaN with `ZERO` where a state is
        constant up to rounding (or, for the RBF kernel, has float64 tokens so far apart that the
        squares of the others are 0), with `NONFINITE` where it is not finite, with
        `NONPOSITIVE_HSIC` where its own HSIC_1 does not exceed its rounding; sound but flagged
        `ZERO_MEDIAN` where more than half of a state's squared distances are 0 and the median of
        the others was taken.

    Raises:
        UnknownNameError: for a kernel that does not exist, with near matches.
        InputError: on fewer than 4 tokens, states of different tokens, or a bandwidth that is not
            positive.
    """
    lengths = [len(state) for state in states]
    if len(set(lengths)) > 1:
        raise InputError(
            f"states have {', '.join(map(str, lengths))} tokens; the CKA of two is of the same "
            "tokens. Give those of one number at a time."
        )
    check(lengths[0], kernels, bandwidth)
    with torch.autocast(states[0].device.type, enabled=False):  # it would round the products
        return _cka(list(states), kernels, bandwidth, grams)


def _cka(
    states: list[Tensor],
    kernels: Sequence[str],
    bandwidth: float,
    grams: Sequence[Tensor] | None,
) -> dict[str, PairwiseCKA]:
    given = [None] * len(states) if grams is None else list(grams)
    results: dict[str, PairwiseCKA] = {}
    for kernel in kernels:
        if kernel == "linear":
            results[kernel] = _linear_of_all(states, given)
        else:
            results[kernel] = _rbf_of_all(states, given, bandwidth)
    return results


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


def _linear_of_all(states: list[Tensor], grams: Sequence[Tensor | None]) -> PairwiseCKA:
    """CKA of the linear kernel, all of it in float64.

    A token of large norm is the largest entry of the kernel and none of its debiased HSIC's: in
    float32, or from an origin that it carries away, nothing is left of the others.
    """
    n = states[0].shape[0]
    kernels = torch.zeros(len(states), n, n, dtype=torch.float64, device=states[0].device)
    diagonal = torch.zeros_like(kernels[..., 0])
    flags = np.full(len(states), int(Flag.NONE), dtype=np.int8)
    noise = np.zeros(len(states))
    for s, (state, gram) in enumerate(zip(states, grams, strict=True)):
        dtype = _rounded_to(state)
        x, exponent = within_range(state.to(torch.float64))
        flags[s] = _flag_of_spread(x, x - x.mean(0), dtype)
        if flags[s] != Flag.NONE:
            continue
        moved = _at_bulk(x)
        matrix = kernels[s]
        if gram is None or not _gram_at_bulk(gram, exponent, matrix):
            torch.mm(moved, moved.mT, out=matrix)
        diagonal[s] = matrix.diagonal()
        matrix.fill_diagonal_(0)
        noise[s] = torch.finfo(torch.float64).eps * float(torch.linalg.vector_norm(matrix)) ** 2
        rows = matrix.sum(1)
        a = rows / (n - 2) - rows.sum() / (2 * (n - 1) * (n - 2))  # leaves rows of sum 0
        matrix.sub_(a[:, None]).sub_(a).fill_diagonal_(0)
        diagonal[s] -= 2 * a
        eps = torch.finfo(dtype).eps
        noise[s] += _rounding(x, moved, eps, float(torch.linalg.vector_norm(matrix)) ** 2)
    return _align(kernels, diagonal, flags, noise)


def _at_bulk(x: Tensor) -> Tensor:
    """A float64 state from an origin among most tokens, however far the others are."""
    moved = x - x.mean(0)
    squares = _squared_norms(moved)
    for _ in range(_ROUNDS):
        candidate = x - _bulk(squares, _TINY) @ x
        median, squares = float(squares.median()), _squared_norms(candidate)
        if not float(squares.median()) < _NEARER * median:
            break
        moved = candidate
    return moved


def _squared_norms(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x, dim=1).square_()


def _gram_at_bulk(gram: Tensor, exponent: int, out: Tensor) -> bool:
    """The same from the Gram matrix of the state times 2ᵉ; False where that has too few digits."""
    norms = gram.diagonal()
    if not _in_range(norms) or abs(exponent) > _RANGE // 2:
        return False
    weights = torch.full_like(norms, 1 / len(gram))
    shift, median = torch.zeros_like(norms), math.inf
    for _ in range(_ROUNDS):
        a = gram @ weights
        squares = (norms - 2 * a + weights @ a).clamp_(min=0)
        if not float(squares.median()) < _NEARER * median:
            break
        shift, median = a - (weights @ a) / 2, float(squares.median())
        weights = _bulk(squares, _TINY)
    torch.sub(gram, shift[:, None], out=out).sub_(shift).mul_(4.0**-exponent)
    return median > _COARSE * float(norms.median())


def _rounded_to(state: Tensor) -> torch.dtype:
    return torch.float64 if state.dtype == torch.float64 else torch.float32


def _rounding(x: Tensor, moved: Tensor, eps: float, hsic: float) -> float:
    """What of an HSIC_1 may be rounding of the tokens: Σ_c ε² x_ic² y_jc² over all pairs i ≠ j.

    With x as it was rounded, to eps, and y, which the kernel was taken of. A bound is given where
    that is much less than the HSIC_1 already.
    """
    sizes, moved_sizes = (torch.linalg.vector_norm(z, dim=0).square_() for z in (x, moved))
    bound = 2 * eps**2 * float(sizes @ moved_sizes)
    if bound < hsic / 4:
        return bound
    y = moved.square()
    others = torch.zeros_like(y)  # of each token; all less its own would be rounding next to one
    others[1:] += y.cumsum(0)[:-1]
    others[:-1] += y.flip(0).cumsum(0).flip(0)[1:]
    return 2 * eps**2 * float((x.square() * others).sum())


def _in_range(norms: Tensor) -> bool:
    """Whether a Gram matrix of these squared norms neither over- nor underflowed."""
    largest = float(norms.max())
    return (
        math.isfinite(float(norms.sum())) and abs(math.frexp(largest)[1]) < _RANGE and largest > 0
    )


def _rbf_of_all(
    states: list[Tensor], grams: Sequence[Tensor | None], bandwidth: float
) -> PairwiseCKA:
    """CKA of the RBF kernel; float32 where no state is float64."""
    matrices, norms, flags = _centred_grams(states, grams)
    diagonal = torch.ones_like(norms, dtype=torch.float64)
    for s, state in enumerate(states):
        if flags[s] == Flag.NONE:
            flags[s] = _rbf(matrices[s], norms[s], bandwidth, state, grams[s])
            diagonal[s] -= 2 * _level(matrices[s])
    return _align(matrices, diagonal, flags)


def _centred_grams(
    states: list[Tensor], grams: Sequence[Tensor | None]
) -> tuple[Tensor, Tensor, np.ndarray]:
    """Centred Gram matrices (state, pos, pos), their diagonals (state, pos), and flags (state,)."""
    n = states[0].shape[0]
    exact = any(state.dtype == torch.float64 for state in states)
    dtype = torch.float64 if exact else torch.float32
    device = states[0].device
    matrices = torch.full((len(states), n, n), torch.nan, dtype=dtype, device=device)
    flags = np.full(len(states), int(Flag.NONE), dtype=np.int8)
    norms = torch.full((len(states), n), torch.nan, dtype=dtype, device=device)
    for s, (state, gram) in enumerate(zip(states, grams, strict=True)):
        if gram is None or not _centre_gram(gram, matrices[s]):
            flags[s] = _centred_gram(state.to(dtype), matrices[s])
        norms[s] = matrices[s].diagonal()
    return matrices, norms, flags


def _centred_gram(x: Tensor, out: Tensor) -> Flag:
    """Gram matrix of a state moved to its bulk, of mean squared norm about 1; 0 where it has none.

    Both kernels are the same wherever the origin is; float32 is best off with it among the tokens,
    outliers aside: a single one of large norm (an attention sink) carries the mean away.
    """
    room = torch.finfo(x.dtype).max ** 0.25
    if not 1 / room < float(torch.linalg.vector_norm(x)) < room:  # its squares may not fit
        x = to_unit_scale(x.to(torch.float64))[0].to(x.dtype)
    state, x = x, x - x.mean(0)
    flag = _flag_of_spread(state, x, x.dtype)
    if flag != Flag.NONE:
        out.zero_()
        return flag
    x.mul_(len(x) ** 0.5 / float(torch.linalg.vector_norm(x)))
    x.sub_(_bulk(torch.linalg.vecdot(x, x)) @ x)
    torch.mm(x, x.mT, out=out)
    return flag


def _centre_gram(gram: Tensor, out: Tensor) -> bool:
    """The same from the float64 Gram matrix; False where that has too few digits or no spread."""
    norms = gram.diagonal()
    means = gram.mean(1)
    squares = norms - 2 * means + means.mean()
    spread = float(squares.sum())
    if not (_in_range(norms) and spread > _COARSE * float(norms.sum())):
        return False
    weights = _bulk(squares)
    a = gram @ weights
    a -= (weights @ a) / 2
    out.copy_((gram - a[:, None]).sub_(a).mul_(len(gram) / spread))
    return float((norms - 2 * a).median()) > _COARSE * float(norms.median())


def _flag_of_spread(x: Tensor, centred: Tensor, dtype: torch.dtype) -> Flag:
    """`NONFINITE`, `ZERO` for a state that is constant up to rounding, `NONE` where all is well."""
    size, spread = float(torch.linalg.vector_norm(x)), float(torch.linalg.vector_norm(centred))
    if not np.isfinite(size + spread):
        return Flag.NONFINITE
    share = _CONSTANT[dtype]
    if spread > share * size:
        return Flag.NONE
    # A dimension or two of huge size do not make the others rounding.
    sizes = torch.linalg.vector_norm(x, dim=0)
    spreads = torch.linalg.vector_norm(centred, dim=0)
    constant = spreads <= share * torch.maximum(sizes, sizes.median())
    return Flag.ZERO if bool(constant.all()) else Flag.NONE


def _bulk(squares: Tensor, floor: float = 1e-12) -> Tensor:
    """Weights of a mean that outliers do not move, from squared distances to the plain mean."""
    weights = 1 / (squares + squares.median() + floor * squares.max())
    return weights / weights.sum()


def _rbf(
    matrix: Tensor, norms: Tensor, bandwidth: float, state: Tensor, gram: Tensor | None
) -> Flag:
    """Turn a state's centred Gram matrix into its RBF kernel matrix, in place."""
    distances = _squared_distances(matrix, norms)
    median = _median(distances.view(-1))
    flag = Flag.NONE
    crowded = median <= _CROWDED * float(norms.median())
    if matrix.dtype == torch.float64 or crowded or _far_tokens_matter(norms, median):
        exact, median = _exact_distances(state, gram)
        if not bool(exact.any()):  # a token is so far away that the squares of others are 0
            return Flag.ZERO
        if median == 0:
            flag = Flag.ZERO_MEDIAN
            median = _median(exact[exact > 0])
        distances.copy_(exact.div_(median))
        median = 1.0
    distances.mul_(-0.5 / (bandwidth**2 * median)).exp_()
    return flag


def _far_tokens_matter(norms: Tensor, median: float) -> bool:
    """Whether the float32 rounding of distances between two or more far tokens shows in the sums.

    One far token does no harm: its distances to all others are large.
    """
    far = norms[norms > _FAR * median].to(torch.float64)
    if len(far) < 2:
        return False
    share = (torch.finfo(torch.float32).eps * far / median).clamp_(max=1)
    return float(share.sqrt().sum() ** 2 - share.sum()) > _SHOWS * len(norms) ** 2


def _exact_distances(state: Tensor, gram: Tensor | None) -> tuple[Tensor, float]:
    """Squared distances in float64, exactly 0 between equal tokens, and their median."""
    if gram is not None and _in_range(gram.diagonal()):
        norms = gram.diagonal().clone()
        exact = _distances_or_zero(gram.clone(), norms, norms)
        median = _median(exact.view(-1))
        if median > _COARSE * float(norms.max()):
            return exact, median
    x = within_range(state.to(torch.float64))[0]
    centred = x - x.mean(0)
    # The rounding of a token is a share of its norm. An offset of all is not part of it, a single
    # token far away (in the mean) neither.
    sizes = torch.minimum(_squared_norms(x), _squared_norms(centred))
    moved = _at_bulk(x)
    largest = moved.abs().amax(1)
    if bool(((largest > 0) & (largest < _ROOT)).any()):
        return torch.zeros(len(x), len(x), dtype=x.dtype, device=x.device), 0.0
    product = moved @ moved.mT
    norms = product.diagonal().clone()
    exact = _distances_or_zero(product, norms, sizes)
    median = _median(exact.view(-1))
    typical = median if median > 0 or not bool(exact.any()) else _median(exact[exact > 0])
    far = torch.nonzero(norms > typical / _COARSE)[:, 0]
    if len(far) > 1:  # their distances from each other are lost in those to the origin
        y = moved[far]
        near = torch.cdist(y, y, compute_mode="donot_use_mm_for_euclid_dist").square_()
        same = _CONSTANT[_rounded_to(state)] ** 2
        near[near <= same * (sizes[far][:, None] + sizes[far])] = 0
        exact[far[:, None], far] = near
        median = _median(exact.view(-1))
    return exact, median


def _distances_or_zero(gram: Tensor, norms: Tensor, sizes: Tensor) -> Tensor:
    """Squared distances, 0 where they are the rounding of tokens of these squared sizes."""
    exact = _squared_distances(gram, norms)
    exact[exact <= _SAME * (sizes[:, None] + sizes)] = 0
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


def _align(
    kernels: Tensor, diagonal: Tensor, flags: np.ndarray, noise: np.ndarray | None = None
) -> PairwiseCKA:
    """Both estimators of all pairs from kernel matrices that need no centring.

    With P_ab = Σ_ij K_a,ij K_b,ij, row sums R and totals t, HSIC_0 ∝ P − (2/n) R Rᵀ + t tᵀ/n².
    HSIC_1 ∝ P̃ − 2/(n−2) R̃ R̃ᵀ + t̃ t̃ᵀ/((n−1)(n−2)) takes the same of the matrices without their
    diagonals d. We sum these and add the diagonals for HSIC_0: the other way round a few tokens of
    large norm would cost all digits. `noise` is what of each own HSIC_1 is rounding, where
    the rows have been centred before and the kernels do not tell it.
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
    eps = np.finfo(np.float64 if kernels.dtype == torch.float64 else np.float32).eps
    unsure = _SUMS * eps * np.diag(products) if noise is None else noise

    d = diagonal.to(torch.float64).cpu().numpy()
    products, rows, totals = products + d @ d.T, rows + d, totals + d.sum(1)
    biased = products - 2 / n * rows @ rows.T + np.outer(totals, totals) / n**2
    return PairwiseCKA(
        _normalised(biased, eps * np.diag(products), flags, Flag.ZERO),
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
    # Of scale 1, exactly: the product of two tiny ones could be 0.
    half = np.frexp(self_hsic)[1] // 2
    hsic, self_hsic = np.ldexp(hsic, -(half[:, None] + half)), np.ldexp(self_hsic, -2 * half)
    return Flagged(hsic / np.sqrt(np.outer(self_hsic, self_hsic)), flag.astype(np.int8))


class CkaRows(LoopRows):
    """The table `cka`: all pairs of states of a loop, by each kernel and estimator.

    States of different numbers of positions (latents and tokens) have none with each other.
    """

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
        lengths = np.array([len(state) for state in loop.states])
        count, estimates = len(lengths), len(self.options.kernels) * len(ESTIMATORS)
        value = np.full((estimates, count, count), np.nan)
        flag = np.full(value.shape, int(Flag.SHAPE), dtype=np.int8)
        for length in dict.fromkeys(lengths[lengths >= MIN_TOKENS].tolist()):
            (chosen,) = np.nonzero(lengths == length)
            pairs = np.ix_(np.arange(estimates), chosen, chosen)
            value[pairs], flag[pairs] = self._of_states(loop.chosen(chosen.tolist()))
        a, b = np.triu_indices(count)
        rows.values["value"][sample] = value[:, a, b].ravel()
        rows.flag[sample] = flag[:, a, b].ravel()

    def _of_states(self, loop: LoopStates) -> tuple[np.ndarray, np.ndarray]:
        """Values and flags, (estimate, state, state) each, of states of the same positions."""
        kernels = self.options.kernels
        by_kernel = cka(
            loop.states, kernels=kernels, bandwidth=self.options.bandwidth, grams=loop.grams
        )
        matrices = [getattr(by_kernel[kernel], name) for kernel in kernels for name in ESTIMATORS]
        return np.stack([m.value for m in matrices]), np.stack([m.flag for m in matrices])
