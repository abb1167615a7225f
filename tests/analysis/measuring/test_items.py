"""Samples that are no windows of tokens, with a loss of the user's own."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import Dataset

import loopscope as ls
from loopscope.analysis.collapse import judge
from loopscope.analysis.measuring.sample_items import read_items, stacked
from loopscope.analysis.tables import COMPARED
from loopscope.errors import InputError
from tests.standins.items import Carry, Regression, Solver

RANDOM = torch.Generator().manual_seed(2)


def task(pos: int) -> tuple[torch.Tensor, torch.Tensor]:
    weights, xs = (torch.randn(n, 2, generator=RANDOM) for n in (1, pos))
    return xs, (xs * weights).sum(1)


ITEMS = [task(10) for _ in range(10)]
MIXED = [task(n) for n in (10, 7, 10, 12, 7, 10)]


def squared(prediction, batch):
    return (prediction - batch[1]).square().mean(-1)


def wrapped(module, items):
    return ls.wrap(module, example=stacked(items[:2]))


def by_hand(module, items):
    with torch.no_grad():
        return [float(squared(module(x[None], y[None]), (x[None], y[None]))) for x, y in items]


@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize("items", [ITEMS, MIXED], ids=["alike", "mixed"])
def test_losses_are_those_of_each_item_by_itself(items, batch_size):
    module = Regression()
    tables = ls.measure(wrapped(module, ITEMS), items, loss=squared, batch_size=batch_size)
    losses = tables.loss.set_index("sample")["value"].sort_index()
    assert list(losses.index) == list(range(len(items)))
    assert np.allclose(losses, by_hand(module, items), rtol=1e-5)


def test_states_of_items_are_those_of_their_own_forward_pass():
    module = Regression()
    rank = ls.measure(wrapped(module, ITEMS), MIXED, ["rank"]).rank
    stable = rank[rank["measure"].eq("stable")].set_index(["sample", "state"])["value"]
    with torch.no_grad():
        for number, (xs, ys) in enumerate(MIXED):
            h = module.embedded(xs[None], ys[None])
            sigma = torch.linalg.svdvals((h + h)[0].double())
            wanted = float((sigma**2).sum() / sigma[0] ** 2)
            assert stable[number, "h0"] == pytest.approx(wanted, rel=1e-5)


def test_a_reading_is_the_loss_with_the_state_in_place_of_the_last():
    module = Regression()
    model = wrapped(module, ITEMS)
    readout = ls.measure(model, ITEMS, ["readout"], loss=squared).readout
    values = (
        readout.astype({"reading": str}).set_index(["reading", "t", "sample"])["value"].sort_index()
    )
    inputs = stacked(ITEMS)
    h = model.capture(inputs).h
    with torch.no_grad():
        for t, state in enumerate(h):
            lengths = [x.norm(dim=-1, keepdim=True) for x in (h[-1], state)]
            for reading, x in (("raw", state), ("matched", state * lengths[0] / lengths[1])):
                wanted = squared(module.read(x), inputs)
                assert np.allclose(values[reading, t].sort_index(), wanted, rtol=1e-4)
    assert values["fitted"].notna().all()


def test_one_number_for_a_batch_is_asked_for_sample_by_sample():
    model = wrapped(Regression(), ITEMS)
    mean = ls.measure(model, ITEMS, ["loss"], loss=lambda y, b: float(squared(y, b).mean()))
    each = ls.measure(model, ITEMS, ["loss"], loss=squared, batch_size=1)
    assert np.allclose(mean.loss["value"], each.loss["value"], rtol=1e-6)
    assert "run by itself" in "".join(mean.provenance["models"][model.name]["notes"])


def test_a_puzzle_takes_dicts_dataclasses_and_grids():
    generator = torch.Generator().manual_seed(4)

    class Puzzles(Dataset):
        documents = ("a", "a", "b", "b", "c", "c")

        def __len__(self):
            return 6

        def __getitem__(self, i):
            grids = torch.randint(61, (2, 3, 4), generator=generator)
            carry = Carry(torch.zeros(12, 32), torch.tensor(i))
            return carry, {"inputs": grids[0], "labels": grids[1]}

    def loss(output, batch):
        labels = batch[1]["labels"].flatten(1)
        return F.cross_entropy(output[1]["logits"].mT, labels, reduction="none").mean(1)

    items = read_items(Puzzles())
    module = Solver()
    tables = ls.measure(wrapped(module, items.items), items, COMPARED, loss=loss)
    with torch.no_grad():
        wanted = [float(loss(module(*stacked([item])), stacked([item]))) for item in items.items]
    assert np.allclose(tables.loss["value"], wanted, rtol=1e-5)
    assert list(tables.loss["document"]) == ["a", "a", "b", "b", "c", "c"]
    assert tables.readout["value"].notna().any()


def test_without_a_loss_the_notes_say_what_to_give():
    model = wrapped(Regression(), ITEMS)
    tables = ls.measure(model, ITEMS, COMPARED)
    assert len(tables.loss) == len(tables.readout) == 0 < len(tables.cka)
    assert "give loss=" in "".join(tables.provenance["models"][model.name]["notes"])


def test_windows_of_tokens_take_a_loss_too():
    model = ls.load("base")
    tokens = torch.randint(model.config.d_vocab, (5, 12))

    def loss(logits, batch):
        targets = batch[:, 1:].to(logits.device)
        return F.cross_entropy(logits[:, :-1].mT, targets, reduction="none").mean(1)

    own = ls.measure(model, tokens, ["loss", "readout"], loss=loss)
    usual = ls.measure(model, tokens, ["loss", "readout"])
    assert np.allclose(own.loss["value"], usual.loss["value"], atol=1e-5)
    assert np.allclose(own.readout["value"], usual.readout["value"], atol=1e-4)


def test_provenance_tells_items_apart():
    model = wrapped(Regression(), ITEMS)
    first, other = (
        ls.measure(model, items, ["rank"]).provenance["models"][model.name]["samples"]
        for items in (ITEMS, [*ITEMS[:-1], task(10)])
    )
    assert first["source"] == "items given in Python" and first["samples"] == len(ITEMS)
    assert first["sha256"] != other["sha256"]
    assert first["sha256"] == read_items(list(ITEMS)).sha256


@pytest.mark.parametrize(
    ("items", "message"),
    [
        ([], "zero samples"),
        ([[1, 2, 3]], "sample 0 has no tensor"),
        ([ITEMS[0], "text"], "sample 1 has no tensor"),
    ],
)
def test_what_are_no_items_is_refused(items, message):
    with pytest.raises(InputError, match=message):
        ls.measure(wrapped(Regression(), ITEMS), items)


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda y, b: y, r"gave \(10, 10\) numbers for 10 samples"),
        (lambda y, b: "good", "gave str"),
        (3, "must be a function"),
    ],
)
def test_what_is_no_loss_is_refused(loss, message):
    with pytest.raises(InputError, match=message):
        ls.measure(wrapped(Regression(), ITEMS), ITEMS, loss=loss)


def test_compare_measures_items_and_goes_on_where_it_was(tmp_path, monkeypatch):
    module = Regression()
    model = wrapped(module, ITEMS)
    whole = ls.compare([model], data=ITEMS, loss=squared)
    assert np.allclose(whole.tables.loss["value"], by_hand(module, ITEMS), rtol=1e-5)

    def fail(*_):
        raise InputError("no room")

    with pytest.raises(InputError, match="no room"):
        ls.compare([model], data=ITEMS, loss=squared, out=tmp_path, write=fail)
    monkeypatch.setattr(type(model), "capture", fail)
    again = ls.compare([model], data=ITEMS, loss=squared, out=tmp_path)
    assert again.tables.loss.equals(whole.tables.loss)
    assert "in a unit of its own" in " ".join(again.notes)
    assert again.findings.summary()["samples"]["count"] == len(ITEMS)
    assert (tmp_path / "report.html").exists()


def test_compare_with_other_items_or_another_loss_begins_anew(tmp_path):
    model = wrapped(Regression(), ITEMS)

    def fail(*_):
        raise InputError("no room")

    for data, loss in ((ITEMS, squared), (ITEMS[:-1], squared), (ITEMS, lambda y, b: y.mean(1))):
        with pytest.raises(InputError, match="no room"):
            ls.compare([model], data=data, loss=loss, out=tmp_path, write=fail)
    keys = [path for path in (tmp_path / ".shards").iterdir() if path.name != "launch"]
    assert len([path for path in keys if path.is_dir()]) == 3


def test_small_gains_in_a_unit_that_nobody_knows_accuse_no_loop():
    """A loss in small units: 0.001 of gain is little in nats, and may be all in another."""
    model = wrapped(Regression(), ITEMS)
    comparison = ls.compare(
        [model], data=ITEMS, loss=lambda y, b: 1e-6 * squared(y, b), more_loops=0
    )
    signs = comparison.signs.assign(low=lambda s: s["low"].where(s["sign"].ne("cka_least"), 0.1))
    signs.loc[signs["sign"].eq("cka_least"), ["mean", "low", "high"]] = (0.3, 0.2, 0.4)
    nats = next(iter(judge(signs).values()))
    own = next(iter(judge(signs, own_losses={model.name: "tiny"}).values()))
    given = judge(signs, own_losses={model.name: "tiny"}, thresholds={"harm": 1e-8})
    by_gain = {check.answer for check in nats.checks if "gain of the loop" in check.because}
    assert "yes" in by_gain  # in nats such gains would accuse
    assert not any(
        check.answer == "yes"
        and ("gain" in check.because or "overthinking" in check.because)
        and "below 0" not in check.because
        for check in own.checks
    )
    assert any(
        "overthinking" in check.because and check.answer == "yes"
        for check in next(iter(given.values())).checks
    )
