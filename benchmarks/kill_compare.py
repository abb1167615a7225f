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
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pandas as pd

COMMAND = ["compare", "base", "mesh", "--samples", "256", "--tokens", "32", "--batch-size", "16"]


def main() -> int:
    """Run the comparison."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        return kill(Path(place), given.kills, random.Random(given.seed))


def kill(place: Path, kills: int, moments: random.Random) -> int:
    """Compare once in peace, then under `kills` kills spread over as many folders as that takes."""
    began = time.monotonic()
    if start(place / "peace").wait():
        print("the uninterrupted comparison failed")
        return 1
    whole = time.monotonic() - began
    wanted = results(place / "peace")
    print(f"uninterrupted: {whole:.1f} s, {len(wanted)} tables compared", flush=True)
    done = wrong = comparisons = 0
    while done < kills:
        out = place / f"killed-{comparisons}"
        comparisons += 1
        told: list[str] = []
        while True:
            process = start(out)
            try:
                process.wait(timeout=moments.uniform(0, whole) if done < kills else None)
                break
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGKILL)
                process.wait()
                done += 1
                told.append(progress(out))
        if process.returncode:
            print(f"the resumed comparison failed with exit code {process.returncode}")
            return 1
        found = results(out)
        differ = [n for n in wanted if n not in found or not wanted[n].equals(found[n])]
        wrong += bool(differ or found.keys() != wanted.keys() or (out / ".shards").exists())
        verdict = f"DIFFERS in {', '.join(differ)}" if differ else "equal"
        print(f"killed at {', '.join(told) or 'no moment'}: {verdict}", flush=True)
    print(f"{done} kills, {wrong} comparisons that ended differently")
    return 1 if wrong else 0


def start(out: Path) -> "subprocess.Popen[bytes]":
    """Give the command."""
    return subprocess.Popen(
        [sys.executable, "-m", "loopscope.cli", *COMMAND, "--out", str(out)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip


def progress(out: Path) -> str:
    """How far it came."""
    shards = len(list(out.glob(".shards/*/*.shard")))
    tables = len(list(out.glob("tables/*.parquet")))
    figures = len(list(out.glob("figures/*.png")))
    return f"{shards} shards" + (f" {tables} tables {figures} figures" if tables else "")


def results(out: Path) -> dict[str, pd.DataFrame]:
    """The content of each table."""
    tables = {path.name: pd.read_parquet(path) for path in sorted(out.glob("tables/*.parquet"))}
    return tables | {"signs.csv": pd.read_csv(out / "tables" / "signs.csv")}


if __name__ == "__main__":
    sys.exit(main())
