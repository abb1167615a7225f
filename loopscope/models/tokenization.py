"""Text in and out of a model: TransformerLens's tokenisation vocabulary."""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from loopscope.errors import InputError
from loopscope.text import usable_tokenizer, without_limits


class TextMixin:
    """`to_tokens`, `to_string` and relatives for a model with an optional tokenizer."""

    config: Any
    name: str | None
    embed: Any
    W_U: Any

    @property
    def tokenizer(self) -> Any:
        """A `tokenizers.Tokenizer`, any other behind the same methods, or None."""
        return self.__dict__.get("_text_tokenizer")

    @tokenizer.setter
    def tokenizer(self, tokenizer: Any) -> None:
        """Takes what `wrap` takes; anything else is refused."""
        self.__dict__["_text_tokenizer"] = usable_tokenizer(tokenizer)

    @property
    def input_device(self) -> torch.device:
        """Where token ids are looked up."""
        return self.embed.weight.device

    def _tokenizer(self) -> Any:
        if self.tokenizer is None:
            raise InputError(
                f"{self.name!r} has no tokenizer (no tokenizer.json beside its weights), so it "
                "takes token ids only; pass an integer tensor (batch, pos)."
            )
        return without_limits(self.tokenizer)

    def to_tokens(
        self, input: str | list[str], prepend_bos: bool | None = False, **_: Any
    ) -> Int[Tensor, "batch pos"]:
        """Give the token ids of a text, or of several texts of equal token length.

        Args:
            input: One text, or a list of texts.
            prepend_bos: Put the BOS token first (off unless asked).

        Returns:
            int64 (batch, pos) on the model's device.

        Raises:
            InputError: without a tokenizer, for empty text, or for texts of unequal length (there
                is no padding).
        """
        tokenizer = self._tokenizer()
        texts = [input] if isinstance(input, str) else list(input)
        encodings = tokenizer.encode_batch(texts, add_special_tokens=False)
        rows = [encoding.ids for encoding in encodings]
        if prepend_bos:
            if self.config.bos_token_id is None:
                raise InputError(f"{self.name!r} has no BOS token; leave prepend_bos out.")
            rows = [[self.config.bos_token_id, *row] for row in rows]
        lengths = {len(row) for row in rows}
        if not rows or 0 in lengths:
            raise InputError("the text is empty (no tokens); give at least one token.")
        if len(lengths) > 1:
            raise InputError(
                f"the texts have {sorted(lengths)} tokens, and nothing is padded here; pass them "
                "one by one, or cut them to one length."
            )
        return torch.tensor(rows, dtype=torch.int64, device=self.input_device)

    def _as_tokens(self, input: Any, prepend_bos: bool = False) -> Int[Tensor, "batch pos"]:
        """Tokens of whatever a model call may be given, checked against the vocabulary."""
        if isinstance(input, str) or (
            isinstance(input, list) and input and all(isinstance(t, str) for t in input)
        ):
            input = self.to_tokens(input, prepend_bos=prepend_bos)
        tokens = torch.as_tensor(input)
        if tokens.is_floating_point() or tokens.dtype == torch.bool or tokens.is_complex():
            raise InputError(f"tokens must be integers, given {tokens.dtype}.")
        tokens = tokens.to(device=self.input_device, dtype=torch.int64)
        if tokens.ndim == 1:
            tokens = tokens.unsqueeze(0)
        if tokens.ndim != 2 or tokens.numel() == 0:
            raise InputError(f"tokens must be (batch, pos), given shape {tuple(tokens.shape)}.")
        if tokens.device.type == "cpu" and not torch.compiler.is_compiling():
            low, high = (int(x) for x in tokens.aminmax())
            if low < 0 or (self.config.d_vocab is not None and high >= self.config.d_vocab):
                raise InputError(
                    f"token ids must lie in 0 … {self.config.d_vocab - 1} for {self.name!r}, given "
                    f"{low} … {high}; were they made with another tokenizer?"
                )
        return tokens

    def to_string(self, tokens: Any) -> str | list[str]:
        """Give the text of token ids.

        Args:
            tokens: Ids (pos,) or (batch, pos), or one id.

        Returns:
            A string for (pos,) or one id, a list for (batch, pos).

        Raises:
            InputError: without a tokenizer.
        """
        ids = torch.as_tensor(tokens)
        tokenizer = self._tokenizer()
        if ids.ndim == 2:
            return [tokenizer.decode(row, skip_special_tokens=False) for row in ids.tolist()]
        return tokenizer.decode(ids.reshape(-1).tolist(), skip_special_tokens=False)

    def to_str_tokens(self, input: Any, prepend_bos: bool = False) -> list[str]:
        """Give each token of one text as a string.

        Args:
            input: The text, or its ids (pos,) or (1, pos).
            prepend_bos: For text: put the BOS token first.

        Returns:
            One string per token.

        Raises:
            InputError: for several texts, or without a tokenizer.
        """
        ids = self._as_tokens(input, prepend_bos=prepend_bos)
        if ids.shape[0] != 1:
            raise InputError(f"to_str_tokens takes one text, given {ids.shape[0]}.")
        tokenizer = self._tokenizer()
        return [tokenizer.decode([i], skip_special_tokens=False) for i in ids[0].tolist()]

    def to_single_token(self, string: str) -> int:
        """Give the id of a text that is exactly one token.

        Args:
            string: The text.

        Returns:
            Its token's id.

        Raises:
            InputError: if it is several tokens, or without a tokenizer.
        """
        ids = self.to_tokens(string)[0].tolist()
        if len(ids) != 1:
            raise InputError(f"{string!r} is {len(ids)} tokens, not one; give one token's text.")
        return ids[0]

    def to_single_str_token(self, token: int) -> str:
        """Give the text of one token.

        Args:
            token: Its id.

        Returns:
            The text.
        """
        return self._tokenizer().decode([int(token)], skip_special_tokens=False)

    def tokens_to_residual_directions(self, tokens: Any) -> Float[Tensor, "..."]:
        """Give the columns of W_U that belong to tokens.

        Args:
            tokens: The text of one token, or ids of any shape.

        Returns:
            (…, d_model) with the shape of the ids in front, or (d_model,) for one token.
        """
        if isinstance(tokens, str):
            tokens = self.to_single_token(tokens)
        ids = torch.as_tensor(tokens, device=self.input_device)
        directions = self.W_U[:, ids.reshape(-1)].T
        if ids.numel() == 1:
            return directions[0]
        return directions.reshape(*ids.shape, -1)
