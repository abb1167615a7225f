"""How often loops run: numbers that must be given, names of numbers, loops in loops in loops."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import loopscope as ls
from loopscope.errors import InputError
from loopscope.models.wrapped.count_search import counts_iterations
from tests.models.wrapped.real import hrm_text
from tests.models.wrapped.small import TOKENS, Small
from tests.standins.counted import Asked, Cycles, Segments, Settings, Tower


def counts(model):
    return {count.loop: (count.kind, count.name) for count in model.map.counts}


def same(found, wanted) -> bool:
    return len(found) == len(wanted) and all(map(torch.equal, found, wanted))


# -- numbers that must be given ------------------------------------------------------------------


@pytest.mark.parametrize(
    "example", [(TOKENS, 4), {"tokens": TOKENS, "n_loops": 4}, {"n_loops": 4, "tokens": TOKENS}]
)
def test_a_number_given_in_the_example_holds_in_every_later_call(example):
    module = Asked()
    model = ls.wrap(module, example)
    assert counts(model) == {"core": ("argument", "n_loops")}
    other = torch.randint(50, (3, 6), generator=torch.Generator().manual_seed(8))
    for steps, again in [(4, model), (7, model.with_loops(7)), (1, model.with_loops(1))]:
        with torch.no_grad():
            wanted = module.states(other, steps)
        for given_tokens in (other, {"tokens": other}, (other,)):
            traj = ls.capture(again, given_tokens, logits=True)
            assert same(traj.h, wanted.loops[0].h) and torch.equal(traj.logits, wanted.logits)
        assert torch.equal(again(other), module(other, steps))
    assert torch.equal(model(other, n_loops=2), module(other, 2))
    assert torch.equal(model((other, 5)), module(other, 5))


def test_a_number_that_is_needed_is_taken_from_loops():
    module = Asked()
    for loops in (4, {"core": 4}):
        model = ls.wrap(module, TOKENS, loops=loops)
        assert model.map.K == 4 and torch.equal(model(TOKENS), module(TOKENS, 4))
    assert ls.wrap(module, loops=3).map.K == 3  # token ids drawn
    once = ls.wrap(module, TOKENS, loops=1)
    assert once.map.K == 1 and torch.equal(once(TOKENS), module(TOKENS, 1))
    assert once.with_loops(5).map.K == 5


def test_measure_and_compare_pass_a_number_that_is_needed(tmp_path):
    model = ls.wrap(Asked(), TOKENS, loops=3)
    file = tmp_path / "ids.npy"
    np.save(file, np.random.default_rng(0).integers(0, 50, (4, 8)))
    tables = ls.measure(model, torch.from_numpy(np.load(file)), measures=["update"])
    assert tables.update["t"].max() == 2
    compared = ls.compare(
        [model], data=file, samples=4, tokens=8, measures=["delta", "loss"], more_loops=5
    )
    assert compared.tables.delta["t"].max() == 4 and not compared.failed


def test_what_forward_needs_is_named_with_an_example_that_has_it():
    class Masked(Asked):
        def forward(self, tokens, mask, n_loops):
            return super().forward(tokens, n_loops)

    class Named(Asked):
        def forward(self, tokens, *, iters_to_do):
            return super().forward(tokens, iters_to_do)

    with pytest.raises(InputError) as refused:
        ls.wrap(Asked(), TOKENS)
    text = str(refused.value)
    assert "\n" not in text and "forward needs n_loops too, the number of iterations" in text
    assert "example=(tokens, 4), or loops=4 (--loops 4)" in text and "--example FILE" in text
    with pytest.raises(InputError, match=r'example=\{"tokens": tokens, "iters_to_do": 4\}'):
        ls.wrap(Named(), TOKENS)
    assert counts(ls.wrap(Named(), TOKENS, loops=3)) == {"core": ("argument", "iters_to_do")}
    with pytest.raises(InputError, match=r"needs mask, n_loops too: .*\(tokens, \.\.\., 4\)"):
        ls.wrap(Masked(), TOKENS)
    with pytest.raises(InputError, match="needs mask too"):
        ls.wrap(Masked(), TOKENS, loops=4)
    with pytest.raises(InputError, match="whole numbers"):
        ls.wrap(Asked(), TOKENS, loops=0)


def test_numbers_of_several_loops_that_are_needed_are_told_apart_by_name():
    class Both(Tower):
        def __init__(self):
            super().__init__(2, lambda module, level, numbers: list(numbers.values())[level])

        def forward(self, tokens, X_cycles, Y_cycles):
            return super().forward(tokens, X_cycles=X_cycles, Y_cycles=Y_cycles)

    module = Both()
    model = ls.wrap(module, TOKENS, loops={"X": 2, "Y": 3})
    assert counts(model) == {"X": ("argument", "X_cycles"), "Y": ("argument", "Y_cycles")}
    assert model.loops == {"X": 2, "Y": 6}
    again = model.with_loops({"Y": 5})
    assert again.loops == {"X": 2, "Y": 10}
    assert torch.equal(again(TOKENS), module(TOKENS, 2, 5))
    with pytest.raises(InputError, match="X_cycles, Y_cycles"):
        ls.wrap(module, TOKENS, loops=3)


# -- names ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "n_loops",
        "n_loop",
        "num_loops",
        "n_repeats",
        "H_cycles",
        "L_cycles",
        "num_cycles",
        "n_recurrence",
        "recurrent_steps",
        "max_steps",
        "halt_max_steps",
        "mean_recurrence",
        "num_recur",
        "total_ut_steps",
        "iters_to_do",
        "max_iters",
        "iter_depth",
        "num_recurrent_steps",
        "recursion_depth",
        "n_refinements",
        "num_rounds",
        "thinking_steps",
        "numLoops",
        "inner_loops",
        "act_max_steps",
        "loop_count",
        "test_recurrences",
    ],
)
def test_usual_names_of_numbers_of_iterations_are_known(name):
    assert counts_iterations(name)


@pytest.mark.parametrize(
    "name",
    [
        "n_layers",
        "n_head",
        "warmup_steps",
        "save_steps",
        "n_embd",
        "num_hidden_layers",
        "max_length",
    ],
)
def test_other_numbers_are_not_taken_for_it(name):
    assert not counts_iterations(name)


HOLDERS = {
    "attribute": lambda module, n: setattr(module, "n_repeats", n),
    "namespace": lambda module, n: setattr(module, "args", SimpleNamespace(n_repeats=n)),
    "dict": lambda module, n: setattr(module, "hparams", {"n_repeats": n, "width": 32}),
    "nested": lambda module, n: setattr(
        module, "config", SimpleNamespace(model={"loop": SimpleNamespace(n_repeats=n)})
    ),
    "config": lambda module, n: setattr(module, "config", SimpleNamespace(n_repeats=n)),
}
READERS = {
    "attribute": lambda module: module.n_repeats,
    "namespace": lambda module: module.args.n_repeats,
    "dict": lambda module: module.hparams["n_repeats"],
    "nested": lambda module: module.config.model["loop"].n_repeats,
    "config": lambda module: module.config.n_repeats,
}
NAMES = {
    "attribute": ("attribute", "n_repeats"),
    "namespace": ("attribute", "args.n_repeats"),
    "dict": ("attribute", "hparams.n_repeats"),
    "nested": ("config", "model.loop.n_repeats"),
    "config": ("config", "n_repeats"),
}


class Held(Small):
    """As many iterations as is written somewhere."""

    where = "attribute"

    def loop(self, x):
        for _ in range(READERS[self.where](self)):
            x = self.core(x)
        return x


@pytest.mark.parametrize("where", HOLDERS)
def test_a_number_is_found_and_set_wherever_it_is_written(where):
    module = Held(n_loops=17)
    module.where = where
    HOLDERS[where](module, 3)
    model = ls.wrap(module, TOKENS)
    assert counts(model) == {"core": NAMES[where]}
    again = model.with_loops(5)
    assert again.map.K == 5 and counts(again) == {"core": NAMES[where]}
    assert READERS[where](module) == 3  # as it was
    logits = again(TOKENS)
    HOLDERS[where](module, 5)
    assert torch.equal(logits, module(TOKENS))


def test_where_two_numbers_are_equal_the_one_with_an_effect_is_found():
    module = Held(n_loops=3)  # n_loops comes first among names, and is not read
    module.n_repeats = 3
    runs = []
    module.register_forward_pre_hook(lambda *a: runs.append(1))
    model = ls.wrap(module, TOKENS)
    assert len(runs) == 2  # looking for it costs no forward pass
    assert counts(model) == {"core": ("attribute", "n_loops")}
    again = model.with_loops(6)
    assert again.map.K == 6 and counts(again) == {"core": ("attribute", "n_repeats")}
    assert (module.n_loops, module.n_repeats) == (3, 3)


def test_where_none_has_an_effect_the_candidates_are_named():
    module = Small(n_loops=4)
    module.loop = lambda x: module.core(module.core(module.core(x)))
    module.n_repeats, module.num_iters = 3, 3
    model = ls.wrap(module, TOKENS)
    with pytest.raises(InputError, match="does not set the number.*usual names are.*n_repeats"):
        model.with_loops(5)
    assert (module.n_loops, module.n_repeats, module.num_iters) == (4, 3, 3)


def test_what_the_users_spec_names_is_not_replaced_by_another():
    module = Held()
    module.n_repeats, module.decoy = 3, 3
    with pytest.raises(InputError, match="decoy was set to 5"):
        ls.wrap(module, TOKENS, spec={"loops": {"attribute": "decoy"}}, loops=5)


@pytest.mark.parametrize("where", ["attribute", "config"])
def test_a_core_that_runs_once_is_looped_by_what_says_so(where):
    module = Held(n_loops=17)
    module.where = where
    HOLDERS[where](module, 1)
    assert ls.wrap(module, TOKENS).map.loops == ()
    model = ls.wrap(module, TOKENS, loops=4)
    assert model.map.K == 4 and counts(model) == {"core": NAMES[where]}
    HOLDERS[where](module, 4)
    assert torch.equal(ls.wrap(module, TOKENS)(TOKENS), model(TOKENS))


# -- loops in loops ------------------------------------------------------------------------------


def test_each_of_three_levels_has_a_number_in_a_frozen_configuration():
    model = ls.wrap(Segments(), TOKENS)
    assert counts(model) == {
        "start": ("attribute", "settings.halt_max_steps"),
        "H": ("attribute", "settings.arch.H_cycles"),
        "L": ("attribute", "settings.arch.L_cycles"),
    }
    assert model.map.loop("L").iterations[-1].path == "start1.H1.L2"


@pytest.mark.parametrize(
    ("loops", "wanted", "paths"),
    [
        (4, (4, 2, 3), "start3.H1.L2"),
        ({"H": 5}, (2, 5, 3), "start1.H4.L2"),
        ({"L": 1}, (2, 2, 1), None),
        ({"H": 1}, (2, 1, 3), None),
        ({"start": 1}, (1, 2, 3), "H1.L2"),
        ({"start": 3, "H": 4, "L": 2}, (3, 4, 2), "start2.H3.L1"),
        ({"start": 1, "H": 1, "L": 1}, (1, 1, 1), None),
    ],
)
def test_each_of_three_levels_is_set_by_name(loops, wanted, paths):
    module = Segments()
    model = ls.wrap(module, TOKENS).with_loops(loops)
    with torch.no_grad():
        states = module.states(TOKENS, wanted)
    traj = ls.capture(model, TOKENS, logits=True)
    assert torch.equal(traj.logits, states.logits)
    if paths is not None:
        deepest = model.map.loops[-1]
        assert deepest.iterations[-1].path == paths
        assert same(traj.loops[deepest.name].h_m, states.loops[2].h_m)
    assert module.settings == Settings(arch=Cycles())


def test_inner_loops_of_a_real_model_are_set_without_its_family():
    module = hrm_text(low=3, high=2)
    module.config.model_type = "unheard_of"
    model = ls.wrap(module, TOKENS)
    assert counts(model) == {"H": ("config", "H_cycles"), "L": ("config", "L_cycles")}
    assert model.with_loops({"H": 3, "L": 2}).loops == {"H": 3, "L": 6}


def test_two_loops_that_run_equally_often_are_told_apart_by_name_alone():
    def unnamed(module, level, numbers):
        return (module.num_loops, module.num_iters)[level]

    module = Tower(2, unnamed)
    module.num_loops = module.num_iters = 3
    model = ls.wrap(module, TOKENS)
    assert set(counts(model)) == {"X"}  # an inner loop gets no number by chance
    with pytest.raises(InputError, match="iterations of Y cannot be set"):
        model.with_loops({"Y": 4})
    del module.num_iters
    module.inner_iters, module.count = 3, lambda m, level, n: (m.num_loops, m.inner_iters)[level]
    assert counts(ls.wrap(module, TOKENS)) == {
        "X": ("attribute", "num_loops"), "Y": ("attribute", "inner_iters"),
    }  # fmt: skip


WORDS = ("{}_cycles", "num_{}_steps", "{}_loops", "max_{}_iters")
PLACES = ("argument", "attribute", "object", "dict", "config")


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    st.lists(
        st.tuples(st.sampled_from(PLACES), st.sampled_from(WORDS), st.integers(2, 3)),
        min_size=1, max_size=3,
    ),
    st.lists(st.integers(2, 4), min_size=3, max_size=3),
)  # fmt: skip
def test_numbers_of_random_towers_of_loops_are_found_and_set(levels, other):
    module, example, expected = _tower(levels)
    model = ls.wrap(module, example)
    names = list("XYZ"[: len(levels)]) if len(levels) > 1 else ["core"]
    assert counts(model) == dict(zip(names, expected, strict=True))
    numbers = [number for _, _, number in levels]
    assert list(model.loops.values()) == [math.prod(numbers[: i + 1]) for i in range(len(numbers))]
    again = model.with_loops(dict(zip(names, other, strict=False)))
    chosen = other[: len(levels)]
    assert list(again.loops.values()) == [math.prod(chosen[: i + 1]) for i in range(len(chosen))]
    wanted, given_again, _ = _tower(
        [(p, w, n) for (p, w, _), n in zip(levels, other, strict=False)]
    )
    assert torch.equal(again(TOKENS), wanted(**given_again))


def _tower(levels):
    """A tower whose numbers stand where they are said to, its example, and what sets each."""
    names = [word.format("XYZ"[i]) for i, (_, word, _) in enumerate(levels)]

    def count(module, level, numbers):
        place, name = levels[level][0], names[level]
        if place == "argument":
            return numbers[name]
        if place == "dict":
            return module.hparams[name]
        held = {"attribute": module, "object": module.args, "config": module.config}[place]
        return getattr(held, name)

    module = Tower(len(levels), count)
    module.args, module.config, module.hparams = SimpleNamespace(), SimpleNamespace(), {}
    example, expected = {"tokens": TOKENS}, []
    for (place, _, number), name in zip(levels, names, strict=True):
        if place == "argument":
            example[name] = number
        elif place == "dict":
            module.hparams[name] = number
        else:
            held = {"attribute": module, "object": module.args, "config": module.config}[place]
            setattr(held, name, number)
        kind = place if place in ("argument", "config") else "attribute"
        prefix = {"object": "args.", "dict": "hparams."}.get(place, "")
        expected.append((kind, prefix + name))
    return module, example, expected


def test_a_module_that_holds_much_else_is_searched_without_harm():
    module = Held()
    module.n_repeats = 3
    module.vocabulary = {f"n_loops{i}": 3 for i in range(5000)}
    module.itself, module.math, module.kind = {"module": module}, math, nn.Linear
    module.circle = {"a": {}}
    module.circle["a"]["b"] = module.circle
    assert counts(ls.wrap(module, TOKENS)) == {"core": ("attribute", "n_repeats")}
