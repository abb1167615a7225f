"""Loops of two states: each is shown as itself, under the name that the code gives it."""

import pytest
import torch

import loopscope as ls
from loopscope.analysis.tables import COMPARED
from loopscope.errors import InputError
from tests.standins.two_states import ByTurns, Injected, Injecting, OneModule, Segments, TwoModules

NESTED = {
    "one_module": (OneModule, ("y", "z"), ("y", "z")),
    "injecting": (Injecting, ("y", "z"), ("y", "z")),
    "two_modules": (TwoModules, ("H", "L"), ("z_H", "z_L")),
}


def tokens() -> torch.Tensor:
    return torch.randint(61, (2, 7), generator=torch.Generator().manual_seed(2))


def same(states, course) -> bool:
    """Whether a trajectory has the states that the code had, to the last bit."""
    pairs = [*zip(states.h[:-1], course.h, strict=True), *zip(states.h_m, course.h_m, strict=True)]
    return all(torch.equal(a, b) for a, b in pairs) and torch.equal(states.h[-1], course.h_m[-1])


@pytest.mark.parametrize("name", NESTED)
@pytest.mark.parametrize("sizes", [(2, 2), (3, 2), (2, 3), (4, 3)])
def test_each_state_of_nested_loops_is_shown_as_itself(name, sizes):
    make, loops, states = NESTED[name]
    module = make(*sizes)
    model = ls.wrap(module, tokens())
    trajectory = ls.capture(model, tokens())
    high, low = sizes
    assert model.loops == {loops[0]: high, loops[1]: high * low}
    assert list(trajectory.named) == list(states)
    assert same(trajectory, module.seen["y"])
    assert same(trajectory.named[states[0]], module.seen["y"])
    assert same(trajectory.named[states[1]], module.seen["z"])
    assert same(trajectory.others[loops[1]], module.seen["inner"])


def test_two_states_without_an_inner_loop():
    module = ByTurns(4)
    model = ls.wrap(module, tokens())
    trajectory = ls.capture(model, tokens())
    assert model.loops == {"core": 4}
    assert list(trajectory.named) == ["y", "z"]
    assert same(trajectory, module.seen["y"])
    assert same(trajectory.named["z"], module.seen["z"])


def test_segments_around_both_cycles_are_a_third_level():
    module = Segments(3, 2, 2)
    model = ls.wrap(module, tokens())
    trajectory = ls.capture(model, tokens())
    assert [*model.loops.values()] == [3, 6, 12]
    outer, high, low = model.loops
    assert [model.map.loop(name).parent for name in (high, low)] == [outer, high]
    assert model.map.loop(low).iterations[3].path == f"{outer}0.{high}1.{low}1"
    assert same(trajectory, module.seen["segment z_H"])
    assert same(trajectory.named["z_L"], module.seen["segment z_L"])
    assert same(trajectory.others[high], module.seen["H"])
    assert same(trajectory.others[low], module.seen["L"])


@pytest.mark.parametrize("name", NESTED)
def test_a_patch_of_the_slow_state_is_that_of_the_module_which_gave_it(name):
    make, loops, _ = NESTED[name]
    module = make(3, 2)
    model = ls.wrap(module, tokens())
    other = torch.randn(2, 7, 32, generator=torch.Generator().manual_seed(5))
    at = f"loop.{loops[0]}1.hook_in"
    patched = model.run_with_hooks(tokens(), fwd_hooks=[(at, lambda h, hook: other)])
    part = module.H_level if name == "two_modules" else module.net
    call = 0 if name == "two_modules" else 2
    calls = []

    def replace_output(part, args, result):
        calls.append(0)
        return other if len(calls) - 1 == call else result

    handle = part.register_forward_hook(replace_output)
    wanted = module(tokens())
    handle.remove()
    assert torch.equal(patched, wanted)


@pytest.mark.parametrize(
    "spec",
    [
        {"core": ["net"], "states": ["fast", "fast", "slow"]},
        {"core": [["net", "net", "net"]] * 3, "states": ["fast", "fast", "slow"]},
    ],
)
def test_a_spec_names_the_states_of_one_module(spec):
    module = OneModule(3, 2)
    model = ls.wrap(module, tokens(), spec=spec)
    trajectory = ls.capture(model, tokens())
    assert list(trajectory.named) == ["slow", "fast"]
    assert same(trajectory, module.seen["y"])
    assert same(trajectory.named["fast"], module.seen["z"])
    [inner] = trajectory.others.values()
    assert same(inner, module.seen["inner"])


def test_a_listed_module_that_comes_again_is_called_as_often():
    model = ls.wrap(OneModule(2, 2), tokens(), spec={"core": [["net", "net", "net"]] * 2})
    assert [it.path for it in model.map.loops[0].iterations] == ["y0", "y1"]
    assert [len(it.units) for it in model.map.loops[0].iterations] == [3, 3]


def test_a_spec_of_a_single_state_keeps_one_loop():
    model = ls.wrap(OneModule(2, 2), tokens(), spec={"core": ["net"], "states": ["h"]})
    assert model.loops == {"core": 6}
    assert not ls.capture(model, tokens()).named


@pytest.mark.parametrize(
    ("states", "words"),
    [
        (["z", "z", "z", "y"], "names 4 calls .z, z, z, y., and the core is called 6 times"),
        ("z", "must list a name for each call"),
        (["z", 3], "must list a name for each call"),
    ],
)
def test_states_that_do_not_fit_are_refused(states, words):
    with pytest.raises(InputError, match=words):
        ls.wrap(OneModule(2, 2), tokens(), spec={"core": ["net"], "states": states})


@pytest.mark.parametrize("make", [OneModule, Injecting, TwoModules])
def test_what_was_found_can_be_written_and_read_as_a_spec(make, tmp_path):
    module = make(3, 2)
    model = ls.wrap(module, tokens())
    path = tmp_path / "spec.toml"
    path.write_text(model.specification())
    again = ls.capture(ls.wrap(module, tokens(), spec=path), tokens())
    assert same(again, module.seen["y"])
    assert same(again.named[list(again.named)[1]], module.seen["z"])


def test_each_state_is_measured_under_its_own_name():
    samples = torch.randint(61, (3, 9), generator=torch.Generator().manual_seed(4))
    module = OneModule(3, 2)
    tables = ls.measure(ls.wrap(module, samples[:2]), samples, COMPARED)
    assert list(tables.update["loop"].unique()) == ["y", "y.z", "z"]
    rows = tables.update[tables.update["loop"].eq("y.z") & tables.update["sample"].eq(1)]
    module(samples)
    course = module.seen["z"]
    pairs = zip(course.h, course.h_m, strict=True)
    wanted = [2 * (b - a)[1].norm() / (a[1].norm() + b[1].norm()) for a, b in pairs]
    assert rows["value"].tolist() == pytest.approx([float(x) for x in wanted], rel=1e-6)


def test_figures_name_the_iterations_of_a_further_state():
    samples = torch.randint(61, (3, 9), generator=torch.Generator().manual_seed(4))
    tables = ls.measure(ls.wrap(OneModule(3, 2), samples), samples, ["update"])
    axes = ls.plot.update(tables).axes[1]
    assert axes.get_title().endswith("y.z")
    assert [label.get_text() for label in axes.get_xticklabels()] == ["y0", "y1", "y2"]


class Cycled(OneModule):
    """One module, with the numbers of iterations under the names of HRM and TRM."""

    def __init__(self, high=3, low=2):
        self.H_cycles, self.L_cycles = high, low
        super().__init__(high, low)
        del self.high, self.low

    def loop(self, x):
        self.high, self.low = self.H_cycles, self.L_cycles
        try:
            return super().loop(x)
        finally:
            del self.high, self.low


@pytest.mark.parametrize(
    ("loops", "layout"),
    [
        (5, "0+(1R2+1)R5+0"),
        ({"z": 4}, "0+(1R4+1)R3+0"),
        ({"z": 1}, "0+2R3+0"),
        ({"y": 1}, "0+1R3+0"),
    ],
)
def test_the_number_of_iterations_of_each_state_is_set_by_name(loops, layout):
    module = Cycled()
    model = ls.wrap(module, tokens()).with_loops(loops)
    assert str(model.map) == layout
    assert torch.equal(model(tokens()), Cycled(**counts(loops))(tokens()))


def counts(loops) -> dict[str, int]:
    """The arguments of `Cycled` for numbers by loop name."""
    by_name = loops if isinstance(loops, dict) else {"y": loops}
    return {"high": by_name.get("y", 3), "low": by_name.get("z", 2)}


class Normed(OneModule):
    """The model's own code norms both states after every update."""

    def loop(self, x):
        y, z = self.y_first.expand_as(x), self.z_first.expand_as(x)
        for _ in range(self.high):
            y_before, z_before = y, z
            for _ in range(self.low):
                before, given = z, self.net(z + y + x)
                z = torch.nn.functional.layer_norm(given, (32,))
                self.note("inner", before, given)
            given_y = self.net(y + z)
            y = torch.tanh(given_y)
            self.note("y", y_before, given_y)
            self.note("z", z_before, given)
        return y


class Restarting(OneModule):
    """The fast state begins anew in each outer iteration: the loop's only state is y."""

    def begin(self, seed):
        super().begin(seed)
        self.f, self.g = Injected(1), Injected(2)

    def loop(self, x):
        y = x
        for _ in range(self.high):
            before, z = y, self.z_first.expand_as(x)
            for _ in range(self.low):
                z = self.f(z, y + x)
            y = self.g(y, z)
            self.note("y", before, y)
        return y


class Lagging(OneModule):
    """One state, of which each call reads the last two values."""

    def loop(self, x):
        h, last = x, 0.5 * x
        for _ in range(self.high):
            before = h
            h, last = self.net(h + 0.5 * last), h
            self.note("h", before, h)
        return h


def test_what_the_code_makes_of_a_state_alone_is_that_state():
    module = Normed(3, 2)
    model = ls.wrap(module, tokens())
    trajectory = ls.capture(model, tokens())
    inner = trajectory.others["z"]
    pairs = [(trajectory, "y"), (trajectory.named["z"], "z"), (inner, "inner")]
    for states, name in pairs:
        course = module.seen[name]
        assert all(map(torch.equal, states.h[:-1], course.h)), name
        assert all(map(torch.equal, states.h_m, course.h_m)), name
    assert sum("is not h_m(t-1)" in note for note in model.map.state_notes) == 2


def test_a_state_that_begins_anew_makes_no_loop_of_its_own():
    module = Restarting(3, 2)
    model = ls.wrap(module, tokens())
    trajectory = ls.capture(model, tokens())
    assert list(model.loops.values()) == [3, 6]
    assert all(map(torch.equal, trajectory.h_m, module.seen["y"].h_m))
    assert model.map.main.mixing.startswith("h_m(t) + ")  # what the first call is given has x in it


def test_a_state_that_reads_earlier_values_is_one_state():
    module = Lagging(6, 1)
    model = ls.wrap(module, tokens())
    trajectory = ls.capture(model, tokens())
    assert model.loops == {"core": 6} and not trajectory.named
    assert all(map(torch.equal, trajectory.h_m, module.seen["h"].h_m))


def test_a_patch_of_a_state_that_was_read_before_changes_nothing_before():
    module = Injecting(2, 2)
    model = ls.wrap(module, tokens())
    other = torch.randn(2, 7, 32, generator=torch.Generator().manual_seed(5))
    at = ("loop.y1.z0.hook_in", lambda z, hook: other)
    with model.hooks(fwd_hooks=[at]):
        patched, cache = model.run_with_cache(tokens(), names_filter="loop.y0.hook_out")
    assert torch.equal(cache["loop.y0.hook_out"], module_outputs(module)["y"].h_m[0])
    assert not torch.equal(patched, model(tokens()))


def module_outputs(module) -> dict:
    module(tokens())
    return module.seen
