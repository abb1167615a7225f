"""The report of a comparison: one HTML file that needs nothing else. Imports no torch."""

from typing import TYPE_CHECKING

from loopscope.lazy import lazy

if TYPE_CHECKING:
    from loopscope.report.page import render, verdict_html, write_report

_HOMES = {"render": "page", "verdict_html": "page", "write_report": "page"}

__all__ = ["render", "verdict_html", "write_report"]

__getattr__, __dir__ = lazy(__name__, _HOMES)
