"""The commands and the Python of docs/your-own-model.md run as they stand there."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[1] / "docs" / "your-own-model.md"
BLOCKS = re.findall(r"(?:<!-- file: (\S+) -->\n)?```(\w+)\n(.*?)```", PAGE.read_text("utf-8"), re.S)


def run(command: list[str], folder: Path) -> str:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        command,
        cwd=folder,
        env=os.environ | {"PATH": path, "MPLBACKEND": "agg", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with the page's files, in which its shell commands have been run."""
    folder = tmp_path_factory.mktemp("stranger")
    for name, _, text in BLOCKS:
        if name:
            (folder / name).write_text(text, "utf-8")
    commands = [text for _, language, text in BLOCKS if language == "bash"]
    told = [run(["bash", "-c", line], folder) for text in commands for line in text.splitlines()]
    (folder / "inspected").write_text(told[0], "utf-8")
    return folder


def test_the_page_has_a_file_commands_and_python():
    assert [name for name, _, _ in BLOCKS if name] == ["looped.py"]
    assert {language for _, language, _ in BLOCKS} >= {"bash", "python", "toml"}


def test_inspect_says_what_the_page_says_it_does(folder):
    told = (folder / "inspected").read_text("utf-8")
    for fact in ("1+2R4+1", "exit_gate", "attribute n_loops", "adapter"):
        assert fact in told


def test_the_figures_are_there(folder):
    for name in ("fig1_make", "fig3_update", "fig4_cka", "fig5_spectrum", "routers_make"):
        assert (folder / "figures" / "figures" / f"{name}.png").stat().st_size > 10_000
    assert (folder / "longer" / "tables" / "signs.csv").is_file()


def test_the_spec_that_was_written_gives_the_same_figures(folder):
    one, two = (folder / n / "figures" / "fig3_update.png" for n in ("figures", "again"))
    assert one.read_bytes() == two.read_bytes()


def test_the_spec_on_the_page_fits_its_model(folder):
    spec = next(text for _, language, text in BLOCKS if language == "toml")
    (folder / "page.toml").write_text(spec, "utf-8")
    told = run(["loopscope", "inspect", "looped.py:make", "--spec", "page.toml"], folder)
    assert "1+2R4+1" in told and "exit_gate" in told


def test_the_python_on_the_page_runs(folder):
    code = next(text for name, _, text in BLOCKS if "from looped import make" in text and not name)
    (folder / "notebook.py").write_text(code, "utf-8")
    run([sys.executable, "notebook.py"], folder)


def test_the_measures_and_thresholds_are_documented_as_they_are() -> None:
    from loopscope.analysis.collapse import SIGNS, THRESHOLDS, VERDICTS

    text = (PAGE.parent / "COLLAPSE.md").read_text(encoding="utf-8")
    for sign in SIGNS:
        row = next(line for line in text.splitlines() if line.startswith(f"| `{sign.name}` |"))
        for part in (sign.title, sign.formula.replace("|", "\\|"), sign.range, sign.meaning):
            assert part in row, sign.name
    for one in THRESHOLDS:
        rows = [line for line in text.splitlines() if line.startswith(f"| `{one.name}` |")]
        assert any(f"| {one.value:g}" in row and one.meaning in row for row in rows), one.name
    assert all(f"**{name}**" in text for name in (*VERDICTS, "uncertain"))
