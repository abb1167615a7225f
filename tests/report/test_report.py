"""The page as text: whole, the same each time, and nobody's markup but ours."""

import re
import subprocess
import sys
from html.parser import HTMLParser

import pytest

from loopscope.analysis.collapse.verdicts import LADDER, VERDICTS
from loopscope.analysis.collapse.yardsticks import FINDINGS
from loopscope.analysis.tables.frames import Tables
from loopscope.errors import InputError
from loopscope.names import READINGS
from loopscope.report import contents, render, verdict_html, write_report
from loopscope.report.loop_rows import per_loop
from loopscope.report.numbers import estimate
from loopscope.report.words import FINDING, WORDS, meaning_of, values_in_force
from loopscope.report.words import word as look_of
from tests.figures.conftest import make
from tests.figures.course_tables import with_courses
from tests.figures.loop_tables import nested
from tests.report import cases
from tests.report.cases import HOSTILE


class Tags(HTMLParser):
    """Which tags a page has, and its text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data

    def count(self, tag: str) -> int:
        return sum(one == tag for one, _ in self.tags)


def text_of(page: str) -> str:
    return " ".join(Tags(page).text.split())


def without_figures(summary, **provenance) -> str:
    return render(summary, Tables(), provenance=provenance or {"models": {}})


def test_the_page_begins_with_its_type_and_names_its_language(page):
    assert page.startswith('<!DOCTYPE html>\n<html lang="en">')
    assert page.rstrip().endswith("</html>")


def test_the_page_holds_no_script_and_no_address_of_another(page):
    tags = Tags(page).tags
    assert not {"script", "link", "iframe", "object", "embed", "form"} & {tag for tag, _ in tags}
    for _, attributes in tags:
        assert not any(name.startswith("on") for name in attributes)
        assert attributes.get("src", "data:").startswith("data:image/png;base64,") or (
            "src" not in attributes
        )
        assert attributes.get("href", "#").startswith("#")
    assert "url(" not in page and "@import" not in page
    assert "default-src 'none'" in page


def test_the_same_input_gives_the_same_bytes(told, measured, page):
    again = render(told, measured, provenance=cases.provenance(measured))
    assert again == page


def test_names_become_text_and_no_markup(page):
    found = Tags(page)
    assert HOSTILE in found.text
    assert "cannot read <b>model.safetensors</b>: eof" in found.text
    assert "<script>" not in page
    assert found.count("i") == 0


def test_a_page_of_seven_figures_stays_under_two_megabytes(page):
    assert Tags(page).count("img") == 7
    assert len(page.encode()) < 2_000_000


def test_every_verdict_stands_there_as_a_word_with_its_evidence(page):
    text = text_of(page)
    for word in ("healthy", "converging", "skewed", "stagnant", "collapsed", "uncertain"):
        assert word in text
    assert "Between ◣ skewed and ● healthy: these samples do not decide." in text
    assert "skew 0.5 [0.45, 0.55], not clearly on one side of 0.5" in text
    assert "it has no loop" in text


def test_the_evidence_is_not_said_twice_on_a_card():
    told = cases.summary()
    card = contents.cards(told)[0]
    assert card["evidence"] == ["gain of the loop 2.94 [2.71, 3.18]; skew 0.13 [0.12, 0.14]"]
    names = [one["name"] for one in card["numbers"]]
    assert names == ["loss", "cka_debiased", "erank_ratio", "erank_share"]
    told["checkpoints"][0]["verdict"]["evidence"] = ["gain of the loop, fitted, −0.5 [−0.6, −0.4]"]
    assert "loop_gain" not in [one["name"] for one in contents.cards(told)[0]["numbers"]]


def test_of_a_run_the_last_step_stands_for_all(told):
    labels = [one["label"] for one in contents.shown(told)]
    assert labels[-2:] == ["runs/good step 3000", f"{HOSTILE} step 3000"]
    assert len(labels) == 8
    assert contents.shown(cases.summary()) == cases.summary()["checkpoints"]


def test_the_section_on_training_tells_onset_and_gaps_and_is_absent_without_a_series(page):
    text = text_of(page)
    assert "▼ collapsed from step 1,500 on, not yet at step 1,000." in text
    assert "steps 0 to 3,000; missing or unreadable, and skipped: 2,000." in text
    assert "Its last checkpoint is ● healthy: nothing bad is sure to last to its end." in text
    assert "Over training" not in text_of(without_figures(cases.summary()))


def test_measures_stand_with_interval_and_against_the_untrained_twin(told):
    rows, absent = contents.measure_rows(told)
    assert absent == []
    row = next(one for one in rows if one["name"] == "loop_gain")
    base, residual = row["cells"][:2]
    assert base == {
        "mean": "2.94", "interval": "[2.85, 3.03]", "few": "",
        "twin": "−1.18", "twin_mean": "4.12", "twin_interval": "[−1.26, −1.09]",
    }  # fmt: skip
    assert residual["twin"] == ""
    nothing = next(one for one in rows if one["name"] == "more_loss")["cells"][3]
    assert nothing["mean"] == "–"


def test_samples_that_a_mean_lacks_are_told():
    summary = cases.summary()
    summary["checkpoints"][0]["measures"]["skew"] |= {"n": 37, "n_flagged": 3}
    [row] = [one for one in contents.measure_rows(summary)[0] if one["name"] == "skew"]
    assert row["cells"][0]["few"] == "37 of 40 samples"
    summary["checkpoints"][0]["measures"]["skew"] = cases.estimate(None, lost=40)
    [row] = [one for one in contents.measure_rows(summary)[0] if one["name"] == "skew"]
    assert (row["cells"][0]["mean"], row["cells"][0]["few"]) == ("–", "0 of 40 samples")


def test_a_measure_that_nobody_has_is_named_below_the_table():
    summary = cases.summary()
    for one in summary["checkpoints"]:
        one["measures"]["more_loss"] = cases.estimate(None)
    rows, absent = contents.measure_rows(summary)
    assert absent == ["loss of more loops"]
    assert "Measured for none of them: loss of more loops." in text_of(without_figures(summary))
    assert "more_loss" not in {row["name"] for row in rows}


def test_differences_stand_with_effect_and_corrected_p_and_only_small_p_are_bold():
    columns, rows, reasons = contents.difference_rows(cases.summary())
    assert columns == ["residual", "anchor", "mesh", "mesh@init", "plain"]
    loss, skew = rows
    assert loss["cells"][0] == {
        "mean": "−0.040", "interval": "[−0.060, −0.020]", "effect": "−0.80", "p": "< 0.001",
        "significant": True, "unpaired": False,
    }  # fmt: skip
    assert skew["cells"][-1] == {"mean": "–", "reason": 1}
    assert reasons == ["plain has no loop"]
    summary = cases.summary()
    for one in summary["differences"]:
        one["p_adjusted"] = 0.4 if one["p"] is not None else None
    assert 'class="number clear"' not in without_figures(summary)
    assert 'class="number clear"' in without_figures(cases.summary())


def test_different_tokenizers_are_told():
    summary = cases.summary()
    summary["samples"]["same_tokens"] = False
    text = text_of(without_figures(summary))
    assert "each with a tokenizer of its own" in text
    assert "losses per token do not compare" in text


def test_a_summary_with_a_single_checkpoint_has_no_differences():
    summary = cases.summary()
    summary |= {"checkpoints": summary["checkpoints"][:1], "differences": []}
    text = text_of(without_figures(summary))
    assert "1 checkpoint compared" in text
    assert "Differences" not in text and "· the reference" not in text


def test_numbers_of_every_loop_stand_beside_the_figure(page):
    text = text_of(page)
    assert "The numbers of base" in text
    assert "the model runs 3 loops by itself, shaded rows are more." in text
    assert page.count('<tr class="more">') == 5 * 3


def test_every_loop_of_a_model_has_a_table_of_its_own():
    tables = nested(make, samples=5)
    found = per_loop(tables)
    assert [(one["title"], one["K"]) for one in found] == [("hrm, H", 2), ("hrm, L", 6)]
    assert [row["t"] for row in found[0]["rows"]] == ["0", "1", "2"]
    render(cases.summary(), tables, provenance=cases.provenance(tables))


def test_of_many_loops_some_rows_are_shown():
    [one] = per_loop(with_courses(make("deep", K=32, samples=3), more=32))
    assert one["shortened"] and len(one["rows"]) <= 18
    assert [row["t"] for row in one["rows"]][-1] == "64"
    update = make("deep", K=32, samples=3).update
    mean = update[update["block"].eq("core5")]["value"].mean()
    [row] = [row for row in one["rows"] if row["t"] == "4"]
    assert row["cells"][one["columns"].index("update")] == estimate(float(mean))


def test_every_reading_and_the_turn_stand_in_the_rows_of_a_loop():
    tables = with_courses(make("base", samples=3), more=2, readings=READINGS, turn=True)
    [one] = per_loop(tables)
    assert one["columns"] == [
        "loss, raw", "loss, matched", "loss, fitted", "step", "turn", "work", "update",
        "mixed update", "CKA", "effective rank",
    ]  # fmt: skip
    first = dict(zip(one["columns"], one["rows"][0]["cells"], strict=True))
    for reading in READINGS:
        rows = tables.readout[tables.readout["reading"].eq(reading) & tables.readout["t"].eq(0)]
        assert first[f"loss, {reading}"] == estimate(float(rows["value"].mean()))
    delta = tables.delta[tables.delta["t"].eq(0)]
    for head, column in (
        ("step", "value"),
        ("turn", "turn"),
        ("work", "work"),
        ("mixed update", "mixed"),
    ):
        assert first[head] == estimate(float(delta[column].mean()))
    last = one["rows"][-1]["cells"]
    assert last[0] != "–" and last[1:3] == ["–", "–"]  # only raw goes beyond K


def test_a_loop_that_was_read_raw_alone_has_no_empty_columns(page):
    [one] = per_loop(with_courses(make("base", samples=3)))
    assert one["columns"] == [
        "loss, raw", "step", "update", "mixed update", "CKA", "effective rank",
    ]  # fmt: skip
    said = "loss, matched: each token of h(t) at its length in h(K)"
    assert said in text_of(page) and said not in one["meanings"]


def test_what_the_provenance_says_of_all_models_stands_once():
    told = {"versions": {"torch": "2"}, "options": {"kernels": ["rbf"], "center": False}}
    found = {"models": {"a": told | {"dtype": "float32"}, "b": told | {"dtype": "bfloat16"}}}
    assert set(contents.facts_of(found)) == {
        ("versions: torch", "2"), ("options: kernels", "rbf"), ("options: center", "no"),
        ("dtype (a)", "float32"), ("dtype (b)", "bfloat16"),
    }  # fmt: skip


def test_diverged_values_make_a_page_all_the_same():
    tables = cases.broken_tables()
    summary = cases.summary()
    nothing = {name: cases.estimate(None) for name, *_ in cases.MEASURES}
    one = summary["checkpoints"][0] | {
        "label": "broken", "model": "broken", "measures": nothing,
        "verdict": cases.verdict("unstable", "1 of the samples have NaN or infinite values"),
    }  # fmt: skip
    summary |= {"checkpoints": [one], "differences": [], "reference": "broken"}
    page = render(summary, tables, provenance=cases.provenance(tables))
    assert "▲ unstable" in text_of(page)
    assert Tags(page).count("img") == 6


def test_a_name_that_utf8_cannot_hold_does_not_stop_the_page(tmp_path):
    summary = cases.summary()
    summary["failed"] = [{"target": "run-\udcff", "reason": "unreadable"}]
    path = write_report(summary, Tables(), tmp_path / "report.html", provenance={"models": {}})
    assert "run-\\udcff" in path.read_text("utf-8")


def test_a_report_that_cannot_be_written_is_the_users_error(tmp_path):
    (tmp_path / "file").write_text("in the way")
    target = tmp_path / "file" / "report.html"
    with pytest.raises(InputError, match="cannot write"):
        write_report(cases.summary(), Tables(), target, provenance={"models": {}})


def test_a_rendering_that_fails_leaves_the_earlier_report(tmp_path):
    path = tmp_path / "report.html"
    path.write_text("earlier")
    summary = cases.summary()
    del summary["samples"]["data"]
    with pytest.raises(Exception, match="data"):
        write_report(summary, Tables(), path, provenance={"models": {}})
    assert path.read_text() == "earlier"
    assert [one.name for one in tmp_path.iterdir()] == ["report.html"]


def test_a_notebook_gets_the_verdicts_alone_with_their_style(told):
    shown = verdict_html(told)
    found = Tags(shown)
    assert found.count("section") == 8
    assert found.count("style") == 1
    assert "▼ collapsed" in " ".join(found.text.split())
    assert f"Not measured: {HOSTILE}/step-002000" in found.text
    assert "<script>" not in shown


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("shrinking", 0.3, "of the T loops run, is less than 0.3 of the first"),
        ("half_rank", 0.25, "or less than 0.25 of the effective rank of h(0)"),
        ("rank_one", 3.0, "h(K) has fewer than 3 directions"),
        ("uneven", 0.3, "the skew of the turn is above 0.3, and"),
        ("still", 0.4, "or the state, turns by less than 0.4 over the whole loop"),
        ("same", 0.9, "all states have a debiased CKA above 0.9, or"),
        ("little_gain", 0.07, "besides the busiest take less than 0.07 nats/token off the loss"),
        ("little_gain", 0.07, "the whole loop takes at least 0.07 nats/token off the loss"),
        ("harm", 0.3, "is read better by more than 0.3 nats/token, whatever the geometry"),
        ("stable", 0.2, "more loops than trained cost less than 0.2 nats/token"),
        ("low_rank", 0.15, "possible, below 0.15: h(K) uses less than 15 % of the directions"),
        ("worse", 0.4, "that of the reference, above 0.4 nats/token: the first model predicts"),
        ("no_better", -0.5, "that of a unigram, above -0.5 nats/token: frequencies of tokens"),
    ],
)
def test_the_meanings_of_verdicts_and_findings_have_the_threshold_in_force(name, value, said):
    summary = cases.summary()
    assert said not in text_of(without_figures(summary))
    entry = {"name": name, "measures": [], "value": value, "unit": "", "meaning": "changed"}
    kept = [one for one in summary["thresholds"] if one["name"] != name]
    assert said in text_of(without_figures(summary | {"thresholds": [*kept, entry]}))


def test_a_threshold_that_is_switched_off_has_no_number():
    summary = cases.summary()  # infinity is null in JSON
    summary["thresholds"][0] |= {"name": "shrinking", "value": None}
    assert "is less than – of the first" in text_of(without_figures(summary))
    summary["thresholds"][0] |= {"name": "low_rank", "value": None}
    assert "of what is possible, below –</td>" in without_figures(summary)


def test_the_meaning_of_a_verdict_is_that_of_its_conditions():
    limits = {name: 7.0 for name in values_in_force(cases.summary())}
    for rung in LADDER:
        meaning = meaning_of(rung.verdict, limits)
        assert "`" not in meaning
        for part in re.split(r"`\w+`", rung.meaning):
            assert part in meaning
    assert {rung.verdict for rung in LADDER} == {*WORDS} - {"healthy", "uncertain", "no loop"}


def luminance(color: str) -> float:
    parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return sum(w * p for w, p in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


@pytest.mark.parametrize("look", [*WORDS.values(), FINDING])
def test_every_verdict_can_be_read_on_white_and_has_a_shape_of_its_own(look):
    assert 1.05 / (luminance(look.color) + 0.05) >= 4.5
    assert [other.shape for other in (*WORDS.values(), FINDING)].count(look.shape) == 1


def test_the_report_knows_every_verdict():
    assert set(WORDS) == {*VERDICTS, "uncertain", "no loop"}


def test_the_report_imports_no_torch():
    code = (
        "import sys, loopscope.report as r; [getattr(r, n) for n in r.__all__];"
        "print([m for m in ('torch', 'matplotlib.pyplot') if m in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_the_templates_mark_nothing_as_safe_that_is_not_theirs():
    from importlib.resources import files

    texts = [
        one.read_text("utf-8")
        for one in files("loopscope.report").joinpath("templates").iterdir()
        if one.name.endswith(".html")
    ]
    marked = [found for text in texts for found in re.findall(r"\{\{[^}]*\|\s*safe[^}]*\}\}", text)]
    assert len(marked) == len(re.findall(r"\|\s*safe", "".join(texts)))
    assert all(re.match(r"\{\{ '[^']*'\|safe if ", one) for one in marked)


def test_a_card_says_how_the_loss_differs_from_what_it_is_held_against():
    summary = cases.summary()
    cards = contents.cards(summary)
    assert cards[0]["against"] == ""  # nothing to hold the first against
    assert cards[1]["against"].startswith("loss against base −0.040 [−0.060, −0.020], p")
    assert cards[3]["against"] == ""  # the yardsticks say it
    assert text_of(verdict_html(summary)).count("loss against base") == len(cards) - 2


def test_findings_stand_beside_the_verdict_with_what_is_behind_them():
    text = text_of(verdict_html(cases.summary()))
    because = "effective rank of h(K), of what is possible 0.12 [0.11, 0.13], below 0.25"
    assert f"◆ converging, but low rank low rank: {because} contraction 0.7" in text
    assert "■ stagnant, and low rank, worse than unigram low rank: " in text
    assert "worse than unigram: loss over that of a unigram 0.31 [0.21, 0.41], above 0" in text
    assert "● healthy gain of the loop" in text  # nothing beside it
    page = text_of(without_figures(cases.summary()))
    assert "1 – no loop; findings: 2 low rank, 1 worse than unigram" in page
    no_findings = cases.summary()
    for one in no_findings["checkpoints"]:
        one["verdict"]["findings"] = []
    assert "findings: " not in text_of(without_figures(no_findings))


@pytest.mark.parametrize(
    ("verdict", "joint"),
    [("healthy", "but"), (None, "but"), ("uncertain", "and"), ("skewed", "and"), ("new", "and")],
)
def test_a_finding_is_a_but_only_after_what_is_good(verdict, joint):
    findings = [{"name": "low rank", "because": "a number"}]
    assert contents.also({"verdict": verdict, "findings": findings}) == f"{joint} low rank"
    assert contents.also({"verdict": verdict, "findings": []}) == ""


def test_the_loss_stands_with_what_it_is_held_against_on_a_card_and_in_the_table():
    summary = cases.summary()
    [base, *_, mesh, _, plain] = contents.cards(summary)
    lines = [(y["short"], y["mean"], y["interval"]) for y in base["yardsticks"]]
    assert lines == [
        ("− unigram", "−3.10", "[−3.20, −3.00]"),
        ("− 1 loop", "−0.90", "[−1.00, −0.80]"),
        ("− untrained", "−5.20", "[−5.30, −5.10]"),
    ]
    assert [y["short"] for y in mesh["yardsticks"]] == ["− unigram", "− reference"]
    assert mesh["yardsticks"][1]["mean"] == "+0.05" and plain["yardsticks"] == []
    assert "− unigram−3.10 [−3.20, −3.00] − 1 loop−0.90" in text_of(verdict_html(summary))
    rows, _ = contents.measure_rows(summary)
    assert [row["name"] for row in rows[:6]] == [
        "loss", "over_unigram", "over_one_loop", "over_untrained", "over_reference", "skew",
    ]  # fmt: skip
    assert [cell["mean"] for cell in rows[4]["cells"]] == ["–", "–", "–", "+0.05", "–", "–"]
    page = without_figures(summary)
    assert page.count('href="#m-over_unigram"') == page.count('id="m-over_unigram"') == 1


def test_a_yardstick_of_fewer_samples_says_so_and_without_a_value_is_not_shown():
    summary = cases.summary()
    summary["checkpoints"][0]["yardsticks"]["over_unigram"]["n"] = 31
    summary["checkpoints"][3]["yardsticks"]["over_unigram"]["mean"] = None
    rows, _ = contents.measure_rows(summary)
    assert rows[1]["cells"][0]["few"] == "31 of 40 samples"
    assert rows[1]["cells"][3]["mean"] == "–"
    assert [y["name"] for y in contents.cards(summary)[3]["yardsticks"]] == ["over_reference"]


def test_the_number_of_documents_is_told_where_it_is_known():
    summary = cases.summary()
    assert "the samples come from 30 documents." in text_of(without_figures(summary))
    summary["samples"]["documents"] = None
    text = text_of(without_figures(summary))
    assert "come from" not in text and "bootstrap interval." in text


def test_what_a_finding_says_is_text_and_no_markup():
    summary = cases.summary()
    evil = {"name": "<i>low</i>", "because": "<script>x</script>"}
    summary["checkpoints"][0]["verdict"]["findings"] = [evil]
    summary["yardsticks"][0]["title"] = '"><i>'
    for page in (without_figures(summary), verdict_html(summary)):
        found = Tags(page)
        assert "<i>low</i>: <script>x</script>" in found.text
        assert found.count("i") == found.count("script") == 0


def test_a_verdict_of_a_later_version_is_shown_as_uncertain():
    assert look_of("tired") == ("tired", WORDS["uncertain"])


def test_the_page_knows_every_finding_that_there_is():
    said = [entry["badge"]["word"] for entry in contents.meanings(cases.summary())]
    assert said == [*WORDS, *FINDINGS]
