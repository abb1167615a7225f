"""Arguments of a call: what is refused, what the example gives, and numbers of iterations."""

import numpy as np
import pytest
import torch
from torch import nn

import loopscope as ls
from loopscope.errors import InputError
from tests.models.wrapped.real import llama
from tests.models.wrapped.small import TOKENS, Small, same, seen


class Stepped(Small):
    """As many iterations as an argument says."""

    def forward(self, tokens, num_steps=4):
        self.n_loops = num_steps
        return super().forward(tokens)


class Masked(Small):
    """A mask without a default, or with one."""

    def forward(self, tokens, mask, scale=1.0):
        return self.rest(self.loop(self.pre(self.embed(tokens) * mask[..., None] * scale)))


class MaybeMasked(Masked):
    """A mask that may be left out."""

    def forward(self, tokens, mask=None, scale=1.0):
        mask = torch.ones(tokens.shape) if mask is None else mask
        return super().forward(tokens, mask, scale)


@pytest.mark.parametrize(
    "name", ["stop_at_layer", "start_at_layer", "prepend_bos", "past_kv_cache"]
)
def test_arguments_of_native_models_are_not_swallowed(name):
    for module in (llama(), Small()):
        model = ls.wrap(module, TOKENS)
        for call in (model, model.run_with_cache, model.run_with_hooks):
            with pytest.raises(InputError, match=name):
                call(TOKENS, **{name: 1})


def test_an_argument_that_forward_does_not_have_is_refused_with_those_it_has():
    model = ls.wrap(Stepped(), TOKENS)
    with pytest.raises(InputError, match="forward takes tokens, num_steps"):
        model(TOKENS, foo=1)
    with pytest.raises(InputError, match="foo"):
        model({"tokens": TOKENS, "foo": 1})
    with pytest.raises(InputError, match="given twice"):
        model(TOKENS, tokens=TOKENS)
    with pytest.raises(InputError, match="positional"):
        model(TOKENS, 3, 4)


def test_tensors_of_the_example_are_never_used_for_other_tokens():
    mask = torch.ones(2, 8)
    mask[:, :3] = 0
    other = torch.randint(50, (4, 8), generator=torch.Generator().manual_seed(1))
    for example in ((TOKENS, mask, 0.5), {"tokens": TOKENS, "mask": mask, "scale": 0.5}):
        module = Masked()
        model = ls.wrap(module, example)
        with pytest.raises(InputError, match="needs mask too, which the example had"):
            model(other)
        ones = torch.ones(4, 8)
        assert torch.equal(model(other, mask=ones), module(other, ones, 0.5))
        assert torch.equal(
            model((other, ones)), module(other, ones, 1.0 if type(example) is tuple else 0.5)
        )
        module = MaybeMasked()
        model = ls.wrap(module, example)
        assert torch.equal(model(other), module(other, scale=0.5))
        assert same(ls.capture(model, other).h_m, seen(module, "core", "out", other, scale=0.5))


@pytest.mark.parametrize("example", [(TOKENS, 4), {"tokens": TOKENS, "num_steps": 4}])
def test_a_number_of_iterations_that_is_set_comes_before_the_examples(example):
    module = Stepped()
    model = ls.wrap(module, example, loops=7)
    assert model.map.K == 7 and torch.equal(model(TOKENS), module(TOKENS, 7))
    assert ls.wrap(module, example).with_loops(2).map.K == 2
    assert torch.equal(model(TOKENS, num_steps=3), module(TOKENS, 3))  # the call comes first
    assert torch.equal(model((TOKENS, 3)), module(TOKENS, 3))
    assert torch.equal(ls.wrap(module, example)(TOKENS), module(TOKENS, 4))


@pytest.mark.parametrize("loops", [2.5, "3", {}, None, [2], {"core": 1.5}, np.float64(2)])
def test_what_is_no_number_of_iterations_is_refused(loops):
    model = ls.wrap(Small(), TOKENS)
    if loops is None:
        assert model.with_loops(None).map.K == 4  # its own
        return
    with pytest.raises(InputError, match="loops"):
        model.with_loops(loops)


def test_whole_numbers_of_other_kinds_are_taken():
    model = ls.wrap(Small(), TOKENS, loops=np.int64(3))
    assert model.map.K == 3 and model.with_loops({"core": torch.tensor(5)}).map.K == 5


@pytest.mark.parametrize("counts", [{"loops": {"attribute": "n_loops"}}, {}])
def test_a_core_that_runs_once_by_default_can_be_looped_by_a_spec(counts):
    module = Small(n_loops=1)
    model = ls.wrap(module, TOKENS, spec={"core": ["core"], **counts}, loops=4)
    assert str(model.map) == "1+1R4+1" and module.n_loops == 1
    states = ls.capture(model, TOKENS)
    module.n_loops = 4
    assert same(states.h_m, seen(module, "core", "out"))


def test_input_that_is_none_is_refused_and_lists_are_read():
    module = Small()
    model = ls.wrap(module, [[1, 2, 3], [4, 5, 6]])
    assert model.map.K == 4 and model([[1, 2, 3]]).shape == (1, 3, 50)
    for call in (lambda: model(), lambda: model(None), lambda: ls.capture(model, None)):
        with pytest.raises(InputError, match="give"):
            call()
    with pytest.raises(InputError, match="empty"):
        ls.wrap(module, TOKENS[:0])
    with pytest.raises(InputError, match="unequal"):
        ls.wrap(module, [[1, 2], [3]])
    with pytest.raises(InputError, match="spec must be"):
        ls.wrap(module, TOKENS, spec=7)


def test_arguments_of_a_model_of_floats_may_come_by_name():
    class Floats(Small):
        def build(self, d):
            self.embed = nn.Linear(5, d)

    module, x = Floats(), torch.randn(2, 8, 5)
    model = ls.wrap(module, {"tokens": x})
    assert torch.equal(model({"tokens": x}), module(x))
    assert same(ls.capture(model, {"tokens": x}).h_m, seen(module, "core", "out", x))


def test_modules_that_cannot_be_seen_into_are_refused():
    class Lazy(Small):
        def build(self, d):
            self.core = nn.LazyLinear(d)

    with pytest.raises(InputError, match="no shape yet"):
        ls.wrap(Lazy(), TOKENS)
    with pytest.warns(DeprecationWarning):
        traced = torch.jit.trace(nn.Sequential(nn.Linear(32, 32), nn.Tanh()), torch.randn(1, 8, 32))
    with pytest.raises(InputError, match="the original module"):
        ls.wrap(traced, TOKENS)
    module = Small()
    module.core = traced
    with pytest.raises(InputError, match="core was scripted"):
        ls.wrap(module, TOKENS)
