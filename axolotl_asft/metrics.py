"""In which metric the penalty measures an update, taken from the aligned model's behaviour on safety prompts."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from axolotl_asft.errors import AsftError
from axolotl_asft.moments import SecondMoment
from axolotl_asft.tokens import turn_tokens

DEFAULT_METRIC_RANK = 256
DEFAULT_METRIC_ENERGY = 0.99
OWN_WORDS = 16  # tokens of the model's own answers: that it refuses is decided in its first words
JUDGED_WORDS = 48  # tokens by which an answer says that it refuses: some begin by saying what they are


@dataclass(frozen=True)
class LayerMetric:
    """The factors of one layer's metric: its penalty becomes ||Y^T (I - C) dW X||_F^2.

    Attributes:
        X: (in, m) fp32.
        Y: (out, n) fp32; None where the metric does not look at outputs.
        energy: share of the trace that the kept directions carry, of X times of Y.
    """

    X: Tensor
    Y: Tensor | None
    energy: float


@dataclass(frozen=True)
class ModelMetric:
    """A metric of every layer.

    Attributes:
        name: "activations" or "fisher".
        layers: by the names of their modules.
        answers: how many answers it was taken from.
        scale: by what the metric as it is defined was divided, so that penalties of all metrics are of one size.
    """

    name: str
    layers: Mapping[str, LayerMetric]
    answers: int
    scale: float = 1.0


@torch.no_grad()
def activation_metric(
    model: nn.Module,
    tokenizer: Any,
    turns: Sequence[tuple[str, str]],
    names: Sequence[str],
    rank: int = DEFAULT_METRIC_RANK,
    energy: float = DEFAULT_METRIC_ENERGY,
    batch_size: int = 8,
    advance: Callable[[int], None] = lambda n: None,
) -> ModelMetric:
    """X X^T ~ E[x x^T] of what each layer is fed on the turns, scaled to trace `in`.

    ||dW X||^2 is how far the layer's outputs move on such inputs. Without a preferred direction of the inputs it would
    be the plain ||dW||^2. x is taken at every token but the first: a text's first token is an attention sink of large
    norm, the same whatever the text says.

    Args:
        model: the aligned model.
        tokenizer: its tokenizer.
        turns: (prompt text as the model reads it, with the chat template; answer).
        names: full names of the linear layers; one that is not fed every token is left out of the result.
        rank, energy: directions kept a layer and side: the fewest with this share of the trace, at most so many.
        batch_size: turns at a time.
        advance: called with the number of turns that were read.

    Raises:
        AsftError: the model has no such layers, or its inputs are not finite.
    """
    moments: dict[str, SecondMoment] = {}
    keep = torch.zeros(0, dtype=torch.bool)

    def look(name: str, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        if args[0].shape[:-1] == keep.shape:  # not so where a layer sees some tokens only, as experts do
            rows = args[0][keep.to(args[0].device)]
            if name not in moments:
                moments[name] = SecondMoment(rows.shape[1], rank)
            moments[name].add(rows)

    with _watched(model, names, look):
        for batch, _ in _batches(model, tokenizer, turns, batch_size, advance):
            keep = batch["attention_mask"].bool().cpu()
            keep[:, 0] = False
            model(**batch)
    layers = {}
    for name in [name for name in names if name in moments]:
        moment = moments.pop(name)
        X, share = _factor(name, moment, energy)
        layers[name] = LayerMetric(X * (X.shape[0] / moment.trace) ** 0.5 if moment.trace > 0 else X, None, share)
    return ModelMetric("activations", layers, len(turns))


def fisher_metric(
    model: nn.Module,
    tokenizer: Any,
    turns: Sequence[tuple[str, str]],
    names: Sequence[str],
    rank: int = DEFAULT_METRIC_RANK,
    energy: float = DEFAULT_METRIC_ENERGY,
    batch_size: int = 8,
    seed: int = 0,
    advance: Callable[[int], None] = lambda n: None,
) -> ModelMetric:
    """Y Y^T (x) X X^T ~ the Fisher information of a layer's weight about the model's answers, Kronecker-factored.

    ||Y^T dW X||^2 is, to second order, layer by layer and up to a common scale, the Kullback-Leibler divergence between
    what the aligned model answers and what the tuned one does: what an update does to the answers, however large it is.
    With x_t a layer's input at token t and g_t the gradient, with respect to its output, of the log-probability of
    tokens drawn from the model along an answer,

        X X^T = E[ |g_t|^2 x_t x_t^T ] / E[ |g_t|^2 ],    Y Y^T = E over answers [ sum_t g_t g_t^T ] / scale

    with scale / 2 ||Y^T dW X||^2 in nats an answer, and scale such that the mean over layers of
    tr(X X^T) tr(Y Y^T) / (in out) is 1: an update without preferred directions costs what plain ||dW||^2 does.

    K-FAC (Martens and Grosse 2015, arXiv 1503.05671) with inputs weighted by their gradients. The anchor is that of
    elastic weight consolidation (Kirkpatrick et al. 2017, arXiv 1612.00796), set at the aligned model's refusals.
    Costs one forward and one backward pass over the turns; the weights get no gradients.

    Args:
        model, tokenizer, turns, names, rank, energy, batch_size, advance: as for `activation_metric`.
        seed: of the drawn tokens; the global generators are left alone.

    Raises:
        AsftError: the model has no such layers, or its gradients are not finite.
    """
    moments: dict[str, tuple[SecondMoment, SecondMoment]] = {}

    def look(name: str, module: nn.Module, args: tuple[Tensor, ...], output: Any) -> None:
        inputs = args[0].detach().flatten(end_dim=-2)

        def add(gradient: Tensor) -> None:
            gradient = gradient.flatten(end_dim=-2)
            if name not in moments:
                moments[name] = SecondMoment(inputs.shape[1], rank), SecondMoment(gradient.shape[1], rank)
            X, Y = moments[name]
            weights = gradient.float().square().sum(dim=1)
            weighed = weights > 0  # all tokens of a text count, but for padding and what follows the answer
            X.add(inputs[weighed], weights[weighed])
            Y.add(gradient[weighed])

        if isinstance(output, Tensor) and output.requires_grad:  # a router may give several
            output.register_hook(add)

    generator = torch.Generator().manual_seed(seed)
    with _watched(model, names, look), _frozen(model):
        for batch, prompt_lengths in _batches(model, tokenizer, turns, batch_size, advance):
            with torch.enable_grad():
                logits = model(**batch).logits.float()
                _log_likelihood_of_own_words(logits, batch["attention_mask"], prompt_lengths, generator).backward()
    seen = [name for name in names if name in moments]
    traces = [moments[name][0].trace / math.prod(len(moment.sketch) for moment in moments[name]) for name in seen]
    scale = sum(traces) / (len(turns) * len(seen)) if any(traces) else 1.0
    layers = {}
    for name in seen:
        x, y = moments.pop(name)
        (X, share_x), (Y, share_y) = _factor(name, x, energy), _factor(name, y, energy)
        # the trace of Y's moment is sum |g_t|^2, the sum of the weights of X's
        X = X / y.trace**0.5 if y.trace > 0 else X
        layers[name] = LayerMetric(X, Y / (len(turns) * scale) ** 0.5, share_x * share_y)
    return ModelMetric("fisher", layers, len(turns), scale)


def _log_likelihood_of_own_words(
    logits: Tensor, attention_mask: Tensor, prompt_lengths: Sequence[int], generator: torch.Generator
) -> Tensor:
    """sum over the answers' tokens of log p(token drawn from p): the Fisher information is its gradient's moment.

    Args:
        logits: (texts, tokens, vocabulary).
        attention_mask: (texts, tokens), padded on the right.
        prompt_lengths: in tokens; the answer to a prompt is drawn from its last token on.
    """
    positions = torch.arange(logits.shape[1], device=logits.device)
    starts = torch.tensor([length - 1 for length in prompt_lengths], device=logits.device)
    answered = (positions >= starts[:, None]) & attention_mask.bool()
    log_probabilities = logits[answered].log_softmax(dim=-1)
    if not torch.isfinite(log_probabilities.detach()).all():
        raise AsftError("the model's logits hold NaN or infinity; load the model in another dtype")
    # drawn on the CPU, so that a seed gives the same tokens on every device
    drawn = torch.multinomial(log_probabilities.detach().exp().cpu(), 1, generator=generator)
    return log_probabilities.gather(1, drawn.to(logits.device)).sum()


def _factor(name: str, moment: SecondMoment, energy: float) -> tuple[Tensor, float]:
    if not torch.isfinite(moment.sketch).all():
        raise AsftError(f"{name}: what it is fed holds NaN or infinity; load the model in another dtype")
    return moment.factor(energy)


def _batches(
    model: nn.Module,
    tokenizer: Any,
    turns: Sequence[tuple[str, str]],
    batch_size: int,
    advance: Callable[[int], None],
) -> Iterator[tuple[Mapping[str, Tensor], list[int]]]:
    """The turns as padded batches on the model's device, with the lengths of their prompts."""
    device = next(model.parameters()).device
    for start in range(0, len(turns), batch_size):
        chunk = turns[start : start + batch_size]
        texts = [prompt + answer for prompt, answer in chunk]
        batch = tokenizer(texts, return_tensors="pt", padding=True, padding_side="right", add_special_tokens=False)
        yield batch.to(device), [turn_tokens(tokenizer, *turn)[1] for turn in chunk]
        advance(len(chunk))


@contextmanager
def _watched(model: nn.Module, names: Sequence[str], look: Callable[..., None]) -> Iterator[None]:
    """`look(name, module, args, output)` at every call of the layers, in evaluation mode."""
    modules = dict(model.named_modules())
    missing = [name for name in names if name not in modules]
    if missing:
        raise AsftError(f"the model has no layer {missing[0]}; expected the aligned model of this direction")

    def hook(name: str) -> Callable[..., None]:
        return lambda module, args, output: look(name, module, args, output)

    training = model.training
    with ExitStack() as stack:
        for name in names:
            stack.callback(modules[name].register_forward_hook(hook(name)).remove)
        stack.callback(model.train, training)
        model.eval()
        yield


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """No gradients of weights, and all the same a graph: it begins at the embeddings."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def begin(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return output.detach().requires_grad_()

    handle = model.get_input_embeddings().register_forward_hook(begin)  # type: ignore[operator]
    for parameter in trainable:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        handle.remove()
        for parameter in trainable:
            parameter.requires_grad_(True)
