"""The corpus: which texts, in which order, and what is held out."""

import json

import pyarrow as pa
import pytest
from pyarrow import parquet

from loopscope.errors import InputError
from loopscope.text.corpus import (
    END_OF_TEXT,
    HELDOUT,
    is_heldout,
    load_corpus,
    read_documents,
    stdlib_corpus,
    train_tokenizer,
)

HELD_NAMES = ["subprocess.py", "json/encoder.py"]  # fixed for ever: the shipped samples rest on it
TRAIN_NAMES = ["abc.py", "json/decoder.py"]


@pytest.fixture
def library(tmp_path):
    """A small standard library with everything that must be left out."""

    def put(name, data):
        path = tmp_path / "lib" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data if isinstance(data, bytes) else data.encode())

    for name in HELD_NAMES + TRAIN_NAMES:
        put(name, f"# the text of {name}\n")
    put("test/test_re.py", "line one\r\nline two\r\n")
    put("zz_copy.py", "# the text of abc.py\n")
    put("latin.py", b"# caf\xe9\n")
    put("empty.py", "\n")
    put("notes.txt", "no Python")
    for name in (
        "site-packages/pip/x.py",
        "dist-packages/y.py",
        "__pycache__/z.py",
        "encodings/cp037.py",
        "pydoc_data/topics.py",
        "lib2to3/tests/data/d.py",
        "html/entities.py",
        "_sysconfigdata__linux.py",
        "config-3.11-x86_64/python-config.py",
        "sitecustomize.py",
    ):
        put(name, f"# {name} is no text to learn from\n")
    return tmp_path / "lib"


def names(documents):
    return [document.path for document in documents]


def test_the_corpus_is_the_librarys_own_text_in_path_order(library):
    corpus = stdlib_corpus(library)
    assert names(corpus.train) == [*TRAIN_NAMES, "test/test_re.py"]
    assert names(corpus.heldout) == sorted(HELD_NAMES)
    assert corpus.train[0].text == "# the text of abc.py\n"
    assert corpus.train[-1].text == "line one\nline two\n"


def test_the_path_alone_decides_what_is_held_out(library):
    before = stdlib_corpus(library)
    for name in HELD_NAMES + TRAIN_NAMES:
        (library / name).write_text(f"another text for {name}")
    after = stdlib_corpus(library)
    assert names(after.heldout) == names(before.heldout) == sorted(HELD_NAMES)
    assert [is_heldout(name) for name in HELD_NAMES] == [True, True]
    assert [is_heldout(name) for name in TRAIN_NAMES] == [False, False]


def test_the_held_out_share_is_as_stated():
    held = sum(is_heldout(f"module_{i}.py") for i in range(20_000)) / 20_000
    assert held == pytest.approx(HELDOUT, abs=0.01)


def test_the_hash_follows_text_and_path_but_not_the_place_of_the_library(library, tmp_path):
    first = stdlib_corpus(library).sha256
    moved = library.rename(tmp_path / "elsewhere")
    assert stdlib_corpus(moved).sha256 == first
    (moved / "subprocess.py").write_text("# another text\n")
    changed = stdlib_corpus(moved).sha256
    (moved / "subprocess.py").rename(moved / "subprocesses.py")
    assert len({first, changed, stdlib_corpus(moved).sha256}) == 3


def test_the_running_python_holds_enough_text_and_the_splits_share_none():
    corpus = load_corpus()
    told = corpus.provenance
    assert told["train"]["characters"] > 4_000_000
    assert told["heldout"]["characters"] > 200_000
    assert not {document.text for document in corpus.train} & {d.text for d in corpus.heldout}
    assert all(is_heldout(name) for name in names(corpus.heldout))
    assert not any(is_heldout(name) for name in names(corpus.train))


def test_a_folder_without_python_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"no Python source text.*\.jsonl"):
        stdlib_corpus(tmp_path)


def test_jsonl_and_parquet_give_the_same_documents(tmp_path):
    texts = [f"text number {i}" for i in range(60)]
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n\n".join(json.dumps({"text": t, "id": 1}) for t in texts))
    table = tmp_path / "rows.parquet"
    parquet.write_table(pa.table({"id": range(60), "text": texts}), table)
    by_suffix = [load_corpus(path) for path in (rows, table)]
    for corpus in by_suffix:
        assert {d.text for d in corpus.train} | {d.text for d in corpus.heldout} == set(texts)
        assert [d.text for d in corpus.train] == [t for t in texts if not is_heldout(t)]
        assert corpus.heldout
    assert names(read_documents(table))[:2] == ["rows.parquet#1", "rows.parquet#2"]
    assert names(read_documents(rows))[:2] == ["rows.jsonl#1", "rows.jsonl#3"]


def test_of_one_long_text_the_end_is_held_out(tmp_path):
    text = "".join(f"line {i}\n" for i in range(1000))
    path = tmp_path / "book.txt"
    path.write_text(text)
    corpus = load_corpus(path)
    head, tail = corpus.train[0].text, corpus.heldout[0].text
    assert head + tail == text
    assert head.endswith("\n")
    assert len(tail) == pytest.approx(HELDOUT * len(text), rel=0.05)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "is empty"),
        ("a.txt", b" \n", "holds no text"),
        ("a.txt", b"caf\xe9", r"not UTF-8 text \(byte 3\)"),
        ("a.csv", b"text", r"suffix is '.csv'; allowed: .txt, .jsonl, .parquet"),
        ("a.jsonl", b'{"text": "x"}\n{"text": ', r"line 2 is not JSON"),
        ("a.jsonl", b'{"text": "x"}\n\n{"body": "y"}', r"line 3 has no string \"text\".*'body'"),
        ("a.jsonl", b"[1]", r"line 1 has no string \"text\".*list"),
        ("a.jsonl", b'{"text": 3}', r"line 1 has no string \"text\""),
        ("a.jsonl", b'{"text": ""}', "holds no text"),
        ("a.jsonl", b'{"text": "\xff"}', "line 1 is not JSON"),
        ("a.parquet", b"not parquet", "is not a Parquet file"),
    ],
)
def test_a_file_of_no_use_is_refused(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(InputError, match=message):
        list(read_documents(path))


def test_missing_files_folders_and_wrong_columns_are_named(tmp_path):
    with pytest.raises(InputError, match=r"no such file: nowhere.txt \(looked for /.*nowhere.txt"):
        list(read_documents("nowhere.txt"))
    with pytest.raises(InputError, match="is a folder"):
        list(read_documents(tmp_path))
    path = tmp_path / "a.parquet"
    parquet.write_table(pa.table({"body": ["x"], "id": [1]}), path)
    with pytest.raises(InputError, match="no column 'text'; its columns are body, id"):
        list(read_documents(path))
    parquet.write_table(pa.table({"text": [1]}), path)
    with pytest.raises(InputError, match="holds int64; it must hold strings"):
        list(read_documents(path))


def test_the_tokenizer_is_deterministic_and_round_trips_any_text():
    texts = ["def f(x):\n    return x + 1\n" * 9, "for y in range(10):\n\tprint(y)\n" * 9]
    first, second = (train_tokenizer(texts, 280) for _ in range(2))
    assert first.to_str() == second.to_str()
    assert first.get_vocab_size() == 280
    assert first.token_to_id(END_OF_TEXT) == 0
    for text in (texts[0], "naïve – 言語 🐍\r\n\x00"):
        assert first.decode(first.encode(text).ids) == text
    assert len(first.encode(texts[0]).ids) < len(texts[0])


def test_a_vocabulary_smaller_than_the_bytes_is_refused():
    with pytest.raises(InputError, match=r"256 is too small .* at least 257"):
        train_tokenizer(["x"], 256)
