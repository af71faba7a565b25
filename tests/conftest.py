"""Everything offline and untracked, before any library looks."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny import ENVIRONMENT, ON_GPU, OWN_ANSWERS, make_dataset, make_pair

os.environ.update(ENVIRONMENT)
MOST_WORKERS = 8  # of 2 to 3 GB each


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """`-n auto`: a worker a core."""
    return min(os.cpu_count() or 1, MOST_WORKERS)


def pytest_configure() -> None:
    """Under pytest-xdist: this worker's share of the cores, and a port of its own for what torchrun starts."""
    worker = os.environ.get("PYTEST_XDIST_WORKER")
    if worker is None:
        return
    threads = max(1, (os.cpu_count() or 1) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"]))
    torch.set_num_threads(threads)
    os.environ["OMP_NUM_THREADS"] = str(threads)
    os.environ["PET_MASTER_PORT"] = str(29501 + int(worker.removeprefix("gw")))


def pytest_collection_modifyitems(items):
    """Tests marked gpu run on request, `ASFT_TEST_GPU=1 pytest -m gpu`; all others see no GPU."""
    for item in items:
        if item.get_closest_marker("gpu") and not ON_GPU:
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU, and ASFT_TEST_GPU=1"))


@pytest.fixture(scope="session")
def pair(tmp_path_factory) -> tuple[Path, Path]:
    """A tiny base and its aligned model, as checkpoint folders."""
    return make_pair(tmp_path_factory.mktemp("pair"))


@pytest.fixture(scope="session")
def direction_file(pair, tmp_path_factory) -> Path:
    """Their direction, rank 8."""
    from axolotl_asft import extract_direction

    path = tmp_path_factory.mktemp("direction") / "tiny.asft.safetensors"
    extract_direction(*pair, rank=8).save(path)
    return path


@pytest.fixture(scope="session")
def anchored_file(pair, tmp_path_factory) -> Path:
    """Their direction with the aligned model's own answers, for anchor_weight."""
    from axolotl_asft import extract_direction

    path = tmp_path_factory.mktemp("anchored") / "tiny.asft.safetensors"
    extract_direction(*pair, rank=8, own_answers=OWN_ANSWERS).save(path)
    return path


@pytest.fixture(scope="session")
def dataset(tmp_path_factory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("dataset") / "data.jsonl")


@pytest.fixture(scope="session")
def rows() -> list[dict]:
    """48 encoded rows of 8 words, for a transformers trainer."""
    from tiny import WORDS, make_tokenizer

    tokenizer = make_tokenizer()
    generator = torch.Generator().manual_seed(0)
    picked = torch.randint(len(WORDS), (48, 8), generator=generator).tolist()
    encoded = [tokenizer.encode(" ".join(WORDS[i] for i in row)) for row in picked]
    return [{"input_ids": ids, "labels": ids, "attention_mask": [1] * len(ids)} for ids in encoded]


@pytest.fixture(scope="session")
def forked_train():
    """Runs `axolotl.cli.train` on a config in a process of its own; returns exit status and output."""
    server = subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("forked_axolotl.py"))],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )

    def answer() -> dict:
        for line in server.stdout:
            if line.startswith("{"):  # axolotl may print while it is imported
                return json.loads(line)
        raise AssertionError("the axolotl server ended")

    assert answer()["ready"]

    def run(config: Path, **environment: str) -> tuple[int, str]:
        server.stdin.write(json.dumps({"config": str(config), "environment": environment}) + "\n")
        server.stdin.flush()
        result = answer()
        return result["exit"], result["output"]

    yield run
    server.stdin.close()
    server.wait(timeout=30)


@pytest.fixture(scope="session")
def classifier(tmp_path_factory) -> Path:
    """A real sequence classifier that learned one thing: answers that say yes are harmful."""
    from tiny import make_tokenizer
    from transformers import LlamaConfig, LlamaForSequenceClassification

    tokenizer = make_tokenizer()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForSequenceClassification(
            LlamaConfig(
                vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
                pad_token_id=3, id2label={0: "harmless", 1: "harmful"}, label2id={"harmless": 0, "harmful": 1},
            )
        )  # fmt: skip
    texts = [f"the {a}\n{b} {a}" for a in ("cat", "dog", "tree", "house") for b in ("yes", "no")]
    batch = tokenizer(texts, return_tensors="pt")
    batch.pop("token_type_ids", None)
    labels = torch.tensor([int("yes" in text) for text in texts])
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(60):
        model(**batch, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    folder = tmp_path_factory.mktemp("classifier")
    model.save_pretrained(folder)
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    tokenizer.save_pretrained(folder)
    return folder
