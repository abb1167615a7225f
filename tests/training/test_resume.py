"""Stopped at any moment, a training goes on and ends as it would have."""

import csv
import json
import os
import re
import resource
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from filelock import FileLock

from loopscope.errors import InputError
from loopscope.models.native import checkpoint
from loopscope.models.native.checkpoint import load_checkpoint
from loopscope.models.native.loop_model import LoopModel
from loopscope.text.corpus import train_tokenizer
from loopscope.training import train_model
from loopscope.training.state import State, drop_damaged, load_state, save_state
from loopscope.training.trainer import make_optimizer
from tests.training.conftest import make_config

RECIPE = make_config("mesh", steps=9, lr=1e-2, log_every=2, eval_every=4)


class Killed(BaseException):
    """Stands for a signal: nothing in the trainer catches it."""


def stop_at(step):
    def progress(report):
        if report.step == step:
            raise Killed

    return progress


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """The folder of the uninterrupted training."""
    folder = tmp_path_factory.mktemp("whole") / "m"
    train_model(RECIPE, data, folder, keep_every=3)
    return folder


def start(data, folder, step, **options):
    """Train up to a step and stop there, a state saved at every step."""
    with pytest.raises(Killed):
        options = {"keep_every": 3, "save_seconds": 0.0, **options}
        train_model(RECIPE, data, folder, progress=stop_at(step), **options)


def go_on(data, folder):
    told, steps = [], []
    model = train_model(
        RECIPE, data, folder, keep_every=3, save_seconds=0.0, tell=told.append,
        progress=lambda report: steps.append(report.step),
    )  # fmt: skip
    return model, told, steps


def rows_of(folder):
    with (folder / "log.csv").open(newline="") as file:
        return [{**row, "tokens_per_s": ""} for row in csv.DictReader(file)]


def assert_equal_trainings(folder, whole):
    names = {p.relative_to(folder) for p in folder.rglob("*")}
    assert names == {p.relative_to(whole) for p in whole.rglob("*")}
    for name in names:
        if name.name in ("model.safetensors", "config.json", "tokenizer.json"):
            assert (folder / name).read_bytes() == (whole / name).read_bytes(), name
    assert rows_of(folder) == rows_of(whole)


@pytest.mark.parametrize("step", [1, 2, 3, 5, 8, 9])
def test_a_training_stopped_at_any_step_ends_bit_equal(data, whole, tmp_path, step):
    folder = tmp_path / "m"
    start(data, folder, step)
    assert not (folder / "config.json").exists()  # no checkpoint yet
    torch.rand(step)  # other draws in between change nothing
    model, told, steps = go_on(data, folder)
    # saved between gradient and update: the state is one step behind, the first step has none
    begin = max(0, step - 1)
    assert steps == list(range(begin + 1, 10))
    assert told == ([f"m goes on from step {begin} of 9."] if begin else [])
    assert model.provenance["resumed"] == ([begin] if begin else [])
    assert_equal_trainings(folder, whole)


def test_a_training_stopped_twice_ends_bit_equal(data, whole, tmp_path):
    start(data, tmp_path / "m", 4)
    with pytest.raises(Killed):
        train_model(
            RECIPE, data, tmp_path / "m", keep_every=3, save_seconds=0.0, tell=lambda _: None,
            progress=stop_at(7),
        )  # fmt: skip
    model, _, _ = go_on(data, tmp_path / "m")
    assert model.provenance["resumed"] == [3, 6]
    assert_equal_trainings(tmp_path / "m", whole)


def test_a_process_killed_while_it_claims_the_folder_is_no_obstacle(data, whole, tmp_path):
    folder = tmp_path / "m"
    folder.mkdir()
    (folder / "run.lock").touch()
    (folder / ".run.json.77.tmp").write_text("{")
    go_on(data, folder)
    assert_equal_trainings(folder, whole)


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 0xFF
    path.write_bytes(content)


def flip_directory(path):
    content = bytearray(path.read_bytes())
    content[content.rindex(b"PK\x01\x02") + 10] ^= 0xFF  # the compression method of one record
    path.write_bytes(content)


def empty(path):
    path.write_bytes(b"")


@pytest.mark.parametrize("damage", [cut, flip, flip_directory, empty])
def test_a_damaged_state_falls_back_to_the_one_before(data, whole, tmp_path, damage):
    start(data, tmp_path / "m", 6)
    states = sorted((tmp_path / "m" / "resume").iterdir())
    assert [path.name for path in states] == ["state-000004.pt", "state-000005.pt"]
    damage(states[1])
    _, told, steps = go_on(data, tmp_path / "m")
    assert steps[0] == 5
    assert "state-000005.pt is damaged" in told[0]
    assert told[1] == "m goes on from step 4 of 9."
    assert_equal_trainings(tmp_path / "m", whole)


def test_a_state_that_cannot_be_read_for_now_is_left_alone(data, tmp_path, monkeypatch):
    start(data, tmp_path / "m", 6)
    before = sorted(path.name for path in (tmp_path / "m" / "resume").iterdir())

    def stale(*given, **options):
        raise OSError(116, "Stale file handle")

    monkeypatch.setattr("zipfile.ZipFile", stale)
    with pytest.raises(
        InputError, match=r"cannot be read \(Stale file handle\); nothing was changed"
    ):
        train_model(RECIPE, data, tmp_path / "m")
    assert sorted(path.name for path in (tmp_path / "m" / "resume").iterdir()) == before


def test_without_a_sound_state_the_training_begins_again(data, whole, tmp_path):
    start(data, tmp_path / "m", 6)
    for path in (tmp_path / "m" / "resume").iterdir():
        cut(path)
    _, told, steps = go_on(data, tmp_path / "m")
    assert steps[0] == 1
    assert len(told) == 2 and all("is damaged" in sentence for sentence in told)
    assert_equal_trainings(tmp_path / "m", whole)


def test_what_a_killed_process_left_half_written_is_removed(data, whole, tmp_path):
    folder = tmp_path / "m"
    start(data, folder, 6)
    (folder / "resume" / ".state-000006.pt.77.tmp").write_bytes(b"half")
    (folder / ".log.csv.77.tmp").write_bytes(b"half")
    (folder / ".checkpoint.abc").mkdir()
    (folder / ".step-000006.abc").mkdir()
    (folder / ".step-000006.abc" / "config.json").write_text("{}")
    with (folder / "log.csv").open("a") as log:
        log.write("6,288,5.0,,0.00")  # a line cut short
    drop_damaged(folder / "resume", pytest.fail)
    kept = sorted(path.name for path in (folder / "resume").iterdir())
    assert kept == ["state-000004.pt", "state-000005.pt"]
    go_on(data, folder)
    assert_equal_trainings(folder, whole)


def test_a_finished_training_is_loaded_and_not_trained_again(data, whole):
    model, told, steps = go_on(data, whole)
    assert (told, steps) == ([], [])
    wanted = load_checkpoint(whole).state_dict()
    assert all(torch.equal(value, wanted[n]) for n, value in model.state_dict().items())


def test_the_end_of_a_training_may_be_cut_short_too(data, whole, tmp_path, monkeypatch):
    folder = tmp_path / "m"

    def fail(*given, **options):
        raise Killed

    monkeypatch.setattr(checkpoint, "save_into", fail)
    start(data, folder, 10)
    monkeypatch.undo()
    go_on(data, folder)
    assert_equal_trainings(folder, whole)


def test_the_file_that_makes_a_folder_a_checkpoint_is_written_last(tmp_path, monkeypatch):
    replaced = []
    replace_file = os.replace

    def noted(source, target):
        replaced.append(Path(target).name)
        replace_file(source, target)

    monkeypatch.setattr(os, "replace", noted)
    checkpoint.save_into(LoopModel(RECIPE.model), tmp_path, provenance={})
    assert replaced[-1] == "config.json"
    assert sorted(replaced) == ["config.json", "model.safetensors", "provenance.json"]


def test_other_settings_or_another_text_are_refused_and_named(data, whole, tmp_path):
    start(data, tmp_path / "m", 3)
    for folder in (tmp_path / "m", whole):
        before = sorted(p.name for p in folder.iterdir())
        with pytest.raises(InputError, match=r"other settings \(lr 0\.01 there, 0\.02 given\)"):
            train_model(replace(RECIPE, lr=2e-2), data, folder)
        slots = replace(RECIPE, model=replace(RECIPE.model, slots=4))
        with pytest.raises(InputError, match="slots 5 there, 4 given"):
            train_model(slots, data, folder)
        other = replace(data, provenance={**data.provenance, "sha256": "cd" * 32})
        with pytest.raises(InputError, match="another text"):
            train_model(RECIPE, other, folder)
        tokenizer = replace(data, tokenizer=train_tokenizer(["other text"], 270))
        with pytest.raises(InputError, match="another tokenizer"):
            train_model(RECIPE, tokenizer, folder)
        assert sorted(p.name for p in folder.iterdir()) == before


def test_other_settings_may_take_over_what_has_saved_nothing_yet(data, whole, tmp_path):
    with pytest.raises(Killed):
        train_model(
            replace(RECIPE, lr=2e-2), data, tmp_path / "m", keep_every=3, progress=stop_at(2)
        )
    go_on(data, tmp_path / "m")
    assert_equal_trainings(tmp_path / "m", whole)


def test_settings_that_an_older_version_did_not_record_count_as_usual(data, tmp_path):
    start(data, tmp_path / "m", 3)
    record = tmp_path / "m" / "run.json"
    told = json.loads(record.read_text())
    del told["training"]["accumulate"]
    record.write_text(json.dumps(told))
    with pytest.raises(InputError, match=r"accumulate 1 there, 3 given"):
        train_model(replace(RECIPE, accumulate=3), data, tmp_path / "m")
    go_on(data, tmp_path / "m")


def test_two_trainings_in_one_folder_are_refused(data, tmp_path):
    start(data, tmp_path / "m", 3)
    refused = pytest.raises(InputError, match="another process is training in")
    with FileLock(tmp_path / "m" / "run.lock"), refused:
        train_model(RECIPE, data, tmp_path / "m")
    go_on(data, tmp_path / "m")


def make_state(step=3):
    model = LoopModel(RECIPE.model)
    optimizer = make_optimizer(model, RECIPE)
    model(torch.tensor([[1, 2, 3]]), return_type="loss").backward()
    optimizer.step()
    return State(
        step=step, model=model.state_dict(), optimizer=optimizer.state_dict(), rows=[],
        losses=[2.5], seconds=1.0, since=0.5, resumed=[],
    )  # fmt: skip


def test_a_state_holds_random_states_moments_and_pending_losses(tmp_path):
    torch.manual_seed(5)
    save_state(make_state(), tmp_path)
    wanted = torch.rand(4)
    state = load_state(tmp_path)
    assert (state.step, state.losses, state.since) == (3, [2.5], 0.5)
    model = LoopModel(RECIPE.model, seed=9)
    optimizer = make_optimizer(model, RECIPE)
    state.restore(model, optimizer)
    assert torch.equal(torch.rand(4), wanted)
    assert optimizer.state_dict()["state"][0]["exp_avg"].abs().max() > 0
    assert optimizer.state_dict()["state"][0]["step"] == 1


@pytest.fixture
def small_disk():
    """Files may not grow beyond 40 kB: the operating system's own refusal."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_is_told_and_leaves_the_state_before(tmp_path, small_disk):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    save_state(make_state(3), tmp_path)
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    with pytest.raises(InputError, match=r"at step 4 in .*: File too large.*give the same command"):
        save_state(make_state(4), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["state-000003.pt"]
    drop_damaged(tmp_path, pytest.fail)
    assert load_state(tmp_path).step == 3


def test_a_full_disk_leaves_no_half_written_checkpoint(tmp_path, small_disk):
    model = LoopModel(RECIPE.model)
    with pytest.raises(InputError, match=r"cannot write .*m: .*File too large"):
        checkpoint.save(model, tmp_path / "m")
    with pytest.raises(InputError, match="File too large"):
        checkpoint.save_into(model, tmp_path, provenance={})
    assert list(tmp_path.iterdir()) == []


def test_a_state_of_another_version_is_refused(tmp_path):
    path = save_state(make_state(), tmp_path)
    values = torch.load(path, weights_only=True)
    torch.save({**values, "version": 99}, path)
    with pytest.raises(InputError, match="has version 99, this loopscope reads 1"):
        load_state(tmp_path)
    torch.save({"version": 1, "step": 4}, path)
    with pytest.raises(InputError, match="cannot be read"):
        load_state(tmp_path)


def test_a_process_killed_by_signal_resumes_to_an_equal_end():
    script = Path(__file__).parents[2] / "benchmarks" / "kill_and_resume.py"
    done = subprocess.run(
        [sys.executable, script, "--kills", "1"], capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout + done.stderr
    # a run may have ended before it was to be killed: then there is another
    assert re.search(r"^1 kills, 0 of \d+ runs ended differently$", done.stdout, re.M)
