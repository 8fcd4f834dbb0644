"""Scenes as data: classification tasks, and files laid out as Flickr8k, CIFAR-10 in parquet, and COCO are.

Picture `number` of a set is scene `number` of its seed. Splits are given as a range of numbers, so that no scene
is in two of them.
"""

import csv
import io
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image
from pyarrow import parquet
from shapely.affinity import scale
from shapely.geometry import LineString, MultiPolygon, Polygon, box
from shapely.ops import split

from labs_common.cache import cached_directory
from labs_common.progress import console
from labs_common.scenes.captions import captions
from labs_common.scenes.world import (
    COLOURS,
    MOST_THINGS,
    SHAPES,
    TEXTURES,
    Scene,
    Thing,
    picture,
    random_look,
    random_scene,
    scene_generator,
)

LEAST_PIXELS = 4.0  # a visible part with a smaller area is no instance
TRUTH = "scenes.json"
LOOKS = tuple(f"{texture} {colour}" for colour in COLOURS for texture in TEXTURES)
MAIN = ((0.22, 0.38), (0.07, 0.16))  # radii: a large thing first, smaller ones after it

Sample = Callable[[np.random.Generator], Scene]


@dataclass(frozen=True)
class Task:
    """A classification task: a question about a scene, its possible answers, and scenes with the right one."""

    question: str
    classes: tuple[str, ...]
    sample: Callable[[np.random.Generator], tuple[Scene, int]]


def _shape(generator: np.random.Generator) -> tuple[Scene, int]:
    scene = random_scene(generator, 1 + int(generator.integers(5)), MAIN)
    return scene, list(SHAPES).index(scene.things[0].shape)


def _texture(generator: np.random.Generator) -> tuple[Scene, int]:
    scene = random_scene(generator, 1 + int(generator.integers(5)), MAIN)
    return scene, TEXTURES.index(scene.things[0].texture)


def _count(generator: np.random.Generator) -> tuple[Scene, int]:
    count = 1 + int(generator.integers(MOST_THINGS))
    return random_scene(generator, count, ((0.1, 0.2),)), count - 1


def _look(generator: np.random.Generator) -> tuple[Scene, int]:
    """Samples five things of one colour and one texture, but of any shapes: every part shows the same look."""
    colour, texture = (list(options)[generator.integers(len(options))] for options in (COLOURS, TEXTURES))
    looks = [(list(SHAPES)[generator.integers(len(SHAPES))], colour, texture) for _ in range(5)]
    return random_scene(generator, 5, ((0.12, 0.22),), looks), LOOKS.index(f"{texture} {colour}")


def _striped_colour(generator: np.random.Generator) -> tuple[Scene, int]:
    """Samples three things of three textures and colours, one of them striped: texture has to be bound to colour."""
    others = [texture for texture in TEXTURES if texture != "striped"]
    generator.shuffle(others)
    textures = ["striped", *others[:2]]
    generator.shuffle(textures)
    colours = [list(COLOURS)[place] for place in generator.permutation(len(COLOURS))[:3]]
    looks = [(random_look(generator)[0], colour, texture) for colour, texture in zip(colours, textures, strict=True)]
    scene = random_scene(generator, 3, ((0.15, 0.24),), looks)
    return scene, list(COLOURS).index(colours[textures.index("striped")])


TASKS = {
    "shape": Task("Which shape has the largest thing?", tuple(SHAPES), _shape),
    "texture": Task("Which texture has the largest thing?", TEXTURES, _texture),
    "count": Task("How many things are there?", tuple(map(str, range(1, MOST_THINGS + 1))), _count),
    "look": Task("What do all things look like?", LOOKS, _look),
    "striped-colour": Task("Which colour has the striped thing?", tuple(COLOURS), _striped_colour),
}


def encoded(image: Image.Image, form: str = "png") -> bytes:
    """Writes a picture as the bytes of a file."""
    stream = io.BytesIO()
    image.save(stream, form, quality=92, compress_level=1)  # noise does not compress: do not try hard
    return stream.getvalue()


def captioned_scenes(
    seed: int, numbers: Iterable[int], sample: Sample = random_scene
) -> Iterator[tuple[int, Scene, list[str]]]:
    """Yields the number, scene and captions of each picture."""
    for number in numbers:
        generator = scene_generator(seed, number)
        scene = sample(generator)
        yield number, scene, captions(scene, generator)


def write_flickr8k(
    folder: Path, numbers: Sequence[int], seed: int = 0, side: int = 64, sample: Sample = random_scene
) -> None:
    """Writes `Images/*.jpg`, `captions.txt` (CSV) and `Flickr8k.token.txt` (tab-separated): both published forms.

    Beside them `scenes.json` says what each picture shows; see `read_truth`.
    """
    (folder / "Images").mkdir(parents=True, exist_ok=True)
    rows, truth = [], {}
    for number, scene, sentences in captioned_scenes(seed, numbers, sample):
        name = f"scene_{number:06d}.jpg"
        (folder / "Images" / name).write_bytes(encoded(picture(scene, side), "jpeg"))
        truth[name] = asdict(scene)
        rows += [(name, place, sentence) for place, sentence in enumerate(sentences)]
    (folder / TRUTH).write_text(json.dumps(truth), encoding="utf-8")
    with (folder / "captions.txt").open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(("image", "caption"))
        writer.writerows((name, sentence) for name, _, sentence in rows)
    lines = "".join(f"{name}#{place}\t{sentence}\n" for name, place, sentence in rows)
    (folder / "Flickr8k.token.txt").write_text(lines, encoding="utf-8")


def is_drawn(data: str | None) -> bool:
    """Says whether --data is drawn scenes and no photographs: none is given, or a directory of `write_flickr8k`."""
    return data is None or (Path(data).expanduser() / TRUTH).is_file()


def read_truth(folder: Path) -> dict[str, Scene]:
    """Reads the scene that each picture of `write_flickr8k` shows, by the picture's name; nothing for other data."""
    file = folder / TRUTH
    truth = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return {
        name: Scene(
            **said | {"light": tuple(said["light"]), "things": tuple(Thing(**thing) for thing in said["things"])}
        )
        for name, said in truth.items()
    }


def cached_flickr8k(name: str, recipe: Any, count: int, side: int, sample: Callable[..., Scene]) -> Path:
    """Returns the directory of `count` scenes with captions, laid out as Flickr8k; they are drawn if never before."""

    def make(folder: Path) -> None:
        console.print(f"drawing {count} scenes with captions")
        write_flickr8k(folder, range(count), seed=0, side=side, sample=sample)

    return cached_directory(name, recipe, make)


def cached_parquet(name: str, task: str, splits: dict[str, Sequence[int]], side: int) -> Path:
    """Returns the directory of a drawn classification task as parquet files; they are drawn if never before."""
    # Splits are ranges of numbers without gaps: their first and their length say all.
    recipe = {"task": task, "side": side, "splits": {of: [part[0], len(part)] for of, part in splits.items()}}

    def make(folder: Path) -> None:
        console.print(f"drawing {sum(map(len, splits.values())):,} scenes ({TASKS[task].question})")
        write_parquet(folder, task, splits, seed=0, side=side)

    return cached_directory(name, recipe | {"format": 1}, make)


def write_parquet(folder: Path, task: str, splits: dict[str, Sequence[int]], seed: int = 0, side: int = 64) -> None:
    """Writes `SPLIT.parquet` with columns `img` (bytes, path) and `label` (with names), as CIFAR-10 on the hub."""
    folder.mkdir(parents=True, exist_ok=True)
    features = {"img": {"_type": "Image"}, "label": {"names": list(TASKS[task].classes), "_type": "ClassLabel"}}
    schema = pa.schema(
        [("img", pa.struct([("bytes", pa.binary()), ("path", pa.string())])), ("label", pa.int64())],
        metadata={"huggingface": json.dumps({"info": {"features": features}})},
    )
    for name, numbers in splits.items():
        pictures, labels = [], []
        for number in numbers:
            scene, label = TASKS[task].sample(scene_generator(seed, number))
            pictures.append({"bytes": encoded(picture(scene, side)), "path": f"{name}/{number:06d}.png"})
            labels.append(label)
        parquet.write_table(pa.table({"img": pictures, "label": labels}, schema), folder / f"{name}.parquet")


def write_coco(
    folder: Path,
    splits: dict[str, Sequence[int]],
    seed: int = 0,
    side: int = 128,
    category: Callable[[Thing], str] = lambda thing: thing.shape,
    categories: Sequence[str] = tuple(SHAPES),
    wanted: Callable[[Scene], bool] = lambda scene: True,
) -> None:
    """Writes `SPLIT/*.jpg`, `annotations/instances_SPLIT.json` and `captions_SPLIT.json`.

    An instance has its category, box, area, the polygons of what is visible of it and, under `attributes`, its colour,
    texture and size and whether its pairing of shape and colour is `unseen`. Scenes that are not `wanted` (such as
    those with unseen pairings) are left out.
    """
    (folder / "annotations").mkdir(parents=True, exist_ok=True)
    ids = {name: place for place, name in enumerate(categories, 1)}
    for split_name, numbers in splits.items():
        (folder / split_name).mkdir(exist_ok=True)
        images: list[dict[str, Any]] = []
        instances: list[dict[str, Any]] = []
        sentences: list[dict[str, Any]] = []
        for number, scene, texts in captioned_scenes(seed, numbers):
            if not wanted(scene):
                continue
            name = f"{number:012d}.jpg"
            (folder / split_name / name).write_bytes(encoded(picture(scene, side), "jpeg"))
            images.append({"id": number, "file_name": name, "width": side, "height": side})
            for thing, polygons in visible_polygons(scene, side):
                attributes = {name: getattr(thing, name) for name in ("colour", "texture", "size", "unseen")}
                instances.append(
                    {"id": len(instances) + 1, "image_id": number, "category_id": ids[category(thing)], "iscrowd": 0}
                    | _measured(polygons)
                    | {"attributes": attributes}
                )
            for text in texts:
                sentences.append({"id": len(sentences) + 1, "image_id": number, "caption": text})
        shared = {"info": {"description": "drawn scenes", "version": "1"}, "licenses": [], "images": images}
        kinds = [{"id": place, "name": name, "supercategory": "shape"} for name, place in ids.items()]
        for kind, own in (
            ("instances", {"annotations": instances, "categories": kinds}),
            ("captions", {"annotations": sentences}),
        ):
            file = folder / "annotations" / f"{kind}_{split_name}.json"
            file.write_text(json.dumps(shared | own), encoding="utf-8")


def visible_polygons(scene: Scene, side: int) -> Iterator[tuple[Thing, list[Polygon]]]:
    """Yields each thing with the parts of it that nothing in front hides, as polygons without holes, in pixels."""
    frame = box(0, 0, side, side)
    outlines = [Polygon(thing.outline(side)) for thing in scene.things]
    for place, (thing, outline) in enumerate(zip(scene.things, outlines, strict=True)):
        seen = outline.intersection(frame)
        for front in outlines[place + 1 :]:
            seen = seen.difference(front)
        parts = seen.geoms if isinstance(seen, MultiPolygon) else [seen]
        whole = [part for polygon in parts if polygon.area >= LEAST_PIXELS for part in _without_holes(polygon)]
        if whole:
            yield thing, whole


def _without_holes(polygon: Polygon) -> list[Polygon]:
    """Cuts a polygon through each hole: COCO's format holds none."""
    if not polygon.interiors:
        return [polygon]
    x = Polygon(polygon.interiors[0]).centroid.x
    _, low, _, high = polygon.bounds
    halves = split(polygon, scale(LineString([(x, low), (x, high)]), yfact=1.1)).geoms
    return [part for half in halves for part in _without_holes(half)]


def _measured(polygons: Sequence[Polygon]) -> dict[str, Any]:
    left, top, right, bottom = MultiPolygon(polygons).bounds
    corners = [[round(value, 2) for corner in polygon.exterior.coords[:-1] for value in corner] for polygon in polygons]
    return {
        "segmentation": corners,
        "area": round(sum(polygon.area for polygon in polygons), 2),
        "bbox": [round(left, 2), round(top, 2), round(right - left, 2), round(bottom - top, 2)],
    }
