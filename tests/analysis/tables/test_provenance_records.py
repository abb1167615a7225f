"""What provenance tells of one model."""

import pytest

from loopscope.analysis.tables.provenance_records import ModelRecord, model_record, model_records

NATIVE = {
    "config": {"variant": "mesh", "layout": "1+2R3+1"},
    "options": {"center": True},
    "training": {"steps": 100},
    "target": "runs/mesh",
}
FOREIGN = {
    "config": {"architecture": "HRM", "variant": "theirs"},
    "map": {
        "layout": "H2.L3",
        "loops": [
            {"name": "H", "paths": ["0", "1"]},
            {"name": "L", "paths": ["H0.L0", "H0.L1", "H1.L0"]},
        ],
    },
    "training": {},
}


def test_a_native_model_is_told_by_its_configuration():
    record = ModelRecord("a", NATIVE)
    assert not record.foreign and record.has_loop is True and not record.untrained
    assert (record.variant, record.layout) == ("mesh", "1+2R3+1")
    assert record.options["center"] and record.config["variant"] == "mesh"
    assert (record.target, record.steps, record.twin_of) == ("runs/mesh", {}, ())
    assert record.paths("core") == ()


def test_a_foreign_model_is_told_by_its_map_and_has_no_variant():
    record = ModelRecord("a", FOREIGN)
    assert record.foreign and record.has_loop is True
    assert (record.variant, record.layout) == (None, "H2.L3")
    assert record.paths("L") == ("H0.L0", "H0.L1", "H1.L0")
    assert record.paths("H") == record.paths("none") == ()
    assert ModelRecord("a", FOREIGN | {"map": {"loops": []}}).has_loop is False
    assert ModelRecord("a", FOREIGN | {"map": {}}).layout == "HRM"


@pytest.mark.parametrize(
    ("layout", "loops"), [("8", False), ("4+8+8+4", False), ("1+2R3+1", True), ("mixed", False)]
)
def test_a_native_model_loops_where_its_layout_shares_its_core(layout, loops):
    assert ModelRecord("a", {"config": {"layout": layout}}).has_loop is loops


@pytest.mark.parametrize(
    ("name", "training", "untrained"),
    [
        ("mesh@init", {}, True),
        ("x", {"untrained": True}, True),
        ("x", {"untrained": False}, False),
        ("x", None, False),
    ],
)
def test_untrained_is_what_its_name_or_its_training_says(name, training, untrained):
    assert ModelRecord(name, {"training": training}).untrained is untrained


def test_of_a_series_the_training_is_that_of_the_first_step():
    steps = {"10": {"target": "run/step-10"}, "200": {"target": "run/step-200"}}
    record = ModelRecord(
        "run", {"training": {"untrained": True}, "steps": steps, "target": "run/step-10"}
    )
    assert list(record.steps) == [10, 200]
    assert [record.untrained_at(step) for step in (10, 200, None)] == [True, False, True]
    assert [record.target_at(step) for step in (200, 30, None)] == [
        "run/step-200", "run/step-10", "run/step-10",
    ]  # fmt: skip


def test_of_an_unknown_model_nothing_is_told():
    for provenance in ({}, {"models": None}, {"models": {"a": None}}):
        record = model_record(provenance, "a")
        assert (record.variant, record.layout, record.has_loop) == (None, "", None)
        assert not record.untrained and record.target is None and not record.config
    assert [r.name for r in model_records({"models": {"a": None, "b": NATIVE}})] == ["a", "b"]
    assert model_record({"models": {"b": {"twin_of": ["a"]}}}, "b").twin_of == ("a",)
