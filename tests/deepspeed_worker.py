"""One rank of a transformers Trainer under DeepSpeed without ZeRO, attached to in Python.

    torchrun --nproc_per_node=2 deepspeed_worker.py BASE ALIGNED DIRECTION FOLDER

Penalty and anchor, two micro-batches a step and layers computed again in the backward pass: the weights after three
steps beside those of the same trainer under DDP; then a trainer that goes past its training_step. Prints one JSON line
on rank 0.
"""

import functools
import json
import sys

from accelerate.state import AcceleratorState
from deepspeed_on_cpu import prepare
from tiny import deepspeed_config, make_tokenizer
from trainers import lora_weights, make_trainer
from transformers import Trainer

from axolotl_asft import AlignmentDirection, attach
from axolotl_asft.errors import AsftError

ROWS = [{"input_ids": [5, 6, 7, 8 + i % 4], "labels": [5, 6, 7, 8], "attention_mask": [1] * 4} for i in range(32)]
STRENGTH = {"lambda_reg": 1.0, "anchor_weight": 3.0, "projector": "subspace"}


def trainer_over(pair, folder, direction, stage=None, strength=STRENGTH):
    carried = {"ddp_backend": "gloo"} if stage is None else {"use_cpu": False, "deepspeed": deepspeed_config(stage)}
    checkpointing = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
    trainer = make_trainer(pair, ROWS, folder, micro=2, accumulation=2, **carried, **checkpointing)
    trainer.processing_class = make_tokenizer()
    if strength:
        attach(trainer, direction, **strength)
    return trainer


def trained(*args, **kwargs):
    trainer = trainer_over(*args, **kwargs)
    trainer.train()
    return lora_weights(trainer)


def apart(one, other):
    return max(float((one[name] - other[name]).norm() / one[name].norm()) for name in one)


def main():
    base, aligned, file, folder = sys.argv[1:]
    pair, direction = (base, aligned), AlignmentDirection.load(file)
    ddp = trained(pair, folder, direction)
    free = trained(pair, folder, direction, strength=None)
    AcceleratorState._reset_state(reset_partial_state=True)
    prepare()
    found = {"constraint": apart(ddp, free), "deepspeed": apart(ddp, trained(pair, folder, direction, 0))}
    past = trainer_over(pair, folder, direction, 0)
    past.training_step = functools.partial(Trainer.training_step, past)
    try:
        past.train()
    except AsftError as error:
        found["past"] = str(error)
    if past.is_world_process_zero():
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
