"""Real classes of transformers, small and with random weights away from their defaults."""

import torch
from transformers import (
    AlbertConfig,
    AlbertForMaskedLM,
    AlbertModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    HrmTextConfig,
    HrmTextForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Zamba2Config,
    Zamba2ForCausalLM,
)

SIZES = {"vocab_size": 61, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48}


def noisy(module, seed=0):
    """Move every parameter that trains away from its default."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return module.eval()


def albert(layers=6, groups=1, inner=1, *, head=False):
    """ALBERT; embeddings are half as wide as the stream."""
    torch.manual_seed(0)
    config = AlbertConfig(
        **SIZES,
        embedding_size=16,
        num_hidden_layers=layers,
        num_hidden_groups=groups,
        inner_group_num=inner,
        max_position_embeddings=64,
    )
    return noisy((AlbertForMaskedLM if head else AlbertModel)(config))


def hrm_text(layers=2, low=3, high=2):
    """HRM-Text: two stacks, one inside the other's rhythm."""
    torch.manual_seed(0)
    config = HrmTextConfig(
        **SIZES,
        num_hidden_layers=layers,
        L_cycles=low,
        H_cycles=high,
        head_dim=8,
        max_position_embeddings=64,
    )
    return noisy(HrmTextForCausalLM(config))


def zamba2(kinds="mhmhmhm", blocks=1):
    """Zamba2: `m` a Mamba layer, `h` one with the shared transformer in front."""
    torch.manual_seed(0)
    config = Zamba2Config(
        **SIZES,
        num_hidden_layers=len(kinds),
        layers_block_type=["hybrid" if kind == "h" else "mamba" for kind in kinds],
        num_mem_blocks=blocks,
        mamba_d_state=8,
        mamba_d_conv=2,
        n_mamba_heads=4,
        chunk_size=16,
        max_position_embeddings=64,
        adapter_rank=4,
    )
    return noisy(Zamba2ForCausalLM(config))


def neox(layers=5):
    """GPT-NeoX."""
    torch.manual_seed(0)
    config = GPTNeoXConfig(**SIZES, num_hidden_layers=layers, max_position_embeddings=64)
    return noisy(GPTNeoXForCausalLM(config))


def llama(layers=4):
    """Llama with grouped queries and a tied unembedding."""
    torch.manual_seed(0)
    config = LlamaConfig(
        **SIZES,
        num_hidden_layers=layers,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=True,
    )
    return noisy(LlamaForCausalLM(config))
