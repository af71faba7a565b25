"""What the ways of initialising LoRA do to the weight beside it."""

# B A is the change from the original weight: it starts at zero, or the base weight is left alone.
ADDED_TO_THE_WEIGHT = (True, False, "gaussian", "eva", "orthogonal")
# B A starts as a part that is taken out of the base weight: the change is B A - B0 A0.
TAKEN_OUT_OF_THE_WEIGHT = ("pissa", "olora", "loftq")


def takes_out(initialisation: str | bool) -> bool:
    """Whether an initialisation subtracts its scaling B0 A0 from the base weight."""
    return str(initialisation).partition("_niter_")[0] in TAKEN_OUT_OF_THE_WEIGHT
