"""`axolotl asft inspect --plot`: a picture of any direction file, in the one size."""

import struct

import pytest
import torch
from click.testing import CliRunner

from axolotl_asft import AlignmentDirection
from axolotl_asft.cli import asft
from axolotl_asft.direction import ModuleDirection
from axolotl_asft.spectra_chart import _kind_and_layer, draw_spectra


def size_of(png):
    data = png.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", data[16:24])


def made(names, ranks, **entry):
    modules, entries = {}, {}
    for name, k in zip(names, ranks, strict=True):
        U = torch.eye(8)[:, :k]
        modules[name] = ModuleDirection(U, torch.linspace(2, 1, k) if k else torch.zeros(0), torch.tensor(9.0), 8)
        entries[name] = {"shape": [8, 8], "k": k, "energy": 0.9, "bound": 0.1} | entry
    ends = {"base": {"id": "base"}, "aligned": {"id": "$\\aligned$"}}
    return AlignmentDirection(modules, ends | {"modules": entries})


def test_the_command(direction_file, tmp_path):
    picture = tmp_path / "d.png"
    shown = CliRunner().invoke(asft, ["inspect", str(direction_file), "--no-modules", "--plot", str(picture)])
    assert shown.exit_code == 0, shown.output
    assert size_of(picture) == (2160, 750)
    refused = CliRunner().invoke(asft, ["inspect", str(direction_file), "--plot", str(tmp_path / "d.pdf")])
    assert refused.exit_code == 2
    assert refused.stderr.endswith("d.pdf; expected a name that ends in .png\n")


@pytest.mark.parametrize(
    ("names", "ranks", "entry"),
    [
        (["model.layers.0.mlp.up_proj"], [1], {}),
        ([f"model.layers.{i}.mlp.up_proj" for i in range(3)], [0, 2, 8], {}),
        ([f"model.layers.{i}.mlp.up_proj" for i in range(2)], [0, 0], {"energy": 1.0, "bound": 0.0}),
        ([f"model.layers.0.mlp.experts.{i}.w{j}" for i in range(9) for j in range(9)], [3] * 81, {"bound": 1e250}),
        (["no.layer.at.all", "$x_{"], [2, 3], {"energy": 0.0, "bound": -1.0}),
    ],
)
def test_whatever_a_file_holds(tmp_path, names, ranks, entry):
    draw_spectra(made(names, ranks, **entry), tmp_path / "d.png")
    assert size_of(tmp_path / "d.png") == (2160, 750)


def test_kinds():
    assert _kind_and_layer("model.layers.3.mlp.experts.5.up_proj") == ("mlp.experts.up_proj", 3)
    assert _kind_and_layer("h.11.attn.c_attn") == ("attn.c_attn", 11)
