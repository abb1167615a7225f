"""Loops that fail while they train, and sound ones: the confusion table of docs/COLLAPSE.md.

    python studies/failing_loops.py train RUNS             # resumes; minutes for each seed
    python studies/failing_loops.py train RUNS --part 1/2  # every second run, for two processes
    python studies/failing_loops.py measure RUNS           # resumes; --again measures anew
    python studies/failing_loops.py table RUNS             # prints Markdown; --verbose: each run

All runs of a seed see the same batches and start from the same weights where they have the same
parameters. `trainings.py` says what is wrong with each; nothing is altered after the training.
Thresholds may be chosen on the seeds 0 and 1; others are given with --seeds.
"""

import argparse
import json
import math
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path

import pandas as pd
import torch
from torch import nn
from trainings import (
    AttentionAlone,
    Bottleneck,
    Contraction,
    DeadCore,
    DecayedCore,
    EveryLoop,
    FewWindows,
    FirstSlotAlone,
    FirstStateAlone,
    HighRate,
    LoopDropout,
    RandomLoops,
    Training,
    UnreadWrites,
    Windows,
)

import loopscope as ls
from loopscope.analysis.collapse import Findings, Verdict
from loopscope.analysis.measuring.streaming import measure
from loopscope.analysis.tables import Tables
from loopscope.models.native.configuration import LoopConfig
from loopscope.models.native.loop_model import LoopModel
from loopscope.text import Samples
from loopscope.text.corpus import stdlib_corpus
from loopscope.training import TrainingData

SEEDS = (0, 1)
VARIANTS = (
    "base", "residual", "anchor", "anchor_emb", "residual+anchor", "static", "dynamic", "mesh",
)  # fmt: skip
WIDTHS = {"d_model": 64, "n_heads": 2, "d_vocab": 2048, "d_mlp": 128, "n_ctx": 64}
STEPS, WARM_UP, BATCH, TOKENS = 400, 20, 16, 64
CHARACTERS = 1500
"""Of each document of the corpus: many documents teach more than long ones."""
SAMPLES = 184
MEASURED = "measured"
"""An empty file that says that a run's tables are whole."""
MEASURES = ("update", "cka", "rank", "routing", "delta", "readout", "loss")
SOUND = ("healthy", "converging")
FAULTY = ("skewed", "stagnant", "collapsed", "unstable")


# -- the runs -------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Run:
    """One training.

    Attributes:
        kind: What is wrong with it, or how it is sound.
        expected: The verdicts that would be right.
        variant: Of the model.
        K: Iterations of the core.
        training: How it is trained.
        seed: Of the weights, the batches and all that is drawn.
    """

    kind: str
    expected: tuple[str, ...]
    variant: str = "base"
    K: int = 3
    training: Training = field(default_factory=Training, compare=False)
    seed: int = 0

    @property
    def name(self) -> str:
        """Of the run among those of its seed."""
        return f"{self.kind}, {self.variant} K={self.K}"

    @property
    def folder(self) -> str:
        """Where it goes below RUNS."""
        return f"seed-{self.seed}/{self.name.replace(', ', '/').replace(' ', '-')}"

    @property
    def faulty(self) -> bool:
        """Whether something is wrong with it."""
        return not set(self.expected) <= set(SOUND)

    @property
    def control(self) -> "Run":
        """The usual training of the same variant, K and seed."""
        return replace(self, kind="control", expected=SOUND, training=Training())


def kinds() -> Iterator[Run]:
    """Every run of one seed, seed 0."""
    sound = partial(Run, expected=SOUND)
    idle = partial(Run, expected=("stagnant", "skewed", "collapsed"))
    low = partial(Run, expected=("collapsed",))
    harmful = partial(Run, expected=("unstable",))
    faulty = partial(Run, expected=FAULTY)
    for K in (3, 6):
        yield from (sound(kind="control", variant=variant, K=K) for variant in VARIANTS)
    yield sound(kind="control", K=8)
    for variant in ("base", "residual", "anchor", "anchor_emb", "mesh"):
        yield idle(kind="dead core", variant=variant, training=DeadCore())
        yield idle(kind="decayed core", variant=variant, training=DecayedCore(0.2))
        yield idle(kind="core of biases", variant=variant, training=DeadCore(biases=True))
    for rank in (1, 2, 4):
        yield low(kind=f"rank {rank}", training=Bottleneck(rank))
    yield low(kind="attention alone", K=8, training=AttentionAlone())
    for K in (3, 6):
        yield idle(kind="contraction", K=K, training=Contraction(100.0))
    yield idle(kind="slot 0 alone", variant="mesh", training=FirstSlotAlone())
    yield idle(kind="unread writes", variant="mesh", training=UnreadWrites())
    for variant in ("base", "residual"):
        yield harmful(kind="loss at h(1)", variant=variant, training=FirstStateAlone())
    for variant in ("base", "mesh"):
        yield faulty(kind="few windows", variant=variant, training=FewWindows(8))
    for rate in (0.1, 0.3, 1e3):
        yield faulty(kind=f"learning rate {rate:g}", training=HighRate(rate))
    for K in (3, 6):
        yield sound(kind="loop dropout", K=K, training=LoopDropout(0.25))
        yield sound(kind="random K", K=K, training=RandomLoops())
        yield sound(kind="loss at every loop", K=K, training=EveryLoop())
    yield sound(kind="random K", variant="residual", training=RandomLoops())
    yield sound(kind="loss at every loop", variant="mesh", training=EveryLoop())


def runs(seeds: tuple[int, ...], part: str = "1/1") -> list[Run]:
    """The runs of some seeds.

    Args:
        seeds: Which.
        part: `i/n`: every n-th run, from the i-th on.

    Returns:
        All of them, those of the first seed first.
    """
    first, count = (int(number) for number in part.split("/"))
    return [replace(run, seed=seed) for seed in seeds for run in kinds()][first - 1 :: count]


# -- training -------------------------------------------------------------------------------------


@cache
def tokenizer() -> object:
    """The zoo's, so that all models read the same tokens."""
    return ls.load("base").tokenizer


@cache
def text() -> TrainingData:
    """A piece of each document of the default corpus' train split, from a third of it on."""
    corpus = stdlib_corpus()
    pieces = tuple(d._replace(text=d.text[len(d.text) // 3 :][:CHARACTERS]) for d in corpus.train)
    return TrainingData.from_corpus(replace(corpus, train=pieces, heldout=()), tokenizer())


def untrained(run: Run) -> LoopModel:
    """The model of a run before its first step.

    Args:
        run: Which.

    Returns:
        The model, with its hooks and frozen parameters.
    """
    config = LoopConfig(variant=run.variant, layout=f"1+1R{run.K}+1", **WIDTHS)
    model = LoopModel(config, seed=run.seed, name=run.name, tokenizer=tokenizer())
    run.training.install(model)
    return model


def batch(run: Run, step: int) -> Windows:
    """The windows of a step, the same for all runs of a seed that see all of the text.

    Args:
        run: The run.
        step: From 0.

    Returns:
        Ids, (batch, pos + 1).
    """
    windows = run.training.windows
    if windows is None:
        return text().batch(step, batch_size=BATCH, seq_len=TOKENS, seed=run.seed)
    few = text().batch(0, batch_size=windows, seq_len=TOKENS, seed=run.seed)
    return few.repeat(-(-BATCH // windows), 1)[:BATCH]


def train(run: Run) -> tuple[LoopModel, dict[str, float | int]]:
    """Train a model; stops where the loss is not finite.

    Args:
        run: What and how.

    Returns:
        The model, and facts: mean loss of the last 50 steps, steps made, seconds.
    """
    model, training = untrained(run).train(), run.training
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": 0.01},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=training.rate, betas=(0.9, 0.95), fused=True)
    drawn = torch.Generator().manual_seed(run.seed)
    losses: list[float] = []
    began = time.perf_counter()
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = training.rate * schedule(step)
        with torch.autocast("cpu", torch.bfloat16):
            loss = training.loss(model, batch(run, step), drawn)
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            break
        optimizer.zero_grad()
        loss.backward()
        if training.clip is not None:
            nn.utils.clip_grad_norm_(parameters, training.clip)
        optimizer.step()
        training.after_step(model)
    last = losses[-50:]
    seconds = round(time.perf_counter() - began, 1)
    return model, {"loss": sum(last) / len(last), "steps": len(losses), "seconds": seconds}


def schedule(step: int) -> float:
    """The learning rate of a step over its peak: warm-up, then a half cosine down to 0.

    Args:
        step: From 0.

    Returns:
        0 … 1.
    """
    return min(1.0, (step + 1) / WARM_UP) * (1 + math.cos(math.pi * step / STEPS)) / 2


def train_all(out: Path, chosen: list[Run]) -> None:
    """Train what is not trained yet; stores the weights and what is known of the training.

    Args:
        out: The folder RUNS.
        chosen: Which runs.
    """
    for run in chosen:
        folder = out / run.folder
        if (folder / "training.json").exists():
            continue
        model, facts = train(run)
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(model.state_dict(), folder / "weights.part")
        os.replace(folder / "weights.part", folder / "weights.pt")
        (folder / "training.json").write_text(json.dumps(facts))
        print(f"{run.folder}  {facts}", flush=True)


# -- measuring ------------------------------------------------------------------------------------


def trained(out: Path, run: Run) -> LoopModel:
    """Rebuild a trained model.

    Args:
        out: The folder RUNS.
        run: Which.

    Returns:
        The model in evaluation mode, its fault in place.
    """
    model = untrained(run)
    model.load_state_dict(torch.load(out / run.folder / "weights.pt", weights_only=True))
    return model.eval()


def measured(model: LoopModel) -> Tables:
    """Measure a model on the shipped held-out samples, and with twice its loops.

    Args:
        model: The model.

    Returns:
        Its tables.
    """
    return measure(model, samples(), MEASURES, more_loops=2 * model.config.K)


@cache
def samples() -> Samples:
    """Windows of the shipped held-out samples, two of each of their 92 files."""
    return ls.load_samples(tokenizer(), samples=SAMPLES, tokens=TOKENS, seed=0)


def measure_all(out: Path, chosen: list[Run], *, again: bool) -> None:
    """Measure what was trained.

    Args:
        out: The folder RUNS.
        chosen: Which runs; those not trained are left out.
        again: Also those that were measured before.
    """
    for run in chosen:
        folder = out / run.folder
        if not (folder / "training.json").exists() or (is_measured(folder) and not again):
            continue
        (folder / MEASURED).unlink(missing_ok=True)
        measured(trained(out, run)).save(folder / "tables")
        (folder / MEASURED).touch()
        print(run.folder, flush=True)


def is_measured(folder: Path) -> bool:
    """Tell whether a run has all of its tables.

    Args:
        folder: Of the run.

    Returns:
        Whether its measuring was finished.
    """
    return (folder / MEASURED).exists()


# -- the table ------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Judged:
    """A run and what is said of it.

    Attributes:
        run: The run.
        verdict: Its verdict.
        signs: Mean of each sign.
        facts: What is known of its training.
        tables: What was measured.
    """

    run: Run
    verdict: Verdict
    signs: dict[str, float]
    facts: dict[str, float | int]
    tables: Tables

    @property
    def outcome(self) -> str:
        """Whether the verdict is right.

        A fault of another name is a fault all the same; a finding beside a good verdict, such as
        "low rank", tells of one, too.
        """
        verdict = self.verdict.verdict
        if verdict in self.run.expected:
            return "right"
        if verdict in FAULTY:
            return "another fault" if self.run.faulty else "false alarm"
        if self.run.faulty and self.verdict.findings:
            return "finding"
        return "undecided" if verdict == "uncertain" else "missed"


def judged(out: Path, run: Run) -> Judged:
    """Judge a run beside its control.

    Args:
        out: The folder RUNS.
        run: Which.

    Returns:
        The run with its verdict.
    """
    beside = [run.control] if run.name != run.control.name else []
    known = [each for each in (*beside, run) if is_measured(out / each.folder)]
    tables = Tables.join(Tables.load(out / each.folder / "tables") for each in known)
    windows = {each.name: samples() for each in known}
    findings = Findings(tables, windows=windows, reference=known[0].name)
    (verdict,) = (v for key, v in findings.verdicts.items() if key.model == run.name)
    rows = findings.signs[findings.signs["model"].eq(run.name)]
    return Judged(
        run=run,
        verdict=verdict,
        signs=rows.set_index("sign")["mean"].to_dict(),
        facts=json.loads((out / run.folder / "training.json").read_text()),
        tables=Tables.load(out / run.folder / "tables"),
    )


def in_words(verdict: Verdict) -> str:
    """A verdict, with what is left where it is uncertain.

    Args:
        verdict: Any.

    Returns:
        A few words.
    """
    between = f" ({' or '.join(verdict.between)})" if verdict.between else ""
    return ", ".join([f"{verdict.verdict}{between}", *(each.name for each in verdict.findings)])


def print_confusion(results: list[Judged]) -> None:
    """Print how often each kind got each verdict.

    Args:
        results: Of all runs.
    """
    columns = [*SOUND, "uncertain", *FAULTY]
    for title, faulty, wrong, last in (
        ("failing", True, ("missed", "undecided"), "named"),
        ("sound", False, ("false alarm",), "not accused"),
    ):
        heads = [title, "expected", "runs", *columns, "with a finding", last]
        print("| " + " | ".join(heads) + " |\n" + "|---" * len(heads) + "|")
        chosen = [result for result in results if result.run.faulty is faulty]
        for kind in dict.fromkeys(result.run.kind for result in chosen):
            of_kind = [result for result in chosen if result.run.kind == kind]
            expected = of_kind[0].run.expected
            names = "any fault" if expected == FAULTY else " or ".join(expected)
            counts = Counter(result.verdict.verdict for result in of_kind)
            cells = [str(counts[column] or "") for column in columns]
            noted = sum(bool(result.verdict.findings) for result in of_kind)
            right = sum(result.outcome not in wrong for result in of_kind)
            cells = [kind, names, len(of_kind), *cells, noted or "", f"{right}/{len(of_kind)}"]
            cells = [str(cell) for cell in cells]
            print("| " + " | ".join(cells) + " |")
        outcomes = Counter(result.outcome for result in chosen)
        words = ", ".join(f"{count} {outcome}" for outcome, count in outcomes.most_common())
        print(f"\nOf {len(chosen)} {title} runs: {words}.\n")


def print_misses(results: list[Judged]) -> None:
    """Print the runs whose verdict is not right.

    Args:
        results: Of all runs.
    """
    print("| run | seed | loss | outcome | verdict | because |")
    print("|---|---|---|---|---|---|")
    for result in results:
        if result.outcome != "right":
            run, verdict = result.run, result.verdict
            because = "; ".join(verdict.evidence[:1])
            cells = [run.name, run.seed, f"{result.signs['loss']:.3f}", result.outcome]
            print(f"| {' | '.join(map(str, cells))} | {in_words(verdict)} | {because} |")


def print_details(result: Judged) -> None:
    """Print what was measured of a run.

    Args:
        result: The run.
    """
    run, tables = result.run, result.tables
    print(f"\n#### {run.name}, seed {run.seed}: {in_words(result.verdict)}, {result.outcome}\n")
    print("training: " + ", ".join(f"{name} {value:.4g}" for name, value in result.facts.items()))
    print("signs: " + ", ".join(f"{name} {value:.4g}" for name, value in result.signs.items()))
    update, rank, readout = tables.update, tables.rank, tables.readout
    if update is not None:
        print("u(t) by block: " + by_place(update, "block"))
    if rank is not None:
        for name, rows in rank.groupby("measure", observed=True):
            print(f"{name} rank: " + by_place(rows, "state"))
    if readout is not None:
        for name, rows in readout.groupby("reading", observed=True):
            print(f"L(t), {name}: " + by_place(rows, "t"))
    for sentence in result.verdict.evidence:
        print(f"* {sentence}")


def by_place(table: pd.DataFrame, place: str) -> str:
    """Means over samples at each place of the loop.

    Args:
        table: With the columns `value` and `place`.
        place: Whose values are told apart.

    Returns:
        The means as text.
    """
    means = table.groupby(place, observed=True, sort=False)["value"].mean()
    return ", ".join(f"{name} {value:.4g}" for name, value in means.items())


def print_tables(out: Path, chosen: list[Run], *, verbose: bool) -> None:
    """Print everything as Markdown.

    Args:
        out: The folder RUNS.
        chosen: Which runs; those not measured are left out.
        verbose: Whether to print each run's measures.
    """
    results = [judged(out, run) for run in chosen if is_measured(out / run.folder)]
    if missing := len(chosen) - len(results):
        print(f"{missing} of {len(chosen)} runs are not measured yet.\n", file=sys.stderr)
    print_confusion(results)
    print_misses(results)
    if verbose:
        for result in results:
            print_details(result)


def main() -> None:
    """Train, measure, or print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("train", "measure", "table"))
    parser.add_argument("runs", type=Path)
    parser.add_argument("--seeds", default=",".join(map(str, SEEDS)))
    parser.add_argument("--part", default="1/1")
    parser.add_argument("--again", action="store_true", help="measure what was measured before")
    parser.add_argument("--verbose", action="store_true", help="print each run's measures, too")
    options = parser.parse_args()
    torch.set_num_threads(1)  # small models; several processes are faster
    chosen = runs(tuple(int(seed) for seed in options.seeds.split(",")), options.part)
    if options.what == "train":
        train_all(options.runs, chosen)
    elif options.what == "measure":
        measure_all(options.runs, chosen, again=options.again)
    else:
        print_tables(options.runs, chosen, verbose=options.verbose)


if __name__ == "__main__":
    main()
