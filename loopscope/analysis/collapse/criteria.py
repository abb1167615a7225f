"""The measures of collapse: names, formulas, ranges, what each says, and its thresholds."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Sign:
    """One measure of collapse, a number for each sample.

    Attributes:
        name: Column of the tables.
        title: How it is shown.
        short: A heading for narrow tables.
        unit: Empty for a pure number.
        range: What values it can take.
        formula: How it is computed, in the paper's symbols.
        meaning: What it says, in one sentence.
        per_token: Whether it counts per token, so that it needs equal tokens to be compared.
    """

    name: str
    title: str
    short: str
    unit: str = ""
    range: str
    formula: str
    meaning: str
    per_token: bool = False


_U = "u(t) = 2‖h_m(t) − h(t)‖/(‖h_m(t)‖ + ‖h(t)‖)"
_L = "L(t): mean next-token cross-entropy when the coda reads h(t)"
_LEAST = "by the reading (raw, matched, fitted) that flatters the loop least"
_TURN = (
    "v(t): the turn, ‖ĥ(t+1) − ĥ(t)‖ over the tokens (root mean square), ĥ each token of h less "
    "the median of all, at length 1"
)

SIGNS = (
    Sign(
        name="loss",
        title="loss",
        short="loss",
        unit="nats/token",
        range="0 …",
        formula="mean next-token cross-entropy of the model as it is",
        meaning="how well the model predicts",
        per_token=True,
    ),
    Sign(
        name="skew",
        title="skew",
        short="skew",
        range="0 … 1",
        formula=f"(p − 1/K)/(1 − 1/K), p = max_t u(t)/Σu, {_U}",
        meaning="how unevenly the loops share the update: 0 where all do the same, 1 where the "
        "busiest does everything",
    ),
    Sign(
        name="first_share",
        title="share of the first loop",
        short="1st loop",
        range="0 … 1",
        formula="u(0)/Σu",
        meaning="part of the loops' relative updates that is the first one's; 1/K if even",
    ),
    Sign(
        name="mixed_update",
        title="update of the mixed state",
        short="mixed",
        range="0 … 2",
        formula="mean over t of 2‖h(t+1) − h(t)‖/(‖h(t+1)‖ + ‖h(t)‖)",
        meaning="how much the state that enters a loop differs from what enters the next: 0 where "
        "nothing of h_m(t) is kept",
    ),
    Sign(
        name="turn",
        title="turn of the state",
        short="turn",
        range="0 … 2K",
        formula=f"Σ_t v(t), {_TURN}",
        meaning="how far the tokens turn on their way through the loop: 0 where states only become "
        "longer, or move as a whole",
    ),
    Sign(
        name="work",
        title="work of the core",
        short="work",
        range="0 … 2K",
        formula="Σ_t of the turn from h(t) to h_m(t)",
        meaning="0 where the core returns what it is given, longer or moved as a whole",
    ),
    Sign(
        name="read_most",
        title="largest α of an iteration",
        short="max α",
        range="0 …",
        formula="max over j and t of |mean α| with which h_m(j) enters h(t) (MeSH Eq. 7)",
        meaning="of a model with a memory: 0 where nothing that the core writes is read",
    ),
    Sign(
        name="read_second",
        title="second largest α",
        short="2nd α",
        range="0 …",
        formula="the same of the iteration that is read second most",
        meaning="of a model with a memory: 0 where what one iteration writes is read alone",
    ),
    Sign(
        name="turn_skew",
        title="skew of the turn",
        short="turn skew",
        range="0 … 1",
        formula="(p − 1/K)/(1 − 1/K), p = max_t v(t)/Σv",
        meaning="how unevenly the loops share the turn of the mixed state",
    ),
    Sign(
        name="cka_debiased",
        title="CKA of consecutive states",
        short="CKA",
        range="… 1",
        formula="mean over t of the debiased RBF-CKA of h(t) and h(t+1)",
        meaning="stagnation: 1 where the states stop changing",
    ),
    Sign(
        name="cka_least",
        title="least CKA of any two states",
        short="min CKA",
        range="… 1",
        formula="least debiased RBF-CKA of any two of h(0) … h(K)",
        meaning="1 where the loop does not change how the tokens lie to each other",
    ),
    Sign(
        name="cka_biased",
        title="CKA of consecutive states, biased",
        short="CKA bias.",
        range="0 … 1",
        formula="the same with the biased estimator",
        meaning="as the paper draws it; it grows with the width, whatever the states",
    ),
    Sign(
        name="erank_0",
        title="effective rank of h(0)",
        short="rank h(0)",
        range="1 … min(L, D)",
        formula="exp(−Σ p log p), p = σ/Σσ of h(0)",
        meaning="how many directions the state entering the loop uses",
    ),
    Sign(
        name="erank_K",
        title="effective rank of h(K)",
        short="rank h(K)",
        range="1 … min(L, D)",
        formula="exp(−Σ p log p), p = σ/Σσ of h(K)",
        meaning="how many directions the state leaving the loop uses",
    ),
    Sign(
        name="erank_ratio",
        title="effective rank, h(K) over h(0)",
        short="ratio",
        range="0 …",
        formula="effective rank of h(K) / effective rank of h(0)",
        meaning="rank collapse: below 1 where the loop loses directions",
    ),
    Sign(
        name="erank_slope",
        title="slope of the effective rank",
        short="slope",
        unit="per loop",
        range="any",
        formula="least-squares slope of ln(effective rank of h(t)) over t = 0 … K",
        meaning="relative change of the rank with each loop; below 0 where it falls",
    ),
    Sign(
        name="erank_share",
        title="effective rank of h(K), of what is possible",
        short="rank share",
        range="0 … 1",
        formula="effective rank of h(K) / min(L, D)",
        meaning="how many of the directions that there are h(K) uses",
    ),
    Sign(
        name="loop_gain",
        title="gain of the loop",
        short="gain",
        unit="nats/token",
        range="any",
        formula=f"L(0) − L(K) {_LEAST}, {_L}",
        meaning="how much the loss falls through the loop; near 0 where the coda would read as "
        "well without it",
        per_token=True,
    ),
    Sign(
        name="raw_gain",
        title="gain, raw",
        short="raw",
        unit="nats/token",
        range="any",
        formula="L(0) − L(K), the coda reading h(t) as it is",
        meaning="the gain of the model run with K loops over none; lengths that the coda expects "
        "count too",
        per_token=True,
    ),
    Sign(
        name="matched_gain",
        title="gain, matched",
        short="matched",
        unit="nats/token",
        range="any",
        formula="L(0) − L(K), each token of h(t) at its length in h(K)",
        meaning="the gain apart from the growth of the state; 0 where h(t) is a multiple of h(0)",
        per_token=True,
    ),
    Sign(
        name="fitted_gain",
        title="gain, fitted",
        short="fitted",
        unit="nats/token",
        range="any",
        formula="L(0) − L(K), h(t) through a map to h(K) fitted on other windows",
        meaning="the gain apart from what an affine map, the same for every token, does as well",
        per_token=True,
    ),
    Sign(
        name="rest_gain",
        title="gain of the other loops",
        short="others",
        unit="nats/token",
        range="any",
        formula=f"L(0) − L(K) − (L(b) − L(b+1)) {_LEAST}, b the loop with the largest mean v(t)",
        meaning="how much the loops besides the busiest take off the loss; near 0 where one loop "
        "does all the work",
        per_token=True,
    ),
    Sign(
        name="overthinking",
        title="overthinking",
        short="overth.",
        unit="nats/token",
        range="0 … on average",
        formula="L(K) − L(t*), t* ≤ K the t of the least mean L, raw or matched, whichever is more",
        meaning="how much better an earlier state would have been read; 0 where the last is best",
        per_token=True,
    ),
    Sign(
        name="more_loss",
        title="loss of more loops",
        short="more",
        unit="nats/token",
        range="any",
        formula="L(T) − L(K) of the model run with T > K loops",
        meaning="what more loops than trained do to the loss; about 0 or less where they stay "
        "stable",
        per_token=True,
    ),
    Sign(
        name="delta_last",
        title="last step",
        short="last step",
        range="0 …",
        formula="‖h(K) − h(K−1)‖/‖h(K−1)‖",
        meaning="how far the last loop still moves the state",
    ),
    Sign(
        name="step_ratio",
        title="last step over the first",
        short="steps",
        range="0 …",
        formula="‖Δ(T−1)‖/‖Δ(0)‖, Δ(t) = h(t+1) − h(t), T the most loops run",
        meaning="convergence: below 1 the steps shrink from loop to loop, above 1 they grow",
    ),
    Sign(
        name="nonfinite",
        title="samples with NaN or infinity",
        short="NaN",
        range="0 … 1",
        formula="share of samples with a value that is not finite in h(0) … h(K) or the loss",
        meaning="above 0 where the states overflow",
    ),
)
"""Every sign, in the order of the tables."""

YARDSTICKS = (
    Sign(
        name="over_unigram",
        title="loss over that of a unigram",
        short="− unigram",
        unit="nats/token",
        range="any",
        formula="loss − mean of −log p(token), p its share of the tokens in all other documents "
        "(one added to each count)",
        meaning="above 0 where the model predicts worse than frequencies do",
        per_token=True,
    ),
    Sign(
        name="over_one_loop",
        title="loss over that of one loop",
        short="− 1 loop",
        unit="nats/token",
        range="any",
        formula="loss − L(1), the coda reading h(1) as it is",
        meaning="above 0 where the model is better run with one loop",
        per_token=True,
    ),
    Sign(
        name="over_untrained",
        title="loss over that of the untrained twin",
        short="− untrained",
        unit="nats/token",
        range="any",
        formula="loss − loss of the same configuration with fresh weights",
        meaning="below 0 where training has taught anything",
        per_token=True,
    ),
    Sign(
        name="over_reference",
        title="loss over that of the reference",
        short="− reference",
        unit="nats/token",
        range="any",
        formula="loss − loss of the first model, on the same tokens",
        meaning="above 0 where the first model predicts better",
        per_token=True,
    ),
)
"""What the loss of a whole model is held against."""


@dataclass(frozen=True, kw_only=True)
class Threshold:
    """A number that a sign is held against in a verdict's condition.

    Attributes:
        name: Under which `judge` takes another value.
        signs: What is held against it.
        value: The number.
        unit: Empty for a pure number.
        meaning: What it means to be on the other side of `value`.
        otherwise: The same for any other number, as `filled` takes it; empty where `meaning` fits
            all.
    """

    name: str
    signs: tuple[str, ...]
    value: float
    unit: str = ""
    meaning: str
    otherwise: str = ""

    def meaning_at(self, value: float) -> str:
        """Say what it means to be on the other side of the number in force.

        Args:
            value: The number, in the threshold's unit.

        Returns:
            `meaning` for the threshold's own value, else a sentence with the number.
        """
        usual = value == self.value or not self.otherwise
        return self.meaning if usual else filled(self.otherwise, value)

    def written(self, value: float | None) -> str:
        """Write a number in the threshold's unit.

        Args:
            value: The number; None where there is none.

        Returns:
            Such as "0.1 nats/token"; – for None.
        """
        return "–" if value is None else f"{value:g} {self.unit}".rstrip()


def filled(template: str, value: float | None) -> str:
    """Write a number into a sentence.

    Args:
        template: With {value} or {percent} where the number goes.
        value: The number; None where there is none.

    Returns:
        The sentence: 0.3 is "0.3" as a value and "30 %" as percent, None is –.
    """
    if value is None:
        return template.format(value="–", percent="–")
    return template.format(value=f"{value:g}", percent=f"{100 * value:g} %")


THRESHOLDS = (
    Threshold(
        name="little_gain",
        signs=("loop_gain", "rest_gain"),
        value=0.02,
        unit="nats/token",
        meaning="loops that take off less do little",
    ),
    Threshold(
        name="harm",
        signs=("overthinking",),
        value=0.1,
        unit="nats/token",
        meaning="an earlier state read better by more: the loop does harm",
    ),
    Threshold(
        name="still",
        signs=("turn", "work"),
        value=0.05,
        meaning="over the whole loop tokens turn by less than about three degrees (root mean "
        "square)",
        otherwise="over the whole loop tokens turn by less than {value} (2 sin of half the angle, "
        "root mean square)",
    ),
    Threshold(
        name="same",
        signs=("cka_least",),
        value=0.995,
        meaning="the loop does not change how the tokens lie to each other",
        otherwise="all states have a CKA above {value} with each other",
    ),
    Threshold(
        name="unread",
        signs=("read_most", "read_second"),
        value=0.005,
        meaning="next to nothing of what was written is read",
        otherwise="what was written is read with less than {value} of its length",
    ),
    Threshold(
        name="uneven",
        signs=("turn_skew", "skew"),
        value=0.8,
        meaning="four fifths of the way from an even split to one loop doing everything",
        otherwise="{percent} of the way from an even split to one loop doing everything",
    ),
    Threshold(
        name="alike",
        signs=("cka_debiased",),
        value=0.98,
        meaning="consecutive states are all but the same, up to rotation and scale",
        otherwise="consecutive states have a CKA above {value}; 1 is the same, up to rotation and "
        "scale",
    ),
    Threshold(
        name="half_rank",
        signs=("erank_ratio",),
        value=0.5,
        meaning="the loop loses half of the effective rank that it is given",
        otherwise="the loop keeps less than {percent} of the effective rank that it is given",
    ),
    Threshold(
        name="rank_one",
        signs=("erank_K",),
        value=2.0,
        meaning="fewer than two directions are left",
        otherwise="fewer than {value} directions are left",
    ),
    Threshold(
        name="low_rank",
        signs=("erank_share",),
        value=0.25,
        meaning="h(K) uses less than a quarter of the directions that there are",
        otherwise="h(K) uses less than {percent} of the directions that there are",
    ),
    Threshold(
        name="worse",
        signs=("over_reference",),
        value=0.2,
        unit="nats/token",
        meaning="the first model predicts better by more than this",
    ),
    Threshold(
        name="no_better",
        signs=("over_unigram",),
        value=0.0,
        unit="nats/token",
        meaning="frequencies of tokens predict better",
    ),
    Threshold(
        name="informed",
        signs=("over_unigram",),
        value=0.15,
        unit="of the unigram's loss",
        meaning="the model predicts this text better than frequencies do by more than this",
    ),
    Threshold(
        name="growing",
        signs=("step_ratio",),
        value=1.0,
        meaning="the last step is longer than the first",
        otherwise="the last step is more than {percent} as long as the first",
    ),
    Threshold(
        name="shrinking",
        signs=("step_ratio",),
        value=0.5,
        meaning="the last step is less than half as long as the first",
        otherwise="the last step is less than {percent} as long as the first",
    ),
    Threshold(
        name="stable",
        signs=("more_loss",),
        value=0.05,
        unit="nats/token",
        meaning="more loops than trained cost no more than this",
    ),
)
"""The numbers of the verdicts' conditions (`verdicts.LADDER`) and of findings (`yardsticks`)."""
