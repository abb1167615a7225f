"""A corpus as batches: what each training step sees, the same for every variant."""

import hashlib
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from loopscope.errors import InputError
from loopscope.text import END_OF_TEXT, Corpus, Document, train_tokenizer

if TYPE_CHECKING:
    from tokenizers import Tokenizer


@dataclass(frozen=True, kw_only=True)
class TrainingData:
    """A corpus as two token streams, shared by all variants.

    Attributes:
        train: Documents joined by `<|endoftext|>`, one stream of ids.
        heldout: The same for the held-out documents.
        tokenizer: What made the ids.
        provenance: What the text was.
    """

    train: np.ndarray
    heldout: np.ndarray
    tokenizer: "Tokenizer"
    provenance: dict[str, Any]

    @classmethod
    def from_corpus(
        cls, corpus: Corpus, tokenizer: "Tokenizer | None" = None, *, vocab: int = 2048
    ) -> "TrainingData":
        """Tokenise both splits.

        Args:
            corpus: The documents.
            tokenizer: Makes the ids; None trains one of `vocab` ids on the train split.
            vocab: Size of a tokenizer trained here.

        Returns:
            Both streams, int32.

        Raises:
            InputError: The tokenizer has no `<|endoftext|>`.
        """
        tokenizer = tokenizer or train_tokenizer((d.text for d in corpus.train), vocab)
        separator = tokenizer.token_to_id(END_OF_TEXT)
        if separator is None:
            raise InputError(
                f"the tokenizer has no {END_OF_TEXT}, which must stand between documents; "
                "use another tokenizer, or none to have one trained."
            )
        return cls(
            train=_stream(corpus.train, tokenizer, separator),
            heldout=_stream(corpus.heldout, tokenizer, separator),
            tokenizer=tokenizer,
            provenance=corpus.provenance,
        )

    @property
    def fingerprint(self) -> dict[str, Any]:
        """What the text was, and a hash of what made ids of it."""
        digest = hashlib.sha256(self.tokenizer.to_str().encode()).hexdigest()
        return {**self.provenance, "tokenizer_sha256": digest}

    def windows(self, seq_len: int) -> int:
        """Count the training windows: T inputs each and, shifted by one, T targets.

        Args:
            seq_len: T.

        Returns:
            Their number; windows do not overlap but for the shift.
        """
        return _count(self.train, seq_len)

    def batch(
        self, step: int, *, batch_size: int, seq_len: int, seed: int
    ) -> Int64[Tensor, "batch pos"]:
        """The windows of one step: a pure function of the text and these arguments.

        Every epoch visits all windows once, in an order of its own.

        Args:
            step: Optimiser step, from 0.
            batch_size: Windows per step.
            seq_len: T.
            seed: The data seed.

        Returns:
            Ids, T + 1 per window: inputs are all but the last, targets all but the first.
        """
        count = self.windows(seq_len)
        places = range(step * batch_size, (step + 1) * batch_size)
        picks = [int(_epoch_order(count, seed, p // count)[p % count]) for p in places]
        return _cut(self.train, picks, seq_len)

    def validation(self, windows: int, seq_len: int) -> Int64[Tensor, "batch pos"]:
        """Held-out windows, spread evenly over the stream.

        Args:
            windows: How many, at the most.
            seq_len: T.

        Returns:
            Ids, T + 1 per window.
        """
        count = _count(self.heldout, seq_len)
        return _cut(self.heldout, np.linspace(0, count - 1, min(windows, count)).round(), seq_len)

    def check(self, seq_len: int) -> None:
        """Refuse a corpus that is shorter than one window.

        Args:
            seq_len: T.

        Raises:
            InputError: Either split holds fewer than `seq_len` + 1 tokens.
        """
        for name, stream in (("train", self.train), ("held-out", self.heldout)):
            if _count(stream, seq_len) < 1:
                raise InputError(
                    f"the {name} text has {len(stream)} tokens, which is shorter than one window "
                    f"of {seq_len + 1}; give more text or a smaller sequence length."
                )


def _stream(
    documents: tuple[Document, ...], tokenizer: "Tokenizer", separator: int, chunk: int = 64
) -> np.ndarray:
    parts: list[np.ndarray] = []
    for start in range(0, len(documents), chunk):
        texts = [document.text for document in documents[start : start + chunk]]
        for encoding in tokenizer.encode_batch_fast(texts, add_special_tokens=False):
            parts.append(np.array([*encoding.ids, separator], np.int32))
    return np.concatenate(parts) if parts else np.zeros(0, np.int32)


def _count(stream: np.ndarray, seq_len: int) -> int:
    return max(0, (len(stream) - 1) // seq_len)


def _cut(stream: np.ndarray, picks: Any, seq_len: int) -> Tensor:
    starts = np.asarray(picks, np.int64)[:, None] * seq_len
    return torch.from_numpy(stream[starts + np.arange(seq_len + 1)].astype(np.int64))


@lru_cache(maxsize=2)
def _epoch_order(count: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(count)
