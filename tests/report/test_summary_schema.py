"""The documented schema of summary.json."""

import json
import re
from pathlib import Path

import jsonschema
import pandas as pd
import pytest

from loopscope.analysis.collapse.conditions import Estimate
from loopscope.analysis.collapse.criteria import YARDSTICKS
from loopscope.analysis.collapse.findings import Findings
from loopscope.analysis.collapse.yardsticks import FINDINGS
from loopscope.analysis.tables.frames import Tables
from loopscope.names import READINGS
from tests.figures.conftest import make
from tests.figures.course_tables import with_courses
from tests.report import cases

DOCS = Path(__file__).parents[2] / "docs"
SCHEMA = json.loads((DOCS / "summary.schema.json").read_text("utf-8"))


def validate(summary) -> None:
    jsonschema.Draft202012Validator(SCHEMA).validate(summary)


def test_the_schema_is_a_schema():
    jsonschema.Draft202012Validator.check_schema(SCHEMA)


def test_the_summaries_of_these_tests_are_valid(told):
    validate(cases.summary())
    validate(told)
    validate(json.loads(json.dumps(told, allow_nan=False)))


@pytest.mark.parametrize(
    ("where", "value"),
    [
        (("format_version",), 1),
        (("checkpoints", 0, "verdict", "verdict"), "fine"),
        (("checkpoints", 0, "measures", "loss", "mean"), "2.5"),
        (("checkpoints", 0, "step"), 1.5),
        (("differences", 0, "p"), 1.5),
        (("series", 1, "onset", "step"), None),
        (("samples", "another"), 1),
        (("samples", "documents"), 0),
        (("checkpoints", 0, "yardsticks", "over_unigram", "n"), None),
        (("checkpoints", 0, "measures", "loss", "clusters"), "30"),
        (("checkpoints", 3, "verdict", "findings", 0, "name"), "high rank"),
    ],
)
def test_the_schema_refuses_what_is_wrong(told, where, value):
    summary = json.loads(json.dumps(told))
    part = summary
    for key in where[:-1]:
        part = part[key]
    part[where[-1]] = value
    with pytest.raises(jsonschema.ValidationError):
        validate(summary)


def test_the_page_on_the_summary_names_every_field():
    text = re.sub(r"```.*?```", "", (DOCS / "SUMMARY.md").read_text("utf-8"), flags=re.S)

    def fields(schema) -> set[str]:
        found = set(schema.get("properties", {}))
        for inner in [*schema.get("properties", {}).values(), *schema.get("anyOf", [])]:
            found |= fields(inner)
        return found | (fields(schema["items"]) if "items" in schema else set())

    names = fields(SCHEMA).union(*(fields(one) for one in SCHEMA["$defs"].values()))
    told = {word for code in re.findall(r"`([^`]+)`", text) for word in re.findall(r"\w+", code)}
    assert sorted(names - told) == []


def findings(documents: list[str | None], **yardsticks: Estimate) -> Findings:
    """Of one model, a sample of each document, its yardsticks given."""
    measured = with_courses(
        make("base", samples=len(documents)), more=2, readings=READINGS, turn=True
    )
    frames = {
        name: frame.assign(document=pd.Categorical([documents[i] for i in frame["sample"]]))
        for name, frame in measured.frames().items()
    }
    record = {"config": {"variant": "base", "layout": "1+2R3+1", "d_model": 400}}
    record |= {"samples": {"tokens": 400}}
    made = Findings(Tables(**frames, provenance={"models": {"base": record}}))
    vars(made)["yardsticks"] = {key: yardsticks for key in made.depth}
    return made


def test_a_summary_has_findings_yardsticks_and_documents_as_the_schema_says():
    over = Estimate(0.5, 0.4, 0.6, 9, clusters=9)
    made = findings([*"aabbcddef", None], over_unigram=over)
    summary = json.loads(json.dumps(made.summary(), allow_nan=False))
    validate(summary)
    assert summary["samples"]["documents"] == 6
    assert [entry["name"] for entry in summary["yardsticks"]] == [y.name for y in YARDSTICKS]
    [entry] = summary["checkpoints"]
    assert entry["yardsticks"] == {
        "over_unigram": {"mean": 0.5, "low": 0.4, "high": 0.6, "n": 9},
    }
    names = [finding["name"] for finding in entry["verdict"]["findings"]]
    assert names == ["low rank", "worse than unigram"]
    rows = made.signs.set_index("sign")
    for count in ("documents", "clusters"):
        assert entry["measures"]["loss"][count] == rows.loc["loss", count]


def test_documents_are_null_where_nobody_knows_them():
    summary = findings([None] * 8).summary()
    validate(summary)
    assert summary["samples"]["documents"] is None
    assert summary["checkpoints"][0]["yardsticks"] == {}


def test_the_schema_knows_every_finding_and_no_other():
    name = SCHEMA["$defs"]["verdict"]["properties"]["findings"]["items"]["properties"]["name"]
    assert tuple(name["enum"]) == FINDINGS
