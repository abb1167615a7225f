"""Foreign models on the command line: every kind of target, and what is said of wrong ones."""

import json
import tomllib

import numpy as np
import pandas as pd
import pytest
import torch
import transformers

from loopscope.models.opening.loading import load
from tests.program import called, without_figures

SIZES = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4,
    "max_position_embeddings": 64,
}  # fmt: skip
MY = """
import torch
from torch import nn


class Block(nn.Module):
    def __init__(self, d):
        super().__init__()
        self.norm, self.inner = nn.LayerNorm(d), nn.Linear(d, d)

    def forward(self, x):
        return x + torch.tanh(self.inner(self.norm(x)))


class Looped(nn.Module):
    def __init__(self, K=3, d=32):
        super().__init__()
        self.embed, self.K = nn.Embedding(61, d), K
        self.pre = nn.ModuleList([Block(d)])
        self.core = nn.ModuleList([Block(d), Block(d)])
        self.last = nn.ModuleList([Block(d)])
        self.norm, self.head = nn.LayerNorm(d), nn.Linear(d, 61, bias=False)

    def forward(self, ids):
        x = self.pre[0](self.embed(ids))
        for _ in range(self.K):
            for block in self.core:
                x = block(x)
        return self.head(self.norm(self.last[0](x)))


def mine():
    torch.manual_seed(0)
    return Looped()


def fails():
    raise RuntimeError("two\\nlines")


class Asked(Looped):
    def forward(self, ids, n_loops):
        self.K = n_loops
        return super().forward(ids)


def pair():
    return Asked(), (torch.arange(12).view(2, 6), 4)
"""


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """A folder with a model of one's own, three saved by transformers, and token ids."""
    folder = tmp_path_factory.mktemp("targets")
    (folder / "my_looped.py").write_text(MY)
    np.save(folder / "ids.npy", np.random.default_rng(0).integers(0, 61, (4, 16)))
    torch.manual_seed(0)
    made = {
        "llama": transformers.LlamaForCausalLM(
            transformers.LlamaConfig(num_hidden_layers=4, **SIZES)
        ),
        "albert": transformers.AlbertForMaskedLM(
            transformers.AlbertConfig(num_hidden_layers=3, embedding_size=16, **SIZES)
        ),
        "hrm": transformers.HrmTextForCausalLM(
            transformers.HrmTextConfig(
                num_hidden_layers=1, num_layers_per_stack=1, head_dim=8, **SIZES
            )
        ),
    }
    for name, model in made.items():
        model.save_pretrained(folder / name)
    return folder


@pytest.fixture
def run(here, monkeypatch, capsys):
    """Call the program in that folder; returns exit code, stdout, stderr."""
    monkeypatch.chdir(here)

    def call(*words, draw=True):
        if not draw:
            without_figures(monkeypatch)
        return called(monkeypatch, capsys, *words)

    return call


SMALL = ["--data", "ids.npy", "--samples", 4, "--tokens", 16]


def test_inspect_shows_a_loop_as_a_tree(run):
    code, told, _ = run("inspect", "my_looped.py:mine")
    assert code == 0
    lines = [line.strip("│├└─ \xa0") for line in told.splitlines()]
    for line in (
        "1+2R3+1  (found in a traced forward pass, unrolled depth 8)",
        "loop core: K = 3, the same modules are called again",
        "core.0…1",
        "h(t): what core.0 is given, width 32",
        "h_m(t): what core.1 gives, width 32",
        "shared by iterations: 2,240 parameters in 8 tensors",
        "number of iterations: attribute K (loops=n)",
        "unembedding: head",
    ):
        assert line in lines, told
    assert "loop.{t}.core.0.hook_in" in told
    assert not any(line != line.rstrip() for line in told.splitlines())


def test_inspect_shows_nested_loops_cut_gradients_and_counts(run):
    code, told, _ = run("inspect", "hrm")
    assert code == 0
    for word in (
        "0+(1R3+1)R2+0", "loop H: K = 2", "loop L: K = 6 (3 in each of 2 runs)", "H0.L0, H0.L1",
        "gradients are cut in H0.L0", "configuration H_cycles", "loop.H{t}.L{t}.hook_in",
    ):  # fmt: skip
        assert word in told, told
    _, told, _ = run("inspect", "hrm", "--loops", "H=3,L=2")
    assert "0+(1R2+1)R3+0" in told


def test_inspect_gives_json_and_every_address(run, here):
    _, told, _ = run("inspect", "albert", "--json", "--hooks")
    found = json.loads(told)
    assert found["map"]["layout"] == "0+1R3+0"
    assert found["hooks"] == list(load(here / "albert").hook_dict)
    _, told, _ = run("inspect", "albert", "--hooks")
    assert all(f"  {name}\n" in told for name in found["hooks"])
    assert "  loop.2.hook_out\n" in told


def test_the_spec_that_inspect_writes_gives_the_same_map(run, tmp_path):
    file = tmp_path / "spec.toml"
    code, told, _ = run("inspect", "my_looped.py:mine", "--write-spec", file)
    assert code == 0 and f"written: {file}" in told
    assert tomllib.loads(file.read_text())["core"] == ["core.0", "core.1"]
    _, told, _ = run("inspect", "my_looped.py:mine", "--spec", file, "--json")
    assert json.loads(told)["map"]["layout"] == "1+2R3+1"
    assert json.loads(told)["map"]["source"] == "spec"
    code, _, err = run("inspect", "my_looped.py:mine", "--write-spec", file)
    assert code == 2 and "is there already" in err


def test_a_wrong_guess_is_corrected_by_a_spec(run, tmp_path):
    (tmp_path / "each.toml").write_text('core = [["model.layers.1"], ["model.layers.2"]]')
    _, told, _ = run("inspect", "llama", "--spec", tmp_path / "each.toml", "--json")
    assert json.loads(told)["map"]["layout"] == "1+1+1+1"
    assert json.loads(told)["map"]["loops"][0]["K"] == 2


def test_figures_mixes_foreign_and_native_models(run, tmp_path):
    words = ["my_looped.py:mine", "mesh", "albert", "--out", tmp_path / "out", *SMALL]
    code, _, err = run("figures", *words)
    assert code == 0, err
    update = pd.read_parquet(tmp_path / "out" / "tables" / "update.parquet")
    assert list(update["model"].cat.categories) == ["mine", "mesh", "albert"]
    drawn = {path.stem for path in (tmp_path / "out" / "figures").iterdir()}
    assert {"fig3_update", "fig4_cka", "fig5_spectrum", "fig1_mine", "fig1_albert"} <= drawn


def test_compare_takes_layout_for_plain_stacks_and_loops_for_the_rest(run, tmp_path):
    words = ["llama", "my_looped:mine", "--layout", "1+2+1", "--out", tmp_path, *SMALL]
    code, _, err = run("compare", *words, draw=False)
    assert code == 0, err
    update = pd.read_parquet(tmp_path / "tables" / "update.parquet")
    blocks = {m: set(update[update["model"].eq(m)]["block"]) for m in ("llama", "mine")}
    assert blocks["llama"] == {"prelude", "core1", "coda"}
    assert blocks["mine"] == {"prelude", "core1", "core2", "core3", "coda"}
    words = ["base", "my_looped.py:mine", "vanilla", "--loops", 2, "--out", tmp_path, *SMALL]
    code, _, err = run("compare", *words, draw=False)
    assert code == 0, err
    update = pd.read_parquet(tmp_path / "tables" / "update.parquet")
    blocks = {m: set(update[update["model"].eq(m)]["block"]) for m in ("base", "mine")}
    assert blocks["base"] == blocks["mine"] == {"prelude", "core1", "core2", "coda"}
    assert "core3" in set(update[update["model"].eq("vanilla")]["block"])  # it has no loop


def test_two_factories_of_one_name_are_told_apart(run, here, tmp_path):
    (here / "other_looped.py").write_text(MY)
    names = ["my_looped.py:mine", "other_looped.py:mine"]
    code, _, err = run("compare", *names, "--out", tmp_path, *SMALL, draw=False)
    assert code == 0, err
    signs = pd.read_csv(tmp_path / "tables" / "signs.csv")
    assert list(signs["model"].unique()) == names


def test_params_counts_what_iterations_share(run, here):
    _, told, _ = run("params", "my_looped.py:mine", "--json")
    count = json.loads(told)[0]
    block = 2 * 32 + 32 * 32 + 32
    assert count["total"] == 2 * 61 * 32 + 4 * block + 2 * 32
    assert count["non_embedding"] == 4 * block + 2 * 32
    assert count["shared"] == 2 * block and count["layout"] == "1+2R3+1"
    _, told, _ = run("params", "llama")
    raw = transformers.LlamaForCausalLM.from_pretrained(here / "llama")
    assert f"{sum(p.numel() for p in raw.parameters()):,}" in told


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["inspect", "org/nowhere"], "HF_HUB_OFFLINE"),
        (["inspect", "nowhere"], "org/name, module:factory and file.py:factory"),
        (["inspect", "my_looped.py"], "my_looped.py:FACTORY"),
        (["inspect", "my_looped.py:fails"], "RuntimeError: two lines (my_looped.py, line 38)"),
        (["figures", "my_looped.py:fails"], "RuntimeError"),
        (["figures", "my_looped.py:mine", "absent.py:make"], "no file absent.py"),
        (["figures", "my_looped.py:mine", "--layout", "1+1+1"], "regroups vanilla models"),
        (
            ["figures", "albert", "hrm", "--layout", "1+1+1", *map(str, SMALL)],
            "regroups vanilla models",
        ),
        (["figures", "base", "--spec", "{tmp}/s.toml"], "spec apply to foreign models"),
        (["figures", "base", "--device-map", "auto"], "device_map apply to foreign models"),
        (["figures", "base", "--loops", "x"], "--loops takes a number"),
        (["figures", "mesh", "--loops", "9"], "routers of its own"),
        (["figures", "--from-tables", "{tmp}", "--loops", "3"], "leave out --loops"),
        (["figures", "my_looped.py:mine"], "has no tokenizer"),
        (["inspect", "llama", "--loops", "2"], "no loop"),
        (["inspect", "hrm", "--loops", "M=2"], "unknown loop 'M'"),
        (["inspect", "llama", "--spec", "{tmp}/no.toml"], "cannot be read"),
        (["inspect", "llama", "--spec", "{tmp}/s.toml"], "transformer.core"),
        (["inspect", "llama", "--device", "cpu", "--device-map", "auto"], "exclude each other"),
        (["inspect", "base", "--write-spec", "{tmp}/new.toml"], "native model"),
        (["inspect", "llama", "--dtype", "int8"], "unknown dtype"),
        (["params", "my_looped.py:mine", "--layout", "4"], "not both"),
        (["params", "mesh", "--spec", "{tmp}/s.toml"], "takes no spec"),
    ],
)
def test_errors_are_one_line_and_exit_code_2(run, tmp_path, words, message):
    (tmp_path / "s.toml").write_text('core = ["transformer.core"]')
    words = [word.format(tmp=tmp_path) for word in words]
    if words[0] == "figures":
        words += ["--out", str(tmp_path / "out")]
    code, _, err = run(*words)
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert code == 2 and len(lines) == 1 and message in lines[0], err
    assert "Traceback" not in err


def test_every_command_takes_an_example_as_its_message_says(run, here, tmp_path):
    code, _, err = run("inspect", "my_looped.py:Asked")
    assert code == 2 and "forward needs n_loops too" in err
    assert "--loops 4" in err and "--example FILE" in err and "returns (model, example)" in err
    file = tmp_path / "example.pt"
    torch.save((torch.arange(12).view(2, 6), 4), file)
    for words in (
        ["my_looped.py:pair"],
        ["my_looped.py:Asked", "--loops", 4],
        ["my_looped.py:Asked", "--example", file],
    ):
        code, told, err = run("inspect", *words)
        assert code == 0 and "1+2R4+1" in told and "n_loops" in told, err
        assert run("params", *words)[0] == 0
    for command in ("figures", "compare"):
        out = tmp_path / command
        words = ["my_looped.py:Asked", "--example", file, "--out", out, *SMALL]
        code, told, err = run(command, *words, draw=False)
        assert code == 0, err
        assert pd.read_parquet(out / "tables" / "update.parquet")["t"].max() >= 3
    code, _, err = run("inspect", "my_looped.py:mine", "--example", tmp_path / "none.npy")
    assert code == 2 and "is no file" in err
    code, _, err = run("inspect", "mesh", "--example", file)
    assert code == 2 and "takes no example" in err
