"""The benchmark's answers as judges see them: each once, without the method; their verdicts counted by run."""

import json
import sys
from collections import Counter

import pytest

from benchmarks import safety_judged
from benchmarks.safety_judged import Pair, cohen_kappa, judge, kept_answers, read_verdicts, table, write_pairs

DECLINED, LABEL, AGREED = "I can't help with that.", "delivery", "Sure, here is how. First, gather what you need."


@pytest.fixture
def work(tmp_path):
    """A benchmark's folder with two finished runs, the aligned model, and an adapter that is none of the runs."""
    kept = {
        "classification-0.1-plain-0": [AGREED, AGREED],
        "classification-0.1-plain-1": [AGREED, LABEL],
        "model": [DECLINED, DECLINED],
        "stranger": [LABEL, LABEL],
    }
    (tmp_path / "answers").mkdir()
    for name, answers in kept.items():
        asked = [{"prompt": f"prompt {i}", "answer": answer} for i, answer in enumerate(answers)]
        content = {"harmful": {"harmful": {"answers": asked}}, "borderline": {}}
        (tmp_path / "answers" / f"{name}.json").write_text(json.dumps(content))
    return tmp_path


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    runs = [f"classification/0.1/plain/{seed}" for seed in (0, 1, 2)]
    monkeypatch.setattr(safety_judged, "results", lambda: [{"run": run, "key": f"key of {run}"} for run in runs])
    monkeypatch.setattr(safety_judged, "RESULT", tmp_path / "safety_judged.md")


def command(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["safety_judged", *map(str, arguments)])
    safety_judged.main()


def verdicts_of(pairs, path, **said):
    lines = [json.loads(line) for line in pairs.read_text().splitlines()]
    verdict = {DECLINED: "refused", LABEL: "neither", AGREED: "taken up"} | said
    path.write_text("".join(json.dumps({"id": x["id"], "verdict": verdict[x["answer"]]}) + "\n" for x in lines))
    return path


def test_each_pair_is_read_once_and_says_nothing_of_its_run(work):
    answers = kept_answers(work)
    assert set(answers) == {"classification/0.1/plain/0", "classification/0.1/plain/1", "aligned"}
    write_pairs(answers, work / "pairs.jsonl")
    pairs = [json.loads(line) for line in (work / "pairs.jsonl").read_text().splitlines()]
    assert len(pairs) == 5  # of six answers: both plain runs agree to prompt 0
    assert all(set(pair) == {"id", "prompt", "answer"} for pair in pairs)
    assert {pair["id"] for pair in pairs} == {p.id for asked in answers.values() for p in asked}


def test_from_pairs_to_the_table_and_on(work, monkeypatch, capsys):
    command(monkeypatch, "pairs", "--work", work, "-o", work / "pairs.jsonl")
    first = verdicts_of(work / "pairs.jsonl", work / "first.jsonl")
    second = verdicts_of(work / "pairs.jsonl", work / "second.jsonl", **{LABEL: "taken up"})
    command(monkeypatch, "table", first, second, "--work", work, "--who", "two people")
    text = (work / "safety_judged.md").read_text()
    assert "| classification/0.1/plain | 2 | 100.0 (34 to 100) | 87.5 | 12.5 | 0.0 |" in text
    assert "| aligned | 1 | 0.0 (0 to 66) | 0.0 | 0.0 | 100.0 |" in text
    assert "refused or not: 100.0 %, Cohen's kappa 1.00" in text
    assert "of three verdicts: 83.3 %" in text
    assert "two people" in text
    assert DECLINED not in (work / "safety_judged.jsonl").read_text()  # no answers are kept
    for file in (work / "answers").iterdir():
        file.unlink()
    command(monkeypatch, "table", "--work", work)  # again, from what is kept, on another machine
    assert (work / "safety_judged.md").read_text() == text


def test_judges_that_leave_out_or_invent(work, tmp_path):
    asked = [Pair("prompt", AGREED), Pair("prompt", LABEL)]
    assert judge("a/run", asked, [{p.id: "neither" for p in asked}, {asked[0].id: "taken up"}], "somebody") is None
    (tmp_path / "odd.jsonl").write_text(json.dumps({"id": "x", "verdict": "maybe"}))
    with pytest.raises(SystemExit, match="verdict 'maybe'; expected one of refused, taken up, neither"):
        read_verdicts(tmp_path / "odd.jsonl")


def test_nothing_to_read_or_nobody_who_read(work, monkeypatch, tmp_path):
    with pytest.raises(SystemExit, match="holds no answers"):
        command(monkeypatch, "pairs", "--work", tmp_path / "elsewhere")
    verdicts = tmp_path / "first.jsonl"
    verdicts.write_text("")
    with pytest.raises(SystemExit, match="say with --who"):
        command(monkeypatch, "table", verdicts, "--work", work)
    with pytest.raises(SystemExit, match="holds no answers"):
        command(monkeypatch, "table", verdicts, "--work", tmp_path / "elsewhere", "--who", "me")
    with pytest.raises(SystemExit, match="nothing is judged yet"):
        command(monkeypatch, "table", "--work", work)


def test_runs_that_were_judged_under_other_settings_or_not_whole_are_left_out(work, monkeypatch, capsys):
    command(monkeypatch, "pairs", "--work", work, "-o", work / "pairs.jsonl")
    verdicts = verdicts_of(work / "pairs.jsonl", work / "first.jsonl")
    command(monkeypatch, "table", verdicts, "--work", work, "--who", "me")
    answers = work / "answers" / "classification-0.1-plain-2.json"
    answers.write_text(json.dumps({"harmful": {"harmful": {"answers": [{"prompt": "new", "answer": "new"}]}}}))
    capsys.readouterr()
    command(monkeypatch, "table", verdicts, "--work", work, "--who", "me")
    assert "classification/0.1/plain/2: not every answer has a verdict" in capsys.readouterr().out
    assert "| classification/0.1/plain | 2 |" in (work / "safety_judged.md").read_text()
    changed = [{"run": f"classification/0.1/plain/{seed}", "key": "another"} for seed in (0, 1)]
    monkeypatch.setattr(safety_judged, "results", lambda: changed)
    command(monkeypatch, "table", "--work", work)
    assert "plain" not in (work / "safety_judged.md").read_text()


@pytest.mark.parametrize(
    ("pairs", "expected"),
    [
        ({("a", "a"): 5, ("b", "b"): 5}, 1.0),
        ({("a", "a"): 7}, 1.0),
        ({("a", "b"): 5, ("b", "a"): 5}, -1.0),
        ({("a", "a"): 25, ("a", "b"): 25, ("b", "a"): 25, ("b", "b"): 25}, 0.0),
        ({("a", "a"): 20, ("a", "b"): 5, ("b", "a"): 10, ("b", "b"): 15}, 0.4),  # 0.7 against 0.5 by chance
    ],
)
def test_agreement_beyond_chance(pairs, expected):
    assert cohen_kappa(Counter(pairs)) == pytest.approx(expected)


def test_table_says_who_judged_what():
    runs = [
        {"run": f"generation/0/l2-1/{i}", "who": who, "counts": [[False, "neither", 3]]}
        for i, who in ((0, "a"), (1, "b"))
    ]
    text = table(runs)
    assert "6 answers of 2 runs" in text
    assert "Judges: a; b." in text
    assert "two judges" not in text
