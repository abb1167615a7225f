"""Measure: run a model over samples and keep nothing but rows (states → tables)."""

from collections.abc import Callable, Sequence
from copy import copy
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from loopscope.analysis.measures import (
    NextTokens,
    OwnLoss,
    Setup,
    check,
    loss_values,
    output_of_state,
)
from loopscope.analysis.measuring.map_fitting import FittedReading, fitted_reading
from loopscope.analysis.measuring.recorder import Recorder, one_thread_per_sample, rows_of
from loopscope.analysis.measuring.sample_groups import (
    SampleGroup,
    Told,
    groups_by_count,
    groups_by_kind,
    joined_groups,
)
from loopscope.analysis.measuring.sample_items import (
    Items,
    are_items,
    equal,
    read_items,
    to_device,
)
from loopscope.analysis.measuring.state_positions import position_notes, state_shapes
from loopscope.analysis.measuring.token_windows import TokenWindows, read_windows
from loopscope.analysis.options import Options, build_options, check_batch_size, takes
from loopscope.analysis.tables import BY_NAME, DEFAULT, Tables
from loopscope.errors import InputError, LoopCountError
from loopscope.models import Hooked, Trajectory
from loopscope.names import MIN_TOKENS
from loopscope.provenance import commit, versions
from loopscope.text import token_texts


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
            `loopscope.load_samples` returns; or a list or data set of items, each what the model's
            forward takes for one sample, without the batch axis.
        measures: Any of `MEASURES`; `routing` fills the table `tokens` too.
        batch_size: Samples per forward pass.
        name: Name of the model in the tables; the model's own when not given.
        progress: Called with the number of samples done since the last call.
        **options: `kernels`, `bandwidth`, `drop_first`, `center`, `normalize_rows`, `more_loops`,
            `refit_coda`, `loss`, `lens`, `probe`, `intervene`, `orbit`, as `Options` describes
            them.

    Returns:
        One table per measure, the others None. A model with several loops has rows for each, told
        apart by the column `loop`; the loss, one per sample, stands with the main loop. A model
        that loops as often as its input asks for is measured in groups of samples of equal numbers
        of iterations, each as a loop of its own (`core[K=3]`). Routing has no rows for a model
        without routers and gates, loss none for one that predicts no next token; `notes` in the
        provenance says why.

    Raises:
        InputError: On unknown measures, kernels or options, or samples that cannot be measured.
    """
    keywords = {**options, "measures": measures}
    settings = build_options(Options, keywords, "measure", ("batch_size", "name"))
    measuring = Measuring(model, samples, settings, batch_size=batch_size, name=name)
    return measuring.part(0, len(measuring), progress)


_OF_THE_SAMPLES = (
    "_fitted", "_prepared", "_longer", "_document_names", "_document_codes", "_one_kind",
)  # fmt: skip
"""What a measuring computes once for its samples."""


class Measuring:
    """One model on one set of samples, measured in parts.

    Attributes:
        name: Name of the model in the tables.
        samples: The samples.
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
        self.samples: TokenWindows | Items
        if are_items(samples):
            self.samples = read_items(samples)
            check(MIN_TOKENS, options.kernels, options.bandwidth)
        else:
            self.samples = read_windows(samples, d_vocab=model.config.d_vocab)
            _check_length(self.samples.tokens, options)
        self.batch_size = check_batch_size(batch_size)
        self.model, self.step = model, step
        self.name = model.name if name is None else name
        self.provenance = _provenance(model, self.samples, options)
        self._measures = [BY_NAME[name] for name in options.measures]
        self._begin()

    def _begin(self) -> None:
        """Know nothing yet of the model's losses, and of the groups of its samples."""
        options = self.options
        self._reads_logits = any(measure.logits for measure in self._measures)
        self._no_loss = why_no_loss(self.model, self.samples, options) if self._reads_logits else ""
        self._unread: str | None = None if "readout" in options.measures else ""
        self._wants_longer = any(measure.longer for measure in self._measures)
        self._shows_tokens, self._loss_seen = True, False
        self._groups: list[SampleGroup] | None = None
        self._label: Callable[[Trajectory], Trajectory] | None = None

    def __len__(self) -> int:
        return len(self.samples)

    @property
    def varied(self) -> bool:
        """Whether samples are measured by the number of iterations that each of them runs."""
        return "groups" in self.provenance

    def part(self, start: int, stop: int, progress: Callable[[int], Any] | None = None) -> Tables:
        """Measure some of the samples.

        Args:
            start: The first.
            stop: The one after the last.
            progress: Called with the number of samples done since the last call.

        Returns:
            Their tables, under their own numbers; `tokens` has rows in the part with sample 0.
        """
        told = Told(progress)
        if self._groups is None and not self._one_kind:
            self._groups = groups_by_kind(self)
        try:
            return self._part(start, stop, told)
        except LoopCountError:
            if self.varied:
                raise
            self.group_by_count()
            told.again()
            return self._part(start, stop, told)

    def group_by_count(self) -> None:
        """Measure each sample with the number of iterations that it runs by itself."""
        self._groups = groups_by_count(self)

    def _part(self, start: int, stop: int, progress: Callable[[int], Any]) -> Tables:
        if self._groups is None:
            return self.measured(start, stop, progress)
        return joined_groups(self, self._groups, start, stop, progress)

    @cached_property
    def _one_kind(self) -> bool:
        return len(set(self.samples.kinds)) == 1

    def of_group(
        self,
        numbers: Sequence[int],
        model: Hooked,
        *,
        label: Callable[[Trajectory], Trajectory] | None,
        shows_tokens: bool,
    ) -> "Measuring":
        """Measure some of the samples by themselves.

        Args:
            numbers: Which.
            model: The model for them.
            label: Renames the loops of a trajectory.
            shows_tokens: Whether its first sample stands in the table `tokens`.

        Returns:
            Their own measuring.
        """
        group = copy(self)
        for name in _OF_THE_SAMPLES:
            group.__dict__.pop(name, None)
        group.samples, group.model = self.samples.chosen(numbers), model
        group.options = self.options.of_samples(numbers)
        group.provenance = {"notes": []}
        group._begin()
        group._label, group._shows_tokens = label, shows_tokens
        return group

    def measured(self, start: int, stop: int, progress: Callable[[int], Any]) -> Tables:
        """Measure samples that run the same iterations and can be stacked.

        Args:
            start: The first.
            stop: The one after the last.
            progress: Called with the number of samples done since the last call.

        Returns:
            Their tables, under their own numbers.

        Raises:
            LoopCountError: where they do not run the same iterations after all.
        """
        model_T, _ = self._longer
        self._check_own_loss()
        recorder: Recorder | None = None
        with one_thread_per_sample() as each:
            for begin in range(start, stop, self.batch_size):
                numbers = range(begin, min(begin + self.batch_size, stop))
                batch = self._inputs(numbers)
                trajectory, longer = self._capture(batch, model_T)
                if recorder is None:
                    recorder = self._recorder(trajectory, start, stop, batch)
                recorder.add(begin - start, trajectory, each, longer, batch)
                del trajectory, longer, batch
                progress(len(numbers))
        assert recorder is not None
        self._note(*recorder.remarks())
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
        for name in ("_fitted", "_prepared"):
            self.__dict__.pop(name, None)
        self._groups = None
        self.provenance.pop("groups", None)

    @cached_property
    def _document_names(self) -> list[str]:
        return list(dict.fromkeys(name for name in self.samples.documents if name is not None))

    @cached_property
    def _document_codes(self) -> np.ndarray:
        code = {name: i for i, name in enumerate(self._document_names)}
        documents = self.samples.documents or [None] * len(self)
        return np.array([-1 if name is None else code[name] for name in documents], np.int32)

    @cached_property
    def _fitted(self) -> FittedReading | None:
        """What the fitted reading reads by; the same for every part."""
        fitted = fitted_reading(
            self.model, self.samples, batch_size=self.batch_size, refit=self.options.refit_coda,
        )  # fmt: skip
        if fitted is not None:
            self.provenance["fitted"] = fitted.record()
        return fitted

    @cached_property
    def _prepared(self) -> dict[str, Any]:
        """What measures did once with all samples; the same for every part."""
        longer, _ = self._longer
        return {
            name: rows_of(name).prepare(
                self.model, self.samples, self.options, batch_size=self.batch_size, longer=longer
            )
            for name in self.options.measures
        }

    @cached_property
    def _longer(self) -> tuple[Hooked | None, str]:
        """The model with more iterations, or None and why there is none."""
        T = self.options.more_loops if self._wants_longer else None
        if T is not None and self._label is not None and T <= self.model.K:
            return None, f"more loops: {T} are not more than the {self.model.K} of some samples"
        return longer_model(self.model, T)

    def _inputs(self, numbers: range) -> Any:
        """Some of the samples as the model takes them."""
        batch = self.samples.batch(numbers)
        return batch if self.samples.tokens is not None else to_device(batch, self._home)

    @property
    def _home(self) -> torch.device:
        return self.model.input_device

    def _capture(self, batch: Any, model_T: Hooked | None) -> tuple[Trajectory, Trajectory | None]:
        """The batch's trajectory, and that with more iterations where there are more."""
        logits = self._reads_logits and not self._no_loss and self.options.loss is None
        longer = None if model_T is None else model_T.capture(batch, memory=False, logits=False)
        if self.options.loss is not None or (longer is not None and self.samples.tokens is None):
            trajectory = self.model.capture(batch, memory=False, output=True)
        elif longer is not None:
            trajectory = self.model.shortened(longer, logits=logits)
        else:
            trajectory = self.model.capture(batch, memory=False, logits=logits)
        return (trajectory if self._label is None else self._label(trajectory)), longer

    def _check_own_loss(self) -> None:
        """A loss that gives one number for several samples takes them one by one."""
        function = self.options.loss
        if function is None or self.batch_size == 1 or len(self) == 1 or self._loss_seen:
            return
        batch = self._inputs(range(2))
        with torch.no_grad():
            output = self.model.run_with_hooks(batch, return_type=self.model.output_type)
            if loss_values(function, output, batch).numel() == 1:
                self.batch_size = 1
                note = "loss: it gives one number for several samples, so each is run by itself"
                self.provenance["notes"] = [*self.provenance["notes"], note]
        self._loss_seen = True

    def _recorder(self, first: Trajectory, start: int, stop: int, inputs: Any) -> Recorder:
        """Make a part's recorder from its first batch; provenance notes what is left out."""
        longer, why_not_longer = self._longer
        items = self.samples.tokens is None
        self.provenance.update(state_shapes(first, self.options.drop_first, always=items))
        own = self.options.loss
        if self._reads_logits and not self._no_loss and own is None:
            self._no_loss = _no_logits(first, self.model)
        if self._unread is None:
            self._unread = self._no_loss or why_unread(self.model, first, inputs)
        unread = "readout" not in self.options.measures or self._unread
        words = None
        if start == 0 and self._shows_tokens and first.tokens is not None:
            words = token_texts(self.model.tokenizer, first.tokens[0].tolist())
        recorder = Recorder(
            Setup(
                model=self.model, options=self.options, first=first, samples=stop - start,
                words=words, longer=longer, no_loss=self._no_loss, unread=self._unread,
                start=start, maps=None if unread else self._fitted,
                scoring=NextTokens() if own is None else OwnLoss(own),
                no_logits=self._no_loss if own is None else "a loss of your own took their place",
                prepared=self._prepared,
            )
        )  # fmt: skip
        self._note(
            *position_notes(first, self.options),
            *recorder.notes(longer=False),
            *([why_not_longer] if why_not_longer else []),
            *recorder.notes(longer=True),
        )
        return recorder

    def _note(self, *notes: str) -> None:
        """Add notes to the provenance, each once."""
        self.provenance["notes"] = list(dict.fromkeys([*self.provenance["notes"], *notes]))


def why_no_loss(model: Hooked, samples: TokenWindows | Items, options: Options) -> str:
    """Tell why there is no loss.

    Args:
        model: The model.
        samples: What it is measured on.
        options: How.

    Returns:
        The reason; empty where the options have one, or the model predicts the samples' tokens.
    """
    if options.loss is not None:
        return ""
    if samples.tokens is None:
        return "what counts as a loss of these samples is not known (give loss=…)"
    return model.why_no_loss()


def why_unread(model: Hooked, first: Trajectory, inputs: Any = None) -> str:
    """Tell why h(t) cannot be read out in place of h(K).

    Args:
        model: A model that predicts next tokens, or has a loss of the user's.
        first: A trajectory of it, with logits or its output.
        inputs: What it was given, where the trajectory has its output.

    Returns:
        The reason; empty where it can.
    """
    if first.K == 0:
        return "the model has no loop"
    h = first.h
    if not any(state.shape == h[-1].shape for state in h[:-1]):
        return "no h(t) before h(K) has its shape"
    # a state that no loop leaves: the tokens' states in another order, turned round
    other = -h[-1].roll(1, dims=1)
    if torch.equal(other, h[-1]):  # of a state that is zero
        other = torch.randn(other.shape, generator=torch.Generator().manual_seed(0)).to(other)
    with torch.no_grad():
        if first.output is not None:
            deaf = equal(output_of_state(model, inputs, other), first.output)
        else:
            assert first.logits is not None and first.tokens is not None
            turned = model.read_out_logits(other, first.tokens)
            deaf = all(torch.equal(a, b) for a, b in zip(turned, first.logits, strict=True))
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


def _no_logits(trajectory: Trajectory, model: Hooked) -> str:
    """Why what a model returns cannot be logits of next tokens; empty where it can."""
    logits, ids = trajectory.logits, trajectory.tokens
    if logits is None or ids is None or logits.shape[:-1] != ids.shape:
        shape = (
            ""
            if logits is None or ids is None
            else (f": {tuple(logits.shape)} for {tuple(ids.shape)} tokens")
        )
        return f"the model returns no logits for each token{shape}"
    vocabulary = model.config.d_vocab or int(ids.max()) + 1
    if logits.shape[-1] < vocabulary:
        return (
            f"the model returns {logits.shape[-1]} numbers for each token, fewer than the "
            f"{vocabulary} of its vocabulary"
        )
    return ""


def _provenance(model: Hooked, samples: TokenWindows | Items, options: Options) -> dict[str, Any]:
    """Everything needed to tell two measurements apart, as JSON values."""
    config = model.config
    context = config.n_ctx
    notes = []
    pos = 0 if samples.tokens is None else samples.tokens.shape[1]
    if context is not None and pos > context:
        notes = [f"samples of {pos} tokens are longer than n_ctx = {context}"]
    if options.loss is not None:
        notes.append(
            f"loss: that of loss={options.record()['loss']}, in a unit of its own: thresholds in "
            "nats say nothing of it"
        )
    structure = model.structure()
    notes += structure.get("map", {}).get("state_notes", [])
    # of a model spread over devices, one stands for all; one that is quantised may have none
    first = next(model.parameters(), None)
    if first is None:
        first = next((buffer for _, buffer in model.named_buffers()), torch.empty(0))
    return {
        "config": config.to_dict(),
        **structure,
        "dtype": str(first.dtype).removeprefix("torch."),
        "device": first.device.type,
        "training": model.provenance or {},
        "samples": samples.provenance,
        "options": options.record(),
        "versions": versions(),
        "commit": commit(),
        "notes": notes,
    }
