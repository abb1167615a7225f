"""TransformerLens's ActivationCache, with aliases, and without silently wrong decompositions."""

from typing import Any

from torch import Tensor
from transformer_lens import ActivationCache
from transformer_lens.utilities import get_act_name

from loopscope.errors import InputError, unknown_name


class LoopCache(ActivationCache):
    """An `ActivationCache` that knows iterations.

    `cache["loop.1.layer.0.hook_resid_post"]` and `cache["blocks.3.hook_resid_post"]` are the same
    tensor; `cache["resid_post", -1]` and the other TransformerLens shorthands work on the unrolled
    depth. Decompositions of the residual stream assume that it is the embedding plus all attention
    and MLP outputs; where a variant mixes states, those that cross an iteration raise.
    """

    def __getitem__(self, key: Any) -> Tensor:
        name = self._name(key)
        if name in self.cache_dict:
            return self.cache_dict[name]
        known = {**self.cache_dict, **{a: 0 for a, n in self._aliases() if n in self.cache_dict}}
        if name in self.model.hook_dict:
            hint = "That hook exists, but names_filter left it out of this cache."
            raise unknown_name("cache entry", name, list(known), hint=hint)
        raise unknown_name("cache entry", name, list(known))

    def __contains__(self, key: object) -> bool:
        return self._name(key) in self.cache_dict

    def __repr__(self) -> str:
        return f"LoopCache with {len(self.cache_dict)} activations of {self.model.name!r}"

    def _aliases(self) -> Any:
        return self.model.aliases.items()

    def _name(self, key: Any) -> str:
        if isinstance(key, str):
            name = self.model.aliases.get(key, key)
            return name if name in self.model.hook_dict else get_act_name(key)
        if len(key) > 1 and isinstance(key[1], int) and key[1] < 0:
            key = (key[0], self.model.cfg.n_layers + key[1], *key[2:])
        return get_act_name(*key)

    def apply_slice_to_batch_dim(self, batch_slice: Any) -> "LoopCache":
        """A cache of some batch entries."""
        cut = super().apply_slice_to_batch_dim(batch_slice)
        return LoopCache(cut.cache_dict, self.model, has_batch_dim=cut.has_batch_dim)

    def _refuse_across_iterations(self, what: str, layer: int | None) -> None:
        """Raise if the stream entering `layer` is more than the embedding plus layer outputs."""
        n_layers = self.model.cfg.n_layers
        depth = n_layers if layer is None or layer == -1 else layer
        for boundary, start in self.model.mixing_boundaries():
            if depth >= start:
                variant = self.model.config.variant
                raise InputError(
                    f"{what} up to layer {depth} would cross {boundary}, where variant "
                    f"{variant!r} replaces the state by a mixture, so the sum of the parts is not "
                    f"the stream. Decompose at most up to layer {start - 1}, or compare states "
                    "with cache.accumulated_resid."
                )

    def accumulated_resid(self, layer: int | None = None, *args: Any, **kwargs: Any) -> Any:
        """The residual stream entering each virtual layer, as in TransformerLens."""
        n_layers = self.model.cfg.n_layers
        last = [b for b, start in self.model.mixing_boundaries() if start == n_layers]
        if last and (layer is None or layer in (-1, n_layers)):
            raise InputError(
                f"the final state of this model is made at {last[0]}, after the last layer, so "
                "its last resid_post is not what the unembedding reads. Ask for layer="
                f"{n_layers - 1} at most and take cache['hook_h_out'] for the final state."
            )
        return super().accumulated_resid(layer, *args, **kwargs)

    def decompose_resid(self, layer: int | None = None, *args: Any, **kwargs: Any) -> Any:
        """Embedding, attention and MLP outputs that sum to the stream entering `layer`."""
        self._refuse_across_iterations("decompose_resid", layer)
        return super().decompose_resid(layer, *args, **kwargs)

    def stack_head_results(self, layer: int = -1, *args: Any, **kwargs: Any) -> Any:
        """Every head's contribution to the stream entering `layer`."""
        self._refuse_across_iterations("stack_head_results", layer)
        return super().stack_head_results(layer, *args, **kwargs)

    def stack_neuron_results(self, layer: int, *args: Any, **kwargs: Any) -> Any:
        """Every neuron's contribution to the stream entering `layer`."""
        self._refuse_across_iterations("stack_neuron_results", layer)
        return super().stack_neuron_results(layer, *args, **kwargs)

    def get_full_resid_decomposition(
        self, layer: int | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        """Heads, neurons, embedding and biases that sum to the stream entering `layer`."""
        self._refuse_across_iterations("get_full_resid_decomposition", layer)
        return super().get_full_resid_decomposition(layer, *args, **kwargs)
