"""Encoder-decoders and images: states at other positions than the example's, or one line."""

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    CLIPConfig,
    CLIPModel,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

import loopscope as ls
from loopscope.errors import InputError
from tests.standins.blocks import Block

IDS = torch.randint(3, 50, (2, 9), generator=torch.Generator().manual_seed(1))
LESS = torch.randint(3, 50, (2, 5), generator=torch.Generator().manual_seed(2))
SAMPLES = torch.randint(3, 50, (5, 20), generator=torch.Generator().manual_seed(3))
IMAGES = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(4))

SIZES = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 40,
}  # fmt: skip
PAIRS = {
    "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 40, "decoder_ffn_dim": 40, "vocab_size": 60,
}  # fmt: skip


def t5():
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 40, "num_layers": 2, "num_heads": 4}
    return T5ForConditionalGeneration(T5Config(vocab_size=60, decoder_start_token_id=0, **sizes))


def bart():
    return BartForConditionalGeneration(BartConfig(max_position_embeddings=64, **PAIRS))


def whisper():
    return WhisperForConditionalGeneration(
        WhisperConfig(
            num_mel_bins=8, max_source_positions=20, max_target_positions=30, pad_token_id=0,
            bos_token_id=1, eos_token_id=2, decoder_start_token_id=1, **PAIRS,
        )
    )  # fmt: skip


def vit():
    return ViTForImageClassification(ViTConfig(image_size=16, patch_size=4, **SIZES))


def clip():
    text = {"vocab_size": 60, "max_position_embeddings": 32, "bos_token_id": 1, "eos_token_id": 2}
    images = {"image_size": 16, "patch_size": 4}
    return CLIPModel(CLIPConfig(text_config=text | SIZES, vision_config=images | SIZES))


class Looped(nn.Module):
    """A looped classifier of images, its patches behind a token of their own."""

    def __init__(self, cls: bool = True) -> None:
        torch.manual_seed(0)
        super().__init__()
        self.patches, self.block = nn.Conv2d(3, 32, 4, 4), Block(causal=False)
        self.cls = nn.Parameter(torch.randn(1, 1, 32)) if cls else None
        self.norm, self.head = nn.LayerNorm(32), nn.Linear(32, 10)
        self.eval()

    def forward(self, pixel_values: Tensor) -> Tensor:
        x = self.patches(pixel_values).flatten(2).transpose(1, 2)
        if self.cls is not None:
            x = torch.cat([self.cls.expand(len(x), -1, -1), x], dim=1)
        for _ in range(3):
            x = self.block(x)
        return self.head(self.norm(x)[:, 0])


class Pair(nn.Module):
    """A looped encoder and a looped decoder, of other lengths."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__()
        self.embed, self.encoder = nn.Embedding(60, 32), Block(causal=False)
        self.decoder = nn.TransformerDecoderLayer(32, 4, 40, batch_first=True)
        self.head = nn.Linear(32, 60)
        self.eval()

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        memory, x = self.embed(source), self.embed(target)
        for _ in range(3):
            memory = self.encoder(memory)
        for _ in range(2):
            x = self.decoder(x, memory)
        return self.head(x)


def outputs(module: nn.Module, name: str, arguments: dict) -> list[Tensor]:
    """What a module gives in one forward pass, by a hook of torch."""
    seen: list[Tensor] = []

    def note(part, args, result):
        seen.append((result[0] if isinstance(result, tuple) else result).detach().clone())

    handle = module.get_submodule(name).register_forward_hook(note)
    with torch.no_grad():
        module(**arguments, **({"use_cache": False} if "decoder." in name else {}))
    handle.remove()
    return seen


MAKERS = [
    (t5, {"input_ids": IDS, "decoder_input_ids": LESS}, "decoder.block.1", 5),
    (t5, {"input_ids": IDS, "labels": LESS}, "decoder.block.1", 5),
    (t5, {"input_ids": IDS, "decoder_input_ids": IDS}, "decoder.block.1", 9),
    (bart, {"input_ids": IDS, "decoder_input_ids": LESS}, "model.decoder.layers.1", 5),
    (
        whisper,
        {"input_features": torch.randn(2, 8, 40), "decoder_input_ids": LESS},
        "model.decoder.layers.1",
        5,
    ),
    (vit, {"pixel_values": IMAGES}, "vit.layers.1", 17),
    (clip, {"input_ids": IDS, "pixel_values": IMAGES}, "vision_model.encoder.layers.1", 17),
]


@pytest.mark.parametrize(("make", "example", "last", "positions"), MAKERS)
def test_states_of_a_stack_at_other_positions_are_its_own(make, example, last, positions):
    torch.manual_seed(0)
    module = make().eval()
    model = ls.wrap(module, example)
    assert str(model.map) == "2"
    traj = ls.capture(model, example)
    assert traj.h_emb.shape == traj.h_out.shape == (2, positions, 32)
    with torch.no_grad():
        _, cache = model.run_with_cache(example)
    before = last.replace("1", "0")
    assert torch.equal(cache[f"{last}.hook_out"], outputs(module, last, example)[0])
    assert torch.equal(cache[f"{last}.hook_in"], outputs(module, before, example)[0])
    if make is not whisper:  # the only one whose tokens are those that are predicted
        assert model.why_no_loss()


@pytest.mark.parametrize(("make", "example", "last", "positions"), MAKERS)
def test_what_such_a_model_cannot_run_on_is_one_line(make, example, last, positions):
    model = ls.wrap(make().eval(), example)
    try:
        tables = ls.measure(model, SAMPLES, measures=["update", "cka", "rank", "loss", "readout"])
    except InputError as error:
        assert "\n" not in str(error)
        assert "dict" in str(error) or "wrapped without token ids" in str(error)
    else:
        assert len(tables.update) == 5


@pytest.mark.parametrize("example", [IDS, None])
def test_an_example_that_is_not_enough_is_one_line(example):
    for make in (t5, clip, whisper):
        with pytest.raises(InputError, match="forward pass fails on the example"):
            ls.wrap(make().eval(), example)
    with pytest.raises(InputError, match="no example can be made up"):
        ls.wrap(vit(), None)


@pytest.mark.parametrize("cls", [True, False])
@pytest.mark.parametrize("form", [lambda x: x, lambda x: {"pixel_values": x}])
def test_a_looped_model_of_images_is_captured_over_its_patches(cls, form):
    module = Looped(cls)
    model = ls.wrap(module, form(IMAGES))
    assert str(model.map) == "0+1R3+0"
    traj = ls.capture(model, form(IMAGES))
    wanted = outputs(module, "block", {"pixel_values": IMAGES})
    assert all(map(torch.equal, traj.h_m, wanted)) and traj.h[0].shape == (2, 16 + cls, 32)
    assert "the shapes of what it returns are (2, 10)" in model.why_no_loss()
    for call in (ls.capture, ls.measure):
        with pytest.raises(InputError, match="wrapped without token ids"):
            call(model, SAMPLES)


def test_a_second_loop_over_other_positions_is_said_and_a_spec_shows_it():
    module = Pair()
    example = {"source": IDS, "target": LESS}
    with pytest.warns(UserWarning, match="decoder runs 2 times on tensors of shape"):
        model = ls.wrap(module, example)
    assert str(model.map) == "0+1R3+0"
    assert "of 9 tokens it returns them at 5 positions" in model.why_no_loss()
    model = ls.wrap(module, example, spec={"core": ["decoder"]})
    traj = ls.capture(model, example)
    assert all(map(torch.equal, traj.h_m, outputs(module, "decoder", example)))
    assert traj.h[0].shape == (2, 5, 32)


def test_samples_longer_than_the_context_are_one_line():
    class Short(nn.Module):
        def __init__(self):
            super().__init__()
            self.config = type("Config", (), {"max_position_embeddings": 12, "vocab_size": 60})()
            self.embed, self.places = nn.Embedding(60, 32), nn.Embedding(12, 32)
            self.block, self.head = Block(), nn.Linear(32, 60)

        def forward(self, tokens):
            x = self.embed(tokens) + self.places(torch.arange(tokens.shape[1]))
            return self.head(self.block(self.block(x)))

    model = ls.wrap(Short(), IDS)
    with pytest.raises(InputError, match=r"IndexError.*It takes 12 tokens, given 20"):
        ls.measure(model, SAMPLES)


def test_an_error_of_a_hook_stays_its_own():
    model = ls.wrap(bart().eval(), {"input_ids": IDS, "decoder_input_ids": LESS})

    def broken(x, hook):
        raise ZeroDivisionError("mine")

    with pytest.raises(ZeroDivisionError, match="mine"):
        model.run_with_hooks(IDS, fwd_hooks=[("model.decoder.layers.0.hook_out", broken)])
