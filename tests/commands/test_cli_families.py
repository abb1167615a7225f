"""inspect and figures run on every family of looped models, and the tables are its loops."""

import numpy as np
import pandas as pd
import pytest

from tests.models.wrapped import real
from tests.program import called
from tests.standins import registry

CASES = {case.name: case for case in registry.CASES}
HF = {
    "albert": lambda: real.albert(layers=4, head=True),
    "albert2": lambda: real.albert(layers=4, groups=2, head=True),
    "hrm": lambda: real.hrm_text(layers=1),
    "zamba2": real.zamba2,
    "llama": real.llama,
    "gpt_neox": real.neox,
}
# family, target, layout, iterations of each loop, kinds of routing rows
FAMILIES = [
    ("huginn", "depth", "prelude core coda", {"core": 4}, set()),
    ("ouro", "gated", "core", {"core": 4}, {"gate"}),
    ("retrofitted", "aliased", "prelude core coda", {"core": 3}, set()),
    ("recursions", "token_routed", "prelude core coda", {"core": 3}, {"gate"}),
    ("relaxed", "relaxed", "core", {"core": 3}, set()),
    ("mesh", "mesh_port", "prelude core coda", {"core": 3}, {"write", "read", "alpha"}),
    ("albert", "albert", "prelude core", {"core": 4}, set()),
    ("albert, 2 groups", "albert2", "prelude core coda", {"A": 2, "B": 2}, set()),
    ("hrm-text", "hrm", "core", {"H": 2, "H.z_L": 2, "L": 6}, set()),
    ("zamba2", "zamba2", "prelude core", {"core": 3}, set()),
    ("llama", "llama", "prelude", {"core": 0}, set()),
    ("gpt-neox", "gpt_neox", "prelude", {"core": 0}, set()),
]


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """A folder with saved models, a file with factories of the others, and token ids."""
    folder = tmp_path_factory.mktemp("families")
    for name, make in HF.items():
        make().save_pretrained(folder / name)
    lines = ["from tests.standins import registry", "CASES = {c.name: c for c in registry.CASES}"]
    lines += [f"def {name}():\n    return CASES[{name!r}].make()" for name in CASES]
    (folder / "made.py").write_text("\n".join(lines) + "\n", "utf-8")
    np.save(folder / "ids.npy", np.random.default_rng(0).integers(0, 61, (5, 12)))
    return folder


@pytest.mark.parametrize(("family", "name", "blocks", "loops", "routing"), FAMILIES)
def test_inspect_and_figures_run_on_the_family(
    family, name, blocks, loops, routing, here, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(here)
    monkeypatch.setattr("loopscope.figures.drawing.DPI", 40)
    target = name if name in HF else f"made.py:{name}"

    def run(*words) -> str:
        code, out, err = called(monkeypatch, capsys, *words)
        assert code == 0, err
        return out

    assert run("inspect", target)
    run("figures", target, "--data", "ids.npy", "--tokens", 12, "--samples", 5, "--out", tmp_path)
    drawn = {path.stem for path in (tmp_path / "figures").glob("*.png")}
    assert {"fig3_update", "fig4_cka", "fig5_spectrum"} <= drawn
    one = [f"fig1_{name}"] if len(loops) == 1 else [f"fig1_{name}_{loop}" for loop in loops]
    assert {n for n in drawn if n.startswith("fig1")} == set(one if any(loops.values()) else [])
    assert (f"routers_{name}" in drawn) == bool(routing)
    update = pd.read_parquet(tmp_path / "tables" / "update.parquet")
    for loop, K in loops.items():
        found = update[update["loop"].eq(loop)]
        cores = found["block"].astype(str).str.startswith("core")
        assert found.loc[cores, "block"].nunique() == K
        assert len(found) == 5 * found["block"].nunique()
    first = update[update["loop"].eq(next(iter(loops)))]["block"].astype(str)
    assert set(first.str.rstrip("0123456789")) == set(blocks.split())
    found = pd.read_parquet(tmp_path / "tables" / "routing.parquet")
    assert set(found["kind"]) == routing
    rank = pd.read_parquet(tmp_path / "tables" / "rank.parquet")
    begins = rank["loop"].isin(["H.z_L", "L"]) & rank["state"].eq("h0")
    assert not rank.loc[begins, "value"].any()  # z_L begins with zeros
    rank = rank[~begins]
    assert np.isfinite(rank["value"]).all() and (rank["value"] >= 1).all()
