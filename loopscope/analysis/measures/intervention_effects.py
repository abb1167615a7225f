"""Effects of interventions: what the prediction loses when something in the model is changed.

Per window, against the clean run of the same window: Δ loss (next-token cross-entropy, changed
less clean, nats), KL(clean ‖ changed) of the next-token distributions (nats, in this direction),
the share of tokens whose top prediction is another, and, where counterfactual answers are given,
the share of them that the changed run gives (interchange-intervention accuracy). The effect is
total where routers are recomputed after the change and direct where they keep their clean weights.
"""

import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import pandas as pd
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from loopscope.analysis.flags import flagged
from loopscope.analysis.inside_options import InterveneOptions
from loopscope.analysis.measures.filling import Batch, MeasureRows, SampleSet, Setup
from loopscope.analysis.measures.intervention_plan import NOT_ASKED, Plan, Target, make_plan
from loopscope.analysis.measures.place_masses import place_mass
from loopscope.analysis.options import Options
from loopscope.analysis.tables import Rows, columns, renumbered
from loopscope.errors import InputError
from loopscope.models import Hooked, Trajectory
from loopscope.probes import CleanRun, clean_run, intervened

TOTAL, DIRECT = "recomputed", "frozen"
"""Values of the column `routers`."""

_KEYS = ("what", "kind", "t", "how", "routers")


class Effect(NamedTuple):
    """What an intervention did, one number per window.

    Attributes:
        loss: Δ loss, nats per token.
        kl: KL(clean ‖ changed), nats per token.
        changed: Share of tokens with another top prediction.
    """

    loss: Float[Tensor, " batch"]
    kl: Float[Tensor, " batch"]
    changed: Float[Tensor, " batch"]


class Predictions:
    """What a clean run predicts, to hold changed runs over the same tokens against."""

    def __init__(
        self,
        logits: Float[Tensor, "batch pos d_vocab"],
        tokens: Int[Tensor, "batch pos"],
        counted: Bool[Tensor, "batch pos"] | None = None,
    ) -> None:
        """Take the clean run.

        Args:
            logits: Its logits.
            tokens: Its tokens.
            counted: The tokens whose prediction counts; all, and what is predicted after the last
                one, when not given.
        """
        rows = tokens[:, 1:].to(logits.device)
        self._kept: list[Any] = [slice(None)] * len(rows)
        self._scored = slice(-1)  # of those kept: nothing follows the last token
        if counted is not None:
            self._kept = [row[1:].nonzero()[:, 0].to(logits.device) for row in counted]
            self._scored = slice(None)
        pairs = zip(rows, self._kept, strict=True)
        self._next = [ids if counted is None else ids[kept] for ids, kept in pairs]
        wide = torch.promote_types(logits.dtype, torch.float32)
        self._log_p = [
            x[kept].to(wide).log_softmax(-1) for x, kept in zip(logits, self._kept, strict=True)
        ]
        self._top = [p.argmax(-1) for p in self._log_p]
        scored = zip(self._log_p, self._next, strict=True)
        self._loss = [F.nll_loss(p[self._scored], ids) for p, ids in scored]

    def effect(self, changed: Float[Tensor, "batch pos d_vocab"]) -> Effect:
        """Compare the predictions of a changed run.

        Args:
            changed: Its logits.

        Returns:
            Δ loss over the tokens but the first; KL(clean ‖ changed) and the share of other top
            tokens over all; each over the counted ones alone where not all count. All are exactly 0
            where the logits are equal.
        """
        rows = [self._of_window(i, x) for i, x in enumerate(changed)]
        return Effect(*(torch.stack(column) for column in zip(*rows, strict=True)))

    def _of_window(self, i: int, changed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        p = self._log_p[i]
        q = changed[self._kept[i]].to(p).log_softmax(-1)
        loss = F.nll_loss(q[self._scored], self._next[i]) - self._loss[i]
        kl = F.kl_div(q, p, reduction="sum", log_target=True) / len(p)
        other = (self._top[i] != q.argmax(-1)).to(p.dtype).mean()
        return loss, kl, torch.where(loss.isfinite(), other, torch.nan)


def answered(
    logits: Float[Tensor, "batch pos d_vocab"], answers: Int[Tensor, "batch pos"]
) -> Float[Tensor, " batch"]:
    """Tell which answers a run gives.

    Args:
        logits: Its logits.
        answers: The token that should follow each token, −100 where none is asked for.

    Returns:
        The share of each window's answers that are its top prediction; NaN without answers.
    """
    answers = answers.to(logits.device)
    asked: Bool[Tensor, "batch pos"] = answers != NOT_ASKED
    right = (logits.argmax(-1) == answers) & asked
    return right.sum(1) / asked.sum(1)


class EffectRows(MeasureRows):
    """The table `effect`."""

    @classmethod
    def prepare(
        cls,
        model: Hooked,
        samples: SampleSet,
        options: Options,
        *,
        batch_size: int,
        longer: Hooked | None = None,
    ) -> Plan:
        chosen = options.intervene
        assert isinstance(chosen, InterveneOptions)
        return make_plan(model, samples, chosen, batch_size=batch_size)

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        self.model, self.start = setup.model, setup.start
        self.plan: Plan = setup.prepared["intervene"]
        why_not = self.plan.why_not or setup.no_logits
        notes = [] if why_not else [*self.plan.notes]
        stop = setup.start + setup.samples
        self.windows = [i for i in self.plan.chosen if setup.start <= i < stop and not why_not]
        self.note = "; ".join(f"effect: {note}" for note in notes)
        if why_not:
            self.note = f"effect: {why_not}; the table has no rows"
        self.rows: dict[str, Rows] = {}
        self.place: dict[tuple[str, str, str], tuple[Rows, int]] = {}
        if self.windows:
            self._set_aside(setup.first)

    def _set_aside(self, first: Trajectory) -> None:
        """Rows of each loop, and where each intervention's are."""
        main, labels = first.loop, dict(zip(self.model.loops, first.loops, strict=False))
        by_loop: dict[str, list[tuple[Any, ...]]] = {}
        for target in self.plan.targets:
            loops = {place.loop for place in target.places}
            loop = loops.pop() if len(loops) == 1 else main
            loop = labels.get(loop, loop)  # `core[K=3]` of samples of one number of iterations
            for routers in self.routers:
                key = (target.what, target.kind, target.t, target.how, routers)
                by_loop.setdefault(loop, []).append(key)
        if self.plan.answers is not None:
            controls = ["base"] + ["source"] * (self.plan.source is not None)
            by_loop.setdefault(main, []).extend(
                (what, "control", 0, "none", TOTAL) for what in controls
            )
        for loop, keys in by_loop.items():
            rows = self.rows[loop] = Rows("effect", len(self.windows), columns(_KEYS, keys))
            for number, (what, _, _, how, routers) in enumerate(keys):
                self.place[what, how, routers] = rows, number

    @property
    def routers(self) -> tuple[str, ...]:
        """Whether effects are total, or total and direct."""
        return (TOTAL, DIRECT) if self.plan.routed else (TOTAL,)

    def add(self, batch: Batch) -> None:
        numbers = range(self.start + batch.samples.start, self.start + batch.samples.stop)
        windows = [i for i in self.windows if i in numbers]
        tokens = batch.trajectory.tokens
        if not windows or tokens is None:
            return
        run = _Windows(self, windows, tokens[[i - numbers.start for i in windows]])
        for target in self.plan.targets:
            run.measure(target)
        run.measure_controls()

    def write(
        self, what: str, how: str, routers: str, windows: Sequence[int], values: dict[str, Tensor]
    ) -> None:
        """Write an intervention's row of some windows.

        Args:
            what: The target.
            how: The way.
            routers: Total or direct.
            windows: The windows, by number.
            values: Column → one number for each of them; rows without a finite loss are flagged.
        """
        rows, column = self.place[what, how, routers]
        samples = [self.windows.index(i) for i in windows]
        for name, value in values.items():
            numbers = flagged(value.detach().cpu().numpy())
            rows.values[name][samples, column] = numbers.value
            if name == "loss":
                rows.flag[samples, column] = numbers.flag

    def remark(self, note: str) -> None:
        """Say what was noticed, once.

        Args:
            note: The line.
        """
        line = f"effect: {note}"
        if line not in self.remarks and line not in self.note:
            self.remarks.append(line)

    def frames(self, model: str) -> dict[str, list[pd.DataFrame]]:
        numbers = [i - self.start for i in self.windows]
        frames = [renumbered(rows.frame(model, loop), numbers) for loop, rows in self.rows.items()]
        return {"effect": frames}


class _Windows:
    """Some windows, run clean and with each intervention."""

    def __init__(self, rows: EffectRows, windows: Sequence[int], tokens: Tensor) -> None:
        self.rows, self.plan, self.windows = rows, rows.plan, windows
        self.clean = clean_run(rows.model, tokens)
        counted = rows.plan.counted
        self.predictions = Predictions(
            self.clean.logits, tokens, None if counted is None else counted[list(windows)]
        )
        self.partners = self.sources = None
        plan = rows.plan
        if plan.needs("resample") and plan.references is not None:
            partners = plan.references[[plan.partners[i] for i in windows]]
            self.partners = clean_run(rows.model, partners.to(tokens.device))
        if plan.source is not None:
            self.sources = clean_run(rows.model, plan.source[list(windows)].to(tokens.device))
        self.answers = None if plan.answers is None else plan.answers[list(windows)]

    @torch.no_grad()
    def measure(self, target: Target) -> None:
        """Fill the rows of a target: total effect and direct."""
        masses: dict[str, Tensor] = {}
        if len(target.places) == 1:
            mass, norm = place_mass(self.clean, target.places[0])
            masses = {"mass": mass, "mass_norm": norm}
        changes = self.plan.interventions(target, self.windows, self.partners, self.sources)
        values: dict[str, Tensor] = {}
        for routers in self.rows.routers:
            if routers == TOTAL or not _last(target, self.clean):
                values = masses | self._effect(target, changes, frozen=routers == DIRECT)
            self.rows.write(target.what, target.how, routers, self.windows, values)

    def _effect(self, target: Target, changes: Any, *, frozen: bool) -> dict[str, Tensor]:
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                logits = intervened(self.clean, changes, frozen=frozen)
        except InputError as error:
            self.rows.remark(str(error).rstrip("."))
            return {"loss": torch.full((len(self.windows),), torch.nan)}
        for warning in caught:
            self.rows.remark(str(warning.message).rstrip("."))
        effect = self.predictions.effect(logits)._asdict()
        if self.answers is not None:
            effect["interchange"] = answered(logits, self.answers)
        return effect

    @torch.no_grad()
    def measure_controls(self) -> None:
        """Fill what the base gives without an intervention, and the source by itself."""
        if self.answers is None:
            return
        runs: dict[str, CleanRun | None] = {"base": self.clean, "source": self.sources}
        for what, run in runs.items():
            if run is not None:
                share = answered(run.logits, self.answers)
                self.rows.write(what, "none", TOTAL, self.windows, {"interchange": share})


def _last(target: Target, clean: CleanRun) -> bool:
    """Whether no router comes after the places, so that the total effect is the direct one."""
    loops = clean.trajectory.loops
    return all(
        place.kind in ("slot", "write", "read", "edge") and place.t == loops[place.loop].K - 1
        for place in target.places
    )


__all__ = ["Effect", "EffectRows", "Predictions", "answered"]
