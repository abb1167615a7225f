"""Options that several commands share."""

from pathlib import Path
from typing import Annotated

import typer

from loopscope.errors import InputError

Models = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[MODEL]...",
        help="Zoo names (vanilla, base, residual, anchor, anchor_emb, mesh), checkpoint folders, "
        "folders saved by Hugging Face, ids org/name (with @init the untrained twin of any of "
        "them), and your own module:factory or file.py:factory.",
    ),
]
Loops = Annotated[
    str | None,
    typer.Option("--loops", help="Iterations to run, where the model allows it: 8, or H=2,L=3."),
]
SpecFile = Annotated[
    Path | None,
    typer.Option("--spec", help="How a foreign model loops (TOML; see inspect --write-spec)."),
]
Trust = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run Python code that came with a checkpoint.")
]
DeviceMap = Annotated[
    str | None,
    typer.Option("--device-map", help="Spread a Hugging Face model over devices, e.g. auto."),
]
Out = Annotated[Path, typer.Option("--out", help="Folder for figures, tables, provenance.")]
Data = Annotated[
    str | None,
    typer.Option(
        "--data",
        help=".txt, .jsonl or .parquet (column `text`), or integer .npy (samples × tokens). "
        "Default: the shipped held-out samples.",
    ),
]
Samples = Annotated[int, typer.Option("--samples", help="Windows of text to measure.")]
Tokens = Annotated[int, typer.Option("--tokens", help="Tokens per window.")]
Device = Annotated[str | None, typer.Option("--device", help="cpu, cuda, cuda:0, mps …")]
Dtype = Annotated[
    str | None, typer.Option("--dtype", help="float32 (default), float64, bfloat16, float16.")
]
BatchSize = Annotated[int, typer.Option("--batch-size", help="Windows per forward pass.")]
Seed = Annotated[int, typer.Option("--seed", help="Chooses windows and @init weights.")]
LayoutOption = Annotated[
    str | None,
    typer.Option("--layout", help="Groups the layers of a model without a loop, e.g. 4+8+8+4."),
]
Center = Annotated[
    bool, typer.Option("--center", help="Centre the states before spectra and ranks.")
]
DropFirst = Annotated[
    int, typer.Option("--drop-first", help="Leave out each window's first tokens (sinks).")
]
NormalizeRows = Annotated[
    bool, typer.Option("--normalize-rows", help="Scale each token's state to norm 1 first.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def parse_loops(text: str | None) -> int | dict[str, int] | None:
    """The value of --loops: a number, or numbers by loop name.

    Raises:
        InputError: for anything else.
    """
    if text is None:
        return None
    if text.isdecimal():
        return int(text)
    named = dict(part.strip().partition("=")[::2] for part in text.split(","))
    if all(name and value.isdecimal() for name, value in named.items()):
        return {name: int(value) for name, value in named.items()}
    raise InputError(f"--loops takes a number, or numbers by loop name (H=2,L=3), given {text!r}.")
