"""ClipCap against transformers' own models and their own `generate`."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from labs_testing.commands import here
from labs_testing.trainings import newest
from safetensors.torch import load_file
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, MambaConfig, PreTrainedTokenizerFast

from caption_lab.clipcap import ClipCap, language_vocabulary, load_language
from caption_lab.config import DecoderOptions, VocabularyOptions
from caption_lab.vocabulary import END, START, TOKENS
from labs_common.decoding import beam_search, write
from labs_common.options import DecodingOptions

CAPTION = "A red star, left of two moons!"


@pytest.fixture(scope="module")
def run(languages: dict[str, Path], scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "clipcap"
    here("caption_lab.train", "--model", "clipcap", "--language-model", languages["gpt2"], "--lora", "2", "--prefix", "3",
         "--data", scenes, "--no-pretrained", "--batch-size", "64", "--epochs", "2", "--max-steps", "6", "--beam", "1",
         "--save-every", "2", "--evaluate-every", "3", "--watch-pictures", "2", "--track", "none", "--output", folder)  # fmt: skip
    return folder


def made(folder: Path, prefix: int = 4, lora: int = 0) -> tuple[ClipCap, torch.Tensor]:
    torch.manual_seed(0)
    vocabulary = language_vocabulary([CAPTION], VocabularyOptions(), str(folder))
    decoder = ClipCap(
        (len(vocabulary), 10, 1, 20), DecoderOptions(language_model=str(folder), prefix=prefix, lora=lora)
    )
    decoder.read(str(folder))
    for name, parameter in decoder.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return decoder.eval(), 3 * torch.randn(5, 10)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_captions_are_tokens_of_the_model(name: str, languages: dict[str, Path], tmp_path: Path) -> None:
    vocabulary = language_vocabulary([CAPTION], VocabularyOptions(), str(languages[name]))
    tokenizer = AutoTokenizer.from_pretrained(languages[name])
    numbers = vocabulary.encode(CAPTION)
    assert numbers == [START, *(4 + token for token in tokenizer("a red star left of two moons").input_ids), END]
    assert vocabulary.decode(numbers) == "a red star left of two moons"
    assert vocabulary.length == len(numbers) - 2
    assert len(vocabulary) == 4 + AutoModelForCausalLM.from_pretrained(languages[name]).config.vocab_size
    short = language_vocabulary([CAPTION], VocabularyOptions(max_length=3), str(languages[name]))
    assert short.encode(CAPTION) == [*numbers[:4], END]
    roomy = language_vocabulary([CAPTION], VocabularyOptions(max_length=30), str(languages[name]))
    for padded in (False, True):  # as it is saved, and as it was in earlier versions
        roomy.save(tmp_path)
        theirs = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
        assert theirs("a red star left of two moons").input_ids == [number - 4 for number in numbers[1:-1]]
        if padded:
            fixed = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
            fixed.enable_padding(pad_id=0, pad_token="<pad>", length=12)
            fixed.enable_truncation(4)
            fixed.save(str(tmp_path / "tokenizer.json"))
        again = load_language(tmp_path)
        assert (again.words, again.length) == (roomy.words, 30)
        assert again.encode(CAPTION) == numbers


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_it_writes_as_the_language_model_goes_on(name: str, languages: dict[str, Path]) -> None:
    """The same weights in transformers' own class, the prefix as embeddings, and the library's greedy search."""
    decoder, features = made(languages[name])
    theirs = AutoModelForCausalLM.from_pretrained(languages[name]).eval()
    prefix = decoder.to_prefix(decoder.scaled(features)).view(5, 4, 32)
    tokens = torch.tensor([[7, 20, 8, 4], [9, 9, 30, 11]])
    words = torch.cat([torch.full((2, 1), START), tokens + 4], 1)
    output = decoder(features, words, torch.tensor([3, 1])).logits.softmax(-1)
    expected = theirs(
        inputs_embeds=torch.cat([prefix[[3, 1]], theirs.get_input_embeddings()(tokens)], 1)
    ).logits[:, 3:].softmax(-1)  # fmt: skip
    torch.testing.assert_close(output[..., END], expected[..., 0], atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(output[..., 5:], expected[..., 1:], atol=1e-6, rtol=1e-4)
    assert output[..., [0, 1, 3, 4]].max() < 1e-6
    said = write(decoder, features, TOKENS, 12, DecodingOptions(beam=1)).words
    written = theirs.generate(inputs_embeds=prefix, max_new_tokens=12, do_sample=False, pad_token_id=0).tolist()
    ended = [row[: row.index(0) + 1] if 0 in row else row for row in written]
    assert [[token + 4 if token else END for token in row] for row in ended] == said
    assert len({tuple(words) for words in said}) > 1


@pytest.mark.parametrize(("name", "prefix", "lora"), [("gpt2", 1, 0), ("gpt2", 3, 2), ("llama", 4, 2)])
def test_a_step_at_a_time_is_all_at_once(name: str, prefix: int, lora: int, languages: dict[str, Path]) -> None:
    decoder, features = made(languages[name], prefix, lora)
    found = beam_search(decoder, features, TOKENS, 12, DecodingOptions(beam=3))
    for place, (words, total) in enumerate(zip(found.words, found.log_probabilities, strict=True)):
        logits = decoder(features[place : place + 1], torch.tensor([[START, *words[:-1]]])).logits.detach()
        logs = logits.index_fill(-1, torch.tensor(TOKENS.never), -torch.inf).log_softmax(-1)[0]
        assert total == pytest.approx(float(logs.gather(1, torch.tensor(words)[:, None]).sum()), abs=1e-3)


def test_captions_of_about_one_length_are_read_together(
    languages: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is computed from <end> on; what is read is as each caption alone has it, and so is the gradient."""
    monkeypatch.setattr("caption_lab.vocabulary.GROUP", 2)
    decoder, features = made(languages["gpt2"])
    captions = [[START, 9], [START, 11, 24, 13, 14, 40], [START, 13, 11], [START]]
    words = torch.tensor([[*caption, END, *[0] * 6][:7] for caption in captions])
    of, lengths = torch.tensor([3, 0, 3, 1]), []
    decoder.language.register_forward_pre_hook(
        lambda module, given, named: lengths.append(named["logits_to_keep"]), with_kwargs=True
    )
    logits = decoder(features, words, of).logits
    assert lengths == [6, 2], "captions of 6 and 3 words, then of 2 and 1"
    alone = [
        decoder(features[place : place + 1], torch.tensor([caption])).logits[0]
        for place, caption in zip(of.tolist(), captions, strict=True)
    ]
    there = [logits[row, : len(caption)] for row, caption in enumerate(captions)]
    parameter = decoder.to_prefix[0].weight
    gradients = [
        torch.autograd.grad(sum(p.softmax(-1).square().sum() for p in parts), parameter)[0] for parts in (there, alone)
    ]
    for one, other in zip([*there, gradients[0]], [*alone, gradients[1]], strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)
    assert gradients[0].any()


@pytest.mark.parametrize("lora", [0, 2])
def test_only_the_prefix_and_low_rank_matrices_learn(lora: int, languages: dict[str, Path]) -> None:
    decoder, features = made(languages["gpt2"], lora=lora)
    decoder.requires_grad_(False)
    decoder.requires_grad_(True).train()
    decoder(features, torch.tensor([[START, 9, 10]] * 5)).logits[..., 5:].square().mean().backward()
    for name, parameter in decoder.named_parameters():
        learns = ".lora_" in name or not name.startswith("language.")
        assert (parameter.grad is not None and bool(parameter.grad.any())) == learns, name
    assert any(".lora_" in name for name, _ in decoder.named_parameters()) == bool(lora)
    assert not any(module.training for module in decoder.language.modules())


def test_a_run_keeps_the_language_model_and_goes_on_to_the_same_bytes(
    run: Path, languages: dict[str, Path], scenes: Path, tmp_path: Path
) -> None:
    weights = load_file(run / "model" / "model.safetensors")
    frozen = {name.removeprefix("decoder.language.").replace(".base_layer", ""): tensor for name, tensor in weights.items()
              if name.startswith("decoder.language.") and ".lora_" not in name}  # fmt: skip
    theirs = load_file(languages["gpt2"] / "model.safetensors")
    assert frozen.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in frozen.items())
    assert all(tensor.any() for name, tensor in weights.items() if "lora_B" in name)
    assert "all are unchanged" in (run / "report.html").read_text()
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [line["validation/loss"] for line in lines if "validation/loss" in line]
    assert losses[-1] < losses[0]

    again = tmp_path / "again"
    shutil.copytree(run, again)
    shutil.rmtree(newest(again))
    shutil.rmtree(again / "model")
    here("caption_lab.train", "--resume", again, "--no-report")
    for name in ("metrics.jsonl", "model/model.safetensors", "captions.json"):
        assert (again / name).read_bytes() == (run / name).read_bytes(), name

    planned = here("caption_lab.train", "--config", run / "config.yaml", "--plan")
    assert "clipcap behind" in planned.stdout

    # Elsewhere, without the language model's own directory.
    here("caption_lab.evaluate", "--checkpoint", run, "--beams", "1", "--output", tmp_path / "evaluated")
    found = json.loads((tmp_path / "evaluated" / "evaluation.json").read_text())["by beam"]["1"]
    assert found == pytest.approx(json.loads((run / "results.json").read_text())["test"]["metrics"])
    picture = next(scenes.rglob("*.jpg"))
    assert here("caption_lab.caption", picture, "--checkpoint", run).stdout.startswith(f"{picture}\t")


BAD: list[tuple[tuple[Any, ...], str]] = [
    (("--model", "transformer", "--lora", "4"), "--model clipcap only"),
    (("--model", "clipcap", "--min-count", "2"), "--min-count"),
    (("--model", "clipcap", "--language-model", "LLAMA", "--prefix", "2040"), "reads 2048 vectors and tokens"),
    (("--model", "clipcap", "--language-model", "no/such/model"), "--language-model no/such/model"),
    (("--model", "clipcap", "--language-model", "MAMBA"), "does not go on from keys and values"),
    (("--model", "clipcap", "--heads", "4"), "--width, --layers, --heads: --model clipcap has those of"),
]


@pytest.mark.parametrize(("arguments", "said"), BAD)
def test_bad_input_is_one_line(
    arguments: tuple[Any, ...], said: str, languages: dict[str, Path], scenes: Path, tmp_path: Path
) -> None:
    if "MAMBA" in arguments:
        shutil.copytree(languages["llama"], tmp_path / "mamba", ignore=shutil.ignore_patterns("*.safetensors"))
        config = MambaConfig(vocab_size=300, hidden_size=16, state_size=4, num_hidden_layers=1, eos_token_id=0)
        AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "mamba")
    places = {"LLAMA": str(languages["llama"]), "MAMBA": str(tmp_path / "mamba")}
    arguments = tuple(places.get(one, one) for one in arguments)
    done = here(
        "caption_lab.train", *arguments, "--data", scenes, "--no-pretrained", "--output", tmp_path / "run", code=2
    )
    assert len(done.errors) == 1
    assert said in done.errors[0]
