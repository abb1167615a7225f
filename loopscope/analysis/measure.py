"""Measure: run a model over samples and keep nothing but rows (states → tables)."""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from torch import Tensor

from loopscope.analysis.cka import MIN_TOKENS, check
from loopscope.analysis.provenance import commit, versions
from loopscope.analysis.record import Options, Recorder
from loopscope.analysis.samples import checked_tokens, samples_provenance
from loopscope.analysis.tables import Tables
from loopscope.analysis.threads import one_thread_per_sample
from loopscope.errors import InputError, unknown_name
from loopscope.probes.capture import capture

MEASURES = ("update", "cka", "spectrum", "rank", "routing", "loss")


def measure(
    model: Any,
    samples: Any,
    measures: Sequence[str] = MEASURES[:-1],
    *,
    batch_size: int = 16,
    kernels: Sequence[str] = ("rbf",),
    bandwidth: float = 1.0,
    drop_first: int = 0,
    center: bool = False,
    normalize_rows: bool = False,
    name: str | None = None,
    progress: Callable[[int], Any] | None = None,
) -> Tables:
    """Measure a model on samples: relative update, CKA, spectrum, ranks, routing (MeSH Section 2).

    Streaming: each batch is captured, measured and let go, so memory does not grow with the number
    of samples except by the returned rows. Samples of a batch are measured on as many threads as
    torch is set to use, each of them computing on its own; results do not depend on their number.

    Args:
        model: A native model.
        samples: Token ids (samples × tokens) as an integer tensor or array, or what
            `loopscope.data.load_samples` returns.
        measures: Any of `MEASURES`; `routing` fills the table `tokens` too.
        batch_size: Samples per forward pass.
        kernels: Kernels of the CKA, `rbf` and/or `linear`.
        bandwidth: RBF bandwidth as a fraction of sqrt(median(d²)).
        drop_first: Leave out the first tokens of each sample, in every table but loss and tokens.
        center: Subtract each state's mean over the tokens before spectrum and ranks.
        normalize_rows: Scale each token's state to norm 1 before CKA, spectrum and ranks.
        name: Name of the model in the tables; the model's own when not given.
        progress: Called with the number of samples done since the last call.

    Returns:
        One table per measure, the others None; routing has no rows for a model without slots.

    Raises:
        InputError: On unknown measures or kernels, or samples that cannot be measured.
    """
    wanted = (measures,) if isinstance(measures, str) else tuple(dict.fromkeys(measures))
    for one in wanted:
        if one not in MEASURES:
            raise unknown_name("measure", one, MEASURES)
    if not wanted:
        raise InputError(f"no measures asked for; choose from {', '.join(MEASURES)}.")
    kernels = (kernels,) if isinstance(kernels, str) else tuple(dict.fromkeys(kernels))
    options = Options(
        measures=wanted,
        kernels=kernels,
        bandwidth=float(bandwidth),
        drop_first=drop_first,
        center=center,
        normalize_rows=normalize_rows,
    )
    tokens = checked_tokens(samples, d_vocab=getattr(model.config, "d_vocab", None))
    _check(tokens, options, batch_size)
    name = model.name if name is None else name

    recorder: Recorder | None = None
    with one_thread_per_sample() as each:
        for start in range(0, len(tokens), batch_size):
            batch = tokens[start : start + batch_size]
            trajectory = capture(model, batch, memory=False, logits="loss" in wanted)
            if recorder is None:
                recorder = Recorder(trajectory, len(tokens), options)
                recorder.token_table(name, trajectory, _strings(model, batch[0]))
            recorder.add(start, trajectory, each)
            del trajectory
            if progress is not None:
                progress(len(batch))
    assert recorder is not None
    return Tables(
        **recorder.frames(name),
        provenance={
            "models": {name: _provenance(model, samples, tokens, options, recorder.has_slots)}
        },
    )


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


def _provenance(
    model: Any, samples: Any, tokens: Tensor, options: Options, has_slots: bool
) -> dict[str, Any]:
    """Everything needed to tell two measurements apart, as JSON values."""
    config = model.config
    trained = getattr(config, "n_ctx", None)
    notes = []
    if "routing" in options.measures and not has_slots:
        notes.append("routing: the model has no memory slots, so its table has no rows")
    if trained is not None and tokens.shape[1] > trained:
        notes.append(f"samples of {tokens.shape[1]} tokens are longer than n_ctx = {trained}")
    origin = getattr(model, "provenance", None) or {}
    return {
        "config": config.to_dict() if hasattr(config, "to_dict") else None,
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "device": next(model.parameters()).device.type,
        "training": origin,
        "samples": samples_provenance(samples, tokens),
        "options": asdict(options),
        "versions": versions(),
        "commit": commit(),
        "notes": notes,
    }
