import pytest

from loopscope.errors import InputError
from loopscope.models.native.configuration import Layout, LoopConfig, parse_variant


@pytest.mark.parametrize("text", ["12", "3+6R3+3", "0+1R6+0", "4+8+8+4", "0+2+3+1+0"])
def test_a_layout_string_survives_parsing_and_printing(text):
    assert str(Layout.parse(text)) == text


def test_layout_counts_layers_of_parameters_and_of_compute():
    layout = Layout.parse("3+6R3+2")
    assert (layout.n_param_layers, layout.n_layers, layout.K) == (11, 23, 3)
    assert [layout.core_start(t) for t in range(4)] == [3, 9, 15, 21]
    uneven = Layout.parse("1+2+5+0")
    assert (uneven.n_param_layers, uneven.n_layers, uneven.K, uneven.shared) == (8, 8, 2, False)
    assert list(uneven.core_layers(1)) == [2, 3, 4, 5, 6]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "x",
        "3+6R3",
        "3+6R0+3",
        "3+0R2+3",
        "1+2",
        "-1+2R2+1",
        "1+0+1",
        "0",
        "3+6R3+3+1",
        "1.5",
        "1 2",
    ],
)
def test_nonsense_layouts_are_refused_with_the_allowed_forms(text):
    with pytest.raises(InputError, match="Allowed are"):
        Layout.parse(text)


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("anchor*", "anchor_emb"),
        ("+mesh", "mesh"),
        ("anchor+residual", "residual+anchor"),
        ("anchor*+anchor+residual", "residual+anchor+anchor_emb"),
    ],
)
def test_variant_names_have_one_canonical_form(text, canonical):
    assert parse_variant(text) == canonical


@pytest.mark.parametrize("text", ["meshh", "mesh+anchor", "", "base+residual"])
def test_unknown_variants_are_named(text):
    with pytest.raises(KeyError, match=r"unknown variant .*summed"):
        parse_variant(text)


def test_a_doubled_supplement_is_refused():
    with pytest.raises(InputError, match="twice"):
        parse_variant("anchor+anchor")


def config(**changes):
    given = {"variant": "mesh", "layout": "1+2R3+1", "d_model": 8, "n_heads": 2, "d_vocab": 9}
    return LoopConfig(**{**given, **changes})


def test_slots_default_to_K_plus_3():
    assert config().slots == 6
    assert config(layout="1+2R2+1").slots == 5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_heads": 3}, "must divide d_model"),
        ({"d_model": 0}, "positive integer"),
        ({"slots": 0}, "slots must be a positive integer"),
        ({"d_mlp": -3}, "d_mlp must be a positive integer"),
        ({"rotary_base": 0.0}, "rotary_base must be a positive number"),
        ({"init_std": -1.0}, "init_std must be a positive number"),
        ({"d_model": 6, "n_heads": 2, "rotary_pct": 1.0}, "an odd number"),
        ({"variant": "base", "slots": 4}, "leave slots out"),
        ({"variant": "vanilla"}, "has no loop"),
        ({"layout": "4"}, "needs core iterations"),
        ({"rotary_pct": 1.5}, "rotary_pct"),
        ({"act_fn": "gellu"}, "did you mean gelu"),
        ({"transition_query": "x"}, "unknown transition_query"),
    ],
)
def test_bad_configurations_say_what_is_allowed(changes, message):
    with pytest.raises(InputError, match=message):
        config(**changes)


def test_configuration_survives_json_and_refuses_unknown_or_missing_keys():
    assert LoopConfig.from_dict(config().to_dict()) == config()
    with pytest.raises(InputError, match="did you mean d_model"):
        LoopConfig.from_dict({**config().to_dict(), "d_modell": 3})
    values = config().to_dict()
    del values["layout"], values["d_vocab"]
    with pytest.raises(InputError, match="lacks layout, d_vocab"):
        LoopConfig.from_dict(values)
