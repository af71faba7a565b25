"""One rank of a transformers Trainer under DDP on gloo, attached to in Python.

    torchrun --nproc_per_node=2 ddp_worker.py BASE ALIGNED DIRECTION FOLDER

A randomised initialisation that the ranks draw differently, the anchor, and a callback that saves on the main process
alone, as transformers allows under DDP. Prints one JSON line on rank 0.
"""

import json
import sys

import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from tiny import make_tokenizer
from trainers import make_trainer
from transformers import AutoModelForCausalLM, TrainerCallback

from axolotl_asft import AlignmentDirection, attach
from axolotl_asft.stamp import read_stamp

ROWS = [{"input_ids": [5, 6, 7, 8 + i % 4], "labels": [5, 6, 7, 8], "attention_mask": [1] * 4} for i in range(32)]


class SaveOnMain(TrainerCallback):
    def __init__(self, trainer, folder):
        self.trainer, self.folder = trainer, folder

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 2 and self.trainer.is_world_process_zero():
            self.trainer.save_model(self.folder)


def trained(pair, direction, folder, initialisation=None, **strength):
    options = {"ddp_backend": "gloo", "ddp_timeout": 60, "logging_strategy": "no", "max_steps": 4}
    trainer = make_trainer(pair, ROWS, folder, micro=2, **options)
    trainer.processing_class = make_tokenizer()
    if initialisation is not None:
        torch.manual_seed(100 + dist.get_rank())
        config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=initialisation)
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(pair[1]), config)
        trainer.model = trainer.model_wrapped = model
    constraint = attach(trainer, direction, **strength)
    started = []

    class Starts(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            started.append(float(constraint.penalty()))

    trainer.add_callback(Starts())
    trainer.add_callback(SaveOnMain(trainer, f"{folder}/best"))
    trainer.train()
    apart = 0.0
    for weight in (weight for weight in trainer.model.parameters() if weight.requires_grad):
        others = [torch.zeros_like(weight.data) for _ in range(dist.get_world_size())]
        dist.all_gather(others, weight.data.contiguous())
        apart = max(apart, *(float((other - weight).abs().max()) for other in others))
    return {"start": max_over_ranks(started[0]), "apart": max_over_ranks(apart)}


def max_over_ranks(value):
    found = torch.tensor(value)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return float(found)


def main():
    base, aligned, file, folder = sys.argv[1:]
    direction = AlignmentDirection.load(file)
    found = {
        "anchored": trained((base, aligned), direction, f"{folder}/a", lambda_reg=0.1, anchor_weight=3.0),
        "niter": trained((base, aligned), direction, f"{folder}/b", "pissa_niter_2", lambda_reg=1.0, anchor_weight=0.0),
    }
    if dist.get_rank() == 0:
        found["anchored"]["stamp"] = read_stamp(f"{folder}/a/best")
        print(json.dumps(found))


if __name__ == "__main__":
    main()
