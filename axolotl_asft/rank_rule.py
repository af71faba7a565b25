"""How many directions of a layer are kept: a number, all, or as many as a bound or an energy asks for."""

from typing import Any

from axolotl_asft.errors import AsftError


def rank_rule(rank: int | str | None, tolerance: float, energy: float | None, max_rank: int | None) -> dict[str, Any]:
    """The rule that chooses k, as the spec says it; refuses one that is none."""
    if rank != "full" and rank is not None and (type(rank) is not int or rank < 1):
        raise AsftError(f"rank is {rank!r}; expected a positive number, 'full', or None with a tolerance or an energy")
    if rank is not None and (energy is not None or max_rank is not None):
        raise AsftError(f"rank is {rank!r}; energy and max_rank go with rank None (auto)")
    if rank is None and not tolerance > 0:
        raise AsftError(f"tolerance is {tolerance!r}; expected a positive number")
    if energy is not None and not 0 < energy <= 1:
        raise AsftError(f"energy is {energy!r}; expected a share, above 0 and at most 1")
    if max_rank is not None and max_rank < 1:
        raise AsftError(f"max_rank is {max_rank!r}; expected a positive number")
    if isinstance(rank, int):
        return {"rule": "fixed", "k": rank}
    if rank is not None:
        return {"rule": "full"}
    rule = {"rule": "tolerance", "tolerance": tolerance} if energy is None else {"rule": "energy", "energy": energy}
    return rule if max_rank is None else rule | {"max_rank": max_rank}
