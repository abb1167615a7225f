"""Gates on other positions than the tokens': named, said, measured and drawn as far as they go."""

import warnings

import numpy as np
import pytest
import torch

import loopscope as ls
from loopscope.errors import InputError
from tests.models.wrapped.small import TOKENS
from tests.standins.gated import Chosen, Gated, Prefixed

POSITIONS = {"registers": 3, "first": 1, "routed": 3, "flat": 3}


def wrapped(module, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return ls.wrap(module, TOKENS, **options)


@pytest.mark.parametrize("where", [*POSITIONS, "ragged"])
def test_a_gate_on_other_positions_is_left_out_with_a_doubt_that_names_it(where):
    with pytest.warns(UserWarning, match="exit_gate gives one number for each of"):
        model = ls.wrap(Gated(where), TOKENS)
    assert not model.map.routers
    [doubt] = model.map.doubts
    assert ('gates = ["exit_gate"]' in doubt) or where == "ragged"
    assert ls.capture(model, TOKENS).gates == {}


@pytest.mark.parametrize("where", POSITIONS)
def test_a_spec_takes_a_gate_on_other_positions(where):
    module = Gated(where)
    model = ls.wrap(module, TOKENS, spec={"gates": ["exit_gate"]})
    assert not model.map.doubts
    for tokens in (TOKENS, TOKENS[:1]):
        probabilities = ls.capture(model, tokens).gates["exit_gate"]
        assert len(probabilities) == len(module.given) == 4
        for p, scores in zip(probabilities, module.given, strict=True):
            assert p.shape == (len(tokens), POSITIONS[where])
            rows = scores.sigmoid().reshape(len(tokens), -1)
            torch.testing.assert_close(p, rows)
    says = any("rows are read as 3 of the first sample" in note for note in model.map.notes)
    assert says == (where == "flat")


def test_a_gate_on_the_states_positions_is_found_where_they_are_not_the_tokens():
    module = Prefixed()
    model = wrapped(module)
    p = ls.capture(model, TOKENS).gates["exit_gate"]
    assert p[2].shape == (2, 11)
    torch.testing.assert_close(p[2], module.given[2][..., 0].sigmoid())


def test_a_gate_of_several_parts_on_other_positions_is_taken_as_the_spec_says():
    module = Chosen()
    model = ls.wrap(module, TOKENS, spec={"gates": ["gate"]})
    p = ls.capture(model, TOKENS).gates["gate"]
    state = ls.capture(model, TOKENS).h[3]
    torch.testing.assert_close(p[3], module.gate(state[:, ::2])[..., 0])


@pytest.mark.parametrize("where", ["ragged", "wide"])
def test_what_is_not_one_number_for_each_position_of_each_sample_is_refused(where):
    with pytest.raises(InputError, match=r"exit_gate, which gives \(.*a gate gives one number"):
        ls.wrap(Gated(where), TOKENS, spec={"gates": ["exit_gate"]})


def test_numbers_that_are_unequally_many_on_another_input_are_left_out_with_a_warning():
    module = Gated("ragged")
    state = module.pre(module.embed(TOKENS))
    kept = [(row[:, 0] > 0).sum().item() for row in state]
    even = TOKENS[[int(np.argmax(kept))] * 2]  # two equal texts: equally many in each
    model = ls.wrap(module, even, spec={"gates": ["exit_gate"]})
    assert ls.capture(model, even).gates["exit_gate"][0].shape == (2, max(kept))
    odd = next(
        t
        for t in torch.randint(50, (64, 2, 8), generator=torch.Generator().manual_seed(0))
        if len(module.looked_at(module.pre(module.embed(t)))) % 2
    )
    with pytest.warns(UserWarning, match="equally many numbers for each sample"):
        assert ls.capture(model, odd).gates["exit_gate"][0] is None


@pytest.mark.parametrize("drop", [0, 2])
def test_rows_of_a_gate_are_over_the_positions_that_it_has(drop):
    module = Gated("registers")
    model = ls.wrap(module, TOKENS, spec={"gates": ["exit_gate"]})
    tables = ls.measure(model, TOKENS, measures="routing", drop_first=drop)
    p = ls.capture(model, TOKENS).gates["exit_gate"]
    for t in range(4):
        rows = tables.routing[tables.routing["t"].eq(t)]
        assert set(rows["target"]) == {"exit_gate"}
        np.testing.assert_allclose(rows["mean"], p[t].mean(1).double(), rtol=1e-5)
        x = p[t].double()
        entropy = -(x * x.log() + (1 - x) * (1 - x).log()).mean(1)
        np.testing.assert_allclose(rows["entropy"], entropy, rtol=1e-5)
    assert len(tables.tokens) == 0
    [note] = tables.provenance["models"]["Gated"]["notes"]
    assert "exit_gate (3) have positions of their own, not the 8 of the tokens" in note


def test_a_figure_by_token_leaves_out_gates_on_other_positions_and_says_so():
    module = Gated("registers")
    module.halt = torch.nn.Linear(32, 1)
    plain = module.looked_at
    module.looked_at = lambda x: (module.halt(x), plain(x))[1]
    model = ls.wrap(module, TOKENS, spec={"gates": ["exit_gate", "halt"]})
    tables = ls.measure(model, TOKENS, measures="routing")
    assert set(tables.tokens["target"]) == {"halt"}
    fig = ls.plot.routers(tables, "Gated")
    text = " ".join(" ".join(t.get_text().split()) for t in fig.findobj(match=_is_text))
    assert "On positions of their own, hence not by token: exit_gate." in text


def _is_text(artist):
    return hasattr(artist, "get_text")
