"""`loopscope train` with a monitor: the same training, and a file that a resumed one continues."""

import csv
import json
import math
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

import loopscope as ls
from loopscope.analysis.collapse import SIGNS, per_sample
from loopscope.cli import main
from loopscope.errors import InputError
from loopscope.models.native.checkpoint import load_checkpoint
from loopscope.training import train_model
from loopscope.training.monitor import MEASURES
from loopscope.training.runs import read_run
from loopscope.training.trainer import PROBE
from tests.training.conftest import T, make_config

RECIPE = make_config("mesh", steps=9, lr=1e-2, log_every=2, eval_every=4)
NAMES = [sign.name for sign in SIGNS]


class Killed(BaseException):
    """Stands for a signal: nothing in the trainer catches it."""


def rows_of(folder, name="monitor.csv"):
    with (folder / name).open(newline="") as file:
        return list(csv.DictReader(file))


def weights(folder):
    return (folder / "model.safetensors").read_bytes()


def start(data, folder, step, recipe=RECIPE, **options):
    """Train up to a step and stop there, a state saved at every step."""

    def progress(report):
        if report.step == step:
            raise Killed

    with pytest.raises(Killed):
        options = {"save_seconds": 0.0, "tell": lambda _: None, **options}
        train_model(recipe, data, folder, progress=progress, **options)


def go_on(data, folder, **options):
    return train_model(RECIPE, data, folder, save_seconds=0.0, tell=lambda _: None, **options)


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """The folder of an uninterrupted training, measured every two steps, checkpoints beside."""
    folder = tmp_path_factory.mktemp("whole") / "m"
    train_model(RECIPE, data, folder, monitor_every=2, keep_every=1)
    return folder


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_weights_and_the_log_are_those_without_a_monitor(data, tmp_path, dtype):
    recipe = replace(RECIPE, dtype=dtype)
    train_model(recipe, data, tmp_path / "plain")
    train_model(recipe, data, tmp_path / "watched", monitor_every=1)
    assert weights(tmp_path / "plain") == weights(tmp_path / "watched")
    logs = [rows_of(tmp_path / name, "log.csv") for name in ("plain", "watched")]
    for row in (*logs[0], *logs[1]):
        del row["tokens_per_s"]
    assert logs[0] == logs[1]
    assert [int(row["step"]) for row in rows_of(tmp_path / "watched")] == list(range(10))
    names = [{path.name for path in (tmp_path / n).iterdir()} for n in ("plain", "watched")]
    assert names[1] - names[0] == {"monitor.csv"}


def test_the_numbers_are_those_of_the_step_checkpoints(data, whole):
    rows = rows_of(whole)
    assert [int(row["step"]) for row in rows] == [0, 2, 4, 6, 8, 9]
    probe = data.validation(PROBE, T)[:, :-1]
    for row in rows:
        model = load_checkpoint(whole / f"step-{int(row['step']):06d}")
        values = per_sample(ls.measure(model, probe, MEASURES))[NAMES].mean()
        for name in NAMES:
            assert row[name] == ("" if math.isnan(values[name]) else repr(float(values[name])))
    told = json.loads((whole / "provenance.json").read_text())["monitor"]
    assert told["every"] == 2
    assert told["samples"]["samples"] == len(probe) and told["samples"]["tokens"] == T


@pytest.mark.parametrize("step", [1, 4, 5, 9])
def test_a_training_stopped_at_any_step_ends_with_the_same_rows(data, whole, tmp_path, step):
    folder = tmp_path / "m"
    start(data, folder, step, monitor_every=2)
    with (folder / "monitor.csv").open("a") as file:
        file.write("8,4.2,0.")  # a line cut short, of a step that comes again
    go_on(data, folder, monitor_every=2)
    assert (folder / "monitor.csv").read_bytes() == (whole / "monitor.csv").read_bytes()
    assert weights(folder) == weights(whole)


def test_rows_of_steps_that_are_taken_again_go_at_once(data, tmp_path):
    start(data, tmp_path / "m", 5, monitor_every=1)
    start(data, tmp_path / "m", 5, monitor_every=100)  # from the state of step 4
    assert [int(row["step"]) for row in rows_of(tmp_path / "m")] == [0, 1, 2, 3, 4]


def test_how_often_is_no_setting_of_the_training(data, whole, tmp_path):
    folder = tmp_path / "m"
    start(data, folder, 5)
    assert not (folder / "monitor.csv").exists()
    assert "monitor" not in (folder / "run.json").read_text()
    start(data, folder, 7, monitor_every=3)  # from the state of step 4
    go_on(data, folder, monitor_every=4)  # from 6
    assert [int(row["step"]) for row in rows_of(folder)] == [6, 8, 9]
    assert weights(folder) == weights(whole)
    go_on(data, folder, monitor_every=1)  # finished: nothing is trained or measured
    assert len(rows_of(folder)) == 3
    assert read_run(folder).recipe == read_run(whole).recipe


def test_other_settings_that_take_over_leave_no_rows_of_the_old(data, tmp_path):
    folder, other = tmp_path / "m", replace(RECIPE, lr=2e-2)
    with pytest.raises(Killed):
        train_model(RECIPE, data, folder, progress=stop, monitor_every=1)
    assert [int(row["step"]) for row in rows_of(folder)] == [0, 1]
    train_model(other, data, folder)
    assert not (folder / "monitor.csv").exists()


def stop(report):
    raise Killed


def test_without_a_loop_there_is_nothing_to_measure(data, tmp_path):
    train_model(make_config("vanilla", layout="3"), data, tmp_path / "m", monitor_every=1)
    assert not (tmp_path / "m" / "monitor.csv").exists()
    with pytest.raises(InputError, match=r"monitor_every must be 0 \(never\) or more, given -1"):
        train_model(RECIPE, data, tmp_path / "n", monitor_every=-1)


SMALL = [
    "--layout", "1+1R2+1", "--d-model", "16", "--heads", "2", "--vocab", "280", "--seq-len", "8",
    "--tokens", "128", "--batch-size", "4", "--device", "cpu",
]  # fmt: skip


def test_the_command_measures_and_two_processes_do_as_one(tmp_path, monkeypatch):
    text = tmp_path / "a.txt"
    text.write_text("\n".join(f"x{i} = {i * i}" for i in range(900)))
    words = ["train", "--data", str(text), "--variants", "base", *SMALL, "--out"]
    two = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_machines"]
    two += ["1", "--num_processes", "2", "--mixed_precision", "no", "--dynamo_backend", "no"]
    folders = {name: tmp_path / name for name in ("usual", "often", "never", "two")}
    for name, more in {"usual": [], "often": ["2"], "never": ["0"]}.items():
        more = ["--monitor-every", *more] if more else []
        monkeypatch.setattr(sys, "argv", ["loopscope", *words, str(folders[name]), *more])
        with pytest.raises(SystemExit, match="0"):
            main()
    done = subprocess.run(
        [*two, "-m", "loopscope.cli", *words, str(folders["two"]), "--monitor-every", "2"],
        env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    steps = {
        name: [int(row["step"]) for row in rows_of(folder / "base")]
        for name, folder in folders.items()
        if name != "never"
    }
    assert steps == {"usual": [0, 4], "often": [0, 2, 4], "two": [0, 2, 4]}
    assert not (folders["never"] / "base" / "monitor.csv").exists()
    often, both = (rows_of(folders[name] / "base") for name in ("often", "two"))
    for one, other in zip(often, both, strict=True):
        assert one["n_flagged"] == other["n_flagged"] == "0.0"
        for name in ("loss", "skew", "cka_debiased", "erank_K"):
            assert float(one[name]) == pytest.approx(float(other[name]), abs=1e-4)
    command = json.loads((folders["often"] / "base" / "provenance.json").read_text())["command"]
    assert "--monitor-every 2" in command
