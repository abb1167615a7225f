"""Which figures the tables allow, and what does not apply and why."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import pandas as pd

from loopscope.analysis.tables import training_curves as curves
from loopscope.analysis.tables.frames import Tables
from loopscope.errors import unknown_name
from loopscope.figures.cka_maps import cka
from loopscope.figures.figure1 import fig1
from loopscope.figures.layer_distribution import layers, why_no_layers
from loopscope.figures.loss_lines import loss_per_loop
from loopscope.figures.names import loop_file_names
from loopscope.figures.panels import all_models, choose, loops_of, need
from loopscope.figures.rank_lines import rank
from loopscope.figures.router_maps import routers
from loopscope.figures.series_panels import series, signs_of
from loopscope.figures.series_steps import of_steps, steps_of
from loopscope.figures.spectra import spectrum
from loopscope.figures.step_lines import steps
from loopscope.figures.style import Figure
from loopscope.figures.training_lines import training
from loopscope.figures.update_bars import update

_LOSS, _LAYERS = "fig6_training", "fig8_layers"
STEMS = (
    "fig3_update", "fig4_cka", "fig4_cka_debiased", "fig5_spectrum", "rank", "loss_per_loop",
    "steps", "series", _LOSS, _LAYERS,
)  # fmt: skip
PREFIXES = ("fig1_", "routers_")


@dataclass(frozen=True, kw_only=True)
class NotDrawn:
    """A figure, or one model's part of it, that does not exist, and why."""

    figure: str
    model: str | None
    reason: str

    def __str__(self) -> str:
        return f"{self.figure}{f', {self.model}' if self.model else ''}: {self.reason}"


@dataclass(frozen=True, kw_only=True)
class Job:
    """One figure to draw: its file name and how to make it."""

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
        _plan_measured(tables, some, jobs, missing, summary)
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
    tables: Tables,
    wanted: Sequence[str],
    jobs: list[Job],
    missing: list[NotDrawn],
    summary: Mapping[str, Any] | None,
) -> None:
    taken = {model: steps_of(tables, model) for model in wanted}
    for model, own in taken.items():
        if len(own) > 2:
            text = (
                f"{len(own) - 2} of its {len(own)} steps; figures of states show the first and "
                "the last, those of one state the last, the tables hold all"
            )
            missing.append(NotDrawn(figure="steps between", model=model, reason=text))
    runs = [model for model, own in taken.items() if len(own) > 1]
    ends = of_steps(tables, {m: {taken[m][0], taken[m][-1]} for m in runs})
    _plan_panels(ends, wanted, jobs, missing)
    if runs and (reason := _no_series(tables, runs, summary)):
        missing.append(NotDrawn(figure="series", model=None, reason=reason))
    elif runs:
        jobs.append(Job(name="series", make=partial(_series, tables, runs, summary)))
    _plan_single(of_steps(ends, {m: {taken[m][-1]} for m in runs}), wanted, jobs, missing)


def _plan_panels(
    tables: Tables, wanted: Sequence[str], jobs: list[Job], missing: list[NotDrawn]
) -> None:
    for name, table, draw in (
        ("fig3_update", "update", update),
        ("fig4_cka", "cka", cka),
        ("fig4_cka_debiased", "cka", partial(cka, estimator="debiased")),
        ("fig5_spectrum", "spectrum", spectrum),
        ("rank", "rank", rank),
        ("loss_per_loop", "readout", loss_per_loop),
        ("steps", "delta", steps),
    ):
        reason = _no_table(tables, table)
        if reason and getattr(tables, table) is None and table in ("readout", "delta"):
            continue  # a command that draws the paper's figures does not measure them
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


def _plan_single(
    tables: Tables, wanted: Sequence[str], jobs: list[Job], missing: list[NotDrawn]
) -> None:
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


def _no_series(tables: Tables, runs: Sequence[str], summary: Mapping[str, Any] | None) -> str:
    if summary is not None:
        told = {c["model"] for c in summary["checkpoints"] if c["step"] is not None}
        return "" if told & {*runs} else "the summary holds no checkpoint of a series"
    return next((r for name in ("update", "cka", "rank") if (r := _no_table(tables, name))), "")


def _series(tables: Tables, runs: Sequence[str], summary: Mapping[str, Any] | None) -> Figure:
    if summary is not None:
        frame = signs_of(summary)
        entries = [entry for entry in summary["series"] if entry["model"] in runs]
        return series(frame[frame["model"].isin(runs)], entries, summary["measures"])
    from loopscope.analysis.collapse import SIGNS, signs

    frame = signs(tables)
    titles = [{"name": sign.name, "title": sign.title, "unit": sign.unit} for sign in SIGNS]
    return series(frame[frame["model"].isin(runs)], measures=titles)


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
