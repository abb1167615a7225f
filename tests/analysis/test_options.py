"""Options: declared once, shown in signatures and --help, refused where they cannot be."""

import inspect
import re
import subprocess
import sys
from dataclasses import fields

import numpy as np
import pytest

import loopscope as ls
from loopscope.analysis.inside_options import INSIDE, LensOptions, ProbeOptions, recorded
from loopscope.analysis.options import Options, Settings, build_options, read_loops
from loopscope.analysis.tables.registry import COMPARED, DEFAULT, INSIDE_MEASURES, MEASURES
from loopscope.errors import InputError, UnknownNameError, whole_number
from tests.program import called


def keywords(function):
    parameters = inspect.signature(function).parameters.values()
    assert not any(p.kind is p.VAR_KEYWORD for p in parameters)
    return {p.name: p.default for p in parameters}


@pytest.mark.parametrize(("function", "kind"), [(ls.measure, Options), (ls.compare, Settings)])
def test_a_signature_shows_every_option_with_its_default(function, kind):
    shown = keywords(function)
    assert {entry.name: shown[entry.name] for entry in fields(kind)} == {
        entry.name: entry.default for entry in fields(kind)
    }


@pytest.mark.parametrize(("function", "kind"), [(ls.measure, Options), (ls.compare, Settings)])
def test_help_says_what_every_option_does_once(function, kind):
    text = inspect.getdoc(function)
    args = text.partition("Args:")[2].partition("Returns:")[0]
    for entry in fields(kind):
        assert len(re.findall(rf"^    {entry.name}: \S", args, re.M)) == 1, entry.name
    assert "Error" not in args and "**" not in text and "as `Settings` describes" not in text


def test_what_is_measured_when_nothing_is_said():
    assert keywords(ls.measure)["measures"] == DEFAULT
    assert keywords(ls.compare)["measures"] == COMPARED
    assert keywords(ls.compare)["samples"] == 500 and keywords(ls.compare)["tokens"] == 256
    assert keywords(ls.measure)["batch_size"] == keywords(ls.compare)["batch_size"] == 16


def test_an_unknown_option_gives_near_matches(mesh, samples):
    with pytest.raises(UnknownNameError) as error:
        ls.measure(mesh, samples, kernel="rbf")
    assert (
        str(error.value) == "unknown option of measure 'kernel'; did you mean kernels, intervene?"
    )
    with pytest.raises(UnknownNameError) as error:
        ls.compare(["base"], layuot="1+1")
    assert str(error.value) == "unknown option of compare 'layuot'; did you mean layout?"
    with pytest.raises(UnknownNameError, match="did you mean batch_size"):
        build_options(Options, {"batchsize": 3}, "measure", ("batch_size",))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"samples": 0}, "samples must be a whole number of at least 1, given 0."),
        ({"tokens": 3}, "tokens must be a whole number of at least 4, given 3."),
        ({"batch_size": 0}, "batch_size is 0; it must be at least 1."),
        ({"more_loops": -1}, "more_loops must be 0 or more, given -1."),
        ({"drop_first": -1}, "drop_first is -1; it must be 0 or more."),
        ({"measures": ["ranks"]}, "unknown measure 'ranks'; did you mean rank?"),
        (
            {"measures": ()},
            "no measures asked for; choose from update, cka, spectrum, rank, routing, delta, "
            "readout, loss, lens, probe, intervene, orbit.",
        ),
        ({"kernels": ()}, "no kernels asked for; choose rbf, linear or both."),
    ],
)
def test_settings_that_cannot_be_are_refused(options, message):
    with pytest.raises(InputError) as error:
        Settings(**options)
    assert str(error.value) == message
    with pytest.raises(InputError) as error:
        ls.compare(["base"], **options)
    assert str(error.value) == message


def test_a_name_alone_is_a_list_of_it_and_names_count_once():
    options = Options(measures="rank", kernels=["linear", "rbf", "linear"])
    assert options.measures == ("rank",) and options.kernels == ("linear", "rbf")


def test_the_options_of_one_model_are_those_of_the_comparison():
    settings = Settings(kernels=("linear",), drop_first=2, samples=3, more_loops=5)
    options = settings.options(more_loops=7)
    assert type(options) is Options
    assert options.record() == settings.record() | {"more_loops": 7}
    assert options.record().keys() == {entry.name for entry in fields(Options)} - INSIDE.keys()


def test_compare_looks_inside_only_when_asked_to():
    assert set(INSIDE_MEASURES) == {"lens", "probe", "intervene", "orbit"} == set(INSIDE)
    assert sorted((*COMPARED, *INSIDE_MEASURES)) == sorted(MEASURES)
    assert not set(DEFAULT) & set(INSIDE_MEASURES)


def test_options_of_looking_inside_are_given_as_they_are_or_as_a_dict():
    given = Options(measures=["lens"], lens={"kinds": ("coda",)})
    assert given.lens == LensOptions(kinds=("coda",))
    assert given == Options(measures=["lens"], lens=given.lens)
    assert given.record()["lens"]["kinds"] == ["coda"] and "probe" not in given.record()
    with pytest.raises(UnknownNameError) as error:
        Options(lens={"kind": ("coda",)})
    assert str(error.value) == "unknown option of lens 'kind'; did you mean kinds?"
    with pytest.raises(InputError, match="probe takes ProbeOptions or a dict of its fields, given"):
        Options(probe=3)


def test_labels_are_recorded_by_their_hash():
    first, second = np.arange(5000.0), np.arange(5000.0)
    second[2500] = 0  # where a printed array has an ellipsis
    notes = [recorded(ProbeOptions(labels={"mine": array}))["labels"] for array in (first, second)]
    assert notes[0]["mine"]["shape"] == [5000] and notes[0] != notes[1]
    assert recorded(["a", "b"]) == ["a", "b"] and recorded(2.5) == 2.5


def test_loops_are_a_number_or_numbers_by_name():
    assert read_loops(None) is None
    assert read_loops("8") == 8
    assert read_loops("H=2, L=3") == {"H": 2, "L": 3}
    for text in ("", "-1", "H=", "=2", "H=2,L"):
        with pytest.raises(InputError, match="--loops takes a number"):
            read_loops(text)


def test_every_flag_is_in_the_help_once(monkeypatch, capsys):
    code, text, _ = called(monkeypatch, capsys, "compare", "--help")
    assert code == 0
    listed = re.findall(r"^  (--[a-z-]+)", text, flags=re.MULTILINE)
    declared = [entry for entry in fields(Settings) if entry.name != "text"]
    flags = [entry.metadata["flag"] for entry in declared if entry.metadata["flag"]]
    assert len(flags) == len(set(flags)) >= 15
    assert {flag: listed.count(flag) for flag in flags} == dict.fromkeys(flags, 1)
    words = " ".join(text.split())
    for entry in declared:
        start = " ".join(entry.metadata["words"].split()[:3])
        assert start in words, entry.name


def test_integers_of_numpy_are_taken_and_become_pythons_own():
    assert type(whole_number("samples", np.int64(4), 1)) is int
    program = (  # without the tests' own check of types
        "import numpy as np, json; from loopscope.analysis import Settings; n = np.int64\n"
        "s = Settings(samples=n(4), tokens=n(16), batch_size=n(2), more_loops=n(6))\n"
        "print(json.dumps([s.samples, s.tokens, s.batch_size, s.more_loops]))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout == "[4, 16, 2, 6]\n", done.stderr


@pytest.mark.parametrize("value", [4.5, True, "4", 0])
def test_what_counts_nothing_is_no_whole_number(value):
    with pytest.raises(InputError, match="samples must be a whole number of at least 1, given"):
        whole_number("samples", value, 1)
