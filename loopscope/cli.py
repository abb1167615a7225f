"""The command line: parsing and printing; the work is done elsewhere and imported when needed."""

import io
import json
import os
import sys
import warnings
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from loopscope.options import (
    BatchSize,
    Center,
    Data,
    Device,
    DeviceMap,
    DropFirst,
    Dtype,
    Json,
    LayoutOption,
    Loops,
    Models,
    NormalizeRows,
    Out,
    Samples,
    Seed,
    SpecFile,
    Tokens,
    Trust,
    parse_loops,
)

if TYPE_CHECKING:
    from loopscope.analysis.compare import Comparison
    from loopscope.analysis.tables import Tables

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="See what happens inside recursive (looped, depth-recurrent) transformers.",
)

PAPER_PANELS = ["base", "residual", "anchor", "mesh"]


@app.command()
def figures(
    models: Models = None,
    out: Out = Path("out"),
    from_tables: Annotated[
        Path | None,
        typer.Option("--from-tables", help="Redraw from the tables in this folder; no model runs."),
    ] = None,
    paper_extra: Annotated[
        bool, typer.Option("--paper-extra", help="Draw Figs. 6 and 8 alone, from training logs.")
    ] = False,
    layout: LayoutOption = None,
    loops: Loops = None,
    spec: SpecFile = None,
    trust_remote_code: Trust = False,
    device_map: DeviceMap = None,
    data: Data = None,
    samples: Samples = 500,
    tokens: Tokens = 256,
    device: Device = None,
    dtype: Dtype = None,
    batch_size: BatchSize = 16,
    seed: Seed = 0,
    center: Center = False,
    drop_first: DropFirst = 0,
    normalize_rows: NormalizeRows = False,
) -> None:
    """Draw the MeSH paper's diagnostic figures (1, 3, 4, 5) and router maps.

    Without models: the paper's four panels (base, residual, anchor, mesh) from the shipped zoo;
    with --paper-extra its training logs. MODEL may then be a folder that is searched for runs.
    """
    from loopscope.output import prepare

    if from_tables is not None or paper_extra:
        from loopscope.analysis.runs import read_runs
        from loopscope.analysis.tables import Tables

        unused = {
            "--layout": layout, "--data": data, "--loops": loops, "--spec": spec,
            "--paper-extra": from_tables and paper_extra,
        }  # fmt: skip
        if given := [name for name, value in unused.items() if value]:
            _fail(f"tables or training logs are read, no model runs; leave out {', '.join(given)}.")
        if from_tables is None:
            tables, models = read_runs(models or ()), None
            print("".join(f"note: {note}\n" for note in tables.provenance["notes"]), end="")
        else:
            inner = from_tables / "tables"
            tables = Tables.load(inner if inner.is_dir() else from_tables)
        prepare(out)
        _save(tables, out)
        _draw(tables, out, models or None)
        return
    prepare(out)
    collected = _collect(
        models or PAPER_PANELS,
        measures=("update", "cka", "spectrum", "rank", "routing"),
        layout=layout, loops=loops, spec=spec, trust_remote_code=trust_remote_code,
        device_map=device_map, data=data, samples=samples, tokens=tokens, device=device,
        dtype=dtype, batch_size=batch_size, seed=seed, center=center, drop_first=drop_first,
        normalize_rows=normalize_rows,
    )  # fmt: skip
    _save(collected.tables, out)
    _draw(collected.tables, out, None)


@app.command()
def compare(
    models: Models = None,
    out: Out = Path("out"),
    layout: LayoutOption = None,
    loops: Loops = None,
    spec: SpecFile = None,
    trust_remote_code: Trust = False,
    device_map: DeviceMap = None,
    data: Data = None,
    samples: Samples = 500,
    tokens: Tokens = 256,
    device: Device = None,
    dtype: Dtype = None,
    batch_size: BatchSize = 16,
    seed: Seed = 0,
    center: Center = False,
    drop_first: DropFirst = 0,
    normalize_rows: NormalizeRows = False,
) -> None:
    """Put checkpoints side by side: figures, and one table of loss and signs of collapse."""
    from loopscope.analysis.collapse import signs
    from loopscope.output import prepare, write_csv
    from loopscope.printing import print_signs

    if not models:
        _fail("compare needs checkpoints: loopscope compare A B …; zoo names work too (base mesh).")
        return
    prepare(out)
    collected = _collect(
        models,
        measures=("update", "cka", "spectrum", "rank", "routing", "loss"),
        layout=layout, loops=loops, spec=spec, trust_remote_code=trust_remote_code,
        device_map=device_map, data=data, samples=samples, tokens=tokens, device=device,
        dtype=dtype, batch_size=batch_size, seed=seed, center=center, drop_first=drop_first,
        normalize_rows=normalize_rows,
    )  # fmt: skip
    _save(collected.tables, out)
    table = signs(collected.tables)
    write_csv(table, out / "tables" / "signs.csv")
    print_signs(table)
    _draw(collected.tables, out, None)


@app.command()
def inspect(
    model: Annotated[str, typer.Argument(help="As MODEL of figures.")],
    hooks: Annotated[bool, typer.Option("--hooks", help="List every hook name.")] = False,
    write_spec: Annotated[
        Path | None,
        typer.Option("--write-spec", help="Write how a foreign model loops to a TOML file."),
    ] = None,
    layout: LayoutOption = None,
    loops: Loops = None,
    spec: SpecFile = None,
    trust_remote_code: Trust = False,
    device: Device = None,
    device_map: DeviceMap = None,
    dtype: Dtype = None,
    as_json: Json = False,
) -> None:
    """Show layout, parameters, states and hook names of a model, and how a foreign one loops."""
    from loopscope import printing
    from loopscope.models.describe import describe, hook_names
    from loopscope.models.load import load

    if write_spec is not None and write_spec.exists():
        _fail(f"{write_spec} is there already; remove it, or give --write-spec another name.")
    with redirect_stdout(sys.stderr):  # what a model prints is no part of --json
        loaded = load(
            model, layout=layout, loops=parse_loops(loops), spec=spec, device=device, dtype=dtype,
            trust_remote_code=trust_remote_code, device_map=device_map,
        )  # fmt: skip
    found: Any = getattr(loaded, "map", None)
    if write_spec is not None:
        from loopscope.output import write_text
        from loopscope.probes.loops.spec import to_toml

        if found is None:
            _fail(f"{model} is a native model, whose loop is known; --write-spec is for others.")
        write_text(to_toml(found), write_spec)
    facts = describe(loaded)
    if as_json:
        names = list(loaded.hook_dict) if hooks else dict(hook_names(loaded))
        told = {} if found is None else {"map": found.to_dict()}
        print(json.dumps({**facts, **told, "hooks": names}, indent=2))
        return
    printing.print_facts(facts)
    (printing.print_hooks if found is None else printing.print_map)(loaded, every=hooks)
    if write_spec is not None:
        print(f"\nwritten: {write_spec}; change what is wrong, then give it with --spec")


@app.command()
def params(
    model: Annotated[str | None, typer.Argument(help="A model; otherwise give a layout.")] = None,
    layout: Annotated[str | None, typer.Option("--layout", help="e.g. 4+8R2+4.")] = None,
    variant: Annotated[str | None, typer.Option("--variant", help="e.g. mesh.")] = None,
    d_model: Annotated[
        int | None, typer.Option("--d-model", help="Width D (2048 when not given).")
    ] = None,
    vocab: Annotated[
        int | None, typer.Option("--vocab", help="Vocabulary (52352 when not given).")
    ] = None,
    slots: Annotated[int | None, typer.Option("--slots", help="Memory slots B.")] = None,
    spec: SpecFile = None,
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:
    """Count parameters: the paper's table, a model, or any layout and variant."""
    from loopscope.models.params import layout_counts, model_counts, paper_counts
    from loopscope.printing import print_counts

    shape: Any = {"variant": variant, "d_model": d_model, "d_vocab": vocab, "slots": slots}
    shaped = any(value is not None for value in shape.values())
    if model is not None:
        if layout is not None or shaped:
            _fail("give a model, or --layout with its options, not both.")
        rows = model_counts(model, spec=spec, trust_remote_code=trust_remote_code)
    elif layout is not None:
        rows = layout_counts(layout, **shape)
    elif shaped:
        _fail("--variant, --d-model, --vocab and --slots need a --layout, such as 4+8R2+4.")
        return
    else:
        rows = paper_counts()
    if as_json:
        print(json.dumps(rows, indent=2))
    else:
        print_counts(rows)


@app.command()
def train(
    out: Annotated[Path, typer.Option("--out", help="Folder; one checkpoint per variant in it.")],
    variants: Annotated[str, typer.Option("--variants", help="Comma-separated.")] = "base,mesh",
    layout: Annotated[str, typer.Option("--layout", help="Layout of the looped ones.")] = "1+2R3+1",
    data: Annotated[
        str | None,
        typer.Option("--data", help=".txt, .jsonl or .parquet; default: the standard library."),
    ] = None,
    tokens: Annotated[int, typer.Option("--tokens", help="Training tokens.")] = 2_000_000,
    d_model: Annotated[int, typer.Option("--d-model", help="Width D.")] = 160,
    heads: Annotated[int | None, typer.Option("--heads", help="Default: D/32.")] = None,
    vocab: Annotated[int, typer.Option("--vocab", help="Vocabulary of the tokenizer.")] = 2048,
    slots: Annotated[
        int | None, typer.Option("--slots", help="Memory slots B of mesh (default: K + 3).")
    ] = None,
    seq_len: Annotated[int, typer.Option("--seq-len", help="Tokens per window.")] = 256,
    batch_size: Annotated[
        int, typer.Option("--batch-size", help="Windows per step, over all processes.")
    ] = 8,
    accumulate: Annotated[
        int, typer.Option("--accumulate", help="Parts each batch is cut into, to save memory.")
    ] = 1,
    lr: Annotated[float, typer.Option("--lr", help="Peak learning rate.")] = 3e-3,
    warmup: Annotated[
        float, typer.Option("--warmup", help="Share of the steps that warm up.")
    ] = 0.01,
    weight_decay: Annotated[
        float, typer.Option("--weight-decay", help="Of AdamW, on matrices.")
    ] = 0.01,
    grad_clip: Annotated[
        float, typer.Option("--grad-clip", help="Largest norm of the gradient.")
    ] = 1.0,
    seed: Annotated[int, typer.Option("--seed", help="Weights and order of batches.")] = 0,
    eval_every: Annotated[
        int, typer.Option("--eval-every", help="Steps between validation losses.")
    ] = 100,
    keep_every: Annotated[
        int | None,
        typer.Option("--keep-every", help="Keep a checkpoint step-000500 … every so many steps."),
    ] = None,
    save_seconds: Annotated[
        float, typer.Option("--save-seconds", help="Seconds between states to resume from.")
    ] = 60.0,
    device: Device = None,
    dtype: Annotated[str, typer.Option("--dtype", help="float32, bfloat16.")] = "float32",
    compile: Annotated[bool, typer.Option("--compile", help="Use torch.compile.")] = False,
    half: Annotated[bool, typer.Option("--half", help="Store weights in float16.")] = False,
) -> None:
    """Train variants with the paper's recipe, on identical batches.

    Stopped at any moment, the same command goes on and ends as it would have. `vanilla` among the
    variants gets the same compute without a loop. Several GPUs or processes: accelerate launch
    --multi_gpu --num_processes N -m loopscope.cli train ...
    """
    from loopscope.printing import progress_bar, training_bars
    from loopscope.training import run_training
    from loopscope.training.processes import is_main

    with progress_bar(shown=is_main()) as bar:
        written = run_training(
            out, variants=variants, layout=layout, data=data, tokens=tokens,
            d_model=d_model, n_heads=heads, vocab=vocab, slots=slots, seq_len=seq_len,
            batch_size=batch_size, accumulate=accumulate, lr=lr, seed=seed, eval_every=eval_every,
            device=device, dtype=dtype, compile=compile, half=half, keep_every=keep_every,
            save_seconds=save_seconds, warmup=warmup, weight_decay=weight_decay,
            grad_clip=grad_clip, progress=training_bars(bar),
            tell=partial(bar.console.print, markup=False),
        )  # fmt: skip
    if is_main():
        for folder, loss in written:
            print(f"{folder}  validation loss {loss:.4f} nats/token")


def _collect(models: list[str], **options: Any) -> "Comparison":
    from loopscope.printing import compare_shown

    return compare_shown(models, **{**options, "loops": parse_loops(options["loops"])})


def _save(tables: "Tables", out: Path) -> None:
    from loopscope.output import write_provenance

    tables.save(out / "tables")
    write_provenance(tables.provenance, out)


def _draw(tables: "Tables", out: Path, models: list[str] | None) -> None:
    from loopscope.figures import draw_all, plan
    from loopscope.printing import print_drawn, progress_bar

    jobs, _ = plan(tables, models)
    with progress_bar() as bar:
        task = bar.add_task("draw", total=len(jobs))
        report = draw_all(tables, out, models, progress=lambda n: bar.advance(task, n))
    print_drawn(report, out / "figures")


def _fail(message: str) -> None:
    from loopscope.errors import InputError

    raise InputError(message)


def main() -> None:
    """Entry point: errors of the user become one line on stderr and exit code 2."""
    from loopscope.errors import InputError

    # idle OpenMP threads that spin slow everything down where cores are shared
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # terminals without Unicode
    warnings.showwarning = lambda message, *_: print(f"warning: {message}", file=sys.stderr)
    try:
        # without standalone mode click's own errors arrive here too
        sys.exit(app(standalone_mode=False) or 0)
    except InputError as error:
        message = str(error)
    except typer.Abort:
        message = "aborted"
    except OSError as error:
        message = f"{error.strerror or error}" + (f" ({error.filename})" if error.filename else "")
    except KeyboardInterrupt:
        resumes = "; the same command goes on" if sys.argv[1:2] == ["train"] else ""
        print(f"interrupted{resumes}", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        # click's usage errors; typer brings its own click or uses the installed one
        if not hasattr(error, "format_message"):
            raise
        message = error.format_message()
        if type(error).__name__ == "NoArgsIsHelpError":
            print(message)
            sys.exit(2)
        message += " `loopscope COMMAND --help` lists what there is."
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    main()
