"""A specification corrects what was found; what does not fit the model is named."""

import tomllib

import pytest
import torch
from torch import Tensor, nn

import loopscope as ls
from loopscope.errors import InputError, UnknownNameError
from loopscope.models.loops.spec import to_toml
from tests.standins import registry

CASES = {case.name: case for case in registry.CASES}


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(61, (2, 9), generator=torch.Generator().manual_seed(5))


class Sandwich(nn.Module):
    """The outer block runs before and after a loop of the inner one: a b b b a."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(61, 8)
        self.outer = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
        self.inner = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
        self.head = nn.Linear(8, 61)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.outer(self.embed(tokens))
        for _ in range(3):
            x = self.inner(x)
        return self.head(self.outer(x))


@pytest.mark.parametrize("name", ["gated", "nano_fork", "two_clocks", "tied_stack", "mesh_port"])
def test_the_spec_written_from_a_map_gives_the_same_map(name, tokens):
    module = CASES[name].make()
    loop_map = ls.wrap(module, tokens).map
    spec = tomllib.loads(to_toml(loop_map))
    again = ls.wrap(module, tokens, spec=spec).map
    assert again.source == "spec" and loop_map.source == "found"
    assert again.to_dict() == {**loop_map.to_dict(), "source": "spec"}
    assert [loop.iterations for loop in again.loops] == [loop.iterations for loop in loop_map.loops]


def test_core_decides_which_of_two_repeated_blocks_is_the_loop(tokens):
    module = Sandwich()
    inner = ls.wrap(module, tokens, spec={"core": ["inner"]}).map
    assert [u.module for u in inner.prelude] == ["outer"] and inner.K == 3
    outer = ls.wrap(module, tokens, spec={"core": ["outer"]})
    assert outer.map.K == 2
    states = ls.capture(outer, tokens)
    e = module.embed(tokens)
    assert torch.equal(states.h[0], e) and torch.equal(states.h_m[0], module.outer(e))
    assert torch.equal(states.h[1], module.inner(module.inner(module.inner(module.outer(e)))))


def test_iterations_of_distinct_modules_are_listed_one_by_one(tokens):
    module = CASES["plain"].make()
    layers = [u.module for u in ls.wrap(module, tokens).map.prelude]
    spec = {"core": [[layers[1]], [layers[2]]]}
    loop_map = ls.wrap(module, tokens, spec=spec).map
    assert [[u.module for u in it.units] for it in loop_map.loops[0].iterations] == spec["core"]
    assert loop_map.prelude[0].module == layers[0] and loop_map.loops[0].mechanic == "none"


def test_state_columns_and_output_are_read_where_the_spec_says(tokens):
    module = CASES["depth"].make()
    with torch.no_grad():
        model = ls.wrap(module, tokens)
        width = model.config.d_model
        adapter = model.map.loops[0].iterations[0].h.module
        spec = {"state": {"input": adapter, "columns": [width, 2 * width]}}
        other = ls.wrap(module, tokens, spec=spec)
        seen = []
        handle = module.get_submodule(adapter).register_forward_pre_hook(
            lambda _, args: seen.append(args[0].clone())
        )
        states = ls.capture(other, tokens)
        handle.remove()
    assert all(torch.equal(h, s[..., width:]) for h, s in zip(states.h[:-1], seen, strict=True))


def test_a_toml_file_does_as_a_dict(tokens, tmp_path):
    path = tmp_path / "spec.toml"
    path.write_text('core = ["inner"]\n', "utf-8")
    module = Sandwich()
    from_file, from_dict = (
        ls.wrap(module, tokens, spec=spec).map for spec in (path, {"core": ["inner"]})
    )
    assert from_file == from_dict


@pytest.mark.parametrize(
    ("spec", "error", "says"),
    [
        ({"cor": ["inner"]}, UnknownNameError, "did you mean core"),
        ({"core": ["iner"]}, UnknownNameError, "did you mean inner"),
        ({"core": ["layers.*"]}, UnknownNameError, "another model"),
        ({"core": "inner", "state": {"in": "inner"}}, UnknownNameError, "input"),
        ({"core": ["inner"], "state": "inner"}, InputError, "must be a table"),
        ({"core": ["inner"], "state": {"columns": [8, 2]}}, InputError, "first and last"),
        ({"core": ["inner"], "state": {"output": "head"}}, InputError, "not called in every"),
        ({"core": ["inner"], "prelude": ["head"]}, InputError, "does not run before the loop"),
        ({"core": ["inner"], "gates": ["outer"]}, InputError, "which no iteration calls"),
        ({"core": ["inner"], "loops": {"attribute": "steps"}}, UnknownNameError, "steps"),
        ({"core": ["inner"], "loops": {"config": "steps"}}, InputError, "no config"),
        ({"core": ["inner"], "loops": {"argument": "n"}}, UnknownNameError, "tokens"),
        ({"core": ["inner"], "loops": {"argument": 3}}, InputError, "must be a name"),
        ({"core": [["head"], ["inner"]]}, InputError, "in the order in which they run"),
        ({"core": 3}, InputError, "list of module names"),
        ({"core": ["inner"], "embed": "head"}, InputError, "before the first layer"),
    ],
)
def test_a_spec_that_does_not_fit_says_what_is_wrong(spec, error, says, tokens):
    with pytest.raises(error, match=says):
        ls.wrap(Sandwich(), tokens, spec=spec)


class Normed(nn.Module):
    """A stack with a norm and a dropout after it: c n d, nothing twice."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(61, 8)
        self.inner = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
        self.norm, self.drop = nn.LayerNorm(8), nn.Dropout(0.0)
        self.proj = nn.Linear(8, 8)
        self.head = nn.Linear(8, 61)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.proj(self.drop(self.norm(self.inner(self.embed(tokens))))))


@pytest.mark.parametrize(
    ("core", "says"),
    [
        (["norm"], "names norm, which has no matrix; name the layers that the state runs through"),
        (["drop"], "names drop, which has no matrix"),
        (["norm", "drop"], "names norm, drop, which have no matrix"),
        ([["norm"], ["drop"]], "names norm, drop, which have no matrix"),
    ],
)
def test_a_core_without_matrices_is_refused(core, says, tokens):
    with pytest.raises(InputError, match=f"^core of the specification {says}"):
        ls.wrap(Normed(), tokens, spec={"core": core})


def test_a_first_iteration_without_matrices_leaves_the_doubt_about_later_ones(tokens):
    with pytest.warns(UserWarning, match=r"core has no layer, only bare matrices \(proj, …\)"):
        model = ls.wrap(Normed(), tokens, spec={"core": [["norm"], ["proj"]]})
    assert [[u.module for u in it.units] for it in model.map.loops[0].iterations] == [[], ["proj"]]


@pytest.mark.parametrize("text", ["core = [", "core = 'a'\ncore = 'b'"])
def test_a_file_that_is_no_toml_is_named(text, tokens, tmp_path):
    (tmp_path / "bad.toml").write_text(text, "utf-8")
    with pytest.raises(InputError, match=r"bad\.toml is no TOML"):
        ls.wrap(Sandwich(), tokens, spec=tmp_path / "bad.toml")
    with pytest.raises(InputError, match="--write-spec"):
        ls.wrap(Sandwich(), tokens, spec=tmp_path / "none.toml")


def test_a_second_candidate_for_the_core_is_said_with_a_way_to_choose_it(tokens):
    with pytest.warns(UserWarning, match=r"outer also runs more than once.*core = \["):
        model = ls.wrap(Sandwich(), tokens)
    assert model.map.K == 3 and "outer" in model.map.to_dict()["notes"][0]
