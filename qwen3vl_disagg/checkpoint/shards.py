"""Loading a part of a model: which rows of each parameter a rank holds, and how its modules keep them.

This room knows no ranks and no DTensor; whoever does says by `Shards` what to read.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor, nn


class Shards(Protocol):
    """A rank's part of a model. Names are those of the module's parameters, shapes are of the whole parameter."""

    def rows(self, name: str, shape: tuple[int, ...]) -> range | None:
        """The rows of dim 0 that this rank holds, also none of them (`range(3, 3)`). None: the parameter is whole."""
        ...

    def hold(self, name: str, local: Tensor, shape: tuple[int, ...]) -> Tensor:
        """What the module keeps for the rank's rows `local` of a tensor of `shape`.

        Called for each parameter that `rows` cut, and for the scales `<name>_scale` of an int8 one.
        """
        ...

    def finish(self, module: nn.Module) -> None:
        """Called once, when all weights are in place and before anything looks at them."""
        ...


class AllRows:
    """The `Shards` of who holds everything."""

    def rows(self, name: str, shape: tuple[int, ...]) -> range | None:
        return None

    def hold(self, name: str, local: Tensor, shape: tuple[int, ...]) -> Tensor:
        return local

    def finish(self, module: nn.Module) -> None:
        pass


def held_rows(shards: Shards, name: str, shape: tuple[int, ...]) -> range | None:
    """`shards.rows`. ValueError for rows that the parameter has not."""
    rows = shards.rows(name, shape)
    if rows is not None and not (rows.step == 1 and 0 <= rows.start <= rows.stop <= shape[0]):
        raise ValueError(f"{name}: {rows} is no range of the {shape[0]} rows of {list(shape)}")
    return rows
