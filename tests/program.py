"""The command line called in this process."""

import sys

import pytest

from loopscope import cli


def called(monkeypatch, capsys, *words):
    """Call the program; its exit code, stdout, stderr."""
    monkeypatch.setattr(sys, "argv", ["loopscope", *map(str, words)])
    with pytest.raises(SystemExit) as done:
        cli.main()
    return (done.value.code, *capsys.readouterr())


def without_figures(monkeypatch) -> None:
    """Leave out figures and report, which other tests look at."""
    for place in ("commands.figures_command.draw", "commands.results.draw", "report.write_report"):
        monkeypatch.setattr(f"loopscope.{place}", lambda *given, **options: None)
