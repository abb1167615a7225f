"""Options of generation that make no sense are refused in one line."""

import pytest

import loopscope as ls
from loopscope.errors import InputError


@pytest.mark.parametrize(
    "options",
    [{"seed": -1}, {"eos_token_id": -1}],
)
def test_a_number_below_zero_is_refused_by_name(options):
    with pytest.raises(InputError, match=f"{next(iter(options))} must be a"):
        ls.load("mesh@init").generate("def f", 1, **options)
