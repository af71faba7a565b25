"""The demo's small model: a real Llama and its chat tokenizer, trained on the spot."""

import math
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from axolotl_asft.demo.prompts import Turn, vocabulary

BATCH = 48  # turns in a step
SPECIAL = ["<unk>", "<s>", "</s>", "<pad>", "<|user|>", "<|assistant|>"]
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|> ' + message['content'] + ' ' }}"
    "{% if message['role'] == 'assistant' %}{{ '</s> ' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|> ' }}{% endif %}"
)


def make_tokenizer():
    """A word-level tokenizer of the demo's vocabulary, with a chat template."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {word: i for i, word in enumerate([*SPECIAL, *vocabulary()])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def make_model(tokenizer, seed: int):
    """A Llama of 4 layers and width 128, about 0.8 million weights, randomly initialised."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=64 * math.ceil(len(tokenizer) / 64),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,  # what `axolotl asft eval` asks and answers by default
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


def encode(tokenizer, turn: Turn) -> tuple[list[int], list[int]]:
    """Token ids of the prompt up to where the answer begins, and of the answer with its end."""
    messages = [{"role": "user", "content": turn.prompt}]
    prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return tokenizer.encode(prompt), tokenizer.encode(f"{turn.answer} </s>")


def fit(
    model,
    tokenizer,
    turns: list[Turn],
    steps: int,
    learning_rate: float,
    seed: int,
    advance: Callable[[], None] = lambda: None,
) -> None:
    """Train all weights on the answers of `turns`."""
    generator = torch.Generator().manual_seed(seed)
    rows = [encode(tokenizer, turn) for turn in turns]
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps, pct_start=0.1)
    model.train()
    for _ in range(steps):
        picked = torch.randint(len(rows), (BATCH,), generator=generator).tolist()
        input_ids, labels, mask = _batch([rows[i] for i in picked], tokenizer.pad_token_id)
        loss = model(input_ids=input_ids, attention_mask=mask, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        advance()
    model.eval()


def _batch(rows: list[tuple[list[int], list[int]]], pad: int) -> tuple[Tensor, Tensor, Tensor]:
    length = max(len(prompt) + len(answer) for prompt, answer in rows)
    input_ids = torch.full((len(rows), length), pad)
    labels = torch.full((len(rows), length), -100)
    mask = torch.zeros((len(rows), length), dtype=torch.long)
    for i, (prompt, answer) in enumerate(rows):
        count = len(prompt) + len(answer)
        input_ids[i, :count] = torch.tensor(prompt + answer)
        labels[i, len(prompt) : count] = torch.tensor(answer)
        mask[i, :count] = 1
    return input_ids, labels, mask


def save(model, tokenizer, folder: Path) -> None:
    """Write a Hugging Face checkpoint folder."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
