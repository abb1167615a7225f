"""Forward and capture, as ratios measured side by side in one run.

    python benchmarks/forward.py [--threads 1]

Prints a markdown table: our bare forward against Hugging Face's GPTNeoXForCausalLM (sdpa) at equal
weights and shape, capture of all loop states against our bare forward, MeSH's forward against base.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from loopscope.models.native.configuration import Layout, LoopConfig
from loopscope.models.native.loop_model import LoopModel
from loopscope.models.opening.loading import load
from loopscope.probes.state_capture import capture

Call = Callable[[], object]


def race(
    calls: dict[str, Call], *, rounds: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, float]:
    """Time calls that take turns, so that drift hits all alike.

    Args:
        calls: By name.
        rounds: How often each is timed.
        clock: Tells the seconds.

    Returns:
        Median seconds of each.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call(), call()
    for _ in range(rounds):
        for name, call in calls.items():
            began = clock()
            call()
            times[name].append(clock() - began)
    return {name: sorted(t)[len(t) // 2] for name, t in times.items()}


def against_hugging_face(rounds: int, width: int, layers: int, batch: int, pos: int) -> list[str]:
    """Compare the bare forward with Hugging Face's at equal weights.

    Args:
        rounds: How often each is timed.
        width: D.
        layers: Depth.
        batch: Samples per forward pass.
        pos: Tokens per sample.

    Returns:
        Two rows of the table.
    """
    rope = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25}
    hf = GPTNeoXForCausalLM(
        GPTNeoXConfig(
            vocab_size=2048, hidden_size=width, num_hidden_layers=layers,
            num_attention_heads=width // 32, intermediate_size=4 * width, rope_parameters=rope,
            tie_word_embeddings=False, attn_implementation="sdpa",
        )
    ).eval()  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        hf.save_pretrained(Path(folder) / "m")
        ours = load(Path(folder) / "m")
    tokens = torch.randint(2048, (batch, pos))
    with torch.no_grad():
        error = (ours(tokens) - hf(tokens).logits).abs().max() / hf(tokens).logits.abs().max()
        seconds = race(
            {
                "hf": lambda: hf(tokens, use_cache=False).logits,
                "ours": lambda: ours(tokens),
            },
            rounds=rounds,
        )
    shape = f"{batch}×{pos} tokens, D {width}, {layers} layers"
    return [
        f"| forward / Hugging Face sdpa | {shape} | {seconds['hf'] * 1e3:.1f} ms "
        f"| {seconds['ours'] * 1e3:.1f} ms | **{seconds['ours'] / seconds['hf']:.3f}** | ≤ 1.05 |",
        f"| largest logit difference, relative | {shape} | | {error:.1e} | | ≤ 1e-5 |",
    ]


def capturing(rounds: int, width: int, layout: str, batch: int, pos: int) -> list[str]:
    """Compare capture with the bare forward, and MeSH's forward with base's.

    Args:
        rounds: How often each is timed.
        width: D.
        layout: Of both models.
        batch: Samples per forward pass.
        pos: Tokens per sample.

    Returns:
        Three rows of the table.
    """
    config = LoopConfig(
        variant="mesh", layout=Layout.parse(layout), d_model=width, n_heads=width // 32,
        d_vocab=2048,
    )  # fmt: skip
    mesh = LoopModel(config, seed=0).eval()
    base = LoopModel(config.replace(variant="base", slots=None), seed=0).eval()
    tokens = torch.randint(2048, (batch, pos))
    h_out = mesh.cfg.n_layers
    rows = []
    shape = f"{batch}×{pos} tokens, D {width}, {layout}"
    for model in (base, mesh):
        names = model.state_hooks(memory=False)
        with torch.no_grad():
            seconds = race(
                {
                    "bare": lambda m=model: m(tokens),
                    "capture": lambda m=model: capture(m, tokens, memory=False, logits=True),
                    "cache": lambda m=model, n=names: m.run_with_cache(tokens, names_filter=n),
                },
                rounds=rounds,
            )
        rows.append(
            f"| {model.name}: capture of all loop states / bare forward | {shape} "
            f"| {seconds['bare'] * 1e3:.1f} ms | {seconds['capture'] * 1e3:.1f} ms "
            f"| **{seconds['capture'] / seconds['bare']:.3f}** | ≤ 1.05 |"
        )
    with torch.no_grad():
        seconds = race(
            {
                "base": lambda: base(tokens, stop_at_layer=h_out),
                "mesh": lambda: mesh(tokens, stop_at_layer=h_out),
            },
            rounds=rounds,
        )
    rows.append(
        f"| mesh / base, without unembedding | {shape} | {seconds['base'] * 1e3:.1f} ms "
        f"| {seconds['mesh'] * 1e3:.1f} ms | **{seconds['mesh'] / seconds['base']:.3f}** | |"
    )
    return rows


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=31)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    print(f"torch {torch.__version__}, {options.threads} thread(s), float32, median of "
          f"{options.rounds} interleaved rounds\n")  # fmt: skip
    print("| what | shape | reference | ours | ratio | target |\n|---|---|---|---|---|---|")
    for row in against_hugging_face(options.rounds, 256, 6, 4, 256):
        print(row)
    for row in against_hugging_face(options.rounds, 160, 8, 8, 256):
        print(row)
    for row in capturing(options.rounds, 256, "1+2R3+1", 4, 256):
        print(row)


if __name__ == "__main__":
    main()
