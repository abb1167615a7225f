"""A sequence of symbols is folded back into the loops that wrote it."""

import pytest

from loopscope.models.loops.folding import Leaf, Run, Sequence_, fold, split_gaps


def written(node) -> str:
    """A node as a regular expression a reader would write: {ab}, iterations separated by |."""
    if isinstance(node, Leaf):
        return node.symbol
    parts = node.parts if isinstance(node, Sequence_) else node.bodies
    inner = [written(part) for part in parts]
    return "".join(inner) if isinstance(node, Sequence_) else "{" + "|".join(inner) + "}"


@pytest.mark.parametrize(
    ("symbols", "wanted"),
    [
        ("abc", ["a", "b", "c"]),
        ("aaa", ["{a|a|a}"]),
        ("abcabc", ["{abc|abc}"]),
        ("AAABBB", ["{A|A|A}", "{B|B|B}"]),
        ("LLLHLLLH", ["{{L|L|L}H|{L|L|L}H}"]),
        ("LHLLLHLLH", ["{{L}H|{L|L|L}H|{L|L}H}"]),
        ("abbabb", ["{a{b|b}|a{b|b}}"]),
        ("AABBAABB", ["{{A|A}{B|B}|{A|A}{B|B}}"]),
        ("cicic", ["{ci|ci|c}"]),
        ("abcabcab", ["{abc|abc|ab}"]),
        ("abccba", ["a", "b", "{c|c}", "b", "a"]),
        ("abacabac", ["{abac|abac}"]),
        ("abcbabcb", ["{abcb|abcb}"]),
        ("abacad" * 3, ["{abacad|abacad|abacad}"]),
        ("abba" * 4, ["{" + "|".join(["a{b|b}a"] * 4) + "}"]),
        ("aba" * 4, ["{aba|aba|aba|aba}"]),
        ("abcba" * 3, ["{abcba|abcba|abcba}"]),
        ("xabab", ["x", "{ab|ab}"]),
        ("", []),
    ],
)
def test_symbols_are_folded_into_their_loops(symbols, wanted):
    assert [written(node) for node in fold(symbols)] == wanted


def test_leaves_keep_the_numbers_they_were_given():
    (run,) = fold("abab", [3, 5, 8, 9])
    assert isinstance(run, Run)
    assert [leaf.index for leaf in run.leaves()] == [3, 5, 8, 9]


def test_long_loops_are_folded_fast_and_whole():
    symbols = [f"layer{i}" for i in range(48)] * 64
    (run,) = fold(symbols)
    assert len(run.bodies) == 64 and all(len(body.parts) == 48 for body in run.bodies)


@pytest.mark.parametrize(
    ("gaps", "before", "after", "wanted"),
    [
        (["n", "n"], "", "nh", (1, 0)),  # a norm after every iteration
        (["a", "a"], "pa", "", (0, 1)),  # an adapter before every one
        (["na", "na"], "pa", "n", (1, 1)),
        (["x", "y"], "p", "c", (0, 0)),  # between two only
        (["a", "a"], "p", "c", (0, 0)),
        (["", ""], "p", "c", (0, 0)),
        ([], "p", "c", (0, 0)),
    ],
)
def test_what_stands_between_iterations_ends_one_or_begins_the_next(gaps, before, after, wanted):
    assert split_gaps(gaps, before, after, lambda a, b: a == b) == wanted
