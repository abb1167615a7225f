"""Make the shipped zoo: six variants with K = 3 trained on identical batches, and held-out samples.

    python -m loopscope.zoo_build --out DIR --tokens 4000000

Each variant is written as `DIR/<variant>/`, the samples as `DIR/heldout.parquet`; what is there
already is kept.
"""

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pyarrow as pa
from pyarrow import parquet

from loopscope.batches import TrainingData
from loopscope.corpus import Corpus, Document, stdlib_corpus
from loopscope.errors import InputError
from loopscope.models.config import LoopConfig
from loopscope.models.layout import Layout
from loopscope.training import TrainConfig, print_progress, train

if TYPE_CHECKING:
    from tokenizers import Tokenizer

VARIANTS = ("vanilla", "base", "residual", "anchor", "anchor_emb", "mesh")
LAYOUT = "1+2R3+1"
VANILLA_LAYOUT = "1+2+2+2+1"
"""The same compute without a loop."""
WIDTH, HEADS, VOCAB = 160, 5, 2048


PIECE_CHARACTERS, PIECE_TOKENS = 2000, 448
OWN_LICENCES = ("asynchat.py", "trace.py", "test/test_sqlite3/test_regression.py")
"""Held out like others, but not shipped: they carry licences of their own beside Python's."""


class Piece(NamedTuple):
    """A held-out text, its file and the character at which it starts."""

    text: str
    file: str
    start: int


def zoo_config(
    variant: str, *, tokens: int, batch_size: int, dtype: str, lr: float, seed: int
) -> TrainConfig:
    """The recipe of one zoo model.

    Args:
        variant: One of `VARIANTS`.
        tokens: Training tokens, rounded up to whole steps.
        batch_size: Windows of 256 tokens per step.
        dtype: `float32` or `bfloat16` autocast.
        lr: Peak learning rate.
        seed: Of weights and batch order.

    Returns:
        The configuration; only variant and layout differ between variants.
    """
    model = LoopConfig(
        variant=variant,
        layout=Layout.parse(VANILLA_LAYOUT if variant == "vanilla" else LAYOUT),
        d_model=WIDTH,
        n_heads=HEADS,
        d_vocab=VOCAB,
        n_ctx=256,
    )
    return TrainConfig(
        model=model,
        steps=-(-tokens // (batch_size * 256)),
        batch_size=batch_size,
        lr=lr,
        seed=seed,
        data_seed=seed,
        dtype=dtype,
        eval_every=100,
    )


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
    """Write pieces as Parquet (columns text, file, start), the provenance in its metadata."""
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
    """Train what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=4_000_000)
    parser.add_argument("--variants", default=",".join(VARIANTS))
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(argv)
    recipe = {
        "tokens": given.tokens,
        "batch_size": given.batch_size,
        "dtype": given.dtype,
        "lr": given.lr,
        "seed": given.seed,
    }
    flags = " ".join(f"--{key.replace('_', '-')} {value}" for key, value in recipe.items())
    command = f"python -m loopscope.zoo_build --out DIR {flags}"
    try:
        configs = {name: zoo_config(name, **recipe) for name in given.variants.split(",")}
        corpus = stdlib_corpus()
        data = TrainingData.from_corpus(corpus, vocab=VOCAB)
        samples = given.out / "heldout.parquet"
        if not samples.exists():
            pieces = heldout_pieces(corpus, data.tokenizer)
            write_heldout(pieces, samples, {**corpus.provenance, "licence": "PSF-2.0"})
        for name, config in configs.items():
            folder = given.out / name
            if folder.exists():
                print(f"{name}: {folder} exists and is kept", flush=True)
                continue
            print(f"{name}: {config.steps} steps, {config.tokens} tokens", flush=True)
            train(
                config,
                data,
                folder,
                progress=print_progress,
                provenance={"command": command},
                half=True,
            )
    except InputError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
