"""Train several variants on identical batches: what `loopscope train` does."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from loopscope.batches import TrainingData
from loopscope.corpus import load_corpus
from loopscope.errors import InputError
from loopscope.models.config import LoopConfig, parse_variant
from loopscope.models.layout import Layout
from loopscope.models.load import check_seed, parse_device
from loopscope.training import StepReport, TrainConfig, train


def variant_config(variant: str, layout: str | Layout, **widths: Any) -> LoopConfig:
    """The configuration of one variant; `vanilla` gets the same compute without a loop.

    Args:
        variant: A variant name.
        layout: The layout of the looped variants.
        **widths: Further fields of `LoopConfig`.
    """
    parsed, name = Layout.parse(layout), parse_variant(variant)
    return LoopConfig(
        variant=name, layout=parsed.unshared if name == "vanilla" else parsed, **widths
    )


def plan_training(
    variants: Sequence[str],
    *,
    layout: str = "1+2R3+1",
    tokens: int = 2_000_000,
    d_model: int = 160,
    n_heads: int | None = None,
    vocab: int = 2048,
    seq_len: int = 256,
    batch_size: int = 8,
    lr: float = 3e-3,
    seed: int = 0,
    device: str = "cpu",
    dtype: str = "float32",
) -> dict[str, TrainConfig]:
    """The recipe of each variant; only the recurrence differs between them.

    Args:
        variants: Names of variants.
        layout: Layout of the looped variants; `vanilla` unrolls it.
        tokens: Training tokens, rounded up to whole steps.
        d_model: Width D.
        n_heads: Heads; D / 32 when not given.
        vocab: Vocabulary of the byte-level BPE that is trained on the text.
        seq_len: Tokens per window.
        batch_size: Windows per step.
        lr: Peak learning rate.
        seed: Of the initial weights and the order of batches.
        device: Where to train.
        dtype: `float32`, or `bfloat16` autocast.

    Raises:
        InputError: for settings that cannot be, or a variant given twice.
    """
    if tokens < 1 or batch_size < 1 or seq_len < 4:
        raise InputError(
            f"tokens and batch size must be at least 1 and seq_len at least 4, given {tokens}, "
            f"{batch_size}, {seq_len}."
        )
    check_seed(seed)
    configs: dict[str, TrainConfig] = {}
    for variant in variants:
        model = variant_config(
            variant,
            layout,
            d_model=d_model,
            n_heads=max(1, d_model // 32) if n_heads is None else n_heads,
            d_vocab=vocab,
            n_ctx=seq_len,
        )
        if model.variant in configs:
            raise InputError(f"{','.join(variants)} names {model.variant} twice; name each once.")
        configs[model.variant] = TrainConfig(
            model=model,
            steps=-(-tokens // (batch_size * seq_len)),
            batch_size=batch_size,
            seq_len=seq_len,
            lr=lr,
            seed=seed,
            data_seed=seed,
            device=device,
            dtype=dtype,
        )
    return configs


def run_training(
    out: str | Path,
    *,
    variants: Sequence[str],
    data: str | Path | None = None,
    half: bool = False,
    progress: Callable[[str, int, int, float], Any] | None = None,
    **recipe: Any,
) -> list[tuple[Path, float]]:
    """Train each variant on the same batches and write `out/<variant>/`.

    Args:
        out: Folder of the checkpoints.
        variants: Names of variants.
        data: `.txt`, `.jsonl` or `.parquet` to train on; the running Python's standard library
            when not given.
        half: Store the weights in float16.
        progress: Called with (variant, step, steps, loss).
        **recipe: As in `plan_training`.

    Returns:
        Each checkpoint folder with its validation loss in nats per token.

    Raises:
        InputError: for settings that cannot be, text that is too short, a folder that exists (all
            looked at before the first variant is trained), or a loss that is not finite.
    """
    configs = plan_training(variants, **recipe)
    folders = {name: Path(out) / name for name in configs}
    there = [str(folder) for folder in folders.values() if folder.exists()]
    if there:
        raise InputError(f"{', '.join(there)} exists already; choose another --out.")
    first = next(iter(configs.values()))
    parse_device(first.device)
    text = TrainingData.from_corpus(load_corpus(data), vocab=first.model.d_vocab)
    options = {"variants": ",".join(variants), **recipe}
    options |= {"data": str(data)} if data is not None else {}
    words = [f"--{key.removeprefix('n_').replace('_', '-')} {v}" for key, v in options.items()]
    command = " ".join(["loopscope train --out DIR", *words, *(["--half"] if half else [])])
    written = []
    for name, config in configs.items():

        def told(report: StepReport, name: str = name) -> None:
            if progress is not None:
                progress(name, report.step, report.steps, report.loss)

        provenance = {"command": command, "seed": config.seed}
        trained = train(
            config, text, folders[name], progress=told, provenance=provenance, half=half
        )
        written.append((folders[name], float(trained.provenance["val_loss"])))
    return written
