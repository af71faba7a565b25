"""Devices by name, and work that is spread over several of them in order."""

import threading
import time

import pytest
import torch
from checkpoints import write_wide_checkpoint
from safetensors.torch import load_file

from axolotl_asft import extract_direction, subspace
from axolotl_asft.devices import devices_named, spread
from axolotl_asft.errors import AsftError


@pytest.mark.parametrize("several", [1, 2, 3])
def test_in_order_whoever_is_first(several):
    def work(item, device):
        time.sleep(0.02 if item % 3 == 0 else 0)
        return item**2

    devices = [f"device {number}" for number in range(several)]
    assert list(spread(range(20), work, devices)) == [(item, item**2) for item in range(20)]
    assert list(spread([], work, devices)) == []


def test_each_device_does_one_at_a_time_and_all_of_them_work():
    together = threading.Barrier(2, timeout=10)
    busy, seen = {"a": threading.Lock(), "b": threading.Lock()}, set()

    def work(item, device):
        assert busy[device].acquire(blocking=False)
        seen.add(device)
        together.wait()  # passed only with the other one at work too
        busy[device].release()

    assert len(list(spread(range(10), work, ["a", "b"]))) == 10
    assert seen == {"a", "b"}


def test_not_far_ahead():
    taken = []

    def items():
        for item in range(30):
            taken.append(item)
            yield item

    for used, (item, _) in enumerate(spread(items(), lambda item, device: None, ["a", "b"])):
        assert item == used
        assert len(taken) <= used + 5


def test_an_error_comes_in_its_place_and_ends_the_work():
    def work(item, device):
        if item == 3:
            raise AsftError("layer 3 is broken")

    results = spread(range(100), work, ["a", "b"])
    assert [next(results)[0] for _ in range(3)] == [0, 1, 2]
    with pytest.raises(AsftError, match="layer 3 is broken"):
        next(results)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("decomposing")]


def test_two_devices_make_the_same_direction(tmp_path, monkeypatch):
    """Randomised too: no thread draws another one's numbers."""
    monkeypatch.setattr(subspace, "EXACT_UP_TO", 0)
    monkeypatch.setattr(subspace, "POWER_ITERATIONS", 1)
    pair = [write_wide_checkpoint(tmp_path / name, 6, seed, 200) for seed, name in enumerate(("base", "aligned"))]
    torch.manual_seed(5)
    state = torch.get_rng_state()
    files = []
    for number, device in enumerate(("cpu", "cpu,cpu")):
        files.append(tmp_path / f"{number}.safetensors")
        direction = extract_direction(*pair, rank=4, device=device, output=files[-1])
        assert {entry["method"] for entry in direction.spec["modules"].values()} == {"randomized"}
    one, two = (load_file(file) for file in files)
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert torch.equal(torch.get_rng_state(), state)


def test_names():
    assert devices_named("cpu") == ["cpu"]
    assert devices_named("cpu, cpu") == ["cpu", "cpu"]
    for wrong in ("tpu", "", "cpu:0", "cuda:x", "cuda:-1", "cuda,mps"):
        with pytest.raises(AsftError, match=r"expected cpu, cuda, or one GPU or more like cuda:0,cuda:1|sees no GPU"):
            devices_named(wrong)


@pytest.mark.parametrize(
    ("seen", "asked", "expected"),
    [
        (3, "cuda", ["cuda:0", "cuda:1", "cuda:2"]),
        (3, "cuda:2", ["cuda:2"]),
        (3, "cuda:0,cuda:2", ["cuda:0", "cuda:2"]),
        (2, "cuda:1,cuda", ["cuda:1", "cuda:0"]),
        (2, "cuda:1,cuda:01", ["cuda:1"]),
        (0, "cuda", "torch sees no GPU here; use cpu"),
        (1, "cuda:1", "torch sees 1 GPU here; use cpu"),
        (2, "cuda:2", "torch sees 2 GPUs here; use cpu"),
    ],
)
def test_gpus(monkeypatch, seen, asked, expected):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: seen)
    if isinstance(expected, list):
        assert devices_named(asked) == expected
    else:
        with pytest.raises(AsftError, match=expected):
            devices_named(asked)
