"""Where foreign models come from: folders of Hugging Face, ids, and the user's own Python."""

import json
import logging
import shutil

import httpx
import huggingface_hub
import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AlbertConfig, AlbertForMaskedLM, LlamaConfig, LlamaForCausalLM

from loopscope.errors import InputError, UnknownNameError
from loopscope.models.native.loop_model import LoopModel
from loopscope.models.opening.hub import _choose
from loopscope.models.opening.loading import load, peek
from loopscope.models.opening.targets import zoo_folder
from loopscope.models.wrapped.wrapped_model import WrappedModel
from tests.models.opening.remote_code import MODELING, by_hand, write

LLAMA = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
    "num_attention_heads": 4, "max_position_embeddings": 64,
}  # fmt: skip
ALBERT = {**LLAMA, "embedding_size": 16}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A Llama and an ALBERT as `save_pretrained` writes them."""
    folder = tmp_path_factory.mktemp("saved")
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**LLAMA)).save_pretrained(folder / "llama")
    AlbertForMaskedLM(AlbertConfig(**ALBERT)).save_pretrained(folder / "albert")
    return folder


@pytest.fixture
def copy(saved, tmp_path):
    """A copy of the Llama to damage."""
    shutil.copytree(saved / "llama", tmp_path / "copy")
    return tmp_path / "copy"


@pytest.fixture
def cache(saved, tmp_path, monkeypatch):
    """A local cache of the Hub that holds org/looped, and gpt2 as a name without organisation."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    for name, source in (("org--looped", "albert"), ("small", "llama")):
        home = tmp_path / "hub" / f"models--{name}"
        (home / "refs").mkdir(parents=True)
        (home / "refs" / "main").write_text("abc123")
        shutil.copytree(saved / source, home / "snapshots" / "abc123")
    return tmp_path / "hub"


def change(folder, **entries):
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**values, **entries}))


# -- folders -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "kind"), [("llama", LlamaForCausalLM), ("albert", AlbertForMaskedLM)]
)
def test_a_folder_gives_the_logits_of_the_class_that_was_saved(saved, tokens, name, kind):
    model = load(saved / name)
    assert isinstance(model, WrappedModel) and type(model.module) is kind
    assert model.name == name and not model.module.training and model.tokenizer is None
    with torch.no_grad():
        assert torch.equal(model(tokens), kind.from_pretrained(saved / name)(tokens).logits)


def test_dtype_and_name_are_as_asked(saved):
    model = load(saved / "llama", dtype="bfloat16", name="mine")
    assert model.name == "mine"
    assert {p.dtype for p in model.module.parameters()} == {torch.bfloat16}


def test_device_map_is_passed_on(saved, tokens, monkeypatch):
    plain, original, seen = load(saved / "llama"), LlamaForCausalLM.from_pretrained, []

    def record(*args, **kwargs):
        seen.append(kwargs.get("device_map"))
        return original(*args, **kwargs)

    monkeypatch.setattr(LlamaForCausalLM, "from_pretrained", record)
    model = load(saved / "llama", device_map={"": "cpu"})
    assert seen == [{"": "cpu"}] and torch.equal(model(tokens), plain(tokens))
    with pytest.raises(InputError, match="device and device_map exclude each other"):
        load(saved / "llama", device="cpu", device_map="auto")
    with pytest.raises(InputError, match="takes no device_map"):
        load("mesh", device_map="auto")


def test_loading_prints_nothing_and_leaves_transformers_as_it_was(saved, capfd):
    said: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = said.append
    logging.getLogger("transformers").addHandler(handler)
    transformers.utils.logging.set_verbosity_info()
    try:
        load(saved / "llama")
        assert transformers.utils.logging.get_verbosity() == transformers.logging.INFO
        assert transformers.utils.logging.is_progress_bar_enabled()
    finally:
        transformers.utils.logging.set_verbosity_warning()
        logging.getLogger("transformers").removeHandler(handler)
    assert capfd.readouterr() == ("", "") and not said


def test_a_saved_body_without_a_head_is_opened_as_the_body(saved, tmp_path, tokens):
    LlamaForCausalLM.from_pretrained(saved / "llama").model.save_pretrained(tmp_path / "body")
    model = load(tmp_path / "body")
    assert type(model.module) is transformers.LlamaModel
    assert model.map.n_layers == 3


def test_an_untrained_twin_has_fresh_weights_of_its_seed(saved, tokens):
    before = torch.random.get_rng_state()
    one, same, other = (load(f"{saved / 'llama'}@init", seed=s) for s in (1, 1, 2))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(one(tokens), same(tokens)) and not torch.equal(one(tokens), other(tokens))
    assert one.name == "llama@init" and one.provenance["untrained"]
    torch.manual_seed(1)
    made = LlamaForCausalLM(LlamaConfig(**LLAMA)).eval()
    assert torch.equal(one(tokens), made(tokens).logits)


def test_a_twin_needs_no_weights(copy):
    (copy / "model.safetensors").unlink()
    assert load(f"{copy}@init").map.n_layers == 3
    with pytest.raises(InputError, match=r"has no weights.*@init"):
        load(copy)


def test_a_tokenizer_beside_the_weights_is_used(copy):
    shutil.copy(zoo_folder() / "mesh" / "tokenizer.json", copy)
    assert load(copy).tokenizer.get_vocab_size() == 2048


def test_a_spec_beside_the_weights_is_used_unless_one_is_given(copy):
    (copy / "loopscope.toml").write_text('prelude = ["model.layers.0"]')
    assert load(copy).map.source == "spec"
    with pytest.raises(InputError, match="layers.9"):
        load(copy, spec={"prelude": ["model.layers.9"]})


def test_pickled_tensors_are_read_and_pickled_code_is_not(copy, tokens):
    wanted = load(copy)(tokens)
    state = load_file(copy / "model.safetensors")
    (copy / "model.safetensors").unlink()
    torch.save(state, copy / "pytorch_model.bin")
    assert torch.equal(load(copy)(tokens), wanted)
    torch.save({**state, "x": np.random.default_rng}, copy / "pytorch_model.bin")
    with pytest.raises(InputError, match="cannot be opened.*UnpicklingError"):
        load(copy)


def test_every_weight_must_be_there_and_fit(copy):
    state = load_file(copy / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"

    def store(tensors):
        save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})

    store({n: t for n, t in state.items() if n != name})
    with pytest.raises(InputError, match=f"missing: {name}"):
        load(copy)
    store({**state, name: torch.zeros(3, 5)})
    with pytest.raises(InputError, match=r"misshapen: .*\(3, 5\) instead of \(48, 32\)"):
        load(copy)
    store({**state, "model.layers.7.mlp.up_proj.weight": state[name].clone()})
    with pytest.raises(InputError, match=r"not expected: model.layers.7"):
        load(copy)
    store({**state, "value_head.weight": torch.zeros(3)})
    assert load(copy).provenance["unused_weights"] == ["value_head.weight"]


def test_damaged_folders_are_named(copy):
    whole = (copy / "model.safetensors").read_bytes()
    (copy / "model.safetensors").write_bytes(whole[:900])
    with pytest.raises(InputError, match=r"copy cannot be opened by transformers.*damaged"):
        load(copy)
    change(copy, model_type="not_there")
    with pytest.raises(InputError, match=r"model_type 'not_there'.*file.py:FACTORY"):
        load(copy)
    (copy / "config.json").write_text("{")
    with pytest.raises(InputError, match="cannot be read as JSON"):
        load(copy)


def test_a_shard_that_the_index_names_must_be_there(copy):
    (copy / "model.safetensors").unlink()
    index = {"weight_map": {"lm_head.weight": "model-00002-of-00002.safetensors"}}
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match="lacks weight files: model-00002-of-00002"):
        load(copy)


def test_peek_reads_no_weights(copy):
    assert peek(copy) == ("copy", None)
    (copy / "model.safetensors").write_bytes(b"")
    assert peek(copy) == ("copy", None)


# -- remote code ---------------------------------------------------------------------------------


def test_remote_code_runs_only_when_it_is_trusted(tmp_path, monkeypatch):
    write(tmp_path / "round", extra="import builtins; builtins.ran = True")
    for look in (load, peek):
        with pytest.raises(InputError, match=r"modeling_round.py.*--trust-remote-code"):
            look(tmp_path / "round")
    import builtins

    assert not hasattr(builtins, "ran")
    load(tmp_path / "round", trust_remote_code=True)
    assert builtins.ran
    del builtins.ran


def test_code_of_transformers_4_is_repaired(tmp_path, tokens):
    weights = write(tmp_path / "old")  # tied weights in a list, `default` rotary, unsaved buffers
    model = load(tmp_path / "old", trust_remote_code=True)
    assert torch.allclose(model(tokens), by_hand(weights, tokens, 3), atol=1e-5)
    assert str(model.map) == "0+2R3+0"
    again = load(tmp_path / "old", trust_remote_code=True, loops=5)
    assert torch.allclose(again(tokens), by_hand(weights, tokens, 5), atol=1e-5)


def test_twins_of_remote_code_are_initialised_by_it(tmp_path):
    write(tmp_path / "twin")
    load(tmp_path / "twin", trust_remote_code=True)
    twin = load(f"{tmp_path / 'twin'}@init", trust_remote_code=True, seed=3)
    assert twin.module.core[0].up.weight.std().item() == pytest.approx(0.3, rel=0.1)


def test_a_known_family_gets_transformer_lens_s_repairs(tmp_path):
    folder = tmp_path / "raven"
    weights = write(folder, architectures=["RavenForCausalLM"])
    code = MODELING.replace("{tied}", '["lm_head.weight"]').replace("{extra}", "")
    code = code.replace(
        "self.wte =", "self.transformer = nn.ModuleDict()\n        self.transformer.wte ="
    )
    code = code.replace("return self.wte", "return self.transformer.wte")
    code = code.replace("self.wte(", "self.transformer.wte(")
    code = code.replace("return self.lm_head\n", "return None\n")  # no hint for other repairs
    code = code.replace(
        "RoundForCausalLM(PreTrainedModel)", "RavenPreTrainedModel(PreTrainedModel)"
    )
    code += "\n\nclass RavenForCausalLM(RavenPreTrainedModel):\n    pass\n"
    (folder / "raven_modeling_minimal.py").write_text(code)
    auto = {
        "AutoConfig": "configuration_round.RoundConfig",
        "AutoModelForCausalLM": "raven_modeling_minimal.RavenForCausalLM",
    }
    change(folder, auto_map=auto)
    weights["transformer.wte.weight"] = weights.pop("wte.weight")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    model = load(folder, trust_remote_code=True)
    kind = type(model.module)
    assert kind._tied_weights_keys == {"lm_head.weight": "transformer.wte.weight"}
    assert torch.equal(model.module.lm_head.weight, weights["transformer.wte.weight"])
    twin = load(f"{folder}@init", trust_remote_code=True)
    assert twin.module.core[0].up.weight.std().item() == pytest.approx(0.3, rel=0.1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"extra": "from transformers.pytorch_utils import gone"}, "ImportError.*'gone'"),
        ({"extra": "import torch; torch.nothing_there"}, "AttributeError.*nothing_there"),
        ({"extra": "import package_that_is_nowhere"}, "package_that_is_nowhere"),
        ({"tied": '["lm_head.weight", "core.0.up.weight"]'}, "cannot be translated safely"),
        ({"auto_map": {"AutoConfig": "configuration_round.RoundConfig"}}, "auto_map names no"),
    ],
)
def test_what_cannot_be_repaired_is_named(tmp_path, changes, message):
    write(tmp_path / "broken", **changes)
    with pytest.raises(InputError, match=message) as error:
        load(tmp_path / "broken", trust_remote_code=True)
    assert "broken" in str(error.value) or "auto_map" in str(error.value)


def test_a_native_class_is_used_rather_than_remote_code(copy):
    change(copy, auto_map={"AutoModelForCausalLM": "modeling_llama.LlamaForCausalLM"})
    assert type(load(copy).module) is LlamaForCausalLM  # no file modeling_llama.py is there
    change(copy, architectures=["LoopedLlamaForCausalLM"])
    with pytest.raises(InputError, match="trust-remote-code"):
        load(copy)


# -- ids -----------------------------------------------------------------------------------------


def test_ids_come_from_the_local_cache(cache, saved, tokens):
    model = load("org/looped")
    assert model.name == "looped" and type(model.module) is AlbertForMaskedLM
    assert torch.equal(model(tokens), load(saved / "albert")(tokens))
    assert load("org/looped@init").name == "looped@init"
    assert load("small").name == "small" and peek("org/looped") == ("looped", None)


def test_gpt_neox_ids_are_native(cache):
    home = cache / "models--org--looped" / "snapshots" / "abc123"
    shutil.rmtree(home)
    config = transformers.GPTNeoXConfig(
        vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4,
    )  # fmt: skip
    transformers.GPTNeoXForCausalLM(config).save_pretrained(home)
    assert isinstance(load("org/looped"), LoopModel)
    assert peek("org/looped")[1].variant == "vanilla"


@pytest.mark.parametrize("look", [load, peek])
def test_offline_the_message_says_what_to_do(cache, monkeypatch, look):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UnknownNameError, match=r"HF_HUB_OFFLINE.*hf download org/nowhere"):
        look("org/nowhere")
    with pytest.raises(UnknownNameError, match="unknown model 'nowhere'"):
        look("nowhere")


def test_a_cached_model_without_its_weights_is_not_taken_for_whole(cache, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    (cache / "models--org--looped" / "snapshots" / "abc123" / "model.safetensors").unlink()
    with pytest.raises(UnknownNameError, match="not \\(completely\\) in the local cache"):
        load("org/looped")
    assert load("org/looped@init").config.K == 3


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (httpx.ConnectError("no route"), r"cannot be reached \(no route\)"),
        (OSError("no network"), r"cannot be reached \(no network\)"),
        (404, "the Hub knows no model"),
        (401, "private or gated"),
        (500, "cannot be downloaded"),
    ],
)
def test_what_the_network_says_becomes_one_error(cache, monkeypatch, error, message):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    if isinstance(error, int):
        response = httpx.Response(error, request=httpx.Request("GET", "https://huggingface.co"))
        error = huggingface_hub.errors.HfHubHTTPError("refused", response=response)

    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", fail)
    with pytest.raises(InputError, match=message):
        load("org/nowhere")


def test_only_what_is_needed_is_downloaded():
    files = [
        "config.json", "model.safetensors", "pytorch_model.bin", "tf_model.h5", "modeling_x.py",
        "tokenizer.json", "onnx/model.onnx", "README.md", "consolidated.safetensors",
    ]  # fmt: skip
    small = ["config.json", "tokenizer.json"]
    assert _choose(files, weights=False, code=False) == small
    assert _choose(files, weights=True, code=False) == [*small, "model.safetensors"]
    assert "modeling_x.py" in _choose(files, weights=True, code=True)
    shards = ["pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"]
    assert _choose(shards, weights=True, code=False) == shards


# -- the user's own Python -----------------------------------------------------------------------
