"""Asking through lm-evaluation-harness: its batching, its cache, its tasks, and ours."""

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from axolotl_asft.console import Stage, silent
from axolotl_asft.errors import AsftError
from axolotl_asft.registration import TASKS

HARMFUL_TASK, BORDERLINE_TASK = "asft_harmfulness", "asft_over_refusal"


@dataclass(frozen=True)
class Answer:
    """What a model answered to one prompt.

    Attributes:
        prompt: as plain text.
        asked: as the model read it, with the chat template.
        answer: greedily generated.
        category: of the prompt.
    """

    prompt: str
    asked: str
    answer: str
    category: str = ""


@dataclass
class Interviewer:
    """Asks one loaded model through lm-eval.

    Attributes:
        model: a causal language model, with or without an adapter.
        tokenizer: with the chat template that it was trained with.
        batch_size: prompts at a time.
        max_new_tokens: of an answer.
        cache: lm-eval's cache of answers, for this model alone: an interrupted interview goes on; None: no cache.
        name: of the model, for the progress bars.
        stage: shows them.
    """

    model: Any
    tokenizer: Any
    batch_size: int = 8
    max_new_tokens: int = 128
    cache: Path | None = None
    name: str = "the model"
    stage: Stage = silent
    _lm: Any = field(init=False, repr=False)

    def __post_init__(self) -> None:
        from lm_eval.models.huggingface import HFLM

        interviewer = self

        class Watched(HFLM):
            """lm-eval's model, with our progress bar in place of its own."""

            advance = staticmethod(silent("", 0))

            def generate_until(self, requests: list, disable_tqdm: bool = False) -> list[str]:
                self.advance = interviewer.stage(f"{interviewer.name} answers", len(requests))
                return super().generate_until(requests, disable_tqdm=True)

            def loglikelihood(self, requests: list, disable_tqdm: bool = False) -> list:
                self.advance = interviewer.stage(f"{interviewer.name} weighs choices", len(requests))
                return super().loglikelihood(requests, disable_tqdm=True)

            def _model_generate(self, context: Any, *args: Any, **options: Any) -> Any:
                output = super()._model_generate(context, *args, **options)
                self.advance(len(context))
                return output

            def _model_call(self, inps: Any, *args: Any, **options: Any) -> Any:
                self.advance(len(inps))
                return super()._model_call(inps, *args, **options)

        self._lm = Watched(pretrained=self.model, tokenizer=self.tokenizer, batch_size=self.batch_size)

    def answers(self, task: str, metadata: dict[str, Any]) -> list[Answer]:
        """The answers to a set of prompts: one of our tasks, with the set in its metadata."""
        samples = self._run([task], metadata, {"max_gen_toks": self.max_new_tokens})["samples"][task]
        samples = sorted(samples, key=lambda sample: sample["doc_id"])
        return [
            Answer(
                sample["doc"]["prompt"],
                sample["arguments"][0][0],
                sample["resps"][0][0],
                sample["doc"].get("category", ""),
            )
            for sample in samples
        ]

    def scores(self, tasks: Sequence[str], limit: int | None, num_fewshot: int | None) -> dict[str, dict[str, float]]:
        """Any of lm-eval's tasks by name: task -> metric -> value, with `metric_stderr` beside it where it is known."""
        results = self._run(list(tasks), {}, None, limit=limit, num_fewshot=num_fewshot)["results"]
        return {task: _metrics(results[task]) for task in results}

    def _run(self, tasks: list[str], metadata: dict[str, Any], gen_kwargs: dict | None, **options: Any) -> Any:
        import lm_eval
        from lm_eval.tasks import TaskManager

        manager = TaskManager(include_path=str(TASKS), metadata=metadata, include_defaults=not set(tasks) <= OURS)
        with _to_the_point():
            return lm_eval.simple_evaluate(
                model=self._lm,
                tasks=tasks,
                task_manager=manager,
                apply_chat_template=True,
                gen_kwargs=gen_kwargs,
                bootstrap_iters=1000,
                use_cache=str(self.cache) if self.cache is not None else None,
                verbosity=None,
                **options,
            )


def check_tasks(tasks: Sequence[str]) -> None:
    """Refuse what lm-eval does not know, before anything long is begun.

    Raises:
        AsftError: no task, group or tag of that name, and no file.
    """
    if not tasks:
        return
    from lm_eval.tasks import TaskManager

    known = TaskManager(include_path=str(TASKS)).all_tasks
    unknown = [task for task in tasks if task not in known and not Path(task).is_file()]
    if unknown:
        raise AsftError(f"lm-eval knows no task {unknown[0]!r}; `lm_eval ls tasks` lists them")


@contextlib.contextmanager
def _to_the_point() -> Iterator[None]:
    """lm-eval without its notes on the machine (3 seconds a call) and the folder's git, and without its small bars."""
    import lm_eval.api.model
    import lm_eval.api.task
    import lm_eval.evaluator

    def hushed(items: Any, *args: Any, **options: Any) -> Any:
        return items

    replaced = [
        (lm_eval.evaluator, "add_env_info", lambda *_: None),
        (lm_eval.evaluator, "get_git_commit_hash", lambda: None),
        (lm_eval.api.task, "tqdm", hushed),
        (lm_eval.api.model, "tqdm", hushed),
    ]
    originals = [getattr(module, name) for module, name, _ in replaced]
    for module, name, replacement in replaced:
        setattr(module, name, replacement)
    try:
        yield
    finally:
        for (module, name, _), original in zip(replaced, originals, strict=True):
            setattr(module, name, original)


OURS = {HARMFUL_TASK, BORDERLINE_TASK}


def _metrics(found: dict[str, Any]) -> dict[str, float]:
    """`acc,none` -> `acc`; what is no number is left out."""
    metrics = {}
    for key, value in found.items():
        name, _, filtered = key.partition(",")
        if isinstance(value, int | float) and filtered and not math.isnan(value):
            metrics[name if filtered == "none" else f"{name} ({filtered})"] = float(value)
    return metrics
