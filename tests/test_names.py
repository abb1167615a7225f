"""Names: made and read back, put in order, told apart."""

import random

import pytest

from loopscope.names import (
    block_name,
    block_number,
    block_order,
    distinct_labels,
    is_twin_name,
    natural_key,
    state_name,
    state_names,
    state_number,
    state_order,
    trained_name,
    twin_name,
)


@pytest.mark.parametrize("t", [0, 1, 9, 10, 137])
def test_the_number_of_a_name_is_what_it_was_made_from(t):
    assert state_number(state_name(t)) == t
    assert block_number(block_name(t)) == t


def test_states_count_from_0_and_blocks_from_1():
    assert state_names(3) == ["h0", "h1", "h2", "h3"]
    assert [block_name(t) for t in range(3)] == ["core1", "core2", "core3"]


@pytest.mark.parametrize("name", ["h_emb", "h_out", "h", "h1x", "xh1", "core1", "h-1", ""])
def test_other_names_are_no_states(name):
    assert state_number(name) is None


@pytest.mark.parametrize("name", ["prelude", "coda", "core", "core1a", "h1", "hardcore1", ""])
def test_other_names_are_no_blocks(name):
    assert block_number(name) is None


def test_states_come_in_the_order_of_computation():
    ordered = ["h_emb", *state_names(11), "z", "x", "h_out"]
    shuffled = [name for name in ordered if name not in ("z", "x")]
    random.Random(0).shuffle(shuffled)
    assert state_order(["z", *shuffled, "x", *shuffled]) == ordered


def test_blocks_come_in_the_order_of_computation():
    ordered = ["h_emb", "prelude", *map(block_name, range(11)), "b", "a", "coda"]
    shuffled = [name for name in ordered if name not in ("b", "a")]
    random.Random(0).shuffle(shuffled)
    assert block_order(["b", *shuffled, "a", *shuffled]) == ordered


def test_names_with_numbers_sort_as_a_person_counts():
    steps = ["step-10", "step-2", "step-1", "step-100"]
    assert sorted(steps, key=natural_key) == ["step-1", "step-2", "step-10", "step-100"]
    runs = ["run2/step-3", "run10/step-1", "run2/step-12"]
    assert sorted(runs, key=natural_key) == ["run2/step-3", "run2/step-12", "run10/step-1"]


def test_labels_are_the_shortest_that_are_different():
    candidates = [["base"], ["last", "a/last", "x/a/last"], ["last", "b/last", "x/b/last"]]
    assert distinct_labels(candidates) == ["base", "a/last", "b/last"]
    deeper = [["last", "a/last", "x/a/last"], ["last", "a/last", "y/a/last"], ["last", "b/last"]]
    assert distinct_labels(deeper) == ["x/a/last", "y/a/last", "b/last"]
    assert distinct_labels([]) == []


def test_labels_are_equal_only_when_all_candidates_are_used_up():
    assert distinct_labels([["a"], ["a"]]) == ["a", "a"]
    assert distinct_labels([["a"], ["a", "b"]]) == ["a", "b"]
    assert distinct_labels([["a", "x"], ["a", "x"]]) == ["x", "x"]


@pytest.mark.parametrize("name", ["base", "runs/last", "org/name"])
def test_a_twin_of_a_twin_has_the_same_name(name):
    twin = twin_name(name)
    assert twin == f"{name}@init" and twin_name(twin) == twin
    assert trained_name(twin) == name == trained_name(name)
    assert is_twin_name(twin) and not is_twin_name(name)


def test_the_mark_alone_names_no_twin():
    assert not is_twin_name("@init")
