"""Options on the command line: what several commands share, and how declared ones become flags."""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import Field, fields
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from loopscope.analysis.options import Options, Settings

Models = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[MODEL]...",
        help="Zoo names (vanilla, base, residual, anchor, anchor_emb, mesh), checkpoint folders, "
        "folders saved by Hugging Face, ids org/name (with @init the untrained twin of any of "
        "them), and your own module:factory or file.py:factory.",
    ),
]
Out = Annotated[Path, typer.Option("--out", help="Folder for figures, tables, provenance.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def with_settings(
    names: Sequence[str] | None = None, *, but: Sequence[str] = ()
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command the flags that `Settings` declares.

    Args:
        names: Which of its fields, in the order of `--help`; all that have a flag when not given.
        but: Fields to leave out.

    Returns:
        A decorator for a command with `**settings`, which gets the values that were typed.
    """
    inherited = {entry.name for entry in fields(Options)}
    ordered = sorted(fields(Settings), key=lambda entry: entry.name in inherited)
    declared: dict[str, Field[Any]] = {entry.name: entry for entry in ordered}
    types = get_type_hints(Settings)
    chosen = [
        declared[name]
        for name in names or declared
        if declared[name].metadata["flag"] and name not in but
    ]

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        @wraps(command)
        def run(*args: Any, **values: Any) -> None:
            for entry in chosen:
                if (read := entry.metadata["read"]) is not None:
                    values[entry.name] = read(values[entry.name])
            command(*args, **values)

        signature = inspect.signature(command)
        parameters = [
            parameter
            for parameter in signature.parameters.values()
            if parameter.kind is not parameter.VAR_KEYWORD
        ]
        flags = [_flag(entry, types[entry.name]) for entry in chosen]
        annotations = {p.name: p.annotation for p in (*parameters, *flags)}
        run.__annotations__ = {**annotations, "return": None}
        run.__signature__ = inspect.Signature([*parameters, *flags])  # type: ignore[attr-defined]
        return run

    return decorate


def _flag(entry: "Field[Any]", hint: Any) -> inspect.Parameter:
    """One option as the parameter that Typer reads."""
    told = entry.metadata
    kind = hint if told["typed"] is None else told["typed"]
    return inspect.Parameter(
        entry.name,
        inspect.Parameter.KEYWORD_ONLY,
        default=entry.default,
        annotation=Annotated[kind, typer.Option(told["flag"], help=told["words"])],
    )
