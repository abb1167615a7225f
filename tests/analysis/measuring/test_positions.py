"""States whose positions are not the tokens: what is defined is measured, the rest withheld."""

from itertools import combinations_with_replacement

import numpy as np
import pytest
import torch
from sklearn.metrics.pairwise import euclidean_distances, rbf_kernel

import loopscope as ls
from loopscope.analysis.collapse import per_sample
from loopscope.analysis.measures.cka_estimators import cka
from loopscope.analysis.tables import COMPARED
from loopscope.errors import InputError
from loopscope.figures import cka as draw_cka
from loopscope.figures import draw_all
from tests.standins import positions

TOKENS = torch.randint(61, (9, 12), generator=torch.Generator().manual_seed(3))
MODELS = {
    "latents": positions.Latents,
    "few_latents": lambda: positions.Latents(latents=3),
    "subset": positions.Subset,
    "pooled": positions.Pooled,
}


@pytest.fixture(scope="module", params=MODELS)
def measured(request):
    model = ls.wrap(MODELS[request.param](), example=TOKENS[:2], name=request.param)
    return model, ls.measure(model, TOKENS, measures=COMPARED, batch_size=4)


def by_hand(x: np.ndarray, y: np.ndarray) -> float:
    """Biased CKA with the RBF kernel, centred by hand."""
    kernels = []
    for state in (x, y):
        gamma = 1 / (2 * np.median(euclidean_distances(state, squared=True)))
        K = rbf_kernel(state, gamma=gamma)
        kernels.append(K - K.mean(0) - K.mean(1)[:, None] + K.mean())
    K, L = kernels
    return float((K * L).sum() / np.sqrt((K * K).sum() * (L * L).sum()))


def test_cka_is_that_of_states_of_the_same_positions_and_no_other(measured):
    model, tables = measured
    states = model.capture(TOKENS).states
    rows = tables.cka[tables.cka["kernel"].eq("rbf") & tables.cka["estimator"].eq("biased")]
    values = rows.set_index(["sample", "state_a", "state_b"])
    for a, b in combinations_with_replacement(states, 2):
        same = states[a].shape[1] == states[b].shape[1] >= 4
        for sample in range(len(TOKENS)):
            row = values.loc[(sample, a, b)]
            if same:
                pair = (states[name][sample].double().numpy() for name in (a, b))
                assert row["value"] == pytest.approx(by_hand(*pair), abs=1e-5)
                assert row.isna()["flag"]
            else:
                assert np.isnan(row["value"]) and row["flag"] == "shape"


def test_steps_are_those_between_states_of_one_shape(measured):
    model, tables = measured
    h = model.capture(TOKENS).h
    rows = tables.delta.set_index(["sample", "t"])
    for t in range(model.K):
        row = rows.loc[(4, t)]
        if h[t].shape == h[t + 1].shape:
            step = (h[t + 1][4] - h[t][4]).norm() / h[t][4].norm()
            assert row["value"] == pytest.approx(float(step), rel=1e-4)
        else:
            assert row["flag"] == "shape"
            assert row[["value", "ratio", "mixed", "turn"]].isna().all()


def test_spectrum_and_rank_are_of_every_state(measured):
    model, tables = measured
    for name, state in model.capture(TOKENS).states.items():
        sigma = torch.linalg.svdvals(state[2].double())
        p = sigma / sigma.sum()
        effective = torch.exp(-(p * p.log()).sum())
        rank = tables.rank.set_index(["sample", "state", "measure"]).loc[(2, name, "effective")]
        assert rank["value"] == pytest.approx(float(effective), rel=1e-4)
        ratios = tables.spectrum.set_index(["sample", "state"]).loc[(2, name)]["sigma_rel"]
        assert np.allclose(ratios[: len(sigma)], sigma / sigma[0], atol=1e-5)


def test_the_notes_say_which_states_have_other_positions(measured):
    model, tables = measured
    notes = "; ".join(tables.provenance["models"][model.name]["notes"])
    other = {"latents": "4 in h_emb", "few_latents": "3 in", "subset": "4 in h3", "pooled": "6 in"}
    assert "positions: 12 of a sample" in notes and other[model.name] in notes


def test_figures_draw_what_there_is_and_name_what_is_left_out(measured, tmp_path):
    model, tables = measured
    drawn = draw_all(tables, tmp_path, None)
    files = {path.name for path in (tmp_path / "figures").iterdir()}
    assert {"fig3_update.png", "fig4_cka.png", "fig5_spectrum.png"} <= files, drawn
    text = draw_cka(tables)._supxlabel.get_text()
    assert ("(shape)" in text) == (model.name != "latents")


def test_positions_can_be_read_out_where_the_state_fits():
    model = ls.wrap(positions.Pooled(), example=TOKENS[:2])
    tables = ls.measure(model, TOKENS, measures=["readout", "loss"])
    raw = tables.readout[tables.readout["reading"].eq("raw")].set_index(["sample", "t"])
    loss = tables.loss.set_index("sample")["value"]
    for t, fits in enumerate((False, False, True, True)):
        rows = raw.xs(t, level="t")
        assert rows["value"].notna().all() if fits else rows["flag"].eq("shape").all()
    assert np.array_equal(raw.xs(3, level="t")["value"], loss)


def test_first_tokens_are_left_out_of_states_of_tokens_alone():
    model = ls.wrap(positions.Latents(), example=TOKENS[:2])
    tables = ls.measure(model, TOKENS, measures=["rank", "cka"], drop_first=3)
    whole = ls.measure(model, TOKENS, measures=["rank", "cka"])
    assert tables.rank["value"].equals(whole.rank["value"])
    pooled = ls.wrap(positions.Pooled(), example=TOKENS[:2])
    rank = ls.measure(pooled, TOKENS, measures=["rank"], drop_first=3).rank
    h = pooled.capture(TOKENS).h
    for name, state in (("h0", h[0][:, 3:]), ("h1", h[1])):
        sigma = torch.linalg.svdvals(state[0].double())
        stable = rank.set_index(["sample", "state", "measure"]).loc[(0, name, "stable")]["value"]
        assert stable == pytest.approx(float((sigma**2).sum() / sigma[0] ** 2), rel=1e-5)


def test_rank_of_latents_is_held_against_as_many_as_there_are():
    model = ls.wrap(positions.Latents(latents=5), example=TOKENS[:2])
    signs = per_sample(ls.measure(model, TOKENS))
    assert np.allclose(signs["erank_share"], signs["erank_K"] / 5)


def test_no_direction_is_made_up_for_a_step_that_has_none():
    model = ls.wrap(positions.Pooled(), example=TOKENS[:2])
    signs = per_sample(ls.measure(model, TOKENS, measures=COMPARED))
    assert signs[["turn", "turn_skew"]].isna().all(axis=None)


def test_cka_refuses_states_of_different_tokens():
    states = [torch.randn(n, 6) for n in (5, 7, 5)]
    with pytest.raises(InputError, match="5, 7, 5 tokens"):
        cka(states)
