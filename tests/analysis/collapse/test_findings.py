"""Findings from small tables: what a summary says of models, thresholds and windows."""

import ast
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from loopscope.analysis import collapse
from loopscope.analysis.collapse.findings import Findings, loopless
from loopscope.errors import UnknownNameError
from tests.analysis.collapse.test_collapse import tables

FOLDER = Path(collapse.__file__).parent


class Windows:
    """Two windows of four tokens."""

    def __init__(self):
        self.tokens = np.zeros((2, 4), dtype=np.int64)
        self.source, self.sha256 = "a text", "ab" * 32
        self.options = {"seed": 3, "requested": 2}

    def __len__(self):
        return len(self.tokens)


def findings(record=None, **changes):
    told = {"config": {"variant": "base", "layout": "1+2R2+1"}} | (record or {})
    return Findings(tables(provenance={"models": {"a": told}}), **changes)


@pytest.mark.parametrize(
    ("training", "untrained"),
    [({"untrained": True, "seed": 0}, True), ({"steps": 100}, False), (None, False)],
)
def test_a_model_of_any_name_is_untrained_where_its_provenance_says_so(training, untrained):
    [entry] = findings({"training": training}).summary()["checkpoints"]
    assert entry["untrained"] is untrained


def test_a_summary_needs_no_more_than_tables():
    summary = findings().summary()
    [entry] = summary["checkpoints"]
    assert (entry["label"], entry["target"]) == ("a", "a")
    assert (entry["variant"], entry["layout"]) == ("base", "1+2R2+1")
    assert summary["samples"]["count"] == 0 and summary["failed"] == summary["notes"] == []


def test_what_is_given_beside_the_tables_stands_in_the_summary():
    summary = findings(
        {"target": "runs/a"},
        windows={"a": Windows()},
        failed=[("b", "unreadable")],
        notes=lambda: ["a: something", "not measured: b: unreadable"],
    ).summary()
    assert summary["samples"] == {
        "data": "a text", "count": 2, "documents": None, "tokens": 4, "seed": 3,
        "same_tokens": True,
    }  # fmt: skip
    assert summary["failed"] == [{"target": "b", "reason": "unreadable"}]
    assert summary["notes"] == ["a: something"]
    assert summary["checkpoints"][0]["target"] == "runs/a"


def test_the_summary_says_what_thresholds_mean_at_the_values_in_force():
    usual = findings()
    signs = usual.signs
    other = usual.with_thresholds({"shrinking": 0.3})
    meanings = [
        {
            entry["name"]: (entry["value"], entry["meaning"])
            for entry in each.summary()["thresholds"]
        }
        for each in (usual, other)
    ]
    assert meanings[0]["shrinking"] == (
        0.5, "the last step is less than half as long as the first",
    )  # fmt: skip
    assert meanings[1].pop("shrinking") == (
        0.3, "the last step is less than 30 % as long as the first",
    )  # fmt: skip
    assert meanings[1].items() <= meanings[0].items()
    assert other.signs is signs and usual.thresholds == {}
    with pytest.raises(UnknownNameError, match="shrinking"):
        _ = usual.with_thresholds({"shrinkin": 0.3}).verdicts


@pytest.mark.parametrize(
    ("record", "without"),
    [
        ({"config": {"layout": "8"}}, True),
        ({"config": {"layout": "1+2R3+1"}}, False),
        ({"config": None, "map": {"loops": []}}, True),
        ({"config": None}, False),
    ],
)
def test_a_model_that_runs_nothing_twice_has_no_verdict(record, without):
    assert (loopless(findings(record).tables) == ["a"]) is without
    [verdict] = findings(record).verdicts.values()
    assert (verdict.verdict is None) is without


def test_collapse_imports_neither_torch_nor_what_compares():
    code = "import sys, loopscope.analysis.collapse.findings; print('torch' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "False"
    for path in FOLDER.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            assert not any("comparisons" in name or name == "torch" for name in names), path
