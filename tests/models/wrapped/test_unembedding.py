"""Logits, causality and loss are read off what a model returns, whatever gives it."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from torch import Tensor, nn

import loopscope as ls
from loopscope.errors import InputError
from tests.models.wrapped.programs import VOCAB as PROGRAM_VOCAB
from tests.models.wrapped.programs import WIDTH, Runs, programs
from tests.standins.heads import Scores

TOKENS = torch.randint(30, (2, 11), generator=torch.Generator().manual_seed(7))
SAMPLES = torch.randint(30, (6, 16), generator=torch.Generator().manual_seed(8))
FUNCTIONAL = ["linear", "transposed", "method", "einsum", "capped", "parameter", "buffer"]
MODULES = ["module", "tied_module", "table_module", "soft_module"]
SQUARE = 32
"""A vocabulary as large as the state is wide."""

WEIGHTS = {"parameter": "matrix", "buffer": "matrix_weight"}


def loss_by_hand(logits: Tensor, tokens: Tensor) -> Tensor:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


def notes(tables) -> str:
    (record,) = tables.provenance["models"].values()
    return " ".join(record["notes"])


@pytest.mark.parametrize("rows", [61, SQUARE])
@pytest.mark.parametrize("head", [*FUNCTIONAL, *MODULES])
def test_logits_have_a_loss_whatever_gives_them(head, rows):
    module = Scores(head, rows=rows)
    model = ls.wrap(module, TOKENS)
    with torch.no_grad():
        logits = module(TOKENS)
    assert model.why_no_loss() == "" and model.map.causal
    assert torch.equal(model(TOKENS, return_type="loss"), loss_by_hand(logits, TOKENS))
    assert (str(model.map), model.map.norm) == ("1+2R3+0", "norm")
    assert model.map.head == ("unembed" if head in MODULES else None)
    weight = None if head in MODULES else WEIGHTS.get(head, "embed.weight")
    assert model.map.head_weight == weight
    states, found = module.states(TOKENS), ls.capture(model, TOKENS, logits=True)
    assert torch.equal(found.logits, states.logits) and torch.equal(found.h_out, states.h_out)
    assert all(map(torch.equal, found.h, states.loops[0].h))


@pytest.mark.parametrize("rows", [61, SQUARE])
@pytest.mark.parametrize("head", ["linear", "module"])
@pytest.mark.parametrize(
    ("form", "where"),
    [
        ("tuple", (0,)),
        ("states_first", (1,)),
        ("dict", ("scores",)),
        ("named", ("logits",)),
        ("dataclass", ("scores",)),
    ],
)
def test_logits_beside_states_are_told_from_them(head, rows, form, where):
    module = Scores(head, rows=rows, form=form)
    model = ls.wrap(module, TOKENS)
    assert model.map.logits == where and model.map.causal
    assert torch.equal(model(TOKENS), module.states(TOKENS).logits)


@pytest.mark.parametrize("rows", [61, SQUARE])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("head", ["none", "added", "half", "doubled"])
def test_states_are_no_logits(head, rows, causal):
    model = ls.wrap(Scores(head, rows=rows, causal=causal), TOKENS)
    assert model.map.causal is None and model.map.head is None
    assert "no logits for each token that can be told from states" in model.why_no_loss()
    undecided = head in ("none", "added") and rows == SQUARE
    assert ("name what gives them in a spec" in model.why_no_loss()) == undecided
    with pytest.raises(InputError, match="no unembedding was seen"):
        model(TOKENS, return_type="loss")


def test_a_projection_of_states_is_an_unembedding_only_with_a_vocabulary_of_that_size():
    assert ls.wrap(Scores("projected", rows=61), TOKENS).map.causal is None
    model = ls.wrap(Scores("projected", rows=SQUARE), TOKENS)
    assert (model.map.head, model.map.causal) == ("unembed", True)


def test_states_cost_no_second_forward_pass_and_logits_one():
    for head, wanted in [("none", 1), ("linear", 2)]:
        module, runs = Scores(head), []
        module.register_forward_pre_hook(lambda *a, runs=runs: runs.append(1))
        ls.wrap(module, TOKENS)
        assert len(runs) == wanted


def test_functional_logits_that_see_later_tokens_say_so():
    model = ls.wrap(Scores("transposed", rows=SQUARE, causal=False), TOKENS)
    assert model.map.causal is False
    assert model.why_no_loss().startswith("the model looks at later tokens")


def test_a_spec_names_what_gives_the_logits():
    module = Scores("plain", rows=SQUARE)
    module.unused = nn.Identity()
    assert ls.wrap(module, TOKENS).map.causal is None
    model = ls.wrap(module, TOKENS, spec={"head": "embed.weight"})
    assert (model.map.causal, model.map.head_weight) == (True, "embed.weight")
    for name, reason in [("embde.weight", "embed"), ("unused", "never called")]:
        with pytest.raises(InputError, match=reason):
            ls.wrap(module, TOKENS, spec={"head": name})
    module = Scores("projected")
    model = ls.wrap(module, TOKENS, spec={"head": "unembed"})
    assert (model.map.causal, model.map.head, model.map.norm) == (True, "unembed", "norm")


@pytest.mark.parametrize("width", [32, 64])
@pytest.mark.parametrize("head", ["cropped", "rows", "cropped_module"])
def test_logits_cut_to_a_vocabulary_are_those_of_its_tokens(head, width):
    module = Scores(head, width=width, rows=64)
    model = ls.wrap(module, TOKENS)
    assert model.map.causal and model.config.d_vocab == model(TOKENS).shape[-1] == 61
    tables = ls.measure(model, SAMPLES, measures=["loss"])
    with torch.no_grad():
        wanted = [loss_by_hand(module(row[None]), row[None]).item() for row in SAMPLES]
    assert tables.loss["value"].tolist() == pytest.approx(wanted, rel=1e-5)
    with pytest.raises(InputError, match="0 … 60"):
        ls.measure(model, torch.full((6, 16), 62), measures=["loss"])


@pytest.mark.parametrize("rows", [61, SQUARE])
@pytest.mark.parametrize("head", ["transposed", "tied_module"])
def test_readings_and_patches_reach_a_functional_unembedding(head, rows):
    module = Scores(head, rows=rows)
    model = ls.wrap(module, TOKENS)
    states = module.states(TOKENS)
    h = states.loops[0].h
    with torch.no_grad():
        early = module.scores(module.norm(h[1]))
        assert torch.equal(model.read_out_logits(h[1], TOKENS), early)
    patch = [("loop.core.after.hook_in", lambda x, hook: h[1])]
    assert torch.equal(model.run_with_hooks(TOKENS, fwd_hooks=patch), early)
    tables = ls.measure(model, SAMPLES, measures=["readout"], refit_coda=2)
    assert set(tables.readout["reading"]) == {"raw", "matched", "fitted"}
    raw = tables.readout.query("reading == 'raw' and sample == 0")["value"]
    with torch.no_grad():
        walked = module.states(SAMPLES[:1])
        last = loss_by_hand(walked.logits, SAMPLES[:1]).item()
    assert any(value == pytest.approx(last, rel=1e-5) for value in raw)


def test_the_map_says_what_the_unembedding_is():
    def lines(head):
        return " ".join(ls.wrap(Scores(head), TOKENS).outline().lines())

    assert "unembedding: functional, embed.weight" in lines("linear")
    assert "unembedding: functional, outside of all modules" in lines("plain")
    assert "unembedding: unembed" in lines("module")
    assert "unembedding" not in lines("none")


def test_parameters_of_a_functional_unembedding_are_not_counted_as_the_models_body():
    model = ls.wrap(Scores("parameter"), TOKENS)
    table, matrix = model.module.embed.weight, model.module.matrix
    counts = model.counts()
    assert counts.total - counts.non_embedding == table.numel() + matrix.numel()


def test_a_vocabulary_is_known_without_an_embedding_module():
    class Bare(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.table = nn.Parameter(torch.randn(30, 8))
            self.layers = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in "ab")

        def forward(self, tokens):
            x = self.table[tokens]
            for layer in self.layers:
                x = x + layer(x)
            return x @ self.table.mT

    model = ls.wrap(Bare(), TOKENS)
    assert (model.config.d_vocab, model.map.head_weight, model.map.causal) == (30, "table", True)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(programs())
def test_a_random_program_with_a_functional_unembedding_is_mapped_the_same(program):
    program = replace(program, head="module", asked=False, registers=0)
    plain, tokens = ls.wrap(Runs(program), TOKENS % PROGRAM_VOCAB), TOKENS % WIDTH
    for rows in (PROGRAM_VOCAB, WIDTH):
        module = Runs(program)
        del module.unembed
        module.embed = nn.Embedding(rows, WIDTH)
        module.unembed = lambda x, module=module: x @ module.embed.weight.T
        model = ls.wrap(module, tokens)
        assert model.map.causal and model.map.head_weight == "embed.weight"
        assert str(model.map) == str(plain.map)
        assert [u.module for u in model.map.coda] == [u.module for u in plain.map.coda]
        assert torch.equal(model(tokens), module(tokens))


def test_a_spec_that_names_the_unembedding_is_written_with_it(tmp_path):
    module = Scores("plain", rows=SQUARE)
    spec = tmp_path / "loopscope.toml"
    spec.write_text(ls.wrap(module, TOKENS, spec={"head": "embed.weight"}).specification())
    again = ls.wrap(module, TOKENS, spec=spec)
    assert again.map.head_weight == "embed.weight" and again.map.causal
    cut = Scores("cropped", rows=64)
    model = ls.wrap(cut, TOKENS, spec={"head": "embed.weight"})
    assert model.config.d_vocab == 61
    assert model.structure()["map"]["unembedding"] == "functional, embed.weight"
