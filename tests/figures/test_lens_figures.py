"""Figures of lenses, from tables made by hand: what is drawn where, and what text is written."""

from io import BytesIO

import numpy as np
import pandas as pd
import pytest
from matplotlib.patches import Rectangle

from loopscope import figures
from loopscope.analysis.tables.frames import Tables
from loopscope.analysis.tables.registry import schema
from loopscope.errors import InputError
from loopscope.figures.jobs import plan
from loopscope.figures.lens_lines import SHOWN, places
from loopscope.figures.token_grid import POSITIONS, fitting, grid

COLUMNS = ["loss", "kl_final", "kl_next", "entropy", "top_final", "flipped", "rank_final",
           "rank_final_median", "rank_true", "rank_true_median"]  # fmt: skip


def framed(rows: list[dict], table: str) -> pd.DataFrame:
    frame = pd.DataFrame(rows)
    for name, dtype in schema(table).items():
        frame[name] = pd.Series(frame.get(name), dtype=dtype)
    return frame[list(schema(table))]


def lens_table(model="m", K=3, more=0, kinds=("logit", "coda"), flag=None, samples=6):
    rng = np.random.default_rng(K)
    rows = []
    for sample in range(samples):
        for kind in kinds:
            course = ["h_emb", *(f"h{t}" for t in range(K + 1))]
            course += ["h_out"] if kind == "logit" else []
            course += [f"h{t}" for t in range(K + 1, K + 1 + more)]
            for place, state in enumerate(course):
                beyond = state[1:].isdigit() and int(state[1:]) > K
                values = dict.fromkeys(COLUMNS, 8.0 / (place + 1) + rng.normal(0, 0.1))
                values["top_final"] = min(1.0, 0.2 * (place + 1))
                rows.append({
                    "model": model, "sample": sample, "document": f"d{sample % 3}", "loop": "core",
                    "flag": flag, "kind": kind, "state": state, "beyond": beyond, **values,
                })  # fmt: skip
    return framed(rows, "lens")


def token_table(tokens, inputs, model="m", kind="logit", beyond=()):
    """Of state → the top token at each position."""
    rows = []
    for state, line in tokens.items():
        for pos, token in enumerate(line):
            for rank, word in enumerate((token, "second"), start=1):
                rows.append({
                    "model": model, "sample": 0, "loop": "core", "flag": None, "kind": kind,
                    "state": state, "beyond": state in beyond, "pos": pos, "input": inputs[pos],
                    "rank": rank, "token": word, "probability": 0.9 / rank,
                })  # fmt: skip
    return framed(rows, "lens_tokens")


def drawn(fig):
    fig.savefig(BytesIO(), format="png", dpi=50)
    return fig


def small_print(fig) -> str:
    return " ".join(fig.get_supxlabel().split())


def line(ax, label):
    [found] = [each for each in ax.get_lines() if each.get_label() == label]
    return found


def test_a_line_is_the_mean_of_each_state_in_the_order_of_computation():
    frame = lens_table()
    fig = drawn(figures.lens(Tables(lens=frame)))
    assert len(fig.axes) == 2 * len(SHOWN)
    for row, value in enumerate(SHOWN):
        for column, kind in enumerate(("logit", "coda")):
            rows = frame[frame["kind"].eq(kind)]
            mean = rows.groupby("state", sort=False, observed=True)[value].mean()
            found = line(fig.axes[2 * row + column], "m")
            places_of = [-1, 0, 1, 2, 3] + ([4] if kind == "logit" else [])
            assert found.get_xdata().tolist() == places_of
            assert found.get_ydata() == pytest.approx(mean.to_numpy())
    labels = [text.get_text() for text in fig.axes[-1].get_xticklabels()]
    assert labels == [r"$h_\mathrm{emb}$", "0", "1", "2", "3", r"$h_\mathrm{out}$"]


def test_states_beyond_the_models_own_are_dotted_from_h_K_on():
    fig = drawn(figures.lens(Tables(lens=lens_table(more=2))))
    for ax in fig.axes[:2]:
        more = line(ax, "_more")
        assert more.get_xdata().tolist() == [3, 4, 5] and more.get_linestyle() == ":"
        assert 4 not in line(ax, "m").get_xdata()
    assert "Dotted: more loops" in small_print(fig)
    assert "Dotted" not in small_print(drawn(figures.lens(Tables(lens=lens_table()))))


def test_models_share_the_place_of_h_out_and_lacking_lenses_are_said():
    frame = pd.concat([lens_table("m", K=3), lens_table("n", K=8, kinds=("logit",))])
    frame = frame.astype(schema("lens"))
    fig = drawn(figures.lens(Tables(lens=frame)))
    assert line(fig.axes[0], "m").get_xdata()[-1] == line(fig.axes[0], "n").get_xdata()[-1] == 9
    assert "No coda lens values: n." in small_print(fig)
    alone = drawn(figures.lens(Tables(lens=frame), "n"))
    assert len(alone.axes) == len(SHOWN)


def test_a_model_without_a_sound_value_says_so():
    fig = drawn(figures.lens(Tables(lens=lens_table(flag="nonfinite"))))
    texts = [text.get_text() for ax in fig.axes for text in ax.texts]
    assert any("no sound values" in text for text in texts)


def test_layers_stand_between_the_states_that_they_lead_from_and_to():
    states = ["h_emb", "prelude.0", "h0", "core1.0", "core1.1", "h1", "coda.0", "h_out"]
    at = places(states, last=1)
    assert list(at.values()) == sorted(at.values())
    assert at["prelude.0"] == -0.5 and at["core1.1"] == pytest.approx(2 / 3)
    assert at["coda.0"] == 1.5 and at["h_out"] == 2
    assert places(["h1", "coda.0", "h_out"], last=3)["coda.0"] == 2.5


INPUTS = ["def", " f", "(", "x", "):"]
TOKENS = {
    "h_emb": ["a", " f", "b", ")", "\n"],
    "h0": [" f", " f", "b", ")", "\n"],
    "h1": ["a", "x", "x", ")", "\n"],
    "h_out": ["a", "x", "x", "):", "\n"],
}


def test_the_frame_is_where_the_final_answer_comes_to_stay():
    frame = token_table(TOKENS, INPUTS)
    found = grid(frame, "logit", 0)
    assert found.states == ("h_emb", "h0", "h1", "h_out")
    assert found.settled == (2, 2, 2, 3, 0)  # at first "a" was on top, and then was not
    assert found.tokens[:, 0].tolist() == ["a", " f", "a", "a"]
    assert found.truth == (" f", "(", "x", "):", None)
    fig = drawn(figures.lens_tokens(Tables(lens_tokens=frame)))
    frames = [p for p in fig.axes[0].patches if isinstance(p, Rectangle)]
    assert [p.get_y() for p in frames] == [2, 2, 2, 3, 0]
    bold = {(t.get_position(), t.get_text()) for t in fig.axes[0].texts if t.get_weight() == "bold"}
    assert bold == {
        ((0.5, 1.5), "␣f"), ((2.5, 2.5), "x"), ((2.5, 3.5), "x"), ((3.5, 3.5), "):"),
    }  # fmt: skip


def test_states_beyond_do_not_decide_what_is_final():
    tokens = {**TOKENS, "h2": ["z"] * 5}
    found = grid(token_table(tokens, INPUTS, beyond=["h2"]), "logit", 0)
    assert found.settled == (2, 2, 2, 3, 0) and found.own == 4
    fig = drawn(figures.lens_tokens(Tables(lens_tokens=token_table(tokens, INPUTS, beyond=["h2"]))))
    assert "Below the gap: more loops" in small_print(fig)


def test_tokens_of_any_script_are_drawn_without_a_warning():
    strange = ["\n\n    ", "日本語", "$x^2$", "\x00\ufffd", "🙂" * 3, "", "a" * 40, "===="]
    frame = token_table({"h0": strange, "h_out": strange[::-1]}, strange)
    fig = drawn(figures.lens_tokens(Tables(lens_tokens=frame)))
    written = {text.get_text() for text in fig.axes[0].texts}
    assert "∅" in written and not any("\n" in text for text in written)
    assert all(len(fitting(token)) <= 12 for token in strange)


def test_a_long_text_goes_on_below_and_what_is_left_out_is_said():
    inputs = [str(pos) for pos in range(50)]
    frame = token_table({"h0": inputs, "h_out": inputs}, inputs)
    fig = drawn(figures.lens_tokens(Tables(lens_tokens=frame)))
    assert len(fig.axes) == 2 + 1  # two bands, a colour bar
    assert "Shown are positions 0 to 31 of 50." in small_print(fig)
    first = [text.get_text() for text in fig.axes[1].get_xticklabels()]
    assert first == inputs[POSITIONS : 2 * POSITIONS]
    fig = drawn(figures.lens_tokens(Tables(lens_tokens=frame), first=45))
    assert "positions 45 to 49 of 50" in small_print(fig)
    with pytest.raises(InputError, match="first is 50; the text has positions 0 to 49"):
        figures.lens_tokens(Tables(lens_tokens=frame), first=50)


def test_of_many_states_some_are_shown():
    tokens = {f"h{t}": ["a"] for t in range(100)} | {"h_out": ["a"]}
    frame = token_table(tokens, ["x"])
    found = grid(frame, "logit", 0)
    assert len(found.states) <= 42 and found.states[0] == "h0" and found.states[-1] == "h_out"
    assert "are not shown" in small_print(drawn(figures.lens_tokens(Tables(lens_tokens=frame))))


def test_a_state_that_is_not_finite_has_empty_cells():
    frame = token_table(TOKENS, INPUTS)
    lost = frame["state"].eq("h_out")
    frame["flag"] = frame["flag"].cat.add_categories(["nonfinite"])
    frame.loc[lost, "flag"], frame.loc[lost, "probability"] = "nonfinite", np.nan
    found = grid(frame, "logit", 0)
    assert (
        all(token is None for token in found.tokens[-1]) and np.isnan(found.probability[-1]).all()
    )
    assert found.settled == (-1,) * 5
    drawn(figures.lens_tokens(Tables(lens_tokens=frame)))


def test_both_figures_are_among_those_that_the_commands_draw():
    tables = Tables(lens=lens_table(), lens_tokens=token_table(TOKENS, INPUTS))
    jobs, missing = plan(tables)
    assert [job.name for job in jobs] == ["lens", "lens_tokens_m"] and not missing
    for job in jobs:
        drawn(job.make())
