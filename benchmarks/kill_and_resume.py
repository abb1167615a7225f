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
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

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


def main() -> int:
    """Run the comparison."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        return compare(Path(place), given.kills, random.Random(given.seed))


def compare(place: Path, kills: int, moments: random.Random) -> int:
    """Train once in peace, then under `kills` kills spread over as many trainings as that takes."""
    text = place / "text.txt"
    text.write_text("\n".join(f"def f{i}(x):\n    return x * {i * i}\n" for i in range(2500)))
    peace = run(place / "peace", text)
    wait_for_first_step(peace, place / "peace")
    began = time.monotonic()
    peace.wait()
    whole = time.monotonic() - began
    wanted = results(place / "peace")
    print(f"uninterrupted: {whole:.1f} s of training, {len(wanted)} files compared", flush=True)
    done = wrong = trainings = 0
    while done < kills:
        out = place / f"killed-{trainings}"
        trainings += 1
        told: list[str] = []
        while True:
            process = run(out, text)
            wait_for_first_step(process, out)
            try:
                process.wait(timeout=moments.uniform(0, whole) if done < kills else None)
                break
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGKILL)
                process.wait()
                done += 1
                told.append(progress(out))
        if process.returncode:
            print(f"the resumed training failed with exit code {process.returncode}")
            return 1
        found = results(out)
        differ = sorted(n for n in wanted | found if wanted.get(n) != found.get(n))
        wrong += bool(differ)
        verdict = f"DIFFERS in {', '.join(differ)}" if differ else "equal"
        print(f"killed at {', '.join(told) or 'no moment'}: {verdict}", flush=True)
    print(f"{done} kills, {wrong} trainings that ended differently")
    return 1 if wrong else 0


def run(out: Path, text: Path) -> "subprocess.Popen[bytes]":
    """Start the command."""
    command = [sys.executable, "-m", "loopscope.cli", *COMMAND]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*command, "--out", str(out), "--data", str(text)], env=environment,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip


def wait_for_first_step(process: "subprocess.Popen[bytes]", out: Path) -> None:
    """Until the training has begun (its log exists) or the process has ended."""
    before = {path: path.stat().st_mtime_ns for path in out.glob("*/log.csv")}
    while process.poll() is None:
        now = {path: path.stat().st_mtime_ns for path in out.glob("*/log.csv")}
        if now != before:
            return
        time.sleep(0.01)


def progress(out: Path) -> str:
    """The last row of the log that was being written."""
    logs = sorted(out.glob("*/log.csv"), key=lambda path: path.stat().st_mtime_ns)
    last = logs[-1].read_text().splitlines()[-1].split(",")[0]
    return f"{logs[-1].parent.name} {last}"


def results(out: Path) -> dict[str, str]:
    """A hash of each result: weights, configurations, tokenizers, logs."""
    found = {}
    for path in sorted(out.rglob("*")):
        if path.suffix == ".csv":
            with path.open(newline="") as file:
                rows = [{**row, NOT_COMPARED: ""} for row in csv.DictReader(file)]
            found[str(path.relative_to(out))] = hashlib.sha256(repr(rows).encode()).hexdigest()
        elif path.is_file() and path.name != "provenance.json":
            found[str(path.relative_to(out))] = hashlib.sha256(path.read_bytes()).hexdigest()
        elif path.is_file():
            found[str(path.relative_to(out))] = "there"
    return found


if __name__ == "__main__":
    sys.exit(main())
