"""The shipped checkpoints: what the issue of this release promises about them."""

import json

import pytest
import torch

from loopscope.models.opening.loading import load
from loopscope.models.opening.targets import zoo, zoo_folder
from loopscope.text.windows import load_samples
from loopscope.training import plan_training

NAMES = ["anchor", "anchor_emb", "base", "mesh", "residual", "vanilla"]


def provenance(name: str) -> dict:
    return json.loads((zoo_folder() / name / "provenance.json").read_text())


def test_the_zoo_holds_six_variants_within_the_size_limits():
    assert zoo() == NAMES
    sizes = {n: sum(f.stat().st_size for f in (zoo_folder() / n).iterdir()) for n in NAMES}
    assert max(sizes.values()) <= 8e6
    assert sum(f.stat().st_size for f in zoo_folder().rglob("*") if f.is_file()) <= 32e6


def test_all_were_trained_on_the_same_tokens_with_the_recorded_recipe():
    told = {name: provenance(name) for name in NAMES}
    assert len({p["data"]["sha256"] for p in told.values()}) == 1
    assert all(p["tokens"] >= 10_000_000 for p in told.values())
    recipe = {"tokens": 10_240_000, "batch_size": 8, "lr": 3e-3, "dtype": "bfloat16", "seed": 0}
    configs = plan_training(NAMES, **recipe)
    assert {n: told[n]["training"] for n in NAMES} == {n: c.to_dict() for n, c in configs.items()}
    for p in told.values():
        words = p["command"].split()
        options = dict(zip(words[2::2], words[3::2], strict=False))
        assert int(options["--tokens"]) == 10_240_000 and options["--dtype"] == "bfloat16"


@pytest.mark.parametrize("name", NAMES)
def test_each_has_three_iterations_and_has_learnt(name):
    model = load(name)
    assert (model.config.variant, model.config.K) == (name, 3)
    tokens = load_samples(model, samples=4).tokens
    with torch.no_grad():
        trained = model(tokens, return_type="loss").item()
        untrained = load(f"{name}@init")(tokens, return_type="loss").item()
    assert trained < 3 < 7 < untrained < 9


def test_the_held_out_samples_give_500_windows_to_each_models_tokenizer():
    hashes = {load_samples(load(name)).sha256 for name in ("base", "mesh")}
    assert len(hashes) == 1
    assert load_samples(load("base")).tokens.shape == (500, 256)
