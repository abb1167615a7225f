"""From figures to files: one figure, or all that the tables allow."""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pandas as pd

from loopscope.analysis import curves
from loopscope.analysis.tables import Tables
from loopscope.errors import InputError, unknown_name
from loopscope.figures.cka_maps import cka
from loopscope.figures.layer_distribution import layers, why_no_layers
from loopscope.figures.names import loop_file_names
from loopscope.figures.panels import all_models, choose, loops_of, need
from loopscope.figures.router_maps import routers
from loopscope.figures.spectra import spectrum
from loopscope.figures.style import Figure
from loopscope.figures.summary import fig1
from loopscope.figures.training_curves import training
from loopscope.figures.update_bars import update
from loopscope.output import whole_file, write_text

DPI = 300
SUFFIXES = (".png", ".pdf")
DRAWN = ".figures.json"
"""The list, beside the folder `figures`, of the files in it that `draw_all` wrote."""

_LOSS, _LAYERS = "fig6_training", "fig8_layers"
_STEMS = ("fig3_update", "fig4_cka", "fig4_cka_debiased", "fig5_spectrum", _LOSS, _LAYERS)
_PREFIXES = ("fig1_", "routers_")


@dataclass(frozen=True, kw_only=True)
class NotDrawn:
    """A figure, or one model's part of it, that does not exist, and why."""

    figure: str
    model: str | None
    reason: str

    def __str__(self) -> str:
        return f"{self.figure}{f', {self.model}' if self.model else ''}: {self.reason}"


@dataclass(frozen=True, kw_only=True)
class DrawReport:
    """What `draw_all` wrote and what it could not draw.

    Attributes:
        files: The files, in the order written.
        not_drawn: What does not apply, with the reason.
        removed: Files of an earlier `draw_all` that this one did not draw again.
    """

    files: tuple[Path, ...]
    not_drawn: tuple[NotDrawn, ...]
    removed: tuple[Path, ...] = ()

    def __str__(self) -> str:
        lines = [str(path) for path in self.files]
        lines += [f"not drawn: {item}" for item in self.not_drawn]
        return "\n".join(lines + [f"removed (of an earlier run): {path}" for path in self.removed])


@dataclass(frozen=True, kw_only=True)
class Job:
    """One figure to draw: its file name and how to make it."""

    name: str
    make: Callable[[], Figure]


def save(fig: Figure, path_without_suffix: str | Path) -> tuple[Path, ...]:
    """Write a figure as .png (300 dpi) and .pdf, each through a temporary file and a rename.

    Args:
        fig: The figure.
        path_without_suffix: Folder and name; `.png` and `.pdf` are appended.

    Returns:
        The two files.

    Raises:
        InputError: if the folder cannot be made or written to.
    """
    target = Path(path_without_suffix)
    written = []
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        engine = fig.get_layout_engine()
        for suffix in SUFFIXES:
            path = target.parent / (target.name + suffix)
            _write(fig, path, suffix[1:])
            written.append(path)
            fig.set_layout_engine("none")  # the layout is found by the first; it takes time
        fig.set_layout_engine(engine)
    except OSError as error:
        raise InputError(
            f"cannot write figures to {str(target.parent)!r}: {error.strerror or error}. "
            "Give a folder that exists or can be made, and that you may write to."
        ) from error
    return tuple(written)


def _write(fig: Figure, path: Path, kind: str) -> None:
    # No date: the same table gives the same bytes.
    metadata = {"CreationDate": None} if kind == "pdf" else {}
    with whole_file(path) as part, part.open("wb") as file:
        fig.savefig(file, format=kind, dpi=DPI, metadata=metadata)


def plan(
    tables: Tables, models: Sequence[str] | None = None
) -> tuple[tuple[Job, ...], tuple[NotDrawn, ...]]:
    """List the figures that the tables allow, and what does not apply and why.

    Figures of measured states are listed where there are tables of measures, those of training
    logs where there is the table `training`.

    Args:
        tables: What was measured or read.
        models: Names in the order of the panels; None takes all.

    Returns:
        The figures to draw, and what is not drawn.

    Raises:
        UnknownNameError: if no table holds a model asked for.
    """
    measured = all_models(tables)
    runs = [] if _no_table(tables, "training") else sorted(_models_of(tables, "training"))
    there = list(dict.fromkeys([*measured, *runs]))
    wanted = there if models is None else list(dict.fromkeys(models))
    for model in wanted:
        if model not in there:
            raise unknown_name(
                "model", model, there, hint=f"The tables hold: {', '.join(there) or 'none'}."
            )
    jobs: list[Job] = []
    missing: list[NotDrawn] = []
    if (some := [m for m in wanted if m in measured]) or not runs:
        _plan_measured(tables, some, jobs, missing)
    if some := [m for m in wanted if m in runs]:
        _plan_training(tables, some, jobs, missing)
    return tuple(jobs), tuple(missing)


def _plan_training(
    tables: Tables, wanted: Sequence[str], jobs: list[Job], missing: list[NotDrawn]
) -> None:
    frame = need(tables, "training")
    frame = frame[frame["model"].isin(wanted)]
    told = curves.progress(frame)
    for run in told[~told["validated"]].itertuples():
        text = f"it has no validation loss yet (step {run.step:,} of {run.steps_planned:,})"
        missing.append(NotDrawn(figure=_LOSS, model=str(run.model), reason=text))
    if told["validated"].any():
        jobs.append(Job(name=_LOSS, make=partial(training, tables, wanted)))
    for run in told[~told["finished"]].itertuples():
        text = f"its training is unfinished (step {run.step:,} of {run.steps_planned:,})"
        missing.append(NotDrawn(figure=_LAYERS, model=str(run.model), reason=text))
    if reason := why_no_layers(frame):
        missing.append(NotDrawn(figure=_LAYERS, model=None, reason=reason))
    else:
        jobs.append(Job(name=_LAYERS, make=partial(layers, tables, wanted)))


def _plan_measured(
    tables: Tables, wanted: Sequence[str], jobs: list[Job], missing: list[NotDrawn]
) -> None:
    for name, table, draw in (
        ("fig3_update", "update", update),
        ("fig4_cka", "cka", cka),
        ("fig4_cka_debiased", "cka", partial(cka, estimator="debiased")),
        ("fig5_spectrum", "spectrum", spectrum),
    ):
        reason = _no_table(tables, table)
        if not reason and table == "cka":
            reason = _no_rbf(tables, "debiased" if name.endswith("debiased") else "biased")
        if reason:
            missing.append(NotDrawn(figure=name, model=None, reason=reason))
            continue
        held = _models_of(tables, table)
        for model in wanted:
            if model not in held:
                text = f"the table {table!r} has no rows of it"
                missing.append(NotDrawn(figure=name, model=model, reason=text))
        if some := [m for m in wanted if m in held]:
            jobs.append(Job(name=name, make=partial(draw, tables, some)))
    loops = {model: _loops(tables, model) for model in wanted}
    # what no loop of a model has is said of the model
    routed = {model: loops[model] if _routes(tables, model) else [None] for model in wanted}
    cases = [(m, loop) for found in (loops, routed) for m in wanted for loop in found[m]]
    part = loop_file_names(cases)
    for stem, found, why_not, draw_one in (
        ("fig1", loops, _no_fig1, fig1),
        ("routers", routed, _no_routers, routers),
    ):
        for model, loop in ((m, loop) for m in wanted for loop in found[m]):
            name = f"{stem}_{part[model, loop]}"
            one = () if loop is None else (loop,)
            if reason := why_not(tables, model, *one):
                missing.append(NotDrawn(figure=name, model=model, reason=reason))
            else:
                jobs.append(Job(name=name, make=partial(draw_one, tables, model, *one)))


def draw_all(
    tables: Tables,
    out_dir: str | Path,
    models: Sequence[str] | None = None,
    progress: Callable[[int], object] | None = None,
) -> DrawReport:
    """Draw every figure that the tables allow into `out_dir/figures`.

    Figures that an earlier call wrote there and this one does not draw again are removed at the
    end, since they would contradict the new ones; which those are is kept in
    `out_dir/.figures.json`. No other file is removed.

    Args:
        tables: What was measured.
        out_dir: Where to write; the folder `figures` in it is made.
        models: Names in the order of the panels; None takes all.
        progress: Called with the number of figures done since the last call (`plan` tells how
            many there will be).

    Returns:
        The files written, what was not drawn and why, and what was removed.

    Raises:
        InputError: if a model is unknown or the folder cannot be written to.
    """
    jobs, missing = plan(tables, models)
    record, folder = Path(out_dir) / DRAWN, Path(out_dir) / "figures"
    earlier = _recorded(record)
    files: list[Path] = []
    try:
        for job in jobs:
            files += save(job.make(), folder / job.name)
            if progress is not None:
                progress(1)
    except BaseException:
        with suppress(InputError):  # what stopped the drawing is the error to tell
            _write_record(record, [*earlier, *(f.name for f in files)])
        raise
    removed = _remove_stale(folder, earlier, files)
    if files or earlier:
        _write_record(record, [f.name for f in files])
    return DrawReport(files=tuple(files), not_drawn=missing, removed=removed)


def _recorded(record: Path) -> list[str]:
    try:
        names = json.loads(record.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []  # none yet, or not ours: then nothing is removed
    return [n for n in names if _ours(n)] if isinstance(names, list) else []


def _ours(name: object) -> bool:
    if not isinstance(name, str) or Path(name).name != name:
        return False
    stem, dot, kind = name.rpartition(".")
    return dot + kind in SUFFIXES and (stem in _STEMS or stem.startswith(_PREFIXES))


def _write_record(record: Path, names: Sequence[str]) -> None:
    if names:
        write_text(json.dumps(list(dict.fromkeys(names)), indent=1) + "\n", record)
    else:
        record.unlink(missing_ok=True)


def _remove_stale(folder: Path, earlier: Sequence[str], files: Sequence[Path]) -> tuple[Path, ...]:
    drawn = {f.name.casefold() for f in files}  # some file systems ignore case
    stale = [folder / n for n in earlier if n.casefold() not in drawn]
    removed = []
    for path in stale:
        try:
            path.unlink()
        except FileNotFoundError:
            continue
        except OSError as error:
            raise InputError(
                f"cannot remove {str(path)!r}, a figure of an earlier run that the new tables "
                f"contradict: {error.strerror or error}. Remove it yourself."
            ) from error
        removed.append(path)
    return tuple(removed)


def _no_table(tables: Tables, table: str) -> str:
    frame = getattr(tables, table)
    return "" if frame is not None and len(frame) else f"the table {table!r} was not measured"


def _models_of(tables: Tables, table: str) -> set[str]:
    return {str(m) for m in getattr(tables, table)["model"].unique()}


def _loops(tables: Tables, model: str) -> list[str] | list[None]:
    """The loops that get a figure each; the only one needs no name."""
    loops = loops_of(tables, model)
    return loops if len(loops) > 1 else [None]


def _own(frame: pd.DataFrame, model: str, loop: str | None) -> pd.Series:
    """Which rows are those of a model, or of one of its loops."""
    here = frame["model"].eq(model)
    return here if loop is None else here & frame["loop"].eq(loop)


def _reasons(tables: Tables, model: str, loop: str | None, names: Sequence[str]) -> Iterator[str]:
    for table in names:
        if reason := _no_table(tables, table):
            yield reason
            continue
        frame = getattr(tables, table)
        own = frame[_own(frame, model, loop)]
        if own.empty:
            yield f"the table {table!r} has no rows of it"
        elif len(panels := choose(tables, own, model, table)) > 1:
            yield f"the table {table!r} holds {len(panels)} steps or loops of it"


def _no_fig1(tables: Tables, model: str, loop: str | None = None) -> str:
    if reason := next(_reasons(tables, model, loop, ("update", "cka", "spectrum")), ""):
        return reason
    frame = need(tables, "update")
    blocks = frame["block"][_own(frame, model, loop)].astype(str)
    if not blocks.str.startswith("core").any():
        return "it has no loop (a plain stack; --layout groups its layers into blocks)"
    return _no_rbf(tables, "biased", model)


def _no_rbf(tables: Tables, estimator: str, model: str | None = None) -> str:
    frame = need(tables, "cka")
    here = frame["kernel"].eq("rbf") & frame["estimator"].eq(estimator)
    if model is not None:
        here &= frame["model"].eq(model)
    return "" if here.any() else f"no {estimator} CKA with the RBF kernel was measured"


def _no_routers(tables: Tables, model: str, loop: str | None = None) -> str:
    if tables.routing is not None and not _routes(tables, model, loop):
        what = "it" if loop is None else f"its loop {loop}"
        return f"{what} has no memory slots and no gates"
    return next(_reasons(tables, model, loop, ("routing",)), "")


def _routes(tables: Tables, model: str, loop: str | None = None) -> bool:
    frame = tables.routing
    if frame is None:
        return False
    return bool(frame["kind"][_own(frame, model, loop)].isin(["write", "read", "gate"]).any())
