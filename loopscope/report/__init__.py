"""The report of a comparison: one HTML file that needs nothing else. Imports no torch."""

from typing import TYPE_CHECKING

from loopscope.lazy import lazy

if TYPE_CHECKING:
    from loopscope.report.contents import cards as cards
    from loopscope.report.contents import runs as runs
    from loopscope.report.page import render as render
    from loopscope.report.page import verdict_html as verdict_html
    from loopscope.report.page import write_report as write_report
    from loopscope.report.words import word as word

__getattr__, __dir__, __all__ = lazy(__name__)
