"""Targets that name a foreign model: what kind each is, and what opening one gives."""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from loopscope.errors import InputError

Kind = Literal["native", "huggingface", "factory", "hub"]

KINDS = (
    "Zoo names, checkpoint folders (loopscope's or Hugging Face's), their untrained twins "
    "TARGET@init, Hugging Face ids org/name, module:factory and file.py:factory can be loaded."
)
_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]*\w")
_LEGACY_ID = re.compile(r"[A-Za-z0-9][\w.-]*")
_FACTORY = re.compile(r"(?P<where>.+):(?P<name>[A-Za-z_][\w.]*)")
_MODULE = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")


@dataclass(frozen=True, kw_only=True)
class Target:
    """What a target string means.

    Attributes:
        kind: `native` and `huggingface` are folders, `hub` an id, `factory` Python code.
        place: The folder, the id, or `where:name`.
        label: The model's name in tables and figures.
        untrained: Whether the untrained twin is meant (`@init`).
    """

    kind: Kind
    place: str
    label: str
    untrained: bool = False


@dataclass(frozen=True, kw_only=True)
class Source:
    """An opened model, before its loop is looked for.

    Attributes:
        module: The torch module, in evaluation mode.
        tokenizer: A `tokenizers.Tokenizer`, or None.
        provenance: Where the weights came from, as JSON values.
        spec: The file `loopscope.toml` beside the weights, if there is one.
    """

    module: Any
    tokenizer: Any = None
    provenance: dict[str, Any] = field(default_factory=dict)
    spec: Path | None = None


def factory_target(text: str) -> Target | None:
    """`package.module:factory` or `file.py:factory`; None for any other text.

    Raises:
        InputError: for a Python file without the name of a factory.
    """
    where, colon, name = text.rpartition(":")
    file = where if colon else text
    if file.endswith(".py") and not (colon and name):
        raise InputError(
            f"{text} is a Python file; name what makes the model in it: {file}:FACTORY."
        )
    found = _FACTORY.fullmatch(text)
    if found is None or not (file.endswith(".py") or _MODULE.fullmatch(where)):
        return None
    return Target(kind="factory", place=text, label=name.rpartition(".")[2])


def hub_target(text: str) -> Target | None:
    """`org/name`, or a single name that is in the local cache; None for any other text."""
    if _ID.fullmatch(text) or (_LEGACY_ID.fullmatch(text) and _is_cached(text)):
        return Target(kind="hub", place=text, label=text.rpartition("/")[2])
    return None


def _is_cached(name: str) -> bool:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        return isinstance(try_to_load_from_cache(name, "config.json"), str)
    except HFValidationError:
        return False
