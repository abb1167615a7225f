"""Samples: which windows, from which text, and what is refused."""

import hashlib
import json
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch
from pyarrow import parquet

import loopscope as ls
from loopscope.errors import InputError
from loopscope.text.corpus import is_heldout, train_tokenizer
from loopscope.text.windows import _pieces, heldout_documents, load_samples

BYTES = train_tokenizer([], 257)  # no merges: one token per byte, so that windows are text slices


def read(samples):
    return [BYTES.decode(row.tolist()) for row in samples.tokens]


@pytest.fixture
def three_texts(tmp_path):
    """Three documents with 6, 3 and 1 windows of eight tokens, and 5 characters left over."""
    texts = [letter * 8 * n + "-----" for letter, n in (("a", 6), ("b", 3), ("c", 1))]
    texts[0] = "".join(f"{i:08d}" for i in range(6)) + "-----"
    texts[1] = "".join(f"b{i:07d}" for i in range(3)) + "-----"
    path = tmp_path / "three.jsonl"
    path.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    return path


def test_windows_are_whole_slices_of_the_text_without_overlap_or_padding(three_texts):
    found = read(load_samples(BYTES, three_texts, samples=99, tokens=8))
    assert sorted(found) == sorted(
        [*(f"{i:08d}" for i in range(6)), *(f"b{i:07d}" for i in range(3)), "c" * 8]
    )


def test_windows_equal_to_others_are_left_out_and_counted(three_texts, tmp_path):
    assert load_samples(BYTES, three_texts, samples=99, tokens=8).options["repeated"] == 0
    (line := tmp_path / "line.txt").write_text("the same line again\n" * 90)
    samples = load_samples(BYTES, line, samples=50, tokens=20)
    assert len(samples) == 1 and samples.options["repeated"] == 89


def test_every_window_knows_its_document(tmp_path):
    (rows := tmp_path / "rows.jsonl").write_text(
        "".join(
            json.dumps({"text": letter * 24, **more}) + "\n"
            for letter, more in (("a", {"document": "x"}), ("b", {"document": 7}), ("c", {}))
        )
    )
    by_window = {}
    samples = load_samples(BYTES, rows, samples=9, tokens=8)
    for window, document in zip(read(samples), samples.documents, strict=True):
        by_window[window[0]] = document
    assert by_window == {"a": "x", "b": "7", "c": "rows.jsonl#3"}
    table = pd.read_json(rows, lines=True, dtype={"document": str})
    table.to_parquet(tmp_path / "rows.parquet")
    again = load_samples(BYTES, tmp_path / "rows.parquet", samples=9, tokens=8)
    assert sorted(again.documents) == ["7", "rows.parquet#3", "x"]


def test_the_shipped_windows_know_their_file_and_do_not_repeat():
    samples = load_samples(ls.load("base"), samples=500, tokens=256)
    assert len(samples) == len(samples.documents) == 500 and samples.options["repeated"] == 0
    assert len({*samples.documents}) == 92 and "enum.py" in samples.documents


def test_every_document_gives_a_window_before_any_gives_two(three_texts):
    for seed in range(5):
        found = read(load_samples(BYTES, three_texts, samples=5, tokens=8, seed=seed))
        kinds = ["0" if window.isdigit() else window[0] for window in found]
        assert sorted(kinds[:3]) == ["0", "b", "c"]
        assert sorted(kinds[3:]) == ["0", "b"]


def test_the_seed_alone_decides_and_fewer_samples_are_the_first_of_more(three_texts):
    def take(samples, seed):
        return load_samples(BYTES, three_texts, samples=samples, tokens=8, seed=seed)

    assert torch.equal(take(9, 1).tokens, take(9, 1).tokens)
    assert torch.equal(take(4, 1).tokens, take(9, 1).tokens[:4])
    assert len({take(9, seed).sha256 for seed in range(5)}) > 1


def test_only_what_is_used_is_tokenised(tmp_path):
    path = tmp_path / "long.txt"
    path.write_text("one line of text\n" * 100_000)
    seen = []

    def encode(text, add_special_tokens):
        seen.append(len(text))
        return BYTES.encode(text, add_special_tokens=add_special_tokens)

    few = load_samples(SimpleNamespace(encode=encode), path, samples=5, tokens=8)
    assert few.tokens.shape == (5, 8)
    assert sum(seen) < 0.01 * path.stat().st_size


def test_cutting_a_long_text_loses_nothing():
    for text in ("line\n" * 5000, "x" * 9000, "", "short"):
        pieces = list(_pieces(text, 1000))
        assert "".join(pieces) == text
        assert max(map(len, pieces)) <= 2000


def test_fewer_windows_than_asked_for_are_used_and_recorded(three_texts):
    samples = load_samples(BYTES, three_texts, samples=99, tokens=8)
    assert samples.provenance == {
        "source": str(three_texts),
        "sha256": samples.sha256,
        "samples": 10,
        "tokens": 8,
        "requested": 99,
        "seed": 0,
        "repeated": 0,
    }
    assert len(samples) == 10
    assert "10 samples × 8 tokens" in samples._repr_html_()


def test_the_hash_is_that_of_the_little_endian_ids(tmp_path):
    path = tmp_path / "ids.npy"
    np.save(path, np.array([[1, 2, 3, 256], [5, 6, 7, 8]], np.uint16))
    want = hashlib.sha256(bytes.fromhex("01000000 02000000 03000000 00010000".replace(" ", "")))
    assert load_samples(BYTES, path, samples=1, tokens=4).sha256 == want.hexdigest()


@pytest.mark.parametrize("kind", ["int64", "int32", "uint16", ">i4"])
def test_ids_are_read_from_npy_and_cut_to_the_width(tmp_path, kind):
    ids = np.arange(40).reshape(4, 10)
    np.save(tmp_path / "ids.npy", ids.astype(kind))
    samples = load_samples(BYTES, tmp_path / "ids.npy", samples=3, tokens=6)
    assert samples.tokens.dtype == torch.int64
    assert samples.tokens.tolist() == ids[:3, :6].tolist()


def test_parquet_and_jsonl_give_the_same_samples(three_texts, tmp_path):
    texts = [json.loads(line)["text"] for line in three_texts.read_text().splitlines()]
    parquet.write_table(pa.table({"text": texts}), tmp_path / "three.parquet")
    of_jsonl = load_samples(BYTES, three_texts, samples=6, tokens=8)
    of_parquet = load_samples(BYTES, tmp_path / "three.parquet", samples=6, tokens=8)
    assert of_jsonl.sha256 == of_parquet.sha256


def test_a_model_is_read_with_its_tokenizer(three_texts):
    model = SimpleNamespace(name="m", tokenizer=BYTES, config=SimpleNamespace(d_vocab=257))
    of_model = load_samples(model, three_texts, samples=3, tokens=8)
    assert of_model.sha256 == load_samples(BYTES, three_texts, samples=3, tokens=8).sha256


def test_a_tokenizer_that_truncates_or_pads_gives_the_same_windows(three_texts):
    cutting = type(BYTES).from_str(BYTES.to_str())
    cutting.enable_truncation(4)
    cutting.enable_padding(length=64)
    got = load_samples(cutting, three_texts, samples=99, tokens=8)
    assert got.sha256 == load_samples(BYTES, three_texts, samples=99, tokens=8).sha256
    assert cutting.truncation["max_length"] == 4  # the caller's own stays as it was


def test_the_shipped_samples_are_500_texts_of_files_no_model_was_trained_on():
    documents = heldout_documents()
    assert len({document.text for document in documents}) == 500
    coarse = train_tokenizer((document.text for document in documents), 4096)
    samples = load_samples(coarse)
    assert samples.tokens.shape == (500, 256)
    assert samples.source == "shipped held-out samples"


def test_the_shipped_samples_do_not_overlap_and_say_where_they_come_from():
    from importlib.resources import files

    table = parquet.read_table(str(files("loopscope") / "zoo" / "heldout.parquet"))
    frame = table.to_pandas()
    assert all(is_heldout(name) for name in frame.file)
    assert frame.file.nunique() > 80
    assert frame.file.value_counts().max() <= 10
    assert (frame.start > 0).mean() > 0.7
    for _, pieces in frame.sort_values("start").groupby("file"):
        ends = (pieces.start + pieces.text.str.len()).to_numpy()
        assert (ends[:-1] <= pieces.start.to_numpy()[1:]).all()
    told = json.loads(table.schema.metadata[b"loopscope"])
    assert told["source"].startswith("standard library of Python 3.")
    assert told["licence"] == "PSF-2.0"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"samples": 0}, "samples must be a whole number of at least 1, given 0"),
        ({"tokens": 3}, "tokens must be a whole number of at least 4, given 3"),
        ({"tokens": -1}, "tokens must be a whole number of at least 4, given -1"),
        ({"seed": -1}, "seed must be a whole number of at least 0, given -1"),
    ],
)
def test_numbers_of_no_use_are_refused(three_texts, options, message):
    with pytest.raises(InputError, match=message):
        load_samples(BYTES, three_texts, **options)


def test_a_text_shorter_than_one_window_is_refused(three_texts):
    with pytest.raises(InputError, match="3 documents gave 0 windows of 64 tokens, 7 were asked"):
        load_samples(BYTES, three_texts, samples=7, tokens=64)


def test_text_for_a_model_without_tokenizer_is_refused(three_texts):
    model = SimpleNamespace(name="pythia", tokenizer=None, config=SimpleNamespace(d_vocab=9))
    with pytest.raises(InputError, match=r"pythia has no tokenizer.*\.npy"):
        load_samples(model, three_texts)


def test_missing_files_folders_and_unknown_kinds_are_named(tmp_path):
    with pytest.raises(InputError, match=r"no such file: .*none\.npy"):
        load_samples(BYTES, tmp_path / "none.npy")
    with pytest.raises(InputError, match=r"no such file: .*none\.txt"):
        load_samples(BYTES, tmp_path / "none.txt")
    with pytest.raises(InputError, match="is a folder"):
        load_samples(BYTES, tmp_path)
    (tmp_path / "x.csv").write_text("text")
    with pytest.raises(InputError, match=r"allowed: \.txt, \.jsonl, \.parquet, \.npy"):
        load_samples(BYTES, tmp_path / "x.csv")


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (np.zeros((2, 8)), r"holds float64 of shape \(2, 8\).*integers"),
        (np.zeros(8, int), r"holds int64 of shape \(8,\)"),
        (np.zeros((2, 8), bool), "holds bool"),
        (np.array([[1, "a"]], object), "no readable .npy file"),
        (np.zeros((2, 6), int), "2 rows of 6 tokens, but windows of 8"),
        (np.zeros((0, 8), int), "0 rows of 8 tokens"),
        (np.full((1, 8), 257), r"token id 257 is out of range.*0 … 256"),
        (np.full((1, 8), -2), "token id -2 is out of range"),
    ],
)
def test_ids_of_no_use_are_refused(tmp_path, ids, message):
    np.save(tmp_path / "ids.npy", ids)
    with pytest.raises(InputError, match=message):
        load_samples(BYTES, tmp_path / "ids.npy", tokens=8)


def test_a_damaged_npy_file_is_refused(tmp_path):
    (tmp_path / "ids.npy").write_bytes(b"\x93NUMPY nothing")
    with pytest.raises(InputError, match=r"no readable \.npy file"):
        load_samples(BYTES, tmp_path / "ids.npy")


def test_a_tokenizer_with_more_ids_than_the_model_is_refused(three_texts):
    model = SimpleNamespace(name="m", tokenizer=BYTES, config=SimpleNamespace(d_vocab=20))
    with pytest.raises(InputError, match=r"out of range: the model knows the ids 0 … 19"):
        load_samples(model, three_texts, tokens=8)
