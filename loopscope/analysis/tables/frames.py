"""Tables: one tidy data frame per measure, with where they came from (needs no torch)."""

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import field, make_dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from pandas.api.types import union_categoricals

from loopscope.analysis.tables.registry import MEASURED, RUNS, TABLES, schema
from loopscope.errors import InputError
from loopscope.files import whole_file

METADATA_KEY = b"loopscope"


_MEANINGS = "\n".join(
    f"        {name}: {table.meaning[0].upper()}{table.meaning[1:]}."
    for name, table in MEASURED.items()
)

if TYPE_CHECKING:

    class _Frames:
        provenance: dict[str, Any]

        def __init__(self, *, provenance: Any = None, **frames: pd.DataFrame | None) -> None: ...

        def __getattr__(self, table: str) -> pd.DataFrame | None: ...

else:
    _Frames = make_dataclass(
        "Tables",
        [
            *((name, pd.DataFrame | None, None) for name in TABLES),
            ("provenance", dict[str, Any], field(default_factory=dict)),
        ],
        kw_only=True,
        repr=False,
    )


class Tables(_Frames):
    __doc__ = f"""The measures of one or more models, one row per item and sample, or training logs.

    Each table of measures starts with the columns model, step (null when not a series), sample,
    loop and flag (null when sound); what follows is in `registry.SCHEMAS`. The columns of
    `training` are in `registry.RUNS`. A table that was not asked for is None.

    Attributes:
{_MEANINGS}
        training: Logs of training runs, one row per logged step; losses in nats per token.
            `recipe` is the same for runs that differ in nothing but their seed.
        provenance: `{{"models": {{name: {{...}}}}}}`: configuration, samples, options, versions.
    """

    def frames(self) -> dict[str, pd.DataFrame]:
        """The tables that there are, by name."""
        named = {name: getattr(self, name) for name in TABLES}
        return {name: frame for name, frame in named.items() if frame is not None}

    @property
    def models(self) -> list[str]:
        """Names of the models, in the order in which they were measured."""
        names: dict[str, None] = dict.fromkeys(self.provenance.get("models", {}))
        for frame in self.frames().values():
            names |= dict.fromkeys(str(name) for name in frame["model"].cat.categories)
        return list(names)

    def save(self, folder: str | os.PathLike[str]) -> list[Path]:
        """Write each table as `<name>.parquet`, provenance in its schema metadata.

        A file is complete or absent: it is written under another name and then renamed. Tables of
        an earlier run in the same folder that this one does not have are removed.

        Args:
            folder: Made if it does not exist.

        Returns:
            The files written.

        Raises:
            InputError: Where the folder cannot be written.
        """
        folder = Path(folder)
        written = []
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for name, frame in self.frames().items():
                path = folder / f"{name}.parquet"
                with whole_file(path) as part:
                    pq.write_table(_to_arrow(frame, self.provenance), part, compression="zstd")
                written.append(path)
            for name in set(TABLES) - self.frames().keys():
                path = folder / f"{name}.parquet"
                if path.is_file() and _provenance(path) is not None:
                    path.unlink()
        except OSError as error:
            raise InputError(
                f"cannot write tables to {folder}: {error.strerror or error}; "
                "give a folder that can be written."
            ) from error
        return written

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> "Tables":
        """Read back what `save` wrote; tables without a file are None.

        Args:
            folder: A folder with `<name>.parquet` files.

        Returns:
            The tables and their provenance.

        Raises:
            InputError: Where there is no table of ours, a file cannot be read, its columns are not
                those of the table, or the files come from different runs.
        """
        folder = Path(folder)
        paths = {name: folder / f"{name}.parquet" for name in TABLES}
        paths = {name: path for name, path in paths.items() if path.is_file()}
        if not paths:
            problem = "holds no tables" if folder.is_dir() else "is not a folder"
            raise InputError(
                f"{folder} {problem}; expected at least one of "
                f"{', '.join(f'{name}.parquet' for name in TABLES)}, as `loopscope figures` "
                "and Tables.save write them."
            )
        provenances = {name: _provenance(path) for name, path in paths.items()}
        foreign = [paths[name].name for name, origin in provenances.items() if origin is None]
        if foreign:
            raise InputError(
                f"{folder}: {', '.join(foreign)} was not written by loopscope (no provenance in "
                "it); give a folder written by Tables.save."
            )
        first, *later = provenances.values()
        if any(provenance != first for provenance in later):
            raise InputError(
                f"{folder} mixes tables of different runs; measure again into an empty folder."
            )
        frames = {
            name: _of_today(name, pq.read_table(path).to_pandas()) for name, path in paths.items()
        }
        for name, frame in frames.items():
            _check_columns(name, frame, paths[name])
            if frame.empty:  # the file has no categories to tell its dtypes from
                frames[name] = empty(name)
        return cls(**frames, provenance=first or {})

    @classmethod
    def join(cls, parts: Iterable["Tables"]) -> "Tables":
        """Put parts of one measurement below each other: other samples or steps, or more models.

        Unlike `concat`, parts may hold the same model; then the first part tells its provenance.

        Args:
            parts: Tables whose rows differ in model, step, loop or sample.

        Returns:
            One set of tables, rows in the order of the parts.

        Raises:
            InputError: Where there are none.
        """
        parts = list(parts)
        if not parts:
            raise InputError("nothing to join; give at least one Tables object.")
        models: dict[str, Any] = {}
        for part in parts:
            models = {**part.provenance.get("models", {}), **models}
        names = dict.fromkeys(name for part in parts for name in part.models)
        in_order = {name: models.get(name) for name in names}
        return cls(**_stacked(parts), provenance=parts[0].provenance | {"models": in_order})

    @classmethod
    def concat(cls, tables: Iterable["Tables"]) -> "Tables":
        """Stack the tables of several models; what only some of them have is kept.

        Args:
            tables: Tables of different models.

        Returns:
            One set of tables; categories in order of first appearance.

        Raises:
            InputError: Where two of them hold a model of the same name, or there are none.
        """
        parts = list(tables)
        if not parts:
            raise InputError("nothing to concatenate; give at least one Tables object.")
        seen: set[str] = set()
        for part in parts:
            if again := seen & set(part.models):
                raise InputError(
                    f"{', '.join(sorted(again))} appears in more than one set of tables; measure "
                    "with name=... to tell them apart."
                )
            seen |= set(part.models)
        return cls.join(parts)

    def _repr_html_(self) -> str:
        head = "".join(f"<th>{column}</th>" for column in ("table", "rows", "samples", "flagged"))
        body = "".join(
            f"<tr><td>{name}</td><td>{len(frame)}</td><td>{_samples(frame)}</td>"
            f"<td>{_flagged(frame)}</td></tr>"
            for name, frame in self.frames().items()
        )
        models = escape(", ".join(self.models)) or "no models"
        return f"<p>Tables of {models}</p><table><tr>{head}</tr>{body}</table>"

    def __repr__(self) -> str:
        sizes = ", ".join(f"{name}: {len(frame)} rows" for name, frame in self.frames().items())
        return f"Tables({', '.join(self.models) or 'no models'}; {sizes or 'empty'})"


def empty(table: str) -> pd.DataFrame:
    """Make a table without rows, with its columns and dtypes.

    Args:
        table: The table's name.

    Returns:
        A data frame of length 0.
    """
    return pd.DataFrame({name: pd.Series(dtype=dtype) for name, dtype in schema(table).items()})


def _samples(frame: pd.DataFrame) -> int | str:
    return frame["sample"].nunique() if "sample" in frame else ""


def _flagged(frame: pd.DataFrame) -> int | str:
    return int(frame["flag"].notna().sum()) if "flag" in frame else ""


def _of_today(table: str, frame: pd.DataFrame) -> pd.DataFrame:
    """A table of an earlier loopscope with the columns that have come since."""
    if table in RUNS or "model" not in frame:
        return frame
    since: dict[str, Any] = {"document": _no_documents(len(frame))}
    if table == "readout":
        since["reading"] = pd.Categorical(["raw"] * len(frame))
    if table == "delta":
        since |= dict.fromkeys(("mixed", "turn", "work"), math.nan)
    lacking = {name: values for name, values in since.items() if name not in frame}
    if not lacking:
        if frame["document"].isna().all():  # a file tells no dtype of none
            frame["document"] = since["document"]
        return frame
    frame = frame.assign(**lacking)
    names = [name for name in schema(table) if name in frame]
    return frame[[*names, *(name for name in frame if name not in names)]]


def _no_documents(rows: int) -> pd.Categorical:
    categories: Any = pd.Index([], dtype="str")
    return pd.Categorical.from_codes(np.full(rows, -1), categories)


def _check_columns(table: str, frame: pd.DataFrame, path: Path) -> None:
    declared, columns = list(schema(table)), [str(column) for column in frame.columns]
    if columns == declared:
        return
    missing = [column for column in declared if column not in columns]
    extra = [column for column in columns if column not in declared]
    problems = [f"lacks {', '.join(missing)}"] if missing else []
    problems += [f"has {', '.join(extra)} besides"] if extra else []
    raise InputError(
        f"{path}: the table {table} {' and '.join(problems) or 'has its columns out of order'}; "
        f"its columns are {', '.join(declared)}."
    )


def _to_arrow(frame: pd.DataFrame, provenance: Mapping[str, Any]) -> pa.Table:
    table = pa.Table.from_pandas(frame, preserve_index=False)
    text = json.dumps(provenance, ensure_ascii=False).encode()
    return table.replace_schema_metadata({**(table.schema.metadata or {}), METADATA_KEY: text})


def _provenance(path: Path) -> dict[str, Any] | None:
    """Provenance in a Parquet file; None where there is none."""
    try:
        metadata = pq.read_schema(path).metadata or {}
        return json.loads(metadata[METADATA_KEY]) if METADATA_KEY in metadata else None
    except (pa.ArrowInvalid, ValueError) as error:
        raise InputError(f"{path} is not a readable Parquet file: {error}") from error


def _stacked(parts: Sequence[Tables]) -> dict[str, pd.DataFrame]:
    """The tables that any of them has, each below each other."""
    by_table = {
        name: [part.frames()[name] for part in parts if name in part.frames()] for name in TABLES
    }
    return {name: stack(frames) for name, frames in by_table.items() if frames}


def stack(frames: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """Put tables of one kind below each other.

    Args:
        frames: Data frames with the same columns.

    Returns:
        One data frame; categories in order of first appearance.
    """
    columns = {}
    for name in frames[0].columns:
        series = [frame[name] for frame in frames]
        if isinstance(frames[0][name].dtype, pd.CategoricalDtype):
            # a column without rows or flags may have categories of another dtype
            series = [s.cat.set_categories(s.cat.categories.astype("str")) for s in series]
            columns[name] = pd.Series(union_categoricals(series))
        else:
            columns[name] = pd.concat(series, ignore_index=True)
    return pd.DataFrame(columns, copy=False)


__all__ = ["Tables", "empty", "stack"]
