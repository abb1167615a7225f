"""Labels of tokens that need no annotation: their class, their place, their depth.

A token is a piece of a word, and a window half a file: a token's class is that of its first
character that is no white space, in the text that the window decodes to.
"""

import keyword
import re
import string
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float64, Int

CLASSES = (
    "identifier", "keyword", "number", "operator", "string", "comment", "whitespace", "other",
)  # fmt: skip
"""What a token may be; in text that is not Python there are no keywords, strings and comments."""

CLASS_LABELS = ("current", "previous", "next")
"""The class of the token, of the one before it and of the one after it."""

NUMBER_LABELS = ("position", "indentation", "brackets")
"""The token's place in the window, the depth of its line and of the brackets around it."""

BUILT_IN_LABELS = (*CLASS_LABELS, *NUMBER_LABELS)

INDENT = 4
"""Columns of one level of indentation."""

_QUOTES = r"'''(?:[^\\]|\\.)*?(?:'''|\\?\Z)|'(?:[^\\\n']|\\.)*(?:'|(?=\n)|\\?\Z)"
_DIGITS = r"\d(?:_?\d)*"
_PYTHON = re.compile(
    rf"""(?P<comment>\#[^\n]*)
    |(?P<string>(?:[bB]?[rR]?|[rR][bB]|[uU]|[fF][rR]?|[rR][fF])
        (?:{_QUOTES}|{_QUOTES.replace("'", '"')}))
    |(?P<number>0[xX](?:_?[0-9a-fA-F])+|0[bB](?:_?[01])+|0[oO](?:_?[0-7])+
        |(?:{_DIGITS}\.?(?:{_DIGITS})?|\.{_DIGITS})(?:[eE][-+]?{_DIGITS})?[jJ]?)
    |(?P<identifier>[^\W\d]\w*)
    |(?P<whitespace>\s+)
    |(?P<other><\|\w+\|>)
    |(?P<operator>[{re.escape(string.punctuation)}])
    |(?P<rest>.)""",
    re.VERBOSE | re.DOTALL,
)
_PLAIN = re.compile(
    r"(?P<number>\d+)|(?P<identifier>[^\W\d]\w*)|(?P<whitespace>\s+)|(?P<other><\|\w+\|>)"
    rf"|(?P<operator>[{re.escape(string.punctuation)}])|(?P<rest>.)",
    re.DOTALL,
)
_STATEMENT = re.compile(
    r"\s*(?:(?:async )?def \w+\(|class \w+[(:]|(?:from [\w.]+ )?import \w|return\b|raise\b|assert\b"
    r"|(?:if|elif|while|for|with|except|else|try)\b.*:$|@\w+|[\w.\[\]]+ [-+*/]?= )"
)
_STATEMENTS = 0.05  # share of lines that makes a text Python; of prose there are hardly any


def is_python(texts: Sequence[str]) -> bool:
    """Tell whether texts are Python: whether enough of their lines begin as its statements do.

    Args:
        texts: Windows, whole lines or not.

    Returns:
        Whether at least one line in twenty that is not empty does.
    """
    lines = [line for text in texts for line in text.split("\n") if line.strip()]
    return sum(map(bool, map(_STATEMENT.match, lines))) > _STATEMENTS * max(len(lines), 1)


def character_classes(text: str, *, python: bool) -> Int[np.ndarray, " character"]:
    """Tell the class of every character.

    Text that begins or ends anywhere is no obstacle: a string without an end lasts to the end of
    its line (in three quotes: of the text). Half a string at the beginning is read as code.

    Args:
        text: Any text.
        python: Whether to look for Python's keywords, strings and comments.

    Returns:
        For each character its place in `CLASSES`, as Python's `tokenize` splits whole files.
    """
    code = {name: i for i, name in enumerate(CLASSES)} | {"rest": CLASSES.index("other")}
    classes = np.full(len(text), code["other"], np.int8)
    for match in (_PYTHON if python else _PLAIN).finditer(text):
        kind = str(match.lastgroup)
        if python and kind == "identifier" and keyword.iskeyword(match[0]):
            kind = "keyword"
        classes[match.start() : match.end()] = code[kind]
    return classes


def token_texts(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """Decode tokens one by one, each of them once.

    Args:
        tokenizer: A `tokenizers.Tokenizer`, any other with its `decode`, or None.
        ids: Tokens.

    Returns:
        The text of each; its number without a tokenizer.
    """
    if tokenizer is None:
        return [str(i) for i in ids]
    texts = {i: tokenizer.decode([i], skip_special_tokens=False) for i in dict.fromkeys(ids)}
    return [texts[i] for i in ids]


def token_pieces(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """Cut the text that tokens decode to into what each of them adds.

    Args:
        tokenizer: A `tokenizers.Tokenizer`, or any other with its `decode`.
        ids: The tokens of one window.

    Returns:
        One piece for each, together the text. A token that only begins a character (some bytes of
        it) adds nothing, the one that completes it the character.
    """

    def decoded(some: Sequence[int]) -> str:
        return tokenizer.decode(list(some), skip_special_tokens=False)

    text = decoded(ids)
    pieces = [decoded([i]) for i in ids]
    if "".join(pieces) == text:
        return pieces
    # a decoder that drops the first space, or characters of several tokens: what came before tells
    ends = [len(decoded(ids[: i + 1]).rstrip("\N{REPLACEMENT CHARACTER}")) for i in range(len(ids))]
    ends = np.maximum.accumulate(np.minimum(ends, len(text))).tolist()
    ends[-1] = len(text)
    return [text[start:end] for start, end in zip([0, *ends[:-1]], ends, strict=True)]


def token_labels(
    pieces: Sequence[Sequence[str]],
    names: Sequence[str] = BUILT_IN_LABELS,
    *,
    python: bool = True,
) -> dict[str, Float64[np.ndarray, "sample pos"]]:
    """Label every token of windows.

    Args:
        pieces: What each token of each window adds to its text (`token_pieces`); windows of one
            length.
        names: Which of `BUILT_IN_LABELS`: `current`, `previous` and `next` are places in
            `CLASSES`; `position` counts from 0; `indentation` is the leading white space of the
            token's line in levels of four columns; `brackets` how many were opened before it in
            this window and are not closed.
        python: Whether to look for Python's keywords, strings and comments.

    Returns:
        Name → (samples × tokens); NaN where the window does not tell: before its first and after
        its last token, and the indentation of its first line.
    """
    texts = ["".join(window) for window in pieces]
    windows = [_window_labels(*pair, python) for pair in zip(pieces, texts, strict=True)]
    return {name: np.stack([labels[name] for labels in windows]) for name in names}


def _window_labels(pieces: Sequence[str], text: str, python: bool) -> dict[str, np.ndarray]:
    starts = np.concatenate([[0], np.cumsum([len(piece) for piece in pieces])[:-1]])
    blanks = [len(piece) - len(piece.lstrip()) for piece in pieces]
    inner = [
        blank if blank < len(piece) else 0 for blank, piece in zip(blanks, pieces, strict=True)
    ]
    offsets = (starts + inner).astype(int)
    classes = character_classes(f"{text} ", python=python)  # the space is behind an empty piece
    current = classes[offsets].astype(np.float64)
    missing = [np.nan]
    return {
        "current": current,
        "previous": np.concatenate([missing, current[:-1]]),
        "next": np.concatenate([current[1:], missing]),
        "position": np.arange(len(pieces), dtype=np.float64),
        "indentation": _indentation(f"{text} ")[offsets],
        "brackets": _brackets(f"{text} ", classes)[offsets],
    }


def _indentation(text: str) -> np.ndarray:
    """Level of the line of each character; unknown of the first, which may be half a line."""
    lines = text.split("\n")
    levels = []
    for number, line in enumerate(lines):
        blank = line[: len(line) - len(line.lstrip(" \t"))]
        levels.append(len(blank.expandtabs(8)) / INDENT if number else np.nan)
    return np.repeat(levels, [len(line) + 1 for line in lines])[: len(text)]


def _brackets(text: str, classes: np.ndarray) -> np.ndarray:
    """Brackets open before each character; one that closes what was opened earlier is passed."""
    depth = np.zeros(len(text))
    level = 0
    operator = CLASSES.index("operator")
    for i, (character, kind) in enumerate(zip(text, classes.tolist(), strict=True)):
        depth[i] = level
        if kind == operator:
            level = max(0, level + (character in "([{") - (character in ")]}"))
    return depth


__all__ = [
    "BUILT_IN_LABELS", "CLASSES", "CLASS_LABELS", "INDENT", "NUMBER_LABELS", "character_classes",
    "is_python", "token_labels", "token_pieces", "token_texts",
]  # fmt: skip
