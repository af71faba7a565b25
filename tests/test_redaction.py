"""What a run writes about itself: the config as it was written, and no secret."""

import json

import pytest

from axolotl_asft.redaction import REDACTED, redacted
from axolotl_asft.yaml_config import written_config


@pytest.mark.parametrize(
    "name",
    [
        "hub_token", "token", "HF_TOKEN", "wandb_api_key", "apiKey", "key", "password", "db-password", "client_secret",
        "aws_secret_access_key", "accessToken", "credentials", "keys", "Authorization",
    ],
)  # fmt: skip
def test_secret_names(name):
    assert redacted({name: "abc"}) == {name: REDACTED}
    assert redacted({"outer": [{name: 12345}]}) == {"outer": [{name: REDACTED}]}
    assert redacted({name: None}) == {name: None}


@pytest.mark.parametrize(
    "name",
    [
        "pad_token", "eos_token", "special_tokens", "tokens", "tokenizer_type", "keypoints", "lora_qkv_kernel",
        "monkey", "max_new_tokens", "add_special_tokens", "direction_sha256", "passage", "image_token_id",
        "hub_model_id",
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
        ("--password-free text, sk-ip", "--password-free text, sk-ip"),
        ("mail me@example.org", "mail me@example.org"),
    ],
)
def test_values_that_hold_a_secret(value, shown):
    assert redacted({"path": value}) == {"path": shown}
    assert redacted([value]) == [shown]


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
