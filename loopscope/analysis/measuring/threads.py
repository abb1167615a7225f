"""Threads: several samples at a time, each computed by one thread."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

Each = Callable[[Callable[[int], Any], Iterable[int]], Iterable[Any]]


@contextmanager
def one_thread_per_sample() -> Iterator[Each]:
    """A `map` over samples on as many threads as torch may use, each computing on one.

    The matrices of a sample are too small to be shared between threads, and numpy's and torch's
    threads get in each other's way: several samples at a time are much faster.
    """
    threads = torch.get_num_threads()
    with threadpool_limits(1, user_api="blas"):
        if threads == 1:
            yield map
            return
        try:
            with ThreadPoolExecutor(
                threads, initializer=torch.set_num_threads, initargs=(1,)
            ) as pool:
                yield pool.map
        finally:  # the number is one per thread, but new threads take the last that was set
            torch.set_num_threads(threads)
