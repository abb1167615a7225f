"""The figures of the page: drawn from the tables, with what to look for."""

import base64
from collections.abc import Callable, Mapping, Sequence
from io import BytesIO
from typing import Any, NamedTuple

from loopscope.analysis.tables import Tables
from loopscope.figures import Figure, Job, plan
from loopscope.names import is_twin_name

DPI = 150
WIDE = 144
"""CSS pixels of an inch: small print of a figure is then as large as that of the page."""

_KEPT = ("loss_per_loop", "steps", "fig3_update", "fig4_cka_debiased", "fig5_spectrum", "rank")


class Caption(NamedTuple):
    """What stands under a figure, and in its place for those who cannot see it."""

    title: str
    look_for: str
    alt: str


CAPTIONS = {
    "loss_per_loop": Caption(
        "Is each loop used?",
        "The loss when the coda reads the state before it is finished, h(t) instead of h(K). A "
        "line that falls to its large marker is a loop that works to the end; one that is flat "
        "before it has loops that do nothing for the prediction; one that rises has loops that do "
        "harm. Raw, the coda reads h(t) as it is, which is what fewer loops give; but it expects "
        "the length of h(K), so that a state that only grows falls too. Matched, each token has "
        "the length it has in h(K); fitted, h(t) goes through a map to h(K), the same for every "
        "token: a loop has to fall there as well, and its gain is counted where it is least. "
        "Dotted: more loops than trained. Bands are as wide as samples differ, which all "
        "models share; the table of differences compares on the same samples.",
        "Line charts of the loss in nats per token against t, one panel per reading of the state, "
        "one line per model",
    ),
    "steps": Caption(
        "How far does each loop move the state?",
        "The relative step from h(t) to h(t+1), logarithmic. A straight fall is convergence to a "
        "fixed point; a level line keeps moving. The turn is the step without growth in length: a "
        "loop with steps but no turn only makes the state longer. Small steps are no failure as "
        "long as the loss beside them is good.",
        "Line charts of the relative step and the turn of each iteration, one line per model",
    ),
    "fig3_update": Caption(
        "Do the loops share the work?",
        "How much each block changes the state, from 0 (not at all) to 2. Look at the blue bars: "
        "even ones are balanced, one tall bar before short ones is skewed computation (MeSH "
        "Fig. 3).",
        "Bar charts of the relative update of prelude, each core loop and coda, one per model",
    ),
    "fig4_cka_debiased": Caption(
        "Do the states go on changing?",
        "How alike two states are, 1 (yellow) where one is the other turned and scaled, about 0 "
        "where they have nothing in common. Bright cells beside the diagonal among h(0) … h(K) "
        "are stagnation. Debiased estimator, which does not grow with the width.",
        "Heat maps of the debiased CKA of all pairs of states, one per model",
    ),
    "fig5_spectrum": Caption(
        "How many directions do the states use?",
        "Singular values over the largest, logarithmic. A line that falls faster than that of "
        "h(0) is a state with fewer directions (MeSH Fig. 5).",
        "Line charts of the leading singular values of each state, one per model",
    ),
    "rank": Caption(
        "Does the rank fall through the loop?",
        "Effective rank of each state: about how many directions it uses evenly. A fall from h(0) "
        "to h(K) is rank collapse; towards 1 nothing else is left.",
        "Line chart of the effective rank of each state, one line per model",
    ),
    "lens": Caption(
        "What would be predicted at every state?",
        "What the model would say if it read out a state now: the logit lens unembeds it, the coda "
        "lens lets the coda read it in place of h(K), the tuned lens maps it first, as fitted on "
        "other text. Where the lenses agree that a line falls, the loops bring the prediction "
        "closer. Where the logit lens is far off and another is not, the state holds the answer in "
        "another basis; where they disagree, believe none alone. Compare with the dashed lines of "
        "the untrained twin. A lens shows what can be read of a state, not what the model uses.",
        "Line charts of loss, KL divergence from the final prediction and share of equal top "
        "tokens against the states, one column per lens, one line per model",
    ),
    "lens_tokens_": Caption(
        "One text, state by state",
        "The token that the lens puts first at each position (columns) and state (rows, in the "
        "order of computation), coloured by its probability. Framed is the state from which on the "
        "final answer stays on top: frames in the upper rows are answers that the later loops do "
        "not change. Bold is the token that follows in the text.",
        "Grids of the top token of each state at each position of one text",
    ),
    "probe_": Caption(
        "What do the states hold?",
        "How well a linear probe tells the label of a token (or sample) from each state, on "
        "documents that it was not fitted to. A probe finds what is there, not what is used: "
        "whether the model uses it shows when it is taken away. Look at where the line rises "
        "above that of h_emb (thin): that is what the loops add. Above the control task, in which "
        "each token type has a random label, the probe reads more than which token it is (shaded, "
        "selectivity); above the untrained twin it reads what training has made; shuffled labels "
        "have to lie at the constant guess, or just below it.",
        "Line charts of the score of linear probes at each state, with control task, untrained "
        "twin, shuffled labels and a constant guess, one panel per model",
    ),
    "orbit": Caption(
        "Do the states settle, orbit or drift?",
        "Steps that shrink by a factor in every iteration come to rest; an angle near 0° goes "
        "straight on, one beyond 90° goes back. The contraction is the largest factor by which "
        "one iteration can move two neighbouring states apart: below 1 all of them come closer; "
        "above 1 some do not, though the path itself (thin line) may still settle. Dotted: more "
        "loops than trained. A kind of path is a rule for the steps that were run, no proof of a "
        "limit.",
        "Line charts of step, angle, acceleration, contraction and distance to the last state "
        "against the iteration, one line per model, and bars of the kinds of path",
    ),
    "orbit_direction": Caption(
        "And without their growth in length?",
        "The same of the directions h/‖h‖. Paths that drift here move on in what they say; those "
        "that drift above and settle here only grow longer.",
        "Line charts of step, angle, acceleration, contraction and distance of the directions of "
        "the states, one line per model, and bars of the kinds of path",
    ),
    "orbit_path_": Caption(
        "Where do tokens go?",
        "Each line is a token of the first sample, in the plane of the first principal components "
        "of all states. Mind how little of the variance the axes explain: what looks like one "
        "direction may be the one that all tokens share.",
        "Paths of tokens in the plane of principal components, coloured by iteration",
    ),
    "attention_drift_": Caption(
        "Do heads look elsewhere in the next iteration?",
        "How far the pattern of each head moves from one iteration to the next: 0 where it looks "
        "at the same tokens, 0.69 at none of them. A head that does not move does the same again.",
        "Heat maps of the Jensen-Shannon divergence of attention patterns, head by iteration",
    ),
    "early_exit": Caption(
        "Could tokens stop earlier?",
        "The loss when each token stops by a rule, against the mean number of iterations. Below: "
        "less the loss of the same number of loops for all tokens; a rule is worth something where "
        "its line and band are below 0.",
        "Line charts of the loss against the mean number of iterations per token, one per model",
    ),
    "series": Caption(
        "The measures over training",
        "One panel per measure, one line per run. A vertical line stands at the checkpoint from "
        "which on a run is judged bad, the shade before it spans the step in which that happened.",
        "Small line charts of every measure of collapse over training steps, one line per run",
    ),
    "effect_": Caption(
        "What does the prediction need?",
        "What the loss gains when one thing is left out or loses what it knows of the token: "
        "iterations are skipped, writes and reads are cut, attention, MLP, slots and edges take "
        "the mean of other texts. Total: routers answer to the change; direct: they keep their "
        "weights. A place with an interval about 0 is not needed by itself; another may hold the "
        "same, so several places without effect may be needed together.",
        "Points with intervals: change of the loss in nats at each place, total and direct",
    ),
    "mass_effect_": Caption(
        "Is what is weighted most needed most?",
        "Effect against mass, a point per place. Mass is what router weights and norms show; "
        "effect is what the loss shows. ρ near 1: the weights tell what is needed; near 0: they "
        "do not. Places with much mass and no effect are written or read for nothing.",
        "Scatter plots of the change of the loss against weights and norms, by kind of place",
    ),
}

"""Name of a figure, or how the names of figures of one model begin (`…_`) → its caption."""

INSIDE: dict[str, tuple[str, ...]] = {
    "What can be read after t loops": ("lens", "lens_tokens_"),
    "What the states hold": ("probe_",),
    "What the prediction depends on": ("effect_", "mass_effect_"),
    "Where the states go": (
        "orbit",
        "orbit_direction",
        "orbit_path_",
        "attention_drift_",
        "early_exit",
    ),
}
"""Chapters of looking inside → their figures, as in `CAPTIONS`."""


def chapters(
    tables: Tables,
    summary: Mapping[str, Any],
    progress: Callable[[int], object] | None = None,
) -> list[dict[str, Any]]:
    """Draw the figures of what looks inside, chapter by chapter.

    Args:
        tables: What was measured.
        summary: The contents of `summary.json`.
        progress: Called with 1 after each figure.

    Returns:
        Title and figures of each chapter that has any; untrained twins get none of their own.
    """
    models = [name for name in tables.models if not is_twin_name(name)] or tables.models
    jobs, _ = plan(tables, models, summary)
    drawn = []
    for title, keys in INSIDE.items():
        shown = []
        for key in keys:
            for job in jobs:
                if key in CAPTIONS and _caption_key(job.name) == key:
                    shown.append(_picture(job, models))
                    if progress is not None:
                        progress(1)
        if shown:
            drawn.append({"title": title, "figures": shown})
    return drawn


def _caption_key(name: str) -> str | None:
    """The key of `CAPTIONS` that a figure's name belongs to, the longest beginning of several."""
    if name in CAPTIONS:
        return name
    beginnings = [key for key in CAPTIONS if key.endswith("_") and name.startswith(key)]
    return max(beginnings, key=len, default=None)


def pictures(
    tables: Tables,
    summary: Mapping[str, Any],
    progress: Callable[[int], object] | None = None,
) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """Draw the figures of the page.

    Args:
        tables: What was measured.
        summary: The contents of `summary.json`, for a series.
        progress: Called with 1 after each figure.

    Returns:
        Name → what the template needs of each figure that the tables allow, and what of them is
        not drawn.
    """
    jobs, missing = plan(tables, None, summary)
    by_name = {job.name: job for job in jobs}
    models = [str(checkpoint["model"]) for checkpoint in summary["checkpoints"]]
    not_drawn = [str(item) for item in missing if item.figure in (*CAPTIONS, "steps between")]
    drawn = {}
    for name in (*_KEPT, "series"):
        if name not in by_name:
            continue
        drawn[name] = _picture(by_name[name], models)
        if progress is not None:
            progress(1)
    return drawn, not_drawn


def _picture(job: Job, models: Sequence[str]) -> dict[str, Any]:
    figure: Figure = job.make()
    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI, metadata={"Software": None})
    caption = CAPTIONS[_caption_key(job.name) or ""]
    names = ", ".join(dict.fromkeys(models))
    return {
        "name": job.name,
        "source": "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode(),
        "width": round(figure.get_figwidth() * WIDE),
        "height": round(figure.get_figheight() * WIDE),
        "title": caption.title,
        "look_for": caption.look_for,
        "alt": f"{caption.alt} ({names}). The numbers stand in the tables of this page.",
    }
