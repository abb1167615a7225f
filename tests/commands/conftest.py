"""The program as a user calls it."""

import pytest

from tests.program import called, without_figures


@pytest.fixture
def run(monkeypatch, capsys):
    """Call the program; returns exit code, stdout, stderr."""

    def call(*words, draw=True):
        if not draw:
            without_figures(monkeypatch)
        return called(monkeypatch, capsys, *words)

    return call
