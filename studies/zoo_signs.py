"""The tables of docs/REPRODUCTION.md and docs/ZOO.md on the shipped checkpoints.

    python studies/zoo_signs.py            # each variant beside its untrained twin, 500 samples
    python studies/zoo_signs.py --series RUNS/seed-0/1+1R3+1/base RUNS/seed-0/1+1R3+1/mesh

Every number is a mean over samples with its 95 % interval, by document: whole documents are
resampled (`collapse.clusters`), as in a comparison. With --series: the step checkpoints of a run,
means alone.
"""

import argparse
from pathlib import Path

import pandas as pd

from loopscope.analysis.collapse import per_sample
from loopscope.analysis.collapse.clusters import Clusters, clusters_of
from loopscope.analysis.collapse.statistics import paired_difference
from loopscope.analysis.measuring.streaming import measure
from loopscope.models.opening.loading import load
from loopscope.text.windows import load_samples

VARIANTS = ("vanilla", "base", "residual", "anchor", "anchor_emb", "mesh")
MEASURES = ["update", "cka", "rank", "loss"]
COLUMNS = {
    "loss": ("loss, nats", 3),
    "first_share": ("share of the first loop", 3),
    "cka_biased": ("CKA of consecutive states", 3),
    "cka_debiased": ("debiased", 3),
    "erank_0": ("effective rank of h(0)", 1),
    "erank_K": ("of h(K)", 1),
}


def written(mean: float, low: float, high: float, digits: int) -> str:
    """Write a mean with its interval: 2.420 [2.371, 2.471].

    Args:
        mean: The mean.
        low: Lower end of the interval.
        high: Its upper end.
        digits: After the point.

    Returns:
        The three numbers as text.
    """
    return f"{mean:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]".replace("-", "−")


def interval(values: pd.Series, clusters: Clusters, digits: int) -> str:
    """Mean and 95 % interval by document.

    Args:
        values: By sample; NaN is left out.
        clusters: Which samples belong together.
        digits: After the point.

    Returns:
        The three numbers as text; a dash where there is no value.
    """
    sound = values.dropna()
    if not len(sound):
        return "–"
    totals = clusters.totals(sound)
    return written(totals.mean, *totals.interval, digits)


def signs_of(target: str, samples: int, tokens: int, seed: int = 0) -> pd.DataFrame:
    """Measure the signs of collapse.

    Args:
        target: What `load` takes.
        samples: How many held-out windows.
        tokens: Tokens per window.
        seed: Of an untrained twin.

    Returns:
        One row per sample, with its document.
    """
    model = load(target, seed=seed)
    windows = load_samples(model, samples=samples, tokens=tokens)
    return per_sample(measure(model, windows, measures=MEASURES))


def zoo(samples: int) -> None:
    """Print the shipped checkpoints and their twins; paired differences of loss to base.

    Args:
        samples: How many each is measured on.
    """
    print("| model | " + " | ".join(title for title, _ in COLUMNS.values()) + " |")
    print("|---" * (len(COLUMNS) + 1) + "|")
    losses, documents = {}, {}
    for name in VARIANTS:
        for target in (name, f"{name}@init"):
            signs = signs_of(target, samples, 256)
            clusters, values = clusters_of(signs), signs.set_index("sample")
            losses[target], documents[target] = values["loss"], clusters
            cells = [interval(values[s], clusters, digits) for s, (_, digits) in COLUMNS.items()]
            print(f"| {target} | " + " | ".join(cells) + " |", flush=True)
    print("\nloss − base, same samples:")
    for name in VARIANTS:
        if name != "base":
            print_difference(name, "base", losses, documents[name])
    for name in ("anchor_emb", "vanilla"):
        print_difference(name, "mesh", losses, documents["mesh"])


def print_difference(
    name: str, against: str, losses: dict[str, pd.Series], clusters: Clusters
) -> None:
    """Print how the losses of two models differ on the same samples.

    Args:
        name: Of the first.
        against: Of the second.
        losses: By model and sample.
        clusters: Which samples belong together.
    """
    d = paired_difference(losses[name], losses[against], clusters)
    if d is not None:
        numbers = written(d.mean, d.low, d.high, 3)
        print(f"| {name} − {against} | {numbers} | {d.n} samples, {d.documents} documents |")


def series(runs: list[Path], samples: int) -> None:
    """Print the step checkpoints of some runs.

    Args:
        runs: Their folders.
        samples: How many each checkpoint is measured on.
    """
    print("| model | step | " + " | ".join(title for title, _ in COLUMNS.values()) + " |")
    print("|---" * (len(COLUMNS) + 2) + "|")
    for run in runs:
        for folder in sorted(run.glob("step-*")):
            means = signs_of(str(folder), samples, 128)[list(COLUMNS)].mean()
            cells = [f"{means[sign]:.{digits}f}" for sign, (_, digits) in COLUMNS.items()]
            step = int(folder.name.removeprefix("step-"))
            print(f"| {run.name} | {step} | " + " | ".join(cells) + " |", flush=True)


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--series", type=Path, nargs="+")
    parser.add_argument("--samples", type=int, default=500)
    options = parser.parse_args()
    if options.series:
        series(options.series, min(options.samples, 100))
    else:
        zoo(options.samples)


if __name__ == "__main__":
    main()
