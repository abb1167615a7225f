"""Accumulated, compiled or shared among processes, a step is the same step."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch

from loopscope.errors import InputError
from loopscope.models.native.block import SHORT, _short_attention
from loopscope.models.native.checkpoint import load_checkpoint
from loopscope.models.native.loop_model import LoopModel
from loopscope.processes import Processes
from loopscope.training import train_model
from loopscope.training.trainer import token_losses
from tests.training.conftest import T, make_config


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_a_batch_in_parts_gives_the_gradient_of_the_whole(data, tmp_path, monkeypatch):
    found, losses, norms = [], [], []
    clip = torch.nn.utils.clip_grad_norm_

    def noted(*given):
        norm = clip(*given)
        norms.append(norm.item())
        return norm

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", noted)
    for n in (1, 3):
        config = make_config("mesh", accumulate=n)
        model = train_model(
            config, data, tmp_path / str(n), progress=lambda r: losses.append(r.loss)
        )
        found.append(weights(model))
    assert not torch.equal(*found)  # other roundings
    assert torch.allclose(*found, atol=1e-5)
    # AdamW does not see the scale of a gradient, so it is looked at by itself
    assert norms[:4] == pytest.approx(norms[4:], rel=1e-4)
    assert losses[:4] == pytest.approx(losses[4:], rel=1e-5)


def test_processes_share_the_windows_and_refuse_uneven_batches():
    windows = torch.arange(12).view(6, 2)
    members = [Processes(rank=r, count=3, device=torch.device("cpu")) for r in range(3)]
    parts = [member.share(windows) for member in members]
    assert torch.equal(torch.cat(parts), windows)
    assert [len(part) for part in parts] == [2, 2, 2]
    assert [member.main for member in members] == [True, False, False]
    members[0].check(12, 2)
    with pytest.raises(InputError, match="batch of 9 windows cannot be shared by 3 processes in 2"):
        members[0].check(9, 2)


SMALL = {
    "layout": "1+1R2+1", "d_model": 16, "n_heads": 2, "vocab": 280, "seq_len": 8, "tokens": 1280,
    "batch_size": 4, "accumulate": 2,
}  # fmt: skip
PROGRAM = """
import json, os, sys
from loopscope.training import train_variants

out, text, stop, recipe = sys.argv[1:]

def progress(variant, report):
    if report.step == int(stop):
        os._exit(3)  # as if killed: nothing is cleaned up

train_variants(
    out, variants=["base", "mesh"], data=text, progress=progress, save_seconds=0.0,
    tell=lambda sentence: print(sentence, flush=True), **json.loads(recipe),
)
"""


def test_two_processes_train_and_resume_what_one_trains(tmp_path):
    text, program = tmp_path / "a.txt", tmp_path / "program.py"
    text.write_text("\n".join(f"x{i} = {i * i}" for i in range(3000)))
    program.write_text(PROGRAM)
    two = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_machines"]
    # the launcher's precision must not change the recipe's
    two += ["1", "--num_processes", "2", "--mixed_precision", "bf16", "--dynamo_backend", "no"]

    def run(launcher, out, stop=0):
        words = [str(program), str(tmp_path / out), str(text), str(stop), json.dumps(SMALL)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.run(
            [*launcher, *words], env=environment, capture_output=True, text=True
        )  # fmt: skip

    for launcher, out in (([sys.executable], "one"), (two, "two")):
        done = run(launcher, out)
        assert done.returncode == 0, done.stderr[-3000:]
    assert run(two, "killed", stop=30).returncode != 0
    assert not (tmp_path / "killed" / "base" / "config.json").exists()
    done = run(two, "killed")
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("base goes on from step 29 of 40.") == 1
    for variant in ("base", "mesh"):
        models = [load_checkpoint(tmp_path / out / variant) for out in ("one", "two", "killed")]
        one, both, resumed = models
        assert [m.provenance["processes"] for m in models] == [1, 2, 2]
        # Not the weights: keys' biases have no gradient but rounding, which Adam makes steps of.
        tokens = torch.arange(1, 9)[None]
        assert torch.allclose(one(tokens), both(tokens), atol=1e-4)
        assert both.provenance["val_loss"] == pytest.approx(one.provenance["val_loss"], abs=1e-5)
        assert torch.equal(weights(both), weights(resumed))
        untrained = weights(LoopModel(one.config, seed=0))
        assert (weights(one) - untrained).abs().max() > 0.01


COMPILED = """
import sys, torch
from pathlib import Path
from loopscope.text.corpus import Corpus, Document
from loopscope.models.native.configuration import LoopConfig
from loopscope.models.native.loop_model import LoopModel
from loopscope.training import TrainConfig, TrainingData, train_model
from loopscope.training.trainer import token_losses

text = tuple(Document(f"{i}.py", f"def f{i}(x): return x + {i}" * 9) for i in range(40))
data = TrainingData.from_corpus(
    Corpus(source="", train=text[:32], heldout=text[32:], sha256=""), vocab=280
)
for variant in ("dynamic", "mesh"):
    config = LoopConfig(variant=variant, layout="0+1R2+0", d_model=16, n_heads=2, d_vocab=280)
    model = LoopModel(config).train()
    batch = data.batch(0, batch_size=3, seq_len=16, seed=0)
    graph = torch.compile(token_losses, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(
        graph(model, batch, "float32"), token_losses(model, batch, "float32"), atol=1e-5, rtol=0
    )
if sys.argv[2] == "compiler":
    torch._dynamo.reset()
    ends = []
    for compile in (False, True):
        recipe = TrainConfig(model=config, steps=3, batch_size=3, seq_len=16, compile=compile)
        ends.append(train_model(recipe, data, Path(sys.argv[1]) / str(compile)).state_dict())
    for name, value in ends[0].items():
        torch.testing.assert_close(ends[1][name], value, atol=1e-4, rtol=0)
"""


@pytest.mark.parametrize(
    "backend",
    [
        "graph",
        pytest.param(
            "compiler",
            marks=pytest.mark.skipif(not shutil.which("g++"), reason="needs a C++ compiler (g++)"),
        ),
    ],
)
def test_the_loss_compiles_as_one_graph_and_trains_alike(tmp_path, backend):
    # in a process of its own: the run-time type checks of these tests cannot be compiled
    done = subprocess.run(
        [sys.executable, "-c", COMPILED, str(tmp_path), backend], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_short_attention_is_the_fused_one_up_to_rounding():
    generator = torch.Generator().manual_seed(0)
    q, k, v = (2 * torch.randn(2, 3, 40, 8, generator=generator) for _ in range(3))
    wanted = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    found = _short_attention(*(x.bfloat16() for x in (q, k, v))).float()
    assert (found - wanted).abs().mean() < 0.02  # bfloat16 scores up to 20 err by 0.06
    assert wanted.abs().mean() > 0.5
    later = v.clone()
    later[:, :, 25:] += 9
    moved = _short_attention(q.bfloat16(), k.bfloat16(), later.bfloat16()).float() - found
    assert moved[:, :, :25].abs().max() == 0
    assert moved[:, :, 25:].abs().max() > 1


def test_short_attention_in_bfloat16_training_is_nearly_that_of_evaluation(data):
    model = LoopModel(make_config("mesh").model)
    batch = data.batch(0, batch_size=3, seq_len=T, seed=0)
    assert batch.shape[1] <= SHORT
    found = [token_losses(model.train(mode), batch, "bfloat16") for mode in (True, False)]
    assert not torch.equal(*found)
    assert torch.allclose(*found, atol=0.02)
