"""`loopscope inspect`: what a model is made of."""

import json
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Annotated, Any

import typer

from loopscope.commands.results import fail
from loopscope.commands.signatures import Json, with_settings


@with_settings(
    [
        "layout", "loops", "spec", "example", "trust_remote_code", "device", "device_map", "dtype",
    ]
)  # fmt: skip
def inspect(
    model: Annotated[str, typer.Argument(help="As MODEL of figures.")],
    hooks: Annotated[bool, typer.Option("--hooks", help="List every hook name.")] = False,
    write_spec: Annotated[
        Path | None,
        typer.Option("--write-spec", help="Write how a foreign model loops to a TOML file."),
    ] = None,
    as_json: Json = False,
    **settings: Any,
) -> None:
    """Show layout, parameters, states and hook names of a model, and how a foreign one loops."""
    from loopscope.commands import printing
    from loopscope.models.opening import load

    if write_spec is not None and write_spec.exists():
        fail(f"{write_spec} is there already; remove it, or give --write-spec another name.")
    with redirect_stdout(sys.stderr):  # what a model prints is no part of --json
        loaded = load(model, **settings)
    if write_spec is not None:
        from loopscope.files import write_text

        if not loaded.structure():
            fail(f"{model} is a native model, whose loop is known; --write-spec is for others.")
        write_text(loaded.specification(), write_spec)
    facts = loaded.describe()
    if as_json:
        patterns = {name: str(n) for name, n in loaded.hook_patterns().items()}
        names = list(loaded.hook_dict) if hooks else patterns
        print(json.dumps({**facts, **loaded.structure(), "hooks": names}, indent=2))
        return
    printing.print_facts(facts)
    printing.print_structure(loaded, every=hooks)
    if write_spec is not None:
        print(f"\nwritten: {write_spec}; change what is wrong, then give it with --spec")
