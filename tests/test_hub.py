"""Directions on the Hub: loaded, pinned, refused and shared, over HTTP with a server of our own."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hub_server import Hub
from safetensors.torch import save_file
from tiny import ENVIRONMENT, OWN_ANSWERS, axolotl, make_pair, write_config

from axolotl_asft import AlignmentDirection, extract_direction
from axolotl_asft.errors import AsftError
from axolotl_asft.hub import HubFile, direction_path, hub_file, hub_model, weight_files
from axolotl_asft.strengths import WEIGHTS_ALONE

LOCATE = """
import logging, sys
logging.basicConfig(level="WARNING", format="%(message)s")
from axolotl_asft.hub import direction_path
from axolotl_asft.errors import AsftError
try:
    print(direction_path(sys.argv[1]))
except AsftError as error:
    sys.exit(f"asft: {error}")
"""


@pytest.fixture
def hub(direction_file):
    hub = Hub()
    hub.commit("me/tiny-asft", {"direction.safetensors": direction_file.read_bytes()})
    yield hub
    hub.close()


@pytest.fixture
def environment(hub, tmp_path):
    """Of a child whose Hub is the server; nothing of the machine's cache or login is used."""
    return {
        **os.environ,
        **ENVIRONMENT,
        "HF_HUB_OFFLINE": "0",
        "HF_ENDPOINT": hub.endpoint,
        "HF_HOME": str(tmp_path / "hf"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DOWNLOAD_TIMEOUT": "5",
        "HF_HUB_ETAG_TIMEOUT": "5",
        "HF_TOKEN": "",
    }


def locate(location, environment, cwd=None, **changes):
    return subprocess.run(
        [sys.executable, "-c", LOCATE, location],
        env={**environment, **changes}, cwd=cwd, capture_output=True, text=True, timeout=120,
    )  # fmt: skip


def content(located):
    assert located.returncode == 0, located.stderr
    return Path(located.stdout.strip()).read_bytes()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("me/tiny", HubFile("me/tiny")),
        ("me/tiny@v1.0", HubFile("me/tiny", "v1.0")),
        ("me/tiny:a.safetensors", HubFile("me/tiny", None, "a.safetensors")),
        ("me/tiny@refs/pr/1:sub/a.safetensors", HubFile("me/tiny", "refs/pr/1", "sub/a.safetensors")),
        ("me/../tiny", None),
        ("me/tiny:../../etc/passwd", None),
        ("me/tiny@../x", None),
        ("tiny", None),
        ("a/b/c", None),
        ("-me/tiny", None),
        ("me/tiny@", None),
        ("me/tiny:", None),
    ],
)
def test_names(text, expected):
    assert HubFile.parse(text) == expected


@pytest.mark.parametrize("text", ["./me/tiny", "/me/tiny", "~/me/tiny", "me/tiny.safetensors", "x.safetensors"])
def test_what_looks_like_a_path_is_one(text):
    assert str(direction_path(text)).endswith(text.removeprefix("~").removeprefix("./"))


# How a location is read: as the direction, and as the model or adapter; None of a local path, "" where it is refused.
SPELLINGS = {
    "me/tiny": (HubFile("me/tiny"), HubFile("me/tiny")),
    "me/tiny@v1": (HubFile("me/tiny", "v1"), HubFile("me/tiny", "v1")),
    "me/tiny:a.safetensors": (HubFile("me/tiny", None, "a.safetensors"), ""),
    "me/tiny@v1:a.safetensors": (HubFile("me/tiny", "v1", "a.safetensors"), ""),
    "me/tiny.safetensors": (None, HubFile("me/tiny.safetensors")),
    "me/here": (None, None),
    "./me/tiny": (None, None),
    "../me/tiny": (None, None),
    "/me/tiny": (None, None),
    "~/me/tiny": (None, None),
    "tiny": (None, None),
    "a/b/c": (None, None),
    Path("me/tiny"): (None, HubFile("me/tiny")),
}


@pytest.mark.parametrize("location", SPELLINGS)
def test_one_rule_says_what_is_on_the_hub(location, tmp_path, monkeypatch):
    (tmp_path / "me" / "here").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    direction, model = SPELLINGS[location]
    assert hub_file(location) == direction
    if model == "":
        with pytest.raises(AsftError, match=f"{location} names one file; expected a model: a folder, or"):
            hub_model(location)
    else:
        assert hub_model(location) == model


def test_a_folder_is_no_direction(tmp_path):
    with pytest.raises(AsftError, match=f"{tmp_path} is a folder; expected a direction file"):
        AlignmentDirection.load(tmp_path)


def test_what_is_here_is_taken_from_here(tmp_path, monkeypatch):
    (tmp_path / "me").mkdir()
    (tmp_path / "me" / "tiny").write_text("local")
    monkeypatch.chdir(tmp_path)
    assert direction_path("me/tiny").read_text() == "local"


def test_download_and_cache(hub, environment, direction_file):
    found = locate("me/tiny-asft", environment)
    assert content(found) == direction_file.read_bytes(), found.stderr
    commit = hub.head("me/tiny-asft")
    assert f"read at main, which can change; to pin it write direction: me/tiny-asft@{commit}" in found.stderr
    sent = hub.bytes_sent("resolve")
    pinned = locate(f"me/tiny-asft@{commit}", environment)
    assert (pinned.stdout, pinned.stderr) == (found.stdout, ""), "a pinned revision is no warning"
    assert hub.bytes_sent("resolve") == sent, "and no second download"
    offline = locate("me/tiny-asft", environment, HF_HUB_OFFLINE="1")
    assert offline.stdout == found.stdout


def test_a_file_by_name(hub, environment):
    hub.commit("me/tiny-asft", {"other.safetensors": b"other"})
    found = locate("me/tiny-asft:other.safetensors", environment)
    assert content(found) == b"other"
    assert ":other.safetensors" in found.stderr, "the hint keeps the name"


def test_an_old_revision(hub, environment, direction_file):
    old = hub.head("me/tiny-asft")
    hub.commit("me/tiny-asft", {"direction.safetensors": b"new"})
    found = locate(f"me/tiny-asft@{old}", environment)
    assert content(found) == direction_file.read_bytes()


@pytest.mark.parametrize(
    ("location", "message"),
    [
        ("me/nothing", "no file me/nothing here, and no repository of that name on the Hub, or a private one"),
        ("me/tiny-asft@v9", "me/tiny-asft has no revision v9"),
        ("me/tiny-asft:x.safetensors", "has no file x.safetensors (of safetensors: direction.safetensors)"),
        ("me/secret", "or a private one; check the name, or log in with `hf auth login`"),
        (
            "me/na--me",
            "is neither a file here nor a name on the Hub (Cannot have -- or .. in repo_id: 'me/na--me'.); expec",
        ),
    ],
)
def test_one_line_errors(hub, environment, location, message):
    hub.commit("me/secret", {"direction.safetensors": b"secret"})
    hub.private.add("me/secret")
    found = locate(location, environment)
    assert found.returncode == 1
    assert message in found.stderr
    assert found.stderr.startswith("asft: ")
    assert found.stderr.count("\n") == 1


def test_a_token_opens_a_private_repository(hub, environment):
    hub.commit("me/secret", {"direction.safetensors": b"secret"})
    hub.private.add("me/secret")
    found = locate("me/secret", environment, HF_TOKEN="secret")
    assert content(found) == b"secret"


def test_a_cut_connection_is_taken_up_again(hub, environment, direction_file):
    hub.fault = lambda method, path, n: "cut" if method == "GET" and "resolve" in path and n == 0 else None
    found = locate("me/tiny-asft", environment)
    assert content(found) == direction_file.read_bytes(), found.stderr


def test_a_connection_that_is_always_cut(hub, environment):
    hub.fault = lambda method, path, n: "cut" if method == "GET" and "resolve" in path else None
    found = locate("me/tiny-asft", environment)
    assert found.returncode == 1
    assert "asft: me/tiny-asft:direction.safetensors cannot be downloaded" in found.stderr


def test_a_slow_hub(hub, environment, direction_file):
    hub.fault = lambda method, path, n: "slow"
    assert content(locate("me/tiny-asft", environment)) == direction_file.read_bytes()


@pytest.mark.slow
def test_a_hub_that_fails(hub, environment):
    hub.fault = lambda method, path, n: 500
    found = locate("me/tiny-asft", environment)
    assert found.returncode == 1
    assert found.stderr.splitlines()[-1].startswith("asft: me/tiny-asft:direction.safetensors "), found.stderr
    assert "Traceback" not in found.stderr


def test_no_hub_at_all(hub, environment, direction_file):
    away = {"HF_ENDPOINT": "http://127.0.0.1:1"}
    found = locate("me/tiny-asft", environment, **away)
    assert found.returncode == 1
    assert "asft: me/tiny-asft:direction.safetensors cannot be downloaded (" in found.stderr
    assert "), and nothing here is called me/tiny-asft; check the name, or try again: what was" in found.stderr
    assert "Traceback" not in found.stderr
    locate("me/tiny-asft", environment)
    assert content(locate("me/tiny-asft", environment, **away)) == direction_file.read_bytes(), "the cache serves"


def test_a_mistyped_folder_while_offline():
    with pytest.raises(AsftError, match="nothing here is called tiny/nope, and the Hub cannot be reached"):
        weight_files(HubFile("tiny/nope"))


def test_offline_and_never_loaded(environment):
    found = locate("me/tiny-asft", environment, HF_HUB_OFFLINE="1")
    assert "HF_HUB_OFFLINE is set; load it once while online, or check the path" in found.stderr


PUSH = "import sys; from axolotl_asft.cli import asft; asft(sys.argv[1:])"


def push(environment, *arguments):
    return subprocess.run(
        [sys.executable, "-c", PUSH, "push", *map(str, arguments)],
        env=environment, capture_output=True, text=True, timeout=120,
    )  # fmt: skip


def test_push(hub, environment, direction_file, tmp_path):
    shared = push(environment | {"HF_TOKEN": "secret"}, direction_file, "me/new-asft", "--license", "mit", "--json")
    assert shared.returncode == 0, shared.stderr
    result = json.loads(shared.stdout)
    commit = hub.head("me/new-asft")
    assert result["direction"] == f"me/new-asft@{commit}"
    files = hub.repos["me/new-asft"][commit]
    assert files["direction.safetensors"] == direction_file.read_bytes()
    card = files["README.md"].decode()
    assert card.startswith("---\nlibrary_name: axolotl-asft\nlicense: mit\ntags: [asft, ")
    assert f"  direction: me/new-asft\n  direction_sha256: {result['sha256']}\n" in card
    assert "| aligned model | aligned  (weights sha256 " in card
    assert "| layers | 14, 8 directions each |" in card
    assert str(tmp_path) not in card, "no word of the machine that made it"
    back = locate(result["direction"], environment)
    assert content(back) == direction_file.read_bytes()


def test_push_again(hub, environment, direction_file):
    environment["HF_TOKEN"] = "secret"
    push(environment, direction_file, "me/new-asft")
    again = push(environment, direction_file, "me/new-asft", "--name", "second.safetensors")
    assert f"direction: me/new-asft@{hub.head('me/new-asft')}:second.safetensors" in again.stdout, again.stderr
    files = hub.repos["me/new-asft"][hub.head("me/new-asft")]
    assert set(files) == {"direction.safetensors", "second.safetensors", "README.md"}
    assert b"direction: me/new-asft:second.safetensors" in files["README.md"], "our card is brought up to date"
    hub.commit("me/new-asft", {"README.md": b"# My own words"})
    for own in (b"# My own words", b"---\nlibrary_name: axolotl-asft\n---\n# My own words"):
        hub.commit("me/new-asft", {"README.md": own})
        left = push(environment, direction_file, "me/new-asft")
        assert "the repository's own card was left as it is" in left.stdout
        assert hub.repos["me/new-asft"][hub.head("me/new-asft")]["README.md"] == own


def test_push_renews_our_section_of_a_card_alone(hub, environment, direction_file, anchored_file):
    """What is written before and behind it, and in the front matter, stays; so does what a training stamped there."""
    environment["HF_TOKEN"] = "secret"
    push(environment, direction_file, "me/new-asft")
    card = hub.repos["me/new-asft"][hub.head("me/new-asft")]["README.md"].decode()
    own = card.replace("license: other", "license: mit").replace(
        "<!-- asft direction -->", "Mine.\n<!-- asft direction -->"
    )
    own += "\nMine, too.\n<!-- asft -->\nstamped\n<!-- /asft -->\n"
    hub.commit("me/new-asft", {"README.md": own.encode()})
    again = push(environment, anchored_file, "me/new-asft", "--json")
    sha256 = json.loads(again.stdout)["sha256"]
    renewed = hub.repos["me/new-asft"][hub.head("me/new-asft")]["README.md"].decode()
    before, begin, _ = own.partition("<!-- asft direction -->")
    _, end, after = own.partition("<!-- /asft direction -->")
    assert renewed.startswith(before + begin)
    assert renewed.endswith(end + after)
    assert f"  direction_sha256: {sha256}\n" in renewed
    assert renewed.count(begin) == renewed.count(end) == 1


def test_push_says_what_it_publishes(hub, environment, anchored_file):
    shared = push(environment | {"HF_TOKEN": "secret"}, anchored_file, "me/new-asft", "--json")
    said = f"the file holds {len(OWN_ANSWERS)} requests and the model's answers, verbatim; see them with"
    assert f"{said} `axolotl asft inspect {anchored_file} --json`" in shared.stderr
    assert json.loads(shared.stdout)["card"]
    card = hub.repos["me/new-asft"][hub.head("me/new-asft")]["README.md"].decode()
    held = f"{len(OWN_ANSWERS)} requests and the model's answers, verbatim; answers that decline: 1"
    assert f"| own answers | {held} |" in card


def test_a_private_push_never_meets_a_public_repository(hub, environment, direction_file):
    environment["HF_TOKEN"] = "secret"
    for _ in range(2):
        shared = push(environment, direction_file, "me/secret-asft", "--private")
        assert shared.returncode == 0, shared.stderr
    assert "me/secret-asft" in hub.private
    before = hub.head("me/tiny-asft")
    refused = push(environment, direction_file, "me/tiny-asft", "--private")
    assert refused.returncode == 2
    assert refused.stderr.startswith("asft: me/tiny-asft is there already and is public; expected a private repository")
    assert refused.stderr.count("\n") == 1
    assert hub.head("me/tiny-asft") == before, "and nothing is uploaded"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("{file}", "new-asft"), "repository is 'new-asft'; expected owner/name"),
        (("{file}", "me/new@main"), "repository is 'me/new@main'; expected owner/name"),
        (("{file}", "me/new", "--name", "../x.safetensors"), "name is '../x.safetensors'; expected a file name"),
        (("nowhere.safetensors", "me/new"), "no direction file at nowhere.safetensors"),
    ],
)
def test_what_cannot_be_pushed(hub, environment, direction_file, arguments, message):
    refused = push(environment, *(argument.format(file=direction_file) for argument in arguments))
    assert refused.returncode == 2
    assert refused.stderr.startswith(f"asft: {message}")
    assert refused.stderr.count("\n") == 1
    assert "me/new" not in hub.repos


def test_push_without_access(hub, environment, direction_file):
    hub.fault = lambda method, path, n: 401 if path == "/api/repos/create" else None
    refused = push(environment, direction_file, "me/new-asft")
    assert refused.returncode == 2
    assert refused.stderr.startswith("asft: me/new-asft: access refused")
    assert "hf auth login" in refused.stderr
    assert refused.stderr.count("\n") == 1


def test_a_hub_that_fails_is_no_mistake_of_the_user(hub, environment, direction_file):
    hub.fault = lambda method, path, n: 500 if path == "/api/repos/create" else None
    failed = push(environment, direction_file, "me/new-asft")
    assert (failed.returncode, failed.stderr.count("\n")) == (1, 1), failed.stderr
    assert failed.stderr.startswith("asft: me/new-asft: the Hub failed (")


def test_an_upload_that_fails_is_no_download(hub, environment, direction_file):
    """Neither at the first connection, nor behind the RuntimeError in which huggingface_hub hides what happened."""
    nobody = push(environment | {"HF_ENDPOINT": "http://127.0.0.1:9"}, direction_file, "me/new-asft")
    assert (nobody.returncode, nobody.stderr.count("\n")) == (1, 1), nobody.stderr
    assert nobody.stderr.startswith("asft: me/new-asft: the upload to the Hub failed (")
    offline = push(environment | {"HF_HUB_OFFLINE": "1"}, direction_file, "me/new-asft")
    assert (offline.returncode, offline.stderr.count("\n")) == (1, 1), offline.stderr
    assert offline.stderr.startswith("asft: me/new-asft: the upload to the Hub failed (Cannot reach http")
    assert "offline mode is enabled" in offline.stderr
    hub.fault = lambda method, path, n: 403 if path.startswith("/lfs/") else None
    environment |= {"HF_TOKEN": "secret", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    failed = push(environment, direction_file, "me/new-asft")
    assert (failed.returncode, failed.stderr.count("\n")) == (1, 1), failed.stderr
    assert failed.stderr.startswith("asft: me/new-asft: the upload to the Hub failed (403 Forbidden")


@pytest.mark.slow
def test_training_from_the_hub(hub, environment, pair, dataset, direction_file, tmp_path):
    """Pinned by revision and hash it trains; damaged on the way, or with another hash, it does not."""
    sha256 = AlignmentDirection.load(direction_file).sha256
    location = f"me/tiny-asft@{hub.head('me/tiny-asft')}"
    changes = {key: environment[key] for key in environment if key.startswith("HF_")}
    changes["HF_HUB_OFFLINE"] = "0"
    block = {"direction": location, "direction_sha256": sha256}
    config = write_config(tmp_path, pair[1], dataset, block, max_steps=1)
    axolotl("train", str(config), "--launcher", "python", cwd=tmp_path, **changes)
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()
    hub.fault = lambda method, path, n: "damaged" if method == "GET" and "resolve" in path else None
    other = {**changes, "HF_HOME": str(tmp_path / "other")}
    refused = axolotl("train", str(config), "--launcher", "python", cwd=tmp_path, check=False, **other)
    assert refused.returncode != 0
    assert f"expected {sha256} (direction_sha256); get the pinned file" in refused.stderr


CHECK = """
import json, sys
from axolotl_asft.console import quietly
with quietly():
    from axolotl_asft.dry_run import check_config
    found = [check_config(path).as_dict() for path in sys.argv[1:]]
print(json.dumps(found))
"""


def test_checking_a_recipe_from_the_hub(hub, environment, pair, dataset, direction_file, tmp_path):
    """Model and direction on the Hub: what is not pinned is named, and of the model only small files are loaded."""
    commit = on_the_hub(hub, pair[1], "me/aligned")
    sha256 = AlignmentDirection.load(direction_file).sha256
    blocks = {
        "branch": {"direction": "me/tiny-asft"},
        "hash": {"direction": "me/tiny-asft", "direction_sha256": sha256},
        "commit": {"direction": f"me/tiny-asft@{hub.head('me/tiny-asft')}"},
        "nowhere": {"direction": "me/no-such"},
    }
    configs = [write_config(tmp_path / name, "me/aligned", dataset, block) for name, block in blocks.items()]
    done = subprocess.run(
        [sys.executable, "-c", CHECK, *map(str, configs)],
        env=environment, capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert not done.stderr
    branch, by_hash, by_commit, nowhere = json.loads(done.stdout)
    assert (branch["fine"], branch["model"]["revision"], len(branch["constrained"])) == (True, commit, 14)
    assert branch["warnings"] == [
        WEIGHTS_ALONE,
        f"direction is read at main of me/tiny-asft, which can change; pin it: direction_sha256: {sha256}",
    ]
    assert [found["direction"]["pinned"] for found in (branch, by_hash, by_commit)] == [False, True, True]
    assert by_hash["warnings"] == by_commit["warnings"] == [WEIGHTS_ALONE]
    assert not nowhere["fine"]
    assert "no repository of that name on the Hub" in nowhere["errors"][0]
    assert not hub.bytes_sent("me/aligned/resolve/main/model.safetensors")


EXTRACT = """
import sys
from axolotl_asft import extract_direction
from axolotl_asft.errors import AsftError
for aligned in sys.argv[2].split(","):
    try:
        print(extract_direction(sys.argv[1], aligned, rank=4).save(sys.argv[3]))
    except AsftError as error:
        print(f"asft: {error}", file=sys.stderr)
"""


def extract(environment, base, aligned, output):
    return subprocess.run(
        [sys.executable, "-c", EXTRACT, base, aligned, str(output)],
        env=environment, capture_output=True, text=True, timeout=120,
    )  # fmt: skip


def on_the_hub(hub, folder, repo):
    return hub.commit(repo, {path.name: path.read_bytes() for path in folder.iterdir()})


@pytest.fixture(scope="module", params=["5GB", "60KB"], ids=["one file", "shards"])
def models(request, tmp_path_factory):
    return make_pair(tmp_path_factory.mktemp("hub"), max_shard_size=request.param)


def test_extracting_from_the_hub(hub, environment, models, tmp_path):
    """The same direction as from folders, without a checkpoint on disk, and only what is needed is read."""
    commits = [on_the_hub(hub, folder, f"org/{folder.name}") for folder in models]
    done = extract(environment, "org/base", f"org/aligned@{commits[1]}", tmp_path / "remote.safetensors")
    assert not done.stderr
    extract_direction(*models, rank=4).save(tmp_path / "local.safetensors")
    remote, local = (AlignmentDirection.load(tmp_path / f"{name}.safetensors") for name in ("remote", "local"))
    for name, module in local.modules.items():
        for part in ("U", "S", "norm"):
            assert torch.equal(getattr(module, part), getattr(remote.modules[name], part))
    for model, commit in zip(("base", "aligned"), commits, strict=True):
        assert remote.spec[model]["id"] == f"org/{model}"
        assert remote.spec[model]["revision"] == commit
        assert remote.spec[model]["sha256"] == local.spec[model]["sha256"]
    assert remote.spec["aligned"]["fingerprint"] == local.spec["aligned"]["fingerprint"]
    cached = [path for path in (tmp_path / "hf").rglob("*") if path.is_file()]
    assert not [path for path in cached if path.suffix == ".safetensors" or path.stat().st_size > 50_000]
    size = sum(path.stat().st_size for path in models[0].glob("*.safetensors"))
    assert hub.bytes_sent("org/base/resolve") < size + 50_000, "no tensor twice, no embeddings"


def test_a_cut_range_is_asked_for_again(hub, environment, models, tmp_path):
    for folder in models:
        on_the_hub(hub, folder, f"org/{folder.name}")
    hub.fault = lambda method, path, n: "cut" if method == "GET" and "safetensors" in path and n == 3 else None
    done = extract(environment, "org/base", "org/aligned", tmp_path / "remote.safetensors")
    assert not done.stderr
    extract_direction(*models, rank=4).save(tmp_path / "local.safetensors")
    assert (
        AlignmentDirection.load(tmp_path / "remote.safetensors").spec["aligned"]["sha256"]
        == (AlignmentDirection.load(tmp_path / "local.safetensors").spec["aligned"]["sha256"])
    )


def test_models_that_cannot_be_read(hub, environment, pair, tmp_path):
    on_the_hub(hub, pair[0], "org/base")
    hub.commit("org/pickled", {"pytorch_model.bin": b"", "config.json": b"{}"})
    hub.commit("org/broken", {"model.safetensors": b"\xff" * 100, "config.json": b"{}"})
    hub.commit(
        "org/half", {"model.safetensors.index.json": b'{"weight_map": {"a": "x.safetensors"}}', "config.json": b"{}"}
    )
    messages = {
        "org/pickled": "holds no model.safetensors and no model.safetensors.index.json (it has pytorch_model.bin: down",
        "org/broken": "is not a safetensors file: its header would be of",
        "org/half": "lacks 1 of its files, the first x.safetensors",
        "org/none": "no repository of that name on the Hub",
        "org/base@v7": "org/base has no revision v7",
        "org/ba--se": "org/ba--se is neither a file here nor a name on the Hub",
        "org/base:model.safetensors": "org/base:model.safetensors names one file; expected a model",
    }
    refused = extract(environment, "org/base", ",".join(messages), tmp_path / "x.safetensors")
    lines = refused.stderr.splitlines()
    assert len(lines) == len(messages), refused.stderr
    for line, message in zip(lines, messages.values(), strict=True):
        assert line.startswith("asft: ")
        assert message in line


@pytest.mark.parametrize("read", ["weight('m.layers.0.up')", "values('m.layers.0.up', 0, 4)"])
def test_a_dtype_that_is_not_read_from_the_hub(hub, environment, tmp_path, read):
    """Whole or in part, it is one line."""
    save_file({"m.layers.0.up.weight": torch.zeros(4, 4, dtype=torch.int32)}, tmp_path / "model.safetensors")
    hub.commit("org/whole", {"model.safetensors": (tmp_path / "model.safetensors").read_bytes(), "config.json": b"{}"})
    code = f"from axolotl_asft.checkpoint import Checkpoint; Checkpoint.open('org/whole').{read}"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    line = done.stderr.splitlines()[-1]
    assert "AsftError: org/whole@" in line
    assert "m.layers.0.up.weight is I32; expected one of BF16, F16, F32, F64; give a full-precision checkpoint" in line


def test_a_stale_index_beside_a_single_file_on_the_hub(hub, environment, pair, tmp_path):
    """Passed over, as transformers does: from the Hub, and from its cache."""
    for folder in pair:
        on_the_hub(hub, folder, f"org/{folder.name}")
        hub.commit(f"org/{folder.name}", {"model.safetensors.index.json": b'{"weight_map": {"a": "gone.safetensors"}}'})
    local = extract_direction(*pair, rank=4).spec["aligned"]["sha256"]
    output = tmp_path / "x.safetensors"
    for cached in (False, True):
        if cached:
            names = ["config.json", "model.safetensors", "model.safetensors.index.json"]
            load = "import sys; from huggingface_hub import hf_hub_download; hf_hub_download(*sys.argv[1:])"
            for repo, name in itertools.product(("org/base", "org/aligned"), names):
                subprocess.run([sys.executable, "-c", load, repo, name], env=environment, check=True, timeout=120)
        done = extract({**environment, "HF_HUB_OFFLINE": str(int(cached))}, "org/base", "org/aligned", output)
        assert not done.stderr
        assert AlignmentDirection.load(output).spec["aligned"]["sha256"] == local


@pytest.mark.slow
def test_a_metric_of_a_model_on_the_hub(hub, environment, models, tmp_path):
    """It loads the aligned model, so that one is downloaded; the base is read in parts."""
    commits = [on_the_hub(hub, folder, f"org/{folder.name}") for folder in models]
    (tmp_path / "prompts.txt").write_text("the cat sees a red dog\nthe dog says no\n")
    output = tmp_path / "tiny.asft.safetensors"
    arguments = ["--base", "org/base", "--aligned", "org/aligned", "-o", str(output), "--metric", "activations"]
    done = subprocess.run(
        [sys.executable, "-c", PUSH, "extract", *arguments, "--prompts", str(tmp_path / "prompts.txt")],
        env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    spec = AlignmentDirection.load(output).spec
    assert [spec[model]["revision"] for model in ("base", "aligned")] == commits
    assert spec["metrics"]["activations"]["answers"] == 2
    cached = {path.parent.parent.parent.name for path in (tmp_path / "hf").rglob("*.safetensors")}
    assert cached == {"models--org--aligned"}
    size = sum(path.stat().st_size for path in models[1].glob("*.safetensors"))
    assert hub.bytes_sent("org/aligned/resolve") < size + 50_000, "no tensor twice"
