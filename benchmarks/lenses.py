"""Lenses of all states against their matrix products, side by side in one run.

    python benchmarks/lenses.py [--threads 1] [--rounds 5]

Prints a markdown table, of a model of the zoo and of wider ones: the CPU time of `lens_values` of
the logit and the coda lens of every state (loss, both KL divergences, entropy, ranks, flips), over
that of what gives the logits alone: final norms, unembeddings, and codas, with the same chunks.
"""

import argparse
import time

import torch
from forward import race

from loopscope.models.native.configuration import Layout, LoopConfig
from loopscope.models.native.loop_model import LoopModel
from loopscope.models.opening.loading import load
from loopscope.probes.lenses import LensReader, lens_states, lens_values


def ratio(model: LoopModel, batch: int, pos: int, rounds: int) -> list[float]:
    """Time the lenses of a batch.

    Args:
        model: The model.
        batch: Samples.
        pos: Tokens per sample.
        rounds: How often each is timed.

    Returns:
        Seconds of the lenses, of what gives their logits, and of their unembeddings alone.
    """
    tokens = torch.randint(model.config.d_vocab, (batch, pos))
    trajectory = model.capture(tokens, memory=False, logits=True)
    lenses = lens_states(["logit", "coda"], model.K)
    read = [lens for lens in lenses if not lens.final]

    def logits() -> None:
        reader = LensReader(model, trajectory)
        for rows in reader.chunks():
            for lens in read:
                reader.logits(lens, rows)

    def products() -> None:
        reader = LensReader(model, trajectory)
        for rows in reader.chunks():
            for lens in read:
                model.unembed(trajectory.states[lens.state].flatten(0, 1)[rows])

    with torch.no_grad():
        seconds = race(
            {
                "lenses": lambda: lens_values(LensReader(model, trajectory), lenses),
                "logits": logits,
                "products": products,
            },
            rounds=rounds,
            clock=time.process_time,  # other work on the machine does not count
        )
    return [seconds[name] for name in ("lenses", "logits", "products")]


def wide(width: int, vocabulary: int) -> LoopModel:
    """Make a mesh model.

    Args:
        width: D.
        vocabulary: V.

    Returns:
        The model, untrained.
    """
    config = LoopConfig(
        variant="mesh", layout=Layout.parse("1+2R3+1"), d_model=width, n_heads=width // 32,
        d_vocab=vocabulary, n_ctx=256,
    )  # fmt: skip
    return LoopModel(config).eval()


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    told = parser.parse_args()
    torch.set_num_threads(told.threads)
    cases = [
        ("mesh of the zoo (D = 160, V = 2,048)", load("mesh"), 16),
        ("mesh (D = 512, V = 8,192)", wide(512, 8192), 4),
        ("mesh (D = 1,024, V = 32,768)", wide(1024, 32768), 1),
    ]
    print("| logit and coda lens of all states | tokens | lenses / their logits | seconds |")
    print("|---|---|---|---|")
    for name, model, batch in cases:
        lenses, logits, products = ratio(model, batch, 256, told.rounds)
        print(
            f"| {name} | {batch * 256} | {lenses / logits:.2f} ({lenses / products:.2f} × the "
            f"unembeddings alone) | {lenses:.2f} |"
        )


if __name__ == "__main__":
    main()
