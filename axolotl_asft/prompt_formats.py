"""Prompts that data put around a request in place of a chat template, such as alpaca's."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from axolotl_asft.errors import AsftError
from axolotl_asft.spec import own_answers_in

PLACE = "{prompt}"  # of the request, in a format
TAIL = 12  # characters before a request that tell its template; what stands further ahead may be the date
LONGEST = 10_000  # characters
OTHER_TEMPLATE = (
    "prompt_formats: the direction file's requests are not in the tokenizer's chat template, so they cannot be put in "
    "another format; make the direction again with the run's tokenizer, or leave prompt_formats out"
)


def checked_formats(formats: Sequence[str]) -> list[str]:
    """The formats, each once.

    Raises:
        AsftError: no list; one without {prompt}, with two of them, or too long.
    """
    if not isinstance(formats, list | tuple):
        raise AsftError(f"prompt_formats is {formats!r}; expected a list of texts, each with {{prompt}} in it")
    for text in formats:
        if not isinstance(text, str) or text.count(PLACE) != 1 or len(text) > LONGEST:
            found = repr(text[:200] if isinstance(text, str) else text)
            raise AsftError(
                f"{found} is no prompt format; expected the text that data put around a request, with {{prompt}} once "
                "in its place, such as 'Q: {prompt}\\nA: '"
            )
    return list(dict.fromkeys(formats))


def asked_in(formats: Sequence[str], general: bool) -> str:
    """What a line of words says of the formats that an anchor asks in; nothing where there are none."""
    others = [f"in {len(formats)} format{'s' if len(formats) > 1 else ''} of the data"] if formats else []
    others += ["under general system prompts and in later turns"] if general else []
    return f" (asked in the chat template, {' and '.join(others)})" if others else ""


def asked_ways(
    answers: int, formats: Sequence[str] = (), general: Sequence[str] = ()
) -> Iterator[tuple[int, str | None]]:
    """What is asked for, in turn: (answer, the text around its request; None: the chat template).

    Each pair of answers, a refusal and a harmless one, in the chat template, in one of the data's formats and in one of
    the general ones: however many these are, they share as many texts as the chat template has.
    """
    for first in range(0, answers, 2):
        for texts in ((None,), formats, general):
            if texts:
                way = texts[first // 2 % len(texts)]
                yield from ((place, way) for place in range(first, min(first + 2, answers)))


def filled(text: str, request: str) -> str:
    """A format around a request."""
    return text.replace(PLACE, request)


def rendered(tokenizer: Any, turns: Sequence[tuple[str, str]] = (), thinks: bool = False) -> tuple[str, str] | None:
    """What the chat template puts before a user's turn and after it; None where it has none, or refuses the turns.

    Args:
        turns: that come before, (role, text) each.
        thinks: leave it to a template that knows thoughts whether one is to come; else it is told that none is.
    """
    thoughts = {} if thinks else {"enable_thinking": False}
    chat = [{"role": role, "content": text} for role, text in (*turns, ("user", PLACE))]
    try:
        text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True, **thoughts)
        before, found, after = text.rpartition(PLACE)
    except Exception:  # a template may refuse in any way
        return None
    return (before, after) if found else None


def plain_requests(tokenizer: Any, requests: Sequence[str]) -> list[str] | None:
    """Requests as a model read them, without the chat template around; None where they are not of the tokenizer's.

    Of what stands before a request only the end is compared, since a template may begin with the date; what follows
    it may be a thought.
    """
    turn = rendered(tokenizer)
    if turn is None:
        return None
    head, lead = turn[0][-TAIL:], turn[1].partition("<think>")[0].strip()
    plain = []
    for request in requests:
        asked = request.rpartition(lead)[0] if lead else request
        _, told, text = asked.rpartition(head) if head else ("", PLACE, asked)
        if not told or not text.strip():
            return None
        plain.append(text.strip())
    return plain


def refuse_other_template(tokenizer: Any, spec: Mapping[str, Any], formats: Sequence[str]) -> None:
    """Formats want the direction file's requests taken out of their template, where there is a tokenizer to tell.

    Raises:
        AsftError: the tokenizer's template is not theirs.
    """
    requests = [request for request, _ in own_answers_in(spec)]
    if formats and tokenizer is not None and plain_requests(tokenizer, requests) is None:
        raise AsftError(OTHER_TEMPLATE)


def format_as_template(tokenizer: Any, text: str) -> str:
    """A chat template (Jinja) that asks in a format, as data in it are tokenised: with the tokenizer's first token.

    Answers of earlier turns end with the end-of-text token.

    Raises:
        AsftError: the tokenizer reads a text in another way where its first token stands before it.
    """
    before, _, after = text.partition(PLACE)
    wanted = tokenizer(text)["input_ids"]
    for lead in ("", "{{ bos_token }}", "{{ bos_token + ' ' }}"):  # some read a space into the beginning of a text
        template = (
            f"{lead}{{% for message in messages %}}{{% if message['role'] == 'assistant' %}}"
            "{{ message['content'] + eos_token }}"
            f"{{% else %}}{{{{ {_quoted(before)} + message['content'] + {_quoted(after)} }}}}"
            "{% endif %}{% endfor %}"
        )
        turn = [{"role": "user", "content": PLACE}]
        asked = tokenizer.apply_chat_template(turn, chat_template=template, tokenize=False)
        if tokenizer(asked, add_special_tokens=False)["input_ids"] == wanted:
            return template
    raise AsftError(
        f"the tokenizer ({type(tokenizer).__name__}) puts something before a text that no chat template can; leave "
        "this format out, and ask in the chat template"
    )


def _quoted(text: str) -> str:
    """As a string of Jinja's."""
    escaped = text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n").replace("\r", "\\r")
    return f"'{escaped}'"
