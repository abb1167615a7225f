"""`loopscope compare`: checkpoints side by side."""

from pathlib import Path

from loopscope.commands.shared import collect, draw, fail, save_tables
from loopscope.options import (
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


def compare(
    models: Models = None,
    out: Out = Path("out"),
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
    """Put checkpoints side by side: figures, and one table of loss and signs of collapse."""
    from loopscope.analysis.collapse import signs
    from loopscope.output import prepare, write_csv
    from loopscope.printing import print_signs

    if not models:
        fail("compare needs checkpoints: loopscope compare A B …; zoo names work too (base mesh).")
    prepare(out)
    collected = collect(
        models,
        measures=("update", "cka", "spectrum", "rank", "routing", "loss"),
        layout=layout, loops=loops, spec=spec, trust_remote_code=trust_remote_code,
        device_map=device_map, data=data, samples=samples, tokens=tokens, device=device,
        dtype=dtype, batch_size=batch_size, seed=seed, center=center, drop_first=drop_first,
        normalize_rows=normalize_rows,
    )  # fmt: skip
    save_tables(collected.tables, out)
    table = signs(collected.tables)
    write_csv(table, out / "tables" / "signs.csv")
    print_signs(table)
    draw(collected.tables, out, None)
