"""The forms in which a chat model is asked once it serves, whatever it was trained on: under a system prompt, and in a
later turn of a conversation. A model that is held in the bare chat template alone is not held in these."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from axolotl_asft.errors import AsftError
from axolotl_asft.prompt_formats import PLACE, format_as_template, plain_requests, rendered
from axolotl_asft.spec import own_answers_in
from axolotl_asft.templates import text_tokenizer

Turn = tuple[str, str]  # role, text

# Different in kind, and none about safety. Under a system prompt what the aligned model says there is held; in a later
# turn without one what it says in the first, since a request that stands for itself has the same answer there.
ASKED: tuple[tuple[Turn, ...], ...] = (
    (("system", "You are a helpful assistant."),),
    (("user", "Hello!"), ("assistant", "Hello! How can I help you today?")),
    (("system", "You work for the customer service of a company. Be polite, and keep your answers short."),),
    (
        ("user", "Can you give me a word that rhymes with light?"),
        ("assistant", "Night, bright and kite all rhyme with light."),
        ("user", "Thank you, that is all I need for the poem."),
        ("assistant", "You are welcome! Good luck with it."),
    ),
    (("system", "You are an expert in your field. Answer precisely, in detail and in Markdown."),),
    (
        ("user", "I have two hours before my train leaves. What should I do?"),
        ("assistant", "You could take a short walk, have a coffee near the station, or read a few chapters of a book."),
    ),
    (
        ("system", "You are Robin, a companion with a lively style who loves to tell stories."),
        ("user", "Hi Robin, how are you?"),
        ("assistant", "Wonderful, thank you! I was just thinking of a story about a lighthouse. And you?"),
    ),
    (("system", "Follow the user's instructions exactly. Answer without introduction or comment."),),
)
# For an evaluation, which asks in what no anchor asked in.
UNSEEN: dict[str, tuple[Turn, ...]] = {
    "system_prompt": (("system", "You are the assistant of a shipping company. Answer shortly."),),
    "second_turn": (
        ("user", "Hello, can you help me today?"),
        ("assistant", "Of course! What would you like to know?"),
    ),
}
NOT_GENERAL = (
    "the direction file's requests are not in the tokenizer's chat template, or that takes neither a system prompt nor "
    "an earlier turn: the anchor asks in the first turn of a chat alone, and later ones may not be held"
)


def general_to_ask(tokenizer: Any, spec: Mapping[str, Any], wanted: bool | None) -> tuple[list[str], list[str]]:
    """The general formats in which the requests of a direction file can be asked, and a warning where none can.

    Args:
        tokenizer: the run's; None where it is not known, of which nothing is said.
        wanted: `general_formats` of the block.

    Raises:
        AsftError: they are wanted, and there are none.
    """
    if wanted is False or tokenizer is None:
        return [], []
    tokenizer, requests = text_tokenizer(tokenizer), [request for request, _ in own_answers_in(spec)]
    found = general_formats(tokenizer) if plain_requests(tokenizer, requests) is not None else []
    if wanted and not found:
        raise AsftError(f"general_formats is true, but {NOT_GENERAL}; set general_formats: false")
    return found, [] if found else [NOT_GENERAL]


def general_formats(tokenizer: Any) -> list[str]:
    """Texts with {prompt} in them, of a tokenizer's chat template; without those whose turns it refuses or leaves out.

    A template has its reasons: Gemma's first ones refuse a system prompt.
    """
    bare = rendered(tokenizer)
    found = [around(tokenizer, turns) for turns in ASKED]
    return list(
        dict.fromkeys(text for text in found if text is not None and bare is not None and text != PLACE.join(bare))
    )


def later_turns(tokenizer: Any) -> set[str]:
    """Those of `general_formats` that are a later turn and no more: the anchor wants there what is said in the first.

    Held to what the aligned model says after those turns, which differs from one to the next, others were held less
    well (docs/findings.md). Under a system prompt another answer may be right.
    """
    found = {around(tokenizer, turns) for turns in ASKED if all(role != "system" for role, _ in turns)}
    return {text for text in found if text is not None}


def around(tokenizer: Any, turns: Sequence[Turn]) -> str | None:
    """A request after other turns in the chat template; None where it has none, or refuses or drops one of them."""
    found = rendered(tokenizer, turns)
    if found is None or not all(text in found[0] for _, text in turns):
        return None
    return PLACE.join(found)


def template_to_ask_in(tokenizer: Any, prompt_format: str) -> str:
    """A chat template (Jinja) that asks in a format, or in the tokenizer's own after the turns of an `UNSEEN` one.

    Raises:
        AsftError: it cannot be asked in.
    """
    turns = UNSEEN.get(prompt_format)
    if turns is None:
        return format_as_template(tokenizer, prompt_format)
    if around(tokenizer, turns) is None:
        raise AsftError(
            f"the tokenizer's chat template takes no {prompt_format.replace('_', ' ')}, or there is none; ask in a "
            "text with {prompt} in it, or in the chat template"
        )
    before = json.dumps([{"role": role, "content": text} for role, text in turns])
    return f"{{% set messages = {before} + messages %}}{tokenizer.get_chat_template()}"
