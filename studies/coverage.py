"""How often 95 % intervals hold the true mean, by windows and by document (docs/COLLAPSE.md).

    python studies/coverage.py    # about four minutes of one idle CPU thread

Prints a Markdown table. "windows": Student's t over windows, as if they were independent (the
BCa bootstrap over windows holds it as often, or less). "documents": the interval of
`loopscope.analysis.collapse`, which resamples documents. "test": of the cluster-robust t-test, that
is 100 % less its rate of false positives. Texts of so many documents are drawn from

* simulated documents: skewed effects of document and window, intra-class correlation 0.1 to 0.5;
  sizes as in the zoo's files, 1 to 9 windows;
* the 92 files of the shipped held-out samples, with the losses of base and mesh.

Standard errors are at most 0.8 %, and 0.7 % where documents are resampled.
"""

import argparse
from collections.abc import Callable
from functools import partial
from importlib.resources import files

import numpy as np
import pandas as pd

from loopscope.analysis.collapse.clusters import LEVEL, Totals, t_interval
from loopscope.analysis.measuring.streaming import measure
from loopscope.models.opening.loading import load
from loopscope.text.windows import load_samples

DOCUMENTS = (8, 16, 30, 60, 92, 200)
CORRELATIONS = (0.1, 0.3, 0.5)
SEED = 0

Text = tuple[np.ndarray, np.ndarray]
"""The windows' values, and the number of each one's document."""
Draw = Callable[[int, np.random.Generator], Text]
"""A text of so many documents."""


def zoo_losses() -> pd.DataFrame:
    """Measure base and mesh on the shipped held-out samples.

    Returns:
        One row per window: base, mesh and the difference of their losses, and the file.
    """
    losses = {}
    for name in ("base", "mesh"):
        model = load(name)
        windows = load_samples(model)
        table = measure(model, windows, measures=["loss"]).loss
        assert table is not None
        losses[name] = table.set_index("sample")["value"].sort_index().to_numpy()
    length = windows.tokens.shape[1]
    pieces = pd.read_parquet(str(files("loopscope") / "zoo" / "heldout.parquet"))
    file_of = {}
    for text, file in zip(pieces["text"], pieces["file"], strict=True):
        ids = np.array(model.tokenizer.encode(text, add_special_tokens=False).ids, dtype=np.int64)
        for start in range(0, len(ids) - length + 1, length):
            file_of[ids[start : start + length].tobytes()] = file
    origins = [file_of[row.tobytes()] for row in windows.tokens.numpy()]
    return pd.DataFrame({**losses, "difference": losses["mesh"] - losses["base"], "file": origins})


def drawn_files(values: list[np.ndarray], documents: int, random: np.random.Generator) -> Text:
    """Draw files with replacement.

    Args:
        values: Of the windows of each file.
        documents: How many to draw.
        random: Draws them.

    Returns:
        The text.
    """
    drawn = [values[i] for i in random.integers(len(values), size=documents)]
    return np.concatenate(drawn), np.repeat(np.arange(documents), [len(part) for part in drawn])


def simulated(
    correlation: float,
    sizes: np.ndarray,
    paired: bool,
    documents: int,
    random: np.random.Generator,
) -> Text:
    """Draw documents whose windows are alike; the true mean is 0.

    Args:
        correlation: Of two windows of one document.
        sizes: Windows per document, to draw from.
        paired: Whether to give differences of two models, of which one varies twice as much.
        documents: How many to draw.
        random: Draws them.

    Returns:
        The text.
    """

    def effects(n: int) -> np.ndarray:  # exponential, mean 0: skewness 2
        shift = random.exponential(size=n) - 1
        return shift - (random.exponential(size=n) - 1) / 2 if paired else shift

    labels = np.repeat(np.arange(documents), random.choice(sizes, documents))
    between, within = effects(documents)[labels], effects(len(labels))
    return np.sqrt(correlation) * between + np.sqrt(1 - correlation) * within, labels


def coverage(draw: Draw, truth: float, documents: int, repetitions: int) -> dict[str, float]:
    """Draw texts, and count how often intervals hold the true mean.

    Args:
        draw: Gives a text.
        truth: The mean of what it draws from.
        documents: In each text.
        repetitions: Texts; only every second is resampled by document, which takes time.

    Returns:
        The share in percent, by kind of interval.
    """
    random = np.random.default_rng(SEED)
    hits: dict[str, list[bool]] = {"windows": [], "documents": [], "test": []}
    for i in range(repetitions):
        values, labels = draw(documents, random)
        n, totals = len(values), Totals.of(values, labels)
        t = t_interval(values.mean(), values.std(ddof=1) / np.sqrt(n), n - 1)
        test = t_interval(totals.mean, totals.error, totals.freedom)
        hits["windows"].append(t.low <= truth <= t.high)
        hits["test"].append(test.low <= truth <= test.high)
        if i % 2 == 0:
            resampled = totals.interval
            hits["documents"].append(resampled.low <= truth <= resampled.high)
    return {kind: 100 * float(np.mean(shares)) for kind, shares in hits.items()}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repetitions", type=int, default=4000)
    repetitions = parser.parse_args().repetitions
    zoo = zoo_losses()
    sizes = zoo.groupby("file").size().to_numpy()
    sources: list[tuple[str, Draw, float]] = []
    for paired in (False, True):
        for r in CORRELATIONS:
            name = f"{'difference' if paired else 'mean'}, simulated, correlation {r}"
            sources.append((name, partial(simulated, r, sizes, paired), 0.0))
        for column in ("difference",) if paired else ("base", "mesh"):
            name = "difference, zoo, mesh − base" if paired else f"mean, zoo, loss of {column}"
            values = [part.to_numpy() for _, part in zoo.groupby("file")[column]]
            sources.append((name, partial(drawn_files, values), float(zoo[column].mean())))
    print(f"nominal {100 * LEVEL:.0f} %; shares in percent\n")
    print("| of | by | " + " | ".join(f"{G} documents" for G in DOCUMENTS) + " |")
    print("|---" * (len(DOCUMENTS) + 2) + "|")
    for name, draw, truth in sources:
        shares = [coverage(draw, truth, G, repetitions) for G in DOCUMENTS]
        for kind in ("windows", "documents", "test"):
            cells = [f"{share[kind]:.1f}" for share in shares]
            print(f"| {name} | {kind} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
