"""The prompts that an evaluation asks in: those of the chat template, or of the data that were trained on."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from axolotl_asft.answer_data import TYPE as ANSWERS
from axolotl_asft.general_formats import UNSEEN
from axolotl_asft.prompt_formats import checked_formats
from axolotl_asft.stamp import read_stamp

if TYPE_CHECKING:
    from axolotl_asft.run_data import DataFormat

CHAT_TEMPLATE = "chat_template"  # the commonest type of data, and what asks for no other format


def format_to_ask_in(
    given: str | None, content: Mapping[str, Any], adapters: Sequence[str] = ()
) -> tuple[str | None, str | None]:
    """The format to ask in, None for the chat template; and a line on it where another was trained in.

    Args:
        given: a text with {prompt} in it, "chat_template", or a name of `UNSEEN`; None: the format in which all of the
            data ask.
        content: the keys of an axolotl YAML, or none.
        adapters: as `axolotl_asft.evaluation.models.subjects` takes them; their stamps say what was asked in training.

    Raises:
        AsftError: the text has no {prompt}.
    """
    if given == CHAT_TEMPLATE:
        return None, None
    if given is not None:
        return (given if given in UNSEEN else checked_formats([given])[0]), None
    formats = formats_of_data(content)
    if not formats:
        return None, _trained_otherwise(adapters)
    told = f"data of type {formats[0].kind} ask in a format of their own"
    texts = {one.text for one in formats}
    block = content.get("asft")
    if texts == {None} and isinstance(block, dict):  # then the config says it
        texts = set(block.get("prompt_formats") or [None])
    text = texts.pop()
    if text is None or texts or len(formats) < len(_kinds(content)):
        return None, f"{told}; prompts are asked in the chat template: --prompt-format asks in another"
    return text, f"{told}; prompts are asked in it: --prompt-format chat_template asks in the chat template"


def formats_of_data(content: Mapping[str, Any]) -> "list[DataFormat]":
    """Each dataset of an axolotl YAML that asks in a format of its own."""
    if all(str(kind or CHAT_TEMPLATE).startswith(CHAT_TEMPLATE) for kind in _kinds(content)):
        return []
    from axolotl_asft.run_data import formats_of_content  # imports axolotl, which takes seconds

    return formats_of_content(content)


def _kinds(content: Mapping[str, Any]) -> list[Any]:
    datasets = content.get("datasets") or []
    kinds = [one.get("type") for one in datasets if isinstance(one, dict)] if isinstance(datasets, list) else []
    return [kind for kind in kinds if kind != ANSWERS]  # which are in all forms


def _trained_otherwise(adapters: Sequence[str]) -> str | None:
    for adapter in adapters:
        folder = adapter.rpartition("=")[2]
        if formats := read_stamp(folder).get("prompt_formats"):
            return (
                f"{folder} was trained on data that ask as {formats[0]!r}; prompts are asked in the chat template: "
                "--prompt-format asks in another"
            )
    return None
