"""The package itself: lazy imports, one direction, small files."""

import ast
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest

import loopscope

ROOT = Path(loopscope.__file__).parent


def imported_after(code: str) -> set[str]:
    program = f"{code}\nimport sys\nprint(*sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


@pytest.mark.parametrize(
    ("code", "absent"),
    [
        ("import loopscope", {"torch", "pandas", "matplotlib", "numpy"}),
        ("import loopscope.cli", {"torch", "pandas", "matplotlib", "transformer_lens"}),
        ("import loopscope.figures; loopscope.figures.cka", {"torch", "transformer_lens"}),
        ("import loopscope.analysis.tables.frames", {"torch", "matplotlib"}),
        ("import loopscope.analysis.collapse", {"torch", "matplotlib"}),
        ("import loopscope.analysis.measuring.streaming", {"matplotlib"}),
    ],
)
def test_importing_one_part_does_not_import_what_it_does_not_need(code, absent):
    assert not imported_after(code) & absent


def test_public_names_are_loaded_when_first_used():
    for name in loopscope.__all__:
        assert getattr(loopscope, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'meassure'"):
        _ = loopscope.meassure


def imports_of(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.split(".")[0])
    return found


@pytest.mark.parametrize(
    ("part", "foreign"),
    [("analysis", {"matplotlib"}), ("models", {"matplotlib"}), ("figures", {"torch"})],
)
def test_the_direction_capture_measure_table_figure_is_kept(part, foreign):
    for path in sorted((ROOT / part).rglob("*.py")):
        assert not imports_of(path) & foreign, path


def test_the_version_stands_once():
    project = tomllib.loads((ROOT.parent / "pyproject.toml").read_text("utf-8"))["project"]
    assert "version" not in project and project["dynamic"] == ["version"]
    assert metadata.version("loopscope") == loopscope.__version__
    text = f'__version__ = "{loopscope.__version__}"'
    assert [p.name for p in ROOT.rglob("*.py") if text in p.read_text("utf-8")] == ["_version.py"]
