"""What the commands show in a terminal: progress on stderr, tables on stdout."""

from typing import Any

SHOWN = 16
"""Address patterns that are shown before the rest is counted."""


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


def compare_shown(models: list[str], **options: Any) -> Any:
    """`compare` with a bar for each model; then what a reader should know beside the numbers."""
    from loopscope.analysis.compare import compare

    with progress_bar() as bar:
        tasks: dict[str, Any] = {}

        def told(name: str, n: int, total: int) -> None:
            if name not in tasks:
                tasks[name] = bar.add_task(f"measure {name}", total=total)
            bar.advance(tasks[name], n)

        found = compare(models, progress=told, **options)
    for note in found.notes:
        print(f"note: {note}")
    return found


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
    long = max(len(str(name)) for name in table["model"]) > 16
    shown.add_column("", no_wrap=not long, overflow="fold")  # a long name breaks, no number
    for sign in SIGNS:
        shown.add_column(sign.short, justify="right", no_wrap=long)
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


def print_facts(facts: dict[str, Any]) -> None:
    """Facts about a model, one a line."""
    width = max(map(len, facts))
    for key, value in facts.items():
        print(f"{key:<{width}}  {value}")


def print_hooks(model: Any, *, every: bool) -> None:
    """The hook names of a native model: each of them, or patterns with how many they stand for."""
    from loopscope.models.describe import hook_names

    print(
        "\nhook names" + ("" if every else " (v: virtual layer, t: iteration; --hooks lists all)")
    )
    for name in model.hook_dict if every else ():
        print(f"  {name}")
    for name, count in hook_names(model) if not every else ():
        print(f"  {name:<36}{'× ' + count if count != '1' else ''}")
    if model.aliases:
        print("  loop.{t}.layer.{l}.… are aliases of blocks.{v}.…")


def print_map(model: Any, *, every: bool) -> None:
    """The map of a wrapped model as a tree, and its addresses."""
    from rich.console import Console
    from rich.text import Text
    from rich.tree import Tree

    from loopscope.models.wrapped.describe import address_patterns, map_tree

    def grow(tree: Tree, branches: Any) -> Tree:
        for branch in branches:
            grow(tree.add(Text(branch.text)), branch.below)
        return tree

    root = map_tree(model.module, model.map)
    print()
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=1000)  # a pipe has no width to wrap at
    console.print(grow(Tree(Text(root.text)), root.below))
    names = list(model.hook_dict)
    states = [n for n in model.aliases if not n.startswith("blocks.") and ".layer." not in n]
    print(f"\n{len(names)} addresses" + ("" if every else "; t: iteration, --hooks lists all"))
    for name in [*states, *names] if every else ():
        print(f"  {name}")
    patterns = [] if every else list(address_patterns(model.map, [*states, *names]).items())
    for name, n in patterns[:SHOWN]:
        print(f"  {name:<52}{f'× {n}' if n > 1 else ''}".rstrip())
    if len(patterns) > SHOWN:
        print(f"  … and {len(patterns) - SHOWN} more")
    also = ["loop.{t}.layer.{l}.…"] if model.map.loops else []
    print(f"  {' and '.join([*also, 'blocks.{v}.hook_resid_pre|post'])} are aliases")


def print_counts(rows: list[dict[str, Any]]) -> None:
    """Parameter counts, one model a line."""
    shared = any("shared" in row for row in rows)
    head = f"{'model':<22}{'total':>16}{'non-embedding':>16}{'router':>10}"
    print(head + (f"{'shared':>16}" if shared else ""))
    for row in rows:
        router = f"{row['router']:,}" if row["router"] else "–"
        line = f"{row['name']:<22}{row['total']:>16,}{row['non_embedding']:>16,}{router:>10}"
        print(line + (f"{row.get('shared', 0):>16,}" if shared else ""))
