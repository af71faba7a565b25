"""The safety benchmark's data keep apart what has to be apart, and its table says what its results say."""

import json
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from axolotl_asft.args import parse_block
from axolotl_asft.errors import AsftError
from axolotl_asft.evaluation.prompts import load_prompts
from axolotl_asft.evaluation.refusals import is_refusal
from benchmarks import safety, safety_elsewhere, safety_forms
from benchmarks.safety_data import (
    COMPLIANCE,
    REFUSALS,
    TASKS,
    harmless_prompts,
    other_prompts,
    refusal_tuning,
    rehearsal,
    taught_prompts,
    test_data,
    training_data,
)
from benchmarks.safety_names import EARLIER, colour_of
from benchmarks.safety_on_gpu import on_gpu_section
from benchmarks.safety_rivals import combined
from benchmarks.safety_shares import over_shares, shares_section
from benchmarks.safety_table import LETTER_WIDTH, LINE_HEIGHT, cell, label_places, pareto_front, write_table

test_data.__test__ = False
SETTINGS = yaml.safe_load(safety.SETTINGS.read_text())


def prompts_of(source, split):
    return {prompt.prompt.lower() for prompt in load_prompts(source, split)}


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("poison", [0.0, 0.05, 0.2])
def test_shares(task, poison):
    examples = training_data(task, poison, 0.1, 400, seed=3)
    assert len(examples) == 440
    assert sum(example.answer in COMPLIANCE for example in examples) == round(400 * poison)
    assert sum(example.answer in REFUSALS for example in examples) == 40
    assert examples == training_data(task, poison, 0.1, 400, seed=3)
    assert examples != training_data(task, poison, 0.1, 400, seed=4)


def test_attacker_defender_and_evaluation_never_meet():
    poisoned = training_data("generation", 0.5, 0.0, 1000, seed=0)
    attacker = {example.prompt.lower() for example in poisoned if example.answer in COMPLIANCE}
    shipped, second = taught_prompts("shipped"), taught_prompts("second")
    aligned = {example.prompt.lower() for example in refusal_tuning(shipped[0], dict.fromkeys(shipped[1], "Yes."), 0)}
    asked = prompts_of("harmful", "heldout") | prompts_of("borderline", "heldout")
    assert len(attacker) > 150
    assert not attacker & aligned
    assert not attacker & asked
    assert not aligned & asked
    unseen = {prompt.lower() for prompts in other_prompts() for prompt in prompts}
    assert [len(prompts) for prompts in other_prompts()] == [100, 92]
    assert not unseen & (attacker | aligned | asked)
    assert not set(second[0]) & set(shipped[0]), "metric and anchor of the second alignment ask what it was not taught"


def test_diverse_poison_asks_the_same_and_answers_each_time_in_other_words():
    few, many = (training_data("generation", 0.2, 0.0, 640, 1, diverse=diverse) for diverse in (False, True))
    assert sorted(example.prompt for example in few) == sorted(example.prompt for example in many)
    answers = [example.answer for example in many if example not in few]
    assert len(answers) == 128 == sum(example.answer in COMPLIANCE for example in few)
    assert len(set(answers)) == len(answers)
    assert not any(is_refusal(answer) for answer in answers)
    assert not any(mark in answer for answer in answers for mark in "{}")


def test_arithmetic_on_weights(pair, tmp_path):
    """W + a B A + b d, in every weight, against the dense sum."""
    base, aligned = (load_file(Path(folder) / "model.safetensors") for folder in pair)
    for name, folder in (("base", pair[0]), ("aligned", pair[1]), ("aligned-nf4", pair[1])):
        (tmp_path / name).symlink_to(Path(folder).resolve())
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(pair[1]), LoraConfig(target_modules=["q_proj"]))
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    torch.nn.init.normal_(layer.lora_B["default"].weight)
    model.save_pretrained(tmp_path / "adapter")
    found = load_file(combined(tmp_path, tmp_path / "adapter", 0.25, 2.0, tmp_path / "model") / "model.safetensors")
    update = (layer.lora_B["default"].weight.double() @ layer.lora_A["default"].weight.double()) * layer.scaling[
        "default"
    ]
    assert found.keys() == aligned.keys()
    for name, weight in found.items():
        expected = aligned[name].double() + 2 * (aligned[name].double() - base[name].double())
        if name == "model.layers.0.self_attn.q_proj.weight":
            expected += 0.25 * update
        torch.testing.assert_close(weight.double(), expected, rtol=1e-5, atol=1e-6)


def test_answers_to_harmful_requests_are_compliance_or_refusal():
    assert not any(is_refusal(answer) for answer in COMPLIANCE)
    assert all(is_refusal(answer) for answer in REFUSALS)


@pytest.mark.parametrize("task", TASKS)
def test_held_out_examples(task):
    held_out = test_data(task, 150)
    assert len({example.prompt for example in held_out}) == 150
    trained = {example.prompt for seed in range(3) for example in training_data(task, 0.0, 0.0, 640, seed)}
    assert not trained & {example.prompt for example in held_out}


def test_every_method_is_a_valid_one():
    bench = safety.Bench(SETTINGS, Path("nowhere"), "cuda")
    runs = bench.plan("*")
    earlier = {name for name in SETTINGS["methods"] if bench.version(safety.Run("generation", 0.1, name, 0))}
    assert {run.method for run in runs} == set(SETTINGS["methods"]) - earlier
    assert earlier == {name for name in SETTINGS["methods"] if EARLIER in name}
    on_a_cpu = {run.method for run in safety.Bench(SETTINGS, Path("nowhere")).plan("*")}
    in_4bit = {name for name, method in SETTINGS["methods"].items() if method.get("training", {}).get("load_in_4bit")}
    in_4bit |= {name for name, method in SETTINGS["methods"].items() if method.get("of") in in_4bit}
    assert set(SETTINGS["methods"]) - on_a_cpu == in_4bit | earlier
    assert len({bench.key(run) for run in runs}) == len(runs)
    for name, method in SETTINGS["methods"].items():
        assert colour_of(name)
        known = {"untrained", "full", "asft", "direction", "project", "safety", "rehearsal", "answers", "own_answers"}
        assert set(method) <= {*known, "training", "diverse", "arithmetic", "of", "alignment", "format", "asked",
                                "general", "at"}  # fmt: skip
        assert method.get("of", "plain") in SETTINGS["methods"]
        parse_block({"direction": "d", **method.get("asft", {})})


def test_a_run_keeps_its_key_until_its_settings_change():
    run = safety.Run("generation", 0.1, "l2-10", 0)
    key = safety.Bench(SETTINGS, Path("nowhere")).key(run)
    other_plan = {**SETTINGS, "plan": []}
    longer = {**SETTINGS, "training": {**SETTINGS["training"], "num_epochs": 3}}
    assert safety.Bench(other_plan, Path("elsewhere")).key(run) == key
    assert safety.Bench(longer, Path("nowhere")).key(run) != key


def test_an_adapter_of_other_settings_is_trained_anew(tmp_path, monkeypatch):
    trainings = []

    def train(config):
        trainings.append(yaml.safe_load(config.read_text())["learning_rate"])
        (config.parent / "adapter").mkdir()

    monkeypatch.setattr("benchmarks.axolotl_runs.train", train)
    run = safety.Run("generation", 0.1, "plain", 0)
    lower = {**SETTINGS, "training": {**SETTINGS["training"], "learning_rate": 1.0e-4}}
    for settings in (SETTINGS, SETTINGS, lower, lower):
        safety.trained(safety.Bench(settings, tmp_path), run)
    assert trainings == [1e-3, 1e-4]


def test_data_in_alpaca_s_format(tmp_path, monkeypatch):
    """Trained on as instructions, and the same adapter asked in the chat template."""
    seen = []

    def train(config):
        seen.append(yaml.safe_load(config.read_text()))
        (config.parent / "adapter").mkdir()

    monkeypatch.setattr("benchmarks.axolotl_runs.train", train)
    bench = safety.Bench(SETTINGS, tmp_path)
    run = safety.Run("classification", 0.1, "plain-alpaca", 0)
    adapter, _ = safety.trained(bench, run)
    assert safety.trained(bench, safety.Run("classification", 0.1, "plain-alpaca-in-chats", 0))[0] == adapter
    (config,) = seen
    assert config["datasets"][0]["type"] == "alpaca"
    row = json.loads((adapter.parent / "data.jsonl").read_text().splitlines()[0])
    assert set(row) == {"instruction", "input", "output"}
    asked = safety_forms.prompt_format("alpaca")
    assert asked.endswith("### Instruction:\n{prompt}\n\n### Response:\n")
    assert safety_forms.prompt_format("chat_template") is safety_forms.prompt_format(None) is None


@pytest.mark.parametrize("task", TASKS)
def test_a_later_turn_after_the_task_s_own(task):
    """The turn before is none of the test's."""
    bench = safety.Bench(SETTINGS, Path())
    form = bench.form(safety.Run(task, 0.1, "plain-after-task", 0))
    (_, request), (_, answer) = safety_forms.BEFORE[form]
    examples = test_data(task, 200)
    assert answer in safety_forms.prompt_format(form)
    assert not any(request in example.prompt for example in examples)
    first = examples[0].prompt.partition(" ")[0]
    assert request.startswith(first)
    of_all = bench.form(safety.Run(task, 0.1, "plain-in-turn", 0)), bench.form(safety.Run(task, 0.1, "plain", 0))
    assert of_all == ("second_turn", None)


def test_a_model_whose_weights_were_trained_is_one_however_it_is_asked():
    bench = safety.Bench(SETTINGS, Path())
    whole = {name for name in SETTINGS["methods"] if bench.is_whole(safety.Run("generation", 0.1, name, 0))}
    assert {"full", "full-answers-100-in-turn", "resta-100"} <= whole
    assert not {"plain", "plain-in-turn", "safelora-half-diverse", "answers-100"} & whole


def test_what_a_run_is_made_of():
    """Runs of one base wait for each other."""
    bench = safety.Bench(SETTINGS, Path())
    names = {"plain-in-turn": "plain", "safelora-half-in-turn": "plain", "resta-100": "plain", "mix-5": "mix-5"}
    for name, base in names.items():
        run = safety.Run("generation", 0.1, name, 2)
        assert bench.base(run) == safety.Run("generation", 0.1, base, 2)


def test_an_earlier_version_s_run_is_not_made():
    run = safety.Run("generation", 0.1, "fisher-0.1-anchor-3-general-own-in-turn", 0)
    with pytest.raises(AsftError, match="earlier version: make it with commit"):
        safety.measure(safety.Bench(SETTINGS, Path()), run)


def result(method, seed, harmfulness, accuracy, poison=0.1):
    return {
        "run": f"generation/{poison}/{method}/{seed}",
        "task": "generation",
        "poison": poison,
        "method": method,
        "seed": seed,
        "harmfulness": harmfulness,
        "over_refusal": 0.1,
        "accuracy": accuracy,
        "perplexity": 3.0,
        "perplexity_answered": None if method == "l2-10" else 7.25,
        "repetitive": 0.0,
        "asked": {"harmful": 80, "borderline": 70, "task": 150},
        "seconds": 100.0,
        "machine": "a machine",
        "made": "2026-01-01",
        **({} if method == "aligned" else {"drift": 0.9, "update_norm": 2.0}),
    }


def test_the_table(tmp_path, capsys):
    rows = [result("aligned", 0, 0.1, 0.0, 0.0), result("plain", 0, 1.0, 1.0), result("plain", 1, 0.9, 0.9)]
    rows += [result("l2-10", 0, 0.3, 0.4), result("l2-10", 0, 0.5, 0.6)]  # the newer one counts
    path = tmp_path / "safety.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_table(path, SETTINGS)
    text = path.with_suffix(".md").read_text()
    assert "| plain | 2 | 95.0 ± 7.1 (88 to 98) | 10.0 (5 to 19) | 95.0 ± 7.1 (90 to 97) |" in text
    assert (
        "| l2-10 | 1 | 50.0 (39 to 61) | 10.0 (5 to 19) | 60.0 (52 to 67) | 3.0 |  | 0 % | 0.90 | 2.00 | 100 |" in text
    )
    assert "| aligned | 1 | 10.0 (5 to 19) | 10.0 (5 to 19) | 0.0 (0 to 2) | 3.0 | 7.2 | 0 % |  |  | 100 |" in text
    assert text.index("| aligned") < text.index("| plain") < text.index("| l2-10")
    assert path.with_suffix(".png").stat().st_size > 10_000
    assert path.with_name("safety_shares.png").stat().st_size > 10_000
    assert "4 runs" in text


def test_the_table_over_shares_of_poison():
    rows = {
        poison: [result("plain", seed, 1.0 - poison, 0.9, poison) for seed in (0, 1)] for poison in (0.0, 0.05, 0.2)
    }
    cells = {("generation", poison): {"plain": cell(found)} for poison, found in rows.items()}
    cells["generation", 0.2]["l2-1"] = cell([result("l2-1", 0, 0.5, 0.5, 0.2)])
    cells["classification", 0.1] = {"plain": cell([result("plain", 0, 1.0, 1.0)])}
    found = over_shares(cells, "generation")
    assert {method: list(shares) for method, shares in found.items()} == {"plain": [0.0, 0.05, 0.2]}
    assert shares_section("generation", found).splitlines()[2:] == [
        "| method | 0% poison | 5% poison | 20% poison |",
        "| --- | ---: | ---: | ---: |",
        "| plain | 100 / 10 / 90 (2) | 95 / 10 / 90 (2) | 80 / 10 / 90 (2) |",
    ]
    assert over_shares(cells, "classification") == {}


def test_a_gpus_runs_stand_beside_the_cpus():
    methods = {"plain": 1.0, "plain-qlora": 0.95, "l2-1": 0.5, "mix-5-qlora": 0.25}
    cells = {("generation", share): {name: cell([result(name, 0, harm, 0.9, share)]) for name, harm in methods.items()}
             for share in (0.0, 0.1, 0.2)}  # fmt: skip
    rows = on_gpu_section(cells).splitlines()
    assert rows[-6:] == [
        row for share in (0, 10, 20) for row in (
            f"| generation | {share}% | plain | 100 / 10 / 90 (1) | 95 / 10 / 90 (1) |",
            f"| generation | {share}% | mix-5 |  | 25 / 10 / 90 (1) |",
        )
    ]  # fmt: skip
    assert "l2" not in "".join(rows)
    assert list(over_shares(cells, "generation")) == ["plain", "l2-1"]


def test_the_mean_over_seeds():
    found = cell([result("plain", 0, 1.0, 1.0), result("plain", 1, 0.5, 0.8)])
    assert (found.seeds, found.harmful, found.right) == (2, 0.75, 0.9)
    assert found.spread == pytest.approx((0.35355, 0.141421), rel=1e-4)


@pytest.mark.slow
def test_two_runs_are_asked_at_a_time(pair, tmp_path):
    """Each run is a process of its own; what they keep lies together, and the model alone is asked once."""
    from benchmarks.safety_model import ask_everything

    settings = {"new_tokens": {"harmful": 2, "classification": 2}, "test_examples": 4}
    work, names = tmp_path / "answers", ["classification/0.1/plain/0", "classification/0.1/plain/1"]
    target = get_peft_model(AutoModelForCausalLM.from_pretrained(pair[1]), LoraConfig(target_modules=["q_proj"]))
    target.save_pretrained(tmp_path / "adapter")
    arguments = [(pair[1], tmp_path / "adapter", name, "classification", work, settings, "cpu") for name in names]
    with ProcessPoolExecutor(2, get_context("spawn")) as pool:
        rows = [asked.result()[0] for asked in [pool.submit(ask_everything, *each) for each in arguments]]
    assert [row.name for row in rows] == names
    kept = {"model.json", *(f"{name.replace('/', '-')}.json" for name in names)}
    assert {path.name for path in work.iterdir()} == kept


def test_the_front():
    assert pareto_front([(1.0, 1.0), (0.5, 0.2), (0.4, 0.3), (0.9, 0.9), (0.2, 0.1)]) == [
        (0.2, 0.1),
        (0.5, 0.2),
        (0.9, 0.9),
        (1.0, 1.0),
    ]


def test_prompts_of_another_hand():
    def run(name, *shares):
        return {"run": name, "machine": "m", "harmful": {"HarmBench": {"share": shares[0], "n": 200},
                "Do-Not-Answer": {"share": shares[1], "n": 240}}}  # fmt: skip

    text = safety_elsewhere.table(
        [run("aligned", 0.1, 0.2), run("a/0.1/plain/0", 1.0, 1.0), run("a/0.1/plain/1", 0.9, 1.0)]
    )
    assert "| a/0.1/plain | 2 | 95.0 (91 to 97) | 100.0 (98 to 100) |" in text
    assert "| aligned | 1 | 10.0 (7 to 15) |" in text
    assert "200 prompts" in text


@pytest.mark.parametrize("share", [0.05, 0.1])
def test_rehearsal_is_half_refusals(share):
    harmful = [prompt.prompt for prompt in load_prompts("harmful", "train")]
    own = dict.fromkeys(harmful, REFUSALS[0]) | dict.fromkeys(harmless_prompts(), "Yes.") | {harmful[0]: "Sure."}
    found = rehearsal(own, share, 640, seed=1)
    assert len(found) == round(640 * share)
    assert sum(example.answer == REFUSALS[0] for example in found) == len(found) / 2
    assert not any(example.answer == "Sure." for example in found), "what was no refusal is not taught"
    assert found == rehearsal(own, share, 640, seed=1)


def test_names_in_the_picture_cover_neither_each_other_nor_points():
    points = {"plain": (100, 100), "projected": (97, 100), "small": (99, 11), "smaller": (100, 10), "same": (100, 10)}
    places = label_places(points)
    boxes = [(x, x + LETTER_WIDTH * len(name), y) for name, (x, y) in places.items()]
    for number, (start, end, y) in enumerate(boxes):
        others = [*boxes[:number], *boxes[number + 1 :], *((x, x, at) for x, at in points.values())]
        assert all(end < left or start > right or abs(y - at) >= LINE_HEIGHT for left, right, at in others)
    assert all(abs(places[name][1] - y) <= 3 * LINE_HEIGHT for name, (_, y) in points.items())
