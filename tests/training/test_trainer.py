"""The trainer: equal batches for every variant, what is learnt, written and refused."""

import csv
import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from loopscope.errors import InputError
from loopscope.models.native.checkpoint import load_checkpoint
from loopscope.models.native.loop_model import LoopModel
from loopscope.training import evaluate, train_model, trainer
from loopscope.training.logs import COLUMNS
from loopscope.training.trainer import make_optimizer, token_losses
from tests.training.conftest import T, make_config


def test_biases_and_norms_are_not_decayed():
    config = make_config("mesh")
    model = LoopModel(config.model)
    decay = {}
    for group in make_optimizer(model, config).param_groups:
        decay |= {id(parameter): group["weight_decay"] for parameter in group["params"]}
    got = {name: decay[id(parameter)] for name, parameter in model.named_parameters()}
    for name, value in got.items():
        assert value == (0.0 if name.endswith("bias") or ".ln" in f".{name}" else 0.01), name
    assert set(got.values()) == {0.0, 0.01}


def test_the_validation_loss_is_the_mean_over_all_targets(data):
    model = LoopModel(make_config("mesh").model)
    held = data.validation(5, T)
    want = np.mean([model(row[None], return_type="loss").item() for row in held])
    assert evaluate(model, held, batch_size=2) == pytest.approx(want, rel=1e-6)
    assert held.shape == (5, T + 1)
    assert torch.equal(held[0], torch.from_numpy(data.heldout[: T + 1]).long())


def test_bfloat16_autocast_gives_nearly_the_loss_of_float32(data):
    model = LoopModel(make_config("mesh").model)
    batch = data.batch(0, batch_size=3, seq_len=T, seed=0)
    exact, rough = token_losses(model, batch, "float32"), token_losses(model, batch, "bfloat16")
    assert rough.dtype == torch.float32
    assert 0 < (rough - exact).abs().max() < 0.05


def test_training_learns_and_the_folder_gives_the_same_model_back(data, tmp_path):
    reports = []
    config = make_config("mesh", steps=30, lr=1e-2)
    model = train_model(
        config, data, tmp_path / "m", progress=reports.append, provenance={"command": "c"}
    )
    assert reports[-1].loss < reports[0].loss - 1
    assert [report.step for report in reports] == list(range(1, 31))
    loaded = load_checkpoint(tmp_path / "m")
    held = data.validation(config.eval_windows, T)
    assert evaluate(loaded, held) == pytest.approx(reports[-1].val_loss, rel=1e-5)
    assert loaded.tokenizer.to_str() == data.tokenizer.to_str()
    assert not model.training
    told = json.loads((tmp_path / "m" / "provenance.json").read_text())
    assert told["training"]["model"]["variant"] == "mesh"
    assert told["tokens"] == 30 * 3 * T
    assert told["data"]["sha256"] == "ab" * 32
    assert told["val_loss"] == reports[-1].val_loss
    assert told["command"] == "c"


def test_the_log_has_a_row_per_interval_and_ends_with_a_validation_loss(data, tmp_path):
    train_model(make_config(steps=7), data, tmp_path / "m")
    with (tmp_path / "m" / "log.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == COLUMNS
    assert [int(row["step"]) for row in rows] == [2, 3, 4, 6, 7]
    assert [row["val_loss"] != "" for row in rows] == [False, True, False, True, True]
    assert [int(row["tokens"]) for row in rows] == [n * 3 * T for n in (2, 3, 4, 6, 7)]


def test_the_logged_loss_is_the_mean_since_the_row_before(data, tmp_path):
    config = make_config(steps=4, log_every=1, eval_every=9)
    single, pairs = [], []
    train_model(config, data, tmp_path / "a", progress=lambda r: single.append(r.loss))
    train_model(
        replace(config, log_every=2), data, tmp_path / "b", progress=lambda r: pairs.append(r.loss)
    )
    assert pairs[1] == pytest.approx((single[0] + single[1]) / 2, rel=1e-6)
    assert pairs[3] == pytest.approx((single[2] + single[3]) / 2, rel=1e-6)


def test_equal_seeds_give_equal_weights_and_others_do_not(data, tmp_path):
    states = [
        train_model(make_config(seed=seed), data, tmp_path / str(i)).state_dict()
        for i, seed in enumerate((1, 1, 2))
    ]
    same = [all(torch.equal(a, s[n]) for n, a in states[0].items()) for s in states[1:]]
    assert same == [True, False]


def test_a_loss_that_is_not_finite_stops_with_the_step_and_keeps_the_last_sound_weights(
    data, tmp_path, monkeypatch
):
    message = r"the (loss|norm of the gradient) became (nan|inf) at step [123]; no state had been"
    with pytest.raises(InputError, match=message):
        train_model(make_config(lr=1e30), data, tmp_path / "m")
    assert not list(tmp_path.glob("m/step-*"))
    calls = []

    def turning_nan(net, windows, dtype):
        calls.append(net.training)
        return token_losses(net, windows, dtype) * (torch.nan if sum(calls) == 4 else 1)

    monkeypatch.setattr(trainer, "token_losses", turning_nan)
    with pytest.raises(InputError, match=r"loss became nan at step 4; the last sound weights are "):
        train_model(make_config(steps=6), data, tmp_path / "n", save_seconds=0.0)
    monkeypatch.undo()
    train_model(make_config(steps=6), data, tmp_path / "o", keep_every=2)
    kept, wanted = (load_checkpoint(tmp_path / name / "step-000002") for name in "no")
    assert all(torch.equal(a, b) for a, b in both(kept, wanted))
    assert [path.name for path in (tmp_path / "n").glob("step-*")] == ["step-000002"]


def test_a_last_update_that_ruins_the_weights_is_no_finished_training(data, tmp_path):
    with pytest.raises(InputError, match="validation loss became (nan|inf) at step 1; no state"):
        train_model(make_config(steps=1, lr=1e30), data, tmp_path / "m", keep_every=1)
    names = {path.name for path in (tmp_path / "m").iterdir()}
    assert names == {"run.json", "run.lock", "log.csv", "step-000000"}


def both(one, other):
    return zip(one.state_dict().values(), other.state_dict().values(), strict=True)


def test_a_folder_of_something_else_is_refused_before_training(data, tmp_path):
    def never(report):
        raise AssertionError("trained")

    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="exists already and is no training of loopscope"):
        train_model(make_config(), data, tmp_path, progress=never)
    with pytest.raises(InputError, match=r"file exists already and is no training"):
        train_model(make_config(), data, tmp_path / "file", progress=never)
    with pytest.raises(InputError, match=r"cannot write to .*file"):
        train_model(make_config(), data, tmp_path / "file" / "m", progress=never)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_text_shorter_than_a_window_and_too_small_a_vocabulary_are_refused(data, tmp_path):
    with pytest.raises(InputError, match=r"the held-out text has \d+ tokens.* one window of 1001"):
        train_model(make_config(seq_len=1000), data, tmp_path / "m")
    small = replace(make_config().model, d_vocab=270)
    with pytest.raises(InputError, match="tokenizer has 280 ids but the model's d_vocab is 270"):
        train_model(replace(make_config(), model=small), data, tmp_path / "m")


def test_an_absent_device_is_refused(data, tmp_path):
    with pytest.raises(InputError, match="device"):
        train_model(make_config(device="nowhere"), data, tmp_path / "m")
