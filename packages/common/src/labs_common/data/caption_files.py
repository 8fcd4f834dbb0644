"""Captions in each published layout: `read_described` finds out which one it is, and decodes nothing."""

import csv
import io
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from labs_common.data.images import SPECIAL, SUFFIXES, BadPictureError, Content, within
from labs_common.data.tables import SPLITS, Columns, by_split, column_of, read_tables, split_of
from labs_common.errors import LabError, bytes_of, json_of, reason_of

# The official archives have the misspelt one, and one within another; the others are of copies in use.
PICTURE_FOLDERS = ("Images", "Flicker8k_Dataset", "Flickr8k_Dataset", "flickr30k_images/flickr30k_images",
                   "flickr30k_images", "flickr30k-images", "images")  # fmt: skip
# They lie beside the pictures' folder, or in a folder beside it, as Flickr8k_text/Flickr8k.token.txt does.
CAPTION_FILES = "captions.txt", "Flickr8k.token.txt", "captions.csv", "results.csv", "results_20130124.token"
KARPATHY = ("dataset_flickr8k.json", "dataset_flickr30k.json", "dataset_coco.json", "dataset.json")
IMAGE_NAMES, CAPTION_NAMES = ("image", "image_name"), ("caption", "comment")  # columns of a .csv file
# Of tables: a caption or a list of them; some have a column for each.
CAPTION_COLUMNS = ("caption", "captions", "sentences", "text", "alt_caption", "caption_0")
EXPECTED = (
    "captions.txt, Flickr8k.token.txt, results.csv, annotations/captions_*.json, dataset_*.json, .parquet or .tar files"
)
LONGEST = csv.field_size_limit()  # characters of a caption: 131,072
# Within a caption: a quote before it was never closed, and what followed was swallowed.
SWALLOWED = re.compile(rf"\n[^\n,]+(?:{'|'.join(map(re.escape, sorted(SUFFIXES)))}),", re.IGNORECASE)
# NAME| NUMBER| CAPTION of Flickr30k's results.csv; the published file lacks the second bar in one line.
BARS = re.compile(r"([^|]+)\|\s*\d+\s*\|?(.*)", re.DOTALL)


@dataclass
class Described:
    """Pictures and what files say of them, before any is decoded.

    Attributes:
        contents: each picture by its name; those that nothing is said of among them.
        captions: of each picture by its name; those of missing pictures among them.
        splits: train, validation or test of each picture by its name; empty where the data do not divide.
        divided: who divided them so, for the report.
        faults: what cannot be used, each a name or a file's line, and why.
    """

    contents: dict[str, Content] = field(default_factory=dict)
    captions: dict[str, list[str]] = field(default_factory=dict)
    splits: dict[str, str] = field(default_factory=dict)
    divided: str = ""
    faults: list[tuple[str, str]] = field(default_factory=list)

    def say(self, where: str, name: str, caption: object) -> None:
        """Keeps a caption of picture `name`, or why the one at `where` cannot be used."""
        fault = _fault(caption)
        if fault:
            self.faults.append((where, fault))
        else:
            self.captions.setdefault(name, []).append(str(caption).strip())

    def show(self, name: str, file: object, *folders: Path) -> None:
        """Keeps picture `name`, the `file` in the first of `folders`, if it is there."""
        try:
            path = within(file, *folders)
            if self.contents.get(name, path) != path:
                raise BadPictureError("is what two pictures are called; rename one")
            if path.exists():
                self.contents[name] = path
        except BadPictureError as error:
            self.faults.append((name, str(error)))
            self.captions.pop(name, None)
            self.contents.pop(name, None)
        except OSError:  # a name that is too long
            pass


def read_described(data: str) -> Described:
    """Reads what is said of pictures: Flickr8k and Flickr30k in all forms, Karpathy's JSON, COCO, tables, tars.

    `data` is a directory, one of those files, what `datasets` saved, or a Hugging Face id (`owner/name`).

    Raises:
        LabError: it is none of those, or a file of it is broken.
    """
    path = Path(data).expanduser()
    if not path.exists() and (path.is_absolute() or data.startswith((".", "~")) or data.count("/") != 1):
        raise LabError(f"--data {data}: no such directory")
    folder = path if path.is_dir() else path.parent
    if not path.exists() or path.suffix == ".parquet":
        return _of_tables(data, read_tables(data))
    files = [path] if not path.is_dir() else []
    for file in files or [path / name for name in KARPATHY]:
        if file.name.startswith("dataset") and file.suffix == ".json" and file.exists():
            return _of_karpathy(file, folder)
    there = [path / name for name in CAPTION_FILES if (path / name).exists()]
    deeper = [file for name in CAPTION_FILES for file in path.glob(f"*/{name}")]
    for file in files or there or (deeper if len(deeper) == 1 else []):
        if file.suffix in (".txt", ".csv", ".token"):
            return _of_lines(file, folder, folder.parent if files else folder)
    if coco := [file for file in files or sorted((path / "annotations").glob("*.json")) if "captions_" in file.name]:
        return _of_coco(coco, folder.parent if files else folder)
    # CLIP_benchmark's lie in a folder for each split.
    folders = ("", "data", *(name for names in SPLITS.values() for name in names))
    beside = [file for name in folders for file in sorted((path / name).glob("*.tar"))]
    if tars := [file for file in files or beside if file.suffix == ".tar"]:
        return _of_tars(data, tars)
    if path.is_dir() and (tables := read_tables(data)):
        return _of_tables(data, tables)
    raise LabError(f"--data {data}: has no captions; expected {EXPECTED}")


def _fault(caption: object) -> str:
    if not isinstance(caption, str):
        return "caption that is no text"
    if len(caption) > LONGEST:
        return f"caption of more than {LONGEST:,} characters"
    if any("\ud800" <= letter <= "\udfff" for letter in caption):
        return "caption with half of a character"
    return "quote that is not closed" if SWALLOWED.search(caption) else "" if caption.strip() else "empty caption"


def _of_lines(file: Path, folder: Path, above: Path) -> Described:
    """Reads a text file with a caption a line; its pictures lie beside it, or in one of `PICTURE_FOLDERS` there.

    Where none do, in such a folder of the directory `above`. Links may lead to what is in the data's `folder`.
    """
    near = [*(file.parent / name for name in PICTURE_FOLDERS), *(above / name for name in PICTURE_FOLDERS)]
    if any(one.suffix.lower() in SUFFIXES for one in file.parent.iterdir()):
        near.insert(len(PICTURE_FOLDERS), file.parent)
    pictures = next((at for at in near if at.is_dir()), file.parent)
    found = Described()
    for path in sorted(pictures.iterdir()):
        if path.suffix.lower() in SUFFIXES:
            if path.is_symlink():
                found.show(path.name, path.name, pictures, folder)
            else:
                found.contents[path.name] = path
    outside = {name for name, _ in found.faults}
    for line, name, caption in caption_lines(file):
        if name is None:
            found.faults.append((f"{file.name}:{line}", caption))
        elif name not in outside:
            found.say(f"{file.name}:{line}", name, caption)
    return found


def caption_lines(file: Path) -> Iterator[tuple[int, str | None, str]]:
    """Yields the line number, picture name and text of each caption; for a bad line no name, and why it is bad.

    Raises:
        LabError: the file cannot be read, or has no columns of pictures and captions.
    """
    raw = bytes_of(file, f"--data {file}").removeprefix(b"\xef\xbb\xbf")  # the mark with which Windows begins UTF-8
    texts: list[str] = []
    for number, line in enumerate(raw.splitlines(), 1):
        try:
            texts.append(line.decode("utf-8"))
        except UnicodeDecodeError:
            texts.append("")  # so that those after it keep their numbers
            yield number, None, "not UTF-8"
    if file.suffix == ".token" or file.name.endswith("token.txt"):  # NAME#NUMBER, tab, caption
        for number, text in enumerate(texts, 1):
            if text:
                name, tab, caption = text.partition("\t")
                name = name.rpartition("#")[0] or name
                yield (number, name, caption) if tab else (number, None, "no tab between picture and caption")
        return
    if texts and texts[0].startswith("image_name|"):
        for number, text in enumerate(texts[1:], 2):
            if text:
                parts = BARS.fullmatch(text)
                yield (number, parts[1].strip(), parts[2]) if parts else (number, None, "too few columns")
        return
    rows = csv.reader(io.StringIO("\n".join(texts)))
    header = [cell.strip().lower() for cell in next(rows, [])]
    image, text_ = (next((header.index(name) for name in known if name in header), -1)
                    for known in (IMAGE_NAMES, CAPTION_NAMES))  # fmt: skip
    if min(image, text_) < 0:
        raise LabError(f"--data {file}: its first line must name the columns image,caption")
    while True:
        try:
            row = next(rows)
        except StopIteration:
            return
        except csv.Error:  # it goes on after the line
            yield rows.line_num, None, f"caption of more than {LONGEST:,} characters"
            continue
        if row:
            whole = len(row) > max(image, text_)
            yield (rows.line_num, row[image], row[text_]) if whole else (rows.line_num, None, "too few columns")


def _of_karpathy(file: Path, folder: Path) -> Described:
    """Reads the captions and splits of Karpathy & Fei-Fei (2015), in which `restval` is training too."""
    found = Described(divided=f"as Karpathy's {file.name} says")
    roots = [folder / name for name in PICTURE_FOLDERS if (folder / name).is_dir()] or [folder]
    for place, image in enumerate(_rows(file, "images", "filename", "sentences")):
        under, name = str(image.get("filepath") or ""), str(image["filename"])
        where = f"{file.name}: images[{place}]"
        split = "train" if image.get("split") == "restval" else split_of(str(image.get("split")))
        sentences = image["sentences"] if isinstance(image["sentences"], list) else [None]
        for sentence in sentences:
            found.say(where, name, sentence.get("raw") if isinstance(sentence, dict) else sentence)
        if not split:
            found.faults.append((where, "neither of train, restval, val nor test"))
            found.captions.pop(name, None)
            continue
        found.splits[name] = split
        root = (
            next((at for at in (folder, folder / "images") if os.path.isdir(at / under)), folder) if under else roots[0]
        )
        found.show(name, Path(under, name), root, folder)
    return found


def _of_coco(files: Sequence[Path], folder: Path) -> Described:
    """Reads annotations/captions_train2017.json and its like; pictures lie in train2017, as its instances' do.

    Captions of COCO's test are not public: its validation pictures are the test here.
    """
    found = Described()
    for file in files:
        part = file.stem.removeprefix("captions_")
        pictures = next((at for at in (folder / part, folder / "images" / part) if at.is_dir()), folder)
        split = split_of(part.rstrip("0123456789"))
        names: dict[Any, str] = {}
        for image in _rows(file, "images", "id", "file_name"):
            name = names[_hashable(image["id"])] = str(image["file_name"])
            found.show(name, name, pictures, folder)
            if len(files) > 1 and split:
                found.splits[name] = "train" if split == "train" else "test"
        bad = {name for name, _ in found.faults}
        for place, row in enumerate(_rows(file, "annotations", "image_id", "caption")):
            where, known = f"{file.name}: annotations[{place}]", names.get(_hashable(row["image_id"]))
            if known is None:
                found.faults.append((where, f"of the unknown picture {row['image_id']}"))
            elif known not in bad:
                found.say(where, known, row["caption"])
    if found.splits:
        found.divided = f"as {' and '.join(file.name for file in files)} do; COCO's validation is the test"
    return found


def _hashable(number: object) -> object:
    return number if isinstance(number, (int, str)) else None


def _rows(file: Path, key: str, *needed: str) -> list[Mapping[str, Any]]:
    """Returns a list of a JSON file whose rows have what is `needed`.

    Raises:
        LabError: it has not.
    """
    content = json_of(file, f"--data {file}")
    rows = content.get(key) if isinstance(content, dict) else None
    if not isinstance(rows, list):
        raise LabError(f"--data {file}: has no list {key}")
    for place, row in enumerate(rows):
        if not isinstance(row, dict) or not set(needed) <= set(row):
            raise LabError(f"--data {file}: {key}[{place}] lacks {' or '.join(needed)}")
    return rows


def _of_tables(data: str, tables: Mapping[str, Columns]) -> Described:
    """Reads columns of pictures and captions; rows of the same picture are one, and a column `split` divides them."""
    found, known = Described(), dict[Content, str]()
    for split, table in tables.items():
        contents, names = table.pictures(data)
        column = column_of(data, table.names, CAPTION_COLUMNS)
        columns = [name for name in table.names if name.startswith("caption_")] if column == "caption_0" else [column]
        captions = [table.values(data, name) for name in columns]
        said = table.values(data, "split") if "split" in table.names else [split] * len(names)
        for place, content in enumerate(contents):
            name = names[place] if len(tables) == 1 else f"{split} {names[place]}"
            name = known.setdefault(content, name) if content else name
            found.contents[name] = content
            found.splits.setdefault(name, split_of(str(said[place])) or "train")
            for value in (values[place] for values in captions):
                for caption in value if isinstance(value, list) else [value]:
                    found.say(
                        f"{split} row {place}", name, caption.get("raw") if isinstance(caption, dict) else caption
                    )
    return _divided(found, data)


def _of_tars(data: str, files: Sequence[Path]) -> Described:
    """Reads tars of WebDataset: of each name a picture and `.txt` with a caption a line, or `.json` with `caption`.

    The library gives their bytes and decodes nothing.
    """
    try:
        from webdataset.tariterators import tarfile_samples  # an extra: most data lie in files
    except ImportError as error:
        raise LabError(
            f"--data {data}: is of .tar files, which need webdataset: install labs-common[webdataset]"
        ) from error
    found, path = Described(), Path(data).expanduser()
    for split, group in by_split(data, files).items():
        for file in group:
            if not file.is_file():
                raise LabError(f"--data {file}: {SPECIAL}")
            try:
                for sample in tarfile_samples([{"url": str(file.resolve())}]):
                    where = file.relative_to(path) if path.is_dir() else file.name
                    _take(found, split, f"{where}/{sample['__key__']}", sample)
            except Exception as error:  # tars break in many ways
                raise LabError(f"--data {file}: truncated or broken ({type(error).__name__})") from error
    return _divided(found, data)


def _take(found: Described, split: str, name: str, sample: Mapping[str, Any]) -> None:
    """Keeps the members of a tar that have one name."""
    found.splits[name] = split
    if not any(f".{end}" in SUFFIXES or end in ("txt", "json") for end in sample):
        found.faults.append((name, "neither picture nor caption"))
    for end, content in sample.items():
        try:
            if f".{end}" in SUFFIXES:
                found.contents[name] = content
            elif end == "txt":
                for caption in content.decode("utf-8").splitlines():
                    found.say(name, name, caption)
            elif end == "json" and "txt" not in sample:
                said = json.loads(content)
                captions = next((said[key] for key in CAPTION_COLUMNS if key in said), None)
                for caption in captions if isinstance(captions, list) else [captions]:
                    found.say(name, name, caption)
        except (ValueError, TypeError, RecursionError) as error:
            found.faults.append((name, f"its {end} cannot be read ({reason_of(error)})"))


def _divided(found: Described, data: str) -> Described:
    """Forgets splits that are all training, which is what data without splits have."""
    if set(found.splits.values()) == {"train"}:
        found.splits = {}
    found.divided = f"as {data} does" if found.splits else ""
    return found
