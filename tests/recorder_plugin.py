"""A plugin for tests: what stands in the gradients at each optimizer step beside the task's own part.

Listed *before* asft, so that it looks at the task's finished gradient before the constraint does, and again when the
optimizer is about to step. Writes the differences, and those that the dense formula asks for, to `record.json`.
"""

import json
from pathlib import Path

import torch
from axolotl.integrations.base import BasePlugin
from safetensors.torch import load_file
from transformers import TrainerCallback


def lora_layers(model):
    for name, module in model.named_modules():
        adapter = next((a for a in getattr(module, "lora_A", {}) if module.lora_A[a].weight.requires_grad), None)
        if adapter is not None:
            A, B = module.lora_A[adapter].weight, module.lora_B[adapter].weight
            yield name.removeprefix("base_model.model."), A, B, module.scaling[adapter]


def dense_gradients(model, direction, weight, taken_out):
    """weight times the gradient of sum_l ||(I - U U^T) dW||_F^2, in fp64: the `subspace` projector.

    dW = s B A, less what a PiSSA initialisation took out of the weight.
    """
    gradients = {}
    for name, A, B, scaling in lora_layers(model):
        a, b = A.detach().double().requires_grad_(), B.detach().double().requires_grad_()
        U = direction[f"{name}.U"].to(A.device).double()
        update = scaling * b @ a - taken_out.get(name, 0.0)
        (weight * (update - U @ (U.T @ update)).square().sum()).backward()
        gradients[name] = a.grad, b.grad
    return gradients


class RecorderPlugin(BasePlugin):
    def post_trainer_create(self, cfg, trainer):
        direction = load_file(cfg.asft.direction)
        lambda_reg = cfg.asft.lambda_reg
        task, record = {}, []
        step = trainer.training_step
        pissa = str(cfg.peft_init_lora_weights).startswith("pissa")
        taken_out = {
            name: (scaling * B @ A).detach().double() for name, A, B, scaling in lora_layers(trainer.model) if pissa
        }

        def current():
            empty = torch.zeros(())
            return {
                name: tuple(empty if p.grad is None else p.grad.detach().double().clone() for p in (A, B))
                for name, A, B, _ in lora_layers(trainer.model)
            }

        def training_step(*args, **kwargs):
            loss = step(*args, **kwargs)
            scaler = trainer.accelerator.scaler  # in fp16: transformers takes its scale out before the optimizer steps
            scale = 1.0 if scaler is None else scaler.get_scale()
            task.update({name: tuple(gradient / scale for gradient in pair) for name, pair in current().items()})
            return loss

        class Compare(TrainerCallback):
            def on_pre_optimizer_step(self, args, state, control, **kwargs):
                expected = dense_gradients(trainer.model, direction, lambda_reg, taken_out)
                error = norm = own = 0.0
                for name, now in current().items():
                    for before, after, wanted in zip(task[name], now, expected[name], strict=True):
                        error += float((after - before - wanted).square().sum())
                        norm += float(wanted.square().sum())
                        own += float(before.square().sum())
                record.append({"error": error**0.5, "expected": norm**0.5, "task": own**0.5})
                answer = {
                    "trainer": type(trainer).__name__,
                    "accumulation": args.gradient_accumulation_steps,
                    "loss_kwargs": bool(trainer.model_accepts_loss_kwargs),
                    "steps": record,
                }
                Path(cfg.output_dir).mkdir(parents=True, exist_ok=True)
                (Path(cfg.output_dir) / "record.json").write_text(json.dumps(answer))

        trainer.training_step = training_step
        trainer.add_callback(Compare())
