"""measure: every row equals the measure of the captured state, whatever the batches."""

import hashlib
import json
import math
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from loopscope.analysis.measures.cka_estimators import cka
from loopscope.analysis.measures.effective_ranks import ranks
from loopscope.analysis.measures.gram_matrices import singular_values
from loopscope.analysis.measures.router_weights import alpha_statistics, router_statistics
from loopscope.analysis.measures.spectrum_decay import spectrum
from loopscope.analysis.measures.update_norm import relative_update
from loopscope.analysis.measuring.streaming import measure
from loopscope.analysis.tables.frames import Tables
from loopscope.analysis.tables.registry import BY_NAME, COMPARED, schema
from loopscope.probes.state_capture import capture

SAMPLES, POS = 5, 12  # of the fixture


def of_sample(frame: pd.DataFrame | None, sample: int) -> pd.DataFrame:
    assert frame is not None
    return frame[frame["sample"] == sample]


def test_every_table_has_its_schema_and_every_sample_its_rows(mesh, samples) -> None:
    tables = measure(mesh, samples, COMPARED)
    states, pairs = 6, 21
    rows = {
        "update": 5,
        "cka": 2 * pairs,
        "spectrum": 50 * states,
        "rank": 3 * states,
        "routing": 2 * 4 * 6 + 14,
        "delta": 3,
        "readout": 3 * 4,
        "loss": 1,
    }
    for name, frame in tables.frames().items():
        assert {column: str(dtype) for column, dtype in frame.dtypes.items()} == schema(name)
        if name in rows:
            assert len(frame) == SAMPLES * rows[name], name
    measured = {table.name for name in COMPARED for table in BY_NAME[name].tables}
    assert rows.keys() <= tables.frames().keys() == measured


@pytest.mark.parametrize("threads", [1, 2])
def test_rows_are_the_measures_of_the_captured_states(mesh, samples, threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        tables = measure(mesh, samples, COMPARED, kernels=("rbf", "linear"), batch_size=2)
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    trajectory = capture(mesh, samples, logits=True)
    for s in (0, 3, 4):
        states = {name: state[s] for name, state in trajectory.states.items()}
        update = of_sample(tables.update, s).set_index("block")
        for block, (h, f_h) in trajectory.blocks.items():
            expected = relative_update(h, f_h).value[s]
            assert update["value"][block] == pytest.approx(expected, rel=1e-5)
        found = cka(list(states.values()), kernels=("rbf", "linear"))
        for (kernel, estimator), part in of_sample(tables.cka, s).groupby(
            ["kernel", "estimator"], observed=True
        ):
            value = getattr(found[kernel], estimator).value
            for row in part.itertuples():
                a, b = list(states).index(row.state_a), list(states).index(row.state_b)
                assert a <= b
                assert row.value == pytest.approx(value[a, b], abs=1e-5)
        lines = of_sample(tables.spectrum, s).set_index("state")
        found_ranks = of_sample(tables.rank, s).set_index("state")
        for name, state in states.items():
            sigma = singular_values(state)
            line, rank = lines.loc[name], found_ranks.loc[name]
            np.testing.assert_allclose(line["sigma_rel"], spectrum(sigma).sigma_rel, rtol=1e-3)
            np.testing.assert_allclose(rank["value"], ranks(sigma).value, rtol=1e-4)
        logits = trajectory.logits[s, :-1].double().log_softmax(-1)
        expected = -logits.gather(1, samples[s, 1:, None]).mean().item()
        assert of_sample(tables.loss, s)["value"].item() == pytest.approx(expected, rel=1e-5)


def test_routing_rows_are_router_means_entropies_and_alpha(mesh, samples) -> None:
    routing = of_sample(measure(mesh, samples, ["routing"]).routing, 1)
    trajectory = capture(mesh, samples)
    start = trajectory.transition
    cycles = {
        "write": [start.w_write, *trajectory.w_write],
        "read": [start.w_read, *trajectory.w_read],
    }
    for kind, routers in cycles.items():
        for t, w in zip(range(-1, 3), routers, strict=True):
            mean, entropy = router_statistics(w)
            rows = routing[(routing["kind"] == kind) & (routing["t"] == t)]
            assert rows["target"].tolist() == [f"m{b}" for b in range(6)]
            np.testing.assert_allclose(rows["mean"], mean.value[1], rtol=1e-5)
            np.testing.assert_allclose(rows["entropy"], entropy.value[1], rtol=1e-5)
    stacked = [torch.stack(cycles[kind], dim=2) for kind in ("write", "read")]
    alpha = alpha_statistics(*stacked).value[1]
    for t, sources in (
        (-1, ["h_emb", "prelude"]),
        (0, ["h_emb", "prelude", "core1"]),
        (2, ["h_emb", "prelude", "core1", "core2", "core3"]),
    ):
        rows = routing[(routing["kind"] == "alpha") & (routing["t"] == t)]
        assert rows["target"].tolist() == sources
        np.testing.assert_allclose(rows["mean"], alpha[t + 1, : len(sources)], rtol=1e-5)
        assert rows["entropy"].isna().all()
        assert rows["flag"].isna().all()


def test_alpha_rebuilds_the_states_of_a_real_model(mesh, samples) -> None:
    from loopscope.analysis.measures.router_weights import alpha

    trajectory = capture(mesh, samples)
    start = trajectory.transition
    weights = alpha(
        torch.stack([start.w_write, *trajectory.w_write], dim=2),
        torch.stack([start.w_read, *trajectory.w_read], dim=2),
    )
    sources = [trajectory.h_emb, trajectory.blocks["prelude"][1], *trajectory.h_m]
    for t, state in enumerate(trajectory.h):
        rebuilt = sum(
            w[..., None] * x for w, x in zip(weights[:, :, t].unbind(-1), sources, strict=False)
        )
        torch.testing.assert_close(rebuilt.float(), state, atol=1e-5, rtol=1e-5)


def test_tokens_are_the_router_weights_of_the_first_sample(mesh, samples) -> None:
    tokens = measure(mesh, samples, ["routing"], batch_size=2).tokens
    assert tokens is not None
    trajectory = capture(mesh, samples)
    assert set(tokens["sample"]) == {0}
    assert len(tokens) == 2 * 4 * 6 * POS
    for kind, t, slot, w in (
        ("write", -1, 2, trajectory.transition.w_write),
        ("read", 1, 5, trajectory.w_read[1]),
    ):
        here = (tokens["kind"] == kind) & (tokens["t"] == t) & (tokens["target"] == f"m{slot}")
        rows = tokens[here]
        assert rows["pos"].tolist() == list(range(POS))
        assert rows["token"].tolist() == [str(i) for i in samples[0].tolist()]
        np.testing.assert_allclose(rows["value"], w[0, :, slot], rtol=1e-5)


def test_tokens_are_shown_as_the_tokenizer_decodes_them(mesh, samples) -> None:
    class Letters:
        def encode(self, text: str) -> list[int]:
            return [ord(letter) - 65 for letter in text]

        def decode(self, ids: list[int]) -> str:
            return "".join(chr(65 + i) for i in ids)

    mesh.tokenizer = Letters()
    tokens = measure(mesh, samples, ["routing"]).tokens
    assert tokens is not None
    assert tokens["token"].tolist()[:POS] == [chr(65 + i) for i in samples[0].tolist()]


def test_batches_do_not_change_the_tables_and_progress_counts_samples(mesh, samples) -> None:
    steps: list[int] = []
    one = measure(mesh, samples, batch_size=2, progress=steps.append)
    all_at_once = measure(mesh, samples)
    assert steps == [2, 2, 1]
    for name, frame in one.frames().items():
        pd.testing.assert_frame_equal(frame, all_at_once.frames()[name], rtol=1e-3, atol=1e-4)


def test_a_model_without_slots_has_no_routing_rows_and_says_why(make_model, samples) -> None:
    tables = measure(make_model("base"), samples)
    assert tables.routing is not None
    assert len(tables.routing) == 0
    assert "no memory slots" in tables.provenance["models"]["base"]["notes"][0]
    assert tables.update is not None
    assert tables.update["block"].unique().tolist() == [
        "prelude", "core1", "core2", "core3", "coda",
    ]  # fmt: skip
    assert tables.update["t"].tolist()[:5] == [-1, 0, 1, 2, 3]


def test_a_plain_stack_and_a_loop_alone_can_be_measured(make_model, samples) -> None:
    stack = measure(make_model("vanilla", "3"), samples)
    loop = measure(make_model("mesh", "0+1R3+0"), samples)
    assert stack.rank is not None
    assert stack.rank["state"].iloc[0] == "h_emb"
    assert loop.update is not None
    assert loop.update["block"].unique().tolist() == ["core1", "core2", "core3"]
    assert loop.routing is not None
    assert len(loop.routing) == SAMPLES * (2 * 4 * 6 + 14)


def test_only_what_was_asked_for_is_measured(make_model, samples) -> None:
    model = make_model("base")
    assert measure(model, samples, ["rank"]).frames().keys() == {"rank"}
    assert measure(model, samples, "update").frames().keys() == {"update"}


def test_options_do_what_their_measures_do_and_are_recorded(make_model, samples) -> None:
    model = make_model("residual")
    options = {"drop_first": 3, "center": True, "normalize_rows": True, "bandwidth": 0.5}
    tables = measure(model, samples, ["cka", "rank", "update"], **options)
    recorded = tables.provenance["models"]["residual"]["options"]
    assert {key: recorded[key] for key in options} == options
    trajectory = capture(model, samples)
    states = [state[2, 3:] for state in trajectory.states.values()]
    states = [x / x.norm(dim=-1, keepdim=True) for x in states]
    expected = cka(states, bandwidth=0.5)["rbf"].biased.value[np.triu_indices(6)]
    found = of_sample(tables.cka, 2).query("estimator == 'biased'")["value"]
    np.testing.assert_allclose(found, expected, atol=1e-5)
    expected = np.concatenate([ranks(singular_values(x, center=True)).value for x in states])
    np.testing.assert_allclose(of_sample(tables.rank, 2)["value"], expected, rtol=1e-4)
    h, f_h = trajectory.blocks["core2"]
    update = of_sample(tables.update, 2).set_index("block")["value"]["core2"]
    assert update == pytest.approx(relative_update(h[:, 3:], f_h[:, 3:]).value[2], rel=1e-5)


def test_normalising_leaves_zero_rows_zero(make_model, samples) -> None:
    model = make_model("base", embed_scale=False)
    with torch.no_grad():
        model.embed.weight.zero_()
    tables = measure(model, samples, ["rank", "cka"], normalize_rows=True)
    assert tables.rank is not None
    first = tables.rank.query("state == 'h_emb'")
    assert (first["flag"] == "zero").all()
    assert first["value"].isna().all()


def test_samples_that_are_not_finite_are_flagged_and_no_others(make_model, samples) -> None:
    model = make_model("mesh")
    bad = int(samples[1, 4])
    with torch.no_grad():
        model.embed.weight[bad] = math.nan
    spoilt = (samples == bad).any(1).numpy()
    assert not spoilt.all()
    tables = measure(model, samples, COMPARED)
    for name, frame in tables.frames().items():
        if name == "tokens":
            continue
        rows = frame[frame["sample"].isin(np.flatnonzero(spoilt))]
        kept = rows["flag"].isin(["nonfinite", "short"])
        assert kept.all(), name
        others = frame[~frame["sample"].isin(np.flatnonzero(spoilt))]
        assert not (others["flag"] == "nonfinite").any(), name


def test_provenance_tells_model_samples_options_and_versions(mesh, samples) -> None:
    mesh.provenance = {"seed": 11, "tokens": 5}
    tables = measure(mesh, samples, ["update"], name="mine")
    told = json.loads(json.dumps(tables.provenance))["models"]["mine"]
    data = samples.numpy().astype("<i4").tobytes()
    assert told["samples"]["sha256"] == hashlib.sha256(data).hexdigest()
    assert told["samples"]["samples"] == SAMPLES
    assert told["samples"]["tokens"] == POS
    assert told["config"]["variant"] == "mesh"
    assert told["training"] == {"seed": 11, "tokens": 5}
    assert told["versions"].keys() >= {"loopscope", "python", "torch", "numpy"}
    assert told["options"]["measures"] == ["update"]
    assert told["dtype"] == "float32"
    assert "commit" in told
    assert tables.update is not None
    assert set(tables.update["model"]) == {"mine"}


def test_samples_may_tell_where_they_are_from(mesh, samples) -> None:
    @dataclass
    class Told:
        tokens: Any
        provenance: dict[str, Any]

    tables = measure(mesh, Told(samples, {"source": "a book", "seed": 4}), ["update"])
    told = tables.provenance["models"]["mesh"]["samples"]
    assert told["source"] == "a book"
    assert told["seed"] == 4
    assert told["tokens"] == POS


def test_arrays_of_integers_are_samples_too(mesh, samples) -> None:
    from_array = measure(mesh, samples.numpy().astype(np.uint16), ["update"])
    pd.testing.assert_frame_equal(from_array.update, measure(mesh, samples, ["update"]).update)


def test_samples_longer_than_the_training_context_are_measured_and_noted(make_model) -> None:
    tables = measure(make_model("base", n_ctx=8), torch.zeros(1, 12, dtype=torch.int32), ["update"])
    assert "longer than n_ctx = 8" in tables.provenance["models"]["base"]["notes"][0]


def test_errors_while_measuring_restore_the_threads(mesh, samples, monkeypatch) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with pytest.raises(KeyError):
            measure(mesh, samples, ["rank"], progress={}.__getitem__)
        assert torch.get_num_threads() == 2
        with ThreadPoolExecutor(1) as pool:  # a new thread takes the last number that was set
            assert pool.submit(torch.get_num_threads).result() == 2
    finally:
        torch.set_num_threads(before)


def test_measure_does_not_import_matplotlib() -> None:
    code = (
        "import sys, loopscope.analysis.measuring.streaming\n"
        "assert 'matplotlib' not in sys.modules, 'matplotlib'"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)


MEMORY = """
import gc, json, resource
import numpy as np, torch
from loopscope.analysis.measuring.streaming import measure
from loopscope.models.native.configuration import LoopConfig
from loopscope.models.native.loop_model import LoopModel

def peak():
    gc.collect()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

torch.set_num_threads(2)
config = LoopConfig(variant="mesh", layout="1+1R3+1", d_model=32, n_heads=4, d_vocab=61)
model = LoopModel(config, seed=0)
samples = torch.randint(61, (500, 64))
few = measure(model, samples[:50])
low = peak()
many = measure(model, samples)
high = peak()
size = sum(int(f.memory_usage(deep=True).sum()) for f in many.frames().values())
print(json.dumps({"grown": high - low, "tables": size}))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs the resource module")
def test_memory_grows_by_the_tables_only() -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", MEMORY],
        check=True,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_WAIT_POLICY": "PASSIVE"},
    )
    found = json.loads(done.stdout)
    # Activations of 450 samples would be about 100 MB; 4 MB allow for the allocator.
    assert found["tables"] < 16e6
    assert found["grown"] <= found["tables"] + 4e6, found


def test_measured_tables_survive_saving(mesh, samples, tmp_path) -> None:
    tables = measure(mesh, samples, COMPARED)
    tables.save(tmp_path)
    back = Tables.load(tmp_path)
    for name, frame in tables.frames().items():
        pd.testing.assert_frame_equal(back.frames()[name], frame)
    assert back.provenance == json.loads(json.dumps(tables.provenance))
