"""Whether another revision gives the same figures, tables, reports and terminal output.

    python benchmarks/same_results.py REVISION              # against the working tree
    python benchmarks/same_results.py REVISION --samples 500 --keep DIR

Both run the same commands on the same inputs: `figures` on the zoo, `compare` on the zoo, on a
series of step checkpoints that the revision trains, on a wrapped family (ALBERT saved by
transformers) beside a looped module of one's own; `inspect` and `params` on each kind of model; and
a training. Every file that they leave is compared byte for byte. Only what tells when, where and
from which commit it was made is set aside: `commit`, `stamp` (times of files, a hash of code),
`folder` and the speed of a training in provenance and logs, and the commit in the report.
"""

import argparse
import csv
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from html import unescape
from io import BytesIO
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
import transformers

ROOT = Path(__file__).resolve().parents[1]
METADATA = b"loopscope"
MODULE = '''
import torch
from torch import nn


class Mixed(nn.Module):
    """Two layers that are looped four times, with a gate."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(64, 32)
        self.core = nn.ModuleList([
            nn.TransformerEncoderLayer(32, 4, 48, dropout=0.0, batch_first=True) for _ in range(2)
        ])
        self.gate = nn.Linear(32, 1)
        self.norm = nn.LayerNorm(32)
        self.head = nn.Linear(32, 64)
        self.num_steps = 4

    def forward(self, tokens):
        x = self.embed(tokens)
        mask = nn.Transformer.generate_square_subsequent_mask(tokens.shape[1])
        for _ in range(self.num_steps):
            for layer in self.core:
                x = layer(x, src_mask=mask, is_causal=True)
            self.gate(x)
        return self.head(self.norm(x))


def make():
    torch.manual_seed(0)
    return Mixed().eval()
'''
TRAINING = [
    "train", "--variants", "base", "--layout", "1+1R3+1", "--tokens", "40960",
    "--d-model", "32", "--vocab", "512", "--seq-len", "64", "--keep-every", "20", "--data",
    "text.txt", "--monitor-every", "20",
]  # fmt: skip


def commands(samples: int) -> dict[str, list[str]]:
    """List the commands.

    Args:
        samples: How many they measure.

    Returns:
        Name of a folder to the command that writes into it; others only print.
    """
    small, ids = ["--samples", str(samples)], ["--data", "ids.npy", "--tokens", "32"]
    return {
        "figures": ["figures", *small],
        "twins": ["figures", "mesh", "mesh@init", "vanilla", *small, "--tokens", "64", "--center"],
        "logs": ["figures", "--paper-extra"],
        "zoo": ["compare", "base", "mesh", "residual", "vanilla", *small, "--tokens", "64"],
        "series": ["compare", "runs/base", "mesh", *small, "--tokens", "64"],
        "wrapped": ["compare", "albert", "own.py:make", *small, *ids],
        "inspect-mesh": ["inspect", "mesh", "--hooks"],
        "inspect-albert": ["inspect", "albert", "--json"],
        "inspect-own": ["inspect", "own.py:make", "--hooks", "--write-spec", "own.toml"],
        "params": ["params", "own.py:make", "--json"],
        "params-paper": ["params"],
        "trained": TRAINING,
    }


def main() -> int:
    """Run the comparison."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("revision")
    parser.add_argument("--samples", type=int, default=48)
    parser.add_argument("--keep", type=Path, help="folder for what the commands leave")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(options.keep or temporary).resolve()
        before, now = place / "before", place / "now"
        if not before.exists():
            with checkout(options.revision) as code:
                inputs(before, code)
                run_all(before, code, options.samples)
        now.mkdir(parents=True, exist_ok=True)
        for path in before.iterdir():  # the same inputs: times of files are part of a stamp
            if path.name in INPUTS and not (now / path.name).exists():
                (now / path.name).symlink_to(path)
        run_all(now, ROOT, options.samples)
        return report(before, now, list(commands(options.samples)))


ASIDE = ("commit", "stamp", "folder", "seconds", "tokens_per_s")
INPUTS = ("ids.npy", "own.py", "albert", "runs", "text.txt")


@contextmanager
def checkout(revision: str) -> Iterator[Path]:
    """Have the files of a revision while the context lasts.

    Args:
        revision: As git names it.

    Yields:
        Their folder.
    """
    with tempfile.TemporaryDirectory() as temporary:
        git, folder = ["git", "-C", str(ROOT), "worktree"], str(Path(temporary) / "code")
        subprocess.run([*git, "add", "-q", "--detach", folder, revision], check=True)
        try:
            yield Path(folder)
        finally:
            subprocess.run([*git, "remove", "--force", folder], check=True)


def inputs(place: Path, code: Path) -> None:
    """Make a text, token ids, a wrapped family, a module, and a series that the revision trains.

    Args:
        place: Folder to be made.
        code: Of the revision.
    """
    import numpy as np

    place.mkdir(parents=True)
    (place / "own.py").write_text(MODULE)
    lines = (f"def f{i}(x):\n    return x * {i * i}\n" for i in range(4000))
    (place / "text.txt").write_text("\n".join(lines))
    np.save(place / "ids.npy", np.random.default_rng(0).integers(0, 61, (500, 32)))
    torch.manual_seed(0)
    config = transformers.AlbertConfig(
        vocab_size=64, embedding_size=16, hidden_size=32, intermediate_size=48,
        num_attention_heads=4, num_hidden_layers=4, max_position_embeddings=64,
    )  # fmt: skip
    transformers.AlbertForMaskedLM(config).save_pretrained(place / "albert")
    call(place, code, [*TRAINING, "--out", "runs"])


def run_all(place: Path, code: Path, samples: int) -> None:
    """Run every command, its output beside its folder.

    Args:
        place: Where the inputs are.
        code: Of the revision.
        samples: How many are measured.
    """
    for name, words in commands(samples).items():
        print(f"{place.name}: {' '.join(words)}", flush=True)
        writes = words[0] in ("figures", "compare", "train")
        (place / "own.toml").unlink(missing_ok=True)
        printed = call(place, code, [*words, *(["--out", name] if writes else [])])
        (place / f"{name}.txt").write_text(printed)


def call(place: Path, code: Path, words: list[str]) -> str:
    """Run a command in a folder.

    Args:
        place: The folder.
        code: Of the revision.
        words: The command.

    Returns:
        What it prints.
    """
    done = subprocess.run(
        [sys.executable, "-m", "loopscope.cli", *words], cwd=place, text=True, capture_output=True,
        env={**os.environ, "PYTHONPATH": str(code), "COLUMNS": "100"},
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(f"{' '.join(words)} failed:\n{done.stderr}")
    return done.stdout


def report(before: Path, now: Path, names: list[str]) -> int:
    """Compare all files, and print which differ.

    Args:
        before: Folder of the revision.
        now: Folder of the working tree.
        names: Folders of the commands.

    Returns:
        The exit code.
    """
    files = {side: dict(results(side, names)) for side in (before, now)}
    differ = [
        name
        for name in sorted({*files[before], *files[now]})
        if files[before].get(name) != files[now].get(name)
    ]
    for name in differ:
        sides = [side.name for side in (before, now) if name in files[side]]
        print(f"DIFFERS: {name}" + ("" if len(sides) == 2 else f" (only {sides[0]})"))
    print(f"{len(files[before])} files, {len(differ)} differ")
    return 1 if differ else 0


def results(side: Path, names: list[str]) -> Iterator[tuple[str, bytes]]:
    """Read files, rid of what tells when, where and from which commit they are.

    Args:
        side: Folder of one revision.
        names: Folders of the commands.

    Yields:
        Name and content.
    """
    for name in names:
        yield f"{name}.txt", (side / f"{name}.txt").read_bytes()
        for path in sorted((side / name).rglob("*")) if (side / name).is_dir() else ():
            if path.is_file() and path.name != ".lock":
                clean = CLEAN.get(path.suffix, lambda content: content)
                yield str(path.relative_to(side)), clean(path.read_bytes())


def clean_json(content: bytes) -> bytes:
    """Take commits, stamps and folders out of JSON.

    Args:
        content: Of a file.

    Returns:
        The rest.
    """
    return json.dumps(without(json.loads(content)), ensure_ascii=False, indent=1).encode()


def clean_parquet(content: bytes) -> bytes:
    """Write a table anew, commits, stamps and folders gone from its provenance.

    Args:
        content: Of a file.

    Returns:
        The rest.
    """
    table = pq.read_table(BytesIO(content))
    metadata = dict(table.schema.metadata)
    metadata[METADATA] = clean_json(metadata[METADATA])
    written = BytesIO()
    pq.write_table(table.replace_schema_metadata(metadata), written, compression="zstd")
    return written.getvalue()


def clean_html(content: bytes) -> bytes:
    """Take commits out of a report, and stamps and folders out of its provenance, JSON in <pre>.

    Args:
        content: Of a file.

    Returns:
        The rest.
    """

    def cleaned(block: re.Match[str]) -> str:
        return json.dumps(without(json.loads(unescape(block[1]))), ensure_ascii=False)

    text = re.sub(r"\b[0-9a-f]{40}\b", "COMMIT", content.decode())
    return re.sub(r"<pre>(\{.*?\})</pre>", cleaned, text, flags=re.S).encode()


def clean_csv(content: bytes) -> bytes:
    """A table without the speed of a training."""
    rows = list(csv.DictReader(content.decode().splitlines()))
    return json.dumps(
        [{k: v for k, v in row.items() if k != "tokens_per_s"} for row in rows]
    ).encode()


CLEAN: dict[str, Callable[[bytes], bytes]] = {
    ".json": clean_json,
    ".parquet": clean_parquet,
    ".html": clean_html,
    ".csv": clean_csv,
}


def without(value: Any) -> Any:
    """Take commits, stamps and folders out of a JSON value.

    Args:
        value: The value.

    Returns:
        The rest.
    """
    if isinstance(value, dict):
        return {
            k: without(v)
            for k, v in value.items()
            if k not in ("commit", "stamp", "folder", "seconds", "tokens_per_s")
        }
    if isinstance(value, list):
        return [without(part) for part in value]
    return value


if __name__ == "__main__":
    sys.exit(main())
