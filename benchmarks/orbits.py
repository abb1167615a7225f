"""Contraction: what a step of the power iteration costs over a forward pass of one iteration.

    OMP_NUM_THREADS=1 python benchmarks/orbits.py

Of a zoo model, alternating in one process, medians: one iteration of the core without gradients
(the layers alone, as they run in a forward pass), a step of the power iteration (Jv and Jᵀu), and
the forward pass with the graph that all steps share.
"""

import argparse
import platform
from collections.abc import Callable, Sequence
from statistics import median
from time import perf_counter, process_time

import torch

import loopscope as ls
from loopscope.probes import jacobian_products, separate_iterations, start_vector

TARGET = 3.0


def clock(function: Callable[[], object]) -> float:
    """CPU seconds of a call where one thread computes, wall seconds of several."""
    now = process_time if torch.get_num_threads() == 1 else perf_counter
    start = now()
    function()
    return now() - start


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a line per model."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("models", nargs="*", default=["base", "residual", "mesh"])
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=9)
    asked = parser.parse_args(arguments)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {platform.machine()}")
    for name in asked.models:
        model = ls.load(name)
        samples = ls.load_samples(model, samples=asked.samples, tokens=asked.tokens).tokens
        t = 1
        path = [str(i) for i in range(model.K)]
        begin, end = (model.config.layout.core_start(i) for i in (t, t + 1))

        def graph(model=model, samples=samples, path=path):
            return separate_iterations(model, samples, path)

        iteration = graph()[t]
        forward, backward = jacobian_products(iteration)
        v = start_vector(iteration.h, range(len(samples)))

        def until(layer, model=model, samples=samples):
            with torch.no_grad():
                return model(samples, stop_at_layer=layer)

        def step(v=v, forward=forward, backward=backward):
            return backward(forward(v))

        times: dict[str, list[float]] = {"to": [], "past": [], "step": [], "graph": []}
        for _ in range(asked.rounds):
            times["to"].append(clock(lambda begin=begin: until(begin)))
            times["past"].append(clock(lambda end=end: until(end)))
            times["step"].append(clock(step))
            times["graph"].append(clock(graph))
        once = median(b - a for a, b in zip(times["to"], times["past"], strict=True))
        of_step, of_graph = median(times["step"]), median(times["graph"])
        word = "within" if of_step <= TARGET * once else "above"
        print(
            f"{name:10} iteration {1000 * once:6.1f} ms | step {1000 * of_step:6.1f} ms = "
            f"{of_step / once:.2f} × ({word} {TARGET:.0f} ×) | graph of all "
            f"{model.K} iterations {1000 * of_graph:6.1f} ms",
            flush=True,
        )


if __name__ == "__main__":
    main()
