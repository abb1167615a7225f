"""The verdicts in a terminal."""

import re

import pytest

from loopscope.commands.printing import print_verdicts
from tests.report import cases
from tests.report.cases import HOSTILE


@pytest.fixture
def printed(capsys):
    print_verdicts(cases.with_series(cases.summary()))
    return capsys.readouterr().out


def test_every_verdict_is_a_word_beside_its_checkpoint_with_evidence(printed):
    assert "● healthy  base\n  gain of the loop 2.94" in printed
    assert "? uncertain  anchor  between skewed and healthy\n" in printed
    assert "  effective rank of h(K) 1.9 [1.8, 1.95], below 2\n" in printed
    assert "  loss against base −0.040 [−0.060, −0.020], p < 0.001\n" in printed


def test_a_series_and_what_failed_are_told(printed):
    assert "runs/good: 6 checkpoints, missing 2,000\n" in printed
    assert f"{HOSTILE}: 6 checkpoints; collapsed from step 1,500 on, not yet at 1,000\n" in printed
    assert f"not measured: {HOSTILE}/step-002000: cannot read <b>model" in printed


def test_a_pipe_gets_plain_text_with_names_as_they_are(printed):
    assert "\x1b" not in printed
    assert f"▼ collapsed  {HOSTILE} step 3000\n" in printed


def test_brackets_in_a_name_are_no_markup(capsys):
    summary = cases.summary()
    summary["checkpoints"][0] |= {"label": "[bold]run[/bold] [red]"}
    print_verdicts(summary)
    assert "● healthy  [bold]run[/bold] [red]\n" in capsys.readouterr().out


@pytest.mark.parametrize("width", [60, 99])
def test_a_narrow_terminal_wraps_and_loses_nothing(capsys, monkeypatch, width):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", str(width))
    print_verdicts(cases.summary())
    lines = capsys.readouterr().out.split("\n")
    plain = [re.sub(r"\x1b\[[0-9;]*m", "", line) for line in lines]
    assert max(map(len, plain)) <= width
    assert any("\x1b[" in line for line in lines)
    text = " ".join(" ".join(plain).split())
    assert "effective rank, h(K) over h(0) 0.800 [0.776, 0.824]" in text
    assert "worse than unigram: loss over that of a unigram 0.31 [0.21, 0.41], above 0" in text


def test_findings_stand_on_the_line_of_the_verdict_and_their_numbers_below(printed):
    assert (
        "◆ converging, but low rank  mesh\n"
        "  low rank: effective rank of h(K), of what is possible 0.12 [0.11, 0.13], below 0.25\n"
        "  contraction 0.7 [0.6, 0.8]\n"
    ) in printed
    assert "■ stagnant, and low rank, worse than unigram  mesh@init\n" in printed


def test_the_loss_and_its_yardsticks_are_one_line(printed):
    lines = printed.split("\n")
    [base] = [line for line in lines if line.startswith("  loss 2.48")]
    assert base == (
        "  loss 2.48 [2.41, 2.55] nats/token; − unigram −3.10 [−3.20, −3.00]; "
        "− 1 loop −0.90 [−1.00, −0.80]; − untrained −5.20 [−5.30, −5.10]"
    )
    assert lines[lines.index(base) + 1].startswith("  CKA of consecutive states 0.71")
    [mesh] = [line for line in lines if line.startswith("  loss 2.41")]
    assert mesh.endswith("; − reference +0.05 [−0.05, 0.15]")
    assert "loss against base" not in lines[lines.index(mesh) + 2]
