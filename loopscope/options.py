"""Options that several commands share."""

from pathlib import Path
from typing import Annotated

import typer

Models = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[MODEL]...",
        help="Zoo names (vanilla, base, residual, anchor, anchor_emb, mesh), checkpoint folders, "
        "GPT-NeoX folders saved by Hugging Face; with @init the untrained twin of any of them.",
    ),
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
    typer.Option("--layout", help="Groups a vanilla model's layers into blocks, e.g. 4+8+8+4."),
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
