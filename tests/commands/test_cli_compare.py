"""`loopscope compare` as a user has it: series, what fails, pipelines, two commands, processes."""

import json
import os
import shutil
import subprocess
import sys
from functools import partial

import pandas as pd
import pytest

from loopscope.analysis.collapse.sign_values import by_key
from loopscope.analysis.collapse.verdicts import Verdict
from loopscope.analysis.collapse.yardsticks import Finding
from loopscope.analysis.tables.frames import Tables
from loopscope.files import claimed
from loopscope.models.native.checkpoint import read_tokenizer, save
from loopscope.models.opening.targets import zoo_folder
from tests.conftest import make_model
from tests.program import called, without_figures

SMALL = ["--samples", "6", "--tokens", "24"]
LOW_RANK = Finding(name="low rank", because="planted too")


@pytest.fixture
def run(monkeypatch, capsys):
    """Call the program without figures; returns exit code, stdout, stderr."""
    without_figures(monkeypatch)
    return partial(called, monkeypatch, capsys)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A run with steps 1, 2, 4, 5 and a single checkpoint, with the shipped tokenizer."""
    folder = tmp_path_factory.mktemp("runs")
    tokenizer = read_tokenizer(zoo_folder() / "base" / "tokenizer.json")
    for variant, places in (("base", [f"run/step-{i}" for i in (1, 2, 4, 5)]), ("mesh", ["mesh"])):
        for seed, place in enumerate(places):
            model = make_model(variant, "1+1R2+1", seed=seed, d_vocab=tokenizer.get_vocab_size())
            model.tokenizer = tokenizer
            save(model, folder / place)
    return folder


@pytest.fixture
def runs(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "runs")
    return tmp_path / "runs"


def damage(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:500])


def error_of(err):
    [line] = [line for line in err.splitlines() if line.startswith("error: ")]
    assert "Traceback" not in err
    return line


def test_a_series_and_a_checkpoint_side_by_side(run, runs, tmp_path):
    damage(runs / "run" / "step-4")
    out = tmp_path / "out"
    code, told, err = run("compare", runs / "run" / "step-*", runs / "mesh", "--out", out, *SMALL)
    assert code == 0, err
    loss = pd.read_parquet(out / "tables" / "loss.parquet")
    assert list(loss["model"].unique()) == ["run", "mesh", "run@init", "mesh@init"]
    assert set(loss["step"].dropna()) == {1, 2, 5}
    assert f"note: not measured: {runs / 'run' / 'step-4'}: " in told
    assert "note: run: no checkpoint of step 3" in told
    signs = pd.read_csv(out / "tables" / "signs.csv")
    assert set(signs[signs["model"].eq("run")]["step"]) == {1, 2, 5}
    assert not (out / ".shards").exists()


def test_twins_can_be_left_out_and_more_loops_chosen(run, runs, tmp_path):
    words = [runs / "run" / "step-1", "--out", tmp_path / "out", *SMALL]
    code, _, err = run("compare", *words, "--no-twins", "--more-loops", 3)
    assert code == 0, err
    readout = pd.read_parquet(tmp_path / "out" / "tables" / "readout.parquet")
    assert list(readout["model"].unique()) == ["step-1"] and readout["t"].max() == 3


def test_a_checkpoint_that_fails_ends_with_exit_code_2_after_the_others(run, runs, tmp_path):
    damage(runs / "mesh")
    out = tmp_path / "out"
    code, told, err = run("compare", runs / "mesh", runs / "run" / "step-1", "--out", out, *SMALL)
    assert code == 2
    assert f"not measured: {runs / 'mesh'}" in error_of(err)
    assert "cannot be read" in told and "note: " in told
    assert list(Tables.load(out / "tables").models) == ["step-1", "step-1@init"]
    assert "the same command measures only that" in told


def test_figures_draws_the_steps_of_a_run_as_models_and_fails_alike(run, runs, tmp_path):
    damage(runs / "run" / "step-4")
    code, _, err = run("figures", runs / "run", "--out", tmp_path / "out", *SMALL)
    assert code == 2 and "step-4" in error_of(err)
    tables = Tables.load(tmp_path / "out" / "tables")
    assert tables.models == ["step-1", "step-2", "step-5"]
    assert tables.loss is None and tables.update["step"].isna().all()


@pytest.mark.parametrize("verdicts", ["VERDICT", "collapsed,VERDICT,unstable"])
def test_fail_on_ends_with_exit_code_1_after_everything_is_written(
    run, runs, tmp_path, verdicts, monkeypatch
):
    # what the verdict is does not matter here; that of the twin must not count
    kinds = {"mesh": "skewed", "step-1": "healthy", "mesh@init": "stagnant"}
    monkeypatch.setattr(
        "loopscope.analysis.collapse.findings.judge",
        lambda signs, **given: {
            key: Verdict(
                verdict=kinds.get(key.model, "stagnant"),
                evidence=("planted",),
                findings=(LOW_RANK,) if key.model == "mesh" else (),
            )
            for key in by_key(signs)
        },
    )
    words = ["compare", runs / "mesh", runs / "run" / "step-1", "--out", tmp_path / "out", *SMALL]
    code, told, err = run(*words, "--fail-on", verdicts.replace("VERDICT", "skewed"))
    assert code == 1, err
    assert "mesh is skewed" in told and "step-1 is" not in told
    assert (tmp_path / "out" / "tables" / "signs.csv").exists()
    code, told, _ = run(*words, "--fail-on", verdicts.replace("VERDICT", "stagnant"))
    assert code == 0 and " is stagnant" not in told
    code, told, _ = run(*words, "--fail-on", verdicts.replace("VERDICT", "low rank"))
    assert code == 1 and "mesh is low rank" in told and "step-1 is" not in told
    assert "◣ skewed, and low rank  mesh\n  low rank: planted too\n" in told


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["compare", "{runs}/mesh", "--fail-on", "collapse"], "did you mean collapsed"),
        (["compare", "{runs}/mesh", "--fail-on", ""], "unknown verdict"),
        (["compare", "{runs}/mesh", "--fail-on", "skewed,lowrank"], "did you mean low rank"),
        (["compare", "{runs}/mesh", "--more-loops", "-1"], "more_loops must be 0 or more"),
        (["compare", "{runs}/none-*"], "nothing matches"),
        (["compare", "{runs}/mesh", "{runs}/none"], "unknown model"),
        (["compare", "{runs}/mesh", "--batch-size", "0"], "batch_size is 0"),
    ],
)
def test_errors_come_before_anything_is_made(run, runs, tmp_path, words, message):
    out = tmp_path / "out"
    code, _, err = run(*[word.format(runs=runs) for word in words], "--out", out, *SMALL)
    assert code == 2 and message in error_of(err)
    assert not out.exists()


@pytest.mark.parametrize("command", ["compare", "figures"])
def test_the_second_command_on_a_folder_refuses(run, runs, tmp_path, command):
    out = tmp_path / "out"
    with claimed(out):
        code, _, err = run(command, runs / "mesh", "--out", out, *SMALL)
    assert code == 2 and "another command is writing" in error_of(err)
    code, _, err = run(command, runs / "mesh", "--out", out, *SMALL)
    assert code == 0, err


def test_redrawing_refuses_a_folder_in_use_too(run, runs, tmp_path):
    out = tmp_path / "out"
    code, _, err = run("figures", runs / "mesh", "--out", out, *SMALL)
    assert code == 0, err
    with claimed(out):
        code, _, err = run("figures", "--from-tables", out, "--out", out)
    assert code == 2 and "another command is writing" in error_of(err)


HOLD = """
import sys
from pathlib import Path
from loopscope.files import claimed

with claimed(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_killed_command_lets_go_of_its_folder(tmp_path):
    held = subprocess.Popen(
        [sys.executable, "-c", HOLD, tmp_path / "out"], stdin=subprocess.PIPE,
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert held.stdout.readline() == "held\n"
    with pytest.raises(ValueError, match="another command"), claimed(tmp_path / "out"):
        pass
    held.kill()
    held.communicate()
    with claimed(tmp_path / "out"):
        pass


LAUNCH = [
    sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_machines", "1",
    "--num_processes", "2", "--mixed_precision", "bf16", "--dynamo_backend", "no",
]  # fmt: skip
PROGRAM = """
import os, signal, sys
import loopscope.commands.results
from loopscope import cli
from loopscope.analysis.comparisons import store as shards

shards.SAMPLES = 2
loopscope.commands.results.draw = lambda *given, **options: None
at, sys.argv = int(sys.argv[1]), ["loopscope", *sys.argv[2:]]
write, done = shards.Store.write, [0]

def counted(self, name, content):
    done[0] += name.endswith(".shard")
    if at and done[0] == at and os.environ.get("RANK") == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    write(self, name, content)

shards.Store.write = counted
cli.main()
"""


@pytest.fixture
def launch(tmp_path):
    """Call the program in a process of its own, or in two."""
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)

    def call(launcher, *words, kill=0):
        return subprocess.run(
            [*launcher, str(program), str(kill), *map(str, words)],
            env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
        )  # fmt: skip

    return call


def test_two_processes_give_the_tables_of_one_and_go_on_alike(launch, runs, tmp_path):
    damage(runs / "run" / "step-4")
    words = ["compare", runs / "run", runs / "mesh", "--batch-size", "2", *SMALL]
    one = launch([sys.executable], *words, "--out", tmp_path / "one")
    assert one.returncode == 0, one.stderr[-3000:]
    two = launch(LAUNCH, *words, "--out", tmp_path / "two")
    assert two.returncode == 0, two.stderr[-3000:]
    printed = two.stdout.replace(str(tmp_path / "two"), str(tmp_path / "one"))
    assert printed == one.stdout  # process 1 prints nothing
    killed = launch(LAUNCH, *words, "--out", tmp_path / "three", kill=3)
    assert killed.returncode != 0
    left = len(list((tmp_path / "three" / ".shards").glob("*/*.shard")))
    assert 0 < left < 15 and not (tmp_path / "three" / "tables").exists()
    three = launch(LAUNCH, *words, "--out", tmp_path / "three")
    assert three.returncode == 0, three.stderr[-3000:]
    tables = [Tables.load(tmp_path / name / "tables") for name in ("one", "two", "three")]
    for other in tables[1:]:
        for name, frame in tables[0].frames().items():
            pd.testing.assert_frame_equal(frame, other.frames()[name], obj=name, check_exact=True)
        assert other.provenance == tables[0].provenance
    told = json.loads((tmp_path / "two" / "provenance.json").read_text())
    assert list(told["models"]["run"]["steps"]) == ["1", "2", "5"]


def test_several_processes_need_a_folder_that_all_of_them_see(launch, runs, tmp_path):
    apart = tmp_path / "apart.py"
    apart.write_text(
        "import os, sys\n"
        "where = sys.argv[1] + os.environ['RANK']\n"
        "os.makedirs(where, exist_ok=True), os.chdir(where)\n"
        "import loopscope as ls\n"
        "ls.compare([sys.argv[2]], samples=4, tokens=16, out=eval(sys.argv[3]))\n"
    )
    for out, message in (("'out'", "not all processes see"), ("None", "need an output folder")):
        words = [*LAUNCH, str(apart), str(tmp_path / "at"), str(runs / "mesh"), out]
        done = subprocess.run(words, capture_output=True, text=True)
        assert done.returncode != 0 and message in done.stderr, done.stderr[-3000:]


def test_a_model_over_all_devices_takes_one_process(run, runs, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("os._exit", sys.exit)  # how one of several processes ends
    words = [runs / "mesh", "--out", tmp_path / "out", "--device-map", "auto", *SMALL]
    code, _, err = run("compare", *words)
    assert code == 2 and "so it takes one process" in error_of(err)
