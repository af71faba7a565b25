"""Asking through lm-evaluation-harness: its batching, its cache, its tasks, and ours."""

import contextlib
import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from axolotl_asft.console import Stage, silent
from axolotl_asft.errors import AsftError, WorkFailed
from axolotl_asft.evaluation.generating import end_tokens, positions, to_the_end
from axolotl_asft.evaluation.lm_tasks import every_task, named, said_of
from axolotl_asft.evaluation.models import within_memory
from axolotl_asft.evaluation.refusals import split_thought
from axolotl_asft.evaluation.task_scores import HIGHER_IS_BETTER, beside, metrics_of
from axolotl_asft.registration import TASKS
from axolotl_asft.tokens import written

HARMFUL_TASK, BORDERLINE_TASK = "asft_harmfulness", "asft_over_refusal"
# Above this share of answers that are thoughts without an end, what was measured would be the model's thinking.
UNFINISHED = 0.05
OTHER_THOUGHTS = ("[THINK]", "<|channel|>analysis", "<seed:think>", "<|START_THINKING|>")

LOG = logging.getLogger("axolotl.asft")


@dataclass(frozen=True)
class Answer:
    """What a model answered to one prompt.

    Attributes:
        prompt: as plain text.
        asked: as the model read it, with the chat template, and with its own thought if it had one.
        answer: greedily generated, with the space before it where the model wrote one; "" where the thought has no end.
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

        interviewer, ends = self, end_tokens(self.model, self.tokenizer)
        if marks := [mark for mark in OTHER_THOUGHTS if mark in str(self.tokenizer.chat_template)]:
            LOG.warning(
                "%s: its chat template knows thoughts that begin with %s; only those of <think> are told from an "
                "answer, so that others would be judged, and kept, as part of it: look at the answers",
                self.name,
                marks[0],
            )

        class Watched(HFLM):
            """lm-eval's model, with our progress bar in place of its own."""

            advance = staticmethod(silent("", 0))
            ours = False  # whether the requests are of our tasks

            def generate_until(self, requests: list, disable_tqdm: bool = False) -> list[str]:
                _check_positions(self, requests)
                self.ours = all(request.task_name in OURS for request in requests)
                self.advance = interviewer.stage(f"{interviewer.name} answers", len(requests))
                return super().generate_until(requests, disable_tqdm=True)

            def tok_decode(self, tokens: Any, skip_special_tokens: bool = True) -> str:
                if self.ours and skip_special_tokens:
                    return written(self.tokenizer, tokens)
                return super().tok_decode(tokens, skip_special_tokens=skip_special_tokens)

            def loglikelihood(self, requests: list, disable_tqdm: bool = False) -> list:
                self.advance = interviewer.stage(f"{interviewer.name} weighs choices", len(requests))
                return super().loglikelihood(requests, disable_tqdm=True)

            def _model_generate(self, context: Any, *args: Any, **options: Any) -> Any:
                # lm-eval's own way to the tokenizer's end is to stop when all of a batch have come to it
                output = super()._model_generate(context, *args, **{"eos_token_id": ends or None} | options)
                self.advance(len(context))
                return to_the_end(output, context.shape[1], ends, self.tokenizer.pad_token_id)

            def _model_call(self, inps: Any, *args: Any, **options: Any) -> Any:
                self.advance(len(inps))
                return super()._model_call(inps, *args, **options)

        self._lm = Watched(
            pretrained=self.model,
            tokenizer=self.tokenizer,
            batch_size=self.batch_size,
            max_length=positions(self.model),
            add_bos_token=False,  # the chat template has said it, as in training
            enable_thinking=False,  # in the templates that know the word; as training renders answers without thoughts
        )

    def answers(self, task: str, metadata: dict[str, Any]) -> list[Answer]:
        """The answers to a set of prompts: one of our tasks, with the set in its metadata.

        Raises:
            AsftError: too many thoughts without an end, a prompt that is too long, or not enough memory.
        """
        from lm_eval.tasks import TaskManager

        manager = TaskManager(include_path=str(TASKS), metadata=metadata, include_defaults=False)
        samples = self._run([task], manager, gen_kwargs={"max_gen_toks": self.max_new_tokens})["samples"][task]
        answers, unfinished = [], 0
        for sample in sorted(samples, key=lambda sample: sample["doc_id"]):
            request, wrote = sample["arguments"][0][0], sample["resps"][0][0]
            if request[-1:].isspace():
                wrote = wrote.removeprefix(" ")  # the decoder's
            asked, said = split_thought(request, wrote)
            unfinished += said is None
            answers.append(Answer(sample["doc"]["prompt"], asked, said or "", sample["doc"].get("category", "")))
        if unfinished > UNFINISHED * len(answers):
            raise AsftError(
                f"{self.name} was still thinking after {self.max_new_tokens} tokens in {unfinished} of {len(answers)} "
                "answers, which therefore cannot be judged; allow more tokens (--max-new-tokens of eval), or give a "
                "tokenizer whose chat template turns thinking off"
            )
        return answers

    def scores(self, tasks: Sequence[str], limit: int | None, num_fewshot: int | None) -> dict[str, dict[str, float]]:
        """Any of lm-eval's tasks by name: task -> metric -> value.

        Beside it stand `metric_stderr` and `metric_higher_is_better` where they are known.

        Args:
            tasks: names, or YAML files.
            limit: documents of each task.
            num_fewshot: examples in the prompt.

        Raises:
            WorkFailed: a task failed.
        """
        try:
            results = self._run(tasks, every_task(), limit=limit, num_fewshot=num_fewshot)
        except AsftError:
            raise
        except Exception as error:  # anybody's tasks, which may do anything
            said = said_of(tasks, error)
            raise WorkFailed(f"lm-eval failed at {said}; see the task's YAML, or leave it out") from error
        better = results["higher_is_better"]
        return {task: _metrics(found, better.get(task, {})) for task, found in results["results"].items()}

    def _run(self, tasks: Sequence[str], manager: Any, **options: Any) -> Any:
        import lm_eval

        with _to_the_point(), within_memory(self.batch_size):
            return lm_eval.simple_evaluate(
                model=self._lm,
                tasks=[named(task, manager) for task in tasks],
                task_manager=manager,
                apply_chat_template=True,
                bootstrap_iters=1000,
                use_cache=str(self.cache) if self.cache is not None else None,
                verbosity=None,
                **options,
            )


def _check_positions(lm: Any, requests: Sequence[Any]) -> None:
    """lm-eval would cut off the beginning of a prompt of ours that is too long, or give up; torch of unknown tokens."""
    ours = [request.args for request in requests if request.task_name in OURS]
    read = [(lm.tok_encode(asked), options["max_gen_toks"]) for asked, options in ours]
    rows = lm.model.get_input_embeddings().weight.shape[0]
    highest = max((max(tokens, default=0) for tokens, _ in read), default=0)
    if highest >= rows:
        raise AsftError(
            f"the tokenizer gives token {highest} for a prompt, but the model has {rows} embeddings; give the "
            "tokenizer that the model was trained with (--tokenizer), and an adapter with the embeddings of the tokens "
            "that it added"
        )
    longest, new = max(((len(tokens), new) for tokens, new in read), key=sum, default=(0, 0))
    if longest + new > lm.max_length:
        raise AsftError(
            f"the longest prompt has {longest} tokens, which with {new} new ones exceed the model's "
            f"{lm.max_length} positions; lower --max-new-tokens, or give a set without that prompt"
        )


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


def _metrics(found: dict[str, Any], better: dict[str, Any]) -> dict[str, float]:
    """`acc,none` -> `acc`; of a score that is no finite number NaN, so that it is missed; such an error is left out."""
    metrics = {}
    for key, value in found.items():
        name, _, filtered = key.partition(",")
        finite = isinstance(value, int | float) and math.isfinite(value)
        missed = isinstance(value, float) and metrics_of([name])
        if filtered and (finite or missed):
            by = "" if filtered == "none" else f" ({filtered})"
            metrics[name + by] = float(value) if finite else math.nan
            if isinstance(better.get(name), bool):
                metrics[beside(name + by, HIGHER_IS_BETTER)] = better[name]
    return metrics
