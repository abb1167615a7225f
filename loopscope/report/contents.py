"""From the summary to what the page shows: cards, rows and cells, all of them plain text."""

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from loopscope.analysis.collapse import YARDSTICKS, finding_meanings
from loopscope.names import MAIN_LOOP
from loopscope.report.numbers import count, effect, estimate, interval, probability, signed
from loopscope.report.words import (
    FINDING,
    GOOD,
    WORDS,
    meaning_of,
    values_in_force,
    word,
)

Entry = Mapping[str, Any]
KEY_NUMBERS = (
    "loss", "loop_gain", "raw_gain", "turn_skew", "cka_debiased", "erank_ratio", "erank_share",
)  # fmt: skip
"""Measures that stand on a card, where they were measured and the evidence lacks them."""

SIGNIFICANT = 0.05
"""Differences with a corrected p below it are bold."""

_STRIP = 400  # verdicts of a run, one mark each


def shown(summary: Entry) -> list[Entry]:
    """List the checkpoints that get a card and a column: of a series, the last step of each run.

    Args:
        summary: The contents of `summary.json`.

    Returns:
        Entries of `checkpoints`, in their order.
    """
    ends = {
        (run["model"], run["loop"]): max(run["steps"]) for run in summary["series"] if run["steps"]
    }
    return [
        checkpoint
        for checkpoint in summary["checkpoints"]
        if ends.get((checkpoint["model"], checkpoint["loop"]), checkpoint["step"])
        == checkpoint["step"]
    ]


def names(summary: Entry) -> dict[str, Entry]:
    """Look up the measures of a summary by name.

    Args:
        summary: The contents of `summary.json`.

    Returns:
        Entries of `measures` by name.
    """
    return {measure["name"]: measure for measure in summary["measures"]}


def headline(summary: Entry) -> list[dict[str, Any]]:
    """Count the verdicts of the checkpoints shown, the best first.

    Args:
        summary: The contents of `summary.json`.

    Returns:
        Verdict and number of each that occurs.
    """
    verdicts = [word(checkpoint["verdict"]["verdict"])[0] for checkpoint in shown(summary)]
    order = [*WORDS, *verdicts]
    return [
        {"badge": badge(None if name == "no loop" else name), "number": verdicts.count(name)}
        for name in dict.fromkeys(sorted(verdicts, key=order.index))
    ]


def finding_counts(summary: Entry) -> list[str]:
    """Count the findings on the checkpoints shown.

    Args:
        summary: The contents of `summary.json`.

    Returns:
        Such as "2 low rank", in order of first appearance.
    """
    numbers = Counter(
        str(finding["name"])
        for checkpoint in shown(summary)
        for finding in checkpoint["verdict"]["findings"]
    )
    return [f"{number} {name}" for name, number in numbers.items()]


def badge(verdict: str | None) -> dict[str, str]:
    """Get what a verdict is shown by.

    Args:
        verdict: Of a summary; None where a model has no loop.

    Returns:
        Its word, shape and color.
    """
    name, look = word(verdict)
    return {"word": name, "shape": look.shape, "color": look.color}


def meanings(summary: Entry) -> list[dict[str, Any]]:
    """Say what each verdict and finding means, with the thresholds in force.

    Args:
        summary: The contents of `summary.json`.

    Returns:
        Badge and meaning of every verdict that there is, the best first, then of the findings.
    """
    thresholds = values_in_force(summary)
    looks = {name: (look, meaning_of(name, thresholds)) for name, look in WORDS.items()}
    looks |= {name: (FINDING, said) for name, said in finding_meanings(thresholds).items()}
    return [
        {
            "badge": {"word": name, "shape": look.shape, "color": look.color},
            "meaning": meaning,
        }
        for name, (look, meaning) in looks.items()
    ]


def cards(summary: Entry) -> list[dict[str, Any]]:
    """One card per checkpoint shown: verdict and findings, the evidence, and a few numbers.

    Args:
        summary: The contents of `summary.json`.

    Returns:
        What the template needs, in order.
    """
    measures = names(summary)
    rows = []
    for checkpoint in shown(summary):
        verdict = checkpoint["verdict"]
        checks = [{**check, "badge": badge(check["verdict"])} for check in verdict["checks"]]
        yardsticks = _yardsticks(summary, checkpoint)
        by_reference = any(entry["name"] == "over_reference" for entry in yardsticks)
        rows.append(
            {
                "label": checkpoint["label"],
                "facts": _facts(checkpoint),
                "reference": checkpoint["label"] == summary["reference"],
                "verdict": verdict["verdict"],
                "badge": badge(verdict["verdict"]),
                "between": [badge(name) for name in verdict["between"]],
                "findings": list(verdict["findings"]),
                "also": also(verdict),
                "evidence": list(verdict["evidence"]),
                "checks": checks,
                "numbers": _key_numbers(checkpoint, measures),
                "yardsticks": yardsticks,
                "against": "" if by_reference else difference_line(summary, checkpoint["label"]),
            }
        )
    return rows


def also(verdict: Entry) -> str:
    """Put the findings into words that follow the verdict.

    Args:
        verdict: Of a checkpoint in the summary.

    Returns:
        Such as "but low rank" after a good verdict, "and low rank" after another; empty without
        findings.
    """
    names = [str(finding["name"]) for finding in verdict["findings"]]
    joint = "but" if word(verdict["verdict"])[0] in GOOD else "and"
    return f"{joint} {', '.join(names)}" if names else ""


def _yardsticks(summary: Entry, checkpoint: Entry) -> list[dict[str, Any]]:
    """What the loss of a checkpoint was held against, in the summary's order."""
    return [
        {"name": entry["name"], "title": entry["title"],
         "short": _SHORT.get(entry["name"], entry["title"]), **_signed_cell(value)}
        for entry in summary["yardsticks"]
        if (value := checkpoint["yardsticks"].get(entry["name"])) and value["mean"] is not None
    ]  # fmt: skip


_SHORT = {sign.name: sign.short for sign in YARDSTICKS}


def _signed_cell(difference: Entry) -> dict[str, Any]:
    ends = (difference["mean"], difference["low"], difference["high"])
    return {"mean": signed(*ends), "interval": interval(*ends)}


def _key_numbers(checkpoint: Entry, measures: Mapping[str, Entry]) -> list[dict[str, Any]]:
    """The measures of a card that its evidence does not give already."""
    evidence = checkpoint["verdict"]["evidence"]
    return [
        {"name": name, "title": measures[name]["title"], "unit": measures[name]["unit"],
         **_cell(checkpoint["measures"][name])}
        for name in KEY_NUMBERS
        if name in measures and checkpoint["measures"].get(name, {}).get("n")
        and not _is_evidence(measures[name]["title"], evidence)
    ]  # fmt: skip


def _is_evidence(title: str, evidence: Sequence[str]) -> bool:
    """Whether the evidence gives this number already."""
    parts = [part for sentence in evidence for part in sentence.split("; ")]
    return any(re.match(rf"{re.escape(title)}(, \w+,)? [-−]?\d", part) for part in parts)


def _facts(checkpoint: Entry) -> list[str]:
    K = checkpoint["K"]
    loops = f"{K} loop{'' if K == 1 else 's'}" if K else "no loop"
    facts = [checkpoint["layout"], loops]
    if checkpoint["variant"] and checkpoint["variant"] != checkpoint["label"]:
        facts.insert(0, f"variant {checkpoint['variant']}")
    if checkpoint["loop"] != MAIN_LOOP:
        facts.append(f"loop {checkpoint['loop']}")
    if checkpoint["step"] is not None:
        facts.append(f"step {count(checkpoint['step'])}")
    if checkpoint["untrained"]:
        facts.append("untrained")
    return [str(fact) for fact in facts if fact]


def _cell(measure: Entry) -> dict[str, Any]:
    ends = (measure["mean"], measure["low"], measure["high"])
    return {"mean": estimate(*ends), "interval": interval(*ends)}


def measure_rows(summary: Entry) -> tuple[list[dict[str, Any]], list[str]]:
    """The table of measures: a row each, a cell per checkpoint shown; yardsticks below the loss.

    Args:
        summary: The contents of `summary.json`.

    Returns:
        The rows, and the titles of the measures that no checkpoint shown has.
    """
    rows, absent = [], []
    columns = shown(summary)
    for measure in summary["measures"]:
        entries = [checkpoint["measures"].get(measure["name"]) for checkpoint in columns]
        if not any(entry and entry["n"] + entry["n_flagged"] for entry in entries):
            absent.append(str(measure["title"]))
            continue
        pairs = zip(entries, columns, strict=True)
        cells = [_measure_cell(entry, checkpoint) for entry, checkpoint in pairs]
        rows.append({**measure, "cells": cells})
        if measure["name"] == "loss":
            rows += _yardstick_rows(summary)
    return rows, absent


def _yardstick_rows(summary: Entry) -> list[dict[str, Any]]:
    """A row for each yardstick that any checkpoint shown was held against."""
    rows = []
    for yardstick in summary["yardsticks"]:
        values = [c["yardsticks"].get(yardstick["name"]) for c in shown(summary)]
        if any(value and value["mean"] is not None for value in values):
            cells = [_yardstick_cell(v, c) for v, c in zip(values, shown(summary), strict=True)]
            rows.append({**yardstick, "cells": cells})
    return rows


def _yardstick_cell(value: Entry | None, checkpoint: Entry) -> dict[str, Any]:
    nothing = {"mean": "–", "interval": "", "twin": "", "few": ""}
    if value is None or value["mean"] is None:
        return nothing
    few = f"{value['n']} of {checkpoint['samples']} samples"
    return (
        nothing | _signed_cell(value) | {"few": few if value["n"] < checkpoint["samples"] else ""}
    )


def _measure_cell(measure: Entry | None, checkpoint: Entry) -> dict[str, Any]:
    if measure is None or not measure["n"]:
        lost = measure["n_flagged"] if measure else 0
        few = f"0 of {lost} samples" if lost else ""
        return {"mean": "–", "interval": "", "twin": "", "few": few}
    cell: dict[str, Any] = {**_cell(measure), "twin": "", "few": ""}
    if twin := measure["untrained"]:
        ends = (twin["difference"], twin["low"], twin["high"])
        cell["twin"], cell["twin_interval"] = signed(*ends), interval(*ends)
        cell["twin_mean"] = estimate(twin["mean"], twin["low"], twin["high"])
    if measure["n_flagged"]:
        cell["few"] = f"{measure['n']} of {measure['n'] + measure['n_flagged']} samples"
    elif measure["n"] < checkpoint["samples"]:
        cell["few"] = f"{measure['n']} of {checkpoint['samples']} samples"
    return cell


def difference_rows(summary: Entry) -> tuple[list[str], list[dict[str, Any]], list[str]]:
    """The table of differences to the reference: a row per measure, a cell per checkpoint shown.

    Args:
        summary: The contents of `summary.json`.

    Returns:
        Labels of the columns, the rows, and the reasons that cells refer to by number from 1.
    """
    by_cell = {(entry["label"], entry["measure"]): entry for entry in summary["differences"]}
    against = {entry["label"]: entry["against"] for entry in summary["differences"]}
    labels = [checkpoint["label"] for checkpoint in shown(summary)]
    columns = [str(label) for label in labels if label in against]
    reasons: list[str] = []
    rows = []
    for measure in summary["measures"]:
        entries = [by_cell.get((label, measure["name"])) for label in columns]
        if not any(entry and entry["mean"] is not None for entry in entries):
            continue
        cells = [_difference_cell(entry, reasons) for entry in entries]
        rows.append({**measure, "cells": cells})
    reference = summary["reference"]
    heads = [
        label if against[label] == reference else f"{label} (against {against[label]})"
        for label in columns
    ]
    return heads, rows, reasons


def _difference_cell(difference: Entry | None, reasons: list[str]) -> dict[str, Any]:
    """A difference; where there is none, the number of the reason, which joins `reasons`."""
    if difference is None or difference["mean"] is None:
        cell: dict[str, Any] = {"mean": "–"}
        if difference is not None and (reason := difference["reason"]):
            if reason not in reasons:
                reasons.append(reason)
            cell["reason"] = reasons.index(reason) + 1
        return cell
    ends = (difference["mean"], difference["low"], difference["high"])
    p, size = difference["p_adjusted"], difference["effect_size"]
    return {
        "mean": signed(*ends),
        "interval": interval(*ends),
        "effect": "" if size is None else effect(size),
        "p": probability(p),
        "significant": p is not None and p < SIGNIFICANT,
        "unpaired": not difference["paired"],
    }


def difference_line(summary: Entry, label: str) -> str:
    """How a checkpoint's loss differs from what it is held against, in one line.

    Args:
        summary: The contents of `summary.json`.
        label: Of the checkpoint.

    Returns:
        Such as 'loss against base −0.04 [−0.06, −0.01], p = 0.006'; empty where there is none.
    """
    for entry in summary["differences"]:
        if entry["label"] == label and entry["measure"] == "loss" and entry["mean"] is not None:
            ends = (entry["mean"], entry["low"], entry["high"])
            p = probability(entry["p_adjusted"])
            p = p if p.startswith("<") else f"= {p}"
            against = f"loss against {entry['against']} {signed(*ends)} {interval(*ends)}"
            return f"{against.strip()}, p {p}"
    return ""


def runs(summary: Entry) -> list[dict[str, Any]]:
    """The runs of a series: how many steps, what is missing, where collapse sets in.

    Args:
        summary: The contents of `summary.json`.

    Returns:
        What the template needs, in order; empty where there is no series.
    """
    by_run: dict[tuple[str, str], list[Entry]] = {}
    for checkpoint in summary["checkpoints"]:
        if checkpoint["step"] is not None:
            by_run.setdefault((checkpoint["model"], checkpoint["loop"]), []).append(checkpoint)
    rows = []
    for run in summary["series"]:
        checkpoints = by_run.get((run["model"], run["loop"]), [])
        rows.append(
            {
                "model": run["model"],
                "loop": "" if run["loop"] == MAIN_LOOP else run["loop"],
                "steps": [count(step) for step in run["steps"]],
                "missing": [count(step) for step in run["missing"]],
                "onset": _onset(run["onset"]),
                "verdicts": _strip_of(checkpoints),
            }
        )
    return rows


def _strip_of(checkpoints: Sequence[Entry]) -> list[dict[str, Any]]:
    """The verdicts of a run, step by step; of very many some are left out, the last never."""
    ordered = sorted(checkpoints, key=lambda checkpoint: checkpoint["step"])
    every = max(1, -(-len(ordered) // _STRIP))
    return [
        {
            "step": count(checkpoint["step"]),
            "badge": badge(checkpoint["verdict"]["verdict"]),
            "why": "; ".join(checkpoint["verdict"]["evidence"]),
        }
        for checkpoint in [*ordered[:-1:every], *ordered[-1:]]
    ]


def _onset(onset: Entry | None) -> dict[str, Any] | None:
    if onset is None:
        return None
    after = None if onset["after"] is None else count(onset["after"])
    return {"badge": badge(onset["verdict"]), "step": count(onset["step"]), "after": after}


def facts_of(provenance: Entry) -> list[tuple[str, str]]:
    """The provenance that a reader looks for first: versions, text, options, device, commit.

    Args:
        provenance: What `provenance.json` holds.

    Returns:
        Names and values; one that is the same for all models stands once.
    """
    with_value: dict[str, dict[str, list[str]]] = {}  # name → value → the models that have it
    records = provenance.get("models") or {}
    for model, record in records.items():
        for name, value in _flat(record or {}):
            with_value.setdefault(name, {}).setdefault(value, []).append(str(model))
    rows = []
    for name, values in with_value.items():
        for value, models in values.items():
            same = len(values) == 1 and len(models) == len(records)
            rows.append((name if same else f"{name} ({', '.join(models)})", value))
    return rows


_FACTS = ("samples", "options", "versions", "commit", "device", "dtype")


def _flat(record: Entry) -> Iterator[tuple[str, str]]:
    for name in _FACTS:
        value = record.get(name)
        if isinstance(value, Mapping):
            for key, inner in value.items():
                yield f"{name}: {key}", _plain(inner)
        elif value is not None:
            yield name, _plain(value)


def _plain(value: Any) -> str:
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(map(str, value))
    return "no" if value is False else "yes" if value is True else str(value)
