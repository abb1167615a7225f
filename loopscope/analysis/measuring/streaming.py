"""Measure: run a model over samples and keep nothing but rows (states → tables)."""

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from loopscope.analysis.measures import Setup, check
from loopscope.analysis.measuring.map_fitting import FittedReading, fitted_reading
from loopscope.analysis.measuring.recorder import Recorder, one_thread_per_sample
from loopscope.analysis.measuring.state_positions import position_notes, state_shapes
from loopscope.analysis.measuring.token_windows import (
    checked_tokens,
    sample_documents,
    samples_provenance,
)
from loopscope.analysis.options import Options, build_options, check_batch_size, takes
from loopscope.analysis.tables import BY_NAME, DEFAULT, Tables
from loopscope.errors import InputError
from loopscope.models import Hooked, Trajectory
from loopscope.names import MIN_TOKENS
from loopscope.probes import capture
from loopscope.provenance import commit, versions


@takes(Options, but=("measures",))
def measure(
    model: Hooked,
    samples: Any,
    measures: Sequence[str] = DEFAULT,
    *,
    batch_size: int = 16,
    name: str | None = None,
    progress: Callable[[int], Any] | None = None,
    **options: Any,
) -> Tables:
    """Measure a model on samples: relative update, CKA, spectrum, ranks, routing (MeSH Section 2).

    Streaming: each batch is captured, measured and let go, so memory does not grow with the number
    of samples except by the returned rows. Samples of a batch are measured on as many threads as
    torch is set to use, each of them computing on its own; results do not depend on their number.

    Args:
        model: A native model, or a wrapped one.
        samples: Token ids (samples × tokens) as an integer tensor or array, or what
            `loopscope.load_samples` returns.
        measures: Any of `MEASURES`; `routing` fills the table `tokens` too.
        batch_size: Samples per forward pass.
        name: Name of the model in the tables; the model's own when not given.
        progress: Called with the number of samples done since the last call.
        **options: `kernels`, `bandwidth`, `drop_first`, `center`, `normalize_rows`, `more_loops`,
            `refit_coda`, as `Options` describes them.

    Returns:
        One table per measure, the others None. A model with several loops has rows for each, told
        apart by the column `loop`; the loss, one per sample, stands with the main loop. Routing
        has no rows for a model without routers and gates, loss none for one that predicts no next
        token; `notes` in the provenance says why.

    Raises:
        InputError: On unknown measures, kernels or options, samples that cannot be measured, or a
            model whose number of iterations changes between batches.
    """
    keywords = {**options, "measures": measures}
    settings = build_options(Options, keywords, "measure", ("batch_size", "name"))
    measuring = Measuring(model, samples, settings, batch_size=batch_size, name=name)
    return measuring.part(0, len(measuring), progress)


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
        model: Hooked,
        samples: Any,
        options: Options,
        *,
        batch_size: int = 16,
        name: str | None = None,
        step: int | None = None,
    ) -> None:
        """Check the samples and options.

        Args:
            model: A native model, or a wrapped one.
            samples: As in `measure`.
            options: How to measure.
            batch_size: Samples per forward pass.
            name: Name of the model in the tables; the model's own when not given.
            step: The training step in the tables, of a series.

        Raises:
            InputError: On unknown kernels, or samples that cannot be measured.
        """
        self.options = options
        self.tokens = checked_tokens(samples, d_vocab=model.config.d_vocab)
        self.batch_size = check_batch_size(batch_size)
        _check_length(self.tokens, options)
        self.model, self.step = model, step
        self.name = model.name if name is None else name
        self.documents = sample_documents(samples, self.tokens)
        self.provenance = _provenance(model, samples, self.tokens, options)
        measures = [BY_NAME[name] for name in options.measures]
        self._reads_logits = any(measure.logits for measure in measures)
        self._no_loss = model.why_no_loss() if self._reads_logits else ""
        self._unread: str | None = None if "readout" in options.measures else ""
        self._wants_longer = any(measure.longer for measure in measures)

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
        model_T, _ = self._longer
        recorder: Recorder | None = None
        with one_thread_per_sample() as each:
            for begin in range(start, stop, self.batch_size):
                batch = self.tokens[begin : min(begin + self.batch_size, stop)]
                trajectory, longer = self._capture(batch, model_T)
                if recorder is None:
                    recorder = self._recorder(trajectory, start, stop)
                recorder.add(begin - start, trajectory, each, longer)
                del trajectory, longer
                if progress is not None:
                    progress(len(batch))
        assert recorder is not None
        frames = {
            table: self._numbered(frame, 0 if table == "tokens" else start)
            for table, frame in recorder.frames(self.name).items()
        }
        return Tables(**frames, provenance={"models": {self.name: self.provenance}})

    def _numbered(self, frame: pd.DataFrame, start: int) -> pd.DataFrame:
        """Rows under the numbers of their samples, with the document of each and the step."""
        if frame.empty:
            return frame
        if start:
            frame["sample"] = (frame["sample"] + start).astype("int32")
        if self.step is not None:
            frame["step"] = pd.array([self.step], dtype="Int64").repeat(len(frame))
        codes = self._document_codes[frame["sample"].to_numpy()]
        names: Any = pd.Index(self._document_names, dtype="str")
        frame["document"] = pd.Categorical.from_codes(codes, names)
        return frame

    def forget(self) -> None:
        """Forget what was fitted to the model: its weights are others now."""
        self.__dict__.pop("_fitted", None)

    @cached_property
    def _document_names(self) -> list[str]:
        return list(dict.fromkeys(name for name in self.documents if name is not None))

    @cached_property
    def _document_codes(self) -> np.ndarray:
        code = {name: i for i, name in enumerate(self._document_names)}
        return np.array([-1 if name is None else code[name] for name in self.documents], np.int32)

    @cached_property
    def _fitted(self) -> FittedReading | None:
        """What the fitted reading reads by; the same for every part."""
        fitted = fitted_reading(
            self.model, self.tokens, self.documents, batch_size=self.batch_size,
            refit=self.options.refit_coda,
        )  # fmt: skip
        if fitted is not None:
            self.provenance["fitted"] = fitted.record()
        return fitted

    @cached_property
    def _longer(self) -> tuple[Hooked | None, str]:
        """The model with more iterations, or None and why there is none."""
        return longer_model(self.model, self.options.more_loops if self._wants_longer else None)

    def _capture(
        self, batch: Tensor, model_T: Hooked | None
    ) -> tuple[Trajectory, Trajectory | None]:
        """The batch's trajectory, and that with more iterations where there are more."""
        logits = self._reads_logits and not self._no_loss
        if model_T is None:
            return capture(self.model, batch, memory=False, logits=logits), None
        longer = capture(model_T, batch, memory=False)
        return self.model.shortened(longer, logits=logits), longer

    def _recorder(self, first: Trajectory, start: int, stop: int) -> Recorder:
        """Make a part's recorder from its first batch; provenance notes what is left out."""
        longer, why_not_longer = self._longer
        self.provenance.update(state_shapes(first, self.options.drop_first))
        if self._reads_logits and not self._no_loss:
            self._no_loss = _no_logits(first, self.tokens, self.model)
        if self._unread is None:
            self._unread = self._no_loss or why_unread(self.model, first)
        unread = "readout" not in self.options.measures or self._unread
        words = _token_strings(self.model, self.tokens[0]) if start == 0 else None
        recorder = Recorder(
            Setup(
                model=self.model, options=self.options, first=first, samples=stop - start,
                words=words, longer=longer, no_loss=self._no_loss, unread=self._unread,
                start=start, maps=None if unread else self._fitted,
            )
        )  # fmt: skip
        notes = [
            *self.provenance["notes"],
            *position_notes(first, self.options),
            *recorder.notes(longer=False),
            *([why_not_longer] if why_not_longer else []),
            *recorder.notes(longer=True),
        ]
        self.provenance["notes"] = list(dict.fromkeys(notes))
        return recorder


def why_unread(model: Hooked, first: Trajectory) -> str:
    """Tell why h(t) cannot be read out in place of h(K).

    Args:
        model: A model that predicts next tokens.
        first: A trajectory of it, with logits.

    Returns:
        The reason; empty where it can.
    """
    if first.K == 0:
        return "the model has no loop"
    h, logits = first.h, first.logits
    assert logits is not None and first.tokens is not None
    if not any(state.shape == h[-1].shape for state in h[:-1]):
        return "no h(t) before h(K) has its shape"
    # a state that no loop leaves: the tokens' states in another order, turned round
    other = -h[-1].roll(1, dims=1)
    if torch.equal(other, h[-1]):  # of a state that is zero
        other = torch.randn(other.shape, generator=torch.Generator().manual_seed(0)).to(other)
    with torch.no_grad():
        turned = model.read_out_logits(other, first.tokens)
        deaf = all(torch.equal(a, b) for a, b in zip(turned, logits, strict=True))
    if deaf:
        return "what follows the loop does not read h(K) where it could be replaced"
    return ""


def longer_model(model: Hooked, T: int | None) -> tuple[Hooked | None, str]:
    """Make the model with T iterations of its main loop in place of K.

    Args:
        model: A native or wrapped model.
        T: Iterations to run; None for no more.

    Returns:
        The model, or None and why there is none (empty where none was asked for).

    Raises:
        InputError: if T is not more than K.
    """
    if T is None or model.K == 0:
        return None, ""
    if T <= model.K:
        raise InputError(
            f"more_loops is {T}, but the model runs {model.K} iterations; give more than that."
        )
    if any(point.fwd_hooks for point in model.hook_points()):
        return None, "more loops: the model has hooks, which it would lose; they were not tried"
    try:
        return model.with_loops({next(iter(model.loops)): T}), ""
    except InputError as error:
        return None, f"more loops: {str(error).rstrip('.').removesuffix('; leave loops out')}"
    except Exception as error:  # somebody else's forward pass
        return None, f"more loops: with {T} the model fails ({type(error).__name__}: {error})"


def _check_length(tokens: Tensor, options: Options) -> None:
    left = tokens.shape[1] - options.drop_first
    if left < MIN_TOKENS:
        dropped = f", {options.drop_first} of which are dropped" if options.drop_first else ""
        raise InputError(
            f"samples have {tokens.shape[1]} tokens{dropped}; at least {MIN_TOKENS} must be left "
            "to measure. Give longer samples."
        )
    check(left, options.kernels, options.bandwidth)


def _token_strings(model: Hooked, tokens: Tensor) -> list[str]:
    """Each token as text, or as its number for a model without a tokenizer."""
    tokenizer = model.tokenizer
    if tokenizer is None:
        return [str(i) for i in tokens.tolist()]
    return [tokenizer.decode([i], skip_special_tokens=False) for i in tokens.tolist()]


def _no_logits(trajectory: Trajectory, tokens: Tensor, model: Hooked) -> str:
    """Why what a model returns cannot be logits of next tokens; empty where it can."""
    logits, ids = trajectory.logits, trajectory.tokens
    if logits is None or ids is None or logits.shape[:-1] != ids.shape:
        return "the model returns no logits for each token"
    vocabulary = model.config.d_vocab or int(tokens.max()) + 1
    if logits.shape[-1] < vocabulary:
        return (
            f"the model returns {logits.shape[-1]} numbers for each token, fewer than the "
            f"{vocabulary} of its vocabulary"
        )
    return ""


def _provenance(model: Hooked, samples: Any, tokens: Tensor, options: Options) -> dict[str, Any]:
    """Everything needed to tell two measurements apart, as JSON values."""
    config = model.config
    context = config.n_ctx
    notes = []
    if context is not None and tokens.shape[1] > context:
        notes = [f"samples of {tokens.shape[1]} tokens are longer than n_ctx = {context}"]
    first = next(model.parameters())  # of a model spread over devices, one stands for all
    return {
        "config": config.to_dict(),
        **model.structure(),
        "dtype": str(first.dtype).removeprefix("torch."),
        "device": first.device.type,
        "training": model.provenance or {},
        "samples": samples_provenance(samples, tokens),
        "options": options.record(),
        "versions": versions(),
        "commit": commit(),
        "notes": notes,
    }
