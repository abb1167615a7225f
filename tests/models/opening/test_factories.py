"""Models from the user's own Python: every factory that may be, and what is said of wrong ones."""

import sys
import warnings

import numpy as np
import pytest
import torch
import transformers
from tokenizers import Tokenizer
from torch import nn

from loopscope.errors import InputError
from loopscope.models.native.loop_model import LoopModel
from loopscope.models.opening.loading import load, peek
from loopscope.models.opening.targets import zoo_folder
from loopscope.models.wrapped.families import family_spec

MY = """
import torch
from torch import nn
from my_parts import Block


class Looped(nn.Module):
    def __init__(self, K=3):
        super().__init__()
        self.embed, self.K = nn.Embedding(61, 16), K
        self.core = nn.ModuleList([Block(16)])
        self.head = nn.Linear(16, 61, bias=False)

    def forward(self, ids):
        x = self.embed(ids)
        for _ in range(self.K):
            for block in self.core:
                x = block(x)
        return self.head(x)


def make():
    torch.manual_seed(0)
    return Looped()


def fails():
    return Looped().no_such_part


def number():
    return 3


def needs(K):
    return Looped(K)


ready = Looped(4)
table = {"a": 1}
"""
PARTS = """
import torch
from torch import nn

STEP = 1.0


class Block(nn.Module):
    def __init__(self, d):
        super().__init__()
        self.inner = nn.Linear(d, d)

    def forward(self, x):
        return x + STEP * torch.tanh(self.inner(x))
"""


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """A folder with my_model.py and what it imports, as the current folder."""
    (tmp_path / "my_model.py").write_text(MY)
    (tmp_path / "my_parts.py").write_text(PARTS)
    monkeypatch.chdir(tmp_path)
    path = list(sys.path)
    yield tmp_path
    assert sys.path == path
    for name in ("my_model", "my_parts", "broken"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("target", ["my_model.py:make", "my_model:make", "{here}/my_model.py:make"])
def test_a_factory_gives_a_model_under_its_name(mine, target, tokens):
    model = load(target.format(here=mine))
    assert model.name == "make" and str(model.map) == "0+1R3+0"
    raw = model.module
    x = raw.embed(tokens)
    for _ in range(3):
        x = x + torch.tanh(raw.core[0].inner(x))
    assert torch.equal(model(tokens), raw.head(x))


def test_a_class_and_a_ready_module_are_taken_too(mine):
    assert load("my_model.py:Looped").config.K == 3
    assert load("my_model.py:ready").config.K == 4


def test_dtype_is_the_factorys_unless_asked_for(mine):
    (mine / "half.py").write_text("from my_model import make\ndef half(): return make().bfloat16()")
    assert load("half.py:half").module.head.weight.dtype == torch.bfloat16
    assert load("half.py:half", dtype="float32").module.head.weight.dtype == torch.float32
    assert load("my_model.py:make", dtype="float64").module.head.weight.dtype == torch.float64


def test_files_of_the_same_name_in_other_folders_do_not_mix(mine, tokens):
    there = mine / "there"
    there.mkdir()
    (there / "my_model.py").write_text(MY)
    (there / "my_parts.py").write_text(PARTS.replace("STEP = 1.0", "STEP = 0.0"))
    one, two = load("my_model.py:make"), load("there/my_model.py:make")
    assert not torch.allclose(one(tokens), two(tokens))
    assert torch.equal(two(tokens), two.module.head(two.module.embed(tokens)))
    (mine / "my_parts.py").write_text(PARTS.replace("STEP = 1.0", "STEP = 0.0"))
    assert torch.equal(load("my_model.py:make")(tokens), two(tokens))  # edited meanwhile


def test_a_tokenizer_on_the_module_is_used(mine):
    path = zoo_folder() / "mesh" / "tokenizer.json"
    (mine / "with_text.py").write_text(
        "from my_model import make\n"
        "from tokenizers import Tokenizer\n"
        "from transformers import PreTrainedTokenizerFast\n"
        "def make_one():\n"
        "    model = make()\n"
        f"    model.tokenizer = Tokenizer.from_file({str(path)!r})\n"
        "    return model\n"
        "def make_fast():\n"
        "    model = make_one()\n"
        "    model.tokenizer = PreTrainedTokenizerFast(tokenizer_object=model.tokenizer)\n"
        "    return model\n"
        "def make_other():\n"
        "    model = make_one()\n"
        "    model.tokenizer = str.split\n"
        "    return model\n"
    )
    for name in ("make_one", "make_fast"):
        assert isinstance(load(f"with_text.py:{name}").tokenizer, Tokenizer)
    with pytest.warns(UserWarning, match="token ids only"):
        load("with_text.py:make_other")


def test_a_factory_may_give_a_loopscope_model(mine):
    (mine / "ours.py").write_text(
        "import loopscope as ls\n"
        "from my_model import make\n"
        "def native(): return ls.load('base')\n"
        "def wrapped(): return ls.wrap(make(), name='inner')\n"
    )
    assert isinstance(load("ours.py:native"), LoopModel)
    assert load("ours.py:native", loops=2).config.K == 2
    wrapped = load("ours.py:wrapped", loops=5)
    assert wrapped.config.K == 5 and wrapped.name == "wrapped"
    with pytest.raises(InputError, match="takes no spec"):
        load("ours.py:native", spec={"core": ["core.0"]})


def test_options_apply_to_a_wrapped_model_that_a_factory_gives(mine, tokens):
    (mine / "ours.py").write_text(
        "import loopscope as ls\n"
        "from my_model import make\n"
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "def wrapped(): return ls.wrap(make(), name='inner')\n"
        "def stack(): return ls.wrap(LlamaForCausalLM(LlamaConfig(\n"
        "    vocab_size=61, hidden_size=16, intermediate_size=24, num_attention_heads=2,\n"
        "    num_hidden_layers=4)))\n"
    )
    by_spec = load("ours.py:wrapped", spec={"state": {"output": "core.0.inner"}})
    assert (by_spec.map.source, by_spec.name) == ("spec", "wrapped")
    assert by_spec.map.main.iterations[0].h_m.module == "core.0.inner"
    again = load("ours.py:wrapped", example=tokens[:1, :5], loops=2)
    assert again.map.K == 2 and again.map.embed.shape == (2, 5, 16)
    assert load("ours.py:wrapped").with_loops(4).name == "wrapped"
    assert str(load("ours.py:stack", layout="1+1+1+1").map) == "1+1+1+1"
    with pytest.raises(InputError, match="unknown module"):
        load("ours.py:wrapped", spec={"core": ["nowhere"]})


EXAMPLES = """
import torch
from torch import nn
from my_model import Looped


class Asked(Looped):
    def forward(self, ids, n_loops):
        self.K = n_loops
        return super().forward(ids)


class Floats(Asked):
    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(3, 16)


ids = torch.arange(10).view(2, 5)
x = torch.linspace(-1, 1, 24).view(2, 4, 3)
def alone(): return Asked()
def pair(): return Asked(), (ids, 4)
def named(): return Asked(), {"ids": ids, "n_loops": 5}
def floats(): return Floats()
ready = (Asked(), (ids, 6))
def three(): return Asked(), ids, 4
def turned(): return ids, Asked()
"""


def test_a_factory_may_return_an_example_with_its_module(mine, tokens):
    (mine / "asked.py").write_text(EXAMPLES)
    for name, K in (("pair", 4), ("named", 5), ("ready", 6)):
        model = load(f"asked.py:{name}")
        assert model.map.K == K and model.name == name
        assert torch.equal(model(tokens), model.module(tokens, K))
    assert load("asked.py:pair", loops=2).map.K == 2
    assert load("asked.py:pair", example=(tokens, 3)).map.K == 3  # the call's own comes first
    assert load("asked.py:alone", loops=3).map.K == 3
    with pytest.raises(InputError, match=r"n_loops too.*factory that returns \(model, example\)"):
        load("asked.py:alone")
    with pytest.raises(InputError, match=r"gave a tuple \(Asked, Tensor, int\).*\(module, example"):
        load("asked.py:three")
    with pytest.raises(InputError, match=r"gave a tuple \(Tensor, Asked\)"):
        load("asked.py:turned")


def test_an_example_is_read_from_a_file(mine):
    (mine / "asked.py").write_text(EXAMPLES)
    x = np.linspace(-1, 1, 24).reshape(2, 4, 3)
    np.save(mine / "ids.npy", np.arange(10, dtype=np.uint16).reshape(2, 5))
    np.save(mine / "x.npy", x)
    torch.save((torch.arange(10).view(2, 5), 4), mine / "pair.pt")
    torch.save({"ids": torch.arange(10).view(2, 5), "n_loops": 5}, mine / "named.pt")
    torch.save(nn.Linear(2, 2), mine / "pickle.pt")
    (mine / "bad.npy").write_text("no array")
    (mine / "ids.csv").write_text("1,2")
    assert load("my_model.py:make", example=mine / "ids.npy").map.embed.shape == (2, 5, 16)
    assert load("asked.py:alone", example=mine / "pair.pt").map.K == 4
    assert load("asked.py:alone", example=mine / "named.pt").map.K == 5
    floats = load("asked.py:floats", example=mine / "x.npy", loops=3)
    assert floats.map.K == 3 and floats.map.main.after.shape == (2, 4, 16)
    for file, said in (
        ("pickle.pt", "cannot be read"), ("bad.npy", "cannot be read"),
        ("ids.csv", "of another kind"), ("none.npy", "is no file"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=said):
            load("my_model.py:make", example=mine / file)
    with pytest.raises(InputError, match="takes no example"):
        load("mesh", example=mine / "ids.npy")


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("nowhere.py:make", "there is no file nowhere.py"),
        ("no_module_of_this_name:make", "no Python module 'no_module_of_this_name'"),
        ("my_model.py", "name what makes the model in it: my_model.py:FACTORY"),
        ("my_model.py:", "my_model.py:FACTORY"),
        ("my_model.py:mak", "unknown name in my_model.py 'mak'; did you mean make"),
        ("my_model.py:fails", r"AttributeError.*\(my_model.py, line 28\)"),
        ("my_model.py:number", "gave int, but the model must be a torch.nn.Module"),
        ("my_model.py:needs", r"without arguments \(missing a required argument: 'K'\)"),
        ("my_model.py:table", "my_model.py:table is a dict"),
        ("my_model.py:make@init", "no untrained twin"),
        ("syntax.py:make", r"SyntaxError.*\(syntax.py, line 2\)"),
        ("exits.py:make", r"importing exits.py failed with SystemExit: 3 \(exits.py, line 1\)"),
        ("imports.py:make", r"ModuleNotFoundError: No module named 'not_there'"),
    ],
)
def test_wrong_factories_are_named_with_the_line(mine, target, message):
    (mine / "syntax.py").write_text("x = 1\ndef make(:\n")
    (mine / "exits.py").write_text("raise SystemExit(3)")
    (mine / "imports.py").write_text("import not_there")
    with warnings.catch_warnings(), pytest.raises(InputError, match=message):
        load(target)


def test_peek_does_not_run_the_users_code(mine):
    (mine / "loud.py").write_text("raise RuntimeError")
    assert peek("loud.py:make") == ("make", None)


# -- families, native models ---------------------------------------------------------------------


def test_families_say_how_the_number_of_iterations_is_set():
    def of(kind, **entries):
        module = nn.Module()
        module.config = transformers.PretrainedConfig(**entries)
        module.config.model_type = kind
        return module

    assert family_spec(of("huginn_raven")) == {"loops": {"argument": "num_steps"}}
    counts = {"config": {"H": "H_cycles", "L": "L_cycles"}}
    carried = {"input": "previous output"}
    assert family_spec(of("hrm_text")) == {"loops": counts, "state": carried}
    one, two = (of("albert", num_hidden_groups=n) for n in (1, 2))
    assert family_spec(one) == {"loops": {"config": "num_hidden_layers"}}
    assert family_spec(two) is None and family_spec(of("llama")) is None
    assert family_spec(nn.Linear(2, 2)) is None
    ouro = of("ouro")
    ouro.model = nn.Module()
    ouro.model.total_ut_steps, ouro.model.early_exit_gate = 4, nn.Linear(2, 1)
    wanted = {"loops": {"attribute": "model.total_ut_steps"}, "gates": ["model.early_exit_gate"]}
    assert family_spec(ouro) == wanted
    assert family_spec(of("ouro")) is None


def test_options_of_foreign_models_are_refused_for_native_ones():
    with pytest.raises(InputError, match="takes no spec"):
        load("mesh", spec={"core": []})
