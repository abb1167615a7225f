"""Text to token windows: the shipped held-out samples, or the user's own files."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib.resources import as_file, files
from pathlib import Path
from types import FunctionType
from typing import Any

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from loopscope.errors import InputError, whole_number
from loopscope.names import MIN_TOKENS
from loopscope.text.corpus import SUFFIXES, Document, check_file, read_documents
from loopscope.text.foreign_tokenizers import usable_tokenizer, without_limits


@dataclass(frozen=True, kw_only=True)
class Samples:
    """Windows of one length, not overlapping and not padded.

    Attributes:
        tokens: Ids, one row per sample.
        source: Where the text came from.
        sha256: Hash of the ids as little-endian int32: equal only for equal samples.
        options: How the windows were chosen, and how many were asked for.
        documents: The document of each window; empty where the text has none (`.npy`).
    """

    tokens: Int64[Tensor, "sample pos"]
    source: str
    sha256: str
    options: dict[str, Any] = field(default_factory=dict)
    documents: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.tokens)

    def __repr__(self) -> str:
        samples, pos = self.tokens.shape
        return f"Samples: {samples} × {pos} tokens from {self.source}"

    @property
    def provenance(self) -> dict[str, Any]:
        """What to record beside every table measured on these samples."""
        samples, pos = self.tokens.shape
        facts = {"source": self.source, "sha256": self.sha256, "samples": samples, "tokens": pos}
        return {**facts, **self.options}

    def _repr_html_(self) -> str:
        samples, pos = self.tokens.shape
        return f"<b>{samples} samples × {pos} tokens</b> from {self.source}"


def load_samples(
    model: Any,
    data: str | Path | None = None,
    *,
    samples: int = 500,
    tokens: int = 256,
    seed: int = 0,
) -> Samples:
    """Cut text into windows of equal length with a model's tokenizer, or read windows of ids.

    Documents come in an order drawn from the seed. Each round takes one unused window of every
    document, its windows in an order drawn from the seed, until there are enough; a text longer
    than a few dozen windows takes several turns a round. Only what is used is tokenised. A window
    equal to an earlier one is left out (`repeated` in the provenance counts them; rows of `.npy`
    are all kept). If the text gives fewer windows than asked for, all of them are used (the
    provenance says both numbers).

    Args:
        model: A model with a tokenizer, or a tokenizer, as `wrap` takes it.
        data: `.txt` (one document), `.jsonl` or `.parquet` (column `text`; a column `document`
            tells which document a row is a piece of, without it each is one), integer `.npy`
            (samples × tokens: the first rows, cut to `tokens` columns); None for the shipped
            held-out samples.
        samples: Windows wanted.
        tokens: Tokens per window, at least 4.
        seed: Of the choice of windows.

    Returns:
        The windows as int64 ids.

    Raises:
        InputError: The numbers or the file are of no use, the text gives no window, the model has
            no tokenizer, or an id lies outside its vocabulary.
    """
    samples = whole_number("samples", samples, 1)
    tokens = whole_number("tokens", tokens, MIN_TOKENS)
    seed = whole_number("seed", seed, 0)
    path = None if data is None else Path(data)
    if path is not None and (path.suffix == ".npy" or path.suffix not in SUFFIXES):
        check_file(path, (*SUFFIXES, ".npy"))
        windows = _read_ids(path, samples, tokens)
        options: dict[str, Any] = {"requested": samples}
        origins: list[str] = []
    else:
        tokenizer = _tokenizer_of(model)
        documents = heldout_documents() if path is None else list(read_documents(path))
        windows, origins, repeated = _windows(documents, tokenizer, samples, tokens, seed)
        options = {"requested": samples, "seed": seed, "repeated": repeated}
        if not len(windows):
            raise InputError(
                f"{path or 'the text'} is too short: {len(documents)} documents gave 0 windows of "
                f"{tokens} tokens, {samples} were asked for; give more text or fewer tokens."
            )
    _check_range(windows, _vocabulary_of(model))
    return Samples(
        tokens=torch.from_numpy(windows.astype(np.int64)),
        source="shipped held-out samples" if path is None else str(path),
        sha256=hashlib.sha256(windows.astype("<i4").tobytes()).hexdigest(),
        options=options,
        documents=tuple(origins),
    )


def one_text(model: Any, text: str) -> Samples:
    """Take a text as the only sample, whole.

    Args:
        model: A model with a tokenizer, or a tokenizer, as `wrap` takes it.
        text: The text.

    Returns:
        One window of all its tokens.

    Raises:
        InputError: the text has fewer than 4 tokens, or the model has no tokenizer.
    """
    ids = np.array(_tokenizer_of(model).encode(text, add_special_tokens=False).ids, np.int32)
    if len(ids) < MIN_TOKENS:
        raise InputError(
            f"the text {text!r} has {len(ids)} tokens; give one of at least {MIN_TOKENS}."
        )
    _check_range(ids, _vocabulary_of(model))
    return Samples(
        tokens=torch.from_numpy(ids.astype(np.int64))[None],
        source="text given",
        sha256=hashlib.sha256(ids.astype("<i4").tobytes()).hexdigest(),
    )


def heldout_documents() -> list[Document]:
    """The shipped held-out samples: pieces of files that no shipped model was trained on."""
    with as_file(files("loopscope") / "zoo" / "heldout.parquet") as path:
        return list(read_documents(path, part_of="file"))


def _windows(
    documents: Sequence[Document], tokenizer: Any, samples: int, tokens: int, seed: int
) -> tuple[np.ndarray, list[str], int]:
    """Windows that differ, the document of each, and how many were left out as repeated."""
    random = np.random.default_rng(seed)
    pieces = [
        (document.part_of or document.path, piece)
        for document in documents
        for piece in _pieces(document.text, 128 * tokens)
    ]
    turns = [
        (pieces[i][0], _piece_windows(pieces[i][1], tokenizer, tokens, random))
        for i in random.permutation(len(pieces))
    ]
    windows: list[np.ndarray] = []
    origins: list[str] = []
    seen: set[bytes] = set()
    repeated = 0
    while turns and len(windows) < samples:
        left = []
        for origin, turn in turns:
            window = next(turn, None)
            if window is None:
                continue
            left.append((origin, turn))
            if (content := window.tobytes()) in seen:
                repeated += 1
                continue
            seen.add(content)
            windows.append(window)
            origins.append(origin)
            if len(windows) == samples:
                break
        turns = left
    none = np.zeros((0, tokens), np.int32)
    return np.stack(windows) if windows else none, origins, repeated


def _pieces(text: str, size: int) -> Iterator[str]:
    # Long texts are cut at line ends, so that one window does not cost tokenising all of it.
    start = 0
    while len(text) - start > 2 * size:
        end = text.rfind("\n", start + size // 2, start + size) + 1 or start + size
        yield text[start:end]
        start = end
    yield text[start:]


def _piece_windows(
    text: str, tokenizer: Any, tokens: int, random: np.random.Generator
) -> Iterator[np.ndarray]:
    ids = np.array(tokenizer.encode(text, add_special_tokens=False).ids, np.int32)
    for i in random.permutation(len(ids) // tokens):
        yield ids[i * tokens : (i + 1) * tokens]


def _read_ids(path: Path, samples: int, tokens: int) -> np.ndarray:
    try:
        ids = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise InputError(f"{path} is no readable .npy file of integers ({error}).") from error
    if not isinstance(ids, np.ndarray) or ids.ndim != 2 or ids.dtype.kind not in "iu":
        raise InputError(
            f"{path} holds {getattr(ids, 'dtype', 'no')} of shape {getattr(ids, 'shape', '()')}; "
            "it must hold integers of shape (samples, tokens)."
        )
    if not len(ids) or ids.shape[1] < tokens:
        raise InputError(
            f"{path} has {ids.shape[0]} rows of {ids.shape[1]} tokens, but windows of {tokens} "
            f"tokens were asked for; ask for at most {ids.shape[1]} tokens."
        )
    return np.array(ids[:samples, :tokens])


def _tokenizer_of(model: Any) -> Any:
    if isinstance(model, str | Path):
        raise InputError(f"give a model or a tokenizer, not a name: load_samples(load({model!r})).")
    tokenizer = usable_tokenizer(model) if _is_tokenizer(model) else None
    tokenizer = getattr(model, "tokenizer", None) if tokenizer is None else tokenizer
    if tokenizer is None:
        raise InputError(
            f"{getattr(model, 'name', 'the model')} has no tokenizer, so it cannot read text; "
            "give token ids as an integer .npy file (samples × tokens)."
        )
    return without_limits(usable_tokenizer(tokenizer))


def _is_tokenizer(model: Any) -> bool:
    """Whether a tokenizer was given, or a function that is one, instead of a model."""
    return hasattr(model, "encode") or isinstance(model, FunctionType)


def _vocabulary_of(model: Any) -> int | None:
    if _is_tokenizer(model):
        return usable_tokenizer(model).get_vocab_size()
    return getattr(getattr(model, "config", None), "d_vocab", None)


def _check_range(windows: np.ndarray, vocabulary: int | None) -> None:
    low, high = int(windows.min()), int(windows.max())
    allowed = f"0 … {vocabulary - 1}" if vocabulary else "0 and above"
    if low < 0 or (vocabulary and high >= vocabulary):
        raise InputError(
            f"token id {low if low < 0 else high} is out of range: the model knows the ids "
            f"{allowed}; the tokens were made for another vocabulary."
        )
