"""Every published layout of captions gives the same pictures and captions; what is wrong with one is a line."""

import io
import json
import os
import re
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest
from labs_testing.commands import real_data
from pyarrow import parquet

from labs_common.data import images
from labs_common.data.captions import caption_splits, captions_alone, read_captioned
from labs_common.errors import LabError
from labs_common.options import CaptionDataOptions
from labs_common.scenes.files import write_flickr8k

TRAIN, VALIDATION = 12, 4  # of twenty; the last four are the test
Said = dict[str, list[str]]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("drawn")
    write_flickr8k(folder, range(20), side=16)
    return folder / "Images"


@pytest.fixture(scope="module")
def said(pictures: Path) -> Said:
    """The captions of each picture, one with what breaks columns."""
    found: Said = {}
    for line in pictures.with_name("Flickr8k.token.txt").read_text().splitlines():
        name, caption = line.split("\t")
        found.setdefault(name.split("#")[0], []).append(caption)
    found["scene_000003.jpg"][0] = 'A "dog", a cat ; and 3 | 4 birds'
    return found


def split_of(place: int) -> str:
    return "train" if place < TRAIN else "val" if place < TRAIN + VALIDATION else "test"


def bars(folder: Path, pictures: Path, said: Said) -> None:
    """As Kaggle has Flickr30k, the line that lacks a bar included."""
    shutil.copytree(pictures, folder / "flickr30k_images" / "flickr30k_images")
    rows = [f"{name}| {number}| {one}" for name, of in said.items() for number, one in enumerate(of)]
    rows[14] = rows[14].replace("| 4| ", "| 4   ")
    (folder / "flickr30k_images" / "results.csv").write_text("\n".join(["image_name| comment_number| comment", *rows]))


def token(folder: Path, pictures: Path, said: Said) -> None:
    shutil.copytree(pictures, folder / "flickr30k-images")
    rows = [f"{name}#{number}\t{one}" for name, of in said.items() for number, one in enumerate(of)]
    (folder / "results_20130124.token").write_text("\n".join(rows))


def comments(folder: Path, pictures: Path, said: Said) -> None:
    shutil.copytree(pictures, folder / "Images")
    quoted = [(name, number, one.replace('"', '""')) for name, of in said.items() for number, one in enumerate(of)]
    rows = [f'{name},{number},"{one}"' for name, number, one in quoted]
    (folder / "captions.txt").write_text("\n".join(["image_name,comment_number,comment", *rows]))


def karpathy(folder: Path, pictures: Path, said: Said) -> None:
    shutil.copytree(pictures, folder / "val2014")
    rows = [{"filepath": "val2014", "filename": name, "split": "restval" if place == 2 else split_of(place),
             "sentences": [{"raw": one, "tokens": one.split()} for one in of]}
            for place, (name, of) in enumerate(said.items())]  # fmt: skip
    (folder / "dataset_coco.json").write_text(json.dumps({"images": rows, "dataset": "coco"}))


def coco(folder: Path, pictures: Path, said: Said) -> None:
    (folder / "annotations").mkdir(parents=True)
    for part, chosen in (("train2017", range(16)), ("val2017", range(16, 20))):
        (folder / part).mkdir()
        names = [list(said)[place] for place in chosen]
        for name in names:
            shutil.copy(pictures / name, folder / part)
        content = {"images": [{"id": 7 * place, "file_name": name} for place, name in enumerate(names)],
                   "annotations": [{"id": 1, "image_id": 7 * place, "caption": one}
                                   for place, name in enumerate(names) for one in said[name]]}  # fmt: skip
        (folder / "annotations" / f"captions_{part}.json").write_text(json.dumps(content))
        (folder / "annotations" / f"instances_{part}.json").write_text("{}")


def records(pictures: Path, said: Said) -> list[dict[str, object]]:
    return [{"bytes": (pictures / name).read_bytes(), "path": name} for name in said]


def table(folder: Path, pictures: Path, said: Said) -> None:
    """As some of the hub's are: all in one file, a column divides."""
    folder.mkdir()
    columns = {"image": records(pictures, said), "caption": list(said.values()),
               "split": [split_of(place) for place in range(len(said))]}  # fmt: skip
    parquet.write_table(pa.table(columns), folder / "test-00000-of-00001.parquet")


def tables(folder: Path, pictures: Path, said: Said) -> None:
    """A file for each split, and a column for each caption."""
    (folder / "data").mkdir(parents=True)
    for split, chosen in (("train", range(12)), ("validation", range(12, 16)), ("test", range(16, 20))):
        part = {name: said[name] for name in (list(said)[place] for place in chosen)}
        columns = {"image": records(pictures, part)}
        columns |= {f"caption_{number}": [of[number] for of in part.values()] for number in range(5)}
        parquet.write_table(pa.table(columns), folder / "data" / f"{split}-00000.parquet")


def rows_of_one_caption(folder: Path, pictures: Path, said: Said) -> None:
    folder.mkdir()
    each = [(name, one) for name, of in said.items() for one in of]
    columns = {"image": [(pictures / name).read_bytes() for name, _ in each], "text": [one for _, one in each]}
    parquet.write_table(pa.table(columns), folder / "all.parquet")


def tar(folder: Path, pictures: Path, said: Said) -> None:
    """As CLIP_benchmark's: captions in lines; one picture with JSON, as img2dataset writes it."""
    pytest.importorskip("webdataset", reason="the extra webdataset is not installed")
    folder.mkdir()
    for split, chosen in (("train", range(12)), ("val", range(12, 16)), ("test", range(16, 20))):
        with tarfile.open(folder / f"{split}-000.tar", "w") as archive:
            for place in chosen:
                name = list(said)[place]
                text = ("json", json.dumps({"captions": said[name]})) if place == 5 else ("txt", "\n".join(said[name]))
                for end, content in (("jpg", (pictures / name).read_bytes()), (text[0], text[1].encode())):
                    member = tarfile.TarInfo(f"{place:03d}.{end}")
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))


def benchmark(folder: Path, pictures: Path, said: Said) -> None:
    """As CLIP_benchmark lays them out: a folder of tars for each split, of which the names are the same in all."""
    tar(folder, pictures, said)
    for split in ("train", "val", "test"):
        (folder / split).mkdir()
        (folder / f"{split}-000.tar").rename(folder / split / "0.tar")
        (folder / split / "nshards.txt").write_text("1")


def one_deeper(folder: Path, pictures: Path, said: Said) -> None:
    """As the archives of Flickr30k unpack: the captions in a folder of their own."""
    token(folder, pictures, said)
    (folder / "flickr30k").mkdir()
    (folder / "results_20130124.token").rename(folder / "flickr30k" / "results_20130124.token")


def saved(folder: Path, pictures: Path, said: Said) -> None:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"image": datasets.Image(), "sentences": [datasets.Value("string")]})
    columns = {"image": records(pictures, said), "sentences": list(said.values())}
    datasets.Dataset.from_dict(columns, features=features).save_to_disk(str(folder))


GIVEN, COCO, DRAWN = (12, 4, 4), (14, 2, 4), (16, 2, 2)


@pytest.mark.parametrize(
    ("write", "counts", "divided"),
    [
        (bars, DRAWN, "drawn with seed 0"), (token, DRAWN, "drawn with seed 0"), (comments, DRAWN, "drawn with seed 0"),
        (karpathy, GIVEN, "as Karpathy's dataset_coco.json says"),
        (coco, COCO, "COCO's validation is the test; validation drawn with seed 0"),
        (table, GIVEN, "as .* does"), (tables, GIVEN, "as .* does"), (rows_of_one_caption, DRAWN, "drawn with seed 0"),
        (tar, GIVEN, "as .* does"), (benchmark, GIVEN, "as .* does"), (one_deeper, DRAWN, "drawn with seed 0"), (saved, DRAWN, "drawn with seed 0"),
    ],
)  # fmt: skip
def test_every_layout_gives_the_same(
    write: Callable[..., None], counts: tuple[int, ...], divided: str, pictures: Path, said: Said, tmp_path: Path
) -> None:
    folder = tmp_path / "data"
    write(folder, pictures, said)
    found = read_captioned(folder, shown=False)
    by_digest = {images.examined([pictures / name], "", shown=False)[0][0]: tuple(of) for name, of in said.items()}
    assert dict(zip(found.digests, found.captions, strict=True)) == by_digest
    assert len(found) == 20
    assert not found.left_out
    parts = caption_splits(found, folder)
    assert tuple(map(len, parts.values())) == counts
    assert all(re.search(divided, part.divided) for part in parts.values())
    digests = list(by_digest)
    if counts == GIVEN:
        assert set(parts["validation"].digests) == set(digests[12:16])
    if counts != DRAWN:
        assert set(parts["test"].digests) == set(digests[16:])
    alone = captions_alone(CaptionDataOptions(data=str(folder)), lambda: folder)
    assert len(alone) == (16 if counts == COCO else counts[0])


def change(file: str, old: str, new: str) -> Callable[[Path], None]:
    def written(folder: Path) -> None:
        text = (folder / file).read_text()
        assert old in text
        (folder / file).write_text(text.replace(old, new, 1))

    return written


CAPTIONS = "annotations/captions_train2017.json"


@pytest.mark.parametrize(
    ("write", "spoil", "line"),
    [
        (coco, change(CAPTIONS, '"image_id": 7', '"image_id": 8'), r"captions_train2017.json: annotations\[5\]: of the unk"),
        (coco, change(CAPTIONS, "{", "{{"), r"captions_train2017.json: is not JSON"),
        (coco, change(CAPTIONS, '"images"', '"pictures"'), "captions_train2017.json: has no list images"),
        (coco, change(CAPTIONS, '"caption"', '"text"'), r"annotations\[0\] lacks image_id or caption"),
        (coco, change(CAPTIONS, "scene_000001.jpg", "../val2017/scene_000016.jpg"), "lies outside of the data's"),
        (coco, change("annotations/captions_val2017.json", "scene_000016.jpg", "scene_000001.jpg"),
         "scene_000001.jpg: is what two pictures are called"),
        (karpathy, change("dataset_coco.json", '"val2014"', f'"{300 * "x"}"'), "jpg: captions without a picture"),
        (karpathy, change("dataset_coco.json", '"val2014"', '"../drawn"'), "lies outside of the data's directory"),
        (karpathy, change("dataset_coco.json", '"split": "train"', '"split": "tr"'), r"images\[0\]: neither of train"),
        (karpathy, change("dataset_coco.json", '"raw": "', '"raw": 5, "_": "'), r"images\[0\]: caption that is no text"),
        (bars, change("flickr30k_images/results.csv", "scene_000000.jpg| 0|", "scene_000000.jpg 0"),
         "results.csv:2: too few columns"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_one_line_and_can_be_left_out(
    write: Callable[..., None], spoil: Callable[[Path], None], line: str, pictures: Path, said: Said, tmp_path: Path
) -> None:
    folder = tmp_path / "data"
    write(folder, pictures, said)
    spoil(folder)
    with pytest.raises(LabError, match=line) as caught:
        read_captioned(folder, shown=False)
    assert "\n" not in str(caught.value)
    if "--on-bad-data skip" in str(caught.value):
        assert sum(read_captioned(folder, "skip", shown=False).left_out.values()) >= 1


def test_paths_in_tables_stay_inside_and_broken_files_are_named(pictures: Path, said: Said, tmp_path: Path) -> None:
    columns = {"image": [{"bytes": None, "path": str(pictures / name)} for name in said], "text": ["a"] * len(said)}
    content = (pictures / next(iter(said))).read_bytes()
    parquet.write_table(pa.table(columns), tmp_path / "all.parquet")
    with pytest.raises(LabError, match=r"row 0 .*lies outside of the data's directory"):
        read_captioned(tmp_path, shown=False)
    for name, match in (("all.parquet", "cannot be read"), ("train.tar", "webdataset|truncated or broken")):
        (tmp_path / name).write_bytes(b"no table")
        with pytest.raises(LabError, match=match):
            read_captioned(tmp_path / name, shown=False)
    nothing = pa.table({"image": [*[{"bytes": b"", "path": None}] * 3, {"bytes": content}], "caption": ["a"] * 4})
    parquet.write_table(nothing, tmp_path / "few.parquet")
    assert read_captioned(tmp_path / "few.parquet", "skip", shown=False).left_out == {"empty": 3}
    (tmp_path / "empty").mkdir()
    os.mkfifo(tmp_path / "empty" / "dataset.json")
    with pytest.raises(LabError, match=r"dataset.json: cannot be read \(is a directory, pipe or device"):
        read_captioned(tmp_path / "empty", shown=False)


def test_what_a_tar_has_in_vain_is_counted(pictures: Path, said: Said, tmp_path: Path) -> None:
    tar(tmp_path / "tars", pictures, said)
    with tarfile.open(tmp_path / "tars" / "test-000.tar", "a") as archive:
        archive.addfile(tarfile.TarInfo("photo.1.jpg"))  # the names of WebDataset end at the first dot
    with pytest.raises(LabError, match=r"test-000.tar/photo: neither picture nor caption"):
        read_captioned(tmp_path / "tars", shown=False)


def test_a_file_of_captions_may_be_named_beside_or_below_its_pictures(
    pictures: Path, said: Said, tmp_path: Path
) -> None:
    one_deeper(tmp_path / "data", pictures, said)
    file = tmp_path / "data" / "flickr30k" / "results_20130124.token"
    assert len(read_captioned(file, shown=False)) == 20
    shutil.copytree(tmp_path / "data" / "flickr30k-images", tmp_path / "data" / "flickr30k", dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "data" / "flickr30k-images")
    assert len(read_captioned(file, shown=False)) == 20
    shutil.copytree(tmp_path / "data" / "flickr30k", tmp_path / "data" / "more")
    with pytest.raises(LabError, match="has no captions"):  # which of both is meant?
        read_captioned(tmp_path / "data", shown=False)


def test_data_that_are_all_of_the_test_name_the_way_to_measure_on_them(
    pictures: Path, said: Said, tmp_path: Path
) -> None:
    rows_of_one_caption(tmp_path / "data", pictures, said)
    (tmp_path / "data" / "all.parquet").rename(tmp_path / "data" / "test-0.parquet")
    with pytest.raises(LabError, match=r"leave the train split empty; .* evaluate with --split all"):
        caption_splits(read_captioned(tmp_path / "data", shown=False))


@pytest.mark.parametrize(("groups", "stops"), [(150, False), (40, True)])
def test_few_captions_without_a_picture_are_left_out_and_counted(groups: int, stops: bool, tmp_path: Path) -> None:
    """As Flickr8k has one group more than pictures; many are a sign that the pictures are elsewhere."""
    (tmp_path / "Images").mkdir()
    rows = ["image,caption", "gone.jpg,never published"]
    for number in range(groups):
        (tmp_path / "Images" / f"{number}.ppm").write_bytes(b"P6 1 1 255 " + bytes((number, 0, 0)))
        rows.append(f"{number}.ppm,a picture")
    (tmp_path / "captions.txt").write_text("\n".join(rows))
    if stops:
        with pytest.raises(LabError, match=r"gone.jpg: captions without a picture; add --on-bad-data skip"):
            read_captioned(tmp_path, shown=False)
    else:
        found = read_captioned(tmp_path, shown=False)
        assert (len(found), dict(found.left_out)) == (groups, {"captions without a picture": 1})


def test_checks_are_remembered_until_a_file_changes(
    pictures: Path, said: Said, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(images, "SETTLED", -1.0)  # these files are new
    opened: list[object] = []
    decode = images.decoded
    monkeypatch.setattr(images, "decoded", lambda content: (opened.append(content), decode(content))[1])
    files, packed = tmp_path / "files", tmp_path / "packed"
    comments(files, pictures, said)
    table(packed, pictures, said)
    for folder, count in ((files, 20), (files, 0), (packed, 20), (packed, 0)):
        opened.clear()
        found = read_captioned(folder, shown=False)
        assert (len(found), len(opened)) == (20, count)
    changed = sorted((files / "Images").iterdir())[4]
    before = changed.stat()
    changed.write_bytes(bytes(len(changed.read_bytes())))  # as long, and said to be as old
    os.utime(changed, ns=(before.st_atime_ns, before.st_mtime_ns))
    opened.clear()
    with pytest.raises(LabError, match=f"{changed.name}: no picture"):
        read_captioned(files, shown=False)
    assert len(opened) == 1
    for record in (tmp_path / "cache").rglob("*.json"):
        for damage in ('{"a": "no digest"', "[1]", '{"a": 5}'):
            record.write_text(damage)
            assert len(read_captioned(files, "skip", shown=False)) == 19
    # A file that was changed just now is looked at again: it could change within the same tick.
    monkeypatch.setattr(images, "SETTLED", 1e6)
    opened.clear()
    read_captioned(files, "skip", shown=False)
    assert len(opened) == 20


def test_real_coco() -> None:
    found = read_captioned(real_data("coco-mini"), shown=False)
    assert (len(found), found.given.count("train"), found.given.count("test")) == (80, 50, 30)
    assert {len(sentences) for sentences in found.captions} <= {5, 6, 7}
