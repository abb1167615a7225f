"""Provenance: which versions and which commit a result was computed with."""

import platform
import subprocess
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from loopscope._version import __version__

VERSIONED = ("torch", "transformer-lens", "transformers", "tokenizers", "safetensors", "numpy")


def versions() -> dict[str, str | None]:
    """Versions of this package, of what computes for it, and of Python."""
    installed: dict[str, str | None] = {
        "loopscope": __version__,
        "python": platform.python_version(),
    }
    for package in VERSIONED:
        try:
            installed[package] = version(package)
        except PackageNotFoundError:
            installed[package] = None
    return installed


@cache
def commit() -> str | None:
    """The git commit of the checkout that this package runs from; None where there is none."""
    root = Path(__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return None
    try:
        done = subprocess.run(
            ["git", "-C", str(root), "rev-parse", "--verify", "--quiet", "HEAD"],
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None
