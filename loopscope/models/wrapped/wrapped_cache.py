"""TransformerLens's ActivationCache for wrapped models: names of iterations, no decompositions."""

from typing import Any

from torch import Tensor
from transformer_lens.utilities import get_act_name

from loopscope.errors import InputError
from loopscope.models.cache import LoopCache


class WrappedCache(LoopCache):
    """An `ActivationCache` of a wrapped model.

    `cache["loop.1.layer.0.hook_out"]`, `cache["blocks.3.hook_resid_post"]` and
    `cache["resid_post", -1]` are the same tensor. What a foreign block adds to its stream is not
    known, so decompositions raise.
    """

    def _name(self, key: Any) -> str:
        if isinstance(key, tuple) and len(key) > 1 and isinstance(key[1], int) and key[1] < 0:
            key = (key[0], self.model.cfg.n_layers + key[1], *key[2:])
        name = key if isinstance(key, str) else get_act_name(*key)
        plain = name.removesuffix("_grad")
        return self.model.resolve(plain) + name[len(plain) :]

    def _refuse_across_iterations(self, what: str, layer: int | None) -> None:
        raise InputError(
            f"{what} needs to know what each block adds to its stream, which a wrapped model does "
            "not tell. Compare states with cache['resid_post', v] or the loop's hooks instead."
        )

    def apply_ln_to_stack(self, residual_stack: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Refused: the norms of a wrapped model are its own.

        Args:
            residual_stack: As in TransformerLens; so are the next ones.
            *args: Not looked at.
            **kwargs: Not looked at.

        Returns:
            Nothing: it always raises an InputError.
        """
        self._refuse_across_iterations("apply_ln_to_stack", None)
        raise AssertionError

    def accumulated_resid(self, layer: int | None = None, *args: Any, **kwargs: Any) -> Any:
        """Refused: read `cache["resid_pre", v]` of the layers wanted.

        Args:
            layer: As in TransformerLens; so are the next ones.
            *args: Not looked at.
            **kwargs: Not looked at.

        Returns:
            Nothing: it always raises an InputError.
        """
        self._refuse_across_iterations("accumulated_resid", layer)

    def apply_slice_to_batch_dim(self, batch_slice: Any) -> "WrappedCache":
        """A cache of some batch entries.

        Args:
            batch_slice: Which ones, as in TransformerLens.

        Returns:
            The cache.
        """
        cut = super(LoopCache, self).apply_slice_to_batch_dim(batch_slice)
        return WrappedCache(cut.cache_dict, self.model, has_batch_dim=cut.has_batch_dim)
