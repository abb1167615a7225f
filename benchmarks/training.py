"""Training steps, as ratios measured side by side in one run.

    python benchmarks/training.py [--device cuda] [--threads 2]

Prints a markdown table: tokens per second of forward, backward, clipping and AdamW against the same
model of Hugging Face (GPTNeoXForCausalLM, sdpa; same data, loss, optimiser), MeSH's time and peak
memory over base, and on a GPU the model FLOPs utilisation.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from loopscope.models.native.loop_model import LoopModel
from loopscope.models.native.parameter_counts import count_parameters
from loopscope.training import TrainConfig, variant_config
from loopscope.training.trainer import make_optimizer, token_losses

H200_BF16 = 989e12  # dense, the data sheet's
Step = Callable[[], None]


class Logits(nn.Module):
    """Hugging Face's model as tokens to logits."""

    def __init__(self, hf: nn.Module) -> None:
        super().__init__()
        self.hf = hf

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Run the model.

        Args:
            tokens: Ids, (batch, pos).

        Returns:
            Logits, (batch, pos, vocab).
        """
        return self.hf(tokens, use_cache=False).logits


def recipe(variant: str, layout: str, width: int, vocab: int, batch: int, pos: int) -> TrainConfig:
    """The recipe of one row of the table.

    Args:
        variant: A variant name.
        layout: Its layout; `vanilla` unrolls it.
        width: D.
        vocab: Size of the vocabulary.
        batch: Windows per step.
        pos: Tokens per window.

    Returns:
        The recipe; more steps than are timed.
    """
    model = variant_config(
        variant, layout, d_model=width, n_heads=max(1, width // 64 if width > 256 else width // 32),
        d_vocab=vocab, n_ctx=pos,
    )  # fmt: skip
    return TrainConfig(model=model, steps=1000, batch_size=batch, seq_len=pos)


def our_step(config: TrainConfig, device: str, dtype: str, compile: bool = False) -> Step:
    """A training step of this package's model.

    Args:
        config: The recipe.
        device: Where to run.
        dtype: `float32`, or `bfloat16` autocast.
        compile: Use `torch.compile`.

    Returns:
        The step.
    """
    model = LoopModel(config.model, seed=0).to(device).train()
    return step_of(model, make_optimizer(model, config), config, device, dtype, compile)


def their_step(config: TrainConfig, device: str, dtype: str) -> Step:
    """A training step of the same model of Hugging Face.

    Args:
        config: The recipe, of `vanilla`.
        device: Where to run.
        dtype: `float32`, or `bfloat16` autocast.

    Returns:
        The step.
    """
    c = config.model
    rope = {"rope_type": "default", "rope_theta": c.rotary_base}
    hf = GPTNeoXForCausalLM(
        GPTNeoXConfig(
            vocab_size=c.d_vocab, hidden_size=c.d_model, num_hidden_layers=c.layout.n_layers,
            num_attention_heads=c.n_heads, intermediate_size=c.d_mlp,
            rope_parameters={**rope, "partial_rotary_factor": c.rotary_pct},
            tie_word_embeddings=False, attn_implementation="sdpa",
        )
    )  # fmt: skip
    model = Logits(hf).to(device).train()
    return step_of(model, make_optimizer(model, config), config, device, dtype, False)


def step_of(
    model: nn.Module, optimizer: torch.optim.Optimizer, config: TrainConfig, device: str,
    dtype: str, compile: bool,
) -> Step:  # fmt: skip
    """Forward, backward, clipping and the optimiser's step, on one random batch.

    Args:
        model: Tokens to logits, on the device.
        optimizer: Of its parameters.
        config: Shape of the batch, and the largest norm of the gradient.
        device: Where to run.
        dtype: `float32`, or `bfloat16` autocast.
        compile: Use `torch.compile`.

    Returns:
        The step; it waits for the device.
    """
    shape = (config.batch_size, config.seq_len + 1)
    windows = torch.randint(config.model.d_vocab, shape, generator=torch.Generator().manual_seed(0))
    windows = windows.to(device)
    losses = torch.compile(token_losses) if compile else token_losses

    def step() -> None:
        loss = losses(model, windows, dtype).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
        optimizer.step()
        loss.item()

    return step


def race(steps: dict[str, Step], rounds: int) -> dict[str, float]:
    """Median seconds of each step, the steps taking turns.

    Args:
        steps: Name → step.
        rounds: How often each is timed.

    Returns:
        Name → seconds.
    """
    times: dict[str, list[float]] = {name: [] for name in steps}
    for step in steps.values():
        for _ in range(3):
            step()
    for _ in range(rounds):
        for name, step in steps.items():
            began = time.perf_counter()
            step()  # ends with .item(), which waits for the device
            times[name].append(time.perf_counter() - began)
    return {name: sorted(t)[len(t) // 2] for name, t in times.items()}


def flops(config: TrainConfig) -> float:
    """Of one training step: 6 per parameter, layer and token used, and attention's products.

    Args:
        config: The recipe.

    Returns:
        Floating-point operations.
    """
    c = config.model
    unrolled = count_parameters(variant_config("vanilla", c.layout, d_model=c.d_model,
        n_heads=c.n_heads, d_vocab=c.d_vocab))  # fmt: skip
    per_token = 6 * (unrolled.total - c.d_vocab * c.d_model)  # the embedding is a look-up
    per_token += 12 * c.layout.n_layers * c.d_model * config.seq_len / 2  # causal half
    return per_token * config.batch_size * config.seq_len


def peak(words: list[object], device: str, dtype: str) -> float:
    """Bytes that a few training steps add to a fresh process (on a GPU: allocated at the most).

    Args:
        words: What `recipe` takes.
        device: Where to run.
        dtype: `float32`, or `bfloat16` autocast.

    Returns:
        Bytes.
    """
    call = [sys.executable, __file__, "--peak", json.dumps(words), "--device", device]
    done = subprocess.run([*call, "--dtype", dtype], capture_output=True, text=True, check=True)
    return float(done.stdout)


def print_peak(config: TrainConfig, device: str, dtype: str) -> None:
    """Print what `peak` reads, in the process of its own.

    Args:
        config: The recipe.
        device: Where to run.
        dtype: `float32`, or `bfloat16` autocast.
    """
    before = resident()
    step = our_step(config, device, dtype)
    for _ in range(3):
        step()
    if device.startswith("cuda"):
        print(torch.cuda.max_memory_allocated())
    else:
        print(resident("VmHWM") - before)


def resident(field: str = "VmRSS") -> float:
    """Bytes of this process in memory now, or (VmHWM) at the most (Linux).

    Args:
        field: Of `/proc/self/status`.

    Returns:
        Bytes.
    """
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(float(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.peak:
        print_peak(recipe(*json.loads(options.peak)), options.device, options.dtype)
        return
    gpu = options.device.startswith("cuda")
    shapes = [("1+2R3+1", 160, 2048, 8, 256), ("1+1R3+1", 512, 8192, 4, 256)]
    if gpu:
        shapes = [("3+6R3+3", 1024, 50304, 16, 1024)]
    print(f"torch {torch.__version__}, {options.device}, {options.threads} thread(s), "
          f"median of {options.rounds} interleaved steps\n")  # fmt: skip
    print("| what | shape | reference | ours | ratio |\n|---|---|---|---|---|")
    for shape in shapes:
        for dtype in ("float32", "bfloat16"):
            print_rows(shape, options.device, dtype, options.rounds, gpu)


def print_rows(
    shape: tuple[str, int, int, int, int], device: str, dtype: str, rounds: int, gpu: bool
) -> None:
    """Measure one shape and print its rows.

    Args:
        shape: Layout, D, vocabulary, windows per step, tokens per window.
        device: Where to run.
        dtype: `float32`, or `bfloat16` autocast.
        rounds: How often each step is timed.
        gpu: Whether the device is one.
    """
    layout, width, vocab, batch, pos = shape
    label = f"{layout}, D {width}, vocabulary {vocab}, {batch}×{pos} tokens, {dtype}"
    vanilla = recipe("vanilla", *shape)
    seconds = race(
        {"hf": their_step(vanilla, device, dtype), "ours": our_step(vanilla, device, dtype)}, rounds
    )
    rate = {name: batch * pos / seconds[name] for name in seconds}
    print(
        f"| vanilla: tokens/s over Hugging Face's (≥ 1.0) | {label} | {rate['hf']:,.0f} "
        f"| {rate['ours']:,.0f} | **{rate['ours'] / rate['hf']:.3f}** |", flush=True,
    )  # fmt: skip
    base, mesh = recipe("base", *shape), recipe("mesh", *shape)
    seconds = race(
        {"base": our_step(base, device, dtype), "mesh": our_step(mesh, device, dtype)}, rounds
    )
    print(
        f"| mesh / base: time of a step | {label} | {seconds['base'] * 1e3:.1f} ms "
        f"| {seconds['mesh'] * 1e3:.1f} ms | **{seconds['mesh'] / seconds['base']:.3f}** |",
        flush=True,
    )  # fmt: skip
    memory = {name: peak([name, *shape], device, dtype) / 2**20 for name in ("base", "mesh")}
    print(
        f"| mesh / base: peak memory | {label} | {memory['base']:.0f} MiB "
        f"| {memory['mesh']:.0f} MiB | **{memory['mesh'] / memory['base']:.3f}** |", flush=True,
    )  # fmt: skip
    if gpu and dtype == "bfloat16":
        compiled = race({"c": our_step(base, device, dtype, compile=True)}, rounds)["c"]
        for name, taken in (("base", seconds["base"]), ("base, compiled", compiled)):
            share = flops(base) / taken / H200_BF16
            print(f"| {name}: model FLOPs utilisation | {label} | 989 TFLOP/s | "
                  f"{flops(base) / taken / 1e12:.0f} TFLOP/s | **{share:.3f}** |")  # fmt: skip


if __name__ == "__main__":
    main()
