"""Names and colours of the safety benchmark's methods in its pictures."""

DEFAULT = "fisher-0.1-anchor-3-general"
FIRST_TURNS = "fisher-0.1-anchor-3"  # the default without its general forms: run at every share of poison
SHOWN = {DEFAULT: "the default", FIRST_TURNS: "the default, first turns alone"}
EARLIER = "-general-own"  # in the name of what was made with an earlier version
ON_GPU = "-qlora"  # ends the name of what was trained in QLoRA on a GPU
FAMILIES = {
    "aligned": "#222b38",
    "plain": "#222b38",
    "full": "#222b38",
    "l2": "#8d99ae",
    "random": "#bc6c25",
    "paper": "#00798c",
    "normalized": "#30638e",
    "subspace": "#003d5b",
    "activation": "#d1495b",
    "fisher": "#e4572e",
    "budget": "#edae49",
    "safelora": "#7b2d8b",
    "scaled": "#9d8189",
    "resta": "#c77dff",
    "anchor": "#2a9d8f",
    "mix": "#588157",
    "own": "#a3b18a",
    "answers": "#a3b18a",
}


def shown_name(method: str) -> str:
    """In the pictures."""
    return SHOWN.get(method, method)


def colour_of(method: str) -> str:
    """Of its family."""
    return FAMILIES[next(family for family in FAMILIES if method.startswith(family))]
