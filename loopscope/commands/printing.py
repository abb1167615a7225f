"""What the commands show in a terminal: progress on stderr, tables on stdout."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from loopscope.models.hooked import Branch, Hooked


def progress_bar(*, shown: bool = True, period: float = 30.0) -> Any:
    """A rich progress display on stderr, with time elapsed and left.

    Args:
        shown: Whether it is shown at all.
        period: Seconds that the time left is estimated from.
    """
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
        speed_estimate_period=period,
    )


def compare_shown(models: list[str], *, write: Any, **options: Any) -> Any:
    """`compare` with one bar for all checkpoints; then what a reader should know, then `write`.

    Args:
        models: What to compare.
        write: Called with the comparison and the output folder, when the bar is gone.
        **options: As in `compare`.
    """
    from loopscope.analysis.comparisons.work import compare
    from loopscope.processes import is_main

    with progress_bar(shown=is_main(), period=3600.0) as bar:

        def finish(comparison: Any, out: Any) -> None:
            bar.stop()
            for note in comparison.notes:
                print(f"note: {note}")
            write(comparison, out)

        return compare(models, progress=_watch(bar), write=finish, **options)


def _watch(bar: Any) -> Any:
    """Shows a comparison as one bar; what an earlier run did counts as done, not as fast."""
    from loopscope.analysis.comparisons.work import Watch

    class Shown(Watch):
        def __init__(self) -> None:
            self.task: Any = None

        def planned(self, samples: int, done: int) -> None:
            self.task = bar.add_task("measure", total=samples, completed=done)

        def measured(self, checkpoint: Any, samples: int, total: int) -> None:
            bar.update(self.task, advance=samples, description=f"measure {checkpoint.label}")

        def late(self, samples: int) -> None:
            self.dropped(samples)

        def dropped(self, samples: int) -> None:
            bar.update(self.task, total=bar.tasks[self.task].total - samples)

    return Shown()


def training_bars(bar: Any) -> Any:
    """A callback for `train_variants` that shows one bar per variant."""
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


def report_shown(summary: Mapping[str, Any], tables: Any, path: Any) -> None:
    """`write_report`, with a bar for its figures."""
    from loopscope.report import write_report

    with progress_bar() as bar:
        task = bar.add_task("report", total=None)
        write_report(
            dict(summary), tables, path, provenance=tables.provenance,
            progress=lambda n: bar.advance(task, n),
        )  # fmt: skip


def print_verdicts(summary: Mapping[str, Any]) -> None:
    """The verdict on each checkpoint of a summary, its evidence and a few numbers.

    A word tells the verdict, colour only repeats it; text wraps at the terminal's width and not at
    all in a pipe. Of a run over training the last step stands for all.
    """
    from rich.console import Console
    from rich.padding import Padding
    from rich.text import Text

    from loopscope.report.contents import cards, difference_line, runs
    from loopscope.report.words import word

    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=1000)  # a pipe has no width to wrap at

    def told(text: str, style: str = "") -> None:
        line = Text(text, style=style)
        console.print(Padding(line, (0, 0, 0, 2), expand=False), soft_wrap=False)

    for card in cards(summary):
        name, look = word(card["verdict"])
        head = Text.assemble((f"{look.shape} {name}", look.ansi), "  ", (card["label"], "bold"))
        if card["between"]:
            head.append(f"  between {' and '.join(one['word'] for one in card['between'])}")
        console.print(head)
        for sentence in card["evidence"]:
            told(sentence)
        numbers = [
            f"{one['title']} {one['mean']} {one['interval']} {one['unit']}".rstrip()
            for one in card["numbers"]
        ]
        told("; ".join(numbers), "dim")
        if line := difference_line(summary, card["label"]):
            told(line, "dim")
    for run in runs(summary):
        name = run["model"] + (f", loop {run['loop']}" if run["loop"] else "")
        began = run["onset"]
        text = f"{name}: {len(run['steps'])} checkpoints"
        text += f", missing {', '.join(run['missing'])}" if run["missing"] else ""
        if began:
            text += f"; {began['badge']['word']} from step {began['step']} on"
            text += f", not yet at {began['after']}" if began["after"] else ""
        console.print(Text(text))
    for one in summary["failed"]:
        console.print(Text(f"not measured: {one['target']}: {one['reason']}", style="red"))


def print_facts(facts: dict[str, Any]) -> None:
    """Facts about a model, one a line."""
    width = max(map(len, facts))
    for key, value in facts.items():
        print(f"{key:<{width}}  {value}")


def print_structure(model: "Hooked", *, every: bool) -> None:
    """Print what was found out about a model's loop as a tree, and its hook names.

    Args:
        model: A native or wrapped model.
        every: Whether each hook name is printed, or patterns.
    """
    from rich.console import Console
    from rich.text import Text
    from rich.tree import Tree

    def grow(tree: Tree, branches: "list[Branch]") -> Tree:
        for branch in branches:
            grow(tree.add(Text(branch.text)), branch.below)
        return tree

    if (root := model.outline()) is not None:
        print()
        console = Console(highlight=False)
        if not console.is_terminal:
            console = Console(highlight=False, width=1000)  # a pipe has no width to wrap at
        console.print(grow(Tree(Text(root.text)), root.below))
    print()
    for line in model.hook_listing(every=every):
        print(line)


def print_counts(rows: list[dict[str, Any]]) -> None:
    """Parameter counts, one model a line."""
    shared = any("shared" in row for row in rows)
    head = f"{'model':<22}{'total':>16}{'non-embedding':>16}{'router':>10}"
    print(head + (f"{'shared':>16}" if shared else ""))
    for row in rows:
        router = f"{row['router']:,}" if row["router"] else "–"
        line = f"{row['name']:<22}{row['total']:>16,}{row['non_embedding']:>16,}{router:>10}"
        print(line + (f"{row.get('shared', 0):>16,}" if shared else ""))
