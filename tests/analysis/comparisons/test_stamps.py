"""What a result is told apart by: weights, settings, buffers, code, hooks."""

import importlib
import sys

import pytest
import torch
from torch import nn

import loopscope as ls
from loopscope.analysis.comparisons.stamps import stamp_of_model
from tests.conftest import make_model


class Looped(nn.Module):
    """A small looped model with a setting and a buffer that no state dict holds."""

    def __init__(self, size: float = 0.1, level: float = 1.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Embedding(11, 8), nn.Linear(8, 11)
        self.core = nn.Sequential(nn.Linear(8, 8), nn.Tanh())
        self.size = size
        self.register_buffer("level", torch.tensor(level), persistent=False)

    def forward(self, tokens):
        h = self.embed(tokens)
        for _ in range(3):
            h = h + self.size * self.level * self.core(h)
        return self.head(h)


TOKENS = torch.randint(11, (2, 7), generator=torch.Generator().manual_seed(1))


def stamp(module) -> dict:
    return stamp_of_model(ls.wrap(module, example=TOKENS))


def test_equal_models_have_equal_stamps():
    assert stamp(Looped()) == stamp(Looped())
    assert stamp_of_model(make_model()) == stamp_of_model(make_model())


@pytest.mark.parametrize("change", [{"size": 0.2}, {"level": 2.0}])
def test_settings_and_buffers_count(change):
    assert stamp(Looped(**change)) != stamp(Looped())


def test_one_weight_counts():
    model = make_model()
    before = stamp_of_model(model)
    with torch.no_grad():
        model.core[0].mlp.up.weight[3, 1] += 1e-6
    assert stamp_of_model(model) != before


def test_a_model_with_hooks_equals_no_other():
    model = make_model()
    before = stamp_of_model(model)
    model.add_hook("loop.1.hook_in", lambda h, hook: 0.5 * h)
    hooked = stamp_of_model(model)
    assert hooked != before and hooked != stamp_of_model(model)
    model.reset_hooks()
    assert stamp_of_model(model) == before


HELPER = "FACTOR = {}\n\ndef scaled(h):\n    return FACTOR * h\n"
MODEL = """
import helper_of_stamps
from torch import nn

class Mine(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(11, 8), nn.Linear(8, 11)
        self.core = nn.Sequential(nn.Linear(8, 8), nn.Tanh())

    def forward(self, tokens):
        h = self.embed(tokens)
        for _ in range(3):
            h = h + helper_of_stamps.scaled(self.core(h))
        return self.head(h)
"""


def test_code_imported_from_the_same_folder_counts(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "model_of_stamps.py").write_text(MODEL)
    found = []
    for factor in ("0.1", "0.2", "0.1"):
        (tmp_path / "helper_of_stamps.py").write_text(HELPER.format(factor))
        for name in ("model_of_stamps", "helper_of_stamps"):
            sys.modules.pop(name, None)
        importlib.invalidate_caches()
        torch.manual_seed(0)
        found.append(stamp(importlib.import_module("model_of_stamps").Mine()))
    for name in ("model_of_stamps", "helper_of_stamps"):
        sys.modules.pop(name, None)
    assert found[0] == found[2] != found[1]


def test_constants_in_code_without_a_file_count():
    made = []
    for factor in ("0.1", "0.2", "0.1"):
        space = {"__name__": "__notebook__", "helper_of_stamps": None}
        code = MODEL.replace("import helper_of_stamps\n", "")
        code = code.replace("helper_of_stamps.scaled(self.core(h))", f"{factor} * self.core(h)")
        exec(code, space)
        torch.manual_seed(0)
        made.append(stamp(space["Mine"]()))
    assert made[0] == made[2] != made[1]
