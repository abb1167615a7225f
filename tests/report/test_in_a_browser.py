"""The report in headless Chromium: complete, silent, and asking nobody for anything."""

import pytest

from tests.report.cases import HOSTILE
from tests.report.chromium import browser, chromium

PROGRAM = chromium()
pytestmark = pytest.mark.skipif(
    PROGRAM is None, reason="needs Chromium (Debian: apt-get install chromium)"
)

OVERFLOW = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
OPEN_ALL = "document.querySelectorAll('details').forEach(d => { d.open = true; })"
WIDTHS = [1200, 400]


@pytest.fixture(scope="module")
def tab(tmp_path_factory):
    with browser(PROGRAM, tmp_path_factory.mktemp("profile")) as found:
        yield found


@pytest.fixture(scope="module", params=WIDTHS)
def opened(request, tab, page, tmp_path_factory):
    path = tmp_path_factory.mktemp("report") / "report.html"
    path.write_text(page, encoding="utf-8")
    tab.open(path, request.param)
    return tab


def test_the_report_asks_for_nothing_outside_itself(opened):
    schemes = {url.partition(":")[0] for url in opened.requests}
    assert schemes == {"file", "data"}
    assert len([url for url in opened.requests if url.startswith("file:")]) == 1


def test_the_console_stays_empty(opened):
    assert opened.complaints == []


def test_every_image_is_there_and_has_a_text_in_its_place(opened):
    images = opened.evaluate("[...document.images].map(i => [i.naturalWidth, i.alt.length])")
    assert len(images) == 7
    assert all(width > 300 and letters > 40 for width, letters in images)


def test_the_verdicts_can_be_read(opened):
    shown = opened.evaluate("document.getElementById('verdicts').parentElement.innerText")
    for word in ("healthy", "converging", "skewed", "stagnant", "collapsed", "uncertain"):
        assert word in shown
    assert "Between\xa0" not in shown and "skewed and" in " ".join(shown.split())
    assert "effective rank of h(K) 1.9 [1.8, 1.95], below 2" in shown


def test_nothing_is_wider_than_the_window_also_with_all_details_open(opened):
    assert opened.evaluate(OVERFLOW) <= 0
    opened.evaluate(OPEN_ALL)
    assert opened.evaluate(OVERFLOW) <= 0


def test_a_printed_page_cuts_nothing_off(tab, page, tmp_path):
    path = tmp_path / "report.html"
    path.write_text(page, encoding="utf-8")
    tab.open(path, 760)
    tab.call("Emulation.setEmulatedMedia", media="print")
    try:
        assert tab.evaluate(OVERFLOW) <= 0
        wide = "[...document.querySelectorAll('table, img')].map(e => e.getBoundingClientRect())"
        assert tab.evaluate(f"Math.max(...{wide}.map(r => r.right))") <= 760
    finally:
        tab.call("Emulation.setEmulatedMedia", media="")


def test_names_are_shown_as_they_are_and_none_becomes_markup(opened):
    titles = opened.evaluate("[...document.querySelectorAll('.ls-card h3')].map(h => h.innerText)")
    assert f"{HOSTILE} step 3000" in titles
    assert opened.evaluate("document.scripts.length") == 0
    assert opened.evaluate("document.querySelectorAll('main i').length") == 0


def test_links_lead_somewhere_and_heads_of_tables_have_a_scope(opened):
    lost = opened.evaluate(
        "[...document.querySelectorAll('a')].map(a => a.getAttribute('href'))"
        ".filter(h => !h.startsWith('#') || !document.getElementById(h.slice(1)))"
    )
    assert lost == []
    assert opened.evaluate("document.querySelectorAll('th:not([scope])').length") == 0
    ids = opened.evaluate("[...document.querySelectorAll('[id]')].map(e => e.id)")
    assert len(ids) == len(set(ids))
    assert opened.evaluate("document.documentElement.lang") == "en"


def test_a_page_that_calls_out_complains_and_overflows_would_be_noticed(tab, tmp_path):
    path = tmp_path / "bad.html"
    path.write_text(
        "<img src='http://example.invalid/a.png'><p style='width:3000px'>x</p>"
        "<script>console.error('no')</script>"
    )
    tab.open(path, 1200)
    assert any(url.startswith("http:") for url in tab.requests)
    assert any("no" in text for text in tab.complaints)
    assert tab.evaluate(OVERFLOW) > 0
    assert tab.evaluate("document.images[0].naturalWidth") == 0
