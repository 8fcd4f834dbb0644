"""The changes that CONTRIBUTING shows are made in a copy, and what they add is run."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from random_models import random_gemma
from test_entry_points import LABS, ROOT

from labs_common.scenes.files import write_flickr8k, write_parquet

CHANGES = re.findall(
    r"^```diff\n(.*?)^```", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE
)
SHARED = ["--max-steps", "2", "--track", "none", "--no-report"]
# What CONTRIBUTING names, on small things.
ADDED = {
    "llm_peft_fa.train": "--method norms --model gemma --conversations 40 --test-prompts 2 --max-new-tokens 4",
    "vit_transfer.train": "--model convnext_atto --no-pretrained --image-size 32 --data classes --batch-size 8 --baselines no",
    "caption_lab.train": "--model deep_tell --no-pretrained --data flickr8k --batch-size 8 --watch-pictures 2",
    "clip_lab.train": "--objective even_clip --data flickr8k --image test_vit --no-image-pretrained --text own --image-size 32 --batch-size 8",
    "zsi_contrastive.pretrain": "--method barlow --data classes --batch-size 8 --side 32 --no-probe",
}
# All in one process, as importing the libraries takes longest.
RUN = """import sys
from labs_testing.commands import here
for command in sys.argv[1:]:
    here(*command.split())
"""


def test_a_method_is_added_to_each_lab(tmp_path: Path) -> None:
    assert len(CHANGES) == len(LABS) == len(ADDED)
    for package in (ROOT / "packages").iterdir():
        shutil.copytree(package / "src", tmp_path / "packages" / package.name / "src")
    for change in CHANGES:
        done = subprocess.run(
            ["git", "apply", "-"], input=change, text=True, capture_output=True, cwd=tmp_path, check=False
        )
        assert done.returncode == 0, done.stderr + change
    work = tmp_path / "work"
    (work / "gemma").mkdir(parents=True)
    random_gemma(work / "gemma")
    write_flickr8k(work / "flickr8k", range(40), side=32)
    write_parquet(work / "classes", "texture", {"train": range(40), "validation": range(40, 56), "test": range(56, 72)})
    copies = ":".join(map(str, [*(tmp_path / "packages").glob("*/src"), ROOT / "packages" / "common" / "tests"]))
    commands = [f"{module} {options} {' '.join(SHARED)}" for module, options in ADDED.items()]
    done = subprocess.run([sys.executable, "-c", RUN, *commands], cwd=work, env=os.environ | {"PYTHONPATH": copies},
                          capture_output=True, text=True, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(list((work / "runs").iterdir())) == len(ADDED)
