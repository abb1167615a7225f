"""What the two benchmarks that kill share: a command killed and given again until it ends."""

import argparse
import random
import signal
import subprocess
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

Process = subprocess.Popen[bytes]


def options(doc: str) -> argparse.Namespace:
    """Read --kills and --seed.

    Args:
        doc: The benchmark's docstring.

    Returns:
        What was typed.
    """
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def kill(
    place: Path,
    arguments: argparse.Namespace,
    *,
    whole: float,
    start: Callable[[Path], Process],
    progress: Callable[[Path], str],
    wrong_in: Callable[[Path], list[str]],
) -> int:
    """Kill a command at random moments, spread over as many folders as that takes.

    Args:
        place: Where the folders go.
        arguments: From `options`.
        whole: Seconds that an uninterrupted run takes from when `start` returns.
        start: Gives the command for a folder; returns when it may be killed.
        progress: How far a folder came, in words.
        wrong_in: What differs in a folder from the uninterrupted one.

    Returns:
        The exit code: 0 where every folder ended as it should.
    """
    moments = random.Random(arguments.seed)
    done = wrong = runs = 0
    while done < arguments.kills:
        out = place / f"killed-{runs}"
        runs += 1
        progresses: list[str] = []
        while True:
            process = start(out)
            try:
                end = moments.uniform(0, whole) if done < arguments.kills else None
                process.wait(timeout=end)
                break
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGKILL)
                process.wait()
                done += 1
                progresses.append(progress(out))
        if process.returncode:
            print(f"given again, the command failed with exit code {process.returncode}")
            return 1
        differ = wrong_in(out)
        wrong += bool(differ)
        verdict = f"DIFFERS in {', '.join(differ)}" if differ else "equal"
        print(f"killed at {', '.join(progresses) or 'no moment'}: {verdict}", flush=True)
    print(f"{done} kills, {wrong} of {runs} runs ended differently")
    return 1 if wrong else 0


def in_a_folder(run: Callable[[Path, argparse.Namespace], int], doc: str) -> int:
    """Run a benchmark in a temporary folder.

    Args:
        run: The benchmark: of the folder and what was typed, to an exit code.
        doc: Its docstring.

    Returns:
        The exit code.
    """
    arguments = options(doc)
    with tempfile.TemporaryDirectory() as place:
        return run(Path(place), arguments)


def different(
    expected: Mapping[str, Any], actual: Mapping[str, Any], same: Callable[[Any, Any], bool]
) -> list[str]:
    """Compare contents by name.

    Args:
        expected: The contents as they should be.
        actual: As they are.
        same: Whether two contents are equal.

    Returns:
        Names whose contents differ, or that only one of both has.
    """
    both = expected.keys() & actual.keys()
    return [
        name
        for name in sorted({*expected, *actual})
        if name not in both or not same(expected[name], actual[name])
    ]
