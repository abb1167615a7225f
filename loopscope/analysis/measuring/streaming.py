"""Measure: run a model over samples and keep nothing but rows (states → tables)."""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import pandas as pd
from torch import Tensor

from loopscope.analysis.measures.cka_estimators import MIN_TOKENS, check
from loopscope.analysis.measuring.course import COURSE, Course, longer_model, why_unread
from loopscope.analysis.measuring.recorder import Options, Recorder
from loopscope.analysis.measuring.threads import one_thread_per_sample
from loopscope.analysis.measuring.token_windows import checked_tokens, samples_provenance
from loopscope.analysis.tables.frames import Tables
from loopscope.errors import InputError, unknown_name
from loopscope.models.native.loop_model import LoopModel
from loopscope.models.trajectory import Trajectory
from loopscope.probes.state_capture import capture, shortened
from loopscope.provenance import commit, versions

MEASURES = ("update", "cka", "spectrum", "rank", "routing", "delta", "readout", "loss")
DEFAULT = ("update", "cka", "spectrum", "rank", "routing")


def measure(
    model: Any,
    samples: Any,
    measures: Sequence[str] = DEFAULT,
    *,
    batch_size: int = 16,
    kernels: Sequence[str] = ("rbf",),
    bandwidth: float = 1.0,
    drop_first: int = 0,
    center: bool = False,
    normalize_rows: bool = False,
    more_loops: int | None = None,
    name: str | None = None,
    progress: Callable[[int], Any] | None = None,
) -> Tables:
    """Measure a model on samples: relative update, CKA, spectrum, ranks, routing (MeSH Section 2).

    Streaming: each batch is captured, measured and let go, so memory does not grow with the number
    of samples except by the returned rows. Samples of a batch are measured on as many threads as
    torch is set to use, each of them computing on its own; results do not depend on their number.

    Args:
        model: A native model, or a wrapped one.
        samples: Token ids (samples × tokens) as an integer tensor or array, or what
            `loopscope.text.windows.load_samples` returns.
        measures: Any of `MEASURES`; `routing` fills the table `tokens` too.
        batch_size: Samples per forward pass.
        kernels: Kernels of the CKA, `rbf` and/or `linear`.
        bandwidth: RBF bandwidth as a fraction of sqrt(median(d²)).
        drop_first: Leave out the first tokens of each sample, in every table but loss and tokens.
        center: Subtract each state's mean over the tokens before spectrum and ranks.
        normalize_rows: Scale each token's state to norm 1 before CKA, spectrum and ranks.
        more_loops: T, iterations of the main loop to run besides its own K, for delta and readout;
            models that do not allow it are measured up to K (`notes` says so).
        name: Name of the model in the tables; the model's own when not given.
        progress: Called with the number of samples done since the last call.

    Returns:
        One table per measure, the others None. A model with several loops has rows for each, told
        apart by the column `loop`; the loss, one per sample, stands with the main loop. Routing
        has no rows for a model without routers and gates, loss none for one that predicts no next
        token; `notes` in the provenance says why.

    Raises:
        InputError: On unknown measures or kernels, samples that cannot be measured, or a model
            whose number of iterations changes between batches.
    """
    whole = Measuring(
        model, samples, measures, batch_size=batch_size, name=name, kernels=kernels,
        bandwidth=bandwidth, drop_first=drop_first, center=center,
        normalize_rows=normalize_rows, more_loops=more_loops,
    )  # fmt: skip
    return whole.part(0, len(whole), progress)


class Measuring:
    """One model on one set of samples, measured in parts.

    Attributes:
        name: Name of the model in the tables.
        tokens: The samples, (sample, pos).
        provenance: Where the tables come from: of the whole set, the same for every part. Its
            notes are complete once a part was measured.
    """

    def __init__(
        self,
        model: Any,
        samples: Any,
        measures: Sequence[str] = DEFAULT,
        *,
        batch_size: int = 16,
        name: str | None = None,
        step: int | None = None,
        kernels: Sequence[str] = ("rbf",),
        **options: Any,
    ) -> None:
        """Check the samples and options.

        Args:
            model: A native model, or a wrapped one.
            samples: As in `measure`.
            measures: Any of `MEASURES`.
            batch_size: Samples per forward pass.
            name: Name of the model in the tables; the model's own when not given.
            step: The training step in the tables, of a series.
            kernels: Kernels of the CKA.
            **options: Further fields of `record.Options`, as in `measure`.

        Raises:
            InputError: On unknown measures or kernels, or samples that cannot be measured.
        """
        wanted = (measures,) if isinstance(measures, str) else tuple(dict.fromkeys(measures))
        for one in wanted:
            if one not in MEASURES:
                raise unknown_name("measure", one, MEASURES)
        if not wanted:
            raise InputError(f"no measures asked for; choose from {', '.join(MEASURES)}.")
        chosen = (kernels,) if isinstance(kernels, str) else tuple(dict.fromkeys(kernels))
        self.options = Options(measures=wanted, kernels=chosen, **options)
        self.tokens = checked_tokens(samples, d_vocab=getattr(model.config, "d_vocab", None))
        _check(self.tokens, self.options, batch_size)
        self.model, self.batch_size, self.step = model, batch_size, step
        self.name = model.name if name is None else name
        self.provenance = _provenance(model, samples, self.tokens, self.options)
        self._no_loss = _sees_ahead(model) if {"loss", "readout"} & {*wanted} else ""
        self._longer: tuple[Any, str] | None = None
        self._unread: str | None = None

    def __len__(self) -> int:
        return len(self.tokens)

    def part(self, start: int, stop: int, progress: Callable[[int], Any] | None = None) -> Tables:
        """Measure some of the samples.

        Args:
            start: The first.
            stop: The one after the last.
            progress: Called with the number of samples done since the last call.

        Returns:
            Their tables, under their own numbers; `tokens` has rows in the part with sample 0.

        Raises:
            InputError: if the number of iterations changes between batches.
        """
        recorder: Recorder | None = None
        with one_thread_per_sample() as each:
            for begin in range(start, stop, self.batch_size):
                batch = self.tokens[begin : min(begin + self.batch_size, stop)]
                logits = bool({"loss", "readout"} & {*self.options.measures}) and not self._no_loss
                trajectory, longer = self._captured(batch, logits)
                if recorder is None:
                    recorder = self._recorder(trajectory, stop - start)
                    if start == 0:
                        words = _strings(self.model, batch[0])
                        recorder.token_table(self.name, trajectory, words)
                recorder.add(begin - start, trajectory, each, longer)
                del trajectory, longer
                if progress is not None:
                    progress(len(batch))
        assert recorder is not None
        frames = {
            table: _numbered(frame, 0 if table == "tokens" else start, self.step)
            for table, frame in recorder.frames(self.name).items()
        }
        return Tables(**frames, provenance={"models": {self.name: self.provenance}})

    def _captured(self, batch: Tensor, logits: bool) -> tuple[Trajectory, Trajectory | None]:
        """The batch's trajectory, and that with more iterations where one run gives both."""
        longer = None if self._longer is None else self._longer[0]
        if longer is None or not isinstance(self.model, LoopModel):
            return capture(self.model, batch, memory=False, logits=logits), None
        long = capture(longer, batch, memory=False)
        return shortened(self.model, long, logits=logits), long

    def _recorder(self, first: Trajectory, samples: int) -> Recorder:
        measures = self.options.measures
        if {"loss", "readout"} & {*measures} and not self._no_loss:
            self._no_loss = _no_logits(first, self.tokens, self.model)
        course = None
        if {*COURSE} & {*measures}:
            if self._longer is None:
                self._longer = longer_model(self.model, first.K, self.options.more_loops)
            if self._unread is None and "readout" in measures:
                self._unread = self._no_loss or why_unread(self.model, first)
            course = Course(
                self.model, first, samples, measures,
                longer=self._longer[0], unread=self._unread or "",
            )  # fmt: skip
        recorder = Recorder(first, samples, self.options, loss=not self._no_loss, course=course)
        notes = list(self.provenance["notes"])
        if "routing" in measures and not recorder.has_routing:
            notes.append(f"routing: {_no_routing(self.model)}, so its table has no rows")
        if "loss" in measures and self._no_loss:
            notes.append(f"loss: {self._no_loss}; the table has no rows")
        if course is not None:
            notes += [
                *([self._longer[1]] if self._longer and self._longer[1] else []),
                *course.notes,
            ]
        self.provenance["notes"] = list(dict.fromkeys(notes))
        return recorder


def _numbered(frame: pd.DataFrame, start: int, step: int | None) -> pd.DataFrame:
    """Rows under the numbers of their samples and the step of their checkpoint."""
    if start:
        frame["sample"] = (frame["sample"] + start).astype("int32")
    if step is not None:
        frame["step"] = pd.array([step], dtype="Int64").repeat(len(frame))
    return frame


def _check(tokens: Tensor, options: Options, batch_size: int) -> None:
    if batch_size < 1:
        raise InputError(f"batch_size is {batch_size}; it must be at least 1.")
    if options.drop_first < 0:
        raise InputError(f"drop_first is {options.drop_first}; it must be 0 or more.")
    if not options.kernels:
        raise InputError("no kernels asked for; choose rbf, linear or both.")
    left = tokens.shape[1] - options.drop_first
    if left < MIN_TOKENS:
        dropped = f", {options.drop_first} of which are dropped" if options.drop_first else ""
        raise InputError(
            f"samples have {tokens.shape[1]} tokens{dropped}; at least {MIN_TOKENS} must be left "
            "to measure. Give longer samples."
        )
    check(left, options.kernels, options.bandwidth)


def _strings(model: Any, tokens: Tensor) -> list[str]:
    """Each token as text, or as its number for a model without a tokenizer."""
    tokenizer = getattr(model, "tokenizer", None)
    if tokenizer is None:
        return [str(i) for i in tokens.tolist()]
    return [tokenizer.decode([i], skip_special_tokens=False) for i in tokens.tolist()]


def _sees_ahead(model: Any) -> str:
    """Why a model that was wrapped predicts no next token; empty where it does."""
    found = getattr(model, "map", None)
    if found is None or found.causal:
        return ""
    if found.causal is None:
        return "the model returns no logits for each token"
    return "the model looks at later tokens, so it predicts no next token"


def _no_logits(trajectory: Trajectory, tokens: Tensor, model: Any) -> str:
    """Why what a model returns cannot be logits of next tokens; empty where it can."""
    logits, ids = trajectory.logits, trajectory.tokens
    if logits is None or ids is None or logits.shape[:-1] != ids.shape:
        return "the model returns no logits for each token"
    vocabulary = getattr(model.config, "d_vocab", None) or int(tokens.max()) + 1
    if logits.shape[-1] < vocabulary:
        return (
            f"the model returns {logits.shape[-1]} numbers for each token, fewer than the "
            f"{vocabulary} of its vocabulary"
        )
    return ""


def _no_routing(model: Any) -> str:
    if hasattr(model, "map"):
        return "no routers and no gates were found in the model or named in its spec"
    return "the model has no memory slots"


def _provenance(model: Any, samples: Any, tokens: Tensor, options: Options) -> dict[str, Any]:
    """Everything needed to tell two measurements apart, as JSON values."""
    config = model.config
    trained = getattr(config, "n_ctx", None)
    notes = []
    if trained is not None and tokens.shape[1] > trained:
        notes = [f"samples of {tokens.shape[1]} tokens are longer than n_ctx = {trained}"]
    origin = getattr(model, "provenance", None) or {}
    first = next(model.parameters())  # of a model spread over devices, one stands for all
    mapped = {"map": model.map.to_dict()} if hasattr(model, "map") else {}
    return {
        "config": config.to_dict() if hasattr(config, "to_dict") else None,
        **mapped,
        "dtype": str(first.dtype).removeprefix("torch."),
        "device": first.device.type,
        "training": origin,
        "samples": samples_provenance(samples, tokens),
        "options": asdict(options),
        "versions": versions(),
        "commit": commit(),
        "notes": notes,
    }
