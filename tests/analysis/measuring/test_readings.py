"""Raw, matched and fitted readings of h(t): what each says of loops that compute nothing."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import loopscope as ls
from loopscope.analysis.measuring.streaming import Measuring, measure
from loopscope.analysis.options import Options
from loopscope.errors import InputError
from loopscope.names import READINGS
from loopscope.probes.ridge_maps import RidgeSums, fold_of_samples
from tests.analysis.planted import identity, plant
from tests.conftest import make_model

K = 3


@pytest.fixture(scope="module")
def samples():
    """Twelve windows of five documents of unequal size."""
    tokens = torch.randint(61, (12, 24), generator=torch.Generator().manual_seed(4))
    return SimpleNamespace(tokens=tokens, documents=[*"aaabbcdddeee"], provenance={})


def table(model, samples, **options):
    """L(t) by reading and t, mean over the samples."""
    readout = measure(model, samples, ["readout"], **options).readout
    assert readout["flag"].isna().all()
    return readout.groupby(["reading", "t"], observed=True)["value"].mean().unstack()


def without_core(variant):
    """A model whose core returns what it is given."""
    model = make_model(variant)
    with torch.no_grad():
        for block in model.core:
            for part in (block.attn.out, block.mlp.down):
                part.weight.zero_()
                part.bias.zero_()
    return model


@pytest.mark.parametrize("variant", ["residual", "anchor"])
def test_a_core_that_does_nothing_gains_nothing_once_length_is_matched(variant, samples):
    losses = table(without_core(variant), samples)
    gains = losses[0] - losses[K]
    assert abs(gains["raw"]) > 1e-3
    assert abs(gains["matched"]) < 1e-6 and abs(gains["fitted"]) < 1e-3


def test_every_reading_ends_at_the_loss_and_raw_alone_goes_on(samples):
    model = make_model("anchor")
    tables = measure(model, samples, ["readout", "loss"], more_loops=5)
    readout = tables.readout
    assert [*readout["reading"].cat.categories] == [*READINGS]
    for reading in READINGS:
        rows = readout[readout["reading"].eq(reading)]
        last = rows[rows["t"].eq(K)].sort_values("sample")["value"].to_numpy()
        assert np.array_equal(last, tables.loss["value"].to_numpy())
        assert rows["t"].max() == (5 if reading == "raw" else K)
    assert (readout["document"].astype(str).to_numpy()[:12] == "a").all()


def test_a_sample_is_read_by_what_was_fitted_on_other_documents(samples):
    model = make_model("mesh")
    readout = measure(model, samples, ["readout"], batch_size=5).readout
    rows = readout[readout["reading"].eq("fitted") & readout["t"].eq(1)]
    folds = np.array(fold_of_samples(samples.documents, range(12)))
    assert folds.tolist() == [0, 0, 0, 1, 1, 0, 1, 1, 1, 0, 0, 0]
    expected = np.empty(12)
    for fold in (0, 1):
        sums, other = RidgeSums(), torch.tensor(folds == 1 - fold)
        fit = ls.capture(model, samples.tokens[other])
        sums.add(fit.h[1], fit.h[K])
        for i in np.flatnonzero(folds == fold):
            tokens = samples.tokens[i : i + 1]
            h = sums.solve()(ls.capture(model, tokens).h[1])
            logits = model.run_with_hooks(
                tokens, fwd_hooks=[("coda.hook_in", lambda _, hook, h=h: h)]
            )
            expected[i] = F.cross_entropy(logits[0, :-1], tokens[0, 1:]).item()
    np.testing.assert_allclose(rows.sort_values("sample")["value"], expected, rtol=1e-5)


def test_parts_are_read_by_the_same_maps_as_the_whole(samples):
    model = make_model("base")
    options = Options(measures=["readout"])
    whole = Measuring(model, samples, options, batch_size=4)
    parted = Measuring(model, samples, options, batch_size=4)
    rows = [parted.part(4, 12).readout, parted.part(0, 4).readout]
    value = np.concatenate([part["value"] for part in rows[::-1]])
    np.testing.assert_array_equal(whole.part(0, 12).readout["value"], value)
    record = parted.provenance["fitted"]
    assert record == {"folds": 2, "windows": [5, 7], "ridge": 1e-3}


def test_windows_that_do_not_differ_have_no_fitted_reading(samples):
    tokens = samples.tokens[:1].repeat(3, 1)
    tables = measure(make_model("base"), tokens, ["readout"])
    assert {*tables.readout["reading"]} == {"raw", "matched"}
    (note,) = tables.provenance["models"]["base"]["notes"]
    assert "two windows that differ" in note


def test_a_refitted_coda_reads_every_state_by_its_own_and_leaves_the_model_alone(samples):
    model = make_model("residual")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    fitted, refitted = table(model, samples), table(model, samples, refit_coda=3)
    assert (fitted.loc["fitted"] != refitted.loc["fitted"]).all()  # h(K) included
    for reading in ("raw", "matched"):
        assert (fitted.loc[reading] == refitted.loc[reading]).all()
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(value.grad is None for value in model.parameters())


def test_a_refitted_coda_gains_nothing_where_the_core_does_nothing(samples):
    losses = table(without_core("residual"), samples, refit_coda=4).loc["fitted"]
    sound = table(make_model("residual", noise=0.3), samples, refit_coda=4).loc["fitted"]
    assert abs(losses[0] - losses[K]) < 2e-3 < abs(sound[0] - sound[K])


def test_a_wrapped_coda_is_refitted_as_the_native_one(samples):
    base = ls.load("base")
    same = plant(base, identity(1.0), "same")
    text = ls.load_samples(base, samples=4, tokens=16)
    names = {name.rpartition("block.")[2] for name in same.coda_parameters()}
    assert "attn.out.weight" in names and not any("core" in n for n in same.coda_parameters())
    ours, theirs = (table(m, text, refit_coda=2).loc["fitted"] for m in (base, same))
    np.testing.assert_allclose(ours, theirs, rtol=2e-3)


class Bare(nn.Module):
    """Nothing with parameters of its own follows the loop: the head is the embedding's."""

    def __init__(self):
        super().__init__()
        self.embed, self.core = nn.Embedding(11, 8), nn.Sequential(nn.Linear(8, 8), nn.Tanh())
        self.norm = nn.LayerNorm(8, elementwise_affine=False)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens):
        h = self.embed(tokens)
        for _ in range(3):
            h = h + self.core(h)
        return self.head(self.norm(h))


def test_a_coda_without_parameters_of_its_own_cannot_be_refitted():
    torch.manual_seed(0)
    tokens = torch.randint(11, (4, 9))
    model = ls.wrap(Bare(), example=tokens)
    assert len(measure(model, tokens, ["readout"]).readout)
    with pytest.raises(InputError, match="no parameters that only what follows the loop uses"):
        measure(model, tokens, ["readout"], refit_coda=2)


def test_steps_of_refitting_are_no_fewer_than_none():
    with pytest.raises(InputError, match="refit_coda"):
        Options(refit_coda=-1)


def test_documents_must_be_as_many_as_windows(samples):
    wrong = SimpleNamespace(tokens=samples.tokens, documents=["a"], provenance={})
    with pytest.raises(InputError, match="12 windows and 1 documents"):
        measure(make_model("base"), wrong, ["loss"])
