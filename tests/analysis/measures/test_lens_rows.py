"""The tables `lens` and `lens_tokens`: against the model's own loss, and what it cannot give."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import AlbertConfig, AlbertForMaskedLM

import loopscope as ls
from loopscope.analysis.measures import lens_fitting
from loopscope.analysis.measuring.streaming import Measuring, measure
from loopscope.analysis.measuring.token_windows import read_windows
from loopscope.analysis.options import Options
from loopscope.analysis.tables.frames import Tables
from loopscope.errors import InputError
from loopscope.probes.lenses import LensReader, lens_states, lens_values
from loopscope.probes.tuned_maps import TunedLens, TunedMap, fit_maps
from tests.conftest import make_model
from tests.models.wrapped.small import Small
from tests.standins import heads, per_loop

SAMPLES = torch.randint(50, (6, 10), generator=torch.Generator().manual_seed(8))


def lens(model, samples=SAMPLES, **options):
    return ls.lens(model, samples, batch_size=options.pop("batch_size", 4), **options)


def column(tables, kind, state, value="loss"):
    frame = tables.lens
    rows = frame[frame["kind"].eq(kind) & frame["state"].eq(state)]
    return rows.sort_values("sample")[value].to_numpy()


def notes(tables):
    [record] = tables.provenance["models"].values()
    return " ".join(record["notes"])


MODELS = {
    "native": lambda: make_model("mesh", noise=0.3),
    "float64": lambda: make_model("anchor", noise=0.3).double(),
    "bfloat16": lambda: make_model("base", noise=0.3).bfloat16(),
    "wrapped": lambda: ls.wrap(Small(), example=SAMPLES[:2]),
    "port": lambda: ls.wrap(per_loop.MeshPort(), example=SAMPLES[:2]),
    "whole runs": lambda: ls.wrap(heads.Scores("capped"), example=SAMPLES[:2]),
}


@pytest.mark.parametrize("name", MODELS)
def test_the_final_states_lens_is_the_measured_loss_to_the_last_bit(name):
    model = MODELS[name]()
    tables = measure(model, SAMPLES, ["lens", "loss"], batch_size=4)
    final = column(tables, "logit", "h_out")
    if name == "float64":  # the table `loss` is in float32
        logits = model(SAMPLES)
        wanted = [F.cross_entropy(x[:-1], ids[1:]).item()
                  for x, ids in zip(logits, SAMPLES, strict=True)]  # fmt: skip
        np.testing.assert_allclose(final, wanted, rtol=1e-14)
        np.testing.assert_allclose(final, tables.loss["value"], rtol=1e-6)
    else:
        assert np.array_equal(final, tables.loss["value"].to_numpy())
    assert (column(tables, "logit", "h_out", "kl_final") == 0).all()
    assert (column(tables, "logit", "h_out", "top_final") == 1).all()
    if "coda" in set(tables.lens["kind"]):
        last = column(tables, "coda", f"h{model.K}")
        assert np.array_equal(last, final)
        assert (column(tables, "coda", f"h{model.K}", "kl_final") == 0).all()
    assert tables.lens["flag"].isna().all()


def test_the_coda_lens_is_the_readout():
    model = make_model("residual", noise=0.3)
    tables = measure(model, SAMPLES, ["lens", "readout"], more_loops=5, batch_size=4)
    raw = tables.readout[tables.readout["reading"].eq("raw")]
    for t in range(6):
        wanted = raw[raw["t"].eq(t)].sort_values("sample")["value"]
        np.testing.assert_allclose(column(tables, "coda", f"h{t}"), wanted, rtol=1e-5)
    beyond = tables.lens.loc[tables.lens["beyond"], "state"]
    assert sorted(beyond.unique()) == ["h4", "h5"]
    assert (column(tables, "coda", "h3", "kl_next") > 0).all()  # the next is h(4)
    assert np.isnan(column(tables, "coda", "h5", "kl_next")).all()


def test_more_loops_of_a_wrapped_model_are_read_by_the_model_that_runs_them():
    model = ls.wrap(Small(), example=SAMPLES[:2])
    tables = lens(model, loops=6)
    for t in (5, 6):
        longer = model.with_loops(t)
        wanted = [F.cross_entropy(x[:-1], ids[1:]).item()
                  for x, ids in zip(longer(SAMPLES), SAMPLES, strict=True)]  # fmt: skip
        np.testing.assert_allclose(column(tables, "coda", f"h{t}"), wanted, rtol=1e-5)


def test_a_sample_is_the_mean_over_its_tokens_in_any_batch():
    model = make_model("static", noise=0.3)
    whole, single = lens(model), lens(model, batch_size=1)
    trajectory = model.capture(SAMPLES, logits=True)
    listed = lens_states(["logit", "coda"], 3)
    values = lens_values(LensReader(model, trajectory), listed)
    for each in listed:
        token = values[each.key].numpy()
        for value, place in (("kl_final", 1), ("entropy", 3), ("rank_final", 4)):
            np.testing.assert_allclose(
                column(whole, *each.key, value), token[place].mean(1), rtol=1e-5, atol=1e-6
            )
        ranks = token[5][:, :-1]
        np.testing.assert_allclose(column(whole, *each.key, "rank_true"), ranks.mean(1))
        np.testing.assert_allclose(
            column(whole, *each.key, "rank_true_median"), np.median(ranks, axis=1)
        )
        for value in ("loss", "kl_next", "flipped", "top_final"):
            np.testing.assert_allclose(
                column(single, *each.key, value), column(whole, *each.key, value), rtol=1e-4,
                atol=1e-6,
            )  # fmt: skip


def test_flips_are_counted_between_neighbouring_states():
    model = make_model("mesh", noise=0.3)
    tables = lens(model)
    trajectory = model.capture(SAMPLES, logits=True)
    tops = [
        torch.stack(list(model.read_out_logits(h, SAMPLES))).argmax(-1)
        for h in (trajectory.h_emb, *trajectory.h)
    ]
    for t in range(4):
        wanted = (tops[t + 1] != tops[t]).double().mean(1)
        np.testing.assert_allclose(column(tables, "coda", f"h{t}", "flipped"), wanted)
    assert np.isnan(column(tables, "coda", "h_emb", "flipped")).all()
    wanted = (tops[2] == tops[4]).double().mean(1)
    np.testing.assert_allclose(column(tables, "coda", "h1", "top_final"), wanted)


def test_within_reads_every_layer_and_the_coda_none_of_its_own():
    tables = lens(make_model("mesh", "1+2R2+1", noise=0.3), within=True)
    states = {kind: list(rows["state"].unique()) for kind, rows in
              tables.lens.groupby("kind", observed=True)}  # fmt: skip
    core = ["h0", "core1.0", "core1.1", "h1", "core2.0", "core2.1", "h2"]
    assert states["logit"] == ["h_emb", "prelude.0", *core, "coda.0", "h_out"]
    assert states["coda"] == ["h_emb", "prelude.0", *core]
    assert (column(tables, "logit", "coda.0", "kl_next") == 0).all()  # it is h_out


def test_tokens_are_the_likeliest_of_the_first_sample():
    model = make_model("base", noise=0.3)
    tables = lens(model, top_k=3)
    frame = tables.lens_tokens
    trajectory = model.capture(SAMPLES[:1], logits=True)
    wanted = torch.stack(list(model.read_out_logits(trajectory.h[1])))[0].softmax(-1).topk(3)
    rows = frame[frame["kind"].eq("coda") & frame["state"].eq("h1")]
    assert rows["token"].astype(str).tolist() == [str(i) for i in wanted.indices.flatten().tolist()]
    np.testing.assert_allclose(rows["probability"], wanted.values.detach().flatten(), rtol=1e-4)
    assert rows["rank"].tolist() == [1, 2, 3] * 10
    assert rows["pos"].tolist() == [pos for pos in range(10) for _ in range(3)]
    assert rows["input"].astype(str).tolist()[::3] == [str(i) for i in SAMPLES[0].tolist()]
    assert (frame["sample"] == 0).all()


def test_a_text_is_read_as_the_only_sample():
    tables = ls.lens(ls.load("mesh"), "def add(a, b):\n    return a + b")
    inputs = tables.lens_tokens.drop_duplicates("pos")["input"].astype(str)
    assert "".join(inputs) == "def add(a, b):\n    return a + b"
    assert tables.lens["sample"].unique().tolist() == [0]


def test_tables_are_the_same_in_parts_and_when_read_again(tmp_path):
    model = make_model("mesh", noise=0.3)
    options = Options(measures=("lens",))
    whole = Measuring(model, SAMPLES, options, batch_size=2).part(0, 6)
    parts = Measuring(model, SAMPLES, options, batch_size=2)
    whole.save(tmp_path)
    again = Tables.load(tmp_path)
    assert again.lens.equals(whole.lens) and again.lens_tokens.equals(whole.lens_tokens)
    first, second = parts.part(0, 4), parts.part(4, 6)
    assert second.lens_tokens is None or second.lens_tokens.empty
    both = np.concatenate([first.lens["loss"], second.lens["loss"]])
    np.testing.assert_array_equal(both, whole.lens["loss"])


# -- what cannot be read ---------------------------------------------------------------------------


def test_what_a_model_cannot_give_is_said_and_the_rest_is_measured():
    plain = lens(make_model("vanilla", "3"))
    assert set(plain.lens["kind"]) == {"logit"} and "no coda lens: the model has no" in notes(plain)
    capped = lens(ls.wrap(heads.Scores("capped"), example=SAMPLES[:2]), tuned=True)
    assert set(capped.lens["kind"]) == {"logit"}
    assert "the coda lens is the logit lens" in notes(capped)
    assert "no tuned lens: the final norm and the unembedding do not run by" in notes(capped)
    none = lens(ls.wrap(heads.Scores("none"), example=SAMPLES[:2]))
    assert none.lens.empty and none.lens_tokens.empty
    assert "lens: the model returns no logits" in notes(none)
    ahead = lens(ls.wrap(heads.Scores("module", causal=False), example=SAMPLES[:2]))
    assert ahead.lens.empty and "looks at later tokens" in notes(ahead)


def test_states_of_another_width_are_flagged():
    class Narrow(Small):
        def build(self, d):
            self.small, self.wide = torch.nn.Embedding(50, 8), torch.nn.Linear(8, d)

        def forward(self, tokens):
            return self.rest(self.loop(self.pre(self.wide(self.small(tokens)))))

    model = ls.wrap(Narrow(), example=SAMPLES[:2])
    tables = lens(model)
    frame = tables.lens
    embedded = frame[frame["state"].eq("h_emb")]
    assert model.capture(SAMPLES).h_emb.shape[-1] == 8
    assert embedded["flag"].eq("shape").all() and embedded["loss"].isna().all()
    assert frame[~frame["state"].eq("h_emb")]["flag"].isna().all()
    assert "h_emb" not in set(tables.lens_tokens["state"])


def test_samples_that_are_not_finite_are_flagged_and_the_others_are_not():
    model = make_model("base", noise=0.3)
    tokens = SAMPLES.clone()
    tokens[2:4, 0] = 60
    with torch.no_grad():
        model.embed.weight[60] = torch.nan
    tables = lens(model, tokens)
    frame = tables.lens
    assert set(frame.loc[frame["sample"].isin([2, 3]), "flag"]) == {"nonfinite"}
    assert frame.loc[~frame["sample"].isin([2, 3]), "flag"].isna().all()
    assert (
        frame.loc[frame["sample"].eq(2), ["loss", "rank_true", "top_final"]].isna().all(axis=None)
    )
    first = lens(model, tokens[[2, 0]])
    assert set(first.lens["kind"]) == {"logit", "coda"}  # they are tried on what is not finite
    assert first.lens_tokens["flag"].eq("nonfinite").any()


def test_options_that_cannot_be_are_refused():
    model = make_model("base")
    with pytest.raises(InputError, match="unknown lens 'coad'; did you mean coda"):
        lens(model, kinds=("coad",))
    with pytest.raises(InputError, match="top_k"):
        lens(model, top_k=0)
    with pytest.raises(InputError, match="no lens was asked for"):
        lens(model, kinds=())
    assert set(lens(model, kinds="logit").lens["kind"]) == {"logit"}


# -- the tuned lens --------------------------------------------------------------------------------


@pytest.fixture
def planted():
    """A small model whose states are far from what the unembedding expects."""
    return make_model("base", "0+1R2+1", noise=0.3)


@pytest.fixture
def quick(monkeypatch):
    """Few steps."""
    monkeypatch.setattr(lens_fitting, "fit_maps", partial(fit_maps, steps=25))


def many(count=24, pos=32, seed=0):
    return torch.randint(61, (count, pos), generator=torch.Generator().manual_seed(seed))


def test_the_tuned_lens_improves_on_samples_that_it_was_not_fitted_on(planted, quick):
    tables = lens(planted, many(64, 48), tuned=True, batch_size=32)
    for state in ("h0", "h1", "h2"):
        tuned = column(tables, "tuned", state, "kl_final")
        logit = column(tables, "logit", state, "kl_final")
        assert tuned.mean() < 0.8 * logit.mean()
    np.testing.assert_allclose(
        column(tables, "tuned", "h2", "kl_next"), column(tables, "tuned", "h2", "kl_final")
    )
    assert set(tables.lens.loc[tables.lens["kind"].eq("tuned"), "state"]) == {
        "h_emb", "h0", "h1", "h2",
    }  # fmt: skip


class Forgetful(TunedMap):
    """Gives NaN for the samples that it was fitted on."""

    def __init__(self, weight, bias, known):
        super().__init__(weight, bias)
        object.__setattr__(self, "known", known)

    def __call__(self, state):
        seen = state.contiguous().numpy().tobytes() in self.known
        return torch.full_like(state, torch.nan) if seen else state


def test_no_sample_is_read_by_maps_that_were_fitted_to_it(planted, monkeypatch):
    """Maps that give NaN for what they were fitted on: nothing is NaN."""
    seen = []

    def fit(model, states, h_out, tokens):
        seen.append(h_out)
        maps = {}
        for name, state in states.items():
            known = {sample.numpy().tobytes() for sample in state.unflatten(0, (-1, 12))}

            maps[name] = Forgetful(torch.eye(32), torch.zeros(32), known)
        return maps, {name: (1.0, 1.0) for name in states}

    monkeypatch.setattr(lens_fitting, "fit_maps", fit)
    samples = many(8, 12)
    assert lens(planted, samples, tuned=True).lens["flag"].isna().all()
    both = torch.cat(seen)
    assert len(both) == samples.numel()  # each sample was fitted on by one of the two
    monkeypatch.setattr(TunedLens, "fold_for", lambda self, hashes: self.folds[0])
    cheated = lens(planted, samples, tuned=True).lens
    cheated = cheated[cheated["kind"].eq("tuned")]
    assert cheated["flag"].eq("nonfinite").mean() == 0.5


def test_samples_of_one_document_are_never_in_both_folds(planted, quick):
    documents = ("a", "a", "a", "b", "b", "c", "c", "d")
    samples = replace(read_windows(many(8, 12), d_vocab=61), documents=documents)
    fitted = lens_fitting.fitted_lens(planted, samples, None, batch_size=4)
    for hashes, document in zip(fitted.hashes, documents, strict=True):
        fold = fitted.lens.fold_for(hashes)
        others = [h for h, d in zip(fitted.hashes, documents, strict=True) if d == document]
        assert not any(h & fold.fitted_on for h in others)


def test_kept_maps_are_read_again_and_never_fitted_twice(planted, quick, tmp_path, monkeypatch):
    samples = many(8, 12)
    first = lens(planted, samples, tuned_folder=tmp_path)
    [path] = tmp_path.glob("base-*.safetensors")
    monkeypatch.setattr(lens_fitting, "fit_maps", None)  # it is not called
    again = lens(planted, samples, tuned_folder=tmp_path)
    assert again.lens.equals(first.lens)
    fresh = lens(planted, many(4, 12, seed=9), tuned_folder=tmp_path)
    assert fresh.lens["flag"].isna().all()
    kept = TunedLens.load(path, planted)
    assert kept.provenance["model"] == "base" and kept.provenance["windows"] == [4, 4]


def test_one_sample_alone_has_no_tuned_lens(planted):
    tables = lens(planted, many(1, 12), tuned=True)
    assert "no tuned lens: it takes two samples that differ" in notes(tables)
    assert set(tables.lens["kind"]) == {"logit", "coda"}


def test_albert_is_no_language_model_of_next_tokens():
    config = AlbertConfig(
        vocab_size=50, embedding_size=8, hidden_size=32, num_hidden_layers=3, intermediate_size=16,
        num_attention_heads=2,
    )  # fmt: skip
    torch.manual_seed(0)
    tables = lens(ls.wrap(AlbertForMaskedLM(config).eval(), example=SAMPLES[:2]))
    assert tables.lens.empty and "lens:" in notes(tables)
