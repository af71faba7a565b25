"""What `axolotl asft eval` keeps, and lets go: nothing is asked twice, and no two models are in memory at once."""

import contextlib
import gc
import itertools
import json
import math
import shutil
import weakref
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub.constants
import pytest
import torch
import yaml
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from axolotl_asft.cli import asft
from axolotl_asft.errors import AsftError
from axolotl_asft.evaluation import evaluate as evaluation
from axolotl_asft.evaluation.evaluate import Questions, evaluate
from axolotl_asft.evaluation.judges import Judge
from axolotl_asft.evaluation.kept import Interview, answer_key, tokenizer_state
from axolotl_asft.evaluation.models import Subject, adapted, load_model, load_tokenizer, model_state, other_base
from axolotl_asft.files import file_sha256, locked

QUESTIONS = Questions(limit=2, max_new_tokens=4)


def make_adapter(model: Path, folder: Path, **settings) -> Path:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"], **{"init_lora_weights": False} | settings)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        get_peft_model(AutoModelForCausalLM.from_pretrained(model), config).save_pretrained(folder)
    return folder


@pytest.fixture
def adapter(pair, tmp_path) -> Path:
    return make_adapter(pair[1], tmp_path / "tuned")


def edit(file: Path, **changes) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def twice(adapter: Path, file: Path) -> Path:
    """The weights of an adapter, times two."""
    save_file({name: 2 * tensor for name, tensor in load_file(adapter / "adapter_model.safetensors").items()}, file)
    return file


class Watch:
    """A stage that remembers what was shown."""

    def __init__(self):
        self.titles = []

    def __call__(self, title, total):
        self.titles.append((title, total))
        return lambda done=1: None


@pytest.fixture
def asked_for(pair, tmp_path):
    """Evaluates into one folder; returns what it had to do."""

    def ask(questions, *adapters):
        watch = Watch()
        evaluate(str(pair[1]), list(map(str, adapters)), tmp_path / "out", questions, stage=watch)
        return watch.titles

    return ask


# ----------------------------------------------------------------------------------------------------------- memory
def test_one_model_at_a_time(pair, classifier, tmp_path, monkeypatch):
    """No chat model lives when a judge is loaded or another chat model, and no judge when the next one is."""
    living, found = [], []

    def watched(name, load):
        def loading(*arguments, **options):
            gc.disable()  # what is gone is gone because it was let go
            found.append((name, [kind for kind, model in living if model() is not None]))
            loaded = load(*arguments, **options)
            living.append((name, weakref.ref(getattr(loaded, "model", loaded) if name == "judge" else loaded)))
            return loaded

        return loading

    monkeypatch.setattr(evaluation, "load_model", watched("chat", load_model))
    monkeypatch.setattr(Judge, "load", watched("judge", Judge.load))
    shutil.copytree(classifier, tmp_path / "another")
    adapter = make_adapter(pair[1], tmp_path / "taken-out", init_lora_weights="pissa")
    questions = replace(QUESTIONS, judges=(str(classifier), str(tmp_path / "another")))
    try:
        evaluate(str(pair[1]), [str(adapter)], tmp_path / "out", questions)
    finally:
        gc.enable()
    assert found == [("chat", []), ("chat", []), ("judge", []), ("judge", [])]


# ------------------------------------------------------------------------------------------------------------- kept
def test_only_what_is_new_is_asked(asked_for, classifier, tmp_path):
    assert asked_for(QUESTIONS) == [("model answers", 2), ("model answers", 2), ("perplexity of model", 4)]
    (tmp_path / "more.txt").write_text("the cat\nthe dog\n")
    more = replace(QUESTIONS, harmful=("harmful", str(tmp_path / "more.txt")), judges=(str(classifier),))
    judge = f"judge: {classifier.name}"
    assert asked_for(more) == [("model answers", 2), ("perplexity of model", 2), (judge, 4)]
    assert asked_for(more) == []
    assert asked_for(QUESTIONS) == []
    assert asked_for(replace(more, harmful=("harmful",))) == []
    # what is asked of a set with other prompts, or otherwise, is new
    (tmp_path / "more.txt").write_text("the cat\nthe house\n")
    assert asked_for(more) == [("model answers", 1), ("perplexity of model", 2), (judge, 2)], "one is in the cache"
    assert asked_for(replace(more, max_new_tokens=3))[0] == ("model answers", 2)


def test_a_task_more_is_asked_alone(asked_for, tmp_path):
    task = "dataset_path: json\ndataset_kwargs: {data_files: {test: DATA}}\ntest_split: test\ndoc_to_target: 0\n"
    task += "output_type: multiple_choice\ndoc_to_choice: ['yes', 'no']\n"
    (tmp_path / "data.jsonl").write_text('{"q": "the cat"}\n{"q": "the dog"}\n')
    for name in ("first", "second"):
        content = f"task: {name}\ndoc_to_text: '{{{{q}}}} is {name}'\n" + task
        (tmp_path / f"{name}.yaml").write_text(content.replace("DATA", str(tmp_path / "data.jsonl")))
    one = replace(QUESTIONS, tasks=(str(tmp_path / "first.yaml"),))
    both = replace(one, tasks=(*one.tasks, str(tmp_path / "second.yaml")))
    assert ("model weighs choices", 4) in asked_for(one)
    assert asked_for(both) == [("model weighs choices", 4)]
    rows = json.loads((tmp_path / "out" / "results.json").read_text())["rows"]
    assert set(rows[0]["tasks"]) == {"first", "second"}
    assert "higher_is_better" not in (tmp_path / "out" / "results.md").read_text()


def test_a_score_that_is_no_number_is_kept_as_one(tmp_path):
    """null in the file, which is JSON, and NaN again for the table."""
    kept = Interview(tmp_path / "row.json", "k", tasks={"asked": {"t": {"ppl": math.nan, "acc": 0.5}}})
    kept.save()
    assert json.loads((tmp_path / "row.json").read_text())["tasks"] == {"asked": {"t": {"ppl": None, "acc": 0.5}}}
    found = Interview.open(tmp_path / "row.json", "k", None).tasks["asked"]["t"]
    assert math.isnan(found["ppl"])
    assert found["acc"] == 0.5


def test_a_task_that_changed_is_asked_anew(asked_for, tmp_path):
    """Its file, its data, and whatever lies beside it that it may take from."""
    task = {
        "task": "one", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(tmp_path / "data.jsonl")}},
        "test_split": "test", "doc_to_text": "{{q}}", "doc_to_target": 0, "output_type": "multiple_choice",
        "doc_to_choice": ["yes", "no"],
    }  # fmt: skip
    (tmp_path / "data.jsonl").write_text('{"q": "the cat"}\n')
    (tmp_path / "one.yaml").write_text(yaml.safe_dump(task))
    questions = replace(QUESTIONS, tasks=(str(tmp_path / "one.yaml"),))

    def accuracy():
        asked_for(questions)
        return json.loads((tmp_path / "out" / "results.json").read_text())["rows"][0]["tasks"]["one"]["acc"]

    first = accuracy()
    assert asked_for(questions) == []
    (tmp_path / "one.yaml").write_text(yaml.safe_dump(task | {"doc_to_target": 1}))
    assert accuracy() == 1 - first
    (tmp_path / "data.jsonl").write_text('{"q": "the dog"}\n')
    assert ("model weighs choices", 2) in asked_for(questions)
    function = "!function functions.target"
    (tmp_path / "functions.py").write_text("def target(doc): return 0\n")
    (tmp_path / "one.yaml").write_text(
        yaml.safe_dump(task | {"doc_to_target": function}).replace(f"'{function}'", function)
    )
    taken = accuracy()
    (tmp_path / "functions.py").write_text("def target(doc): return 1\n")
    assert accuracy() == 1 - taken


def test_whatever_changes_the_answers_changes_a_model_s_state(pair, hub_cache, tmp_path):
    folder = shutil.copytree(pair[1], tmp_path / "model")
    (folder / "pytorch_model.bin").write_bytes(b"1")
    seen = [model_state(str(folder))]
    for name in ("pytorch_model.bin", "config.json", "generation_config.json", "tokenizer.json"):
        (folder / name).write_bytes((folder / name).read_bytes() + b" ")
        seen.append(model_state(str(folder)))
    assert all(one != other for one, other in itertools.pairwise(seen))
    (folder / "notes.md").write_text("what nobody reads")
    assert model_state(str(folder)) == seen[-1]
    assert [model_state(name) for name in (hub_cache, f"{hub_cache}@v1")] == [["0" * 40], ["1" * 40]]


def test_two_evaluations_do_not_write_one_folder(pair, tmp_path):
    with (
        locked(tmp_path / ".lock", "busy"),
        pytest.raises(AsftError, match="another evaluation is running in"),
    ):
        evaluate(str(pair[1]), [], tmp_path, QUESTIONS)
    evaluate(str(pair[1]), [], tmp_path, QUESTIONS)


def test_the_adapter_lies_where_axolotl_puts_it(pair, tmp_path, monkeypatch):
    """A config without output_dir trains into ./model-out; one without an adapter has none to ask."""
    monkeypatch.chdir(tmp_path)
    make_adapter(pair[1], tmp_path / "model-out")
    config = tmp_path / "config.yml"
    short = ("--limit", 1, "--max-new-tokens", 2, "--json", "-o")
    config.write_text(f"base_model: {pair[1]}\nadapter: lora\n")
    found = json.loads(run(config, *short, tmp_path / "one").stdout)
    assert [row["adapter"] for row in found["rows"]] == [None, "model-out"]
    config.write_text(f"base_model: {pair[1]}\n")
    alone = run(config, *short, tmp_path / "two")
    assert [row["adapter"] for row in json.loads(alone.stdout)["rows"]] == [None]
    assert f"{config} trains no adapter: {pair[1]} is evaluated alone" in alone.stderr


def test_an_adapter_s_config_belongs_to_it(asked_for, adapter):
    """lora_alpha changes every answer; the stamp of the training, and the base's name, none."""
    asked_for(QUESTIONS, adapter)
    edit(adapter / "adapter_config.json", asft={"lambda_reg": 1}, base_model_name_or_path="elsewhere")
    assert asked_for(QUESTIONS, adapter) == []
    edit(adapter / "adapter_config.json", lora_alpha=800)
    assert ("tuned answers", 2) in asked_for(QUESTIONS, adapter)


def test_a_tokenizer_belongs_to_what_was_asked(pair):
    """Its template, its special tokens, and the numbers of its words; no trace of how it was called last."""
    tokenizers = [load_tokenizer(str(pair[1])) for _ in range(4)]
    plain, template, special, words = tokenizers
    template.chat_template += " "
    special.eos_token = "<|user|>"
    cuts = json.loads(words.backend_tokenizer.to_str())
    vocabulary = cuts["model"]["vocab"]
    vocabulary["cat"], vocabulary["dog"] = vocabulary["dog"], vocabulary["cat"]
    words._tokenizer = Tokenizer.from_str(json.dumps(cuts))
    assert words.encode("cat") == plain.encode("dog")
    states = {tokenizer_state(tokenizer) for tokenizer in tokenizers}
    assert len(states) == 4
    plain(["the cat", "the"], padding=True, truncation=True, max_length=8)
    assert tokenizer_state(plain) in states
    assert len({answer_key(str(pair[1]), Subject("model"), "", {}, state) for state in states}) == 4


def test_another_tokenizer_is_asked_anew(asked_for, pair, adapter):
    """That of an adapter's folder, or of --tokenizer, under one template."""
    words = load_tokenizer(str(pair[1]))
    words.save_pretrained(adapter)
    asked_for(QUESTIONS, adapter)
    assert asked_for(QUESTIONS, adapter) == []
    words.eos_token = "<|user|>"
    words.save_pretrained(adapter)
    assert ("tuned answers", 2) in asked_for(QUESTIONS, adapter)


def test_a_tokenizer_without_a_backend_has_a_state_too():
    def slow(**words):
        return SimpleNamespace(get_vocab=lambda: words, special_tokens_map={"eos_token": "b"}, chat_template="")

    assert tokenizer_state(slow(a=0, b=1)) == tokenizer_state(slow(b=1, a=0)) != tokenizer_state(slow(a=1, b=0))


def test_results_say_which_adapter_was_asked(asked_for, adapter, tmp_path):
    asked_for(QUESTIONS, adapter)
    rows = json.loads((tmp_path / "out" / "results.json").read_text())["rows"]
    assert [row["adapter_sha256"] for row in rows] == [None, file_sha256(adapter / "adapter_model.safetensors")]


def test_an_adapter_that_is_written_anew_while_others_are_asked(pair, adapter, tmp_path, monkeypatch):
    """Its answers are those of the weights that results.json names."""
    later = Path(shutil.copytree(adapter, tmp_path / "later"))
    newer = twice(adapter, tmp_path / "newer.safetensors")

    class Replacing(Watch):
        def __call__(self, title, total):
            if title.startswith("perplexity of first"):
                shutil.copyfile(newer, later / "adapter_model.safetensors")
            return super().__call__(title, total)

    evaluate(str(pair[1]), [f"first={adapter}", str(later)], tmp_path / "out", QUESTIONS, stage=Replacing())
    rows = json.loads((tmp_path / "out" / "results.json").read_text())["rows"]
    assert rows[2]["adapter_sha256"] == file_sha256(newer) != rows[1]["adapter_sha256"]


def test_an_adapter_that_is_written_anew_while_it_is_read(pair, adapter, tmp_path, monkeypatch):
    copy = Path(shutil.copytree(adapter, tmp_path / "copy"))
    newer = twice(adapter, tmp_path / "newer.safetensors")

    @contextlib.contextmanager
    def replaced(model, subject):
        with adapted(model, subject) as ready:
            if subject.adapter is not None:
                shutil.copyfile(newer, copy / "adapter_model.safetensors")
            yield ready

    monkeypatch.setattr(evaluation, "adapted", replaced)
    with pytest.raises(AsftError, match="was written anew while it was read; wait for its training"):
        evaluate(str(pair[1]), [str(copy)], tmp_path / "out", QUESTIONS)
    assert not (tmp_path / "out" / "copy.json").exists(), "nothing was asked of it"


def test_a_judge_is_asked_again_when_it_changed(asked_for, classifier, tmp_path):
    judge = tmp_path / "judge"
    shutil.copytree(classifier, judge)
    questions = replace(QUESTIONS, judges=(str(judge),))
    asked_for(questions)
    edit(judge / "config.json", id2label={"0": "harmful", "1": "harmless"})
    assert asked_for(questions) == [("judge: judge", 2)]
    assert asked_for(replace(questions, judge_text="{prompt} {answer}")) == [("judge: judge", 2)]
    assert asked_for(replace(questions, judge_load_in_4bit=True)) == [("judge: judge", 2)]
    assert asked_for(questions) == []


def test_what_earlier_versions_kept_is_asked_anew(asked_for, tmp_path):
    (tmp_path / "out").mkdir()
    old = {"key": "0" * 64, "adapter": None, "harmful": {"harmful": [{"prompt": "a", "asked": "a", "answer": "a"}]}}
    old |= {"borderline": {}, "tasks": {}, "perplexity": 2.0, "judged": {"a judge": [True]}}
    (tmp_path / "out" / "model.json").write_text(json.dumps(old))
    assert asked_for(QUESTIONS)[0] == ("model answers", 2)


# ---------------------------------------------------------------------------------------------------------- command
def run(*arguments, **options):
    return CliRunner().invoke(asft, ["eval", "--limit", "1", "--max-new-tokens", "2", *map(str, arguments)], **options)


def test_what_another_version_was_answered_is_asked_anew(pair, monkeypatch):
    subject, state = Subject("model"), tokenizer_state(load_tokenizer(str(pair[1])))
    before = answer_key(str(pair[1]), subject, "", {}, state)
    assert answer_key(str(pair[1]), subject, "", {}, state) == before
    monkeypatch.setattr("axolotl_asft.evaluation.kept.installed_versions", lambda: {"transformers": "99"})
    of_other_libraries = answer_key(str(pair[1]), subject, "", {}, state)
    monkeypatch.setattr("axolotl_asft.evaluation.kept.__version__", "99")
    assert len({before, of_other_libraries, answer_key(str(pair[1]), subject, "", {}, state)}) == 3


@pytest.mark.parametrize("change", [{"borderline": None}, {"tasks": 3}, {"harmful": {"a": {"answers": []}}}])
def test_a_kept_file_that_is_not_whole(tmp_path, change):
    file = tmp_path / "model.json"
    Interview(file, "key").save()
    edit(file, **change)
    with pytest.raises(AsftError, match=r"model\.json is damaged \(.*; delete it"):
        Interview.open(file, "key", None)


def test_a_judge_takes_batch_size_and_4_bits(pair, classifier, tmp_path, monkeypatch):
    judges, load = [], Judge.load
    monkeypatch.setattr(Judge, "load", lambda *arguments: judges.append(load(*arguments)) or judges[-1])
    (tmp_path / "text.txt").write_text("{prompt}\n{answer}\n")
    arguments = ["--model", pair[1], "--judge", classifier, "--judge-text", f"@{tmp_path / 'text.txt'}"]
    result = run(*arguments, "--judge-load-in-4bit", "--batch-size", "3", "-o", tmp_path / "out")
    assert result.exit_code == 0, result.output
    (judge,) = judges
    assert judge.batch_size == 3
    assert judge.model.config.quantization_config.load_in_4bit
    assert judge.way.text == "{prompt}\n{answer}"


@pytest.fixture
def hub_cache(pair, tmp_path, monkeypatch) -> str:
    """A repository in the Hub's cache: the base model as main, the aligned one as v1."""
    repo = tmp_path / "cache" / "models--me--chat"
    for revision, commit, folder in (("main", "0" * 40, pair[0]), ("v1", "1" * 40, pair[1])):
        shutil.copytree(folder, repo / "snapshots" / commit)
        (repo / "refs").mkdir(exist_ok=True)
        (repo / "refs" / revision).write_text(commit)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    return "me/chat"


def test_a_revision_is_taken(hub_cache, pair):
    aligned = load_model(str(pair[1])).state_dict()
    name = "model.layers.0.self_attn.q_proj.weight"
    assert torch.equal(load_model(f"{hub_cache}@v1").state_dict()[name], aligned[name])
    assert not torch.equal(load_model(hub_cache).state_dict()[name], aligned[name])
    assert load_tokenizer(f"{hub_cache}@v1").chat_template


def test_the_config_s_revision_is_taken(hub_cache, tmp_path):
    config = tmp_path / "config.yml"
    config.write_text(f"base_model: {hub_cache}\nrevision_of_model: v1\n")
    result = run(config, "-o", tmp_path / "out", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["model"] == f"{hub_cache}@v1"


def test_8_bits_are_not_dropped_in_silence(pair, tmp_path):
    config = tmp_path / "config.yml"
    config.write_text(f"base_model: {pair[1]}\nload_in_8bit: true\n")
    result = run(config, "-o", tmp_path / "out")
    assert result.exit_code == 2
    assert result.stderr.count("\n") == 1
    assert "has load_in_8bit, which eval does not support; give --no-load-in-4bit" in result.stderr
    assert run(config, "--no-load-in-4bit", "-o", tmp_path / "out").exit_code == 0


# ------------------------------------------------------------------------------------------- an adapter of another
def test_an_adapter_of_another_model_is_told(pair, adapter, tmp_path):
    wide, same = tmp_path / "wide", tmp_path / "same"
    for folder in (wide, same):
        shutil.copytree(pair[1], folder)
    edit(wide / "config.json", vocab_size=65)
    edit(same / "config.json", dtype="bfloat16")

    def told(base, model):
        edit(adapter / "adapter_config.json", base_model_name_or_path=str(base))
        return other_base(str(model), Subject("tuned", adapter)) is not None

    assert told("me/chat", "me/other")
    assert told("me/chat", "me/other@v1")
    assert not told("me/Chat", "me/chat@v1")
    assert told(pair[1], wide)
    for base, model in ((pair[1], same), (pair[0], pair[1]), ("me/chat", pair[1]), (tmp_path / "gone", pair[1])):
        assert not told(base, model)
    assert other_base("me/other", Subject("model")) is None
    # a model that reads images says its text model's sizes further in
    for folder, layers in ((wide, 2), (same, 3)):
        edit(folder / "config.json", vocab_size=64, text_config={"vocab_size": 64, "num_hidden_layers": layers})
    assert told(wide, same)
    assert not told(wide, wide)


def test_an_adapter_of_another_model_is_asked_all_the_same(pair, adapter, tmp_path, caplog):
    shutil.copytree(pair[1], tmp_path / "other")
    edit(tmp_path / "other" / "config.json", vocab_size=65)
    edit(adapter / "adapter_config.json", base_model_name_or_path=str(tmp_path / "other"))
    assert run("--model", pair[1], "--adapter", adapter, "-o", tmp_path / "out").exit_code == 0
    (line,) = [record.getMessage() for record in caplog.records if record.name == "axolotl.asft"]
    assert line.startswith(f"{adapter} was trained on {tmp_path / 'other'} but evaluated on {pair[1]}")
    assert "\n" not in line
