"""The end of a spectrum that only some samples have."""

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

from loopscope.figures.spectra import draw_spectrum, state_looks


@pytest.mark.parametrize(("left", "last"), [(10, 9), (9, 6), (2, 6)])
def test_a_line_ends_where_few_samples_still_have_a_value(left, last):
    """With 20 samples, of which `left` lack σ_7 … σ_9; the mean of the rest would turn upwards."""
    n = np.where(np.arange(10) < 7, 20, 20 - left if left < 10 else 20)
    part = pd.DataFrame(
        {
            "state": "h0",
            "i": np.arange(10),
            "mean": -0.1 * np.arange(10),
            "std": 0.05,
            "n": n,
            "n_flagged": 20 - n,
        }
    )
    ax = Figure().subplots()
    draw_spectrum(ax, part, state_looks(["h0"]))
    x, y = ax.lines[0].get_data()
    assert list(x) == list(range(last + 1))
    np.testing.assert_allclose(y, 10.0 ** (-0.1 * np.arange(last + 1)))
