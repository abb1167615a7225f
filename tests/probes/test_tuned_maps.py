"""Tuned lens maps: what they can bring back, what they were fitted on, and their file."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from loopscope.errors import InputError
from loopscope.probes.tuned_maps import (
    TunedFold,
    TunedLens,
    TunedMap,
    brought,
    fingerprint,
    fit_maps,
    sample_hashes,
    training_tokens,
)
from tests.conftest import make_model


@pytest.fixture(scope="module")
def model():
    return make_model("base", noise=0.3)


def divergence(model, p_read, q_read):
    with torch.no_grad():
        p, q = (
            next(iter(model.unembed_state(x[None]))).double().log_softmax(-1)
            for x in (p_read, q_read)
        )
    return float((p.exp() * (p - q)).sum(-1).mean())


def rows(count, width=32, seed=0):
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


def test_a_turned_and_moved_state_is_brought_back_on_rows_it_was_not_fitted_on(model):
    h_out, fresh = rows(3000), rows(200, seed=1)
    turn, shift = torch.linalg.qr(rows(32, seed=2)).Q, 3.0

    def hidden(x):
        return x @ turn + shift

    maps, losses = fit_maps(model, {"h1": hidden(h_out)}, h_out, None, steps=50)
    assert divergence(model, fresh, hidden(fresh)) > 1.0
    assert divergence(model, fresh, maps["h1"](hidden(fresh))) < 0.01
    before, after = losses["h1"]
    assert after <= before


def test_steps_improve_on_the_ridge_map_where_the_state_keeps_a_part_only(model):
    h_out, fresh = rows(4000), rows(400, seed=1)

    def hidden(x):  # not linear, and with less of it
        return torch.tanh(x)[:, :24]

    ridge, _ = fit_maps(model, {"h1": hidden(h_out)}, h_out, None, steps=1)
    maps, losses = fit_maps(model, {"h1": hidden(h_out)}, h_out, None, steps=120)
    assert losses["h1"][1] < losses["h1"][0]
    assert divergence(model, fresh, maps["h1"](hidden(fresh))) < 0.99 * divergence(
        model, fresh, ridge["h1"](hidden(fresh))
    )


def test_fitting_leaves_the_model_as_it_was(model):
    before = {name: value.clone() for name, value in model.named_parameters()}
    fit_maps(model, {"h1": rows(300)}, rows(300, seed=3), None, steps=3)
    assert all(value.grad is None for value in model.parameters())
    assert all(torch.equal(before[name], value) for name, value in model.named_parameters())


def test_noise_is_not_read_better_by_what_was_fitted_to_it(model):
    """Steps on 200 rows of noise learn those rows; what is kept was chosen on others."""
    h_out, noise = rows(200), rows(200, seed=4)
    maps, losses = fit_maps(model, {"h1": noise}, h_out, None, steps=60)
    fresh, other = rows(400, seed=5), rows(400, seed=6)
    mean = h_out.mean(0).expand_as(fresh)
    assert losses["h1"][1] <= losses["h1"][0]
    assert divergence(model, fresh, maps["h1"](other)) > 0.7 * divergence(model, fresh, mean)


def test_states_that_are_not_finite_get_no_map(model):
    maps, losses = fit_maps(
        model, {"h0": torch.full((50, 32), torch.nan), "h1": rows(50)}, rows(50), None, steps=2
    )
    assert set(maps) == set(losses) == {"h1"}


def two_folds(model):
    known = [sample_hashes(i, document) for i, document in enumerate("aab")]
    folds = tuple(
        TunedFold(
            {"h0": TunedMap(torch.eye(32) * scale, torch.zeros(32))}, frozenset().union(*of_fold),
            {"h0": (2.0, 1.0)},
        )
        for scale, of_fold in ((10.0, known[:2]), (20.0, known[2:]))
    )  # fmt: skip
    return TunedLens(folds, fingerprint(model), {"tokens": 4}), known


def test_a_sample_is_read_by_maps_that_know_neither_it_nor_its_document(model):
    lens, known = two_folds(model)
    state = rows(4)[:, None]
    fresh, same_document = sample_hashes(99, "c"), sample_hashes(98, "a")
    found = brought(lens, state, "h0", [known[0], known[2], fresh, same_document])
    for sample, scale in enumerate((20.0, 10.0, 10.0, 20.0)):
        torch.testing.assert_close(found[sample], scale * state[sample])
    everywhere = known[0] | known[2]
    assert brought(lens, state[:1], "h0", [everywhere]).isnan().all()


def test_maps_are_the_same_when_read_again(model, tmp_path):
    lens, _ = two_folds(model)
    path = tmp_path / "new" / "maps.safetensors"
    lens.save(path)
    again = TunedLens.load(path, model)
    assert again.provenance == lens.provenance and again.states == ["h0"]
    for one, other in zip(lens.folds, again.folds, strict=True):
        assert torch.equal(one.maps["h0"].weight, other.maps["h0"].weight)
        assert torch.equal(one.maps["h0"].bias, other.maps["h0"].bias)
        assert one.fitted_on == other.fitted_on and one.losses == other.losses
    with safe_open(path, framework="pt") as file:
        assert json.loads(file.metadata()["facts"])["provenance"] == {"tokens": 4}


def test_maps_of_other_weights_and_other_files_are_refused(model, tmp_path):
    path = tmp_path / "maps.safetensors"
    two_folds(model)[0].save(path)
    with pytest.raises(InputError, match="fitted to other weights than those of 'base'"):
        TunedLens.load(path, make_model("base", seed=5))
    with pytest.raises(InputError, match="other weights"):
        TunedLens.load(path, model.with_loops(5))
    save_file({"x": torch.zeros(2)}, path)
    with pytest.raises(InputError, match="is no tuned lens of loopscope"):
        TunedLens.load(path, model)
    path.write_bytes(b"no tensors")
    with pytest.raises(InputError, match="cannot read"):
        TunedLens.load(path, model)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write"):
        two_folds(model)[0].save(tmp_path / "file" / "maps.safetensors")


def test_wide_models_are_fitted_on_fewer_tokens():
    assert training_tokens(160, 6) == 2**14
    assert 512 <= training_tokens(8192, 40) < 2**14
