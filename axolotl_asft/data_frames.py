"""What stands around the requests of tokenised data, system prompts for one: the model is held where it is asked."""

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from axolotl_asft.prompt_formats import LONGEST, PLACE, filled, rendered

ROWS = 1000  # looked at, from all over
SHARE = 0.05  # of the rows, from which on a frame is common
MOST = 8  # frames that are asked in
HALF = 0.5  # of the rows under a head, from which on an instruction is theirs
ALIKE, LONGER = 0.95, 8  # of the rows with an instruction, and tokens, that tell what they have in common
LEAST = 4  # letters that tell a turn's header, or its end, from a line break
TRIED = 8  # rows that tell a frame's text
TOKENS = 512  # of a frame that is one row's alone
EXAMPLE = 30  # tokens shown of a prompt
PREFERENCES = ("prompt_ids", "prompt_input_ids")  # columns of TRL's with the prompts of answers to choose from

Tokens = tuple[int, ...]


@dataclass(frozen=True)
class _Frame:
    """What rows have before and after their requests; without `end`, what the chat template has."""

    before: Tokens
    end: Tokens
    rows: Sequence[Tokens]


@dataclass(frozen=True)
class Frames:
    """What stands around the requests of a run's data where that is not what is asked.

    Attributes:
        formats: of them, those to ask in, as texts with {prompt} in it.
        share: of the rows whose prompts begin as none of what is asked.
        left: of these, still in none of `formats` and not like them.
        example: how the first of these begins.
        untold: share of the rows of which nothing tells the prompt; the others are of the rest.
    """

    formats: tuple[str, ...]
    share: float
    left: float
    example: str
    untold: float

    def unheld(self, are_asked: bool, others: bool = False) -> list[str]:
        """A line on rows that begin as nothing that is asked, and one on rows of which it is not known, where many are.

        Args:
            are_asked: whether `formats` are.
            others: whether the config says what else is, for rows of which it is not known.
        """
        share = self.left if are_asked else self.share
        told = (
            f"{share:.0%} of the data's prompts begin as none in which the anchor asks, and nothing is held there "
            f"(first {self.example!r}); where many begin alike, give that as asft.prompt_formats, with {PLACE} in the "
            "request's place"
        )
        untold = (
            f"of {self.untold:.0%} of the data nothing tells the prompts, as in raw texts, streamed data and chats "
            "with images; where a system prompt or an instruction stands around the requests, give that as "
            f"asft.prompt_formats, with {PLACE} in the request's place, or nothing is held under it"
        )
        unknown = 0.0 if others else self.untold
        return [line for line, part in ((told, share), (untold, unknown)) if part >= SHARE]


def frames(tokenizer: Any, dataset: Any, asked: Sequence[str]) -> Frames | None:
    """What stands around the requests of tokenised data; None where it is nearly all what is asked.

    In chats it is what stands before the first turn of the user, a system prompt, and in any data an instruction that
    most requests begin and end with. Common ones are told each; of system prompts that few rows share, some from all
    over.

    Args:
        tokenizer: of the run.
        dataset: rows of "input_ids" and "labels", of TRL's preference data, or of a "prompt" that is to be answered.
        asked: formats in which the anchor asks beside the tokenizer's chat template.
    """
    turn = rendered(tokenizer)
    if turn is None:
        return None
    looked_at = list(_prompts(tokenizer, dataset))
    prompts = [ids for ids in looked_at if ids]
    untold = 1 - len(prompts) / len(looked_at) if looked_at else 1.0
    if not prompts:
        return Frames((), 0.0, 0.0, "", untold)
    starts = [_start(tokenizer, turn[0], False), *(_start(tokenizer, text.partition(PLACE)[0], True) for text in asked)]
    starts = [start for start in starts if start not in ((), (tokenizer.bos_token_id,))]
    header, least = _header(tokenizer, turn[0]), SHARE * len(prompts)
    heads: dict[Tokens, list[Tokens]] = defaultdict(list)
    for ids in prompts:
        heads[_head(ids, starts, header)].append(ids)
    common: list[tuple[_Frame, str]] = []
    rare: list[_Frame] = []
    for head, rows in heads.items():
        most = HALF * len(rows) if header else least  # without a header it may be a system prompt in the user's turn
        inside = _instructions(head, rows, max(least, most))
        told = [(frame, text) for frame in inside if (text := _format(tokenizer, frame, turn)) is not None]
        rest = [ids for ids in rows if not any(_begins(ids, frame.before) for frame, _ in told)]
        if head and head not in starts and len(rest) >= least:
            frame = _Frame(head, (), rest)
            told += [(frame, text)] if (text := _format(tokenizer, frame, turn)) is not None else []
        elif head and head not in starts and rest and len(head) <= TOKENS:
            rare.append(_Frame(head, (), rest))
        common += told
    common = sorted(common, key=lambda pair: -len(pair[0].rows))[:MOST]
    if sum(len(frame.rows) for frame in rare) < least:
        rare = []
    room = min(MOST - len(common), len(rare))
    texts = [_format(tokenizer, rare[i * len(rare) // room], turn) for i in range(room)]
    sampled = [text for text in texts if text is not None]
    formats = tuple(dict.fromkeys([*(text for _, text in common), *sampled]))
    others = [ids for head, rows in heads.items() if head not in starts for ids in rows]
    if not formats and len(others) < least and untold < SHARE:
        return None
    held = {id(ids) for frame in [*(frame for frame, _ in common), *(rare if sampled else ())] for ids in frame.rows}
    left = [ids for ids in others if id(ids) not in held]
    example = tokenizer.decode(list((left or others or prompts)[0][:EXAMPLE]))
    return Frames(formats, len(others) / len(prompts), len(left) / len(prompts), example, untold)


def _head(ids: Tokens, starts: Sequence[Tokens], header: Tokens) -> Tokens:
    """What stands before a row's request: the longest start that is asked, else what ends with the user's first turn's
    header; nothing where there is none."""
    asked = [start for start in starts if _begins(ids, start)]
    return max(asked, key=len) if asked else _up_to(ids, header)


def _instructions(head: Tokens, rows: Sequence[Tokens], least: float) -> list[_Frame]:
    """What so many requests after a head begin with alike, and end with."""
    alike: dict[Tokens, list[Tokens]] = defaultdict(list)
    for ids in rows:
        alike[ids[len(head) : len(head) + LONGER]].append(ids)
    found = []
    for group in alike.values():
        if len(group) < least:
            continue
        before = _shared(group)
        end = _shared([ids[: len(before) - 1 : -1] for ids in group])[::-1]
        frame = _Frame(before, end, [ids for ids in group if _begins(ids, before)])
        if sum(len(ids) > len(before) + len(end) for ids in frame.rows) >= ALIKE * len(group):  # else equal requests
            found.append(frame)
    return found


def _begins(ids: Tokens, start: Tokens) -> bool:
    return ids[: len(start)] == start


def _shared(prompts: Sequence[Tokens]) -> Tokens:
    """The longest beginning that nearly all have."""
    group, least = list(prompts), ALIKE * len(prompts)
    depth = 0
    while counts := Counter(ids[depth] for ids in group if len(ids) > depth):
        token, count = counts.most_common(1)[0]
        if count < least:
            break
        group = [ids for ids in group if len(ids) > depth and ids[depth] == token]
        depth += 1
    return group[0][:depth]


def _prompts(tokenizer: Any, dataset: Any) -> Iterator[Tokens]:
    """The tokens before the first answer, of rows from all over; nothing of a row where they cannot be told."""
    columns = set(getattr(dataset, "column_names", None) or ())
    tokenised = next((name for name in PREFERENCES if name in columns), None)
    in_one = {"input_ids", "labels"} <= columns
    ends = _turn_ends(tokenizer)
    mark = ends[-1] if len(tokenizer.decode(list(ends[-1])).strip()) >= LEAST else ()
    readable = hasattr(dataset, "__len__") and bool(tokenised or in_one or "prompt" in columns)
    count = min(ROWS, len(dataset)) if readable else 0
    for i in range(count):
        row = dataset[i * len(dataset) // count]
        if tokenised is not None:
            ids = _numbers(row[tokenised])
        elif in_one:
            ids = _numbers(row["input_ids"])
            trained = next((place for place, label in enumerate(row["labels"]) if label != -100), 0)
            ids = ids[: max(trained, len(_up_to(ids, mark)))]  # the requests may be trained too
        else:
            ids = _read(tokenizer, row["prompt"])
        end = next((end for end in ends if end and _ends(ids, end)), ())
        yield ids[: len(ids) - len(end)] + ends[0] if end else ids


def _turn_ends(tokenizer: Any) -> list[Tokens]:
    """What may stand after a request: first that of an answer without a thought, in which an anchor asks; then as the
    template renders it by itself, and before a thought of the data's own."""
    turns = [turn for thinks in (False, True) if (turn := rendered(tokenizer, thinks=thinks)) is not None]
    before, after = turns[0]
    turns.append((before, after.partition("<think>")[0]))
    found = dict.fromkeys(_end(tokenizer, *turn) for turn in turns)
    first, *others = found
    return [first, *sorted(others, key=len, reverse=True)]


def _read(tokenizer: Any, prompt: Any) -> Tokens:
    """A prompt that is not tokenised, as TRL will read it: a text, or turns; nothing where it is neither."""
    if isinstance(prompt, str):
        return _numbers(tokenizer(prompt)["input_ids"])
    try:
        text = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
    except Exception:  # a template may refuse in any way, which is the trainer's to say
        return ()
    return _numbers(tokenizer(text, add_special_tokens=False)["input_ids"]) if isinstance(text, str) else ()


def _numbers(ids: Any) -> Tokens:
    return tuple(int(token) for token in ids)


def _header(tokenizer: Any, before: str) -> Tokens:
    """With what a turn of the user begins, wherever it stands; nothing where that is but a line break."""
    other = rendered(tokenizer, [("system", "What is it?")])
    if other is None:
        return ()
    same = takewhile(lambda pair: pair[0] == pair[1], zip(reversed(before), reversed(other[0]), strict=False))
    shared = "".join(letter for letter, _ in same)[::-1]
    whole = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in (before, other[0])]
    for i in range(len(shared)):  # letters that two tokens have in common are no header
        ids = tokenizer(shared[i:], add_special_tokens=False)["input_ids"]
        if len(shared[i:].strip()) >= LEAST and all(tokens[-len(ids) :] == ids for tokens in whole):
            return tuple(ids)
    return ()


def _start(tokenizer: Any, before: str, special: bool) -> Tokens:
    """The tokens of what stands before a request, whatever that is: the last letters may be of one token with it."""
    texts = [before, before + "A", before + "7"]
    read = [tokenizer(text, add_special_tokens=special)["input_ids"] for text in texts]
    end = next((i for i, ids in enumerate(zip(*read, strict=False)) if len(set(ids)) > 1), len(read[0]))
    return tuple(read[0][:end])


def _up_to(ids: Tokens, header: Tokens) -> Tokens:
    """Up to the first place of the header and with it; nothing where it is not there, or there is none."""
    for i in range(len(ids) - len(header) + 1 if header else 0):
        if ids[i : i + len(header)] == header:
            return ids[: i + len(header)]
    return ()


def _format(tokenizer: Any, frame: _Frame, turn: tuple[str, str]) -> str | None:
    """A frame as a format, as most of some of its rows have it; None where none is read as it was.

    Args:
        turn: what the chat template has before and after a request.
    """
    rows = [frame.rows[i * len(frame.rows) // TRIED] for i in range(TRIED)]
    found = Counter(text for row in rows if (text := _text(tokenizer, frame, row, turn)) is not None)
    return found.most_common(1)[0][0] if found else None


def _text(tokenizer: Any, frame: _Frame, row: Tokens, turn: tuple[str, str]) -> str | None:
    """A row with {prompt} in its request's place; None where the tokenizer reads the same otherwise."""
    usual = _end(tokenizer, *turn)
    end = frame.end or usual
    extra = end[: len(end) - len(usual)] if _ends(end, usual) else end
    after = turn[1] if _ends(end, usual) else ""
    first = tokenizer("a")["input_ids"][:1]
    own = int(first == [tokenizer.bos_token_id] == list(row[:1]))  # the tokenizer puts it before every text by itself
    before = tokenizer.decode(frame.before[own:])
    rest = tokenizer.decode(row[own:]).removeprefix(before)
    lead = before + rest[: len(rest) - len(rest.lstrip())]
    request = tokenizer.decode(row[len(frame.before) : len(row) - len(end)])
    last = request[len(request.rstrip()) :]  # a token may be of the request's last letters and of the break after them
    for gap in dict.fromkeys((last, "", " ") if extra else (last, "")):
        text = f"{lead}{PLACE}{gap}{tokenizer.decode(extra)}{after}"
        ids = tuple(tokenizer(filled(text, request.strip()))["input_ids"])
        if text.count(PLACE) == 1 and len(text) <= LONGEST and ids == row:
            return text
    return None


def _end(tokenizer: Any, before: str, after: str) -> Tokens:
    """The tokens of what stands after a request, whatever that is."""
    texts = [before + request + after for request in ("", "A", "7")]
    read = [tokenizer(text, add_special_tokens=False)["input_ids"][::-1] for text in texts]
    return tuple(ids[0] for ids in takewhile(lambda ids: len(set(ids)) == 1, zip(*read, strict=False)))[::-1]


def _ends(ids: Tokens, end: Tokens) -> bool:
    return ids[len(ids) - len(end) :] == end
