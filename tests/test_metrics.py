"""The metrics of safety prompts: taken from a model, kept in the direction file, used by the penalty."""

import json
from dataclasses import replace

import pytest
import torch
from lora_models import UP, lora_model
from tiny import axolotl, make_tokenizer
from transformers import AutoModelForCausalLM

from axolotl_asft import AlignmentDirection, AlignmentPenalty, extract_direction
from axolotl_asft.errors import AsftError
from axolotl_asft.evaluation.models import load_model
from axolotl_asft.metrics import LayerMetric, ModelMetric, activation_metric, fisher_metric
from axolotl_asft.moments import OVERSAMPLING, SecondMoment

TURNS = [("<|user|> the cat sees a dog </s><|assistant|> ", "yes no"), ("<|user|> red </s><|assistant|> ", "no")]
LAYERS = ("model.layers.0.mlp.up_proj", "model.layers.1.mlp.down_proj", "model.layers.1.self_attn.o_proj")


@pytest.fixture(scope="module")
def model(pair):
    return AutoModelForCausalLM.from_pretrained(pair[1]).eval()


@pytest.fixture(scope="module")
def activations(model):
    return activation_metric(model, make_tokenizer(), TURNS, list(linear(model)), rank=64, energy=1.0)


@pytest.fixture(scope="module")
def fisher(model):
    return fisher_metric(model, make_tokenizer(), TURNS, list(linear(model)), rank=64, energy=1.0)


@pytest.fixture(scope="module")
def direction(pair, activations, fisher, tmp_path_factory):
    path = tmp_path_factory.mktemp("metrics") / "tiny.asft.safetensors"
    extract_direction(*pair, rank=8, dtype="float32", metrics=[activations, fisher]).save(path)
    return AlignmentDirection.load(path)


def linear(model):
    return {name: module for name, module in model.named_modules() if name.endswith("_proj")}


def tokens(text):
    return make_tokenizer()(text, return_tensors="pt", add_special_tokens=False)["input_ids"]


def dense_inputs(model, name):
    """The inputs of one layer, one text at a time, without padding; the first token left out."""
    kept = []
    handle = linear(model)[name].register_forward_pre_hook(lambda module, args: kept.append(args[0][0, 1:].double()))
    with torch.no_grad():
        for prompt, answer in TURNS:
            model(input_ids=tokens(prompt + answer))
    handle.remove()
    return torch.cat(kept)


def dense_fisher(model, name):
    """X X^T and Y Y^T of one layer without the scale: one text at a time, by a probe on the layer's output."""
    generator, kept = torch.Generator().manual_seed(0), []
    for prompt, answer in TURNS:
        ids, start = tokens(prompt + answer), tokens(prompt).shape[1] - 1
        probe = torch.zeros(ids.shape[1], linear(model)[name].out_features, requires_grad=True)
        rows = []

        def hook(module, args, output, rows=rows, probe=probe):
            rows.append(args[0][0].detach())
            return output + probe

        handle = linear(model)[name].register_forward_hook(hook)
        log_p = model(input_ids=ids).logits[0, start:].log_softmax(-1)
        handle.remove()
        drawn = torch.multinomial(log_p.detach().exp(), 1, generator=generator)
        (gradient,) = torch.autograd.grad(log_p.gather(1, drawn).sum(), probe)
        kept.append((rows[0].double(), gradient.double()))
    x, g = (torch.cat(parts) for parts in zip(*kept, strict=True))
    weights = g.square().sum(1)
    return (x * weights[:, None]).T @ x / weights.sum(), g.T @ g / len(TURNS)


def relative(found, expected):
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize(("size", "directions", "rank"), [(40, 40, 40), (200, 30, 10), (300, 300, 20), (5, 2, 64)])
def test_a_second_moment_of_a_stream(size, directions, rank):
    generator = torch.Generator().manual_seed(1)
    basis = torch.linalg.qr(torch.randn(size, directions, generator=generator, dtype=torch.float64))[0]
    spectrum = torch.arange(1, directions + 1, dtype=torch.float64) ** -1.5
    rows = torch.randn(500, directions, generator=generator, dtype=torch.float64) * spectrum @ basis.T
    weights = torch.rand(500, generator=generator, dtype=torch.float64)
    moment = SecondMoment(size, rank)
    for start in range(0, 500, 70):
        moment.add(rows[start : start + 70], weights[start : start + 70])
    F, energy = moment.factor()
    dense = (rows * weights[:, None]).T @ rows
    values, vectors = torch.linalg.eigh(dense)
    values, vectors = values.flip(0)[:rank], vectors.flip(1)[:, :rank]
    exact = directions <= rank + OVERSAMPLING
    assert F.shape == (size, min(rank, size, directions))
    assert relative(F.double() @ F.double().T, vectors * values @ vectors.T) < (1e-4 if exact else 1e-2)
    assert energy == pytest.approx(float(values.sum() / dense.trace()), rel=1e-4 if exact else 1e-2)
    assert moment.trace == pytest.approx(float(dense.trace()), rel=1e-5)


def test_the_fewest_directions_with_an_energy():
    moment = SecondMoment(6, 6)
    moment.add(torch.diag(torch.tensor([6.0, 3.0, 2.0, 1.0, 0.5, 0.1])))
    shares = torch.tensor([36, 9, 4, 1, 0.25, 0.01], dtype=torch.float64).cumsum(0) / 50.26
    for wanted, k in [(0.1, 1), (0.7, 1), (0.72, 2), (0.95, 3), (0.98, 4), (1.0, 6)]:
        F, energy = moment.factor(wanted)
        assert F.shape == (6, k)
        assert energy == pytest.approx(float(shares[k - 1]), rel=1e-4)


def test_a_moment_of_nothing():
    moment = SecondMoment(6, 3)
    assert moment.factor()[0].shape == (6, 0)
    moment.add(torch.zeros(4, 6))
    F, energy = moment.factor()
    assert (F.shape, energy) == ((6, 0), 1.0)


def test_the_global_generator_is_left_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    SecondMoment(20, 5)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("name", LAYERS)
def test_activations_against_the_dense_second_moment(model, activations, name):
    rows = dense_inputs(model, name)
    moment = rows.T @ rows
    moment *= moment.shape[0] / moment.trace()
    X = activations.layers[name].X.double()
    assert relative(X @ X.T, moment) < 1e-4
    assert activations.layers[name].energy == pytest.approx(1, abs=1e-4)
    assert activations.layers[name].Y is None


@pytest.mark.parametrize("batch_size", [1, 2])
@pytest.mark.parametrize("name", LAYERS)
def test_fisher_against_dense_gradients(model, name, batch_size):
    layers = list(linear(model))
    metric = fisher_metric(model, make_tokenizer(), TURNS, layers, rank=64, energy=1.0, batch_size=batch_size)
    inputs, outputs = dense_fisher(model, name)
    X, Y = metric.layers[name].X.double(), metric.layers[name].Y.double()
    assert relative(X @ X.T, inputs) < 1e-3
    assert relative(metric.scale * Y @ Y.T, outputs) < 1e-3
    assert metric.layers[name].energy == pytest.approx(1, abs=1e-3)


def test_fisher_is_the_divergence_of_the_answers(model):
    """scale / 2 ||Y^T dW X||^2 is the KL divergence in nats of a small step: exactly, for a text of one token."""
    name = "model.layers.1.mlp.down_proj"
    turns = [("dog", "")] * 3000
    metric = fisher_metric(model, make_tokenizer(), turns, list(linear(model)), rank=64, energy=1.0, batch_size=500)
    moved = AutoModelForCausalLM.from_pretrained(model.name_or_path).eval()
    generator = torch.Generator().manual_seed(3)
    step = 1e-3 * torch.randn(linear(model)[name].weight.shape, generator=generator)
    with torch.no_grad():
        linear(moved)[name].weight += step
        p, q = (m.double()(input_ids=tokens("dog")).logits[0, -1].log_softmax(-1) for m in (model, moved))
        model.float()
    divergence = float((p.exp() * (p - q)).sum())
    change = metric.layers[name].Y.T @ step @ metric.layers[name].X
    assert 0.5 * metric.scale * float(change.square().sum()) == pytest.approx(divergence, rel=0.1)


def test_the_scale_makes_metrics_comparable(fisher):
    traces = [
        float(fisher.layers[name].X.square().sum() * fisher.layers[name].Y.square().sum())
        / (len(fisher.layers[name].X) * len(fisher.layers[name].Y))
        for name in fisher.layers
    ]
    assert sum(traces) / len(traces) == pytest.approx(1, rel=1e-2)


def test_the_model_is_left_as_it_was(model):
    model.train()
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    fisher_metric(model, make_tokenizer(), TURNS, [UP])
    assert model.training
    model.eval()
    for name, weight in model.named_parameters():
        assert torch.equal(weight, before[name])
        assert weight.requires_grad
        assert weight.grad is None
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_seed_gives_the_same_metric(model, fisher):
    again = fisher_metric(model, make_tokenizer(), TURNS, list(linear(model)), rank=64, energy=1.0)
    other = fisher_metric(model, make_tokenizer(), TURNS, list(linear(model)), rank=64, energy=1.0, seed=1)
    assert torch.equal(again.layers[UP].Y, fisher.layers[UP].Y)
    assert not torch.allclose(other.layers[UP].Y @ other.layers[UP].Y.T, fisher.layers[UP].Y @ fisher.layers[UP].Y.T)


def test_of_a_model_in_4_bit(pair, fisher):
    """Weights in NF4 have no gradients, and need none."""
    model = load_model(str(pair[1]), "float32", load_in_4bit=True, device="cpu")
    found = fisher_metric(model, make_tokenizer(), TURNS, list(linear(model)), rank=64, energy=1.0)
    X, expected = (metric.layers[UP].X.double() for metric in (found, fisher))
    assert relative(X @ X.T, expected @ expected.T) < 0.5, "rounding moves it, and no more"
    assert float(found.layers[UP].Y.norm()) > 0


@pytest.mark.parametrize("metric", [activation_metric, fisher_metric])
def test_fewer_directions_are_the_leading_ones(model, metric):
    few = metric(model, make_tokenizer(), TURNS, [UP], rank=2, energy=1.0)
    values = torch.linalg.svdvals(metric(model, make_tokenizer(), TURNS, [UP], rank=64, energy=1.0).layers[UP].X)
    torch.testing.assert_close(torch.linalg.svdvals(few.layers[UP].X), values[:2], rtol=1e-3, atol=1e-3)
    assert few.layers[UP].energy < 1


def test_the_file_keeps_them(direction, activations, fisher):
    for name, module in direction.modules.items():
        entry = direction.spec["modules"][name]["metrics"]
        for metric in (activations, fisher):
            assert torch.equal(module.metrics[metric.name].inputs, metric.layers[name].X)
            assert entry[metric.name]["inputs"] == metric.layers[name].X.shape[1]
        assert torch.equal(module.metrics["fisher"].outputs, fisher.layers[name].Y)
        assert module.metrics["activations"].outputs is None
    assert direction.spec["metrics"]["fisher"] == {"answers": 2, "scale": fisher.scale}


def test_norm_of_the_difference_in_the_metric(pair, direction):
    base, aligned = (AutoModelForCausalLM.from_pretrained(folder).state_dict() for folder in pair)
    d = aligned[f"{UP}.weight"].double() - base[f"{UP}.weight"].double()
    activations, fisher = (direction.modules[UP].metrics[name] for name in ("activations", "fisher"))
    assert float(activations.norm) == pytest.approx(float((d @ activations.inputs.double()).norm()), rel=1e-4)
    expected = float((fisher.outputs.double().T @ d @ fisher.inputs.double()).norm())
    assert float(fisher.norm) == pytest.approx(expected, rel=1e-4)


def test_the_penalty_measures_outputs(pair, direction):
    """P of one layer is |(I - C) dW x|^2 over its inputs x, up to the scale of the trace."""
    peft_model = lora_model(pair[1])
    penalty = AlignmentPenalty(
        peft_model, direction, projector="subspace", rank=4, metric="activations", modules=["0.mlp.up"]
    )
    delta = peft_model.get_submodule(f"base_model.model.{UP}").get_delta_weight("default").detach().double()
    U = direction.modules[UP].U[:, :4].double()
    rows = dense_inputs(AutoModelForCausalLM.from_pretrained(pair[1]), UP)
    outputs = rows @ delta.T
    off = outputs - outputs @ U @ U.T
    expected = float(off.square().sum() / rows.square().sum() * rows.shape[1])
    assert float(penalty()) == pytest.approx(expected, rel=1e-2)
    measured = penalty.measure()[0]
    assert measured.penalty == pytest.approx(float(penalty()), rel=1e-4)
    assert measured.relative == pytest.approx(
        expected**0.5 / float(direction.modules[UP].metrics["activations"].norm), rel=1e-2
    )
    penalty.shorten(0.5 * measured.relative)
    assert penalty.measure()[0].relative == pytest.approx(0.5 * measured.relative, rel=1e-3)


def test_the_penalty_measures_answers(pair, direction):
    peft_model = lora_model(pair[1])
    penalty = AlignmentPenalty(peft_model, direction, metric="fisher", modules=["0.mlp.up"])
    assert penalty.rank == 0, "no direction is free, unless asked for"
    delta = peft_model.get_submodule(f"base_model.model.{UP}").get_delta_weight("default").detach().double()
    metric = direction.modules[UP].metrics["fisher"]
    expected = float((metric.outputs.double().T @ delta @ metric.inputs.double()).square().sum())
    assert float(penalty()) == pytest.approx(expected, rel=1e-4)
    measured = penalty.measure()[0]
    assert measured.penalty == pytest.approx(expected, rel=1e-4)
    assert measured.total == pytest.approx(float(delta.square().sum()), rel=1e-4), "drift stays one of weights"
    penalty.shorten(0.5 * measured.relative)
    assert penalty.measure()[0].relative == pytest.approx(0.5 * measured.relative, rel=1e-3)


@pytest.mark.parametrize("metric", ["activations", "fisher"])
def test_added_gradients_are_those_of_autograd(pair, direction, metric):
    peft_model = lora_model(pair[1])
    penalty = AlignmentPenalty(peft_model, direction, metric=metric)
    weights = [weight for weight in peft_model.parameters() if weight.requires_grad]
    expected = torch.autograd.grad(3 * penalty(), weights)
    penalty.add_gradient(3.0)
    for weight, gradient in zip(weights, expected, strict=True):
        torch.testing.assert_close(weight.grad, gradient, rtol=1e-5, atol=1e-7)


def test_the_best_metric_that_the_file_holds(pair, direction, direction_file, activations, tmp_path):
    assert AlignmentPenalty(lora_model(pair[1]), direction).metric == "fisher"
    assert AlignmentPenalty(lora_model(pair[1]), AlignmentDirection.load(direction_file)).metric == "weights"
    extract_direction(*pair, rank=8, metrics=[activations]).save(tmp_path / "other.safetensors")
    other = AlignmentDirection.load(tmp_path / "other.safetensors")
    assert AlignmentPenalty(lora_model(pair[1]), other).metric == "weights"
    assert AlignmentPenalty(lora_model(pair[1]), direction, metric="weights").rank is None


def test_a_metric_that_holds_nothing(pair, direction):
    """A run that asked for the constraint never trains without it."""
    for change in (lambda X: X[:, :0], torch.zeros_like):
        modules = {}
        for name, module in direction.modules.items():
            empty = replace(module.metrics["fisher"], inputs=change(module.metrics["fisher"].inputs))
            modules[name] = replace(module, metrics={"fisher": empty})
        with pytest.raises(AsftError, match="metric fisher is empty in every layer"):
            AlignmentPenalty(lora_model(pair[1]), AlignmentDirection(modules, direction.spec))


def test_one_layer_whose_metric_is_empty(pair, direction):
    modules = dict(direction.modules)
    first = next(iter(modules))
    fisher = modules[first].metrics["fisher"]
    modules[first] = replace(modules[first], metrics={"fisher": replace(fisher, inputs=fisher.inputs[:, :0])})
    emptied = AlignmentDirection(modules, direction.spec)
    with pytest.raises(AsftError, match=rf"1 LoRA layers without a direction in the metric fisher .*{first}"):
        AlignmentPenalty(lora_model(pair[1]), emptied)
    assert AlignmentPenalty(lora_model(pair[1]), emptied, on_uncovered="ignore").uncovered == 1


def test_a_layer_that_the_metric_does_not_know(pair, direction):
    """A tower of images reads no text: it is not covered, and never constrained by less than what was asked for."""
    modules = dict(direction.modules)
    first = next(iter(modules))
    modules[first] = replace(modules[first], metrics={})
    known = AlignmentDirection(modules, direction.spec)
    with pytest.raises(
        AsftError, match=rf"does not cover 1 LoRA layers without a direction in the metric fisher .*{first}"
    ):
        AlignmentPenalty(lora_model(pair[1]), known)
    penalty = AlignmentPenalty(lora_model(pair[1]), known, on_uncovered="ignore")
    assert (len(penalty.layers), penalty.uncovered) == (len(modules) - 1, 1)
    assert len(AlignmentPenalty(lora_model(pair[1]), known, metric="weights").layers) == len(modules)


@pytest.mark.parametrize("metric", ["activations", "fisher"])
def test_a_file_without_the_metric_is_refused(pair, direction_file, metric):
    with pytest.raises(AsftError, match=rf"metric is '{metric}', which the direction file does not hold"):
        AlignmentPenalty(lora_model(pair[1]), AlignmentDirection.load(direction_file), metric=metric)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda metric: replace(metric, inputs=metric.inputs[:, :-1]), "fisher.inputs has shape"),
        (lambda metric: replace(metric, outputs=metric.outputs[:-1]), "fisher.outputs has shape"),
        (lambda metric: replace(metric, inputs=metric.inputs * float("nan")), "NaN"),
        (lambda metric: replace(metric, norm=-metric.norm), "fisher.norm is negative"),
        (lambda metric: replace(metric, outputs=None), "lacks the tensor .*fisher.outputs"),
    ],
)
def test_damaged_files(direction, tmp_path, change, message):
    module = direction.modules[UP]
    module = replace(module, metrics={**module.metrics, "fisher": change(module.metrics["fisher"])})
    AlignmentDirection({**direction.modules, UP: module}, direction.spec).save(tmp_path / "bad.safetensors")
    with pytest.raises(AsftError, match=message):
        AlignmentDirection.load(tmp_path / "bad.safetensors")


@pytest.mark.parametrize("metrics", [[], "fisher", {"other": {"inputs": 3}}, {"fisher": 3}, {"fisher": {"inputs": -1}}])
def test_damaged_specs(direction, tmp_path, metrics):
    entries = {**direction.spec["modules"], UP: {**direction.spec["modules"][UP], "metrics": metrics}}
    spec = {**direction.spec, "modules": entries}
    AlignmentDirection(direction.modules, spec).save(tmp_path / "bad.safetensors")
    with pytest.raises(AsftError, match=f"its spec for {UP} has the metric"):
        AlignmentDirection.load(tmp_path / "bad.safetensors")


@pytest.mark.parametrize("metric", [activation_metric, fisher_metric])
def test_unknown_layers(model, metric):
    with pytest.raises(AsftError, match=r"no layer model\.layers\.9"):
        metric(model, make_tokenizer(), TURNS, ["model.layers.9.mlp.up_proj"])


@pytest.mark.parametrize("metric", [activation_metric, fisher_metric])
def test_weights_that_overflow(pair, metric):
    broken = AutoModelForCausalLM.from_pretrained(pair[1])
    with torch.no_grad():
        linear(broken)["model.layers.0.mlp.down_proj"].weight.fill_(float("inf"))
    with pytest.raises(AsftError, match="NaN or infinity"):
        metric(broken, make_tokenizer(), TURNS, list(linear(broken)))


@pytest.mark.slow
def test_the_command(pair, tmp_path):
    (tmp_path / "prompts.txt").write_text("the cat sees a red dog\nthe dog says no\n")
    output = tmp_path / "tiny.asft.safetensors"
    command = ["asft", "extract", "--base", str(pair[0]), "--aligned", str(pair[1]), "-o", str(output)]
    options = ["--prompts", str(tmp_path / "prompts.txt"), "--metric-rank", "4", "--json"]
    printed = axolotl(*command, "--metric", "activations", *options, cwd=tmp_path).stdout
    assert json.loads(printed)["modules"]
    metric = AlignmentDirection.load(output).modules[UP].metrics["activations"]
    assert metric.inputs.shape == (64, 4)
    assert float(metric.norm) > 0
    refused = axolotl(*command, "--force", "--metric", "fisher", *options, cwd=tmp_path, check=False)
    assert refused.returncode == 2
    assert "refuses 0 of 2 prompts that ask for harm" in refused.stderr


def test_own_answers_in_turns():
    from axolotl_asft.evaluation.safety_metrics import in_turns

    refused, answered = [("a", "no"), ("b", "no"), ("c", "no")], [("x", "yes"), ("y", "yes")]
    assert [turn[0] for turn in in_turns(refused, answered)] == ["a", "x", "b", "y", "c", "x"]
    assert in_turns(refused, []) == refused
    assert in_turns([], answered) == [], "harmless answers alone hold nothing"


def test_a_metric_is_of_the_layers_that_a_direction_file_has():
    """Both go by the numbered blocks of a decoder: a number elsewhere in a name is no block's."""
    from axolotl_asft.evaluation.safety_metrics import linear_layers

    blocks = [torch.nn.ModuleDict({"up": torch.nn.Linear(2, 2), "norm": torch.nn.LayerNorm(2)}) for _ in range(2)]
    parts = {"layers": torch.nn.ModuleList(blocks[:1]), "mergers": torch.nn.ModuleList(blocks[1:])}
    assert linear_layers(torch.nn.ModuleDict({"model": torch.nn.ModuleDict(parts)})) == ["model.layers.0.up"]


def test_a_device_holds_one_omega_for_all_layers_of_a_size():
    """Of an 8B model the sketches of 224 layers are 3 GB, and as many Omegas were as much again."""
    moments = [SecondMoment(30, 4) for _ in range(5)]
    rows = torch.randn(9, 30, generator=torch.Generator().manual_seed(0))
    for moment in moments:
        moment.add(rows)
    kept = {tensor.data_ptr() for moment in moments for tensor in vars(moment).values() if torch.is_tensor(tensor)}
    assert len(kept) == 5
    assert all(moment.sketch.device.type == "cpu" for moment in moments)


def test_a_metric_of_other_names_is_not_dropped_unsaid(pair):
    layer = LayerMetric(torch.ones(4, 1), torch.ones(4, 1), 0.9)
    metric = ModelMetric("fisher", {"decoder.0.q": layer}, answers=1)
    with pytest.raises(
        AsftError, match=r"the metric fisher is for layers such as decoder\.0\.q, but the checkpoint's are"
    ):
        extract_direction(*pair, rank=2, metrics=[metric])
