"""Layout strings: how the layers of a model form prelude, core iterations and coda."""

import re
from dataclasses import dataclass

from loopscope.errors import InputError
from loopscope.names import block_name

_ALLOWED = (
    "Allowed are 'N' (a plain stack), 'P+CRK+Q' (a C-layer core looped K times, such as 3+6R3+3) "
    "and 'P+C1+...+CK+Q' (unshared cores, such as 4+8+8+4)."
)


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Depths of the prelude, of each core iteration and of the coda.

    Attributes:
        prelude: Layers before the loop (P).
        cores: Layers of each iteration, K entries; empty for a plain stack.
        coda: Layers after the loop (Q).
        shared: Whether all iterations run the same layers (the `CRK` form).
    """

    prelude: int
    cores: tuple[int, ...] = ()
    coda: int = 0
    shared: bool = False

    def __post_init__(self) -> None:
        if self.prelude < 0 or self.coda < 0 or any(c < 1 for c in self.cores):
            raise InputError(
                f"layout {self} has a core of no layers or a negative depth. {_ALLOWED}"
            )
        if self.n_layers < 1:
            raise InputError(f"a layout needs at least one layer, given {self}. {_ALLOWED}")
        if self.shared and len(set(self.cores)) != 1:
            raise InputError(f"a shared core has one depth, given {self.cores}. {_ALLOWED}")

    @classmethod
    def parse(cls, text: "str | Layout") -> "Layout":
        """Read a layout string.

        Args:
            text: `N`, `P+CRK+Q` or `P+C1+...+CK+Q`; P and Q may be 0.

        Returns:
            The layout; `str()` of it gives the canonical string back.

        Raises:
            InputError: if the string has another form, naming the allowed ones.
        """
        if isinstance(text, Layout):
            return text
        given = re.sub(r"\s*\+\s*", "+", str(text).strip())
        if re.fullmatch(r"\d{1,4}", given):
            return cls(prelude=int(given))
        match = re.fullmatch(r"(\d{1,4})\+(\d{1,4})[Rr](\d{1,4})\+(\d{1,4})", given)
        if match:
            p, c, k, q = map(int, match.groups())
            if k < 1 or c < 1:
                raise InputError(
                    f"layout {text!r} loops {c} layers {k} times; both must be at least 1. "
                    + _ALLOWED
                )
            return cls(prelude=p, cores=(c,) * k, coda=q, shared=True)
        if re.fullmatch(r"\d{1,4}(\+\d{1,4}){2,}", given):
            p, *cores, q = map(int, given.split("+"))
            return cls(prelude=p, cores=tuple(cores), coda=q)
        raise InputError(f"layout {text!r} cannot be read. {_ALLOWED}")

    def __str__(self) -> str:
        if not self.cores:
            return str(self.prelude)
        middle = f"{self.cores[0]}R{self.K}" if self.shared else "+".join(map(str, self.cores))
        return f"{self.prelude}+{middle}+{self.coda}"

    @property
    def K(self) -> int:
        """Number of core iterations (N_loop); 0 for a plain stack."""
        return len(self.cores)

    @property
    def n_layers(self) -> int:
        """Layers of compute: the unrolled depth."""
        return self.prelude + sum(self.cores) + self.coda

    @property
    def n_core_params(self) -> int:
        """Core layers that own parameters."""
        return self.cores[0] if self.shared else sum(self.cores)

    @property
    def n_param_layers(self) -> int:
        """Layers of parameters."""
        return self.prelude + self.n_core_params + self.coda

    @property
    def unshared(self) -> "Layout":
        """The same compute without a loop: every iteration has layers of its own."""
        return Layout(prelude=self.prelude, cores=self.cores, coda=self.coda)

    def core_start(self, t: int) -> int:
        """First virtual layer of iteration t; t = K gives the first layer of the coda."""
        return self.prelude + sum(self.cores[:t])

    def core_layers(self, t: int) -> range:
        """Indices into the core's own layers that iteration t runs."""
        if self.shared:
            return range(self.cores[0])
        start = sum(self.cores[:t])
        return range(start, start + self.cores[t])

    def roles(self) -> list[tuple[str, int, int]]:
        """Name each part that has layers.

        Returns:
            (`prelude`, `core1` … `coreK` or `coda`, its first virtual layer, its depth), in order.
        """
        parts = [("prelude", 0, self.prelude)]
        parts += [(block_name(t), self.core_start(t), self.cores[t]) for t in range(self.K)]
        parts.append(("coda", self.core_start(self.K), self.coda))
        return [part for part in parts if part[2]]
