"""An anchor that is asked anew at every step: the aligned model's own answers, beside what the model says now."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from axolotl_asft.errors import AsftError, one_line
from axolotl_asft.general_formats import later_turns
from axolotl_asft.prompt_formats import OTHER_TEMPLATE, asked_ways, filled, plain_requests
from axolotl_asft.quiet import without_adapter, without_noise
from axolotl_asft.spec import own_answers_in
from axolotl_asft.templates import text_tokenizer
from axolotl_asft.tokens import turn_tokens

TEXTS = 8  # answers a step
MULTIPLE = 16  # of tokens, to which a pass is padded: on an H100 each new length took 1 to 3 s once
LIKELIEST = 64  # tokens told apart at each place of an answer
TILED = "_tiled_mlp_dist_impl"  # axolotl's mark of a class whose forward pass it cuts into shards
SAME = 0.01  # nats a token that two passes over the same text may be apart


@dataclass(frozen=True)
class Places:
    """What a distribution over the vocabulary was at n places of a text, as far as it is told apart.

    Attributes:
        tokens: (n, m), the likeliest.
        log_p: (n, m) fp32, of these.
        log_rest: (n,) fp32, of all others together.
    """

    tokens: Tensor
    log_p: Tensor
    log_rest: Tensor

    @classmethod
    def of(cls, logits: Tensor) -> "Places":
        """From logits (n, vocabulary)."""
        tokens = logits.float().topk(min(LIKELIEST, logits.shape[-1] - 1)).indices
        return cls(tokens, *_log_probabilities(logits, tokens))

    def to(self, device: torch.device) -> "Places":
        return Places(self.tokens.to(device), self.log_p.to(device), self.log_rest.to(device))


def divergence(places: Places, logits: Tensor) -> Tensor:
    """KL(p || q) at each place, (n,) nats: sum over the likeliest tokens and the rest, taken as one, of p log(p / q).

    At most the divergence over the whole vocabulary, zero where q = p, and differentiable in `logits` (n, vocabulary).
    """
    log_q, log_rest = _log_probabilities(logits, places.tokens)
    likeliest = (places.log_p.exp() * (places.log_p - log_q)).sum(dim=-1)
    return likeliest + places.log_rest.exp() * (places.log_rest - log_rest)


def _log_probabilities(logits: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """(n, m) of the tokens and (n,) of all others, fp32."""
    logits = logits.float()
    total = logits.logsumexp(dim=-1)
    others = logits.scatter(-1, tokens, float("-inf")).logsumexp(dim=-1)
    return logits.gather(-1, tokens) - total[:, None], others - total


class AnswerAnchor:
    """KL(aligned || now), nats a token, of what the aligned model itself answered: refusals and harmless answers.

    What it says is remembered once, before the first step, by the model that is trained, without its adapter: of
    each place of an answer the 64 likeliest tokens. Every optimizer step asks for a few of the answers. It is learning
    without forgetting (Li and Hoiem 2016, arXiv 1606.09282), of what a model says when it is asked for harm. In a later
    turn the aligned model is meant as it answers in the first: there the divergence does not begin at zero.

    Attributes:
        kl: of the texts of the last `loss`, without those later turns, detached: zero of the aligned model.
    """

    def __init__(
        self,
        tokenizer: Any,
        answers: Sequence[tuple[str, str]],
        formats: Sequence[str] = (),
        general: Sequence[str] = (),
    ) -> None:
        """
        Args:
            tokenizer: the model's.
            answers: (request as the model reads it, with the chat template; its answer), of `own_answers_of`.
            formats: in which the requests are asked too, by turns (`axolotl_asft.prompt_formats`).
            general: in which they are asked besides, whatever the data (`axolotl_asft.general_formats`).

        Raises:
            AsftError: the trainer has no tokenizer, or one that reads no chat template's text; there are formats, and
                its chat template is not that of the requests.
        """
        if tokenizer is None:
            raise AsftError("anchor_weight needs the trainer's tokenizer; give it as processing_class, or set 0")
        tokenizer = text_tokenizer(tokenizer)
        plain = plain_requests(tokenizer, [request for request, _ in answers]) if formats or general else []
        if plain is None:
            raise AsftError(OTHER_TEMPLATE)
        self._texts: list[tuple[list[int], int]] = []
        self._in_template: list[bool] = []
        self._expected: list[int] = []  # of each text, the one whose answer is wanted: its own, or the first turn's
        general = [text for text in general if text not in formats]  # asked as the data ask
        later = later_turns(tokenizer).intersection(general)
        first: dict[int, int] = {}
        for place, text in asked_ways(len(answers), formats, general):
            request, answer = answers[place]
            asked = request if text is None else filled(text, plain[place])
            number = len(self._texts)
            if text in formats:
                self._texts.append(_joined(tokenizer, asked, answer))
            else:
                self._texts.append(_encoded(tokenizer, asked, answer))
            self._in_template.append(text is None)
            if text is None:
                first[place] = number
            same = text in later and self._answer(number) == self._answer(first[place])
            self._expected.append(first[place] if same else number)
        self._remembered: list[Places] = []
        self.kl = torch.zeros(())
        self._at_once = TEXTS  # in a pass

    def _answer(self, number: int) -> list[int]:
        """The tokens of a text's answer."""
        ids, start = self._texts[number]
        return ids[start:]

    @torch.no_grad()
    def remember(self, model: nn.Module) -> float:
        """The answers as the model without its adapter gives them. Under FSDP every process has to call.

        Returns the share of the answers' tokens that it holds likeliest, asked with the chat template: of its own
        nearly all.

        Raises:
            AsftError: the model does not take the texts, says nothing that is a number, or not twice the same.
        """
        with without_adapter(model), without_noise(model):
            self._at_once = self._most_at_once(model)
            found = [Places.of(logits) for logits in self._of_all(model, self._texts)]
            again = self._logits(model, self._texts[:TEXTS])
        said = [part for places in found for part in (places.log_p, places.log_rest)]
        if not all(bool(part.isfinite().all()) for part in said):
            raise AsftError(
                "the aligned model's answers are not finite numbers in this precision; train in another one (bf16 in "
                "place of fp16), or set anchor_weight: 0, and a lambda_reg"
            )
        apart = max(float(divergence(places, logits).max()) for places, logits in zip(found, again, strict=False))
        if not apart <= SAME:
            raise AsftError(
                f"the model without its adapter gives the same text two scores, {apart:.3g} nats per token apart: "
                "something in it is random, such as dropout; set that to 0, or anchor_weight: 0 and a lambda_reg"
            )
        self._remembered = [found[expected] for expected in self._expected]
        own = [
            places.tokens[:, 0].cpu() == torch.tensor(ids[start:])
            for places, (ids, start), is_own in zip(found, self._texts, self._in_template, strict=True)
            if is_own
        ]
        return float(torch.cat(own).float().mean())

    def _most_at_once(self, model: nn.Module) -> int:
        """Texts that the model takes in a pass: where packing is patched into a model, it may take a batch of one.

        So does axolotl's tiled MLP, and says nothing: its gradient of several texts is wrong.
        """
        tiled = any(hasattr(module, TILED) for module in model.modules())
        longest = sorted(self._texts, key=lambda text: -len(text[0]))
        for most in (1,) if tiled else (TEXTS, 1):
            try:
                self._pass(model, longest[:most])
                return most
            except AsftError:
                raise
            except Exception as error:  # a model's own forward, of any kind
                refusal = error
        raise AsftError(
            f"the model fails on the anchor's answers ({type(refusal).__name__}: {one_line(refusal)}); "
            "set anchor_weight: 0, and a lambda_reg"
        ) from refusal

    def loss(self, model: nn.Module, step: int, rank: int = 0, world: int = 1) -> Tensor:
        """This process's part of the mean divergence over the tokens of the step's answers, () fp32 with a graph.

        The mean over the processes is the mean over the tokens: however many there are, a step asks for the same
        answers. To be called, and followed by its backward pass, inside `without_noise(model)`.

        Args:
            model: as it is trained, wrapped or not.
            step: of the optimizer, from 0; the answers take turns.
        """
        turn = [(step * TEXTS + i) % len(self._texts) for i in range(min(TEXTS, len(self._texts)))]
        mine = turn[rank::world]
        # every process asks for as many, or passes would wait for ones that do not come; the added ones count nothing
        asked = (mine + turn)[: -(-len(turn) // world)]
        logits = self._logits(model, [self._texts[i] for i in asked])
        tokens = {i: len(self._remembered[i].log_rest) for i in turn}
        own = {i: count for i, count in tokens.items() if self._expected[i] == i}
        parts = [
            divergence(self._remembered[i].to(found.device), found).sum() * (place < len(mine))
            for place, (i, found) in enumerate(zip(asked, logits, strict=True))
        ]
        mine_alone = [part.detach() * (i in own) for part, i in zip(parts, asked, strict=True)]
        self.kl = torch.stack(mine_alone).sum() * (world / sum(own.values()))
        return torch.stack(parts).sum() * (world / sum(tokens.values()))

    @torch.no_grad()
    def measure(self, model: nn.Module) -> Tensor:
        """The mean divergence over the tokens of all the answers, () fp32. Under FSDP every process has to call.

        Without the later turns that are to be answered as the first: zero of the aligned model.
        """
        own = [i for i, expected in enumerate(self._expected) if expected == i]
        with without_noise(model):
            said = zip(own, self._of_all(model, [self._texts[i] for i in own]), strict=True)
            return torch.cat([divergence(self._remembered[i].to(now.device), now) for i, now in said]).mean()

    def _of_all(self, model: nn.Module, texts: Sequence[tuple[list[int], int]]) -> Iterator[Tensor]:
        """What `_logits` gives, of every text in turn, a few in memory at a time."""
        for first in range(0, len(texts), TEXTS):
            yield from self._logits(model, texts[first : first + TEXTS])

    def _logits(self, model: nn.Module, texts: Sequence[tuple[list[int], int]]) -> list[Tensor]:
        """Of each text (n, vocabulary): what is said at the n tokens of its answer."""
        starts = range(0, len(texts), self._at_once)
        return [logits for i in starts for logits in self._pass(model, texts[i : i + self._at_once])]

    @staticmethod
    def _pass(model: nn.Module, texts: Sequence[tuple[list[int], int]]) -> list[Tensor]:
        """The same of texts that are asked together."""
        device = next(model.parameters()).device
        length = -(-max(len(ids) for ids, _ in texts) // MULTIPLE) * MULTIPLE
        batch = torch.zeros(2, len(texts), length, dtype=torch.long)
        for row, (ids, _) in enumerate(texts):
            batch[0, row, : len(ids)] = torch.tensor(ids)
            batch[1, row, : len(ids)] = 1
        ids, mask = batch.to(device)
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        if logits is None or logits.ndim != 3 or logits.shape[-1] <= int(batch[0].max()):
            found = "nothing" if logits is None else f"logits {tuple(logits.shape)} for tokens {tuple(ids.shape)}"
            raise AsftError(
                f"the model gives {found}; anchor_weight needs a model that gives the probability of every next token: "
                "set anchor_weight: 0"
            )
        counts = [len(ids) - start for ids, start in texts]
        rows = torch.tensor([row for row, count in enumerate(counts) for _ in range(count)])
        places = torch.tensor([place for ids, start in texts for place in range(start - 1, len(ids) - 1)])
        return list(logits[rows, places].split(counts))  # at once: each slice would have a gradient as large as logits


def own_answers_of(spec: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The aligned model's own answers that a direction file keeps.

    Raises:
        AsftError: it keeps none.
    """
    kept = own_answers_in(spec)
    if not kept:
        raise AsftError(
            "anchor_weight needs the aligned model's own answers, which the direction file does not hold; make it "
            "again with `axolotl asft extract --metric fisher`, or set anchor_weight: 0"
        )
    return kept


def _encoded(tokenizer: Any, request: str, answer: str) -> tuple[list[int], int]:
    """The tokens of both, and where the answer begins."""
    ids, start = turn_tokens(tokenizer, request, answer)
    if not 0 < start < len(ids):
        raise AsftError("the direction file holds an answer without a text; make it again with `axolotl asft extract`")
    return ids, start


def _joined(tokenizer: Any, prompt: str, answer: str) -> tuple[list[int], int]:
    """The same of a prompt in a format of the data, whose two parts axolotl tokenises one by one."""
    head = tokenizer(prompt)["input_ids"]
    return head + tokenizer(answer.strip(), add_special_tokens=False)["input_ids"], len(head)
