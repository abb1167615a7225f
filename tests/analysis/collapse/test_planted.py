"""Verdicts on models whose fault is known, and on trained ones that have none."""

import pytest
import torch

import loopscope as ls
from loopscope.analysis.collapse import judge, signs
from loopscope.analysis.measuring.streaming import measure
from loopscope.models.native.configuration import LoopConfig
from loopscope.models.native.loop_model import LoopModel
from studies.trainings import (
    Bottleneck,
    DeadCore,
    UnreadWrites,
)
from tests.analysis.planted import (
    diverging,
    first_loop_only,
    fixed_point,
    identity,
    plant,
    rank_one,
)

MEASURES = ("update", "cka", "rank", "delta", "readout", "loss")


def verdict(model, seed=0, samples=16, tokens=48, measures=MEASURES, more_loops=6):
    """The verdict on windows drawn from a seed."""
    text = ls.load_samples(model, samples=samples, tokens=tokens, seed=seed)
    (found,) = judge(signs(measure(model, text, measures, more_loops=more_loops))).values()
    return found


@pytest.fixture(scope="module")
def zoo_base():
    return ls.load("base")


FAULTS = {
    "pulled towards the identity": ("stagnant", lambda seed: identity(0.01)),
    "contracted to a fixed point": ("converging", lambda seed: fixed_point(0.5 + 0.1 * seed)),
    "of rank one": ("collapsed", rank_one),
    "that ends at nothing": ("collapsed", lambda seed: lambda h, f_h, end, t: 0.0 * f_h),
    "that diverges": ("unstable", lambda seed: diverging(2.0 + seed)),
    "that overflows": ("unstable", lambda seed: diverging(1e20)),
    "that leaves all work to the first loop": ("skewed", lambda seed: first_loop_only(0.003)),
}


@pytest.mark.filterwarnings("ignore:Planted. two runs on the same input differ")  # NaN ≠ NaN
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_gets_its_verdict(zoo_base, fault, seed):
    expected, alter = FAULTS[fault]
    found = verdict(plant(zoo_base, alter(seed), fault), seed)
    assert found.verdict == expected, found.evidence


TRAINED = {
    "a core that is frozen at nothing": ("stagnant", "residual", DeadCore()),
    "a core of biases": ("stagnant", "anchor_emb", DeadCore(biases=True)),
    "a state of rank one": ("collapsed", "base", Bottleneck(1)),
    "a memory of which the first write is read alone": ("skewed", "mesh", UnreadWrites()),
}


def trained(variant, training, tokenizer):
    """A small model trained for a moment, whose fault is there from the first step."""
    config = LoopConfig(
        variant=variant, layout="1+1R3+1", d_model=48, n_heads=2, d_vocab=2048, n_ctx=64
    )
    model = LoopModel(config, seed=3, tokenizer=tokenizer)
    training.install(model.train())
    text = ls.load_samples(model, samples=300, tokens=49, seed=100).tokens
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    drawn = torch.Generator().manual_seed(3)
    for _ in range(80):
        loss = training.loss(model, text[torch.randperm(len(text), generator=drawn)[:12]], drawn)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        training.after_step(model)
    return model.eval()


@pytest.mark.parametrize("fault", TRAINED)
def test_a_model_trained_with_a_fault_gets_its_verdict(zoo_base, fault):
    expected, variant, training = TRAINED[fault]
    model = trained(variant, training, zoo_base.tokenizer)
    hooked = any(point.fwd_hooks for point in model.hook_points())
    more = None if hooked or variant == "mesh" else 6
    found = verdict(model, samples=60, measures=(*MEASURES, "routing"), more_loops=more)
    assert found.verdict == expected, found.evidence


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", ["base", "residual", "anchor", "anchor_emb", "mesh"])
def test_a_trained_model_is_not_accused(name, seed):
    model = ls.load(name)
    more = None if name == "mesh" else 6
    found = verdict(model, seed, more_loops=more)
    assert found.verdict in ("healthy", "converging"), found.evidence


def test_an_unaltered_core_is_judged_as_the_model_itself(zoo_base):
    same = verdict(plant(zoo_base, identity(1.0), "same"))
    assert same.verdict == verdict(zoo_base).verdict == "healthy"
    assert same.evidence == verdict(zoo_base).evidence


def test_an_untrained_model_is_stagnant():
    assert verdict(ls.load("base@init")).verdict == "stagnant"


def test_without_a_loss_geometry_alone_accuses_nobody(zoo_base):
    geometry = [name for name in MEASURES if name not in ("readout", "loss")]
    altered = plant(zoo_base, first_loop_only(0.003), "first loop only")
    found = verdict(altered, measures=geometry)
    assert found.verdict == "uncertain" and {"skewed", "healthy"} <= {*found.between}
    assert verdict(zoo_base, measures=geometry).verdict == "healthy"


def test_few_samples_are_not_judged(zoo_base):
    found = verdict(zoo_base, samples=4)
    assert found.verdict == "uncertain" and "4 samples are too few" in found.evidence[0]
