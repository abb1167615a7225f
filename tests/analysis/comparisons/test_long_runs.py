"""Comparisons that are stopped, fail in part, or run out of room: nothing measured is lost."""

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch

from loopscope.analysis.comparisons import store as shards
from loopscope.analysis.comparisons import work as comparing
from loopscope.analysis.comparisons.work import compare
from loopscope.analysis.tables.frames import Tables
from loopscope.analysis.tables.registry import COMPARED as EVERY
from loopscope.errors import InputError
from loopscope.files import claimed
from loopscope.models.native.checkpoint import read_tokenizer, save
from loopscope.models.opening.targets import zoo_folder
from tests.conftest import make_model

MEASURES = ("update", "routing", "loss")
SMALL = {"samples": 7, "tokens": 16, "batch_size": 2, "measures": MEASURES}


@pytest.fixture(autouse=True)
def _small_shards(monkeypatch):
    monkeypatch.setattr(shards, "SAMPLES", 2)  # 4 shards of each checkpoint


@pytest.fixture(scope="module")
def tokenizer():
    return read_tokenizer(zoo_folder() / "base" / "tokenizer.json")


def made(tokenizer, variant="base", seed=0, layout="1+1R2+1"):
    model = make_model(variant, layout, seed=seed, d_vocab=tokenizer.get_vocab_size())
    model.tokenizer = tokenizer
    return model


@pytest.fixture
def run(tokenizer, tmp_path):
    """A folder of three steps."""
    for step in (1, 2, 3):
        save(made(tokenizer, seed=step), tmp_path / "run" / f"step-{step}")
    return tmp_path / "run"


@pytest.fixture
def loads(monkeypatch):
    """The names of the targets that are loaded."""
    seen, load = [], comparing.load

    def noted(target, **given):
        seen.append(Path(str(target)).name)
        return load(target, **given)

    monkeypatch.setattr(comparing, "load", noted)
    return seen


def same(one: Tables, two: Tables) -> None:
    assert one.frames().keys() == two.frames().keys()
    for name, frame in one.frames().items():
        if frame.empty and two.frames()[name].empty:
            continue  # without rows the dtype of categories is open
        pd.testing.assert_frame_equal(frame, two.frames()[name], obj=name, check_exact=True)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} - {".lock"}


def test_a_series_is_one_model_with_its_steps(run, tmp_path):
    found = compare([run / "step-3", run / "step-1", run / "step-2"], **SMALL)
    assert found.tables.models == ["run", "run@init"]
    rows = found.tables.loss[found.tables.loss["model"].eq("run")]
    assert list(rows["step"]) == [1] * 7 + [2] * 7 + [3] * 7
    assert list(rows["sample"]) == [*range(7)] * 3
    for step in (1, 3):
        alone = compare([run / f"step-{step}"], twins=False, **SMALL).tables.loss["value"]
        assert alone.tolist() == rows[rows["step"].eq(step)]["value"].tolist()
    twin = found.tables.loss[found.tables.loss["model"].eq("run@init")]
    assert twin["step"].isna().all() and len(twin) == 7
    told = found.tables.provenance["models"]["run"]
    assert told["steps"]["3"] == {"target": str(run / "step-3")}
    assert told["target"] == str(run / "step-1")
    assert found.tables.provenance["models"]["run@init"]["twin_of"] == ["run"]
    assert found.twins == {"run": "run@init"} and found.reference == "run"


def test_the_folder_of_results_does_not_change_them(run, tmp_path):
    given = {**SMALL, "measures": EVERY, "twins": False}
    there = compare([run, "base"], out=tmp_path / "out", **given)
    assert there.tables.frames().keys() == {*EVERY, "tokens"}
    same(there.tables, compare([run, "base"], **given).tables)
    same(there.tables, Tables.load(tmp_path / "out" / "tables"))
    assert names(tmp_path / "out") == {"tables", "provenance.json", "summary.json", "report.html"}
    told = json.loads((tmp_path / "out" / "provenance.json").read_text())
    assert told["models"]["run"]["steps"].keys() == {"1", "2", "3"}
    assert told["models"]["run"]["stamp"]["files"].keys() >= {"config.json", "model.safetensors"}
    assert told["models"]["base"]["target"] == "base"


def test_sharded_measures_are_those_of_one_part(run, monkeypatch):
    given = {**SMALL, "measures": EVERY, "twins": False}
    small = compare([run / "step-1"], **given)
    monkeypatch.setattr(shards, "SAMPLES", 64)
    same(small.tables, compare([run / "step-1"], **given).tables)


def interrupted(after: int):
    left = [after]

    def progress(*_):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt

    return progress


@pytest.mark.parametrize("after", [1, 5, 9, 12])
def test_the_same_call_goes_on_and_loads_only_what_is_missing(run, tmp_path, loads, after):
    # a batch is a shard here, so `after` shards are done: 4 of each step, 4 of the twin
    whole = compare([run], **SMALL).tables
    with pytest.raises(KeyboardInterrupt):
        compare([run], out=tmp_path / "out", progress=interrupted(after), **SMALL)
    assert not (tmp_path / "out" / "tables").exists()
    del loads[:]
    told = []
    found = compare([run], out=tmp_path / "out", progress=lambda *x: told.append(x), **SMALL)
    assert loads == ["step-1", "step-2", "step-3", "step-1@init"][after // 4 :]
    assert sum(n for _, n, _ in told) == 4 * 7  # what was done before counts
    same(whole, found.tables)
    assert ".shards" not in names(tmp_path / "out")


def test_other_options_or_weights_do_not_take_what_is_there(run, tmp_path, loads, tokenizer):
    def stopped(targets, **changes):
        del loads[:]
        given = {**SMALL, "twins": False, **changes}
        with pytest.raises(KeyboardInterrupt):  # when all but the last is done
            compare(targets, out=tmp_path / "out", progress=interrupted(11), **given)
        return list(loads)

    every = ["step-1", "step-2", "step-3"]
    assert stopped([run]) == every
    assert stopped([run]) == every[2:]
    others = {"seed": 1, "more_loops": 3, "center": True, "dtype": "float64", "loops": 3}
    for changes in ({name: value} for name, value in others.items()):
        assert stopped([run], **changes) == every, changes
    save(made(tokenizer, seed=9), run / "step-2", overwrite=True)
    assert stopped([run]) == every[1:]


def test_models_in_memory_and_factories_go_on_too(tokenizer, tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(
        "from loopscope.models.opening.loading import load\ndef make(): return load('mesh')\n"
    )
    targets = [made(tokenizer), f"{tmp_path / 'mine.py'}:make"]
    whole = compare(targets, **SMALL).tables
    with pytest.raises(KeyboardInterrupt):
        compare(targets, out=tmp_path / "out", progress=interrupted(7), **SMALL)
    told = []
    monkeypatch.setattr(comparing.Watch, "resumed", lambda self, c, n, _: told.append((c.label, n)))
    found = compare([made(tokenizer), targets[1]], out=tmp_path / "out", **SMALL)
    same(whole, found.tables)


def test_what_was_damaged_is_measured_again(run, tmp_path, loads):
    whole = compare([run], **SMALL).tables
    with pytest.raises(KeyboardInterrupt):
        compare([run], out=tmp_path / "out", progress=interrupted(13), **SMALL)
    files = sorted((tmp_path / "out" / ".shards").glob("*/*.shard"))
    assert len(files) == 13
    files[0].write_bytes(files[0].read_bytes()[:-30])
    files[-1].write_bytes(b"")
    found = compare([run], out=tmp_path / "out", **SMALL)
    same(whole, found.tables)


PROGRAM = """
import os, signal, sys
from loopscope.analysis.comparisons import store as shards
from loopscope.analysis.comparisons.work import compare
from loopscope.analysis.tables.registry import COMPARED as EVERY

shards.SAMPLES = 2
run, out, after = sys.argv[1], sys.argv[2], int(sys.argv[3])
write, done = shards.Store.write, [0]

def counted(self, name, content):
    if name.endswith(".shard"):
        done[0] += 1
        if done[0] == after:  # half of it is there
            (self.folder / name).with_name(".half.tmp").write_bytes(content[:99])
            os.kill(os.getpid(), signal.SIGKILL)
    write(self, name, content)

shards.Store.write = counted
measures = ("update", "routing", "loss")
compare([run], out=out, samples=7, tokens=16, batch_size=2, measures=measures)
"""


def test_killed_again_and_again_it_ends_with_the_same_tables(run, tmp_path):
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    whole = compare([run], out=tmp_path / "whole", **SMALL)
    for after in (6, 1, 7, 0):
        done = subprocess.run(
            [sys.executable, program, run, tmp_path / "out", str(after)],
            env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())},
            capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == (-signal.SIGKILL if after else 0), done.stderr[-3000:]
    same(whole.tables, Tables.load(tmp_path / "out" / "tables"))
    assert names(tmp_path / "out") == {"tables", "provenance.json"}


def test_a_full_disk_is_one_error_and_loses_nothing(run, tmp_path, monkeypatch, loads):
    whole = compare([run], **SMALL).tables
    fsync, left = os.fsync, [6]

    def full(file):
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(file)

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(InputError, match="No space left on device. What was measured before"):
            compare([run], out=tmp_path / "out", **SMALL)
    assert len(list((tmp_path / "out" / ".shards").glob("*/*.shard"))) == 4  # and 2 of samples
    del loads[:]
    same(whole, compare([run], out=tmp_path / "out", **SMALL).tables)
    assert loads == ["step-2", "step-3", "step-1@init"]


def test_results_that_cannot_be_written_are_kept_as_shards(run, tmp_path, loads):
    whole = compare([run], **SMALL).tables

    def full(found, out):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(InputError, match="No space left on device. What was measured is kept in"):
        compare([run], out=tmp_path / "out", write=full, **SMALL)
    del loads[:]
    same(whole, compare([run], out=tmp_path / "out", **SMALL).tables)
    assert not loads


def damage(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])


def test_a_broken_step_is_reported_and_the_others_are_measured(run, tmp_path):
    damage(run / "step-1")
    found = compare([run], out=tmp_path / "out", **SMALL)
    assert set(found.tables.loss["step"].dropna()) == {2, 3}
    [(target, reason)] = found.failed
    assert target == str(run / "step-1") and "cannot be read" in reason
    assert any(note.startswith(f"not measured: {target}") for note in found.notes)
    assert not found.incomplete and ".shards" not in names(tmp_path / "out")
    assert found.twins == {"run": "run@init"}  # it needs no weights


def test_a_checkpoint_that_fails_late_leaves_the_others(run, tmp_path, loads, tokenizer):
    broken = save(made(tokenizer, "mesh"), tmp_path / "broken")
    sound = (broken / "model.safetensors").read_bytes()
    damage(broken)
    found = compare([broken, run], out=tmp_path / "out", **SMALL)
    assert found.incomplete and found.reference == "run"
    assert [target for target, _ in found.failed] == [str(broken)]
    assert found.tables.models == ["run", "run@init"]
    del loads[:]
    (broken / "model.safetensors").write_bytes(sound)
    found = compare([broken, run], out=tmp_path / "out", **SMALL)
    assert loads == ["broken", "broken@init"]  # the others were kept
    assert found.reference == "broken" and not found.incomplete
    assert ".shards" not in names(tmp_path / "out")


def test_where_nothing_can_be_measured_the_reason_is_the_error(run, tmp_path):
    for step in (1, 2, 3):
        damage(run / f"step-{step}")
    with pytest.raises(InputError, match=r"run, step 1: .*cannot be read.*run, step 2: "):
        compare([run], out=tmp_path / "out", **SMALL)
    with pytest.raises(InputError, match="^.*step-1/model.safetensors cannot be read"):
        compare([run / "step-1"], out=tmp_path / "out", **SMALL)


def test_unfinished_work_of_another_command_is_left_and_told(run, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        compare([run], out=tmp_path / "out", progress=interrupted(5), **SMALL)
    found = compare([run], out=tmp_path / "out", **{**SMALL, "seed": 1})
    [note] = [note for note in found.notes if "another command" in note]
    assert "MB" in note
    assert len(list((tmp_path / "out" / ".shards").glob("*/*.shard"))) == 5


def test_two_commands_do_not_write_to_one_folder(run, tmp_path):
    with claimed(tmp_path / "out"), pytest.raises(InputError, match="another command is writing"):
        compare([run], out=tmp_path / "out", **SMALL)
    compare([run], out=tmp_path / "out", **SMALL)


def test_a_folder_that_stayed_empty_is_removed_again(tmp_path):
    with pytest.raises(InputError, match="unknown model"):
        compare(["nowhere"], out=tmp_path / "new" / "out", **SMALL)
    assert not (tmp_path / "new").exists()
    (tmp_path / "old").mkdir()
    with pytest.raises(InputError, match="unknown model"):
        compare(["nowhere"], out=tmp_path / "old", **SMALL)
    assert (tmp_path / "old").is_dir()


def test_more_loops_are_twice_the_models_own_unless_told(tokenizer):
    models = [made(tokenizer), made(tokenizer, "mesh", layout="1+1R3+1")]

    def depths(**more):
        given = {**SMALL, "measures": ["delta", "readout"], **more}
        found = compare(models, twins=False, **given)
        frame = found.tables.delta
        return [frame[frame["model"].eq(m)]["t"].max() + 1 for m in ("base", "mesh")], found.notes

    assert depths()[0] == [4, 3]  # mesh has routers of its own for each iteration
    assert any("routers of its own" in note for note in depths()[1])
    assert depths(more_loops=5)[0] == [5, 3]
    assert depths(more_loops=0)[0] == [2, 3]
    assert any("2 are not more than its own 2" in note for note in depths(more_loops=2)[1])
