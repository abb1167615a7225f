"""The table `probe`: what is planted is decoded where it is, and nothing where nothing is."""

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GroupKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from tokenizers import Tokenizer, decoders, models

import loopscope as ls
from loopscope.analysis.measures.probe_scores import CONTROLS
from loopscope.analysis.measuring.streaming import Measuring
from loopscope.analysis.options import Options
from loopscope.errors import InputError
from loopscope.probes import random_labels
from loopscope.probes.linear_probes import STEPS, TOLERANCE
from tests.conftest import make_model
from tests.standins.items import Regression
from tests.standins.mesh_ports import block_port
from tests.standins.positions import Latents
from tests.standins.registry import CASES

SAMPLES, POS, VOCABULARY = 16, 20, 61
CHARACTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJ0123456789+-*/=()[]{}:,. \n"[:VOCABULARY]


def windows(samples=SAMPLES, pos=POS, documents=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(VOCABULARY, (samples, pos), generator=generator)
    return SimpleNamespace(tokens=tokens, documents=[f"d{i % documents}" for i in range(samples)])


def text_tokenizer():
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(CHARACTERS)}, []))
    tokenizer.decoder = decoders.Fuse()
    return tokenizer


def signs(seed=3, shape=(SAMPLES, POS)):
    return np.random.default_rng(seed).integers(2, size=shape)


def scores(tables, labels="labels", column="score", control="none"):
    rows = tables.probe[tables.probe["labels"].eq(labels) & tables.probe["control"].eq(control)]
    return rows.groupby("target", observed=True, sort=False)[column].mean()


def notes(tables):
    return " ".join(next(iter(tables.provenance["models"].values()))["notes"])


def plant(model, labels, name="loop.1.hook_state", strength=4.0):
    """Write a feature into a state along a known direction, sample and token by label."""
    direction = torch.zeros(32)
    direction[5], direction[9] = strength, -strength

    def hook(state, hook):
        sign = 2.0 * torch.as_tensor(labels)[..., None] - 1
        return state + (sign if sign.ndim == 3 else sign[:, None]) * direction

    model.add_hook(name, hook)
    return model


@pytest.mark.parametrize("variant", ["base", "mesh"])
def test_a_planted_feature_is_decoded_from_its_iteration_on_and_not_before(variant):
    model = plant(make_model(variant), signs())
    tables = ls.probe(model, windows(), {"sign": signs()}, batch_size=SAMPLES)
    score = scores(tables, "sign")
    assert list(score.index) == ["h_emb", "h0", "h1", "h2", "h3", "h_out"]
    assert (score[["h_emb", "h0"]] - 0.5).abs().max() < 0.1
    assert score["h1"] > 0.97 and score[["h2", "h3", "h_out"]].min() > 0.8
    entropy = scores(tables, "sign", "cross_entropy")
    assert entropy["h1"] < 0.35 and abs(entropy["h0"] - np.log(2)) < 0.15
    for control in ("shuffled", "untrained"):
        assert (scores(tables, "sign", control=control) - 0.5).abs().max() < 0.15
    assert not tables.probe["flag"].notna().any() and (tables.probe["tokens"] == POS).all()


def test_a_planted_number_is_decoded_by_its_r2():
    model = plant(make_model("base"), signs())
    noise = np.random.default_rng(0).normal(size=(SAMPLES, POS))
    tables = ls.probe(model, windows(), {"size": signs() * 3.0 + noise}, batch_size=SAMPLES)
    score = scores(tables, "size")
    assert score["h0"] < 0.1
    assert score["h1"] == pytest.approx(9 / 4 / (9 / 4 + 1), abs=0.1)
    assert tables.probe["cross_entropy"].isna().all()
    assert tables.probe["baseline"].abs().max() < 1e-12


def test_a_label_per_sample_is_that_of_its_tokens_and_documents_stay_whole():
    labels = signs(5, (SAMPLES,))
    model = plant(make_model("base"), labels)
    tables = ls.probe(model, windows(), {"kind": labels}, batch_size=SAMPLES)
    assert scores(tables, "kind")["h1"] > 0.97
    by_document = np.array([i % 8 % 2 for i in range(SAMPLES)])
    tokens = windows().tokens
    tokens[:, :] = torch.arange(SAMPLES)[:, None] % 8  # a document is told by its tokens alone
    samples = SimpleNamespace(tokens=tokens, documents=windows().documents)
    tables = ls.probe(make_model("base"), samples, {"kind": by_document})
    assert scores(tables, "kind").mean() < 0.7
    alone = SimpleNamespace(tokens=tokens, documents=[str(i) for i in range(SAMPLES)])
    tables = ls.probe(make_model("base"), alone, {"kind": by_document}, folds=5)
    assert scores(tables, "kind")["h0"] == 1  # the other window of its document tells


def test_random_labels_stay_at_chance_and_control_tasks_have_no_selectivity():
    model, samples = make_model("base"), windows(24, 30)
    random = {f"seed{i}": signs(50 + i, (24, 30)) for i in range(5)}
    tables = ls.probe(model, samples, random, of="h2")
    for name in random:
        assert (scores(tables, name) - 0.5).abs().max() < 0.08
    coin = signs(1, (720,))
    tasks = {
        f"task{i}": random_labels(coin, samples.tokens.numpy().ravel(), (9, i)).reshape(24, 30)
        for i in range(4)
    }
    tables = ls.probe(model, samples, tasks, of="h2")
    selectivity = [scores(tables, name) - scores(tables, name, control="types") for name in tasks]
    assert scores(tables, "task0")["h_emb"] > 0.7  # learnt by remembering types
    assert np.abs(np.mean(selectivity, axis=0)).max() < 0.06


def by_hand(model, samples, labels, target, folds=4):
    """The score of each sample with scikit-learn alone, of all tokens."""
    x = ls.capture(model, samples.tokens).states[target].flatten(0, 1).numpy()
    y = labels.ravel()
    probe = make_pipeline(
        StandardScaler(), LogisticRegression(C=1 / 32, tol=TOLERANCE, max_iter=STEPS)
    )
    groups = np.repeat(samples.documents, POS)
    p = cross_val_predict(probe, x, y, groups=groups, cv=GroupKFold(folds), method="predict_proba")
    right = (p.argmax(1) == y).reshape(SAMPLES, POS).mean(1)
    return right, -np.log(p[np.arange(len(y)), y]).reshape(SAMPLES, POS).mean(1)


@pytest.mark.parametrize("batch_size", [3, 16])
def test_scikit_learn_alone_gives_the_same_scores_and_those_of_the_twin(batch_size):
    model, samples, labels = make_model("mesh"), windows(), signs()
    tables = ls.probe(model, samples, labels, folds=4, batch_size=batch_size)
    for control, other in (("none", model), ("untrained", model.untrained())):
        rows = tables.probe[tables.probe["target"].eq("h2") & tables.probe["control"].eq(control)]
        right, loss = by_hand(other, samples, labels, "h2")
        np.testing.assert_allclose(rows["score"], right, atol=1e-12)
        np.testing.assert_allclose(rows["cross_entropy"], loss, rtol=1e-4)


def test_parts_are_those_of_the_whole():
    model, samples = make_model("base"), windows()
    options = Options(measures=["probe"], probe={"labels": {"x": signs()}, "probed_tokens": 7})
    measuring = Measuring(model, samples, options, batch_size=4)
    whole = measuring.part(0, SAMPLES).probe
    other = Measuring(model, samples, options, batch_size=5)
    parts = pd.concat([other.part(*part).probe for part in ((0, 3), (3, 16))], ignore_index=True)
    columns = ["sample", "target", "control", "score", "cross_entropy", "tokens"]
    pd.testing.assert_frame_equal(
        whole[columns].astype({"target": str, "control": str}),
        parts[columns].astype({"target": str, "control": str}), rtol=1e-4,
    )  # fmt: skip
    assert (whole["tokens"] == 7).all()
    assert "fitted to 7 of each sample's 20 positions (probed_tokens)" in notes(
        measure_of(measuring)
    )


def measure_of(measuring):
    return SimpleNamespace(provenance={"models": {"x": measuring.provenance}})


def test_tokens_without_label_and_first_tokens_are_left_out():
    labels = signs().astype(float)
    labels[:, :5] = np.nan
    labels[2] = np.nan
    tables = ls.probe(make_model("base"), windows(), {"x": labels}, of="h1")
    tokens = tables.probe.groupby("sample")["tokens"].mean()
    assert tokens[2] == 0 and (tokens.drop(2) == POS - 5).all()
    missing = tables.probe[tables.probe["sample"].eq(2)]
    assert missing["score"].isna().all() and missing["flag"].eq("zero").all()
    options = Options(measures=["probe"], drop_first=8, probe={"labels": signs(), "of": "h1"})
    tables = Measuring(make_model("base"), windows(), options).part(0, SAMPLES)
    assert (tables.probe["tokens"] == POS - 8).all()


def test_samples_whose_states_are_not_finite_are_flagged_and_others_scored():
    model = make_model("base")

    def hook(state, hook):
        state = state.clone()
        state[4, 7] = torch.nan
        return state

    model.add_hook("loop.1.hook_state", hook)
    tables = ls.probe(model, windows(), signs(), batch_size=SAMPLES)
    flagged = tables.probe[tables.probe["flag"].eq("nonfinite")]
    assert set(flagged["sample"]) == {4} and flagged["score"].isna().all()
    assert {*flagged["target"]} == {"h1", "h2", "h3", "h_out"}
    assert "untrained" not in {*flagged["control"]}
    others = tables.probe[tables.probe["sample"].ne(4)]
    assert others["score"].notna().all() and others["flag"].isna().all()


def test_slots_core_outputs_and_routers_are_targets_beside_the_embedding():
    model = make_model("mesh", "1+1R2+1", slots=3)
    tables = ls.probe(model, windows(), signs(), of=("h_m", "m1", "m2@0", "w_read"))
    assert list(dict.fromkeys(tables.probe["target"])) == [
        "h_emb", "h_m0", "h_m1", "m1@-1", "m1@0", "m1@1", "m2@0", "w_read@-1", "w_read@0",
        "w_read@1",
    ]  # fmt: skip
    assert {*tables.probe["control"]} == {*CONTROLS}
    tables = ls.probe(make_model("base"), windows(), signs(), of=("m", "h9"))
    assert {*tables.probe["target"]} == {"h_emb"}
    assert "probe: the model has no memory slots, h9" in notes(tables)


def test_a_plain_stack_has_embedding_and_output():
    tables = ls.probe(make_model("vanilla", "3"), windows(), signs())
    assert {*tables.probe["target"]} == {"h_emb", "h0", "h_out"}


def test_classes_are_built_in_where_there_is_a_tokenizer():
    model = make_model("base")
    model.tokenizer = text_tokenizer()
    tables = ls.probe(model, windows(), of="h1")
    assert {*tables.probe["labels"]} == {"current", "previous", "next"}
    score, baseline = scores(tables, "current"), scores(tables, "current", "baseline")
    assert score["h_emb"] > baseline["h_emb"] + 0.1  # an embedding tells its token's class
    assert (tables.probe.groupby("labels", observed=True)["tokens"].max() == [20, 19, 19]).all()
    assert "the text is not Python: classes are those of its characters" in notes(tables)


def test_without_a_tokenizer_positions_are_left_and_that_is_said():
    tables = ls.probe(make_model("base"), windows())
    assert {*tables.probe["labels"]} == {"position"}
    assert "there is no tokenizer, so tokens have no current, previous, next labels" in notes(
        tables
    )
    tables = ls.probe(make_model("base"), windows(), "current,position")
    assert {*tables.probe["labels"]} == {"position"}
    assert ls.probe(make_model("base"), windows(), "next").probe.empty


def test_without_documents_samples_are_held_out_and_equal_ones_together():
    tokens = windows().tokens
    tokens[8:] = tokens[:8]
    labels = np.tile(signs(1, (8, POS)), (2, 1))
    tables = ls.probe(make_model("base"), tokens, labels, of="h1", folds=20)
    assert (scores(tables) - 0.5).abs().max() < 0.2  # not remembered from the equal window
    assert "no documents are known" in notes(tables)
    assert "there are 8 groups of samples, hence as many folds" in notes(tables)
    alike = ls.probe(make_model("base"), tokens[:1].expand(6, -1), labels[:6])
    assert alike.probe.empty and "none can be held out" in notes(alike)


def test_a_twin_is_held_against_no_twin():
    tables = ls.probe(make_model("base").untrained(), windows(), signs(), of="h1")
    assert "untrained" not in {*tables.probe["control"]} and "it is not held against" in notes(
        tables
    )


def test_labels_of_another_shape_are_refused():
    with pytest.raises(InputError, match=r"labels 'x' have the shape \(16, 19\); 16 samples of 20"):
        ls.probe(make_model("base"), windows(), {"x": signs()[:, 1:]})


def test_ports_with_slots_are_probed_and_have_no_twin():
    samples = windows()
    model = ls.wrap(block_port(2, 3), samples.tokens[:2])
    tables = ls.probe(model, samples, signs(), of=("h", "m", "w_write"))
    targets = {*tables.probe["target"]}
    assert {"h2", "m2@1", "m0@-1", "w_write@0"} <= targets
    assert {*tables.probe["control"]} == {"none", "types", "shuffled"}
    assert "no untrained twin" in notes(tables) and tables.probe["score"].notna().all()


def test_states_of_other_positions_take_labels_of_samples_alone():
    samples = windows(pos=11)
    model = ls.wrap(Latents(), samples.tokens[:2])
    labels = {"token": signs(0, (16, 11)), "sample": signs(1, (16,))}
    tables = ls.probe(model, samples, labels)
    assert {*tables.probe["labels"]} == {"sample"}
    assert {"h_emb", "h0", "h3"} < {*tables.probe["target"]}
    assert tables.probe["tokens"].max() == 4
    assert "states of 4 positions of their own have no labels of tokens (token)" in notes(tables)


def test_loops_share_what_they_share():
    samples = windows(12)
    case = next(case for case in CASES if case.name == "layer_major")
    tables = ls.probe(ls.wrap(case.make(), samples.tokens[:2]), samples, signs(0, (12, POS)))
    by_loop = dict([*tables.probe.groupby("loop", observed=True)])
    assert [*by_loop] == ["A", "B"]
    ends = [frame[frame["target"].isin(["h_emb", "h_out"])] for frame in by_loop.values()]
    assert ends[0]["score"].tolist() == ends[1]["score"].tolist()


def test_items_have_labels_by_sample_in_groups_of_their_own():
    generator = torch.Generator().manual_seed(0)

    def task(pos):
        xs = torch.randn(pos, 2, generator=generator)
        return xs, xs.sum(1)

    items = [task(n) for n in (6, 9) * 8]
    labels = np.array([0, 1] * 8)
    model = ls.wrap(Regression(), example=(torch.randn(2, 6, 2), torch.randn(2, 6)))
    tables = ls.probe(model, items, {"long": labels, "noise": signs(0, (16,))}, batch_size=4)
    rows = tables.probe[tables.probe["labels"].eq("long")]
    assert rows["score"].eq(1).all()  # within a group of equal shape there is one class
    assert set(rows["sample"]) == {*range(16)}
    assert "there is no text" not in notes(tables)
    assert {*tables.probe["control"]} == {"none", "types", "shuffled"}
