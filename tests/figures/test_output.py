"""Figures as files, in notebooks, and without side effects."""

import subprocess
import sys
from dataclasses import replace
from io import BytesIO

import jaxtyping
import matplotlib as mpl
import pytest

from loopscope import figures
from loopscope.analysis.comparisons.result import Comparison
from loopscope.analysis.tables.frames import Tables
from loopscope.errors import InputError, UnknownNameError
from loopscope.figures import style
from tests.figures.course_tables import with_courses


def test_figures_import_neither_torch_nor_pyplot():
    code = (
        "import sys, loopscope.figures as f; [getattr(f, n) for n in f.__all__];"
        "print([m for m in ('torch', 'matplotlib.pyplot') if m in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_importing_the_package_of_figures_is_lazy():
    code = "import sys, loopscope.figures; print('matplotlib' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "False"


def test_the_packages_functions_are_listed_and_others_are_an_attribute_error():
    assert set(figures.__all__) <= set(dir(figures))
    with pytest.raises(AttributeError, match="no attribute 'heatmap'"):
        figures.heatmap  # noqa: B018


def test_drawing_leaves_the_global_rcparams_alone(four, tmp_path):
    before = dict(mpl.rcParams)
    fig = figures.fig1(four, "base")
    figures.save(fig, tmp_path / "a")
    fig._repr_png_()
    assert dict(mpl.rcParams) == before


def test_the_look_does_not_depend_on_the_users_rcparams(four):
    with mpl.rc_context({"font.size": 20, "axes.labelsize": 30, "ytick.labelsize": 40}):
        fig = figures.update(four)
        fig._repr_png_()
        assert fig.axes[0].yaxis.label.get_size() == style.NORMAL
        assert {t.get_size() for t in fig.axes[0].get_yticklabels()} == {style.SMALL}


def test_a_notebook_shows_a_figure_once_as_png(four):
    formatters = pytest.importorskip("IPython.core.formatters")
    shown, _ = formatters.DisplayFormatter().format(figures.update(four))
    assert set(shown) == {"text/plain", "image/png"}
    assert shown["image/png"][:8] == b"\x89PNG\r\n\x1a\n"


def test_save_writes_png_and_pdf_with_truetype_fonts_and_keeps_dots_in_the_name(four, tmp_path):
    files = figures.save(figures.rank(four), tmp_path / "new" / "pythia-1.4b")
    assert [f.name for f in files] == ["pythia-1.4b.png", "pythia-1.4b.pdf"]
    png, pdf = (f.read_bytes() for f in files)
    assert int.from_bytes(png[16:20], "big") >= 200 * 3
    assert b"/Type3" not in pdf
    assert b"FontFile2" in pdf
    assert sorted(p.name for p in files[0].parent.iterdir()) == sorted(f.name for f in files)


def test_the_same_table_gives_the_same_bytes(four, tmp_path):
    one = figures.save(figures.rank(four), tmp_path / "one")
    two = figures.save(figures.rank(four), tmp_path / "two")
    assert [f.read_bytes() for f in one] == [f.read_bytes() for f in two]


def test_saving_leaves_the_figure_free_to_lay_itself_out_again(four, tmp_path):
    fig = figures.rank(four)
    engine = fig.get_layout_engine()
    figures.save(fig, tmp_path / "a")
    assert fig.get_layout_engine() is engine


def test_an_unwritable_folder_is_the_users_error(four, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(InputError, match=r"cannot write figures to .*file.*Give a folder"):
        figures.save(figures.rank(four), tmp_path / "file" / "a")


def test_a_write_that_fails_leaves_the_old_file_and_no_other(four, tmp_path, monkeypatch):
    (tmp_path / "a.png").write_bytes(b"old")
    fig = figures.rank(four)

    def fail(file, **options):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(fig, "savefig", fail)
    with pytest.raises(InputError, match="No space left on device"):
        figures.save(fig, tmp_path / "a")
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]
    assert (tmp_path / "a.png").read_bytes() == b"old"


@pytest.fixture
def quick(monkeypatch):
    """Write names instead of figures: what is drawn is tested elsewhere."""
    import loopscope.figures.drawing as output

    def write(fig, path, kind):
        path.write_text(type(fig).__name__)

    monkeypatch.setattr(output, "_write", write)


@pytest.fixture
def unchecked():
    """Types are not checked while the program runs, as at a user's."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def test_a_comparison_of_a_series_is_drawn_as_its_tables_are(make, tmp_path, quick, unchecked):
    runs = [with_courses(make("mesh", B=6, step=step, seed=step), more=1) for step in (0, 100, 200)]
    tables = Tables.join([*runs, with_courses(make("base"))])
    comparison = Comparison(tables=tables, samples={})
    planned, not_planned = figures.plan(comparison)
    jobs, missing = figures.plan(tables)
    assert [job.name for job in planned] == [job.name for job in jobs]
    assert "series" in [job.name for job in planned]
    assert not_planned == missing
    report = figures.draw_all(comparison, tmp_path)
    assert {file.stem for file in report.files} == {job.name for job in jobs}


def test_draw_all_writes_the_contracts_files(four, tmp_path, quick):
    done = []
    report = figures.draw_all(four, tmp_path, progress=done.append)
    names = ["fig3_update", "fig4_cka", "fig4_cka_debiased", "fig5_spectrum", "rank"]
    names += [f"fig1_{m}" for m in ("base", "residual", "anchor", "mesh")]
    names += ["routers_mesh"]
    wanted = [tmp_path / "figures" / f"{n}.{s}" for n in names for s in ("png", "pdf")]
    assert list(report.files) == wanted
    assert all(f.is_file() for f in wanted)
    assert len(list((tmp_path / "figures").iterdir())) == len(wanted)
    assert sum(done) == len(names) == len(figures.plan(four)[0])


def test_draw_all_names_what_does_not_apply_and_why(mixed, tmp_path, quick):
    report = figures.draw_all(mixed, tmp_path, ["plain", "vanilla", "org/deep mesh@init"])
    told = {(n.figure, n.model): n.reason for n in report.not_drawn}
    assert set(told) == {
        ("fig1_plain", "plain"),
        ("routers_plain", "plain"),
        ("routers_vanilla", "vanilla"),
    }
    assert "no loop" in told["fig1_plain", "plain"]
    assert "no memory slots" in told["routers_vanilla", "vanilla"]
    assert "not drawn: routers_plain, plain: it has no memory slots" in str(report)
    stems = [f.stem for f in report.files[::2]]
    assert [s.rpartition("-")[0] for s in stems[-2:]] == [
        "fig1_org-deep-mesh@init",
        "routers_org-deep-mesh@init",
    ]


def test_draw_all_draws_what_the_tables_hold_and_names_the_rest(make, tmp_path, quick):
    tables = make("mesh", B=6)
    tables.spectrum = tables.routing = None
    tables.cka = tables.cka[tables.cka["estimator"].eq("biased")]
    report = figures.draw_all(tables, tmp_path)
    assert {f.stem for f in report.files} == {"fig3_update", "fig4_cka", "rank"}
    told = {n.figure: n.reason for n in report.not_drawn}
    assert told == {
        "fig4_cka_debiased": "no debiased CKA with the RBF kernel was measured",
        "fig5_spectrum": "the table 'spectrum' was not measured",
        "fig1_mesh": "the table 'spectrum' was not measured",
        "routers_mesh": "the table 'routing' was not measured",
    }


def test_draw_all_names_a_model_that_one_table_lacks(four, tmp_path, quick):
    tables = replace(four, update=four.update[~four.update["model"].eq("base")])
    report = figures.draw_all(tables, tmp_path, ["base", "mesh"])
    told = {(n.figure, n.model): n.reason for n in report.not_drawn}
    assert told["fig3_update", "base"] == "the table 'update' has no rows of it"
    assert told["fig1_base", "base"] == "the table 'update' has no rows of it"
    assert "fig3_update" in {f.stem for f in report.files}


def test_draw_all_draws_the_ends_of_a_series_and_tells_which_steps_it_leaves_out(
    series, tmp_path, quick
):
    report = figures.draw_all(series, tmp_path)
    stems = {f.stem for f in report.files}
    assert {"fig3_update", "rank", "series", "fig1_mesh", "routers_mesh"} <= stems
    [told] = report.not_drawn
    assert (told.figure, told.model) == ("steps between", "mesh")
    assert told.reason.startswith("1 of its 3 steps; figures of states show the first and the last")
    jobs = {job.name: job.make for job in figures.plan(series)[0]}
    titles = [ax.get_title() for ax in jobs["fig3_update"]().axes]
    assert titles == ["+mesh, step 0", "+mesh, step 20,000"]
    assert jobs["fig1_mesh"]().get_suptitle() == "+mesh, step 20,000"


def test_a_series_of_a_hundred_steps_gets_no_hundred_panels(make, tmp_path, quick):
    runs = [
        make(name, samples=2, step=step, seed=step)
        for name in ("base", "mesh") for step in range(0, 10_000, 500)
    ]  # fmt: skip
    tables = Tables.join([*runs, make("anchor", samples=2)])
    jobs, missing = figures.plan(tables, ["base", "anchor", "mesh"])
    drawn = {job.name: job.make for job in jobs}
    assert len(drawn["fig3_update"]().axes) == 5
    assert [m.reason.partition(";")[0] for m in missing if m.figure == "steps between"] == [
        "18 of its 20 steps"
    ] * 2
    assert len(jobs) < 15


def test_a_series_without_the_tables_of_the_signs_is_named(series, tmp_path, quick):
    series = replace(series, rank=None)
    told = {n.figure: n.reason for n in figures.draw_all(series, tmp_path).not_drawn}
    assert told["series"] == "the table 'rank' was not measured"


def test_losses_and_steps_are_drawn_where_they_were_measured_and_else_not_mentioned(
    make, tmp_path, quick
):
    tables = Tables.concat([with_courses(make("base"), more=2), make("mesh")])
    report = figures.draw_all(tables, tmp_path)
    assert {"loss_per_loop", "steps"} <= {f.stem for f in report.files}
    told = {(n.figure, n.model): n.reason for n in report.not_drawn}
    assert told["loss_per_loop", "mesh"] == "the table 'readout' has no rows of it"
    told = {n.figure for n in figures.draw_all(make("mesh"), tmp_path).not_drawn}
    assert not told & {"loss_per_loop", "steps"}


def test_draw_all_refuses_an_unknown_model(four, tmp_path):
    with pytest.raises(UnknownNameError, match="unknown model 'vanila'"):
        figures.draw_all(four, tmp_path, ["base", "vanila"])
    assert not list(tmp_path.iterdir())


def names_in(folder) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_an_untrained_twin_keeps_its_name_in_its_files(make, tmp_path, quick):
    figures.draw_all(make("mesh@init", B=6), tmp_path, progress=None)
    assert {"fig1_mesh@init.png", "routers_mesh@init.pdf"} <= names_in(tmp_path / "figures")


def test_draw_all_removes_what_an_earlier_one_drew_and_this_one_does_not(four, tmp_path, quick):
    figures.draw_all(four, tmp_path, ["base", "mesh"])
    folder = tmp_path / "figures"
    mine = ["fig1_mine.png", "notes.txt", "routers_mesh.svg"]
    for name in mine:
        (folder / name).write_text("mine")
    report = figures.draw_all(four, tmp_path, ["base", "anchor"])
    gone = {f"{stem}_mesh.{kind}" for stem in ("fig1", "routers") for kind in ("png", "pdf")}
    assert {path.name for path in report.removed} == gone
    assert "removed (of an earlier run): " in str(report)
    assert names_in(folder) == {path.name for path in report.files} | set(mine)
    assert names_in(tmp_path) == {"figures", ".figures.json"}
    assert figures.draw_all(four, tmp_path, ["base", "anchor"]).removed == ()


def test_draw_all_removes_no_figure_that_it_did_not_record(four, tmp_path, quick):
    folder = tmp_path / "figures"
    folder.mkdir()
    (folder / "fig1_mesh.png").write_text("mine")
    (tmp_path / "fig1_base.png").write_text("mine")
    (folder / "a.png").write_text("mine")
    for record in ("{", "3", '{"a.png": 1}', '["../fig1_base.png", "a.png", 7, "fig1_x/y.png"]'):
        (tmp_path / ".figures.json").write_text(record)
        assert figures.draw_all(four, tmp_path, ["base"]).removed == ()
    assert {"fig1_mesh.png", "a.png"} <= names_in(folder)
    assert (tmp_path / "fig1_base.png").is_file()


def test_a_drawing_that_fails_removes_nothing_and_records_what_it_wrote(
    four, tmp_path, quick, monkeypatch
):
    from loopscope.figures import jobs

    figures.draw_all(four, tmp_path, ["mesh"])

    def fail(tables, model):
        raise RuntimeError("no")

    with monkeypatch.context() as patch:
        patch.setattr(jobs, "routers", fail)
        with pytest.raises(RuntimeError, match="no"):
            figures.draw_all(four, tmp_path, ["base", "anchor", "mesh"])
    folder = tmp_path / "figures"
    assert {"fig1_mesh.png", "fig1_anchor.png"} <= names_in(folder)
    report = figures.draw_all(four, tmp_path, ["base"])
    assert names_in(folder) == {path.name for path in report.files}


def test_a_stale_figure_that_cannot_be_removed_is_named(four, tmp_path, quick):
    figures.draw_all(four, tmp_path, ["mesh"])
    stale = tmp_path / "figures" / "fig1_mesh.png"
    stale.unlink()
    stale.mkdir()
    with pytest.raises(InputError, match=r"cannot remove .*fig1_mesh\.png.*Remove it yourself"):
        figures.draw_all(four, tmp_path, ["base"])


def test_every_figure_draws_without_a_warning(mixed):
    for job in figures.plan(mixed, ["plain", "org/deep mesh@init"])[0]:
        job.make().savefig(BytesIO(), format="png", dpi=40)
