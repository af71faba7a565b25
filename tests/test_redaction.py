"""What a run writes about itself: the config as it was written, and no secret."""

import json

import pytest

from axolotl_asft.redaction import REDACTED, redacted
from axolotl_asft.yaml_config import written_config


@pytest.mark.parametrize(
    "name",
    [
        "hub_token", "token", "HF_TOKEN", "wandb_api_key", "apiKey", "key", "password", "db-password", "client_secret",
        "aws_secret_access_key", "accessToken", "credentials", "keys", "Authorization", "hf_token2", "HF_TOKEN_2",
        "api_key1", "hub_token_id", "bearer", "cookie", "accesstoken", "authtoken", "pass", "db_pwd", "privatekey",
    ],
)  # fmt: skip
def test_secret_names(name):
    assert redacted({name: "abc"}) == {name: REDACTED}
    shown = 12345 if name == "hub_token_id" else REDACTED
    assert redacted({"outer": [{name: 12345}]}) == {"outer": [{name: shown}]}
    assert redacted({name: None}) == {name: None}


def test_all_that_stands_under_a_secret_name():
    assert redacted({"auth": {"user": "me", "value": "abc"}}) == {"auth": REDACTED}
    assert redacted({"special_tokens": {"pad_token": "<pad>"}}) == {"special_tokens": {"pad_token": "<pad>"}}


@pytest.mark.parametrize("name", ["decoder_start_token_id", "vision_start_token_id", "boi_token_id", "stopTokenIds"])
@pytest.mark.parametrize("number", [0, 151652, [1, 2]])
def test_a_tokens_number_is_no_secret(name, number):
    assert redacted({name: number}) == {name: number}


@pytest.mark.parametrize(
    "name",
    [
        "pad_token", "eos_token", "special_tokens", "tokens", "tokenizer_type", "keypoints", "lora_qkv_kernel",
        "monkey", "max_new_tokens", "add_special_tokens", "direction_sha256", "passage", "image_token_id",
        "hub_model_id", "direction_file", "peft_trainable_token_indices", "pose_split_on_token_ids",
        "resize_token_embeddings_to_32x", "template_thinking_key", "token_type", "key_column",
    ],
)  # fmt: skip
def test_ordinary_names(name):
    assert redacted({name: "abc"}) == {name: "abc"}


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("https://me:secret@host/data.jsonl", f"https://{REDACTED}@host/data.jsonl"),
        ("s3://bucket/x?X-Amz-Signature=abc&part=2", f"s3://bucket/x?X-Amz-Signature={REDACTED}&part=2"),
        ("hf_abcdefghijklmnopqrstuvwxyz", REDACTED),
        ("github_pat_11ABCDEFG0abcdefghijklmnop", REDACTED),
        ("sk-proj-abc_defghijklmnopqrstuvwxyz", REDACTED),
        ("sk-lf-0a1b2c3d-1111-2222-3333-444455556666", REDACTED),
        ("sk-abcd_efgh-ijklmnopqrstuv", REDACTED),
        ("sk-aBcd-efgh-ijklmnopqrstuv", REDACTED),
        ("sk-1234-5678-9012-3456-7890", REDACTED),
        ("sk_abcdefghijklmnopqrstuv", REDACTED),
        ("AKIAIOSFODNN7EXAMPLE", REDACTED),
        ("Authorization: Bearer abcdefghijklmnop", f"Authorization: Bearer {REDACTED}"),
        ("Authorization: Basic bWU6eA==", f"Authorization: Basic {REDACTED}"),
        ("https://host/x?auth=abc&part=2", f"https://host/x?auth={REDACTED}&part=2"),
        (
            "https://a.blob.core/c/d.jsonl?sv=2022&sig=kT3%3D&se=1",
            f"https://a.blob.core/c/d.jsonl?sv=2022&sig={REDACTED}&se=1",
        ),
        ("sig=kT3%3D&se=1", f"sig={REDACTED}&se=1"),
        ("X-Amz-Signature=abc&part=2", f"X-Amz-Signature={REDACTED}&part=2"),
        ("AccountKey=abc==", f"AccountKey={REDACTED}"),
        ("accountkey=abc==;sig=d", f"accountkey={REDACTED};sig={REDACTED}"),
        ("hf_token2=abc def", f"hf_token2={REDACTED} def"),
        ("next=https://host/x?token=abc", f"next=https://host/x?token={REDACTED}"),
        ("AccountName=a;AccountKey=abc==;Suffix=b", f"AccountName=a;AccountKey={REDACTED};Suffix=b"),
        ("--password-free text, sk-ip", "--password-free text, sk-ip"),
        ("mail me@example.org", "mail me@example.org"),
    ],
)
def test_values_that_hold_a_secret(value, shown):
    assert redacted({"path": value}) == {"path": shown}
    assert redacted([value]) == [shown]


@pytest.mark.parametrize(
    "value",
    [
        "hf-internal-testing/tiny-random-LlamaForCausalLM", "hf_models_llama_instruct", "ghost-writers-dataset-v2",
        "skill-classification-v1/data.jsonl", "/home/me/skeleton-classifier-8b/llama.asft.safetensors",
        "/mnt/sk_hynix_nvme_storage/x", "out/sketch-llama-3.1-8b-asft", "model.layers.0.skip_connection_projection",
        "https://host/data.jsonl?split=train&design=2", "a=b", "tokenizer=me/x", "tokens=3", "monkey=banana",
        "key_column=text", "design=2", "eos_token=<|im_end|>", "sk-news-corpus-cleaned-and-split",
        "opus-mt-en-sk-finetuned-kde4-2023",
    ],
)  # fmt: skip
def test_plain_names_are_left(value):
    assert redacted(value) == value


def test_the_config_as_it_was_written(tmp_path):
    path = tmp_path / "config.yml"
    path.write_text("lora_r: 8\nlearning_rate: 0.1\nseed: 1\ndatasets: [{path: a}]\nasft: {direction: d}\n")
    cfg = {
        "axolotl_config_path": str(path), "lora_r": 8, "learning_rate": 0.2, "lora_alpha": 4, "device": "cpu",
        "datasets": [{"path": "a", "trust_remote_code": False}], "asft": {"direction": "d", "lambda_reg": 3.0},
    }  # fmt: skip
    shown = written_config(cfg, ["config.yml", "--learning-rate", "0.2", "--lora_alpha=4"])
    assert shown == {
        "lora_r": 8, "learning_rate": 0.2, "seed": 1, "datasets": [{"path": "a"}],
        "asft": {"direction": "d", "lambda_reg": 3.0}, "lora_alpha": 4,
    }  # fmt: skip


def test_without_the_file_every_key_that_is_set(tmp_path):
    cfg = {"axolotl_config_path": str(tmp_path / "gone.yml"), "lora_r": 8, "seed": None, "output_dir": tmp_path}
    assert written_config(cfg, []) == {
        "axolotl_config_path": str(tmp_path / "gone.yml"), "lora_r": 8, "output_dir": str(tmp_path),
    }  # fmt: skip
    json.dumps(written_config(cfg, []))
