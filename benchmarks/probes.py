"""Time of the probes of one model: `python benchmarks/probes.py [--model mesh] [--samples 200]`.

In the same run, at the defaults of `ls.probe` (labels current, previous, next; states; 32 tokens a
sample; 5 folds; all controls):

* all: `ls.probe`, and of it the captures of the model and its twin, and the fits;
* fits on one thread and on all, and how much faster that is;
* floor: the matrix products alone of a logistic regression's steps, two per step (logits and
  slope), for as many steps as scikit-learn took at h(K).

Wall time and this process's CPU time, in seconds; on a busy machine the second says more.
"""

import argparse
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from threadpoolctl import threadpool_limits

import loopscope as ls
from loopscope.analysis.measures import probe_scores
from loopscope.probes import cross_validated, fit_together, group_folds
from loopscope.probes.linear_probes import class_probe

SPENT: dict[str, list[float]] = {}


def timed(name: str, call: Callable[[], Any]) -> Any:
    """Run something and add up what it takes.

    Args:
        name: Under which name.
        call: What to run.

    Returns:
        Its result.
    """
    wall, cpu = time.perf_counter(), time.process_time()
    result = call()
    spent = SPENT.setdefault(name, [0.0, 0.0])
    spent[0] += time.perf_counter() - wall
    spent[1] += time.process_time() - cpu
    return result


def watched(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Time each call of a function.

    Args:
        name: Under which name.
        function: The function.

    Returns:
        The same, timed.
    """
    return lambda *given, **options: timed(name, lambda: function(*given, **options))


def floor(x: np.ndarray, y: np.ndarray, steps: int) -> None:
    """Do a fit's matrix products.

    Args:
        x: States, (token, width).
        y: Classes.
        steps: How many steps.
    """
    weights = np.zeros((x.shape[1], y.max() + 1), x.dtype)
    for _ in range(steps):
        logits = x @ weights
        weights = x.T @ logits


def main() -> None:
    """Print the times."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="mesh")
    parser.add_argument("--samples", type=int, default=200)
    given = parser.parse_args()
    model = ls.load(given.model)
    samples = ls.load_samples(model, samples=given.samples)

    probe_scores.fit_together = watched("fits", probe_scores.fit_together)
    probe_scores.collect_states = watched("captures", probe_scores.collect_states)
    timed("all", lambda: ls.probe(model, samples))

    random = np.random.default_rng(0)
    h = ls.capture(model, samples.tokens[:100], memory=False).h[-1]
    x = h[:, ::8].flatten(0, 1).numpy()
    centres = random.normal(size=(7, x.shape[1])).astype(x.dtype)
    y = (x @ centres.T + random.gumbel(size=(len(x), 7)) * 3).argmax(1)
    fold = group_folds(range(100), 5)[np.repeat(np.arange(100), x.shape[0] // 100)]
    jobs = [lambda: cross_validated(x, y, fold, classes=True) for _ in range(8)]
    threads = torch.get_num_threads()
    timed("8 fits, 1 thread", lambda: fit_together(jobs, threads=1))
    timed(f"8 fits, {threads} threads", lambda: fit_together(jobs, threads=threads))
    steps = int(class_probe(x.shape[1]).fit(x, y)[-1].n_iter_[0])
    with threadpool_limits(1, user_api="blas"):
        timed("their products", lambda: [floor(x[fold != f], y, steps) for f in [*range(5)] * 8])
    print(f"{given.model}, {len(samples)} samples, width {x.shape[1]}, {steps} steps a fit")
    for name, (wall, cpu) in SPENT.items():
        print(f"{name:>20}  {wall:7.2f} s  CPU {cpu:7.2f} s")


if __name__ == "__main__":
    main()
