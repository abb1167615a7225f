"""`loopscope params`: parameter counts."""

import json
from typing import Annotated, Any

import typer

from loopscope.commands.results import fail
from loopscope.commands.signatures import Json, with_settings


@with_settings(["loops", "spec", "example", "trust_remote_code"])
def params(
    model: Annotated[str | None, typer.Argument(help="A model; otherwise give a layout.")] = None,
    layout: Annotated[str | None, typer.Option("--layout", help="e.g. 4+8R2+4.")] = None,
    variant: Annotated[str | None, typer.Option("--variant", help="e.g. mesh.")] = None,
    d_model: Annotated[
        int | None, typer.Option("--d-model", help="Width D (2048 when not given).")
    ] = None,
    vocab: Annotated[
        int | None, typer.Option("--vocab", help="Vocabulary (52352 when not given).")
    ] = None,
    slots: Annotated[int | None, typer.Option("--slots", help="Memory slots B.")] = None,
    as_json: Json = False,
    **settings: Any,
) -> None:
    """Count parameters: the paper's table, a model, or any layout and variant."""
    from loopscope.commands.printing import print_counts
    from loopscope.models.native import layout_counts, model_counts, paper_counts
    from loopscope.models.opening import load

    shape: Any = {"variant": variant, "d_model": d_model, "d_vocab": vocab, "slots": slots}
    shaped = any(value is not None for value in shape.values())
    if model is not None:
        if layout is not None or shaped:
            fail("give a model, or --layout with its options, not both.")
        rows = model_counts(load(model, **settings))
    elif layout is not None:
        rows = layout_counts(layout, **shape)
    elif shaped:
        fail("--variant, --d-model, --vocab and --slots need a --layout, such as 4+8R2+4.")
        return
    else:
        rows = paper_counts()
    if as_json:
        print(json.dumps(rows, indent=2))
    else:
        print_counts(rows)
