"""The models that are asked: a chat model, and adapters on it, with the chat template that they were trained with."""

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from axolotl_asft.direction import file_sha256
from axolotl_asft.errors import AsftError

# as in `saved`, which imports PEFT: seconds that an error in the arguments need not cost
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@dataclass(frozen=True)
class Subject:
    """One row of the table: the model itself, or one of its adapters.

    Attributes:
        name: what the table calls it.
        adapter: folder of a PEFT adapter; None for the model itself.
    """

    name: str
    adapter: Path | None = None

    @property
    def sha256(self) -> str:
        """Of the adapter's weights; "" for the model itself."""
        return file_sha256(self.adapter / ADAPTER_WEIGHTS) if self.adapter is not None else ""


def subjects(adapters: list[str]) -> list[Subject]:
    """The adapters to ask, given as `folder` or `name=folder`.

    Raises:
        AsftError: no adapter there, one kept as a pickle, or two of one name.
    """
    found: list[Subject] = []
    for text in adapters:
        name, equals, folder = text.partition("=")
        if equals and (Path(text).expanduser() / ADAPTER_CONFIG).is_file():
            equals, name = "", ""  # a folder with a = in its name
        elif equals and not name:
            raise AsftError(f"--adapter is {text!r}; expected a folder, or name=folder")
        path = Path(folder if equals else text).expanduser()
        if not (path / ADAPTER_CONFIG).is_file():
            raise AsftError(f"{path} is no PEFT adapter (no {ADAPTER_CONFIG} in it); give the folder that was trained")
        if not (path / ADAPTER_WEIGHTS).is_file():
            raise AsftError(f"{path} has no {ADAPTER_WEIGHTS}; expected an adapter saved as safetensors")
        found.append(Subject(name if equals else path.resolve().name, path))
    names = [subject.name for subject in found]
    twice = next((name for name in names if names.count(name) > 1 or name == "model"), None)
    if twice is not None:
        raise AsftError(f"two rows would be called {twice!r}; name the adapters with --adapter name=folder")
    return found


def chosen_device(device: str | None) -> str:
    """The device to compute on: as asked, else the GPU if there is one.

    Raises:
        AsftError: another kind than cpu and cuda, or a GPU that torch does not see.
    """
    if device is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, number = device.partition(":")
    if kind not in ("cpu", "cuda") or (number and not number.isdecimal()):
        raise AsftError(f"--device is {device!r}; expected cpu, cuda, or cuda: and a number")
    if kind == "cuda" and int(number or 0) >= torch.cuda.device_count():
        raise AsftError(f"--device is {device!r}; torch sees {torch.cuda.device_count()} GPUs here")
    return device


def load_model(name: str, dtype: str = "auto", load_in_4bit: bool = False, device: str | None = None) -> Any:
    """The chat model, as `AutoModelForCausalLM`, on one device, without remote code.

    Args:
        name: a folder or Hub id.
        dtype: "auto" for that of the checkpoint, or "float32", "bfloat16", "float16".
        load_in_4bit: as bitsandbytes NF4, as QLoRA trains.
        device: default: the GPU if there is one.

    Raises:
        AsftError: no such model.
    """
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    device = chosen_device(device)
    check_model(name)
    options: dict[str, Any] = {"dtype": dtype if dtype == "auto" else getattr(torch, dtype), "device_map": device}
    if load_in_4bit:
        compute = torch.bfloat16 if device.startswith("cuda") else torch.float32
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=compute,
        )
    try:
        return AutoModelForCausalLM.from_pretrained(name, **options).eval()
    except (OSError, ValueError) as error:
        raise AsftError(f"the model {name} cannot be loaded ({str(error).splitlines()[0]})") from error


def check_model(name: str) -> None:
    """Refuse an adapter in place of a model, which transformers would load with its base below it."""
    folder = Path(name)
    weights = [*folder.glob("model*.safetensors"), *folder.glob("pytorch_model*.bin")]
    if (folder / ADAPTER_CONFIG).is_file() and not weights:
        raise AsftError(f"{name} is an adapter; give its base model as --model, and the adapter as --adapter")


def model_state(name: str) -> list[tuple[str, int, int]]:
    """Name, size and time of the weight files of a local folder, to notice that they changed; [] of a Hub id."""
    files = sorted(Path(name).glob("*.safetensors"))
    return [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]


def load_tokenizer(model: str, adapter: Path | None = None) -> Any:
    """The tokenizer that an adapter was saved with, else that of the model; it has to have a chat template.

    Raises:
        AsftError: no tokenizer, or one without a chat template.
    """
    from transformers import AutoTokenizer

    kept = adapter is not None and (adapter / "tokenizer_config.json").is_file()
    source = str(adapter) if kept else model
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise AsftError(f"no tokenizer at {source} ({str(error).splitlines()[0]})") from error
    if not tokenizer.chat_template:
        raise AsftError(
            f"the tokenizer of {source} has no chat template, so that it is not known how the model was asked in "
            "training; give --tokenizer with a folder that has one"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


@contextlib.contextmanager
def adapted(model: Any, subject: Subject) -> Iterator[Any]:
    """The model with the subject's adapter on it; without it afterwards, but see `changes_weights`."""
    if subject.adapter is None:
        yield model
        return
    # PEFT's own unload leaves fully trained modules (modules_to_save) in the model
    children = [(parent, name, child) for parent in model.modules() for name, child in parent.named_children()]
    try:
        yield _with_adapter(model, subject.adapter)
    finally:
        for parent, name, child in children:
            setattr(parent, name, child)
        model.__dict__.pop("peft_config", None)


def _with_adapter(model: Any, adapter: Path) -> Any:
    from peft import PeftModel

    try:
        peft_model = PeftModel.from_pretrained(model, str(adapter)).eval()
    except (ValueError, RuntimeError, KeyError, OSError, TypeError) as error:
        raise AsftError(f"{adapter} does not go onto this model ({str(error).splitlines()[0]})") from error
    _check_complete(peft_model, adapter)
    return peft_model


def changes_weights(subject: Subject) -> bool:
    """Whether putting the adapter on takes something out of the model's weights, for good: PiSSA and its like."""
    if subject.adapter is None:
        return False
    from axolotl_asft.lora import takes_out

    config = json.loads((subject.adapter / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    return takes_out(config.get("init_lora_weights", True))


def _check_complete(peft_model: Any, adapter: Path) -> None:
    """PEFT only warns where an adapter has layers that the model lacks."""
    from peft import get_peft_model_state_dict
    from safetensors import safe_open

    loaded = get_peft_model_state_dict(peft_model, save_embedding_layers=False)
    with safe_open(str(adapter / ADAPTER_WEIGHTS), framework="pt") as tensors:
        saved = {name for name in tensors.keys() if "lora_" in name}  # noqa: SIM118 - not iterable itself
    differing = saved ^ {name for name in loaded if "lora_" in name}
    if differing:
        raise AsftError(
            f"{adapter} does not go onto this model: {len(differing)} of its tensors have no counterpart (first "
            f"{min(differing)}); give the model that it was trained on"
        )
