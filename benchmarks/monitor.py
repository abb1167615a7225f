"""What a monitor costs a training: `python benchmarks/monitor.py [--threads 2] [--device cuda]`.

For each model a markdown table: one training step, one measurement (its median; the first, which
also imports and traces, by itself; and one with the raw reading alone, without the fit), and the
share of training time that it takes every n steps, projected as measurement / (n · step +
measurement), and measured for n up to --steps: the same from the monitor's own clock in a training
that it watches, and that training's wall clock over one without a monitor, in rounds that take
turns. Models:

* base: the zoo's layout, width and recipe (8 × 256 tokens a step, a probe of 8 × 256);
* Trainer: transformers' GPTNeoXForCausalLM whose two middle layers run three times, trained by
  transformers' Trainer with the callback, the same sizes, a probe of 4 × 256: a foreign model runs
  whole for each h(t) that is read out.

`--parts` prints instead where the time of a measurement goes.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from compare import raw_alone
from torch import nn
from transformers import (
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    PrinterCallback,
    Trainer,
    TrainingArguments,
)

from loopscope.analysis.collapse import per_sample
from loopscope.analysis.measuring.streaming import Measuring
from loopscope.analysis.options import Options
from loopscope.models.native.loop_model import LoopModel
from loopscope.models.wrapped.wrapping import wrap
from loopscope.training import LoopCallback, Monitor, TrainConfig, variant_config
from loopscope.training.monitor import MEASURES
from loopscope.training.trainer import make_optimizer, token_losses

EVERY = (50, 100, 200, 500)
LAYOUT, WIDTH, VOCABULARY, POS = "1+2R3+1", 160, 2048, 256
Train = Callable[[int, Monitor | None], float]


def tokens(count: int, seed: int = 0) -> torch.Tensor:
    """Make random ids: what they are does not change what they cost.

    Args:
        count: Windows.
        seed: Of the random numbers.

    Returns:
        Ids, (count, pos).
    """
    return torch.randint(
        VOCABULARY, (count, POS), generator=torch.Generator().manual_seed(seed)
    )  # fmt: skip


class Native:
    """The zoo's base recipe."""

    probe = 8
    name = f"base {LAYOUT}, D {WIDTH}, vocabulary {VOCABULARY}"

    def __init__(self, batch: int, device: str, dtype: str) -> None:
        config = variant_config(
            "base", LAYOUT, d_model=WIDTH, n_heads=WIDTH // 32, d_vocab=VOCABULARY, n_ctx=POS
        )
        self.config = TrainConfig(model=config, steps=1000, batch_size=batch, seq_len=POS)
        self.model = LoopModel(config, seed=0).to(device)
        self.optimizer = make_optimizer(self.model, self.config)
        self.windows, self.dtype = tokens(batch).to(device), dtype

    def train(self, steps: int, monitor: Monitor | None) -> float:
        """Train.

        Args:
            steps: How many.
            monitor: Watches, where there is one.

        Returns:
            Seconds.
        """
        began = time.perf_counter()
        for step in range(steps):
            self.model.train()
            self.optimizer.zero_grad(set_to_none=True)
            loss = token_losses(self.model, self.windows, self.dtype).mean()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            loss.item()
            if monitor is not None and monitor.due(step + 1):
                monitor.measure(self.model, step + 1)
        return time.perf_counter() - began


class Neo:
    """A looped GPT-NeoX in transformers' Trainer."""

    probe = 4
    name = f"Trainer: GPT-NeoX, layers 1 + 2 × 3 + 1, D {WIDTH}, vocabulary {VOCABULARY}"

    def __init__(self, batch: int, device: str, dtype: str) -> None:
        self.batch, self.device, self.dtype = batch, device, dtype
        self.model = GPTNeoXForCausalLM(
            GPTNeoXConfig(
                vocab_size=VOCABULARY, hidden_size=WIDTH, num_hidden_layers=4,
                num_attention_heads=WIDTH // 32, intermediate_size=4 * WIDTH,
                tie_word_embeddings=False, use_cache=False,
            )
        )  # fmt: skip
        first, *core, last = self.model.gpt_neox.layers
        self.model.gpt_neox.layers = nn.ModuleList([first, *core * 3, last])
        self.model.config.num_hidden_layers = 8

    def train(self, steps: int, monitor: Monitor | None) -> float:
        """Train.

        Args:
            steps: How many.
            monitor: Watches, where there is one.

        Returns:
            Seconds, the Trainer's own preparations left out.
        """
        rows = [{"input_ids": row, "labels": row} for row in tokens(self.batch * steps)]
        with tempfile.TemporaryDirectory() as folder:
            args = TrainingArguments(
                output_dir=folder, max_steps=steps, per_device_train_batch_size=self.batch,
                report_to="none", save_strategy="no", logging_steps=50, disable_tqdm=True,
                use_cpu=self.device == "cpu", bf16=self.dtype == "bfloat16",
                dataloader_pin_memory=False,
            )  # fmt: skip
            trainer = Trainer(self.model, args, train_dataset=rows)
            trainer.remove_callback(PrinterCallback)
            if monitor is not None:
                trainer.add_callback(LoopCallback(trainer, monitor))
            return float(trainer.train().metrics["train_runtime"])


def watched(make: Callable[[], Any], steps: int, n: int, rounds: int) -> tuple[float, float]:
    """Train with a monitor and without, in rounds that take turns.

    Args:
        make: Makes the model.
        steps: Steps of a training.
        n: Steps between measurements.
        rounds: How often.

    Returns:
        Share of time by the monitor's clock, and by the wall beside a training without it.
    """
    shares, ratios = [], []
    for _ in range(rounds):
        plain = make().train(steps, None)
        model = make()
        monitor = Monitor(tokens(model.probe, seed=1), every=n)
        monitor.measure(model.model, -1)  # imports and traces: once in a training
        monitor.seconds = 0.0
        taken = model.train(steps, monitor)
        each = monitor.seconds / sum(row["step"] >= 0 for row in monitor.rows)
        shares.append(each / (n * (taken - monitor.seconds) / steps + each))
        ratios.append(taken / plain - 1)
    return median(shares), median(ratios)


def parts(net: Any) -> None:
    """Print where the time of a measurement goes.

    Args:
        net: A `Native` or `Neo`.
    """
    probe, model = tokens(net.probe, seed=1), net.model
    monitor = Monitor(probe)
    monitor.measure(model, 0)
    if isinstance(net, Neo):
        model = wrap(model.eval(), probe)
    print("| part | ms |\n|---|---|")
    for name in ("update", "cka", "rank", "delta", "loss", "readout"):
        measuring = Measuring(model, probe, Options(measures=(name,)))
        print(f"| forward and {name} | {1e3 * timed(lambda m=measuring: m.part(0, len(m))):.0f} |")
    tables = Measuring(model, probe, Options(measures=MEASURES)).part(0, net.probe)
    print(f"| rows to signs | {1e3 * timed(lambda: per_sample(tables)):.0f} |")
    print(f"| a whole measurement | {1e3 * timed(lambda: monitor.measure(net.model, 0)):.0f} |\n")


def timed(call: Callable[[], Any], rounds: int = 7) -> float:
    """Time a call.

    Args:
        call: What is called.
        rounds: How often, the first call aside.

    Returns:
        Median seconds.
    """
    times = []
    for _ in range(rounds + 1):
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    return median(times[1:])


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--parts", action="store_true")
    options = parser.parse_args()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    torch.set_num_threads(options.threads)
    settings = (options.batch, options.device, options.dtype)
    print(
        f"torch {torch.__version__}, {options.device}, {options.threads} thread(s), "
        f"{options.dtype}, {options.batch} × {POS} tokens a step\n"
    )
    for kind in (Native, Neo):
        print(f"**{kind.name}, probe {kind.probe} × {POS}**\n")
        if options.parts:
            parts(kind(*settings))
            continue
        model = kind(*settings)
        monitor = Monitor(tokens(model.probe, seed=1))
        began = time.perf_counter()
        monitor.measure(model.model, 0)
        first = time.perf_counter() - began
        model.train(3, None)
        step = median(model.train(10, None) / 10 for _ in range(options.rounds))
        measure = timed(lambda m=monitor, x=model: m.measure(x.model, 0))
        with raw_alone():
            raw = timed(lambda m=monitor, x=model: m.measure(x.model, 0))
        print("| | |\n|---|---|")
        print(f"| a training step | {1e3 * step:.0f} ms |")
        print(f"| a measurement | {1e3 * measure:.0f} ms = {measure / step:.2f} steps |")
        print(f"| with the raw reading alone | {1e3 * raw:.0f} ms, ratio {measure / raw:.2f} |")
        print(f"| the first one | {first:.1f} s |")
        for n in EVERY:
            text = f"{100 * measure / (n * step + measure):.2f} % projected"
            if n <= options.steps:
                share, wall = watched(lambda k=kind: k(*settings), options.steps, n, options.rounds)
                text += f", **{100 * share:.2f} %** by its clock, {100 * wall:+.1f} % of wall clock"
            print(f"| every {n} steps | {text} |", flush=True)
        print()


if __name__ == "__main__":
    main()
