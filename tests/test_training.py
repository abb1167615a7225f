"""The trainer: equal batches for every variant, the paper's recipe, what is written and refused."""

import csv
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from loopscope.batches import TrainingData
from loopscope.corpus import Corpus, Document, train_tokenizer
from loopscope.errors import InputError
from loopscope.heldout import heldout_pieces
from loopscope.models.checkpoint import load_checkpoint
from loopscope.models.config import LoopConfig
from loopscope.models.model import LoopModel
from loopscope.training import (
    LOG_COLUMNS,
    TrainConfig,
    _loss,
    _optimizer,
    evaluate,
    train,
)
from loopscope.training_run import plan_training, run_training

T = 16


def make_config(variant="base", layout="1+1R2+1", **changes):
    model = LoopConfig(variant=variant, layout=layout, d_model=16, n_heads=2, d_vocab=280, n_ctx=T)
    settings = {"steps": 4, "batch_size": 3, "seq_len": T, "log_every": 2, "eval_every": 3}
    return TrainConfig(model=model, **{**settings, **changes})


@pytest.fixture(scope="module")
def corpus():
    documents = [Document(f"{i}.py", f"def f{i}(x):\n    return x + {i}\n" * 4) for i in range(32)]
    held = [Document(f"h{i}.py", f"class C{i}:\n    y = {i}\n" * 5) for i in range(8)]
    return Corpus(
        source="forty functions",
        train=tuple(documents),
        heldout=tuple(held),
        sha256="ab" * 32,
    )


@pytest.fixture(scope="module")
def data(corpus):
    return TrainingData.from_corpus(corpus, vocab=280)


def test_the_stream_is_the_documents_with_a_separator_after_each(corpus, data):
    pieces = data.tokenizer.decode(data.train.tolist(), skip_special_tokens=False)
    assert pieces == "".join(d.text + "<|endoftext|>" for d in corpus.train)
    assert data.train.dtype == np.int32
    assert data.provenance["sha256"] == corpus.sha256


def test_the_tokenizer_learns_from_the_train_split_alone(corpus, data):
    own = train_tokenizer((d.text for d in corpus.train), 280)
    assert data.tokenizer.to_str() == own.to_str()
    given = TrainingData.from_corpus(corpus, train_tokenizer([], 257))
    assert given.tokenizer.get_vocab_size() == 257
    assert given.train.max() < 257


def test_an_epoch_visits_every_window_once_in_an_order_of_its_own(data):
    count = data.windows(T)
    orders = []
    for epoch in range(2):
        steps = range(epoch * count, (epoch + 1) * count)
        rows = torch.cat([data.batch(s, batch_size=1, seq_len=T, seed=5) for s in steps])
        assert (rows[:, 1:-1] == rows[:, :-1][:, 1:]).all()
        starts = {row.tobytes(): i for i, row in enumerate(windows_of(data))}
        orders.append([starts[row.numpy().tobytes()] for row in rows])
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(count))
    assert orders[0] != orders[1]


def windows_of(data):
    """All windows of T inputs and T targets, in the order of the text."""
    starts = range(0, len(data.train) - T, T)
    return [data.train[i : i + T + 1].astype(np.int64) for i in starts]


def test_a_batch_depends_on_step_and_seed_alone(data, corpus):
    def take(step, seed, source=data):
        return source.batch(step, batch_size=3, seq_len=T, seed=seed)

    later = take(7, 1)
    again = TrainingData.from_corpus(corpus, vocab=280)
    assert torch.equal(take(7, 1, again), later)  # asked for first, and by a new object
    assert not torch.equal(take(7, 2), later)
    assert not torch.equal(take(8, 1), later)
    both = data.batch(0, batch_size=6, seq_len=T, seed=1)
    assert torch.equal(both, torch.cat([take(0, 1), take(1, 1)]))


def test_every_variant_sees_identical_batches(data, tmp_path, monkeypatch):
    seen = {}
    forward = LoopModel.forward

    def spy(model, tokens, *args, **options):
        seen.setdefault(model.config.variant, []).append((model.training, tokens.clone()))
        return forward(model, tokens, *args, **options)

    monkeypatch.setattr(LoopModel, "forward", spy)
    for variant, layout in (("base", "1+1R2+1"), ("mesh", "1+1R2+1"), ("vanilla", "2")):
        train(make_config(variant, layout, data_seed=3), data, tmp_path / variant)
    base, mesh, vanilla = (seen[variant] for variant in ("base", "mesh", "vanilla"))
    assert sum(training for training, _ in base) == 4
    for other in (mesh, vanilla):
        assert len(other) == len(base)
        for (mode, tokens), (base_mode, base_tokens) in zip(other, base, strict=True):
            assert mode == base_mode
            assert torch.equal(tokens, base_tokens)


def test_the_rate_warms_up_linearly_and_falls_on_a_cosine_to_a_tenth():
    config = make_config(steps=200, lr=2.0, warmup=0.02)
    rates = [config.lr_at(step) for step in range(200)]
    assert rates[:4] == pytest.approx([0.5, 1.0, 1.5, 2.0])
    assert rates[101] == pytest.approx((2.0 + 0.2) / 2)  # half of the 196 steps after warm-up
    assert rates[-1] == pytest.approx(0.2)
    assert rates[3:] == sorted(rates[3:], reverse=True)
    assert make_config(steps=1, lr=2.0).lr_at(0) == 2.0


def test_biases_and_norms_are_not_decayed():
    config = make_config("mesh")
    model = LoopModel(config.model)
    decay = {}
    for group in _optimizer(model, config).param_groups:
        decay |= {id(parameter): group["weight_decay"] for parameter in group["params"]}
    got = {name: decay[id(parameter)] for name, parameter in model.named_parameters()}
    for name, value in got.items():
        assert value == (0.0 if name.endswith("bias") or ".ln" in f".{name}" else 0.01), name
    assert set(got.values()) == {0.0, 0.01}


def test_the_validation_loss_is_the_mean_over_all_targets(data):
    model = LoopModel(make_config("mesh").model)
    held = data.validation(5, T)
    want = np.mean([model(row[None], return_type="loss").item() for row in held])
    assert evaluate(model, held, batch_size=2) == pytest.approx(want, rel=1e-6)
    assert held.shape == (5, T + 1)
    assert torch.equal(held[0], torch.from_numpy(data.heldout[: T + 1]).long())


def test_bfloat16_autocast_gives_nearly_the_loss_of_float32(data):
    model = LoopModel(make_config("mesh").model)
    batch = data.batch(0, batch_size=3, seq_len=T, seed=0)
    exact, rough = _loss(model, batch, "float32"), _loss(model, batch, "bfloat16")
    assert rough.dtype == torch.float32
    assert 0 < (rough - exact).abs().max() < 0.05


def test_training_learns_and_the_folder_gives_the_same_model_back(data, tmp_path):
    reports = []
    config = make_config("mesh", steps=30, lr=1e-2)
    model = train(
        config, data, tmp_path / "m", progress=reports.append, provenance={"command": "c"}
    )
    assert reports[-1].loss < reports[0].loss - 1
    assert [report.step for report in reports] == list(range(1, 31))
    loaded = load_checkpoint(tmp_path / "m")
    held = data.validation(config.eval_windows, T)
    assert evaluate(loaded, held) == pytest.approx(reports[-1].val_loss, rel=1e-5)
    assert loaded.tokenizer.to_str() == data.tokenizer.to_str()
    assert not model.training
    told = json.loads((tmp_path / "m" / "provenance.json").read_text())
    assert told["training"]["model"]["variant"] == "mesh"
    assert told["tokens"] == 30 * 3 * T
    assert told["data"]["sha256"] == "ab" * 32
    assert told["val_loss"] == reports[-1].val_loss
    assert told["command"] == "c"


def test_the_log_has_a_row_per_interval_and_ends_with_a_validation_loss(data, tmp_path):
    train(make_config(steps=7), data, tmp_path / "m")
    with (tmp_path / "m" / "log.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == LOG_COLUMNS
    assert [int(row["step"]) for row in rows] == [2, 3, 4, 6, 7]
    assert [row["val_loss"] != "" for row in rows] == [False, True, False, True, True]
    assert [int(row["tokens"]) for row in rows] == [n * 3 * T for n in (2, 3, 4, 6, 7)]


def test_the_logged_loss_is_the_mean_since_the_row_before(data, tmp_path):
    config = make_config(steps=4, log_every=1, eval_every=9)
    single, pairs = [], []
    train(config, data, tmp_path / "a", progress=lambda r: single.append(r.loss))
    train(
        replace(config, log_every=2), data, tmp_path / "b", progress=lambda r: pairs.append(r.loss)
    )
    assert pairs[1] == pytest.approx((single[0] + single[1]) / 2, rel=1e-6)
    assert pairs[3] == pytest.approx((single[2] + single[3]) / 2, rel=1e-6)


def test_equal_seeds_give_equal_weights_and_others_do_not(data, tmp_path):
    states = [
        train(make_config(seed=seed), data, tmp_path / str(i)).state_dict()
        for i, seed in enumerate((1, 1, 2))
    ]
    same = [all(torch.equal(a, s[n]) for n, a in states[0].items()) for s in states[1:]]
    assert same == [True, False]


def test_a_loss_that_is_not_finite_stops_with_the_step_and_leaves_nothing(data, tmp_path):
    with pytest.raises(InputError, match=r"the loss became (nan|inf) at step [23]; nothing was"):
        train(make_config(lr=1e30), data, tmp_path / "m")
    assert not list(tmp_path.iterdir())


def test_a_folder_that_exists_or_cannot_be_made_is_refused_before_training(data, tmp_path):
    def never(report):
        raise AssertionError("trained")

    with pytest.raises(InputError, match="exists already; choose another folder"):
        train(make_config(), data, tmp_path, progress=never)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"cannot write to .*file"):
        train(make_config(), data, tmp_path / "file" / "m", progress=never)


def test_text_shorter_than_a_window_and_too_small_a_vocabulary_are_refused(data, tmp_path):
    with pytest.raises(InputError, match=r"the held-out text has \d+ tokens.* one window of 1001"):
        train(make_config(seq_len=1000), data, tmp_path / "m")
    small = replace(make_config().model, d_vocab=270)
    with pytest.raises(InputError, match="tokenizer has 280 ids but the model's d_vocab is 270"):
        train(replace(make_config(), model=small), data, tmp_path / "m")


def test_a_tokenizer_without_a_separator_is_refused(corpus):
    from tokenizers import Tokenizer, models

    with pytest.raises(InputError, match=r"no <\|endoftext\|>"):
        TrainingData.from_corpus(corpus, Tokenizer(models.BPE()))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps must be at least 1, given 0"),
        ({"batch_size": -1}, "batch_size must be at least 1, given -1"),
        ({"lr": 0.0}, r"lr must be positive, given 0\.0"),
        ({"lr": math.nan}, "lr must be positive, given nan"),
        ({"dtype": "float8"}, "unknown dtype 'float8'.*float32, bfloat16"),
    ],
)
def test_a_recipe_of_no_use_is_refused(changes, message):
    with pytest.raises(InputError, match=message):
        make_config(**changes)


def test_an_absent_device_is_refused(data, tmp_path):
    with pytest.raises(InputError, match="device"):
        train(make_config(device="nowhere"), data, tmp_path / "m")


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
    assert [given[:3] for given in told] == [(v, s, 2) for v in ("base", "mesh") for s in (1, 2)]
    provenance = json.loads((tmp_path / "runs" / "base" / "provenance.json").read_text())
    assert provenance["command"].startswith("loopscope train --out DIR --variants base,mesh ")
    assert (provenance["tokens"], provenance["seed"]) == (64, 0)
    with pytest.raises(InputError, match=r"runs/mesh exists already"):
        run_training(tmp_path / "runs", variants=["dynamic", "mesh"], data=text, **small)
    assert not (tmp_path / "runs" / "dynamic").exists()
    with pytest.raises(InputError, match="names base twice"):
        plan_training(["base", "base"])


def test_held_out_pieces_are_long_spread_over_files_and_do_not_overlap(corpus):
    long = tuple(
        Document(f"{n}.py", "".join(f"x{i} = {i}\n" for i in range(900 * n))) for n in (1, 2, 3)
    )
    own = Document("asynchat.py", long[2].text)
    held = replace(corpus, heldout=(*long, own))
    pieces = heldout_pieces(held, train_tokenizer([], 257), count=9)
    texts = {document.path: document.text for document in long}
    for piece in pieces:
        assert texts[piece.file][piece.start :].startswith(piece.text)
        assert 2000 <= len(piece.text) < 2020
        assert piece.text.endswith("\n")
    files = [piece.file for piece in pieces]
    assert [files.count(f"{n}.py") for n in (1, 2, 3)] == [3, 3, 3]
    ends = [piece.start + len(piece.text) for piece in pieces]
    for i in range(8):
        assert files[i] != files[i + 1] or ends[i] <= pieces[i + 1].start
    with pytest.raises(InputError, match=r"hold \d\d pieces of 448 tokens, 500 are needed"):
        heldout_pieces(held, train_tokenizer([], 257))
