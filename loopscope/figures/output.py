"""From figures to files: one figure, or all that the tables allow."""

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from loopscope.analysis.tables import Tables
from loopscope.errors import InputError, unknown_name
from loopscope.figures.cka_maps import cka
from loopscope.figures.names import file_names
from loopscope.figures.panels import all_models, choose, need
from loopscope.figures.router_maps import routers
from loopscope.figures.spectra import spectrum
from loopscope.figures.style import Figure
from loopscope.figures.summary import fig1
from loopscope.figures.update_bars import update

DPI = 300
SUFFIXES = (".png", ".pdf")


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
    """

    files: tuple[Path, ...]
    not_drawn: tuple[NotDrawn, ...]

    def __str__(self) -> str:
        lines = [str(path) for path in self.files]
        return "\n".join(lines + [f"not drawn: {item}" for item in self.not_drawn])


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
    part = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with part.open("wb") as file:
            fig.savefig(file, format=kind, dpi=DPI, metadata=metadata)
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def plan(
    tables: Tables, models: Sequence[str] | None = None
) -> tuple[tuple[Job, ...], tuple[NotDrawn, ...]]:
    """List the figures that the tables allow, and what does not apply and why.

    Args:
        tables: What was measured.
        models: Names in the order of the panels; None takes all.

    Returns:
        The figures to draw, and what is not drawn.

    Raises:
        UnknownNameError: if no table holds a model asked for.
    """
    there = all_models(tables)
    wanted = there if models is None else list(dict.fromkeys(models))
    for model in wanted:
        if model not in there:
            raise unknown_name(
                "model", model, there, hint=f"The tables hold: {', '.join(there) or 'none'}."
            )
    jobs: list[Job] = []
    missing: list[NotDrawn] = []
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
    part = file_names(wanted)
    for stem, why_not, draw_one in (
        ("fig1", _no_fig1, fig1),
        ("routers", _no_routers, routers),
    ):
        for model in wanted:
            name = f"{stem}_{part[model]}"
            if reason := why_not(tables, model):
                missing.append(NotDrawn(figure=name, model=model, reason=reason))
            else:
                jobs.append(Job(name=name, make=partial(draw_one, tables, model)))
    return tuple(jobs), tuple(missing)


def draw_all(
    tables: Tables,
    out_dir: str | Path,
    models: Sequence[str] | None = None,
    progress: Callable[[int], object] | None = None,
) -> DrawReport:
    """Draw every figure that the tables allow into `out_dir/figures`.

    Args:
        tables: What was measured.
        out_dir: Where to write; the folder `figures` in it is made.
        models: Names in the order of the panels; None takes all.
        progress: Called with the number of figures done since the last call (`plan` tells how
            many there will be).

    Returns:
        The files written, and what was not drawn and why.

    Raises:
        InputError: if a model is unknown or the folder cannot be written to.
    """
    jobs, missing = plan(tables, models)
    files: list[Path] = []
    for job in jobs:
        files += save(job.make(), Path(out_dir) / "figures" / job.name)
        if progress is not None:
            progress(1)
    return DrawReport(files=tuple(files), not_drawn=missing)


def _no_table(tables: Tables, table: str) -> str:
    frame = getattr(tables, table)
    return "" if frame is not None and len(frame) else f"the table {table!r} was not measured"


def _models_of(tables: Tables, table: str) -> set[str]:
    return {str(m) for m in getattr(tables, table)["model"].unique()}


def _reasons(tables: Tables, model: str, names: Sequence[str]) -> Iterator[str]:
    for table in names:
        if reason := _no_table(tables, table):
            yield reason
        elif model not in _models_of(tables, table):
            yield f"the table {table!r} has no rows of it"
        elif len(panels := choose(getattr(tables, table), model, table)) > 1:
            yield f"the table {table!r} holds {len(panels)} steps or loops of it"


def _no_fig1(tables: Tables, model: str) -> str:
    if reason := next(_reasons(tables, model, ("update", "cka", "spectrum")), ""):
        return reason
    frame = need(tables, "update")
    blocks = frame["block"][frame["model"].eq(model)].astype(str)
    if not blocks.str.startswith("core").any():
        return "it has no loop (a plain stack; --layout groups its layers into blocks)"
    return _no_rbf(tables, "biased", model)


def _no_rbf(tables: Tables, estimator: str, model: str | None = None) -> str:
    frame = need(tables, "cka")
    here = frame["kernel"].eq("rbf") & frame["estimator"].eq(estimator)
    if model is not None:
        here &= frame["model"].eq(model)
    return "" if here.any() else f"no {estimator} CKA with the RBF kernel was measured"


def _no_routers(tables: Tables, model: str) -> str:
    frame = tables.routing
    if frame is not None:
        own = frame["kind"][frame["model"].eq(model)]
        if not own.isin(["write", "read"]).any():
            return "it has no memory slots"
    return next(_reasons(tables, model, ("routing",)), "")
