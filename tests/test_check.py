"""`axolotl asft check`: says before a run what the run would do, and fails where the run would."""

import copy
import importlib.util
import json
import os
import re
import shutil
from dataclasses import replace

import pytest
import transformers
from click.testing import CliRunner
from families import FAMILIES, save_what_prepares_images, save_what_reads
from lora_models import lora_model
from tiny import axolotl, make_dataset, random_metric, write_config
from torch.utils.flop_counter import FlopCounterMode

from axolotl_asft import AlignmentDirection, AlignmentPenalty, extract_direction
from axolotl_asft.advice import on_foreign_code, on_origin, on_pin
from axolotl_asft.args import parse_block
from axolotl_asft.cli import asft
from axolotl_asft.cost import estimate, tokens_asked
from axolotl_asft.errors import AsftError
from axolotl_asft.strengths import WEIGHTS_ALONE
from axolotl_asft.yaml_config import read_config

WANTS_TORCHVISION = "Llama4ImageProcessorFast"

FLAG = "--trust-remote-code"


@pytest.fixture(autouse=True)
def no_plugins_left():
    """axolotl's plugin manager outlives a test."""
    yield
    from axolotl.integrations.base import PluginManager

    PluginManager.get_instance().plugins.clear()


@pytest.fixture
def checked(pair, dataset, direction_file, tmp_path):
    """Check these changes to a good config; exit status and result."""

    def run(asft_changes: dict | None = None, options: list[str] | None = None, **changes) -> tuple[int, dict]:
        block = {"direction": str(direction_file), **(asft_changes or {})}
        config = write_config(
            tmp_path, changes.pop("base_model", pair[1]), dataset, changes.pop("asft", block), **changes
        )
        result = CliRunner().invoke(asft, ["check", str(config), "--json", *(options or [])])
        return result.exit_code, json.loads(result.stdout)

    return run


@pytest.fixture(scope="module")
def fisher_file(pair, tmp_path_factory):
    """A direction that holds the Fisher metric of random factors."""
    metric = random_metric(extract_direction(*pair, rank=4))
    path = tmp_path_factory.mktemp("fisher") / "fisher.asft.safetensors"
    extract_direction(*pair, rank=4, metrics=[metric]).save(path)
    return path


def warned(found: dict, text: str) -> bool:
    return any(text in line for line in found["warnings"])


def test_a_good_config(checked, direction_file):
    status, found = checked()
    assert (status, found["fine"], found["errors"], found["warnings"]) == (0, True, [], [WEIGHTS_ALONE])
    assert len(found["constrained"]) == found["model"]["lora_layers"] == 14
    assert found["unconstrained"] == {}
    assert found["direction"]["sha256"] == AlignmentDirection.load(direction_file).sha256
    assert found["direction"]["weights"] == "agree"
    assert found["model"]["architecture"] == "LlamaForCausalLM"
    assert 0 < found["cost"]["share_of_step"] < 1


def test_nothing_is_written_and_no_weights_are_read(checked, pair, tmp_path):
    checked()
    assert [path.name for path in tmp_path.iterdir()] == ["config.yml"]


def test_the_parameters_are_those_of_the_model(checked, pair):
    from transformers import AutoModelForCausalLM

    _, found = checked()
    assert found["model"]["parameters"] == AutoModelForCausalLM.from_pretrained(pair[1]).num_parameters()


@pytest.mark.parametrize(
    ("changes", "layers"),
    [
        ({"lora_target_linear": None, "lora_target_modules": ["q_proj", "v_proj"]}, 4),
        ({"lora_target_linear": None, "lora_target_modules": r".*layers\.1.*(up|down)_proj"}, 2),
        ({"lora_target_linear": None, "lora_target_modules": ["q_proj"], "peft_layers_to_transform": [1]}, 1),
        ({"peft_init_lora_weights": "pissa"}, 14),
        ({"bf16": True, "fp16": None, "tf32": True, "lora_mlp_kernel": None}, 14),
        ({"adapter": "lora", "load_in_4bit": None}, 14),
        ({"attn_implementation": "flash_attention_2", "sample_packing": True, "bf16": "auto", "fp16": None}, 14),
        ({"rl": "dpo", "datasets": [{"path": "x.jsonl", "ds_type": "json", "type": {"field_prompt": "q"}}]}, 14),
    ],
)
def test_lora_settings_of_all_kinds_without_a_gpu(checked, changes, layers):
    status, found = checked(**changes)
    assert (status, found["errors"]) == (0, [])
    assert len(found["constrained"]) == found["model"]["lora_layers"] == layers


@pytest.mark.parametrize(
    ("block", "changes", "message"),
    [
        ({"lamda_reg": 1}, {}, "did you mean lambda_reg?"),
        ({"direction": "nowhere.safetensors"}, {}, "no direction file at nowhere.safetensors"),
        ({"direction_sha256": "0" * 64}, {}, "get the pinned file"),
        ({"modules": ["nothing"]}, {}, "matches none of 14 layers"),
        ({"metric": "fisher"}, {}, "which the direction file does not hold"),
        ({}, {"lora_modules_to_save": ["embed_tokens"]}, "1 trainable weights that are not LoRA layers"),
        ({}, {"adapter": None, "load_in_4bit": None}, "set adapter: qlora or adapter: lora"),
        ({}, {"peft_use_dora": True}, "peft_use_dora is not supported"),
        ({}, {"relora": True}, "relora is not supported"),
        ({}, {"deepspeed": "ds.json"}, "there is no file ds.json"),
        ({}, {"deepspeed": {"zero_optimization": {"stage": 3}}}, "DeepSpeed's ZeRO-3 is not supported"),
        (
            {},
            {"deepspeed": {"zero_optimization": {"stage": 2, "round_robin_gradients": True}}},
            "round_robin_gradients is",
        ),
        (
            {},
            {
                "deepspeed": {
                    "zero_optimization": {"stage": 1},
                    "bf16": {"enabled": "auto"},
                    "data_types": {"grad_accum_dtype": "fp32"},
                }
            },
            "grad_accum_dtype: fp32 is not supported by the constraint",
        ),
        (
            {},
            {"plugins": ["axolotl.integrations.grokfast.GrokfastPlugin", "asft"]},
            "Grokfast amplifies gradients after",
        ),
        ({}, {"rl": "dpo", "lora_model_dir": "out/earlier"}, "lora_model_dir is ignored by axolotl under rl: dpo"),
        ({"max_drift": 0.1}, {"deepspeed": {"zero_optimization": {"stage": 1}}}, "max_drift is not supported under"),
        ({}, {"fsdp_config": {"state_dict_type": "FULL_STATE_DICT"}}, "FSDP1 is not supported"),
        ({}, {"optimizer": "lomo"}, "steps during the backward pass"),
        ({}, {"plugins": ["asfft"]}, "did you mean 'asft'"),
        ({}, {"plugins": None}, "add `- asft` under plugins"),
        ({}, {"plugins": ["asft", "nodots"]}, "plugins: 'nodots' is not a plugin; expected asft, or package.module"),
        ({}, {"plugins": ["asft", "os.nothing"]}, "cannot be loaded"),
        ({}, {"output_dir": __file__}, "which is a file; give another name"),
        ({}, {"plugins": "asft"}, "expected a list, with asft in it"),
        ({}, {"lora_target_linear": None, "lora_target_modules": "("}, "PEFT refuses the LoRA settings (missing )"),
        ({}, {"gradient_accumulation_steps": 0}, "axolotl refuses the config"),
        ({}, {"overrides_of_model_config": {"hidden_size": "x"}}, "axolotl refuses the config"),
        ({}, {"peft_init_lora_weights": "corda"}, "is initialised by 'corda'"),
        ({}, {"special_tokens": {"eos_token": "the cat sees dog"}}, "cannot load the tokenizer of"),
        ({}, {"tokens": ["<new>"]}, "`lora_modules_to_save` not properly set"),
        ({}, {"lora_target_linear": None, "lora_target_modules": ["attn"]}, "linear layers are called down_proj"),
        ({}, {"base_model": "no-such-folder"}, "its config.json cannot be read"),
        ({}, {"base_model": "../aligne"}, "base_model: there is no folder ../aligne (seen from "),
        ({}, {"base_model": "/no/aligned"}, "base_model: there is no folder /no/aligned (seen from "),
        ({}, {"base_model": "runs/a/aligned"}, "paths in a config are relative to where the command runs, not to the"),
        ({}, {"base_model": "~/aligned"}, "there is no folder ~/aligned (axolotl takes ~ as it stands; write the path"),
        ({}, {"micro_batch_size": "many"}, "axolotl refuses the config: micro_batch_size"),
        ({}, {"type_of_model": "LamaForCausalLM"}, "which transformers does not have"),
        ({"max_drift": 0.1}, {"peft_init_lora_weights": "pissa"}, "max_drift cannot shorten"),
        ({"anchor_weight": 1}, {"peft_init_lora_weights": "pissa"}, "anchor_weight cannot score the aligned model"),
        ({"max_drift": 0.1}, {"optimizer": "schedule_free_adamw"}, "which max_drift cannot hold"),
        ({"anchor_weight": 1}, {}, "anchor_weight needs the aligned model's own answers"),
        ({}, {"asft": None, "plugins": None}, "the config has no asft: block"),
        ({}, {"asft": None, "plugins": ["asft"], "AsFT": {"direction": "d"}}, "AsFT: is not an axolotl key"),
        ({}, {"asft": None, "AsFT": {"direction": "d"}}, "did you mean asft:?"),
    ],
)
def test_what_would_end_the_run(checked, block, changes, message):
    status, found = checked(block, **changes)
    assert status == 2
    assert not found["fine"]
    assert any(message in line for line in found["errors"]), found["errors"]
    assert all("\n" not in line for line in found["errors"])


def test_the_base_model_in_place_of_the_aligned_one(checked, pair):
    status, found = checked(base_model=pair[0])
    assert status == 2
    assert any("extracted for another model" in line for line in found["errors"])
    assert warned(found, "reads like its base model")


@pytest.mark.parametrize(
    "content", ["", "- a list", "key: [unclosed", "\x00", "day: 2024-13-01", "special_tokens: &a {x: *a}"]
)
def test_no_config(tmp_path, content):
    path = tmp_path / "config.yml"
    path.write_text(content)
    result = CliRunner().invoke(asft, ["check", str(path)])
    assert result.exit_code == 2
    assert str(path) in result.output
    assert "Traceback" not in result.output
    assert CliRunner().invoke(asft, ["check", str(tmp_path / "nothing.yml")]).exit_code == 2


BOMBS = [
    "l0: &l0 {a: 1}\n" + "".join(f"l{i}: &l{i} {form % ', '.join([f'*l{i - 1}'] * 10)}\n" for i in range(1, 7))
    for form in ("[%s]", "{<<: [%s]}")
]
CHAIN = "l0: &l0 x\n" + "".join(f"l{i}: &l{i} [*l{i - 1}]\n" for i in range(1, 200))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("special_tokens: &a {x: *a}", "line 1: the value that begins here contains itself"),
        ("one: 1\nplugins: &a [[*a]]", "line 2: the value that begins here contains itself"),
        *((bomb, "expands to more than 100,000 values") for bomb in BOMBS),
        (CHAIN, "or more than 50 levels, once its aliases"),
        (f"a: {'[' * 2000}", "cannot be read as YAML"),
    ],
)
def test_yaml_that_hardly_ends(tmp_path, content, message):
    """A stranger's few lines; the bombs stand for a million values here, and take a line each for ten times more."""
    (tmp_path / "config.yml").write_text(content)
    with pytest.raises(AsftError, match=message):
        read_config(tmp_path / "config.yml")


def test_aliases_that_end(tmp_path):
    path = tmp_path / "config.yml"
    path.write_text("one: &one {a: [1, 2]}\ntwo: *one\nthree: {<<: *one, b: *one}\n")
    one = {"a": [1, 2]}
    assert read_config(path) == {"one": one, "two": one, "three": {**one, "b": one}}


def test_layers_without_a_direction(checked, pair, tmp_path):
    extract_direction(*pair, rank=2, modules=["q_proj", "v_proj"]).save(tmp_path / "some.safetensors")
    some = {"direction": str(tmp_path / "some.safetensors")}
    status, found = checked(some)
    assert status == 2
    assert "10 LoRA layers without a direction" in found["errors"][0]
    assert (len(found["constrained"]), len(found["unconstrained"])) == (4, 10)
    assert set(found["unconstrained"].values()) == {"the direction file has no such layer"}
    status, found = checked({**some, "on_uncovered": "warn"})
    assert (status, found["errors"]) == (0, [])
    assert warned(found, "on_uncovered is warn: 10 trainable weights are not constrained")
    assert not warned(checked({"on_uncovered": "warn"})[1], "on_uncovered")


def test_a_layer_whose_metric_is_empty(checked, fisher_file, tmp_path):
    """It is uncovered, as in the run, and nothing that the block leaves out."""
    direction = AlignmentDirection.load(fisher_file)
    modules = dict(direction.modules)
    first, second, *_ = modules
    fisher = modules[first].metrics["fisher"]
    modules[first] = replace(modules[first], metrics={"fisher": replace(fisher, inputs=0 * fisher.inputs)})
    AlignmentDirection(modules, direction.spec).save(tmp_path / "emptied.safetensors")
    block = {"direction": str(tmp_path / "emptied.safetensors")}
    status, found = checked(block)
    assert status == 2
    assert "1 LoRA layers without a direction in the metric fisher" in found["errors"][0]
    assert found["unconstrained"] == {first: "the direction file's metric fisher is empty for it"}
    status, found = checked({**block, "on_uncovered": "warn"})
    assert (status, len(found["constrained"])) == (0, 13)
    assert warned(found, "on_uncovered is warn: 1 trainable weights are not constrained")
    assert not warned(found, "asft.modules leaves")
    status, found = checked({**block, "on_uncovered": "warn", "modules": [second]})
    assert (found["constrained"], set(found["unconstrained"].values())) == ([second], {"asft.modules leaves it out"})
    assert not warned(found, "on_uncovered"), "the run has nothing to say of layers that are not chosen"
    assert warned(found, "asft.modules leaves 13 LoRA layers out")


def test_an_anchor_in_plain_words(checked, anchored_file):
    _, found = checked({"direction": str(anchored_file), "anchor_weight": 3, "lambda_reg": 0})
    assert any(
        "anchor_weight 3: at every step 8 of the aligned model's stored answers" in line for line in found["settings"]
    )
    assert not warned(found, "nothing is constrained")
    assert found["fine"]
    assert found["cost"]["anchor_flops"] > 0


def test_layers_that_the_block_leaves_out(checked):
    _, found = checked({"modules": ["q_proj"]})
    assert len(found["constrained"]) == 2
    assert set(found["unconstrained"].values()) == {"asft.modules leaves it out"}
    assert warned(found, "12 LoRA layers")


@pytest.mark.parametrize(
    ("block", "changes", "message"),
    [
        ({"lambda_reg": 1e4}, {}, "more than ten times the largest"),
        ({"lambda_reg": 1e-3}, {}, "less than a tenth of the smallest"),
        ({"lambda_reg": 0}, {}, "nothing is constrained"),
        ({"max_drift": 2}, {}, "a budget of 1 kept none"),
        ({"rank": 100}, {}, "the direction file holds 8 directions"),
        ({"projector": "subspace"}, {}, "leaves the way back to the base model free"),
        ({"projector": "subspace", "rank": 0}, {}, "projector subspace has no effect at rank 0; give another rank"),
        ({"verify_model": False}, {}, "verify_model is false"),
        ({}, {"optimizer": "muon"}, "normalises every update"),
        ({}, {"trust_remote_code": True}, "executes code of the repository"),
        ({}, {"plugins": ["asft", "no.such.Plugin"]}, "no.such.Plugin cannot be imported: the run goes on without it"),
        ({}, {"plugins": ["asft", "recorder_plugin.RecorderPlugin"]}, "is code from outside axolotl"),
        (
            {},
            {"lora_target_linear": None, "lora_target_modules": ["q_proj", "v_prj"]},
            "'v_prj' is not a layer of the model, and is ignored; did you mean v_proj?",
        ),
    ],
)
def test_warnings(checked, block, changes, message):
    status, found = checked(block, **changes)
    assert (status, found["errors"]) == (0, [])
    assert warned(found, message), found["warnings"]


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ({"datasets": [{"path": "d", "type": "evil.steps"}]}, "datasets[].type: evil.steps"),
        ({"test_datasets": [{"type": "evil.a.load_b"}, {"type": "x.y"}]}, "test_datasets[].type: evil.a.load_b, x.y"),
        ({"pretraining_dataset": {"path": "d", "type": "evil.steps"}}, "pretraining_dataset[].type: evil.steps"),
        ({"trl": {"reward_funcs": ["evil.reward", "me/reward-2.5"]}}, "trl.reward_funcs: evil.reward"),
        ({"trl": {"rollout_func": "evil.rollout"}}, "trl.rollout_func: evil.rollout"),
        ({"trainer_cls": "evil.Trainer"}, "trainer_cls: evil.Trainer"),
        ({"datasets": [{"type": "evil-pkg.steps"}]}, "datasets[].type: evil-pkg.steps"),
        ({"datasets": [{"type": "chatml.evil.fn"}]}, "datasets[].type: chatml.evil.fn"),
        ({"datasets": [{"type": "me/a.evil.fn"}, {"type": ".evil.fn"}]}, "datasets[].type: me/a.evil.fn, .evil.fn"),
        ({"rl": "dpo", "datasets": [{"type": "evil"}, {"type": "chatml"}]}, "datasets[].type: evil"),
        ({"trl": {"reward_funcs": ["evil-pkg.reward", "trl.rewards.a"]}}, "trl.reward_funcs: evil-pkg.reward"),
        ({"trl": {"reward_funcs": ["chatml.reward", "./reward.d"]}}, "trl.reward_funcs: chatml.reward"),
        ({"trainer_cls": "evil-pkg.Trainer"}, "trainer_cls: evil-pkg.Trainer"),
        ({"plugins": ["asft", "evil.Plugin", "liger.LigerPlugin"]}, "plugins: evil.Plugin"),
        ({"attn_implementation": "evil/kernel@v1:attend"}, "attn_implementation: evil/kernel@v1:attend"),
        ({"model_kwargs": {"attn_implementation": {"": "e/k"}}}, "model_kwargs.attn_implementation: e/k"),
        (
            {"overrides_of_model_config": {"_attn_implementation": "e/k"}},
            "overrides_of_model_config._attn_implementation: e/k",
        ),
    ],
)
def test_code_of_others_is_named_key_by_key(content, named):
    assert on_foreign_code(content, False) == [f"{named} is code from outside axolotl; check where it comes from"]


@pytest.mark.parametrize("key", ["model_kwargs", "overrides_of_model_kwargs"])
def test_code_by_the_arguments_of_the_model(key):
    """They reach the model's from_pretrained past the top-level keys, which may say no."""
    content = {"base_model": "me/a", "trust_remote_code": False, "tokenizer_config": "me/t"}
    kwargs = {"trust_remote_code": True, "allow_all_kernels": True, "attn_implementation": "sdpa"}
    code, kernels = on_foreign_code({**content, key: kwargs}, True)
    assert code == (f"{key}.trust_remote_code: the run executes code of the repository me/a; this check did not run it")
    assert kernels.startswith(f"{key}.allow_all_kernels: the run may execute kernels from any Hub repository")
    assert on_foreign_code({**content, key: dict.fromkeys(kwargs, False)}, True) == []


def test_every_repository_whose_code_is_run_is_named():
    content = {"base_model": "me/a", "base_model_config": "you/b", "tokenizer_config": "you/t", "model_kwargs": None}
    content |= {"trust_remote_code": True, "model_config": {"auto_map": {"AutoModel": "evil/c--file.Class"}}}
    (line,) = on_foreign_code(content, False)
    assert "executes code of the repositories me/a, you/b, you/t, evil/c; this check did not run it" in line


@pytest.mark.parametrize(
    ("content", "warned"),
    [
        ({"use_kernels": True}, True),
        ({"plugins": ["asft", "axolotl.integrations.kernels.KernelsPlugin"]}, True),
        ({"plugins": ["asft", "kernels.KernelsPlugin"], "use_kernels": False}, False),
    ],
)
def test_kernels_of_any_repository(content, warned):
    found = on_foreign_code(content, False)
    assert [line.partition(":")[0] for line in found] == ["use_kernels"] * warned


@pytest.mark.parametrize(
    "kind",
    [
        "chat_template", "alpaca_w_system.load_open_orca", "context_qa.load_v2", "chatml.argilla", "llama3.ultra",
        "bradley_terry.chat_template", "axolotl.prompt_strategies.completion", {"field_instruction": "a.b"}, None,
        "bradley_terry.llama3.icr", "ebft.ebft_reasoning.transform", "alpaca:chat", "explainchoice",
    ],
)  # fmt: skip
def test_axolotls_own_are_not_named(kind):
    content = {"datasets": [{"path": "d.e", "type": kind}, "torn"], "trl": {"reward_funcs": "me/model", "beta": 0.1}}
    assert on_foreign_code(content | {"trainer_cls": None, "pretraining_dataset": "me/data"}, False) == []


def test_a_lambda_of_the_usual_size_is_no_warning(checked):
    assert checked({"lambda_reg": 30})[1]["warnings"] == [WEIGHTS_ALONE]


def test_weights_alone_are_no_safe_hold(checked, anchored_file):
    """What the README's table says of it, said where somebody is about to rely on it."""
    assert warned(checked()[1], "a penalty on the weights alone kept little of the safety in our benchmarks; make the")
    assert not warned(checked({"max_drift": 0.1})[1], "on the weights alone")
    assert not warned(checked({"direction": str(anchored_file), "anchor_weight": 3})[1], "on the weights alone")


def test_a_budget_over_layers_that_alignment_left_alone(checked, pair, tmp_path):
    direction = extract_direction(*pair, rank=4)
    modules = dict(direction.modules)
    for name in [name for name in modules if "mlp" in name]:
        modules[name] = replace(modules[name], S=0 * modules[name].S, norm=0 * modules[name].norm)
    AlignmentDirection(modules, direction.spec).save(tmp_path / "attention-alone.safetensors")
    block = {"direction": str(tmp_path / "attention-alone.safetensors")}
    status, found = checked({**block, "max_drift": 0.1})
    assert status == 0
    assert warned(found, "max_drift lets 6 of 14 layers learn nothing, since alignment did not move them (first model")
    assert not warned(checked(block)[1], "learn nothing")
    assert not warned(checked({"max_drift": 0.1})[1], "learn nothing")


def test_a_key_that_lost_its_indentation(checked):
    status, found = checked(max_drift=0.1)
    assert (status, found["fine"]) == (2, False)
    assert "max_drift stands outside the asft: block" in found["errors"][0]


def test_a_metric_that_is_held(checked, fisher_file):
    _, found = checked({"direction": str(fisher_file)})
    assert found["warnings"] == []
    assert found["settings"][0].startswith("metric fisher, since the direction file holds it")
    assert found["cost"]["memory"]["U"] == 0
    assert found["cost"]["memory"]["X"] > found["cost"]["memory"]["Y"] > 0
    _, found = checked({"direction": str(fisher_file), "metric": "weights"})
    assert warned(found, "holds the metric fisher, which is not used")


def test_a_projector_where_no_direction_is_free(checked, fisher_file):
    """Under the metric fisher the rank is 0 unless it is given, and C with it."""
    block, line = {"direction": str(fisher_file)}, "has no effect at rank 0, the default under metric fisher; give rank"
    for projector in ("subspace", "normalized"):
        found = checked({**block, "projector": projector})[1]
        assert found["warnings"] == [f"projector {projector} {line}, or metric: weights"]
        assert not warned(checked({**block, "projector": projector, "rank": 2})[1], "has no effect")
        found = checked({**block, "projector": projector, "rank": 0})[1]
        assert warned(found, "has no effect at rank 0; give another rank, or metric: weights")
        assert not warned(checked({**block, "projector": projector, "metric": "weights"})[1], "has no effect")
    assert checked({**block, "projector": "paper"})[1]["warnings"] == []


@pytest.fixture(scope="module")
def without_template(pair, tmp_path_factory):
    """The aligned model with a tokenizer that has no chat template, as base models have theirs."""
    folder = tmp_path_factory.mktemp("without") / "aligned"
    shutil.copytree(pair[1], folder, ignore=shutil.ignore_patterns("chat_template*"))
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "chat_template"}))
    return folder


PREFERENCES = {"rl": "dpo", "datasets": [{"path": "x.jsonl", "ds_type": "json", "type": "chat_template.default"}]}
PLAIN = {"datasets": [{"path": "x.jsonl", "type": "alpaca"}]}
NAMED = {"datasets": [{"path": "x.jsonl", "type": "chat_template", "chat_template": "chatml"}]}


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({}, "datasets"),
        (PREFERENCES, "datasets"),
        ({**NAMED, "test_datasets": [{"path": "t.jsonl", "type": "chat_template", "split": "t"}]}, "test_datasets"),
    ],
)
def test_a_chat_dataset_without_a_template(checked, without_template, changes, key):
    """The run ends as it renders the data."""
    status, found = checked(base_model=without_template, **changes)
    assert (status, len(found["errors"])) == (2, 1), found["errors"]
    assert re.match(rf"{key}: \S+ is of type chat_template\S*, which needs a chat template \(", found["errors"][0])
    assert "tokenizer's chat_template is null" in found["errors"][0]
    assert found["errors"][0].endswith("set chat_template: in the config, or give a tokenizer that has one")


@pytest.mark.parametrize(
    "changes",
    [
        {"chat_template": "chatml"},
        {"chat_template": "tokenizer_default_fallback_chatml"},
        {"chat_template_jinja": "{{ messages }}"},
        {**PREFERENCES, "chat_template": "chatml"},
        PLAIN,
        NAMED,
    ],
)
def test_a_template_from_elsewhere(checked, without_template, changes):
    status, found = checked(base_model=without_template, **changes)
    assert (status, found["errors"]) == (0, [])


def test_an_anchor_wants_no_template(checked, without_template, anchored_file):
    """The direction file keeps the requests as text."""
    block = {"direction": str(anchored_file), "anchor_weight": 1}
    assert checked(block, base_model=without_template, **PLAIN)[1]["errors"] == []


def test_weights_that_are_not_compared(checked, pair, tmp_path):
    assert checked({"verify_model": False})[1]["direction"]["weights"] == "not asked"
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (tmp_path / "bare").mkdir(exist_ok=True)
        shutil.copy(pair[1] / name, tmp_path / "bare" / name)
    status, found = checked(base_model=tmp_path / "bare")
    assert (status, found["direction"]["weights"]) == (0, "not here")


def test_weights_that_differ(checked, pair):
    status, found = checked(base_model=pair[0])
    assert (status, found["direction"]["weights"]) == (2, "differ")
    assert "this direction was extracted for another model" in found["errors"][0]


def test_a_checkpoint_to_go_on_from(checked, direction_file, tmp_path):
    """What ends the run after its model is loaded is said here: no such folder, no constraint, or another one."""
    status, found = checked(resume_from_checkpoint=str(tmp_path / "nothing"))
    assert (status, len(found["errors"])) == (2, 1)
    assert found["errors"][0].startswith(f"resume_from_checkpoint: there is no folder {tmp_path / 'nothing'}")
    checkpoint = tmp_path / "out" / "checkpoint-3"
    checkpoint.mkdir(parents=True)
    (checkpoint / "adapter_config.json").write_text("{}")
    named, by_itself = {"resume_from_checkpoint": str(checkpoint)}, {"auto_resume_from_checkpoints": True}
    for changes in (named, by_itself):
        errors = checked(**changes)[1]["errors"]
        assert ["was trained without the constraint" in error for error in errors] == [True]
    held = AlignmentDirection.load(direction_file).sha256
    (checkpoint / "adapter_config.json").write_text(json.dumps({"asft": {"direction_sha256": held, "lambda_reg": 7}}))
    assert "was trained under lambda_reg 7, and this run asks for" in checked(**named)[1]["errors"][0]
    assert checked({"lambda_reg": 7}, **named)[:1] == (0,)


def test_a_model_folder_without_a_tokenizer(checked, pair, tmp_path):
    """The run ends in it, though nothing here needs one; where it lies elsewhere, or may need code, nobody can tell."""
    (tmp_path / "bare").mkdir()
    shutil.copy(pair[1] / "config.json", tmp_path / "bare" / "config.json")
    status, found = checked(base_model=tmp_path / "bare")
    assert (status, len(found["errors"])) == (2, 1)
    assert found["errors"][0].startswith(f"axolotl cannot load the tokenizer of {tmp_path / 'bare'} (")
    status, found = checked(base_model=tmp_path / "bare", trust_remote_code=True)
    assert (status, found["errors"]) == (0, [])
    assert warned(found, "if it needs code from its repository, give --trust-remote-code")
    status, found = checked(base_model=tmp_path / "bare", tokenizer_config="not/here")
    assert (status, found["errors"], warned(found, "cannot load")) == (0, [], False)


def test_a_model_of_images_without_what_prepares_them(checked, tmp_path):
    """axolotl loads it whatever the data are."""
    family = "Gemma 3 (vision, text tower)"
    config_class, arguments, *_ = FAMILIES[family]
    getattr(transformers, config_class)(**copy.deepcopy(arguments)).save_pretrained(tmp_path / "model")
    save_what_reads(tmp_path / "model", family)
    (tmp_path / "model" / "preprocessor_config.json").unlink()
    start = f"axolotl cannot load the processor of {tmp_path / 'model'}, a model that reads images ("
    assert any(line.startswith(start) for line in checked(base_model=tmp_path / "model")[1]["errors"])
    save_what_prepares_images(tmp_path / "model", family)
    assert not any("cannot load" in line for line in checked(base_model=tmp_path / "model")[1]["errors"])
    if importlib.util.find_spec("torchvision") is None:  # the machine that trains may have it
        prepares = tmp_path / "model" / "preprocessor_config.json"
        prepares.write_text(json.dumps({**json.loads(prepares.read_text()), "image_processor_type": WANTS_TORCHVISION}))
        found = checked(base_model=tmp_path / "model")[1]
        assert not any("cannot load" in line for line in found["errors"])
        assert warned(found, "install what it names here too, and check again: the run needs it")


def test_a_direction_of_another_name_and_revision():
    """The names and revisions that the file keeps, against those of the run."""
    spec = {"base": {"id": "me/Chat-Base"}, "aligned": {"id": "me/Chat", "revision": "a" * 40}}
    direction = AlignmentDirection(modules={}, spec=spec, sha256="0" * 64)
    assert on_origin(direction, "me/Chat", "a" * 40) == []
    assert on_origin(direction, "./models/chat/", None) == []
    assert "revision aaaaaaaaaaaa" in on_origin(direction, "me/Chat", "b" * 40)[0]
    assert "reads like another model" in on_origin(direction, "you/Other", None)[0]
    assert "reads like its base model" in on_origin(direction, "me/chat-base", None)[0]
    hub = {"direction": "me/chat-asft@v1"}
    assert "read at v1 of me/chat-asft, which can change" in on_pin(parse_block(hub), direction)[0]
    for pinned in ({"direction": f"me/chat-asft@{'c' * 40}"}, {**hub, "direction_sha256": "0" * 64}):
        assert on_pin(parse_block(pinned), direction) == []
    assert on_pin(parse_block({"direction": "./d.safetensors"}), direction) == []


def test_weights_that_agree_outweigh_a_name(checked, pair, tmp_path):
    shutil.copytree(pair[1], tmp_path / "renamed")
    assert checked(base_model=tmp_path / "renamed")[1]["warnings"] == [WEIGHTS_ALONE]


@pytest.mark.parametrize("metric", [False, True])
def test_the_operations_are_those_that_torch_counts(pair, direction_file, fisher_file, metric):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(pair[1]), LoraConfig(r=3, target_modules=["q_proj", "down_proj"])
    )
    penalty = AlignmentPenalty(model, AlignmentDirection.load(fisher_file if metric else direction_file))
    with FlopCounterMode(display=False) as counter:
        penalty.add_gradient()
    expected = counter.get_total_flops()
    with FlopCounterMode(display=False) as counter:
        penalty.measure()
    measured = counter.get_total_flops()
    cost = estimate(penalty.groups, parameters=1000, tokens=10, checkpointing=False, log_every=10**9)
    assert cost.penalty_flops == pytest.approx(expected, rel=1e-6)
    assert cost.task_flops == 4 * 1000 * 10
    assert cost.anchor_flops == 0
    every = estimate(penalty.groups, parameters=1000, tokens=10, checkpointing=True, log_every=1)
    assert every.penalty_flops == pytest.approx(expected + measured, rel=1e-6)
    assert every.task_flops == 6 * 1000 * 10
    anchored = estimate(penalty.groups, parameters=1000, tokens=10, checkpointing=True, anchor_tokens=5)
    assert anchored.anchor_flops == 6 * 1000 * 5
    ours = anchored.penalty_flops + anchored.anchor_flops
    assert anchored.share == pytest.approx(ours / (ours + 6 * 1000 * 10))
    assert cost.memory["U"] == sum(group.U.nbytes for group in penalty.groups)


def test_an_anchor_asks_for_a_few_answers_a_step():
    assert tokens_asked([]) == 0
    assert tokens_asked([("r" * 30, "a" * 10)] * 3) == 3 * 40 / 4, "all, where there are fewer than a step asks for"
    assert tokens_asked([("r" * 30, "a" * 10), ("r" * 90, "a" * 30)] * 100) == 8 * 80 / 4


def test_options_of_a_run_are_obeyed(checked, fisher_file):
    """`check` and `train` take the same ones, in both spellings, and both refuse what is none."""
    block = {"direction": str(fisher_file), "lambda_reg": 1}
    options = ["--asft.lambda_reg", "7", "--asft.metric=weights", "--no-asft.lora-scaling"]
    status, found = checked(block, options=options)
    assert (status, found["errors"]) == (0, [])
    assert any(line.startswith("lambda_reg 7: loss = task loss + 7 x penalty") for line in found["settings"])
    assert any(line.startswith("metric weights: ") for line in found["settings"])
    assert any(line.startswith("lora_scaling false: ") for line in found["settings"])
    status, found = checked(block, options=["--asft.lambda-reg", "-1"])
    assert status == 2
    assert found["errors"] == ["asft.lambda_reg is -1.0; input should be greater than or equal to 0"]


CODE = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM
Path({marker!r}).touch()
class StrangeConfig(LlamaConfig):
    model_type = "strange"
class StrangeForCausalLM(LlamaForCausalLM):
    config_class = StrangeConfig
"""


def test_code_of_the_models_repository_is_not_run_unasked(pair, dataset, direction_file, tmp_path, monkeypatch):
    """A stranger's config may say trust_remote_code: true; the check obeys the one who checks."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    model, marker = tmp_path / "strange", tmp_path / "was-run"
    model.mkdir()
    content = json.loads((pair[1] / "config.json").read_text()) | {"model_type": "strange", "architectures": None}
    content["auto_map"] = {"AutoConfig": "code.StrangeConfig", "AutoModelForCausalLM": "code.StrangeForCausalLM"}
    (model / "config.json").write_text(json.dumps(content))
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(pair[1] / name, model / name)
    (model / "code.py").write_text(CODE.format(marker=str(marker)))
    block = {"direction": str(direction_file)}
    for trusted, flags, status, was_run in ((True, [], 2, False), (False, [FLAG], 2, False), (True, [FLAG], 0, True)):
        config = write_config(tmp_path / f"{trusted}", model, dataset, block, trust_remote_code=trusted)
        result = CliRunner().invoke(asft, ["check", str(config), "--json", *flags])
        assert (result.exit_code, marker.exists()) == (status, was_run), result.stdout
    assert json.loads(result.stdout)["model"]["architecture"] == "StrangeForCausalLM"


def test_the_text_says_the_same(pair, dataset, direction_file, tmp_path):
    config = write_config(tmp_path, pair[1], dataset, {"direction": str(direction_file), "lambda_reg": 5000})
    result = CliRunner().invoke(asft, ["check", str(config)])
    assert result.exit_code == 0
    for text in (
        "14 of 14 LoRA layers: 2 q_proj",
        "agree with the base model's files",
        AlignmentDirection.load(direction_file).sha256,
        "loss = task loss + 5000 x penalty",
        "once per optimizer step, whatever the accumulation (2 micro-batches here)",
        "The run would start. 2 warnings.",
    ):
        assert text in result.stdout, text


def test_one_is_no_plural(checked):
    assert any("(1 micro-batch here)" in line for line in checked(gradient_accumulation_steps=1)[1]["settings"])


def test_a_block_that_is_left_empty(pair, dataset, tmp_path):
    config = write_config(tmp_path, pair[1], dataset, plugins=["asft"])
    config.write_text(f"{config.read_text()}asft:\n")
    result = CliRunner().invoke(asft, ["check", str(config)])
    assert (result.exit_code, "the asft: block is empty, so nothing" in result.stdout) == (2, True)


def test_files_that_are_no_text(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "latin.yml").write_bytes("base_model: modèle".encode("latin-1"))
    (tmp_path / "folder").mkdir()
    for name, message in {
        "nothere.yml": "nothere.yml cannot be read: there is no file of that name; check the path",
        "folder": "folder is a folder; expected a file; give one in it",
        "latin.yml": "latin.yml is not UTF-8 (byte 16); save it as UTF-8",
    }.items():
        found = json.loads(CliRunner().invoke(asft, ["check", name, "--json"]).stdout)
        assert found["errors"] == [message]


@pytest.mark.slow
def test_through_axolotls_command_line(pair, direction_file, tmp_path):
    """A real `axolotl train` constrains what the check says."""
    config = write_config(
        tmp_path, pair[1], make_dataset(tmp_path / "data.jsonl"), {"direction": str(direction_file)}, max_steps=1,
        lora_target_linear=None, lora_target_modules=["q_proj", "down_proj"],
    )  # fmt: skip
    before = set(os.listdir(tmp_path))
    found = json.loads(axolotl("asft", "check", str(config), "--json", cwd=tmp_path).stdout)
    assert set(os.listdir(tmp_path)) == before
    assert found["fine"]
    run = axolotl("train", str(config), "--launcher", "python", cwd=tmp_path)
    assert f"{len(found['constrained'])} layers constrained" in run.stdout + run.stderr


def test_a_saved_adapter_that_took_a_part_out_is_not_gone_on_from(checked, pair, tmp_path):
    """Where PiSSA started is not in its file."""
    model = lora_model(pair[1], random_b=False, init_lora_weights="pissa")
    model.save_pretrained(tmp_path / "pissa")
    status, found = checked(lora_model_dir=str(tmp_path / "pissa"))
    assert status == 2
    assert [line for line in found["errors"] if "removed a part of the weights, and how far it has moved" in line]
