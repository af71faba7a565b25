"""What stands before the requests of tokenised data, such as a system prompt: the model is held where it is asked."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from axolotl_asft.prompt_formats import PLACE, rendered

ROWS = 1000  # looked at, from all over
SHARE = 0.05  # of the rows, from which on a beginning is told
MOST = 3  # beginnings that are asked in
ALIKE, LONGER = 0.95, 8  # of the rows, and tokens past what is asked, that tell a beginning which nearly all have
LEAST = 4  # letters that tell a turn's header from a line break
EXAMPLE = 30  # tokens shown of a prompt


@dataclass(frozen=True)
class Beginnings:
    """How the prompts of a run's data begin, where that is as none of what is asked.

    Attributes:
        share: of the rows.
        formats: the commonest of them, as texts with {prompt} in it.
        example: how the first begins.
    """

    share: float
    formats: tuple[str, ...]
    example: str

    def unheld(self) -> str:
        """What is said of them."""
        return (
            f"{self.share:.0%} of the data's prompts begin as none in which the anchor asks, and nothing is held there "
            f"(first {self.example!r}); where many begin alike, give that as asft.prompt_formats, with {PLACE} in the "
            "request's place"
        )


def beginnings(tokenizer: Any, dataset: Any, formats: Sequence[str]) -> Beginnings | None:
    """How the prompts of tokenised data begin, if not as what is asked; None where nearly all do, or it is not known.

    In chats it is what stands before the first turn of the user: a system prompt.

    Args:
        tokenizer: of the run.
        dataset: rows of "input_ids" and "labels".
        formats: in which the anchor asks beside the tokenizer's chat template.
    """
    turn, prompts = rendered(tokenizer), list(_prompts(dataset))
    if turn is None or not prompts:
        return None
    before, after = turn
    asked = [_start(tokenizer, before, False), *(_start(tokenizer, text.partition(PLACE)[0], True) for text in formats)]
    others = [ids for ids in prompts if not any(ids[: len(start)] == start for start in asked)]
    header = _header(tokenizer, before)
    ids = tokenizer(header, add_special_tokens=False)["input_ids"] if header else []
    if header:
        heads = Counter(tuple(_up_to(prompt, ids)) for prompt in others)
    else:  # the template puts a system prompt into the user's turn: what nearly all rows begin with
        shared = _shared(prompts)
        known = max(len(start) for start in asked if shared[: len(start)] == start or start is asked[0])
        is_chat = shared[: len(asked[0])] == asked[0]
        heads = Counter({tuple(shared): len(prompts)} if is_chat and len(shared) >= known + LONGER else {})
        others = others or (prompts if heads else [])
    least = SHARE * len(prompts)
    if len(others) < least:
        return None
    common = [list(head) for head, count in heads.most_common(MOST) if head and count >= least]
    texts = [_format(tokenizer, head, header, len(ids), after) for head in common]
    found = tuple(text for text in texts if text is not None)
    return Beginnings(len(others) / len(prompts), found, tokenizer.decode(others[0][:EXAMPLE]))


def _shared(prompts: Sequence[list[int]]) -> list[int]:
    """The longest beginning that nearly all have."""
    group, least = list(prompts), ALIKE * len(prompts)
    depth = 0
    while counts := Counter(ids[depth] for ids in group if len(ids) > depth):
        token, count = counts.most_common(1)[0]
        if count < least:
            break
        group = [ids for ids in group if len(ids) > depth and ids[depth] == token]
        depth += 1
    return group[0][:depth]


def _prompts(dataset: Any) -> Iterator[list[int]]:
    """The tokens before the first trained one, of rows from all over; none of rows that are trained whole."""
    columns = getattr(dataset, "column_names", None)
    if not hasattr(dataset, "__len__") or not columns or not {"input_ids", "labels"} <= set(columns):
        return
    count = min(ROWS, len(dataset))
    for i in range(count):
        row = dataset[i * len(dataset) // count]
        start = next((place for place, label in enumerate(row["labels"]) if label != -100), 0)
        if start:
            yield [int(token) for token in row["input_ids"][:start]]


def _header(tokenizer: Any, before: str) -> str:
    """With what a turn of the user begins, wherever it stands; nothing where that is but a line break."""
    other = rendered(tokenizer, system="What is it?")
    if other is None:
        return ""
    same = takewhile(lambda pair: pair[0] == pair[1], zip(reversed(before), reversed(other[0]), strict=False))
    shared = "".join(letter for letter, _ in same)[::-1]
    whole = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in (before, other[0])]
    for i in range(len(shared)):  # letters that two tokens have in common are no header
        ids = tokenizer(shared[i:], add_special_tokens=False)["input_ids"]
        if len(shared[i:].strip()) >= LEAST and all(tokens[-len(ids) :] == ids for tokens in whole):
            return shared[i:]
    return ""


def _start(tokenizer: Any, before: str, special: bool) -> list[int]:
    """The tokens of what stands before a request, whatever that is: the last letters may be of one token with it."""
    texts = [before, before + "A", before + "7"]
    read = [tokenizer(text, add_special_tokens=special)["input_ids"] for text in texts]
    return read[0][: next((i for i, ids in enumerate(zip(*read, strict=False)) if len(set(ids)) > 1), len(read[0]))]


def _up_to(ids: list[int], header: list[int]) -> list[int]:
    """Up to the first place of the header and with it; nothing where it is not there."""
    for i in range(len(ids) - len(header) + 1):
        if ids[i : i + len(header)] == header:
            return ids[: i + len(header)]
    return []


def _format(tokenizer: Any, head: list[int], header: str, tokens: int, after: str) -> str | None:
    """A beginning of so many tokens of header at its end as a format; None where the tokenizer reads that otherwise."""
    first = tokenizer("a")["input_ids"][:1]
    own = int(first == [tokenizer.bos_token_id] == head[:1])  # the tokenizer puts it before every text by itself
    text = tokenizer.decode(head[own : len(head) - tokens]) + header
    for gap in ("", " "):  # some drop the last space
        found = f"{text}{gap}{PLACE}{after}"
        if found.count(PLACE) == 1 and tokenizer(found)["input_ids"][: len(head)] == head:
            return found
    return None
