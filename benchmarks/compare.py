"""Where `compare` spends its time: `python benchmarks/compare.py [--device cuda] [--size 410m]`.

Measures four variants of random weights on random tokens, a few samples each, with twice the
trained iterations, and prints for each the time per sample in

* forward: the run to T = 2K iterations (K for mesh) and the coda from h(K);
* readout: the coda and the head on every other h(t);
* CKA: all pairs of states, both estimators;
* spectra: float64 Gram matrices and their eigenvalues;
* I/O: a shard of tables written to disk;
* rest: updates, steps, losses, rows,

beside the floor: the floating-point operations of the matrix products over the rate of a large
product measured in the same run (float32 for forward, readout and CKA; float64 for the Gram
matrices; eigenvalues have no floor). With `--size 410m` it is Pythia-410M's shape, 3+6R3+3, D 1024,
16 heads, vocabulary 50304, 2048 tokens: four variants and 500 samples on one GPU are meant to take
minutes. On another machine the last lines project that from the operations: a projection, no
measurement. `--memory` prints the peak memory with more samples and with more checkpoints instead.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import torch

from loopscope.analysis.measures import cka_estimators, filling, readout_losses
from loopscope.analysis.measuring import streaming
from loopscope.analysis.options import Options
from loopscope.analysis.tables.registry import MEASURES
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
    "readout": [(readout_losses, "read_out_losses")],
    "CKA": [(cka_estimators, "cka")],
    "spectra": [(filling, "gram"), (filling, "singular_values_of_grams")],
}


def make(size: Size, variant: str, device: str) -> LoopModel:
    config = LoopConfig(
        variant=variant, layout=size.layout, d_model=size.width, n_heads=size.heads,
        d_vocab=size.vocabulary, n_ctx=size.pos,
    )  # fmt: skip
    return LoopModel(config, seed=0).to(device).eval()


def synchronise(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def rate(device: str, dtype: torch.dtype, n: int) -> float:
    """Operations per second of a large matrix product."""
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
    """Operations of the matrix products of one sample, by part."""
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
        "readout": T * (layout.coda * layer + head),
        "CKA": states * 2 * L * L * D + states**2 * 2 * L * L,
        "spectra": states * 2 * L * D * min(L, D),
    }


def measured(model: LoopModel, tokens: torch.Tensor, device: str, batch: int) -> dict[str, float]:
    """Seconds of a sample, by part."""
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
    known = sum(value for name, value in parts.items() if name != "I/O")
    return {**parts, "rest": total / count - known}


def table(size: Size, device: str, samples: int, batch: int) -> None:
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
        found = measured(make(size, variant, device), tokens, device, batch)
        total = sum(found.values())
        work = operations(size, variant)
        floor = sum(v / (exact if part == "spectra" else fast) for part, v in work.items())
        over[variant] = total / floor
        shares = " | ".join(f"{found[name] / total:.0%}" for name in names)
        ends = f"{1000 * floor:.1f} | {total / floor:.2f}"
        print(f"| {variant} | {1000 * total:.1f} | {shares} | {ends} |")
    if size != SIZES["410m"]:
        project(over)


def project(over: dict[str, float]) -> None:
    """What four variants of 410M would take, from the operations alone."""
    big = SIZES["410m"]
    for single, double in ((50e12, 50e12), (15e12, 0.5e12)):
        seconds = 0.0
        for variant in VARIANTS:
            work = operations(big, variant)
            floor = sum(v / (double if part == "spectra" else single) for part, v in work.items())
            seconds += 500 * floor * over[variant]
        rates = f"{single / 1e12:g} (float32) and {double / 1e12:g} (float64) TFLOP/s"
        print(f"\nPROJECTION, not measured: 4 variants × 500 × 2048 tokens of 410M at {rates}, the")
        print(f"overheads as above: {seconds / 60:.1f} minutes")


MEMORY = """
import json, resource, sys
import loopscope as ls
samples, models = int(sys.argv[1]), int(sys.argv[2])
targets = [ls.load("base").untrained(seed) for seed in range(models)]
for i, one in enumerate(targets):
    one.name = f"m{i}"
found = ls.compare(targets, samples=samples, tokens=64, twins=False)
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
size = sum(int(f.memory_usage(deep=True).sum()) for f in found.tables.frames().values())
print(json.dumps([peak / 1e6, size / 1e6]))
"""


def memory() -> None:
    print("| samples | checkpoints | peak, MB | of it tables, MB |\n|---|---|---|---|")
    for samples, models in ((64, 2), (256, 2), (448, 2), (64, 8)):
        command = [sys.executable, "-c", MEMORY, str(samples), str(models)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        peak, size = json.loads(done.stdout.splitlines()[-1])
        print(f"| {samples} | {models} | {peak:.0f} | {size:.1f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--size", choices=SIZES, default="zoo")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--memory", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    if given.memory:
        memory()
    else:
        table(SIZES[given.size], given.device, given.samples, given.batch_size)


if __name__ == "__main__":
    main()
