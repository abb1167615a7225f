"""The tables of docs/FINDINGS.md: lenses, probes, interventions and orbits of trained loops.

    python studies/inside.py zoo OUT           # the shipped checkpoints and their untrained twins
    python studies/inside.py seeds RUNS OUT  # four variants of studies/small_scale.py
    python studies/inside.py tables OUT        # prints what was measured as Markdown

What was measured stays in OUT (`compare` goes on where it was stopped). Every number is a mean over
samples with its 95 % interval by document; of the seeds the mean of each is shown.
"""

import argparse
from pathlib import Path

import pandas as pd
from scipy import stats

from loopscope.analysis.comparisons import compare
from loopscope.analysis.tables import INSIDE_MEASURES, Tables
from loopscope.analysis.tables.aggregate import with_errors

ZOO = ("base", "residual", "anchor", "mesh")
SEEDS = (0, 1, 2)
SHOWN = (
    ("lens", ["kind", "state"], ["loss", "kl_final", "top_final"]),
    ("probe", ["labels", "target", "control"], ["score"]),
    ("effect", ["kind", "what", "how", "routers"], ["loss", "mass"]),
    (
        "orbit",
        ["part", "view", "t"],
        ["size", "cosine", "rate", "contraction", "settles", "drifts"],
    ),
    ("early_exit", ["rule", "threshold"], ["iterations", "loss"]),
)
"""Table, the columns that tell its rows apart, the values shown."""


def measure(targets: list[str], out: Path, samples: int, tokens: int) -> None:
    """Look inside models and store the tables.

    Args:
        targets: What `load` takes.
        out: The folder.
        samples: Windows.
        tokens: Tokens per window.
    """
    comparison = compare(
        targets, out=out, measures=INSIDE_MEASURES, samples=samples, tokens=tokens, twins=True,
        series=False, write=lambda result, folder: result.tables.save(folder / "tables"),
        progress=lambda model, done, total: print(model, done, total, flush=True),
    )  # fmt: skip
    for failure in comparison.failed:
        print("not measured:", *failure)


def print_tables(out: Path) -> None:
    """Print every table as Markdown.

    Args:
        out: The folder of the tables.
    """
    tables = Tables.load(out / "tables")
    for name, keys, values in SHOWN:
        frame = getattr(tables, name)
        if frame is None or frame.empty:
            continue
        print(f"\n### {name}\n\n| model | {' | '.join(keys + values)} |")
        print("|---" * (1 + len(keys) + len(values)) + "|")
        cells = [cells_of(frame, keys, value) for value in values]
        for row in pd.concat(cells, axis=1).itertuples():
            print(f"| {' | '.join(map(str, [*row.Index, *row[1:]]))} |")


def cells_of(frame: pd.DataFrame, keys: list[str], value: str) -> pd.Series:
    """Write the mean of a value with its 95 % interval, by row of a table.

    Args:
        frame: The table.
        keys: The columns that tell its rows apart.
        value: The column that is averaged.

    Returns:
        `2.420 [2.371, 2.471]` by model and keys.
    """
    means = with_errors(frame, keys, value).set_index(["model", *keys])
    half = means["error"] * stats.t.ppf(0.975, means["clusters"] - 1)
    low, high = means["mean"] - half, means["mean"] + half
    texts = [
        f"{mean:.3f} [{a:.3f}, {b:.3f}]".replace("-", "−")
        for mean, a, b in zip(means["mean"], low, high, strict=True)
    ]
    return pd.Series(texts, means.index, name=value)


def main() -> None:
    """Measure, or print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["zoo", "seeds", "tables"])
    parser.add_argument("folders", type=Path, nargs="+")
    parser.add_argument("--samples", type=int, default=200)
    options = parser.parse_args()
    if options.what == "tables":
        print_tables(options.folders[0])
    elif options.what == "zoo":
        measure(["vanilla", *ZOO], options.folders[0], options.samples, 256)
    else:
        runs, out = options.folders
        for seed in SEEDS:
            targets = [str(runs / f"seed-{seed}" / "1+1R3+1" / name) for name in ZOO]
            measure(targets, out / f"seed-{seed}", options.samples, 128)


if __name__ == "__main__":
    main()
