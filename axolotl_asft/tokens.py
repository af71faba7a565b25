"""From text to tokens and back, as a chat model read its request and wrote its answer."""

from collections.abc import Sequence
from typing import Any


def turn_tokens(tokenizer: Any, request: str, answer: str) -> tuple[list[int], int]:
    """The tokens of request and answer, read as one text, and where those of the answer begin.

    Alone, an answer may be read otherwise than the model wrote it: a tokenizer of SentencePiece's kind puts a space
    before the first word of whatever it is given.

    Args:
        request: as the model reads it, with the chat template.
        answer: as `written` gives it.
    """
    ids = tokenizer(request + answer, add_special_tokens=False)["input_ids"]
    head = tokenizer(request, add_special_tokens=False)["input_ids"]
    differing = (i for i, (one, other) in enumerate(zip(head, ids, strict=False)) if one != other)
    return ids, next(differing, min(len(head), len(ids)))


def written(tokenizer: Any, tokens: Sequence[int]) -> str:
    """The text of tokens that follow others, without special ones.

    By itself `decode` drops the space before a first word, which stands between request and answer in the formats of
    Llama 2 and Mistral ("[/INST] I cannot"), and in others not.
    """
    before = tokenizer("a", add_special_tokens=False)["input_ids"]
    lead = tokenizer.decode(before, skip_special_tokens=True)
    text = tokenizer.decode([*before, *tokens], skip_special_tokens=True)
    return text[len(lead) :] if text.startswith(lead) else tokenizer.decode(tokens, skip_special_tokens=True)


def first_words(tokenizer: Any, text: str, count: int) -> str:
    """The text of its first `count` tokens."""
    if not tokenizer.is_fast:
        tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
        space = text[: len(text) - len(text.lstrip())]
        return text if len(tokens) <= count else space + tokenizer.decode(tokens[:count]).lstrip()
    places = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    return text if len(places) <= count else text[: places[count - 1][1]]
