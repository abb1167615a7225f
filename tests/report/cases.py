"""A summary and tables as a comparison gives them: four models, a series, what failed, NaN."""

from typing import Any

import numpy as np
import pandas as pd

from loopscope.analysis.tables.frames import Tables
from loopscope.names import READINGS
from tests.figures.conftest import make
from tests.figures.course_tables import with_courses

HOSTILE = (
    "runs/<script>alert('x')</script>&\"quoted\"/" + "very_long_folder_name/" * 6 + "größe-日本"
)

MEASURES = [
    ("loss", "loss", "nats/token", "0 …", "mean next-token cross-entropy", "how well it predicts"),
    ("skew", "skew", "", "0 … 1", "(p − 1/K)/(1 − 1/K)", "how unevenly the loops share"),
    ("cka_debiased", "CKA of consecutive states", "", "… 1", "mean over t", "1: states stop"),
    ("erank_K", "effective rank of h(K)", "", "1 … min(L, D)", "exp(−Σ p log p)", "directions"),
    ("erank_ratio", "effective rank, h(K) over h(0)", "", "0 …", "ratio", "below 1: fewer"),
    ("loop_gain", "gain of the loop", "nats/token", "any", "L(0) − L(K)", "what the loop does"),
    ("more_loss", "loss of more loops", "nats/token", "any", "L(T) − L(K)", "more loops than K"),
    ("erank_share", "effective rank of h(K), of what is possible", "", "0 … 1", "share", "few"),
]
MEANS = {
    "base": (2.48, 0.13, 0.71, 60.0, 0.8, 2.94, 0.9, 0.4),
    "residual": (2.461, 0.31, 0.88, 55.0, 0.7, 29.2, 0.32, 0.3),
    "anchor": (2.44, 0.42, 0.79, 61.0, 0.9, 4.2, 0.2, 0.35),
    "mesh": (2.41, 0.2, 0.55, 16.0, 1.05, 2.0, None, 0.12),
}
YARDSTICKS = [
    ("over_unigram", "loss over that of a unigram", "loss − unigram", "above 0: worse"),
    ("over_one_loop", "loss over that of one loop", "loss − L(1)", "above 0: one loop is better"),
    ("over_untrained", "loss over that of the untrained twin", "loss − twin", "below 0: taught"),
    ("over_reference", "loss over that of the reference", "loss − first", "above 0: worse"),
]
FINDINGS = {
    "low rank": "effective rank of h(K), of what is possible 0.12 [0.11, 0.13], below 0.25",
    "worse than unigram": "loss over that of a unigram 0.31 [0.21, 0.41], above 0",
}


def estimate(
    mean: float | None,
    share: float = 0.03,
    *,
    twin: float | None = None,
    n: int = 40,
    lost: int = 0,
) -> dict[str, Any]:
    """One measure of one checkpoint."""
    if mean is None:
        nothing = {"mean": None, "low": None, "high": None, "std": None}
        return nothing | {
            "n": 0,
            "documents": 0,
            "clusters": 0,
            "n_flagged": lost,
            "untrained": None,
        }
    half = share * abs(mean)
    untrained = None
    if twin is not None:
        d = mean - twin
        untrained = {"mean": twin, "difference": d, "low": d - half, "high": d + half}
    ends = {"mean": mean, "low": mean - half, "high": mean + half, "std": 3 * half}
    return ends | {
        "n": n,
        "documents": min(n, 30),
        "clusters": min(n, 30),
        "n_flagged": 0,
        "untrained": untrained,
    }


def yardsticks(**means: float) -> dict[str, dict[str, Any]]:
    """What the loss of a checkpoint was held against."""
    return {
        f"over_{name}": {"mean": mean, "low": mean - 0.1, "high": mean + 0.1, "n": 40}
        for name, mean in means.items()
    }


def verdict(
    name: str | None,
    *evidence: str,
    between: tuple[str, ...] = (),
    findings: tuple[str, ...] = (),
) -> dict[str, Any]:
    """A verdict with two checks, and findings beside it."""
    checks = [
        {"verdict": "collapsed", "answer": "no", "because": "effective rank of h(K) 60, above 2"},
        {"verdict": "skewed", "answer": "unknown", "because": "skew 0.5 [0.4, 0.6]"},
    ]
    told = {"verdict": name, "between": list(between), "evidence": list(evidence)}
    beside = [{"name": finding, "because": FINDINGS[finding]} for finding in findings]
    return told | {"checks": checks if name else [], "findings": beside}


def checkpoint(model: str, means: tuple, told: dict[str, Any], *, twin=None, **changes: Any):
    """One entry of `checkpoints`."""
    names = [m[0] for m in MEASURES]
    measures = {
        name: estimate(mean, twin=None if twin is None or mean is None else twin * mean)
        for name, mean in zip(names, means, strict=True)
    }
    entry = {
        "label": model, "model": model, "step": None, "loop": "core", "target": model,
        "variant": model if model in MEANS else None, "layout": "1+2R3+1", "K": 3, "T": 6,
        "untrained": False, "samples": 40, "measures": measures, "yardsticks": {}, "verdict": told,
    }  # fmt: skip
    return entry | changes


def difference(
    label: str, measure: str, mean: float | None, reason: str | None = None, against: str = "base"
):
    """One entry of `differences`."""
    names = {"label": label, "against": against, "measure": measure}
    if mean is None:
        nothing = dict.fromkeys(("mean", "low", "high", "effect_size", "p", "p_adjusted"))
        return {
            **names,
            **nothing,
            "n": 0,
            "documents": 0,
            "clusters": 0,
            "paired": False,
            "reason": reason,
        }
    return {
        **names, "mean": mean, "low": mean - 0.02, "high": mean + 0.02,
        "effect_size": mean * 20, "p": 1e-7, "p_adjusted": 3e-6 if abs(mean) > 0.03 else 0.4,
        "n": 40, "documents": 30, "clusters": 30, "paired": True, "reason": reason,
    }  # fmt: skip


def summary() -> dict[str, Any]:
    """Four models of the zoo, an untrained one, and one without a loop."""
    ok = "gain of the loop 2.94 [2.71, 3.18]; skew 0.13 [0.12, 0.14]"
    found = [
        checkpoint(
            "base", MEANS["base"], verdict("healthy", ok), twin=1.4,
            yardsticks=yardsticks(unigram=-3.1, one_loop=-0.9, untrained=-5.2),
        ),
        checkpoint(
            "residual", MEANS["residual"],
            verdict("skewed", "skew 0.62 [0.58, 0.66], above 0.5",
                    "gain of the other loops 0.01 [0, 0.02], below 0.05"),
        ),
        checkpoint(
            "anchor", MEANS["anchor"],
            verdict("uncertain", "skew 0.5 [0.45, 0.55], not clearly on one side of 0.5",
                    between=("skewed", "healthy")),
            twin=1.2,
        ),
        checkpoint(
            "mesh", MEANS["mesh"],
            verdict("converging", "contraction 0.7 [0.6, 0.8]", findings=("low rank",)),
            yardsticks=yardsticks(unigram=-3.2, reference=0.05),
        ),
        checkpoint(
            "mesh@init", (7.66, 0.01, 0.999, 12.3, 0.99, 0.0001, None, 0.1),
            verdict("stagnant", "CKA of consecutive states 0.999 [0.998, 1], above 0.98",
                    findings=("low rank", "worse than unigram")),
            untrained=True, variant="mesh",
        ),
        checkpoint(
            "plain", (2.39, None, None, None, None, None, None, 0.5),
            verdict(None, "it has no loop: no layers are run again with the same weights"),
            layout="8", K=0, T=0, variant="vanilla",
        ),
    ]  # fmt: skip
    return {
        "format": "loopscope-summary",
        "format_version": 2,
        "loopscope": "0.1.0",
        "command": "loopscope compare base residual anchor mesh mesh@init plain --samples 40",
        "samples": {
            "data": "shipped held-out samples", "count": 40, "documents": 30, "tokens": 256,
            "seed": 0, "same_tokens": True,
        },
        "reference": "base",
        "measures": [
            dict(zip(("name", "title", "unit", "range", "formula", "meaning"), m, strict=True))
            for m in MEASURES
        ],
        "thresholds": [
            {"name": "uneven", "measures": ["skew"], "value": 0.5, "unit": "",
             "meaning": "half way from even to one"},
            {"name": "little_gain", "measures": ["loop_gain"], "value": 0.02,
             "unit": "nats/token", "meaning": "is little"},
        ],
        "yardsticks": [
            {"name": name, "title": title, "unit": "nats/token", "range": "any",
             "formula": formula, "meaning": meaning}
            for name, title, formula, meaning in YARDSTICKS
        ],
        "checkpoints": found,
        "differences": [
            difference(c["label"], name, mean, reason)
            for c in found[1:]
            for name, mean, reason in (
                ("loss", -0.04, None),
                ("skew", 0.18, None) if c["K"] else ("skew", None, "plain has no loop"),
                ("more_loss", None, "fewer than 8 samples have both"),
            )
        ],
        "series": [],
        "failed": [],
        "notes": ["mesh: 'mesh' has routers of its own for each iteration, so it runs exactly 3"],
    }  # fmt: skip


STEPS = (0, 500, 1000, 1500, 2500, 3000)


def with_series(told: dict[str, Any]) -> dict[str, Any]:
    """The same with two runs over training, one of which collapses, and what could not be read."""
    runs = []
    for model, bad in (("runs/good", None), (HOSTILE, 1500)):
        for i, step in enumerate(STEPS):
            gone = bad is not None and step >= bad
            means = (
                2.5 + 8.0 * 0.15**i, 0.2, 0.6 + 0.39 * gone, 60.0 / (1 + 30 * gone),
                1 - 0.95 * gone, 3.0 * (1 - 0.99 * gone), 0.2, 0.4 - 0.39 * gone,
            )  # fmt: skip
            fine = verdict("healthy", "gain of the loop 3 [2.9, 3]")
            end = verdict("collapsed", "effective rank of h(K) 1.9 [1.8, 1.95], below 2")
            runs.append(
                checkpoint(
                    model, means, end if gone else fine,
                    label=f"{model} step {step}", step=step, target=f"{model}/step-{step:06d}",
                )
            )  # fmt: skip
    entries = [
        {"model": "runs/good", "loop": "core", "steps": list(STEPS), "missing": [2000],
         "onset": None},
        {"model": HOSTILE, "loop": "core", "steps": list(STEPS), "missing": [],
         "onset": {"verdict": "collapsed", "step": 1500, "after": 1000}},
    ]  # fmt: skip
    failed = [
        {"target": f"{HOSTILE}/step-002000", "reason": "cannot read <b>model.safetensors</b>: eof"}
    ]
    return told | {
        "checkpoints": [*told["checkpoints"], *runs],
        "series": entries,
        "failed": failed,
        "notes": [*told["notes"], "different tokenizers: <i>losses</i> cannot be compared"],
    }


def tables(models=("base", "residual", "anchor", "mesh", "mesh@init")) -> Tables:
    """Tables of models with three loops."""
    parts = [
        with_courses(make(m, B=6 if m.startswith("mesh") else None, samples=12),
                     more=0 if m.startswith("mesh") else 3, readings=READINGS, turn=True)
        for m in models
    ]  # fmt: skip
    return Tables.concat([*parts, make("plain", plain=True, samples=12)])


def series_tables() -> Tables:
    """The tables of `with_series(summary())`."""
    runs = [
        with_courses(
            make(model, samples=4, step=step, seed=step), more=3, readings=READINGS, turn=True
        )
        for model in ("runs/good", HOSTILE)
        for step in STEPS
    ]
    return Tables.join([tables(), *runs])


def provenance(found: Tables) -> dict[str, Any]:
    """What `provenance.json` holds."""
    versions = {"loopscope": "0.1.0", "python": "3.11.7", "torch": "2.13.0", "numpy": "2.4.6"}
    one = {
        "samples": {"source": "shipped held-out samples", "sha256": "ab" * 32, "samples": 40,
                    "tokens": 256, "seed": 0},
        "options": {"bandwidth": 1.0, "drop_first": 0, "kernels": ["rbf"]},
        "versions": versions, "commit": "1" * 40, "device": "cpu", "dtype": "float32",
    }  # fmt: skip
    return {"models": {model: dict(one) for model in found.models}}


def broken_tables() -> Tables:
    """One model of which no value is sound."""
    found = with_courses(make("broken", samples=5), more=2)
    for name, columns in {
        "update": ["value"], "cka": ["value"], "rank": ["value"],
        "spectrum": ["sigma_rel", "log10_sigma_rel"],
        "delta": ["value", "ratio", "mixed", "turn", "work"],
        "readout": ["value"], "loss": ["value"],
    }.items():  # fmt: skip
        frame: pd.DataFrame = getattr(found, name)
        frame.loc[:, columns] = np.nan
        frame.loc[:, "flag"] = "nonfinite"
    return found
