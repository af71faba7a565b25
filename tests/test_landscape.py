"""`axolotl asft landscape`: steps of the right size and kind, weights put back, a verdict that can go both ways."""

import json
import math
import shutil
from dataclasses import replace

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from tiny import make_tokenizer
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from axolotl_asft import extract_direction
from axolotl_asft.cli import asft
from axolotl_asft.errors import AsftError
from axolotl_asft.evaluation.basin import KINDS, Point, landscape_table, verdict
from axolotl_asft.evaluation.basin_texts import asked_with_the_template
from axolotl_asft.evaluation.landscape import (
    _moved,
    _pair,
    _perturbed,
    _weights,
    measure_landscape,
    perturbation,
)
from axolotl_asft.evaluation.shares import Share
from axolotl_asft.files import locked


@pytest.fixture(scope="module")
def direction(pair):
    return extract_direction(*pair, rank="full", dtype="float32", keep_v=True)


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_has_the_norm_of_d_and_its_kind(pair, direction, kind):
    module = extract_direction(*pair, rank=4, dtype="float32", keep_v=True).modules["model.layers.0.mlp.up_proj"]
    step = perturbation(module, kind, torch.Generator().manual_seed(0))
    assert float(step.norm()) == pytest.approx(float(module.norm), rel=1e-5)
    inside = float((module.U.T @ step).norm() / step.norm())
    assert inside == pytest.approx(0.0 if kind == "orthogonal" else 1.0, abs=1e-5)


def test_steps_along_d_lead_to_the_base_model_and_beyond(pair, direction):
    """W - d is the base; W + d doubles what alignment did; afterwards the weights are as before."""
    base, aligned = (AutoModelForCausalLM.from_pretrained(folder) for folder in pair)
    weights = _weights(aligned, direction)
    before = {name: weight.detach().clone() for name, weight in weights.items()}
    with _perturbed(weights, direction, "against", 1.0, 0):
        for name, weight in weights.items():
            torch.testing.assert_close(weight, base.get_submodule(name).weight, rtol=1e-4, atol=1e-6)
    with _perturbed(weights, direction, "along", 1.0, 0):
        for name, weight in weights.items():
            d = before[name] - base.get_submodule(name).weight
            torch.testing.assert_close(weight, before[name] + d, rtol=1e-4, atol=1e-6)
    assert all(torch.equal(before[name], weight) for name, weight in weights.items())


def test_random_steps_differ_by_seed_and_repeat(pair, direction):
    model = AutoModelForCausalLM.from_pretrained(pair[1])
    weights = _weights(model, direction)
    name = next(iter(weights))
    seen = []
    for seed in (0, 1, 0):
        with _perturbed(weights, direction, "orthogonal", 0.5, seed):
            seen.append(weights[name].detach().clone())
    assert torch.equal(seen[0], seen[2])
    assert not torch.equal(seen[0], seen[1])


@pytest.mark.parametrize("prefix", ["model.layers.", "model.language_model.layers."])
def test_a_base_model_gives_d_itself(pair, tmp_path, prefix):
    """Of rank 4 the direction keeps a part of d; with the base model at hand, W - d is the base all the same.

    Also where the base is kept as a wrapper around a language model, whose names have another prefix.
    """
    base, aligned = (AutoModelForCausalLM.from_pretrained(folder) for folder in pair)
    shutil.copytree(pair[0], tmp_path / "base")
    stored = load_file(pair[0] / "model.safetensors")
    renamed = {name.replace("model.layers.", prefix): tensor for name, tensor in stored.items()}
    save_file(renamed, tmp_path / "base" / "model.safetensors", {"format": "pt"})
    direction = extract_direction(tmp_path / "base", pair[1], rank=4)
    weights = _weights(aligned, direction)
    with _perturbed(weights, direction, "against", 1.0, 0, _pair(tmp_path / "base", str(pair[1]), direction)):
        for name, weight in weights.items():
            torch.testing.assert_close(weight, base.get_submodule(name).weight, rtol=1e-4, atol=1e-6)


def test_only_steps_along_d_read_the_base(pair, tmp_path):
    """A random step has no use for it, and a base on the Hub would be read anew for each of them."""
    shutil.copytree(pair[0], tmp_path / "base")
    direction = extract_direction(*pair, rank=4)
    base = _pair(tmp_path / "base", str(pair[1]), direction)
    (tmp_path / "base" / "model.safetensors").unlink()
    weights = _weights(AutoModelForCausalLM.from_pretrained(pair[1]), direction)
    for kind in ("inside", "orthogonal"):
        with _perturbed(weights, direction, kind, 1.0, 0, base):
            pass
    for kind in ("along", "against"):
        with pytest.raises(AsftError, match="not a readable"), _perturbed(weights, direction, kind, 1.0, 0, base):
            pass


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("dtype", "radius"), [(torch.float32, 0.02), (torch.bfloat16, 0.02), (torch.bfloat16, 4.0)])
def test_a_step_says_how_far_rounding_bent_it(pair, direction, kind, dtype, radius):
    """Over all layers, against the step that is taken in float64."""
    weights = _weights(AutoModelForCausalLM.from_pretrained(pair[1], dtype=dtype), direction)
    before = {name: weight.detach().double().clone() for name, weight in weights.items()}
    wanted = []
    for i, name in enumerate(weights):
        generator = torch.Generator().manual_seed(1_000_003 * 2 + i)
        wanted.append(radius * perturbation(direction.modules[name], kind, generator).double().flatten())
    with _perturbed(weights, direction, kind, radius, 2) as (cosine, norm_ratio):
        realised = torch.cat([(weight.detach().double() - before[name]).flatten() for name, weight in weights.items()])
    step = torch.cat(wanted)
    assert cosine == pytest.approx(float(realised @ step / (realised.norm() * step.norm())), abs=1e-5)
    assert norm_ratio == pytest.approx(float(realised.norm() / step.norm()), abs=1e-5)
    assert (cosine < 0.9) == (dtype == torch.bfloat16 and radius < 1)
    assert Point(kind, radius, 2, -1.0, 1.0, None, cosine).faithful == (cosine >= 0.99)


def test_no_step_has_no_cosine(pair, direction):
    weights = _weights(AutoModelForCausalLM.from_pretrained(pair[1]), direction)
    with _perturbed(weights, direction, "aligned", 0.0, 0) as realised:
        assert realised == (None, None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_are_put_back_bit_by_bit(pair, direction, dtype):
    """Also when what is measured in between fails."""
    model = AutoModelForCausalLM.from_pretrained(pair[1], dtype=dtype)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    name = "model.layers.0.mlp.up_proj"

    def interrupted(kind: str) -> None:
        with _perturbed(_weights(model, direction), direction, kind, 2.0, 1):
            assert not torch.equal(model.get_submodule(name).weight, before[f"{name}.weight"])
            raise KeyboardInterrupt

    for kind in KINDS:
        with pytest.raises(KeyboardInterrupt):
            interrupted(kind)
        assert all(torch.equal(before[key], weight) for key, weight in model.state_dict().items())


def test_layers_that_are_kept_transposed(tmp_path):
    """GPT-2 keeps its weights as (in, out)."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=32, n_embd=32, n_layer=1, n_head=2))
        model.save_pretrained(tmp_path / "base")
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if ".h." in name and weight.ndim == 2:
                    weight += 0.001 * torch.randn_like(weight)
        model.save_pretrained(tmp_path / "aligned")
    direction = extract_direction(tmp_path / "base", tmp_path / "aligned", rank=4)
    base = GPT2LMHeadModel.from_pretrained(tmp_path / "base")
    weights = _weights(model, direction)
    assert len(weights) == 4
    with _perturbed(
        weights, direction, "against", 1.0, 0, _pair(tmp_path / "base", str(tmp_path / "aligned"), direction)
    ):
        for name in weights:
            ours, theirs = model.get_submodule(name).weight, base.get_submodule(name).weight
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_layers_of_which_all_directions_are_kept_are_left_out(pair, direction, caplog):
    """Nothing is orthogonal to them: a Gaussian matrix without its part inside would be rounding noise."""
    moved = _moved(direction, None)
    assert [name.rpartition(".")[2] for name in moved.modules] == ["gate_proj", "up_proj"] * 2
    assert (
        "10 of 14 layers are not perturbed: the direction keeps all of their directions (first model.lay" in caplog.text
    )
    caplog.clear()
    assert _moved(moved, None) == moved
    assert not caplog.text
    narrow = replace(direction, modules={k: v for k, v in direction.modules.items() if k not in moved.modules})
    with pytest.raises(
        AsftError, match=r"keeps all 64 directions of model.*, and all of every other .* smaller --rank"
    ):
        _moved(narrow, None)


def test_a_direction_of_another_model_is_refused(pair, tmp_path):
    with pytest.raises(AsftError, match="extracted for another model"):
        measure_landscape(str(pair[0]), extract_direction(*pair, rank=4), tmp_path, base=pair[0])


def test_shared_and_absent_layers_are_refused(pair, direction):
    model = AutoModelForCausalLM.from_pretrained(pair[1])
    model.model.layers[1].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight
    with pytest.raises(AsftError, match=r"layers.0.mlp.up_proj and model.layers.1.mlp.up_proj share one weight"):
        _weights(model, direction)
    del model.model.layers[1].mlp.up_proj
    with pytest.raises(AsftError, match=r"the model has no layer model.layers.1.mlp.up_proj"):
        _weights(model, direction)


def points(along: float, inside: tuple[float, ...], orthogonal: tuple[float, ...], radius: float = 1.0) -> list[Point]:
    found = [Point("aligned", 0.0, 0, -0.1, 1.0)]
    found += [Point("along", radius, 0, -0.1 - along, 1.5), Point("against", radius, 0, -5.0, 1.0)]
    for kind, drops in (("inside", inside), ("orthogonal", orthogonal)):
        found += [Point(kind, radius, seed, -0.1 - drop, 1.0) for seed, drop in enumerate(drops)]
    return found


def test_harmfulness_in_the_table_has_the_interval_of_its_prompts():
    found = [replace(point, harmfulness=Share.of([True, False, False, False])) for point in points(0.0, (1, 2), (1, 2))]
    lines = landscape_table(found).splitlines()
    assert len(lines) == 2 + 5
    assert all(line.endswith("| 25.0% (5% to 70%) |") for line in lines[2:]), lines


@pytest.mark.parametrize(
    ("along", "inside", "orthogonal", "claim", "of_inside", "words"),
    [
        (
            0.0,
            (0.1, 0.12, 0.11),
            (1.0, 1.1, 0.9),
            "borne out",
            "borne out",
            "At radius 1, this model bears out that",
        ),
        (0.9, (0.1, 0.12, 0.11), (0.5, 0.45, 0.55), "refuted", "borne out", "this model refutes that steps ortho"),
        (0.4, (0.5, 0.4, 0.6), (0.1, 0.9, 1.0), "undecided", "undecided", "this model leaves open, through noise"),
        (
            0.5,
            (0.9, 1.0, 0.95),
            (0.5, 0.45, 0.55),
            "undecided",
            "refuted",
            "It refutes that they cost more",
        ),
    ],
)
def test_the_verdict_goes_every_way(along, inside, orthogonal, claim, of_inside, words):
    found = verdict(points(along, inside, orthogonal))
    assert (found.claim, found.inside) == (claim, of_inside)
    assert words in found.text
    assert f"orthogonal {sum(orthogonal) / 3:+.3f}" in found.text
    assert "the task along +0.500" in found.text


def test_the_verdict_holds_at_every_radius_or_not_at_all():
    near, far = points(0.0, (0.1, 0.1), (1.0, 1.1)), points(1.0, (0.1, 0.1), (0.2, 0.3), radius=2.0)
    assert verdict(near).claim == "borne out"
    assert verdict(far).claim == "refuted"
    both = verdict(near + far[1:])
    assert both.claim == "undecided"
    assert both.text.startswith("At radii 1 to 2, this model leaves open, through")


def test_radii_at_which_rounding_bent_a_step_are_left_out_of_the_verdict():
    near, far = points(0.0, (0.1, 0.1), (1.0, 1.1), radius=0.25), points(1.0, (0.1, 0.1), (0.2, 0.3), radius=2.0)
    straight = [replace(point, cosine=0.995) for point in far[1:]]
    for worst in range(1, len(near)):
        bent = [replace(point, cosine=0.65 if i == worst else 0.995) for i, point in enumerate(near)]
        found = verdict([near[0], *bent[1:], *straight])
        assert found == replace(verdict(far), text=found.text)
        assert found.text.startswith("At radius 2, this model refutes")
        assert "Left out: radius 0.25, where" in found.text
        assert "(cosine 0.65 at 0.25, under 0.99); use --dtype float32, or larger --radii." in found.text
        alone = verdict([near[0], *bent[1:]])
        assert (alone.claim, alone.inside) == ("undecided", "undecided")
        assert alone.text.startswith("No verdict. Left out: radius 0.25")
    assert "Left out" not in verdict([*near, *straight]).text


def test_radii_at_which_the_model_overflowed_are_left_out():
    near, far = points(0.0, (0.1, 0.1), (1.0, 1.1)), points(1.0, (0.1, 0.1), (0.2, 0.3), radius=2.0)
    for worst in range(1, len(far)):
        broken = [replace(point, refusal=math.nan) if i == worst else point for i, point in enumerate(far)]
        found = verdict(near + broken[1:])
        assert found == replace(verdict(near), text=found.text)
        assert "Left out: radius 2, where the model's outputs are no longer finite; use --dtype" in found.text
        kind = broken[worst].kind
        rows = [line for line in landscape_table(near + broken[1:]).splitlines() if "not finite" in line]
        assert rows == [f"| {kind} | 2 | not finite | not finite |"]
    alone = verdict([far[0], *[replace(point, task_loss=math.inf) for point in far[1:]]])
    assert alone.claim == "undecided"
    assert alone.text.startswith("No verdict. Left out: radius 2, where the model's outputs")


def test_table_and_picture_show_what_was_left_out():
    from matplotlib.figure import Figure

    from axolotl_asft.evaluation.landscape_chart import _line

    near, far = points(0.0, (0.1, 0.1), (1.0, 1.1)), points(1.0, (0.1, 0.1), (0.2, 0.3), radius=2.0)
    bent = [near[0], *[replace(point, cosine=0.65) for point in near[1:]]]
    bent += [replace(point, cosine=0.995) for point in far[1:]]
    table = landscape_table(bent).splitlines()
    assert table[0] == "| step | radius | log p of refusals | task loss | cosine |"
    assert table[2].endswith("| 1.000 |  |")
    assert (table[3][-9:], table[4][-9:]) == ("| 0.650 |", "| 0.650 |")
    assert "cosine" not in landscape_table(near + far[1:])
    axes = Figure().add_subplot()
    _line(axes, bent, "along", "refusal")
    _line(axes, near + far[1:], "along", "refusal")
    assert [list(line.get_xdata()) for line in axes.lines] == [[0.0, 1.0, 2.0], [1.0], [0.0, 1.0, 2.0]]
    assert [line.get_markerfacecolor() for line in axes.lines].index("white") == 1


def test_too_few_points_give_no_verdict():
    with pytest.raises(AsftError, match="no aligned model"):
        verdict([])
    with pytest.raises(AsftError, match="one random step"):
        verdict(points(0.0, (0.1,), (1.0,)))


@pytest.fixture(scope="module")
def refusing_pair(tmp_path_factory):
    """The tiny aligned model never refuses: one that answers everything with a refusal, and its base."""
    folder = tmp_path_factory.mktemp("refusing")
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = ["<unk>", "<s>", "</s>", "<pad>", "<|user|>", "<|assistant|>", "I", "cannot", "help", "with", "that", "How"]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", eos_token="</s>", pad_token="<pad>")
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<|' + m['role'] + '|> ' + m['content'] + ' ' }}{% endfor %}{{ '<|assistant|> ' }}"
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=16, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
            eos_token_id=2, pad_token_id=3,
        )  # fmt: skip
        model = LlamaForCausalLM(config)
    tokenizer.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "aligned")
    texts = [f"<|user|> {'How ' * n}<|assistant|> I cannot help with that </s>" for n in range(1, 9)]
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for step in range(120):
        if step == 40:
            model.save_pretrained(folder / "base")
        batch = tokenizer(texts, return_tensors="pt", padding=True)
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        model(**batch, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder / "aligned")
    return folder / "base", folder / "aligned"


def test_a_whole_landscape(refusing_pair, tmp_path):
    base, aligned = refusing_pair
    (tmp_path / "task.jsonl").write_text(
        json.dumps(
            {"messages": [{"role": "user", "content": "How\u2028"}, {"role": "assistant", "content": "with that"}]},
            ensure_ascii=False,  # U+2028 ends no line of JSON
        )
    )
    arguments = ["landscape", "--model", str(aligned), "--base", str(base), "--radii", "0.5,1", "--seeds", "2"]
    arguments += ["--rank", "8"]
    arguments += ["--limit", "4", "--max-new-tokens", "6", "--generate", "--task", str(tmp_path / "task.jsonl")]
    arguments += ["-o", str(tmp_path / "out")]
    result = CliRunner().invoke(asft, arguments)
    assert result.exit_code == 0, result.output
    kept = json.loads((tmp_path / "out" / "landscape.json").read_text())["points"]
    assert len(kept) == 1 + 2 * (1 + 1 + 2 + 2)
    assert {point["harmfulness"]["n"] for point in kept} == {4}
    assert kept[0]["harmfulness"]["value"] == kept[0]["harmfulness"]["low"] == 0.0 < kept[0]["harmfulness"]["high"]
    assert (kept[0]["cosine"], kept[0]["norm_ratio"]) == (None, None)
    assert all(abs(point["cosine"] - 1) < 1e-4 > abs(point["norm_ratio"] - 1) for point in kept[1:])
    assert all(point["refusal"] < 0 < point["task_loss"] for point in kept)
    against = {point["radius"]: point["refusal"] for point in kept if point["kind"] == "against"}
    assert against[1.0] < against[0.5] < kept[0]["refusal"], "the way back to the base costs refusals"
    assert (tmp_path / "out" / "landscape.png").read_bytes().startswith(b"\x89PNG")
    assert "At radii 0.5 to 1, this model" in result.stdout
    before = (tmp_path / "out" / "landscape.json").stat().st_mtime_ns
    again = CliRunner().invoke(asft, [*arguments, "--json"])
    assert json.loads(again.stdout)["points"] == kept
    assert (tmp_path / "out" / "landscape.json").stat().st_mtime_ns == before, "nothing was measured twice"

    whole = json.loads((tmp_path / "out" / "landscape.json").read_text())
    cut = {**whole, "points": [{**whole["points"][0], "task_loss": 7.0}, *whole["points"][1:5]]}
    (tmp_path / "out" / "landscape.json").write_text(json.dumps(cut))
    resumed = CliRunner().invoke(asft, [*arguments, "--json"])
    found = json.loads(resumed.stdout)["points"]
    assert found[0]["task_loss"] == 7.0, "what was measured before is kept"
    assert [p | {"task_loss": 0} for p in found] == [p | {"task_loss": 0} for p in whole["points"]]
    # it goes on with the texts that it began with, which a template with the date in it would not give again
    refusals = whole["texts"]["refusals"]
    (tmp_path / "out" / "landscape.json").write_text(
        json.dumps(whole | {"points": whole["points"][:5], "texts": whole["texts"] | {"refusals": refusals[:1]}})
    )
    fewer = json.loads(CliRunner().invoke(asft, [*arguments, "--json"]).stdout)["points"]
    assert [p["refusal"] for p in fewer[:5]] == [p["refusal"] for p in kept[:5]]
    assert all(one["refusal"] != two["refusal"] for one, two in zip(fewer[5:], kept[5:], strict=True))
    assert all(one["task_loss"] == two["task_loss"] for one, two in zip(fewer[5:], kept[5:], strict=True))
    other = CliRunner().invoke(asft, [*arguments, "--max-new-tokens", "7"])
    assert other.exit_code == 2
    assert "with other settings (" in other.stderr
    odd = json.dumps(json.loads((tmp_path / "out" / "landscape.json").read_text()) | {"settings": [1]})
    damaged = {odd: "holds no landscape"} | dict.fromkeys(('{"settings"', "[" * 100_000), "cannot be read as JSON")
    for content, message in damaged.items():
        (tmp_path / "out" / "landscape.json").write_text(content)
        broken = CliRunner().invoke(asft, arguments)
        assert (broken.exit_code, message in broken.stderr) == (2, True)


def test_two_landscapes_do_not_write_into_one_folder(refusing_pair, tmp_path):
    base, aligned = map(str, refusing_pair)
    arguments = ["landscape", "--model", aligned, "--base", base, "--rank", "8", "--radii", "1", "-o", str(tmp_path)]
    with locked(tmp_path / ".lock", "ours"):
        result = CliRunner().invoke(asft, arguments)
    assert (result.exit_code, result.stderr.count("another landscape is measured in")) == (2, 1)


def test_the_space_before_an_answer_is_the_template_s():
    tokenizer = make_tokenizer()
    turn = "{{ '[INST] ' + m['content'] + ' [/INST]' if m['role'] == 'user' else ANSWER }}"
    turns = "{% for m in messages %}" + turn + "{% endfor %}"
    for answer, expected in (("' ' + m['content']", " yes"), ("m['content']", "yes")):
        tokenizer.chat_template = turns.replace("ANSWER", answer)
        assert asked_with_the_template(tokenizer, [("the cat", "yes")]) == [("[INST] the cat [/INST]", expected)]


def test_one_narrow_layer_does_not_stop_a_landscape(refusing_pair, tmp_path):
    """Of 32 rows all directions are kept at the default rank; layers of 64 rows are moved, as they should be."""
    base, aligned = map(str, refusing_pair)
    arguments = ["landscape", "--model", aligned, "--base", base, "--radii", "1", "--seeds", "2", "--limit", "2"]
    arguments += ["--max-new-tokens", "6", "-o", str(tmp_path)]
    result = CliRunner().invoke(asft, arguments)
    assert result.exit_code == 0, result.output
    kept = json.loads((tmp_path / "landscape.json").read_text())
    assert (kept["settings"]["left_out"], kept["settings"]["ranks"]) == (10, [32])
    assert all(point["cosine"] > 0.999 for point in kept["points"][1:])


@pytest.mark.gpu
def test_a_landscape_on_a_gpu_is_the_cpus(refusing_pair, tmp_path):
    base, aligned = map(str, refusing_pair)
    direction = extract_direction(base, aligned, rank=8, dtype="float32", keep_v=True)
    asked = {"base": base, "radii": (0.5, 1.0), "seeds": 1, "limit": 4, "max_new_tokens": 6}
    on_cpu, on_gpu = (
        measure_landscape(aligned, direction, tmp_path / device, device=device, **asked) for device in ("cpu", "cuda")
    )
    assert [(p.kind, p.radius) for p in on_gpu] == [(p.kind, p.radius) for p in on_cpu]
    for mine, theirs in zip(on_gpu, on_cpu, strict=True):
        assert mine.refusal == pytest.approx(theirs.refusal, rel=1e-3)
        assert mine.task_loss == pytest.approx(theirs.task_loss, rel=1e-3)


def test_a_bf16_checkpoint_is_float32_on_a_cpu_and_left_out_where_it_is_not(refusing_pair, tmp_path):
    for folder in refusing_pair:
        shutil.copytree(folder, tmp_path / folder.name)
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).save_pretrained(tmp_path / folder.name)
    arguments = ["landscape", "--model", str(tmp_path / "aligned"), "--base", str(tmp_path / "base"), "--rank", "8"]
    arguments += ["--radii", "0.002", "--seeds", "2", "--limit", "2", "--max-new-tokens", "6"]

    def landscape(name: str, *more: str):
        result = CliRunner().invoke(asft, [*arguments, "--json", "-o", str(tmp_path / name), *more])
        assert result.exit_code == 0, result.output
        settings = json.loads((tmp_path / name / "landscape.json").read_text())["settings"]
        return settings["dtypes"], json.loads(result.stdout)

    dtypes, found = landscape("default")
    assert dtypes == ["float32"]
    assert all(point["cosine"] > 0.999 for point in found["points"][1:])
    assert found["verdict"]["text"].startswith("At radius 0.002, this model")
    dtypes, found = landscape("bf16", "--dtype", "bfloat16")
    assert dtypes == ["bfloat16"]
    assert any(point["cosine"] < 0.99 for point in found["points"][1:])
    assert found["verdict"]["text"].startswith("No verdict. Left out: radius 0.002, where the weights' dtype")
    for _ in range(2):  # measured, and read again
        _, found = landscape("fp16", "--dtype", "float16", "--radii", "1000000")
        assert all(point["refusal"] is None for point in found["points"][1:])
        left_out = "No verdict. Left out: radius 1e+06, where the model's outputs are no longer finite"
        assert found["verdict"]["text"].startswith(left_out)
    assert "NaN" not in (tmp_path / "fp16" / "landscape.json").read_text()
    assert (tmp_path / "fp16" / "landscape.png").is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give one of --direction and --base"),
        (["--direction", "{file}"], "keeps no right singular vectors"),
        (["--base", "{base}", "--radii", "0,1"], "expected positive numbers"),
        (["--base", "{base}", "--task", "{file}"], "is not UTF-8"),
        (["--base", "{base}", "--rank", "8", "--limit", "2", "--max-new-tokens", "2"], "refuses none of 2"),
        (["--base", "/no/base"], "no checkpoint folder at /no/base"),
        (["--base", "{base}", "--radii", "nan"], "expected positive numbers"),
        (["--base", "{base}", "--radii", "inf"], "expected positive numbers"),
        (["--base", "{base}", "--rank", "8", "--device", "tpu"], "expected cpu, cuda"),
        (["--direction", "{file}", "--base", "{base}"], "give one of"),
        (["--direction", "{base}"], "is a folder; expected a direction file"),
        (["--direction", "me/na--me"], "is neither a file here nor a name on the Hub"),
    ],
)
def test_bad_usage_is_one_line(pair, direction_file, tmp_path, arguments, message):
    import re

    filled = [argument.format(file=direction_file, base=pair[0]) for argument in arguments]
    result = CliRunner().invoke(asft, ["landscape", "--model", str(pair[1]), *filled, "-o", str(tmp_path / "o")])
    assert result.exit_code == 2, result.output
    assert re.search(message, next(line for line in result.stderr.splitlines() if line.startswith("asft: ")))


def test_a_task_without_chats_is_refused(pair, tmp_path):
    (tmp_path / "empty.jsonl").write_text("\n")
    arguments = ["landscape", "--model", str(pair[1]), "--base", str(pair[0]), "--task", str(tmp_path / "empty.jsonl")]
    result = CliRunner().invoke(asft, arguments)
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1)
    assert "holds no chats" in result.stderr
