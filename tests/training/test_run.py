"""One command, several variants."""

import json

import pytest
import torch

from loopscope.errors import InputError
from loopscope.models.native.loop_model import LoopModel
from loopscope.training import plan_training, train_variants


def test_one_command_gives_every_variant_identical_batches(tmp_path, monkeypatch):
    text = tmp_path / "a.txt"
    text.write_text("\n".join(f"x{i} = {i * i}" for i in range(3000)))
    seen = {}
    forward = LoopModel.forward

    def spy(model, tokens, *args, **options):
        seen.setdefault(model.config.variant, []).append((model.training, tokens.clone()))
        return forward(model, tokens, *args, **options)

    monkeypatch.setattr(LoopModel, "forward", spy)
    train_variants(
        tmp_path / "runs", variants="base,mesh,vanilla", data=text, d_model=16, n_heads=2,
        vocab=280, seq_len=8, layout="1+1R2+1", tokens=160, batch_size=4, seed=3,
    )  # fmt: skip
    assert list(seen) == ["base", "mesh", "vanilla"]
    assert sum(training for training, _ in seen["base"]) == 5
    steps = [tokens for training, tokens in seen["base"] if training]
    assert not torch.equal(steps[0], steps[1])
    for other in (seen["mesh"], seen["vanilla"]):
        for (mode, tokens), (base_mode, base_tokens) in zip(other, seen["base"], strict=True):
            assert mode == base_mode
            assert torch.equal(tokens, base_tokens)


def test_one_command_trains_variants_and_refuses_what_is_there_first(tmp_path):
    text = tmp_path / "a.txt"
    text.write_text("\n".join(f"x{i} = {i * i}" for i in range(3000)))
    small = {"d_model": 16, "n_heads": 2, "vocab": 280, "seq_len": 8, "layout": "1+1R2+1"}
    small |= {"tokens": 64, "batch_size": 4}
    told = []
    written = train_variants(
        tmp_path / "runs", variants=["base", "mesh"], data=text,
        progress=lambda *given: told.append(given), **small,
    )  # fmt: skip
    assert [folder.name for folder, _ in written] == ["base", "mesh"]
    steps = [(variant, report.step, report.steps) for variant, report in told]
    assert steps == [(v, s, 2) for v in ("base", "mesh") for s in (1, 2)]
    provenance = json.loads((tmp_path / "runs" / "base" / "provenance.json").read_text())
    assert provenance["command"].startswith("loopscope train --out DIR --variants base,mesh ")
    assert (provenance["tokens"], provenance["seed"]) == (64, 0)
    assert provenance["command"].split()[6:8] == ["--data", str(text)]


def test_the_same_command_finds_finished_variants_and_others_are_refused_first(tmp_path):
    text = tmp_path / "a.txt"
    text.write_text("\n".join(f"x{i} = {i * i}" for i in range(3000)))
    small = {"d_model": 16, "n_heads": 2, "vocab": 280, "seq_len": 8, "layout": "1+1R2+1"}
    small |= {"tokens": 64, "batch_size": 4, "data": text}
    first = train_variants(tmp_path / "runs", variants=["mesh"], **small)
    told, trained = [], []
    again = train_variants(
        tmp_path / "runs", variants=["mesh", "base"], tell=told.append,
        progress=lambda variant, report: trained.append(variant), **small,
    )  # fmt: skip
    assert again[0] == first[0]
    assert set(trained) == {"base"}
    assert told == [f"{tmp_path / 'runs' / 'mesh'} is trained already."]
    with pytest.raises(InputError, match=r"runs/mesh holds a training with other settings \(lr "):
        train_variants(tmp_path / "runs", variants=["dynamic", "mesh"], lr=1e-3, **small)
    assert not (tmp_path / "runs" / "dynamic").exists()


def test_variants_named_twice_and_slots_without_a_memory_are_refused():
    with pytest.raises(InputError, match="names base twice"):
        plan_training(["base", "+base"])
    with pytest.raises(InputError, match="no variant was given"):
        plan_training([])
    with pytest.raises(InputError, match="unknown setting 'warm_up'; did you mean warmup"):
        plan_training("base,mesh", warm_up=0.1)
    with pytest.raises(InputError, match="slots=4 is for mesh only, given base, vanilla"):
        plan_training(["base", "vanilla"], slots=4)
    plan = plan_training(["base", "mesh"], slots=4)
    assert (plan["base"].model.slots, plan["mesh"].model.slots) == (None, 4)
