"""What the commands say of a direction's answers, and of a projection that found nothing to do."""

import pytest
from click.testing import CliRunner

from axolotl_asft import AlignmentDirection
from axolotl_asft.cli import asft
from axolotl_asft.project import ProjectedLayer, ProjectionReport, summary_text
from axolotl_asft.summary import summary

NO, YES = ["a", "I'm sorry, but I can't help with that."], ["b", "Sure, here is a red house."]


@pytest.mark.parametrize(
    ("answers", "text"),
    [
        ([NO, YES, NO, ["c", "Yes."]], "4 (3 different), of which 2 decline; for anchor_weight"),
        ([NO, YES], "2, of which 1 decline; for anchor_weight"),
    ],
)
def test_answers_that_come_again_are_told(direction_file, tmp_path, answers, text):
    """Of the rarer kind they do, so that the kinds take turns."""
    direction, path = AlignmentDirection.load(direction_file), tmp_path / "kept.safetensors"
    AlignmentDirection(direction.modules, {**direction.spec, "own_answers": answers}).save(path)
    assert f"own answers   {text}\n" in CliRunner().invoke(asft, ["inspect", str(path), "--no-modules"]).stdout
    different = len({request for request, _ in answers})
    assert summary(AlignmentDirection.load(path), path)["own_answers_different"] == different


@pytest.mark.parametrize("projected", [0, 1])
def test_a_threshold_below_every_cosine_is_told(projected):
    rows = [ProjectedLayer(name, cosine, False, 1.0, 1.0) for name, cosine in (("a", 0.125), ("b", 0.5))]
    rows[0] = ProjectedLayer("a", 0.125, bool(projected), 1.0, 1.0)
    settings = {"projector": "paper", "energy": 0.5, "verified": True, "threshold": -0.5}
    text = summary_text(ProjectionReport(tuple(rows), settings))
    said = "nothing was projected, the output is a copy: no layer's cosine is at most --threshold -0.5\n"
    assert (said in text) != projected
    assert "in the median layer" in text
    assert "cos(C dW, dW): 0.1250 to 0.5000" in text
