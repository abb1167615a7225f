"""Batches: the text as a stream, the same windows for every variant, held-out pieces."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from loopscope.errors import InputError
from loopscope.text.corpus import Document, train_tokenizer
from loopscope.text.heldout import heldout_pieces
from loopscope.training import TrainingData
from tests.training.conftest import T


def test_the_stream_is_the_documents_with_a_separator_after_each(corpus, data):
    pieces = data.tokenizer.decode(data.train.tolist(), skip_special_tokens=False)
    assert pieces == "".join(d.text + "<|endoftext|>" for d in corpus.train)
    assert data.train.dtype == np.int32
    assert data.provenance["sha256"] == corpus.sha256


def test_the_tokenizer_learns_from_the_train_split_alone(corpus, data):
    own = train_tokenizer((d.text for d in corpus.train), 280)
    assert data.tokenizer.to_str() == own.to_str()
    given = TrainingData.from_corpus(corpus, train_tokenizer([], 257))
    assert given.tokenizer.get_vocab_size() == 257
    assert given.train.max() < 257


def test_an_epoch_visits_every_window_once_in_an_order_of_its_own(data):
    count = data.windows(T)
    orders = []
    for epoch in range(2):
        steps = range(epoch * count, (epoch + 1) * count)
        rows = torch.cat([data.batch(s, batch_size=1, seq_len=T, seed=5) for s in steps])
        assert (rows[:, 1:-1] == rows[:, :-1][:, 1:]).all()
        starts = {row.tobytes(): i for i, row in enumerate(windows_of(data))}
        orders.append([starts[row.numpy().tobytes()] for row in rows])
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(count))
    assert orders[0] != orders[1]


def windows_of(data):
    """All windows of T inputs and T targets, in the order of the text."""
    starts = range(0, len(data.train) - T, T)
    return [data.train[i : i + T + 1].astype(np.int64) for i in starts]


def test_a_batch_depends_on_step_and_seed_alone(data, corpus):
    def take(step, seed, source=data):
        return source.batch(step, batch_size=3, seq_len=T, seed=seed)

    later = take(7, 1)
    again = TrainingData.from_corpus(corpus, vocab=280)
    assert torch.equal(take(7, 1, again), later)  # asked for first, and by a new object
    assert not torch.equal(take(7, 2), later)
    assert not torch.equal(take(8, 1), later)
    both = data.batch(0, batch_size=6, seq_len=T, seed=1)
    assert torch.equal(both, torch.cat([take(0, 1), take(1, 1)]))


def test_a_tokenizer_without_a_separator_is_refused(corpus):
    from tokenizers import Tokenizer, models

    with pytest.raises(InputError, match=r"no <\|endoftext\|>"):
        TrainingData.from_corpus(corpus, Tokenizer(models.BPE()))


def test_held_out_pieces_are_long_spread_over_files_and_do_not_overlap(corpus):
    long = tuple(
        Document(f"{n}.py", "".join(f"x{i} = {i}\n" for i in range(900 * n))) for n in (1, 2, 3)
    )
    own = Document("asynchat.py", long[2].text)
    held = replace(corpus, heldout=(*long, own))
    pieces = heldout_pieces(held, train_tokenizer([], 257), count=9)
    texts = {document.path: document.text for document in long}
    for piece in pieces:
        assert texts[piece.file][piece.start :].startswith(piece.text)
        assert 2000 <= len(piece.text) < 2020
        assert piece.text.endswith("\n")
    files = [piece.file for piece in pieces]
    assert [files.count(f"{n}.py") for n in (1, 2, 3)] == [3, 3, 3]
    ends = [piece.start + len(piece.text) for piece in pieces]
    for i in range(8):
        assert files[i] != files[i + 1] or ends[i] <= pieces[i + 1].start
    with pytest.raises(InputError, match=r"hold \d\d pieces of 448 tokens, 500 are needed"):
        heldout_pieces(held, train_tokenizer([], 257))
