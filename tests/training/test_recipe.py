"""The recipe: schedules, settings that cannot be, variants that differ in the recurrence alone."""

import math
from dataclasses import replace

import pytest

from loopscope.errors import InputError
from loopscope.training import plan_training
from tests.training.conftest import make_config


def test_the_rate_warms_up_linearly_and_falls_on_a_cosine_to_a_tenth():
    config = make_config(steps=200, lr=2.0, warmup=0.02)
    rates = [config.lr_at(step) for step in range(200)]
    assert rates[:4] == pytest.approx([0.5, 1.0, 1.5, 2.0])
    assert rates[101] == pytest.approx((2.0 + 0.2) / 2)  # half of the 196 steps after warm-up
    assert rates[-1] == pytest.approx(0.2)
    assert rates[3:] == sorted(rates[3:], reverse=True)
    assert make_config(steps=1, lr=2.0).lr_at(0) == 2.0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps must be at least 1, given 0"),
        ({"batch_size": -1}, "batch_size must be at least 1, given -1"),
        ({"lr": 0.0}, r"lr must be positive, given 0\.0"),
        ({"lr": math.nan}, "lr must be positive, given nan"),
        ({"accumulate": 2}, "a batch of 3 windows cannot be cut into 2 equal parts"),
        ({"warmup": 1.5}, r"warmup is a share, 0 … 1, given 1\.5"),
        ({"weight_decay": -0.1}, r"weight_decay must not be negative, given -0\.1"),
        ({"dtype": "float8"}, "unknown dtype 'float8'.*float32, bfloat16"),
    ],
)
def test_a_recipe_of_no_use_is_refused(changes, message):
    with pytest.raises(InputError, match=message):
        make_config(**changes)


def test_variants_of_one_command_differ_in_the_recurrence_alone():
    variants = ["vanilla", "base", "residual", "anchor*", "mesh", "dynamic"]
    configs = plan_training(variants, tokens=5000, lr=1e-3, seed=4)
    base = configs["base"]
    assert base.tokens == 3 * 8 * 256
    assert list(configs) == ["vanilla", "base", "residual", "anchor_emb", "mesh", "dynamic"]
    for name, config in configs.items():
        layout = config.model.layout
        assert layout.K == 3
        assert layout.n_layers == base.model.layout.n_layers
        same = replace(config.model, variant="base", layout=base.model.layout, slots=None)
        assert replace(config, model=same) == base, name
