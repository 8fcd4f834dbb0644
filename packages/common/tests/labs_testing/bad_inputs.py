"""Bad inputs and faults that every training command refuses: exit code 2, one line that names the culprit, no output.

A new command gets them with its line in `COMMANDS`. A row is what is typed and what the line must say; {files} is a
directory with the files below, {whole} a finished run of the command. They are refused before any work, so that all of
a command take some seconds.
"""

import io
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from PIL import Image
from pyarrow import parquet

Rows = dict[str, str]  # what is typed, and what the error must name


@dataclass(frozen=True)
class Names:
    """The kind of a command's data, the option that names its network, and that of a file of weights."""

    data: str
    network: str
    weights: str | None


COMMANDS = {
    "caption_lab.train": Names("captions", "--encoder", "--weights"),
    "clip_lab.train": Names("captions", "--image", "--image-weights"),
    "llm_peft_fa.train": Names("chats", "--model", None),
    "vit_transfer.train": Names("classes", "--model", "--weights"),
    "vit_transfer.distill": Names("classes", "--model", "--weights"),
    "zsi_contrastive.train": Names("coco", "--backbone", "--backbone-weights"),
    "zsi_contrastive.pretrain": Names("classes", "--backbone", None),
}

OPTIONS: Rows = {
    "--no-such-option 1": "--no-such-option",
    "--learnin-rate 1": "--learning-rate",  # what was meant
    "nothing": "nothing",
    "--report maybe": "maybe",
    "--epochs": "--epochs",
    "--epochs -1": "--epochs: must be a whole number at least",
    "--epochs ''": "--epochs: must be a whole number at least",
    "--epochs 1.5": "--epochs: must be a whole number at least",
    "--epochs 1_000": "--epochs: must be a whole number at least",
    "--epochs 0x10": "--epochs: must be a whole number at least",
    "--batch-size 1e3": "--batch-size: must be a whole number at least",
    "--batch-size 1000000000000000000000000000000": "--batch-size: must be a whole number at least",
    "--max-steps 0": "--max-steps: must be a whole number at least 1",
    "--save-every 0": "--save-every: must be a whole number at least 1",
    "--keep 0": "--keep: must be a whole number at least 1",
    "--log-every 0": "--log-every: must be a whole number at least 1",
    "--evaluate-every -1": "--evaluate-every: must be a whole number at least 0",
    "--patience -1": "--patience: must be a whole number at least 0",
    "--seed -1": "--seed: must be a whole number at least 0",
    "--seed 4294967296": "--seed: must be a whole number at least 0 and at most 2147483647",
    "--learning-rate nan": "--learning-rate: must be a number at least 0",
    "--learning-rate=-inf": "--learning-rate: must be a number at least 0",
    "--learning-rate 1e400": "--learning-rate: must be a number at least 0",
    "--warmup 5": "--warmup: must be a number at least 0 and at most 1, not '5'",
    "--weight-decay -2": "--weight-decay: must be a number at least 0",
    "--clip-norm inf": "--clip-norm: must be a number at least 0",
    "--schedule wavy": "--schedule",
    "--precision fp8": "--precision",
    "--precision fp16": "--precision fp16",  # on a CPU
    "--track everything": "--track",
    "--on-bad-data ignore": "--on-bad-data",
}
CONFIGS: Rows = {
    "--config": "--config",
    "--config {files}/missing.yaml": "missing.yaml",
    "--config {files}": "--config",
    "--config {files}/empty.yaml": "empty.yaml",
    "--config {files}/list.yaml": "list.yaml",
    "--config {files}/open.yaml": "open.yaml",
    "--config {files}/bytes.yaml": "bytes.yaml",
    "--config {files}/null.yaml": "null.yaml",
    "--config {files}/object.yaml": "object.yaml",
    "--config {files}/unknown.yaml": "no-such-option",
    "--config {files}/nan.yaml": "nan.yaml: --warmup: must be",
    "--config {files}/text.yaml": "text.yaml: --epochs: must be",
    "--config {files}/choice.yaml": "--precision",
    "--config {files}/group.yaml": "training",
    "--config {files}/bomb.yaml": "bomb.yaml",
    "--config {files}/resume.yaml": "resume",
    "--config {files}/pipe": "pipe",
    "--config /dev/zero": "/dev/zero",
}
RUNS: Rows = {
    "--resume": "--resume",
    "--resume {files}/nowhere": "nowhere",
    "--resume {files}/empty": "config.yaml is missing",
    "--resume {files}/list.yaml": "list.yaml",
    "--resume {files}/broken-run": "broken-run/config.yaml",
    "--resume {files}/other-run": "no-such-option",
    "--resume {whole} --seed 7": "--seed",
    "--resume {whole} --batch-size 3 --learning-rate 2": "--batch-size",
    "--resume {whole} --config {whole}/config.yaml": "--resume",
    "--output {whole}": "--resume {whole}",
    "--output {whole}/config.yaml": "--output",
    "--output {whole}/config.yaml/run": "--output",
    "--output /proc/run": "--output",
    "--output /dev/null/run": "--output",
    f"--output {300 * 'a'}": "--output",
    "--resume {files}/pipe": "pipe",
    "--resume {files}/pipe-run": "pipe-run",
}
CACHES: Rows = {
    "XDG_CACHE_HOME={files}/list.yaml": "set XDG_CACHE_HOME",
    "XDG_CACHE_HOME=/proc/cache": "set XDG_CACHE_HOME",
}
DATA: dict[str, Rows] = {
    "captions": {
        "--data {files}/garbage.parquet": "garbage.parquet",
        "--data {files}/no-header": "no-header",
        "--data {files}/no-pictures": "cut.png",
        "--data {files}/cut-captions": "cut.png",
        "--data {files}/latin": "latin",
        "--data {files}/endless-captions": "endless-captions",
        "--data {files}/pipe-captions": "pipe-captions",
        "--splits {files}/nowhere": "--splits",
        "--limit -1": "--limit: must be a whole number at least 0",
    },
    "classes": {
        "--data {files}/garbage.parquet": "garbage.parquet",
        "--data {files}/numbers.parquet": "numbers.parquet",
        "--data {files}/cut-classes": "cut.png",
        "--data {files}/list.yaml": "list.yaml",
        "--data {files}/pickled": "pickled",
        "--limit -1": "--limit: must be a whole number at least 0",
    },
    "chats": {
        "--data {files}/garbage.parquet": "garbage.parquet",
        "--data {files}/numbers.parquet": "numbers.parquet",
        "--data {files}/empty.jsonl": "empty.jsonl",
        "--data {files}/open.jsonl": "open.jsonl:1",
        "--data {files}/numbers.jsonl": "numbers.jsonl:1",
        "--data {files}/roles.jsonl": "roles.jsonl:1",
        "--data {files}/latin.jsonl": "latin.jsonl",
        "--data {files}/half.jsonl": "half.jsonl:1",
        "--data {files}/digits.jsonl": "digits.jsonl:1",
        "--data {files}/deep.jsonl": "deep.jsonl:1",
        "--data {files}/pipe.jsonl": "pipe.jsonl",
        "--model {files}/code": "code",
        "--model ./nothing/there": "--model ./nothing/there: no such directory",
        "--model {files}/nothing": "/nothing: no such directory",
        "--conversations 0": "--conversations: must be a whole number at least 1",
        "--rank 0": "--rank: must be a whole number at least 1",
        "--dropout 1": "--dropout: must be a number at least 0 and below 1",
    },
    "coco": {
        "--data {files}/list.yaml": "list.yaml",
        "--data {files}/coco-open": "instances_train2017.json",
        "--data {files}/coco-list": "instances_train2017.json",
        "--data {files}/coco-empty": "instances_train2017.json",
        "--data {files}/coco-pipe": "instances_train2017.json",
        "--data {files}/coco-deep": "instances_train2017.json",
        "--split {files}/list.yaml": "list.yaml",
        "--split 50_10": "50_10",
        "--word-vectors {files}/list.yaml": "list.yaml",
        "--word-vectors nowhere.txt": "nowhere.txt",
        "--limit -1": "--limit: must be a whole number at least 0",
    },
}
COCO = "annotations/instances_{}2017.json"
PIPES = ("pipe", "pipe.jsonl", "pipe-run/config.yaml", "pipe-captions/captions.txt",
         *(f"coco-pipe/{COCO.format(part)}" for part in ("train", "val")))  # fmt: skip
FILES = {
    "empty.yaml": b"", "list.yaml": b"- 1\n", "open.yaml": b"a: [", "bytes.yaml": b"epochs: \xff\xfe",
    "null.yaml": b"epochs: \0", "object.yaml": b"epochs: !!python/object/apply:os.getcwd []", "group.yaml": b"training: 3",
    "unknown.yaml": b"no_such_option: 1", "nan.yaml": b"training: {warmup: .nan}", "text.yaml": b"epochs: many",
    "choice.yaml": b"training: {precision: fp8}", "broken-run/config.yaml": b"a: [", "empty/nothing": b"",
    "other-run/config.yaml": b"no_such_option: 1", "garbage.parquet": b"PAR1" + bytes(64),
    "no-header/captions.txt": b"one line\n", "no-pictures/captions.txt": b"image,caption\ncut.png,a thing\n",
    "latin/captions.txt": b"image,caption\ncut.png,caf\xe9\n", "cut-captions/captions.txt": b"image,caption\ncut.png,a\n",
    "pickled/data_batch_1": b"\x80\x04cos\ngetcwd\n(tR.", "pickled/test_batch": b"\x80\x04cos\ngetcwd\n(tR.",
    "bomb.yaml": b"a: &a [1, 1]\n" + b"".join(b"%c: &%c [*%c, *%c]\n" % (n + 1, n + 1, n, n) for n in range(97, 121)),
    "resume.yaml": b"resume: elsewhere",
    "endless-captions/captions.txt": b"image,caption\ncut.png," + 200_000 * b"a",
    "half.jsonl": b'{"messages": [{"role": "user", "content": "\\ud800"}, {"role": "assistant", "content": "a"}]}\n',
    "digits.jsonl": b'{"messages": ' + 5_000 * b"9" + b"}\n", "deep.jsonl": 100_000 * b"[" + b"\n",
    "code/config.json": b'{"model_type": "own", "auto_map": {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own"}}',
    "code/own.py": b"raise SystemExit('this code was run')",
    "empty.jsonl": b"", "open.jsonl": b'{"messages": [', "numbers.jsonl": b"1\n",
    "roles.jsonl": b'{"messages": [{"role": "king", "content": "a"}]}\n', "latin.jsonl": b'{"messages": "caf\xe9"}\n',
    **{f"coco-{kind}/{COCO.format(part)}": text for part in ("train", "val")
       for kind, text in {"open": b"{", "list": b"[]", "empty": b"{}", "deep": 100_000 * b"["}.items()},
}  # fmt: skip


def write_bad_files(folder: Path) -> Path:
    """Writes the files that the rows name, with pictures cut in half."""
    picture = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(picture, "png")
    half = picture.getvalue()[: len(picture.getvalue()) // 2]
    cut = {f"cut-captions/{name}": half for name in ("cut.png", "Images/cut.png")}
    cut |= {f"cut-classes/{part}/{kind}/cut.png": half for part in ("train", "test") for kind in "ab"}
    for name, content in (FILES | cut).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    for name in PIPES:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        os.mkfifo(folder / name)
    parquet.write_table(pa.table({"number": [1, 2]}), folder / "numbers.parquet")
    return folder


def rows_of(module: str) -> Rows:
    """The rows of a command."""
    names = COMMANDS[module]
    network = {f"{names.network} no_such_network": "no_such_network"}
    if names.weights is not None:
        network |= {f"{names.weights} {{files}}/missing.safetensors": names.weights,
                    f"{names.weights} {{files}}/garbage.parquet": names.weights}  # fmt: skip
    anything = {"--data {files}/nowhere": "nowhere", "--data {files}/empty": "empty", "--data ''": "--data"}
    return OPTIONS | CONFIGS | RUNS | CACHES | anything | DATA[names.data] | network
