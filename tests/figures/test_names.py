"""How models, blocks, states and tokens are written."""

import pytest

from loopscope import names as everywhere
from loopscope.figures import names


@pytest.mark.parametrize(
    ("name", "label"),
    [
        ("base", "base"),
        ("residual", "+residual"),
        ("anchor", "+anchor"),
        ("anchor_emb", "+anchor*"),
        ("mesh", "+mesh"),
        ("mesh@init", "+mesh (untrained)"),
        ("base@init", "base (untrained)"),
        ("residual+anchor", "residual+anchor"),
        ("a@b/c", "a@b/c"),
        ("pay$me$", r"pay\$me\$"),
    ],
)
def test_models_are_named_as_in_the_paper(name, label):
    assert names.model_label(name) == label


def test_blocks_are_counted_in_english():
    labels = [names.block_label(f"core{i}") for i in (1, 2, 3, 4, 11, 12, 13, 21, 22)]
    assert labels == [
        f"{n} core" for n in ("1st", "2nd", "3rd", "4th", "11th", "12th", "13th", "21st", "22nd")
    ]
    assert names.block_label("coda") == "coda"


def test_states_are_ordered_by_computation_and_not_by_letters():
    given = ["h_out", "h10", "h2", "other", "h_emb", "h2", "h0"]
    assert everywhere.state_order(given) == ["h_emb", "h0", "h2", "h10", "other", "h_out"]


def test_blocks_are_ordered_by_computation_and_not_by_letters():
    given = ["coda", "core10", "core2", "prelude", "h_emb"]
    assert everywhere.block_order(given) == ["h_emb", "prelude", "core2", "core10", "coda"]


@pytest.mark.parametrize(
    ("token", "label"),
    [
        (" def", "␣def"),
        ("\n    ", "↵␣⁴"),
        ("\n\n", "↵↵"),
        ("\t", "⇥"),
        ("            ", "␣¹²"),
        ("", "∅"),
        ("longidentifier", "longident…"),
        ("日", r"\u65e5"),
        ("\x00", r"\u0000"),
        ("$x$", r"\$x\$"),
    ],
)
def test_tokens_show_their_whitespace_and_what_has_no_glyph(token, label):
    assert names.token_label(token) == label


def test_file_names_are_safe_and_never_the_same_for_two_models():
    given = ["mesh", "mesh@init", "a/b", "a b", "a-b", "Mesh", "x" * 90, "..", "3+6R3+3"]
    made = names.file_names(given)
    assert made["3+6R3+3"] == "3+6R3+3"
    assert made["a-b"] == "a-b"
    assert made["mesh@init"] == "mesh@init"
    assert made["a/b"].startswith("a-b-")
    assert made["a b"].startswith("a-b-")
    assert all(set(part) <= set(names.SAFE) and len(part) <= 70 for part in made.values())
    assert len({part.casefold() for part in made.values()}) == len(given)


def test_a_name_keeps_its_file_name_whatever_else_is_drawn():
    alone = names.file_names(["mesh@init"])["mesh@init"]
    assert names.file_names(["base", "a/b", "mesh@init"])["mesh@init"] == alone
