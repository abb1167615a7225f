"""The registry: every measure fills the tables that its record declares, and no others."""

import os
import shutil
import subprocess
import sys
from dataclasses import fields
from importlib import import_module
from pathlib import Path

import pytest
import torch

import loopscope
from loopscope.analysis.measures.filling import MeasureRows, Setup
from loopscope.analysis.measuring.recorder import Recorder, one_thread_per_sample, rows_of
from loopscope.analysis.measuring.streaming import longer_model, measure
from loopscope.analysis.measuring.token_windows import read_windows
from loopscope.analysis.options import Options
from loopscope.analysis.tables import registry
from loopscope.analysis.tables.frames import Tables
from loopscope.analysis.tables.registry import BY_NAME, MEASURES, REGISTRY, TABLES, schema
from loopscope.probes.state_capture import capture
from tests.conftest import make_model


@pytest.mark.parametrize("name", MEASURES)
def test_the_rows_of_a_record_are_a_class_of_rows(name):
    module, _, attribute = BY_NAME[name].rows.partition(":")
    rows = getattr(import_module(f"loopscope.analysis.measures.{module}"), attribute)
    assert issubclass(rows, MeasureRows) and rows is not MeasureRows


@pytest.fixture(scope="module")
def recorder():
    """All measures of a model with routers, on one batch; a name for each token of the first."""
    model = make_model("mesh")
    samples = torch.randint(61, (3, 12), generator=torch.Generator().manual_seed(3))
    first = capture(model, samples, memory=False, logits=True)
    options, windows = Options(measures=MEASURES), read_windows(samples, d_vocab=61)
    prepared = {
        name: rows_of(name).prepare(model, windows, options, batch_size=3) for name in MEASURES
    }
    recorder = Recorder(
        Setup(
            model=model, options=options, first=first, samples=3, prepared=prepared,
            words=[str(token) for token in samples[0].tolist()],
        )
    )  # fmt: skip
    with one_thread_per_sample() as each:
        recorder.add(0, first, each, inputs=samples)
    return recorder


@pytest.mark.parametrize("name", MEASURES)
def test_a_measure_fills_exactly_the_tables_of_its_record(recorder, name):
    frames = recorder.measures[name].frames("mesh")
    assert list(frames) == [table.name for table in BY_NAME[name].tables]
    for table, parts in frames.items():
        assert len(parts) == 1 and len(parts[0]), table
        columns = {column: str(dtype) for column, dtype in parts[0].dtypes.items()}
        assert columns == schema(table) and list(columns) == list(schema(table))
        assert parts[0]["flag"].isna().any(), table


def test_declared_columns_are_keys_and_values(recorder):
    for name, rows in recorder.measures.items():
        for table in BY_NAME[name].tables:
            (frame,) = rows.frames("mesh")[table.name]
            assert list(frame)[len(registry.COMMON) :] == [*table.keys, *table.values]
            assert not frame.duplicated(["sample", *table.keys]).any()


@pytest.mark.parametrize("measures", [MEASURES, ("rank",), ("loss", "update")])
def test_only_what_was_asked_for_is_measured(mesh, samples, measures):
    frames = measure(mesh, samples, measures).frames()
    assert set(frames) == {table.name for name in measures for table in BY_NAME[name].tables}
    assert list(frames) == [name for name in TABLES if name in frames]


def test_what_a_record_says_of_more_iterations_is_so(samples):
    model = make_model("base")
    longer, _ = longer_model(model, 5)
    assert longer is not None
    for entry in REGISTRY:
        kwargs = {"more_loops": 5} if entry.longer else {}
        table = entry.tables[0].name
        frame = measure(model, samples, [entry.name], **kwargs).frames()[table]
        if entry.longer:
            assert frame["beyond"].any() if "beyond" in frame else frame["t"].max() > model.K - 1
            assert len(frame) > len(measure(model, samples, [entry.name]).frames()[table])


def test_names_are_in_the_order_of_the_registry_and_there_once():
    assert tuple(entry.name for entry in REGISTRY) == MEASURES == tuple(BY_NAME)
    assert tuple(name for name in MEASURES if BY_NAME[name].default) == registry.DEFAULT
    tables = [table.name for entry in REGISTRY for table in entry.tables]
    assert tables == list(registry.MEASURED) == list(registry.SCHEMAS)
    assert tuple([*tables, *registry.RUNS]) == TABLES and len(set(TABLES)) == len(TABLES)


def test_a_set_of_tables_has_a_field_for_each():
    assert [entry.name for entry in fields(Tables)] == [*TABLES, "provenance"]
    tables = Tables()
    assert all(getattr(tables, name) is None for name in TABLES) and tables.provenance == {}
    assert all(f"        {name}: " in (Tables.__doc__ or "") for name in TABLES)


RECORD = """REGISTRY: tuple[Measure, ...] = (
    Measure(
        rows="widths:WidthRows",
        tables=(
            Table(
                name="width",
                meaning="width of each state",
                keys={"state": "category"},
                values={"value": "float64"},
            ),
        ),
    ),
"""
ROWS = """
from loopscope.analysis.flags import Flag
from loopscope.analysis.measures.filling import LoopRows


class WidthRows(LoopRows):
    table = "width"

    def keys(self, loop, setup):
        return [(name,) for name in loop.states]

    def fill(self, rows, batch, loop):
        for column, state in enumerate(loop.states.values()):
            rows.values["value"][batch.samples, column] = state.shape[-1]
            rows.flag[batch.samples, column] = Flag.NONE
"""
PROGRAM = """
import inspect
import torch
import loopscope as ls
from loopscope.models.native.configuration import LoopConfig
from loopscope.models.native.loop_model import LoopModel

config = LoopConfig(variant="base", layout="1+1R2+1", d_model=16, n_heads=2, d_vocab=11)
tables = ls.measure(LoopModel(config), torch.randint(11, (3, 6)))
assert inspect.signature(ls.measure).parameters["measures"].default[0] == "width"
assert list(tables.width["state"][:5]) == ["h_emb", "h0", "h1", "h2", "h_out"]
assert tables.width["value"].eq(16).all() and len(tables.width) == 15
tables.save("tables")
assert ls.Tables.load("tables").width.equals(tables.width)
print(ls.__file__)
"""


def test_a_new_measure_is_a_record_and_a_file(tmp_path: Path):
    copy = tmp_path / "loopscope"
    source = Path(loopscope.__file__).parent
    shutil.copytree(source, copy, ignore=shutil.ignore_patterns("zoo", "__pycache__"))
    records = copy / "analysis" / "tables" / "registry.py"
    start, text = RECORD.partition("\n")[0], records.read_text(encoding="utf-8")
    assert text.count(start + "\n") == 1
    records.write_text(text.replace(start + "\n", RECORD), encoding="utf-8")
    (copy / "analysis" / "measures" / "widths.py").write_text(ROWS, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PROGRAM],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()).parent == copy
