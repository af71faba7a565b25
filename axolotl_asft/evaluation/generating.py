"""How a model reads and writes: in its positions, with none of its authors' settings, to its tokenizer's end."""

from typing import Any

import torch
from torch import Tensor

from axolotl_asft.templates import QUESTION

ANSWER = "That is all."


def positions(model: Any) -> int | None:
    """How many tokens the model reads; lm-eval looks at the outer config alone, which a wrapper's text model is not in.

    RoBERTa and its like count positions from the padding's number on, and have so many fewer than their config says.
    None where its config says nothing.
    """
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            return module.num_embeddings - module.padding_idx - 1
    config = model.config.get_text_config()
    names = ("n_positions", "max_position_embeddings", "n_ctx")
    return next((value for name in names if (value := getattr(config, name, None))), None)


def only_special_tokens(model: Any) -> None:
    """Of a model's generation_config.json nothing else counts.

    A repetition penalty, or a length, that its authors put there would come into every answer, and what is asked for is
    what the model itself says.
    """
    from transformers import GenerationConfig

    kept = model.generation_config
    tokens = {name: getattr(kept, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    model.generation_config = GenerationConfig(**tokens)


def end_tokens(model: Any, tokenizer: Any) -> list[int]:
    """The tokens that end what it writes: the model's, the tokenizer's, and the one that ends a turn of its template.

    A training may have taught another end than the one that the model came with.
    """
    found = model.generation_config.eos_token_id
    ids = [*(found if isinstance(found, list) else [found]), tokenizer.eos_token_id, _turn_end(tokenizer)]
    return sorted({token for token in ids if token is not None})


def to_the_end(output: Tensor, asked: int, ends: list[int], padding: int) -> Tensor:
    """(batch, tokens) with padding for the first end behind what was asked, which a text may show, and all after it."""
    ended = torch.isin(output, torch.tensor(ends, dtype=torch.long, device=output.device))
    ended[:, :asked] = False
    return output.masked_fill(ended.cumsum(dim=1) > 0, padding)


def _turn_end(tokenizer: Any) -> int | None:
    """The added token that the chat template puts behind an answer; None where it puts none, or words."""
    if not tokenizer.chat_template:
        return None
    turns = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}]
    try:
        text = tokenizer.apply_chat_template(turns, tokenize=False)
    except Exception:  # a template may refuse a turn in any way; then what the other two say has to do
        return None
    _, answered, tail = text.rpartition(ANSWER)
    ids = tokenizer.encode(tail.strip(), add_special_tokens=False) if answered else []
    return ids[0] if ids and ids[0] in tokenizer.added_tokens_decoder else None
