"""Checkpoint folders: round trips, and every kind of damage named."""

import json
import os

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers

from loopscope.errors import InputError
from loopscope.models.native.checkpoint import save
from loopscope.models.opening.loading import load
from tests.conftest import VARIANTS, make_model


@pytest.mark.parametrize("variant", [*VARIANTS, "vanilla"])
def test_a_saved_model_comes_back_equal(tmp_path, variant, tokens):
    model = make_model(variant, "1+2+3+1" if variant == "vanilla" else "1+2R3+1")
    save(model, tmp_path / "m", provenance={"tokens": 5})
    again = load(tmp_path / "m")
    assert (again.config, again.name, again.provenance) == (model.config, "m", {"tokens": 5})
    assert torch.equal(again(tokens), model(tokens))
    assert not again.training and all(p.requires_grad for p in again.parameters())


def test_tied_embeddings_stay_tied(tmp_path, tokens):
    model = make_model("base", tied_embeddings=True)
    save(model, tmp_path / "m")
    again = load(tmp_path / "m")
    assert again.unembed.weight is again.embed.weight
    assert torch.equal(again(tokens), model(tokens))


def test_half_precision_on_disk_is_float32_in_memory(tmp_path):
    model = make_model("mesh")
    full, half = save(model, tmp_path / "full"), save(model, tmp_path / "half", half=True)
    size = [(f / "model.safetensors").stat().st_size for f in (full, half)]
    assert size[1] < 0.6 * size[0]
    again = load(half)
    assert again.embed.weight.dtype == torch.float32
    torch.testing.assert_close(again.embed.weight, model.embed.weight, rtol=1e-3, atol=1e-4)
    assert load(half, dtype="float64").cfg.dtype == torch.float64


def test_the_untrained_twin_has_the_same_configuration_and_other_weights(tmp_path, tokens):
    model = make_model("mesh")
    save(model, tmp_path / "m")
    twin = load(f"{tmp_path}/m@init", seed=3)
    assert (twin.name, twin.config) == ("m@init", model.config)
    assert torch.equal(twin.embed.weight, load(f"{tmp_path}/m@init", seed=3).embed.weight)
    assert torch.equal(twin.embed.weight, model.untrained(3).embed.weight)
    assert not torch.equal(twin.embed.weight, load(f"{tmp_path}/m@init", seed=4).embed.weight)


def test_a_tokenizer_goes_along(tmp_path):
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    model = make_model("mesh")
    model.tokenizer = tokenizer
    save(model, tmp_path / "m")
    again = load(tmp_path / "m")
    assert again.to_tokens("a b x").tolist() == [[0, 1, 2]]
    assert again.to_tokens("b", prepend_bos=True).tolist() == [[0, 1]]
    assert again.to_tokens(["a b", "b b"]).tolist() == [[0, 1], [1, 1]]
    assert again.to_str_tokens("a b") == ["a", "b"]
    assert again.to_single_token("b") == 1
    with pytest.raises(InputError, match="2 tokens, not one"):
        again.to_single_token("a b")
    with pytest.raises(InputError, match="empty"):
        again.to_tokens("")
    with pytest.raises(InputError, match=r"\[1, 2\] tokens"):
        again.to_tokens(["a", "a b"])


def damage(folder, kind):
    config = json.loads((folder / "config.json").read_text())
    weights = folder / "model.safetensors"
    if kind == "no config":
        (folder / "config.json").unlink()
    elif kind == "no weights":
        weights.unlink()
    elif kind == "truncated":
        weights.write_bytes(weights.read_bytes()[:-500])
    elif kind == "empty":
        weights.write_bytes(b"")
    elif kind == "not json":
        (folder / "config.json").write_text("{")
    elif kind == "a list":
        (folder / "config.json").write_text("[]")
    elif kind == "version":
        (folder / "config.json").write_text(json.dumps({**config, "format_version": 2}))
    elif kind == "foreign":
        (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    elif kind == "unknown key":
        (folder / "config.json").write_text(json.dumps({**config, "slotz": 2}))
    elif kind == "misshapen":
        (folder / "config.json").write_text(json.dumps({**config, "d_vocab": 60}))
    elif kind == "other layout":
        (folder / "config.json").write_text(json.dumps({**config, "layout": "2+1R3+1"}))
    elif kind == "tokenizer":
        (folder / "tokenizer.json").write_text("{}")
    elif kind == "provenance":
        (folder / "provenance.json").write_text("x")


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("no config", "without config.json"),
        ("no weights", "lacks model.safetensors"),
        ("truncated", r"model.safetensors cannot be read.*truncated"),
        ("empty", r"model.safetensors cannot be read.*truncated"),
        ("not json", r"config.json cannot be read as JSON"),
        ("a list", "must hold a JSON object"),
        ("version", "format_version 2; this loopscope reads 1"),
        ("foreign", "no weights of model_type 'llama'"),
        ("unknown key", "did you mean slots"),
        ("misshapen", r"misshapen: embed.weight is \(61, 32\) instead of \(60, 32\)"),
        ("other layout", r"missing: prelude\.1.*not expected: core\.1"),
        ("tokenizer", "tokenizer.json cannot be read"),
        ("provenance", "provenance.json cannot be read"),
    ],
)
def test_damage_is_named(tmp_path, kind, message):
    folder = save(make_model("mesh"), tmp_path / "m")
    damage(folder, kind)
    with pytest.raises(InputError, match=message):
        load(folder)


def test_what_is_not_there_is_named_with_what_is(tmp_path):
    with pytest.raises(InputError, match=r"unknown model 'nowhere'.*No such folder"):
        load("nowhere")
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="is a file"):
        load(tmp_path / "file")
    save(make_model("mesh"), tmp_path / "m")
    with pytest.raises(InputError, match=r"'cuda:7' is absent; present here: cpu"):
        load(tmp_path / "m", device="cuda:7")
    with pytest.raises(InputError, match="unknown device 'gpu'"):
        load(tmp_path / "m", device="gpu")
    with pytest.raises(InputError, match="unknown dtype 'float31'; did you mean float32"):
        load(tmp_path / "m", dtype="float31")


def test_saving_never_overwrites_unasked_and_never_anything_else(tmp_path):
    model = make_model("mesh")
    folder = save(model, tmp_path / "m")
    with pytest.raises(InputError, match="exists already"):
        save(model, folder)
    save(model, folder, overwrite=True, provenance={"second": 1})
    assert load(folder).provenance == {"second": 1}
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="left alone"):
        save(model, folder, overwrite=True)
    assert (folder / "notes.txt").exists()


def test_a_failed_save_leaves_nothing_behind(tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr("loopscope.models.native.checkpoint.save_file", full)
    with pytest.raises(InputError, match="No space left"):
        save(make_model("mesh"), tmp_path / "m")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="cannot write to"):
        save(make_model("mesh"), tmp_path / "file" / "m")
