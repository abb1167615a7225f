"""Foreign tokenizers: anybody's, behind the few methods of `tokenizers.Tokenizer` that are used."""

import hashlib
import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from operator import index
from typing import Any

from loopscope.errors import InputError

KINDS = (
    "a tokenizers.Tokenizer, a tokenizer of transformers, a tiktoken Encoding, a sentencepiece "
    "SentencePieceProcessor, an object with encode and decode, or a function from a text to its "
    "ids"
)
PROBES = (
    "def f(x):\n\treturn x + 10  # Ünï-çødé, 字\nThe quick brown fox.",
    "The quick brown fox jumps over the lazy dog.",
    *"ae01AT .\n",
)
"""What a tokenizer is tried on when it is given; one of characters may lack some of them."""
_NO_SPECIALS = (
    "add_special_tokens", "bos", "eos", "add_bos", "add_eos", "add_bos_token", "add_eos_token",
)  # fmt: skip
"""Arguments of `encode` that would add tokens."""
_AS_IT_IS = ("skip_special_tokens", "clean_up_tokenization_spaces")
"""Arguments of `decode` that would change the text."""


@dataclass(frozen=True)
class Encoded:
    """A text's tokens.

    Attributes:
        ids: Their ids.
    """

    ids: list[int]


@dataclass(frozen=True, kw_only=True)
class ForeignTokenizer:
    """A tokenizer of another library, or the user's own, that adds no token unless asked.

    Attributes:
        kind: What it is, for messages.
        original: The tokenizer.
        ids_of: Gives the ids of a text.
        text_of: Gives the text of ids; None where it cannot.
        piece_of: Gives the text of one id where that is more than `text_of` says.
        size: How many ids there are; None where that is not known.
        vocabulary: What the tokenizer is made of, for its stamp.
    """

    kind: str
    original: Any
    ids_of: Callable[[str], Any]
    text_of: Callable[[list[int]], str] | None = None
    piece_of: Callable[[int], str] | None = None
    size: int | None = None
    vocabulary: Callable[[], bytes] | None = None

    def encode(self, text: str, *, add_special_tokens: bool = False) -> Encoded:
        """The tokens of a text.

        Args:
            text: The text.
            add_special_tokens: As in `tokenizers`; no token can be added.

        Returns:
            The tokens.

        Raises:
            InputError: if the tokenizer raises, or gives no ids.
        """
        if add_special_tokens:
            raise InputError(f"a {self.kind} is used without special tokens; put them in as ids.")
        try:
            return Encoded(_as_ids(self.ids_of(text)))
        except Exception as error:  # whatever the user's own code raises
            reason = f"{type(error).__name__}: {error}".splitlines()[0].rstrip(".")
            raise InputError(
                f"tokenizer {self.kind} gives no ids of a text ({reason}); give {KINDS}."
            ) from error

    def encode_batch(
        self, texts: Sequence[str], *, add_special_tokens: bool = False
    ) -> list[Encoded]:
        """The tokens of several texts.

        Args:
            texts: The texts.
            add_special_tokens: As in `encode`.

        Returns:
            The tokens of each.
        """
        return [self.encode(text, add_special_tokens=add_special_tokens) for text in texts]

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """The text of ids.

        Args:
            ids: Token ids; one alone where each token is wanted as a text.
            skip_special_tokens: As in `tokenizers`; nothing is left out.

        Returns:
            The text; of one id that the tokenizer has no text for, its number.

        Raises:
            InputError: for several ids, where the tokenizer cannot decode.
        """
        whole = [int(i) for i in ids]
        if self.text_of is None and len(whole) != 1:
            raise InputError(f"tokenizer {self.kind} has no decode, so ids cannot be made a text.")
        try:
            if len(whole) == 1 and (self.piece_of or self.text_of) is None:
                return str(whole[0])
            if len(whole) == 1 and self.piece_of is not None:
                return str(self.piece_of(whole[0]))
            assert self.text_of is not None
            text = self.text_of(whole)
        except Exception:  # an id that it does not have: models have more rows than tokenizers
            return "".join(map(self.decode, ([i] for i in whole))) if whole[1:] else str(whole[0])
        return text.decode("utf-8", "replace") if isinstance(text, bytes) else str(text)

    def get_vocab_size(self) -> int | None:
        """How many ids there are; None where that is not known."""
        return self.size

    def to_str(self, pretty: bool = False) -> str:
        """Refused: only a `tokenizers.Tokenizer` can be written to a file.

        Args:
            pretty: As in `tokenizers`.

        Returns:
            Nothing.

        Raises:
            InputError: always.
        """
        raise InputError(
            f"a {self.kind} cannot be saved as tokenizer.json; give the model a "
            "tokenizers.Tokenizer, or none, before it is saved."
        )

    def __repr__(self) -> str:
        return f"ForeignTokenizer({self.kind})"


def usable_tokenizer(tokenizer: Any) -> Any:
    """A tokenizer as models use it, which adds no token that nobody asked for.

    Args:
        tokenizer: A `tokenizers.Tokenizer`, a tokenizer of transformers, a tiktoken `Encoding`, a
            sentencepiece `SentencePieceProcessor`, an object with `encode` and `decode`, or a
            function from a text to its ids; None for none.

    Returns:
        A `tokenizers.Tokenizer` where it is or holds one, otherwise a `ForeignTokenizer`.

    Raises:
        InputError: for anything else, and for what gives no ids when tried.
    """
    from tokenizers import Tokenizer
    from tokenizers.implementations import BaseTokenizer

    if tokenizer is None or isinstance(tokenizer, ForeignTokenizer):
        return tokenizer
    plain = getattr(tokenizer, "backend_tokenizer", tokenizer)
    if isinstance(plain, BaseTokenizer):
        plain = plain._tokenizer
    if isinstance(plain, Tokenizer):
        return plain
    foreign = _adapted(tokenizer)
    if foreign is None:
        raise InputError(f"tokenizer is {_described(tokenizer)}; give {KINDS}.")
    if not any(_tried(foreign).values()):
        foreign.encode(PROBES[1])  # which says why not
        raise InputError(f"tokenizer {foreign.kind} gives no ids of a text; give {KINDS}.")
    return foreign


def without_limits(tokenizer: Any) -> Any:
    """A tokenizer that neither cuts texts nor pads them.

    Args:
        tokenizer: What `usable_tokenizer` gave.

    Returns:
        The same; a copy of a `tokenizers.Tokenizer` that is set to do so.
    """
    if isinstance(tokenizer, ForeignTokenizer) or not (tokenizer.truncation or tokenizer.padding):
        return tokenizer
    copy = type(tokenizer).from_str(tokenizer.to_str())
    copy.no_truncation()
    copy.no_padding()
    return copy


def tokenizer_stamp(tokenizer: Any) -> bytes:
    """What tells tokenizers apart.

    Args:
        tokenizer: What `usable_tokenizer` gave.

    Returns:
        All of a `tokenizers.Tokenizer`; of another its kind, its vocabulary where that can be read,
        and its ids of a few texts.
    """
    if tokenizer is None:
        return b""
    if not isinstance(tokenizer, ForeignTokenizer):
        return tokenizer.to_str().encode()
    digest = hashlib.sha256(tokenizer.vocabulary() if tokenizer.vocabulary else b"")
    digest.update(json.dumps([tokenizer.kind, tokenizer.size, _tried(tokenizer)]).encode())
    return digest.digest()


def _tried(tokenizer: ForeignTokenizer) -> dict[str, list[int]]:
    """Ids of the probes, of those that a tokenizer takes."""
    ids = {}
    for probe in PROBES:
        with suppress(InputError):
            ids[probe] = tokenizer.encode(probe).ids
    return ids


def _adapted(tokenizer: Any) -> ForeignTokenizer | None:
    """A tokenizer behind the methods used here; None for what is none."""
    kind = type(tokenizer).__name__
    if isinstance(tokenizer, str | bytes | type | Mapping) or _is_layer(tokenizer):
        return None
    if hasattr(tokenizer, "encode_ordinary"):  # tiktoken
        return ForeignTokenizer(
            kind=kind,
            original=tokenizer,
            ids_of=tokenizer.encode_ordinary,
            text_of=getattr(tokenizer, "decode", None),
            size=_size(tokenizer),
            vocabulary=lambda: _ranks(tokenizer),
        )
    if hasattr(tokenizer, "id_to_piece") and hasattr(tokenizer, "encode"):  # sentencepiece
        return _sentencepiece(tokenizer, kind)
    if hasattr(tokenizer, "encode"):
        text_of = getattr(tokenizer, "decode", None)
        return ForeignTokenizer(
            kind=kind,
            original=tokenizer,
            ids_of=_with(tokenizer.encode, _NO_SPECIALS),
            text_of=None if text_of is None else _with(text_of, _AS_IT_IS, unless=()),
            size=_size(tokenizer),
            vocabulary=lambda: _vocabulary(tokenizer),
        )
    if callable(tokenizer):
        name = getattr(tokenizer, "__qualname__", kind)
        return ForeignTokenizer(kind=f"function {name}", original=tokenizer, ids_of=tokenizer)
    return None


def _sentencepiece(tokenizer: Any, kind: str) -> ForeignTokenizer:
    """sentencepiece: its own settings may add tokens, draw at random or turn the text around."""
    off = dict.fromkeys(
        ("add_bos", "add_eos", "reverse", "emit_unk_piece", "enable_sampling"), False
    )

    def piece(i: int) -> str:
        if tokenizer.is_byte(i):
            return tokenizer.decode([i])
        return tokenizer.id_to_piece(i).replace("\u2581", " ")

    return ForeignTokenizer(
        kind=kind,
        original=tokenizer,
        ids_of=lambda text: tokenizer.encode(text, out_type=int, **off),
        text_of=tokenizer.decode,
        piece_of=piece,
        size=_size(tokenizer),
        vocabulary=lambda: bytes(tokenizer.serialized_model_proto()),
    )


def _with(
    function: Callable[..., Any], names: Sequence[str], *, unless: tuple[Any, ...] = (None, False)
) -> Callable[[Any], Any]:
    """A function of one argument, those of its others that have these names being False.

    What is off by default (one of `unless`) is left as it is.
    """
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):  # compiled code without a signature
        return function
    off = {n: False for n in names if n in parameters and parameters[n].default not in unless}
    return lambda given: function(given, **off)


def _is_layer(tokenizer: Any) -> bool:
    """Whether something is a torch module: a model's part of this name is no tokenizer of text."""
    return any(base.__module__.startswith("torch.nn") for base in type(tokenizer).__mro__)


def _as_ids(given: Any) -> list[int]:
    """Ids from a list, an array, an object with `ids`, or a mapping with `input_ids`."""
    if hasattr(given, "ids"):
        given = given.ids
    elif isinstance(given, Mapping) or hasattr(given, "input_ids"):
        given = given["input_ids"] if isinstance(given, Mapping) else given.input_ids
    if hasattr(given, "tolist"):
        given = given.tolist()
    ids = list(given)
    if len(ids) == 1 and isinstance(ids[0], list | tuple):
        ids = list(ids[0])
    if any(isinstance(i, bool | str) for i in ids):
        raise TypeError(f"it gave {ids[0]!r}, which is no id")
    return [index(i) for i in ids]


def _size(tokenizer: Any) -> int | None:
    """How many ids a tokenizer has, where it says so."""
    for name in ("get_vocab_size", "get_piece_size", "__len__", "n_vocab", "vocab_size"):
        value = getattr(tokenizer, name, None)
        try:
            # what is no number is a TypeError, which the loop takes for no answer
            return index(value() if callable(value) else value)  # type: ignore[arg-type]
        except Exception:
            continue
    return None


def _ranks(tokenizer: Any) -> bytes:
    """What a tiktoken encoding is made of."""
    names = ("_pat_str", "_mergeable_ranks", "_special_tokens")
    return repr([_sorted(getattr(tokenizer, name, None)) for name in names]).encode()


def _vocabulary(tokenizer: Any) -> bytes:
    """The vocabulary of a tokenizer that tells it."""
    get = getattr(tokenizer, "get_vocab", None)
    return repr(_sorted(get())).encode() if callable(get) else b""


def _sorted(value: Any) -> Any:
    return sorted(value.items()) if isinstance(value, Mapping) else value


def _described(value: Any) -> str:
    if isinstance(value, type):
        return f"the class {value.__name__}, not one of its objects"
    if isinstance(value, str):
        return f"the text {value!r}; a name opens no tokenizer here"
    return f"a {type(value).__name__}"
