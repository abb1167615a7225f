"""Kill a training at random moments and resume it: does it end as the uninterrupted one?

    python benchmarks/kill_and_resume.py              # 20 kills; exit code 1 if it does not
    python benchmarks/kill_and_resume.py --kills 5 --seed 7

The training is `loopscope train` in a process of its own, killed with SIGKILL at moments drawn
uniformly between its first step and its end; the same command is then given again until it ends.
Compared are the weights, the step checkpoints and every column of log.csv but tokens_per_s, all for
equality.
"""

import argparse
import csv
import hashlib
import os
import subprocess
import sys
import time
from functools import partial
from operator import eq
from pathlib import Path

from killing import Process, different, in_a_folder, kill

COMMAND = [
    "train",
    "--variants",
    "base,mesh",
    "--layout",
    "1+1R3+1",
    "--d-model",
    "32",
    "--heads",
    "1",
    "--vocab",
    "300",
    "--seq-len",
    "32",
    "--batch-size",
    "4",
    "--tokens",
    "12800",
    "--eval-every",
    "20",
    "--keep-every",
    "25",
    "--save-seconds",
    "0.02",
    "--device",
    "cpu",
]
NOT_COMPARED = "tokens_per_s"


def run(place: Path, options: argparse.Namespace) -> int:
    """Train once in peace, then under kills.

    Args:
        place: Where the folders go.
        options: From `killing.options`.

    Returns:
        The exit code: 0 where every training ended as the uninterrupted one.
    """
    text = place / "text.txt"
    text.write_text("\n".join(f"def f{i}(x):\n    return x * {i * i}\n" for i in range(2500)))
    peace = begin(place / "peace", text)
    began = time.monotonic()
    peace.wait()
    whole = time.monotonic() - began
    reference = results(place / "peace")
    print(f"uninterrupted: {whole:.1f} s of training, {len(reference)} files compared", flush=True)
    return kill(
        place, options, whole=whole, start=partial(begin, text=text), progress=progress,
        wrong_in=lambda out: different(reference, results(out), eq),
    )  # fmt: skip


def begin(out: Path, text: Path) -> Process:
    """Give the command; returns at its first step.

    Args:
        out: Where it writes.
        text: What it trains on.

    Returns:
        The running command.
    """
    process = start(out, text)
    wait_for_first_step(process, out)
    return process


def start(out: Path, text: Path) -> Process:
    """Start the command.

    Args:
        out: Where it writes.
        text: What it trains on.

    Returns:
        The command, perhaps before its first step.
    """
    command = [sys.executable, "-m", "loopscope.cli", *COMMAND]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*command, "--out", str(out), "--data", str(text)], env=environment,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip


def wait_for_first_step(process: Process, out: Path) -> None:
    """Until the training has begun (its log exists) or the process has ended.

    Args:
        process: The command.
        out: Where it writes.
    """
    before = {path: path.stat().st_mtime_ns for path in out.glob("*/log.csv")}
    while process.poll() is None:
        now = {path: path.stat().st_mtime_ns for path in out.glob("*/log.csv")}
        if now != before:
            return
        time.sleep(0.01)


def progress(out: Path) -> str:
    """How far a training came.

    Args:
        out: Where it wrote.

    Returns:
        The variant and the last step of the log that was being written.
    """
    logs = sorted(out.glob("*/log.csv"), key=lambda path: path.stat().st_mtime_ns)
    last = logs[-1].read_text().splitlines()[-1].split(",")[0]
    return f"{logs[-1].parent.name} {last}"


def results(out: Path) -> dict[str, str]:
    """A hash of each result: weights, configurations, tokenizers, logs.

    Args:
        out: Where a training wrote.

    Returns:
        Path below `out` → hash; of `provenance.json`, which differs, that it is there.
    """
    hashes = {}
    for path in sorted(out.rglob("*")):
        if path.suffix == ".csv":
            with path.open(newline="") as file:
                rows = [{**row, NOT_COMPARED: ""} for row in csv.DictReader(file)]
            hashes[str(path.relative_to(out))] = hashlib.sha256(repr(rows).encode()).hexdigest()
        elif path.is_file() and path.name != "provenance.json":
            hashes[str(path.relative_to(out))] = hashlib.sha256(path.read_bytes()).hexdigest()
        elif path.is_file():
            hashes[str(path.relative_to(out))] = "there"
    return hashes


if __name__ == "__main__":
    sys.exit(in_a_folder(run, __doc__ or ""))
