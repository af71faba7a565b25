"""The models that are asked: a chat model, and adapters on it, with the chat template that they were trained with."""

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from axolotl_asft.errors import AsftError, WorkFailed, one_line
from axolotl_asft.evaluation.fitting import check_complete, check_layers
from axolotl_asft.evaluation.generating import only_special_tokens
from axolotl_asft.evaluation.resizing import resized, saved_rows
from axolotl_asft.files import file_sha256, named_folder, read_json
from axolotl_asft.general_formats import template_to_ask_in
from axolotl_asft.hub import hub_file, hub_model
from axolotl_asft.initialisation import takes_out
from axolotl_asft.naming import model_class
from axolotl_asft.saved import ADAPTER_CONFIG, ADAPTER_WEIGHTS, adapter_config
from axolotl_asft.templates import text_tokenizer

# what transformers and PEFT raise for a bad checkpoint; a RuntimeError is torch's for a lack of memory, too
FAILURES = (OSError, ValueError, RuntimeError, KeyError, TypeError, ImportError, MemoryError, SafetensorError)


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
        name, path = named_folder("--adapter", text)
        if not path.is_dir():
            raise AsftError(f"there is no folder {path}; give the folder of an adapter that was trained")
        if not (path / ADAPTER_CONFIG).is_file():
            raise AsftError(
                f"{path} is not a PEFT adapter (no {ADAPTER_CONFIG} in it); give the folder that was trained"
            )
        if not (path / ADAPTER_WEIGHTS).is_file():
            raise AsftError(f"{path} has no {ADAPTER_WEIGHTS}; expected an adapter saved as safetensors")
        found.append(Subject(name, path))
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
    """The chat model, see `model_class`, on one device, without remote code, see `only_special_tokens`.

    Args:
        name: a folder, or owner/name[@revision] on the Hub.
        dtype: "auto" for that of the checkpoint, or "float32", "bfloat16", "float16".
        load_in_4bit: as bitsandbytes NF4, as QLoRA trains.
        device: default: the GPU if there is one.

    Raises:
        AsftError: no such model.
    """
    from transformers import AutoConfig

    device = chosen_device(device)
    check_model(name)
    options: dict[str, Any] = {"dtype": dtype if dtype == "auto" else getattr(torch, dtype), "device_map": device}
    if load_in_4bit:
        options["quantization_config"] = nf4(device)
    with loading(
        f"the model {name} cannot be loaded", "; check that its files are complete, and that it fits into memory"
    ):
        kind = model_class(AutoConfig.from_pretrained(**place(name)))
        model = kind.from_pretrained(**place(name), **options).eval()
    only_special_tokens(model)
    return model


@contextlib.contextmanager
def loading(failure: str, instead: str = "") -> Iterator[None]:
    """What the libraries make of files that they cannot load, as one line.

    Raises:
        WorkFailed: there is no memory for them, or they are not here and the Hub cannot be reached.
        AsftError: anything else that they raise.
    """
    try:
        yield
    except AsftError:
        raise
    except FAILURES as error:
        kind = WorkFailed if _of_the_machine(error) else AsftError
        raise kind(f"{failure} ({one_line(error)}){instead}") from error


def _of_the_machine(error: BaseException | None) -> bool:
    from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled

    while error is not None:
        if isinstance(error, torch.OutOfMemoryError | MemoryError | LocalEntryNotFoundError | OfflineModeIsEnabled):
            return True
        error = error.__cause__ or error.__context__
    return False


def nf4(device: str) -> Any:
    """How bitsandbytes loads a model in 4 bits, as QLoRA trains."""
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16 if device.startswith("cuda") else torch.float32,
    )


def place(name: str) -> dict[str, Any]:
    """What `from_pretrained` wants to be told of a folder or an id, and of `owner/name@revision` in its parts."""
    wanted = hub_model(name)
    if wanted is None or wanted.revision is None:
        return {"pretrained_model_name_or_path": name}
    return {"pretrained_model_name_or_path": wanted.repo, "revision": wanted.revision}


def check_place(name: str) -> None:
    """Refuse what is no folder here and cannot be on the Hub, of which transformers says that it is not reached."""
    if hub_model(name) is None and not Path(name).is_dir():
        raise AsftError(f"there is no folder {name} here, and no such name on the Hub; give a folder, or owner/name")


def check_model(name: str) -> None:
    """Refuse an adapter in place of a model, which transformers would load with its base below it."""
    check_place(name)
    folder = Path(name)
    weights = [*folder.glob("model*.safetensors"), *folder.glob("pytorch_model*.bin")]
    if (folder / ADAPTER_CONFIG).is_file() and not weights:
        raise AsftError(f"{name} is an adapter; give its base model as --model, and the adapter as --adapter")


MODEL_FILES = (".safetensors", ".bin", ".json", ".jinja", ".model", ".txt")  # weights, configs, vocabularies


def model_state(name: str) -> list[Any]:
    """What tells that a model is no longer the one it was: its files' names, sizes and times; of a Hub id its commit.

    Raises:
        AsftError: no such model on the Hub.
    """
    if hub_model(name) is None:
        return files_state(file for file in Path(name).glob("*") if file.suffix in MODEL_FILES)
    from transformers import AutoConfig

    with loading(f"the model {name} cannot be loaded"):
        return [getattr(AutoConfig.from_pretrained(**place(name)), "_commit_hash", None)]


def files_state(files: Iterable[Path]) -> list[tuple[str, int, int]]:
    """Name, size and time of files, to notice that they changed."""
    there = sorted(file for file in files if file.is_file())
    return [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in there]


def load_tokenizer(model: str, adapter: Path | None = None, prompt_format: str | None = None) -> Any:
    """The tokenizer that an adapter was saved with, else that of the model; it has to have a chat template.

    Args:
        prompt_format: that is to stand in the chat template's place (`axolotl_asft.prompt_formats`), or of `UNSEEN`.

    Raises:
        AsftError: no tokenizer, or one without a chat template.
    """
    from transformers import AutoTokenizer

    kept = adapter is not None and (adapter / "tokenizer_config.json").is_file()
    source = str(adapter) if kept else model
    check_place(source)
    with loading(f"no tokenizer at {source}"):
        tokenizer = text_tokenizer(AutoTokenizer.from_pretrained(**place(source)))
    if prompt_format is not None:
        tokenizer.chat_template = template_to_ask_in(tokenizer, prompt_format)
    if not tokenizer.chat_template:
        raise AsftError(
            f"the tokenizer of {source} has no chat template, so how the model was prompted in training is not known; "
            "save one with the tokenizer; eval, and no other command, can take one from elsewhere (--tokenizer DIR) or "
            "ask without one (--prompt-format)"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


@contextlib.contextmanager
def within_memory(batch_size: int) -> Iterator[None]:
    """Asking a model, with so many texts at a time.

    Raises:
        WorkFailed: the GPU's memory is not enough.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise WorkFailed(
            f"the GPU has too little memory for --batch-size {batch_size} ({one_line(error)[:60]}...); give a smaller "
            "one, or see what else is on the GPU"
        ) from error


def check_fits(model: Any, subject: Subject) -> None:
    """Refuse an adapter of another model, told by its layers; see `check_layers`."""
    if subject.adapter is not None:
        with loading(f"{subject.adapter} does not fit this model"):
            check_layers(model, subject.adapter)


@contextlib.contextmanager
def adapted(model: Any, subject: Subject) -> Iterator[Any]:
    """The model with the subject's adapter on it; without it afterwards, but see `changes_weights`."""
    if subject.adapter is None:
        yield model
        return
    # PEFT's own unload leaves fully trained modules (modules_to_save) in the model
    children = [(parent, name, child) for parent in model.modules() for name, child in parent.named_children()]
    check_fits(model, subject)
    with loading(f"{subject.adapter} does not fit this model"):
        rows = saved_rows(model, subject.adapter)
    with resized(model, rows):
        try:
            yield _with_adapter(model, subject.adapter)
        finally:
            for parent, name, child in children:
                setattr(parent, name, child)
            model.__dict__.pop("peft_config", None)


def _with_adapter(model: Any, adapter: Path) -> Any:
    from peft import PeftModel

    with loading(f"{adapter} does not fit this model"):
        peft_model = PeftModel.from_pretrained(model, str(adapter)).eval()
    # lm-eval ties the weights of what it is given, where PEFT's copies of them are apart
    peft_model.tie_weights = lambda *_, **__: None  # type: ignore[assignment]
    check_complete(peft_model, adapter)
    return peft_model


def changes_weights(subject: Subject) -> bool:
    """Whether putting the adapter on changes the model's own weights, for good.

    PiSSA and its like take something out of them; trained biases, and whatever else is no LoRA and in no module that is
    replaced whole, are written over them.
    """
    if subject.adapter is None:
        return False
    from safetensors import safe_open

    config = adapter_config(subject.adapter)
    if takes_out(config.get("init_lora_weights", True)):
        return True
    beside = ("lora_", "trainable_tokens", *(f".{name}." for name in config.get("modules_to_save") or ()))
    with safe_open(str(subject.adapter / ADAPTER_WEIGHTS), framework="pt") as tensors:
        return any(not any(word in name for word in beside) for name in tensors.keys())  # noqa: SIM118


def other_base(model: str, subject: Subject) -> str | None:
    """A line on an adapter of another model, as its config names it; None where there is nothing to say.

    Told apart are two ids of the Hub, whatever their revisions, and two local folders whose config.json differ in
    architecture or shape. Of an id and a folder, and of folders with models of one shape, nothing is said: a copy that
    is merged, rounded or in another dtype is as good.
    """
    if subject.adapter is None:
        return None
    base = adapter_config(subject.adapter).get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        return None
    one, other = hub_file(base), hub_file(model)
    if one is not None and other is not None:
        same = one.repo.lower() == other.repo.lower()
    else:
        shapes = [_shape(Path(name).expanduser()) for name in (base, model)]
        same = None in shapes or shapes[0] == shapes[1]
    if same:
        return None
    return f"{subject.adapter} was trained on {base} but evaluated on {model}; pass {base} as --model"


def _shape(folder: Path) -> list[Any] | None:
    if not (folder / "config.json").is_file():
        return None
    config = read_json(folder / "config.json", "give the folder of a model")
    config |= {**(config.get("text_config") or {}), "architectures": config.get("architectures")}
    return [config.get(key) for key in ("architectures", "vocab_size", "hidden_size", "num_hidden_layers")]
