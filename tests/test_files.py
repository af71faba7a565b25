"""Files are whole or not there."""

import errno
import math
from pathlib import Path

import pytest

from axolotl_asft.errors import AsftError, WorkFailed
from axolotl_asft.files import (
    atomic_write,
    atomic_write_text,
    named_folder,
    read_json,
    refuse_to_replace_file,
    without_nan,
)


def test_writes_and_replaces(tmp_path):
    path = tmp_path / "new" / "file.txt"
    atomic_write_text(path, "one")
    atomic_write_text(path, "two")
    assert path.read_text() == "two"
    assert list(path.parent.iterdir()) == [path]


def test_a_failure_leaves_the_old_file(tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("old")

    def fail(temporary):
        temporary.write_text("half")
        raise RuntimeError("disk full")

    with pytest.raises(RuntimeError, match="disk full"):
        atomic_write(path, fail)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_permissions_stay(tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("old")
    path.chmod(0o640)
    atomic_write_text(path, "new")
    assert path.stat().st_mode & 0o777 == 0o640


def test_a_link_stays_a_link(tmp_path):
    (tmp_path / "big").mkdir()
    (tmp_path / "link").symlink_to("big/file.txt")
    for text in ("one", "two"):
        atomic_write_text(tmp_path / "link", text)
        assert (tmp_path / "link").is_symlink()
        assert (tmp_path / "big" / "file.txt").read_text() == text


def test_what_cannot_be_written_is_one_line(tmp_path):
    """Also for those who catch OSError, and go on without the file."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    for path, why in ((tmp_path / "folder", "Is a directory"), (tmp_path / "file" / "new", "File exists")):
        with pytest.raises(AsftError) as refused:
            atomic_write_text(path, "text")
        assert str(refused.value) == f"{path} cannot be written ({why}); give another place"
        assert isinstance(refused.value, OSError)
        assert refused.value.strerror == why
        assert not isinstance(refused.value, WorkFailed)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]


def test_a_full_disk_is_nobody_s_mistake(tmp_path):
    def full(temporary):
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(
        WorkFailed, match=r"new cannot be written \(No space left on device\); make room, and try again"
    ):
        atomic_write(tmp_path / "new", full)


@pytest.mark.parametrize("force", [False, True])
def test_no_file_replaces_a_folder(tmp_path, force):
    with pytest.raises(AsftError, match="is a folder; expected the name of a file, give another --output"):
        refuse_to_replace_file(tmp_path, force)
    refuse_to_replace_file(tmp_path / "new", force)


def test_a_folder_with_or_without_a_name(tmp_path, monkeypatch):
    (tmp_path / "out" / "lr=1e-4").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "out")
    monkeypatch.setenv("HOME", str(tmp_path))
    for text, found in {
        "lr=1e-4": ("lr=1e-4", "lr=1e-4"),
        "low=lr=1e-4": ("low", "lr=1e-4"),
        "plain=gone": ("plain", "gone"),
        "gone/plain": ("plain", "gone/plain"),
        ".": ("out", "."),
        "plain=~/out": ("plain", tmp_path / "out"),
    }.items():
        assert named_folder("--compare", text) == (found[0], Path(found[1])), text
    for text in ("", "=out", "plain="):
        with pytest.raises(AsftError, match=f"^--compare is '{text}'; expected a folder, or NAME=DIR, as plain=out/pl"):
            named_folder("--compare", text)


def test_json_has_no_number_that_is_not_finite():
    value = {"a": [1.5, math.nan, (True, -math.inf)], "b": {"c": math.inf, "d": None, "e": "nan"}, "f": 3}
    assert without_nan(value) == {"a": [1.5, None, [True, None]], "b": {"c": None, "d": None, "e": "nan"}, "f": 3}


def test_a_file_that_is_missing_is_told_from_its_folder(tmp_path):
    with pytest.raises(AsftError, match=f"^there is no file {tmp_path}/a.json; give one$"):
        read_json(tmp_path / "a.json", "give one")
    with pytest.raises(AsftError, match=f"^there is no folder {tmp_path}/gone; give one$"):
        read_json(tmp_path / "gone" / "a.json", "give one")
