"""What is compared: series of steps, labels, untrained twins."""

import shutil
from pathlib import Path

import pytest

from loopscope.analysis.comparisons.plan import look_up, missing_steps, with_twins
from loopscope.errors import InputError
from loopscope.models.native.checkpoint import save
from tests.conftest import make_model


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save(make_model("base", "1+1R2+1"), tmp_path_factory.mktemp("one") / "base")


@pytest.fixture
def folder(checkpoint, tmp_path):
    """Makes copies of a checkpoint: `folder("run", "step-1")`."""

    def make(*parts: str) -> Path:
        return Path(shutil.copytree(checkpoint, tmp_path.joinpath(*parts)))

    return make


def seen(plan):
    return [(one.model, one.step) for one in plan.checkpoints]


def test_a_pattern_is_a_series_in_natural_order(folder, tmp_path):
    for step in (100, 20, 3):
        folder("run", f"step-{step}")
    (tmp_path / "run" / "step-7").write_text("a file, no folder")
    plan = look_up([str(tmp_path / "run" / "step-*")])
    assert seen(plan) == [("run", 3), ("run", 20), ("run", 100)]
    assert [Path(one.target).name for one in plan.checkpoints] == ["step-3", "step-20", "step-100"]
    assert not plan.failed and not plan.missing


@pytest.mark.parametrize(
    "names",
    [
        ("step-000010", "step-000020"),
        ("checkpoint-10", "checkpoint-20"),
        ("ckpt_10", "ckpt_20"),
        ("iter_0000010", "iter_0000020"),
        ("epoch10", "Epoch20"),
    ],
)
def test_a_folder_of_steps_is_a_series_however_they_are_called(folder, tmp_path, names):
    for name in names:
        folder("run", name)
    (tmp_path / "run" / "logs").mkdir()
    assert seen(look_up([tmp_path / "run"])) == [("run", 10), ("run", 20)]


def test_steps_named_one_by_one_are_a_series_but_one_alone_is_not(folder, tmp_path):
    steps = [str(folder("run", f"step-{step}")) for step in (5, 40)]
    other = str(folder("other", "step-5"))
    assert seen(look_up(steps[::-1])) == [("run", 5), ("run", 40)]
    assert seen(look_up(steps[:1])) == [("step-5", None)]
    assert seen(look_up([*steps, other])) == [("run", 5), ("run", 40), ("step-5", None)]
    plan = look_up(steps, series=False)
    assert seen(plan) == [("step-5", None), ("step-40", None)]


def test_several_series_stand_beside_single_checkpoints(folder, tmp_path):
    for run in ("a/run", "b/run"):
        for step in (1, 2):
            folder(run, f"step-{step}")
    alone = folder("alone")
    plan = look_up([str(tmp_path / "a" / "run" / "step-*"), str(alone), str(tmp_path / "b/run")])
    first, second = str(tmp_path / "a" / "run"), str(tmp_path / "b" / "run")
    wanted = [(first, 1), (first, 2), ("alone", None), (second, 1), (second, 2)]
    assert seen(plan) == wanted
    assert seen(look_up([str(tmp_path / "*" / "run")])) == [wanted[i] for i in (0, 1, 3, 4)]


def test_a_run_beside_its_own_steps_has_another_name(folder, tmp_path):
    run = folder("run")
    for step in (1, 2):
        folder("run", f"step-{step}")
    plan = look_up([str(run), str(run / "step-*")])
    assert seen(plan) == [(str(run), None), (f"{run}/step-*", 1), (f"{run}/step-*", 2)]


def test_a_pattern_may_match_checkpoints_that_are_no_steps(folder, tmp_path):
    for name in ("b10", "b9"):
        folder("runs", name)
    (tmp_path / "runs" / "notes").mkdir()
    assert seen(look_up([str(tmp_path / "runs" / "*")])) == [("b9", None), ("b10", None)]


def test_broken_and_missing_steps_of_a_series_are_reported_and_skipped(folder, tmp_path):
    for step in (10, 20, 40, 50, 60):
        folder("run", f"step-{step}")
    (tmp_path / "run" / "step-20" / "config.json").unlink()
    (tmp_path / "run" / "step-50" / "config.json").write_text("{")
    plan = look_up([str(tmp_path / "run" / "step-*")])
    assert seen(plan) == [("run", 10), ("run", 40), ("run", 60)]
    assert [Path(target).name for target, _ in plan.failed] == ["step-20", "step-50"]
    reasons = [reason for _, reason in plan.failed]
    assert "without config.json" in reasons[0] and "cannot be read as JSON" in reasons[1]
    assert plan.missing == {"run": [30]}  # what is broken is there, what is not is missing


@pytest.mark.parametrize(
    ("steps", "missing"),
    [
        ([25, 50, 100, 125], [75]),
        ([0, 10, 20, 50, 60, 70], [30, 40]),
        ([25, 50, 75, 80], []),  # the end of a training need not be regular
        ([1, 2, 4, 8, 16, 32], []),
        ([1, 2, 3, 4, 8, 16, 32], []),  # half of the distances are not the usual one
        ([0, 1, 2, 4, 512, 1000, 2000, 3000, 5000, 6000, 7000, 8000, 9000, 10000], [4000]),
        ([100, 500], []),
        ([7], []),
    ],
)
def test_a_step_is_missing_where_the_others_are_regular(steps, missing):
    assert missing_steps(steps) == missing
    assert missing_steps(steps[::-1]) == missing


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (["{here}/nothing-*"], "nothing matches"),
        (["{here}/run/step-1/*"], "none of the 3 that match is one"),
        (["{here}/run/step-1", "{here}/run/step-1"], "given twice"),
        (["{here}/run", "{here}/run/step-2"], "given twice"),
        (["{here}/alone", "{here}/alone"], "given twice"),
        (["{here}/empty"], "folder without config.json"),
        (["{here}/run/step-3"], "unknown model"),
        (["{here}/broken/step-*"], "none of the steps can be read"),
        ([], "no models given"),
    ],
)
def test_what_cannot_be_meant_is_refused(folder, tmp_path, targets, message):
    for parts in (("run", "step-1"), ("run", "step-2"), ("alone",)):
        folder(*parts)
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken" / "step-1").mkdir(parents=True)
    with pytest.raises(InputError, match=message):
        look_up([target.format(here=tmp_path) for target in targets])


def test_a_folder_whose_name_looks_like_a_pattern_is_a_folder(folder, tmp_path):
    made = folder("run[1]")
    assert seen(look_up([str(made)])) == [("run[1]", None)]


def test_each_configuration_has_one_untrained_twin(folder, tmp_path):
    for step in (1, 2):
        folder("run", f"step-{step}")
    same, other = folder("same"), save(make_model("mesh", "1+1R2+1"), tmp_path / "other")
    plan = with_twins(look_up([tmp_path / "run", same, other]), seed=0)
    assert seen(plan)[4:] == [("run@init", None), ("other@init", None)]
    assert plan.twins == {"run": "run@init", "same": "run@init", "other": "other@init"}
    assert [one.twin_of for one in plan.checkpoints[4:]] == [("run", "same"), ("other",)]
    assert plan.checkpoints[4].target == f"{tmp_path / 'run' / 'step-1'}@init"


def test_a_twin_that_was_named_is_not_measured_twice(folder):
    one, two = folder("one"), folder("two")
    plan = with_twins(look_up([one, f"{two}@init"]), seed=0)
    assert seen(plan) == [("one", None), ("two@init", None)]
    assert plan.twins == {"one": "two@init"}


def test_models_in_memory_have_twins_of_their_own_seed():
    model = make_model("base", "1+1R2+1")
    plan = with_twins(look_up([model]), seed=3)
    twin = plan.checkpoints[1]
    assert twin.model == "base@init" and twin.untrained
    assert twin.target.embed.weight.equal(model.untrained(3).embed.weight)
    assert not twin.target.embed.weight.equal(model.untrained(4).embed.weight)


def test_where_there_is_no_twin_a_note_says_so(tmp_path):
    (tmp_path / "mine.py").write_text("def make(): raise AssertionError('not called')")
    plan = with_twins(look_up([f"{tmp_path / 'mine.py'}:make"]), seed=0)
    assert plan.twins == {} and len(plan.checkpoints) == 1
    assert plan.notes == ["make: no untrained twin: a factory makes its own weights"]
