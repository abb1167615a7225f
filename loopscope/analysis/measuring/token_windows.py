"""Samples as `measure` takes them: checked token windows and where they came from."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from loopscope.errors import InputError


@dataclass(frozen=True, kw_only=True)
class TokenWindows:
    """Windows of tokens, checked, and where they came from.

    Attributes:
        tokens: Ids, (sample, pos).
        documents: The document of each, None where unknown.
        provenance: What to record beside every table measured on them.
    """

    tokens: Int64[Tensor, "sample pos"]
    documents: Sequence[str | None]
    provenance: dict[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def keys(self) -> list[bytes]:
        """Something of each window that is equal for equal ones."""
        return [row.numpy().tobytes() for row in self.tokens]

    @property
    def kinds(self) -> list[Any]:
        """Windows are of one length: all can be stacked."""
        return [None] * len(self)

    def batch(self, numbers: range) -> Int64[Tensor, "batch pos"]:
        """Give some of the windows.

        Args:
            numbers: Which, one after the other.

        Returns:
            Their tokens.
        """
        return self.tokens[numbers.start : numbers.stop]

    def chosen(self, numbers: Sequence[int]) -> "TokenWindows":
        """Give some of the windows.

        Args:
            numbers: Which.

        Returns:
            Their own set.
        """
        rows = list(numbers)
        documents = [self.documents[i] for i in rows]
        return replace(self, tokens=self.tokens[rows], documents=documents)


def read_windows(samples: Any, *, d_vocab: int | None) -> TokenWindows:
    """Check windows of tokens and take what they say of themselves.

    Args:
        samples: As `checked_tokens`.
        d_vocab: As `checked_tokens`.

    Returns:
        The windows.

    Raises:
        InputError: as `checked_tokens` and `sample_documents`.
    """
    tokens = checked_tokens(samples, d_vocab=d_vocab)
    return TokenWindows(
        tokens=tokens,
        documents=sample_documents(samples, tokens),
        provenance=samples_provenance(samples, tokens),
    )


def checked_tokens(samples: Any, *, d_vocab: int | None) -> Int64[Tensor, "sample pos"]:
    """Check token windows and give them as an int64 tensor.

    Args:
        samples: Integers (sample, pos) as a tensor or array, or an object with such `tokens`.
        d_vocab: Size of the model's vocabulary, None where unknown.

    Returns:
        The tokens, (sample, pos), on the CPU.

    Raises:
        InputError: On another shape or dtype, no samples, or token ids out of range.
    """
    tokens = getattr(samples, "tokens", samples)
    if isinstance(tokens, np.ndarray) and np.issubdtype(tokens.dtype, np.integer):
        tokens = torch.from_numpy(tokens.astype(np.int64))
    if not isinstance(tokens, Tensor):
        is_array = isinstance(tokens, np.ndarray)
        kind = f"an array of {tokens.dtype}" if is_array else type(tokens)
        raise InputError(
            f"samples must be integer token ids (samples × tokens) as a tensor or array, or from "
            f"loopscope.load_samples; got {kind}."
        )
    if tokens.is_floating_point() or tokens.is_complex() or tokens.dtype == torch.bool:
        raise InputError(f"samples must hold integer token ids, got {tokens.dtype}.")
    if tokens.ndim != 2:
        raise InputError(
            f"samples must have two axes (samples × tokens), got shape {tuple(tokens.shape)}; "
            "one window of tokens is tokens[None]."
        )
    if len(tokens) == 0:
        raise InputError("there are zero samples; give at least one.")
    tokens = tokens.detach().cpu().long()
    if tokens.numel() and d_vocab is not None:
        low, high = int(tokens.min()), int(tokens.max())
        if low < 0 or high >= d_vocab:
            bad = low if low < 0 else high
            sample, pos = (int(i) for i in (tokens == bad).nonzero()[0])
            raise InputError(
                f"token id {bad} (sample {sample}, position {pos}) is out of range; the model's "
                f"vocabulary has ids 0 … {d_vocab - 1}. Tokenise with this model's tokenizer."
            )
    return tokens


def sample_documents(samples: Any, tokens: Int64[Tensor, "sample pos"]) -> list[str | None]:
    """Tell which document each sample is from.

    Args:
        samples: What the user gave.
        tokens: Its tokens, (sample, pos).

    Returns:
        The samples' own `documents`; None for each where they have none.

    Raises:
        InputError: if the samples have another number of documents than of windows.
    """
    documents = list(getattr(samples, "documents", None) or ())
    if not documents:
        return [None] * len(tokens)
    if len(documents) != len(tokens):
        raise InputError(
            f"the samples have {len(tokens)} windows and {len(documents)} documents; give the "
            "document of each window, or none."
        )
    return [None if document is None else str(document) for document in documents]


def samples_provenance(samples: Any, tokens: Int64[Tensor, "sample pos"]) -> dict[str, Any]:
    """Tell where samples came from: what they say of themselves, their hash and size.

    Args:
        samples: What the user gave.
        tokens: Its tokens, (sample, pos).

    Returns:
        At least source, sha256 (of the tokens as little-endian int32), samples and tokens.
    """
    origin = getattr(samples, "provenance", None)
    data = tokens.numpy().astype("<i4").tobytes()
    return {
        "source": "tokens given in Python",
        "sha256": hashlib.sha256(data).hexdigest(),
        **(dict(origin) if isinstance(origin, Mapping) else {}),
        "samples": tokens.shape[0],
        "tokens": tokens.shape[1],
    }
