"""What the commands show in a terminal: progress on stderr, tables on stdout."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loopscope.analysis.tables import BY_NAME

if TYPE_CHECKING:
    import pandas as pd
    from rich.console import Console
    from rich.progress import Progress, TaskID

    from loopscope.analysis.comparisons import Checkpoint, Comparison, Watch
    from loopscope.analysis.tables import Tables
    from loopscope.figures import DrawReport
    from loopscope.models import Branch, Hooked
    from loopscope.training import StepReport


def progress_bar(*, shown: bool = True, period: float = 30.0) -> "Progress":
    """Make a progress display on stderr, with time elapsed and left.

    Args:
        shown: Whether it is shown at all.
        period: Seconds that the time left is estimated from.

    Returns:
        The display; use it as a context.
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


def compare_shown(
    models: list[str], *, write: Callable[["Comparison", Path], None], **options: Any
) -> "Comparison":
    """`compare` with one bar for all checkpoints; then what a reader should know, then `write`.

    Args:
        models: What to compare.
        write: Called with the comparison and the output folder, when the bar is gone.
        **options: As in `compare`.

    Returns:
        What `compare` gives.
    """
    from loopscope.analysis.comparisons import compare
    from loopscope.processes import is_main

    with progress_bar(shown=is_main(), period=3600.0) as bar:

        def finish(comparison: "Comparison", out: Path) -> None:
            bar.stop()
            for note in comparison.notes:
                print(f"note: {note}")
            write(comparison, out)

        return compare(models, progress=_watch(bar), write=finish, **options)


def _watch(bar: "Progress") -> "Watch":
    """Shows a comparison as one bar; what an earlier run did counts as done, not as fast."""
    from loopscope.analysis.comparisons import Watch

    class Shown(Watch):
        task: "TaskID"

        def planned(self, samples: int, done: int) -> None:
            self.task = bar.add_task("measure", total=samples, completed=done)

        def measured(self, checkpoint: "Checkpoint", samples: int, total: int) -> None:
            bar.update(self.task, advance=samples, description=f"measure {checkpoint.label}")

        def late(self, samples: int) -> None:
            self.dropped(samples)

        def dropped(self, samples: int) -> None:
            total = bar.tasks[self.task].total
            assert total is not None
            bar.update(self.task, total=total - samples)

    return Shown()


def training_bars(bar: "Progress") -> Callable[[str, "StepReport"], None]:
    """Show one bar per variant.

    Args:
        bar: The display.

    Returns:
        A callback for `train_variants`.
    """
    tasks: dict[str, TaskID] = {}

    def show(variant: str, report: "StepReport") -> None:
        if variant not in tasks:
            tasks[variant] = bar.add_task(variant, total=report.steps, completed=report.step - 1)
        text = f"{variant}  loss {report.loss:.3f}  {report.tokens_per_s:,.0f} tokens/s"
        bar.update(tasks[variant], completed=report.step, description=text)

    return show


def print_drawn(report: "DrawReport", folder: Path) -> None:
    """Print what was removed, could not be drawn, and was written into a folder.

    Args:
        report: What `figures.draw_all` gave.
        folder: The folder.
    """
    if report.removed:
        print(f"removed, of an earlier run: {', '.join(path.name for path in report.removed)}")
    for item in report.not_drawn:
        print(f"not drawn: {item}")
    pngs = [path for path in report.files if path.suffix == ".png"]
    print(f"{len(pngs)} figures (.png, .pdf) in {folder}:")
    print("  " + "  ".join(path.stem for path in pngs))


def report_shown(summary: Mapping[str, Any], tables: "Tables", path: Path) -> None:
    """`write_report`, with a bar for its figures.

    Args:
        summary: The contents of `summary.json`.
        tables: What was measured.
        path: The file.
    """
    from loopscope.report import write_report

    with progress_bar() as bar:
        task = bar.add_task("report", total=None)
        write_report(
            dict(summary), tables, path, provenance=tables.provenance,
            progress=lambda n: bar.advance(task, n),
        )  # fmt: skip


def print_verdicts(summary: Mapping[str, Any]) -> None:
    """Print verdict and findings on each checkpoint of a summary, evidence and a few numbers.

    A word tells the verdict, colour only repeats it; text wraps at the terminal's width and not at
    all in a pipe. Of a run over training the last step stands for all.

    Args:
        summary: The contents of `summary.json`.
    """
    from rich.text import Text

    from loopscope.report import cards, runs

    console = _console()
    for card in cards(summary):
        _print_card(console, card)
    for run in runs(summary):
        console.print(Text(_run_in_words(run)))
    for failure in summary["failed"]:
        text = f"not measured: {failure['target']}: {failure['reason']}"
        console.print(Text(text, style="red"))


def _console() -> "Console":
    from rich.console import Console

    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=1000)  # a pipe has no width to wrap at
    return console


def _print_card(console: "Console", card: Mapping[str, Any]) -> None:
    """A verdict with its findings; below it, indented, the sentences and numbers behind them."""
    from rich.padding import Padding
    from rich.text import Text

    from loopscope.report import word

    name, look = word(card["verdict"])
    head = Text.assemble((f"{look.shape} {name}", look.ansi))
    if card["also"]:
        head.append(", ").append(card["also"], "yellow")
    head.append("  ").append(card["label"], "bold")
    if card["between"]:
        head.append(f"  between {' and '.join(verdict['word'] for verdict in card['between'])}")
    console.print(head)
    lines = [(f"{finding['name']}: {finding['because']}", "") for finding in card["findings"]]
    lines += [(sentence, "") for sentence in card["evidence"]]
    lines += [(line, "dim") for line in _number_lines(card)]
    for line, style in lines:
        padded = Padding(Text(line, style=style), (0, 0, 0, 2), expand=False)
        console.print(padded, soft_wrap=False)


def _number_lines(card: Mapping[str, Any]) -> list[str]:
    """The loss and what it was held against, the other numbers, the difference to another."""
    numbers = {
        number["name"]: f"{number['title']} {number['mean']} {number['interval']} {number['unit']}"
        for number in card["numbers"]
    }
    yardsticks = [f"{y['short']} {y['mean']} {y['interval']}" for y in card["yardsticks"]]
    loss = [numbers.pop("loss"), *yardsticks] if yardsticks and "loss" in numbers else yardsticks
    parts = (loss, numbers.values(), [card["against"]])
    lines = ["; ".join(text.rstrip() for text in part if text) for part in parts]
    return [line for line in lines if line]


def _run_in_words(run: Mapping[str, Any]) -> str:
    """How many checkpoints a run has, and from which step on it is collapsed."""
    name = run["model"] + (f", loop {run['loop']}" if run["loop"] else "")
    text = f"{name}: {len(run['steps'])} checkpoints"
    text += f", missing {', '.join(run['missing'])}" if run["missing"] else ""
    if onset := run["onset"]:
        text += f"; {onset['badge']['word']} from step {onset['step']} on"
        text += f", not yet at {onset['after']}" if onset["after"] else ""
    return text


def print_inside(tables: "Tables", measure: str) -> None:
    """Print the means over samples of what a command measured that looks inside.

    Args:
        tables: What was measured.
        measure: `lens`, `probe`, `intervene` or `orbit`.
    """
    frame = getattr(tables, BY_NAME[measure].tables[0].name)
    if frame is None or frame.empty:
        return
    sound = frame[frame["flag"].isna() & frame["step"].isna()]
    for (model, loop), rows in sound.groupby(["model", "loop"], observed=True, sort=False):
        several = sound.loc[sound["model"].eq(model), "loop"].nunique() > 1
        title = f"{model}, {loop}" if several else str(model)
        for caption, shown in _SUMMARIES[measure](rows):
            lines = shown.to_string(float_format="{:.3f}".format, na_rep="")
            print(f"\n{title}: {caption}\n{lines}")


def _pivot(
    frame: "pd.DataFrame", index: Sequence[str], columns: str, values: Sequence[str]
) -> "pd.DataFrame":
    """Means over samples, in the table's own order."""
    means = frame.pivot_table(
        index=list(index), columns=columns, values=list(values), observed=True, sort=False
    )
    order = [(value, name) for name in frame[columns].unique() for value in values]
    return means[[pair for pair in order if pair in means.columns]].swaplevel(axis=1)


def _lens_summary(frame: "pd.DataFrame") -> "Iterator[tuple[str, pd.DataFrame]]":
    values = ["loss", "kl_final", "top_final"]
    yield (
        "loss and KL in nats, share of top tokens that are the final ones",
        _pivot(frame, ["state"], "kind", values),
    )


def _probe_summary(frame: "pd.DataFrame") -> "Iterator[tuple[str, pd.DataFrame]]":
    for labels, rows in frame.groupby("labels", observed=True, sort=False):
        yield (
            f"score of a linear probe for {labels}, and its controls",
            _pivot(rows, ["target"], "control", ["score"]),
        )


def _effect_summary(frame: "pd.DataFrame") -> "Iterator[tuple[str, pd.DataFrame]]":
    means = _pivot(frame, ["kind", "what", "how"], "routers", ["loss", "kl"])
    largest = means.iloc[:, 0].abs().sort_values(ascending=False).index[:_MOST]
    heading = "what the loss (nats) changes by"
    yield (
        (heading if len(means) <= _MOST else f"{heading}, the {_MOST} largest"),
        means.loc[largest],
    )


def _orbit_summary(frame: "pd.DataFrame") -> "Iterator[tuple[str, pd.DataFrame]]":
    rows = frame[frame["part"].eq("core") & frame["view"].eq("state")]
    values = ["size", "cosine", "rate", "contraction", "settles", "orbits", "drifts"]
    yield "per iteration", rows.groupby("t")[values].mean()


_MOST = 20  # rows of a summary
_SUMMARIES: "Mapping[str, Callable[[pd.DataFrame], Iterator[tuple[str, pd.DataFrame]]]]" = {
    "lens": _lens_summary, "probe": _probe_summary, "intervene": _effect_summary,
    "orbit": _orbit_summary,
}  # fmt: skip


def print_facts(facts: Mapping[str, Any]) -> None:
    """Print facts about a model, each on a line.

    Args:
        facts: What `describe` gives.
    """
    width = max(map(len, facts))
    for key, value in facts.items():
        print(f"{key:<{width}}  {value}")


def print_structure(model: "Hooked", *, every: bool) -> None:
    """Print what was found out about a model's loop as a tree, and its hook names.

    Args:
        model: A native or wrapped model.
        every: Whether each hook name is printed, or patterns.
    """
    from rich.text import Text
    from rich.tree import Tree

    def grow(tree: Tree, branches: "Sequence[Branch]") -> Tree:
        for branch in branches:
            grow(tree.add(Text(branch.text)), branch.below)
        return tree

    if (root := model.outline()) is not None:
        print()
        _console().print(grow(Tree(Text(root.text)), root.below))
    print()
    for line in model.hook_listing(every=every):
        print(line)


def print_counts(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print parameter counts, a model on each line.

    Args:
        rows: What `model_counts` and the like give.
    """
    shared = any("shared" in row for row in rows)
    head = f"{'model':<22}{'total':>16}{'non-embedding':>16}{'router':>10}"
    print(head + (f"{'shared':>16}" if shared else ""))
    for row in rows:
        router = f"{row['router']:,}" if row["router"] else "–"
        line = f"{row['name']:<22}{row['total']:>16,}{row['non_embedding']:>16,}{router:>10}"
        print(line + (f"{row.get('shared', 0):>16,}" if shared else ""))
