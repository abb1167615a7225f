"""What is stored of an unfinished comparison: whole or not at all, and found only by its own."""

import errno
import os

import pytest
import torch

from loopscope.analysis.comparisons.stamps import stamp_of_model, stamp_of_target
from loopscope.analysis.comparisons.store import (
    Shelf,
    Store,
    StoreError,
    cuts,
    key_of,
    packed,
    unpacked,
)
from loopscope.analysis.measuring.streaming import Measuring
from loopscope.analysis.options import Options
from loopscope.models.native.checkpoint import read_tokenizer, save
from loopscope.models.opening.targets import zoo_folder
from loopscope.text.windows import load_samples
from tests.conftest import make_model


@pytest.fixture(scope="module")
def model():
    tokenizer = read_tokenizer(zoo_folder() / "base" / "tokenizer.json")
    made = make_model("mesh", "1+1R2+1", d_vocab=tokenizer.get_vocab_size())
    made.tokenizer = tokenizer
    return made


@pytest.fixture(scope="module")
def samples(model):
    return load_samples(model, samples=5, tokens=16)


@pytest.fixture(scope="module")
def tables(model, samples):
    every = ("update", "cka", "spectrum", "rank", "routing", "delta", "readout", "loss")
    return Measuring(model, samples, Options(measures=every), step=7).part(2, 5)


def same(one, two):
    assert one.frames().keys() == two.frames().keys()
    for name, frame in one.frames().items():
        other = two.frames()[name]
        assert (frame.dtypes == other.dtypes).all() or not len(frame), name
        assert frame.equals(other) or not len(frame), name


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ((130, 256, 16), [(0, 64), (64, 128), (128, 130)]),
        ((130, 2048, 16), [(i, min(i + 16, 130)) for i in range(0, 130, 16)]),
        ((130, 256, 100), [(0, 100), (100, 130)]),
        ((100, 256, 24), [(0, 72), (72, 100)]),
        ((3, 2**17, 2), [(0, 2), (2, 3)]),
    ],
)
def test_shards_are_whole_batches_of_about_64_samples(given, wanted):
    assert cuts(*given) == wanted


def test_a_shard_comes_back_as_it_was(tables, tmp_path):
    assert set(tables.loss["sample"]) == {2, 3, 4} and set(tables.loss["step"]) == {7}
    same(tables, unpacked(packed(tables)))
    for store in (Store(None), Store(tmp_path)):
        shelf = Shelf(store, "key")
        assert not shelf.has(2, 5)
        shelf.put(2, 5, tables)
        assert shelf.has(2, 5) and not shelf.has(0, 2)
        same(tables, shelf.get(2, 5))
        assert shelf.get(2, 5).provenance["models"]["mesh"]["options"]["measures"][0] == "update"


def test_a_damaged_shard_counts_as_none(tables, tmp_path):
    Shelf(Store(tmp_path), "key").put(0, 3, tables)
    [file] = (tmp_path / ".shards" / "key").iterdir()
    whole = file.read_bytes()
    for at in range(0, len(whole), 997):
        file.write_bytes(whole[:at] + bytes([whole[at] ^ 255]) + whole[at + 1 :])
        found = Shelf(Store(tmp_path), "key").get(0, 3)
        if found is not None:  # a byte that nobody reads, such as a date
            same(tables, found)
    for cut in (0, 10, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:cut])
        assert not Shelf(Store(tmp_path), "key").has(0, 3)
    file.write_bytes(whole)
    assert Shelf(Store(tmp_path), "key").has(0, 3)


def test_samples_come_back_and_equal_ones_are_stored_once(samples, tmp_path):
    store = Store(tmp_path)
    for key in ("a", "b"):
        assert Shelf(store, key).samples() is None
        Shelf(store, key).begin(samples)
        found = Shelf(store, key).samples()
        assert torch.equal(found.tokens, samples.tokens)
        assert found.provenance == samples.provenance
    [file] = (tmp_path / ".shards" / "samples").iterdir()
    file.write_bytes(file.read_bytes()[:-4] + b"\1\2\3\4")
    assert Shelf(store, "a").samples() is None
    Shelf(store, "a").begin(samples)
    assert torch.equal(Shelf(store, "b").samples().tokens, samples.tokens)


def test_a_full_disk_leaves_no_half_of_a_shard(tables, tmp_path, monkeypatch):
    shelf = Shelf(Store(tmp_path), "key")
    shelf.put(0, 3, tables)

    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(StoreError, match=r"No space left on device\. What was measured before"):
            shelf.put(3, 6, tables)
    assert [path.name for path in (tmp_path / ".shards" / "key").iterdir()] == [
        "000000-000003.shard"
    ]
    assert shelf.has(0, 3) and not shelf.has(3, 6)


def test_keys_of_others_are_left_alone(tables, tmp_path):
    store = Store(tmp_path)
    for key in ("mine", "others"):
        Shelf(store, key).put(0, 3, tables)
    assert store.size(besides=["mine"]) == len(packed(tables))
    store.remove(["mine"])
    assert Shelf(store, "others").has(0, 3) and not Shelf(Store(tmp_path), "mine").has(0, 3)
    store.remove(["others"])
    assert not (tmp_path / ".shards").exists()


def test_another_value_is_another_key():
    told = {"a": [1, None], "b": {"c": "x"}}
    assert key_of(told) == key_of({"b": {"c": "x"}, "a": [1, None]})
    assert len({key_of(told), key_of({**told, "a": [1, 0]}), key_of({**told, "d": 1})}) == 3


def test_stamps_see_other_weights_and_not_other_times_of_reading(model, tmp_path):
    folder = save(model, tmp_path / "saved")

    def stamp(target=folder):
        return stamp_of_target(target, trust_remote_code=False)

    first, twin = stamp(), stamp(f"{folder}@init")
    assert stamp() == first
    file = folder / "model.safetensors"
    os.utime(file, ns=(0, file.stat().st_mtime_ns + 1))
    assert stamp() != first and stamp(f"{folder}@init") == twin  # it has no weights of theirs
    file = folder / "config.json"
    os.utime(file, ns=(0, file.stat().st_mtime_ns + 1))
    assert stamp(f"{folder}@init") != twin
    assert stamp("base") != first


def test_a_model_in_memory_is_told_by_its_weights():
    stamps = []
    for seed, bump in ((0, 0.0), (0, 0.0), (1, 0.0), (0, 1e-7)):
        made = make_model("base", "1+1R2+1", seed=seed)
        with torch.no_grad():
            made.ln_final.bias[0] += bump
        stamps.append(stamp_of_model(made)["sha256"])
    assert stamps[0] == stamps[1]
    assert len(set(stamps)) == 3
    longer = make_model("base", "1+1R2+1").with_loops(3)
    assert stamp_of_model(longer)["sha256"] not in stamps
