"""Make the shipped held-out samples: pieces of files that no shipped model was trained on.

    python -m loopscope.text.heldout --out heldout.parquet

`docs/ZOO.md` says how the shipped checkpoints are made.
"""

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pyarrow as pa
from pyarrow import parquet

from loopscope.errors import InputError
from loopscope.text.corpus import Corpus, Document, stdlib_corpus, train_tokenizer

if TYPE_CHECKING:
    from tokenizers import Tokenizer

PIECE_CHARACTERS, PIECE_TOKENS = 2000, 448
OWN_LICENCES = ("asynchat.py", "trace.py", "test/test_sqlite3/test_regression.py")
"""Held out like others, but not shipped: they carry licences of their own beside Python's."""


class Piece(NamedTuple):
    """A held-out text, its file and the character at which it starts."""

    text: str
    file: str
    start: int


def heldout_pieces(corpus: Corpus, tokenizer: "Tokenizer", *, count: int = 500) -> list[Piece]:
    """Cut held-out files into pieces at line ends, and draw some, spread over the files.

    Each round takes one unused piece of every file, until there are enough.

    Args:
        corpus: Its held-out documents are used.
        tokenizer: Counts the tokens of a piece.
        count: Pieces wanted.

    Returns:
        Pieces of at least 2000 characters and 448 tokens (so that tokenizers with larger
        vocabularies find 256), without overlap, sorted by file and place.

    Raises:
        InputError: The held-out files hold fewer pieces.
    """
    random = np.random.default_rng(0)
    turns: list[list[Piece]] = []
    for document in corpus.heldout:
        if document.path in OWN_LICENCES:
            continue
        pieces = list(_cut(document))
        encoded = tokenizer.encode_batch_fast([piece.text for piece in pieces])
        long = [p for p, e in zip(pieces, encoded, strict=True) if len(e.ids) >= PIECE_TOKENS]
        turns.append([long[i] for i in random.permutation(len(long))])
    rounds = range(max(map(len, turns), default=0))
    drawn = [pieces[i] for i in rounds for pieces in turns if i < len(pieces)][:count]
    if len(drawn) < count:
        raise InputError(
            f"the held-out files of the {corpus.source} hold {len(drawn)} pieces of "
            f"{PIECE_TOKENS} tokens, {count} are needed; use a Python with its test package."
        )
    return sorted(drawn, key=lambda piece: piece[1:])


def write_heldout(pieces: Sequence[Piece], path: Path, provenance: dict[str, object]) -> None:
    """Write pieces as Parquet (columns text, file, start), the provenance in its metadata.

    Args:
        pieces: One row each.
        path: The file; its folder is made.
        provenance: Plain JSON values.
    """
    table = pa.Table.from_pylist(
        [piece._asdict() for piece in pieces],
        pa.schema([("text", pa.string()), ("file", pa.string()), ("start", pa.int32())]),
    )
    table = table.replace_schema_metadata({"loopscope": json.dumps(provenance)})
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(table, path, compression="zstd", compression_level=19)


def _cut(document: Document) -> Iterator[Piece]:
    text, start = document.text, 0
    while (end := text.find("\n", start + PIECE_CHARACTERS - 1) + 1) > 0:
        yield Piece(text[start:end], document.path, start)
        start = end


def main(argv: Sequence[str] | None = None) -> None:
    """Write the samples of the running Python's standard library.

    Args:
        argv: Words of the command line; the process's own when not given.
    """
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--vocab", type=int, default=2048)
    options = parser.parse_args(argv)
    corpus = stdlib_corpus()
    tokenizer = train_tokenizer((document.text for document in corpus.train), options.vocab)
    pieces = heldout_pieces(corpus, tokenizer)
    write_heldout(pieces, options.out, {**corpus.provenance, "licence": "PSF-2.0"})
    print(f"{options.out}: {len(pieces)} pieces")


if __name__ == "__main__":
    main()
