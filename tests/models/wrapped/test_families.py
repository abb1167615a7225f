"""What is known of a family is a help: it holds where a model has it, and is left out elsewhere."""

from types import MethodType, SimpleNamespace

import pytest
import torch

import loopscope as ls
from loopscope.errors import InputError
from loopscope.models.wrapped.families import known_spec
from tests.models.wrapped.real import albert, hrm_text
from tests.standins.blocks import through
from tests.standins.injected import Recurring
from tests.standins.repeated import Depth, Gated

TOKENS = torch.randint(3, 61, (2, 9), generator=torch.Generator().manual_seed(2))


def ouro(steps=4, gate="early_exit_gate"):
    """As Ouro: the inner model has the number of iterations and the gate; which may be missing."""
    module = Gated(steps=steps)
    module.config = SimpleNamespace(model_type="ouro", total_ut_steps=steps)

    def forward(inner, input_ids):
        x, gates = inner.embed_tokens(input_ids), []
        for _ in range(inner.total_ut_steps):
            x = inner.norm(through(inner.layers, x))
            gates += [] if gate is None else [getattr(inner, gate)(x)]
        return x, [], gates

    module.model.forward = MethodType(forward, module.model)
    if gate != "early_exit_gate":
        if gate is not None:
            setattr(module.model, gate, module.model.early_exit_gate)
        module.model.early_exit_gate = None
    return module


def family(module, kind):
    """A model that calls itself one of a family."""
    module.config = SimpleNamespace(model_type=kind, num_hidden_groups=1)
    return module


def counts(model):
    return [(count.kind, count.name, count.loop) for count in model.map.counts]


@pytest.mark.parametrize("gate", ["early_exit_gate", None, "leave"])
@pytest.mark.parametrize("steps", [1, 2, 4])
def test_ouro_is_opened_for_any_number_of_iterations_with_or_without_its_gate(steps, gate):
    module = ouro(steps, gate)
    model = ls.wrap(module, TOKENS)
    assert (steps if steps > 1 else 0) == model.map.K
    assert torch.equal(model(TOKENS), module(TOKENS)["logits"])
    longer = model.with_loops(3)
    assert counts(longer) == [("attribute", "model.total_ut_steps", "core")]
    states = module.states(TOKENS, 3)
    assert torch.equal(longer(TOKENS), states.logits)
    traj = ls.capture(longer, TOKENS)
    assert all(map(torch.equal, traj.h, states.loops[0].h))
    assert [router.name for router in longer.map.routers] == ([gate] if gate else [])


def test_a_gate_that_is_there_and_never_called_is_left_out_with_a_note():
    module = ouro()
    quiet = ouro(gate=None)
    module.model.forward = MethodType(quiet.model.forward.__func__, module.model)
    model = ls.wrap(module, TOKENS)
    assert model.map.K == 4 and model.map.routers == ()
    assert any("family does not fit" in note and "gates" in note for note in model.map.notes)
    with pytest.raises(InputError, match="no iteration calls"):  # the user's own is a demand
        ls.wrap(module, TOKENS, spec={"gates": ["model.early_exit_gate"]})


def test_a_family_that_runs_its_core_once_says_how_to_run_it_more_often():
    for module in (ouro(1), albert(1), hrm_text(low=1, high=1)):
        (note,) = ls.wrap(module, TOKENS).map.notes
        assert "runs its core once" in note and "--loops n" in note


@pytest.mark.parametrize(
    ("low", "high", "layout"),
    [
        (1, 1, "2"),
        (3, 1, "0+2R3+2"),
        (1, 3, "0+4R3+0"),
        (2, 2, "0+(2R2+2)R2+0"),
        (3, 2, "0+(2R3+2)R2+0"),
    ],
)
def test_hrm_text_is_opened_for_any_number_of_either_cycle(low, high, layout):
    module = hrm_text(layers=2, low=low, high=high)
    model = ls.wrap(module, TOKENS)
    assert str(model.map) == layout
    assert torch.equal(model(TOKENS), module(TOKENS, use_cache=False).logits)
    if model.map.loops:
        again = model.with_loops(5)
        name = "L_cycles" if high == 1 else "H_cycles"
        assert again.map.K == 5 and ("config", name, model.map.main.name) in counts(again)
        setattr(module.config, name, 5)
        assert torch.equal(again(TOKENS), module(TOKENS, use_cache=False).logits)


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_huginn_is_opened_for_any_number_of_iterations(steps):
    module = family(Depth(steps=steps), "huginn_raven")
    model = ls.wrap(module, TOKENS)
    assert (steps if steps > 1 else 0) == model.map.K
    longer = model.with_loops(3)
    assert counts(longer) == [("argument", "num_steps", "core")] and longer.map.K == 3


@pytest.mark.parametrize("layers", [1, 2, 5])
def test_albert_is_opened_for_any_number_of_layers(layers):
    model = ls.wrap(albert(layers), TOKENS)
    assert (layers if layers > 1 else 0) == model.map.K
    assert model.with_loops(3).map.K == 3


@pytest.mark.parametrize("kind", ["ouro", "huginn_raven", "hrm_text", "albert"])
def test_a_model_that_only_calls_itself_one_of_a_family_is_wrapped_as_any_other(kind):
    for make, setter in ((Gated, "model.total_ut_steps"), (Recurring, "num_recur")):
        module = family(make(), kind)
        wanted = ls.wrap(make(), TOKENS)
        model = ls.wrap(module, TOKENS)
        assert str(model.map) == str(wanted.map)
        assert [name for _, name, _ in counts(model)] == [setter]
        assert model.with_loops(2).map.K == 2


def test_what_a_family_names_and_the_model_lacks_is_no_part_of_its_spec():
    assert known_spec(ouro(gate="leave")).gates == ()
    assert known_spec(ouro()).gates == ("model.early_exit_gate",)
    assert known_spec(family(Gated(), "unheard_of")).source == "found"
