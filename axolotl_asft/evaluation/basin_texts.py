"""What the landscape's losses are measured of: refusals, and answers that are useful."""

from typing import Any

from axolotl_asft.errors import AsftError
from axolotl_asft.evaluation.asking import BORDERLINE_TASK, HARMFUL_TASK, Interviewer
from axolotl_asft.evaluation.refusals import is_refusal

Pairs = list[tuple[str, str]]  # (what the model has read, its answer)


def basin_texts(model: str, interviewer: Interviewer, ask: dict[str, Any], task: Pairs | None) -> dict[str, Pairs]:
    """Of what the loss is measured: the aligned model's refusals, and the task's answers or the model's own."""
    answers = interviewer.answers(HARMFUL_TASK, {"prompts": "harmful", **ask})
    refusals = [(answer.asked, answer.answer) for answer in answers if is_refusal(answer.answer)]
    if not refusals:
        raise AsftError(f"{model} refuses none of {len(answers)} harmful prompts; there is no basin to draw")
    pairs = asked_with_the_template(interviewer.tokenizer, task) if task is not None else _own_answers(interviewer, ask)
    return {"refusals": refusals, "task": pairs}


def asked_with_the_template(tokenizer: Any, turns: Pairs) -> Pairs:
    """(prompt, answer) of a task as a model reads and writes them, under the tokenizer's chat template."""

    def chat(*texts: str) -> str:
        messages = [{"role": role, "content": text} for role, text in zip(("user", "assistant"), texts, strict=False)]
        options = {"add_generation_prompt": len(texts) == 1, "enable_thinking": False}
        return tokenizer.apply_chat_template(messages, tokenize=False, **options)

    def turn(prompt: str, answer: str) -> tuple[str, str]:
        asked, whole = chat(prompt), chat(prompt, answer)
        space = " " if whole.startswith(f"{asked} {answer}") else ""  # some templates put it before an answer
        return asked, space + answer

    return [turn(*each) for each in turns]


def _own_answers(interviewer: Interviewer, ask: dict[str, Any]) -> Pairs:
    answers = interviewer.answers(BORDERLINE_TASK, {"borderline": "borderline", **ask})
    kept = [(answer.asked, answer.answer) for answer in answers if not is_refusal(answer.answer)]
    return kept or [(answer.asked, answer.answer) for answer in answers]
