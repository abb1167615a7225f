"""Several loops, other widths, gates: rows follow from hand-made trajectories."""

from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.metrics.pairwise import euclidean_distances, rbf_kernel

from loopscope.analysis.measuring.streaming import measure
from loopscope.analysis.tables.frames import Tables
from loopscope.analysis.tables.registry import DEFAULT, schema
from loopscope.errors import InputError
from tests.analysis.loop_trajectories import POS, SAMPLES, Played, loop, nested, tokens

GEOMETRY = ["update", "cka", "spectrum", "rank"]


PLAYED = (*DEFAULT, "delta", "loss")  # a trajectory played back has no coda to read states


@pytest.fixture
def run():
    """Measure what a played model was made of."""

    def measured(model: Played, measures: Any = PLAYED, **options: Any) -> Tables:
        return measure(model, tokens(), measures, **options)

    return measured


def of_loop(frame: pd.DataFrame, name: str) -> pd.DataFrame:
    """The rows of one loop, categories as strings."""
    rows = frame[frame["loop"].eq(name)].reset_index(drop=True)
    names = [c for c in rows if isinstance(rows[c].dtype, pd.CategoricalDtype)]
    return rows.astype(dict.fromkeys(names, "str"))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"kernels": ("rbf", "linear"), "batch_size": 2},
        {"drop_first": 3, "center": True, "normalize_rows": True},
    ],
)
def test_each_loop_has_the_rows_it_would_have_alone(run, options):
    together = nested()
    tables = run(Played(together), **options)
    for name, one in together.loops.items():
        alone = run(Played(replace(one, others={})), GEOMETRY, **options)
        for table in GEOMETRY:
            found = of_loop(getattr(tables, table), name)
            pd.testing.assert_frame_equal(found, of_loop(getattr(alone, table), name), rtol=1e-6)


def test_every_table_has_its_schema_and_its_loops(run, tmp_path):
    tables = run(Played(nested()))
    for name, frame in tables.frames().items():
        assert {column: str(dtype) for column, dtype in frame.dtypes.items()} == schema(name)
    counts = tables.rank.groupby("loop", observed=True).size()
    assert counts.to_dict() == {"H": SAMPLES * 3 * 5, "L": SAMPLES * 3 * 9}
    assert list(tables.update["loop"].cat.categories) == ["H", "L"]
    tables.save(tmp_path)
    for name, frame in Tables.load(tmp_path).frames().items():
        pd.testing.assert_frame_equal(frame, tables.frames()[name])


def test_a_single_loop_keeps_its_own_name(run):
    tables = run(Played(loop("core", 3, 8, seed=1)))
    assert set(tables.update["loop"]) == {"core"}
    assert set(run(Played(loop("A", 3, 8, seed=1))).update["loop"]) == {"A"}


def test_the_loss_is_one_per_sample_and_stands_with_the_main_loop(run):
    trajectory = nested()
    tables = run(Played(trajectory))
    logp = trajectory.logits.double().log_softmax(-1)[:, :-1]
    expected = -logp.gather(-1, tokens()[:, 1:, None]).mean((1, 2))
    np.testing.assert_allclose(tables.loss["value"], expected, rtol=1e-6)
    assert tables.loss["loop"].tolist() == ["H"] * SAMPLES


def textbook_cka(x: np.ndarray, y: np.ndarray) -> float:
    def kernel(z: np.ndarray) -> np.ndarray:
        gamma = 1 / (2 * np.median(euclidean_distances(z, squared=True)))
        return rbf_kernel(z, gamma=gamma)

    H = np.eye(POS) - 1 / POS
    a, b = (H @ kernel(z) @ H for z in (x, y))
    return float((a * b).sum() / np.sqrt((a * a).sum() * (b * b).sum()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("d_emb", [5, 40])
def test_states_of_other_widths_have_cka_spectrum_and_rank(run, dtype, d_emb):
    one = loop("core", 2, 20, seed=3, d_emb=d_emb)
    one = replace(
        one,
        h_emb=one.h_emb.to(dtype),
        h_out=one.h_out.to(dtype),
        h=tuple(x.to(dtype) for x in one.h),
    )
    tables = run(Played(one), ["cka", "spectrum", "rank"])
    states = {name: x.double().numpy() for name, x in one.states.items()}
    for s in (0, 4):
        pairs = tables.cka[tables.cka["sample"].eq(s) & tables.cka["estimator"].eq("biased")]
        for row in pairs.itertuples():
            expected = textbook_cka(states[row.state_a][s], states[row.state_b][s])
            assert row.value == pytest.approx(expected, abs=1e-5)
        for name, state in states.items():
            sigma = np.linalg.svd(state[s], compute_uv=False)
            p = sigma / sigma.sum()
            here = tables.rank["sample"].eq(s) & tables.rank["state"].eq(name)
            found = tables.rank[here].set_index("measure")["value"]
            assert found["effective"] == pytest.approx(np.exp(-(p * np.log(p)).sum()), rel=1e-5)
            assert found["stable"] == pytest.approx((sigma**2).sum() / sigma[0] ** 2, rel=1e-5)
            here = tables.spectrum["sample"].eq(s) & tables.spectrum["state"].eq(name)
            line = tables.spectrum[here]["sigma_rel"].to_numpy()
            np.testing.assert_allclose(line[: len(sigma)], sigma / sigma[0], rtol=1e-5)
            assert np.isnan(line[len(sigma) :]).all()


@pytest.mark.parametrize("options", [{"normalize_rows": True}, {"center": True, "drop_first": 2}])
def test_options_apply_to_states_of_every_width(run, options):
    one = loop("core", 1, 20, seed=3, d_emb=6)
    tables = run(Played(one), ["rank"], **options)
    for name, state in one.states.items():
        x = state[2].double().numpy()[options.get("drop_first", 0) :]
        if "normalize_rows" in options:
            x = x / np.linalg.norm(x, axis=1, keepdims=True)
        else:
            x = x - x.mean(0)
        sigma = np.linalg.svd(x, compute_uv=False)
        here = tables.rank["sample"].eq(2) & tables.rank["state"].eq(name)
        found = tables.rank[here].set_index("measure")["value"]["stable"]
        assert found == pytest.approx((sigma**2).sum() / sigma[0] ** 2, rel=1e-5)


def test_a_block_that_changes_the_width_has_no_update_and_says_so(run):
    update = run(Played(loop("core", 2, 20, seed=3, d_emb=6)), ["update"]).update
    changed = update["block"].isin(["prelude", "coda"])
    assert update.loc[changed, "value"].isna().all()
    assert set(update.loc[changed, "flag"]) == {"shape"}
    assert update.loc[~changed, "value"].notna().all()
    assert update.loc[~changed, "flag"].isna().all()


def test_iterations_that_change_between_batches_are_an_error(run):
    class Growing(Played):
        def capture(self, batch, **options):
            found = super().capture(batch, **options)
            if self.done <= 2:
                return found
            short = {n: x for n, x in found.blocks.items() if n != "core3"}
            return replace(found, h=found.h[:-1], h_m=found.h_m[:-1], blocks=short)

    with pytest.raises(InputError, match=r"ran 3 iterations of core and a later one 2 .*depends"):
        run(Growing(loop("core", 3, 8, seed=1)), ["rank"], batch_size=2)
