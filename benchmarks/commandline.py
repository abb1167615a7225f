"""Time and memory of the command line: `python benchmarks/commandline.py`.

Prints a markdown table: start-up of `loopscope --help`, and wall time of `loopscope figures` (four
models of the zoo, 256 tokens) with 50 and with 500 samples; then the peak memory of measuring the
same models with `measure`, each in a process of its own, against the size of the returned tables.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

MEASURE = """
import json, resource, sys
import loopscope as ls
comparison = ls.compare(["base", "residual", "anchor", "mesh"], samples=int(sys.argv[1]))
size = sum(int(f.memory_usage(deep=True).sum()) for f in comparison.tables.frames().values())
print(json.dumps([resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, size]))
"""


def timed(command: list[str]) -> float:
    """Time a command, start-up included.

    Args:
        command: Its words.

    Returns:
        Wall seconds.
    """
    began = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    return time.perf_counter() - began


def main() -> None:
    """Print the table."""
    program = str(Path(sys.executable).parent / "loopscope")
    print(f"{os.cpu_count()} cores\n\n| what | measured | target |\n|---|---|---|")
    helped = sorted(timed([program, "--help"]) for _ in range(7))[3]
    print(f"| `loopscope --help`, median of 7 | {helped:.2f} s | < 0.5 s |")
    with tempfile.TemporaryDirectory() as folder:
        for samples in (50, 500):
            took = timed([program, "figures", "--out", folder, "--samples", str(samples)])
            target = "about 90 s" if samples == 500 else ""
            print(f"| `loopscope figures`, {samples} × 256 tokens | {took:.1f} s | {target} |")
    peaks = []
    for samples in (50, 500):
        command = [sys.executable, "-c", MEASURE, str(samples)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        peaks.append(json.loads(done.stdout.splitlines()[-1]))
    (few, small), (many, large) = peaks
    print(
        f"| peak memory, 500 against 50 samples | {(many - few) / 1e6:+.1f} MB "
        f"| ≤ {(large - small) / 1e6:.1f} MB, the growth of the tables |"
    )
    print(f"| tables of four models, 500 samples | {large / 1e6:.1f} MB | ≤ 64 MB |")


if __name__ == "__main__":
    main()
