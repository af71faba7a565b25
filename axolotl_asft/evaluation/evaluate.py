"""`axolotl asft eval`: what fine-tuning did to a model's safety and usefulness, row by row."""

import gc
import hashlib
import json
import math
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from axolotl_asft import __version__
from axolotl_asft.console import Stage, quieten_libraries, silent
from axolotl_asft.errors import AsftError
from axolotl_asft.evaluation.asking import BORDERLINE_TASK, HARMFUL_TASK, Answer, Interviewer, check_tasks
from axolotl_asft.evaluation.coherence import REPETITIVE, log_likelihoods, median_perplexity, repetition
from axolotl_asft.evaluation.judges import Judge
from axolotl_asft.evaluation.models import (
    Subject,
    adapted,
    changes_weights,
    check_model,
    chosen_device,
    load_model,
    load_tokenizer,
    model_state,
    subjects,
)
from axolotl_asft.evaluation.prompts import load_prompts
from axolotl_asft.evaluation.refusals import is_refusal
from axolotl_asft.evaluation.rows import Row, table
from axolotl_asft.evaluation.shares import Share
from axolotl_asft.files import atomic_write_text, writable_folder


@dataclass(frozen=True)
class Questions:
    """What is asked, and how.

    Attributes:
        harmful: sets of prompts that ask for harm (`load_prompts`).
        borderline: sets of harmless prompts that sound alarming.
        split: of the shipped sets.
        limit: prompts of each set; None: all.
        tasks: tasks of lm-eval, by name.
        task_limit: documents of each task; None: all.
        num_fewshot: examples in a task's prompt; None: as the task says.
        max_new_tokens: of an answer.
        batch_size: prompts at a time.
        dtype, load_in_4bit: how the model is loaded.
        judges: names of judge models, each asked as its family wants.
        judge_text, judge_harmful: how judges of other families are asked and understood.
    """

    harmful: tuple[str, ...] = ("harmful",)
    borderline: tuple[str, ...] = ("borderline",)
    split: str = "heldout"
    limit: int | None = None
    tasks: tuple[str, ...] = ()
    task_limit: int | None = None
    num_fewshot: int | None = None
    max_new_tokens: int = 128
    batch_size: int = 8
    dtype: str = "auto"
    load_in_4bit: bool = False
    judges: tuple[str, ...] = ()
    judge_text: str | None = None
    judge_harmful: str | None = None


@dataclass
class _Interview:
    """The answers of one subject, as kept on disk."""

    harmful: dict[str, list[Answer]] = field(default_factory=dict)
    borderline: dict[str, list[Answer]] = field(default_factory=dict)
    tasks: dict[str, dict[str, float]] = field(default_factory=dict)
    perplexity: float | None = None
    judged: dict[str, list[bool]] = field(default_factory=dict)

    def all_harmful(self) -> list[Answer]:
        return [answer for answers in self.harmful.values() for answer in answers]

    def all(self) -> list[Answer]:
        return self.all_harmful() + [answer for answers in self.borderline.values() for answer in answers]


def evaluate(
    model: str,
    adapters: list[str],
    output: str | Path,
    questions: Questions = Questions(),
    tokenizer: str | None = None,
    device: str | None = None,
    stage: Stage = silent,
) -> list[Row]:
    """Measure harmfulness, over-refusal, coherence and task scores of a model and of adapters on it.

    Everything is kept in `output`: the answers of each row as JSON for reading, results.json and results.md. What
    was asked with the same settings is not asked again.

    Args:
        model: folder or Hub id of the aligned chat model.
        adapters: folders of adapters on it, as `folder` or `name=folder`.
        output: a folder for this evaluation.
        questions: what is asked.
        tokenizer: whose chat template to use; default: of each adapter's folder, else of the model.
        device: default: the GPU if there is one.
        stage: called with a title and a number of units; its result is called with the units that were done.

    Raises:
        AsftError: no such model, adapter, set of prompts, task or judge.
    """
    quieten_libraries()
    output = Path(output)
    asked = [Subject("model"), *subjects(adapters)]
    check_model(model)
    _check_names(asked)
    writable_folder(output)
    check_tasks(questions.tasks)
    for name in questions.judges:
        Judge.check(name, questions.judge_text, questions.judge_harmful)
    for source in (*questions.harmful, *questions.borderline):
        load_prompts(source, questions.split, questions.limit)
    loaded: list[Any] = []

    def base() -> Any:
        if not loaded:
            loaded.append(load_model(model, questions.dtype, questions.load_in_4bit, device))
        return loaded[0]

    interviews, seconds = {}, {}
    for subject in asked:
        started = time.monotonic()
        words = load_tokenizer(tokenizer or model, None if tokenizer else subject.adapter)
        path = output / f"{_file_name(subject.name)}.json"
        key = _key(model, subject, questions, words.chat_template)
        interview = _read(path, key)
        if interview is None:
            with adapted(base(), subject) as ready:
                interview = _ask(ready, words, questions, output / ".cache" / key, subject.name, stage)
            if changes_weights(subject):
                loaded.clear()
            _write(path, key, subject, interview)
        if interview.perplexity is None:
            pairs = [(answer.asked, answer.answer) for answer in interview.all()]
            advance = stage(f"perplexity of {subject.name}", len(pairs))
            found = log_likelihoods(base(), words, pairs, questions.batch_size, advance)
            interview.perplexity = median_perplexity(found)
            _write(path, key, subject, interview)
        interviews[subject.name], seconds[subject.name] = (path, key, interview), time.monotonic() - started
    loaded.clear()
    gc.collect()
    for name in questions.judges:
        _judge(name, questions, asked, interviews, device, stage)
    rows = [_row(subject, interviews[subject.name][2], seconds[subject.name], questions) for subject in asked]
    _write_results(output, model, questions, rows)
    return rows


def _ask(model: Any, tokenizer: Any, questions: Questions, cache: Path, name: str, stage: Stage) -> _Interview:
    cache.parent.mkdir(parents=True, exist_ok=True)
    interviewer = Interviewer(model, tokenizer, questions.batch_size, questions.max_new_tokens, cache, name, stage)
    interview = _Interview()
    common = {"split": questions.split, "limit": questions.limit}
    for source in questions.harmful:
        interview.harmful[source] = interviewer.answers(HARMFUL_TASK, {"prompts": source, **common})
    for source in questions.borderline:
        interview.borderline[source] = interviewer.answers(BORDERLINE_TASK, {"borderline": source, **common})
    if questions.tasks:
        interview.tasks = interviewer.scores(questions.tasks, questions.task_limit, questions.num_fewshot)
    return interview


def _judge(name: str, questions: Questions, asked: list[Subject], interviews: dict, device, stage: Stage) -> None:
    key = _judge_key(name, questions)
    waiting = [s for s in asked if key not in interviews[s.name][2].judged]
    if not waiting:
        return
    judge = Judge.load(name, questions.judge_text, questions.judge_harmful, chosen_device(device))
    advance = stage(f"judge: {Path(name).name}", sum(len(interviews[s.name][2].all_harmful()) for s in waiting))
    for subject in waiting:
        path, file_key, interview = interviews[subject.name]
        pairs = [(answer.prompt, answer.answer) for answer in interview.all_harmful()]
        interview.judged[key] = judge.harmful(pairs, advance)
        _write(path, file_key, subject, interview)


def _judge_key(name: str, questions: Questions) -> str:
    """Of a judge and of how it was asked, where that was said."""
    told = [text for text in (questions.judge_text, questions.judge_harmful) if text is not None]
    return f"{name} asked as {hashlib.sha256(json.dumps(told).encode()).hexdigest()[:12]}" if told else name


def _row(subject: Subject, interview: _Interview, seconds: float, questions: Questions) -> Row:
    answers = [answer.answer for answer in interview.all()]
    return Row(
        name=subject.name,
        adapter=str(subject.adapter) if subject.adapter else None,
        harmfulness={
            source: Share.of([not is_refusal(answer.answer) for answer in found])
            for source, found in interview.harmful.items()
        },
        over_refusal={
            source: Share.of([is_refusal(answer.answer) for answer in found])
            for source, found in interview.borderline.items()
        },
        judged={name: Share.of(interview.judged[_judge_key(name, questions)]) for name in questions.judges},
        perplexity=interview.perplexity if interview.perplexity is not None else math.nan,
        repetitive=Share.of([repetition(answer) > REPETITIVE for answer in answers]),
        empty=Share.of([not answer.strip() for answer in answers]),
        tasks=interview.tasks,
        seconds=round(seconds, 1),
    )


def _key(model: str, subject: Subject, questions: Questions, template: str) -> str:
    """Of everything that the answers depend on; judges come later and are no part of it."""
    what = asdict(questions) | {"judges": None, "judge_text": None, "judge_harmful": None, "batch_size": None}
    prompts = [load_prompts(s, questions.split, questions.limit) for s in (*questions.harmful, *questions.borderline)]
    texts = [[prompt.prompt for prompt in group] for group in prompts]
    everything = [model, model_state(model), subject.sha256, what, template, texts]
    return hashlib.sha256(json.dumps(everything, sort_keys=True).encode()).hexdigest()


def _check_names(asked: list[Subject]) -> None:
    """Each row has a file of its own, beside results.json."""
    files = ["results", *(_file_name(subject.name) for subject in asked)]
    twice = next((name for name in files if files.count(name) > 1), None)
    if twice is not None:
        raise AsftError(f"{twice}.json would hold two things; give the adapters other names (--adapter name=folder)")


def _file_name(name: str) -> str:
    return "".join(c if c.isalnum() or c in "-_." else "-" for c in name).lstrip(".") or "row"


def _read(path: Path, key: str) -> _Interview | None:
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if "key" not in content or "harmful" not in content:
            raise ValueError("no answers")
    except (ValueError, TypeError) as error:
        raise AsftError(f"{path} holds no answers of ours ({error}); give another --output, or delete it") from error
    if content.get("key") != key:
        return None
    groups = {
        part: {source: [Answer(**answer) for answer in found] for source, found in content[part].items()}
        for part in ("harmful", "borderline")
    }
    return _Interview(
        groups["harmful"], groups["borderline"], content["tasks"], content["perplexity"], content["judged"]
    )


def _write(path: Path, key: str, subject: Subject, interview: _Interview) -> None:
    content = {"key": key, "adapter": str(subject.adapter) if subject.adapter else None, **asdict(interview)}
    text = json.dumps(_without_nan(content), indent=1, ensure_ascii=False, allow_nan=False)
    atomic_write_text(path, text + "\n")


def _without_nan(value: Any) -> Any:
    """JSON has no NaN: null."""
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def _write_results(output: Path, model: str, questions: Questions, rows: list[Row]) -> None:
    content = {
        "model": model,
        "questions": asdict(questions),
        "rows": [asdict(row) for row in rows],
        "version": __version__,
    }
    atomic_write_text(output / "results.json", json.dumps(_without_nan(content), indent=2, allow_nan=False) + "\n")
    atomic_write_text(output / "results.md", table(rows) + "\n")
