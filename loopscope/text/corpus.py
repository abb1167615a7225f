"""Documents to train on: the running Python's standard library, or the user's own files.

The default corpus is text that every machine already has. Its documents are held out by file: a
hash of the path alone decides, so that every Python version holds out the same files.
"""

import hashlib
import json
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from platform import python_version
from typing import TYPE_CHECKING, NamedTuple

from loopscope.errors import InputError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

HELDOUT = 0.1
"""Share of the documents that is held out."""
END_OF_TEXT = "<|endoftext|>"
"""Stands between documents; id 0 of our tokenizer."""
SUFFIXES = (".txt", ".jsonl", ".parquet")

# Not the standard library's own text: installed packages, and what describes one machine's build.
_FOREIGN_DIRS = ("site-packages", "dist-packages", "__pycache__", "lib-dynload")
_FOREIGN_PARTS = ("_sysconfigdata", "config-", "sitecustomize", "usercustomize")
# Tables written by programs.
_TABLES = (
    "encodings/",
    "pydoc_data/",
    "lib2to3/tests/data/",
    "_opcode_metadata.py",
    "html/entities.py",
    "re/_casefix.py",
    "stringprep.py",
    "test/test_stable_abi_ctypes.py",
)


class Document(NamedTuple):
    """One text and where it came from.

    Attributes:
        path: A path relative to the corpus, or `file#row`.
        text: The text.
        part_of: The document that the text is a piece of; empty where it is one itself.
    """

    path: str
    text: str
    part_of: str = ""


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """Documents in a fixed order, and those held out from training.

    Attributes:
        source: What the documents are, in words.
        sha256: Hash of every path and text of both splits, in order.
    """

    source: str
    train: tuple[Document, ...]
    heldout: tuple[Document, ...]
    sha256: str

    @property
    def provenance(self) -> dict[str, object]:
        """What to write beside everything made from this corpus."""
        return {
            "source": self.source,
            "sha256": self.sha256,
            "heldout_share": HELDOUT,
            "train": {"documents": len(self.train), "characters": _characters(self.train)},
            "heldout": {"documents": len(self.heldout), "characters": _characters(self.heldout)},
        }


def is_heldout(key: str) -> bool:
    """Whether a document is held out: a pure function of its name.

    Args:
        key: What the document is called.

    Returns:
        True for the share `HELDOUT` of all names.
    """
    digest = hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") < HELDOUT * 2**64


def stdlib_corpus(root: Path | None = None) -> Corpus:
    """The source text of a Python standard library, tests included, split by file.

    Left out: installed packages, tables written by programs, build settings of this machine, files
    that are empty, not UTF-8, or equal to an earlier one.

    Args:
        root: The library's folder; by default the running Python's.

    Returns:
        The corpus, documents sorted by path.

    Raises:
        InputError: There is no Python source in the folder.
    """
    source = f"standard library of Python {python_version()}" if root is None else root.name
    root = Path(sysconfig.get_paths()["stdlib"]) if root is None else root
    documents = list(_python_sources(root))
    if not documents:
        raise InputError(
            f"no Python source text in {root}; this Python has no readable standard library: "
            "give your own text as a .txt, .jsonl or .parquet file."
        )
    return _corpus(source, documents, is_heldout)


def load_corpus(path: str | Path | None = None) -> Corpus:
    """The corpus in a file, or the standard library's source text.

    A document is held out by a hash of its text. If that leaves one side empty (one long text), the
    end of the last document is held out instead (the same share).

    Args:
        path: A `.txt` (one document), `.jsonl` or `.parquet` file (column `text`); None for
            the default corpus.

    Returns:
        The documents of both splits.

    Raises:
        InputError: The file cannot be read as one of these, or holds no text.
    """
    if path is None:
        return stdlib_corpus()
    path = Path(path)
    documents = list(read_documents(path))
    text_of = {document.path: document.text for document in documents}
    corpus = _corpus(path.name, documents, lambda name: is_heldout(text_of[name]))
    if corpus.train and corpus.heldout:
        return corpus
    last = documents[-1]
    cut = int(len(last.text) * (1 - HELDOUT))
    cut = last.text.rfind("\n", cut // 2, cut) + 1 or cut
    head, tail = last.text[:cut], last.text[cut:]
    parts = [Document(f"{last.path}:head", head), Document(f"{last.path}:tail", tail)]
    return _corpus(path.name, documents[:-1] + parts, lambda name: name == parts[1].path)


def read_documents(path: str | Path, *, part_of: str = "document") -> Iterator[Document]:
    """Texts of a `.txt` file (one document), or of the column `text` of `.jsonl` or `.parquet`.

    Args:
        path: The file; its suffix says how to read it. Empty texts are left out.
        part_of: The column, where there is one, that names the document each row is a piece of;
            without it each row is a document.

    Returns:
        The documents in the file's order.

    Raises:
        InputError: The file is missing, a folder, empty, of another kind, not UTF-8, or
            holds no text.
    """
    path = Path(path)
    check_file(path, SUFFIXES)
    rows = {".txt": _txt_rows, ".jsonl": _jsonl_rows, ".parquet": _parquet_rows}[path.suffix]
    empty = True
    for document in rows(path, part_of):
        if document.text.strip():
            empty = False
            yield document
    if empty:
        raise InputError(f"{path} holds no text; give a file with some.")


def check_file(path: Path, suffixes: Sequence[str]) -> None:
    """Refuse what is no readable file of an allowed kind.

    Args:
        path: The file.
        suffixes: Those allowed, with their dots.

    Raises:
        InputError: The path is missing, a folder, empty or of another suffix.
    """
    allowed = ", ".join(suffixes)
    if not path.exists():
        raise InputError(f"no such file: {path} (looked for {path.absolute()}); give {allowed}.")
    if path.is_dir():
        raise InputError(f"{path} is a folder; give one file of the kind {allowed}.")
    if path.suffix not in suffixes:
        raise InputError(f"cannot read {path}: its suffix is {path.suffix!r}; allowed: {allowed}.")
    try:
        with path.open("rb") as file:
            empty = not file.read(1)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}.") from error
    if empty:
        raise InputError(f"{path} is empty; give a file with text.")


def train_tokenizer(texts: Iterable[str], vocab_size: int = 2048) -> "Tokenizer":
    """Train a byte-level BPE tokenizer (any text round-trips; `<|endoftext|>` is id 0).

    Args:
        texts: What to learn from: the train split only.
        vocab_size: Number of ids, the separator and the 256 bytes included.

    Returns:
        The tokenizer; the same texts in the same order give the same one.

    Raises:
        InputError: `vocab_size` is below 257.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    if vocab_size < len(alphabet) + 1:
        raise InputError(
            f"a vocabulary of {vocab_size} is too small for byte-level BPE: "
            f"it needs at least {len(alphabet) + 1} (256 bytes and {END_OF_TEXT})."
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def _python_sources(root: Path) -> Iterator[Document]:
    seen: set[bytes] = set()
    paths = {path.relative_to(root).as_posix(): path for path in root.rglob("*.py")}
    for name in sorted(paths):
        parts = name.split("/")
        if (
            any(part in _FOREIGN_DIRS for part in parts)
            or any(part.startswith(_FOREIGN_PARTS) for part in parts)
            or name.startswith(_TABLES)
        ):
            continue
        try:
            text = paths[name].read_bytes().decode("utf-8-sig").replace("\r\n", "\n")
        except (UnicodeDecodeError, OSError):
            continue
        digest = hashlib.sha256(text.encode()).digest()
        if text.strip() and digest not in seen:
            seen.add(digest)
            yield Document(name, text)


def _corpus(source: str, documents: Sequence[Document], heldout: Callable[[str], bool]) -> Corpus:
    sides: tuple[list[Document], list[Document]] = ([], [])
    digest = hashlib.sha256()
    for document in documents:
        side = heldout(document.path)
        sides[side].append(document)
        for field in (document.path, document.text, "heldout" if side else "train"):
            data = field.encode("utf-8", "surrogatepass")
            digest.update(len(data).to_bytes(8, "little") + data)
    return Corpus(
        source=source, train=tuple(sides[0]), heldout=tuple(sides[1]), sha256=digest.hexdigest()
    )


def _characters(documents: Sequence[Document]) -> int:
    return sum(len(document.text) for document in documents)


def _txt_rows(path: Path, _: str) -> Iterator[Document]:
    try:
        text = path.read_bytes().decode("utf-8-sig").replace("\r\n", "\n")
        yield Document(path.name, text)
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path} is not UTF-8 text (byte {error.start}); convert it to UTF-8."
        ) from error


def _jsonl_rows(path: Path, part_of: str) -> Iterator[Document]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            try:
                row = json.loads(line)
            except ValueError as error:
                raise InputError(
                    f'{where} is not JSON ({error}); each line must be like {{"text": "..."}}.'
                ) from error
            if not isinstance(row, dict) or not isinstance(row.get("text"), str):
                has = ", ".join(map(repr, row)) if isinstance(row, dict) else type(row).__name__
                raise InputError(
                    f'{where} has no string "text" (it has {has or "nothing"}); '
                    'each line must be like {"text": "..."}.'
                )
            if not row["text"].isascii() and any("\ud800" <= c <= "\udfff" for c in row["text"]):
                raise InputError(
                    f"{where} has half of a surrogate pair, which is no Unicode text; mend it."
                )
            yield Document(f"{path.name}#{number}", row["text"], _name(row.get(part_of)))


def _parquet_rows(path: Path, part_of: str) -> Iterator[Document]:
    import pyarrow as pa
    from pyarrow import parquet

    try:
        file = parquet.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{path} is not a Parquet file ({error}).") from error
    with file:
        schema = file.schema_arrow
        if "text" not in schema.names:
            raise InputError(
                f"{path} has no column 'text'; its columns are {', '.join(schema.names) or 'none'}."
            )
        kind = schema.field("text").type
        if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
            raise InputError(f"column 'text' of {path} holds {kind}; it must hold strings.")
        row = 0
        columns = [name for name in ("text", part_of) if name in schema.names]
        batches = file.iter_batches(batch_size=1024, columns=columns)
        while True:
            try:
                batch = next(batches, None)
                entries = batch.to_pylist() if batch is not None else []
            except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
                raise InputError(
                    f"{path} cannot be read after row {row} ({error}); it is damaged."
                ) from error
            if batch is None:
                return
            for entry in entries:
                row += 1
                yield Document(f"{path.name}#{row}", entry["text"] or "", _name(entry.get(part_of)))


def _name(part_of: object) -> str:
    return "" if part_of is None or part_of != part_of else str(part_of)  # NaN is no name
