"""The monitor: what `measure` says of a checkpoint, without a trace in the training."""

import math
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import loopscope as ls
from loopscope.analysis.collapse import SIGNS, per_sample
from loopscope.analysis.measures import cka_estimators as cka
from loopscope.errors import InputError
from loopscope.models.native.checkpoint import load_checkpoint, save
from loopscope.models.native.configuration import LoopConfig
from loopscope.models.native.loop_model import LoopModel
from loopscope.training.monitor import MEASURES, Monitor, _undisturbed, plain_module
from tests.training import looped

NAMES = [sign.name for sign in SIGNS]
PROBE = looped.windows(3, seed=99)
CONFIG = LoopConfig(variant="mesh", layout="1+1R3+1", d_model=16, n_heads=2, d_vocab=96)


def same(one, two):
    """Whether two rows are equal to the last bit, NaN where the other is."""
    return list(one) == list(two) and all(
        one[k] == two[k] or (math.isnan(one[k]) and math.isnan(two[k])) for k in one
    )


def by_hand(model, probe=PROBE):
    """What `measure` and `per_sample` say of a model."""
    values = per_sample(ls.measure(model, probe, MEASURES))[NAMES]
    return {name: float(values[name].mean()) for name in NAMES}


def random_states():
    """Not Python's generator: the checks of types in these tests draw from that."""
    return [*torch.get_rng_state().tolist(), *np.random.get_state()[1].tolist()]


def attributes(model):
    return set(vars(model))


def test_the_numbers_are_those_of_a_checkpoint_saved_at_that_step(tmp_path):
    model, monitor = LoopModel(CONFIG, seed=3), Monitor(PROBE, every=2)
    assert list(monitor.table) == ["step", *NAMES, "n_flagged"] and monitor.table.empty
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(5):
        if monitor.due(step):
            monitor.measure(model, step)
            save(model, tmp_path / str(step))
        model(looped.windows(4, seed=step), return_type="loss").backward()
        optimizer.step()
    assert [row["step"] for row in monitor.rows] == [0, 2, 4]
    for row in monitor.rows:
        want = by_hand(load_checkpoint(tmp_path / str(row["step"])))
        assert same({name: row[name] for name in NAMES}, want)
        assert row["n_flagged"] == 0
    assert monitor.rows[0]["loss"] != monitor.rows[2]["loss"]
    assert monitor.table["step"].tolist() == [0, 2, 4]
    assert list(monitor.table) == ["step", *NAMES, "n_flagged"]
    assert monitor.seconds > 0


def test_a_foreign_model_is_wrapped_once_and_followed_as_it_changes(monkeypatch):
    model, monitor, rows = looped.make(), Monitor(PROBE), []
    wrapped = ls.wrap(looped.make(), PROBE)

    def after(step):
        rows.append(monitor.measure(model, step))
        wrapped.module.load_state_dict(model.state_dict())
        assert same({name: rows[-1][name] for name in NAMES}, by_hand(wrapped.eval()))

    monkeypatch.setattr(ls.training.monitor, "wrap", counted := Counted(ls.wrap))
    looped.train(model, 3, after)
    assert counted.calls == 1
    assert rows[0]["skew"] != rows[3]["skew"]


class Counted:
    def __init__(self, function):
        self.function, self.calls = function, 0

    def __call__(self, *args, **kwargs):
        self.calls += 1
        return self.function(*args, **kwargs)


@pytest.mark.parametrize("threads", [1, 2])
def test_a_training_with_dropout_ends_bit_equal_with_and_without(threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    ends = []
    for monitor in (None, Monitor(PROBE)):
        model = looped.make()
        if monitor is None:
            looped.train(model, 4)
        else:
            looped.train(model, 4, lambda step, m=model, mon=monitor: mon.measure(m, step))
            assert len(monitor.rows) == 5
        ends.append(looped.weights(model))
        assert torch.get_num_threads() == threads
    torch.set_num_threads(before)
    assert torch.equal(*ends)


def test_modes_generators_gradients_buffers_and_hooks_stay_as_they_were():
    model = looped.make().train()
    model.coda.eval()  # as for a frozen part
    model(PROBE, labels=PROBE)["loss"].backward()
    seen = []
    model.head.register_forward_hook(lambda *_: seen.append(1))
    modes = [part.training for part in model.modules()]
    hooks = [len(part._forward_hooks) + len(part._forward_pre_hooks) for part in model.modules()]
    grads = {name: p.grad.clone() for name, p in model.named_parameters()}
    states, calls, names = random_states(), model.calls.clone(), attributes(model)
    Monitor(PROBE).measure(model, 0)
    assert [part.training for part in model.modules()] == modes
    assert hooks == [
        len(part._forward_hooks) + len(part._forward_pre_hooks) for part in model.modules()
    ]
    assert all(torch.equal(p.grad, grads[name]) for name, p in model.named_parameters())
    assert random_states() == states
    assert torch.equal(model.calls, calls) and attributes(model) == names
    assert all(p.requires_grad for p in model.parameters()) and torch.is_grad_enabled()


class Noisy(looped.Looped):
    """Draws from generators, and fails when it is told to."""

    broken = False

    def forward(self, input_ids, labels=None):
        np.random.rand(), torch.rand(1)
        if self.broken:
            raise RuntimeError("told to")
        return super().forward(input_ids, labels)


def test_a_measurement_that_fails_leaves_everything_as_it_was_too():
    model, monitor = Noisy(), Monitor(PROBE)
    states = random_states()
    monitor.measure(model, 0)
    model.broken = True
    with pytest.raises(RuntimeError, match="told to"):
        monitor.measure(model, 1)
    assert random_states() == states
    assert all(part.training for part in model.modules())
    assert [row["step"] for row in monitor.rows] == [0]


def test_a_model_that_leaves_its_random_numbers_to_torch_takes_none_from_the_training():
    wrapped, monitor = ls.wrap(Noisy(), PROBE), Monitor(PROBE)
    wrapped.seed = None  # as to train it
    states = random_states()
    monitor.measure(wrapped, 0)
    assert random_states() == states


def test_python_s_generator_stays_as_it_was():
    model = looped.make()
    before = random.getstate()
    with _undisturbed(model):
        random.random()
        assert random.getstate() != before
    assert random.getstate() == before


NARROW = replace(CONFIG, d_model=8)  # more tokens than dimensions: CKA makes its own products


@pytest.mark.parametrize("make", [lambda: looped.make(width=8), lambda: LoopModel(NARROW)])
def test_under_autocast_the_model_runs_so_and_the_statistics_do_not(make, one_thread, monkeypatch):
    """The states are those of the model's own forward under autocast; CKA multiplies in float32."""
    model, on, gram = make().eval(), [], cka._centred_gram

    def noted(x, out):
        on.append(torch.is_autocast_enabled("cpu"))
        return gram(x, out)

    monkeypatch.setattr(cka, "_centred_gram", noted)
    before, plain = attributes(model), Monitor(PROBE).measure(model, 0)
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(PROBE)
        rough = Monitor(PROBE).measure(model, 0)
        assert torch.is_autocast_enabled("cpu")
    assert attributes(model) == before
    assert on and not any(on)
    logits = logits["logits"] if isinstance(logits, dict) else logits
    assert logits.dtype == torch.bfloat16
    own = [
        nn.functional.cross_entropy(x[:-1].float(), y[1:])
        for x, y in zip(logits, PROBE, strict=True)
    ]
    assert rough["loss"] == pytest.approx(torch.stack(own).mean().item(), rel=1e-6)
    assert 0 < abs(rough["loss"] - plain["loss"]) < 0.05
    assert 0 < abs(rough["loop_gain"] - plain["loop_gain"]) < 0.05


def test_under_autocast_every_h_t_is_read_out_as_h_k_is():
    """A loop that does nothing gains nothing, to the last bit."""
    model = LoopModel(
        LoopConfig(variant="base", layout="1+1R2+1", d_model=8, n_heads=2, d_vocab=96)
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith(("core.0.attn.out", "core.0.mlp.down")):
                parameter.zero_()
    with torch.autocast("cpu", torch.bfloat16):
        row = Monitor(PROBE).measure(model, 0)
    assert row["delta_last"] == 0
    assert row["loop_gain"] == 0


@pytest.fixture
def one_thread():
    """What is measured runs in the thread that asks for it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_flagged_values_are_left_out_and_counted():
    """h(0) of a model that starts from zero has no CKA: NaN in the row; a part of them: counted."""
    model = LoopModel(CONFIG)
    probe = PROBE.clone()
    probe[1] = 5  # one token again and again: states without spread
    values = per_sample(ls.measure(model, probe, MEASURES))[NAMES]
    missing = int(values.isna().sum()[values.notna().any()].sum())
    assert missing > 0
    monitor = Monitor(probe)
    row = monitor.measure(model, 0)
    assert row["n_flagged"] == missing
    assert row["cka_debiased"] == pytest.approx(values["cka_debiased"].dropna().mean())
    assert math.isnan(row["more_loss"])
    base = LoopModel(replace(CONFIG, variant="base", slots=None))
    assert math.isfinite(Monitor(PROBE, more_loops=5).measure(base, 0)["more_loss"])


def test_other_loops_have_columns_of_their_own():
    class Two(looped.Looped):
        def __init__(self):
            super().__init__()
            self.second = looped.Block(16)

        def forward(self, input_ids, labels=None):
            state = self.embed(input_ids)
            for _ in range(4):
                state = self.core[1](self.core[0](state))
            for _ in range(2):
                state = self.second(state)
            return {"logits": self.head(state)}

    wrapped = ls.wrap(Two().eval(), PROBE)
    main, other = [loop.name for loop in wrapped.map.loops]
    row = Monitor(PROBE).measure(wrapped, 0)
    values = per_sample(ls.measure(wrapped, PROBE, MEASURES)).set_index("loop")
    for loop, prefix in ((main, ""), (other, f"{other}/")):
        assert row[f"{prefix}skew"] == pytest.approx(values.loc[loop, "skew"].mean(), abs=1e-12)
    assert row["skew"] != row[f"{other}/skew"]


def test_text_is_read_by_a_model_with_a_tokenizer():
    model = ls.load("base")
    text = "def double(x):\n    return x + x\n"
    row = Monitor(text).measure(model, 0)
    tokens = model.to_tokens(text)
    assert same(row, Monitor(tokens).measure(model, 0))
    with pytest.raises(InputError, match="has no tokenizer"):
        Monitor(text).measure(LoopModel(CONFIG), 0)


def test_the_file_has_a_row_per_step_and_a_resumed_run_continues_it(tmp_path):
    out, model = tmp_path / "runs" / "monitor.csv", LoopModel(CONFIG)

    def go(monitor, *steps):
        for step in steps:
            monitor.measure(model, step)

    go(Monitor(PROBE, out=out), 0, 10, 20, 30)
    whole = out.read_bytes()
    lines = whole.decode().splitlines()
    assert lines[0] == ",".join(["step", *NAMES, "n_flagged"])
    assert [line.split(",")[0] for line in lines[1:]] == ["0", "10", "20", "30"]
    empty = lines[0].split(",").index("more_loss")
    assert lines[1].split(",")[empty] == ""
    for cut in (1, 40, len(lines[-1]) + 1):  # killed in the middle of a line, or before it
        out.write_bytes(whole[:-cut])
        resumed = Monitor(PROBE, out=out)
        resumed.resume(20)
        assert [row["step"] for row in resumed.rows] == [0, 10, 20]
        go(resumed, 30)
        assert out.read_bytes() == whole
    resumed = Monitor(PROBE, out=out)
    resumed.resume(10)  # from a state of step 10: what came later is taken again
    assert out.read_text().count("\n") == 3
    go(resumed, 20, 30)
    assert out.read_bytes() == whole
    go(Monitor(PROBE, out=out), 20)  # without a word the row of a step and later ones make way
    assert out.read_text().splitlines() == lines[:4]
    again = Monitor(PROBE, out=out)
    assert all(same(a, b) for a, b in zip(again.rows, resumed.rows, strict=False))


def test_rows_of_another_version_keep_their_columns(tmp_path):
    out = tmp_path / "monitor.csv"
    out.write_text("step,loss,older,n_flagged\n0,7.5,1.25,0.0\n")
    Monitor(PROBE, out=out).measure(LoopModel(CONFIG), 5)
    old, new = Monitor(PROBE, out=out).rows
    assert (old["loss"], old["older"], new["step"]) == (7.5, 1.25, 5)
    assert math.isnan(old["skew"]) and math.isnan(new["older"]) and new["skew"] > 0


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("step,tokens,train_loss\n1,2,3.0\n", "columns do not go from step to n_flagged"),
        ("step,loss,n_flagged\n1,2\n", "shorter"),
        ("step,loss,n_flagged\n1,two,0\n", "could not convert"),
        ("no line", "columns do not go"),
        ("\nstep,loss,n_flagged\n", "columns do not go"),
    ],
)
def test_a_file_of_something_else_is_refused_and_kept(tmp_path, text, why):
    (tmp_path / "log.csv").write_text(text)
    with pytest.raises(InputError, match=f"no log of a monitor.*{why}.*choose another file"):
        Monitor(PROBE, out=tmp_path / "log.csv")
    assert (tmp_path / "log.csv").read_text() == text


def test_what_cannot_be_is_refused_when_the_monitor_is_made():
    with pytest.raises(InputError, match="every is 0; give the steps between measurements"):
        Monitor(PROBE, every=0)
    with pytest.raises(InputError, match="a monitor needs rank too"):
        Monitor(PROBE, measures=("update", "cka"))
    with pytest.raises(InputError, match="samples must have two axes"):
        Monitor(PROBE[0])
    with pytest.raises(InputError, match="token id 95 .* is out of range"):
        small = LoopConfig(variant="base", layout="0+1R2+0", d_model=16, n_heads=2, d_vocab=90)
        Monitor(torch.full((2, 8), 95)).measure(LoopModel(small), 0)


def test_what_stands_around_a_module_is_taken_off(process_group):
    model = looped.make()
    around = nn.parallel.DistributedDataParallel(model)
    assert plain_module(around) is model
    assert plain_module(torch.compile(around, backend="eager")) is model
    assert (
        plain_module(nn.parallel.DistributedDataParallel(torch.compile(model, backend="eager")))
        is model
    )
    monitor = Monitor(PROBE)
    assert same(monitor.measure(around, 0), monitor.measure(model, 1))


def test_parameters_that_are_spread_over_processes_are_refused(process_group):
    model = looped.make()
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    with pytest.raises(InputError, match="spread over the processes .* save checkpoints"):
        Monitor(PROBE).measure(model, 0)


@pytest.fixture
def process_group(tmp_path):
    """One process that is a group."""
    torch.distributed.init_process_group("gloo", f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_a_compiled_model_is_not_compiled_again():
    model = looped.make()
    counted, monitor = Counted(lambda graph, _: graph), Monitor(PROBE)
    compiled = torch.compile(model, backend=counted)
    compiled(PROBE, labels=PROBE)["loss"].backward()
    assert counted.calls
    before = counted.calls
    monitor.measure(compiled, 0)
    compiled(PROBE, labels=PROBE)["loss"].backward()
    assert counted.calls == before
    torch.compiler.reset()
