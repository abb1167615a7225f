"""Parameter counts, from the model itself on the meta device."""

from typing import Any

import torch

from loopscope.models.hooked import Hooked, ParameterCount
from loopscope.models.native.configuration import Layout, LoopConfig
from loopscope.models.native.loop_model import LoopModel


def count_parameters(config: LoopConfig) -> ParameterCount:
    """Count the parameters of a configuration without allocating them.

    Args:
        config: Widths, layout and variant.

    Returns:
        The counts.
    """
    with torch.device("meta"):
        return LoopModel(config, seed=None).counts()


def paper_table() -> list[tuple[str, LoopConfig, ParameterCount]]:
    """The rows of MeSH Table 5 (D = 2048, vocabulary padded to 52352) and Pythia's sizes."""
    loop = Layout.parse("4+8R2+4")
    widths: dict[str, Any] = {"d_model": 2048, "n_heads": 16, "d_vocab": 52352}
    rows: list[tuple[str, LoopConfig]] = [
        ("vanilla 24", LoopConfig(variant="vanilla", layout=Layout.parse("24"), **widths)),
        ("recursive 4+8R2+4", LoopConfig(variant="base", layout=loop, **widths)),
        ("+mesh 4+8R2+4", LoopConfig(variant="mesh", layout=loop, **widths)),
    ]
    for label, (layers, width, heads, vocab) in PYTHIA.items():
        config = LoopConfig(
            variant="vanilla",
            layout=Layout(prelude=layers),
            d_model=width,
            n_heads=heads,
            d_vocab=vocab,
        )
        rows.append((f"pythia-{label}", config))
    return [(label, config, count_parameters(config)) for label, config in rows]


def model_counts(model: Hooked) -> list[dict[str, Any]]:
    """Give the counts of one model as a table of one row.

    Args:
        model: A native or wrapped model.

    Returns:
        One row: name, layout, variant, widths, slots and counts.
    """
    return [_row(str(model.name), model.config, model.counts())]


def layout_counts(
    layout: str,
    *,
    variant: str | None = None,
    d_model: int | None = None,
    d_vocab: int | None = None,
    slots: int | None = None,
) -> list[dict[str, Any]]:
    """Give the counts of a layout as a table of one row; widths default to MeSH Table 5's.

    Args:
        layout: A layout string.
        variant: The variant; `base` with a loop and `vanilla` without one when not given.
        d_model: Width D; 2048 when not given.
        d_vocab: Vocabulary size V; 52352 when not given.
        slots: Memory slots of `mesh`; K + 3 when not given.

    Returns:
        One row: name, layout, variant, widths, slots and counts.
    """
    parsed = Layout.parse(layout)
    config = LoopConfig(
        variant=variant or ("base" if parsed.shared else "vanilla"),
        layout=parsed,
        d_model=2048 if d_model is None else d_model,
        n_heads=1,
        d_vocab=52352 if d_vocab is None else d_vocab,
        slots=slots,
    )
    return [_row(f"{config.variant} {config.layout}", config, count_parameters(config))]


def paper_counts() -> list[dict[str, Any]]:
    """The rows of `paper_table` as plain values."""
    return [_row(*row) for row in paper_table()]


def _row(name: str, config: Any, count: ParameterCount) -> dict[str, Any]:
    return {
        "name": name, "layout": str(config.layout), "variant": config.variant,
        "d_model": config.d_model, "d_vocab": config.d_vocab, "slots": config.slots,
        **count.to_dict(),
    }  # fmt: skip


PYTHIA = {  # layers, width, heads, vocabulary
    "70m": (6, 512, 8, 50304),
    "160m": (12, 768, 12, 50304),
    "410m": (24, 1024, 16, 50304),
    "1b": (16, 2048, 8, 50304),
    "1.4b": (24, 2048, 16, 50304),
    "2.8b": (32, 2560, 32, 50304),
    "6.9b": (32, 4096, 32, 50432),
    "12b": (36, 5120, 40, 50688),
}
