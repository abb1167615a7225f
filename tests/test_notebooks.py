"""The notebook runs from top to bottom and shows figures."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"


SHOWN = {"quickstart": (3, 7), "look_inside": (3, 5)}
"""Notebook → figures, and the fewest tables."""


@pytest.mark.parametrize("path", sorted(NOTEBOOKS.glob("*.ipynb")), ids=lambda p: p.stem)
@pytest.mark.filterwarnings("ignore")  # of the Jupyter client, not ours
def test_notebook_runs_and_shows_its_figures(path):
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        cell.get("outputs", []).clear()
    NotebookClient(notebook, timeout=300, kernel_name="python3").execute()
    shown = [out for cell in notebook.cells for out in cell.get("outputs", [])]
    figures, tables = SHOWN[path.stem]
    assert sum("image/png" in out.get("data", {}) for out in shown) == figures
    assert sum("text/html" in out.get("data", {}) for out in shown) >= tables
    assert not [out for out in shown if out.get("name") == "stderr"]
