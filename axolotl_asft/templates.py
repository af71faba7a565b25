"""Tokenizers and chat templates beside the requests that a direction file keeps as the aligned model read them."""

from collections.abc import Mapping, Sequence
from typing import Any

from axolotl_asft.errors import AsftError
from axolotl_asft.spec import own_answers_in

QUESTION = "What is it?"


def text_tokenizer(tokenizer: Any) -> Any:
    """The tokenizer itself, or a processor's, which reads a chat template's text with its control tokens.

    Raises:
        AsftError: mistral-common's, which would read control tokens in a text as plain letters.
    """
    tokenizer = words_of(tokenizer)
    if _is_a(tokenizer, "MistralCommonBackend"):
        raise AsftError(
            f"the tokenizer is mistral-common's ({type(tokenizer).__name__}), which reads the control tokens of a chat "
            "template as plain text; expected one of transformers: a model with a tokenizer.json and without a "
            "tekken.json, and no tokenizer_use_mistral_common"
        )
    return tokenizer


def words_of(tokenizer: Any) -> Any:
    """The tokenizer itself, or a processor's, whichever it is."""
    return tokenizer.tokenizer if _is_a(tokenizer, "ProcessorMixin") else tokenizer


def _is_a(tokenizer: Any, name: str) -> bool:
    """By the name of a class of transformers, each of which takes long to import."""
    return any(kind.__name__ == name for kind in type(tokenizer).__mro__)


def template_warnings(tokenizer: Any, spec: Mapping[str, Any], others: Sequence[str] = ()) -> list[str]:
    """A line where a chat template of the run leads to an answer in other words than those of the kept requests.

    What is held is held under the template that the direction file was made with; only the end of a turn is compared,
    since a template may begin with the date.

    Args:
        others: templates that data are rendered with, beside the tokenizer's own.
    """
    requests = [request for request, _ in own_answers_in(spec)]
    if not requests or tokenizer is None:
        return []
    own = getattr(tokenizer, "chat_template", None)
    templates = [own, *(template for template in dict.fromkeys(others) if template != own)]
    found = [_template_warning(tokenizer, template, requests) for template in templates if template]
    return [line for line in found if line is not None]


def _template_warning(tokenizer: Any, template: Any, requests: Sequence[str]) -> str | None:
    turns = [{"role": "user", "content": QUESTION}]
    options = {} if template == tokenizer.chat_template else {"chat_template": template}
    try:
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True, **options)
    except Exception:  # a template may refuse a turn in any way, which is the trainer's to say
        return None
    lead = text.rpartition(QUESTION)[2].partition("<think>")[0].strip()  # thinking may be on or off
    if all(lead in request for request in requests):
        return None
    kept = requests[0][-len(lead) - 20 :]
    return (
        f"the run's chat template opens the answer with {lead!r}, but the direction file's requests end in {kept!r}: "
        "the constraint holds the model only under the latter; train and serve with the aligned model's template, or "
        "make the direction again with this one"
    )
