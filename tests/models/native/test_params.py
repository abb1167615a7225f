"""Counts against MeSH Table 5 and Pythia's published non-embedding counts."""

import pytest

from loopscope.models.native.configuration import LoopConfig
from loopscope.models.native.parameter_counts import count_parameters, paper_table

TABLE_5 = {
    "vanilla 24": (1_423_036_416, 1_208_602_624, 0),
    "recursive 4+8R2+4": (1_020_170_240, 805_736_448, 0),
    "+mesh 4+8R2+4": (1_020_231_710, 805_797_918, 61_470),
}
PYTHIA_NON_EMBEDDING = {
    "pythia-70m": 18_915_328,
    "pythia-160m": 85_056_000,
    "pythia-410m": 302_311_424,
    "pythia-1b": 805_736_448,
    "pythia-1.4b": 1_208_602_624,
    "pythia-2.8b": 2_517_652_480,
    "pythia-6.9b": 6_444_163_072,
    "pythia-12b": 11_327_027_200,
}


def test_parameter_counts_equal_the_published_ones_to_the_digit():
    rows = {label: count for label, _, count in paper_table()}
    for label, expected in TABLE_5.items():
        count = rows[label]
        assert (count.total, count.non_embedding, count.router) == expected
    assert {n: rows[n].non_embedding for n in PYTHIA_NON_EMBEDDING} == PYTHIA_NON_EMBEDDING


@pytest.mark.parametrize(("layout", "slots"), [("1+2R3+1", 6), ("0+1R6+0", 4), ("2+3+1+2", 7)])
def test_router_parameters_follow_the_closed_form(layout, slots):
    config = LoopConfig(
        variant="mesh", layout=layout, d_model=24, n_heads=2, d_vocab=11, slots=slots
    )
    assert count_parameters(config).router == (config.K + 1) * 2 * slots * (24 + 1)


def test_tied_embeddings_are_counted_once():
    config = LoopConfig(variant="vanilla", layout="2", d_model=24, n_heads=2, d_vocab=11)
    untied, tied = count_parameters(config), count_parameters(config.replace(tied_embeddings=True))
    assert untied.total - tied.total == 11 * 24
    assert untied.non_embedding == tied.non_embedding
