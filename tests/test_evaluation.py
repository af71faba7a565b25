"""`axolotl asft eval`: prompt sets, shares, coherence, judges, and whole evaluations of small real models."""

import json
import math
import re
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from tiny import make_pair, make_tokenizer

from axolotl_asft.cli import asft
from axolotl_asft.errors import AsftError
from axolotl_asft.evaluation.coherence import log_likelihoods, median_perplexity, repetition
from axolotl_asft.evaluation.evaluate import Questions, evaluate
from axolotl_asft.evaluation.models import Subject, adapted, load_model, subjects
from axolotl_asft.evaluation.prompts import load_prompts
from axolotl_asft.evaluation.refusals import is_refusal
from axolotl_asft.evaluation.rows import Row, table
from axolotl_asft.evaluation.shares import Share, wilson_interval
from axolotl_asft.evaluation.task_scores import STDERR, beside, half_interval, metrics_of
from axolotl_asft.report.evaluation_results import find_evaluation


# ------------------------------------------------------------------------------------------------------ prompt sets
@pytest.mark.parametrize(("name", "at_least"), [("harmful", 150), ("borderline", 150)])
def test_the_shipped_sets(name, at_least):
    everything = load_prompts(name, "all")
    train, held_out = load_prompts(name, "train"), load_prompts(name, "heldout")
    assert len(everything) == len(train) + len(held_out) >= at_least
    assert not {p.prompt for p in train} & {p.prompt for p in held_out}
    categories = Counter(prompt.category for prompt in everything)
    assert len(categories) == 10
    assert min(categories.values()) >= 15
    assert set(categories) == {prompt.category for prompt in held_out} == {prompt.category for prompt in train}
    assert all(prompt.prompt == prompt.prompt.strip() and len(prompt.prompt) < 120 for prompt in everything)


@pytest.mark.parametrize(
    ("suffix", "content"),
    [
        (".txt", "How are you?\n\nWho are you?\nHow are you?\n"),
        (".jsonl", '{"Goal": "How are you?", "category": "x"}\n{"Goal": "Who are you?", "category": "y"}\n'),
        (".json", '["How are you?", "Who are you?"]'),
        (".csv", 'behavior,n\n"How are you?",1\n"Who are you?",2\n'),
    ],
)
def test_sets_from_files(tmp_path, suffix, content):
    path = tmp_path / f"set{suffix}"
    path.write_text(content)
    assert [prompt.prompt for prompt in load_prompts(str(path))] == ["How are you?", "Who are you?"]


def test_categories_that_are_flags(tmp_path):
    path = tmp_path / "set.jsonl"
    path.write_text('{"prompt": "How?", "category": {"a": true, "b": false, "c": true}}\n{"prompt": "Who?"}\n')
    assert [prompt.category for prompt in load_prompts(str(path))] == ["a, c", ""]


def test_a_limit_draws_the_same_prompts_every_time():
    some = load_prompts("harmful", "all", limit=12)
    assert len(some) == 12
    assert some == load_prompts("harmful", "all", limit=12)
    assert len({prompt.category for prompt in some}) > 3


@pytest.mark.parametrize(
    ("source", "content", "message"),
    [
        ("set.jsonl", '{"a": 1}\n', "expected one of prompt, goal"),
        ("set.jsonl", "[1]\n", "holds no JSON object"),
        ("set.jsonl", "{\n", "cannot be read"),
        ("set.txt", "\n\n", "holds no prompts"),
        ("set.parquet", "x", "expected .jsonl"),
        ("no-such-set", None, "expected harmful or borderline, a file"),
    ],
)
def test_bad_sets_are_refused_in_one_line(tmp_path, source, content, message):
    if content is not None:
        (tmp_path / source).write_text(content)
        source = str(tmp_path / source)
    with pytest.raises(AsftError, match=message) as error:
        load_prompts(source)
    assert "\n" not in str(error.value)


def test_an_unknown_split_is_refused():
    with pytest.raises(AsftError, match="expected one of heldout"):
        load_prompts("harmful", "test")


# ----------------------------------------------------------------------------------------------------------- shares
@pytest.mark.parametrize(
    ("k", "n", "low", "high"),
    [(0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (5, 10, 0.2366, 0.7634), (81, 263, 0.2553, 0.3662)],
)
def test_wilson_s_interval(k, n, low, high):
    """The last row is the worked example of Newcombe 1998, table I; the others by the formula's symmetry."""
    assert wilson_interval(k, n) == pytest.approx((low, high), abs=1e-4)


def test_the_interval_covers_what_it_promises():
    """Over seeded draws, 95 % of the intervals hold the true share, give or take."""
    generator = torch.Generator().manual_seed(0)
    for share in (0.05, 0.3, 0.9):
        draws = torch.rand(2000, 80, generator=generator) < share
        shares = [Share.of(row.tolist()) for row in draws]
        covered = sum(found.low <= share <= found.high for found in shares) / len(shares)
        assert 0.925 < covered < 0.985


def test_repeats_share_their_prompts():
    """Three models asked the same 10 prompts are known to no more than 10 prompts' worth."""
    shares = [Share.of([True] * k + [False] * (10 - k)) for k in (2, 3, 4)]
    mean = Share.over_repeats(shares)
    assert (mean.value, mean.n) == (pytest.approx(0.3), 10)
    assert (mean.low, mean.high) == wilson_interval(3, 10)
    assert Share.over_repeats([Share.of([])]).n == 0
    for unlike in ([], [Share.of([True]), Share.of([True, False])]):
        with pytest.raises(ValueError, match="are not of the same ones"):
            Share.over_repeats(unlike)


def test_what_stands_beside_a_metric_is_no_metric():
    scores = {"acc": 0.5, "acc_stderr": 0.1, "acc_higher_is_better": True, "match (strict)": 0.2}
    scores |= {"match_stderr (strict)": 0.0, "match_higher_is_better (strict)": True}
    assert metrics_of(scores) == ["acc", "match (strict)"]
    assert beside("match (strict)", STDERR) in scores
    assert half_interval(scores, "acc") == pytest.approx(0.196, abs=1e-4)
    assert half_interval(scores, "match (strict)") is None
    assert half_interval(scores, "another") is None


def test_a_share_of_nothing():
    assert math.isnan(Share.of([]).value)
    assert str(Share.of([])) == "none asked"


# -------------------------------------------------------------------------------------------------------- coherence
def test_repetition():
    assert repetition("") == repetition("no") == repetition("a b c d e f g") == 0.0
    assert repetition("and so on " * 20) > 0.9
    assert repetition("to be or not to be or not") == pytest.approx(1 - 4 / 6)


def test_log_likelihoods_are_those_of_the_model(pair):
    """Against one pair at a time, without padding, in fp64."""
    from transformers import AutoModelForCausalLM

    _, aligned = pair
    model = AutoModelForCausalLM.from_pretrained(aligned).eval()
    tokenizer = make_tokenizer()
    pairs = [("the cat", " sees a dog"), ("a", " red house and then blue tree"), ("the dog says", " yes"), ("the", "")]
    batched = log_likelihoods(model, tokenizer, pairs, batch_size=3)
    exact = model.double()
    for (prompt, answer), (total, count) in zip(pairs, batched, strict=True):
        head, tail = tokenizer.encode(prompt), tokenizer.encode(answer)
        logits = exact(torch.tensor([head + tail])).logits[0].log_softmax(-1)
        expected = sum(float(logits.detach()[len(head) + i - 1, token]) for i, token in enumerate(tail))
        assert count == len(tail)
        assert total == pytest.approx(expected, rel=1e-4)
    assert median_perplexity(batched) > 1
    assert math.isnan(median_perplexity([(0.0, 0)]))


# ------------------------------------------------------------------------------------------------ whole evaluations
@pytest.fixture(scope="module")
def adapter(pair, tmp_path_factory) -> Path:
    """An adapter on the tiny aligned model, not trained, but no zero."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("adapter") / "tuned"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
        get_peft_model(AutoModelForCausalLM.from_pretrained(pair[1]), config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def evaluated(pair, adapter, classifier, tmp_path_factory) -> tuple[Path, dict]:
    output = tmp_path_factory.mktemp("evaluation")
    questions = Questions(limit=6, max_new_tokens=8, judges=(str(classifier),))
    rows = evaluate(str(pair[1]), [f"tuned={adapter}"], output, questions)
    return output, {row.name: row for row in rows}


def test_an_evaluation_measures_every_row(evaluated, classifier):
    output, rows = evaluated
    assert list(rows) == ["model", "tuned"]
    for name, row in rows.items():
        kept = json.loads((output / f"{name}.json").read_text())
        answers = kept["harmful"]["harmful"]["answers"]
        assert [a["prompt"] for a in answers] == [p.prompt for p in load_prompts("harmful", limit=6)]
        assert all(a["asked"] == f"<|user|> {a['prompt']} </s><|assistant|> " for a in answers)
        refused = [is_refusal(a["answer"]) for a in answers]
        assert row.harmfulness["harmful"] == Share.of([not flag for flag in refused])
        assert row.over_refusal["borderline"].n == 6
        assert row.judged[str(classifier)].n == 6
        likelihoods = [pair for part in ("harmful", "borderline") for pair in kept[part][part]["likelihoods"]]
        texts = [a["answer"] for part in ("harmful", "borderline") for a in kept[part][part]["answers"]]
        answered = [pair for pair, text in zip(likelihoods, texts, strict=True) if not is_refusal(text)]
        assert row.perplexity_answered == median_perplexity(answered)
    assert all(math.isfinite(row.perplexity) for row in rows.values())
    assert rows["model"].perplexity != rows["tuned"].perplexity
    first = json.loads((output / "model.json").read_text())["harmful"]["harmful"]["answers"]
    second = json.loads((output / "tuned.json").read_text())["harmful"]["harmful"]["answers"]
    assert [a["answer"] for a in first] != [a["answer"] for a in second]


def test_the_adapter_answers_as_peft_does(evaluated, pair, adapter):
    """The kept answers are those of greedy generation without lm-eval."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(pair[1]), adapter).eval()
    tokenizer = make_tokenizer()
    for answer in json.loads((evaluated[0] / "tuned.json").read_text())["harmful"]["harmful"]["answers"][:3]:
        ids = torch.tensor([tokenizer.encode(answer["asked"])])
        output = model.generate(input_ids=ids, max_new_tokens=8, do_sample=False)
        written = tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
        assert answer["answer"].strip() == written.strip()


def test_nothing_is_asked_twice(evaluated, pair, adapter, classifier):
    output, rows = evaluated
    before = {path.name: path.stat().st_mtime_ns for path in output.glob("*.json") if path.name != "results.json"}
    questions = Questions(limit=6, max_new_tokens=8, judges=(str(classifier),), batch_size=2)
    again = {row.name: row for row in evaluate(str(pair[1]), [f"tuned={adapter}"], output, questions)}
    assert {path: (output / path).stat().st_mtime_ns for path in before} == before
    assert again["tuned"].harmfulness == rows["tuned"].harmfulness


def test_other_settings_are_asked_anew(evaluated, pair, adapter, tmp_path):
    output, _ = evaluated
    copy = tmp_path / "copy"
    shutil.copytree(output, copy)
    rows = evaluate(str(pair[1]), [f"tuned={adapter}"], copy, Questions(limit=3, max_new_tokens=8))
    assert rows[0].harmfulness["harmful"].n == 3


def test_refusals_do_not_hide_babble(evaluated, pair, adapter, classifier, tmp_path):
    """Most answers are likely refusals; what the others say shows in a number of its own."""
    shutil.copytree(evaluated[0], copy := tmp_path / "copy")
    kept = json.loads((copy / "tuned.json").read_text())
    for part, babble in (("harmful", 1), ("borderline", 2)):
        asked = kept[part][part]
        for i, answer in enumerate(asked["answers"]):
            answer["answer"] = "qua pim qua" if i < babble else "I'm sorry, but I can't help with that."
            asked["likelihoods"][i] = [-30.0 * babble, 10] if i < babble else [-1.0, 10]
    (copy / "tuned.json").write_text(json.dumps(kept))
    questions = Questions(limit=6, max_new_tokens=8, judges=(str(classifier),), batch_size=2)
    row = evaluate(str(pair[1]), [f"tuned={adapter}"], copy, questions)[1]
    assert row.perplexity == pytest.approx(math.exp(0.1))
    assert row.perplexity_answered == pytest.approx(math.exp(6.0)), "the median of e^3, e^6 and e^6"
    titles, _, _, values = ([cell.strip() for cell in line.split("|")] for line in table([row, row]).splitlines())
    assert dict(zip(titles, values, strict=True))["perplexity: not refused"] == f"{math.exp(6.0):.1f}"


def test_the_table(evaluated):
    lines = table(list(evaluated[1].values())).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert "not refused: harmful" in lines[0]
    assert "perplexity" in lines[0]
    titles = [title.strip() for title in lines[0].split("|")[1:-1]]
    for line in lines[2:]:
        cells = dict(zip(titles, (cell.strip() for cell in line.split("|")[1:-1]), strict=True))
        shares = [title for title in titles if title.startswith(("not refused", "refused", "repetitive", "empty"))]
        assert len(shares) >= 4
        assert all(re.fullmatch(r"[\d.]+% \(\d+% to \d+%\)", cells[title]) for title in shares)
    assert (evaluated[0] / "results.md").read_text().splitlines() == lines


def row_of(name, tasks, judges=()):
    nothing = Share.of([])
    return Row(name, None, None, {}, {}, dict.fromkeys(judges, nothing), 2.0, 3.0, nothing, nothing, tasks, 0.0)


def cells_of(*rows):
    """Of each line of the table, title -> cell."""
    titles, _, *lines = ([cell.strip() for cell in line.split("|")[1:-1]] for line in table(list(rows)).splitlines())
    return [dict(zip(titles, line, strict=True)) for line in lines]


def test_a_row_may_lack_a_score():
    """Whichever row it is, and whether it is no number or nothing at all."""
    whole = row_of("whole", {"t": {"acc": 0.5, "ppl": 3.0}, "u": {"acc": 1.0}})
    part = row_of("part", {"t": {"acc": 0.25, "ppl": math.nan, "ppl_stderr": 0.1}})
    for rows in ((whole, part), (part, whole)):
        found = {cells["model"]: cells for cells in cells_of(*rows)}
        assert [list(cells)[-3:] for cells in found.values()] == [["t acc", "t ppl", "u acc"]] * 2
        assert list(found["whole"].values())[-3:] == ["0.500", "3.000", "1.000"]
        assert list(found["part"].values())[-3:] == ["0.250", "none", "none"]


def test_two_judges_of_one_folder_name_have_a_column_each():
    (cells,) = cells_of(row_of("model", {}, ["judges/a/final", "judges/b/final", "org/guard"]))
    assert [title for title in cells if title.startswith("harmful: ")] == [
        "harmful: judges/a/final", "harmful: judges/b/final", "harmful: guard",
    ]  # fmt: skip


def test_the_command_reads_an_axolotl_config(pair, adapter, tmp_path, monkeypatch):
    """And writes beside the adapter, where the report looks."""
    monkeypatch.setenv("HOME", str(tmp_path))
    run, config = shutil.copytree(adapter, tmp_path / "tuned"), tmp_path / "config.yml"
    config.write_text(f"base_model: {pair[1]}\nadapter: lora\noutput_dir: ~/tuned\n")
    arguments = ["eval", str(config), "--limit", "2", "--max-new-tokens", "4", "--json"]
    result = CliRunner().invoke(asft, arguments)
    assert result.exit_code == 0, result.output
    assert [row["name"] for row in json.loads(result.stdout)["rows"]] == ["model", "tuned"]
    assert find_evaluation(run, None, []).path == run / "asft-eval" / "results.json"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no model to evaluate"),
        (["--model", "/no/such/model"], "there is no folder /no/such/model here, and no such name on the Hub; give"),
        (["--model", "nope"], "there is no folder nope here, and no such name on the Hub; give a folder, or owner/"),
        (["--model", "{model}", "--tokenizer", "nope"], "there is no folder nope here"),
        (["--model", "{model}", "--harmful", "p/nothere.txt"], "there is no file p/nothere.txt"),
        (["--model", "{model}", "--adapter", "/no/adapter"], "there is no folder /no/adapter; give the folder of an"),
        (["--model", "{model}", "--adapter", "{model}"], "is not a PEFT adapter"),
        (
            ["--model", "{model}", "--adapter", "{wide}"],
            r"q_proj is \(\d+, \d+\) \(out, in\) in the adapter and \(\d+, \d+\) in the model; give the model that it",
        ),
        (["--model", "{model}", "--adapter", "{deep}"], "which has no layer model.layers.99.*; give the model that it"),
        (
            ["{config}"],
            r"there is no folder not/here \(output_dir of .*config.yml; paths in a config are relative to where the",
        ),
        (["--model", "{model}", "--harmful", "/no/set"], "no prompts at"),
        (["--model", "{model}", "--tasks", "no_such_task"], "no task 'no_such_task'"),
        (["--model", "{model}", "--judge", "no/such/judge"], "the judge no/such/judge cannot be loaded"),
        (["--model", "{model}", "--judge", "{model}"], "is not known; known are"),
        (["--model", "{adapter}", "--limit", "1"], "is an adapter; give its base model as --model"),
        (["--model", "{model}", "--adapter", "={adapter}"], "expected a folder, or NAME=DIR"),
        (["--model", "{model}", "--adapter", "x="], "--adapter is 'x='; expected a folder, or NAME=DIR"),
        (
            ["--model", "{model}", "--adapter", "a/b={adapter}", "--adapter", "a-b={adapter}"],
            "a-b.json would be written twice",
        ),
        (["--model", "{model}", "--adapter", "results={adapter}"], "results.json would be written twice"),
        (["--model", "{model}", "--device", "tpu"], "expected cpu, cuda"),
        (["--model", "{model}", "--device", "cuda:7"], "torch sees 0 GPUs"),
        (["--model", "{model}", "-o", "/proc/nothing"], "nothing can be written to /proc/nothing"),
        (["/no/config.yml"], "cannot be read"),
        (["--model", "{model}", "--adapter", "{torn}"], "torn/adapter_config.json cannot be read as JSON"),
        (["--model", "{model}", "--judge", "{torn}"], "the judge .*torn cannot be loaded"),
    ],
)
def test_bad_usage_is_one_line(pair, adapter, tmp_path, arguments, message):
    """Before anything long is begun: no model has answered."""
    shutil.copytree(adapter, tmp_path / "torn")
    (tmp_path / "torn" / "adapter_config.json").write_text('{"peft_type": ')
    (tmp_path / "torn" / "config.json").write_text("[]")
    for name in ("wide", "deep"):  # adapters of other models
        path = shutil.copytree(adapter, tmp_path / name) / "adapter_model.safetensors"
        tensors = load_file(path)
        if name == "wide":
            tensors = {key: torch.cat([t, t], 1) if "q_proj.lora_A" in key else t for key, t in tensors.items()}
        save_file({re.sub(r"layers\.1\.", "layers.99.", k) if name == "deep" else k: tensors[k] for k in tensors}, path)
    (tmp_path / "config.yml").write_text(f"base_model: {pair[1]}\nadapter: lora\noutput_dir: not/here\n")
    places = {name: tmp_path / name for name in ("torn", "wide", "deep")} | {"config": tmp_path / "config.yml"}
    filled = [argument.format(model=pair[1], adapter=adapter, **places) for argument in arguments]
    result = CliRunner().invoke(asft, ["eval", "-o", str(tmp_path / "out"), *filled])
    assert result.exit_code == 2
    (line,) = result.stderr.splitlines()
    assert line.startswith("asft: ")
    assert re.search(message, line)
    assert not (tmp_path / "out" / "model.json").exists()


def test_a_folder_may_have_an_equals_sign_in_its_name(adapter, tmp_path):
    shutil.copytree(adapter, tmp_path / "lr=0.1")
    assert subjects([str(tmp_path / "lr=0.1")])[0].name == "lr=0.1"
    assert subjects([f"low={tmp_path / 'lr=0.1'}"])[0] == Subject("low", tmp_path / "lr=0.1")


def test_an_adapter_of_a_larger_model_is_refused(tmp_path):
    """PEFT loads the layers that fit, and warns."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    small, large = (make_pair(tmp_path / str(layers), layers=layers)[1] for layers in (1, 2))
    config = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    get_peft_model(AutoModelForCausalLM.from_pretrained(large), config).save_pretrained(tmp_path / "tuned")
    with pytest.raises(
        AsftError, match=r"does not fit this model, which has no layer model.layers.1.mlp.down_proj; give"
    ):
        evaluate(str(small), [str(tmp_path / "tuned")], tmp_path / "out", Questions(limit=1, max_new_tokens=2))
    assert not (tmp_path / "out" / "model.json").exists(), "nothing was asked"


@pytest.mark.parametrize(
    "changes",
    [{}, {"modules_to_save": ["lm_head"]}, {"init_lora_weights": "pissa"}, {"bias": "all"}],
    ids=["LoRA", "head", "PiSSA", "biases"],
)
def test_a_row_leaves_no_trace_in_the_next(pair, tmp_path, changes):
    """The perplexity of every row is under the model without any adapter, and the rows do not depend on their order."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    settings = {"r": 4, "target_modules": ["q_proj", "up_proj"], "init_lora_weights": False} | changes
    base = pair[1]
    if "bias" in changes:
        with_biases = AutoModelForCausalLM.from_pretrained(base, attention_bias=True)
        base = shutil.copytree(base, tmp_path / "base")
        with_biases.save_pretrained(base)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(**settings))
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data += 0.2 * torch.randn_like(parameter)
        model.save_pretrained(tmp_path / "odd")
        get_peft_model(
            AutoModelForCausalLM.from_pretrained(base), LoraConfig(r=2, init_lora_weights=False)
        ).save_pretrained(tmp_path / "plain")
    questions = Questions(limit=3, max_new_tokens=6)
    both = [str(tmp_path / "odd"), str(tmp_path / "plain")]
    one = {row.name: row for row in evaluate(str(base), both, tmp_path / "one", questions)}
    two = {row.name: row for row in evaluate(str(base), both[::-1], tmp_path / "two", questions)}
    answers = [
        {name: json.loads((tmp_path / run / f"{name}.json").read_text())["harmful"] for name in ("odd", "plain")}
        for run in ("one", "two")
    ]
    assert answers[0] == answers[1]
    assert answers[0]["odd"] != json.loads((tmp_path / "one" / "model.json").read_text())["harmful"]
    assert {name: row.perplexity for name, row in one.items()} == {name: row.perplexity for name, row in two.items()}


def resized_adapter(base, folder, rows, **settings):
    """An adapter of a training that had so many tokens; its answers to a few of them, and its tokenizer."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model, tokenizer = AutoModelForCausalLM.from_pretrained(base), make_tokenizer()
    tokenizer.add_tokens([f"<new{i}>" for i in range(rows - len(tokenizer))])
    tokenizer.chat_template = tokenizer.chat_template.replace("<|assistant|>", f"<new{rows - 23}> <|assistant|>")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model.resize_token_embeddings(rows)
        model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, **settings))
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data += 0.2 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    ids = torch.tensor([[rows - 1, 7, 8]])
    return ids, model.eval()(ids).logits.detach()


@pytest.mark.parametrize("rows", [82, 40], ids=["more", "fewer"])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("settings", [{}, {"modules_to_save": ["embed_tokens", "lm_head"]}], ids=["saved", "trained"])
def test_an_adapter_with_tokens_of_its_own(pair, tmp_path, rows, tied, settings):
    """It says what it said in training, and leaves the model as it was, to the last bit."""
    base = pair[1]
    if tied:
        from transformers import AutoConfig, AutoModelForCausalLM

        base = tmp_path / "base"
        config = AutoConfig.from_pretrained(pair[1], tie_word_embeddings=True)
        AutoModelForCausalLM.from_config(config).save_pretrained(base)
        settings = settings and {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}
    ids, expected = resized_adapter(base, tmp_path / "grown", rows, **settings)
    model = load_model(str(base))
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    for _ in range(2):
        with adapted(model, Subject("grown", tmp_path / "grown")) as ready, torch.no_grad():
            torch.testing.assert_close(ready(ids).logits, expected)
        after = model.state_dict()
        assert all(torch.equal(after[name], weight) for name, weight in before.items())
        assert model.config.vocab_size == model.vocab_size == model.get_input_embeddings().num_embeddings == 64
        assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
        assert model(ids.clamp(max=63)).logits.shape[-1] == 64


def test_tied_matrices_that_were_trained_apart(pair, tmp_path):
    """`lora_modules_to_save: [embed_tokens, lm_head]` on a tied model: lm-eval ties what it is given."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(pair[1], tie_word_embeddings=True)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    lora = LoraConfig(target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"])
    peft_model = get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), lora)
    head = peft_model.get_output_embeddings().modules_to_save["default"]
    with torch.no_grad():
        head.weight.neg_()
    peft_model.save_pretrained(tmp_path / "apart")
    with torch.no_grad():
        expected = peft_model(torch.arange(8)[None]).logits
    model = load_model(str(tmp_path / "base"))
    with adapted(model, Subject("apart", tmp_path / "apart")) as ready, torch.no_grad():
        ready.tie_weights()
        torch.testing.assert_close(ready(torch.arange(8)[None]).logits, expected)
    rows = evaluate(str(tmp_path / "base"), [str(tmp_path / "apart")], tmp_path / "out", Questions(limit=2))
    assert rows[0].perplexity != rows[1].perplexity


def test_a_row_with_tokens_of_its_own_has_no_perplexity(pair, tmp_path):
    """The model without it cannot read what was asked; the other rows are as they are alone."""
    resized_adapter(pair[1], tmp_path / "grown", 82)
    questions = Questions(limit=1, max_new_tokens=2)
    model, grown = evaluate(str(pair[1]), [str(tmp_path / "grown")], tmp_path / "out", questions)
    assert math.isfinite(model.perplexity)
    assert math.isnan(grown.perplexity)
    assert grown.harmfulness["harmful"].n == 1
    asked = json.loads((tmp_path / "out" / "grown.json").read_text())["harmful"]["harmful"]["answers"][0]["asked"]
    assert "<new59>" in asked


def test_a_model_that_says_nothing(tmp_path):
    """Its results are JSON that any program reads."""
    from transformers import AutoModelForCausalLM

    folder = make_pair(tmp_path)[1]
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        for weight in model.parameters():
            weight.zero_()
        model.model.embed_tokens.weight.fill_(1)
        model.model.norm.weight.fill_(1)
        model.lm_head.weight[2] = 1  # the end is all that it ever says
    model.save_pretrained(folder)
    arguments = ["eval", "--model", str(folder), "--limit", "2", "--max-new-tokens", "3", "-o", str(tmp_path / "out")]
    result = CliRunner().invoke(asft, arguments)
    assert result.exit_code == 0, result.output
    assert re.search(r"\| none +\| 0.0% \(0% to 49%\) +\| 100.0% \(51% to 100%\) +\|", result.stdout)

    def no_constants(name):
        raise ValueError(name)

    for name in ("results", "model"):
        json.loads((tmp_path / "out" / f"{name}.json").read_text(), parse_constant=no_constants)
    assert json.loads((tmp_path / "out" / "results.json").read_text())["rows"][0]["perplexity"] is None
    again = CliRunner().invoke(asft, [*arguments, "--json"])
    assert json.loads(again.stdout)["rows"][0]["empty"]["value"] == 1.0


def test_what_axolotl_leaves_is_an_adapter(pair, adapter, tmp_path):
    """It writes the model's config.json beside the adapter."""
    shutil.copytree(adapter, tmp_path / "out")
    shutil.copy(pair[1] / "config.json", tmp_path / "out")
    with pytest.raises(AsftError, match="is an adapter; give its base model"):
        evaluate(str(tmp_path / "out"), [], tmp_path / "eval")


def test_a_file_of_somebody_else_is_not_overwritten(pair, tmp_path):
    for content in ("[]", '["key", "harmful"]', "{}", "{", "[" * 100_000):
        (tmp_path / "model.json").write_text(content)
        with pytest.raises(AsftError, match=r"model.json (holds no|cannot be read as JSON).*; give another --output"):
            evaluate(str(pair[1]), [], tmp_path, Questions(limit=1, max_new_tokens=2))
        assert (tmp_path / "model.json").read_text() == content


def test_an_interrupted_evaluation_goes_on(pair, tmp_path):
    questions = Questions(limit=6, max_new_tokens=4, batch_size=2)
    asked = []

    def stage_that_stops(title, total):
        batches = []
        asked.append((title, total))

        def advance(done=1):
            batches.append(done)
            if len(batches) == 3:
                raise KeyboardInterrupt

        return advance

    with pytest.raises(KeyboardInterrupt):
        evaluate(str(pair[1]), [], tmp_path, questions, stage=stage_that_stops)
    assert asked == [("model answers", 6)]
    asked.clear()

    def stage(title, total):
        asked.append((title, total))
        return lambda done=1: None

    (row,) = evaluate(str(pair[1]), [], tmp_path, questions, stage=stage)
    assert asked == [("model answers", 2), ("model answers", 6), ("perplexity of model", 12)], "4 were answered before"
    whole = evaluate(str(pair[1]), [], tmp_path / "whole", questions)[0]
    answers = [json.loads((folder / "model.json").read_text())["harmful"] for folder in (tmp_path, tmp_path / "whole")]
    assert answers[0] == answers[1]
    assert (row.harmfulness, row.over_refusal) == (whole.harmfulness, whole.over_refusal)


def test_a_judge_is_asked_again_when_it_is_asked_otherwise(evaluated, pair, classifier, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(evaluated[0], copy)
    questions = Questions(limit=6, max_new_tokens=8, judges=(str(classifier),))
    plain, turned = questions, replace(questions, judge_harmful="^harmless$")
    shares = [evaluate(str(pair[1]), [], copy, asked)[0].judged[str(classifier)].value for asked in (plain, turned)]
    assert shares[1] == pytest.approx(1 - shares[0])


def test_a_model_that_changed_is_asked_anew(pair, tmp_path):
    shutil.copytree(pair[1], tmp_path / "model")
    questions = Questions(limit=2, max_new_tokens=4)
    first = evaluate(str(tmp_path / "model"), [], tmp_path / "out", questions)[0]
    shutil.copy(pair[0] / "model.safetensors", tmp_path / "model" / "model.safetensors")
    assert evaluate(str(tmp_path / "model"), [], tmp_path / "out", questions)[0].perplexity != first.perplexity


def test_two_rows_of_one_name_are_refused(adapter):
    with pytest.raises(AsftError, match="two rows would be called 'tuned'"):
        subjects([str(adapter), str(adapter)])


def test_lm_eval_itself_knows_our_tasks(pair, tmp_path):
    """Its own command line, in its own process, without a path to our folder."""
    command = [sys.executable, "-m", "lm_eval", "--model", "hf", "--tasks", "asft_safety", "--limit", "3"]
    command += ["--model_args", f"pretrained={pair[1]}", "--apply_chat_template", "--device", "cpu"]
    command += ["--gen_kwargs", "max_gen_toks=4", "--output_path", str(tmp_path)]
    subprocess.run(command, check=True, capture_output=True, text=True)
    results = json.loads(next(tmp_path.rglob("results_*.json")).read_text())["results"]
    assert {"asft_harmfulness", "asft_over_refusal"} <= set(results)
    assert 0 <= results["asft_harmfulness"]["harmfulness,none"] <= 1


@pytest.mark.parametrize(
    ("command", "options", "message"),
    [
        ("eval", ["--judge-harmful", "("], "--judge-harmful goes with --judge; give that too, or leave it out"),
        ("eval", ["--judge-load-in-4bit"], "--judge-load-in-4bit goes with --judge; give that"),
        ("eval", ["--num-fewshot", "0"], "--num-fewshot goes with --tasks; give that"),
        ("landscape", ["--direction", "d.safetensors", "--rank", "4"], "--rank goes with --base; give that"),
    ],
)
def test_options_that_would_do_nothing(pair, command, options, message):
    result = CliRunner().invoke(asft, [command, "--model", str(pair[1]), *options])
    assert (result.exit_code, message in result.stderr) == (2, True)
