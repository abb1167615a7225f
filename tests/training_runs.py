"""Folders of training runs as `loopscope train` writes them, with made-up losses."""

import json
import math
from pathlib import Path

import numpy as np

from loopscope.analysis.tables.frames import Tables
from loopscope.models.native.configuration import Layout, LoopConfig
from loopscope.training import TrainConfig
from loopscope.training.runs import read_runs

SKILL = {"vanilla": 0.0, "base": 0.1, "residual": 0.08, "anchor": 0.05, "mesh": 0.01}
HEADER = "step,tokens,train_loss,val_loss,lr,tokens_per_s"


def config_of(variant: str, layout: str, *, slots: int | None = None, **widths) -> LoopConfig:
    """A small model; vanilla unrolls the layout."""
    parsed = Layout.parse(layout)
    sizes = {"d_model": 32, "n_heads": 1, "d_vocab": 64, "n_ctx": 16} | widths
    if variant == "vanilla":
        parsed = parsed.unshared
    return LoopConfig(variant=variant, layout=parsed, slots=slots, **sizes)


def val_losses(config: LoopConfig, seed: int, steps: int, every: int) -> dict[int, float]:
    """Step → validation loss: a power law, lower for more layers, different for every seed."""
    rng = np.random.default_rng([seed, *config.variant.encode(), *str(config.layout).encode()])
    end = 3.6 - 0.25 * math.log(config.layout.n_param_layers * config.d_model / 32)
    end += SKILL.get(config.variant, 0.04) - 0.01 * (config.slots or 0) + rng.normal(0, 0.015)
    at = [*range(every, steps, every), steps]
    return {s: end + 2.5 * (s / every) ** -0.9 + float(rng.normal(0, 0.004)) for s in at}


def write_run(
    folder: Path,
    variant: str,
    layout: str = "1+2R3+1",
    *,
    seed: int = 0,
    steps: int = 1500,
    stop: int | None = None,
    text: str = "a" * 64,
    slots: int | None = None,
    losses: dict[int, float] | None = None,
    widths: dict[str, int] | None = None,
    **settings,
) -> Path:
    """Write one run; `stop` ends it early, as a killed or running one."""
    config = config_of(variant, layout, slots=slots, **(widths or {}))
    recipe = {"batch_size": 8, "seq_len": 16} | settings
    training = TrainConfig(model=config, steps=steps, seed=seed, data_seed=seed, **recipe)
    losses = losses or val_losses(config, seed, steps, training.eval_every)
    lines = [HEADER]
    for step in sorted({*range(10, steps, 10), *losses, steps}):
        if step > (stop or steps):
            continue
        val = losses.get(step)
        train = 3 + 40 / (step + 9)
        tokens = step * training.batch_size * training.seq_len
        told = "" if val is None else repr(val)
        lines.append(f"{step},{tokens},{train},{told},{training.lr_at(step - 1)},{1000.0 + step}")
    folder.mkdir(parents=True)
    (folder / "log.csv").write_text("\n".join(lines) + "\n")
    told = {"training": training.to_dict(), "data": {"sha256": text, "heldout_share": 0.1}}
    name = "run.json" if stop else "provenance.json"
    (folder / name).write_text(json.dumps(told))
    if stop is None:
        (folder / "config.json").write_text("{}")
    return folder


BASE = [{100: 5.0, 200: 4.0, 300: 3.0}, {100: 5.5, 200: 4.3, 300: 3.6}, {200: 4.1, 300: 3.3}]
MESH = {100: 4.5, 200: 3.5, 300: 2.75}
DEEP = {100: 4.4, 200: 3.4, 300: 2.5}


def add(folder: Path, name: str, variant: str, layout: str = "1+2R3+1", **given) -> None:
    """Write a short run under a name."""
    write_run(folder / name, variant, layout, **({"steps": 300} | given))


def example(folder: Path) -> Tables:
    """base with three seeds and one unfinished, mesh, vanilla, and a deeper base."""
    for seed, losses in enumerate(BASE):
        add(folder, f"base-{seed}", "base", losses=losses, seed=seed)
    add(folder, "base-going", "base", losses={100: 9.0, 200: 8.0, 300: 7.0}, seed=3, stop=210)
    add(folder, "mesh", "mesh", losses=MESH)
    add(folder, "vanilla", "vanilla", losses={100: 4.25, 300: 2.0})
    add(folder, "deep", "base", "1+3R2+2", losses=DEEP)
    return read_runs([folder])


def lines_of(ax) -> dict:
    """The lines of a panel by their names."""
    return {str(line.get_label()): line for line in ax.get_lines()}


def points(line) -> list[list[float]]:
    """Data of a line, not what is shown of it."""
    return np.asarray(line.get_xydata(), float).tolist()


def note_of(fig) -> str:
    """The small print, without its line breaks."""
    return " ".join(fig._supxlabel.get_text().split())
