"""Registry: every measure, its tables, their columns, and where their rows are filled.

Schemas, `measure`, the recorder and the command line read this one list; a test holds the README's
table to it.
A new measure is one record here, one file in `analysis/measures` that fills its rows, one test and
one figure (docs/ARCHITECTURE.md).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

COMMON: dict[str, str] = {
    "model": "category",
    "step": "Int64",
    "sample": "int32",
    "document": "category",
    "loop": "category",
    "flag": "category",
}
"""The columns that every table of measures begins with."""


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table of a measure.

    Attributes:
        name: The table's name.
        meaning: What stands in it, in a few words.
        keys: The columns that tell the rows of a sample apart, with their dtypes.
        values: The columns that are measured, with their dtypes.
        averaged: The one that figures average over samples.
    """

    name: str
    meaning: str
    averaged: str = "value"
    keys: Mapping[str, str] = field(default_factory=dict)
    values: Mapping[str, str]

    @property
    def columns(self) -> dict[str, str]:
        """All columns but the common ones, with their dtypes."""
        return {**self.keys, **self.values}


@dataclass(frozen=True, kw_only=True)
class Measure:
    """A measure.

    Attributes:
        tables: What it fills.
        rows: Where its rows are filled: `module:class`, in `loopscope.analysis.measures`.
        default: Whether it is measured where nothing is said.
        logits: Whether it needs the logits of next tokens.
        longer: Whether it uses more iterations than the model's own, where there are any.
        inside: Whether it looks inside (lens, probe, intervene, orbit): `compare` takes it with
            `--inside` alone.
        asked: What it is asked for by; its first table's name when empty.
    """

    tables: tuple[Table, ...]
    rows: str
    default: bool = True
    logits: bool = False
    longer: bool = False
    inside: bool = False
    asked: str = ""

    @property
    def name(self) -> str:
        """What it is asked for by."""
        return self.asked or self.tables[0].name


_VALUE = {"value": "float64"}
_ROUTE = {"kind": "category", "t": "int16", "target": "category"}

REGISTRY: tuple[Measure, ...] = (
    Measure(
        rows="update_norm:UpdateRows",
        tables=(
            Table(
                name="update",
                meaning="relative update of each block",
                keys={"block": "category", "t": "int16"},
                values=_VALUE,
            ),
        ),
    ),
    Measure(
        rows="cka_estimators:CkaRows",
        tables=(
            Table(
                name="cka",
                meaning="CKA of all pairs of states",
                keys=dict.fromkeys(("state_a", "state_b", "kernel", "estimator"), "category"),
                values=_VALUE,
            ),
        ),
    ),
    Measure(
        rows="spectrum_decay:SpectrumRows",
        tables=(
            Table(
                name="spectrum",
                meaning="the first singular values of each state over the largest",
                keys={"state": "category", "i": "int16"},
                averaged="log10_sigma_rel",
                values={"sigma_rel": "float32", "log10_sigma_rel": "float32"},
            ),
        ),
    ),
    Measure(
        rows="effective_ranks:RankRows",
        tables=(
            Table(
                name="rank",
                meaning="effective rank, stable rank and participation ratio of each state",
                keys={"state": "category", "measure": "category"},
                values=_VALUE,
            ),
        ),
    ),
    Measure(
        rows="router_weights:RoutingRows",
        tables=(
            Table(
                name="routing",
                meaning="mean router weights and entropies, and α, each averaged over the tokens",
                keys=_ROUTE,
                averaged="mean",
                values={"mean": "float64", "entropy": "float64"},
            ),
            Table(
                name="tokens",
                meaning="router weights of the first sample, token by token",
                keys={**_ROUTE, "pos": "int32", "token": "category"},
                values={"value": "float32"},
            ),
        ),
    ),
    Measure(
        rows="step_sizes:DeltaRows",
        default=False,
        longer=True,
        tables=(
            Table(
                name="delta",
                meaning="‖h(t+1) − h(t)‖/‖h(t)‖ of each iteration, its ratio to the one before, "
                "the update of the mixed state, its turn (the step without growth in length), and "
                "the core's work (the turn from h(t) to h_m(t))",
                keys={"t": "int16"},
                values=dict.fromkeys(("value", "ratio", "mixed", "turn", "work"), "float64"),
            ),
        ),
    ),
    Measure(
        rows="readout_losses:ReadoutRows",
        default=False,
        logits=True,
        longer=True,
        tables=(
            Table(
                name="readout",
                meaning="mean next-token cross-entropy of each sample, in nats, when the coda "
                "reads h(t): raw, each token at its length in h(K) (matched), by a map (fitted)",
                keys={"t": "int16", "reading": "category"},
                values=_VALUE,
            ),
        ),
    ),
    Measure(
        rows="readout_losses:LossRows",
        default=False,
        logits=True,
        tables=(
            Table(
                name="loss",
                meaning="mean next-token cross-entropy of each sample, in nats",
                values=_VALUE,
            ),
        ),
    ),
    Measure(
        rows="lens_readings:LensRows",
        default=False,
        logits=True,
        longer=True,
        inside=True,
        tables=(
            Table(
                name="lens",
                meaning="what would be predicted if the model read out each state now (logit, coda "
                "or tuned lens): loss and entropy, KL from the final and from the next state's "
                "prediction to it, in nats; shares of positions whose top token is the final one, "
                "and where it changed from the state before; ranks of the final and the true token",
                averaged="loss",
                keys={"kind": "category", "state": "category", "beyond": "bool"},
                values=dict.fromkeys(
                    (
                        "loss",
                        "kl_final",
                        "kl_next",
                        "entropy",
                        "top_final",
                        "flipped",
                        "rank_final",
                        "rank_final_median",
                        "rank_true",
                        "rank_true_median",
                    ),
                    "float64",
                ),
            ),
            Table(
                name="lens_tokens",
                meaning="the likeliest tokens at each state and position of the first sample",
                averaged="probability",
                keys={
                    "kind": "category",
                    "state": "category",
                    "beyond": "bool",
                    "pos": "int32",
                    "input": "category",
                    "rank": "int16",
                    "token": "category",
                },
                values={"probability": "float32"},
            ),
        ),
    ),
    Measure(
        rows="probe_scores:ProbeRows",
        default=False,
        inside=True,
        tables=(
            Table(
                name="probe",
                meaning="how well a linear probe, fitted to other documents, tells a label from a "
                "state (accuracy, or R² of numbers), beside its control tasks",
                keys=dict.fromkeys(("labels", "target", "control"), "category"),
                averaged="score",
                values=dict.fromkeys(
                    (
                        "score",
                        "baseline",
                        "cross_entropy",
                        "baseline_cross_entropy",
                        "tokens",
                    ),
                    "float64",
                ),
            ),
        ),
    ),
    Measure(
        rows="intervention_effects:EffectRows",
        default=False,
        logits=True,
        inside=True,
        asked="intervene",
        tables=(
            Table(
                name="effect",
                meaning="what an intervention at a place does to a sample: Δ loss and KL from the "
                "clean run in nats, the share of changed top tokens; and the mass of the place",
                keys={
                    "what": "category",
                    "kind": "category",
                    "t": "int16",
                    "how": "category",
                    "routers": "category",
                },
                averaged="loss",
                values=dict.fromkeys(
                    ("loss", "kl", "changed", "mass", "mass_norm", "interchange"), "float64"
                ),
            ),
        ),
    ),
    Measure(
        rows="orbit_steps:OrbitRows",
        default=False,
        logits=True,
        longer=True,
        inside=True,
        tables=(
            Table(
                name="orbit",
                meaning="where the tokens' states go: size of the step, its angle to the one "
                "before, acceleration, distances, rate, contraction, shares of the kinds of path",
                keys={"part": "category", "view": "category", "t": "int16"},
                averaged="size",
                values=dict.fromkeys(
                    (
                        "size",
                        "cosine",
                        "acceleration",
                        "to_last",
                        "to_limit",
                        "rate",
                        "contraction",
                        "settles",
                        "orbits",
                        "drifts",
                    ),
                    "float64",
                ),
            ),
            Table(
                name="attention_drift",
                meaning="Jensen-Shannon divergence between the patterns of a head at t and t+1, in "
                "nats, mean over the queries",
                keys={"layer": "int16", "head": "int16", "t": "int16"},
                values=_VALUE,
            ),
            Table(
                name="orbit_path",
                meaning="paths of tokens of the first sample along the principal components of all "
                "states, and the share of variance that each component explains",
                keys={"pos": "int32", "t": "int16"},
                averaged="pc1",
                values=dict.fromkeys(
                    ("pc1", "pc2", "pc3", "explained1", "explained2", "explained3"), "float64"
                ),
            ),
            Table(
                name="early_exit",
                meaning="loss against iterations when each token stops by a rule, or after a fixed "
                "number of loops",
                keys={"rule": "category", "threshold": "float64"},
                averaged="loss",
                values=dict.fromkeys(("iterations", "loss"), "float64"),
            ),
        ),
    ),
)
"""Every measure, in the order of the tables."""

MEASURES = tuple(measure.name for measure in REGISTRY)
DEFAULT = tuple(measure.name for measure in REGISTRY if measure.default)
COMPARED = tuple(measure.name for measure in REGISTRY if not measure.inside)
"""What `compare` measures where nothing is said: all that a verdict may rest on."""

INSIDE_MEASURES = tuple(measure.name for measure in REGISTRY if measure.inside)
BY_NAME = {measure.name: measure for measure in REGISTRY}
MEASURED = {table.name: table for measure in REGISTRY for table in measure.tables}
SCHEMAS: dict[str, dict[str, str]] = {name: table.columns for name, table in MEASURED.items()}
"""Columns and dtypes of each table of measures, the common ones aside."""

RUNS: dict[str, dict[str, str]] = {
    "training": {
        "model": "category",
        "variant": "category",
        "layout": "category",
        "slots": "Int64",
        "seed": "Int64",
        "recipe": "category",
        "K": "int64",
        "d_model": "int64",
        "params_total": "int64",
        "params_non_embedding": "int64",
        "step": "int64",
        "tokens": "int64",
        "steps_planned": "int64",
        "train_loss": "float64",
        "val_loss": "float64",
        "lr": "float64",
        "tokens_per_s": "float64",
    },
}
"""Tables of training runs, one row per logged step; these are all their columns."""

TABLES = (*SCHEMAS, *RUNS)


def schema(table: str) -> dict[str, str]:
    """Give the columns of one table, those of measures with the common columns first.

    Args:
        table: The table's name.

    Returns:
        Column → dtype.
    """
    return RUNS[table] if table in RUNS else COMMON | SCHEMAS[table]
