"""Word vectors of every kind, which column is which, and what the order of neighbours changes when they are refined."""

import gzip
import shutil
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from labs_testing.damage import OWN_CODE, cut, edited, hostile, without
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from labs_common.errors import LabError
from zsi_contrastive.detector.annotations import PUBLISHED, Split, coco_groups, read_instances, read_split
from zsi_contrastive.detector.columns import checked_order, neighbours
from zsi_contrastive.detector.pictures import instance_pictures
from zsi_contrastive.detector.vectors import (
    AGGREGATES,
    PROMPTS,
    attribute_vectors,
    check_same_space,
    neighbour_graph,
    read_class_vectors,
    read_vocabulary,
    refined,
    word_vectors,
)

COCO = [name for names in coco_groups().values() for name in names]
torch.manual_seed(0)  # of the graph below
STATES, OWN, OTHERS = torch.randn(7, 4), torch.randn(4, 3), torch.randn(4, 3)
GRAPH = (torch.rand(7, 7) < 0.4).float().fill_diagonal_(0)
ORDER = torch.randperm(7)


def drawn(classes: tuple[str, ...], length: int = 30) -> torch.Tensor:
    """Vectors in which classes of a supercategory are alike."""
    generator = torch.Generator().manual_seed(0)
    centres = {group: torch.randn(length, generator=generator) for group in coco_groups()}
    group_of = {name: group for group, names in coco_groups().items() for name in names}
    own = {name: torch.randn(length, generator=generator) for name in COCO}
    return torch.stack([centres[group_of[name]] + own[name] for name in classes])


def write_matrix(file: Path, rows: torch.Tensor) -> Path:
    np.savetxt(file, torch.cat([rows.mean(0)[None], rows]).T.numpy(), delimiter=",")
    return file


def test_columns_in_the_right_order_are_believed(tmp_path: Path) -> None:
    for name in PUBLISHED:
        split = read_split(name)
        vectors = read_class_vectors(str(write_matrix(tmp_path / "m.txt", drawn(split.classes))), split)
        assert vectors.by_column
        torch.testing.assert_close(vectors.classes, drawn(split.classes))
        assert "fit the names" in checked_order(vectors.classes, split, "m.txt").verdict


def test_columns_in_another_order_are_refused() -> None:
    split = read_split("48_17")
    by_id = sorted(split.seen, key=COCO.index) + sorted(split.unseen, key=COCO.index)
    with pytest.raises(LabError, match="in the order of COCO's category ids"):
        checked_order(drawn(tuple(by_id)), split, "m.txt")
    with pytest.raises(LabError, match="one column"):
        checked_order(drawn(split.classes).roll(1, 0), split, "m.txt")
    shuffled = drawn(split.classes)[torch.randperm(65, generator=torch.Generator().manual_seed(1))]
    with pytest.raises(LabError, match="do not fit"):
        checked_order(shuffled, split, "m.txt")
    mine = Split("mine", ("unicorn", "dragon"), ("elf",))
    assert "cannot be checked" in checked_order(torch.randn(3, 4), mine, "m.txt").verdict


@pytest.mark.parametrize(
    ("name", "columns"),
    [
        ("48_17", {"person": 1, "truck": 5, "toothbrush": 39, "train": 40, "bear": 41, "toilet": 46, "toaster": 48,
                   "bus": 49, "airplane": 63, "snowboard": 65}),
        ("65_15", {"person": 1, "bus": 5, "truck": 6, "toothbrush": 65, "airplane": 66, "hair drier": 80}),
    ],
)  # fmt: skip
def test_labels_are_columns_whatever_the_ids_are(
    name: str, columns: dict[str, int], coco: Path, coco_vectors: Path
) -> None:
    """COCO's ids are in another order than the columns: train has id 7, and is the 40th seen class of 48/17."""
    split, file = read_split(name), coco_vectors / f"word_w2v_withbg_{name}.txt"
    whole = read_instances(coco / "annotations" / "instances_train2017.json")
    ids = {row["name"]: row["id"] for row in whole.categories}
    box = {"bbox": [1, 1, 6, 6], "segmentation": [[1, 1, 7, 1, 7, 7, 1, 7]], "iscrowd": 0, "image_id": 1}
    part = replace(whole, images=[{"id": 1, "file_name": "x", "width": 9, "height": 9}],
                   annotations=[{**box, "category_id": ids[one]} for one in columns])  # fmt: skip
    labels = instance_pictures(part, (Path("x"),), split.classes).target(0)["labels"].tolist()
    assert labels == list(columns.values())
    vectors = read_class_vectors(str(file), split)
    matrix = np.loadtxt(file, delimiter=",", dtype=np.float32)
    rows = torch.cat([vectors.background[None], vectors.classes]).numpy()
    np.testing.assert_array_equal(rows[labels], matrix[:, list(columns.values())].T)


def test_the_reference_files_are_in_the_splits_order(coco_vectors: Path) -> None:
    both = {}
    for name in PUBLISHED:
        split = read_split(name)
        file = coco_vectors / f"word_w2v_withbg_{name}.txt"
        vectors = read_class_vectors(str(file), split)
        assert vectors.seen.shape == (len(split.seen), 300)
        assert checked_order(vectors.classes, split, str(file)).excess > 20
        near = dict(zip(split.classes, neighbours(vectors.classes, split.classes), strict=True))
        assert near["cat"][0][0] == "dog"
        assert near["snowboard"][0][0] == "skis"
        both[name] = dict(zip(split.classes, vectors.classes, strict=True)), vectors
    one, other = both["48_17"][0], both["65_15"][0]
    assert all(torch.allclose(one[name], other[name], atol=1e-6) for name in one), "both files agree by name"
    # What background's vector was made of: the mean of all 80 classes.
    torch.testing.assert_close(both["65_15"][1].classes.mean(0), both["65_15"][1].background, atol=1e-6, rtol=0)
    torch.testing.assert_close(both["48_17"][1].background, both["65_15"][1].background)


@pytest.mark.parametrize("form", ["glove", "fasttext", "gzip"])
def test_text_files(form: str, tmp_path: Path) -> None:
    split = Split("mine", ("cat", "hot dog", "sports ball"), ("teddy bear",))
    rows = {"cat": [3.0, 4.0], "hot": [1.0, 0.0], "dog": [0.0, 1.0], "sports_ball": [0.0, 2.0], "bear": [5.0, 0.0]}
    text = "".join(f"{word} {a} {b}\n" for word, (a, b) in rows.items())
    if form == "fasttext":
        text = f"{len(rows)} 2\n" + text
    file = tmp_path / ("vectors.vec.gz" if form == "gzip" else "vectors.txt")
    file.write_bytes(gzip.compress(text.encode()) if form == "gzip" else text.encode())
    found = read_class_vectors(str(file), split)
    half = 0.5**0.5
    expected = torch.tensor([[0.6, 0.8], [half, half], [0.0, 1.0], [1.0, 0.0]])
    torch.testing.assert_close(found.classes, expected)
    torch.testing.assert_close(found.background, expected.mean(0))
    assert [note.split(":")[0] for note in found.notes] == ["hot dog", "teddy bear"]
    assert not found.by_column
    if form != "gzip":
        torch.testing.assert_close(read_class_vectors(f"{form}:{file}", split).classes, expected)
    with pytest.raises(LabError, match="no vector for unicorn, elf"):
        word_vectors(str(file), ["cat", "unicorn", "elf"])


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIP of transformers in its real form, small and with random weights; its tokenizer knows letters alone."""
    folder = tmp_path_factory.mktemp("clip")
    letters = [chr(code) for code in range(33, 127)]
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    CLIPTokenizer({word: place for place, word in enumerate(words)}, []).save_pretrained(folder)
    torch.manual_seed(0)
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {**small, "vocab_size": len(words), "bos_token_id": len(words) - 2, "eos_token_id": len(words) - 1}
    pictures = {**small, "image_size": 8, "patch_size": 4}
    CLIPModel(CLIPConfig(text_config=text, vision_config=pictures, projection_dim=12)).save_pretrained(folder)
    return folder


def test_texts_of_a_clip(clip: Path) -> None:
    """Each prompt read alone, without padding, by transformers: unit mean of unit features, less the seen mean."""
    model, tokenizer = CLIPModel.from_pretrained(clip).eval(), CLIPTokenizer.from_pretrained(clip)

    def by_hand(name: str) -> np.ndarray:
        rows = []
        for prompt in PROMPTS:
            with torch.no_grad():
                ids = tokenizer(prompt.format(name), return_tensors="pt")["input_ids"]
                pooled = model.text_model(ids).pooler_output.numpy()[0]
            row = model.text_projection.weight.detach().numpy() @ pooled
            rows.append(row / np.linalg.norm(row))
        return np.mean(rows, 0) / np.linalg.norm(np.mean(rows, 0))

    split = Split("mine", ("cat", "hot dog"), ("a giraffe",))
    expected = np.stack([by_hand(name) for name in split.classes])
    raw, _ = word_vectors(f"clip:{clip}", split.classes)
    np.testing.assert_allclose(raw, expected, atol=1e-5)
    found = read_class_vectors(f"clip:{clip}", split)
    mean = expected[:2].mean(0)
    centred = (expected - mean) / np.linalg.norm(expected - mean, axis=1, keepdims=True)
    np.testing.assert_allclose(found.classes, centred, atol=1e-4)
    np.testing.assert_allclose(found.background, mean / np.linalg.norm(mean), atol=1e-5)
    assert float(found.classes[0] @ found.classes[2]) < 0.9, "other words point elsewhere"
    # A word of later, and another split of the same run, are measured from the same mean.
    torch.testing.assert_close(word_vectors(f"clip:{clip}", ["cat"], found.mean)[0], found.seen[:1])
    other = read_class_vectors(f"clip:{clip}", Split("other", ("a giraffe", "cat"), ("elf",)), found)
    torch.testing.assert_close(other.seen, torch.stack([found.unseen[0], found.seen[0]]))
    with pytest.raises(LabError, match="has one seen class"):
        read_class_vectors(f"clip:{clip}", Split("one", ("cat",), ("elf",)))


def test_models_that_are_no_clip(clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever its files say: no code of theirs runs, and no weight is random."""
    with pytest.raises(LabError, match="cannot be loaded"):
        word_vectors("clip:no/such-model", ["cat"])
    with pytest.raises(LabError, match="take the texts of a CLIP"):
        word_vectors("encoder:any", ["cat"])
    weights = "model.safetensors"
    for place, (damage, said) in enumerate(
        (
            (edited("config.json", model_type="mine", auto_map=OWN_CODE), "code of its own"),
            (edited("config.json", auto_map=OWN_CODE), None),
            (edited("config.json", model_type="clip_text_model"), "projects no texts|cannot be loaded|lack"),
            (without(weights, "text_projection"), "lack text_projection.weight"),
            (cut(weights), "model.safetensors is truncated"),
            (cut("tokenizer.json"), "tokenizer.json: is not JSON"),
            (cut("config.json"), "config.json: is not JSON"),
        )
    ):
        folder = tmp_path / str(place) / "model"
        shutil.copytree(clip, folder)
        ran = hostile(folder, monkeypatch)
        damage(folder)
        with pytest.raises(LabError, match=said) if said else nullcontext():
            word_vectors(f"clip:{folder}", ["cat"])
        assert not ran.exists()


def test_noisy_words_of_drawn_things() -> None:
    """Words that are shared make names alike, less than attributes say; a name is the same in any order of words."""
    rows, _ = word_vectors("noisy", ["striped circle", "circle striped", "striped square", "dotted heart"])
    assert rows.shape == (4, 300)
    torch.testing.assert_close(rows.norm(dim=1), torch.ones(4))
    cosines = rows @ rows.T
    assert cosines[0, 1] == pytest.approx(1)
    assert 0.2 < cosines[0, 2] < 0.45, "1/2 by attributes, 1/3 with noise"
    assert abs(cosines[0, 3]) < 0.2
    with pytest.raises(LabError, match="furry circle"):
        word_vectors("noisy", ["furry circle"])


def test_broken_files(tmp_path: Path) -> None:
    split = Split("mine", ("cat", "dog"), ("elf",))
    file = tmp_path / "v.txt"
    for content, said in (
        ("1,2,3,4,5\n", "row 1 has 5 columns; the split mine needs 4"),
        ("1,2,3,4\n1,2,3\n", "row 2 has 3 columns"),
        ("1,2,3,4\n1,2,x,3\n", "line 2"),
        ("1,2,3,4\n1,2,nan,3\n", "not a number"),
        ("1,2,3,0\n1,2,3,0\n", "the vector of elf has the length 0.0"),
        ("cat 1 2\ndog 1e39 2\nelf 1 2\n", "the vector of dog has the length nan"),
        ("cat 1 2\ndog 1\n", "cannot be read"),
        ("cat 1 two\n", "cannot be read"),
        ("", "cannot be read|no vector"),
    ):
        file.write_text(content)
        with pytest.raises(LabError, match=said):
            read_class_vectors(str(file), split)
    file.write_bytes(b"3 4\ncat \x00\x01\x02 1 1")
    with pytest.raises(LabError, match=r"binary|not a word"):
        read_class_vectors(str(file), split)
    with pytest.raises(LabError, match="no such file"):
        read_class_vectors(str(tmp_path / "nowhere.txt"), split)


def test_a_download_that_was_cut_off_or_damaged_is_named(tmp_path: Path) -> None:
    file = tmp_path / "v.txt.gz"
    whole = gzip.compress(b"cat 1 2 3\ndog 4 5 6\n" * 2000)
    flipped = bytearray(whole)
    flipped[20] ^= 255
    for content in (whole[: len(whole) // 2], bytes(flipped), b"cat 1 2 3"):
        file.write_bytes(content)
        for read in (
            lambda: word_vectors(str(file), ["cat", "elf"]),
            lambda: read_vocabulary(file, 3),
            lambda: read_class_vectors(str(file), Split("mine", ("cat",), ("dog", "elf"))),
        ):
            with pytest.raises(LabError, match=r"v\.txt\.gz: cannot be read .*; download it again"):
                read()


def test_vocabulary(tmp_path: Path) -> None:
    matrix = tmp_path / "tags.txt"
    np.savetxt(matrix, np.arange(12.0).reshape(3, 4), delimiter=",")
    assert read_vocabulary(matrix, 3).tolist() == np.arange(12.0).reshape(3, 4).T.tolist()
    with pytest.raises(LabError, match="each must have 5"):
        read_vocabulary(matrix, 5)
    with pytest.raises(LabError, match="no such file"):
        read_vocabulary(tmp_path / "no", 3)


def test_attributes_also_of_words_never_listed() -> None:
    rows = attribute_vectors(["striped circle", "striped square", "circle"])
    half = 0.5**0.5
    torch.testing.assert_close(rows @ rows.T, torch.tensor([[1.0, 0.5, half], [0.5, 1.0, 0.0], [half, 0.0, 1.0]]))
    with pytest.raises(LabError, match="furry circle"):
        attribute_vectors(["furry circle"])


def test_vectors_of_another_space_are_refused() -> None:
    known = {"cat": torch.tensor([1.0, 0.0]), "dog": torch.tensor([0.0, 1.0])}
    check_same_space(known, ["cat", "elf"], torch.tensor([[2.0, 0.0], [0.5, 0.5]]))
    with pytest.raises(LabError, match="dog has another vector"):
        check_same_space(known, ["cat", "dog"], torch.tensor([[1.0, 0.0], [1.0, 0.2]]))
    with pytest.raises(LabError, match="cat has another vector"):
        check_same_space(known, ["cat"], torch.ones(1, 3))


def propagated(
    graph: torch.Tensor, states: torch.Tensor, own: torch.Tensor, of_neighbours: torch.Tensor, how: str
) -> torch.Tensor:
    """A layer H' = tanh(H W + agg(A, H) W') (n, e) on a square graph (n, n), states (n, d), weights (d, e)."""
    return torch.tanh(states @ own + AGGREGATES[how](graph, states) @ of_neighbours)


@pytest.mark.quick
@pytest.mark.parametrize("how", AGGREGATES)
def test_layers_are_equivariant(how: str) -> None:
    p = torch.eye(7)[ORDER]
    found = propagated(p @ GRAPH @ p.T, p @ STATES, OWN, OTHERS, how)
    torch.testing.assert_close(found, p @ propagated(GRAPH, STATES, OWN, OTHERS, how))


@pytest.mark.quick
@pytest.mark.parametrize("how", AGGREGATES)
def test_aggregates_do_not_depend_on_the_order_of_neighbours(how: str) -> None:
    torch.testing.assert_close(AGGREGATES[how](GRAPH[:, ORDER], STATES[ORDER]), AGGREGATES[how](GRAPH, STATES))
    for node in range(7):
        members = STATES[GRAPH[node] > 0]
        expected = {
            "none": torch.zeros(4),
            "sum": members.sum(0),
            "mean": members.mean(0),
            "max": members.amax(0) if len(members) else None,
        }
        if len(members):
            torch.testing.assert_close(AGGREGATES[how](GRAPH, STATES)[node], expected[how])


@pytest.mark.quick
def test_a_weight_for_each_neighbours_place_breaks_it() -> None:
    """The counter-example: a node that weighs its first neighbour otherwise than its second."""
    weights = torch.arange(1.0, 8.0)

    def by_place(graph: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        return torch.tanh(states @ OWN + (graph * weights) @ states @ OTHERS)

    p = torch.eye(7)[ORDER]
    found = by_place(p @ GRAPH @ p.T, p @ STATES)
    assert not torch.allclose(found, p @ by_place(GRAPH, STATES), atol=1e-2)


@pytest.mark.quick
def test_refined_vectors() -> None:
    seen, unseen = torch.randn(9, 5), torch.randn(4, 5)
    graph = neighbour_graph(unseen, torch.cat([seen, unseen]), 3)
    assert graph.sum(1).tolist() == [3.0] * 4
    assert graph[:, 9:].diagonal().sum() == 0, "nobody is its own neighbour"
    for how in AGGREGATES:
        torch.testing.assert_close(refined(unseen, seen, how, 3, 0.0), unseen)
        found = refined(unseen, seen, how, 3, 0.4)
        torch.testing.assert_close(found.norm(dim=1), unseen.norm(dim=1))
        order = torch.randperm(4)
        torch.testing.assert_close(refined(unseen[order], seen, how, 3, 0.4), found[order])
        torch.testing.assert_close(refined(unseen, seen[torch.randperm(9)], how, 3, 0.4), found)
    one = refined(unseen, seen, "mean", 2, 0.5)[0]
    everything = torch.cat([seen, unseen])
    cosines = torch.cosine_similarity(unseen[:1], everything)
    cosines[9] = -2
    mixed = 0.5 * unseen[0] + 0.5 * everything[cosines.topk(2).indices].mean(0)
    torch.testing.assert_close(one, mixed / mixed.norm() * unseen[0].norm())
