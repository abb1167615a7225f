"""Effects of interventions: against hooks, scipy and sums by hand, on models native and wrapped."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.stats import entropy

import loopscope as ls
from loopscope.analysis import InterveneOptions, Options
from loopscope.analysis.measures.intervention_plan import make_plan, spread
from loopscope.analysis.measuring.streaming import Measuring
from loopscope.analysis.measuring.token_windows import read_windows
from loopscope.errors import InputError
from loopscope.probes import place_named
from tests.analysis.measures.known_answers import Bits, Headless, Sums
from tests.conftest import make_model
from tests.standins.mesh_ports import native_port

VALUES = ["loss", "kl", "changed", "mass", "mass_norm"]


@dataclass
class Windows:
    """Tokens and the document of each window, as `load_samples` gives them."""

    tokens: torch.Tensor
    documents: list[str] = field(default_factory=list)


def windows(n: int = 6, pos: int = 10, vocabulary: int = 61, documents: Any = None) -> Windows:
    tokens = torch.randint(vocabulary, (n, pos), generator=torch.Generator().manual_seed(5))
    return Windows(tokens, documents or [f"file{i}" for i in range(n)])


def notes(tables) -> str:
    (record,) = tables.provenance["models"].values()
    return "; ".join(record["notes"])


def of(tables, what: str, routers: str = "recomputed", how: str | None = None):
    rows = tables.effect
    rows = rows[rows["what"].eq(what) & rows["routers"].eq(routers)]
    return rows if how is None else rows[rows["how"].eq(how)]


@pytest.fixture(scope="module")
def mesh():
    return make_model("mesh", "1+2R3+1", slots=4, noise=0.2)


@pytest.fixture(scope="module")
def small():
    return make_model("mesh", "1+1R2+1", slots=2, noise=0.2)


@pytest.fixture(scope="module")
def deaf():
    """A MeSH model that writes to slot 3 and never reads it."""
    model = make_model("mesh", "1+1R2+1", slots=4, noise=0.2)
    with torch.no_grad():
        for router in (model.recurrence.transition, *model.recurrence.iterations):
            router.read.weight[3] = 0
            router.read.bias[3] = -torch.inf
    return model


# -- one effect, by hand -----------------------------------------------------------------------


def test_loss_kl_and_changed_tokens_of_a_silenced_mlp_are_those_of_a_hook_by_hand(mesh):
    samples = windows(3)
    tables = ls.intervene(mesh, samples, "loop1.layer0.mlp", "zero")
    v = mesh.config.layout.core_start(1)
    clean = mesh(samples.tokens).detach()
    silent = mesh.run_with_hooks(
        samples.tokens, fwd_hooks=[(f"blocks.{v}.hook_mlp_out", lambda x, hook: 0 * x)]
    ).detach()
    for i, row in enumerate(of(tables, "loop1.layer0.mlp").itertuples()):
        x, y, ids = clean[i].double(), silent[i].double(), samples.tokens[i, 1:]
        loss = F.cross_entropy(y[:-1], ids) - F.cross_entropy(x[:-1], ids)
        p, q = x.softmax(-1).detach().numpy(), y.softmax(-1).detach().numpy()
        assert row.loss == pytest.approx(float(loss), abs=1e-5)
        assert row.kl == pytest.approx(float(np.mean(entropy(p, q, axis=-1))), abs=1e-5)
        assert row.kl != pytest.approx(float(np.mean(entropy(q, p, axis=-1))), abs=1e-5)
        assert row.changed == pytest.approx(float((x.argmax(-1) != y.argmax(-1)).double().mean()))


def test_delta_loss_is_the_difference_of_the_table_loss(mesh):
    samples = windows(4)
    tables = ls.intervene(mesh, samples, "loop2", "skip")
    clean = ls.measure(mesh, samples, ["loss"]).loss["value"].to_numpy()

    def skip(h_m, hook):
        return held["h"]

    held = {}

    def hold(h, hook):
        held["h"] = h

    hooks = [("loop.2.hook_in", hold), ("loop.2.hook_out", skip)]
    with mesh.hooks(fwd_hooks=hooks):
        skipped = ls.measure(mesh, samples, ["loss"]).loss["value"].to_numpy()
    np.testing.assert_allclose(of(tables, "loop2")["loss"], skipped - clean, atol=1e-5)


def test_the_mean_is_over_the_tokens_of_windows_of_other_documents(mesh):
    samples = windows(6, documents=["a", "b", "a", "b", "c", "c"])
    options = InterveneOptions(what="loop0.layer1.attn", how="mean", windows=2)
    plan = make_plan(mesh, read_windows(samples, d_vocab=61), options, batch_size=4)
    assert plan.chosen == (0, 1)
    tables = ls.intervene(mesh, samples, "loop0.layer1.attn", "mean", windows=2)
    v = mesh.config.layout.core_start(0) + 1
    _, cache = mesh.run_with_cache(samples.tokens)
    out = cache[f"blocks.{v}.hook_attn_out"]
    for i, others in ((0, [1, 3, 4, 5]), (1, [0, 2, 4, 5])):
        mean = out[others].mean((0, 1))
        changed = mesh.run_with_hooks(
            samples.tokens[[i]],
            fwd_hooks=[(f"blocks.{v}.hook_attn_out", lambda x, hook, m=mean: m.expand_as(x))],
        )
        clean = mesh(samples.tokens[[i]])
        ids = samples.tokens[i, 1:]
        loss = (
            F.cross_entropy(changed[0, :-1], ids) - F.cross_entropy(clean[0, :-1], ids)
        ).detach()
        rows = of(tables, "loop0.layer1.attn")
        assert rows[rows["sample"].eq(i)]["loss"].item() == pytest.approx(float(loss), abs=1e-5)


def test_resampled_values_are_those_of_the_same_position_of_another_document(mesh):
    samples = windows(5, documents=["a", "a", "b", "b", "b"])
    options = InterveneOptions(what="loop1", how="resample")
    read = read_windows(samples, d_vocab=61)
    plan = make_plan(mesh, read, options, batch_size=2)
    other = make_plan(mesh, read, InterveneOptions(what="loop1", how="resample", seed=3),
                      batch_size=2)  # fmt: skip
    assert plan.partners != other.partners
    tables = ls.intervene(mesh, samples, "loop1", "resample")
    rows = {tuple(row.tolist()): i for i, row in enumerate(samples.tokens)}
    for i in range(5):
        partner = plan.references[plan.partners[i]]
        assert samples.documents[rows[tuple(partner.tolist())]] != samples.documents[i]
        h_m = mesh.capture(partner[None]).h_m[1]
        changed = mesh.run_with_hooks(
            samples.tokens[[i]], fwd_hooks=[("loop.1.hook_out", lambda x, hook, v=h_m: v)]
        )
        clean, ids = mesh(samples.tokens[[i]]), samples.tokens[i, 1:]
        loss = (
            F.cross_entropy(changed[0, :-1], ids) - F.cross_entropy(clean[0, :-1], ids)
        ).detach()
        row = of(tables, "loop1")
        assert row[row["sample"].eq(i)]["loss"].item() == pytest.approx(float(loss), abs=1e-5)


# -- truths ------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrapped", [False, True])
def test_patching_a_window_from_itself_has_no_effect_at_any_place(small, wrapped):
    samples = windows(2, 7)
    model = ls.wrap(native_port(small), samples.tokens) if wrapped else small
    tables = ls.intervene(model, samples, source=samples.tokens)
    assert {*tables.effect["kind"]} >= {"iteration", "slot", "write", "read", "edge"}
    assert (tables.effect[["loss", "kl", "changed"]] == 0).all(axis=None)
    assert tables.effect["flag"].isna().all()


def test_a_slot_that_is_written_and_never_read_has_mass_and_no_effect(deaf):
    samples = windows(4)
    tables = ls.intervene(deaf, samples, ["slot", "write", "read"], ["zero", "resample"])
    rows = tables.effect
    unread = rows[rows["what"].str.contains("m3@")]
    assert (unread[["loss", "kl", "changed"]] == 0).all(axis=None)  # not a bit
    assert (unread.loc[unread["kind"].eq("write"), "mass"] > 0.01).all()
    assert (unread.loc[unread["kind"].eq("write"), "mass_norm"] > 0.01).all()
    assert (unread.loc[unread["kind"].eq("read"), "mass"] == 0).all()
    assert (unread.loc[unread["kind"].eq("slot"), "mass"] == 0).all()
    read = rows[rows["what"].str.contains("m1@") & rows["how"].eq("zero")]
    assert (read["kl"] > 0).all()


def test_interchange_finds_the_loop_that_holds_the_partial_sum():
    tokens = torch.randint(7, (6, 5), generator=torch.Generator().manual_seed(0))
    model = ls.wrap(Sums(), tokens[:2])
    source = (tokens + 3) % 7
    answers = (3 * source + tokens) % 7  # x + x + x of the source, then + x of the base
    tables = ls.intervene(model, tokens, "iteration", source=source, answers=answers)
    accuracy = tables.effect.groupby("what", observed=True)["interchange"].mean()
    assert accuracy.to_dict() == {"loop0": 0, "loop1": 1, "loop2": 0, "base": 0, "source": 0}
    assert len(of(tables, "loop1")) == 6  # all pairs, whatever a default would choose

    at_the_end = torch.full_like(tokens, -100)
    at_the_end[:, -1] = answers[:, -1]
    by_window = ls.intervene(model, tokens, "loop1", source=source, answers=answers[:, -1])
    by_token = ls.intervene(model, tokens, "loop1", source=source, answers=at_the_end)
    assert by_window.effect.equals(by_token.effect)


def test_erasing_what_the_model_uses_costs_loss_and_what_it_does_not_use_costs_nothing():
    generator = torch.Generator().manual_seed(1)
    parity = torch.randint(2, (40, 1), generator=generator)
    tokens = 2 * torch.randint(4, (40, 12), generator=generator) + parity
    model = ls.wrap(Bits(), tokens[:2])
    used = ls.intervene(model, tokens, "loop0", labels={"parity": tokens % 2})
    unused = ls.intervene(model, tokens, "loop0", labels={"second": tokens // 2 % 2})
    assert {*used.effect["how"]} == {"erase", "erase_random"}
    lost = of(used, "loop0", how="erase")["loss"]
    assert (lost > 0.5).all()
    assert of(unused, "loop0", how="erase")["loss"].abs().max() < 0.05
    assert of(used, "loop0", how="erase_random")["loss"].mean() < 0.5 * lost.mean()


def test_random_labels_are_worth_no_more_than_random_directions():
    generator = torch.Generator().manual_seed(1)
    tokens = 2 * torch.randint(4, (40, 12), generator=generator) + torch.randint(2, (40, 1))
    model = ls.wrap(Bits(), tokens[:2])
    erased, control = [], []
    for seed in range(20):
        labels = torch.randint(2, tokens.shape, generator=generator)
        tables = ls.intervene(model, tokens, "loop0", labels=labels, windows=10, seed=seed)
        erased.append(of(tables, "loop0", how="erase")["loss"].mean())
        control.append(of(tables, "loop0", how="erase_random")["loss"].mean())
    gap = np.array(erased) - np.array(control)
    assert abs(gap.mean()) < 2.1 * gap.std(ddof=1) / np.sqrt(20)


# -- masses ------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrapped", [False, True])
def test_masses_are_router_weights_alphas_and_relative_steps(small, wrapped):
    samples = windows(3)
    model = ls.wrap(native_port(small), samples.tokens) if wrapped else small
    tables = ls.intervene(model, samples)
    known = ls.measure(model, samples, ["routing", "delta"])
    weights = known.routing.set_index(["sample", "kind", "t", "target"])["mean"]
    sources = {"h_emb": "h_emb", "prelude": "prelude", "h_m0": "core1", "h_m1": "core2"}
    rows = tables.effect[tables.effect["routers"].eq("recomputed")]
    for row in rows[rows["kind"].isin(["write", "read"])].itertuples():
        slot = row.what.split()[1].split("@")[0]
        assert row.mass == pytest.approx(weights[row.sample, row.kind, row.t, slot], abs=1e-6)
    for row in rows[rows["kind"].eq("edge")].itertuples():
        target = sources[row.what.split(">")[0]]
        assert row.mass == pytest.approx(weights[row.sample, "alpha", row.t, target], abs=1e-5)
    for row in rows[rows["kind"].eq("slot")].itertuples():
        slot = row.what.split("@")[0]
        later = [weights[row.sample, "read", s, slot] for s in range(row.t, 2)]
        assert row.mass == pytest.approx(np.mean(later), abs=1e-6)
    trajectory = model.capture(samples.tokens)
    for row in rows[rows["kind"].eq("iteration")].itertuples():
        a, b = trajectory.h[row.t][row.sample], trajectory.h[row.t + 1][row.sample]
        steps = (b - a).norm(dim=-1)
        assert row.mass == pytest.approx(float((steps / a.norm(dim=-1)).mean()), rel=1e-4)
        assert row.mass_norm == pytest.approx(float(steps.mean()), rel=1e-4)


# -- direct and total --------------------------------------------------------------------------


def test_direct_and_total_effect_are_one_where_no_router_follows_and_differ_before(mesh):
    tables = ls.intervene(mesh, windows(3), ["iteration", "read"])
    for what in ("read m1@2", "loop2"):
        total, direct = (of(tables, what, routers)[VALUES] for routers in ("recomputed", "frozen"))
        np.testing.assert_array_equal(total, direct)
    total, direct = (of(tables, "loop0", routers)["loss"] for routers in ("recomputed", "frozen"))
    assert (np.abs(total.to_numpy() - direct.to_numpy()) > 1e-6).all()


def test_a_model_without_routers_has_total_effects_alone():
    tables = ls.intervene(make_model("anchor"), windows(3))
    assert {*tables.effect["routers"]} == {"recomputed"}
    assert "no memory slots" in notes(tables)
    assert {*tables.effect["kind"]} == {"iteration", "attention", "mlp", "edge"}


# -- samples, parts, kinds of models -----------------------------------------------------------


@pytest.mark.parametrize("how", ["skip", "mean", "resample"])
def test_results_do_not_depend_on_the_batch_size_nor_on_parts(mesh, how):
    samples = windows(6, documents=["a", "a", "b", "b", "c", "c"])
    options = {"what": "loop1", "how": how}
    whole = ls.intervene(mesh, samples, batch_size=6, **options).effect
    single = ls.intervene(mesh, samples, batch_size=1, **options).effect
    np.testing.assert_allclose(whole[VALUES], single[VALUES], atol=2e-6)
    measuring = Measuring(
        mesh, samples, Options(measures=["intervene"], intervene=options), batch_size=2
    )
    parts = [measuring.part(*ends).effect for ends in ((0, 2), (2, 6))]
    for column in VALUES:
        joined = np.concatenate([part[column] for part in parts])
        np.testing.assert_allclose(np.sort(joined), np.sort(whole[column]), atol=2e-6)
    assert sorted(i for part in parts for i in part["sample"]) == sorted(whole["sample"])
    assert [*parts[1]["document"].astype(str).unique()] == ["b", "c"]


def test_windows_are_of_as_many_documents_as_can_be():
    assert spread(["a", "a", "a", "b", "c", "b"], 3) == [0, 3, 4]
    assert spread(["a", "a", "a", "b", "c", "b"], 5) == [0, 1, 3, 4, 5]
    assert spread([None, None], 9) == [0, 1]


def test_a_cap_on_windows_is_noted_and_kept(mesh):
    tables = ls.intervene(mesh, windows(6, documents=list("aabbcc")), "loop0", windows=3)
    assert [*tables.effect["sample"].unique()] == [0, 2, 4]
    assert "on 3 of 6 windows, of 3 documents" in notes(tables)


def test_one_window_alone_cannot_be_averaged_over_others(mesh):
    tables = ls.intervene(mesh, windows(1))
    assert "there is only one" in notes(tables)
    assert {*tables.effect["how"]} == {"skip", "zero"}


def test_several_places_at_once_are_a_row_of_their_own(mesh):
    tables = ls.intervene(mesh, windows(2), ["loop0+read m1@1", "loop0"])
    joint = of(tables, "loop0+read m1@1")
    assert {*joint["kind"]} == {"joint"} and {*joint["how"]} == {"skip+zero"}
    assert joint["mass"].isna().all() and joint["flag"].isna().all()
    assert (joint["kl"].to_numpy() != of(tables, "loop0")["kl"].to_numpy()).all()


def test_heads_are_measured_when_asked_for():
    tables = ls.intervene(make_model("base", "1+1R2+1"), windows(2), "head", "zero")
    assert tables.effect["what"].nunique() == 2 * 4
    assert (tables.effect["mass"] > 0).all()


def test_a_plain_stack_is_told_so_in_a_line_and_the_rest_is_measured():
    model = make_model("vanilla", "3")
    tables = ls.measure(model, windows(2), ["loss", "intervene"])
    assert tables.effect.empty and len(tables.loss) == 2
    assert "effect: " in notes(tables) and "no loop" in notes(tables)


def test_a_model_without_logits_is_told_so_in_a_line():
    samples = windows(2, vocabulary=8)
    model = ls.wrap(Headless(), samples.tokens)
    tables = ls.measure(model, samples, ["update", "intervene"])
    assert len(tables.update) and tables.effect.empty
    assert notes(tables).count("effect: ") == 1


def test_values_that_are_not_finite_are_flagged(mesh):
    model = make_model("base")
    with torch.no_grad():
        model.embed.weight[7] = torch.nan
    samples = windows(3)
    samples.tokens[samples.tokens == 7] = 8
    samples.tokens[1, 4] = 7
    rows = ls.intervene(model, samples, "loop0", "skip").effect.set_index("sample")
    assert rows["flag"].astype(object).where(rows["flag"].notna(), "").to_dict() == {
        0: "", 1: "nonfinite", 2: "",
    }  # fmt: skip
    assert np.isnan(rows.loc[1, "loss"]) and np.isfinite(rows.loc[2, "loss"])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_are_measured(dtype):
    model = make_model("mesh", "1+1R2+1", slots=3).to(dtype)
    tables = ls.intervene(model, windows(2))
    assert tables.effect["flag"].isna().all() and (tables.effect["kl"] >= -1e-6).all()


# -- what is refused ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"what": "loop9"}, "loop9"),
        ({"what": "iterations"}, "iteration"),
        ({"how": "ablate"}, "way to intervene"),
        ({"what": "loop0+"}, "empty name"),
        ({"windows": 0}, "windows"),
        ({"how": "patch"}, "source="),
        ({"what": "loop0", "how": "erase"}, "labels="),
        ({"source": torch.zeros(2, 3, dtype=torch.long)}, r"\(2, 10\)"),
        ({"what": "loop0", "answers": torch.zeros(3, dtype=torch.long)}, r"-100"),
        ({"what": "loop0", "labels": "current"}, "no tokenizer"),
        ({"what": "loop0", "labels": ["current", "next"]}, "one at a time|at a time"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(mesh, options, message):
    with pytest.raises(InputError, match=message):
        ls.intervene(mesh, windows(2), **options)


def test_ways_that_do_not_apply_are_noted_and_the_rest_runs(mesh):
    tables = ls.intervene(mesh, windows(2), ["iteration", "slot"], "skip")
    assert {*tables.effect["kind"]} == {"iteration"}
    assert "skip does not apply to slot" in notes(tables)


def test_a_place_is_found_by_its_name_whatever_its_kind(mesh):
    trajectory = mesh.capture(windows(1).tokens)
    for name in ("m2@-1", "write m0@1", "h_m0>h2", "loop1.layer0.head3"):
        tables = ls.intervene(mesh, windows(2), name, "zero")
        assert {*tables.effect["kind"]} == {place_named(mesh, trajectory, name).kind}
