"""One rank of a raw FSDP2 run on gloo: the sharded gradient and step against the same on whole weights.

    torchrun --nproc_per_node=2 fsdp2_worker.py ALIGNED DIRECTION RANK LAMBDA

Prints one JSON line on rank 0.
"""

import json
import sys
import weakref

import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from tiny import OWN_ANSWERS, make_tokenizer
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

from axolotl_asft import AlignmentDirection, AlignmentPenalty, layer_groups
from axolotl_asft.anchor import AnswerAnchor
from axolotl_asft.quiet import without_noise


def lora_model(folder, r):
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(folder), LoraConfig(r=r, lora_alpha=8, target_modules="all-linear")
    )
    generator = torch.Generator().manual_seed(0)
    for name, weight in model.named_parameters():
        if "lora_" in name:
            weight.data = 0.1 * torch.randn(weight.shape, generator=generator)
    return model


def trained(model):
    return {name: weight for name, weight in model.named_parameters() if weight.requires_grad}


def batch_of(rank):
    return torch.randint(4, 20, (2, 12), generator=torch.Generator().manual_seed(rank))


def backward(model, ranks, divide_by):
    for rank in ranks:
        ids = batch_of(rank)
        (model(input_ids=ids, labels=ids).loss / divide_by).backward()


def largest_difference(sharded, whole):
    worst = 0.0
    for name, tensor in whole.items():
        full = sharded[name].full_tensor()
        worst = max(worst, float((full - tensor).detach().norm() / tensor.detach().norm()))
    return worst


def anchored(model, reference, rank, world):
    """A micro-batch and the anchor, sharded and whole: how far apart the gradients are, and without the anchor."""
    gradients = {}
    for name, one, ranks, place in (("sharded", model, [rank], (rank, world)), ("whole", reference, range(world), ())):
        one.zero_grad()
        anchor = AnswerAnchor(make_tokenizer(), OWN_ANSWERS)
        anchor.remember(one)
        backward(one, ranks, len(ranks))
        if name == "whole":
            task = {name: weight.grad.clone() for name, weight in trained(one).items()}
        with without_noise(one):
            (50.0 * anchor.loss(one, 3, *place)).backward()
        gradients[name] = {name: weight.grad for name, weight in trained(one).items()}
    return largest_difference(gradients["sharded"], gradients["whole"]), largest_difference(gradients["sharded"], task)


def main(aligned, direction_file, r, lambda_reg):
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    direction = AlignmentDirection.load(direction_file)
    torch.set_num_threads(1)

    reference = lora_model(aligned, r)
    whole_penalty = AlignmentPenalty(reference, direction)
    backward(reference, range(world), world)
    task = {name: weight.grad.clone() for name, weight in trained(reference).items()}
    value = float(whole_penalty.add_gradient(lambda_reg))

    model = lora_model(aligned, r)
    layer_groups.TEMPORARY_BYTES = 40_000  # a few of this model's layers at a time, as of a large model's
    penalty = AlignmentPenalty(model, direction)  # before sharding, as `attach` does
    for layer in model.base_model.model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    alive, most = [], 0
    gather = layer_groups.whole

    def counted(tensor):
        nonlocal most
        full = gather(tensor)
        alive[:] = [ref for ref in alive if ref() is not None] + [weakref.ref(full)]
        most = max(most, len(alive))
        return full

    layer_groups.whole = counted
    backward(model, [rank], 1)
    answer = {"value": value, "gathered value": float(penalty.add_gradient(lambda_reg)), "most whole factors": most}
    answer["groups"] = [len(group.found) for group in penalty.groups]
    layer_groups.whole = gather
    parameters = trained(model)
    answer["sharded"] = all(isinstance(weight, DTensor) for weight in parameters.values())
    answer["uneven"] = any(weight.shape[0] % world for weight in parameters.values())
    gradients = {name: weight.grad for name, weight in parameters.items()}
    answer["gradient"] = largest_difference(gradients, {n: w.grad for n, w in trained(reference).items()})
    answer["without the penalty"] = largest_difference(gradients, task)
    answer["drift"] = [sum(x.orthogonal for x in p.measure()) for p in (whole_penalty, penalty)]

    for one in (reference, model):
        torch.optim.AdamW(trained(one).values(), lr=0.01).step()
    answer["weights"] = largest_difference(trained(model), trained(reference))
    answer["shortened"] = [float(p.shorten(0.05)) for p in (whole_penalty, penalty)]
    answer["weights within the budget"] = largest_difference(trained(model), trained(reference))

    model.zero_grad()
    (lambda_reg * penalty()).backward()  # the differentiable form, through the gathering
    reference.zero_grad()
    (lambda_reg * whole_penalty()).backward()
    expected = {name: weight.grad for name, weight in trained(reference).items()}
    answer["autograd"] = largest_difference({name: weight.grad for name, weight in trained(model).items()}, expected)
    answer["anchor"], answer["anchor's part"] = anchored(model, reference, rank, world)
    if rank == 0:
        print(json.dumps(answer), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), float(sys.argv[4]))
