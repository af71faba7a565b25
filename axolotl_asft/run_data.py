"""What the datasets of an axolotl config ask in: chat templates, and prompts of their own."""

import contextlib
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from axolotl.prompt_strategies import load
from axolotl.utils.chat_templates import get_chat_template_from_config
from axolotl.utils.data.wrappers import DATASET_HANDLERS
from axolotl.utils.dict import DictDefault
from axolotl.utils.schemas.datasets import UserDefinedPrompterType
from datasets import Dataset

from axolotl_asft.errors import one_line
from axolotl_asft.prompt_formats import PLACE, checked_formats, plain_requests
from axolotl_asft.spec import own_answers_in

# Types of data that a chat template renders, or that come as they are, without a prompt around them.
NO_FORMAT = {"chat_template", "messages", "input_output", "completion", "pretrain", "llama2_chat"}


@dataclass(frozen=True)
class DataFormat:
    """Data that ask in a format of their own.

    Attributes:
        path: of the dataset.
        kind: its type, in a word.
        text: what it puts around a request without further input, with {prompt} in its place; None: no one text can be
            told, since the rows bring parts of it.
    """

    path: str
    kind: str
    text: str | None


@dataclass(frozen=True)
class RunFormats:
    """What a run's data ask in beside the chat template, and what is asked of the model in it.

    Attributes:
        data: the datasets that ask in a format of their own.
        asked: the texts in which an anchor is to ask.
        given: whether the config says so; else they are the data's.
        readable: whether the direction's requests can be taken out of the chat template at all.
    """

    data: tuple[DataFormat, ...]
    asked: tuple[str, ...]
    given: bool
    readable: bool

    def unheld(self, held: Sequence[str]) -> list[str]:
        """A line for each format under which nothing of the model is held, naming the first of its datasets.

        Args:
            held: the formats that the anchor asks in; none without an anchor.
        """
        if self.given and held:  # of a format that is not known, one of these may be it
            left = [one for one in self.data if one.text is not None and one.text not in held]
        else:
            left = [one for one in self.data if one.text not in held]
        firsts: dict[str, DataFormat] = {}
        for one in left:
            firsts.setdefault(one.text or one.kind, one)
        return [
            f"datasets: {one.path} is of type {one.kind}, whose prompts are not the chat template's, and under which "
            f"nothing is held; {self._way_out(one)}, or make chats of the data (type: chat_template)"
            for one in firsts.values()
        ]

    def _way_out(self, one: DataFormat) -> str:
        if not self.readable:
            return "train with the chat template of the direction file's requests, so that they can be asked otherwise"
        if one.text is None:
            return "give the text around a request, with {prompt} in its place, as asft.prompt_formats"
        return "ask in them: with an anchor_weight, and asft.prompt_formats that do not leave them out"


class _Row:
    """A row of data that has what a strategy takes for granted, each field a mark of its own, and nothing optional."""

    def __getitem__(self, field: str) -> str:
        return f"<{field}>"

    def __contains__(self, field: str) -> bool:
        return False


def dataset_templates(cfg: DictDefault, tokenizer: Any) -> list[str]:
    """The chat templates that single datasets name for themselves, in place of the run's."""
    found = []
    for dataset in [*(cfg.datasets or []), *(cfg.pretraining_dataset or [])]:
        if isinstance(dataset, dict) and dataset.get("chat_template") and tokenizer is not None:
            with contextlib.suppress(Exception):  # one that cannot be had is axolotl's to refuse
                found.append(get_chat_template_from_config(cfg, dataset, tokenizer))
    return found


def run_formats(cfg: DictDefault, tokenizer: Any, given: Sequence[str] | None, spec: Mapping[str, Any]) -> RunFormats:
    """What the run's data ask in, and what an anchor is to ask in: what is given, or else what the data do.

    Args:
        tokenizer: the run's; None where it is not known, and taken to have the chat template of the requests.
        given: `prompt_formats` of the block.
        spec: of the direction file, whose requests are asked.
    """
    data = data_formats(cfg, tokenizer)
    requests = [request for request, _ in own_answers_in(spec)]
    readable = tokenizer is None or not requests or plain_requests(tokenizer, requests) is not None
    if given is None:
        asked = dict.fromkeys(one.text for one in data if one.text is not None) if readable else ()
        return RunFormats(tuple(data), tuple(asked), False, readable)
    return RunFormats(tuple(data), tuple(given), True, readable)


def data_formats(cfg: DictDefault, tokenizer: Any) -> list[DataFormat]:
    """Each dataset that asks in a format of its own, such as alpaca's."""
    if cfg.skip_prepare_dataset or cfg.rl:
        return []
    found = []
    for dataset in cfg.datasets if isinstance(cfg.datasets, list) else []:
        kind = dataset.get("type") if isinstance(dataset, dict) else None
        if kind and not (isinstance(kind, str) and _may_be_rendered(kind)):
            named = kind if isinstance(kind, str) else "of its own"
            found.append(DataFormat(str(dataset.get("path")), named, _text_around(cfg, dataset, tokenizer)))
    return found


def formats_of_content(content: Mapping[str, Any]) -> list[DataFormat]:
    """The same of the keys of a YAML, as they stand there."""
    return data_formats(DictDefault(content), None)


def _text_around(cfg: DictDefault, dataset: Mapping[str, Any], tokenizer: Any) -> str | None:
    """What axolotl's own strategy for a type of data puts around a request, if it is the same in every row."""
    kind = dataset["type"]
    try:
        with _in_silence():
            if isinstance(kind, str):
                strategy = load(kind, tokenizer, cfg, dataset) or _built_in(cfg, kind, tokenizer)
            else:  # as axolotl reads it: without what is empty or unknown
                known = {key: kind[key] for key in UserDefinedPrompterType.model_fields if kind.get(key) is not None}
                if "format" in known and "no_input_format" not in known:
                    return None  # the one for rows with an input, the other as axolotl has it: which counts is theirs
                strategy = load("user_defined", tokenizer, cfg, known)
            instruction, more, answer, *system = strategy.parse_instruction_fields(_Row())
            if not _is_mark(instruction) or more or (answer and not _is_mark(answer)) or any(map(_is_mark, system)):
                return None
            build = strategy.prompter.build_prompt_w_system if system else strategy.prompter.build_prompt
            (text,) = checked_formats([next(iter(build(*system, PLACE, "")))])
    except Exception:  # a strategy of any kind, which may want other than a request
        return None
    return text if text.strip() != PLACE else None  # what is around a bare request stands in the rows


def _is_mark(text: object) -> bool:
    return isinstance(text, str) and re.fullmatch(r"<\w+>", text) is not None


@contextlib.contextmanager
def _in_silence() -> Iterator[None]:
    """axolotl logs a strategy that cannot be loaded as an error, on standard output."""
    before = logging.root.manager.disable
    logging.disable()
    try:
        yield
    finally:
        logging.disable(before)


def _built_in(cfg: DictDefault, kind: str, tokenizer: Any) -> Any:
    """The strategy of a type that axolotl has no module for; it is had around a dataset, here an empty one."""
    base, _, style = kind.partition(":")
    wrapped, _ = DATASET_HANDLERS[base](style or None, tokenizer, cfg, Dataset.from_dict({"text": []}), {})
    return wrapped.prompt_tokenizer


def _may_be_rendered(kind: str) -> bool:
    """Whether data of a type come in the chat template, or without any; of a module of the user's, nobody can tell."""
    parts = re.split(r"[.:]", kind)
    is_theirs = "." in kind and find_spec(f"axolotl.prompt_strategies.{parts[0]}") is None
    return is_theirs or bool(NO_FORMAT & set(parts))


def missing_templates(cfg: DictDefault, tokenizer: Any) -> list[str]:
    """A line for each dataset of type chat_template for which there is no chat template, in which the run ends."""
    if cfg.skip_prepare_dataset or cfg.tokenizer_use_mistral_common:
        return []  # no dataset is rendered by a template
    lines = []
    for key in ("datasets", "test_datasets", "pretraining_dataset"):
        for dataset in cfg[key] or []:
            if not isinstance(dataset, dict) or "chat_template" not in str(dataset.get("type")).split("."):
                continue
            try:
                get_chat_template_from_config(cfg, dataset, tokenizer)
            except Exception as error:
                lines.append(
                    f"{key}: {dataset.get('path')} is of type {dataset['type']}, which needs a chat template "
                    f"({one_line(error)}); set chat_template: in the config, or give a tokenizer that has one"
                )
    return lines
