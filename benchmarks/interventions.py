"""Interventions against the bare pass from their place on, side by side in one run.

    python benchmarks/interventions.py [--model mesh] [--threads 1] [--cpu-time]

Prints a markdown table: for each place the time of `intervened` (zero, routers recomputed), of the
rest of the model written by hand from that place on (no hooks, no interventions), and of a whole
forward pass; then the clean pass against a forward pass, and a wrapped port, which runs whole.
"""

import argparse
import time
from collections.abc import Callable

import torch
from forward import race
from torch import Tensor

from loopscope.models.native.block import rotary_tables
from loopscope.models.native.loop_model import LoopModel
from loopscope.models.opening.loading import load
from loopscope.probes import CleanRun, Intervention, clean_run, intervened, place_named

PLACES = (
    "loop0", "loop1", "loop2", "loop0.attn", "loop2.layer1.attn", "loop1.layer0.mlp",
    "loop2.layer1.mlp", "loop1.layer0.head3", "m1@-1", "m2@0", "m2@2", "write m2@1", "read m2@2",
    "h_emb>h0", "h_m0>h1", "h_m0>h3",
)  # fmt: skip


def rest_by_hand(clean: CleanRun, name: str) -> Callable[[], Tensor]:
    """Write the pass from a place on as plain calls of the model's parts.

    Args:
        clean: A clean pass of a native model.
        name: A place.

    Returns:
        The logits of that pass, when called.
    """
    model, kept = clean.model, clean.kept
    assert isinstance(model, LoopModel)
    layout, recurrence = model.config.layout, model.recurrence
    points = model._loop_points()
    rotary = rotary_tables(model.config, clean.trajectory.h_emb.shape[1], clean.trajectory.h_emb)
    place = place_named(model, clean.trajectory, name)
    transition = getattr(model, "transition", None)

    def ending(h: Tensor) -> Tensor:
        for v in range(layout.core_start(layout.K), layout.n_layers):
            h = model.blocks[v](h, rotary)
        return model.unembed(model.ln_final(h))

    def iterations(t: int, h: Tensor, carry: object) -> Tensor:
        for at in range(t, layout.K):
            x = h
            for v in range(layout.core_start(at), layout.core_start(at + 1)):
                x = model.blocks[v](x, rotary)
            h, carry = recurrence.step(at, h, x, carry, points[at])
        return ending(h)

    def after(t: int, x: Tensor) -> Tensor:
        if t < 0:
            h, carry = recurrence.start(kept["hook_embed"], x, transition)
        else:
            h, carry = kept[f"loop.{t}.hook_in"], recurrence.resumed(t, kept)
            h, carry = recurrence.step(t, h, x, carry, points[t])
        return iterations(t + 1, h, carry)

    t = place.t
    if place.kind == "edge":
        if t + 1 == layout.K:
            return lambda: ending(kept["coda.hook_in"])
        return lambda: iterations(
            t + 1, kept[f"loop.{t + 1}.hook_in"], recurrence.resumed(t + 1, kept)
        )
    if place.kind in ("iteration", "slot", "write", "read"):
        x = kept[f"loop.{t}.hook_out"] if t >= 0 else clean.trajectory.blocks["prelude"][1]
        return lambda: after(t, x)
    v = layout.core_start(t) + (place.layer or 0)
    at = f"blocks.{v}"

    def layers() -> Tensor:
        x, attn_out = kept[f"{at}.hook_resid_pre"], kept[f"{at}.hook_attn_out"]
        if place.kind == "head":
            attn_out = model.blocks[v].weights.attn.out(kept[f"{at}.attn.hook_z"].flatten(2))
        x = kept[f"{at}.hook_mlp_out"] + attn_out + x
        for later in range(v + 1, layout.core_start(t + 1)):
            x = model.blocks[later](x, rotary)
        return after(t, x)

    return layers


def rows(clean: CleanRun, rounds: int, clock: Callable[[], float]) -> list[str]:
    """Time each place.

    Args:
        clean: A clean pass of a native model with memory.
        rounds: How often each is timed.
        clock: Tells the seconds.

    Returns:
        Rows of the table.
    """
    lines = []
    for name in PLACES:
        place = place_named(clean.model, clean.trajectory, name)
        edits = [Intervention(place, "zero")]
        rest = rest_by_hand(clean, name)
        off = (rest() - clean.logits).abs().max()
        assert off < 1e-3, (name, off)
        seconds = race(
            {
                "rest": rest,
                "ours": lambda e=edits: intervened(clean, e),
                "whole": lambda: clean.model(clean.tokens),
            },
            rounds=rounds,
            clock=clock,
        )
        lines.append(
            f"| `{name}` | {seconds['whole'] * 1e3:.1f} ms | {seconds['rest'] * 1e3:.1f} ms "
            f"| {seconds['ours'] * 1e3:.1f} ms | **{seconds['ours'] / seconds['rest']:.3f}** "
            f"| {seconds['ours'] / seconds['whole']:.2f} |"
        )
    return lines


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="mesh")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--pos", type=int, default=256)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--cpu-time", action="store_true", help="of this process; a busy machine")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model = load(options.model, device=options.device)
    shape = (options.batch, options.pos)
    tokens = torch.randint(model.config.d_vocab, shape, device=model.input_device)

    def clock() -> float:
        if options.device != "cpu":
            torch.cuda.synchronize()
        return time.process_time() if options.cpu_time else time.perf_counter()

    with torch.no_grad():
        clean = clean_run(model, tokens)
        print(f"{options.model}, {shape[0]}×{shape[1]} tokens, {options.threads} thread(s)\n")
        print("| place | whole forward | from the place on | intervened | ratio | of whole |")
        print("|---|---|---|---|---|---|")
        print("\n".join(rows(clean, options.rounds, clock)))
        seconds = race(
            {"forward": lambda: model(tokens), "clean": lambda: clean_run(model, tokens)},
            rounds=options.rounds,
            clock=clock,
        )
    print(f"\nclean pass / forward: {seconds['clean'] / seconds['forward']:.3f}")


if __name__ == "__main__":
    main()
