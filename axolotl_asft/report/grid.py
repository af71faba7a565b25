"""Module names as a grid: layers from left to right, kinds of module from top to bottom."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Grid:
    """Where each module stands.

    Attributes:
        kinds: the rows: what is left of a name without its layer, `self_attn.q_proj`.
        layers: the columns: the layers' numbers.
        places: (row, column) of each name, in the order of the names. Experts of one layer share a place.
    """

    kinds: tuple[str, ...]
    layers: tuple[int, ...]
    places: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, names: Sequence[str]) -> "Grid":
        """The layer is a name's first number; later numbers (experts) become `*`; without a number it is layer 0."""
        split = [_split(name) for name in names]
        prefixes = {prefix for prefix, _, _ in split}
        kinds, layers = [], []
        for prefix, layer, kind in split:
            kinds.append(kind if len(prefixes) == 1 or not prefix else f"{prefix}: {kind}")
            layers.append(layer)
        rows = tuple(dict.fromkeys(kinds))
        columns = tuple(sorted(set(layers)))
        places = tuple((rows.index(k), columns.index(layer)) for k, layer in zip(kinds, layers, strict=True))
        return cls(rows, columns, places)

    def fill(self, values: Iterable[float | None]) -> list[list[float]]:
        """The values of the names as rows of cells: NaN where nothing stands, the largest where several do."""
        cells = [[math.nan] * len(self.layers) for _ in self.kinds]
        for (row, column), value in zip(self.places, values, strict=True):
            if value is not None and not value <= cells[row][column]:
                cells[row][column] = value
        return cells


def _split(name: str) -> tuple[str, int, str]:
    """model.layers.3.mlp.experts.7.up_proj -> ("model.layers", 3, "mlp.experts.*.up_proj")."""
    parts = name.split(".")
    at = next((i for i, part in enumerate(parts) if part.isdecimal() and part.isascii()), None)
    if at is None:
        return "", 0, name
    rest = ["*" if part.isdecimal() else part for part in parts[at + 1 :]]
    return ".".join(parts[:at]), int(parts[at]), ".".join(rest) or parts[at - 1]
