"""From the summary to what the page shows: cards, rows and cells, all of them plain text."""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from loopscope.report.numbers import count, effect, estimate, interval, probability, signed
from loopscope.report.words import WORDS, word

Entry = Mapping[str, Any]
KEY_NUMBERS = ("loss", "loop_gain", "skew", "cka_debiased", "erank_ratio")
"""Measures that stand on a card, where they were measured."""

SIGNIFICANT = 0.05
_STRIP = 400  # verdicts of a run, one mark each


def shown(summary: Entry) -> list[Entry]:
    """List the checkpoints that get a card and a column: of a series, the last step of each run.

    Args:
        summary: The contents of `summary.json`.

    Returns:
        Entries of `checkpoints`, in their order.
    """
    ends = {(one["model"], one["loop"]): max(one["steps"]) for one in _several(summary)}
    return [
        one for one in summary["checkpoints"]
        if ends.get((one["model"], one["loop"]), one["step"]) == one["step"]
    ]  # fmt: skip


def _several(summary: Entry) -> list[Entry]:
    return [one for one in summary["series"] if one["steps"]]


def names(summary: Entry) -> dict[str, Entry]:
    """The measures of a summary by name."""
    return {one["name"]: one for one in summary["measures"]}


def headline(summary: Entry) -> list[dict[str, Any]]:
    """Count the verdicts of the checkpoints shown, the best first.

    Args:
        summary: The contents of `summary.json`.

    Returns:
        Verdict and number of each that occurs.
    """
    found = [word(one["verdict"]["verdict"])[0] for one in shown(summary)]
    order = [*WORDS, *found]
    return [
        {"badge": badge(None if name == "no loop" else name), "number": found.count(name)}
        for name in dict.fromkeys(sorted(found, key=order.index))
    ]


def badge(verdict: str | None) -> dict[str, str]:
    """Word, shape and colour of a verdict."""
    name, look = word(verdict)
    return {"word": name, "shape": look.shape, "color": look.color}


def cards(summary: Entry) -> list[dict[str, Any]]:
    """One card per checkpoint shown: its verdict, the evidence, and a few numbers.

    Args:
        summary: The contents of `summary.json`.

    Returns:
        What the template needs, in order.
    """
    measures = names(summary)
    found = []
    for one in shown(summary):
        told = one["verdict"]
        numbers = [
            {"name": name, "title": measures[name]["title"], "unit": measures[name]["unit"],
             **_cell(one["measures"][name])}
            for name in KEY_NUMBERS
            if name in measures and one["measures"].get(name, {}).get("n")
            and not _said(measures[name]["title"], told["evidence"])
        ]  # fmt: skip
        found.append(
            {
                "label": one["label"],
                "facts": _facts(one),
                "reference": one["label"] == summary["reference"],
                "verdict": told["verdict"],
                "badge": badge(told["verdict"]),
                "between": [badge(name) for name in told["between"]],
                "evidence": list(told["evidence"]),
                "checks": [{**check, "badge": badge(check["verdict"])} for check in told["checks"]],
                "numbers": numbers,
                "against": difference_line(summary, one["label"]),
            }
        )
    return found


def _said(title: str, evidence: Sequence[str]) -> bool:
    """Whether the evidence gives this number already."""
    parts = [part for sentence in evidence for part in sentence.split("; ")]
    return any(re.match(rf"{re.escape(title)} [-−]?\d", part) for part in parts)


def _facts(one: Entry) -> list[str]:
    loops = f"{one['K']} loop{'' if one['K'] == 1 else 's'}" if one["K"] else "no loop"
    told = [one["layout"], loops]
    if one["variant"] and one["variant"] != one["label"]:
        told.insert(0, f"variant {one['variant']}")
    if one["loop"] != "core":
        told.append(f"loop {one['loop']}")
    if one["step"] is not None:
        told.append(f"step {count(one['step'])}")
    if one["untrained"]:
        told.append("untrained")
    return [str(part) for part in told if part]


def _cell(told: Entry) -> dict[str, Any]:
    ends = (told["mean"], told["low"], told["high"])
    return {"mean": estimate(*ends), "interval": interval(*ends)}


def measure_rows(summary: Entry) -> tuple[list[dict[str, Any]], list[str]]:
    """The table of measures: a row each, a cell per checkpoint shown.

    Args:
        summary: The contents of `summary.json`.

    Returns:
        The rows, and the titles of the measures that no checkpoint shown has.
    """
    rows, absent = [], []
    columns = shown(summary)
    for measure in summary["measures"]:
        told = [one["measures"].get(measure["name"]) for one in columns]
        if not any(one and one["n"] + one["n_flagged"] for one in told):
            absent.append(str(measure["title"]))
            continue
        cells = [_measure_cell(t, c) for t, c in zip(told, columns, strict=True)]
        rows.append({**measure, "cells": cells})
    return rows, absent


def _measure_cell(told: Entry | None, checkpoint: Entry) -> dict[str, Any]:
    if told is None or not told["n"]:
        lost = told["n_flagged"] if told else 0
        few = f"0 of {lost} samples" if lost else ""
        return {"mean": "–", "interval": "", "twin": "", "few": few}
    cell: dict[str, Any] = {**_cell(told), "twin": "", "few": ""}
    if twin := told["untrained"]:
        ends = (twin["difference"], twin["low"], twin["high"])
        cell["twin"], cell["twin_interval"] = signed(*ends), interval(*ends)
        cell["twin_mean"] = estimate(twin["mean"], twin["low"], twin["high"])
    if told["n_flagged"]:
        cell["few"] = f"{told['n']} of {told['n'] + told['n_flagged']} samples"
    elif told["n"] < checkpoint["samples"]:
        cell["few"] = f"{told['n']} of {checkpoint['samples']} samples"
    return cell


def difference_rows(summary: Entry) -> tuple[list[str], list[dict[str, Any]], list[str]]:
    """The table of differences to the reference: a row per measure, a cell per checkpoint shown.

    Args:
        summary: The contents of `summary.json`.

    Returns:
        Labels of the columns, the rows, and the reasons that cells refer to by number from 1.
    """
    told = {(one["label"], one["measure"]): one for one in summary["differences"]}
    with_one = {label for label, _ in told}
    columns = [str(one["label"]) for one in shown(summary) if one["label"] in with_one]
    reasons: list[str] = []
    rows = []
    for measure in summary["measures"]:
        found = [told.get((label, measure["name"])) for label in columns]
        if not any(one and one["mean"] is not None for one in found):
            continue
        cells = [_difference_cell(one, reasons) for one in found]
        rows.append({**measure, "cells": cells})
    against = {one["label"]: one["against"] for one in summary["differences"]}
    other = [against[label] for label in columns]
    heads = [
        label if one == summary["reference"] else f"{label} (against {one})"
        for label, one in zip(columns, other, strict=True)
    ]
    return heads, rows, reasons


def _difference_cell(one: Entry | None, reasons: list[str]) -> dict[str, Any]:
    if one is None or one["mean"] is None:
        cell: dict[str, Any] = {"mean": "–"}
        if one is not None and one["reason"]:
            if one["reason"] not in reasons:
                reasons.append(one["reason"])
            cell["reason"] = reasons.index(one["reason"]) + 1
        return cell
    ends = (one["mean"], one["low"], one["high"])
    p = one["p_adjusted"]
    return {
        "mean": signed(*ends),
        "interval": interval(*ends),
        "effect": "" if one["effect_size"] is None else effect(one["effect_size"]),
        "p": probability(p),
        "significant": p is not None and p < SIGNIFICANT,
        "unpaired": not one["paired"],
    }


def difference_line(summary: Entry, label: str) -> str:
    """How a checkpoint's loss differs from what it is held against, in one line.

    Args:
        summary: The contents of `summary.json`.
        label: Of the checkpoint.

    Returns:
        Such as 'loss against base −0.04 [−0.06, −0.01], p = 0.006'; empty where there is none.
    """
    for one in summary["differences"]:
        if one["label"] == label and one["measure"] == "loss" and one["mean"] is not None:
            ends = (one["mean"], one["low"], one["high"])
            p = probability(one["p_adjusted"])
            p = p if p.startswith("<") else f"= {p}"
            against = f"loss against {one['against']} {signed(*ends)} {interval(*ends)}"
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
    for one in summary["checkpoints"]:
        by_run.setdefault((one["model"], one["loop"]), []).append(one)
    found = []
    for entry in summary["series"]:
        own = [c for c in by_run.get((entry["model"], entry["loop"]), ()) if c["step"] is not None]
        own.sort(key=lambda one: one["step"])
        every = max(1, -(-len(own) // _STRIP))
        found.append(
            {
                "model": entry["model"],
                "loop": "" if entry["loop"] == "core" else entry["loop"],
                "steps": [count(step) for step in entry["steps"]],
                "missing": [count(step) for step in entry["missing"]],
                "onset": _onset(entry["onset"]),
                "verdicts": [
                    {"step": count(c["step"]), "badge": badge(c["verdict"]["verdict"]),
                     "why": "; ".join(c["verdict"]["evidence"])}
                    for c in [*own[:-1:every], *own[-1:]]
                ],
            }
        )  # fmt: skip
    return found


def _onset(told: Entry | None) -> dict[str, Any] | None:
    if told is None:
        return None
    after = None if told["after"] is None else count(told["after"])
    return {"badge": badge(told["verdict"]), "step": count(told["step"]), "after": after}


def facts_of(provenance: Entry) -> list[tuple[str, str]]:
    """The provenance that a reader looks for first: versions, text, options, device, commit.

    Args:
        provenance: What `provenance.json` holds.

    Returns:
        Names and values; one that is the same for all models stands once.
    """
    found: dict[str, dict[str, list[str]]] = {}
    models = provenance.get("models") or {}
    for model, told in models.items():
        for name, value in _flat(told or {}):
            found.setdefault(name, {}).setdefault(value, []).append(str(model))
    rows = []
    for name, values in found.items():
        for value, own in values.items():
            same = len(values) == 1 and len(own) == len(models)
            rows.append((name if same else f"{name} ({', '.join(own)})", value))
    return rows


_FACTS = ("samples", "options", "versions", "commit", "device", "dtype")


def _flat(told: Entry) -> Iterator[tuple[str, str]]:
    for name in _FACTS:
        value = told.get(name)
        if isinstance(value, Mapping):
            for key, inner in value.items():
                yield f"{name}: {key}", _plain(inner)
        elif value is not None:
            yield name, _plain(value)


def _plain(value: Any) -> str:
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(map(str, value))
    return "no" if value is False else "yes" if value is True else str(value)
