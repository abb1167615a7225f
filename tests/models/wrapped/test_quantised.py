"""Weights that are no parameters: dynamically quantised, codes in buffers, packed."""

import pytest
import torch
from torch import nn

import loopscope as ls
from loopscope.analysis.comparisons.stamps import stamp_of_model
from tests.models.wrapped.programs import VOCAB as PROGRAM_VOCAB
from tests.models.wrapped.programs import Item, Program, Runs
from tests.models.wrapped.small import TOKENS, Small, same, seen
from tests.standins.quantised import Frozen, Int8, Masked, Table, dynamic, replaced

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
SAMPLES = torch.randint(50, (5, 20), generator=torch.Generator().manual_seed(1))


class MaskedSmall(Small):
    """Blocks with causal masks and positions as buffers."""

    def build(self, d):
        self.pre, self.core, self.coda = Masked(d), Masked(d), Masked(d)


class Plain(nn.Module):
    """A layer norm without parameters."""

    def __init__(self, norm):
        super().__init__()
        self.shape = norm.normalized_shape

    def forward(self, x):
        return nn.functional.layer_norm(x, self.shape)


def bare() -> nn.Module:
    """A model without a single parameter."""
    module = replaced(replaced(Small(), Int8), Table, nn.Embedding)
    return replaced(module, Plain, nn.LayerNorm)


MAKERS = {
    "dynamic": lambda: dynamic(Small()),
    "int8": lambda: replaced(Small(), Int8),
    "frozen": lambda: replaced(Small(), Frozen),
    "masked int8": lambda: replaced(MaskedSmall(), Int8),
    "masked dynamic": lambda: dynamic(MaskedSmall()),
    "no parameters": bare,
}


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_a_quantised_model_is_mapped_and_measured_as_its_original(make):
    module = make()
    model = ls.wrap(module, TOKENS)
    assert (str(model.map), model.map.head, model.map.causal) == ("1+1R4+1", "head", True)
    wanted = seen(module, "core", "out")
    states = ls.capture(model, TOKENS, logits=True)
    assert same(states.h_m, wanted)
    assert torch.equal(states.logits, module(TOKENS))
    names = [name for name in model.map.main.shared if "weight" in name and ".n." not in name]
    assert len(names) == 2 and not any(it.own for it in model.map.main.iterations)
    assert model.counts().shared >= 2 * 32 * 128
    tables = ls.measure(model, SAMPLES, measures=["update", "cka", "loss", "readout"])
    assert len(tables.loss) == 5 and tables.update["value"].notna().all()
    assert model.with_loops(2).map.K == 2
    assert "float32, cpu" in str(model.describe()) and "parameters" in repr(model)


def test_masks_positions_scales_and_tables_are_no_matrices():
    def weights(module):
        return ls.wrap(module, TOKENS).counts().total

    extra = weights(MaskedSmall()) - weights(Small())
    assert extra == 0
    codes = sum(b.numel() for n, b in bare().named_buffers() if n.endswith("weight_int8"))
    assert weights(bare()) == codes


def test_rounding_by_the_range_of_the_batch_is_said():
    model = ls.wrap(dynamic(Small()), TOKENS)
    assert any("dynamic quantisation" in note for note in model.map.notes)
    module = dynamic(Small())
    module.core.forward = lambda x, f=module.core.forward: f(x) + x.mean(1, keepdim=True)
    assert ls.wrap(module, TOKENS).map.causal is False


@pytest.mark.parametrize("make", [lambda m: m, dynamic, lambda m: replaced(m, Int8)])
def test_what_was_shared_before_it_was_quantised_is_a_loop(make):
    module = make(Runs(Program(1, ((3, (Item("tied"),)),), 1)))
    model = ls.wrap(module, TOKENS % PROGRAM_VOCAB)
    assert str(model.map) == "1+1R3+1"
    assert model.map.main.mechanic == "parameters" and len(model.map.main.shared) == 1


def test_a_buffer_that_modules_share_makes_them_a_loop():
    module = replaced(Runs(Program(1, ((3, (Item("own"), Item("shared"))),), 1)), Int8)
    blocks = module.body["l0a"]
    for block in blocks[1:]:
        block.inner.weight_int8 = blocks[0].inner.weight_int8
    model = ls.wrap(module, TOKENS % PROGRAM_VOCAB)
    assert len(model.map.main.iterations[0].units) == 2
    assert "body.l0a.0.inner.weight_int8" in model.map.main.shared


def test_packed_weights_are_part_of_what_tells_two_models_apart():
    def stamp(change):
        module = Small()
        with torch.no_grad():
            module.core.a.weight[0, 0] += change
        return stamp_of_model(ls.wrap(dynamic(module), TOKENS))

    assert stamp(0.0) == stamp(0.0) != stamp(2.0)
