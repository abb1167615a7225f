"""A HookPoint whose hooks may change their tensor in place."""

from torch import Tensor
from transformer_lens.hook_points import HookPoint


class Point(HookPoint):
    """A `HookPoint` that hands a copy to hooks that might write into it.

    One state has several names (h(t) is also the first layer's `hook_resid_pre`, and MeSH's buffer
    keeps h_emb), and TransformerLens's own patching tools write in place. A copy keeps such a write
    to the point it was meant for. Hooks that only read, marked `reads_only`, cost no copy.
    """

    def forward(self, x: Tensor) -> Tensor:
        if self.fwd_hooks and not all(
            getattr(handle.user_hook, "reads_only", False) for handle in self.fwd_hooks
        ):
            return x.clone()
        return x
