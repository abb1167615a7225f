"""The callback in transformers' own Trainer: what reaches its loggers, and what it leaves alone."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

from loopscope.training import LoopCallback, Monitor
from tests.training import looped

PROBE = looped.windows(2, seed=99)
DATA = [{"input_ids": row, "labels": row} for row in looped.windows(64)]


class Logger(TrainerCallback):
    """Reports as TensorBoard's does: what `on_log` is given, with the step."""

    def __init__(self):
        self.seen = []

    def on_log(self, args, state, control, logs, **kwargs):
        self.seen.append((state.global_step, dict(logs)))


class Stop(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop |= state.global_step == self.step


def make_trainer(folder, monitor=None, *, before=(), after=(), **settings):
    """A Trainer on a tiny looped model with dropout; the callback between `before` and `after`."""
    options = {"max_steps": 6, "logging_steps": 2, "save_steps": 3, "report_to": "none"}
    args = TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=4, use_cpu=True, disable_tqdm=True,
        learning_rate=1e-2, seed=5, dataloader_pin_memory=False, **{**options, **settings},
    )  # fmt: skip
    trainer = Trainer(looped.make(), args, train_dataset=DATA, callbacks=list(before))
    if monitor is not None:
        trainer.add_callback(LoopCallback(trainer, monitor))
    for one in after:
        trainer.add_callback(one)
    return trainer


def history(trainer):
    """The rows of the monitor and the others, as the Trainer keeps them."""
    ours = [row for row in trainer.state.log_history if "loop/skew" in row]
    return ours, [row for row in trainer.state.log_history if "loop/skew" not in row]


def timeless(rows):
    return [
        {k: v for k, v in row.items() if "runtime" not in k and "second" not in k} for row in rows
    ]


def test_the_measures_reach_every_logger_wherever_it_stands(tmp_path):
    monitor, first, last = Monitor(PROBE, every=4), Logger(), Logger()
    trainer = make_trainer(tmp_path, monitor, before=[first], after=[last])
    trainer.train()
    ours, _ = history(trainer)
    assert [row["step"] for row in ours] == [0, 4, 6]  # the last one is always measured
    assert [row["step"] for row in monitor.rows] == [0, 4, 6]
    for row, measured in zip(ours, monitor.rows, strict=True):
        assert row["loop/skew"] == measured["skew"]
        assert row["loop/cka_debiased"] == measured["cka_debiased"]
        assert "loop/more_loss" not in row  # NaN: it was not measured
    for logger in (first, last):
        told = [(step, row) for step, row in logger.seen if "loop/skew" in row]
        assert [step for step, _ in told] == [0, 4, 6]
        assert [row["loop/skew"] for _, row in told] == [row["loop/skew"] for row in ours]
        assert [step for step, row in logger.seen if "loss" in row] == [2, 4, 6]
    assert len({row["loop/loss"] for row in ours}) == 3
    state = json.loads((tmp_path / "checkpoint-6" / "trainer_state.json").read_text())
    assert [row for row in state["log_history"] if "loop/skew" in row] == ours


def both(folder, monitor, **settings):
    """Two trainings, without and with a monitor; a Trainer seeds dropout when it is made."""
    trainers = []
    for name, one in (("a", None), ("b", monitor)):
        trainers.append(make_trainer(folder / name, one, **settings))
        trainers[-1].train()
    return trainers


def test_the_trainer_s_own_log_and_weights_are_those_without_it(tmp_path):
    plain, watched = both(tmp_path, Monitor(PROBE, every=1))
    assert torch.equal(looped.weights(plain.model), looped.weights(watched.model))
    assert timeless(history(plain)[1]) == timeless(history(watched)[1])
    assert [row["step"] for row in history(watched)[0]] == list(range(7))


def test_with_autocast_and_accumulation_too(tmp_path):
    monitor = Monitor(PROBE, every=2)
    plain, watched = both(tmp_path, monitor, bf16=True, gradient_accumulation_steps=2)
    assert torch.equal(looped.weights(plain.model), looped.weights(watched.model))
    assert [row["step"] for row in monitor.rows] == [0, 2, 4, 6]
    exact = Monitor(PROBE).measure(looped.make().eval(), 0)
    assert 0 < abs(monitor.rows[0]["loss"] - exact["loss"]) < 0.05  # as it runs: in bfloat16


def test_a_training_that_is_stopped_early_is_measured_where_it_ends(tmp_path):
    trainer = make_trainer(tmp_path, Monitor(PROBE, every=4), before=[Stop(5)])
    trainer.train()
    assert [row["step"] for row in history(trainer)[0]] == [0, 4, 5]


def test_a_resumed_training_goes_on_without_rows_twice(tmp_path):
    out = tmp_path / "monitor.csv"
    whole = make_trainer(tmp_path / "whole", Monitor(PROBE, every=2, out=tmp_path / "whole.csv"))
    whole.train()
    first = make_trainer(tmp_path / "run", Monitor(PROBE, every=2, out=out), before=[Stop(4)])
    first.train()  # its last state is of step 3; 4 is in the file, and taken again
    assert [int(line.split(",")[0]) for line in out.read_text().split()[1:]] == [0, 2, 4]
    second = make_trainer(tmp_path / "run", Monitor(PROBE, every=2, out=out))
    second.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3"))
    assert out.read_bytes() == (tmp_path / "whole.csv").read_bytes()
    assert timeless(history(second)[0]) == timeless(history(whole)[0])
    assert torch.equal(looped.weights(second.model), looped.weights(whole.model))


def test_a_new_training_with_the_same_monitor_begins_anew(tmp_path):
    monitor = Monitor(PROBE, every=4, out=tmp_path / "monitor.csv")
    monitor.measure(looped.make(seed=9), 0)  # of a training that came no further
    old = monitor.rows[0]["loss"]
    for name in "ab":
        make_trainer(tmp_path / name, monitor, max_steps=2).train()
        assert [row["step"] for row in monitor.rows] == [0, 2]
        assert monitor.rows[0]["loss"] != old
    assert (tmp_path / "monitor.csv").read_text().count("\n") == 3


@pytest.mark.skipif(importlib.util.find_spec("tensorboard") is None, reason="needs tensorboard")
def test_tensorboard_shows_the_measures(tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    monitor = Monitor(PROBE, every=2)
    make_trainer(tmp_path, monitor, report_to="tensorboard").train()
    events = EventAccumulator(str(tmp_path / "board")).Reload()
    shown = [(event.step, event.value) for event in events.Scalars("train/loop/skew")]
    assert shown == [(row["step"], pytest.approx(row["skew"])) for row in monitor.rows]
    assert len(events.Scalars("train/loss")) == 3


PROGRAM = """
import json, sys
from tests.training.test_callback import PROBE, Logger, Monitor, looped, make_trainer

folder = sys.argv[1]
monitor, logger = Monitor(PROBE, every=2, out=f"{folder}/monitor.csv"), Logger()
trainer = make_trainer(f"{folder}/run", monitor, after=[logger])
trainer.train()
told = {
    "processes": trainer.args.world_size,
    "logged": [step for step, row in logger.seen if "loop/skew" in row],
    "measured": [row["step"] for row in monitor.rows],
    "weights": looped.weights(trainer.model).sum().item(),
}
with open(f"{folder}/{trainer.args.process_index}.json", "w") as file:
    json.dump(told, file)
"""


def test_of_two_processes_the_first_alone_measures_and_logs(tmp_path):
    (tmp_path / "program.py").write_text(PROGRAM)
    done = subprocess.run(
        [
            sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu",
            "--num_machines", "1", "--num_processes", "2", "--mixed_precision", "no",
            "--dynamo_backend", "no", str(tmp_path / "program.py"), str(tmp_path),
        ],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert first["processes"] == second["processes"] == 2
    assert first["logged"] == first["measured"] == [0, 2, 4, 6]
    assert second["logged"] == second["measured"] == []
    assert first["weights"] == second["weights"]
    assert (tmp_path / "monitor.csv").read_text().count("\n") == 5
