"""Whether another revision gives the same figures, tables, reports and terminal output.

    python benchmarks/same_results.py REVISION              # against the working tree
    python benchmarks/same_results.py REVISION --samples 500 --keep DIR

Both run the same commands on the same inputs: `figures` on the zoo, `compare` on the zoo, on a
series of step checkpoints that the revision trains, and on a wrapped family (ALBERT saved by
transformers) beside a looped module of one's own, and `inspect` and `params` on each kind of model.
Every file that they leave is compared byte for byte. Only what tells when, where and from which
commit it was made is set aside: `commit`, `stamp` (times of files, a hash of code) and `folder` in
provenance, and the commit in the report.
"""

import argparse
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
    "train", "--out", "runs", "--variants", "base", "--layout", "1+1R3+1", "--tokens", "40960",
    "--d-model", "32", "--vocab", "512", "--seq-len", "64", "--keep-every", "20", "--data",
    "text.txt", "--monitor-every", "20",
]  # fmt: skip


def commands(samples: int) -> dict[str, list[str]]:
    """Name of a folder to the command that writes into it; others only print."""
    some, ids = ["--samples", str(samples)], ["--data", "ids.npy", "--tokens", "32"]
    return {
        "figures": ["figures", *some],
        "twins": ["figures", "mesh", "mesh@init", "vanilla", *some, "--tokens", "64", "--center"],
        "logs": ["figures", "--paper-extra"],
        "zoo": ["compare", "base", "mesh", "residual", "vanilla", *some, "--tokens", "64"],
        "series": ["compare", "runs/base", "mesh", *some, "--tokens", "64"],
        "wrapped": ["compare", "albert", "own.py:make", *some, *ids],
        "inspect-mesh": ["inspect", "mesh", "--hooks"],
        "inspect-albert": ["inspect", "albert", "--json"],
        "inspect-own": ["inspect", "own.py:make", "--hooks", "--write-spec", "own.toml"],
        "params": ["params", "own.py:make", "--json"],
        "params-paper": ["params"],
    }


def main() -> int:
    """Run the comparison."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("revision")
    parser.add_argument("--samples", type=int, default=48)
    parser.add_argument("--keep", type=Path, help="folder for what the commands leave")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(given.keep or temporary).resolve()
        before, now = place / "before", place / "now"
        if not before.exists():
            with checkout(given.revision) as code:
                inputs(before, code)
                run_all(before, code, given.samples)
        now.mkdir(parents=True, exist_ok=True)
        for path in before.iterdir():  # the same inputs: times of files are part of a stamp
            if path.name in INPUTS and not (now / path.name).exists():
                (now / path.name).symlink_to(path)
        run_all(now, ROOT, given.samples)
        return report(before, now, list(commands(given.samples)))


INPUTS = ("ids.npy", "own.py", "albert", "runs", "text.txt")


@contextmanager
def checkout(revision: str) -> Iterator[Path]:
    """The files of a revision, while the context lasts."""
    with tempfile.TemporaryDirectory() as temporary:
        git, folder = ["git", "-C", str(ROOT), "worktree"], str(Path(temporary) / "code")
        subprocess.run([*git, "add", "-q", "--detach", folder, revision], check=True)
        try:
            yield Path(folder)
        finally:
            subprocess.run([*git, "remove", "--force", folder], check=True)


def inputs(place: Path, code: Path) -> None:
    """A text, token ids, a wrapped family, a module, and a series that the revision trains."""
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
    call(place, code, TRAINING)


def run_all(place: Path, code: Path, samples: int) -> None:
    """Every command, its output beside its folder."""
    for name, words in commands(samples).items():
        print(f"{place.name}: {' '.join(words)}", flush=True)
        writes = words[0] in ("figures", "compare")
        (place / "own.toml").unlink(missing_ok=True)
        said = call(place, code, [*words, *(["--out", name] if writes else [])])
        (place / f"{name}.txt").write_text(said)


def call(place: Path, code: Path, words: list[str]) -> str:
    """A command in a folder; what it says."""
    done = subprocess.run(
        [sys.executable, "-m", "loopscope.cli", *words], cwd=place, text=True, capture_output=True,
        env={**os.environ, "PYTHONPATH": str(code), "COLUMNS": "100"},
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(f"{' '.join(words)} failed:\n{done.stderr}")
    return done.stdout


def report(before: Path, now: Path, names: list[str]) -> int:
    """Compare all files; the exit code."""
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
    """Files by name, rid of what tells when, where and from which commit they are."""
    for name in names:
        yield f"{name}.txt", (side / f"{name}.txt").read_bytes()
        for path in sorted((side / name).rglob("*")) if (side / name).is_dir() else ():
            if path.is_file() and path.name != ".lock":
                clean = CLEAN.get(path.suffix, lambda content: content)
                yield str(path.relative_to(side)), clean(path.read_bytes())


def clean_json(content: bytes) -> bytes:
    """JSON without commits, stamps and folders."""
    return json.dumps(without(json.loads(content)), ensure_ascii=False, indent=1).encode()


def clean_parquet(content: bytes) -> bytes:
    """A table written anew, commits, stamps and folders gone from its provenance."""
    table = pq.read_table(BytesIO(content))
    metadata = dict(table.schema.metadata)
    metadata[METADATA] = clean_json(metadata[METADATA])
    written = BytesIO()
    pq.write_table(table.replace_schema_metadata(metadata), written, compression="zstd")
    return written.getvalue()


def clean_html(content: bytes) -> bytes:
    """A report without commits, its provenance (JSON in <pre>) without stamps and folders."""

    def cleaned(block: re.Match[str]) -> str:
        return json.dumps(without(json.loads(unescape(block[1]))), ensure_ascii=False)

    text = re.sub(r"\b[0-9a-f]{40}\b", "COMMIT", content.decode())
    return re.sub(r"<pre>(\{.*?\})</pre>", cleaned, text, flags=re.S).encode()


CLEAN: dict[str, Callable[[bytes], bytes]] = {
    ".json": clean_json,
    ".parquet": clean_parquet,
    ".html": clean_html,
}


def without(value: Any) -> Any:
    """A JSON value without commits, stamps and folders."""
    if isinstance(value, dict):
        return {k: without(v) for k, v in value.items() if k not in ("commit", "stamp", "folder")}
    if isinstance(value, list):
        return [without(part) for part in value]
    return value


if __name__ == "__main__":
    sys.exit(main())
