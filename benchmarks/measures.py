"""Time and error of all measures of one sample: `python benchmarks/measures.py [--threads N]`.

For each shape (tokens × width, six states, float32 on CPU) our whole set (relative updates, RBF CKA
of all pairs by both estimators, spectra, ranks) against, in the same run,

* the GEMM floor: the float32 Gram matrices of all states, the float64 Gram matrices of their
  smaller sides and the products of all pairs of kernel matrices, as torch multiplies them;
* careful: scikit-learn's kernels once per state in float64, centred once, `np.linalg.svd` without
  vectors; biased CKA only;
* textbook: the same kernels, `np.trace(K @ H @ L @ H)` for each pair and its two self terms,
  `np.linalg.svd` with its vectors; biased CKA only.

Times are the smallest of several, per sample; with N threads N samples are measured at a time, as
`measure` does. `--cpu-time` counts this process's CPU time instead (one thread, on a busy machine).
`--memory` instead prints the peak memory of `measure` with 50 and with 500 samples of 256 tokens (a
small mesh model, each in a process of its own) beside the size of the returned tables; `--linear`
the linear CKA, with the Gram matrices given and without (`--before CHECKOUT`: beside another
revision's).
Errors are the largest against float64: CKA (absolute, both estimators, against the
formulas above and Song et al.'s), σ_i/σ_0 (absolute) and effective rank (relative).
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from sklearn.metrics.pairwise import euclidean_distances, rbf_kernel
from threadpoolctl import threadpool_limits

from loopscope.analysis.measures.cka_estimators import cka
from loopscope.analysis.measures.effective_ranks import ranks
from loopscope.analysis.measures.gram_matrices import gram, singular_values_of_grams
from loopscope.analysis.measures.spectrum_decay import spectrum
from loopscope.analysis.measures.update_norm import relative_update
from loopscope.analysis.measuring.recorder import Each, one_thread_per_sample

STATES = 6
SHAPES = ((256, 160), (512, 256), (1024, 1024))


def make_states(pos: int, d_model: int, seed: int) -> torch.Tensor:
    """Make six states that drift apart, as those of a loop do.

    Args:
        pos: Tokens.
        d_model: Width.
        seed: Of the random numbers.

    Returns:
        The states, (state, pos, d_model), float32.
    """
    generator = torch.Generator().manual_seed(seed)
    steps = torch.randn(STATES, pos, d_model, generator=generator)
    return (steps * torch.tensor([1.0] + [0.5] * (STATES - 1))[:, None, None]).cumsum(0)


def ours(states: torch.Tensor) -> tuple:
    """Measure as `measure` does.

    Args:
        states: (state, pos, d_model).

    Returns:
        Updates, CKA, spectra and ranks.
    """
    updates = [relative_update(a[None], b[None]) for a, b in pairwise(states)]
    products = [gram(state) for state in states]
    shared = products if states.shape[1] <= states.shape[2] else None
    pairs = cka(states, grams=shared)["rbf"]
    sigmas = singular_values_of_grams(products)
    return updates, pairs, [spectrum(s) for s in sigmas], [ranks(s) for s in sigmas]


def floor(states: torch.Tensor, kernels: torch.Tensor) -> None:
    """Multiply what any way of measuring multiplies.

    Args:
        states: (state, pos, d_model).
        kernels: (state, pos, pos).
    """
    torch.bmm(states, states.mT)
    exact = states.double() if states.shape[1] <= states.shape[2] else states.double().mT
    torch.bmm(exact, exact.mT)
    by_row = kernels.transpose(0, 1)
    torch.bmm(by_row, by_row.mT)


def kernel(x: np.ndarray) -> np.ndarray:
    """Evaluate the RBF kernel with scikit-learn.

    Args:
        x: A state, (pos, d_model).

    Returns:
        Its kernel matrix, (pos, pos).
    """
    return rbf_kernel(x, gamma=1 / (2 * np.median(euclidean_distances(x, squared=True))))


def updates_in_numpy(states: np.ndarray) -> list[float]:
    """Measure the relative updates.

    Args:
        states: (state, pos, d_model).

    Returns:
        Those of consecutive states.
    """
    norm = np.linalg.norm
    return [2 * norm(b - a) / (norm(b) + norm(a)) for a, b in pairwise(states)]


def careful(states: np.ndarray) -> tuple[np.ndarray, list[np.ndarray]]:
    """Measure with scikit-learn's kernels, each centred once, and singular values alone.

    Args:
        states: (state, pos, d_model).

    Returns:
        Biased CKA (state, state) and each state's singular values.
    """
    updates_in_numpy(states)
    centred = []
    for x in states:
        k = kernel(x)
        centred.append(k - k.mean(0) - k.mean(1)[:, None] + k.mean())
    hsic = np.empty((STATES, STATES))
    for a in range(STATES):
        for b in range(a, STATES):
            hsic[a, b] = hsic[b, a] = (centred[a] * centred[b]).sum()
    norms = np.sqrt(np.diag(hsic))
    return hsic / np.outer(norms, norms), [np.linalg.svd(x, compute_uv=False) for x in states]


def textbook(states: np.ndarray) -> None:
    """Measure as the formulas stand there.

    Args:
        states: (state, pos, d_model).
    """
    updates_in_numpy(states)
    n = states.shape[1]
    h = np.eye(n) - 1 / n
    kernels = [kernel(x) for x in states]
    for a in range(STATES):
        for b in range(a, STATES):
            k, m = kernels[a], kernels[b]
            cross, own_k, own_m = (np.trace(p @ h @ q @ h) for p, q in ((k, m), (k, k), (m, m)))
            cross / np.sqrt(own_k * own_m)
    for x in states:
        np.linalg.svd(x)


def debiased(states: np.ndarray) -> np.ndarray:
    """Evaluate the debiased CKA of Song et al. 2007 in float64.

    Args:
        states: (state, pos, d_model).

    Returns:
        CKA of all pairs, (state, state).
    """
    kernels = [kernel(x) for x in states]
    for k in kernels:
        np.fill_diagonal(k, 0)
    n, ones = states.shape[1], np.ones(states.shape[1])
    hsic = np.empty((STATES, STATES))
    for a, k in enumerate(kernels):
        for b, m in enumerate(kernels):
            total = k.sum() * m.sum() / ((n - 1) * (n - 2))
            hsic[a, b] = (k * m).sum() + total - 2 / (n - 2) * ((ones @ k) @ (m @ ones))
    norms = np.sqrt(np.diag(hsic))
    return hsic / np.outer(norms, norms)


def errors(states: torch.Tensor) -> tuple[float, float, float]:
    """Compare `ours` with float64.

    Args:
        states: (state, pos, d_model).

    Returns:
        The largest errors of CKA and σ_i/σ_0 (absolute) and of the effective rank (relative).
    """
    exact = states.double().numpy()
    expected, sigmas = careful(exact)
    _, pairs, spectra, found_ranks = ours(states)
    off_cka = max(
        abs(pairs.biased.value - expected).max(), abs(pairs.debiased.value - debiased(exact)).max()
    )
    off_sigma, off_rank = 0.0, 0.0
    for sigma, line, rank in zip(sigmas, spectra, found_ranks, strict=True):
        ratio = (sigma / sigma[0])[:50]
        off_sigma = max(off_sigma, abs(line.sigma_rel[: len(ratio)] - ratio).max())
        p = sigma / sigma.sum()
        effective = np.exp(-(p * np.log(p)).sum())
        off_rank = max(off_rank, abs(rank.value[0] / effective - 1))
    return off_cka, off_sigma, off_rank


clock = time.perf_counter


def smallest(function: Callable[[], object], repeats: int) -> float:
    """Time a function.

    Args:
        function: What is called.
        repeats: How often.

    Returns:
        Milliseconds of the fastest call.
    """
    times = []
    for _ in range(repeats):
        start = clock()
        function()
        times.append(clock() - start)
    return 1000 * min(times)


def measured(shape: tuple[int, int], threads: int, repeats: int, each: Each) -> dict[str, float]:
    """Time all ways of measuring.

    Args:
        shape: Tokens and width.
        threads: Samples at a time.
        repeats: Rounds that take turns.
        each: Applies a function to each sample's number.

    Returns:
        Milliseconds per sample, by way.
    """
    pos, d_model = shape
    samples = [make_states(pos, d_model, seed) for seed in range(threads)]
    kernels = torch.rand(STATES, pos, pos)
    exact = samples[0].double().numpy()
    rounds: dict[str, list[float]] = {"ours": [], "floor": [], "careful": []}
    for _ in range(repeats):
        rounds["ours"].append(
            smallest(lambda: list(each(lambda i: ours(samples[i]), range(threads))), 2) / threads
        )
        rounds["floor"].append(
            smallest(lambda: list(each(lambda i: floor(samples[i], kernels), range(threads))), 2)
            / threads
        )
        with threadpool_limits(threads, user_api="blas"):
            rounds["careful"].append(smallest(lambda: careful(exact), 1))
    with threadpool_limits(threads, user_api="blas"):
        slow = smallest(lambda: textbook(exact), 1)
    return {name: min(times) for name, times in rounds.items()} | {"textbook": slow}


MEMORY = """
import json, resource, sys
import torch
from loopscope.analysis.measuring.streaming import measure
from loopscope.models.native.configuration import LoopConfig
from loopscope.models.native.loop_model import LoopModel

torch.set_num_threads(int(sys.argv[2]))
config = LoopConfig(variant="mesh", layout="1+2R3+1", d_model=160, n_heads=4, d_vocab=4096)
samples = torch.randint(4096, (500, 256), generator=torch.Generator().manual_seed(0))
model = LoopModel(config)
measure(model, samples[:16])
tables = measure(model, samples[: int(sys.argv[1])])
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
size = sum(int(f.memory_usage(deep=True).sum()) for f in tables.frames().values())
print(json.dumps([peak / 1e6, size / 1e6]))
"""


def memory(threads: int) -> None:
    """Print the peak memory with 50 and with 500 samples.

    Args:
        threads: Samples at a time.
    """
    print("| samples | peak, MB | tables, MB |\n|---|---|---|")
    for samples in (50, 500):
        command = [sys.executable, "-c", MEMORY, str(samples), str(threads)]
        peak, size = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
        print(f"| {samples} | {peak:.1f} | {size:.1f} |", flush=True)


LINEAR = """
import json, sys, time
import torch
from loopscope.analysis.measures.cka_estimators import cka
from loopscope.analysis.measures.gram_matrices import gram
torch.set_num_threads(int(sys.argv[1]))
steps = torch.randn(6, 1024, 1024, generator=torch.Generator().manual_seed(0))
states = (steps * torch.tensor([1.0] + [0.5] * 5)[:, None, None]).cumsum(0)
grams = [gram(state) for state in states]
def smallest(given, kernel):
    times = []
    for _ in range(4):
        began = time.process_time()
        cka(states, kernels=(kernel,), grams=given)
        times.append(time.process_time() - began)
    return 1000 * min(times)
print(json.dumps([smallest(g, k) for k in ("linear", "rbf") for g in (None, grams)]))
"""


def linear(threads: int, before: Path | None) -> None:
    """Print the CPU time of the CKA by kernel, of six states of 1024 × 1024.

    Args:
        threads: Of torch.
        before: A checkout of another revision, run in turns with this one.
    """
    here = Path(__file__).resolve().parents[1]
    times: dict[Path, list[list[float]]] = {c: [] for c in (before, here) if c is not None}
    for _ in range(3):
        for checkout, taken in times.items():
            command = [sys.executable, "-c", LINEAR, str(threads)]
            env = {**os.environ, "PYTHONPATH": str(checkout)}
            done = subprocess.run(command, check=True, capture_output=True, env=env, cwd=checkout)
            taken.append(json.loads(done.stdout))
    print(
        "| CKA, 1024 × 1024, ms of CPU time | "
        + " | ".join(["before", "now"][-len(times) :])
        + " |"
    )
    print("|---" * (1 + len(times)) + "|")
    fastest = [np.min(taken, axis=0) for taken in times.values()]
    for i, name in enumerate(("linear", "linear, Gram given", "RBF", "RBF, Gram given")):
        print(f"| {name} | " + " | ".join(f"{taken[i]:.1f}" for taken in fastest) + " |")


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--cpu-time", action="store_true")
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--linear", action="store_true")
    parser.add_argument("--before", type=Path, help="checkout of another revision")
    options = parser.parse_args()
    if options.memory:
        return memory(options.threads)
    if options.linear:
        return linear(options.threads, options.before and options.before.resolve())
    if options.cpu_time:
        global clock
        clock = time.process_time
    torch.set_num_threads(options.threads)
    print(f"threads: {options.threads}, torch {torch.__version__}, numpy {np.__version__}\n")
    print(
        "| tokens × width | ours, ms | floor, ms | ours / floor | careful, ms | careful / ours "
        "| textbook, ms | textbook / ours | error CKA | error σ | error rank |\n"
        + "|---" * 11
        + "|"
    )
    with one_thread_per_sample() as each:
        for shape in SHAPES:
            t = measured(shape, options.threads, options.repeats, each)
            off = errors(make_states(*shape, seed=0))
            cells = [
                f"{shape[0]} × {shape[1]}",
                f"{t['ours']:.1f}",
                f"{t['floor']:.1f}",
                f"{t['ours'] / t['floor']:.2f}",
                f"{t['careful']:.0f}",
                f"{t['careful'] / t['ours']:.1f}",
                f"{t['textbook']:.0f}",
                f"{t['textbook'] / t['ours']:.1f}",
                *(f"{error:.0e}" for error in off),
            ]
            print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
