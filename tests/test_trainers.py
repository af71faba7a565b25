"""Every trainer class and feature of axolotl that changes how a step is made: the penalty counts once in each."""

import json

import pytest
from recorder_plugin import RecorderPlugin
from tiny import log_history, make_tokenizer, write_config

from axolotl_asft.stamp import read_stamp

pytestmark = pytest.mark.slow

PLUGINS = ["recorder_plugin.RecorderPlugin", "asft"]
STEPS = 3


@pytest.fixture(scope="module")
def rows(dataset):
    return [json.loads(line)["messages"] for line in dataset.read_text().splitlines()]


@pytest.fixture(scope="module")
def data(rows, tmp_path_factory):
    """The same turns as each kind of training wants them."""
    folder = tmp_path_factory.mktemp("data")
    question, answer = (lambda row: row[0]["content"]), (lambda row: row[1]["content"])
    other = [*rows[1:], rows[0]]
    tokenizer = make_tokenizer()

    def teacher(row):
        ids = tokenizer.encode(answer(row) + " </s>")
        return {"logprobs": [[-0.2, -1.7] for _ in ids], "target_token_ids": [[i, 9] for i in ids]}

    kinds = {
        "dpo": [{"q": question(a), "good": answer(a), "bad": answer(b)} for a, b in zip(rows, other, strict=True)],
        "kto": [{"q": question(a), "a": answer(a), "ok": n % 2 == 0} for n, a in enumerate(rows)],
        "orpo": [{"chosen": a, "rejected": [a[0], b[1]]} for a, b in zip(rows, other, strict=True)],
        "kd": [{"messages": a, **teacher(a)} for a in rows],
    }
    paths = {}
    for kind, samples in kinds.items():
        paths[kind] = folder / f"{kind}.jsonl"
        paths[kind].write_text(lines(samples))
    return paths


def lines(samples):
    return "".join(json.dumps(sample) + "\n" for sample in samples)


@pytest.fixture(scope="module")
def record(forked_train, pair, dataset, direction_file, tmp_path_factory):
    """Train with these changes; what the recorder saw."""

    def run(**changes):
        block = {"direction": str(direction_file), "lambda_reg": 0.3, "projector": "subspace"}
        options = {"max_steps": STEPS, "max_grad_norm": 0.0, "plugins": PLUGINS, "save_steps": STEPS}
        config = write_config(
            tmp_path_factory.mktemp("run"), pair[1], dataset, block, **{**options, "save_strategy": "steps", **changes}
        )
        status, output = forked_train(config)
        assert status == 0, output[-5000:]
        answer = json.loads((config.parent / "out" / "record.json").read_text())
        stamp = json.loads((config.parent / "out" / "adapter_config.json").read_text())["asft"]
        assert stamp["update_norm"] > 0
        return answer

    return run


# TRL trains a QLoRA adapter in bf16, whose gradients have 8 bits
IN_BF16 = 0.02


def counts_once(answer, steps=STEPS, tolerance=1e-4):
    assert len(answer["steps"]) == steps
    # at the first step B is zero, and with it the penalty's gradient
    for step in answer["steps"][1:]:
        assert step["expected"] > 0
        assert step["task"] > 0
        assert step["error"] < tolerance * step["expected"]


def jsonl(path, kind):
    return [{"path": str(path), "ds_type": "json", "split": "train", "type": kind}]


PREFERENCE = {"field_prompt": "q", "field_chosen": "good", "field_rejected": "bad", "prompt_format": "{prompt} "}
COMPLETION = {"field_prompt": "q", "field_completion": "a", "field_label": "ok", "prompt_format": "{prompt} "}
IN_KTO = {"remove_unused_columns": False}
IN_ORPO = {"orpo_alpha": 0.1, "chat_template": "tokenizer_default", "remove_unused_columns": False}
GENERATED = {"beta": 0.001, "num_generations": 4, "max_completion_length": 8, "use_vllm": False}
GENERATED |= {"reward_funcs": ["rewards.length"]}
UNDER_SYSTEM = "<|system|> no dog says yes </s> <|user|> {prompt} </s><|assistant|> "
FEATURES = {
    "packing": {"sample_packing": True, "attn_implementation": "sdpa", "sequence_len": 128, "micro_batch_size": 1},
    "gradient checkpointing": {"gradient_checkpointing": True},
    "accumulation 8": {"gradient_accumulation_steps": 8, "micro_batch_size": 1},
    "eaft": {"use_eaft": True},
    "neftune": {"neftune_noise_alpha": 5},
    "LoRA+": {"loraplus_lr_ratio": 16},
    "LoRA in 16 bit": {"adapter": "lora", "load_in_4bit": None},
    "8 bit": {"adapter": "lora", "load_in_4bit": None, "load_in_8bit": True},
    "dropout": {"lora_dropout": 0.1},
    "PiSSA": {"adapter": "lora", "load_in_4bit": None, "peft_init_lora_weights": "pissa"},
    "torch.compile": {"torch_compile": True, "adapter": "lora", "load_in_4bit": None},
    "chunked cross entropy": {"chunked_cross_entropy": True},
    "bf16": {"bf16": True, "plugins": [*PLUGINS, "cpu_plugin.CpuPlugin"]},
    "Liger listed before": {"plugins": ["axolotl.integrations.liger.LigerPlugin", *PLUGINS]},
    "Liger listed after": {"plugins": [*PLUGINS, "axolotl.integrations.liger.LigerPlugin"]},
    "regex": {"lora_target_linear": None, "lora_target_modules": r".*layers\.1.*(up|down)_proj"},
}


@pytest.mark.parametrize("feature", FEATURES)
def test_a_feature(record, feature):
    counts_once(record(**FEATURES[feature]))


NOISY = {"neftune_noise_alpha": 5, "lora_dropout": 0.3, **FEATURES["gradient checkpointing"]}
ANCHORED = {"noise": NOISY, **{name: FEATURES[name] for name in ("packing", "8 bit", "torch.compile")}}
ANCHORED |= {name: FEATURES[name] for name in ("chunked cross entropy", "bf16", "Liger listed after")}


@pytest.mark.parametrize("feature", [*ANCHORED, "dpo"])
def test_the_anchor_sees_the_same_model(forked_train, data, pair, dataset, anchored_file, tmp_path, feature):
    """Before the first step it is where the aligned model is, to the bit nearly; then it has moved."""
    dpo = {"rl": "dpo", "datasets": jsonl(data["dpo"], PREFERENCE), "dataset_prepared_path": None}
    block = {"direction": str(anchored_file), "lambda_reg": 0.3, "anchor_weight": 2.0}
    kept = {"save_strategy": "steps", "save_steps": STEPS}
    options = {"max_steps": STEPS, "plugins": ["asft"], **kept, **(dpo if feature == "dpo" else ANCHORED[feature])}
    options["plugins"] = [name for name in options["plugins"] if "recorder" not in name]
    config = write_config(tmp_path, pair[1], dataset, block, **options)
    status, output = forked_train(config)
    assert status == 0, output[-5000:]
    found = [line["asft/anchor_kl"] for line in log_history(config) if "loss" in line]
    assert found[0] == pytest.approx(0, abs=1e-5)
    assert found[-1] > 1e-4


def test_dpo(record, data):
    answer = record(rl="dpo", datasets=jsonl(data["dpo"], PREFERENCE), dataset_prepared_path=None)
    assert "DPO" in answer["trainer"]
    counts_once(answer, tolerance=IN_BF16)


@pytest.mark.parametrize("rl", ["ipo", "simpo"])
def test_relatives_of_dpo(record, data, rl):
    changes = {"rl_beta": 0.1, "simpo_gamma": 0.5, "cpo_alpha": 1.0} if rl == "simpo" else {}
    answer = record(rl=rl, datasets=jsonl(data["dpo"], PREFERENCE), dataset_prepared_path=None, **changes)
    counts_once(answer, tolerance=IN_BF16)


def test_kto(record, data):
    answer = record(rl="kto", datasets=jsonl(data["kto"], COMPLETION), dataset_prepared_path=None, **IN_KTO)
    assert "KTO" in answer["trainer"]
    counts_once(answer, tolerance=IN_BF16)


def test_orpo(record, data):
    kind = jsonl(data["orpo"], "chat_template.argilla")
    answer = record(rl="orpo", datasets=kind, dataset_prepared_path=None, **IN_ORPO)
    assert "ORPO" in answer["trainer"]
    counts_once(answer)


def test_grpo(record, dataset):
    kind = jsonl(dataset, "rewards.transform")
    answer = record(rl="grpo", trl=GENERATED, datasets=kind, dataset_prepared_path=None)
    assert "GRPO" in answer["trainer"]
    counts_once(answer, tolerance=IN_BF16)


@pytest.mark.parametrize("rl", ["dpo", "kto", "orpo", "grpo"])
def test_the_anchor_asks_as_the_data_do(forked_train, data, rows, pair, anchored_file, tmp_path, rl):
    """Under the system prompt that all prompts have, whatever kind of data they are in."""
    system, path = "no dog says yes", data.get(rl, tmp_path / "data.jsonl")
    if rl == "orpo":
        kept = [json.loads(line) for line in path.read_text().splitlines()]
        path = tmp_path / "data.jsonl"
        path.write_text(lines([{**row, "system": system} for row in kept]))
    elif rl == "grpo":
        path.write_text(lines([{"messages": [{"role": "system", "content": system}, *turns]} for turns in rows]))
    kinds = {
        "dpo": {**PREFERENCE, "prompt_format": UNDER_SYSTEM},
        "kto": {**COMPLETION, "prompt_format": UNDER_SYSTEM},
        "orpo": "chat_template.argilla",
        "grpo": "rewards.transform",
    }
    options = {"dpo": {}, "kto": IN_KTO, "orpo": IN_ORPO, "grpo": {"trl": GENERATED}}[rl]
    options |= {"rl": rl, "datasets": jsonl(path, kinds[rl]), "dataset_prepared_path": None}
    block = {"direction": str(anchored_file), "anchor_weight": 2.0}
    config = write_config(tmp_path, pair[1], path, block, max_steps=1, plugins=["asft"], **options)
    status, output = forked_train(config)
    assert status == 0, output[-5000:]
    first = "<s> " if rl == "orpo" else ""  # TRL's ORPO puts it before every prompt
    assert read_stamp(tmp_path / "out")["prompt_formats"] == [first + UNDER_SYSTEM]


def test_kd(record, data):
    plugins = ["axolotl.integrations.kd.KDPlugin", *PLUGINS]
    kind = [{**jsonl(data["kd"], "axolotl.integrations.kd.chat_template")[0], "field_messages": "messages"}]
    kind[0] |= {"logprobs_field": "logprobs"}
    options = {"kd_trainer": True, "kd_ce_alpha": 0.1, "kd_alpha": 0.9, "kd_temperature": 1.0}
    answer = record(plugins=plugins, datasets=kind, remove_unused_columns=False, **options)
    assert "KD" in answer["trainer"]
    counts_once(answer)


def test_diffusion(record):
    plugins = ["axolotl.integrations.diffusion.DiffusionPlugin", *PLUGINS]
    answer = record(plugins=plugins, diffusion={"mask_token_str": "<unk>", "generate_samples": False})
    assert "Diffusion" in answer["trainer"]
    counts_once(answer)


def test_the_recorder_would_notice(record, monkeypatch):
    """Listed after asft it sees the penalty in both places, and no difference where one is expected."""
    assert RecorderPlugin.__module__ == "recorder_plugin"
    answer = record(plugins=list(reversed(PLUGINS)))
    assert all(step["error"] == pytest.approx(step["expected"], rel=1e-3) for step in answer["steps"][1:])
