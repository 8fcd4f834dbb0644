"""What is kept in the cache."""

import os
from pathlib import Path

import pytest

from labs_common.cache import cached_directory, check_cache, check_variables
from labs_common.errors import LabError


@pytest.mark.parametrize("damage", ["cut", "other", "gone", "no sums", "none"])
def test_what_was_damaged_is_made_again(damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    made = []

    def make(folder: Path) -> None:
        made.append(folder)
        (folder / "inner").mkdir()
        (folder / "inner" / "file.bin").write_bytes(b"content" * 100)

    folder = cached_directory("thing", {"a": 1}, make)
    file = folder / "inner" / "file.bin"
    whole = file.read_bytes()
    if damage == "no sums":
        (folder / ".check-sums.json").unlink()
    elif damage == "gone":
        file.unlink()
    else:
        file.write_bytes({"cut": whole[:50], "other": b"X" + whole[1:], "none": whole}[damage])
    assert cached_directory("thing", {"a": 1}, make) == folder
    assert file.read_bytes() == whole
    assert len(made) == (1 if damage == "none" else 2)
    assert ("damaged" in capsys.readouterr().err) == (damage != "none")
    assert [path.name for path in folder.parent.iterdir()] == [folder.name], "nothing is left beside it"


def test_what_changes_is_not_checked_and_an_interrupted_one_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = cached_directory("rows", 1, lambda part: (part / "rows").write_bytes(b"0") and None, changes=True)
    (folder / "rows").write_bytes(b"1")
    assert cached_directory("rows", 1, lambda part: pytest.fail("is there"), changes=True) == folder

    def interrupted(part: Path) -> None:
        (part / "half").write_bytes(b"0")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cached_directory("other", 2, interrupted)
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


@pytest.mark.parametrize("name", ["HF_HOME", "HF_HUB_CACHE", "HF_DATASETS_CACHE", "TORCH_HOME"])
def test_other_libraries_caches_are_looked_at_too(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv(name, str(tmp_path / "file" / "below"))
    with pytest.raises(LabError, match=rf"^{name}=.*file/below: cannot be used \(Not a directory\): set it to"):
        check_cache()
    monkeypatch.setenv(name, str(tmp_path / "new"))
    check_cache()


def test_a_cache_that_cannot_be_used_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No home, a file in its place, a directory that may not be written; what is there already can still be read."""
    file = tmp_path / "file"
    file.touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(file))
    with pytest.raises(LabError, match=r"the cache .*file/foundation-labs cannot be used .* set XDG_CACHE_HOME to"):
        check_cache()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    there = cached_directory("thing", 1, lambda part: (part / "file").touch())
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write anywhere
    assert cached_directory("thing", 1, lambda part: pytest.fail("is there")) == there
    with pytest.raises(LabError, match="set XDG_CACHE_HOME to"):
        cached_directory("thing", 2, lambda part: pytest.fail("cannot be written"))
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr("pwd.getpwuid", lambda uid: {}[uid])  # as for a container's user without an entry
    with pytest.raises(LabError, match="no home directory for the cache: set XDG_CACHE_HOME"):
        check_cache()


@pytest.mark.parametrize("said", ["", "two", "1.5", "1" * 5000])
def test_variables_of_a_launcher_are_numbers(said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check_variables()
    monkeypatch.setenv("LOCAL_RANK", "-1")  # some say so of a single process
    check_variables()
    monkeypatch.setenv("LOCAL_WORLD_SIZE", said)
    with pytest.raises(LabError, match="LOCAL_WORLD_SIZE="):
        check_variables()
