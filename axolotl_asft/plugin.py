"""The axolotl plugin: a thin adapter over `attach`."""

from pathlib import Path
from typing import Any

from axolotl.integrations.base import BasePlugin

from axolotl_asft.args import AsftArgs, parse_block
from axolotl_asft.constraint import Constraint, attach
from axolotl_asft.direction import AlignmentDirection
from axolotl_asft.errors import AsftError
from axolotl_asft.guard import OUR_NAMES
from axolotl_asft.verify import verify_checkpoint

ADAPTERS = ("lora", "qlora")


class AsftPlugin(BasePlugin):
    """`plugins: [asft]`: trains under the AsFT penalty, as the `asft:` block says."""

    def __init__(self) -> None:
        super().__init__()
        self._direction: AlignmentDirection | None = None
        self._constraint: Constraint | None = None

    def get_input_args(self) -> str:
        return "axolotl_asft.args.AsftPluginArgs"

    def register(self, cfg: Any) -> None:
        """Called for every command that reads a config: what the YAML alone tells to be wrong ends here."""
        if cfg.get("asft") is None:
            raise AsftError("plugins: lists asft, but the config has no asft: block; add it, or take the plugin out")
        parse_block(cfg["asft"])
        if sum(name in OUR_NAMES for name in cfg.get("plugins") or []) > 1:
            raise AsftError("plugins: lists asft more than once; list it once")
        if cfg.get("adapter") not in ADAPTERS:
            raise AsftError(
                f"adapter is {cfg.get('adapter')!r}; the constraint needs LoRA: set adapter: qlora or adapter: lora"
            )
        for key in ("relora", "peft_use_dora"):
            if cfg.get(key):
                raise AsftError(f"{key} is not supported by the constraint yet; take it out of the config")

    def load_datasets(self, cfg: Any, preprocess: bool = False) -> None:
        """The first hook that `axolotl train` alone calls: look at the direction before any long work."""
        if not preprocess:
            self._load_direction(cfg)

    def post_trainer_create(self, cfg: Any, trainer: Any) -> None:
        block = _block(cfg)
        options = block.model_dump(exclude={"direction", "direction_sha256", "lambda_reg"})
        self._constraint = attach(trainer, self._load_direction(cfg), block.lambda_reg, **options)

    def post_train(self, cfg: Any, model: Any) -> None:
        """axolotl saves the adapter itself at the end, past the trainer's save_model."""
        if self._constraint is None:
            raise AsftError("training ended without the constraint being attached; do not use its adapter")
        self._constraint.mark(cfg.output_dir)

    def _load_direction(self, cfg: Any) -> AlignmentDirection:
        if self._direction is None:
            block = _block(cfg)
            direction = AlignmentDirection.load(Path(block.direction), block.direction_sha256)
            if block.verify_model:
                verify_checkpoint(direction, cfg.base_model)
            self._direction = direction
        return self._direction


def _block(cfg: Any) -> AsftArgs:
    return parse_block(cfg.asft.to_dict() if hasattr(cfg.asft, "to_dict") else cfg.asft)
