"""Running axolotl for a benchmark: a config and a data set as files, one training in a process of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from axolotl_asft.files import atomic_write_text
from benchmarks.safety_data import Example

OFFLINE = {"HF_HUB_OFFLINE": "1", "AXOLOTL_DO_NOT_TRACK": "1", "DO_NOT_TRACK": "1", "TOKENIZERS_PARALLELISM": "false"}
COMMON = {
    "sequence_len": 128,
    "pad_to_multiple_of": 2,  # axolotl pads to 64 by itself, which here would be a third of the work
    "optimizer": "adamw_torch",
    "logging_steps": 10,
    "save_strategy": "no",
    "dataset_num_proc": 1,
    "dataloader_num_workers": 0,
    "bf16": False,
    "fp16": False,
    "tf32": False,
}


def write_chats(path: Path, examples: list[Example]) -> None:
    """One chat a line."""
    atomic_write_text(path, "".join(json.dumps(example.as_chat()) + "\n" for example in examples))


def write_config(path: Path, model: Path, data: Path, output: Path, settings: dict[str, Any]) -> Path:
    """An axolotl config beside its output; returns its path."""
    config = {
        "base_model": str(model),
        "datasets": [{"path": str(data), "type": "chat_template"}],
        "dataset_prepared_path": str(path.with_suffix(".prepared")),
        "output_dir": str(output),
        **COMMON,
        **settings,
    }
    atomic_write_text(path, yaml.safe_dump(config, sort_keys=False))
    return path


def train(config: Path) -> None:
    """`axolotl train` without a launcher; its log lies beside the config.

    Raises:
        RuntimeError: the training failed; with the end of its log.
    """
    environment = {**os.environ, **OFFLINE}
    log = config.with_suffix(".log")
    with log.open("w") as file:
        command = [sys.executable, "-m", "axolotl.cli.train", config.name]
        done = subprocess.run(command, cwd=config.parent, env=environment, stdout=file, stderr=file)
    if done.returncode != 0:
        raise RuntimeError(f"{config} failed:\n{log.read_text()[-3000:]}")
