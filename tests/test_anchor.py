"""The anchor: the divergence against a dense one in float64, and once per optimizer step in a trainer."""

import importlib.util
from pathlib import Path

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from tiny import OWN_ANSWERS as ANSWERS
from tiny import make_tokenizer
from trainers import lora_weights, make_trainer, training_lines
from transformers import AutoModelForCausalLM

from axolotl_asft import AlignmentDirection, attach
from axolotl_asft.anchor import LIKELIEST, MULTIPLE, TEXTS, TILED, AnswerAnchor, Places, divergence, own_answers_of
from axolotl_asft.errors import AsftError
from axolotl_asft.quiet import without_noise
from axolotl_asft.stamp import read_stamp

WEIGHT = 3.0


@pytest.fixture(scope="module")
def direction(anchored_file):
    return AlignmentDirection.load(anchored_file)


@pytest.fixture
def model(pair):
    torch.manual_seed(0)
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", lora_dropout=0.5)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(pair[1]), config)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            weight.data.normal_(std=0.3, generator=torch.Generator().manual_seed(1))
    return model


def coarse(p, tokens):
    """Dense float64: the probabilities of the tokens, and of the rest as one."""
    rest = p.scatter(-1, tokens, 0.0).sum(dim=-1, keepdim=True)
    return torch.cat([p.gather(-1, tokens), rest], dim=-1)


@pytest.mark.parametrize("vocabulary", [2, 20, 65, 500])
@pytest.mark.parametrize("sharpness", [0.1, 1.0, 8.0])
def test_against_the_dense_divergence(vocabulary, sharpness):
    generator = torch.Generator().manual_seed(0)
    before = sharpness * torch.randn(30, vocabulary, generator=generator, dtype=torch.float64)
    after = before + 0.5 * torch.randn(30, vocabulary, generator=generator, dtype=torch.float64)
    places = Places.of(before.float())
    assert places.tokens.shape == (30, min(LIKELIEST, vocabulary - 1))
    x, y = after.float().requires_grad_(), after.clone().requires_grad_()
    found = divergence(places, x)
    p, q = coarse(before.softmax(-1), places.tokens), coarse(y.softmax(-1), places.tokens)
    expected = (p * (p / q).log()).sum(dim=-1)
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-5)
    found.sum().backward()
    expected.sum().backward()
    torch.testing.assert_close(x.grad.double(), y.grad, rtol=1e-3, atol=1e-5)
    whole = (before.softmax(-1) * (before.log_softmax(-1) - after.log_softmax(-1))).sum(dim=-1)
    assert (found <= whole + 1e-5).all()
    if vocabulary <= LIKELIEST + 1:
        torch.testing.assert_close(found.double(), whole, rtol=1e-3, atol=1e-5)


def test_nothing_pulls_at_the_aligned_model():
    logits = 5 * torch.randn(12, 300, generator=torch.Generator().manual_seed(0))
    x = logits.clone().requires_grad_()
    found = divergence(Places.of(logits), x)
    found.sum().backward()
    assert found.abs().max() < 1e-5
    assert x.grad.abs().max() < 1e-6


def test_certain_of_one_word():
    """All others together have next to no probability, whose logarithm is finite all the same."""
    logits = torch.zeros(1, 500)
    logits[0, 3] = 200.0
    x = (0.5 * logits).requires_grad_()
    found = divergence(Places.of(logits), x)
    found.sum().backward()
    assert torch.isfinite(found).all()
    assert torch.isfinite(x.grad).all()


def expected_loss(model, turns):
    """KL(without the adapter || with it), the mean over the answers' tokens, text by text and over all words."""
    tokenizer, parts = make_tokenizer(), []
    model.eval()
    for request, answer in turns:
        start = len(tokenizer(request)["input_ids"])
        ids = tokenizer(request + answer, return_tensors="pt")["input_ids"]
        with model.disable_adapter(), torch.no_grad():
            p = model(input_ids=ids).logits[0, start - 1 : -1].double().log_softmax(-1)
        q = model(input_ids=ids).logits[0, start - 1 : -1].double().log_softmax(-1)
        parts.append((p.exp() * (p - q)).sum(dim=-1))
    return torch.cat(parts).mean()


@pytest.mark.parametrize("step", [0, 1, 7])
def test_the_loss_of_a_step(model, step):
    """Padding, dropout and the rows of a batch have no say; answers take turns."""
    anchor = AnswerAnchor(make_tokenizer(), ANSWERS)
    anchor.remember(model)
    state = torch.get_rng_state()
    model.train()
    with without_noise(model):
        loss = anchor.loss(model, step)
    assert torch.equal(torch.get_rng_state(), state), "no dropout"
    assert model.training
    assert all(module.training for module in model.modules())
    turns = [ANSWERS[(step * TEXTS + i) % len(ANSWERS)] for i in range(TEXTS)]
    wanted = expected_loss(model, turns)
    assert float(loss) == pytest.approx(float(wanted), rel=1e-4)
    parameters = [weight for weight in model.parameters() if weight.requires_grad]
    for found, true in zip(torch.autograd.grad(loss, parameters), torch.autograd.grad(wanted, parameters), strict=True):
        torch.testing.assert_close(found, true.float(), rtol=1e-3, atol=1e-6)


def test_a_run_has_few_lengths(model):
    """A GPU takes its time over each new one; the tokenizer's own would be as many as there are answers."""
    lengths = []
    model.register_forward_pre_hook(lambda _, __, given: lengths.append(given["input_ids"].shape[1]), with_kwargs=True)
    many = [(request, answer + " no" * i) for i, (request, answer) in enumerate(ANSWERS * 3)]
    anchor = AnswerAnchor(make_tokenizer(), many)
    anchor.remember(model)
    with without_noise(model):
        for step in range(len(many)):
            anchor.loss(model, step)
    own = {len(make_tokenizer()(request + answer)["input_ids"]) for request, answer in many}
    assert not [length for length in lengths if length % MULTIPLE]
    assert len(set(lengths)) <= max(own) // MULTIPLE + 1 < len(own)


@pytest.mark.parametrize("world", [2, 3, 8, 11])
def test_however_many_processes(model, world):
    anchor = AnswerAnchor(make_tokenizer(), ANSWERS)
    anchor.remember(model)
    with without_noise(model):
        alone = anchor.loss(model, 4)
        parts = [anchor.loss(model, 4, rank, world) for rank in range(world)]
    assert float(sum(parts) / world) == pytest.approx(float(alone), rel=1e-5)
    assert all(part.requires_grad for part in parts), "every process has a backward pass"


@pytest.mark.parametrize("world", [3, 5, 6, 11])
def test_every_process_makes_as_many_passes(model, world):
    """Where a pass takes one text alone: engines talk in every pass, and one more of one process waits for ever."""
    anchor = AnswerAnchor(make_tokenizer(), ANSWERS)
    anchor.remember(model)
    anchor._at_once = 1
    passes = []
    handle = model.register_forward_pre_hook(lambda *_: passes.append(rank))
    with without_noise(model):
        parts = []
        for rank in range(world):
            parts.append(anchor.loss(model, 4, rank, world))
        handle.remove()
        alone = anchor.loss(model, 4)
    assert {passes.count(rank) for rank in range(world)} == {-(-TEXTS // world)}
    assert float(sum(parts) / world) == pytest.approx(float(alone), rel=1e-5)


def test_fewer_answers_than_a_step_asks_for(model):
    anchor = AnswerAnchor(make_tokenizer(), ANSWERS[:3])
    anchor.remember(model)
    with without_noise(model):
        loss = anchor.loss(model, 5)
    assert float(loss) == pytest.approx(float(expected_loss(model, ANSWERS[:3])), rel=1e-4)


@pytest.mark.parametrize(("micro", "accumulation"), [(8, 1), (2, 4)])
def test_one_step_adds_its_gradient_once(pair, rows, direction, tmp_path, micro, accumulation):
    options = {"micro": micro, "accumulation": accumulation, "max_steps": 1}
    plain = make_trainer(pair, rows, tmp_path / "plain", **options)
    anchored = make_trainer(pair, rows, tmp_path / "anchored", **options)
    anchored.processing_class = make_tokenizer()
    weights = {name: weight for name, weight in plain.model.named_parameters() if weight.requires_grad}
    wanted = expected_loss(plain.model, ANSWERS[:TEXTS])
    gradients = dict(zip(weights, torch.autograd.grad(wanted, list(weights.values())), strict=True))
    attach(anchored, direction, lambda_reg=0, anchor_weight=WEIGHT, general_formats=False)
    plain.train()
    anchored.train()
    after = lora_weights(plain)
    step = plain.args.learning_rate * WEIGHT
    for name, weight in lora_weights(anchored).items():
        torch.testing.assert_close(after[name] - weight, step * gradients[name].float(), rtol=1e-3, atol=1e-6)
    assert training_lines(anchored)[0]["asft/anchor_kl"] == pytest.approx(float(wanted), rel=1e-4)
    assert training_lines(anchored)[0]["loss"] == pytest.approx(training_lines(plain)[0]["loss"], rel=1e-5)


def all_answers(model):
    """The mean divergence over the tokens of every answer, one text at a time."""
    anchor, total, tokens = AnswerAnchor(make_tokenizer(), ANSWERS), 0.0, 0
    anchor.remember(model)
    for places, text in zip(anchor._remembered, anchor._texts, strict=True):
        with torch.no_grad():
            found = divergence(places, anchor._pass(model.eval(), [text])[0])
        total, tokens = total + float(found.sum()), tokens + len(found)
    return total / tokens


def test_what_is_saved_says_how_far_it_is_itself(pair, rows, direction, tmp_path):
    """Not how far the steps before were, nor 0 where a run that had ended is started again."""
    said = []
    for resumed in (None, True):
        options = {"max_steps": -1, "num_train_epochs": 1, "save_strategy": "epoch", "learning_rate": 0.3}
        trainer = make_trainer(pair, rows, tmp_path, logging_strategy="no", **options)
        trainer.processing_class = make_tokenizer()
        attach(trainer, direction, lambda_reg=0, anchor_weight=0.01, general_formats=False)
        trainer.train(resume_from_checkpoint=resumed)
        trainer.save_model()
        said.append(read_stamp(tmp_path)["anchor_kl"])
    assert said == [pytest.approx(all_answers(trainer.model), rel=1e-3)] * 2
    assert said[0] > 1e-3


def test_it_holds_the_answers(pair, rows, direction, tmp_path):
    """A task that drives the answers away, with and without it; the log says how far."""
    ends = {}
    for weight in (1e-6, 5.0):
        trainer = make_trainer(pair, rows, tmp_path / str(weight), max_steps=30, optim="adamw_torch")
        trainer.processing_class = make_tokenizer()
        constraint = attach(trainer, direction, lambda_reg=0, anchor_weight=weight, general_formats=False)
        trainer.train()
        ends[weight] = training_lines(trainer)[-1]["asft/anchor_kl"]
        assert constraint.stamp()["anchor_kl"] == pytest.approx(all_answers(trainer.model), rel=1e-4)
        assert constraint.stamp()["anchor_weight"] == weight
    assert ends[5.0] < 0.3 * ends[1e-6]


def test_a_checkpoint_goes_on(pair, rows, direction, tmp_path):
    """What is remembered is the model without its adapter, whatever the adapter is by then."""
    final = []
    for stop in (None, 4):
        options = {"max_steps": 8, "optim": "adamw_torch", "save_strategy": "steps", "save_steps": 4}
        trainer = make_trainer(pair, rows, tmp_path / str(stop), **options)
        trainer.processing_class = make_tokenizer()
        attach(trainer, direction, lambda_reg=1, anchor_weight=WEIGHT)
        if stop is None:
            trainer.train()
        else:
            trainer.train(resume_from_checkpoint=str(tmp_path / "None" / "checkpoint-4"))
        final.append(lora_weights(trainer))
    for name, weight in final[0].items():
        torch.testing.assert_close(final[1][name], weight, rtol=1e-4, atol=1e-5)


def test_refused(pair, rows, direction, direction_file, tmp_path):
    plain = AlignmentDirection.load(direction_file)
    with pytest.raises(AsftError, match="which the direction file does not hold; make it again with"):
        own_answers_of(plain.spec)
    trainer = make_trainer(pair, rows, tmp_path)
    with pytest.raises(AsftError, match="direction file does not hold"):
        attach(trainer, plain, anchor_weight=1)
    with pytest.raises(AsftError, match="needs the trainer's tokenizer; give it as processing_class"):
        attach(trainer, direction, anchor_weight=1)
    for wrong in (-1.0, float("nan"), float("inf"), True):
        with pytest.raises(AsftError, match=r"anchor_weight is .*; expected a finite number, 0 or more"):
            attach(trainer, direction, anchor_weight=wrong)
    with pytest.raises(AsftError, match="holds an answer without a text"):
        AnswerAnchor(make_tokenizer(), [("<|user|> a cat </s>", "")])


@pytest.mark.parametrize("kind", ["SequenceClassification", "TokenClassification"])
def test_refused_where_the_model_writes_nothing(pair, kind):
    """A reward model gives scores, which would be held as if they were words."""
    classifier = getattr(transformers, f"AutoModelFor{kind}").from_pretrained(pair[1])
    classifier.config.pad_token_id = 0
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
    model = get_peft_model(classifier, config)
    anchor = AnswerAnchor(make_tokenizer(), ANSWERS)
    with pytest.raises(
        AsftError, match=r"the model gives logits \(.*; anchor_weight needs a model that gives the prob"
    ):
        anchor.remember(model)


def test_refused_initialisations(pair, rows, direction, tmp_path):
    """Where a part was taken out of the weight, the model without its adapter is not the aligned one."""
    trainer = make_trainer(pair, rows, tmp_path)
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights="pissa")
    trainer.model = get_peft_model(AutoModelForCausalLM.from_pretrained(pair[1]), config)
    trainer.processing_class = make_tokenizer()
    with pytest.raises(AsftError, match="anchor_weight cannot score the aligned model: the initialisation of model"):
        attach(trainer, direction, anchor_weight=1)


def test_a_model_that_is_random_all_the_same(tmp_path):
    """OPT's layers drop out by themselves, and checkpoint in training mode alone."""
    torch.manual_seed(0)
    config = transformers.OPTConfig(
        vocab_size=64, hidden_size=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=4, word_embed_proj_dim=32,
        max_position_embeddings=64, dropout=0.5, init_std=0.3,
    )  # fmt: skip
    model = get_peft_model(transformers.OPTForCausalLM(config), LoraConfig(target_modules=["q_proj"])).train()
    anchor = AnswerAnchor(make_tokenizer(), ANSWERS)
    anchor.remember(model)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    with pytest.raises(AsftError, match=r"two scores, .* nats per token apart: something in it is random"):
        anchor.remember(model)


def test_a_model_that_takes_one_text_at_a_time(model):
    """As one whose layers are patched for packing may."""
    expected = AnswerAnchor(make_tokenizer(), ANSWERS)
    expected.remember(model)
    with without_noise(model):
        together = expected.loss(model, 1)

    def refuse(module, args, kwargs):
        if len(kwargs["input_ids"]) != 1:
            raise ValueError(f"the batch size is expected to be 1 rather than {len(kwargs['input_ids'])}")

    model.register_forward_pre_hook(refuse, with_kwargs=True)
    anchor = AnswerAnchor(make_tokenizer(), ANSWERS)
    anchor.remember(model)
    with without_noise(model):
        found = anchor.loss(model, 1)
    assert float(found.detach()) == pytest.approx(float(together.detach()), rel=1e-4)


def test_a_model_that_does_not_take_the_texts():
    config = transformers.GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=2, n_positions=4)
    model = get_peft_model(transformers.GPT2LMHeadModel(config), LoraConfig(target_modules=["c_attn"]))
    with pytest.raises(AsftError, match=r"fails on the anchor's answers \(IndexError: .*; set anchor_weight: 0"):
        AnswerAnchor(make_tokenizer(), ANSWERS).remember(model)


def test_answers_that_are_no_numbers(model):
    with torch.no_grad():
        model.base_model.model.lm_head.weight[5] = float("nan")
    with pytest.raises(AsftError, match="not finite numbers in this precision; train in another one"):
        AnswerAnchor(make_tokenizer(), ANSWERS).remember(model)


@pytest.mark.parametrize("name", ["activation_offload_context", "maybe_activation_offload_context"])
def test_where_activations_are_offloaded_the_anchor_s_are_too(pair, rows, direction, tmp_path, name):
    saved = []
    trainer = make_trainer(pair, rows, tmp_path, max_steps=1)
    trainer.processing_class = make_tokenizer()
    offload = torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x)
    setattr(trainer, name, offload)  # as axolotl and TRL enter it: around their own training_step, not around ours
    attach(trainer, direction, lambda_reg=0, anchor_weight=WEIGHT)
    trainer.train()
    assert saved


def test_a_tiled_mlp_is_asked_one_text_at_a_time(model, monkeypatch):
    """axolotl's `tiled_mlp` in shards gives a wrong gradient for a batch of several."""
    patched = importlib.util.find_spec("axolotl.monkeypatch.tiled_mlp.patch").origin
    assert f"target_cls.{TILED} = None" in Path(patched).read_text()
    asked, mlp = [], type(model.get_submodule("base_model.model.model.layers.0.mlp"))
    model.register_forward_pre_hook(lambda _, args, options: asked.append(len(options["input_ids"])), with_kwargs=True)
    AnswerAnchor(make_tokenizer(), ANSWERS).remember(model)
    assert max(asked) > 1
    monkeypatch.setattr(mlp, TILED, None, raising=False)
    asked.clear()
    AnswerAnchor(make_tokenizer(), ANSWERS).remember(model)
    assert set(asked) == {1}


def test_a_model_that_never_gave_these_answers_is_told(pair, rows, direction, tmp_path, caplog, monkeypatch):
    """Another head, other embeddings, another tokenizer: no fingerprint of the layers sees them."""
    tokenizer, aligned = make_tokenizer(), AutoModelForCausalLM.from_pretrained(pair[1]).eval()
    hits = []
    for request, answer in ANSWERS:
        start = len(tokenizer(request, add_special_tokens=False)["input_ids"])
        ids = tokenizer(request + answer, add_special_tokens=False, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            likeliest = aligned(input_ids=ids).logits[0].argmax(dim=-1)
        hits += (likeliest[start - 1 : -1] == ids[0, start:]).tolist()
    share = sum(hits) / len(hits)
    for least, told in ((share, False), (share + 0.01, True)):
        monkeypatch.setattr("axolotl_asft.anchored.RECOGNISED", least - 1e-6)
        trainer = make_trainer(pair, rows, tmp_path, max_steps=1)
        trainer.processing_class = tokenizer
        attach(trainer, direction, lambda_reg=0, anchor_weight=WEIGHT)
        caplog.clear()
        trainer.train()
        assert (f"reproduces only {100 * share:.0f} % of the stored answer tokens" in caplog.text) == told
