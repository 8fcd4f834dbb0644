import random
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from llm_peft_fa.base import load_model, load_tokenizer
from llm_peft_fa.config import MethodOptions
from llm_peft_fa.methods import Setting, apply_method, resolved
from llm_peft_fa.model import Adapted, PackedCausalLM, virtual_tokens
from llm_peft_fa.packing import Packing, bucketed, learnt_tokens, packed_row, spread
from llm_peft_fa.templates import Encoded

pytestmark = pytest.mark.quick


def conversations(count: int = 9, seed: int = 0, longest: int = 90) -> list[Encoded]:
    draw = random.Random(seed)
    made = []
    for number in range(count):
        ids = [2, *(draw.randrange(300, 700) for _ in range(draw.randrange(4, longest)))]
        made.append(Encoded(ids, [draw.random() < 0.4 for _ in ids[:-1]] + [True], f"row {number}"))
    return made


def adapted(folder: Path, method: str, **options: object) -> Adapted:
    torch.manual_seed(0)
    complete = resolved(MethodOptions(method=method, **options))
    return apply_method(load_model(str(folder)), complete, Setting(load_tokenizer(str(folder)), 10))


def own_loss(model: torch.nn.Module, item: Encoded) -> torch.Tensor:
    """The summed loss as transformers computes it, on one conversation alone."""
    ids = torch.tensor([item.ids])
    labels = ids.masked_fill(~torch.tensor([item.learnt]), -100)
    return model(input_ids=ids, labels=labels, use_cache=False).loss * learnt_tokens([item])


@pytest.mark.parametrize("own_attention", ["eager", "sdpa"])
def test_packed_loss_and_gradients_equal_each_alone(model_dir: Path, own_attention: str) -> None:
    if own_attention == "sdpa" and "gemma" in str(model_dir):
        own_attention = "eager"  # transformers has no other for soft-caps
    items = conversations()
    ours = PackedCausalLM(load_model(str(model_dir)))
    theirs = AutoModelForCausalLM.from_pretrained(model_dir, attn_implementation=own_attention)
    loss = ours(packed_row(items))
    loss.backward()
    expected = sum(own_loss(theirs, item) for item in items)
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    gradients = {name: p.grad for name, p in theirs.named_parameters()}
    for name, parameter in ours.model.named_parameters():
        scale = gradients[name].abs().max()
        torch.testing.assert_close(parameter.grad / scale, gradients[name] / scale, atol=1e-5, rtol=0)


def test_packed_hidden_states_equal_each_alone(model_dir: Path) -> None:
    items = conversations()
    ours, theirs = (
        load_model(str(model_dir)),
        AutoModelForCausalLM.from_pretrained(model_dir, attn_implementation="eager"),
    )
    row = packed_row(items)
    with torch.no_grad():
        packed = ours.get_decoder()(
            input_ids=row.input_ids, position_ids=row.position_ids, attention_mask=torch.zeros(1, 1, 1, 1),
            use_cache=False, blocks=row.blocks,
        ).last_hidden_state  # fmt: skip
        logits = ours.get_output_embeddings()(packed)[0]
        start = 0
        for item in items:
            alone = theirs(input_ids=torch.tensor([item.ids]), use_cache=False).logits[0]
            here = logits[start : start + len(item.ids)]
            if (cap := getattr(ours.config, "final_logit_softcapping", None)) is not None:
                here = cap * torch.tanh(here / cap)
            torch.testing.assert_close(here, alone, atol=1e-5, rtol=1e-5)
            start += len(item.ids)


def test_changing_one_conversation_leaves_the_others_alone(model_dir: Path) -> None:
    model = PackedCausalLM(load_model(str(model_dir)))
    items = conversations(4)
    other = Encoded([2, *(300 for _ in items[1].ids[1:])], items[1].learnt, "")
    losses = []
    for second in (items[1], other):
        row = packed_row([items[0], Encoded(second.ids, [False] * len(second.ids), ""), *items[2:]])
        with torch.no_grad():
            losses.append(model(row).item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_generation_is_that_of_transformers(model_dir: Path) -> None:
    ours, theirs = (
        load_model(str(model_dir)),
        AutoModelForCausalLM.from_pretrained(model_dir, attn_implementation="eager"),
    )
    ids = torch.randint(300, 700, (3, 30), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :12] = mask[1, :3] = 0  # padded on the left
    options = {
        "attention_mask": mask,
        "max_new_tokens": 24,
        "do_sample": False,
        "output_logits": True,
        "return_dict_in_generate": True,
    }
    one, two = ours.generate(ids, **options), theirs.generate(ids, **options)
    assert torch.equal(one.sequences, two.sequences)
    torch.testing.assert_close(torch.stack(one.logits), torch.stack(two.logits), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("prompt_tuning", {}),
        ("prefix_tuning", {}),
        ("prefix_tuning", {"encoder_width": 8}),
        ("p_tuning", {}),
    ],
)
def test_soft_prompts_packed_equal_pefts_own_forward(model_dir: Path, method: str, options: dict[str, int]) -> None:
    """Loss and gradients: the prompt belongs to each conversation, and the sliding window counts a prefix."""
    model = adapted(model_dir, method, virtual_tokens=5, **options)
    items = [Encoded(item.ids, [False, *item.learnt[1:]], item.where) for item in conversations()]
    row = packed_row(items, virtual=virtual_tokens(model))
    loss = PackedCausalLM(model)(row)
    loss.backward()
    ours = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    model.get_base_model().set_attn_implementation("eager")
    expected = torch.zeros(())
    for item in items:
        ids = torch.tensor([item.ids])
        labels = ids.masked_fill(~torch.tensor([item.learnt]), -100)
        # PEFT's prefix needs the cache; alone in the batch, a conversation cannot see another through it.
        out = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels, use_cache="prefix" in method)
        expected = expected + out.loss * learnt_tokens([item])
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            scale = parameter.grad.abs().max()
            torch.testing.assert_close(ours[name] / scale, parameter.grad / scale, atol=1e-5, rtol=0)


def test_a_soft_prompt_can_be_left_out(model_dir: Path) -> None:
    items = conversations(4)
    plain = PackedCausalLM(load_model(str(model_dir)))(packed_row(items)).item()
    for method in ("prompt_tuning", "prefix_tuning"):
        packed = PackedCausalLM(adapted(model_dir, method, virtual_tokens=5))
        packed.prompted = False
        assert packed(packed_row(items)).item() == pytest.approx(plain, rel=1e-6)


def test_rows_with_virtual_tokens_keep_to_the_limit() -> None:
    items = conversations(30)
    rows = spread(items, 200, virtual=10)
    assert all(sum(10 + len(item.ids) for item in row) <= 200 for row in rows)
    row = packed_row(items[:3], virtual=10)
    assert row.tokens == sum(len(item.ids) for item in items[:3])
    assert row.input_ids.shape[1] == row.tokens + 30
    assert row.slots.shape == (3, 10)
    assert row.position_ids[0, row.slots].tolist() == [list(range(10))] * 3
    assert row.input_ids[0, row.slots[:, -1] + 1].tolist() == [item.ids[0] for item in items[:3]]
    assert torch.equal(row.targets, packed_row(items[:3]).targets)


@pytest.mark.parametrize("method", ["lora", "prefix_tuning", "prompt_tuning", "layers"])
def test_gradient_checkpointing_changes_nothing(model_dir: Path, method: str) -> None:
    gradients = []
    for checkpointing in (False, True):
        options = {"rank": 4} if method == "lora" else {"layers": 1} if method == "layers" else {"virtual_tokens": 5}
        made = adapted(model_dir, method, **options)
        if checkpointing:
            base = made.get_base_model() if hasattr(made, "get_base_model") else made
            base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model = PackedCausalLM(made).train()
        model(packed_row(conversations(5), virtual=virtual_tokens(made))).backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    for one, two in zip(*gradients, strict=True):
        scale = one.abs().max().clamp(min=1e-9)
        torch.testing.assert_close(one / scale, two / scale, atol=1e-5, rtol=0)


def test_nothing_is_recorded_below_the_first_layer_that_trains(model_dir: Path) -> None:
    model = adapted(model_dir, "layers", layers=1, which="last")
    recorded = []
    for layer in model.get_decoder().layers:
        layer.register_forward_hook(lambda module, given, out: recorded.append(out.requires_grad))
    PackedCausalLM(model)(packed_row(conversations(3)))
    assert recorded == [False, True]


@pytest.mark.parametrize(
    ("count", "tokens", "multiple", "virtual"), [(200, 400, 2, 40), (40, 333, 1, 0), (3, 900, 4, 0)]
)
def test_spread_is_longest_first_into_the_emptiest_row(count: int, tokens: int, multiple: int, virtual: int) -> None:
    """Graham's rule, written out: each choice looks at every row."""
    items = conversations(count, seed=count)
    found = spread(items, tokens, multiple, virtual)

    def size(row: list[Encoded]) -> int:
        return sum(virtual + len(item.ids) for item in row)

    def by_hand(count: int) -> list[list[Encoded]]:
        rows: list[list[Encoded]] = [[] for _ in range(count)]
        for item in sorted(items, key=lambda item: -len(item.ids)):
            min(rows, key=size).append(item)
        return rows

    assert [[item.where for item in row] for row in found] == [
        [item.where for item in row] for row in by_hand(len(found))
    ]
    assert max(map(size, found)) <= tokens
    fewer = len(found) - multiple
    assert fewer == 0 or max(map(size, by_hand(fewer))) > tokens


def test_spread_keeps_every_conversation_once_and_the_limit() -> None:
    items = conversations(50)
    for multiple in (1, 2, 3):
        rows = spread(items, 200, multiple)
        assert sorted(item.where for row in rows for item in row) == sorted(item.where for item in items)
        assert all(sum(len(item.ids) for item in row) <= 200 for row in rows)
        assert len(rows) % multiple == 0
    assert len(spread(items[:2], 4096, 4)) == 4, "every process gets a row, if only an empty one"
    assert max(len(item.ids) for row in spread(items, 10) for item in row) == max(len(item.ids) for item in items)


def test_batches_are_of_like_length_and_keep_the_limit() -> None:
    items = conversations(50)
    for multiple, virtual in ((1, 0), (3, 10), (64, 0)):
        rows = bucketed(items, 200, multiple, virtual)
        assert sorted(item.where for row in rows for item in row) == sorted(item.where for item in items)
        assert len(rows) % multiple == 0
        for row in filter(None, rows):
            sizes = [virtual + len(item.ids) for item in row]
            assert len(row) * max(sizes) <= 200 or len(row) == 1
    long, short = (Encoded([5] * length, [True] * length, "") for length in (40, 20))
    assert [len(row) for row in bucketed([short, long, short, long], 10_000)] == [2, 2], "less than half is padding"
    assert [len(row) for row in bucketed([items[0]] * 8, 10_000, 4)] == [2] * 4, "every process gets its part"


def test_the_padding_that_is_told_is_what_is_made() -> None:
    items, packing = conversations(23), Packing(150, padded=True)
    rows = [row for step in packing.steps(items, 8, seed=5).steps(0, 0) for row in step]
    padding = sum(int((row.input_ids == 0).sum()) for row in rows)
    assert packing.padding(items, 8, seed=5) == pytest.approx(padding / sum(row.input_ids.numel() for row in rows))
    assert padding > 0
    assert Packing(150).padding(items, 8, seed=5) == 0


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("processes", [1, 2, 3])
def test_an_epoch_sees_each_conversation_once_whatever_the_processes(processes: int, padded: bool) -> None:
    items = conversations(23)
    sources = [Packing(150, rank, processes, padded=padded).steps(items, 8, seed=5) for rank in range(processes)]
    assert {len(source) for source in sources} == {3}
    tokens = []
    for parts in zip(*(source.steps(0, 0) for source in sources), strict=True):
        assert len({len(part) for part in parts}) == 1, "processes pass in step"
        for part in parts:
            tokens += [token for row in part if row.tokens for token in row.input_ids.flatten().tolist() if token]
        learnt = sum(len(row.targets) for part in parts for row in part)
        assert all(row.weight in (0.0, pytest.approx(processes / learnt)) for part in parts for row in part)
    assert sorted(tokens) == sorted(token for item in items for token in item.ids)
    orders = [[row.input_ids.tolist() for rows in sources[0].steps(epoch, 0) for row in rows] for epoch in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]
    rest = [row.input_ids.tolist() for rows in sources[0].steps(0, 2) for row in rows]
    assert orders[0][-len(rest) :] == rest, "going on in the middle gives the same steps"


def test_pad_token_equal_to_eos_is_learnt() -> None:
    item = Encoded([2, 5, 6, 1], [False, False, True, True], "")  # 1 is EOS, and here also the pad token
    assert packed_row([item, item]).targets.tolist() == [6, 1, 6, 1]


def test_the_first_token_of_a_conversation_is_never_a_target() -> None:
    item = Encoded([7, 8], [True, True], "")
    row = packed_row([item, item])
    assert (row.predicting.tolist(), row.targets.tolist()) == ([0, 2], [8, 8])
