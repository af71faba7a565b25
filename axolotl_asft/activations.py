"""What a model's linear layers are fed on a set of prompts: the second moment of their inputs, in factored form."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from axolotl_asft.errors import AsftError

DEFAULT_INPUT_RANK = 64
OWN_WORDS = 16  # tokens of the model's own answers: a refusal shows in its first words
MAX_TOKENS = 4096  # whose inputs are kept, in bf16


@dataclass(frozen=True)
class LayerInputs:
    """The inputs of the linear layers, on average over tokens.

    Attributes:
        factors: module name -> X (in, m) fp32, X X^T ~ E[x x^T] scaled to trace `in`: without a preferred direction of
            the inputs it would be the identity.
        energy: module name -> share of the trace that the m kept directions carry.
        tokens: how many tokens the average is over.
    """

    factors: Mapping[str, Tensor]
    energy: Mapping[str, float]
    tokens: int


@torch.no_grad()
def layer_inputs(
    model: nn.Module,
    tokenizer: Any,
    turns: Sequence[tuple[str, str]],
    names: Sequence[str],
    rank: int = DEFAULT_INPUT_RANK,
    batch_size: int = 8,
    advance: Callable[[int], None] = lambda n: None,
) -> LayerInputs:
    """E[x x^T] of what each layer is fed on the turns, its m leading principal directions.

    x is taken at every token but the first: a text's first token is an attention sink of large norm, the same
    whatever the text says.

    Args:
        model: the aligned model.
        tokenizer: its tokenizer.
        turns: (prompt text as the model reads it, with the chat template; answer).
        names: full names of the linear layers; one that is not fed every token is left out of the result.
        rank: m, at most.
        batch_size: turns at a time.
        advance: called with the number of turns that were read.

    Raises:
        AsftError: the model has no such layers, or its inputs are not finite.
    """
    modules = dict(model.named_modules())
    missing = [name for name in names if name not in modules]
    if missing:
        raise AsftError(f"the model has no layer {missing[0]}; expected the aligned model of this direction")
    kept: dict[str, list[Tensor]] = {name: [] for name in names}
    keep = torch.zeros(0, dtype=torch.bool)
    last: list[tuple[Tensor, Tensor]] = []  # the query, key and value layers are fed one tensor: one copy serves all

    def look(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            if args[0].shape[:-1] != keep.shape:
                return  # a layer that sees some tokens only, as experts do
            if not last or last[0][0] is not args[0]:
                last[:] = [(args[0], args[0][keep.to(args[0].device)].to("cpu", torch.bfloat16, copy=True))]
            kept[name].append(last[0][1])

        return hook

    tokens = 0
    with ExitStack() as stack:
        for name in names:
            stack.callback(modules[name].register_forward_pre_hook(look(name)).remove)
        for start in range(0, len(turns), batch_size):
            texts = [prompt + answer for prompt, answer in turns[start : start + batch_size]]
            batch = tokenizer(texts, return_tensors="pt", padding=True, padding_side="right", add_special_tokens=False)
            keep = batch["attention_mask"].bool()
            keep[:, 0] = False
            model(**batch.to(next(model.parameters()).device))
            advance(len(texts))
            tokens += int(keep.sum())
            if tokens >= MAX_TOKENS:
                break
    found = {name: _factor(name, torch.cat(rows).float(), rank) for name in names if (rows := kept.pop(name))}
    return LayerInputs({name: X for name, (X, _) in found.items()}, {name: e for name, (_, e) in found.items()}, tokens)


def _factor(name: str, inputs: Tensor, rank: int) -> tuple[Tensor, float]:
    """X (in, m) and its share of the trace, of inputs (tokens, in)."""
    if not torch.isfinite(inputs).all():
        raise AsftError(f"{name}: its inputs hold NaN or infinity; load the model in another dtype")
    # the Gram matrix of the smaller side: exact, and never larger than MAX_TOKENS squared
    tokens, columns = inputs.shape
    small = (inputs @ inputs.T if tokens < columns else inputs.T @ inputs).double()
    values, vectors = torch.linalg.eigh(small)
    leading = slice(max(0, len(values) - rank), None)
    values, vectors = values.clamp(min=0)[leading].flip(0), vectors[:, leading].flip(1)
    # columns of length sqrt(value), either way
    X = inputs.T.double() @ vectors if tokens < columns else vectors * values.sqrt()
    total = float(inputs.double().square().sum())
    if total == 0:
        return X.float(), 1.0
    return (X * (columns / total) ** 0.5).float(), float(values.sum()) / total
