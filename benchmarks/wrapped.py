"""Foreign models: finding and capture, as ratios measured side by side in one run.

    python benchmarks/wrapped.py [--threads 2] [--rounds 30]

Prints a markdown table, on Hugging Face's HRM-Text (two nested loops) and ALBERT with random
weights: what finding the loop costs in forward passes, capture of every loop state against the bare
forward pass, and the same states by nnsight (where installed: pip install nnsight) and by
TransformerLens's bridge, whose hooks keep a loop's last iteration only. Then what matched and
fitted readings cost beside the raw one alone where a model runs whole for each h(t) that is read.
"""

import argparse
import copy
import time
from collections.abc import Callable

import torch
from compare import reading_times
from forward import race
from torch import nn
from transformers import AlbertConfig, AlbertForMaskedLM, HrmTextConfig, HrmTextForCausalLM

import loopscope as ls

WIDTH = 256


def hrm() -> nn.Module:
    """Two stacks of three layers, (L³ H)²."""
    config = HrmTextConfig(
        vocab_size=2048, hidden_size=WIDTH, intermediate_size=4 * WIDTH, num_attention_heads=8,
        num_hidden_layers=3,
    )  # fmt: skip
    return HrmTextForCausalLM(config).eval()


def albert() -> nn.Module:
    """One layer, twelve times."""
    config = AlbertConfig(
        vocab_size=2048, hidden_size=WIDTH, intermediate_size=4 * WIDTH, num_attention_heads=8,
        embedding_size=64, num_hidden_layers=12,
    )  # fmt: skip
    return AlbertForMaskedLM(config).eval()


def finding(name: str, module: nn.Module, tokens: torch.Tensor) -> str:
    """Count the forward passes that finding the loop takes, on a small example.

    Args:
        name: Of the model.
        module: The model.
        tokens: Ids, (batch, pos).

    Returns:
        A row of the table, with the seconds.
    """
    count = [0]
    handle = module.register_forward_pre_hook(lambda *_: count.__setitem__(0, count[0] + 1))
    began = time.perf_counter()
    ls.wrap(module, tokens[:2, :8])
    took = time.perf_counter() - began
    handle.remove()
    return f"| finding the loop | {name} | {count[0]} forward passes | {took:.2f} s | | ≤ 2 |"


def nnsight_states(module: nn.Module, tokens: torch.Tensor) -> Callable[[], object] | None:
    """Read the output of the fast stack in all its six iterations, by nnsight.

    Args:
        module: HRM-Text.
        tokens: Ids, (batch, pos).

    Returns:
        The call; None where nnsight is not installed or cannot.
    """
    try:
        from nnsight import NNsight
    except ImportError:
        return None
    traced = NNsight(module)

    def run() -> list[torch.Tensor]:
        with traced.trace(tokens, use_cache=False) as tracer:
            outputs = list().save()
            for _ in tracer.iter[0:6]:
                outputs.append(traced.model.L_module.output)
        return outputs

    try:
        assert len(run()) == 6
    except Exception as error:
        print(f"nnsight could not read the iterations: {type(error).__name__}: {error}")
        return None
    return run


def bridge_states(module: nn.Module, tokens: torch.Tensor) -> Callable[[], object] | None:
    """Cache what TransformerLens's bridge sees of the stacks' layers: the last iteration.

    Args:
        module: HRM-Text.
        tokens: Ids, (batch, pos).

    Returns:
        The call; None where the bridge cannot.
    """
    from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module

    try:
        bridge = build_bridge_from_module(
            copy.deepcopy(module), "HrmTextForCausalLM", hf_config=module.config
        )
        names = [n for n in bridge.hook_dict if n.endswith(("hook_resid_post", ".hook_out"))]
        stacks = [n for n in names if n.count(".") == 2] or names

        def run() -> object:
            return bridge.run_with_cache(tokens, names_filter=stacks)

        run()
    except Exception as error:
        print(f"the bridge could not run: {type(error).__name__}: {error}")
        return None
    return run


def readings(tokens: torch.Tensor, rounds: int) -> None:
    """Print what matched and fitted readings cost beside the raw one alone, on HRM-Text.

    Args:
        tokens: Ids, (batch, pos).
        rounds: How often each is timed, at most three times.
    """
    print("\n| readings, HRM-Text, 4 samples of 128 tokens | ratio |\n|---|---|")
    model = ls.wrap(hrm(), tokens[:2, :8])
    windows = torch.randint(2048, (4, 128), generator=torch.Generator().manual_seed(1))
    t = reading_times(model, windows, rounds=min(rounds, 3))
    raw, every = t["raw"] - t["none"], t["all"] - t["none"]
    print(f"| readout, all readings / raw alone | **{every / raw:.2f}** |")
    print(f"| measure, all readings / raw alone | **{t['all'] / t['raw']:.2f}** |")
    print(f"| share of measure, raw alone | {raw / t['raw']:.0%} |")
    print(f"| share of measure, all readings | {every / t['all']:.0%} |")
    print(f"| the fit, once, in samples measured | {4 * t['fit'] / t['all']:.1f} |")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--readings", action="store_true", help="only what the readings cost")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    tokens = torch.randint(2048, (4, 256), generator=torch.Generator().manual_seed(0))
    if options.readings:
        return readings(tokens, options.rounds)
    shape = f"float32, D {WIDTH}, 4×256 tokens"
    print(f"{options.threads} threads, torch {torch.__version__}, {shape}\n")
    print("| what | model | bare | with | ratio | target |")
    print("|---|---|---|---|---|---|")
    for name, module in (("HRM-Text", hrm()), ("ALBERT", albert())):
        print(finding(name, module, tokens))
        model = ls.wrap(module, tokens[:2, :8])
        calls: dict[str, Callable[[], object]] = {
            "bare": lambda m=module: (
                m(tokens, **({"use_cache": False} if m is not None else {}))
                if hasattr(m, "model")
                else m(tokens)
            ),
            "capture": lambda w=model: ls.capture(w, tokens),
        }
        if name == "HRM-Text":
            for tool, states in (
                ("nnsight", nnsight_states(module, tokens)),
                ("bridge, last iteration only", bridge_states(module, tokens)),
            ):
                if states is not None:
                    calls[tool] = states
        with torch.no_grad():
            took = race(calls, rounds=options.rounds)
        for what, seconds in list(took.items())[1:]:
            target = "≤ 1.05" if what == "capture" else ""
            print(
                f"| {what} / bare forward | {name} | {took['bare'] * 1e3:.1f} ms "
                f"| {seconds * 1e3:.1f} ms | **{seconds / took['bare']:.3f}** | {target} |"
            )
    readings(tokens, options.rounds)


if __name__ == "__main__":
    main()
