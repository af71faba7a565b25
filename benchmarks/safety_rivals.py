"""Rivals of the constraint that come after training: arithmetic on the weights of models."""

import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file

WEIGHTS = "model.safetensors"


@torch.no_grad()
def combined(work: Path, adapter: Path, of_adapter: float, of_direction: float, output: Path) -> Path:
    """W + a B A + b d in every weight: a model in `output`, in fp32.

    a < 1 takes the update back in part. b > 0 adds the alignment direction d once more, whole and not to a rank: RESTA
    (Bhardwaj et al. 2024, arXiv 2402.11746), with the base as the model that is not aligned.

    Args:
        work: the folder of `prepare`, whose aligned-nf4 was trained, and whose aligned less base is d.
        adapter: a LoRA adapter on aligned-nf4.
        of_adapter: a.
        of_direction: b.
    """
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    start = work / "aligned-nf4"
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(start), adapter).merge_and_unload()
    before, base, aligned = (load_file(work / name / WEIGHTS) for name in (start.name, "base", "aligned"))
    for name, weight in model.state_dict().items():
        if name in before:  # tied embeddings are there once
            weight.copy_(
                before[name] + of_adapter * (weight - before[name]) + of_direction * (aligned[name] - base[name])
            )
    shutil.rmtree(output, ignore_errors=True)
    model.save_pretrained(output)
    AutoTokenizer.from_pretrained(start).save_pretrained(output)
    return output
