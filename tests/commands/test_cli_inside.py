"""The commands that look inside: what they write and print, what they refuse."""

import json
import re
from dataclasses import fields

import pandas as pd
import pytest

from loopscope.analysis.inside_options import INSIDE
from loopscope.analysis.tables.registry import BY_NAME
from loopscope.models.native.checkpoint import read_tokenizer, save
from loopscope.models.opening.targets import zoo_folder
from tests.conftest import make_model

SMALL = ["--samples", 6, "--tokens", 24]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Small checkpoints with the shipped tokenizer."""
    folder = tmp_path_factory.mktemp("inside")
    tokenizer = read_tokenizer(zoo_folder() / "base" / "tokenizer.json")
    for variant in ("base", "mesh"):
        model = make_model(variant, "1+1R2+1", d_vocab=tokenizer.get_vocab_size())
        model.tokenizer = tokenizer
        save(model, folder / f"my-{variant}")
    return folder


@pytest.mark.parametrize("command", INSIDE)
def test_a_command_writes_its_tables_and_figures_and_prints_the_means(
    command, run, checkpoints, tmp_path
):
    out = tmp_path / "out"
    names = [checkpoints / "my-base", checkpoints / "my-mesh"]
    code, told, error = run(command, *names, "--out", out, *SMALL)
    assert code == 0, error
    tables = {path.stem for path in (out / "tables").iterdir()}
    assert tables == {table.name for table in BY_NAME[command].tables}
    frame = pd.read_parquet(out / "tables" / f"{BY_NAME[command].tables[0].name}.parquet")
    assert set(frame["model"].unique()) == {"my-base", "my-mesh"}
    assert frame["sample"].nunique() == 6
    assert list((out / "figures").glob("*.png"))
    assert "not drawn: fig" not in told and "not drawn: rank" not in told
    assert re.search(r"^my-mesh.*: ", told, flags=re.MULTILINE)
    provenance = json.loads((out / "provenance.json").read_text())
    assert command in provenance["models"]["my-base"]["options"]


@pytest.mark.parametrize("command", INSIDE)
def test_figures_are_redrawn_from_tables_alone(command, run, checkpoints, tmp_path):
    run(command, checkpoints / "my-mesh", "--out", tmp_path / "a", *SMALL)
    code, _, _ = run(command, "--from-tables", tmp_path / "a", "--out", tmp_path / "b")
    assert code == 0
    drawn = list((tmp_path / "a" / "figures").glob("*.png"))
    assert drawn
    for path in drawn:
        assert (tmp_path / "b" / "figures" / path.name).read_bytes() == path.read_bytes()


@pytest.mark.parametrize("command", ["lens", "intervene", "orbit"])
def test_a_text_takes_the_place_of_samples(command, run, checkpoints, tmp_path):
    out = tmp_path / "out"
    text = "def f(x):\n    return x + 1\n"
    code, _, error = run(command, checkpoints / "my-mesh", "--text", text, "--out", out, draw=False)
    assert code == 0, error
    frame = pd.read_parquet(out / "tables" / f"{BY_NAME[command].tables[0].name}.parquet")
    assert frame["sample"].unique().tolist() == [0]


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["lens"], "error: lens needs a model: loopscope lens mesh; several are put side by side."),
        (["orbit", "--from-tables", "x", "--data", "y"], "leave out --data."),
        (["lens", "mesh", "--text", "a"], "the text 'a' has 1 tokens; give one of at least 4."),
        (["lens", "mesh", "--text", "abc def", "--data", "x.txt"], "text and data were both given"),
        (["lens", "nothere"], "nothere"),
        (["probe", "mesh", "--data", "nothere.txt"], "nothere.txt"),
    ],
)
def test_what_cannot_be_is_one_line_and_exit_code_2(words, line, run, tmp_path):
    code, _, error = run(*words, "--out", tmp_path / "out")
    lines = [entry for entry in error.splitlines() if entry and "━" not in entry]
    assert code == 2 and len(lines) == 1 and line in lines[0]


def test_a_model_that_cannot_is_told_so_in_a_line(run, checkpoints, tmp_path):
    base = checkpoints / "my-base"
    code, told, _ = run("intervene", base, "--what", "slot", "--out", tmp_path, *SMALL, draw=False)
    assert code == 0
    assert re.search(r"^note: my-base: effect: .*slot.*the table has no rows$", told, re.M)


def test_tables_of_another_command_are_not_redrawn(run, checkpoints, tmp_path):
    folder = tmp_path / "a"
    run("lens", checkpoints / "my-base", "--out", folder, *SMALL, draw=False)
    code, _, error = run("orbit", "--from-tables", folder, "--out", tmp_path / "b")
    assert code == 2
    assert error.strip() == (
        f"error: {folder} has no table orbit; the tables in it: lens, lens_tokens."
    )


@pytest.mark.parametrize("command", INSIDE)
def test_every_option_has_a_flag_in_the_help_or_is_of_python_alone(command, run):
    code, text, _ = run(command, "--help")
    assert code == 0
    for entry in fields(INSIDE[command]):
        if entry.metadata["flag"]:
            assert entry.metadata["flag"] in text


def test_compare_with_inside_adds_chapters_to_the_report(run, checkpoints, tmp_path):
    out = tmp_path / "out"
    code, _, error = run(
        "compare", checkpoints / "my-mesh", "--inside", "--no-twins", "--out", out, *SMALL
    )
    assert code == 0, error
    page = (out / "report.html").read_text()
    for title in (
        "What can be read after t loops", "What the states hold",
        "What the prediction depends on", "Where the states go",
    ):  # fmt: skip
        assert page.count(f"<h3>{title}</h3>") == 1
    assert {path.stem for path in (out / "tables").glob("*.parquet")} >= {
        "lens", "probe", "effect", "orbit", "update", "readout",
    }  # fmt: skip
