"""A plain transformers trainer over a small LoRA model, and what is left after it trained."""

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments


def make_trainer(pair, rows, folder, micro=4, accumulation=1, loss_kwargs=True, cls=Trainer, **changes):
    model = AutoModelForCausalLM.from_pretrained(pair[1])
    torch.manual_seed(0)
    model = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"))
    generator = torch.Generator().manual_seed(0)
    for name, weight in model.named_parameters():
        if "lora_B" in name:  # away from B = 0, where the penalty has no gradient
            weight.data = 0.05 * torch.randn(weight.shape, generator=generator)
    options = {
        "output_dir": str(folder),
        "per_device_train_batch_size": micro,
        "gradient_accumulation_steps": accumulation,
        "max_steps": 3,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "optim": "sgd",
        "max_grad_norm": 0,
        "logging_steps": 1,
        "report_to": "none",
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    trainer = cls(
        model=model, args=TrainingArguments(**{**options, **changes}), train_dataset=rows, eval_dataset=rows[:8]
    )
    trainer.model_accepts_loss_kwargs = loss_kwargs
    return trainer


def lora_weights(trainer):
    return {name: weight.detach().clone() for name, weight in trainer.model.named_parameters() if weight.requires_grad}


def training_lines(trainer):
    return [line for line in trainer.state.log_history if "loss" in line]
