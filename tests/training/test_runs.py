"""Training logs as a table: what a folder of runs says, and what is refused."""

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from loopscope.analysis.tables import training_curves as curves
from loopscope.analysis.tables.frames import Tables, empty
from loopscope.analysis.tables.registry import RUNS, schema
from loopscope.errors import InputError, UnknownNameError
from loopscope.models.native.configuration import Layout
from loopscope.models.opening.targets import zoo_folder
from loopscope.training.logs import read_log
from loopscope.training.runs import read_runs
from tests.training_runs import HEADER, write_run

LOSSES = {100: 4.0, 200: 3.5, 250: 3.25}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_run(tmp_path / "mesh", "mesh", steps=250, losses=LOSSES, seed=3)


def change(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert text.count(old) == 1
    path.write_text(text.replace(old, new))


def change_training(run: Path, **values) -> None:
    told = json.loads((run / "provenance.json").read_text())
    told["training"] |= values
    (run / "provenance.json").write_text(json.dumps(told))


def rows_of(tables: Tables, model: str) -> pd.DataFrame:
    frame = tables.training
    assert frame is not None
    return frame[frame["model"].eq(model)].reset_index(drop=True)


def test_a_log_becomes_one_row_per_logged_step_with_what_was_trained(run: Path) -> None:
    tables = read_runs([run])
    frame = tables.training
    assert frame is not None
    assert {name: str(dtype) for name, dtype in frame.dtypes.items()} == RUNS["training"]
    assert frame["step"].tolist() == [*range(10, 250, 10), 250]
    assert frame["tokens"].tolist() == [step * 8 * 16 for step in frame["step"]]
    given = dict(zip(frame["step"], frame["val_loss"], strict=True))
    assert {s: v for s, v in given.items() if not math.isnan(v)} == LOSSES
    assert frame["train_loss"].iloc[1] == 3 + 40 / 29
    assert frame["tokens_per_s"].iloc[-1] == 1250.0
    same = frame.drop(columns=["step", "tokens", "train_loss", "val_loss", "lr", "tokens_per_s"])
    assert len(same.drop_duplicates()) == 1
    first = same.iloc[0].to_dict()
    del first["recipe"]
    # 4 layers of 12·D² + 13·D, the final norm 2·D, routers (K+1)·2·B·(D+1)
    size = 4 * (12 * 32**2 + 13 * 32) + 2 * 32 + 4 * 2 * 6 * 33
    assert first == {
        "model": "mesh", "variant": "mesh", "layout": "1+2R3+1", "slots": 6, "seed": 3, "K": 3,
        "d_model": 32, "params_total": size + 2 * 64 * 32, "params_non_embedding": size,
        "steps_planned": 250,
    }  # fmt: skip


def test_the_whole_zoo_is_read_when_nothing_is_named() -> None:
    tables = read_runs()
    assert set(tables.models) >= {"vanilla", "base", "residual", "anchor", "anchor_emb", "mesh"}
    base = rows_of(tables, "base")
    assert base["slots"].isna().all()
    shipped = {name: zoo_folder() / "base" / name for name in ("config.json", "provenance.json")}
    told = {name: json.loads(path.read_text()) for name, path in shipped.items()}
    D, V = told["config.json"]["d_model"], told["config.json"]["d_vocab"]
    layers = Layout.parse(told["config.json"]["layout"]).n_param_layers
    assert base["params_total"].iloc[0] == layers * (12 * D**2 + 13 * D) + 2 * D + 2 * V * D
    assert tables.provenance["models"]["base"]["training"] == told["provenance.json"]


def test_provenance_tells_where_each_run_came_from(run: Path) -> None:
    told = read_runs([run]).provenance["models"]["mesh"]
    assert told["folder"] == str(run)
    assert told["training"]["training"]["steps"] == 250
    assert told["training"]["data"]["sha256"] == "a" * 64
    assert told["config"]["slots"] == 6


def test_the_table_comes_back_as_it_was_saved(run: Path, tmp_path: Path) -> None:
    tables = read_runs([run, write_run(tmp_path / "base", "base", steps=250)])
    assert [p.name for p in tables.save(tmp_path / "tables")] == ["training.parquet"]
    back = Tables.load(tmp_path / "tables")
    assert back.training is not None and tables.training is not None
    pd.testing.assert_frame_equal(back.training, tables.training)
    assert back.provenance == tables.provenance
    assert back.models == ["mesh", "base"]
    assert {n: str(d) for n, d in empty("training").dtypes.items()} == schema("training")
    assert "<td>training</td><td>50</td>" in back._repr_html_()
    Tables(loss=empty("loss")).save(tmp_path / "tables")
    assert [p.name for p in (tmp_path / "tables").iterdir()] == ["loss.parquet"]


def test_a_folder_is_searched_and_the_inside_of_a_run_is_not(tmp_path: Path) -> None:
    for seed in (10, 2):
        run = write_run(tmp_path / "runs" / f"s{seed}" / "mesh", "mesh", seed=seed, steps=250)
        write_run(run / "step-000100", "mesh", seed=99)
    write_run(tmp_path / "runs" / "s2" / "base", "base", seed=2, steps=250, stop=120)
    write_run(tmp_path / "runs" / ".half.tmp" / "base", "base", seed=77)
    (tmp_path / "runs" / "others").mkdir()
    (tmp_path / "runs" / "others" / "log.csv").write_text("epoch,loss\n1,2\n")
    (tmp_path / "runs" / "others" / "provenance.json").write_text('{"model": "other"}')
    tables = read_runs([tmp_path / "runs", tmp_path / "runs" / "s2"])
    assert tables.models == ["base", "s2/mesh", "s10/mesh"]
    assert [rows_of(tables, m)["seed"].iloc[0] for m in tables.models] == [2, 2, 10]
    assert rows_of(tables, "base")["step"].max() == 120
    assert tables.provenance["notes"] == []


def test_recipes_are_equal_when_only_seed_or_machine_differ(tmp_path: Path) -> None:
    given = {
        "a": {}, "seed": {"seed": 1}, "machine": {"device": "cuda", "compile": True, "seed": 2},
        "log": {"log_every": 50, "eval_every": 50, "accumulate": 2, "seed": 3},
        "lr": {"lr": 1e-3}, "steps": {"steps": 400}, "text": {"text": "b" * 64},
        "slots": {"slots": 5}, "width": {"widths": {"d_model": 64}}, "dtype": {"dtype": "bfloat16"},
    }  # fmt: skip
    folders = [
        write_run(tmp_path / n, "mesh", **({"steps": 250} | more)) for n, more in given.items()
    ]
    frame = read_runs(folders).training
    assert frame is not None
    recipes = frame.groupby("model", observed=True)["recipe"].first().astype(str).to_dict()
    same = {name for name, recipe in recipes.items() if recipe == recipes["a"]}
    assert same == {"a", "seed", "machine", "log"}
    assert len(set(recipes.values())) == 7


def test_a_repeated_recipe_and_seed_is_left_out_and_said(run: Path, tmp_path: Path) -> None:
    early = write_run(tmp_path / "early", "mesh", steps=250, seed=3, stop=100)
    for order in ([early, run], [run, early]):
        tables = read_runs(order)
        assert tables.models == ["mesh"]
        assert rows_of(tables, "mesh")["step"].max() == 250
        assert tables.provenance["notes"] == [
            f"left out: {early} repeats recipe and seed 3 of {run}"
        ]


def test_a_run_without_a_row_is_left_out_and_said(run: Path, tmp_path: Path) -> None:
    for name, log in (("header", HEADER + "\n"), ("cut", HEADER[:9]), ("none", None)):
        early = write_run(tmp_path / name, "base", steps=250, stop=100)
        (early / "log.csv").unlink() if log is None else (early / "log.csv").write_text(log)
        tables = read_runs([run, early])
        assert tables.models == ["mesh"]
        assert tables.provenance["notes"] == [f"left out: {early} has no logged step yet"]
    with pytest.raises(InputError, match="no run has a logged step yet .*none.* wait for one"):
        read_runs([early])


def test_the_last_line_of_a_killed_run_is_dropped_where_it_is_cut(tmp_path: Path) -> None:
    killed = write_run(tmp_path / "killed", "base", steps=250, stop=200)
    text = (killed / "log.csv").read_text()
    for cut in (1, 3, 30, 50):
        (killed / "log.csv").write_text(text[:-cut])
        assert read_runs([killed]).training["step"].max() == 190


def test_a_finished_log_may_lack_its_last_line_break_or_have_those_of_windows(run: Path) -> None:
    text = (run / "log.csv").read_text()
    (run / "log.csv").write_text(text.removesuffix("\n"))
    assert read_runs([run]).training["val_loss"].iloc[-1] == 3.25
    (run / "log.csv").write_bytes(text.replace("\n", "\r\n").encode())
    assert read_runs([run]).training["val_loss"].iloc[-1] == 3.25


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("step,tokens,", "step,", r"log.csv, line 1 names no column tokens; copy the run's folder"),
        ("\n200,", "\n200,7,", r"log.csv, line 21 has 7 fields instead of 6"),
        ("\n200,25600", "\n200,x", r"line 21: tokens must be a positive integer, is 'x'"),
        ("\n200,", "\n-200,", r"line 21: step must be a positive integer, is '-200'"),
        (
            "\n200,25600",
            "\n200," + "9" * 400,
            r"tokens must be a positive integer, is '99",
        ),
        (",3.5,", ",nan,", r"line 21: val_loss must be a finite number, is 'nan'"),
        (",3.5,", ",3.5.1,", r"line 21: val_loss must be a finite number, is '3.5.1'"),
        (",1200.0\n", ",\n", r"line 21: tokens_per_s must be a finite number, is ''"),
        ("\n200,", "\n190,", r"line 21: step and tokens must grow, step 190 after 190"),
        ("\n250,", "\n260,", r"goes to step 260, but provenance.json plans 250"),
        ("\n200,", "\n\n200,", r"line 21 has 1 fields instead of 6"),
        ("\n200,", "\n\udcff200,", r"log.csv cannot be read: .*utf-8.*leave it out"),
    ],
)
def test_a_mangled_log_is_refused_with_its_line(run: Path, old, new, message) -> None:
    text = (run / "log.csv").read_text()
    assert text.count(old) == 1
    (run / "log.csv").write_text(text.replace(old, new), errors="surrogateescape")
    for target in (run, run.parent):
        with pytest.raises(InputError, match=message):
            read_runs([target])


def test_a_missing_log_file_has_no_rows(tmp_path: Path) -> None:
    assert read_log(tmp_path / "log.csv", whole=True).empty


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model": None}, r"provenance.json lacks training.model"),
        ({"model": {"variant": "mesh"}}, r"provenance.json, training.model lacks layout"),
        ({"steps": "250"}, r"training.steps must be an integer of at least 1, is '250'"),
        ({"seed": None}, r"training.seed must be an integer of at least 0, is None"),
    ],
)
def test_a_mangled_recipe_is_refused(run: Path, values, message) -> None:
    change_training(run, **values)
    with pytest.raises(InputError, match=message):
        read_runs([run])


def test_a_recipe_that_is_no_json_is_refused(run: Path) -> None:
    (run / "provenance.json").write_text("{")
    with pytest.raises(InputError, match=r"provenance.json cannot be read as JSON"):
        read_runs([run.parent])


def test_targets_that_are_no_runs_are_refused_with_what_they_lack(run: Path) -> None:
    top = run.parent

    def refused(target: Path | str, message: str) -> None:
        with pytest.raises(InputError, match=message):
            read_runs([target])

    (top / "empty").mkdir()
    refused(top / "empty", r"empty holds no training run; a run is a folder with log.csv and")
    refused(run / "log.csv", r"log.csv is a file; give the run's folder instead")
    refused("mesh@init", r"mesh@init is untrained, so it has no log; leave @init out")
    with pytest.raises(UnknownNameError, match=r"unknown run 'mseh'; did you mean mesh"):
        read_runs(["mseh"])
    shutil.copytree(run, top / "bare" / "x")
    (top / "bare" / "x" / "log.csv").unlink()
    refused(top / "bare" / "x", r"\(it is a checkpoint without log.csv\); a run is")
    refused(top / "bare", r"bare holds no training run;")
    shutil.copytree(run, top / "log")
    (top / "log" / "provenance.json").write_text("{}")
    refused(top / "log", r"\(its provenance.json has no object 'training'\)")
    (top / "log" / "provenance.json").unlink()
    refused(top / "log", r"\(it has log.csv, but no provenance.json or run.json\)")


def test_reading_needs_no_matplotlib_and_importing_no_torch() -> None:
    code = (
        "import sys, loopscope.training.runs as runs, loopscope.analysis.tables.training_curves\n"
        "assert not {'torch', 'matplotlib'} & sys.modules.keys()\n"
        "runs.read_runs(['mesh']); assert 'matplotlib' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def seeds(tmp_path: Path) -> pd.DataFrame:
    """Three finished seeds of base, one of them with other validation steps; one unfinished."""
    losses = [
        {100: 5.0, 200: 4.0, 250: 3.0},
        {100: 5.5, 200: 4.3, 250: 3.6},
        {50: 7.0, 200: 4.1, 250: 3.3},
    ]
    for seed, told in enumerate(losses):
        write_run(tmp_path / f"s{seed}", "base", steps=250, seed=seed, losses=told)
    write_run(tmp_path / "s3", "base", steps=250, seed=3, stop=200, losses={100: 9.0, 200: 8.0})
    write_run(tmp_path / "m", "mesh", steps=250, losses={100: 2.0, 250: 1.0})
    write_run(tmp_path / "late", "mesh", steps=250, seed=1, stop=90)
    frame = read_runs([tmp_path]).training
    assert frame is not None
    return frame


def test_losses_are_averaged_over_finished_seeds_at_common_steps(tmp_path: Path) -> None:
    frame = seeds(tmp_path)
    stats = curves.validation(frame)
    base = stats[stats["n"].eq(3)]
    assert base["step"].tolist() == [200, 250]
    assert base["tokens"].tolist() == [200 * 128, 250 * 128]
    assert base["mean"].tolist() == pytest.approx([12.4 / 3, 3.3])
    assert base["low"].tolist() == [4.0, 3.0] and base["high"].tolist() == [4.3, 3.6]
    mesh = stats[stats["n"].eq(1)]
    assert mesh[["mean", "low", "high"]].to_numpy().tolist() == [[2.0] * 3, [1.0] * 3]
    assert len(stats) == 4


def test_unfinished_runs_stand_alone(tmp_path: Path) -> None:
    frame = seeds(tmp_path)
    alone = curves.unfinished(frame)
    assert alone[["model", "step", "val_loss"]].to_numpy().tolist() == [
        ["s3", 100, 9.0],
        ["s3", 200, 8.0],
    ]
    told = curves.progress(frame).set_index("model")
    assert told["finished"].to_dict() == {
        "late": False, "m": True, "s0": True, "s1": True, "s2": True, "s3": False
    }  # fmt: skip
    assert not told["validated"]["late"] and told["validated"]["s3"]
    assert told["step"]["late"] == 90


def test_a_run_whose_last_validation_is_missing_is_unfinished(run: Path) -> None:
    change(run / "log.csv", ",3.25,", ",,")
    assert not curves.progress(read_runs([run]).training)["finished"].any()


def test_perplexity_is_the_exponential_of_the_final_loss(tmp_path: Path) -> None:
    ends = curves.final_perplexity(seeds(tmp_path)).sort_values("n")
    assert ends["n"].tolist() == [1, 3]
    expected = [[math.e] * 3, [sum(map(math.exp, (3.0, 3.6, 3.3))) / 3, math.exp(3), math.exp(3.6)]]
    assert ends[["mean", "low", "high"]].to_numpy().tolist() == [
        pytest.approx(row, rel=1e-12) for row in expected
    ]
    plain = 4 * (12 * 32**2 + 13 * 32) + 2 * 32
    assert ends["params"].tolist() == [plain + 4 * 2 * 6 * 33, plain]


def test_statistics_follow_the_rows_not_the_categories(tmp_path: Path) -> None:
    frame = seeds(tmp_path)
    part = frame[frame["model"].isin(["s0", "m"])]
    assert set(curves.progress(part)["model"]) == {"m", "s0"}
    assert set(curves.validation(part)["n"]) == {1}
    assert curves.unfinished(part).empty
