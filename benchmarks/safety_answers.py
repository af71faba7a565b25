"""A direction file's own answers for the safety benchmark: as training data, and fewer of them."""

from pathlib import Path

from axolotl_asft.spec import own_answers_in


def with_answers(
    work: Path, folder: Path, lines: int, general: bool, data: list[dict[str, str]] | None, form: str | None
) -> list[dict[str, str]]:
    """The run's data, and beside it what `axolotl asft answers` writes of the direction file.

    Args:
        data: as the config lists it; None: chats.
        form: prompt format of the data; None: the chat template's.
    """
    from axolotl_asft import AlignmentDirection
    from axolotl_asft.answer_data import TYPE, in_formats, write_answers
    from axolotl_asft.evaluation.models import load_tokenizer

    turns = own_answers_in(AlignmentDirection.load(work / "direction.safetensors").spec)
    answers = folder / "own-answers.jsonl"
    if general:
        turns = in_formats(load_tokenizer(str(work / "aligned-nf4")), turns, [form] if form else [])
    write_answers(turns, answers, lines)
    chats = [{"path": str(folder / "data.jsonl"), "type": "chat_template"}]
    return [*(data or chats), {"path": str(answers), "type": TYPE}]


def with_fewer_answers(file: Path, count: int, output: Path) -> Path:
    """A direction file with `count` of its own answers, from all over and in turns as they were."""
    from axolotl_asft import AlignmentDirection

    direction = AlignmentDirection.load(file)
    kinds = [list({tuple(turn): turn for turn in direction.spec["own_answers"][start::2]}.values()) for start in (0, 1)]
    half = range(count // 2)
    answers = [kind[i * len(kind) // len(half)] for i in half for kind in kinds]
    AlignmentDirection(direction.modules, {**direction.spec, "own_answers": answers}).save(output)
    return output
