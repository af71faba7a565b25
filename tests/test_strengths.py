"""How strongly a run is held where its settings leave that open."""

import pytest
from peft import LoraConfig, get_peft_model
from tiny import OWN_ANSWERS, make_tokenizer, random_metric
from trainers import make_trainer, training_lines
from transformers import AutoModelForCausalLM

from axolotl_asft import AlignmentPenalty, attach, extract_direction
from axolotl_asft.strengths import Strengths, strengths


@pytest.fixture(scope="module")
def directions(pair):
    """By what they hold beside the directions themselves."""
    metric = random_metric(extract_direction(*pair, rank=4))
    answers = {"own_answers": OWN_ANSWERS}
    kinds = {
        "nothing": {},
        "answers": answers,
        "fisher": {"metrics": [metric]},
        "both": answers | {"metrics": [metric]},
    }
    return {kind: extract_direction(*pair, rank=4, **held) for kind, held in kinds.items()}


@pytest.fixture(scope="module")
def model(pair):
    return get_peft_model(AutoModelForCausalLM.from_pretrained(pair[1]), LoraConfig(r=4, target_modules="all-linear"))


@pytest.mark.parametrize(
    ("kind", "given", "expected"),
    [
        ("both", {}, (0.1, None, 3.0)),
        ("nothing", {}, (1.0, None, 0.0)),
        ("answers", {}, (1.0, None, 0.0)),
        ("fisher", {}, (1.0, None, 0.0)),
        ("both", {"taken_out": True}, (1.0, None, 0.0)),
        ("both", {"lambda_reg": 1}, (1.0, None, 3.0)),
        ("both", {"lambda_reg": 0}, (0.0, None, 3.0)),
        ("both", {"lambda_reg": 0, "anchor_weight": 0}, (0.0, None, 0.0)),
        ("fisher", {"lambda_reg": 2}, (2.0, None, 0.0)),
        ("both", {"lambda_reg": 2, "taken_out": True}, (2.0, None, 0.0)),
        ("both", {"anchor_weight": 0}, (1.0, None, 0.0)),
        ("both", {"anchor_weight": 5}, (0.1, None, 5.0)),
        ("answers", {"anchor_weight": 5}, (1.0, None, 5.0)),
        ("both", {"lambda_reg": 2, "anchor_weight": 5}, (2.0, None, 5.0)),
        ("both", {"max_drift": 0.2}, (0.0, 0.2, 0.0)),
        ("both", {"max_drift": 0.2, "lambda_reg": 2}, (2.0, 0.2, 0.0)),
        ("both", {"max_drift": 0.2, "anchor_weight": 5}, (0.0, 0.2, 5.0)),
    ],
)
def test_what_is_given_stands(model, directions, kind, given, expected):
    penalty = AlignmentPenalty(model, directions[kind])
    chosen = strengths(penalty.metric, directions[kind].spec, **{"taken_out": False, **given})
    assert chosen == Strengths(*expected)


def test_another_metric_is_not_what_was_measured(model, directions):
    penalty = AlignmentPenalty(model, directions["both"], metric="weights")
    assert strengths(penalty.metric, directions["both"].spec, taken_out=False) == Strengths(1.0, None, 0.0)


def test_a_run_that_says_nothing_is_anchored(pair, rows, directions, tmp_path):
    trainer = make_trainer(pair, rows, tmp_path, max_steps=2)
    trainer.processing_class = make_tokenizer()
    constraint = attach(trainer, directions["both"])
    trainer.train()
    assert (constraint.lambda_reg, constraint.anchor_weight) == (0.1, 3.0)
    assert (constraint.stamp()["lambda_reg"], constraint.stamp()["anchor_weight"]) == (0.1, 3.0)
    assert [line["asft/anchor_kl"] >= 0 for line in training_lines(trainer)] == [True, True]


def test_an_initialisation_that_leaves_no_aligned_model_to_ask(pair, rows, directions, tmp_path):
    trainer = make_trainer(pair, rows, tmp_path)
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights="pissa")
    trainer.model = get_peft_model(AutoModelForCausalLM.from_pretrained(pair[1]), config)
    constraint = attach(trainer, directions["both"])
    assert (constraint.lambda_reg, constraint.anchor_weight) == (1.0, 0.0)
