"""One command, several variants."""

import json

import pytest

from loopscope.errors import InputError
from loopscope.training import plan_training, run_training


def test_one_command_trains_variants_and_refuses_what_is_there_first(tmp_path):
    text = tmp_path / "a.txt"
    text.write_text("\n".join(f"x{i} = {i * i}" for i in range(3000)))
    small = {"d_model": 16, "n_heads": 2, "vocab": 280, "seq_len": 8, "layout": "1+1R2+1"}
    small |= {"tokens": 64, "batch_size": 4}
    told = []
    written = run_training(
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
    first = run_training(tmp_path / "runs", variants=["mesh"], **small)
    told, trained = [], []
    again = run_training(
        tmp_path / "runs", variants=["mesh", "base"], tell=told.append,
        progress=lambda variant, report: trained.append(variant), **small,
    )  # fmt: skip
    assert again[0] == first[0]
    assert set(trained) == {"base"}
    assert told == [f"{tmp_path / 'runs' / 'mesh'} is trained already."]
    with pytest.raises(InputError, match=r"runs/mesh holds a training with other settings \(lr "):
        run_training(tmp_path / "runs", variants=["dynamic", "mesh"], lr=1e-3, **small)
    assert not (tmp_path / "runs" / "dynamic").exists()


def test_variants_named_twice_and_slots_without_a_memory_are_refused():
    with pytest.raises(InputError, match="names base twice"):
        plan_training(["base", "+base"])
    with pytest.raises(InputError, match="slots=4 is for mesh only, given base, vanilla"):
        plan_training(["base", "vanilla"], slots=4)
    plan = plan_training(["base", "mesh"], slots=4)
    assert (plan["base"].model.slots, plan["mesh"].model.slots) == (None, 4)
