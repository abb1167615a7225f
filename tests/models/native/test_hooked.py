"""Hooked: a native and a wrapped model answer the same questions."""

from unittest.mock import Mock

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import nn

import loopscope as ls
from loopscope.errors import InputError
from loopscope.models.hooked import Hooked
from loopscope.models.hooks import NamedHooks
from tests.conftest import make_model
from tests.models.wrapped.small import TOKENS, Small


def wrapped(n_loops=4):
    return ls.wrap(Small(n_loops), TOKENS)


LOOPED = {
    "native": lambda: make_model("mesh", "1+2R3+1"),
    "wrapped": wrapped,
}
PLAIN = {
    "native": lambda: make_model("vanilla", "4"),
    "wrapped": lambda: wrapped(1),
}


@pytest.mark.parametrize("make", [*LOOPED.values(), *PLAIN.values()])
def test_every_model_is_hooked(make):
    assert isinstance(make(), Hooked)


def test_a_plain_torch_module_is_not_hooked():
    assert not isinstance(Small(), Hooked)


@pytest.mark.parametrize(("kind", "K", "layout"), [("native", 3, "1+2R3+1"), ("wrapped", 4, None)])
def test_a_looped_model_tells_its_loop(kind, K, layout):
    model = LOOPED[kind]()
    assert model.K == K and model.loops == {"core": K} and not model.is_plain
    assert layout is None or str(model.config.layout) == layout
    assert model.describe()["iterations K"] == K and model.describe()["name"] == model.name
    assert model.capture(TOKENS).K == K


@pytest.mark.parametrize("kind", PLAIN)
def test_a_plain_stack_tells_that_it_has_no_loop(kind):
    model = PLAIN[kind]()
    assert model.K == 0 and model.loops == {} and model.is_plain


@pytest.mark.parametrize("make", LOOPED.values(), ids=LOOPED)
def test_every_model_counts_its_parameters_and_names_its_hooks(make):
    model = make()
    counts = model.counts()
    assert counts.total == sum(p.numel() for p in model.parameters())
    assert counts.total > counts.non_embedding > counts.router >= 0
    assert counts.to_dict().items() >= {"total": counts.total, "router": counts.router}.items()
    patterns = model.hook_patterns()
    assert sum(patterns.values()) == len(model.hook_dict)
    assert any("{t}" in pattern and n == model.K for pattern, n in patterns.items())
    listing = "\n".join(model.hook_listing(every=True))
    assert all(name in listing for name in model.hook_dict)


def test_only_what_the_configuration_does_not_say_is_structure():
    native, other = LOOPED["native"](), wrapped()
    assert native.structure() == {} and native.specification() == "" and native.outline() is None
    assert other.structure().keys() == {"map"}
    assert "core" in other.specification()
    assert any("core" in line for line in other.outline().lines())


@pytest.mark.parametrize("make", LOOPED.values(), ids=LOOPED)
def test_reading_out_h_K_gives_h_out_and_the_logits(make):
    model = make()
    trajectory = model.capture(TOKENS, logits=True)
    h_K = trajectory.h[-1]
    with torch.no_grad():
        torch.testing.assert_close(model.read_out(h_K, TOKENS), trajectory.h_out)
        logits = torch.stack(list(model.read_out_logits(h_K, TOKENS)))
    torch.testing.assert_close(logits, trajectory.logits)
    assert not torch.equal(model.read_out(trajectory.h[0], TOKENS), trajectory.h_out)


def test_a_wrapped_model_is_read_out_with_tokens_and_a_loop_only():
    model, plain = wrapped(), wrapped(1)
    h_K = model.capture(TOKENS).h[-1]
    with pytest.raises(InputError, match="give its tokens too"):
        model.read_out(h_K)
    with pytest.raises(InputError, match="has no loop, so there is no state to read out"):
        plain.read_out(h_K, TOKENS)
    with pytest.raises(InputError, match="has no loop"):
        list(plain.read_out_logits(h_K, TOKENS))


def tokenizer(*words):
    return Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token=words[0]))


def test_equal_configuration_and_tokenizer_mean_the_same_twin():
    model = make_model("base", seed=0)
    again = make_model("base", seed=1)
    again.name = "another name"
    assert model.twin_key() == again.twin_key()
    model.tokenizer, again.tokenizer = tokenizer("a", "b"), tokenizer("a", "b")
    assert model.twin_key() == again.twin_key()
    again.tokenizer = tokenizer("a", "c")
    assert model.twin_key() != again.twin_key()
    again.tokenizer = None
    assert model.twin_key() != again.twin_key()
    assert make_model("base", "1+2R4+1").twin_key() != make_model("base").twin_key()
    assert make_model("residual").twin_key() != make_model("base").twin_key()


def test_a_wrapped_model_has_no_twin():
    model = wrapped()
    assert model.twin_key() is None
    with pytest.raises(InputError, match="only its weights are known"):
        model.untrained()


class Lens(nn.Module):
    """A module that shows another's attributes and gives something else."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def __getattr__(self, name: str):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)

    def forward(self, tokens):
        return self.inner(tokens) * 0


def test_what_only_looks_like_a_model_of_ours_is_not_taken_for_one(make_model):
    with pytest.raises(InputError, match="wrap takes a torch module, given Mock"):
        ls.wrap(Mock())
    lens = Lens(make_model("base"))
    assert isinstance(lens, Hooked)  # it has all the names
    assert not isinstance(lens, NamedHooks)  # what wrap, load and Monitor ask
    assert isinstance(make_model("base"), NamedHooks) and isinstance(wrapped(), NamedHooks)
