"""The prompts that an evaluation asks in: those of the chat template, or of the data that were trained on."""

from collections.abc import Mapping
from typing import Any

from axolotl_asft.prompt_formats import checked_formats

CHAT_TEMPLATE = "chat_template"  # the commonest type of data, and what asks for no other format


def format_to_ask_in(given: str | None, content: Mapping[str, Any]) -> tuple[str | None, str | None]:
    """The format to ask in, None for the chat template; and a line on it where the config's data have another.

    Args:
        given: a text with {prompt} in it, or "chat_template"; None: the format in which all of the data ask.
        content: the keys of an axolotl YAML, or none.

    Raises:
        AsftError: the text has no {prompt}.
    """
    if given is not None:
        return (None if given == CHAT_TEMPLATE else checked_formats([given])[0]), None
    kinds = [one.get("type") for one in content.get("datasets") or [] if isinstance(one, dict)]
    if all(str(kind or CHAT_TEMPLATE).startswith(CHAT_TEMPLATE) for kind in kinds):
        return None, None
    from axolotl_asft.run_data import formats_of_content  # imports axolotl, which takes seconds

    formats = formats_of_content(content)
    if not formats:
        return None, None
    text = formats[0].text
    told = f"data of type {formats[0].kind} ask in a format of their own"
    if text is None or len(formats) < len(kinds) or any(one.text != text for one in formats):
        return None, f"{told}; prompts are asked in the chat template: --prompt-format asks in another"
    return text, f"{told}; prompts are asked in it: --prompt-format chat_template asks in the chat template"
