"""Every trainer class and feature of axolotl that changes how a step is made: the penalty counts once in each."""

import json

import pytest
from recorder_plugin import RecorderPlugin
from tiny import log_history, make_tokenizer, write_config

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
        paths[kind].write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    return paths


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
    kind = {"field_prompt": "q", "field_completion": "a", "field_label": "ok", "prompt_format": "{prompt} "}
    answer = record(
        rl="kto", datasets=jsonl(data["kto"], kind), dataset_prepared_path=None, remove_unused_columns=False
    )
    assert "KTO" in answer["trainer"]
    counts_once(answer, tolerance=IN_BF16)


def test_orpo(record, data):
    changes = {"orpo_alpha": 0.1, "chat_template": "tokenizer_default", "remove_unused_columns": False}
    answer = record(
        rl="orpo", datasets=jsonl(data["orpo"], "chat_template.argilla"), dataset_prepared_path=None, **changes
    )
    assert "ORPO" in answer["trainer"]
    counts_once(answer)


def test_grpo(record, dataset):
    trl = {"beta": 0.001, "num_generations": 4, "max_completion_length": 8, "use_vllm": False}
    trl["reward_funcs"] = ["rewards.length"]
    answer = record(rl="grpo", trl=trl, datasets=jsonl(dataset, "rewards.transform"), dataset_prepared_path=None)
    assert "GRPO" in answer["trainer"]
    counts_once(answer, tolerance=IN_BF16)


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
