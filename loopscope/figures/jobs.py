"""Which figures the tables allow, and what does not apply and why."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import pandas as pd

from loopscope.analysis.tables import BY_NAME, INSIDE_MEASURES, Tables
from loopscope.analysis.tables import training_curves as curves
from loopscope.errors import unknown_name
from loopscope.figures.cka_maps import cka, why_no_rbf
from loopscope.figures.effect_bars import effect
from loopscope.figures.exit_lines import early_exit
from loopscope.figures.figure1 import fig1
from loopscope.figures.head_drifts import attention_drift
from loopscope.figures.layer_distribution import layers, why_no_layers
from loopscope.figures.lens_lines import lens
from loopscope.figures.loss_lines import loss_per_loop
from loopscope.figures.mass_effect_points import mass_effect, why_no_mass_effect
from loopscope.figures.names import file_names, loop_file_names
from loopscope.figures.orbit_lines import orbit
from loopscope.figures.orbit_paths import orbit_path
from loopscope.figures.panels import all_models, choose, loops_of, need
from loopscope.figures.probe_lines import probe
from loopscope.figures.rank_lines import rank
from loopscope.figures.router_maps import routers
from loopscope.figures.series_panels import series, signs_of
from loopscope.figures.series_steps import of_steps, steps_of
from loopscope.figures.spectra import spectrum
from loopscope.figures.step_lines import steps
from loopscope.figures.style import Figure
from loopscope.figures.token_grid import lens_tokens
from loopscope.figures.training_lines import training
from loopscope.figures.update_bars import update
from loopscope.names import block_number


@dataclass(frozen=True, kw_only=True)
class PanelFigure:
    """A figure of one table, with a panel or a line for each model.

    Attributes:
        stem: Its file name.
        table: The table that it shows.
        draw: Makes it from the tables and the names of the models.
        optional: Whether nothing is said where the table was not measured: the command that
            draws the paper's figures does not measure it.
        why_not: Says why a table that has rows does not allow it, or nothing.
    """

    stem: str
    table: str
    draw: Callable[[Tables, Sequence[str]], Figure]
    optional: bool = False
    why_not: Callable[[pd.DataFrame], str] = lambda frame: ""


# A new measure's figure: a file that draws it, a record here, its name in `__init__.py`.
PANEL_FIGURES = (
    PanelFigure(stem="fig3_update", table="update", draw=update),
    PanelFigure(
        stem="fig4_cka", table="cka", draw=cka, why_not=partial(why_no_rbf, estimator="biased")
    ),
    PanelFigure(
        stem="fig4_cka_debiased", table="cka", draw=partial(cka, estimator="debiased"),
        why_not=partial(why_no_rbf, estimator="debiased"),
    ),
    PanelFigure(stem="fig5_spectrum", table="spectrum", draw=spectrum),
    PanelFigure(stem="rank", table="rank", draw=rank),
    PanelFigure(stem="loss_per_loop", table="readout", draw=loss_per_loop, optional=True),
    PanelFigure(stem="steps", table="delta", draw=steps, optional=True),
    PanelFigure(stem="lens", table="lens", draw=lens, optional=True),
    PanelFigure(stem="orbit", table="orbit", draw=orbit, optional=True),
    PanelFigure(
        stem="orbit_direction", table="orbit", draw=partial(orbit, view="direction"), optional=True
    ),
    PanelFigure(stem="early_exit", table="early_exit", draw=early_exit, optional=True),
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class EachFigure:
    """Figures of what looks inside, one for each model (or each set of labels).

    Attributes:
        prefix: How its file names begin.
        table: The table that it shows.
        draw: Makes it from the tables and the model's name; with `by` another column, from the
            tables, the names of the models and one value of that column.
        by: The column with a figure for each of its values.
        why_not: Says why the rows of a model do not allow it, or nothing.
    """

    prefix: str
    table: str
    draw: Callable[..., Figure]
    by: str = "model"
    why_not: Callable[[pd.DataFrame], str] = lambda frame: ""


EACH_FIGURES: tuple[EachFigure, ...] = (
    EachFigure(prefix="effect_", table="effect", draw=effect),
    EachFigure(prefix="mass_effect_", table="effect", draw=mass_effect, why_not=why_no_mass_effect),
    EachFigure(prefix="lens_tokens_", table="lens_tokens", draw=lens_tokens),
    EachFigure(prefix="probe_", table="probe", draw=probe, by="labels"),
    EachFigure(prefix="orbit_path_", table="orbit_path", draw=orbit_path),
    EachFigure(prefix="attention_drift_", table="attention_drift", draw=attention_drift),
)

_LOSS, _LAYERS, _SERIES = "fig6_training", "fig8_layers", "series"
STEMS = (*(figure.stem for figure in PANEL_FIGURES), _SERIES, _LOSS, _LAYERS)
"""File names of the figures that show all models."""

_FIG1, _ROUTERS = "fig1_", "routers_"
PREFIXES = (_FIG1, _ROUTERS, *(figure.prefix for figure in EACH_FIGURES))
"""How the file names of the figures of one model begin."""


@dataclass(frozen=True, kw_only=True)
class NotDrawn:
    """A figure, or one model's part of it, that does not exist, and why.

    Attributes:
        figure: File name of the figure.
        model: Whose part of it; None where it is all of it.
        reason: Why it does not exist.
    """

    figure: str
    model: str | None
    reason: str

    def __str__(self) -> str:
        return f"{self.figure}{f', {self.model}' if self.model else ''}: {self.reason}"


@dataclass(frozen=True, kw_only=True)
class Job:
    """One figure to draw.

    Attributes:
        name: Its file name, without an ending.
        make: Draws it.
    """

    name: str
    make: Callable[[], Figure]


def plan(
    tables: Tables,
    models: Sequence[str] | None = None,
    summary: Mapping[str, Any] | None = None,
) -> tuple[tuple[Job, ...], tuple[NotDrawn, ...]]:
    """List the figures that the tables allow, and what does not apply and why.

    Figures of measured states are listed where there are tables of measures, those of training
    logs where there is the table `training`. Of a model at several steps of its training, figures
    of states show the first and the last, those of one state the last; `series` shows all.

    Args:
        tables: What was measured or read.
        models: Names in the order of the panels; None takes all.
        summary: The contents of `summary.json`, for signs that need not be computed again and for
            where a verdict sets in.

    Returns:
        The figures to draw, and what is not drawn.

    Raises:
        UnknownNameError: if no table holds a model asked for.
    """
    measured = all_models(tables)
    runs = [] if _why_no_table(tables, "training") else sorted(_models_of(tables, "training"))
    held = list(dict.fromkeys([*measured, *runs]))
    models = held if models is None else list(dict.fromkeys(models))
    for model in models:
        if model not in held:
            raise unknown_name(
                "model", model, held, hint=f"The tables hold: {', '.join(held) or 'none'}."
            )
    jobs: list[Job] = []
    missing: list[NotDrawn] = []
    if (shown := [m for m in models if m in measured]) or not runs:
        _plan_measured(tables, shown, jobs, missing, summary)
    if shown := [m for m in models if m in runs]:
        _plan_training(tables, shown, jobs, missing)
    return tuple(jobs), tuple(missing)


def _plan_training(
    tables: Tables, models: Sequence[str], jobs: list[Job], missing: list[NotDrawn]
) -> None:
    frame = need(tables, "training")
    frame = frame[frame["model"].isin(models)]
    progress = curves.progress(frame)
    for run in progress[~progress["validated"]].itertuples():
        text = f"it has no validation loss yet (step {run.step:,} of {run.steps_planned:,})"
        missing.append(NotDrawn(figure=_LOSS, model=str(run.model), reason=text))
    if progress["validated"].any():
        jobs.append(Job(name=_LOSS, make=partial(training, tables, models)))
    for run in progress[~progress["finished"]].itertuples():
        text = f"its training is unfinished (step {run.step:,} of {run.steps_planned:,})"
        missing.append(NotDrawn(figure=_LAYERS, model=str(run.model), reason=text))
    if reason := why_no_layers(frame):
        missing.append(NotDrawn(figure=_LAYERS, model=None, reason=reason))
    else:
        jobs.append(Job(name=_LAYERS, make=partial(layers, tables, models)))


def _plan_measured(
    tables: Tables,
    models: Sequence[str],
    jobs: list[Job],
    missing: list[NotDrawn],
    summary: Mapping[str, Any] | None,
) -> None:
    series_steps = {model: steps_of(tables, model) for model in models}
    for model, taken in series_steps.items():
        if len(taken) > 2:
            text = (
                f"{len(taken) - 2} of its {len(taken)} steps; figures of states show the first and "
                "the last, those of one state the last, the tables hold all"
            )
            missing.append(NotDrawn(figure="steps between", model=model, reason=text))
    runs = {model: taken for model, taken in series_steps.items() if len(taken) > 1}
    ends = of_steps(tables, {model: {taken[0], taken[-1]} for model, taken in runs.items()})
    inside_alone = _inside_alone(tables)
    _plan_panels(ends, models, jobs, missing, quiet=inside_alone)
    if runs and not inside_alone:
        _plan_series(tables, list(runs), jobs, missing, summary)
    last = of_steps(ends, {model: {taken[-1]} for model, taken in runs.items()})
    if not inside_alone:
        _plan_single(last, models, jobs, missing)
    _plan_each(last, models, jobs, missing)


def _inside_alone(tables: Tables) -> bool:
    """Whether nothing was measured but what looks inside: then no other figure is missed."""
    inside = {table.name for name in INSIDE_MEASURES for table in BY_NAME[name].tables}
    measured = tables.frames().keys() - {"training"}
    return bool(measured) and measured <= inside


def _plan_panels(
    tables: Tables,
    models: Sequence[str],
    jobs: list[Job],
    missing: list[NotDrawn],
    *,
    quiet: bool,
) -> None:
    for figure in PANEL_FIGURES:
        if (figure.optional or quiet) and getattr(tables, figure.table) is None:
            continue
        reason = _why_no_table(tables, figure.table)
        if reason := reason or figure.why_not(getattr(tables, figure.table)):
            missing.append(NotDrawn(figure=figure.stem, model=None, reason=reason))
            continue
        held = _models_of(tables, figure.table)
        for model in models:
            if model not in held:
                text = f"the table {figure.table!r} has no rows of it"
                missing.append(NotDrawn(figure=figure.stem, model=model, reason=text))
        if shown := [m for m in models if m in held]:
            jobs.append(Job(name=figure.stem, make=partial(figure.draw, tables, shown)))


def _plan_each(
    tables: Tables, models: Sequence[str], jobs: list[Job], missing: list[NotDrawn]
) -> None:
    for figure in EACH_FIGURES:
        frame = getattr(tables, figure.table)
        if frame is None:
            continue
        held = [model for model in models if frame["model"].eq(model).any()]
        for model in [m for m in models if m not in held]:
            text = f"the table {figure.table!r} has no rows of it"
            missing.append(NotDrawn(figure=figure.prefix + model, model=model, reason=text))
        if figure.by != "model":
            rows = frame[frame["model"].isin(held)]
            for name in rows[figure.by].unique():
                make = partial(figure.draw, tables, held, str(name))
                stem = figure.prefix + file_names([str(name)])[str(name)]
                jobs.append(Job(name=stem, make=make))
            continue
        names = file_names(held)
        for model in held:
            name = figure.prefix + names[model]
            if reason := figure.why_not(frame[frame["model"].eq(model)]):
                missing.append(NotDrawn(figure=name, model=model, reason=reason))
            else:
                jobs.append(Job(name=name, make=partial(figure.draw, tables, model)))


def _plan_series(
    tables: Tables,
    runs: Sequence[str],
    jobs: list[Job],
    missing: list[NotDrawn],
    summary: Mapping[str, Any] | None,
) -> None:
    if reason := _why_no_series(tables, runs, summary):
        missing.append(NotDrawn(figure=_SERIES, model=None, reason=reason))
    else:
        jobs.append(Job(name=_SERIES, make=partial(_series, tables, runs, summary)))


def _plan_single(
    tables: Tables, models: Sequence[str], jobs: list[Job], missing: list[NotDrawn]
) -> None:
    loops = {model: _loops(tables, model) for model in models}
    # what no loop of a model has is said of the model
    routed = {model: loops[model] if _routes(tables, model) else [None] for model in models}
    cases = [(m, loop) for each in (loops, routed) for m in models for loop in each[m]]
    names = loop_file_names(cases)
    for prefix, loops_drawn, why_not, draw in (
        (_FIG1, loops, _why_no_fig1, fig1),
        (_ROUTERS, routed, _why_no_routers, routers),
    ):
        for model, loop in ((m, loop) for m in models for loop in loops_drawn[m]):
            name = prefix + names[model, loop]
            place = () if loop is None else (loop,)
            if reason := why_not(tables, model, *place):
                missing.append(NotDrawn(figure=name, model=model, reason=reason))
            else:
                jobs.append(Job(name=name, make=partial(draw, tables, model, *place)))


def _why_no_series(tables: Tables, runs: Sequence[str], summary: Mapping[str, Any] | None) -> str:
    if summary is not None:
        models = {c["model"] for c in summary["checkpoints"] if c["step"] is not None}
        return "" if models & {*runs} else "the summary holds no checkpoint of a series"
    reasons = (_why_no_table(tables, name) for name in ("update", "cka", "rank"))
    return next(filter(None, reasons), "")


def _series(tables: Tables, runs: Sequence[str], summary: Mapping[str, Any] | None) -> Figure:
    if summary is not None:
        frame = signs_of(summary)
        entries = [entry for entry in summary["series"] if entry["model"] in runs]
        return series(frame[frame["model"].isin(runs)], entries, summary["measures"])
    from loopscope.analysis.collapse import SIGNS, signs

    frame = signs(tables)
    titles = [{"name": sign.name, "title": sign.title, "unit": sign.unit} for sign in SIGNS]
    return series(frame[frame["model"].isin(runs)], measures=titles)


def _why_no_table(tables: Tables, table: str) -> str:
    frame = getattr(tables, table)
    return "" if frame is not None and len(frame) else f"the table {table!r} was not measured"


def _models_of(tables: Tables, table: str) -> set[str]:
    return {str(m) for m in getattr(tables, table)["model"].unique()}


def _loops(tables: Tables, model: str) -> list[str] | list[None]:
    """The loops that get a figure each; the only one needs no name."""
    loops = loops_of(tables, model)
    return loops if len(loops) > 1 else [None]


def _belongs(frame: pd.DataFrame, model: str, loop: str | None) -> pd.Series:
    """Which rows are those of a model, or of one of its loops."""
    belongs = frame["model"].eq(model)
    return belongs if loop is None else belongs & frame["loop"].eq(loop)


def _reasons(tables: Tables, model: str, loop: str | None, names: Sequence[str]) -> Iterator[str]:
    for table in names:
        if reason := _why_no_table(tables, table):
            yield reason
            continue
        frame = getattr(tables, table)
        rows = frame[_belongs(frame, model, loop)]
        if rows.empty:
            yield f"the table {table!r} has no rows of it"
        elif len(panels := choose(tables, rows, model, table)) > 1:
            yield f"the table {table!r} holds {len(panels)} steps or loops of it"


def _why_no_fig1(tables: Tables, model: str, loop: str | None = None) -> str:
    if reason := next(_reasons(tables, model, loop, ("update", "cka", "spectrum")), ""):
        return reason
    frame = need(tables, "update")
    blocks = frame["block"][_belongs(frame, model, loop)].astype(str)
    if all(block_number(block) is None for block in blocks):
        return "it has no loop (a plain stack; --layout groups its layers into blocks)"
    pairs = need(tables, "cka")
    return why_no_rbf(pairs[pairs["model"].eq(model)], "biased")


def _why_no_routers(tables: Tables, model: str, loop: str | None = None) -> str:
    if tables.routing is not None and not _routes(tables, model, loop):
        what = "it" if loop is None else f"its loop {loop}"
        return f"{what} has no memory slots and no gates"
    return next(_reasons(tables, model, loop, ("routing",)), "")


def _routes(tables: Tables, model: str, loop: str | None = None) -> bool:
    frame = tables.routing
    if frame is None:
        return False
    kinds = frame["kind"][_belongs(frame, model, loop)]
    return bool(kinds.isin(["write", "read", "gate"]).any())
