"""Labels without annotation, against Python's own tokenizer; windows that begin anywhere."""

import io
import keyword
import tokenize
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

import loopscope
from loopscope.text.token_classes import (
    BUILT_IN_LABELS,
    CLASSES,
    character_classes,
    is_python,
    token_labels,
    token_pieces,
)

FILES = sorted(Path(loopscope.__file__).parent.rglob("*.py"))
STRINGS = """\
a = rb'x\\'y' + Rb"z" + u'\\
' + f"n{a!r:>{3}}" 'don\\'t'  # it's
b = '''one
"two" \\''' three''' + \"\"\"it's\"\"\" + ''
c = 0x_fF + 1_0.5e-3j + .5 + 1. + 0b1 + 0o17 + 1e5 - x.y[-1:2] if not a else b'' @ c
"""


def classes_of_tokenize(text):
    """The class of each character that Python's own tokenizer gives one."""
    lines = [0, *np.cumsum([len(line) for line in text.splitlines(keepends=True)])]
    names = np.full(len(text), "", dtype=object)
    within = None
    for kind, word, start, end, _ in tokenize.generate_tokens(io.StringIO(text).readline):
        span = slice(lines[start[0] - 1] + start[1], lines[end[0] - 1] + end[1])
        name = {
            tokenize.NUMBER: "number", tokenize.OP: "operator", tokenize.STRING: "string",
            tokenize.COMMENT: "comment",
        }.get(kind)  # fmt: skip
        if kind == tokenize.NAME:
            name = "keyword" if keyword.iskeyword(word) else "identifier"
        token = tokenize.tok_name[kind]
        if token == "FSTRING_START":  # in parts since Python 3.12
            within = span.start
        if token == "FSTRING_END":
            span, name, within = slice(within, span.stop), "string", None
        if name and within is None:
            names[span] = name
    return names


@pytest.mark.parametrize("texts", [[STRINGS], FILES[::9]], ids=["strings", "files"])
def test_characters_are_classed_as_python_tokenizes(texts):
    for text in texts:
        text = text if isinstance(text, str) else text.read_text("utf-8")
        expected = classes_of_tokenize(text)
        classes = np.array(CLASSES, dtype=object)[character_classes(text, python=True)]
        told = expected != ""
        assert told.mean() > 0.4
        wrong = np.flatnonzero(told & (classes != expected))
        assert not len(wrong), text[max(0, wrong[0] - 40) : wrong[0] + 40]


def labels(*pieces):
    python = is_python(["".join(pieces)])
    return {name: v[0].tolist() for name, v in token_labels([pieces], python=python).items()}


PIECES = [
    "x",
    " =",
    " f",
    "oo",
    "([",
    "1",
    "],",
    "\n    ",
    "\n",
    "  if",
    " 'a",
    " b'",
    ")",
    " +",
    "\n",
]


def test_a_token_is_of_the_class_of_its_first_character_that_is_no_white_space():
    assert [CLASSES[int(c)] for c in labels(*PIECES)["current"]] == [
        "identifier", "operator", "identifier", "identifier", "operator", "number", "operator",
        "whitespace", "whitespace", "keyword", "string", "string", "operator", "operator",
        "whitespace",
    ]  # fmt: skip


def test_neighbours_are_those_beside_a_token():
    given = labels(*PIECES)
    assert given["previous"][1:] == given["current"][:-1] and np.isnan(given["previous"][0])
    assert given["next"][:-1] == given["current"][1:] and np.isnan(given["next"][-1])


def test_depths_are_of_the_line_and_of_the_brackets_before():
    given = labels(*PIECES)
    assert given["position"] == list(range(15))
    assert np.isnan(given["indentation"][:8]).all()  # the first line may be half a line
    assert given["indentation"][8:] == [1, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5]
    assert given["brackets"] == [0, 0, 0, 0, 0, 2, 2, 1, 1, 1, 1, 1, 1, 0, 0]
    assert labels(")", "(", "x")["brackets"] == [0, 0, 1]  # opened before the window
    assert labels("x = ", "'('", " + y")["brackets"] == [0, 0, 0]
    assert labels("it is", " '('", " y")["brackets"] == [0, 0, 1]  # no strings in prose


@pytest.mark.parametrize(
    "text",
    ["'''never closed\nif", 'x = "half\nif', "b'\\", "it's\nif", "\\", "\x00\n\t$?", "((]", ""],
)
def test_half_a_file_has_classes_too(text):
    assert len(character_classes(text, python=True)) == len(text)
    if text.startswith(("x", "it")):
        assert CLASSES[character_classes(text, python=True)[-1]] == "keyword"


def test_prose_has_neither_keywords_nor_strings():
    prose = ["It isn't for me,", " and not 'if' or 3 apples,\n", "which is # one more.\n"]
    assert not is_python(["".join(prose)])
    names = {CLASSES[int(c)] for c in labels(*prose)["current"]}
    assert names == {"identifier"}
    assert CLASSES[character_classes("don't", python=False)[3]] == "operator"
    assert is_python([path.read_text("utf-8") for path in FILES[:9]])


def test_pieces_are_the_text_whatever_the_decoder_does_with_spaces():
    words = ["▁def", "▁f", "(", "x", "):", "▁▁"]
    tokenizer = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, []))
    tokenizer.decoder = decoders.Metaspace()
    assert tokenizer.decode([1]) == "f"  # the space is lost
    pieces = token_pieces(tokenizer, [0, 1, 2, 3, 4, 5, 1])
    assert pieces == ["def", " f", "(", "x", "):", "  ", " f"]


def test_bytes_of_one_character_are_one_piece():
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({byte: i for i, byte in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    ids = tokenizer.encode("aé字 b").ids
    pieces = token_pieces(tokenizer, ids)
    assert pieces == ["a", "", "é", "", "", "字", " ", "b"]
    current = token_labels([pieces, pieces])["current"]
    assert current.shape == (2, 8)
    assert {CLASSES[int(c)] for c in current[0]} == {"identifier", "whitespace"}
    half = token_pieces(tokenizer, ids[:2])  # ends in the middle of a character
    assert "".join(half) == tokenizer.decode(ids[:2])


def test_names_are_those_that_are_asked_for():
    assert tuple(token_labels([["a"]])) == BUILT_IN_LABELS
    assert tuple(token_labels([["a"]], ["next"])) == ("next",)
