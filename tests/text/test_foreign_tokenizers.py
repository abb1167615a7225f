"""Anybody's tokenizer: the ids are those of its own library, and no token is added."""

import io
import json
from typing import ClassVar

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.implementations import ByteLevelBPETokenizer
from torch import nn
from transformers import CanineTokenizer, PreTrainedTokenizerFast

import loopscope as ls
from loopscope.errors import InputError
from loopscope.models.native.checkpoint import save
from loopscope.models.opening import zoo_folder
from loopscope.text import load_samples, tokenizer_stamp, usable_tokenizer
from loopscope.text.foreign_tokenizers import PROBES

TEXT = "def f(x):\n    return x + 1  # naïve\n"


class Model(nn.Module):
    """A looped model of any vocabulary."""

    def __init__(self, vocabulary=3000):
        super().__init__()
        torch.manual_seed(0)
        self.n_loops, self.embed = 3, nn.Embedding(vocabulary, 16)
        self.core = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 16))
        self.head = nn.Linear(16, vocabulary)

    def forward(self, tokens):
        x = self.embed(tokens)
        for _ in range(self.n_loops):
            x = x + self.core(x)
        return self.head(x)


class Tiktoken:
    """As tiktoken's Encoding of single bytes: `encode` refuses special tokens, no `add_...`."""

    n_vocab = 257
    _mergeable_ranks: ClassVar = {bytes([i]): i for i in range(256)}
    _special_tokens: ClassVar = {"<|endoftext|>": 256}
    _pat_str = "."

    def encode(self, text, *, allowed_special=(), disallowed_special="all"):
        if "<|endoftext|>" in text and disallowed_special == "all":
            raise ValueError("disallowed special token")
        return self.encode_ordinary(text)

    def encode_ordinary(self, text):
        return list(text.encode())

    def decode(self, tokens, errors="replace"):
        parts = [bytes([t]) if t < 256 else b"<|endoftext|>" for t in tokens if t < 257]
        if len(parts) < len(tokens):
            raise KeyError(f"Invalid token for decoding: {max(tokens)}")
        return b"".join(parts).decode("utf-8", errors)


class Llama:
    """As the tokenizers of Llama's and minbpe's code: flags that must be given, lists of ids."""

    def encode(self, s, bos, eos):
        return [1] * bos + [ord(c) % 500 + 3 for c in s] + [2] * eos

    def decode(self, ids):
        return "".join(chr(i - 3) for i in ids)


class Characters:
    """As nanoGPT's character level: what is not in its table is a KeyError."""

    stoi: ClassVar = {c: i for i, c in enumerate(" \nabcdefghijklmnopqrstuvwxyz")}

    def encode(self, s):
        return [self.stoi[c] for c in s]

    def decode(self, ids):
        return "".join(list(self.stoi)[i] for i in ids)


def sentencepiece(**more):
    """A real one, trained on this file."""
    import sentencepiece as spm

    written = io.BytesIO()
    with open(__file__, encoding="utf-8") as file:
        lines = file.read().splitlines()
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=written, vocab_size=420, byte_fallback=True,
        model_type="bpe", minloglevel=2,
    )  # fmt: skip
    return spm.SentencePieceProcessor(model_proto=written.getvalue(), **more)


def zoo_tokenizer():
    return Tokenizer.from_file(str(zoo_folder() / "mesh" / "tokenizer.json"))


def fast():
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=zoo_tokenizer(), bos_token="<|endoftext|>", pad_token="<|endoftext|>"
    )
    wrapped(["a b c d e f", "a"], padding=True, truncation=True, max_length=3)  # leaves its mark
    return wrapped


def code(text):
    return [ord(c) % 700 for c in text]


def asked(text):
    return {"input_ids": torch.tensor([code(text)]), "attention_mask": None}


KINDS = {
    "tokenizers": (zoo_tokenizer, lambda t, s: t.encode(s, add_special_tokens=False).ids),
    "fast": (fast, lambda t, s: zoo_tokenizer().encode(s, add_special_tokens=False).ids),
    "slow": (CanineTokenizer, lambda t, s: [ord(c) for c in s]),
    "tiktoken": (Tiktoken, lambda t, s: list(s.encode())),
    "sentencepiece": (
        lambda: sentencepiece(add_bos=True, add_eos=True),
        lambda t, s: t.EncodeAsIds(s, add_bos=False, add_eos=False),
    ),
    "llama": (Llama, lambda t, s: Llama().encode(s, False, False)),
    "function": (lambda: code, lambda t, s: code(s)),
    "mapping": (lambda: asked, lambda t, s: code(s)),
    "byte_level": (
        lambda: ByteLevelBPETokenizer(vocab={c: i for i, c in enumerate(" adeft()")}, merges=[]),
        lambda t, s: t.encode(s).ids,
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_ids_are_those_of_the_tokenizers_own_library(kind):
    make, oracle = KINDS[kind]
    tokenizer = make()
    model = ls.wrap(Model(), tokenizer=tokenizer)
    wanted = oracle(tokenizer, TEXT)
    assert len(wanted) > 5 and model.to_tokens(TEXT).tolist() == [wanted]
    assert len(model.to_str_tokens(TEXT)) == len(wanted)
    assert model.to_tokens([TEXT, TEXT]).tolist() == [wanted, wanted]
    if kind not in ("function", "mapping", "byte_level"):
        assert model.to_string(wanted) == (
            TEXT if kind != "sentencepiece" else tokenizer.decode(wanted)
        )
    if kind == "sentencepiece":
        assert "".join(model.to_str_tokens("def make(x)")).strip() == "def make(x)"
    assert model.with_loops(2).tokenizer is model.tokenizer


@pytest.mark.parametrize("kind", ["tiktoken", "sentencepiece", "slow", "function", "llama"])
def test_text_is_measured_and_compared_with_any_tokenizer(kind, tmp_path):
    file = tmp_path / "text.txt"
    file.write_text("The quick brown fox jumps over the lazy dog. " * 30)
    tokenizer = KINDS[kind][0]()
    model = ls.wrap(Model(), tokenizer=tokenizer, name="one")
    compared = ls.compare(
        [model], data=file, samples=4, tokens=8, measures=["update", "loss", "lens_tokens"]
        if "lens_tokens" in ls.analysis.tables.MEASURES else ["update", "loss"],
        more_loops=0,
    )  # fmt: skip
    assert not compared.failed and len(compared.tables.update)
    samples = load_samples(tokenizer, file, samples=4, tokens=8)
    assert torch.equal(samples.tokens, load_samples(model, file, samples=4, tokens=8).tokens)
    assert ls.capture(model, "a fox").K == 3


def test_tokens_beyond_the_tokenizers_ids_are_shown_as_numbers():
    model = ls.wrap(Model(), tokenizer=Tiktoken())
    assert model.to_str_tokens(torch.tensor([97, 300])) == ["a", "300"]
    assert model.to_string(torch.tensor([97, 98, 300])) == "ab300"
    assert ls.wrap(Model(), tokenizer=code).to_str_tokens("ab") == ["97", "98"]
    with pytest.raises(InputError, match="no decode"):
        ls.wrap(Model(), tokenizer=code).to_string(torch.tensor([97, 98]))


def test_special_tokens_in_a_text_are_text():
    model = ls.wrap(Model(), tokenizer=Tiktoken())
    assert model.to_tokens("a<|endoftext|>").shape == (1, 14)


def test_a_tokenizer_of_characters_is_taken_and_names_what_it_lacks():
    model = ls.wrap(Model(30), tokenizer=Characters())
    assert model.to_string(model.to_tokens("a fox")[0]) == "a fox"
    with pytest.raises(InputError, match="KeyError: 'ï'"):
        model.to_tokens("naïve")


class Silent:
    def encode(self, text, images):
        return []


@pytest.mark.parametrize(
    ("tokenizer", "said"),
    [
        (str.split, "function str.split gives no ids"),
        ("gpt2", "the text 'gpt2'; a name opens no tokenizer here"),
        (Tokenizer, "the class Tokenizer, not one of its objects"),
        (nn.Linear(2, 2), "a Linear"),
        (7, "a int"),
        (Silent(), "Silent gives no ids"),
        (len, "function len gives no ids"),
    ],
)
def test_what_is_no_tokenizer_is_refused_by_name_when_it_is_given(tokenizer, said):
    with pytest.raises(InputError, match="tiktoken") as refused:
        ls.wrap(Model(), tokenizer=tokenizer)
    assert said in str(refused.value) and "\n" not in str(refused.value)
    model = ls.wrap(Model())
    if not isinstance(tokenizer, nn.Module):
        with pytest.raises(InputError, match="tiktoken"):
            model.tokenizer = tokenizer


def test_a_models_attribute_is_used_or_left_with_a_warning():
    module = Model()
    module.tokenizer = Tiktoken()
    assert ls.wrap(module).to_tokens("ab").tolist() == [[97, 98]]
    module.tokenizer = str.split
    with pytest.warns(UserWarning, match="token ids only"):
        assert ls.wrap(module).tokenizer is None
    module = Model()
    module.tokenizer = nn.Linear(2, 2)  # a layer of this name
    assert ls.wrap(module).tokenizer is None


def test_an_example_of_text_is_read_with_any_tokenizer():
    model = ls.wrap(Model(), "a fox", tokenizer=Tiktoken())
    assert model.map.K == 3


def test_stamps_tell_tokenizers_apart_and_know_them_again():
    def stamp(tokenizer):
        return tokenizer_stamp(usable_tokenizer(tokenizer))

    other = Tiktoken()
    other._mergeable_ranks = {**other._mergeable_ranks, b"ab": 257}
    every = [stamp(t) for t in (Tiktoken(), other, Llama(), code, asked, zoo_tokenizer(), None)]
    assert len(set(every)) == len(every)
    assert stamp(Tiktoken()) == stamp(Tiktoken()) and stamp(fast()) == stamp(fast())
    assert stamp(zoo_tokenizer()) == zoo_tokenizer().to_str().encode()


def test_a_native_model_takes_one_too_and_is_not_saved_with_it(tmp_path):
    model = ls.load("base")
    model.tokenizer = Tiktoken()
    assert model.to_tokens("ab").tolist() == [[97, 98]]
    assert isinstance(hash(model.twin_key()), int)
    with pytest.raises(InputError, match=r"cannot be saved as tokenizer\.json"):
        save(model, tmp_path / "out")


def test_windows_of_a_tokenizer_that_cuts_and_pads_are_whole(tmp_path):
    file = tmp_path / "text.jsonl"
    file.write_text(json.dumps({"text": TEXT * 9}))
    cutting, plain = fast(), zoo_tokenizer()
    given = load_samples(cutting, file, samples=3, tokens=16)
    assert np.array_equal(given.tokens, load_samples(plain, file, samples=3, tokens=16).tokens)
    assert PROBES  # what is tried does not end up in the samples
