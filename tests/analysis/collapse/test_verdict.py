"""Verdicts from signs written by hand: thresholds, intervals, what is left when one is crossed."""

import re
from dataclasses import is_dataclass

import numpy as np
import pandas as pd
import pytest

from loopscope.analysis.collapse import SIGNS, THRESHOLDS, judge
from loopscope.analysis.collapse.conditions import Estimate
from loopscope.analysis.collapse.criteria import YARDSTICKS
from loopscope.analysis.collapse.verdicts import (
    LADDER,
    VERDICTS,
    Onset,
    Verdict,
    onset,
    parse_verdicts,
    verdict_of,
)
from loopscope.analysis.collapse.yardsticks import RULES, Finding, findings_of, unigram_losses
from loopscope.errors import InputError, UnknownNameError

LIMITS = {one.name: one.value for one in THRESHOLDS}
SOUND = {
    "loss": 3.0, "skew": 0.1, "turn": 1.2, "work": 1.4, "turn_skew": 0.1, "cka_debiased": 0.9,
    "cka_least": 0.8, "erank_0": 80.0, "erank_K": 90.0, "erank_ratio": 1.1, "erank_share": 0.6,
    "loop_gain": 2.0, "raw_gain": 2.6, "matched_gain": 2.2, "fitted_gain": 2.0, "rest_gain": 0.7,
    "overthinking": 0.0, "more_loss": 0.3, "step_ratio": 0.8, "nonfinite": 0.0,
}  # fmt: skip


def estimates(width=0.001, n=20, without=(), **changes):
    """A sound loop's signs with narrow intervals; changes are means, or (low, mean, high)."""
    found = {}
    for name, mean in {**SOUND, **changes}.items():
        low, mean, high = mean if isinstance(mean, tuple) else (mean - width, mean, mean + width)
        found[name] = Estimate(mean, low, high, n, clusters=n)
    return {name: one for name, one in found.items() if name not in without}


def verdict(**changes):
    return verdict_of(estimates(**changes), LIMITS)


CASES = [
    ("healthy", {}),
    ("unstable", {"nonfinite": 0.05}),
    ("unstable", {"step_ratio": 3.0, "overthinking": 0.4}),
    ("unstable", {"overthinking": 0.4}),
    ("healthy", {"step_ratio": 30.0}),  # states may grow, if they are read the better for it
    ("collapsed", {"erank_K": 1.3, "erank_ratio": 0.02, "overthinking": 2.0}),
    ("collapsed", {"erank_K": 1.3, "erank_ratio": 0.7, "rest_gain": 0.01}),
    ("healthy", {"erank_K": 1.3, "erank_ratio": 0.02}),  # a token of huge norm does that
    ("collapsed", {"erank_ratio": 0.3, "overthinking": 0.4}),
    ("collapsed", {"erank_ratio": 0.3, "rest_gain": 0.01}),
    ("healthy", {"erank_ratio": 0.3}),  # fewer directions, but the loops are used
    ("stagnant", {"loop_gain": 0.01, "rest_gain": 0.005}),  # whatever the geometry
    ("healthy", {"cka_debiased": 0.995}),
    ("stagnant", {"work": 0.01}),  # a core that returns what it is given, whatever the gain
    ("stagnant", {"turn": 0.01}),
    ("stagnant", {"cka_least": 0.9999, "width": 0.0001}),
    ("stagnant", {"read_most": 0.001}),  # a memory of which nothing is read
    ("skewed", {"read_most": 0.4, "read_second": 0.001}),
    ("healthy", {"read_most": 0.4, "read_second": 0.1}),
    ("skewed", {"turn_skew": 0.9, "rest_gain": 0.01}),
    ("skewed", {"skew": 0.9, "rest_gain": 0.01, "without": ("turn_skew",)}),
    ("healthy", {"skew": 0.9, "rest_gain": 0.01}),
    ("healthy", {"turn_skew": 0.9}),
    ("converging", {"step_ratio": 0.2, "more_loss": 0.01}),
    ("healthy", {"step_ratio": 0.2, "more_loss": 0.2}),
    ("healthy", {"step_ratio": 0.2, "without": ("more_loss",)}),
]


@pytest.mark.parametrize(("expected", "changes"), CASES)
def test_a_verdict_needs_its_geometry_and_its_loss(expected, changes):
    found = verdict(**changes)
    assert found.verdict == expected and not found.between
    assert found.evidence


def test_the_more_serious_verdict_wins():
    everything = {"erank_K": 1.3, "work": 0.0, "loop_gain": 0.0, "turn_skew": 0.9}
    assert verdict(**everything, rest_gain=0.0).verdict == "collapsed"
    assert verdict(**everything, rest_gain=0.0, nonfinite=1.0).verdict == "unstable"


@pytest.mark.parametrize(
    ("changes", "left"),
    [
        ({"turn_skew": (0.7, 0.8, 0.9), "rest_gain": 0.01}, ("skewed", "healthy")),
        ({"turn_skew": 0.9, "rest_gain": (0.01, 0.05, 0.08)}, ("skewed", "healthy")),
        ({"turn_skew": (0.7, 0.8, 0.9), "rest_gain": 0.5}, ("healthy",)),
        ({"loop_gain": (0.01, 0.03, 0.05)}, ("stagnant", "healthy")),
        ({"overthinking": (0.02, 0.15, 0.3)}, ("unstable", "healthy")),
        (
            {"overthinking": (0.02, 0.15, 0.3), "step_ratio": 0.2, "more_loss": 0.01},
            ("unstable", "converging"),
        ),
        ({"step_ratio": (0.4, 0.5, 0.6), "more_loss": 0.01}, ("healthy",)),  # neither is a fault
    ],
)
def test_an_interval_across_a_threshold_leaves_the_verdict_open(changes, left):
    found = verdict(**changes)
    assert found.verdict == ("uncertain" if len(left) > 1 else left[0])
    assert (found.between or (found.verdict,)) == left


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"overthinking": 0.47, "step_ratio": (0.9, 1.0, 1.1)}, "unstable"),
        ({"overthinking": 0.47, "loop_gain": (0.01, 0.02, 0.03)}, "unstable"),
        ({"turn_skew": 0.9, "rest_gain": 0.01, "erank_K": (1.5, 1.9, 2.5)}, "skewed"),
        ({"work": 0.0, "overthinking": (0.02, 0.15, 0.3)}, "stagnant"),
    ],
)
def test_a_sure_fault_is_said_though_a_more_serious_one_may_hold(changes, expected):
    found = verdict(**changes)
    assert (found.verdict, found.between) == (expected, ())
    assert all("not clearly" not in words for words in found.evidence)


def test_an_uncertain_verdict_is_among_wanted_ones_where_all_that_are_left_are():
    open_one = Verdict(verdict="uncertain", between=("unstable", "stagnant"))
    assert open_one.among({"unstable", "stagnant", "skewed"}) == "unstable or stagnant"
    assert open_one.among({"unstable"}) == "" and open_one.among({"uncertain"}) == "uncertain"
    low = Finding(name="low rank", because="")
    assert Verdict(verdict="healthy", findings=(low,)).among({"low rank"}) == "low rank"
    assert Verdict(verdict="stagnant").among({"stagnant"}) == "stagnant"


def test_the_threshold_of_a_gain_is_in_nats_whatever_the_loss():
    case = {"turn_skew": 0.9, "rest_gain": 0.03}
    assert verdict(**case, loss=1.0).verdict == verdict(**case, loss=9.0).verdict == "healthy"


def test_the_evidence_names_the_reading_by_which_the_gain_is_least():
    found = verdict(loop_gain=0.001, fitted_gain=0.9, matched_gain=0.001, raw_gain=3.0)
    assert "gain of the loop, matched, 0.001" in found.evidence[0]


FINDING_CASES = [
    ("low rank", {"erank_share": 0.1}),
    ("worse than reference", {"over_reference": 0.9}),
    ("worse than unigram", {"over_unigram": 0.2}),
]


@pytest.mark.parametrize(("name", "changes"), FINDING_CASES)
def test_a_finding_stands_beside_the_verdict(name, changes):
    of_model = estimates(over_reference=0.01, over_unigram=-2.0)
    assert findings_of(of_model, LIMITS) == ()
    (finding,) = findings_of({**of_model, **estimates(**changes)}, LIMITS)
    assert finding.name == name and finding.because
    across = {key: (-9.0, value, 9.0) for key, value in changes.items()}
    assert findings_of(estimates(**across), LIMITS) == ()


def test_a_unigram_predicts_by_how_frequent_a_token_is_in_other_documents():
    tokens = np.array([[0, 1, 1], [2, 0, 1], [0, 0, 0], [1, 2, 2]])
    losses = unigram_losses(tokens, ["a", "a", "b", None], vocabulary=5)
    counts = [
        np.bincount(tokens[rows].ravel(), minlength=5)
        for rows in ([2, 3], [2, 3], [0, 1, 3], [0, 1, 2])
    ]
    expected = [
        -np.mean([np.log((c[i] + 1) / (c.sum() + 5)) for i in row[1:]])
        for row, c in zip(tokens, counts, strict=True)
    ]
    np.testing.assert_allclose(losses, expected, rtol=1e-12)
    of_one_text = unigram_losses(tokens, ["a"] * 4, vocabulary=5)
    np.testing.assert_array_equal(of_one_text, unigram_losses(tokens, [None] * 4, vocabulary=5))
    assert np.isfinite(of_one_text).all() and np.isnan(unigram_losses(tokens[:1], ["a"])).all()


def test_without_readout_geometry_accuses_nobody_for_sure():
    lost = ("loss", "loop_gain", "rest_gain", "overthinking", "more_loss")
    assert verdict(without=lost).verdict == "healthy"
    found = verdict(cka_debiased=0.99, without=lost)
    assert (found.verdict, found.between) == ("uncertain", ("stagnant", "healthy"))
    found = verdict(turn_skew=0.9, without=lost)
    assert (found.verdict, found.between) == ("uncertain", ("skewed", "healthy"))
    found = verdict(erank_K=1.2, without=lost)
    assert (found.verdict, found.between) == ("uncertain", ("collapsed", "healthy"))


def test_one_iteration_is_judged_by_the_gain_of_the_loop():
    lost = ("rest_gain", "skew", "turn_skew", "step_ratio")
    assert verdict(erank_ratio=0.3, loop_gain=0.01, without=lost).verdict == "collapsed"
    assert verdict(without=lost).verdict == "healthy"


def test_few_samples_are_not_judged():
    found = verdict(n=7, nonfinite=1.0)
    assert found.verdict == "uncertain" and "7 samples are too few" in found.evidence[0]


def test_windows_that_repeat_others_do_not_count_as_samples():
    repeated = {name: e._replace(n=500, clusters=7) for name, e in estimates().items()}
    found = verdict_of(repeated, LIMITS)
    assert found.verdict == "uncertain" and "7 windows that differ" in found.evidence[0]


def test_a_sign_that_few_samples_have_decides_nothing():
    case = estimates(n=100, overthinking=0.5)
    few = {**case, "overthinking": Estimate(0.5, 0.45, 0.55, 2, 98)}
    assert verdict_of(case, LIMITS).verdict == "unstable"
    assert verdict_of(few, LIMITS).verdict == "uncertain"


def test_more_loops_that_overflow_are_no_convergence():
    case = estimates(n=20, step_ratio=0.2, more_loss=0.0)
    assert verdict_of(case, LIMITS).verdict == "converging"
    case["more_loss"] = Estimate(0.0, 0.0, 0.0, 19, 1)
    assert verdict_of(case, LIMITS).verdict == "healthy"


def frame(**changes):
    """The rows of `collapse.signs` for one model, named a."""
    rows = [
        {"model": "a", "step": None, "loop": "core", "sign": name, **one._asdict(), "std": 0.1}
        for name, one in estimates(**changes).items()
    ]
    return pd.DataFrame(rows).astype({"step": "Int64"})


def test_other_thresholds_change_the_verdict_and_unknown_ones_raise():
    table = frame(turn_skew=0.4, rest_gain=0.01)
    key = ("a", None, "core")
    assert judge(table)[key].verdict == "healthy"
    assert judge(table, thresholds={"uneven": 0.3})[key].verdict == "skewed"
    with pytest.raises(UnknownNameError, match="uneven"):
        judge(table, thresholds={"unevn": 0.3})


def test_a_model_without_a_loop_gets_no_verdict():
    found = judge(frame(), loopless=["a"])["a", None, "core"]
    assert found.verdict is None and "no loop" in found.evidence[0]


def run(*words):
    return {100 * i: Verdict(verdict=word) for i, word in enumerate(words)}


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["healthy", "skewed", "collapsed", "collapsed"], Onset("collapsed", 200, 100)),
        (["skewed", "healthy", "uncertain", "stagnant"], Onset("stagnant", 300, 100)),
        (["uncertain", "stagnant"], Onset("stagnant", 100, None)),
        (["collapsed", "collapsed", "uncertain"], None),
        (["healthy", "skewed", "uncertain", "skewed"], Onset("skewed", 100, 0)),
        (["collapsed", "collapsed"], Onset("collapsed", 0, None)),
        (["collapsed", "healthy"], None),
        (["healthy", "converging"], None),
        ([], None),
    ],
)
def test_collapse_sets_in_where_the_last_stretch_of_that_verdict_begins(words, expected):
    assert onset(run(*words)) == expected


def names_of(condition) -> set[str]:
    """The thresholds that a condition asks for."""
    if not is_dataclass(condition):
        return set()
    inner = [names_of(part) for part in getattr(condition, "conditions", ())]
    return set().union(*inner, {getattr(condition, "threshold", None)} - {None})


def test_the_ladder_uses_every_threshold_and_its_words_name_those_that_it_asks_for():
    assert {rung.verdict for rung in LADDER} == {*VERDICTS} - {"healthy"}
    rules = [condition for _, condition in RULES]
    asked = (names_of(condition) for condition in [*(r.condition for r in LADDER), *rules])
    assert set().union(*asked) == {*LIMITS}
    for rung in LADDER:
        named = set(re.findall(r"`(\w+)`", rung.meaning))
        assert named == names_of(rung.condition), rung.meaning


def test_every_threshold_says_what_it_means_at_another_value():
    by_name = {one.name: one for one in THRESHOLDS}
    assert all(one.meaning_at(one.value) == one.meaning for one in THRESHOLDS)
    for name, value, words in (
        ("shrinking", 0.3, "the last step is less than 30 % as long as the first"),
        ("growing", 1.5, "the last step is more than 150 % as long as the first"),
        ("half_rank", 0.7, "the loop keeps less than 70 % of the effective rank that it is given"),
        ("rank_one", 1.5, "fewer than 1.5 directions are left"),
        ("uneven", 0.3, "30 % of the way from an even split to one loop doing everything"),
    ):
        assert by_name[name].meaning_at(value) == words


def test_verdicts_are_parsed_from_words():
    assert parse_verdicts("collapsed, unstable,collapsed") == ("collapsed", "unstable")
    assert parse_verdicts("skewed, low rank") == ("skewed", "low rank")
    for wrong in ("colapsed", "", "collapsed,fine"):
        with pytest.raises(InputError, match="verdict"):
            parse_verdicts(wrong)


def test_every_sign_says_what_it_is():
    names = [sign.name for sign in SIGNS]
    assert len(set(names)) == len(names)
    assert all(sign.formula and sign.range and sign.meaning for sign in SIGNS)
    used = {name for one in THRESHOLDS for name in one.signs}
    assert (
        used <= {*names, *(sign.name for sign in YARDSTICKS)}
        and not np.isnan(list(LIMITS.values())).any()
    )
