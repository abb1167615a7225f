"""Train several variants on identical batches: what `loopscope train` does."""

from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from loopscope.analysis import takes
from loopscope.processes import is_main
from loopscope.text import load_corpus
from loopscope.training.batches import TrainingData
from loopscope.training.folder import RunFolder
from loopscope.training.recipe import PlanOptions, TrainOptions, plan_training
from loopscope.training.trainer import StepReport, train_model


@takes(TrainOptions)
def train_variants(
    out: str | Path,
    *,
    variants: Sequence[str] | str,
    progress: Callable[[str, StepReport], Any] | None = None,
    tell: Callable[[str], Any] = print,
    **settings: Any,
) -> list[tuple[Path, float]]:
    """Train each variant on the same batches and write `out/<variant>/`.

    The same call goes on where an earlier one was stopped.

    Args:
        out: Folder of the checkpoints.
        variants: Names of variants.
        progress: Called with the variant and each step's report.
        tell: Given a sentence when a training is resumed or found finished.
        **settings: As `TrainOptions` describes them: `data`, `half`, `keep_every`,
            `monitor_every`, `save_seconds`, and those of `plan_training`.

    Returns:
        Each checkpoint folder with its validation loss in nats per token.

    Raises:
        InputError: for settings that cannot be, text that is too short, a folder of another
            training (all looked at before the first variant is trained), a full disk, or a loss
            that is not finite.
    """
    recipe = {name: value for name, value in settings.items() if name not in _OF_A_RUN}
    how = TrainOptions(**{name: settings[name] for name in settings.keys() - recipe})
    configs = plan_training(variants, **recipe)
    first = next(iter(configs.values()))
    text = TrainingData.from_corpus(load_corpus(how.data), vocab=first.model.d_vocab)
    folders = {name: Path(out).expanduser() / name for name in configs}
    runs = {
        name: RunFolder(folders[name], config, text.fingerprint) for name, config in configs.items()
    }
    if is_main():
        for run in runs.values():
            run.check()
    stored = {"keep_every": how.keep_every, "monitor_every": how.monitor_every}
    command = _command(list(configs), {"data": how.data, **recipe, **stored}, how.half)
    written = []
    for name, config in configs.items():

        def report_step(report: StepReport, name: str = name) -> None:
            if progress is not None:
                progress(name, report)

        if is_main() and runs[name].finished:
            tell(f"{folders[name]} is trained already.")
        trained = train_model(
            config, text, folders[name], progress=report_step, tell=tell, half=how.half,
            provenance={"command": command, "seed": config.seed}, keep_every=how.keep_every,
            monitor_every=how.monitor_every, save_seconds=how.save_seconds,
        )  # fmt: skip
        written.append((folders[name], trained.provenance["val_loss"]))
    return written


_OF_A_RUN = {entry.name for entry in fields(TrainOptions)} - {
    entry.name for entry in fields(PlanOptions)
}


def _command(variants: Sequence[str], options: dict[str, Any], half: bool) -> str:
    """The command line that does the same."""
    words = ["loopscope", "train", "--out", "DIR", "--variants", ",".join(variants)]
    for key, value in options.items():
        if value is True:
            words.append(f"--{key}")
        elif value is not None and value is not False:
            words += [f"--{key.removeprefix('n_').replace('_', '-')}", str(value)]
    return " ".join([*words, *(["--half"] if half else [])])
