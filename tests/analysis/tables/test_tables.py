"""Tables: what is saved comes back, and what is not ours is refused by name."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from loopscope.analysis.flags import FLAG_NAMES, Flag
from loopscope.analysis.tables.frames import Tables, empty
from loopscope.analysis.tables.registry import SCHEMAS, schema
from loopscope.analysis.tables.rows import Rows
from loopscope.errors import InputError


def small(model: str = "base", states: tuple[str, ...] = ("h_emb", "h0"), **other) -> Tables:
    cka = Rows(
        "cka",
        3,
        {
            "state_a": np.array([states[0]] * 2),
            "state_b": np.array(states),
            "kernel": np.array(["rbf"] * 2),
            "estimator": np.array(["biased"] * 2),
        },
    )
    cka.values["value"][:] = [[1, 0.25], [1, 0.5], [1, np.nan]]
    cka.flag[2, 1] = Flag.NONPOSITIVE_HSIC
    update = Rows("update", 3, {"block": np.array(["core1"]), "t": np.array([0])})
    update.values["value"][:, 0] = [0.1, 0.2, 0.4]
    provenance = {"models": {model: {"samples": {"source": "тест"}, "options": {"t": 1.0}}}}
    return Tables(cka=cka.frame(model), update=update.frame(model), provenance=provenance, **other)


def test_rows_become_one_row_per_item_and_sample() -> None:
    cka = small().cka
    assert cka is not None
    assert cka["sample"].tolist() == [0, 0, 1, 1, 2, 2]
    assert cka["state_b"].tolist() == ["h_emb", "h0"] * 3
    assert cka["value"].tolist()[:5] == [1, 0.25, 1, 0.5, 1]
    assert cka["flag"].isna().tolist() == [True] * 5 + [False]
    assert cka["flag"].iloc[5] == "nonpositive_hsic"
    assert cka["step"].isna().all()
    assert set(cka["loop"]) == {"core"}


@pytest.mark.parametrize("table", SCHEMAS)
def test_every_table_has_its_declared_columns_and_dtypes(table: str) -> None:
    keys = {c: np.array([1, 2]) for c, d in SCHEMAS[table].items() if d.startswith("int")}
    keys |= {c: np.array(["a", "b"]) for c, d in SCHEMAS[table].items() if d == "category"}
    for frame in (Rows(table, 2, keys).frame("m"), empty(table)):
        assert {name: str(dtype) for name, dtype in frame.dtypes.items()} == schema(table)


def test_the_values_of_a_frame_are_not_copied() -> None:
    rows = Rows("loss", 4, {})
    frame = rows.frame("m")
    rows.values["value"][2, 0] = 7
    assert frame["value"].iloc[2] == 7


def test_flag_codes_are_positions_in_the_category() -> None:
    for flag in Flag:
        if flag >= 0:
            assert FLAG_NAMES[flag] == flag.name.lower()


def test_tables_come_back_as_they_were_saved(tmp_path: Path) -> None:
    tables = small()
    written = tables.save(tmp_path / "new" / "folder")
    assert sorted(path.name for path in written) == ["cka.parquet", "update.parquet"]
    assert sorted(path.name for path in (tmp_path / "new" / "folder").iterdir()) == [
        "cka.parquet",
        "update.parquet",
    ]
    back = Tables.load(tmp_path / "new" / "folder")
    assert back.provenance == tables.provenance
    assert back.frames().keys() == {"update", "cka"}
    for name, frame in tables.frames().items():
        pd.testing.assert_frame_equal(back.frames()[name], frame)


def test_provenance_is_in_the_parquet_metadata(tmp_path: Path) -> None:
    small().save(tmp_path)
    metadata = pq.read_schema(tmp_path / "cka.parquet").metadata
    assert json.loads(metadata[b"loopscope"]) == small().provenance
    assert (
        pq.ParquetFile(tmp_path / "cka.parquet").metadata.row_group(0).column(0).compression
        == "ZSTD"
    )


def test_saving_again_removes_our_stale_tables_and_nothing_else(tmp_path: Path) -> None:
    small().save(tmp_path)
    pq.write_table(pa.table({"value": [1.0]}), tmp_path / "rank.parquet")
    (tmp_path / "notes.txt").write_text("mine")
    tables = small()
    tables.cka = None
    tables.save(tmp_path)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["notes.txt", "rank.parquet", "update.parquet"]


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write tables to .*file.*can be written"):
        small().save(tmp_path / "file")


def test_folders_without_tables_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no tables; expected at least one of update.parq"):
        Tables.load(tmp_path)
    with pytest.raises(InputError, match="nowhere is not a folder"):
        Tables.load(tmp_path / "nowhere")


def test_foreign_and_broken_files_are_refused(tmp_path: Path) -> None:
    pq.write_table(pa.table({"value": [1.0]}), tmp_path / "cka.parquet")
    with pytest.raises(InputError, match=r"cka.parquet was not written by loopscope"):
        Tables.load(tmp_path)
    (tmp_path / "cka.parquet").write_bytes(b"PAR1 or so")
    with pytest.raises(InputError, match=r"cka.parquet is not a readable Parquet file"):
        Tables.load(tmp_path)


def test_wrong_columns_are_named(tmp_path: Path) -> None:
    tables = small()
    assert tables.cka is not None
    tables.cka = tables.cka.rename(columns={"state_b": "stateb"})
    tables.save(tmp_path)
    with pytest.raises(InputError, match="the table cka lacks state_b and has stateb besides"):
        Tables.load(tmp_path)
    tables.cka = small().cka[["value", *(c for c in schema("cka") if c != "value")]]
    tables.save(tmp_path)
    with pytest.raises(InputError, match="the table cka has its columns out of order"):
        Tables.load(tmp_path)


def test_files_of_two_runs_are_not_mixed(tmp_path: Path) -> None:
    small("mesh").save(tmp_path / "mesh")
    small("base").save(tmp_path / "base")
    (tmp_path / "mesh" / "cka.parquet").replace(tmp_path / "base" / "cka.parquet")
    with pytest.raises(InputError, match="mixes tables of different runs"):
        Tables.load(tmp_path / "base")


def test_concat_stacks_models_and_unites_their_categories() -> None:
    other = small("mesh", states=("h_emb", "h4"))
    other.routing = empty("routing")
    both = Tables.concat([small(), other])
    assert both.cka is not None
    assert both.routing is not None
    assert both.cka["model"].tolist() == ["base"] * 6 + ["mesh"] * 6
    assert list(both.cka["state_b"].cat.categories) == ["h_emb", "h0", "h4"]
    assert {name: str(dtype) for name, dtype in both.cka.dtypes.items()} == schema("cka")
    assert both.cka.index.tolist() == list(range(12))
    assert both.models == ["base", "mesh"]
    assert both.provenance["models"].keys() == {"base", "mesh"}


def test_concat_refuses_nothing_and_equal_names() -> None:
    with pytest.raises(InputError, match="nothing to concatenate"):
        Tables.concat([])
    with pytest.raises(InputError, match="base appears in more than one .* name="):
        Tables.concat([small(), small("mesh"), small()])


def test_tables_show_their_size_and_flags() -> None:
    html = small("<b>")._repr_html_()
    assert "<tr><td>cka</td><td>6</td><td>3</td><td>1</td></tr>" in html
    assert "&lt;b&gt;" in html
    assert repr(small()) == "Tables(base; update: 3 rows, cka: 6 rows)"
    assert repr(Tables()) == "Tables(no models; empty)"


def test_tables_need_no_torch_and_no_matplotlib() -> None:
    code = (
        "import sys, loopscope.analysis.tables.frames, loopscope.analysis.tables.rows\n"
        "assert not {'torch', 'matplotlib'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
