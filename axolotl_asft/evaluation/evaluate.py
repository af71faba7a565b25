"""`axolotl asft eval`: what fine-tuning did to a model's safety and usefulness, row by row."""

import gc
import logging
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from axolotl_asft.console import Stage, quieten_libraries, silent
from axolotl_asft.errors import AsftError
from axolotl_asft.evaluation.asking import BORDERLINE_TASK, HARMFUL_TASK, Interviewer
from axolotl_asft.evaluation.coherence import REPETITIVE, log_likelihoods, median_perplexity, repetition
from axolotl_asft.evaluation.judges import Judge
from axolotl_asft.evaluation.kept import Asked, Interview, answer_key, judge_key, shared_out, tokenizer_state
from axolotl_asft.evaluation.lm_tasks import check_tasks, task_state
from axolotl_asft.evaluation.models import (
    Subject,
    adapted,
    changes_weights,
    check_fits,
    check_model,
    chosen_device,
    load_model,
    load_tokenizer,
    other_base,
    subjects,
)
from axolotl_asft.evaluation.prompts import load_prompts
from axolotl_asft.evaluation.refusals import is_refusal
from axolotl_asft.evaluation.rows import Row, write_results
from axolotl_asft.evaluation.shares import Share
from axolotl_asft.files import LOCK, locked, writable_folder

LOG = logging.getLogger("axolotl.asft")


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
        prompt_format: text with {prompt} in it that prompts are asked in, in place of a chat template; system_prompt or
            second_turn: in the chat template after that (`axolotl_asft.general_formats.UNSEEN`).
        batch_size: prompts at a time, also of a judge.
        dtype, load_in_4bit: how the model is loaded.
        judges: names of judge models, each asked as its family wants.
        judge_text, judge_harmful: how judges of other families are asked and understood.
        judge_load_in_4bit: how judges are loaded.
    """

    harmful: tuple[str, ...] = ("harmful",)
    borderline: tuple[str, ...] = ("borderline",)
    split: str = "heldout"
    limit: int | None = None
    tasks: tuple[str, ...] = ()
    task_limit: int | None = None
    num_fewshot: int | None = None
    max_new_tokens: int = 128
    prompt_format: str | None = None
    batch_size: int = 8
    dtype: str = "auto"
    load_in_4bit: bool = False
    judges: tuple[str, ...] = ()
    judge_text: str | None = None
    judge_harmful: str | None = None
    judge_load_in_4bit: bool = False

    def sets(self) -> list[tuple[str, str]]:
        """("harmful" or "borderline", set) of every set of prompts."""
        return [("harmful", source) for source in self.harmful] + [("borderline", s) for s in self.borderline]

    def how(self) -> dict[str, Any]:
        """What an answer depends on beside prompt, model and tokenizer."""
        return {"max_new_tokens": self.max_new_tokens, "dtype": self.dtype, "load_in_4bit": self.load_in_4bit}


@dataclass
class _Run:
    """One evaluation: the chat model when it is needed, and what is asked of it.

    Attributes:
        load: gives the model; nobody but this may keep it.
        questions: what is asked.
        prompts: (harmful or borderline, set) -> its prompts.
        judges: judge -> what its verdicts are kept under.
        tasks: task -> what its scores are kept under.
        stage: shows what goes on.
    """

    load: Callable[[], Any]
    questions: Questions
    prompts: dict[tuple[str, str], list[str]]
    judges: dict[str, str]
    tasks: dict[str, str]
    stage: Stage
    _model: Any = None

    def base(self) -> Any:
        if self._model is None:
            self._model = self.load()
        return self._model

    def let_go(self) -> None:
        self._model = None
        _free_memory()

    def interview(self, subject: Subject, sha256: str, tokenizer: Any, interview: Interview) -> None:
        """Ask one row what it was not asked before."""
        sets = [place for place, texts in self.prompts.items() if not interview.answers(*place, texts)]
        tasks = [task for task in self.questions.tasks if self.tasks[task] not in interview.tasks]
        if sets or tasks:
            self._ask(self.base(), subject, sha256, tokenizer, interview, sets, tasks)
            if changes_weights(subject):
                self.let_go()
        waiting = [a for part, source in self.prompts if (a := interview.sets[part][source]).likelihoods is None]
        if waiting:
            pairs = [(answer.asked, answer.answer) for asked in waiting for answer in asked.answers]
            advance = self.stage(f"perplexity of {subject.name}", len(pairs))
            found = log_likelihoods(self.base(), tokenizer, pairs, self.questions.batch_size, advance)
            for asked, its in shared_out(found, waiting):
                asked.likelihoods = its
            interview.save()

    def _ask(
        self, model: Any, subject: Subject, sha256: str, tokenizer: Any, interview: Interview, sets: list, tasks: list
    ) -> None:
        told = self.questions
        cache = interview.path.parent / ".cache" / interview.key
        cache.parent.mkdir(parents=True, exist_ok=True)
        with adapted(model, subject) as ready:
            if subject.sha256 != sha256:
                raise AsftError(
                    f"{subject.adapter} was written anew while it was read; wait for its training, and run again"
                )
            asker = Interviewer(ready, tokenizer, told.batch_size, told.max_new_tokens, cache, subject.name, self.stage)
            for part, source in sets:
                task, word = (HARMFUL_TASK, "prompts") if part == "harmful" else (BORDERLINE_TASK, "borderline")
                found = asker.answers(task, {word: source, "split": told.split, "limit": told.limit})
                interview.sets[part][source] = Asked(found)
                interview.save()
            for task in tasks:
                scores = asker.scores([task], told.task_limit, told.num_fewshot)
                interview.tasks[self.tasks[task]] = scores
                interview.save()

    def judge(self, name: str, interviews: dict[str, Interview], device: str | None) -> None:
        """Let a judge see the answers to harmful prompts that it did not see before."""
        told, key = self.questions, self.judges[name]
        waiting = {
            row: [asked for source in told.harmful if key not in (asked := interview.sets["harmful"][source]).judged]
            for row, interview in interviews.items()
        }
        count = sum(len(asked.answers) for groups in waiting.values() for asked in groups)
        if not count:
            return
        on, small = chosen_device(device), told.judge_load_in_4bit
        judge = Judge.load(name, told.judge_text, told.judge_harmful, on, told.batch_size, small)
        advance = self.stage(f"judge: {Path(name).name}", count)
        for row, groups in waiting.items():
            pairs = [(answer.prompt, answer.answer.strip()) for asked in groups for answer in asked.answers]
            for asked, verdicts in shared_out(judge.harmful(pairs, advance), groups):
                asked.judged[key] = verdicts
            interviews[row].save()

    def row(self, subject: Subject, sha256: str, interview: Interview, seconds: float) -> Row:
        harmful, borderline = (
            {source: interview.sets[part][source] for part, source in self.prompts if part == group}
            for group in ("harmful", "borderline")
        )
        everything = [*harmful.values(), *borderline.values()]
        answers = [answer.answer for asked in everything for answer in asked.answers]
        likelihoods = [found for asked in everything for found in asked.likelihoods or []]
        answered = [found for found, text in zip(likelihoods, answers, strict=True) if not is_refusal(text)]
        return Row(
            name=subject.name,
            adapter=str(subject.adapter) if subject.adapter else None,
            adapter_sha256=sha256 or None,
            harmfulness={
                source: Share.of([not is_refusal(answer.answer) for answer in asked.answers])
                for source, asked in harmful.items()
            },
            over_refusal={
                source: Share.of([is_refusal(answer.answer) for answer in asked.answers])
                for source, asked in borderline.items()
            },
            judged={
                name: Share.of([verdict for asked in harmful.values() for verdict in asked.judged[key]])
                for name, key in self.judges.items()
            },
            perplexity=median_perplexity(likelihoods),
            perplexity_answered=median_perplexity(answered),
            repetitive=Share.of([repetition(answer) > REPETITIVE for answer in answers]),
            empty=Share.of([not answer.strip() for answer in answers]),
            tasks={
                task: scores
                for asked in self.questions.tasks
                for task, scores in interview.tasks[self.tasks[asked]].items()
            },
            seconds=round(seconds, 1),
        )


def _free_memory() -> None:
    """What nobody holds any more, cycles too, makes room for the next model: lm-eval's models hold themselves."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


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

    Everything is kept in `output`: the answers of each row as JSON for reading, results.json and results.md. A set of
    prompts, a task and a judge that were asked with the same settings are not asked again, whatever else is asked.

    Args:
        model: folder or Hub id (owner/name[@revision]) of the aligned chat model.
        adapters: folders of adapters on it, as `folder` or `name=folder`.
        output: a folder for this evaluation.
        questions: what is asked.
        tokenizer: whose chat template to use; default: of each adapter's folder, else of the model.
        device: default: the GPU if there is one.
        stage: called with a title and a number of units; its result is called with the units that were done.

    Raises:
        AsftError: no such model, adapter, set of prompts, task or judge; another evaluation at work in `output`.
    """
    quieten_libraries()
    output = Path(output)
    asked = [Subject("model"), *subjects(adapters)]
    check_model(model)
    _check_names(asked)
    writable_folder(output)
    with locked(output / LOCK, f"another evaluation is running in {output}; wait for it, or give another --output"):
        return _evaluate(model, asked, output, questions, tokenizer, device, stage)


def _evaluate(
    model: str,
    asked: list[Subject],
    output: Path,
    questions: Questions,
    tokenizer: str | None,
    device: str | None,
    stage: Stage,
) -> list[Row]:
    check_tasks(questions.tasks)

    def load() -> Any:
        loaded = load_model(model, questions.dtype, questions.load_in_4bit, device)
        for subject in asked:  # before anything is asked
            check_fits(loaded, subject)
        return loaded

    run = _Run(
        load,
        questions,
        {place: _texts(place[1], questions) for place in questions.sets()},
        {name: _judge_key(name, questions) for name in questions.judges},
        {task: _task_key(task, questions) for task in questions.tasks},
        stage,
    )
    for warning in filter(None, (other_base(model, subject) for subject in asked)):
        LOG.warning(warning)
    interviews, seconds, hashes = {}, {}, {}
    for subject in asked:
        started = time.monotonic()
        words = load_tokenizer(tokenizer or model, None if tokenizer else subject.adapter, questions.prompt_format)
        hashes[subject.name] = subject.sha256  # looked at again when it is loaded: a training may replace it
        key = answer_key(model, subject, hashes[subject.name], questions.how(), tokenizer_state(words))
        interview = Interview.open(output / f"{_file_name(subject.name)}.json", key, subject.adapter)
        run.interview(subject, hashes[subject.name], words, interview)
        interviews[subject.name], seconds[subject.name] = interview, time.monotonic() - started
    run.let_go()
    for name in questions.judges:
        run.judge(name, interviews, device)
        _free_memory()
    rows = [
        run.row(subject, hashes[subject.name], interviews[subject.name], seconds[subject.name]) for subject in asked
    ]
    write_results(output, model, asdict(questions), rows)
    return rows


def _texts(source: str, questions: Questions) -> list[str]:
    return [prompt.prompt for prompt in load_prompts(source, questions.split, questions.limit)]


def _judge_key(name: str, questions: Questions) -> str:
    way, _, _ = Judge.check(name, questions.judge_text, questions.judge_harmful)
    return judge_key(name, way, questions.judge_load_in_4bit)


def _task_key(task: str, questions: Questions) -> str:
    return f"{task}, limit {questions.task_limit}, examples {questions.num_fewshot}, of {task_state(task)}"


def _check_names(asked: list[Subject]) -> None:
    """Each row has a file of its own, beside results.json."""
    files = ["results", *(_file_name(subject.name) for subject in asked)]
    twice = next((name for name in files if files.count(name) > 1), None)
    if twice is not None:
        raise AsftError(f"{twice}.json would be written twice; give the adapters other names (--adapter name=folder)")


def _file_name(name: str) -> str:
    return "".join(c if c.isalnum() or c in "-_." else "-" for c in name).lstrip(".") or "row"
