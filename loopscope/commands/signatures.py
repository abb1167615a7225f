"""Signatures of commands: parameters that several share, and how declared options become flags."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import Field, fields, is_dataclass
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from loopscope.analysis import Settings

Models = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[MODEL]...",
        help="Zoo names (vanilla, base, residual, anchor, anchor_emb, mesh), checkpoint folders, "
        "folders saved by Hugging Face, ids org/name (with @init the untrained twin of any of "
        "them), and your own module:factory or file.py:factory, which returns a model or (model, "
        "example).",
    ),
]
Out = Annotated[Path, typer.Option("--out", help="Folder for figures, tables, provenance.")]
FromTables = Annotated[
    Path | None,
    typer.Option("--from-tables", help="Redraw from the tables in this folder; no model runs."),
]
LOOKED_INTO = (
    "layout", "loops", "spec", "example", "trust_remote_code", "device_map", "data", "samples",
    "tokens", "device", "dtype", "batch_size", "seed",
)  # fmt: skip
"""Settings of the commands that look inside, as flags."""
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def with_settings(
    names: Sequence[str] | None = None,
    *,
    kind: type = Settings,
    but: Sequence[str] = (),
    defaults: Mapping[str, Any] | None = None,
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command the flags that a dataclass of options declares.

    Args:
        names: Which of its fields, in the order of `--help`; all that have a flag when not given,
            those that it inherits last.
        kind: The dataclass, its fields made by `option`.
        but: Fields to leave out.
        defaults: Values of fields whose default differs on the command line.

    Returns:
        A decorator for a command with `**settings`, which gets the values that were typed, in the
        order of the dataclass.
    """
    declared = {entry.name: entry for entry in fields(kind)}
    types, defaults = get_type_hints(kind), defaults or {}
    chosen = [
        declared[name]
        for name in names or _inherited_last(kind)
        if declared[name].metadata["flag"] and name not in but
    ]

    in_order = sorted(chosen, key=[*declared.values()].index)

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        @wraps(command)
        def run(**typed: Any) -> None:
            settings = {entry.name: typed.pop(entry.name) for entry in in_order}
            for entry in chosen:
                if (read := entry.metadata["read"]) is not None:
                    settings[entry.name] = read(settings[entry.name])
            command(**typed, **settings)

        signature = inspect.signature(command)
        parameters = [
            parameter
            for parameter in signature.parameters.values()
            if parameter.kind is not parameter.VAR_KEYWORD
        ]
        flags = [
            _flag(entry, types[entry.name], defaults.get(entry.name, entry.default))
            for entry in chosen
        ]
        annotations = {p.name: p.annotation for p in (*parameters, *flags)}
        run.__annotations__ = {**annotations, "return": None}
        run.__signature__ = inspect.Signature([*parameters, *flags])  # type: ignore[attr-defined]
        return run

    return decorate


def _inherited_last(kind: type) -> list[str]:
    """The fields of a dataclass, those of its bases behind its own."""
    bases = [base for base in kind.__mro__[1:] if is_dataclass(base)]
    inherited = {entry.name for base in bases for entry in fields(base)}
    names = [entry.name for entry in fields(kind)]
    return sorted(names, key=lambda name: name in inherited)


def _flag(entry: "Field[Any]", hint: Any, default: Any) -> inspect.Parameter:
    """An option as the parameter that Typer reads."""
    words = entry.metadata
    kind = hint if words["typed"] is None else words["typed"]
    return inspect.Parameter(
        entry.name,
        inspect.Parameter.KEYWORD_ONLY,
        default=default,
        annotation=Annotated[kind, typer.Option(words["flag"], help=words["words"])],
    )
