"""What was asked, as kept on disk: one model under one adapter is asked a set of prompts, or a task, only once."""

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from axolotl_asft import __version__
from axolotl_asft.errors import AsftError
from axolotl_asft.evaluation.asking import Answer
from axolotl_asft.evaluation.judges import Way
from axolotl_asft.evaluation.models import Subject, model_state
from axolotl_asft.files import atomic_write_text, read_json, without_nan
from axolotl_asft.history import installed_versions
from axolotl_asft.saved import adapter_config

# Of adapter_config.json: our stamps, and what does not change what the model computes.
NOT_COMPUTED = {"asft", "asft_projection", "base_model_name_or_path", "revision", "inference_mode", "peft_version"}


@dataclass
class Asked:
    """The answers to one set of prompts, and what was made of them.

    Attributes:
        answers: in the order of the prompts.
        likelihoods: log p of each answer and its tokens, under the model without any adapter; None: not known yet.
        judged: judge and how it was asked (`judge_key`) -> its verdicts.
    """

    answers: list[Answer]
    likelihoods: list[tuple[float, int]] | None = None
    judged: dict[str, list[bool]] = field(default_factory=dict)


@dataclass
class Interview:
    """All that one row was asked, in a file of its own.

    Attributes:
        path: of the file.
        key: of what the answers depend on beside the prompts (`answer_key`).
        adapter: for the reader of the file.
        sets: "harmful" or "borderline" -> set of prompts -> what was asked.
        tasks: task and how it was asked -> task of lm-eval -> metric -> value.
    """

    path: Path
    key: str
    adapter: Path | None = None
    sets: dict[str, dict[str, Asked]] = field(default_factory=lambda: {"harmful": {}, "borderline": {}})
    tasks: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)

    @classmethod
    def open(cls, path: Path, key: str, adapter: Path | None) -> "Interview":
        """As it was kept; empty where nothing was, or under another key.

        Raises:
            AsftError: the file is somebody else's.
        """
        content = _read(path)
        if content.get("key") != key:
            return cls(path, key, adapter)
        try:
            sets = {p: {s: _asked(**kept) for s, kept in content[p].items()} for p in ("harmful", "borderline")}
            tasks = {how: {task: _scores(found) for task, found in t.items()} for how, t in content["tasks"].items()}
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise AsftError(f"{path} is damaged ({type(error).__name__}: {error}); delete it") from error
        return cls(path, key, adapter, sets, tasks)

    def answers(self, part: str, source: str, prompts: Sequence[str]) -> bool:
        """Whether it holds the answers to these prompts of a set."""
        asked = self.sets[part].get(source)
        return asked is not None and [answer.prompt for answer in asked.answers] == list(prompts)

    def save(self) -> None:
        sets = {part: {source: asdict(asked) for source, asked in found.items()} for part, found in self.sets.items()}
        adapter = str(self.adapter) if self.adapter else None
        content = without_nan({"key": self.key, "adapter": adapter, **sets, "tasks": self.tasks})
        text = json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False)
        atomic_write_text(self.path, text + "\n")


def shared_out(values: Sequence[Any], groups: Sequence[Asked]) -> Iterator[tuple[Asked, list[Any]]]:
    """Each group with its part of the values that were found for the answers of all."""
    rest = iter(values)
    for group in groups:
        yield group, list(islice(rest, len(group.answers)))


def answer_key(model: str, subject: Subject, sha256: str, how: dict[str, Any], tokenizer: str) -> str:
    """Of everything that an answer depends on beside its prompt, the versions of the libraries included.

    Args:
        sha256: of the subject's weights.
        how: the model is loaded and asked.
        tokenizer: its `tokenizer_state`.
    """
    config = {}
    if subject.adapter is not None:
        config = adapter_config(subject.adapter)
    computed = {name: value for name, value in config.items() if name not in NOT_COMPUTED}
    versions = [__version__, installed_versions()]
    return hash_of([versions, model, model_state(model), sha256, computed, how, tokenizer])


def tokenizer_state(tokenizer: Any) -> str:
    """Of what a tokenizer makes of a chat: its template, its special tokens, and how it cuts and numbers words."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    cuts = json.loads(backend.to_str()) if backend is not None else tokenizer.get_vocab()
    if backend is not None:
        cuts |= {"truncation": None, "padding": None}  # of its last call
    specials = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    return hash_of([cuts, specials, tokenizer.chat_template])


def judge_key(name: str, way: Way, load_in_4bit: bool) -> str:
    """Of a judge, of how it is asked, and of the files of a local one, or the commit of one on the Hub."""
    return f"{name} asked as {hash_of([asdict(way), load_in_4bit, model_state(name)])[:12]}"


def hash_of(what: Any) -> str:
    """Of what JSON can say, in hex."""
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    content = read_json(path, "give another --output, or delete it")
    if "key" not in content or "harmful" not in content:
        raise AsftError(f"{path} holds no answers of axolotl asft; give another --output, or delete it")
    return content


def _scores(found: dict[str, Any]) -> dict[str, float]:
    return {metric: math.nan if value is None else value for metric, value in found.items()}


def _asked(answers: list[dict[str, str]], likelihoods: list[Any] | None, judged: dict[str, list[bool]]) -> Asked:
    known = likelihoods and [(math.nan if total is None else total, count) for total, count in likelihoods]
    return Asked([Answer(**answer) for answer in answers], known, judged)
