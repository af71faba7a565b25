"""Is an answer language at all? A model that babbles refuses nothing and helps nobody."""

import math
from collections.abc import Callable, Sequence

import torch

from axolotl_asft.evaluation.models import within_memory
from axolotl_asft.tokens import turn_tokens

# Above this share of repeated pieces an answer goes round in circles.
REPETITIVE = 0.5
# Characters in a piece: what differs in rows of tables, lists and code stands closer together than that.
RUN = 32


def repetition(answer: str, n: int = 3) -> float:
    """1 - distinct pieces / pieces: 0 says nothing twice, towards 1 it goes round in circles.

    Pieces are n words or `RUN` characters, whichever repeat more: not every language has spaces, nor has "hahaha".

    Args:
        answer: one of at most n words and `RUN` characters cannot repeat: 0.
        n: words in a piece.
    """
    words = answer.lower().split()
    return max(_repeated(words, n), _repeated(" ".join(words), RUN))


def _repeated(units: Sequence[str], n: int) -> float:
    pieces = [tuple(units[i : i + n]) for i in range(len(units) - n + 1)]
    return 1 - len(set(pieces)) / len(pieces) if len(pieces) > 1 else 0.0


@torch.no_grad()
def log_likelihoods(
    model,
    tokenizer,
    pairs: Sequence[tuple[str, str]],
    batch_size: int = 8,
    advance: Callable[[int], None] = lambda n: None,
) -> list[tuple[float, int]]:
    """(sum over tokens of log p(answer | prompt), number of tokens) of each pair, in nats.

    The sum is NaN where the model lacks one of the tokens, which a training may have added.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer.
        pairs: (prompt text as the model reads it, with the chat template; answer).
        batch_size: pairs at a time; the longest go first.
        advance: called with the number of pairs that were done.
    """
    turns = [turn_tokens(tokenizer, prompt, answer) for prompt, answer in pairs]
    encoded = [(ids[:start], ids[start:]) for ids, start in turns]
    embeddings = model.get_input_embeddings().weight
    rows, device = embeddings.shape[0], embeddings.device
    found = [(math.nan if max([*head, *tail], default=0) >= rows else 0.0, len(tail)) for head, tail in encoded]
    order = [i for i, (total, _) in enumerate(found) if not math.isnan(total)]
    order.sort(key=lambda i: -len(encoded[i][0]) - len(encoded[i][1]))
    if lacking := len(encoded) - len(order):
        advance(lacking)
    for start in range(0, len(order), batch_size):
        chunk = order[start : start + batch_size]
        length = max(len(encoded[i][0]) + len(encoded[i][1]) for i in chunk)
        ids = torch.zeros(len(chunk), length, dtype=torch.long)
        mask, answered = torch.zeros_like(ids), torch.zeros_like(ids, dtype=torch.bool)
        for row, i in enumerate(chunk):
            head, tail = encoded[i]
            ids[row, : len(head) + len(tail)] = torch.tensor(head + tail)
            mask[row, : len(head) + len(tail)] = 1
            answered[row, len(head) : len(head) + len(tail)] = True
        if not answered.any():
            advance(len(chunk))
            continue
        with within_memory(batch_size):
            logits = model(input_ids=ids.to(device), attention_mask=mask.to(device)).logits[:, :-1]
        picked = answered[:, 1:]
        chosen = logits.cpu()[picked].float().log_softmax(-1).gather(1, ids[:, 1:][picked][:, None])[:, 0]
        sums = torch.zeros(len(chunk), dtype=torch.float64)
        sums.index_add_(0, picked.nonzero()[:, 0], chosen.double())
        for row, i in enumerate(chunk):
            found[i] = float(sums[row]), int(picked[row].sum())
        advance(len(chunk))
    return found


def median_perplexity(likelihoods: Sequence[tuple[float, int]]) -> float:
    """The median over answers of exp(- mean log p of a token); NaN where nothing was answered, or one is not known."""
    values = sorted(math.exp(min(-total / count, 50.0)) for total, count in likelihoods if count)
    if not values or any(map(math.isnan, values)):
        return math.nan
    middle = len(values) // 2
    return values[middle] if len(values) % 2 else (values[middle - 1] + values[middle]) / 2
