"""Direction files come from strangers: whatever is in them ends in one AsftError, fast, and in little memory."""

import json
import os
import subprocess
import sys
import time
import zipfile

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from axolotl_asft import AlignmentDirection
from axolotl_asft.errors import AsftError
from axolotl_asft.publish import direction_card
from axolotl_asft.summary import module_table, summary, summary_table

EXAMPLES = int(os.environ.get("ASFT_FUZZ_EXAMPLES", "300"))
FUZZED = settings(
    max_examples=EXAMPLES,
    deadline=1000,
    derandomize=EXAMPLES <= 300,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([10**400, -(10**400)])
    | st.floats()
    | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A direction file of two small modules, as bytes."""
    from dataclasses import replace

    from axolotl_asft.direction import Metric, ModuleDirection

    def module(seed):
        generator = torch.Generator().manual_seed(seed)
        U, S, _ = torch.linalg.svd(torch.randn(6, 4, generator=generator), full_matrices=False)
        metric = Metric(torch.randn(4, 2, generator=generator), torch.ones(()), torch.randn(6, 3, generator=generator))
        whole = ModuleDirection(U[:, :2], S[:2], S.norm(), 4)
        return replace(whole, metrics={"fisher": metric})

    entry = {"shape": [6, 4], "k": 2, "energy": 0.9, "bound": 0.1, "metrics": {"fisher": {"inputs": 2, "outputs": 3}}}
    spec = {
        "relative_norm": 0.1, "metrics": {"fisher": {"answers": 3, "scale": 1.0}},
        "base": {"id": "b"}, "aligned": {"id": "a"}, "rank": {}, "svd": {}, "tool": "t", "created": "c",
        "modules": {"layers.0.a": entry, "layers.1.a": entry}, "own_answers": [["ask", "answer"], ["again", "no"]],
    }  # fmt: skip
    path = tmp_path_factory.mktemp("hostile") / "small.safetensors"
    AlignmentDirection({"layers.0.a": module(0), "layers.1.a": module(1)}, spec).save(path)
    return path.read_bytes()


def header_of(data):
    size = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def with_header(header, body):
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    return len(text).to_bytes(8, "little") + text + body


def load(data, folder):
    """What loading and showing it gives; anything but a direction or an AsftError in one line is a failure."""
    path = folder / "hostile.safetensors"
    path.write_bytes(data)
    try:
        direction = AlignmentDirection.load(path)
    except AsftError as error:
        message = str(error)
    else:
        found = summary(direction, path)
        assert summary_table(found)
        assert module_table(found)
        assert direction_card(direction, path, "owner/name")
        return direction
    assert "\n" not in message
    assert len(message) < 2000
    return None


def test_the_file_itself_is_sound(small, tmp_path):
    assert load(small, tmp_path).modules


@FUZZED
@given(data=st.data())
def test_flipped_and_cut_bytes(small, tmp_path, data):
    changed = bytearray(small)
    for _ in range(data.draw(st.integers(1, 8))):
        changed[data.draw(st.integers(0, len(changed) - 1))] = data.draw(st.integers(0, 255))
    length = data.draw(st.integers(0, len(changed)))
    load(bytes(changed[:length] if data.draw(st.booleans()) else changed), tmp_path)


@FUZZED
@given(data=st.data())
def test_other_values_in_the_header(small, tmp_path, data):
    """Any tensor's shape, dtype or offsets."""
    header, body = header_of(small)
    name = data.draw(st.sampled_from(sorted(set(header) - {"__metadata__"})))
    key = data.draw(st.sampled_from(["shape", "dtype", "data_offsets"]))
    numbers = st.lists(st.integers(-1, 2**63) | st.integers(0, 100), max_size=3)
    header[name][key] = data.draw(JSON | numbers | st.sampled_from(["F64", "BF16", "I64", "BOOL", "U8"]))
    if data.draw(st.booleans()):
        header[data.draw(st.sampled_from(["../../etc/passwd", "/x", "layers.0.a.V", ""]))] = header[name]
    load(with_header(header, body), tmp_path)


@FUZZED
@given(data=st.data())
def test_other_values_in_the_spec(small, tmp_path, data):
    """Any value of the spec, at any depth."""
    header, body = header_of(small)
    spec = json.loads(header["__metadata__"]["spec"])
    inner = spec
    while True:
        keys = sorted(inner) if isinstance(inner, dict) else range(len(inner))
        key = data.draw(st.sampled_from(list(keys)))
        if not isinstance(inner[key], dict | list) or not inner[key] or data.draw(st.booleans()):
            break
        inner = inner[key]
    inner[key] = data.draw(JSON)
    header["__metadata__"]["spec"] = json.dumps(spec)
    load(with_header(header, body), tmp_path)


@FUZZED
@given(text=st.text(max_size=60) | st.sampled_from(["[" * 100_000, '{"a":' * 50_000, "1e999", "NaN", '"\\ud800"']))
def test_a_spec_that_is_no_spec(small, tmp_path, text):
    header, body = header_of(small)
    header["__metadata__"]["spec"] = text
    assert load(with_header(header, body), tmp_path) is None


def absurd_header(small):
    return (2**62).to_bytes(8, "little") + small[8:]


def deep_header(small):
    return with_header("[" * 1_000_000, b"")


def terabytes(small):
    header, body = header_of(small)
    header["layers.0.a.U"] |= {"shape": [2**40, 2], "data_offsets": [0, 2**42]}
    return with_header(header, body)


def overlapping(small):
    header, body = header_of(small)
    header["layers.0.a.U"]["data_offsets"] = header["layers.1.a.U"]["data_offsets"]
    return with_header(header, body)


def a_path_for_a_name(small):
    header, body = header_of(small)
    return with_header(json.dumps(header).replace("layers.0.a", "../../layers"), body)


def a_pickle(small):
    import pickle

    return pickle.dumps({"weights": list(range(100))})


def a_zip(small):
    import io

    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("data.pkl", b"x" * 100)
    return file.getvalue()


@pytest.mark.parametrize(
    ("turns", "message"),
    [
        ("text", "own_answers 'text'; expected pairs of a request and an answer"),
        ([["one"]], "expected pairs"),
        ([["one", 2]], "expected pairs"),
        ([["a", "b", "c"]], "expected pairs"),
        ([{"a": "b"}], "expected pairs"),
        ([["a", "b" * 10_001]], "of 10,000 characters at most"),
        ([["a", "b"]] * 513, "has 513 own_answers; expected 512 at most"),
    ],
)
def test_own_answers_of_another_kind(small, tmp_path, turns, message):
    header, body = header_of(small)
    spec = json.loads(header["__metadata__"]["spec"])
    header["__metadata__"]["spec"] = json.dumps({**spec, "own_answers": turns})
    path = tmp_path / "file.safetensors"
    path.write_bytes(with_header(header, body))
    with pytest.raises(AsftError, match=message) as refused:
        AlignmentDirection.load(path)
    assert len(str(refused.value)) < 500


HOSTILE = [absurd_header, deep_header, terabytes, overlapping, a_pickle, a_zip]


@pytest.mark.parametrize("make", HOSTILE)
def test_refused(small, tmp_path, make):
    started = time.monotonic()
    assert load(make(small), tmp_path) is None
    assert time.monotonic() - started < 1


def test_names_are_never_paths(small, tmp_path):
    """A module may be called anything: names are looked up among the model's, and nothing else is done with them."""
    found = load(a_path_for_a_name(small), tmp_path)
    assert "../../layers" in found.modules
    assert [path.name for path in tmp_path.iterdir()] == ["hostile.safetensors"]


MEASURE = """
import re, sys
from axolotl_asft import AlignmentDirection
from axolotl_asft.errors import AsftError
from axolotl_asft.publish import direction_card
from axolotl_asft.summary import module_table, summary, summary_table
def peak():  # not getrusage: what that tells of a child is at least what its parent holds
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
before = peak()
for path in sys.argv[1:]:
    try:
        AlignmentDirection.load(path)
    except AsftError:
        pass
print(peak() - before)
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="asks Linux for the peak")
def test_memory_stays_small(small, tmp_path):
    paths = []
    for make in HOSTILE:
        paths.append(tmp_path / f"{make.__name__}.safetensors")
        paths[-1].write_bytes(make(small))
    grown = subprocess.run(
        [sys.executable, "-c", MEASURE, *map(str, paths)], capture_output=True, text=True, check=True
    )
    assert int(grown.stdout.splitlines()[-1]) < 200e6
