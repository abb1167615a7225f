"""`loopscope compare`: checkpoints side by side."""

from pathlib import Path
from typing import Annotated

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
from loopscope.commands.results import collect, end, fail, write_results


def compare(
    models: Models = None,
    out: Out = Path("out"),
    twins: Annotated[
        bool,
        typer.Option("--twins/--no-twins", help="Measure the untrained twins too, as MODEL@init."),
    ] = True,
    more_loops: Annotated[
        int | None,
        typer.Option(
            "--more-loops",
            help="Iterations to try beyond a model's own, where it allows more (default: twice as "
            "many; 0: none).",
        ),
    ] = None,
    fail_on: Annotated[
        str | None,
        typer.Option(
            "--fail-on",
            help="Exit with 1 if a checkpoint has one of these verdicts: collapsed,unstable.",
        ),
    ] = None,
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
    """Put checkpoints side by side: figures, and one table of loss and signs of collapse.

    A quoted pattern ('run/step-*') or a folder of step checkpoints is a series: one model over its
    training. Stopped at any moment, the same command goes on. Several GPUs or processes: accelerate
    launch --multi_gpu --num_processes N -m loopscope.cli compare ...
    """
    from loopscope.analysis.collapse.verdicts import parse_verdicts
    from loopscope.processes import is_main

    if not models:
        fail("compare needs checkpoints: loopscope compare A B …; zoo names work too (base mesh).")
    bad = () if fail_on is None else parse_verdicts(fail_on)
    found = collect(
        models,
        measures=("update", "cka", "spectrum", "rank", "routing", "delta", "readout", "loss"),
        out=out, write=write_results, twins=twins, more_loops=more_loops,
        layout=layout, loops=loops, spec=spec, trust_remote_code=trust_remote_code,
        device_map=device_map, data=data, samples=samples, tokens=tokens, device=device,
        dtype=dtype, batch_size=batch_size, seed=seed, center=center, drop_first=drop_first,
        normalize_rows=normalize_rows,
    )  # fmt: skip
    if not is_main():
        return
    caught = found.with_verdict(bad) if bad else []
    if caught:
        print(f"--fail-on {','.join(bad)}: {'; '.join(caught)}")
    if bad and found.failed:
        names = ", ".join(target for target, _ in found.failed)
        fail(f"--fail-on: not measured, so not judged: {names}; everything else is written.")
    end(found)
    if caught:
        raise typer.Exit(1)
