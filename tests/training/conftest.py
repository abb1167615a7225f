"""A small corpus and small recipes, shared by the tests of training."""

import pytest

from loopscope.models.native.configuration import LoopConfig
from loopscope.text.corpus import Corpus, Document
from loopscope.training import TrainConfig, TrainingData

T = 16


def make_config(variant="base", layout="1+1R2+1", **changes):
    """A recipe of 4 steps of 3 windows of 16 tokens."""
    model = LoopConfig(variant=variant, layout=layout, d_model=16, n_heads=2, d_vocab=280, n_ctx=T)
    settings = {"steps": 4, "batch_size": 3, "seq_len": T, "log_every": 2, "eval_every": 3}
    return TrainConfig(model=model, **{**settings, **changes})


@pytest.fixture(scope="package")
def corpus():
    documents = [Document(f"{i}.py", f"def f{i}(x):\n    return x + {i}\n" * 4) for i in range(32)]
    held = [Document(f"h{i}.py", f"class C{i}:\n    y = {i}\n" * 5) for i in range(8)]
    return Corpus(
        source="forty functions",
        train=tuple(documents),
        heldout=tuple(held),
        sha256="ab" * 32,
    )


@pytest.fixture(scope="package")
def data(corpus):
    return TrainingData.from_corpus(corpus, vocab=280)
