"""Digits that an interval supports."""

import pytest

from loopscope.report import numbers


@pytest.mark.parametrize(
    ("mean", "low", "high", "text", "ends"),
    [
        (2.48123, 2.31, 2.69, "2.48", "[2.31, 2.69]"),
        (60.04, 57.6, 62.5, "60.0", "[57.6, 62.5]"),
        (0.94491, 0.9423, 0.9478, "0.9449", "[0.9423, 0.9478]"),
        (0.5, 0.42, 0.58, "0.50", "[0.42, 0.58]"),
        (1234.5, 1100.0, 1300.0, "1,234", "[1,100, 1,300]"),
        (-0.0005, -0.0013, 0.0003, "−0.0005", "[−0.0013, 0.0003]"),
        (0.0, 0.0, 0.0, "0", "[0, 0]"),
        (1.2e7, 1.1e7, 1.3e7, "1.2×10⁷", "[1.1×10⁷, 1.3×10⁷]"),
        (3e-7, 2e-7, 4e-7, "3.0×10⁻⁷", "[2.0×10⁻⁷, 4.0×10⁻⁷]"),
    ],
)
def test_a_mean_has_the_digits_that_its_interval_supports(mean, low, high, text, ends):
    assert numbers.estimate(mean, low, high) == text
    assert numbers.interval(mean, low, high) == ends


def test_an_end_that_is_not_zero_is_not_written_as_zero():
    assert numbers.interval(-0.0225, -0.044, -0.001) == "[−0.044, −0.001]"
    assert numbers.interval(0.5, 0.004, 0.996) == "[0.004, 0.996]"


def test_a_number_without_an_interval_has_three_digits():
    assert [numbers.estimate(x) for x in (2.48123, 31.71, 100.4, 0.00042, 0.0)] == [
        "2.48", "31.7", "100", "0.0004", "0",
    ]  # fmt: skip


def test_what_does_not_exist_is_a_dash_and_has_no_interval():
    assert numbers.estimate(None) == numbers.probability(None) == numbers.effect(None) == "–"
    assert numbers.interval(1.0, None, None) == numbers.interval(None, 0.0, 1.0) == ""


def test_differences_have_a_sign_unless_they_are_zero():
    assert numbers.signed(0.04, 0.02, 0.06) == "+0.040"
    assert numbers.signed(-0.04, -0.06, -0.02) == "−0.040"
    assert numbers.signed(0.0) == "0"
    assert numbers.signed(0.001, -0.5, 0.5) == "0.0"
    assert numbers.effect(0.431) == "+0.43"
    assert numbers.effect(-11.68) == "−11.7"
    assert numbers.effect(117.8) == "+118"


def test_probabilities_are_never_written_as_zero():
    texts = [numbers.probability(p) for p in (0.0, 0.00099, 0.0343, 0.75, 1.0)]
    assert texts == ["< 0.001", "< 0.001", "0.034", "0.75", "1.00"]
