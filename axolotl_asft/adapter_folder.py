"""A new adapter made from one on disk: where it may be written, and how it gets there whole."""

import json
import os
import shutil
import tempfile
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from axolotl_asft.errors import AsftError
from axolotl_asft.files import refuse_to_replace
from axolotl_asft.saved import ADAPTER_CONFIG, ADAPTER_WEIGHTS, SavedAdapter
from axolotl_asft.stamp import add_to_config, add_to_model_card, remove_measurements

PROJECTION_KEY = "asft_projection"
# What stands beside an adapter and is needed to go on training, belongs to the run, or was measured of that adapter.
NOT_COPIED = (
    "checkpoint-", "optimizer", "scheduler", "rng_state", "trainer_state", "training_args", "merged", "debug", "asft_",
    "asft-", "eval", "results", "all_results", "train_results", "test_results", "predict_results", "landscape.",
)  # fmt: skip
# All that --force may delete where the adapter is not one that was written here.
ADAPTER_FILES = (
    "adapter_config.json", "adapter_model.*", "README.md", ".gitattributes", "config.json", "generation_config.json",
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "chat_template*", "vocab.*", "merges.txt",
    "*processor_config.json",
)  # fmt: skip


def check_output(output: Path, adapter: Path, force: bool) -> None:
    """Nothing is written into the adapter that is read, and --force deletes no more than an adapter.

    Raises:
        AsftError: `output` and `adapter` lie in each other, or `output` holds what may not be replaced.
    """
    place, read = output.resolve(), adapter.resolve()
    if place == read:
        raise AsftError(f"{output} is the adapter itself; give another --output")
    if place in read.parents:
        raise AsftError(f"the adapter {adapter} lies inside {output}; give another --output")
    if read in place.parents:
        raise AsftError(f"{output} lies inside the adapter's folder {adapter}; give another --output")
    refuse_to_replace(output, force)
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    if not (output / ADAPTER_CONFIG).is_file():
        raise AsftError(f"{output} holds no adapter, so it is not replaced; give another --output")
    ours = _written_here(output)
    for path in sorted(output.iterdir()):
        if path.is_dir() or not (ours or any(fnmatch(path.name, pattern) for pattern in ADAPTER_FILES)):
            raise AsftError(
                f"{output} holds {path.name}, which is not part of an adapter, so the folder is not replaced; give "
                "another --output"
            )


def write_projected(
    saved: SavedAdapter, tensors: dict[str, Tensor], output: Path, settings: dict[str, Any], section: str, force: bool
) -> None:
    """A complete adapter, beside its place first and then renamed into it.

    Args:
        saved: whose other files are copied.
        settings: for adapter_config.json.
        section: for the model card.
        force: replace what stands in `output`.
    """
    output = output.resolve()  # a link stays a link
    output.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.parent))
    try:
        for path in saved.folder.iterdir():
            wanted = path.is_file() and path.suffix not in (".pt", ".pth", ".bin", ".pkl")
            if wanted and path.name != ADAPTER_WEIGHTS and not path.name.startswith(NOT_COPIED):
                shutil.copy2(path, work / path.name)
        save_file(
            {name: tensor.contiguous() for name, tensor in tensors.items()},
            str(work / ADAPTER_WEIGHTS),
            {"format": "pt"},
        )
        remove_measurements(work)
        add_to_config(work / ADAPTER_CONFIG, PROJECTION_KEY, settings)
        add_to_model_card(work / "README.md", section, "asft-projection", "safe-lora")
        os.chmod(work, 0o755)
        with (work / ADAPTER_WEIGHTS).open("rb") as written:
            os.fsync(written.fileno())
        _into_place(work, output, force)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _written_here(folder: Path) -> bool:
    try:
        config = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and PROJECTION_KEY in config


def _into_place(new: Path, output: Path, force: bool) -> None:
    """Rename `new` to `output`. What stands there goes aside first, comes back if that fails, and is deleted last."""
    old = new.with_name(f"{new.name}.old")
    try:
        if force and output.exists():
            os.rename(output, old)
        os.rename(new, output)
    except BaseException:
        if old.exists() and not output.exists():
            os.rename(old, output)
        raise
    shutil.rmtree(old, ignore_errors=True)
