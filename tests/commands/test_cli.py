"""The command line as a user has it: what it writes, what it says, how it fails."""

import json
from dataclasses import fields

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors import safe_open

from loopscope.analysis.collapse import SIGNS
from loopscope.commands.train_command import FLAGS
from loopscope.models.native.checkpoint import read_tokenizer, save
from loopscope.models.opening.loading import load
from loopscope.models.opening.targets import zoo_folder
from loopscope.text.windows import heldout_documents
from loopscope.training import TrainOptions
from tests.conftest import make_model


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Three small checkpoints with the shipped tokenizer."""
    folder = tmp_path_factory.mktemp("runs")
    tokenizer = read_tokenizer(zoo_folder() / "base" / "tokenizer.json")
    for variant in ("base", "mesh", "vanilla"):
        layout = "1+1+1+1" if variant == "vanilla" else "1+1R2+1"
        model = make_model(variant, layout, d_vocab=tokenizer.get_vocab_size())
        model.tokenizer = tokenizer
        save(model, folder / f"my-{variant}")
    return folder


SMALL = ["--samples", 6, "--tokens", 24]


def test_figures_writes_figures_tables_and_provenance(run, checkpoints, tmp_path):
    out = tmp_path / "out"
    names = [checkpoints / "my-base", checkpoints / "my-mesh"]
    code, told, _ = run("figures", *names, "--out", out, *SMALL)
    assert code == 0
    drawn = {path.name for path in (out / "figures").iterdir()}
    stems = {"fig3_update", "fig4_cka", "fig5_spectrum", "fig1_my-base", "fig1_my-mesh"}
    stems |= {"routers_my-mesh", "fig4_cka_debiased", "rank"}
    assert drawn == {f"{stem}.{kind}" for stem in stems for kind in ("png", "pdf")}
    assert "not drawn: routers_my-base, my-base: it has no memory slots" in told
    provenance = json.loads((out / "provenance.json").read_text())
    mesh = provenance["models"]["my-mesh"]
    assert mesh["config"]["layout"] == "1+1R2+1" and mesh["samples"]["samples"] == 6
    update = pd.read_parquet(out / "tables" / "update.parquet")
    assert set(update["block"]) == {"prelude", "core1", "core2", "coda"}
    assert update["sample"].nunique() == 6


def test_figures_redraws_from_tables_without_a_model(run, checkpoints, tmp_path):
    names = [checkpoints / "my-mesh", checkpoints / "my-base"]  # not the alphabet's order
    run("figures", *names, "--out", tmp_path / "a", *SMALL)
    code, _, _ = run("figures", "--from-tables", tmp_path / "a", "--out", tmp_path / "b")
    assert code == 0
    for path in (tmp_path / "a" / "figures").glob("*.png"):
        assert (tmp_path / "b" / "figures" / path.name).read_bytes() == path.read_bytes()


def test_compare_prints_one_row_per_checkpoint(run, checkpoints, tmp_path):
    out = tmp_path / "out"
    names = [checkpoints / f"my-{v}" for v in ("base", "mesh", "vanilla")]
    code, told, _ = run("compare", *names, "--out", out, *SMALL, draw=False)
    assert code == 0
    for word in ("my-base", "my-mesh", "my-vanilla", "no loop", "skew", "effective rank"):
        assert word in told
    signs = pd.read_csv(out / "tables" / "signs.csv")
    twins = [f"my-{v}@init" for v in ("base", "mesh", "vanilla")]
    assert list(signs["model"].unique()) == [path.name for path in names] + twins
    assert len(signs) == 6 * len(SIGNS)
    loss = pd.read_parquet(out / "tables" / "loss.parquet")
    shown = signs.query("model == 'my-mesh' and sign == 'loss'")["mean"].item()
    assert shown == pytest.approx(loss[loss["model"].eq("my-mesh")]["value"].mean())


def test_fewer_windows_than_asked_for_are_said(run, checkpoints, tmp_path):
    (tmp_path / "a.txt").write_text(heldout_documents()[0].text[:400])
    words = [checkpoints / "my-base", "--data", tmp_path / "a.txt", "--tokens", 24]
    code, told, _ = run("compare", *words, "--out", tmp_path / "out", draw=False)
    assert code == 0
    assert "note: my-base: the text gave" in told and "windows of 500 asked for" in told


def test_a_diverged_checkpoint_does_not_spoil_the_others(run, checkpoints, tmp_path):
    model = load(checkpoints / "my-base")
    with torch.no_grad():
        model.embed.weight.fill_(float("nan"))
    save(model, tmp_path / "broken")
    names = [tmp_path / "broken", checkpoints / "my-mesh"]
    code, told, err = run("compare", *names, "--out", tmp_path / "out", *SMALL)
    assert code == 0, err
    assert "note: broken: NaN or infinite values in 6 samples of table loss" in told
    assert (tmp_path / "out" / "figures" / "fig5_spectrum.png").exists()
    signs = pd.read_csv(tmp_path / "out" / "tables" / "signs.csv").set_index(["model", "sign"])
    assert signs.loc[("broken", "loss"), "n"] == 0
    assert signs.loc[("my-mesh", "loss"), "n"] == 6


def test_without_a_command_the_help_is_shown(run):
    code, told, _ = run()
    assert code == 2 and "figures" in told and "Usage" in told


def test_untrained_twins_can_be_named_everywhere(run, checkpoints, tmp_path):
    twin = f"{checkpoints / 'my-mesh'}@init"
    model = checkpoints / "my-mesh"
    code, _, _ = run("compare", model, twin, "--out", tmp_path, *SMALL, draw=False)
    signs = (tmp_path / "tables" / "signs.csv").read_text()
    assert code == 0 and signs.count("my-mesh@init") == len(SIGNS)
    code, told, _ = run("inspect", twin)
    assert code == 0 and "untrained twin, seed 0" in told


def test_a_vanilla_model_is_grouped_by_layout(run, checkpoints, tmp_path):
    model = checkpoints / "my-vanilla"
    words = [model, "--layout", "1+2+1", "--out", tmp_path, *SMALL]
    code, _, _ = run("figures", *words, draw=False)
    assert code == 0
    update = pd.read_parquet(tmp_path / "tables" / "update.parquet")
    assert set(update["block"]) == {"prelude", "core1", "coda"}


def test_a_plain_stack_names_what_does_not_apply(run, checkpoints, tmp_path):
    code, told, _ = run(
        "figures", checkpoints / "my-vanilla", "--layout", "4", "--out", tmp_path, *SMALL
    )
    assert code == 0 and "it has no loop" in told


def test_inspect_shows_layout_states_and_hooks(run, checkpoints):
    code, told, _ = run("inspect", checkpoints / "my-mesh")
    assert code == 0
    for word in ("1+1R2+1", "h_emb, h0, h1, h2, h_out", "loop.{t}.hook_memory", "core2: block 2"):
        assert word in told
    code, told, _ = run("inspect", checkpoints / "my-mesh", "--json", "--hooks")
    assert "blocks.3.attn.hook_pattern" in json.loads(told)["hooks"]


def test_params_prints_the_papers_table_and_answers_for_any_model(run, checkpoints):
    code, told, _ = run("params")
    assert code == 0 and "1,020,231,710" in told and "11,327,027,200" in told
    asked = ["--layout", "4+8R2+4", "--variant", "mesh", "--d-model", 2048, "--vocab", 52352]
    _, told, _ = run("params", *asked, "--json")
    assert json.loads(told)[0]["total"] == 1_020_231_710
    assert json.loads(told)[0]["router"] == 61_470
    _, told, _ = run("params", checkpoints / "my-mesh", "--json")
    with safe_open(checkpoints / "my-mesh" / "model.safetensors", "pt") as file:
        total = sum(file.get_tensor(name).numel() for name in file.keys())  # noqa: SIM118
    assert json.loads(told)[0]["total"] == total


def test_data_may_be_text_lines_or_ids(run, checkpoints, tmp_path):
    text = "\n".join(document.text for document in heldout_documents()[:5])
    (tmp_path / "a.txt").write_text(text)
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": text}) + "\n")
    pd.DataFrame({"text": [text]}).to_parquet(tmp_path / "a.parquet")
    ids = torch.randint(2048, (7, 30)).numpy()
    np.save(tmp_path / "a.npy", ids)
    for kind in ("txt", "jsonl", "parquet", "npy"):
        out = tmp_path / kind
        data = tmp_path / f"a.{kind}"
        words = [checkpoints / "my-base", "--no-twins", "--data", data, "--out", out, *SMALL]
        code, _, err = run("compare", *words, draw=False)
        assert code == 0, err
        loss = pd.read_parquet(out / "tables" / "loss.parquet")
        assert len(loss) == 6 and loss["value"].between(3, 20).all()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["figures", "nowhere"], "unknown model 'nowhere'"),
        (["figures", "{mesh}", "{mesh}"], "given twice"),
        (["figures", "{mesh}", "--data", "{tmp}/no.txt"], "no.txt"),
        (["figures", "{mesh}", "--data", "{tmp}/empty.txt"], "empty"),
        (["figures", "{mesh}", "--data", "{tmp}/short.txt"], "too short"),
        (["figures", "{mesh}", "--data", "{tmp}/big.npy"], "0 … 2047"),
        (["figures", "{mesh}", "--data", "{tmp}/x.csv"], ".csv"),
        (["figures", "{mesh}", "--samples", "0"], "samples"),
        (["figures", "{mesh}", "--tokens", "2"], "tokens"),
        (["figures", "{mesh}", "--batch-size", "0"], "batch_size"),
        (["figures", "{mesh}", "--device", "cuda:9"], "present here: cpu"),
        (["figures", "{mesh}", "--dtype", "int8"], "unknown dtype 'int8'"),
        (["figures", "{mesh}", "--layout", "2+2"], "Allowed are"),
        (["figures", "{mesh}", "--layout", "1+2+1"], "regroups vanilla models"),
        (["figures", "{mesh}", "--out", "{tmp}/short.txt/x"], "cannot write to"),
        (["figures", "--from-tables", "{tmp}"], "holds no tables"),
        (["compare"], "needs checkpoints"),
        (["params", "--layout", "4+8R2+4", "--variant", "mosh"], "did you mean mesh"),
        (["params", "--variant", "mesh"], "need a --layout"),
        (["params", "--layout", "12", "--variant", "mesh"], "needs core iterations"),
        (["inspect", "{tmp}"], "without config.json"),
        (["train", "--out", "{tmp}/t", "--variants", "bass"], "did you mean base"),
        (["train", "--out", "{tmp}/t", "--tokens", "0"], "at least 1"),
        (["train", "--out", "{tmp}/t", "--data", "{tmp}/no.txt"], "no.txt"),
        (["figures", "{mesh}", "--drop-first", "22", "--tokens", "24"], "at least 4"),
        (["figures", "{mesh}", "--samples", "many"], "Invalid value for '--samples'"),
        (["figures", "{mesh}", "--sample", "3"], "--samples"),
        (["figurs"], "No such command 'figurs'"),
        (["inspect"], "Missing argument"),
        (["figures", "{mesh}@init", "--seed", str(2**70)], "seed must lie in"),
        (["train", "--out", "{tmp}/t", "--seed", "-1"], "seed must lie in"),
        (["compare", "{mesh}", "--data", "{tmp}/half.jsonl"], "half.jsonl, line 1 has half of"),
        (["params", "--d-model", "128"], "need a --layout"),
        (["params", "{mesh}", "--vocab", "3"], "not both"),
        (["figures", "--from-tables", "{tmp}", "--layout", "3"], "leave out --layout"),
    ],
)
def test_errors_of_the_user_are_one_line_and_exit_code_2(
    run, checkpoints, tmp_path, words, message
):
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "short.txt").write_text("too little")
    (tmp_path / "x.csv").write_text("a,b")
    (tmp_path / "half.jsonl").write_text('{"text": "a\\ud800b"}\n')
    np.save(tmp_path / "big.npy", np.full((3, 300), 2048))
    names = {"mesh": checkpoints / "my-mesh", "tmp": tmp_path}
    words = [word.format(**names) for word in words]
    if "--out" not in words and words[0] in ("figures", "compare"):
        words += ["--out", str(tmp_path / "out")]
    code, _, err = run(*words)
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert code == 2 and len(lines) == 1 and message in lines[0], err
    assert "Traceback" not in err


def test_train_writes_checkpoints_that_load(run, tmp_path):
    (tmp_path / "a.txt").write_text("\n".join(d.text for d in heldout_documents()[:40]))
    code, told, err = run(
        "train", "--out", tmp_path / "runs", "--variants", "base,mesh,vanilla", "--data",
        tmp_path / "a.txt", "--tokens", 512, "--d-model", 32, "--vocab", 300, "--seq-len", 32,
        "--batch-size", 4, "--layout", "1+1R2+1",
    )  # fmt: skip
    assert code == 0, err
    assert told.count("validation loss") == 3
    code, told, _ = run("inspect", tmp_path / "runs" / "vanilla")
    assert code == 0 and "1+1+1+1" in told and "512 tokens" in told


def test_every_declared_option_of_training_has_its_flag():
    declared = [entry.name for entry in fields(TrainOptions) if entry.metadata["flag"]]
    assert sorted(FLAGS) == sorted(declared)


def test_help_names_every_command(run):
    code, told, _ = run("--help")
    assert code == 0
    assert all(word in told for word in ("figures", "compare", "inspect", "params", "train"))
