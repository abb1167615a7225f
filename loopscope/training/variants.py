"""Train several variants on identical batches: what `loopscope train` does."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from loopscope.processes import is_main
from loopscope.text.corpus import load_corpus
from loopscope.training.batches import TrainingData
from loopscope.training.folder import RunFolder
from loopscope.training.recipe import plan_training
from loopscope.training.trainer import StepReport, train_model


def train_variants(
    out: str | Path,
    *,
    variants: Sequence[str] | str,
    data: str | Path | None = None,
    half: bool = False,
    keep_every: int | None = None,
    monitor_every: int = 0,
    save_seconds: float = 60.0,
    progress: Callable[[str, StepReport], Any] | None = None,
    tell: Callable[[str], Any] = print,
    **recipe: Any,
) -> list[tuple[Path, float]]:
    """Train each variant on the same batches and write `out/<variant>/`.

    The same call goes on where an earlier one was stopped.

    Args:
        out: Folder of the checkpoints.
        variants: Names of variants.
        data: `.txt`, `.jsonl` or `.parquet` to train on; the running Python's standard library
            when not given.
        half: Store the weights in float16.
        keep_every: Keep a step checkpoint every so many steps.
        monitor_every: Write the measures of loop collapse every so many steps; 0 for never.
        save_seconds: Save the state for resuming when so many seconds have passed.
        progress: Called with the variant and each step's report.
        tell: Given a sentence when a training is resumed or found finished.
        **recipe: As in `plan_training`.

    Returns:
        Each checkpoint folder with its validation loss in nats per token.

    Raises:
        InputError: for settings that cannot be, text that is too short, a folder of another
            training (all looked at before the first variant is trained), a full disk, or a loss
            that is not finite.
    """
    configs = plan_training(variants, **recipe)
    first = next(iter(configs.values()))
    text = TrainingData.from_corpus(load_corpus(data), vocab=first.model.d_vocab)
    folders = {name: Path(out).expanduser() / name for name in configs}
    runs = {n: RunFolder(folders[n], config, text.fingerprint) for n, config in configs.items()}
    if is_main():
        for run in runs.values():
            run.check()
    options = {"data": data, **recipe, "keep_every": keep_every, "monitor_every": monitor_every}
    command = _command(list(configs), options, half)
    written = []
    for name, config in configs.items():

        def report_step(report: StepReport, name: str = name) -> None:
            if progress is not None:
                progress(name, report)

        if is_main() and runs[name].finished:
            tell(f"{folders[name]} is trained already.")
        trained = train_model(
            config, text, folders[name], progress=report_step, tell=tell, half=half,
            provenance={"command": command, "seed": config.seed}, keep_every=keep_every,
            monitor_every=monitor_every, save_seconds=save_seconds,
        )  # fmt: skip
        written.append((folders[name], trained.provenance["val_loss"]))
    return written


def _command(variants: Sequence[str], options: dict[str, Any], half: bool) -> str:
    """The command line that does the same."""
    words = ["loopscope", "train", "--out", "DIR", "--variants", ",".join(variants)]
    for key, value in options.items():
        if value is True:
            words.append(f"--{key}")
        elif value is not None and value is not False:
            words += [f"--{key.removeprefix('n_').replace('_', '-')}", str(value)]
    return " ".join([*words, *(["--half"] if half else [])])
