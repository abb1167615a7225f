"""`loopscope probe`: labels by name and from files, shards that go on, wrong labels."""

import numpy as np
import pandas as pd
import pytest

from loopscope.analysis.tables.frames import Tables
from loopscope.models.native.checkpoint import save
from tests.conftest import make_model
from tests.program import called, without_figures

SIZE = ("--samples", 10, "--tokens", 12, "--folds", 3, "--batch-size", 4)


@pytest.fixture
def folder(tmp_path):
    """A model without a tokenizer, tokens and labels as files."""
    save(make_model("base"), tmp_path / "tiny")
    random = np.random.default_rng(0)
    np.save(tmp_path / "tokens.npy", random.integers(61, size=(10, 12)))
    np.save(tmp_path / "syntax.npy", random.integers(2, size=(10, 12)))
    pd.DataFrame({"language": ["py", "c"] * 5}).to_csv(tmp_path / "kinds.csv", index=False)
    return tmp_path


def probed(monkeypatch, capsys, folder, labels, *more):
    return called(
        monkeypatch, capsys, "probe", folder / "tiny", "--data", folder / "tokens.npy", *SIZE,
        "--labels", labels, "--out", folder / "out", *more,
    )  # fmt: skip


def test_labels_come_by_name_and_from_files(folder, monkeypatch, capsys):
    without_figures(monkeypatch)
    labels = f"position,{folder / 'syntax.npy'},{folder / 'kinds.csv'}"
    code, out, err = probed(monkeypatch, capsys, folder, labels, "--of", "h1,h_m")
    assert code == 0, err
    frame = Tables.load(folder / "out" / "tables").probe
    assert {*frame["labels"]} == {"position", "syntax", "language"}
    assert {*frame["target"]} == {"h_emb", "h1", "h_m0", "h_m1", "h_m2"}
    assert frame["sample"].nunique() == 10
    assert "score of a linear probe for language, and its controls" in out


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ("curent", "error: unknown labels 'curent'; did you mean current?"),
        ("lost.npy", "error: there is no file lost.npy with labels."),
        ("short", "error: labels 'short' have the shape (9, 12); 10 samples of 12 tokens take one"),
    ],
)
def test_wrong_labels_are_one_line(folder, labels, message, monkeypatch, capsys):
    without_figures(monkeypatch)
    np.save(folder / "short.npy", np.zeros((9, 12), int))
    labels = str(folder / "short.npy") if labels == "short" else labels
    code, _, err = probed(monkeypatch, capsys, folder, labels)
    assert code == 2 and message in err and "Traceback" not in err
