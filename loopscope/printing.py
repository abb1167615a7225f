"""What the commands show in a terminal: progress on stderr, tables on stdout."""

from typing import Any


def progress_bar(*, shown: bool = True) -> Any:
    """A rich progress display on stderr, with time elapsed and left."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        disable=not shown,
    )


def training_bars(bar: Any) -> Any:
    """A callback for `run_training` that shows one bar per variant."""
    tasks: dict[str, Any] = {}

    def told(variant: str, report: Any) -> None:
        if variant not in tasks:
            tasks[variant] = bar.add_task(variant, total=report.steps, completed=report.step - 1)
        text = f"{variant}  loss {report.loss:.3f}  {report.tokens_per_s:,.0f} tokens/s"
        bar.update(tasks[variant], completed=report.step, description=text)

    return told


def print_drawn(report: Any, folder: Any) -> None:
    """What `figures.draw_all` removed, could not draw, and wrote into a folder."""
    if report.removed:
        print(f"removed, of an earlier run: {', '.join(path.name for path in report.removed)}")
    for item in report.not_drawn:
        print(f"not drawn: {item}")
    pngs = [path for path in report.files if path.suffix == ".png"]
    print(f"{len(pngs)} figures (.png, .pdf) in {folder}:")
    print("  " + "  ".join(path.stem for path in pngs))


def print_signs(table: Any) -> None:
    """The table of `collapse.signs`: a row per checkpoint and loop, then what the columns mean."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    from loopscope.analysis.collapse import SIGNS

    shown = Table(
        title="mean ± standard deviation over samples", title_justify="left", box=SIMPLE_HEAD
    )
    shown.add_column("", no_wrap=True)
    for sign in SIGNS:
        shown.add_column(sign.short, justify="right")
    for model, rows in table.groupby("model", observed=True):
        cells = []
        for sign in SIGNS:
            row = rows[rows["sign"].eq(sign.name)].iloc[0]
            out = f" ({row['n_flagged']} out)" if row["n_flagged"] else ""
            digits = 1 if sign.name in ("erank_0", "erank_K") else 3
            spread = f" ±{row['std']:.{digits}f}" if row["n"] > 1 else ""
            sound = f"{row['mean']:.{digits}f}{spread}{out}"
            cells.append(sound if row["n"] else f"–{out if sign.name == 'loss' else ''}")
        shown.add_row(str(model), *cells)
    Console().print(shown)
    for sign in SIGNS:
        print(f"  {sign.short:<14}{sign.meaning}")
