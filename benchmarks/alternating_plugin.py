"""An axolotl plugin that turns the constraint on and off, step by step, and times both: side by side in one run.

Listed after asft: `plugins: [asft, benchmarks.alternating_plugin.AlternatingPlugin]`. Writes `steps.json` to the
output folder.
"""

import json
import time
from pathlib import Path

import torch
from axolotl.integrations.base import BasePlugin
from transformers import TrainerCallback

from benchmarks.shapes import stored_bytes


class AlternatingPlugin(BasePlugin):
    """Even steps are constrained, odd ones are not; both are of one trainer, model and data."""

    def post_trainer_create(self, cfg, trainer):
        constraint = trainer.log.__self__
        gradient, penalty = constraint.gradient, constraint.penalty
        lambda_reg, anchor = gradient.lambda_reg, gradient.anchor
        add_gradient = penalty.add_gradient
        spent = {"penalty": 0.0, "anchor": 0.0}
        record, kept = [], stored_bytes(penalty)

        def no_waiting(*args, **kwargs):
            """On a GPU: an error where the penalty waits for the device."""
            torch.cuda.set_sync_debug_mode("error")
            try:
                return add_gradient(*args, **kwargs)
            finally:
                torch.cuda.set_sync_debug_mode("default")

        def timed(part, function):
            def called(*args, **kwargs):
                started = clock()
                result = function(*args, **kwargs)
                spent[part] += clock() - started
                return result

            return called

        penalty.add_gradient = timed("penalty", no_waiting if torch.cuda.is_available() else add_gradient)
        if anchor is not None:
            anchor.add_gradient = timed("anchor", anchor.add_gradient)

        class Alternate(TrainerCallback):
            def on_step_begin(self, args, state, control, **kwargs):
                constrained = state.global_step % 2 == 0
                gradient.lambda_reg = lambda_reg if constrained else 0.0
                gradient.anchor = anchor if constrained else None
                spent.update(penalty=0.0, anchor=0.0)
                reset_peak()
                self.started = clock()

            def on_step_end(self, args, state, control, **kwargs):
                seconds = clock() - self.started
                line = {
                    "constrained": gradient.lambda_reg > 0,
                    "seconds": seconds,
                    **spent,
                    "added": sum(spent.values()),
                    "peak": peak(),
                    "kept": kept,
                }
                record.append(line)
                Path(cfg.output_dir).mkdir(parents=True, exist_ok=True)
                (Path(cfg.output_dir) / "steps.json").write_text(json.dumps(record))

        trainer.add_callback(Alternate())


def clock() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def reset_peak() -> None:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def peak() -> int:
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
