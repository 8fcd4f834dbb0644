"""What is kept in the cache."""

from pathlib import Path

import pytest

from labs_common.cache import cached_directory


@pytest.mark.parametrize("damage", ["cut", "other", "gone", "none"])
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
    if damage == "gone":
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
