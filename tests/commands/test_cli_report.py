"""What `loopscope compare` leaves behind: the report, the summary, tables that agree with it."""

import json
import sys
from pathlib import Path

import jsonschema
import pandas as pd
import pytest

from loopscope import cli
from loopscope.models.native.checkpoint import read_tokenizer, save
from loopscope.models.opening.targets import zoo_folder
from tests.conftest import make_model

SCHEMA = Path(__file__).parents[2] / "docs" / "summary.schema.json"
VERDICTS = ("healthy", "converging", "skewed", "stagnant", "collapsed", "unstable", "uncertain")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A run of four steps, a mesh model and a plain stack, compared once; what was printed."""
    folder = tmp_path_factory.mktemp("compared")
    tokenizer = read_tokenizer(zoo_folder() / "base" / "tokenizer.json")
    places = {f"run/step-{step}": "base" for step in (1, 2, 3, 5)}
    places |= {"mesh": "mesh", "plain": "vanilla"}
    for seed, (place, variant) in enumerate(places.items()):
        layout = "1+1+1+1" if variant == "vanilla" else "1+1R2+1"
        model = make_model(variant, layout, seed=seed, d_vocab=tokenizer.get_vocab_size())
        model.tokenizer = tokenizer
        save(model, folder / place)
    targets = [folder / "run", folder / "mesh", folder / "plain"]
    words = ["compare", *targets, "--out", folder / "out", "--samples", 9, "--tokens", 24]
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as done:
        patch.setattr(sys, "argv", ["loopscope", *map(str, words)])
        cli.main()
    assert done.value.code == 0
    return folder / "out"


@pytest.fixture(scope="module")
def summary(made):
    return json.loads((made / "summary.json").read_text(encoding="utf-8"))


def test_the_summary_is_as_its_schema_says(summary):
    schema = json.loads(SCHEMA.read_text(encoding="utf-8"))
    jsonschema.Draft202012Validator(schema).validate(summary)
    assert summary["command"].startswith("loopscope compare ")
    assert summary["samples"]["count"] == 9 and summary["samples"]["same_tokens"]


def test_the_summary_has_every_checkpoint_and_no_twin(summary):
    labels = [one["label"] for one in summary["checkpoints"]]
    assert labels == [*(f"run, step {step}" for step in (1, 2, 3, 5)), "mesh", "plain"]
    verdicts = [one["verdict"]["verdict"] for one in summary["checkpoints"]]
    assert verdicts[-1] is None and all(one in VERDICTS for one in verdicts[:-1])
    (run,) = summary["series"]
    assert (run["model"], run["steps"], run["missing"]) == ("run", [1, 2, 3, 5], [4])


def test_the_summary_agrees_with_the_tables(summary, made):
    loss = pd.read_parquet(made / "tables" / "loss.parquet")
    own = loss[loss["model"].eq("run") & loss["step"].eq(2)].set_index("sample")["value"]
    told = summary["checkpoints"][1]["measures"]["loss"]
    assert told["mean"] == pytest.approx(own.mean()) and told["low"] < told["mean"] < told["high"]
    twin = loss[loss["model"].eq("run@init")].set_index("sample")["value"]
    assert told["untrained"]["difference"] == pytest.approx((own - twin).mean())
    mesh = loss[loss["model"].eq("mesh")].set_index("sample")["value"]
    last = loss[loss["model"].eq("run") & loss["step"].eq(5)].set_index("sample")["value"]
    (one,) = (d for d in summary["differences"] if d["label"] == "mesh" and d["measure"] == "loss")
    assert one["against"] == "run, step 5" and one["paired"] and one["n"] == 9
    assert one["mean"] == pytest.approx((mesh - last).mean())
    csv = pd.read_csv(made / "tables" / "differences.csv")
    assert len(csv) == len(summary["differences"])


def test_the_report_shows_the_verdicts_and_stands_alone(summary, made):
    page = (made / "report.html").read_text(encoding="utf-8")
    for one in summary["checkpoints"]:
        assert one["model"] in page
    assert "http://" not in page and "https://" not in page and "<script" not in page
    assert page.count("data:image/png;base64,") >= 5


def test_figures_are_of_what_was_named(made):
    drawn = {path.stem for path in (made / "figures").glob("*.png")}
    assert {"loss_per_loop", "steps", "rank", "series", "fig3_update", "fig1_mesh"} <= drawn
    assert not any("@init" in name for name in drawn)
