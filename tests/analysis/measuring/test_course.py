"""Steps and readouts along the loop, held against runs with fewer or more iterations."""

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import loopscope as ls
from loopscope.analysis.measures.readout_losses import beyond
from loopscope.analysis.measures.step_sizes import steps, turn
from loopscope.analysis.measuring.streaming import Measuring, measure
from loopscope.analysis.options import Options
from loopscope.analysis.tables.frames import Tables
from loopscope.analysis.tables.registry import COMPARED
from loopscope.errors import InputError
from loopscope.models.native.loop_model import LoopModel
from loopscope.models.wrapped.wrapped_model import WrappedModel
from loopscope.probes.readout import read_out
from tests.analysis.planted import identity, plant
from tests.conftest import make_model
from tests.models.wrapped.small import Small

K, T = 3, 5


@pytest.fixture(scope="module")
def samples():
    return torch.randint(61, (5, 13), generator=torch.Generator().manual_seed(2))


def losses(model, tokens):
    """Mean next-token loss of each sample, from the model's own logits."""
    logits = model(tokens)
    return [F.cross_entropy(x[:-1], y[1:]).item() for x, y in zip(logits, tokens, strict=True)]


def column(frame, t, value="value", reading="raw"):
    rows = frame[frame["t"].eq(t)]
    if "reading" in frame:
        rows = rows[rows["reading"].eq(reading)]
    return rows.sort_values("sample")[value].to_numpy()


@pytest.mark.parametrize("variant", ["base", "residual", "anchor+anchor_emb", "static"])
def test_reading_h_t_is_running_t_iterations(variant, samples):
    model = make_model(variant)
    readout = measure(model, samples, ["readout"], more_loops=T, batch_size=2).readout
    assert sorted(readout["t"].unique()) == [0, 1, 2, 3, 4, 5]
    for t in range(1, T + 1):
        np.testing.assert_allclose(column(readout, t), losses(model.with_loops(t), samples), 1e-6)


def test_reading_h_0_is_leaving_the_loop_out(samples):
    model = make_model("base", "1+2R3+1")
    readout = measure(model, samples, ["readout"]).readout
    skipped = []
    for tokens in samples:
        h_0 = ls.capture(model, tokens[None]).h[0]
        hooks = [("coda.hook_in", lambda h, hook, h_0=h_0: h_0)]
        logits = model.run_with_hooks(tokens[None], fwd_hooks=hooks)
        skipped.append(F.cross_entropy(logits[0, :-1], tokens[1:]).item())
    np.testing.assert_allclose(column(readout, 0), skipped, 1e-6)


def test_the_last_readout_is_the_loss(samples):
    tables = measure(make_model("mesh"), samples, ["readout", "loss"])
    assert np.array_equal(column(tables.readout, K), tables.loss["value"].to_numpy())


def test_steps_are_those_of_the_captured_states(samples):
    model = make_model("anchor")
    delta = measure(model, samples, ["delta"], more_loops=T, drop_first=2).delta
    h = [x[:, 2:].double().numpy() for x in ls.capture(model, samples, loops=T).h]
    for t in range(T):
        step = [np.linalg.norm(b - a) for a, b in zip(h[t], h[t + 1], strict=True)]
        size = [np.linalg.norm(a) for a in h[t]]
        np.testing.assert_allclose(column(delta, t), np.divide(step, size), rtol=1e-6)
        if t:
            before = [np.linalg.norm(b - a) for a, b in zip(h[t - 1], h[t], strict=True)]
            np.testing.assert_allclose(column(delta, t, "ratio"), np.divide(step, before), 1e-6)
    assert np.isnan(column(delta, 0, "ratio")).all()
    assert delta["flag"].isna().all()


def test_steps_of_known_length():
    h = torch.zeros(4, 2, 3, 2, dtype=torch.float64)
    h[0, 0, 0, 0] = 3.0  # sample 0: 3, 6, 6, 3; sample 1 stays at zero, then moves
    h[1, 0, 0, 0], h[2, 0, 0, 0], h[3, 0, 0, 0] = 6.0, 6.0, 3.0
    h[3, 1, 1, 1] = 2.0
    value, ratio, mixed, turn = steps(list(h))
    assert value[0].tolist() == [1.0, 0.0, 0.5] and value[1, :2].tolist() == [0.0, 0.0]
    assert ratio[0, 1:].tolist() == [0.0, float("inf")] and ratio[1, 1].item() == 0.0
    assert mixed[0].tolist() == [2 * 3 / 9, 0.0, 2 * 3 / 9] and mixed[1].tolist() == [0, 0, 2]
    assert turn[0].tolist() == [0.0, 0.0, 0.0]
    assert turn[1, :2].tolist() == [0.0, 0.0] and torch.isnan(turn[1, 2])  # from nowhere
    for late, whole in zip(steps(list(h), first=2), (value, ratio, mixed, turn), strict=True):
        torch.testing.assert_close(late, whole[:, 2:], rtol=0, atol=0, equal_nan=True)


def around(*tokens, midst=(0.0, 0.0)):
    """A state (1, pos, 2) of tokens and their mirror images, and one in the midst of them."""
    points = torch.tensor([*tokens, *([-x, -y] for x, y in tokens), [0.0, 0.0]])
    return points.double()[None] + torch.tensor(midst, dtype=torch.float64)


def test_the_turn_is_the_chord_between_directions_whatever_lengths_and_midst():
    angles = np.array([0.3, 1.1])  # of two tokens, and of their mirror images
    before = around([5.0, 0.0], [0.0, 0.25])
    after = around(
        [2e3 * np.cos(0.3), 2e3 * np.sin(0.3)], [1e-3 * np.sin(1.1), 1e-3 * np.cos(1.1)],
        midst=(7.0, -4.0),
    )  # fmt: skip
    chord = np.sqrt(np.mean((2 * np.sin(angles / 2)) ** 2))
    assert turn(before, after).item() == pytest.approx(chord, rel=1e-9)
    assert turn(before, 3.0 * before + 11.0).item() == pytest.approx(0.0, abs=1e-12)
    assert turn(before, -before).item() == pytest.approx(2.0)
    assert torch.isnan(turn(before, torch.full_like(before, 4.0))).all()


def test_the_work_of_the_core_is_the_turn_to_its_output(samples):
    model = make_model("anchor")
    delta = measure(model, samples, ["delta"], drop_first=1).delta
    trajectory = ls.capture(model, samples)
    for t in range(K):
        h, h_m = trajectory.h[t][:, 1:], trajectory.h_m[t][:, 1:]
        np.testing.assert_allclose(column(delta, t, "work"), turn(h, h_m), rtol=1e-6)
        after = trajectory.h[t + 1][:, 1:]
        np.testing.assert_allclose(column(delta, t, "turn"), turn(h, after), rtol=1e-6)
    assert not np.allclose(column(delta, 1, "work"), column(delta, 1, "turn"), rtol=0.1)


def test_a_core_that_adds_a_vector_to_every_token_does_no_work(samples):
    model = make_model("anchor_emb")
    with torch.no_grad():
        for block in model.core:
            block.attn.out.weight.zero_()
            block.mlp.down.weight.zero_()
    tables = measure(model, samples, ["update", "delta"])
    cores = tables.update[tables.update["block"].astype(str).str.startswith("core")]
    assert cores["value"].min() > 0.01 and tables.delta["turn"].max() > 0.1
    assert tables.delta["work"].max() < 1e-5


def test_a_wrapped_model_is_read_out_as_the_native_one():
    base = ls.load("base")
    same = plant(base, identity(1.0), "same")
    text = ls.load_samples(base, samples=3, tokens=24)
    tables = [measure(m, text, ["delta", "readout"], more_loops=T) for m in (base, same)]
    for name in ("delta", "readout"):
        ours, theirs = (getattr(one, name) for one in tables)
        np.testing.assert_allclose(ours["value"], theirs["value"], rtol=2e-5)
    h = ls.capture(base, text.tokens).h[1]
    torch.testing.assert_close(read_out(same, text.tokens, h), read_out(base, text.tokens, h))


class Deaf(nn.Module):
    """A model whose head reads the embedding, not what the loop made."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.core = nn.Embedding(11, 8), nn.Sequential(nn.Linear(8, 8), nn.Tanh())
        self.coda, self.head = nn.Linear(8, 8), nn.Linear(8, 11)

    def forward(self, tokens):
        x = h = self.embed(tokens)
        for _ in range(3):
            h = h + self.core(h)
        nothing = 0.0 * self.coda(h).sum(-1, keepdim=True)
        return self.head(x) + nothing


def test_a_head_that_does_not_hear_the_loop_is_said_to():
    torch.manual_seed(0)
    tokens = torch.randint(11, (3, 9))
    model = ls.wrap(Deaf(), example=tokens)
    tables = measure(model, tokens, ["readout"])
    assert tables.readout.empty
    (note,) = tables.provenance["models"][model.name]["notes"]
    assert "does not read h(K)" in note


def test_what_cannot_run_longer_is_measured_as_it_is(samples):
    tables = measure(make_model("mesh"), samples, ["delta", "readout"], more_loops=T)
    assert tables.delta["t"].max() == K - 1 and tables.readout["t"].max() == K
    (note,) = tables.provenance["models"]["mesh"]["notes"]
    assert note.startswith("more loops: ") and "runs exactly 3" in note
    plain = measure(make_model("vanilla", "4"), samples, ["delta", "readout"], more_loops=T)
    assert plain.delta.empty and plain.readout.empty


def test_fewer_loops_than_it_runs_are_an_error(samples):
    with pytest.raises(InputError, match="more_loops is 3, but the model runs 3 iterations"):
        measure(make_model("base"), samples, ["delta"], more_loops=3)


def test_what_overflows_is_flagged_and_nothing_else(samples):
    model = make_model("residual", "1+1R3+1")
    with torch.no_grad():  # doubled twice and more it is above float32, once it is not
        model.core[0].mlp.down.bias.copy_(torch.linspace(-1e38, 1e38, 32))
    tables = measure(model, samples, ["delta", "readout"], more_loops=T)
    for frame in (tables.delta, tables.readout):
        bad = ~np.isfinite(frame["value"])
        assert frame["flag"].eq("nonfinite").equals(bad.rename("flag"))
        at = bad.groupby(frame["t"]).all()
        assert not at.iloc[0] and at.iloc[-1]


@pytest.mark.parametrize("variant", ["base", "mesh"])
def test_parts_and_batches_do_not_change_the_rows(variant, samples):
    model, kinds = make_model(variant), list(COMPARED)
    more = T if variant == "base" else None
    whole = measure(model, samples, kinds, batch_size=5, more_loops=more)
    how = Options(measures=kinds, more_loops=more)
    cut = Measuring(model, samples, how, batch_size=2)
    joined = Tables.join([cut.part(0, 2), cut.part(2, 5)])
    assert joined.provenance["models"].keys() == {variant}
    for name, frame in whole.frames().items():
        other = joined.frames()[name]
        keys = [c for c in frame.columns if frame[c].dtype.kind not in "f"]
        pd.testing.assert_frame_equal(frame[keys], other[keys], check_categorical=False)
        for value in set(frame.columns) - set(keys):
            np.testing.assert_allclose(frame[value], other[value], rtol=1e-5, atol=1e-6)


def test_a_part_has_its_samples_numbers_and_step(samples):
    how = Options(measures=["update", "routing"])
    cut = Measuring(make_model("mesh"), samples, how, name="run", step=500)
    late = cut.part(3, 5)
    assert sorted(late.update["sample"].unique()) == [3, 4]
    assert late.update["step"].eq(500).all() and str(late.update["step"].dtype) == "Int64"
    assert late.tokens.empty and len(cut.part(0, 2).tokens)


def test_many_more_loops_are_read_out_at_four_places_where_that_is_dear():
    assert list(beyond(8, 16, cheap=False)) == [10, 12, 14, 16]
    assert list(beyond(3, 6, cheap=False)) == [4, 5, 6] == list(beyond(3, 6, cheap=True))


@pytest.mark.parametrize("variant", ["base", "anchor+anchor_emb", "dynamic"])
def test_running_more_loops_changes_no_other_row(variant, samples):
    model = make_model(variant)
    kinds = ("update", "cka", "spectrum", "rank", "readout", "loss")
    plain = measure(model, samples, kinds, batch_size=2)
    longer = measure(model, samples, kinds, batch_size=2, more_loops=T)
    longer.readout = longer.readout[longer.readout["t"] <= K].reset_index(drop=True)
    for name, frame in plain.frames().items():
        pd.testing.assert_frame_equal(frame, longer.frames()[name], rtol=1e-6, atol=1e-7)


def test_a_model_with_hooks_is_not_run_without_them(samples):
    model = make_model("base")
    model.add_hook("loop.1.hook_in", lambda h, hook: 0.5 * h)
    tables = measure(model, samples, ["delta"], more_loops=T)
    assert tables.delta["t"].max() == K - 1
    assert "has hooks" in tables.provenance["models"]["base"]["notes"][0]


def captures_of_each_batch(monkeypatch, kind, model, samples, measures, more):
    """K of the model of each call of `capture`, batch by batch."""
    batches, original = [[]], kind.capture

    def spy(self, *args, **kwargs):
        batches[-1].append(self.K)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(kind, "capture", spy)
    measure(
        model, samples, measures, more_loops=more, batch_size=2,
        progress=lambda done: batches.append([]),
    )  # fmt: skip
    assert batches.pop() == []
    return batches


@pytest.mark.parametrize("measures", [["delta"], ["update", "delta"], ["delta", "loss"]])
def test_every_batch_runs_the_longer_model_alone(monkeypatch, measures, samples):
    batches = captures_of_each_batch(
        monkeypatch, LoopModel, make_model("base"), samples, measures, T
    )
    assert batches == [[T]] * 3


def test_every_batch_of_a_model_that_cannot_run_longer_takes_the_same_route(monkeypatch, samples):
    batches = captures_of_each_batch(
        monkeypatch, LoopModel, make_model("mesh"), samples, ["delta"], T
    )
    assert batches == [[K]] * 3


def test_every_batch_of_a_wrapped_model_takes_the_same_route(monkeypatch):
    tokens = torch.randint(50, (5, 9), generator=torch.Generator().manual_seed(2))
    model = ls.wrap(Small(K), tokens)
    batches = captures_of_each_batch(monkeypatch, WrappedModel, model, tokens, ["delta"], T)
    assert batches == [[T, K]] * 3
