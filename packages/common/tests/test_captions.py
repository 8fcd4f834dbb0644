import json
import shutil
from pathlib import Path

import pytest
from labs_testing.commands import real_data
from PIL import Image

from labs_common.data.captions import Transform, caption_splits, read_captioned
from labs_common.errors import LabError
from labs_common.scenes.files import write_flickr8k


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_flickr8k(tmp_path / "flickr", range(20), side=24)
    return tmp_path / "flickr"


def test_both_forms_give_the_same(folder: Path, tmp_path: Path) -> None:
    by_csv = read_captioned(folder, shown=False)
    assert len(by_csv) == 20
    assert all(len(sentences) == 5 for sentences in by_csv.captions)
    assert by_csv.image(3).size == (24, 24)
    # As the first release was laid out.
    old = tmp_path / "old"
    shutil.copytree(folder / "Images", old / "Flicker8k_Dataset")
    (old / "Flickr8k_text").mkdir()
    shutil.copy(folder / "Flickr8k.token.txt", old / "Flickr8k_text")
    by_token = read_captioned(old, shown=False)
    assert (by_token.names, by_token.captions, by_token.digests) == (by_csv.names, by_csv.captions, by_csv.digests)
    assert by_token.fingerprint() == by_csv.fingerprint()


def test_commas_and_quotes_in_captions(folder: Path) -> None:
    (folder / "captions.txt").write_text(
        'image,caption\nscene_000000.jpg,"A dog, a cat and ""a bird""."\nscene_000000.jpg,Plain\n', encoding="utf-8"
    )
    found = read_captioned(folder, "skip", shown=False)
    assert found.captions == (('A dog, a cat and "a bird".', "Plain"),)
    assert found.left_out["picture without captions"] == 19


def test_every_fault_is_named_and_counted(folder: Path) -> None:
    names = [f"scene_{number:06d}.jpg" for number in range(20)]
    lines = (folder / "captions.txt").read_bytes().splitlines()
    lines = [line for line in lines if not line.startswith(names[1].encode())]
    lines += [
        b"missing.jpg,A picture that is not there",
        names[0].encode() + b",  ",
        b"scene_000000.jpg,caf\xe9",
        b"alone",
    ]
    (folder / "captions.txt").write_bytes(b"\n".join(lines) + b"\n")
    (folder / "Images" / names[2]).write_bytes(b"")
    whole = (folder / "Images" / names[3]).read_bytes()
    (folder / "Images" / names[3]).write_bytes(whole[: len(whole) // 2])
    Image.new("1", (20_000, 20_000)).save(folder / "Images" / "huge.png")
    (folder / "captions.txt").open("a").write("huge.png,Very large\n")
    with pytest.raises(LabError) as error:
        read_captioned(folder, shown=False)
    assert "8 captions or pictures cannot be used" in str(error.value)
    assert "--on-bad-data skip" in str(error.value)
    found = read_captioned(folder, "skip", shown=False)
    assert len(found) == 17
    assert found.left_out["captions without a picture"] == 1
    assert found.left_out["picture without captions"] == 1
    assert found.left_out["empty caption"] == 1
    assert found.left_out["not UTF-8"] == 1
    assert found.left_out["too few columns"] == 1
    assert sum(found.left_out.values()) == 8, found.left_out
    assert len(found.examples) == 5
    assert not {names[1], names[2], names[3], "huge.png"} & set(found.names)


def test_a_link_out_of_the_directory_is_a_fault(folder: Path, tmp_path: Path) -> None:
    first, second, third = sorted((folder / "Images").iterdir())[:3]
    shutil.move(first, tmp_path / "secret.jpg")
    first.symlink_to(tmp_path / "secret.jpg")
    shutil.move(second, folder / "second.jpg")
    second.symlink_to("../second.jpg")  # still the data's
    with pytest.raises(LabError, match=f"{first.name}: lies outside of the data's directory"):
        read_captioned(folder, shown=False)
    kept = read_captioned(folder, "skip", shown=False)
    assert first.name not in kept.names
    assert {second.name, third.name} < set(kept.names)


@pytest.mark.parametrize(
    ("make", "names"),
    [
        (lambda folder: shutil.rmtree(folder), "no such directory"),
        (lambda folder: [file.unlink() for file in folder.glob("*.txt")], "has no captions; expected captions.txt"),
        (lambda folder: (folder / "captions.txt").write_text("a,b\n"), "image,caption"),
        (lambda folder: (folder / "captions.txt").write_text("image,caption\n"), "no picture|cannot be used"),
    ],
)
def test_what_is_no_data_says_so(make: object, names: str, folder: Path) -> None:
    make(folder)
    with pytest.raises(LabError, match=names):
        read_captioned(folder, "skip", shown=False)


def test_no_picture_is_in_two_splits(folder: Path) -> None:
    for number in range(5):  # the same picture under another name
        shutil.copy(folder / "Images" / f"scene_{number:06d}.jpg", folder / "Images" / f"copy_{number}.jpg")
        with (folder / "captions.txt").open("a") as stream:
            stream.write(f"copy_{number}.jpg,The same again\n")
    pictures = read_captioned(folder, shown=False)
    for seed in range(4):
        parts = caption_splits(pictures, seed=seed)
        assert list(parts) == ["train", "validation", "test"]
        assert sum(map(len, parts.values())) == 25
        for one, two in (("train", "validation"), ("train", "test"), ("validation", "test")):
            assert not set(parts[one].digests) & set(parts[two].digests)
            assert not set(parts[one].names) & set(parts[two].names)
        assert caption_splits(pictures, seed=seed)["test"].names == parts["test"].names
    assert len({caption_splits(pictures, seed=seed)["test"].names for seed in range(4)}) > 1


def test_the_official_lists_are_kept_and_copies_leave_the_training(folder: Path) -> None:
    shutil.copy(folder / "Images" / "scene_000019.jpg", folder / "Images" / "copy.jpg")
    with (folder / "captions.txt").open("a") as stream:
        stream.write("copy.jpg,The same again\n")
    names = [f"scene_{number:06d}.jpg" for number in range(20)]
    lists = {"train": [*names[:10], "copy.jpg", names[15]], "dev": names[10:15], "test": names[15:]}
    for split, members in lists.items():
        (folder / f"Flickr_8k.{split}Images.txt").write_text("\n".join(members) + "\n")
    pictures = read_captioned(folder, shown=False)
    parts = caption_splits(pictures, folder)
    assert parts["test"].names == tuple(names[15:])
    assert parts["validation"].names == tuple(names[10:15])
    assert parts["train"].names == tuple(names[:10]), "without the copy of a test picture, and without one listed twice"
    assert sum(parts["train"].left_out.values()) == 2
    (folder / "Flickr_8k.devImages.txt").unlink()
    with pytest.raises(LabError, match="devImages"):
        caption_splits(pictures, folder)


def test_real_captions() -> None:
    pictures = read_captioned(real_data("flickr8k-mini"), shown=False)
    assert len(pictures) == 800
    assert {len(sentences) for sentences in pictures.captions} == {5}
    assert {name: len(part) for name, part in caption_splits(pictures).items()} == {
        "train": 640, "validation": 80, "test": 80,
    }  # fmt: skip


@pytest.mark.parametrize("file", ["captions.txt", "Flickr8k.token.txt"])
def test_a_caption_without_end_is_counted_and_the_next_is_read(folder: Path, file: str) -> None:
    """More characters than csv takes, and a quote that swallows what follows."""
    name, comma = "scene_000000.jpg", "," if file == "captions.txt" else "#0\t"
    lines = [f"{name}{comma}before", f"{name}{comma}{'x' * 131_073}", f"{name}{comma}a\u2028b"]
    lines += [f'{name},"open', "scene_000001.jpg,swallowed", f'{name},"quoted"'] if comma == "," else []
    for other in ("captions.txt", "Flickr8k.token.txt"):
        (folder / other).unlink()
    (folder / file).write_text("image,caption\n" * (comma == ",") + "\n".join(lines) + "\n", encoding="utf-8")
    with pytest.raises(LabError, match=rf"{file}:{3 if comma == ',' else 2}: caption of more than 131,072 characters"):
        read_captioned(folder, shown=False)
    found = read_captioned(folder, "skip", shown=False)
    assert found.captions == (("before", "a\u2028b"),)
    assert found.left_out["caption of more than 131,072 characters"] == 1
    assert found.left_out["quote that is not closed"] == (comma == ",")


def test_official_lists_name_files_with_spaces(folder: Path) -> None:
    for number, name in enumerate(("train", "dev", "test")):
        before, after = f"scene_00000{number}.jpg", f"scene {number}.jpg"
        (folder / "Images" / before).rename(folder / "Images" / after)
        captions = (folder / "captions.txt").read_text(encoding="utf-8")
        (folder / "captions.txt").write_text(captions.replace(before, after), encoding="utf-8")
        (folder / f"Flickr_8k.{name}Images.txt").write_text(f"{after} \r\n\n")
    assert {name: len(part) for name, part in caption_splits(read_captioned(folder, shown=False), folder).items()} == {
        "train": 1, "validation": 1, "test": 1,
    }  # fmt: skip


def test_half_a_character_is_a_fault(tmp_path: Path) -> None:
    """JSON may hold a surrogate by itself, which no file can be written with."""
    for number in range(2):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{number}.jpg")
    rows = [
        {"filename": f"{n}.jpg", "split": "train", "sentences": [{"raw": raw}]}
        for n, raw in enumerate(("a dog", "\ud800"))
    ]
    (tmp_path / "dataset_flickr8k.json").write_text(json.dumps({"images": rows}))
    assert read_captioned(tmp_path, "skip", shown=False).left_out["caption with half of a character"] == 1


@pytest.mark.parametrize("mean", [(0.5, 0.5), (0.5, float("nan"), 0.5), (0.5, 1e308, 0.5), (0.5, "x", 0.5)])
def test_a_transform_that_cannot_be_is_refused(mean: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match=r"mean and std"):
        Transform(8, mean, (1.0, 1.0, 1.0), "bicubic")
