"""`loopscope figures`: the paper's diagnostic figures."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from loopscope.commands.options import (
    BatchSize,
    Center,
    Data,
    Device,
    DeviceMap,
    DropFirst,
    Dtype,
    LayoutOption,
    Loops,
    Models,
    NormalizeRows,
    Out,
    Samples,
    Seed,
    SpecFile,
    Tokens,
    Trust,
)
from loopscope.commands.results import collect, draw, end, fail, save_tables

if TYPE_CHECKING:
    from loopscope.analysis.comparisons.result import Comparison

PAPER_PANELS = ["base", "residual", "anchor", "mesh"]


def figures(
    models: Models = None,
    out: Out = Path("out"),
    from_tables: Annotated[
        Path | None,
        typer.Option("--from-tables", help="Redraw from the tables in this folder; no model runs."),
    ] = None,
    paper_extra: Annotated[
        bool, typer.Option("--paper-extra", help="Draw Figs. 6 and 8 alone, from training logs.")
    ] = False,
    layout: LayoutOption = None,
    loops: Loops = None,
    spec: SpecFile = None,
    trust_remote_code: Trust = False,
    device_map: DeviceMap = None,
    data: Data = None,
    samples: Samples = 500,
    tokens: Tokens = 256,
    device: Device = None,
    dtype: Dtype = None,
    batch_size: BatchSize = 16,
    seed: Seed = 0,
    center: Center = False,
    drop_first: DropFirst = 0,
    normalize_rows: NormalizeRows = False,
) -> None:
    """Draw the MeSH paper's diagnostic figures (1, 3, 4, 5) and router maps.

    Without models: the paper's four panels (base, residual, anchor, mesh) from the shipped zoo;
    with --paper-extra its training logs. MODEL may then be a folder that is searched for runs.
    """
    from loopscope.files import claimed

    if from_tables is not None or paper_extra:
        from loopscope.analysis.tables.frames import Tables
        from loopscope.training.runs import read_runs

        unused = {
            "--layout": layout, "--data": data, "--loops": loops, "--spec": spec,
            "--paper-extra": from_tables and paper_extra,
        }  # fmt: skip
        if given := [name for name, value in unused.items() if value]:
            fail(f"tables or training logs are read, no model runs; leave out {', '.join(given)}.")
        if from_tables is None:
            tables, models = read_runs(models or ()), None
            print("".join(f"note: {note}\n" for note in tables.provenance["notes"]), end="")
        else:
            inner = from_tables / "tables"
            tables = Tables.load(inner if inner.is_dir() else from_tables)
        with claimed(out):
            save_tables(tables, out)
            draw(tables, out, models or None)
        return

    def write(found: "Comparison", out: Path) -> None:
        save_tables(found.tables, out)
        draw(found.tables, out, None)

    found = collect(
        models or PAPER_PANELS,
        measures=("update", "cka", "spectrum", "rank", "routing"),
        out=out, write=write, twins=False, more_loops=0, series=False,
        layout=layout, loops=loops, spec=spec, trust_remote_code=trust_remote_code,
        device_map=device_map, data=data, samples=samples, tokens=tokens, device=device,
        dtype=dtype, batch_size=batch_size, seed=seed, center=center, drop_first=drop_first,
        normalize_rows=normalize_rows,
    )  # fmt: skip
    end(found)
