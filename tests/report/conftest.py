"""One summary, its tables and its page for all tests of the report."""

import pytest

from loopscope.report import render
from tests.report import cases


@pytest.fixture(scope="session")
def told():
    """A summary of four models, a series and a failed target."""
    return cases.with_series(cases.summary())


@pytest.fixture(scope="session")
def measured():
    """Its tables."""
    return cases.series_tables()


@pytest.fixture(scope="session")
def page(told, measured) -> str:
    """Its report."""
    return render(told, measured, provenance=cases.provenance(measured))
