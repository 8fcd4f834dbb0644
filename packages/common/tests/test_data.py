import io
import os
import pickle
import struct
import zlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from labs_testing.commands import real_data
from PIL import Image
from pyarrow import parquet

from labs_common.data.classes import read_pictures, stratified_parts
from labs_common.data.images import BadPictureError, checked, decoded, picture_files, readable, within
from labs_common.data.tables import by_split
from labs_common.errors import LabError
from labs_common.scenes.files import write_parquet

CLASSES = ["cat", "dog"]


@pytest.fixture
def levels() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (10, 3, 32, 32), dtype=np.uint8)


LABELS = [0, 1, 1, 0, 1, 0, 1, 1, 0, 0]


def python2_pickle(levels: np.ndarray, labels: list[int], names: list[str]) -> bytes:
    """A batch as Python 2 wrote it: its strings are bytes, its arrays come from numpy.core."""
    array = pickle.dumps(levels.reshape(len(labels), -1), protocol=2)[2:-1]
    array = array.replace(b"numpy._core.multiarray", b"numpy.core.multiarray")

    def text(word: str) -> bytes:
        return b"U" + bytes([len(word)]) + word.encode()

    numbers = b"](" + b"".join(b"K" + bytes([label]) for label in labels) + b"e"
    files = b"](" + b"".join(map(text, names)) + b"e"
    return b"\x80\x02}(" + text("data") + array + text("labels") + numbers + text("filenames") + files + b"u."


def write_python_batches(folder: Path, levels: np.ndarray) -> Path:
    folder.mkdir(parents=True)
    for number in range(1, 6):
        part = slice(2 * number - 2, 2 * number)
        content = python2_pickle(levels[part], LABELS[part], [f"{number}_a.png", f"{number}_b.png"])
        (folder / f"data_batch_{number}").write_bytes(content)
    (folder / "test_batch").write_bytes(python2_pickle(levels[:4], LABELS[:4], ["a", "b", "c", "d"]))
    (folder / "batches.meta").write_bytes(pickle.dumps({b"label_names": [name.encode() for name in CLASSES]}, 2))
    return folder


def encoded(levels: np.ndarray, form: str = "png") -> bytes:
    stream = io.BytesIO()
    Image.fromarray(levels.transpose(1, 2, 0)).save(stream, form)
    return stream.getvalue()


def write_folders(folder: Path, levels: np.ndarray) -> Path:
    for place, (image, label) in enumerate(zip(levels, LABELS, strict=True)):
        file = folder / CLASSES[label] / f"{place}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(encoded(image))
    return folder


def test_python_and_binary_batches_are_the_same_pictures(tmp_path: Path, levels: np.ndarray) -> None:
    python = write_python_batches(tmp_path / "cifar-10-batches-py", levels)
    binary = tmp_path / "cifar-10-batches-bin"
    binary.mkdir()
    rows = np.concatenate([np.array(LABELS, np.uint8)[:, None], levels.reshape(10, -1)], 1)
    for number in range(1, 6):
        rows[2 * number - 2 : 2 * number].tofile(binary / f"data_batch_{number}.bin")
    rows[:4].tofile(binary / "test_batch.bin")
    (binary / "batches.meta.txt").write_text("\n".join(CLASSES) + "\n\n")
    for folder in (python, tmp_path, binary):  # the parent of the unpacked archive will do
        splits = read_pictures(str(folder))
        assert splits.test is not None
        for found, count in ((splits.train, 10), (splits.test, 4)):
            found = checked(found, "error")
            assert found.classes == ("cat", "dog")
            assert found.labels.tolist() == LABELS[:count]
            assert np.array_equal(
                np.stack([np.asarray(found.image(place)) for place in range(count)]),
                levels[:count].transpose(0, 2, 3, 1),
            )
    assert splits.validation is None
    assert read_pictures(str(python)).train.names[3] == "2_b.png"
    (binary / "data_batch_3.bin").write_bytes(b"short")
    with pytest.raises(LabError, match=r"data_batch_3\.bin is truncated"):
        read_pictures(str(binary))
    (python / "data_batch_4").unlink()
    with pytest.raises(LabError, match="data_batch_4 is missing"):
        read_pictures(str(python))


def test_a_pickle_that_asks_for_code_is_refused_and_does_nothing(tmp_path: Path, levels: np.ndarray) -> None:
    folder = write_python_batches(tmp_path / "set", levels)
    trace = tmp_path / "trace"

    class Trap:
        def __reduce__(self) -> tuple[object, ...]:
            return Path.touch, (trace,)

    for content in (
        pickle.dumps({b"data": Trap()}), b"cos\nsystem\n(S'touch /tmp/x'\ntR.", b"\x80\x02}(U\x04data", b"", b"\x80\x05K\x01.",
    ):  # fmt: skip
        (folder / "data_batch_2").write_bytes(content)
        with pytest.raises(LabError, match="data_batch_2"):
            read_pictures(str(folder))
    assert not trace.exists()


def test_folders_and_parquet_and_saved_datasets(tmp_path: Path, levels: np.ndarray) -> None:
    datasets = pytest.importorskip("datasets")
    folder = write_folders(tmp_path / "folders", levels)
    flat = read_pictures(str(folder))
    assert flat.test is None
    assert flat.train.labels.tolist() == sorted(LABELS)
    by_name = {name: np.asarray(flat.train.image(place)) for place, name in enumerate(flat.train.names)}
    assert np.array_equal(by_name["dog/4.png"], levels[4].transpose(1, 2, 0))
    split = tmp_path / "split"
    write_folders(split / "train", levels)
    write_folders(split / "val", levels)
    assert read_pictures(str(split)).validation is not None

    table = datasets.load_dataset("imagefolder", data_dir=str(folder), cache_dir=str(tmp_path / "cache"))["train"]
    table.save_to_disk(str(tmp_path / "saved"))
    # It names the pictures by their whole paths, which lie in its directory.
    table.to_parquet(str(folder / "train-00000-of-00001.parquet"))
    whole = checked(flat.train, "error")
    for place in ("saved", "folders", "folders/train-00000-of-00001.parquet"):
        read = checked(read_pictures(str(tmp_path / place)).train, "error")
        assert read.classes == ("cat", "dog")
        assert sorted(read.digests) == sorted(whole.digests)


@pytest.mark.parametrize(
    ("name", "inside"),
    [
        ("own.png", True), ("sub/own.png", True), ("link.png", True), ("sub/../own.png", False),
        ("../secret.png", False), ("sub/../../secret.png", False), ("..\\secret.png", False), ("/secret.png", False),
        ("out.png", False), ("away/secret.png", False), ("nul\0.png", False), ("\ud800.png", False), (5, False),
        ("..", False),
    ],
)  # fmt: skip
def test_what_data_name_stays_inside_of_their_directory(
    name: object, inside: bool, tmp_path: Path, levels: np.ndarray
) -> None:
    """By climbing, by an absolute name, by links of files and of directories."""
    folder, other = tmp_path / "data", tmp_path / "other"
    for place in (folder / "sub", other):
        place.mkdir(parents=True)
    for file in (folder / "own.png", folder / "sub" / "own.png", other / "secret.png", tmp_path / "secret.png"):
        (file).write_bytes(encoded(levels[0]))
    (folder / "link.png").symlink_to("own.png")
    (folder / "out.png").symlink_to(other / "secret.png")
    (folder / "away").symlink_to(other)
    name = str(tmp_path) + name if name == "/secret.png" else name
    readers = [lambda: within(name, folder)]
    if isinstance(name, str) and name.isprintable():  # as the file can hold it
        rows = [{"image": {"bytes": None, "path": name}, "label": 0}]
        parquet.write_table(pa.Table.from_pylist(rows), folder / "train.parquet")
        readers.append(lambda: read_pictures(str(folder)).train.contents[0])
    for read in readers:
        if inside:
            assert read() == folder / str(name)
        else:
            with pytest.raises((LabError, BadPictureError), match="outside of the data's directory"):
                read()


def test_a_class_folder_s_links_stay_inside(tmp_path: Path, levels: np.ndarray) -> None:
    for name in ("cat", "dog"):
        (tmp_path / "data" / name).mkdir(parents=True)
        (tmp_path / "data" / name / "a.png").write_bytes(encoded(levels[0]))
    (tmp_path / "secret.png").write_bytes(encoded(levels[0]))
    (tmp_path / "data" / "cat" / "b.png").symlink_to("../dog/a.png")
    assert len(read_pictures(str(tmp_path / "data")).train) == 3
    (tmp_path / "data" / "cat" / "c.png").symlink_to(tmp_path / "secret.png")
    with pytest.raises(LabError, match=r"cat/c\.png: lies outside"):
        read_pictures(str(tmp_path / "data"))


def test_scenes_come_back_as_they_were_drawn(tmp_path: Path) -> None:
    write_parquet(tmp_path, "count", {"train": range(6), "test": range(6, 8)}, side=32)
    splits = read_pictures(str(tmp_path))
    assert splits.train.classes == ("1", "2", "3", "4", "5", "6")
    assert splits.test is not None
    assert len(splits.test) == 2
    assert splits.train.image(0).size == (32, 32)


def png_header(width: int, height: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "empty"),
        (b"hello", "no picture"),
        (png_header(60_000, 60_000), "decompression bomb"),
        (png_header(9_000, 8_000), "72|more than|9000"),
        (png_header(100, 100), "truncated or broken"),
    ],
)
def test_what_is_no_picture_is_refused(content: bytes, said: str) -> None:
    with pytest.raises(BadPictureError, match=said):
        decoded(content)


def test_every_mode_becomes_rgb() -> None:
    for mode in ("1", "L", "LA", "P", "RGBA", "CMYK", "I;16"):
        stream = io.BytesIO()
        Image.new(mode, (4, 3)).save(stream, "tiff")
        assert decoded(stream.getvalue()).mode == "RGB"
    turned = Image.new("RGB", (4, 3))
    turned.getexif()[0x0112] = 6
    stream = io.BytesIO()
    turned.save(stream, "jpeg", exif=turned.getexif())
    assert decoded(stream.getvalue()).size == (3, 4)


def test_bad_pictures_are_named_or_counted(tmp_path: Path, levels: np.ndarray) -> None:
    folder = write_folders(tmp_path / "set", levels)
    broken = encoded(levels[0], "jpeg")
    (folder / "cat" / "half.jpg").write_bytes(broken[: len(broken) // 2])
    (folder / "dog" / "empty.png").write_bytes(b"")
    with pytest.raises(LabError, match=r"2 of 12 .*cat/half.jpg: truncated.*dog/empty.png: empty.*--on-bad-data skip"):
        checked(read_pictures(str(folder)).train, "error")
    kept = checked(read_pictures(str(folder)).train, "skip")
    assert len(kept) == len(kept.digests) == 10
    assert kept.left_out.total() == 2
    clean = checked(read_pictures(str(write_folders(tmp_path / "clean", levels))).train, "error")
    assert kept.fingerprint() == clean.fingerprint()
    assert clean.fingerprint() != clean.subset(range(9)).fingerprint() != clean.subset(range(8, -1, -1)).fingerprint()


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("absent/x/y", "no such file"),
        ("set.tar.gz", "unpack it"),
        ("set.csv", r"directory or a \.parquet"),
        ("hollow", "directory for each class"),
        ("half", "two holds no pictures"),
        ("wrong.parquet", "cannot be read"),
        ("columns.parquet", "no column img or image"),
    ],
)
def test_a_wrong_path_gets_one_line(tmp_path: Path, path: str, said: str) -> None:
    for name in ("set.tar.gz", "set.csv", "wrong.parquet"):
        (tmp_path / name).write_bytes(b"x")
    parquet.write_table(pa.table({"text": ["a"]}), tmp_path / "columns.parquet")
    (tmp_path / "hollow").mkdir()
    (tmp_path / "half" / "two").mkdir(parents=True)
    with pytest.raises(LabError, match=said) as caught:
        read_pictures(str(tmp_path / path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("cc3m-train-0000.tar", "train"),
        ("cc3m_validation_0000.tar", "validation"),
        ("coco.val2017.parquet", "validation"),
        ("Test.parquet", "test"),
        ("testimonials-0.parquet", "train"),
        ("train_val.parquet", "train"),
    ],
)
def test_any_word_of_a_name_says_the_split(name: str, split: str, tmp_path: Path) -> None:
    assert by_split(str(tmp_path), [tmp_path / name]) == {split: [tmp_path / name]}


def test_labels_outside_of_the_classes_are_bad(tmp_path: Path, levels: np.ndarray) -> None:
    import json

    names = json.dumps({"info": {"features": {"label": {"names": CLASSES, "_type": "ClassLabel"}}}})
    table = pa.table({"image": [encoded(image) for image in levels[:4]], "label": [0, 7, None, 1]})
    parquet.write_table(table.replace_schema_metadata({"huggingface": names}), tmp_path / "train.parquet")
    kept = checked(read_pictures(str(tmp_path)).train, "skip")
    assert kept.labels.tolist() == [0, 1]
    assert kept.left_out == {"label 7 is outside of the 2 classes": 1, "label -1 is outside of the 2 classes": 1}


def test_files_are_named_by_themselves_by_directories_and_by_patterns(tmp_path: Path, levels: np.ndarray) -> None:
    folder = write_folders(tmp_path / "set", levels)
    (folder / "cat" / "notes.txt").write_text("no picture")
    cats, one = sorted((folder / "cat").glob("*.png")), folder / "dog" / "1.png"
    assert picture_files([str(folder / "cat"), str(cats[0]), str(one)]) == [*cats, one]
    assert sorted(picture_files([str(folder / "**" / "*.png")])) == sorted(folder.rglob("*.png"))
    for named, said in (
        ([str(tmp_path / "none")], "no such file"),
        ([str(tmp_path)], "no picture in that directory"),
        ([], "name pictures"),
    ):
        with pytest.raises(LabError, match=said):
            picture_files(named)


def test_stratified_parts() -> None:
    labels = np.array([0] * 50 + [1] * 10 + [2] * 2 + [3])
    kept, aside = stratified_parts(labels, 0.1, seed=0)
    assert sorted([*kept, *aside]) == list(range(63))
    assert np.bincount(labels[aside], minlength=4).tolist() == [5, 1, 1, 0]
    assert stratified_parts(labels, 0.1, seed=0)[1].tolist() == aside.tolist()
    assert stratified_parts(labels, 0.1, seed=1)[1].tolist() != aside.tolist()
    assert len(stratified_parts(labels, 0.0, seed=0)[1]) == 0


def test_real_cifar10() -> None:
    folder = real_data("cifar10-mini")
    splits = read_pictures(str(folder))
    assert splits.test is not None
    assert np.bincount(splits.train.labels).tolist() == [1000] * 10
    assert np.bincount(checked(splits.test, "error").labels).tolist() == [200] * 10
    assert splits.train.classes[9] == "truck"


def test_files_that_cannot_be_read_are_named_or_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good, bad = tmp_path / "good.png", [tmp_path / f"{number}.png" for number in range(7)]
    Image.new("L", (3, 2)).save(good)
    for file in bad:
        file.touch()
    ((found, image),) = readable([bad[0], good], "skip")
    assert (found, image.size, image.mode) == (good, (3, 2), "RGB")
    assert "left out" in capsys.readouterr().err
    with pytest.raises(LabError, match=r"4\.png: empty and 2 more; add --on-bad-data skip"):
        readable([good, *bad], "error")
    with pytest.raises(LabError, match=r"0\.png: empty; add"):
        readable(bad[:1], "skip")


def test_a_number_that_is_no_class_is_a_fault(tmp_path: Path, levels: np.ndarray) -> None:
    """Classes without names have those of the numbers up to the largest: not of a hundred million."""
    pictures = [encoded(image) for image in levels[:4]]
    parquet.write_table(pa.table({"image": pictures, "label": [0, 10**8, 1, 2**62]}), tmp_path / "train.parquet")
    found = read_pictures(str(tmp_path)).train
    assert found.classes == ("0", "1")
    assert checked(found, "skip").labels.tolist() == [0, 1]


def test_pipes_and_broken_text_in_the_place_of_data(tmp_path: Path) -> None:
    for name in ("train.parquet", "data_batch_1"):
        (tmp_path / name).mkdir()
        os.mkfifo(tmp_path / name / name)
        with pytest.raises(LabError, match=r"pipe|directory for each class"):
            read_pictures(str(tmp_path / name))
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(LabError, match="name a directory"):
        read_pictures(str(tmp_path / "pipe"))
    text = pa.StringArray.from_buffers(1, pa.py_buffer(np.array([0, 2], dtype=np.int32)), pa.py_buffer(b"\xff\xfe"))
    parquet.write_table(pa.table({"image": [b"x"], "label": text}), tmp_path / "bad.parquet")
    with pytest.raises(LabError, match="holds what cannot be read"):
        read_pictures(str(tmp_path / "bad.parquet"))
