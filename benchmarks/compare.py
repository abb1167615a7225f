"""Where `compare` spends its time: `python benchmarks/compare.py [--device cuda] [--size 410m]`.

Measures four variants of random weights on random tokens, a few samples each, with twice the
trained iterations, and prints for each the time per sample in

* forward: the run to T = 2K iterations (K for mesh) and the coda from h(K);
* readout: the coda and the head on every other h(t), by three readings;
* CKA: all pairs of states, both estimators;
* spectra: float64 Gram matrices and their eigenvalues;
* turn: how far tokens turn from state to state, and in the core;
* I/O: a shard of tables written to disk;
* rest: updates, steps, losses, rows,

beside the floor: the floating-point operations of the matrix products over the rate of a large
product measured in the same run (float32 for forward, readout and CKA; float64 for the Gram
matrices and the maps of the fitted reading; eigenvalues have no floor). Fitting the maps, once for
each model, is not in it.

`--readings` prints instead what matched and fitted readings cost beside the raw one alone: of
`measure`, in rounds that take turns, with the fit by itself and the turns by themselves, and of a
whole `compare` without figures. With `--before CHECKOUT` it holds `measure` and `compare` against
those of another revision's checkout, in processes that take turns.

With `--size 410m` it is Pythia-410M's shape, 3+6R3+3, D 1024, 16 heads, vocabulary 50304, 2048
tokens: four variants and 500 samples on one GPU are meant to take minutes. On another machine the
last lines project that from the operations: a projection, no measurement. `--memory` prints the
peak memory with more samples and with more checkpoints instead.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import torch
from forward import race

import loopscope as ls
from loopscope.analysis.measures import cka_estimators, filling, readout_losses, step_sizes
from loopscope.analysis.measuring import map_fitting, streaming, token_windows
from loopscope.analysis.options import Options
from loopscope.analysis.tables.registry import MEASURES
from loopscope.models import Hooked
from loopscope.models.native.configuration import LoopConfig
from loopscope.models.native.loop_model import LoopModel

VARIANTS = ("base", "residual", "anchor", "mesh")


@dataclass(frozen=True)
class Size:
    layout: str
    width: int
    heads: int
    vocabulary: int
    pos: int


SIZES = {
    "zoo": Size("1+2R3+1", 160, 5, 2048, 256),
    "small": Size("1+2R3+1", 512, 8, 8192, 512),
    "410m": Size("3+6R3+3", 1024, 16, 50304, 2048),
}
PARTS = {
    "forward": [(streaming, "capture"), (LoopModel, "shortened")],
    "readout": [
        (readout_losses, "read_out_losses"),
        (readout_losses, "matched"),
        (map_fitting.FittedReading, "losses"),
    ],
    "CKA": [(cka_estimators, "cka")],
    "spectra": [(filling, "gram"), (filling, "singular_values_of_grams")],
    "turn": [(step_sizes, "turn")],
}
EXACT = ("spectra", "maps")
"""What is computed in float64."""


def make(size: Size, variant: str, device: str) -> LoopModel:
    """Make a model of random weights.

    Args:
        size: Its widths and layout.
        variant: Its variant.
        device: Where to.

    Returns:
        The model, in evaluation mode.
    """
    config = LoopConfig(
        variant=variant, layout=size.layout, d_model=size.width, n_heads=size.heads,
        d_vocab=size.vocabulary, n_ctx=size.pos,
    )  # fmt: skip
    return LoopModel(config, seed=0).to(device).eval()


def synchronise(device: str) -> None:
    """Wait until a GPU has done what it was options.

    Args:
        device: The device; nothing happens on the CPU.
    """
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def rate(device: str, dtype: torch.dtype, n: int) -> float:
    """Time a large matrix product.

    Args:
        device: Where.
        dtype: Its floating type.
        n: Rows and columns of both factors.

    Returns:
        Operations per second of the fastest of four.
    """
    a = torch.randn(n, n, dtype=dtype, device=device)
    times = []
    for _ in range(4):
        synchronise(device)
        start = time.perf_counter()
        a @ a
        synchronise(device)
        times.append(time.perf_counter() - start)
    return 2 * n**3 / min(times)


def operations(size: Size, variant: str) -> dict[str, float]:
    """Count the operations of the matrix products of one sample.

    Args:
        size: Widths and layout.
        variant: The variant.

    Returns:
        Floating-point operations, by part.
    """
    config = LoopConfig(
        variant=variant, layout=size.layout, d_model=size.width, n_heads=size.heads,
        d_vocab=size.vocabulary,
    )  # fmt: skip
    layout, L, D = config.layout, size.pos, size.width
    layer = 2 * 12 * L * D * D + 4 * L * L * D
    head = 2 * L * D * size.vocabulary
    T = config.K if variant == "mesh" else 2 * config.K
    depth = layout.prelude + T * layout.cores[0] + layout.coda
    states = config.K + 3
    return {
        "forward": depth * layer + head,
        "readout": (T + 2 * config.K) * (layout.coda * layer + head),
        "maps": config.K * 2 * L * D * D,
        "CKA": states * 2 * L * L * D + states**2 * 2 * L * L,
        "spectra": states * 2 * L * D * min(L, D),
    }


def measured(model: LoopModel, tokens: torch.Tensor, device: str, batch: int) -> dict[str, float]:
    """Time the measuring of one sample.

    Args:
        model: The model.
        tokens: Ids, (sample, pos); the first batch warms up.
        device: Where the model is.
        batch: Samples per forward pass.

    Returns:
        Seconds, by part.
    """
    spent: dict[str, float] = defaultdict(float)

    def timed(part: str, function):
        def call(*args, **kwargs):
            synchronise(device)
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                synchronise(device)
                spent[part] += time.perf_counter() - start

        return call

    more = None if model.config.variant == "mesh" else 2 * model.config.K
    options = Options(measures=MEASURES, more_loops=more)
    whole = streaming.Measuring(model, tokens, options, batch_size=batch)
    whole.part(0, batch)
    with ExitStack() as stack:
        for part, places in PARTS.items():
            for module, name in places:
                stack.enter_context(patch.object(module, name, timed(part, getattr(module, name))))
        synchronise(device)
        start = time.perf_counter()
        tables = whole.part(batch, len(tokens))
        synchronise(device)
        total = time.perf_counter() - start
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        tables.save(Path(folder))
        spent["I/O"] = time.perf_counter() - start
    count = len(tokens) - batch
    parts = {name: seconds / count for name, seconds in spent.items()}
    timed_parts = sum(value for name, value in parts.items() if name != "I/O")
    return {**parts, "rest": total / count - timed_parts}


def table(size: Size, device: str, samples: int, batch: int) -> None:
    """Print a row for each variant.

    Args:
        size: Widths and layout.
        device: Where to measure.
        samples: How many are timed.
        batch: Samples per forward pass.
    """
    fast, exact = rate(device, torch.float32, 2048), rate(device, torch.float64, 1024)
    print(f"{size}, {device}, {torch.get_num_threads()} threads, batches of {batch}")
    print(f"float32 {fast / 1e9:,.0f} GFLOP/s, float64 {exact / 1e9:,.0f} GFLOP/s\n")
    names = [*PARTS, "I/O", "rest"]
    print(f"| variant | ms per sample | {' | '.join(names)} | floor, ms | time / floor |")
    print("|---" * (len(names) + 4) + "|")
    tokens = torch.randint(
        size.vocabulary, (batch + samples, size.pos), generator=torch.Generator().manual_seed(0)
    )
    over = {}
    for variant in VARIANTS:
        seconds = measured(make(size, variant, device), tokens, device, batch)
        total = sum(seconds.values())
        work = operations(size, variant)
        floor = sum(v / (exact if part in EXACT else fast) for part, v in work.items())
        over[variant] = total / floor
        shares = " | ".join(f"{seconds[name] / total:.0%}" for name in names)
        ends = f"{1000 * floor:.1f} | {total / floor:.2f}"
        print(f"| {variant} | {1000 * total:.1f} | {shares} | {ends} |")
    if size != SIZES["410m"]:
        project(over)


def project(over: dict[str, float]) -> None:
    """Print what four variants of 410M would take, from the operations alone.

    Args:
        over: Time over the floor, by variant.
    """
    big = SIZES["410m"]
    for single, double in ((50e12, 50e12), (15e12, 0.5e12)):
        seconds = 0.0
        for variant in VARIANTS:
            work = operations(big, variant)
            floor = sum(v / (double if part in EXACT else single) for part, v in work.items())
            seconds += 500 * floor * over[variant]
        rates = f"{single / 1e12:g} (float32) and {double / 1e12:g} (float64) TFLOP/s"
        print(f"\nPROJECTION, not measured: 4 variants × 500 × 2048 tokens of 410M at {rates}, the")
        print(f"overheads as above: {seconds / 60:.1f} minutes")


# -- what readings cost ----------------------------------------------------------------------------


@contextmanager
def raw_alone() -> Iterator[None]:
    """A context in which h(t) is read raw only, and nothing is fitted."""
    with (
        patch.object(readout_losses, "READINGS", ("raw",)),
        patch.object(streaming, "fitted_reading", lambda *_, **__: None),
    ):
        yield


def reading_times(
    model: Hooked, tokens: torch.Tensor, *, rounds: int, more_loops: int | None = None
) -> dict[str, float]:
    """Time measuring with and without some of its parts, in rounds that take turns.

    Args:
        model: A model.
        tokens: Ids, (sample, pos).
        rounds: How often each is timed.
        more_loops: T, where more iterations than trained are to run.

    Returns:
        Median seconds (CPU time where the model is on the CPU): all measures but the readout, all
        with the raw reading alone, with all readings and the maps fitted already, the same with
        nothing in place of the turns, and the fit.
    """
    kept = {}
    others = tuple(name for name in MEASURES if name != "readout")
    for name, measures in (("none", others), ("raw", MEASURES), ("all", MEASURES)):
        options = Options(measures=measures, more_loops=more_loops)
        kept[name] = streaming.Measuring(model, tokens, options, batch_size=8)
    nothing = patch.object(step_sizes, "turn", lambda h, _: torch.zeros(len(h)).double())

    def run(name: str) -> None:
        kept[name].part(0, len(tokens))

    def run_raw() -> None:
        with raw_alone():
            run("raw")

    def run_unturned() -> None:
        with nothing:
            run("all")

    def fit() -> None:
        documents = [str(i // 4) for i in range(len(tokens))]
        windows = token_windows.TokenWindows(tokens=tokens, documents=documents)
        map_fitting.fitted_reading(model, windows, batch_size=8)

    calls: dict[str, Callable[[], None]] = {
        "none": lambda: run("none"), "raw": run_raw, "all": lambda: run("all"),
        "no turns": run_unturned, "fit": fit,
    }  # fmt: skip
    return race(calls, rounds=rounds, clock=_clock(model))


def _clock(model: Hooked) -> Callable[[], float]:
    """CPU time, of which other work on the machine takes nothing; by the wall on a GPU."""
    on_cpu = next(model.parameters()).device.type == "cpu"
    return time.process_time if on_cpu else time.perf_counter


def readings_table(size: Size, device: str, rounds: int) -> None:
    """Print what the readings cost of `measure`, for each variant, and of `compare`.

    Args:
        size: Widths and layout.
        device: Where to measure.
        rounds: How often each is timed.
    """
    # as many windows as the fit takes, of which each fold's maps see half
    count = 2 * -(-map_fitting.TOKENS_PER_DIRECTION * size.width // size.pos)
    seed = torch.Generator().manual_seed(0)
    tokens = torch.randint(size.vocabulary, (count, size.pos), generator=seed)
    print(f"{size}, {device}, {torch.get_num_threads()} threads, {count} samples\n")
    names = [
        "raw alone, ms per sample", "all readings", "measure: all / raw", "readout: all / raw",
        "share of measure, raw", "all", "fit, in samples measured", "turn and work, of measure",
    ]  # fmt: skip
    print(f"| variant | {' | '.join(names)} |\n{'|---' * (len(names) + 1)}|")
    for variant in VARIANTS:
        model = make(size, variant, device)
        more = None if variant == "mesh" else 2 * model.config.K
        t = reading_times(model, tokens, rounds=rounds, more_loops=more)
        raw, every = t["raw"] - t["none"], t["all"] - t["none"]
        cells = [
            f"{1e3 * t['raw'] / count:.1f}", f"{1e3 * t['all'] / count:.1f}",
            f"{t['all'] / t['raw']:.2f}", f"{every / raw:.2f}", f"{raw / t['raw']:.0%}",
            f"{every / t['all']:.0%}", f"{t['fit'] / t['all'] * count:.1f}",
            f"{1 - t['no turns'] / t['all']:.1%}",
        ]  # fmt: skip
        print(f"| {variant} | {' | '.join(cells)} |", flush=True)

    spent = {}
    for name, how in (("raw", raw_alone), ("all", nullcontext)):
        began = time.process_time()
        with how():
            ls.compare(["base", "mesh"], samples=48, tokens=256)
        spent[name] = time.process_time() - began
    print(
        "\nThe zoo's base and mesh with their twins compared on 48 × 256 tokens, CPU time: "
        f"{spent['all']:.1f} s, raw alone {spent['raw']:.1f} s, ratio "
        f"{spent['all'] / spent['raw']:.2f}"
    )


AGAINST = """
import json, sys, time
import torch
import loopscope as ls
torch.set_num_threads(int(sys.argv[1]))
from loopscope.analysis.tables.registry import MEASURES
def timed(call):
    began = time.process_time()
    call()
    return time.process_time() - began
model = ls.load("base")
windows = ls.load_samples(model, samples=24, tokens=256)
timed(lambda: ls.measure(model, windows.tokens[:8], measures=MEASURES, more_loops=6))
both = [timed(lambda: ls.measure(model, windows, measures=MEASURES, more_loops=6))]
both.append(timed(lambda: ls.compare(["base", "mesh"], samples=24, tokens=256)))
print(json.dumps(both))
"""


def against(before: Path, threads: int, rounds: int) -> None:
    """Print `measure` and `compare` over those of another checkout.

    Args:
        before: The checkout.
        threads: Threads of each process.
        rounds: How often each runs.
    """
    times: dict[Path, list[list[float]]] = {before: [], Path(ls.__file__).parents[1]: []}
    for _ in range(rounds):
        for checkout, taken in times.items():
            command = [sys.executable, "-c", AGAINST, str(threads)]
            env = {**os.environ, "PYTHONPATH": str(checkout)}
            done = subprocess.run(command, check=True, capture_output=True, env=env, cwd=checkout)
            taken.append(json.loads(done.stdout.splitlines()[-1]))
    old, new = (list(zip(*taken, strict=True)) for taken in times.values())
    print("| 24 × 256 tokens, CPU time | before, s | now, s | ratio |\n|---|---|---|---|")
    for i, name in enumerate(("measure, base", "compare, base and mesh with twins")):
        a, b = min(old[i]), min(new[i])
        print(f"| {name} | {a:.2f} | {b:.2f} | {b / a:.2f} |")


MEMORY = """
import json, resource, sys
import loopscope as ls
samples, models = int(sys.argv[1]), int(sys.argv[2])
targets = [ls.load("base").untrained(seed) for seed in range(models)]
for i, model in enumerate(targets):
    model.name = f"m{i}"
comparison = ls.compare(targets, samples=samples, tokens=64, twins=False)
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
size = sum(int(f.memory_usage(deep=True).sum()) for f in comparison.tables.frames().values())
print(json.dumps([peak / 1e6, size / 1e6]))
"""


def memory() -> None:
    """Print the peak memory with more samples and with more checkpoints."""
    print("| samples | checkpoints | peak, MB | of it tables, MB |\n|---|---|---|---|")
    for samples, models in ((64, 2), (256, 2), (448, 2), (64, 8)):
        command = [sys.executable, "-c", MEMORY, str(samples), str(models)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        peak, size = json.loads(done.stdout.splitlines()[-1])
        print(f"| {samples} | {models} | {peak:.0f} | {size:.1f} |", flush=True)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--size", choices=SIZES, default="zoo")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--readings", action="store_true")
    parser.add_argument("--before", type=Path, help="checkout of another revision")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.memory:
        memory()
    elif options.before:
        against(options.before.resolve(), options.threads, options.rounds)
    elif options.readings:
        readings_table(SIZES[options.size], options.device, options.rounds)
    else:
        table(SIZES[options.size], options.device, options.samples, options.batch_size)


if __name__ == "__main__":
    main()
