"""Every command that the documents show is run, with small things under the names that the documents use.

What cannot be had here is put in its place: released weights by random ones, the large by the small. What a document
writes is parsed as it stands first, so that no option of it can be wrong.
"""

import json
import os
import re
import shlex
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
from labs_testing import bad_inputs
from labs_testing.browser import faults_of
from labs_testing.commands import here
from PIL import Image
from random_models import random_gemma
from test_entry_points import MODULES, ROOT, config_type
from transformers import Gemma2Config, LlamaConfig

from labs_common.cli import parse
from labs_common.scenes.files import write_coco, write_flickr8k, write_parquet
from labs_common.scenes.world import Thing

DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("packages/*/README.md")])
BLOCK = re.compile(r"^```sh\n(.*?)^```", re.DOTALL | re.MULTILINE)
INLINE = re.compile(r"`((?:uv run |\w+=\w+ )*(?:python -m|accelerate launch|torchrun) [^`]*)`")
LINK = re.compile(r"\]\(([^)\s:]*)\)")  # without those of the web
EXERCISES = [ROOT / "docs" / "exercises.md", ROOT / "docs" / "fa" / "exercises.md"]
# Commands of the shell that CI runs itself, word for word.
SHELL = {
    "pip install uv", "uv run pytest", ".ci/run", ".ci/package common", "uv run ruff check", "uv run ruff format",
    "uv run mypy", "uv run python -m benchmarks", "uv run python -m benchmarks.gpu", "uv run pytest tests", 'uv run pytest -m "kills or long or pretended or documents" packages tests', ".ci/supply", "uv pip install ./packages/llm_peft_fa", "llm-peft-fa-train --help",
    "git clone URL foundation-labs", "cd foundation-labs",
    "uv run pytest -m quick packages tests/test_house.py", "uv run pytest -m alone", "uvx pre-commit install",  # a part of the above
    # tests/test_launcher.py runs the script.
    "sbatch --nodes=2 --gpus-per-node=8 --time=24:00:00 launch/slurm.sbatch --data cifar-10-batches-py --epochs 20",
}  # fmt: skip
# Each has a test of its own: a comparison starts processes, a page serves until it is stopped, a checkpoint of others.
PARSED_ONLY = ("compare", "ablate", "demo", ".rate", ".convert")
# What makes a documented command small, after its own options. {…} are things that `workplace` makes.
SMALL = {
    "llm_peft_fa.train": "--epochs 1 --max-steps 2 --test-prompts 2 --max-new-tokens 4 --batch-size 4 --learning-rate 1e-3",
    "llm_peft_fa.evaluate": "--test-prompts 2 --max-new-tokens 4",
    "llm_peft_fa.chat": "--max-new-tokens 4",
    "vit_transfer.train": "--no-pretrained --image-size 32 --max-steps 2 --batch-size 8 --baselines no --views 1",
    "vit_transfer.distill": "--no-pretrained --image-size 32 --max-steps 2 --batch-size 8 --baselines no --views 1",
    "vit_transfer.attack": "--used 4 --passes 1 --limit 8",
    "caption_lab.train": "--no-pretrained --image-size 64 --max-steps 2 --batch-size 8 --limit 16 --watch-pictures 2",
    "clip_lab.train": "--no-image-pretrained --image-size 64 --text-width 64 --text-layers 2 --max-steps 2 --batch-size 8 "
    "--limit 16 --chunk 0",
    "clip_lab.evaluate": "--limit 24",
    "clip_lab.probe": "--shots 1,all --draws 1 --limit 24",
    "clip_lab.zero_shot": "--limit 24",
    "zsi_contrastive.train": "--no-backbone-pretrained --min-side 48 --max-side 64 --max-steps 1 --batch-size 1 "
    "--controls 1 --columns trust --limit 4 --kept 5",
    "zsi_contrastive.evaluate": "--controls 1 --columns trust --limit 4 --kept 5",
    "zsi_contrastive.predict": "",
    "zsi_contrastive.prepare": "",
    "zsi_contrastive.words": "--columns trust",
    "zsi_contrastive.pretrain": "--max-steps 2 --epochs 1 --batch-size 8 --side 32 --limit 40 --no-probe --queue 16",
}
# What is offline by default draws or trains something first, for minutes: it gets the small data instead.
OFFLINE = {
    "llm_peft_fa.train": "--model google/gemma-2-2b --conversations 40",
    "vit_transfer.train": "--data cifar-10-batches-py",
    "vit_transfer.distill": "--data cifar-10-batches-py --teacher runs/block-resnet50-1",
    "vit_transfer.attack": "--data cifar-10-batches-py --models runs/block-resnet50-1",
    "caption_lab.train": "--data flickr8k",
    "caption_lab.prepare": "--data flickr8k",
    "clip_lab.train": "--data flickr8k --image resnet18",
    "clip_lab.evaluate": "--data flickr8k",
    "clip_lab.probe": "--data cifar-10-batches-py",
    "clip_lab.zero_shot": "--data cifar-10-batches-py",
    "zsi_contrastive.train": "--data scenes --split scenes",
    "zsi_contrastive.pretrain": "--data cifar-10-batches-py",
}
# Words of the documents, and what stands for them here.
WORDS = {
    "flickr8k-mini": "flickr8k", "runs/transformer-…": "runs/caption_lab", "RN50:openai": "runs/clip_lab",
    "runs/block-resnet50-…": "runs/block-resnet50-1", "resnet101": "resnet18", "resnet50": "resnet18",
    "vit_base_patch32_224": "vit_tiny_patch16_224", "deit_small_patch16_224": "deit_tiny_patch16_224",
    "folder-of-classes": "cifar-10-batches-py",
    "runs/block-resnet50-…,runs/block-deit_small_patch16_224-…": "runs/block-resnet50-1",
    "openai/clip-vit-base-patch32": "runs/clip_lab", "zebra,umbrella": "striped star,dotted moon",
    "runs/NAME": "runs/llm_peft_fa", "universitytehran/SlimOrca": "chats.jsonl", "…": None,
}  # fmt: skip
# An encoder that pre-training left, by the lab that starts from it.
PRETRAINED = {"vit_transfer": "vit_tiny_patch16_224", "zsi_contrastive": "resnet18"}


def lines_of(text: str) -> list[str]:
    """The commands of a document's blocks, one a line, without comments."""
    found: list[str] = []
    for block in BLOCK.findall(text):
        for line in block.replace("\\\n", " ").splitlines():
            found += [part.strip() for part in re.sub(r"(^|\s)# .*$", "", line).split("&&") if part.strip()]
    return found


def module_and_arguments(line: str) -> tuple[str, list[str]] | None:
    """The lab's command in a line of the shell, if there is one."""
    words = shlex.split(line)
    for place, word in enumerate(words[:-1]):
        if word == "-m" and words[place + 1] in MODULES:
            return words[place + 1], words[place + 2 :]
    return None


SHOWN = [(document, line) for document in DOCUMENTS for line in lines_of(document.read_text(encoding="utf-8"))]
IN_TEXT = [(document, line) for document in DOCUMENTS for line in INLINE.findall(document.read_text(encoding="utf-8"))]
COMMANDS = [(module_and_arguments(line), document) for document, line in SHOWN if module_and_arguments(line)]

# The document in which a command is shown last, of those that are run.
RUN = {(found[0], shlex.join(found[1])): document for found, document in COMMANDS
       if found and not found[0].endswith(PARSED_ONLY)}  # fmt: skip
# Cells of the table of memory that are computed always; LABS_FITS=all computes every one, in minutes.
CHEAP = {("full --optimizer adamw_8bit --pure-bf16", "Gemma-2-2B, 16 GB"), ("prompt_tuning", "Llama-3.2-3B, 24 GB"),
         ("full --optimizer adamw_8bit", "Llama-3.2-3B, 24 GB")}  # fmt: skip
LLAMA_3B = LlamaConfig(
    vocab_size=128256, hidden_size=3072, intermediate_size=8192, num_hidden_layers=28, num_attention_heads=24,
    num_key_value_heads=8, head_dim=128, tie_word_embeddings=True, max_position_embeddings=131072,
)  # fmt: skip
# A report is made by the first training of each command, and looked at in a browser below.
REPORTED = dict(reversed(RUN)).items()


def test_the_page_of_promises_has_the_numbers_of_the_table() -> None:
    counts = [len(bad_inputs.rows_of(command)) for command in bad_inputs.COMMANDS]
    assert min(counts) >= 60
    assert (
        f"a table of {min(counts)} to {max(counts)} rows for each of the {len(counts)} training commands, {sum(counts)} "
        "in all: options"
    ) in (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")


def what_fits() -> list[tuple[str, str, str]]:
    """Options, column and cell of the table of what fits 24 and 16 GB."""
    page = (ROOT / "docs" / "llm_peft_fa.md").read_text(encoding="utf-8")
    table = page.partition("## What fits 24 and 16 GB")[2].partition("\n## ")[0]
    lines = [line.strip("|").split("|") for line in table.splitlines() if line.startswith("|")]
    header, _, *rows = ([cell.strip() for cell in line] for line in lines)
    return [(row[0].strip("`"), *cell) for row in rows for cell in zip(header[1:], row[1:], strict=True)]


@pytest.mark.parametrize(
    ("options", "column", "cell"), [one for one in what_fits() if one[:2] in CHEAP or "LABS_FITS" in os.environ]
)
def test_the_table_of_what_fits_is_what_the_plan_prints(options: str, column: str, cell: str, tmp_path: Path) -> None:
    (Gemma2Config() if "Gemma" in column else LLAMA_3B).save_pretrained(tmp_path)  # the former's defaults are the 2B
    (memory,) = re.findall(r", (\d+) GB", column)
    more = ("--precision", "fp16") * (memory == "16")
    asked = ("--plan", "--model", tmp_path, "--method", *options.split(), "--gpu-memory", memory, *more)
    if cell == "needs bf16":
        assert "--pure-bf16: needs --precision bf16" in here("llm_peft_fa.train", *asked, code=2).stderr
        return
    said = here("llm_peft_fa.train", *asked).stdout
    chosen = re.search(r"chosen: --tokens-per-batch (\d+) --(no-)?gradient", said)
    tokens, checkpointed = (int(chosen[1]), chosen[2] is None) if chosen else (512, True)
    (line,) = re.findall(rf"^ *{tokens:,}: .*", said, re.MULTILINE)
    peak = re.findall(r"([\d.]+) GB", line)[3 if checkpointed else 1]
    found = f"{tokens:,} ({peak}){', checkpointed' * checkpointed}" if chosen else f"no ({peak})"
    assert found == cell


def test_the_documents_have_commands() -> None:
    assert len(COMMANDS) > 50
    assert {document.parent.name for _, document in COMMANDS} >= {"clip_lab", "caption_lab", "llm_peft_fa", ROOT.name}


def test_what_is_no_command_of_a_lab_is_run_by_ci() -> None:
    others = {line for _, line in SHOWN if module_and_arguments(line) is None and not line.startswith("echo ")}
    scripts = {line for line in others if line.startswith("uv run python benchmarks/")}
    assert others - scripts <= SHELL
    assert all((ROOT / line.split()[3]).is_file() for line in scripts)


@pytest.mark.parametrize(("document", "line"), [*SHOWN, *IN_TEXT])
def test_every_command_is_parsed(document: Path, line: str) -> None:
    found = module_and_arguments(line)
    if found is None:
        assert not re.search(r"-m (?!benchmarks|quick|alone|labs_common\.report)\w", line), (
            f"{document.name}: there is no such command: {line}"
        )
        return
    module, arguments = found
    values = [argument for argument in arguments if argument not in ("--config",)]
    configs = [place for place, argument in enumerate(arguments) if argument == "--config"]
    for place in configs:
        assert list(ROOT.glob(f"**/{arguments[place + 1]}")), f"{document.name}: no file {arguments[place + 1]}"
        values.remove(arguments[place + 1])
    parse(config_type(module), module, [value for value in values if value != "…"])
    for launch in re.findall(r"--config_file (\S+)", line):
        assert list(ROOT.glob(launch)) or list(ROOT.glob(f"packages/*/{launch}")), f"{document.name}: no file {launch}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: str(document.relative_to(ROOT)))
def test_every_link_leads_somewhere(document: Path) -> None:
    for link in LINK.findall(document.read_text(encoding="utf-8")):
        name, _, anchor = link.partition("#")
        file = document.parent / name if name else document
        assert file.exists(), f"{link}: no such file"
        if anchor and file.suffix == ".md":
            titles = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.MULTILINE)
            # As GitHub makes anchors of headings.
            assert anchor in [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles], link


def questions(page: Path) -> list[tuple[str, str]]:
    """The lines with command and report of a page of questions, each with its answer."""
    parts = re.split(r"^### .*\n", page.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]
    return [(part.partition("\n")[0], part.partition("\n")[2].partition("\n## ")[0]) for part in parts]


def figures_in(answer: str) -> list[str]:
    """The numbers of an answer, without code, formulas and links, digits of Persian as those of English."""
    plain = re.sub(r"<code.*?</code>|`[^`]*`|\$\$.*?\$\$|\$[^$]*\$|\]\([^)]*\)", "", answer, flags=re.DOTALL)
    plain = plain.translate(str.maketrans("۰۱۲۳۴۵۶۷۸۹٫٬", "0123456789.,"))
    return sorted(re.findall(r"\d+(?:[.,]\d+)*", plain))


def test_sections_that_answer_questions_are_in_the_reports() -> None:
    sources = dict.fromkeys(("common", *(module.partition(".")[0] for module in MODULES)), "")
    for package in sources:
        files = ROOT.glob(f"packages/{package}/src/**/*.py")
        sources[package] = "".join(file.read_text(encoding="utf-8") for file in files)
    for line, _ in questions(EXERCISES[0]):
        (lab,) = set(re.findall(r"-m (\w+)", line))
        for title in re.findall(r"\*([^*]+)\*", line):
            assert f'"{title}"' in sources[lab] + sources["common"], f"{line}: no report has a section {title}"


def test_questions_are_the_same_in_both_languages() -> None:
    english, persian = map(questions, EXERCISES)
    assert len(english) == len(persian) > 40
    for (line, answer), (its, translated) in zip(english, persian, strict=True):
        for part in (r"`([^`]+)`", r"\*([^*]+)\*"):
            assert re.findall(part, line) == re.findall(part, its), its
        assert figures_in(answer) == figures_in(translated), its


@pytest.mark.parametrize("document", sorted(ROOT.glob("docs/fa/*.md")), ids=lambda document: document.stem)
def test_persian_begins_from_the_right(document: Path) -> None:
    """GitHub gives a paragraph the direction of its first letter: one that begins in Latin would run from the left."""
    text = re.sub(
        r"^```.*?^```$|^\$\$.*?\$\$$", "", document.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE
    )
    for paragraph in re.split(r"\n{2,}", text):
        if not paragraph.startswith(("<", "|")):
            first = re.search(r"[^\W\d_]", re.sub(r"<code.*?</code>", "", paragraph))
            assert first is None or "\u0600" <= first[0] <= "\u06ff", paragraph


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory in which the documents' names exist."""
    folder = tmp_path_factory.mktemp("workplace")
    (folder / "google" / "gemma-2-2b").mkdir(parents=True)
    random_gemma(folder / "google" / "gemma-2-2b")
    write_flickr8k(folder / "flickr8k", range(40), side=32)
    parts = {"train": range(40), "validation": range(40, 56), "test": range(56, 80)}
    write_parquet(folder / "cifar-10-batches-py", "texture", parts, seed=0, side=32)
    names = [
        *json.loads(split("48_17"))["seen"],
        *json.loads(split("48_17"))["unseen"],
        *json.loads(split("65_15"))["seen"],
    ]
    names = list(dict.fromkeys([*names, *json.loads(split("65_15"))["unseen"]]))
    words = sorted({word for name in names for word in [name, *name.split()]})

    shown = ["person", "dog", names[-1], "car"]  # seen and unseen ones of each split

    def category(thing: Thing) -> str:
        return shown[(ord(thing.shape[0]) + ord(thing.texture[0])) % len(shown)]

    write_coco(folder / "coco", {"train2017": range(16), "val2017": range(100, 116)}, 0, 48, category, names)
    from zsi_contrastive.detector.annotations import scenes_split
    from zsi_contrastive.detector.data import category as own_category

    write_coco(
        folder / "scenes", {"train": range(16), "val": range(16, 32)}, 0, 48, own_category, scenes_split().classes
    )
    (folder / "my_72_8.json").write_text(json.dumps({"seen": names[:72], "unseen": names[72:80]}))
    chance = np.random.default_rng(0)
    glove = [f"{word.replace(' ', '-')} {' '.join(f'{x:.3f}' for x in chance.normal(size=300))}" for word in words]
    (folder / "glove.6B.300d.txt").write_text("\n".join(glove))
    np.savetxt(folder / "word_w2v_withbg_48_17.txt", chance.normal(size=(300, 66)), fmt="%.5f", delimiter=",")
    found = {"image_id": 100, "category_id": 1, "bbox": [1.0, 1.0, 20.0, 20.0], "score": 0.9}
    (folder / "their_results.segm.json").write_text(json.dumps([found]))
    for name in ("photo.jpg", "dog.jpg", "photos/one.jpg", "photos/two.jpg", "holiday/three.jpg", "more/four.png",
                 "my_pictures/five.png"):  # fmt: skip
        (folder / name).parent.mkdir(exist_ok=True)
        Image.fromarray(chance.integers(0, 255, (40, 50, 3), dtype=np.uint8)).save(folder / name)
    rows = [{"instruction": f"عدد {number} چند است؟", "output": str(number)} for number in range(40)]
    for name in ("chats.jsonl", "held_out.jsonl", "test.jsonl"):
        (folder / name).write_text("\n".join(json.dumps(row) for row in rows))
    (folder / "news.txt").write_text("تهران پایتخت ایران است.\n")
    for link in ("packages", "docs", "benchmarks"):
        (folder / link).symlink_to(ROOT / link)
    for launch in ("launch", "configs"):
        (folder / launch).symlink_to(ROOT / "packages" / "zsi_contrastive" / launch)
    return folder


def text_tower(folder: Path, tokenizer: Path) -> None:
    """A small BERT with random weights."""
    from transformers import BertConfig, BertModel

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    BertModel(BertConfig(vocab_size=400, bos_token_id=2, eos_token_id=3, pad_token_id=0, **sizes)).save_pretrained(
        folder
    )
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tokenizer / name, folder / name)


def split(name: str) -> str:
    return (ROOT / f"packages/zsi_contrastive/src/zsi_contrastive/detector/classes/{name}.json").read_text()


@pytest.fixture(scope="module")
def finished(workplace: Path) -> Path:
    """A finished run of each lab, from which other commands go on."""
    before = Path.cwd()
    os.chdir(workplace)
    try:
        for module, name, more in (
            ("llm_peft_fa.train", "llm_peft_fa", ""),
            ("vit_transfer.train", "block-resnet50-1", "--model tiny-cnn"),
            ("caption_lab.train", "caption_lab", "--model transformer"),
            ("clip_lab.train", "clip_lab", "--image test_vit --no-image-pretrained --text own --image-size 32"),
            ("zsi_contrastive.train", "zsi_contrastive", "--split scenes"),
            *(("zsi_contrastive.pretrain", name, f"--backbone {name}") for name in PRETRAINED.values()),
        ):
            arguments = f"{OFFLINE[module]} {SMALL[module]} {more} --no-report --track none --output runs/{name}"
            here(module, *shlex.split(arguments))
        text_tower(workplace / "bert-base-uncased", workplace / "runs" / "clip_lab" / "model")
    finally:
        os.chdir(before)
    return workplace


@pytest.mark.parametrize(
    ("module", "arguments", "document"),
    [(module, shlex.split(words), document) for (module, words), document in RUN.items()],
)
def test_every_command_runs(
    module: str, arguments: list[str], document: Path, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(finished)
    lab = module.partition(".")[0]
    asked = [WORDS.get(argument, argument) for argument in arguments]
    words = offline(module, [argument for argument in asked if argument])
    small = SMALL.get(module, "")
    if lab in PRETRAINED and any("runs/NAME/" in word for word in words):
        words = [word.replace("NAME", PRETRAINED[lab]).replace("resnet50", PRETRAINED[lab]) for word in words]
    if "--start" in words:  # brings its own encoder
        small = small.replace("--no-pretrained --image-size 64", "")
    if "…" in arguments:
        small += " --split 48_17 --word-vectors word_w2v_withbg_48_17.txt"
    words += shlex.split(small)
    if "--to" in words or module.endswith((".train", ".pretrain", ".distill", ".attack", ".prepare")):
        words += ["--output", tempfile.mkdtemp(dir=finished) + "/run"]
    if module.endswith((".train", ".pretrain", ".distill")):
        words += ["--track", "none"]
        words += [] if (module, shlex.join(arguments)) in REPORTED else ["--no-report"]
    done = here(module, *words, typed="سلام\n/quit\n" if module.endswith(".chat") else "")
    assert "Traceback" not in done.stderr


def offline(module: str, words: list[str]) -> list[str]:
    """The words with small data, unless they name some, and with the finished run in the place of the newest."""
    flags = shlex.split(OFFLINE.get(module, ""))
    for flag, value in zip(flags[::2], flags[1::2], strict=True):
        if flag not in words:
            words = [*words, flag, value]
    lab = module.partition(".")[0]
    if module in ("clip_lab.retrieve", "clip_lab.probe", "clip_lab.zero_shot", "clip_lab.export", "clip_lab.evaluate", "caption_lab.evaluate",
                  "caption_lab.caption", "zsi_contrastive.predict", "zsi_contrastive.evaluate") and not (
        {"--checkpoint", "--results"} & set(words)
    ):  # fmt: skip
        words = [*words, "--checkpoint", f"runs/{lab}"]
    if module == "llm_peft_fa.chat":
        words = [*words, "--checkpoint", f"runs/{lab}"]
    return words


def test_reports_stand_in_a_browser(finished: Path) -> None:
    """All that the commands above have left, on a phone and a desk, light and dark, and printed."""
    reports = sorted(finished.rglob("report.html"))
    assert len(reports) > 10 or "PYTEST_XDIST_WORKER" not in os.environ
    assert faults_of(reports, every=False) == []
