"""The axolotl plugin: a thin adapter over `attach`."""

import importlib.util
import logging
import os
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

from axolotl.integrations.base import BasePlugin
from axolotl.utils.schemas.config import AxolotlInputConfig

from axolotl_asft.args import AsftArgs, parse_block
from axolotl_asft.attaching import attach, refused_of_continued
from axolotl_asft.constraint import Constraint
from axolotl_asft.data_frames import frames
from axolotl_asft.direction import AlignmentDirection
from axolotl_asft.engines import FSDP1, deepspeed_config, other_parallelism, refuse_deepspeed
from axolotl_asft.errors import AsftError, one_line
from axolotl_asft.guard import OUR_NAMES, SHORT_NAME, fold_dotted_keys, refuse_misspelt_block, refuse_strays
from axolotl_asft.initialisation import takes_out
from axolotl_asft.interruption import StampOnInterrupt
from axolotl_asft.report.drawing import INSTALL
from axolotl_asft.resuming import formats_before
from axolotl_asft.startup import is_installed
from axolotl_asft.templates import words_of
from axolotl_asft.trained import Trained
from axolotl_asft.verify import verify_checkpoint
from axolotl_asft.yaml_config import refuse_repeated_keys, written_config

LOG = logging.getLogger("axolotl.asft")

ADAPTERS = ("lora", "qlora")
NEW_ADAPTER = ("dpo", "ipo", "kto")  # trainers that make the adapter themselves, whatever lora_model_dir says
REFUSED_KEYS = {
    "relora": "it merges the update into the weights and starts again, and the change from the aligned model is lost; "
    "train one LoRA of a larger lora_r",
    "peft_use_dora": "DoRA also rescales the rows of the aligned weight, so that its update is not scaling B A; use "
    "plain LoRA",
    "qat": "it rounds the weights during training; train first, and quantize afterwards",
    "nvfp4_merge_aware": "it rounds the weights during training; train first, and quantize afterwards",
    "lisa_step_interval": "LISA trains whole layers in turn, which no penalty covers; leave it out",
    "lisa_n_layers": "LISA trains whole layers in turn, which no penalty covers; leave it out",
    "fix_untrained_tokens": "it changes embeddings, which no penalty covers; leave it out",
    "reinit_weights": "the model would not be the aligned one; leave it out",
    "peft_layer_replication": "its layers would not be those of the same names in the direction; leave it out",
}


class AsftPlugin(BasePlugin):
    """`plugins: [asft]`: trains under the AsFT penalty, as the `asft:` block says."""

    def __init__(self) -> None:
        super().__init__()
        self._loaded: tuple[AsftArgs, AlignmentDirection, bool] | None = None
        self._constraint: Constraint | None = None  # until the training ends
        self._trained: Trained | None = None
        self._pictured = False

    def get_input_args(self) -> str:
        return "axolotl_asft.args.AsftPluginArgs"

    def register(self, cfg: Any) -> None:
        """Called for every command that reads a config: what the YAML alone tells to be wrong ends here."""
        fold_dotted_keys(cfg)
        refuse_misspelt_block(cfg)
        if (file := cfg.get("axolotl_config_path")) and Path(file).is_file():
            refuse_repeated_keys(Path(file))
        if cfg.get("asft") is None:
            raise AsftError("plugins: lists asft, but the config has no asft: block; add it, or take the plugin out")
        block = parse_block(cfg["asft"])
        if not is_installed():
            LOG.warning(
                "AsFT: Python did not read axolotl_asft.pth, as under pip's --target or with the package on PYTHONPATH "
                "alone: this run is constrained, but one whose plugins: line is missing or misspelt would not be "
                "stopped; install axolotl-asft into the environment itself"
            )
        if SHORT_NAME not in cfg.get("plugins", []):
            LOG.warning(
                "AsFT: plugins: lists the long name; on a machine without axolotl-asft axolotl would only log that and "
                "train without the constraint, while the short one ends the run; write `- asft`"
            )
        refuse_strays(cfg, AxolotlInputConfig.model_fields)
        if sum(name in OUR_NAMES for name in cfg.get("plugins") or []) > 1:
            raise AsftError("plugins: lists asft more than once; list it once")
        if cfg.get("adapter") not in ADAPTERS:
            raise AsftError(
                f"adapter is {cfg.get('adapter') or 'not set'}; the constraint needs LoRA: set adapter: qlora or "
                "adapter: lora (for full fine-tuning there is `axolotl asft answers`)"
            )
        if any("grokfast" in str(name).lower() for name in cfg.get("plugins") or []):
            raise AsftError(
                "plugins: Grokfast amplifies gradients after the constraint has joined them, so that lambda_reg would "
                "not mean what it says; leave it out"
            )
        if cfg.get("lora_model_dir") and cfg.get("rl") in NEW_ADAPTER:
            raise AsftError(
                f"lora_model_dir is ignored by axolotl under rl: {cfg['rl']}, which starts a new adapter; leave it "
                "out, or merge that adapter first"
            )
        for key, instead in REFUSED_KEYS.items():
            if cfg.get(key) not in (None, False):  # axolotl obeys an empty block
                raise AsftError(f"{key} is not supported by the constraint: {instead}")
        if cfg.get("deepspeed"):
            refuse_deepspeed(deepspeed_config(cfg["deepspeed"]), cfg.get("fp16") is True, block.max_drift)
        if (cfg.get("fsdp") or cfg.get("fsdp_config")) and not _asks_for_fsdp2(cfg):
            raise AsftError(FSDP1)
        # sequence_parallel_degree is axolotl's deprecated name of context_parallel_size
        sizes = ("tensor_parallel_size", "context_parallel_size", "sequence_parallel_degree", "expert_parallel_size")
        for key in sizes:
            if str(cfg.get(key) or 1) != "1":
                raise AsftError(other_parallelism(key))

    def load_datasets(self, cfg: Any, preprocess: bool = False) -> None:
        """The first hook that `axolotl train` alone calls: look at the direction before any long work."""
        if not preprocess:
            self._load_direction(cfg)

    def post_trainer_create(self, cfg: Any, trainer: Any) -> None:
        block = _block(cfg)
        options = block.model_dump(exclude={"direction", "direction_sha256", "lambda_reg"})
        direction, verified = self._load_direction(cfg)
        if verified and _loftq(cfg):
            options["verify_model"] = False  # LoftQ rounds the weights as it loads them: their files were looked at
        plugin = weakref.ref(self)  # of a sweep each run has a plugin of its own, and leaves a handler behind
        trainer.add_callback(StampOnInterrupt(lambda: _held(plugin())))
        if cfg.lora_model_dir and any(map(_takes_out, trainer.model.peft_config.values())):
            raise AsftError(refused_of_continued(cfg.lora_model_dir))
        self._trained, self._pictured = None, False
        from axolotl_asft.run_config import resumed_from
        from axolotl_asft.run_data import dataset_templates, run_formats

        tokenizer, given = getattr(trainer, "processing_class", None), block.prompt_formats
        if given is None:  # a template may have the date in it: read anew, the data would begin otherwise
            given = formats_before(resumed_from(cfg))
        formats = run_formats(cfg, tokenizer, given, direction.spec)
        found = frames(words_of(tokenizer), getattr(trainer, "train_dataset", None), formats.asked)
        by_itself = formats.readable and not formats.given
        options["prompt_formats"] = [*formats.asked, *(found.formats if found is not None and by_itself else ())]
        templates = dataset_templates(cfg, tokenizer)
        self._constraint = attach(trainer, direction, block.lambda_reg, chat_templates=templates, **options)
        held = self._constraint.prompt_formats
        lines = formats.unheld(held) if self._constraint.holds_answers else []
        if not lines and self._constraint.anchor_weight > 0 and found is not None:
            lines = found.unheld(by_itself, formats.given or bool(formats.asked))
        for line in lines:
            LOG.warning("AsFT: %s", line)
        self._constraint.history.header |= {
            "config": written_config(cfg.to_dict(), sys.argv[1:]),
            "direction_file": _seen_from(cfg.output_dir, block.direction),
        }

    def post_train(self, cfg: Any, model: Any) -> None:
        """axolotl saves the adapter itself at the end, past the trainer's save_model.

        Called when training ends and again when the adapter and its card are saved: the card finds its picture drawn.
        From then on nothing here holds the model: other plugins want its memory.
        """
        has_ended = self._constraint is not None
        if self._constraint is not None:
            self._trained, self._constraint = self._constraint.trained(), None
        if self._trained is None:
            raise AsftError("training ended without the constraint being attached; do not use its adapter")
        if not self._pictured:
            self._pictured = True
            self._draw(cfg, lambda write: write.draw_training_picture(cfg.output_dir))
        if not has_ended:  # else the adapter that lies there is not this run's yet
            self._trained.mark(cfg.output_dir)

    def post_train_unload(self, cfg: Any) -> None:
        """The last hook of `axolotl train`: everything is saved, and can be drawn."""
        if self._trained is not None:
            direction = self._trained.direction
            self._draw(cfg, lambda write: write.write_report(cfg.output_dir, direction=direction))

    def _draw(self, cfg: Any, draw: Callable[[Any], Any]) -> None:
        """Draw on the main process; a picture that cannot be drawn costs a warning, never the run."""
        assert self._trained is not None
        if not self._trained.has_history or os.environ.get("ASFT_REPORT") == "0":
            return
        by_hand = f"axolotl asft report {cfg.output_dir}"
        if importlib.util.find_spec("matplotlib") is None:
            LOG.info("no report is drawn without matplotlib: %s, then %s", INSTALL, by_hand)
            return
        try:
            from axolotl_asft.report import write

            draw(write)
        except Exception as error:  # of whatever kind: the training is done and saved
            LOG.warning("the report could not be drawn (%s); draw it by hand: %s", one_line(error), by_hand)

    def _load_direction(self, cfg: Any) -> tuple[AlignmentDirection, bool]:
        """The direction, and whether the files of the base model agreed with it."""
        block = _block(cfg)
        if self._loaded is None or self._loaded[0] != block:
            direction = AlignmentDirection.load(block.direction, block.direction_sha256)
            self._loaded = block, direction, block.verify_model and verify_checkpoint(direction, cfg.base_model)
        return self._loaded[1:]


def _held(plugin: AsftPlugin | None) -> Constraint | Trained | None:
    """What stamps an adapter that is saved at Ctrl-C."""
    return None if plugin is None else plugin._constraint or plugin._trained


def _asks_for_fsdp2(cfg: Any) -> bool:
    config = cfg.get("fsdp_config") or {}
    version = cfg.get("fsdp_version") or config.get("fsdp_version") or config.get("version")
    return str(version) == "2"


def _seen_from(folder: str, direction: str) -> str:
    """Where a direction file lies, from a folder that may be shared or moved along with it; of the Hub as it is."""
    path = Path(direction).expanduser()
    if not path.is_file():
        return direction
    return os.path.join(os.curdir, os.path.relpath(path.resolve(), Path(folder).resolve()))


def _takes_out(adapter: Any) -> bool:
    return takes_out(getattr(adapter, "init_lora_weights", True))


def _loftq(cfg: Any) -> bool:
    return bool(((cfg.get("peft") or {}).get("loftq_config") or {}).get("loftq_bits"))


def _block(cfg: Any) -> AsftArgs:
    return parse_block(cfg.asft.to_dict() if hasattr(cfg.asft, "to_dict") else cfg.asft)
