"""The small-scale study of docs/REPRODUCTION.md: 60 trainings, three seeds each, and its tables.

    python studies/small_scale.py train RUNS             # resumes; about an hour of one core
    python studies/small_scale.py train RUNS --part 1/2  # every second training, for two processes
    python studies/small_scale.py tables RUNS            # prints the tables as Markdown

All trainings see the same text, and those of one seed the same batches. Compute is matched: every
layout unrolls to five layers.
"""

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from zoo_signs import signs_of

from loopscope.text.corpus import load_corpus
from loopscope.training import TrainingData, plan_training, train_model
from loopscope.training.logs import LOG, read_log

SEEDS = (0, 1, 2)
LAYOUT = "1+1R3+1"
VARIANTS = ("vanilla", "base", "residual", "anchor", "anchor_emb", "mesh")
COMBINED = (
    "residual+anchor", "anchor+anchor_emb", "residual+anchor+anchor_emb", "static", "dynamic",
)  # fmt: skip
SLOTS = (4, 5, 7)  # 6 = K + 3 is among the variants
LAYOUTS = ("0+1R5+0", "0+1R4+1", "2+1R2+1")
RECIPE = {
    "d_model": 64, "n_heads": 2, "vocab": 2048, "seq_len": 128, "batch_size": 8,
    "tokens": 1_000_000, "lr": 3e-3, "dtype": "bfloat16",
}  # fmt: skip
SERIES = ("base", "mesh")  # their runs of seed 0 keep a checkpoint every 100 steps
SIGNS = {
    "first_share": "share of the first loop",
    "cka_biased": "CKA of consecutive states",
    "cka_debiased": "debiased",
    "erank_0": "effective rank of h(0)",
    "erank_K": "of h(K)",
}


@dataclass(frozen=True, kw_only=True)
class Run:
    """One training of the study."""

    variant: str
    seed: int
    layout: str = LAYOUT
    slots: int | None = None

    @property
    def folder(self) -> str:
        """Where it goes below RUNS."""
        kind = f"{self.layout}-B{self.slots}" if self.slots else self.layout
        return f"seed-{self.seed}/{kind}/{self.variant}"


def runs() -> Iterator[Run]:
    """All trainings of the study, those that matter most first."""
    for seed in SEEDS:
        yield from (Run(variant=v, seed=seed) for v in VARIANTS)
    for seed in SEEDS:
        yield from (Run(variant="mesh", seed=seed, slots=slots) for slots in SLOTS)
        yield from (Run(variant=v, seed=seed) for v in COMBINED)
    for seed in SEEDS:
        for layout in LAYOUTS:
            yield from (Run(variant=v, seed=seed, layout=layout) for v in ("base", "mesh"))


def train_all(out: Path, part: str) -> None:
    """Train what is not trained yet.

    Args:
        out: The folder RUNS.
        part: `i/n`: every n-th training, from the i-th on.
    """
    first, count = (int(number) for number in part.split("/"))
    text = TrainingData.from_corpus(load_corpus(), vocab=RECIPE["vocab"])
    for run in list(runs())[first - 1 :: count]:
        config = plan_training(
            [run.variant], layout=run.layout, slots=run.slots, seed=run.seed, **RECIPE
        )[run.variant]
        keep = 100 if run.variant in SERIES and run == Run(variant=run.variant, seed=0) else None
        command = f"python studies/small_scale.py train RUNS ({run.folder})"
        model = train_model(
            config, text, out / run.folder, half=True, keep_every=keep, tell=print,
            provenance={"command": command, "seed": run.seed},
        )  # fmt: skip
        print(f"{run.folder}  {model.provenance['val_loss']:.4f}", flush=True)


def results(out: Path) -> pd.DataFrame:
    """Validation loss and parameters of every finished training.

    Args:
        out: The folder RUNS.

    Returns:
        One row per training: the fields of `Run`, and `loss` in nats per token.
    """
    rows = []
    for run in runs():
        if not (out / run.folder / "config.json").exists():
            print(f"not trained: {run.folder}", file=sys.stderr)
            continue
        log = read_log(out / run.folder / LOG, whole=True)
        rows.append({**vars(run), "loss": log["val_loss"].iloc[-1]})
    return pd.DataFrame(rows)


def spread(values: pd.Series, digits: int = 3) -> str:
    """Mean and range over the seeds.

    Args:
        values: One per seed.
        digits: After the point.

    Returns:
        The three numbers as text.
    """
    return f"{values.mean():.{digits}f} [{values.min():.{digits}f}, {values.max():.{digits}f}]"


def loss_table(frame: pd.DataFrame, key: str, base: pd.Series) -> None:
    """Print loss, perplexity and the difference to base.

    Args:
        frame: From `results`.
        key: The column whose values are compared.
        base: Loss of base by seed, in the study's main layout.
    """
    print(f"| {key} | loss, nats | perplexity | loss − base {LAYOUT}, same seed | seeds |")
    print("|---|---|---|---|---|")
    order = frame.groupby(key)["loss"].mean().sort_values().index
    for name in order:
        loss = frame[frame[key].eq(name)].set_index("seed")["loss"]
        beside = spread(loss - base.reindex(loss.index))
        print(f"| {name} | {spread(loss)} | {spread(np.exp(loss), 2)} | {beside} | {len(loss)} |")


def sign_values(out: Path, samples: int) -> pd.DataFrame:
    """Signs of collapse, mean over samples, of each variant and seed, trained and untrained.

    Args:
        out: The folder RUNS.
        samples: How many each is measured on.

    Returns:
        One row per variant (`@init`: untrained) and seed.
    """
    rows = []
    for seed in SEEDS:
        for variant in VARIANTS:
            folder = out / Run(variant=variant, seed=seed).folder
            for twin in ("", "@init"):
                signs = signs_of(f"{folder}{twin}", samples, RECIPE["seq_len"], seed)
                means = signs[["loss", *SIGNS]].mean()
                rows.append({"variant": variant + twin, "seed": seed, **means})
    return pd.DataFrame(rows)


def sign_table(frame: pd.DataFrame) -> None:
    """Print each sign, mean and range over the seeds.

    Args:
        frame: From `sign_values`.
    """
    print("| variant | " + " | ".join(SIGNS.values()) + " |")
    print("|---" * (len(SIGNS) + 1) + "|")
    for variant in [name + twin for name in VARIANTS for twin in ("", "@init")]:
        rows = frame[frame["variant"].eq(variant)]
        cells = [spread(rows[s], 1 if s.startswith("erank") else 3) for s in SIGNS]
        print(f"| {variant} | " + " | ".join(cells) + " |")


def tables(out: Path, samples: int) -> None:
    """Print everything as Markdown.

    Args:
        out: The folder RUNS.
        samples: How many the signs are measured on.
    """
    losses = results(out)
    main = losses[losses["layout"].eq(LAYOUT) & losses["slots"].isna()]
    base = main[main["variant"].eq("base")].set_index("seed")["loss"]
    print("### Variants\n")
    loss_table(main[main["variant"].isin(VARIANTS)], "variant", base)
    print("\n### Table 3, slots\n")
    mesh = losses[losses["layout"].eq(LAYOUT) & losses["variant"].eq("mesh")].copy()
    mesh["B"] = mesh["slots"].fillna(6).astype(int)
    loss_table(mesh, "B", base)
    print("\n### Table 4, combinations\n")
    loss_table(main[~main["variant"].eq("vanilla")], "variant", base)
    print("\n### Layouts\n")
    layouts = losses[losses["variant"].isin(("base", "mesh")) & losses["slots"].isna()].copy()
    layouts["model"] = layouts["variant"] + " " + layouts["layout"]
    loss_table(layouts, "model", base)
    print("\n### Signs\n")
    sign_table(sign_values(out, samples))


def main() -> None:
    """Train, or print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("train", "tables"))
    parser.add_argument("runs", type=Path)
    parser.add_argument("--part", default="1/1")
    parser.add_argument("--samples", type=int, default=100)
    options = parser.parse_args()
    torch.set_num_threads(1)  # small models; several processes are faster
    if options.what == "train":
        train_all(options.runs, options.part)
    else:
        tables(options.runs, options.samples)


if __name__ == "__main__":
    main()
