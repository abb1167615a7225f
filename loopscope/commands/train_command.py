"""`loopscope train`: checkpoints by the paper's recipe."""

from functools import partial
from pathlib import Path
from typing import Annotated

import typer


def train(
    out: Annotated[Path, typer.Option("--out", help="Folder; one checkpoint per variant in it.")],
    variants: Annotated[str, typer.Option("--variants", help="Comma-separated.")] = "base,mesh",
    layout: Annotated[str, typer.Option("--layout", help="Layout of the looped ones.")] = "1+2R3+1",
    data: Annotated[
        str | None,
        typer.Option("--data", help=".txt, .jsonl or .parquet; default: the standard library."),
    ] = None,
    tokens: Annotated[int, typer.Option("--tokens", help="Training tokens.")] = 2_000_000,
    d_model: Annotated[int, typer.Option("--d-model", help="Width D.")] = 160,
    heads: Annotated[int | None, typer.Option("--heads", help="Default: D/32.")] = None,
    vocab: Annotated[int, typer.Option("--vocab", help="Vocabulary of the tokenizer.")] = 2048,
    slots: Annotated[
        int | None, typer.Option("--slots", help="Memory slots B of mesh (default: K + 3).")
    ] = None,
    seq_len: Annotated[int, typer.Option("--seq-len", help="Tokens per window.")] = 256,
    batch_size: Annotated[
        int, typer.Option("--batch-size", help="Windows per step, over all processes.")
    ] = 8,
    accumulate: Annotated[
        int, typer.Option("--accumulate", help="Parts each batch is cut into, to save memory.")
    ] = 1,
    lr: Annotated[float, typer.Option("--lr", help="Peak learning rate.")] = 3e-3,
    warmup: Annotated[
        float, typer.Option("--warmup", help="Share of the steps that warm up.")
    ] = 0.01,
    weight_decay: Annotated[
        float, typer.Option("--weight-decay", help="Of AdamW, on matrices.")
    ] = 0.01,
    grad_clip: Annotated[
        float, typer.Option("--grad-clip", help="Largest norm of the gradient.")
    ] = 1.0,
    seed: Annotated[int, typer.Option("--seed", help="Weights and order of batches.")] = 0,
    eval_every: Annotated[
        int, typer.Option("--eval-every", help="Steps between validation losses.")
    ] = 100,
    keep_every: Annotated[
        int | None,
        typer.Option("--keep-every", help="Keep a checkpoint step-000500 … every so many steps."),
    ] = None,
    monitor_every: Annotated[
        int,
        typer.Option("--monitor-every", help="Steps between measures of loop collapse; 0: never."),
    ] = 100,
    save_seconds: Annotated[
        float, typer.Option("--save-seconds", help="Seconds between states to resume from.")
    ] = 60.0,
    device: Annotated[str | None, typer.Option("--device", help="cpu, cuda, cuda:0, mps …")] = None,
    dtype: Annotated[str, typer.Option("--dtype", help="float32, bfloat16.")] = "float32",
    compile: Annotated[bool, typer.Option("--compile", help="Use torch.compile.")] = False,
    half: Annotated[bool, typer.Option("--half", help="Store weights in float16.")] = False,
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
            out, variants=variants, layout=layout, data=data, tokens=tokens,
            d_model=d_model, n_heads=heads, vocab=vocab, slots=slots, seq_len=seq_len,
            batch_size=batch_size, accumulate=accumulate, lr=lr, seed=seed, eval_every=eval_every,
            device=device, dtype=dtype, compile=compile, half=half, keep_every=keep_every,
            monitor_every=monitor_every, save_seconds=save_seconds, warmup=warmup,
            weight_decay=weight_decay, grad_clip=grad_clip, progress=training_bars(bar),
            tell=partial(bar.console.print, markup=False),
        )  # fmt: skip
    if is_main():
        for folder, loss in written:
            print(f"{folder}  validation loss {loss:.4f} nats/token")
