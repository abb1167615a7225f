"""The documented schema of summary.json."""

import json
import re
from pathlib import Path

import jsonschema
import pytest

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
        (("format_version",), 2),
        (("checkpoints", 0, "verdict", "verdict"), "fine"),
        (("checkpoints", 0, "measures", "loss", "mean"), "2.5"),
        (("checkpoints", 0, "step"), 1.5),
        (("differences", 0, "p"), 1.5),
        (("series", 1, "onset", "step"), None),
        (("samples", "another"), 1),
        (("samples", "documents"), 0),
        (("checkpoints", 0, "yardsticks", "over_unigram", "n"), None),
        (("checkpoints", 0, "measures", "loss", "units"), "30"),
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
