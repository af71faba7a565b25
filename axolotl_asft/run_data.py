"""What the datasets of an axolotl config ask in: chat templates, and prompts of their own."""

import contextlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from axolotl.prompt_strategies import load
from axolotl.utils.chat_templates import get_chat_template_from_config
from axolotl.utils.data.wrappers import DATASET_HANDLERS
from axolotl.utils.dict import DictDefault
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
        text: what it puts around a request without further input, with {prompt} in its place; None: it cannot be told.
    """

    path: str
    kind: str
    text: str | None


def dataset_templates(cfg: DictDefault, tokenizer: Any) -> list[str]:
    """The chat templates that single datasets name for themselves, in place of the run's."""
    found = []
    for dataset in [*(cfg.datasets or []), *(cfg.pretraining_dataset or [])]:
        if isinstance(dataset, dict) and dataset.get("chat_template") and tokenizer is not None:
            with contextlib.suppress(Exception):  # one that cannot be had is axolotl's to refuse
                found.append(get_chat_template_from_config(cfg, dataset, tokenizer))
    return found


def data_formats(cfg: DictDefault, tokenizer: Any) -> list[DataFormat]:
    """Each dataset that asks in a format of its own, such as alpaca's."""
    if cfg.skip_prepare_dataset or cfg.rl:
        return []
    found = []
    for dataset in cfg.datasets or []:
        kind = dataset.get("type") if isinstance(dataset, dict) else None
        if kind and not (isinstance(kind, str) and _may_be_rendered(kind)):
            named = kind if isinstance(kind, str) else "of its own"
            found.append(DataFormat(str(dataset.get("path")), named, _text_around(cfg, dataset, tokenizer)))
    return found


def formats_of_content(content: Mapping[str, Any]) -> list[DataFormat]:
    """The same of the keys of a YAML, as they stand there."""
    return data_formats(DictDefault(content), None)


def run_formats(
    cfg: DictDefault, tokenizer: Any, given: Sequence[str] | None, spec: Mapping[str, Any]
) -> tuple[list[DataFormat], list[str]]:
    """The data's own formats, and the texts in which an anchor is to ask: those given, or else those that it can.

    Args:
        given: `prompt_formats` of the block.
        spec: of the direction file, whose requests are asked.
    """
    formats = data_formats(cfg, tokenizer)
    if given is not None:
        return formats, list(given)
    texts = list(dict.fromkeys(one.text for one in formats if one.text is not None))
    requests = [request for request, _ in own_answers_in(spec)]
    return formats, texts if texts and plain_requests(tokenizer, requests) is not None else []


def unheld_data(formats: Sequence[DataFormat], held: Sequence[str]) -> list[str]:
    """A line for each format under which nothing of the model is held, naming the first of its datasets.

    Args:
        held: the formats that the anchor asks in.
    """
    return [
        f"datasets: {one.path} is of type {one.kind}, whose prompts are not the chat template's, and under which "
        "nothing is held: the direction file's requests are asked in the chat template; make chats of the data (type: "
        "chat_template), or give their format as asft.prompt_formats, with an anchor_weight"
        for one in {one.text or one.kind: one for one in reversed(formats)}.values()
        if one.text not in held
    ]


def _text_around(cfg: DictDefault, dataset: Mapping[str, Any], tokenizer: Any) -> str | None:
    """What axolotl's own strategy for a type of data puts around a request."""
    kind, system = dataset["type"], ""
    try:
        if isinstance(kind, str):
            strategy = load(kind, tokenizer, cfg, dataset) or _built_in(cfg, kind, tokenizer)
        else:
            strategy, system = load("user_defined", tokenizer, cfg, dict(kind)), kind.get("system_prompt") or ""
        prompter = strategy.prompter
        if hasattr(prompter, "build_prompt_w_system"):
            prompts = prompter.build_prompt_w_system(system, PLACE, "")
        else:
            prompts = prompter.build_prompt(PLACE, "")
        return checked_formats([next(iter(prompts))])[0]
    except Exception:  # a strategy of any kind, which may want other than a request
        return None


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
