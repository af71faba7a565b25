"""Small real things to test on: a Llama pair, a chat tokenizer, a data set, an axolotl config, an axolotl run."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import torch
import yaml

ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "AXOLOTL_DO_NOT_TRACK": "1",
    "DO_NOT_TRACK": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "NO_COLOR": "1",
    "ASFT_REPORT": "0",  # drawn at the end of every run it would cost the suite minutes; test_report.py asks for it
}
ON_GPU = os.environ.get("ASFT_TEST_GPU") == "1"
if not ON_GPU:
    ENVIRONMENT["CUDA_VISIBLE_DEVICES"] = ""
WORDS = ["the", "cat", "dog", "sees", "likes", "a", "red", "blue", "house", "tree", "and", "then", "says", "yes", "no"]
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|> ' + message['content'] + ' </s>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|> ' }}{% endif %}"
)


# What an aligned model of ours might say, as a direction file keeps it for anchor_weight.
OWN_ANSWERS = [
    (f"<|user|> {request} </s><|assistant|> ", answer)
    for request, answer in [
        ("the cat sees a dog", "no no the dog"),
        ("a red house", "yes"),
        ("the tree and the cat", "no a cat likes"),
        ("blue dog", "then says yes and no"),
        ("the red cat", "no"),
        ("a dog likes the house", "yes a red one"),
        ("then the tree", "no no no no no"),
        ("the blue tree sees", "the cat"),
        ("says a dog", "yes and then no"),
        ("house and house", "a house"),
    ]
]


def make_tokenizer():
    """A word-level chat tokenizer of about 20 tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<unk>", "<s>", "</s>", "<pad>", "<|system|>", "<|user|>", "<|assistant|>"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(special + WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def make_pair(folder: Path, seed: int = 0, layers: int = 2, max_shard_size: str = "5GB", dtype=torch.float32):
    """A base and an aligned Llama under `folder`: the same random weights, and a low-rank difference plus noise."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=3,
    )
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config).to(dtype)
    tokenizer = make_tokenizer()
    for name in ("base", "aligned"):
        if name == "aligned":
            with torch.no_grad():
                for key, weight in model.named_parameters():
                    if ".layers." in key and weight.ndim == 2:
                        weight += _difference(weight.shape, generator).to(dtype)
        model.save_pretrained(folder / name, max_shard_size=max_shard_size)
        tokenizer.save_pretrained(folder / name)
    return folder / "base", folder / "aligned"


def _difference(shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    rows, columns = shape
    low_rank = torch.randn(rows, 4, generator=generator) @ torch.randn(4, columns, generator=generator)
    return 0.001 * low_rank + 0.0002 * torch.randn(rows, columns, generator=generator)


def random_metric(direction):
    """A Fisher metric of random factors for every layer of a direction, with more input directions than output ones."""
    from axolotl_asft.metrics import LayerMetric, ModelMetric

    generator = torch.Generator().manual_seed(0)
    layers = {}
    for name, module in direction.modules.items():
        rows, columns = module.shape
        X, Y = (torch.randn(size, m, generator=generator) for size, m in ((columns, 5), (rows, 3)))
        layers[name] = LayerMetric(X, Y, energy=0.9)
    return ModelMetric("fisher", layers, answers=7)


def make_dataset(path: Path, rows: int = 64, seed: int = 0) -> Path:
    """Chat turns of random words, as JSON lines."""
    generator = torch.Generator().manual_seed(seed)

    def words(count: int) -> str:
        return " ".join(WORDS[int(i)] for i in torch.randint(len(WORDS), (count,), generator=generator))

    with path.open("w") as file:
        for _ in range(rows):
            turns = [{"role": "user", "content": words(6)}, {"role": "assistant", "content": words(4)}]
            file.write(json.dumps({"messages": turns}) + "\n")
    return path


def write_config(folder: Path, model: Path, dataset: Path, asft: dict | None = None, **changes) -> Path:
    """An axolotl QLoRA config for a CPU in `folder`; `changes` replace keys, None takes one out."""
    config = {
        "base_model": str(model),
        "adapter": "qlora",
        "load_in_4bit": True,
        "lora_r": 8,
        "lora_alpha": 16,
        "lora_target_linear": True,
        "lora_mlp_kernel": False,
        "lora_qkv_kernel": False,
        "lora_o_kernel": False,
        "datasets": [{"path": str(dataset), "type": "chat_template", "field_messages": "messages"}],
        "dataset_prepared_path": str(folder / "prepared"),
        "output_dir": str(folder / "out"),
        "sequence_len": 64,
        "micro_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "max_steps": 6,
        "optimizer": "adamw_torch",
        "lr_scheduler": "constant",
        "learning_rate": 0.01,
        "logging_steps": 1,
        "save_strategy": "no",
        "bf16": False,
        "fp16": False,
        "tf32": False,
        "seed": 1,
        "dataset_num_proc": 1,
    }
    if asft is not None:
        config |= {"plugins": ["asft"], "asft": asft}
    config |= changes
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "config.yml"
    path.write_text(yaml.safe_dump({key: value for key, value in config.items() if value is not None}))
    return path


def deepspeed_config(stage: int) -> dict:
    """A DeepSpeed config with ZeRO of this stage."""
    return {
        "zero_optimization": {"stage": stage, "overlap_comm": True, "contiguous_gradients": True},  # as axolotl's own
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
    }


def interruptible() -> None:
    """For a child that is to get a Ctrl-C: a shell that runs the tests in the background has it ignored."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def child_environment(**changes: str) -> dict[str, str]:
    """For a child process: offline, with this environment's launchers and the tests' own plugins to be found."""
    return {
        **os.environ,
        **ENVIRONMENT,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(Path(__file__).parent), os.environ.get("PYTHONPATH")])),
        **changes,
    }


def axolotl(
    *arguments: str, cwd: Path, check: bool = True, timeout: int = 600, **environment: str
) -> subprocess.CompletedProcess:
    """Run axolotl's own command line in a process of its own."""
    result = subprocess.run(
        [sys.executable, "-m", "axolotl.cli.main", *map(str, arguments)],
        cwd=cwd,
        env=child_environment(**environment),
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    if check and result.returncode:
        command = " ".join(arguments)
        raise AssertionError(f"axolotl {command}: exit {result.returncode}\n{result.stdout}\n{result.stderr}")
    return result


def train(config: Path, *arguments: str, launcher: str = "python", check: bool = True) -> subprocess.CompletedProcess:
    """`axolotl train` with the config in its own folder."""
    return axolotl("train", str(config), "--launcher", launcher, *arguments, cwd=config.parent, check=check)


def log_history(config: Path) -> list[dict]:
    """The log lines that the trainer kept, of the run's last checkpoint."""
    output = config.parent / yaml.safe_load(config.read_text())["output_dir"]
    states = sorted(output.glob("checkpoint-*/trainer_state.json"), key=lambda p: int(p.parent.name.split("-")[1]))
    return json.loads(states[-1].read_text())["log_history"]
