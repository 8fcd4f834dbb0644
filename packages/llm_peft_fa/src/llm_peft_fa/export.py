"""Writes a result for others: `python -m llm_peft_fa.export runs/NAME --to merged`."""

from llm_peft_fa import commands

if __name__ == "__main__":  # before the imports below: --help and a wrong option answer at once
    commands.export()

import json
import re
import shutil
from pathlib import Path

from huggingface_hub import EvalResult, HfApi, ModelCard, ModelCardData, get_token
from huggingface_hub.utils import validate_repo_id
from peft import PeftConfig

from labs_common.errors import LabError, json_of, reason_of
from labs_common.lock import check_new, new_folder
from labs_common.run import written_whole
from llm_peft_fa.base import load_tokenizer
from llm_peft_fa.config import ExportConfig, SubjectOptions
from llm_peft_fa.methods import METHODS
from llm_peft_fa.saved import FOUR_BITS, READ, Subject, adapter_config, file_of, subject_of, write_merged
from llm_peft_fa.templates import stands_alone

TEMPLATE = "chat_template.jinja"  # as transformers names it
HUB_ID = r"[\w.-]+/[\w.-]+"
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM's --max-lora-rank takes (its config/lora.py)
SCORES = {"exact match": "exact_match", "chrF": "chrf", "validation loss": "loss"}  # and their names on the hub
# The same for both languages: what it is, data, scores, use, licence.
TEXT = """\
# {name}

{base} fine-tuned on conversations by {method} with llm_peft_fa of Foundation Labs.

**Method.** {description}.

**Data.** {data}.

**Scores** on {validation}, before and after:

{scores}

**Use.** {use}

**Licence.** {licence} What is made from a model is bound by its licence: read it before you pass this on.

<div dir="rtl" lang="fa">

# {name} به فارسی

این مدل از آموزش تکمیلی <bdi>{base}</bdi> روی گفت‌وگوها به روش <bdi>{method}</bdi>
با <bdi>llm_peft_fa</bdi> به دست آمده است.

**داده.** <bdi>{data}</bdi>

**نتیجه** روی دادهٔ کنار گذاشته، پیش و پس از آموزش: در جدول بالا.

**کاربرد.** دستورهای بالا مدل را اجرا می‌کنند؛ گفت‌وگو را با قالب گفت‌وگوی همین توکن‌ساز بفرستید.

**پروانه.** {licence_fa} پروانهٔ مدل پایه بر هر چه از آن ساخته شود حاکم است؛ پیش از انتشار آن را بخوانید.

</div>
"""


def export(config: ExportConfig) -> None:
    """Writes the merged model or the adapter with a model card, and pushes it if asked.

    Raises:
        LabError: there is no such result, it has no such form, the directory exists, or the hub refuses.
    """
    check_new(config.output)
    subject = subject_of(SubjectOptions(checkpoint=config.checkpoint))
    token = check_export(config, subject)
    whole = not subject.adapted or config.merge or config.to == "merged"
    folder = config.output or Path(subject.source).parent / f"exported-{'model' if whole else 'adapter'}"
    new_folder(folder, folder)  # locked: another export may be on its way there
    with written_whole(folder) as part:
        if subject.adapted and whole:
            assert subject.base is not None
            write_merged(Path(subject.source), subject.base, subject.quantized, part)
        else:
            for file in (file for kind in READ for file in Path(subject.source).glob(kind)):
                shutil.copy(file, part)  # and no optimizers or pickled arguments that others keep there
            if subject.adapted and subject.quantized:
                (part / FOUR_BITS).write_text(json.dumps({"base_in_4_bits": True}) + "\n", encoding="utf-8")
        if subject.trained:  # servers know nothing of --thinking
            template = stands_alone(load_tokenizer(str(part)))
            (part / TEMPLATE).write_text(template, encoding="utf-8")
        card = model_card(subject, whole, config.repo or str(folder), (part / TEMPLATE).is_file())
        (part / "README.md").write_text(str(card), encoding="utf-8")
    print(f"written: {folder}")
    if token is not None:
        assert config.repo is not None
        print(f"pushed: {push(folder, config.repo, config.private, token)}")


def check_export(config: ExportConfig, subject: Subject) -> str | None:
    """Refuses what cannot be written, and returns the token for the hub if that is asked for.

    Raises:
        LabError: the result has no such form, or repository or token are missing.
    """
    if config.to == "adapter" and not subject.adapted:
        raise LabError(f"--to adapter: {subject.name} is a whole model; take --to merged")
    prompt = subject.adapted and adapter_config(Path(subject.source), subject.source).is_prompt_learning
    if prompt and (config.to == "merged" or config.merge):
        raise LabError("--to merged: a soft prompt is no update of weights that could be merged; take --to adapter")
    if config.to != "hub":
        if config.repo is not None or config.merge:
            raise LabError(f"--{'merge' if config.merge else 'repo'}: is of --to hub")
        return None
    if config.repo is None or not re.fullmatch(HUB_ID, config.repo):
        raise LabError("--repo: name where to push, as someone/name")
    try:
        validate_repo_id(config.repo)
    except ValueError as error:
        raise LabError(f"--repo {config.repo}: {reason_of(error)}") from error
    if (token := get_token()) is None:
        raise LabError("--to hub: has no token; run `hf auth login`, or set HF_TOKEN to one that may write")
    return str(token)


def push(folder: Path, repo: str, private: bool, token: str) -> str:
    """Makes the repository if it does not exist, uploads the directory in one commit, and returns its address.

    Raises:
        LabError: the hub refuses, or cannot be reached.
    """
    api = HfApi(token=token)
    try:
        url = api.create_repo(repo, private=private, exist_ok=True)
        api.upload_folder(repo_id=repo, folder_path=folder, commit_message="Upload model with llm_peft_fa")
    except Exception as error:  # HTTP, connection and answers that are none have no common type
        raise LabError(f"--repo {repo}: the hub did not take it ({reason_of(error)}); {folder} is written") from error
    return str(url)


def model_card(subject: Subject, whole: bool, place: str, template: bool) -> ModelCard:
    """Makes the README of a result, in English and Persian; `place` is where it is found: hub id or directory.

    `template` says whether it has a chat template beside it.
    """
    trained, base = subject.trained, subject.base or subject.source
    known = _card_of(base)
    method = trained.method.method if trained else _kind(_adapter(subject)).lower()
    asked = trained.data.data if trained else None
    data = "generated Persian tasks" if trained else "not recorded"
    if asked is not None:
        data = asked if _on_hub(asked) else Path(asked).name
    file = Path(subject.source).parent / "results.json"
    results = json_of(file, str(file)) if trained and file.is_file() else {}
    before, after = results.get("before", {}), results.get("after", {})
    named = Path(place).name if not _on_hub(place) else place.rpartition("/")[2]
    scores = [EvalResult("text-generation", data, data, SCORES[name], value, metric_name=name)
              for name, value in after.items() if name in SCORES]  # fmt: skip
    meta = ModelCardData(
        language="fa", license=known.license, license_name=known.get("license_name"),
        license_link=known.get("license_link"), base_model=base if _on_hub(base) else None,
        datasets=[data] if _on_hub(data) else None, library_name="transformers" if whole else "peft",
        pipeline_tag="text-generation", tags=["persian", method], model_name=named, eval_results=scores or None,
    )  # fmt: skip
    rows = [f"| {name} | {before.get(name, float('nan')):.3f} | {value:.3f} |" for name, value in after.items()]
    text = TEXT.format(
        name=named, base=base if _on_hub(base) else Path(base).name, method=method, data=data,
        description=METHODS[method].description if method in METHODS else method,
        validation="held-out conversations", use=_use(subject, whole, place, template),
        scores="\n".join(["| | before | after |", "|---|---|---|", *rows]) if rows else "not recorded",
        licence_fa=f"پروانهٔ مدل پایه: <bdi>{known.license}</bdi>." if known.license else "پروانهٔ مدل پایه پیدا نشد.",
        licence=f"The base's: {known.license}." if known.license else "The base's, which could not be read.",
    )  # fmt: skip
    return ModelCard(f"---\n{meta.to_yaml()}\n---\n\n{text}")


def _use(subject: Subject, whole: bool, place: str, template: bool) -> str:
    """Says how others run it: vLLM takes models and LoRA without DoRA, llama.cpp models, PEFT every adapter."""
    if whole:  # with its tokenizer, of which the template is
        return f"""`vllm serve {place}`; or for llama.cpp

```sh
python convert_hf_to_gguf.py DIRECTORY --outtype bf16 --outfile model.gguf
llama-cli -m model.gguf --jinja
```"""
    config = _adapter(subject)
    rank: int = getattr(config, "r", 0)
    base = config.base_model_name_or_path
    asked = f"""```python
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("{base}"), "{place}")
tokenizer = AutoTokenizer.from_pretrained("{place if template else base}")
chat = [{{"role": "user", "content": "سلام"}}]
asked = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
print(tokenizer.decode(model.generate(**asked, max_new_tokens=256)[0, asked["input_ids"].shape[1] :]))
```"""
    if _kind(config) != "LORA" or getattr(config, "use_dora", False) or rank > RANKS[-1]:
        return f"{asked}\n\nvLLM serves no adapters of this kind."
    least = next(size for size in RANKS if size >= rank)
    serve = [f"vllm serve {base} --enable-lora --max-lora-rank {least} --lora-modules tuned={place}"]
    if template:  # the base's tokenizer would take its own
        file = f"{place}/{TEMPLATE}"
        if _on_hub(place):
            serve, file = [f"hf download {place} {TEMPLATE} --local-dir .", *serve], TEMPLATE
        serve[-1] += f" --chat-template {file}"
    steps, own = "\n".join(serve), ", with the chat template that it was trained with" * template
    return f"{asked}\n\nor by vLLM{own}\n\n```sh\n{steps}\n```"


def _adapter(subject: Subject) -> PeftConfig:
    return adapter_config(Path(subject.source), subject.source)


def _kind(config: PeftConfig) -> str:
    return str(getattr(config.peft_type, "value", config.peft_type))


def _card_of(model: str) -> ModelCardData:
    """Reads what a model's README says of it, if it has one."""
    try:
        file = file_of(model, "README.md")
        return ModelCardData() if file is None else ModelCard.load(file).data
    except (OSError, ValueError, LabError):  # written by anybody, or of a base that is elsewhere
        return ModelCardData()


def _on_hub(name: str) -> bool:
    return re.fullmatch(HUB_ID, name) is not None and not Path(name).exists()
