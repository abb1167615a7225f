"""Labels of the user's own: every form they come in, and what is no label."""

import numpy as np
import pandas as pd
import pytest
import torch

from loopscope.analysis.inside_options import ProbeOptions, recorded
from loopscope.errors import InputError
from loopscope.probes.probe_labels import read_labels

NAN = np.nan


def values(given, name="labels"):
    labels = read_labels(given)[name]
    return labels.values.tolist(), labels.are_classes


@pytest.mark.parametrize(
    ("given", "codes"),
    [
        (np.array([[3, -7], [3, 9]]), [[0, 1], [0, 2]]),
        (torch.tensor([5, 4, 5]), [0, 1, 0]),
        ([True, False], [0, 1]),
        (np.array(["b", "a", "b"]), [0, 1, 0]),
        ({"labels": ["b", None, "a"]}, [0, -1, 1]),
        ({"labels": ["b", NAN, "a"]}, [0, -1, 1]),
        ([[1, None], [2, 1]], [[0, -1], [1, 0]]),
        (pd.Series(["x", None, "y"]), [0, -1, 1]),
        (pd.Series([4, None, 4], dtype="Int64"), [0, -1, 0]),
        (pd.Series(["u", "v"], dtype="category"), [0, 1]),
    ],
)
def test_integers_booleans_and_strings_are_classes(given, codes):
    assert values(given) == (codes, True)


@pytest.mark.parametrize(
    ("given", "numbers"),
    [
        ([0.5, 2.0], [0.5, 2.0]),
        (torch.tensor([[0.5], [2.0]], dtype=torch.bfloat16), [[0.5], [2.0]]),
        ([1, 2.5, None], [1.0, 2.5, NAN]),
        (np.array([1.0, np.inf]), [1.0, NAN]),
        (pd.Series([1.5, None]), [1.5, NAN]),
    ],
)
def test_floats_are_numbers(given, numbers):
    found, classes = values(given)
    assert not classes
    np.testing.assert_array_equal(found, numbers)


def test_names_come_one_by_one_or_with_commas():
    assert read_labels(None) is None
    assert read_labels("current, brackets") == {"current": None, "brackets": None}
    assert read_labels(("next",)) == {"next": None}
    assert [*read_labels({"a": [1, 2], "next": None})] == ["a", "next"]
    assert [*read_labels(pd.DataFrame({"language": ["py", "c"], "size": [1.0, 2.0]}))] == [
        "language", "size",
    ]  # fmt: skip


def test_files_hold_a_label_for_each_token_or_sample(tmp_path):
    np.save(tmp_path / "syntax.npy", np.array([[1, 2, 1], [2, 2, 1]]))
    pd.DataFrame({"language": ["py", "c"], "size": [0.5, NAN]}).to_csv(tmp_path / "a.csv")
    frame = pd.DataFrame({"sample": [1, 0], "kind": ["x", "y"], "document": ["d", "e"]})
    frame.to_parquet(tmp_path / "b.parquet")
    labels = read_labels(f"next,{tmp_path / 'syntax.npy'},{tmp_path / 'b.parquet'}")
    assert [*labels] == ["next", "syntax", "kind"]
    assert labels["syntax"].values.tolist() == [[0, 1, 0], [1, 1, 0]]
    assert labels["kind"].values.tolist() == [0, 1]  # sorted by sample: y, x
    read = read_labels(tmp_path / "a.csv")
    assert read["language"].values.tolist() == [0, 1] and not read["size"].are_classes


def test_a_table_may_list_single_tokens(tmp_path):
    frame = pd.DataFrame(
        {"sample": [0, 2, 2], "pos": [1, 0, 3], "role": ["subject", "verb", "verb"]}
    )
    frame.to_csv(tmp_path / "roles.csv", index=False)
    labels = read_labels(str(tmp_path / "roles.csv"))["role"]
    full = labels.of_samples("role", 4, 5).values
    assert full.shape == (4, 5) and (full >= 0).sum() == 3
    assert full[0, 1] == 0 and full[2, 0] == full[2, 3] == 1
    few = labels.chosen([2, 3]).of_samples("role", 2, 5).values
    assert few[0].tolist() == [1, -1, -1, 1, -1] and (few[1] == -1).all()
    with pytest.raises(InputError, match=r"\(3, 4\); 2 samples of 5 tokens"):
        labels.of_samples("role", 2, 5)


def test_labels_of_some_samples_are_theirs():
    labels = read_labels(np.array([[1, 2], [3, 1], [2, 2]]))["labels"]
    assert labels.chosen([2, 0]).values.tolist() == [[1, 1], [0, 1]]
    options = ProbeOptions(labels={"a": [0.5, 1.5, 2.5], "next": None}).chosen([1])
    assert options.labels["a"].values.tolist() == [1.5] and options.labels["next"] is None
    assert ProbeOptions().chosen([1]) == ProbeOptions()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("curent", "unknown labels 'curent'; did you mean current?"),
        ("words.npy", "there is no file words.npy with labels."),
        ("", "Labels of your own: a .npy, .csv, .parquet file"),
        ({}, "no labels were given; choose from current"),
        (np.zeros((2, 3, 4)), r"shape \(2, 3, 4\); give one for each token"),
        (np.zeros((0, 3)), r"shape \(0, 3\)"),
        (np.arange(101), "101 classes; at most 100 can be probed. Numbers are given as floats"),
        ([[1, 2], [3]], "are no array of one or two axes"),
        (np.array([1j]), "complex"),
        (pd.DataFrame({"sample": [0], "pos": [0]}), "has no column of labels"),
        (pd.DataFrame({"pos": [0], "x": [0]}), "column pos without sample"),
        (pd.DataFrame({"sample": [0, 2], "x": [0, 1]}), "must hold 0, 1, 2 … once each"),
        (pd.DataFrame({"sample": [0], "pos": [-1], "x": [1]}), "whole numbers from 0"),
        (pd.DataFrame({"sample": [0], "pos": [0.5], "x": [1]}), "whole numbers from 0"),
    ],
)
def test_what_is_no_label_is_refused(given, message):
    with pytest.raises(InputError, match=message):
        read_labels(given)


def test_files_that_cannot_be_read_are_refused(tmp_path):
    for name in ("a.npy", "b.parquet"):
        (tmp_path / name).write_text("no such thing")
        with pytest.raises(InputError, match="cannot be read as labels"):
            read_labels(str(tmp_path / name))
    np.save(tmp_path / "c.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(InputError, match="cannot be read as labels"):  # nothing is unpickled
        read_labels(str(tmp_path / "c.npy"))


def test_provenance_keeps_names_and_hashes_of_labels():
    record = recorded(ProbeOptions(labels={"a": np.array([[1, 2]]), "next": None}))
    assert record["of"] == ["h"] and record["labels"]["next"] is None
    assert record["labels"]["a"]["shape"] == [1, 2] and len(record["labels"]["a"]["sha256"]) == 64
    other = recorded(ProbeOptions(labels={"a": np.array([[1, 1]])}))
    assert other["labels"]["a"]["sha256"] != record["labels"]["a"]["sha256"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"of": ("h", "slots")}, "unknown target of probes 'slots'"),
        ({"of": "h_x"}, "did you mean h_m"),
        ({"folds": 1}, "folds must be a whole number of at least 2"),
        ({"probed_tokens": 0}, "probed_tokens must be"),
    ],
)
def test_options_that_cannot_be_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        ProbeOptions(**options)
