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
        names = [*self.cache_dict, *(a for a, n in self._aliases() if n in self.cache_dict)]
        hint = ""
        if name in self.model.hook_dict:
            hint = "That hook exists, but the run did not keep it (names_filter, stop_at_layer)."
        raise unknown_name("cache entry", name, names, hint=hint)

    def __contains__(self, key: object) -> bool:
        return isinstance(key, str | tuple) and self._name(key) in self.cache_dict

    def __repr__(self) -> str:
        return f"LoopCache with {len(self.cache_dict)} activations of {self.model.name!r}"

    def _aliases(self) -> Any:
        return self.model.aliases.items()

    def _name(self, key: Any) -> str:
        """The canonical name that a name, an alias or a shorthand tuple stands for."""
        if isinstance(key, str):
            plain = key.removesuffix("_grad")
            name = self.model.aliases.get(plain, plain) + key[len(plain) :]
            exists = name in self.cache_dict or plain in self.model.mod_dict
            return name if exists else get_act_name(key)
        if not isinstance(key, tuple) or not key:
            raise InputError(
                f"a cache is indexed by a hook name or a tuple such as ('resid_post', -1), given "
                f"{key!r}."
            )
        if len(key) > 1 and isinstance(key[1], int) and key[1] < 0:
            key = (key[0], self.model.cfg.n_layers + key[1], *key[2:])
        return get_act_name(*key)

    def _depth(self, layer: int | None) -> int:
        """The virtual layer that `layer` means; None and -1 mean all, as in TransformerLens."""
        n_layers = self.model.cfg.n_layers
        if layer is None or layer == -1:
            return n_layers
        if not 0 <= layer <= n_layers:
            raise InputError(
                f"layer must be 0 … {n_layers} (None and -1 mean all {n_layers}), given {layer}."
            )
        return layer

    def _gain(self, depth: int, mlp_input: bool) -> Tensor:
        """Weight of the norm that reads the stream entering virtual layer `depth`."""
        if depth == self.model.cfg.n_layers:
            return self.model.ln_final.weight
        block = self.model.blocks[depth].weights
        return (block.ln2 if mlp_input else block.ln1).weight

    def apply_ln_to_stack(
        self,
        residual_stack: Tensor,
        layer: int | None = None,
        mlp_input: bool = False,
        *args: Any,
        recompute_ln: bool = False,
        **kwargs: Any,
    ) -> Tensor:
        """Pass each component through the norm of `layer`: centred, scaled, times the gain.

        TransformerLens expects the gain folded into the next weights; here weights are raw (a norm
        reused in a loop cannot be folded), so it is applied. The norm's bias belongs to no
        component: all of them sum to the norm's output less its bias.

        Args:
            residual_stack: Components of the stream, (component, …, d_model).
            layer: The virtual layer whose norm it is; None, -1 and `n_layers` mean the final one.
            mlp_input: Take the norm before the MLP.
            *args: As in TransformerLens.
            recompute_ln: Call the final norm anew on each component.
            **kwargs: As in TransformerLens.

        Returns:
            The components, of the same shape.
        """
        depth = self._depth(layer)
        out = super().apply_ln_to_stack(
            residual_stack, depth, mlp_input, *args, recompute_ln=recompute_ln, **kwargs
        )
        if recompute_ln and depth == self.model.cfg.n_layers:
            return out  # the real norm was called
        return out * self._gain(depth, mlp_input)

    def _stack_neuron_results_apply_ln_projected(
        self, layer: int, pos_slice: Any, neuron_slice: Any, project_2d: Tensor, **kwargs: Any
    ) -> Tensor:
        gain = self._gain(self._depth(layer), kwargs.get("mlp_input", False))
        projection = gain[:, None] * project_2d
        return super()._stack_neuron_results_apply_ln_projected(
            layer, pos_slice, neuron_slice, projection, **kwargs
        )

    def apply_slice_to_batch_dim(self, batch_slice: Any) -> "LoopCache":
        """Make a cache of some batch entries.

        Args:
            batch_slice: Which, as in TransformerLens.

        Returns:
            The cache.
        """
        cut = super().apply_slice_to_batch_dim(batch_slice)
        return LoopCache(cut.cache_dict, self.model, has_batch_dim=cut.has_batch_dim)

    def _refuse_across_iterations(self, method: str, layer: int | None) -> None:
        """Raise if the stream entering `layer` is more than the embedding plus layer outputs."""
        depth = self._depth(layer)
        for boundary, start in self.model.mixing_boundaries():
            if depth >= start:
                variant = self.model.config.variant
                raise InputError(
                    f"{method} up to layer {depth} would cross {boundary}, where variant "
                    f"{variant!r} replaces the state by a mixture, so the sum of the parts is not "
                    f"the stream. Decompose at most up to layer {start - 1}, or compare states "
                    "with cache.accumulated_resid."
                )

    def accumulated_resid(self, layer: int | None = None, *args: Any, **kwargs: Any) -> Any:
        """Give the residual stream entering each virtual layer, as in TransformerLens.

        Args:
            layer: The last virtual layer; None and -1 mean all, the final state included.
            *args: As in TransformerLens.
            **kwargs: As in TransformerLens.

        Returns:
            The states, (layer, …, d_model), with labels if asked for.

        Raises:
            InputError: if the final state is made after the last layer, or there is no such layer.
        """
        depth = self._depth(layer)
        n_layers = self.model.cfg.n_layers
        last = [b for b, start in self.model.mixing_boundaries() if start == n_layers]
        if last and depth == n_layers:
            raise InputError(
                f"the final state of this model is made at {last[0]}, after the last layer, so "
                "its last resid_post is not what the unembedding reads. Ask for layer="
                f"{n_layers - 1} at most and take cache['hook_h_out'] for the final state."
            )
        return super().accumulated_resid(layer, *args, **kwargs)

    def decompose_resid(self, layer: int | None = None, *args: Any, **kwargs: Any) -> Any:
        """Give embedding, attention and MLP outputs that sum to the stream entering `layer`.

        Args:
            layer: A virtual layer; None and -1 mean the final state.
            *args: As in TransformerLens.
            **kwargs: As in TransformerLens.

        Returns:
            The components, (component, …, d_model), with labels if asked for.

        Raises:
            InputError: if the sum would cross a mixture of states, or the layer does not exist.
        """
        self._refuse_across_iterations("decompose_resid", layer)
        return super().decompose_resid(layer, *args, **kwargs)

    def stack_head_results(self, layer: int = -1, *args: Any, **kwargs: Any) -> Any:
        """Give every head's contribution to the stream entering `layer`.

        Args:
            layer: A virtual layer; -1 means the final state.
            *args: As in TransformerLens.
            **kwargs: As in TransformerLens.

        Returns:
            The contributions, (head, …, d_model), with labels if asked for.

        Raises:
            InputError: if the sum would cross a mixture of states, or the layer does not exist.
        """
        self._refuse_across_iterations("stack_head_results", layer)
        return super().stack_head_results(layer, *args, **kwargs)

    def stack_neuron_results(self, layer: int, *args: Any, **kwargs: Any) -> Any:
        """Give every neuron's contribution to the stream entering `layer`.

        Args:
            layer: A virtual layer; -1 means the final state.
            *args: As in TransformerLens.
            **kwargs: As in TransformerLens.

        Returns:
            The contributions, (neuron, …, d_model), with labels if asked for.

        Raises:
            InputError: if the sum would cross a mixture of states, or the layer does not exist.
        """
        self._refuse_across_iterations("stack_neuron_results", layer)
        return super().stack_neuron_results(layer, *args, **kwargs)

    def get_full_resid_decomposition(
        self, layer: int | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        """Give heads, neurons, embedding and biases that sum to the stream entering `layer`.

        Args:
            layer: A virtual layer; None and -1 mean the final state.
            *args: As in TransformerLens.
            **kwargs: As in TransformerLens.

        Returns:
            The components, (component, …, d_model), with labels if asked for.

        Raises:
            InputError: if the sum would cross a mixture of states, or the layer does not exist.
        """
        self._refuse_across_iterations("get_full_resid_decomposition", layer)
        return super().get_full_resid_decomposition(layer, *args, **kwargs)
