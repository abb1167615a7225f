"""Shards: the finished parts of a comparison, each stored whole or not at all."""

import hashlib
import json
import os
import shutil
import zipfile
from collections.abc import Iterable, Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from loopscope.analysis.measuring import Items
from loopscope.analysis.tables import TABLES, Tables, empty
from loopscope.errors import InputError
from loopscope.files import whole_file
from loopscope.text import Samples

FOLDER = ".shards"
SAMPLES, TOKENS = 64, 2**15
"""A shard has about so many samples, fewer where they are long."""


class StoreError(InputError):
    """Nothing can be stored any more; what was stored stays."""


def sample_length(samples: Samples | Items) -> int:
    """Give the length of samples, as `cuts` takes it.

    Args:
        samples: The samples.

    Returns:
        Tokens of a window; 1 for items, which may be of any length.
    """
    return 1 if samples.tokens is None else samples.tokens.shape[1]


def cuts(samples: int, tokens: int, batch_size: int) -> list[tuple[int, int]]:
    """Cut samples into shards, the same for any number of processes.

    Args:
        samples: How many there are.
        tokens: Their length.
        batch_size: Samples per forward pass; a shard is a whole number of batches.

    Returns:
        First sample, and the one after the last, of each shard.
    """
    ideal = max(1, min(SAMPLES, TOKENS // tokens))
    size = batch_size * max(1, round(ideal / batch_size))
    return [(start, min(start + size, samples)) for start in range(0, samples, size)]


class Store:
    """Named results, each there whole or not at all: in a folder, or in memory.

    In a folder: `.shards/<key>/` of each checkpoint with `samples.json` and a file per shard, and
    `.shards/samples/`. Keys of other commands are left alone.
    """

    def __init__(self, out: Path | None, items: Items | None = None) -> None:
        """Open it; a folder is made when something is written.

        Args:
            out: The output folder; None keeps everything in memory.
            items: The samples, where they are no windows of tokens: they stay in memory.
        """
        self.items = items
        self.folder = None if out is None else out / FOLDER
        self._held: dict[str, bytes] = {}

    def read(self, name: str) -> bytes | None:
        """Read what is stored under a name.

        Args:
            name: The name, `/` between its parts.

        Returns:
            The content; None where there is nothing, or it cannot be read.
        """
        if self.folder is None:
            return self._held.get(name)
        try:
            return (self.folder / name).read_bytes()
        except OSError:
            return None

    def write(self, name: str, content: bytes) -> None:
        """Store something; on the disk when this returns.

        Args:
            name: Its name, `/` between the parts.
            content: What is stored.

        Raises:
            StoreError: if the disk is full, or the like.
        """
        if self.folder is None:
            self._held[name] = content
            return
        path = self.folder / name
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with whole_file(path) as part, part.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise StoreError(
                f"cannot write to {self.folder}: {error.strerror or error}. What was measured "
                "before is kept there; make room and give the same command again."
            ) from error

    def size(self, *, besides: Iterable[str] = ()) -> int:
        """Sum up the shards of all checkpoints but some.

        Args:
            besides: Keys that do not count.

        Returns:
            Bytes; 0 in memory.
        """
        if self.folder is None or not self.folder.is_dir():
            return 0
        skipped = set(besides)
        folders = [path for path in self._keys() if path.name not in skipped]
        return sum(file.stat().st_size for folder in folders for file in folder.iterdir())

    def remove(self, keys: Iterable[str]) -> None:
        """Remove the shards of some keys, and everything if no other key is left.

        Args:
            keys: The keys, known or not.
        """
        for key in keys:
            for name in [name for name in self._held if name.startswith(f"{key}/")]:
                del self._held[name]
            if self.folder is not None:
                shutil.rmtree(self.folder / key, ignore_errors=True)
        if self.folder is not None and not self._keys():
            shutil.rmtree(self.folder, ignore_errors=True)

    def _keys(self) -> list[Path]:
        assert self.folder is not None
        paths = self.folder.iterdir() if self.folder.is_dir() else ()
        return [path for path in paths if path.is_dir() and path.name != "samples"]


class Shelf:
    """The shards of one checkpoint."""

    def __init__(self, store: Store, key: str) -> None:
        self.store, self.key = store, key
        self._sound: set[tuple[int, int]] = set()

    def samples(self) -> Samples | Items | None:
        """The samples it is measured on; None before `begin`."""
        try:
            record = json.loads(self.store.read(f"{self.key}/samples.json") or b"")
            sha256 = record["sha256"]
            if record["bytes"] is None:
                items = self.store.items
                return items if items is not None and items.sha256 == sha256 else None
            content = self.store.read(f"samples/{sha256}.npy")
            if content is None or _sha256(content[-record["bytes"] :]) != sha256:
                return None
            windows = np.load(BytesIO(content), allow_pickle=False)
        except (ValueError, KeyError):
            return None
        return Samples(
            tokens=torch.from_numpy(windows.astype(np.int64)),
            source=record["source"],
            sha256=sha256,
            options=record["options"],
            documents=tuple(record.get("documents", ())),
        )

    def begin(self, samples: Samples | Items) -> None:
        """Note the samples; equal ones of several checkpoints are stored once.

        Args:
            samples: What the checkpoint is measured on.

        Raises:
            StoreError: as `Store.write`.
        """
        size = None
        if samples.tokens is not None:
            windows = samples.tokens.numpy().astype("<i4")
            size, name = windows.nbytes, f"samples/{samples.sha256}.npy"
            if self.store.read(name) is None or self.samples() is None:
                content = BytesIO()
                np.save(content, windows)
                self.store.write(name, content.getvalue())
        record = {
            "source": samples.source,
            "sha256": samples.sha256,
            "bytes": size,
            "options": samples.options,
            "documents": list(samples.documents),
        }
        text = json.dumps(record, ensure_ascii=False, default=int)
        self.store.write(f"{self.key}/samples.json", text.encode())

    def has(self, start: int, stop: int) -> bool:
        """Look for a shard.

        Args:
            start: Its first sample.
            stop: The one after its last.

        Returns:
            Whether it is there and undamaged.
        """
        if (start, stop) not in self._sound and self.get(start, stop) is None:
            return False
        self._sound.add((start, stop))
        return True

    def put(self, start: int, stop: int, tables: Tables) -> None:
        """Store a shard.

        Args:
            start: Its first sample.
            stop: The one after its last.
            tables: Its tables.

        Raises:
            StoreError: as `Store.write`.
        """
        self.store.write(self._name(start, stop), packed(tables))

    def get(self, start: int, stop: int) -> Tables | None:
        """Read a shard.

        Args:
            start: Its first sample.
            stop: The one after its last.

        Returns:
            Its tables; None where it is missing or damaged.
        """
        content = self.store.read(self._name(start, stop))
        try:
            return None if content is None else unpacked(content)
        except ValueError:
            return None

    @property
    def varied(self) -> bool:
        """Whether samples were seen to run other numbers of iterations than others."""
        return self.store.read(f"{self.key}/varied") is not None

    def mark_varied(self) -> None:
        """Note that samples were seen to run other numbers of iterations than others."""
        self.store.write(f"{self.key}/varied", b"yes")

    def _name(self, start: int, stop: int) -> str:
        return f"{self.key}/{start:06d}-{stop:06d}.shard"


def packed(tables: Tables) -> bytes:
    """Make one file of tables.

    Args:
        tables: The tables.

    Returns:
        A SHA-256 (32 bytes), then a zip archive of Parquet files and their provenance.
    """
    content = BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        archive.writestr("provenance.json", json.dumps(tables.provenance, ensure_ascii=False))
        for name, frame in tables.frames().items():
            part = BytesIO()
            table = pa.Table.from_pandas(frame, preserve_index=False)
            pq.write_table(table, part, compression="zstd")
            archive.writestr(f"{name}.parquet", part.getvalue())
    whole = content.getvalue()
    return hashlib.sha256(whole).digest() + whole


def unpacked(content: bytes) -> Tables:
    """Make tables of what `packed` gave.

    Args:
        content: The bytes.

    Returns:
        The tables, as they were.

    Raises:
        ValueError: if a byte of it is not as it was.
    """
    digest, whole = content[:32], content[32:]
    if hashlib.sha256(whole).digest() != digest:
        raise ValueError("the shard is damaged")
    with zipfile.ZipFile(BytesIO(whole)) as archive:
        provenance = json.loads(archive.read("provenance.json"))
        frames: dict[str, Any] = {}
        for name in TABLES:
            if f"{name}.parquet" in archive.namelist():
                frame = pq.read_table(BytesIO(archive.read(f"{name}.parquet"))).to_pandas()
                frames[name] = empty(name) if frame.empty else frame
    return Tables(**frames, provenance=provenance)


def key_of(facts: Mapping[str, Any]) -> str:
    """Name what a result depends on: other values, another name.

    Args:
        facts: JSON values, in any order.

    Returns:
        32 hexadecimal digits.
    """
    text = json.dumps(facts, sort_keys=True, ensure_ascii=False, default=str)
    return _sha256(text.encode())[:32]


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


__all__ = ["Shelf", "Store", "StoreError", "cuts", "key_of"]
