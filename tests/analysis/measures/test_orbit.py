"""Orbit: what is known of linear loops, by hand, and against scipy and scikit-learn."""

import math
import warnings

import numpy as np
import pytest
import torch
from scipy.spatial.distance import jensenshannon
from sklearn.decomposition import PCA

import loopscope as ls
from loopscope.analysis import Options
from loopscope.analysis.measuring.streaming import Measuring
from loopscope.errors import InputError
from tests.standins.linear import Linear, wrapped_linear
from tests.standins.two_states import OneModule

D = 4
TOKENS = torch.randint(20, (3, 9), generator=torch.Generator().manual_seed(0))
LITTLE = {"close_samples": 2, "contraction_samples": 2}


def notes(tables):
    (record,) = tables.provenance["models"].values()
    return record["notes"]


def core(tables, view="state", **values):
    frame = tables.orbit
    frame = frame[frame["part"].eq("core") & frame["view"].eq(view)]
    for column, value in values.items():
        frame = frame[frame[column].eq(value)]
    return frame


@pytest.fixture(scope="module")
def contracting():
    A = torch.tensor([[0.5, 0.1, 0, 0], [0, 0.4, 0.2, 0], [0.1, 0, 0.3, 0], [0, 0, 0, 0.45]])
    b = torch.tensor([1.0, -2.0, 0.5, 3.0])
    return A, ls.orbit(wrapped_linear(A, b, K=8), TOKENS, **LITTLE)


def test_a_linear_contraction_has_its_spectral_norm_settles_and_nears_its_limit(contracting):
    A, tables = contracting
    rows = core(tables, t=2)
    measured = rows["contraction"].dropna()
    assert len(measured) == 2
    np.testing.assert_allclose(measured, torch.linalg.matrix_norm(A, 2).item(), rtol=1e-5)
    assert (rows["settles"] == 1).all() and (rows[["orbits", "drifts"]] == 0).all(axis=None)
    assert (core(tables, t=8)["to_limit"] < 2e-3).all()
    assert (core(tables)["rate"].dropna() < torch.linalg.matrix_norm(A, 2).item()).all()


@pytest.mark.parametrize(
    "A, b, kind",
    [
        ([[0.0, -1.0], [1.0, 0.0]], None, "orbits"),
        ([[1.0, 0.0], [0.0, 1.0]], [1.0, -0.5], "drifts"),
        ([[0.0, -0.6], [0.6, 0.0]], None, "settles"),
    ],
    ids=["rotation", "constant step", "spiral"],
)
def test_a_rotation_orbits_and_a_constant_step_drifts(A, b, kind):
    A = torch.kron(torch.eye(2), torch.tensor(A))
    b = None if b is None else torch.tensor(b * 2)
    tables = ls.orbit(wrapped_linear(A, b), TOKENS, close_samples=0, contraction_samples=0)
    assert (core(tables)[kind] == 1).all()


def test_growth_is_a_step_of_the_state_and_none_of_its_direction():
    tables = ls.orbit(wrapped_linear(2 * torch.eye(D)), TOKENS, **LITTLE)
    state, direction = core(tables, t=1), core(tables, "direction", t=1)
    np.testing.assert_allclose(state["size"], 1, rtol=1e-5)
    np.testing.assert_allclose(direction["size"], 0, atol=1e-6)
    np.testing.assert_allclose(state["contraction"].dropna(), 2, rtol=1e-5)
    np.testing.assert_allclose(direction["contraction"].dropna(), 1, rtol=1e-5)
    assert (state["drifts"] == 1).all() and (direction["settles"] == 1).all()


def test_the_last_layer_takes_the_cores_path_one_iteration_later(make_model, samples):
    tables = ls.orbit(make_model("base"), samples, loops=5)
    last = tables.orbit[tables.orbit["part"].eq("layer1") & tables.orbit["view"].eq("state")]
    assert sorted(last["t"].unique()) == [0, 1, 2, 3, 4]
    for t in range(4):
        shifted = core(tables, t=t + 1).set_index("sample")
        ours = last[last["t"].eq(t)].set_index("sample")
        np.testing.assert_allclose(ours["size"], shifted["size"][ours.index], rtol=1e-4)


def test_more_loops_go_beyond_K_and_a_model_that_refuses_says_so(make_model, samples):
    tables = ls.orbit(make_model("base"), samples, loops=6, **LITTLE)
    assert core(tables)["t"].max() == 6
    assert core(tables, t=5)["contraction"].notna().sum() == 2
    refused = ls.orbit(make_model("mesh"), samples, loops=6, **LITTLE)
    assert core(refused)["t"].max() == 3
    assert [note for note in notes(refused) if "more loops" in note]


def test_plain_stacks_are_told_in_one_line(make_model, samples):
    tables = ls.orbit(make_model("vanilla", "4"), samples)
    assert all(len(frame) == 0 for frame in tables.frames().values())
    assert [note for note in notes(tables) if note.startswith("orbit: the model has no loop")]


def test_states_that_are_not_finite_are_flagged(make_model, samples):
    model = make_model("base", d_vocab=62)
    with torch.no_grad():
        model.embed.weight[61] = torch.nan
    samples = samples.clone()
    samples[2, 5] = 61
    tables = ls.orbit(model, samples)
    bad = tables.orbit["sample"].eq(2)
    assert (tables.orbit.loc[bad, "flag"] == "nonfinite").all()
    assert tables.orbit.loc[bad, "size"].isna().all()
    assert tables.orbit.loc[~bad, "flag"].isna().all()
    exits = tables.early_exit
    assert exits.loc[exits["sample"].eq(2), "flag"].notna().all()
    assert exits.loc[~exits["sample"].eq(2), "flag"].isna().all()


def test_every_state_of_a_loop_has_its_rows():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = ls.wrap(OneModule(high=3), example=TOKENS)
    tables = ls.orbit(model, TOKENS, **LITTLE)
    courses = model.capture(TOKENS).courses
    assert len(courses) > 1
    assert set(tables.orbit["loop"].unique()) == {*courses}
    assert set(tables.orbit_path["loop"].unique()) == {*courses}


def test_drift_of_heads_is_that_of_scipy(mesh, samples):
    tables = ls.orbit(mesh, samples)
    _, cache = mesh.run_with_cache(samples)
    for row in tables.attention_drift.itertuples():
        p, q = (
            cache[f"loop.{row.t + s}.layer.{row.layer}.attn.hook_pattern"][row.sample, row.head]
            for s in (0, 1)
        )
        expected = np.nan_to_num(jensenshannon(p.double().numpy(), q.double().numpy(), axis=-1))
        assert row.value == pytest.approx((expected**2).mean(), abs=1e-6)
    assert len(tables.attention_drift) == 5 * 2 * 2 * 4


def test_paths_are_those_of_sklearn_in_the_plane_of_all_states(mesh, samples):
    tables = ls.orbit(mesh, samples)
    h = torch.stack(mesh.capture(samples).h)  # (t, sample, pos, d_model): fewer than are fitted
    fit = PCA(3).fit(h.flatten(0, 2).double().numpy())
    rows = tables.orbit_path
    assert set(rows["sample"]) == {0}
    np.testing.assert_allclose(rows["explained1"], fit.explained_variance_ratio_[0], rtol=1e-6)
    places = fit.transform(h[:, 0].flatten(0, 1).double().numpy()).reshape(4, 12, 3)
    for number in range(3):
        ours = rows.pivot(index="t", columns="pos", values=f"pc{number + 1}").to_numpy()
        theirs = places[..., number]
        sign = np.sign((ours * theirs).sum())
        np.testing.assert_allclose(ours, sign * theirs, atol=1e-5)


def test_exits_by_hand(make_model, samples):
    model = make_model("base").double()
    tables = ls.orbit(model, samples)
    trajectory = model.capture(samples, logits=True)
    h = torch.stack(trajectory.h)
    logits = torch.stack([torch.stack(list(model.read_out_logits(x))) for x in trajectory.h])
    log_p = logits.log_softmax(-1)[:, :, :-1]
    losses = -log_p.gather(-1, samples[:, 1:, None].expand(4, -1, -1, -1))[..., 0]
    steps = ((h[1:] - h[:-1]).norm(dim=-1) / h[:-1].norm(dim=-1))[:, :, :-1]
    kl = (log_p[1:].exp() * (log_p[1:] - log_p[:-1])).sum(-1)
    exits = tables.early_exit
    for rule, signal in (("step", steps), ("kl", kl)):
        thresholds = exits.loc[exits["rule"].eq(rule), "threshold"].unique()
        assert len(thresholds) == 11
        for threshold in thresholds:
            rows = exits[exits["rule"].eq(rule) & exits["threshold"].eq(threshold)]
            for row in rows.itertuples():
                stop, loss = [], []
                for pos in range(11):
                    below = [t for t in (1, 2, 3) if signal[t - 1, row.sample, pos] <= threshold]
                    stop.append(below[0] if below else 3)
                    loss.append(losses[stop[-1], row.sample, pos].item())
                assert row.iterations == pytest.approx(np.mean(stop))
                assert row.loss == pytest.approx(np.mean(loss))
    fixed = exits[exits["rule"].eq("loops")]
    assert sorted(fixed["threshold"].unique()) == [0, 1, 2, 3]
    own = fixed[fixed["threshold"].eq(3)].set_index("sample")["loss"]
    loss = ls.measure(model, samples, ["loss"]).loss.set_index("sample")["value"]
    np.testing.assert_allclose(own, loss, rtol=1e-6)  # that of `loss` is in float32


def test_thresholds_span_from_the_first_chance_to_the_models_own_loops(make_model, samples):
    exits = ls.orbit(make_model("base"), samples).early_exit
    for rule, first in (("step", 1), ("acceleration", 2), ("kl", 1)):
        means = exits[exits["rule"].eq(rule)].groupby("threshold")["iterations"].mean()
        assert means.iloc[0] == 3 and means.iloc[-1] == pytest.approx(first, abs=0.01)


def test_parts_give_the_rows_of_the_whole(make_model):
    model = make_model("residual")
    samples = torch.randint(61, (7, 12), generator=torch.Generator().manual_seed(3))
    options = Options(
        measures=["orbit"],
        more_loops=4,
        orbit={"close_samples": 3, "contraction_samples": 3, "power_steps": 2},
    )
    whole = Measuring(model, samples, options, batch_size=2).part(0, 7)
    parts = Measuring(model, samples, options, batch_size=2)
    joined = ls.Tables.join([parts.part(0, 4), parts.part(4, 7)])
    for name, frame in whole.frames().items():
        keys = [c for c in frame if frame[c].dtype.kind not in "f" or c == "threshold"]
        keys = [c for c in keys if c not in ("step", "document", "flag")]
        a, b = (
            x.astype({c: str for c in keys if x[c].dtype == "category"}).sort_values(keys)
            for x in (frame, getattr(joined, name))
        )
        for column in frame.select_dtypes("float"):
            np.testing.assert_allclose(a[column], b[column], rtol=1e-4, atol=1e-5)


class Once(torch.autograd.Function):
    """The identity, which cannot be differentiated twice."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        return gradient.clone()


class OnceLinear(Linear):
    def forward(self, tokens):
        h = self.embed(tokens)
        for _ in range(self.K):
            h = self.core(Once.apply(h))
        return self.head(h)


def test_what_cannot_be_differentiated_is_told_in_one_line_and_the_rest_runs():
    model = ls.wrap(OnceLinear(torch.eye(D) / 2), example=TOKENS)
    tables = ls.orbit(model, TOKENS)
    assert core(tables)["contraction"].isna().all()
    assert core(tables, t=1)["size"].notna().all()
    (note,) = [note for note in notes(tables) if "no contraction" in note]
    assert "\n" not in note


def test_bfloat16_and_one_sample_run(make_model, samples):
    tables = ls.orbit(make_model("mesh").bfloat16(), samples[:1], batch_size=1)
    assert core(tables, t=1)["contraction"].notna().all()
    assert tables.orbit["flag"].isna().all()


def test_first_tokens_can_be_left_out(make_model, samples):
    model = make_model("base")
    tables = ls.measure(model, samples, ["orbit"], drop_first=4)
    h = [x[:, 4:] for x in model.capture(samples).h]
    expected = ((h[1] - h[0]).norm(dim=-1) / h[0].norm(dim=-1)).mean(1)
    np.testing.assert_allclose(core(tables, t=0)["size"], expected, rtol=1e-5)
    assert tables.orbit_path["pos"].min() == 4


@pytest.mark.parametrize("changes", [{"power_steps": 0}, {"close_samples": -1}])
def test_options_that_cannot_be_are_refused(make_model, samples, changes):
    with pytest.raises(InputError, match=next(iter(changes))):
        ls.orbit(make_model("base"), samples, **changes)


def test_angles_are_those_of_a_rotation():
    c, s = math.cos(0.7), math.sin(0.7)
    A = torch.kron(torch.eye(2), torch.tensor([[c, -s], [s, c]]))
    tables = ls.orbit(wrapped_linear(A), TOKENS, close_samples=0, contraction_samples=0)
    np.testing.assert_allclose(core(tables, t=2)["cosine"], c, rtol=1e-5)
    np.testing.assert_allclose(core(tables, t=2)["rate"], 1, rtol=1e-5)


def test_heads_of_a_wrapped_model_drift_too():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=20, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=4,
    )  # fmt: skip
    module = transformers.LlamaForCausalLM(config).eval()
    module.model.layers = torch.nn.ModuleList([module.model.layers[0]] * 3)
    module.config.num_hidden_layers = 3
    model = ls.wrap(module, example=TOKENS)
    tables = ls.orbit(model, TOKENS, **LITTLE)
    names = [f"blocks.{v}.attn.hook_pattern" for v in range(3)]
    _, cache = model.run_with_cache(TOKENS, names_filter=names)
    p, q = (cache["pattern", v][0].double().numpy() for v in (0, 1))
    expected = (np.nan_to_num(jensenshannon(p, q, axis=-1)) ** 2).mean(-1)
    rows = tables.attention_drift
    rows = rows[rows["sample"].eq(0) & rows["t"].eq(0)]
    np.testing.assert_allclose(rows["value"], expected, atol=1e-6)
    assert len(core(tables)["contraction"].dropna()) == 2 * 3
