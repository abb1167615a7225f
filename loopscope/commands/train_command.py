"""`loopscope train`: checkpoints by the paper's recipe."""

from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from loopscope.commands.signatures import with_settings
from loopscope.training import TrainOptions

FLAGS = (
    "layout", "data", "tokens", "d_model", "n_heads", "vocab", "slots", "seq_len", "batch_size",
    "accumulate", "lr", "warmup", "weight_decay", "grad_clip", "seed", "eval_every", "keep_every",
    "monitor_every", "save_seconds", "device", "dtype", "compile", "half",
)  # fmt: skip
"""In the order of `--help`."""
DEFAULTS = {"device": None, "monitor_every": 100}
"""Unlike Python, the command takes a GPU where there is one, and watches for collapse."""


@with_settings(FLAGS, kind=TrainOptions, defaults=DEFAULTS)
def train(
    out: Annotated[Path, typer.Option("--out", help="Folder; one checkpoint per variant in it.")],
    variants: Annotated[str, typer.Option("--variants", help="Comma-separated.")] = "base,mesh",
    **settings: Any,
) -> None:
    """Train variants with the paper's recipe, on identical batches.

    Stopped at any moment, the same command goes on and ends as it would have. `vanilla` among the
    variants gets the same compute without a loop. Several GPUs or processes: accelerate launch
    --multi_gpu --num_processes N -m loopscope.cli train ...
    """
    from loopscope.commands.printing import progress_bar, training_bars
    from loopscope.processes import is_main
    from loopscope.training import train_variants

    with progress_bar(shown=is_main()) as bar:
        written = train_variants(
            out, variants=variants, **settings,
            progress=training_bars(bar), tell=partial(bar.console.print, markup=False),
        )  # fmt: skip
    if is_main():
        for folder, loss in written:
            print(f"{folder}  validation loss {loss:.4f} nats/token")
