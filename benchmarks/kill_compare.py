"""Kill a comparison at random moments and give it again: does it end with the same tables?

    python benchmarks/kill_compare.py              # 20 kills; exit code 1 if it does not
    python benchmarks/kill_compare.py --kills 5 --seed 7

The command is `loopscope compare` over two zoo models and their untrained twins in a process of its
own, killed with SIGKILL at moments drawn uniformly over an uninterrupted run, the start of Python
and the drawing of the figures included; the same command is then given again until it ends. All
Parquet tables and signs.csv are compared for equality of their content.
"""

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
from killing import Process, different, in_a_folder, kill

COMMAND = ["compare", "base", "mesh", "--samples", "256", "--tokens", "32", "--batch-size", "16"]


def run(place: Path, arguments: argparse.Namespace) -> int:
    """Compare once in peace, then under kills.

    Args:
        place: Where the folders go.
        arguments: From `killing.options`.

    Returns:
        The exit code.
    """
    began = time.monotonic()
    if start(place / "peace").wait():
        print("the uninterrupted comparison failed")
        return 1
    whole = time.monotonic() - began
    expected = results(place / "peace")
    print(f"uninterrupted: {whole:.1f} s, {len(expected)} tables compared", flush=True)

    def wrong_in(out: Path) -> list[str]:
        left = [".shards"] if (out / ".shards").exists() else []
        return different(expected, results(out), pd.DataFrame.equals) + left

    return kill(place, arguments, whole=whole, start=start, progress=progress, wrong_in=wrong_in)


def start(out: Path) -> Process:
    """Give the command.

    Args:
        out: The output folder.

    Returns:
        Its process.
    """
    return subprocess.Popen(
        [sys.executable, "-m", "loopscope.cli", *COMMAND, "--out", str(out)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip


def progress(out: Path) -> str:
    """Look how far it came.

    Args:
        out: The output folder.

    Returns:
        How far, in words.
    """
    shards = len(list(out.glob(".shards/*/*.shard")))
    tables = len(list(out.glob("tables/*.parquet")))
    figures = len(list(out.glob("figures/*.png")))
    return f"{shards} shards" + (f" {tables} tables {figures} figures" if tables else "")


def results(out: Path) -> dict[str, pd.DataFrame]:
    """Read the tables.

    Args:
        out: The output folder.

    Returns:
        The content of each, by file name.
    """
    tables = {path.name: pd.read_parquet(path) for path in sorted(out.glob("tables/*.parquet"))}
    return tables | {"signs.csv": pd.read_csv(out / "tables" / "signs.csv")}


if __name__ == "__main__":
    sys.exit(in_a_folder(run, __doc__ or ""))
