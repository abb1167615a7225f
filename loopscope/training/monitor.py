"""Monitor: the measures of loop collapse while a model trains, on a fixed probe batch."""

import math
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from loopscope.analysis import Options, build_options
from loopscope.analysis.collapse import NEEDED, SIGNS, per_sample
from loopscope.analysis.measuring import Measuring, checked_tokens
from loopscope.errors import InputError
from loopscope.models import Hooked, NamedHooks
from loopscope.models.loops import devices_of
from loopscope.models.wrapped import buffers_kept, wrap
from loopscope.training.logs import Log, read_numbers

if TYPE_CHECKING:
    from loopscope.analysis.tables import Tables

MEASURES = (*NEEDED, "delta", "readout", "loss")
LAST = "n_flagged"
EXAMPLES = 2  # samples on which a foreign model is traced once


class Monitor:
    """Measures a model on the same few samples every so many steps of its training.

    The training is not disturbed: modes, random states, buffers, gradients and autocast are left
    as they were, and the weights it ends with are the same bit for bit. The model runs as in
    evaluation mode, under autocast where that is on; what is computed from its states is not.

    Attributes:
        every: Steps between measurements.
        rows: One per measured step: `step`, the mean of each sign over the samples (NaN where there
            is none), and `n_flagged`, how many values those means leave out. A model with several
            loops has the signs of the others as `loop/sign`.
        seconds: Time spent in measuring, the tracing of a foreign model included.
    """

    def __init__(
        self,
        probe: Any,
        *,
        every: int = 100,
        measures: Sequence[str] = MEASURES,
        out: str | Path | None = None,
        spec: Any = None,
        **options: Any,
    ) -> None:
        """Take the samples; the model comes with the first measurement.

        Args:
            probe: Token ids (samples × tokens), what `load_samples` returns, or text for a model
                with a tokenizer. Four to eight samples of 128 to 256 tokens are enough.
            every: Steps between measurements.
            measures: At least update, cka and rank; signs that need others are NaN without them.
            out: CSV file that gets each row at once. One that is there is continued: rows of steps
                that are measured again are replaced.
            spec: Corrects what finding the loop of a foreign model gets wrong, as in `wrap`.
            **options: Further options of `measure`, such as `more_loops`.

        Raises:
            InputError: for a probe, measures or a number of steps that cannot be, or a file that
                is no monitor's.
        """
        if every < 1:
            raise InputError(f"every is {every}; give the steps between measurements, 1 or more.")
        if missing := [name for name in NEEDED if name not in measures]:
            raise InputError(
                f"a monitor needs {', '.join(missing)} too; leave measures out for all, or give at "
                f"least {', '.join(NEEDED)}."
            )
        self._text = _text(probe)
        self.probe = None if self._text else checked_tokens(probe, d_vocab=None)
        self.every, self.measures = every, tuple(measures)
        self.out = None if out is None else Path(out).expanduser()
        self.spec = spec
        self.batching = {key: options.pop(key) for key in ("batch_size", "name") if key in options}
        how = {**options, "measures": self.measures}
        self.options: Options = build_options(Options, how, "Monitor", ("batch_size", "name"))
        self.rows: list[dict[str, Any]] = []
        if self.out is not None:
            self.rows = read_numbers(self.out, LAST)
        self.seconds = 0.0
        self._log: Log | None = None
        self._module: nn.Module | None = None
        self._measuring: Measuring | None = None

    def due(self, step: int) -> bool:
        """Whether a step is to be measured: 0, `every`, twice that …

        Args:
            step: Steps done.

        Returns:
            True where it is.
        """
        return step % self.every == 0

    def resume(self, step: int) -> None:
        """Forget the rows of steps after this one, which a resumed training takes again.

        Args:
            step: Steps done.

        Raises:
            InputError: The file cannot be written.
        """
        kept = [row for row in self.rows if row["step"] <= step]
        if len(kept) < len(self.rows):
            self._keep(kept, tuple(self.rows[-1]))

    def measure(self, model: Any, step: int) -> dict[str, float]:
        """Measure a model as it is now and append a row.

        Args:
            model: A native or wrapped model, or any torch module: that is wrapped once, in any
                layers of DDP, accelerate and torch.compile, and measured through the same wrapper
                from then on.
            step: Steps done.

        Returns:
            The row but for its step.

        Raises:
            InputError: as `wrap` and `measure`, for a model whose parameters are spread over
                processes, or for a file that cannot be written.
        """
        module = plain_module(model)
        _wait(module)
        began = time.perf_counter()
        with _undisturbed(module):
            measuring = self._for(module)
            measuring.forget()
            tables = measuring.part(0, len(measuring))
        values = _means(tables)
        row = {"step": int(step), **values}
        self._keep([earlier for earlier in self.rows if earlier["step"] < step], tuple(row))
        self.rows.append(row)
        if self._log is not None:
            self._log.add(_blank(row, self._log.columns))
        self.seconds += time.perf_counter() - began
        return values

    @property
    def table(self) -> pd.DataFrame:
        """The rows as a table."""
        if not self.rows:
            return pd.DataFrame(columns=["step", *(sign.name for sign in SIGNS), LAST])
        return pd.DataFrame(self.rows)

    @property
    def provenance(self) -> dict[str, Any]:
        """What was measured, on what; empty before the first measurement."""
        if self._measuring is None:
            return {}
        provenance = self._measuring.provenance
        return {"every": self.every, **{k: provenance[k] for k in ("samples", "options", "notes")}}

    def _keep(self, rows: list[dict[str, Any]], columns: Sequence[str]) -> None:
        """Go on after these rows, in the file too.

        Args:
            rows: Some of those there are.
            columns: Of the row that comes next; another loopscope may have written others.
        """
        before = self._log.columns if self._log else tuple(rows[0]) if rows else ()
        names = (*dict.fromkeys([*before[:-1], *columns[:-1]]), LAST)
        new = self._log is None or self._log.columns != names
        if self.out is not None and (new or len(rows) < len(self.rows)):
            self._log = Log(self.out, [_blank(row, names) for row in rows], names)
        self.rows = rows

    def _for(self, module: nn.Module) -> Measuring:
        """The measuring of this module, made when it first comes."""
        if self._measuring is None or self._module is not module:
            example = None if self.probe is None else self.probe[:EXAMPLES]
            model: Hooked = wrap(module, example, spec=self.spec)
            tokens = self.probe if self._text is None else model.to_tokens(self._text)
            self._measuring = Measuring(model, tokens, self.options, **self.batching)
            self._module = module
        return self._measuring


def plain_module(model: Any) -> Any:
    """The module inside what DDP, accelerate and torch.compile put around it.

    Args:
        model: What is trained.

    Returns:
        The module; anything else as it is.

    Raises:
        InputError: if its parameters are spread over processes.
    """
    from accelerate.utils import extract_model_from_parallel

    before = None
    while before is not model:
        before, model = model, extract_model_from_parallel(model, keep_torch_compile=False)
    if isinstance(model, nn.Module) and any(map(_is_part, model.parameters())):
        raise InputError(
            "the model's parameters are spread over the processes (FSDP, tensor parallel or ZeRO), "
            "so no process can run it alone; save checkpoints and use `loopscope compare` on them."
        )
    return model


def _is_part(parameter: Tensor) -> bool:
    from torch.distributed.tensor import DTensor

    kind = type(parameter).__name__
    return isinstance(parameter, DTensor) or kind == "FlatParameter" or hasattr(parameter, "ds_id")


def _means(tables: "Tables") -> dict[str, float]:
    """Each sign's mean over the samples, without NaN; and how many values that leaves out."""
    signs = per_sample(tables)
    values: dict[str, float] = {}
    n_flagged = 0
    for number, (loop, rows) in enumerate(signs.groupby("loop", sort=False, observed=True)):
        for sign in SIGNS:
            sound = rows[sign.name].dropna()
            values[f"{loop}/{sign.name}" if number else sign.name] = float(sound.mean())
            n_flagged += len(rows) - len(sound) if len(sound) else 0
    return {**values, LAST: float(n_flagged)}


def _blank(row: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """A row as it is written: None where there is no number."""
    return {n: None if math.isnan(x := row.get(n, math.nan)) else x for n in names}


def _text(probe: Any) -> str | list[str] | None:
    if isinstance(probe, str):
        return probe
    if isinstance(probe, list | tuple) and probe and all(isinstance(x, str) for x in probe):
        return list(probe)
    return None


def _wait(module: nn.Module) -> None:
    """Let a GPU finish the training step, so that its time is not counted here."""
    for device in devices_of(module) if torch.cuda.is_available() else ():
        torch.cuda.synchronize(device)


@contextmanager
def _undisturbed(module: nn.Module) -> Iterator[None]:
    """A context in which a module is in evaluation mode, and after which nothing has changed."""
    # not eval(): what a model of somebody else's does there (LoRA: merge weights) is no no-op
    modes = [(part, part.training) for part in module.modules()]
    python, numpy = random.getstate(), np.random.get_state()
    try:
        for part, _ in modes:
            part.training = False
        with (
            torch.random.fork_rng(devices=devices_of(module)),
            buffers_kept(module),
            _autocast_inside(module),
        ):
            yield
    finally:
        for part, mode in modes:
            part.training = mode
        random.setstate(python)
        np.random.set_state(numpy)


@contextmanager
def _autocast_inside(module: nn.Module) -> Iterator[None]:
    """A context in which autocast, where it is on, is on in the model's own code alone."""
    kinds = {"cpu", *(p.device.type for p in module.parameters())} - {"meta"}
    on = {kind: torch.get_autocast_dtype(kind) for kind in kinds if torch.is_autocast_enabled(kind)}
    entries: Any = [(module, "forward")]
    if isinstance(module, NamedHooks):
        entries = module.code_entries()
    with ExitStack() as during:
        for kind, dtype in on.items():
            for part, name in entries:
                during.callback(_restore, part, name, dict(vars(part)))
                run = torch.autocast(kind, dtype)(getattr(part, name))
                vars(part)[name] = run
            during.enter_context(torch.autocast(kind, enabled=False))
        yield


def _restore(module: nn.Module, name: str, before: Mapping[str, Any]) -> None:
    if name in before:
        vars(module)[name] = before[name]
    else:
        vars(module).pop(name, None)
