"""Models that loop as often as their input asks for (ACT): groups of equal K."""

import numpy as np
import pytest
import torch

import loopscope as ls
from loopscope.analysis.measuring import Measuring
from loopscope.analysis.options import Options
from loopscope.analysis.tables import COMPARED, Tables
from loopscope.errors import InputError, LoopCountError
from loopscope.figures import draw_all
from tests.standins import traps

TOKENS = torch.randint(61, (20, 12), generator=torch.Generator().manual_seed(3))


def counts(module) -> list[int]:
    """K of each sample, by itself."""
    return [int(module.steps(row[None])) for row in TOKENS]


@pytest.fixture(scope="module", params=[traps.Adaptive, traps.Halting])
def measured(request):
    module = request.param()
    model = ls.wrap(module, example=TOKENS[:2])
    done = []
    tables = ls.measure(model, TOKENS, COMPARED, batch_size=4, progress=done.append)
    assert sum(done) == len(TOKENS)
    return module, model, tables


def test_each_sample_is_measured_with_the_iterations_that_it_runs_alone(measured):
    module, _, tables = measured
    for table in ("update", "cka", "rank", "delta", "readout", "loss"):
        frame = getattr(tables, table)
        loops = frame.groupby("sample")["loop"].agg(lambda names: {*map(str, names)})
        assert loops.to_dict() == {i: {f"core[K={K}]"} for i, K in enumerate(counts(module))}


def test_numbers_are_those_of_a_model_unrolled_by_hand(measured):
    module, _, tables = measured
    update = tables.update.set_index(["sample", "block"])["value"]
    losses = tables.loss.set_index("sample")["value"]
    with torch.no_grad():
        for i, row in enumerate(TOKENS):
            states = module.states(row[None])
            for t, (h, h_m) in enumerate(zip(states.loops[0].h, states.loops[0].h_m, strict=False)):
                wanted = 2 * (h_m - h).norm() / (h_m.norm() + h.norm())
                assert update[i, f"core{t + 1}"] == pytest.approx(float(wanted), rel=1e-4)
            loss = torch.nn.functional.cross_entropy(states.logits[0, :-1], row[1:])
            assert losses[i] == pytest.approx(float(loss), rel=1e-5)


def test_the_notes_say_how_many_samples_ran_how_often(measured):
    module, model, tables = measured
    record = tables.provenance["models"][model.name]
    numbers = counts(module)
    groups = {tuple(group["loops"].values()): group["samples"] for group in record["groups"]}
    assert groups == {(K,): numbers.count(K) for K in set(numbers)}
    assert "depends on the sample" in "".join(record["notes"])


def test_figures_have_a_panel_for_each_number(measured, tmp_path):
    drawn = draw_all(measured[2], tmp_path, None)
    assert (tmp_path / "figures" / "fig3_update.png").exists(), drawn


def test_parts_of_a_measurement_are_those_of_the_whole(measured):
    _, model, tables = measured
    measuring = Measuring(model, TOKENS, Options(measures=("update",)), batch_size=4)
    parts = Tables.join([measuring.part(0, 9), measuring.part(9, 20)])
    keys = ["sample", "block"]
    whole = tables.update.set_index(keys)["value"].sort_index()
    assert whole.equals(parts.update.set_index(keys)["value"].sort_index())


def test_a_model_with_a_fixed_number_runs_no_pass_more():
    module = traps.Chained()
    model = ls.wrap(module, example=TOKENS[:2])
    passes = []
    module.register_forward_pre_hook(lambda *_: passes.append(1))
    ls.measure(model, TOKENS, ["update"], batch_size=4)
    assert len(passes) == 5


def test_samples_of_one_other_number_keep_the_loops_name():
    module = traps.Adaptive()
    model = ls.wrap(module, example=TOKENS[:2])
    same = TOKENS[[i for i, K in enumerate(counts(module)) if K == 4]]
    tables = ls.measure(model, same, ["update"])
    assert {*tables.update["loop"]} == {"core"} and tables.update["t"].max() == 3
    assert tables.provenance["models"][model.name]["config"]["K"] == 4


def test_one_iteration_is_a_loop_too():
    class Few(traps.Adaptive):
        def steps(self, tokens):
            return 1 + int(tokens[0, 0]) % 3

    module = Few()
    three = TOKENS[TOKENS[:, 0] % 3 == 2][:1]
    tables = ls.measure(ls.wrap(module, example=three), TOKENS, ["update"])
    assert "core[K=1]" in {*tables.update["loop"]}


def test_a_single_text_is_captured_with_its_own_iterations():
    module = traps.Adaptive()
    model = ls.wrap(module, example=TOKENS[:2])
    for row, K in zip(TOKENS, counts(module), strict=True):
        trajectory = ls.capture(model, row[None])
        assert trajectory.K == K
        with torch.no_grad():
            wanted = module.states(row[None]).loops[0].h
        assert all(torch.equal(a, b) for a, b in zip(trajectory.h, wanted, strict=True))


def test_several_texts_are_refused_and_the_number_is_not_to_be_fixed_where_it_cannot_be():
    module = traps.Adaptive()
    model = ls.wrap(module, example=TOKENS[:2])
    other = TOKENS[[1, 2]]
    with pytest.raises(LoopCountError, match="loops as often as its input asks for") as error:
        ls.capture(model, other)
    assert "ix the number" not in str(error.value)

    class Set(traps.Adaptive):
        n_loops = 3

        def steps(self, tokens):
            return self.n_loops + int(tokens[0, 0] % 2)

    module = Set()
    even, odd = (TOKENS[TOKENS[:, 0] % 2 == rest][:2] for rest in (0, 1))
    module.n_loops = 3
    with pytest.raises(InputError, match="Fix the number"):
        ls.capture(ls.wrap(module, example=even), odd)


def test_compare_redoes_what_it_took_for_samples_of_one_number(tmp_path):
    module = traps.Adaptive()
    order = sorted(range(20), key=lambda i: counts(module)[i])
    tokens = TOKENS[order].repeat_interleave(10, 0)  # several shards, the first of one number
    np.save(tmp_path / "tokens.npy", tokens.numpy())
    model = ls.wrap(module, example=tokens[:2])
    assert model.K == 2
    comparison = ls.compare(
        [model], data=tmp_path / "tokens.npy", samples=200, tokens=12,
        measures=["update", "cka", "rank", "loss"], out=tmp_path / "out",
    )  # fmt: skip
    loops = comparison.tables.update.groupby("sample")["loop"].first().astype(str)
    wanted = [f"core[K={counts(module)[i]}]" for i in order for _ in range(10)]
    assert list(loops) == wanted
    assert "depends on the sample" in " ".join(comparison.notes)
    assert {*comparison.verdicts["loop"]} == {*wanted}
