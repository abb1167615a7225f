"""Several models on the same text."""

import pytest
import torch

from loopscope.analysis.comparisons.work import compare
from loopscope.errors import InputError
from loopscope.models.native.checkpoint import read_tokenizer, save
from loopscope.models.opening.targets import zoo_folder
from tests.conftest import make_model

SMALL = {"samples": 5, "tokens": 16, "twins": False}


@pytest.fixture(scope="module")
def tokenizer():
    return read_tokenizer(zoo_folder() / "base" / "tokenizer.json")


def model(tokenizer, variant="base", layout="1+1R2+1"):
    made = make_model(variant, layout, d_vocab=tokenizer.get_vocab_size())
    made.tokenizer = tokenizer
    return made


def test_models_and_folders_are_measured_alike_on_the_same_samples(tokenizer, tmp_path):
    mesh = model(tokenizer, "mesh")
    save(mesh, tmp_path / "saved")
    found = compare([mesh, tmp_path / "saved"], **SMALL)
    assert found.tables.models == ["mesh", "saved"]
    assert torch.equal(found.samples["mesh"].tokens, found.samples["saved"].tokens)
    for name, frame in found.tables.frames().items():
        one, two = (frame[frame["model"].eq(m)].drop(columns="model") for m in ("mesh", "saved"))
        assert len(one) and one.reset_index(drop=True).equals(two.reset_index(drop=True)), name


def test_models_of_the_same_name_are_told_apart_by_their_path(tokenizer, tmp_path):
    for run in ("a", "b"):
        save(model(tokenizer), tmp_path / run / "final")
    targets = [str(tmp_path / run / "final") for run in ("a", "b")]
    found = compare(targets, measures=["update"], **SMALL)
    assert found.tables.models == targets


def test_layout_regroups_the_vanilla_models_only(tokenizer):
    base, vanilla = model(tokenizer), model(tokenizer, "vanilla", "1+1+1+1")
    frame = compare([base, vanilla], layout="1+2+1", measures=["update"], **SMALL).tables.update
    blocks = {m: list(frame[frame["model"].eq(m)]["block"].unique()) for m in ("base", "vanilla")}
    assert blocks["base"] == ["prelude", "core1", "core2", "coda"]
    assert blocks["vanilla"] == ["prelude", "core1", "coda"]


def test_all_targets_are_looked_up_before_the_first_is_measured(tokenizer):
    told = []
    with pytest.raises(InputError, match="unknown model 'nowhere'"):
        compare([model(tokenizer), "nowhere"], progress=lambda *x: told.append(x), **SMALL)
    assert not told
    with pytest.raises(InputError, match="no models given"):
        compare([])


def test_progress_counts_every_sample(tokenizer):
    told = []
    compare(
        [model(tokenizer)], progress=lambda *x: told.append(x), measures=["rank"],
        batch_size=2, **SMALL,
    )  # fmt: skip
    assert told == [("base", 2, 5), ("base", 2, 5), ("base", 1, 5)]


def test_a_comparison_shows_a_card_per_model_that_was_named(tokenizer):
    found = compare([model(tokenizer), model(tokenizer, "mesh")], samples=9, tokens=16)
    html = found._repr_html_()
    verdicts = found.verdicts.set_index("model")
    assert list(verdicts.index) == ["base", "mesh"] and "base@init" not in html
    for name in verdicts.index:
        assert name in html and verdicts.loc[name, "verdict"] in html
