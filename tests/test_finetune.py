"""Fine-tuning: answers alone are learned, an adapter starts as its base, and anybody's peft can read it."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from pydantic import TypeAdapter, ValidationError

from llm_from_scratch.bundle import BundleError, load_tensors, seal, verify
from llm_from_scratch.config import Params
from llm_from_scratch.data.chat import ChatRecord, RecordError, question_messages, records, write_records
from llm_from_scratch.data.corpora import Source
from llm_from_scratch.data.documents import Document, with_splits, write_documents
from llm_from_scratch.data.questions import questions
from llm_from_scratch.evaluation.generation import Task, answers, exact_match, examine, fitting, task_of, task_of_record, token_f1
from llm_from_scratch.evaluation.splits import conversations
from llm_from_scratch.finetune import METHODS, FinetuneParams, lora, qlora, sft
from llm_from_scratch.finetune.lora import LoraParams
from llm_from_scratch.finetune.sft import Examples, answer_loss, chat_batches, encode_records
from llm_from_scratch.inference.engine import Engine
from llm_from_scratch.inference.quantize import dequantized, load_bundle, quantize, quantized_layers, save_quantized, scheme_of
from llm_from_scratch.model.gpt import GptParams
from llm_from_scratch.model.llama import Llama, LlamaParams, LlamaShape
from llm_from_scratch.model.registry import build, load_model, parameters, save_model
from llm_from_scratch.tokenizer.bpe import BpeTokenizer, train_bpe
from llm_from_scratch.training.loop import fit, next_token
from llm_from_scratch.training.memory import UNSCORED
from llm_from_scratch.training.optimizer import build as build_optimizer
from llm_from_scratch.training.resume import Journal
from stages import finetune as stage
from stages.__main__ import read_yaml
from tests.tiny import in_float32

PLAN = {
    "seed": 1,
    "context": 64,
    "batch": 8,
    "micro_batch": 0,
    "steps": 40,
    "optimizer": "adamw",
    "learning_rate": 0.01,
    "embedding_learning_rate": 0.01,
    "weight_decay": 0.0,
    "warmup_steps": 2,
    "cooldown_share": 0.5,
    "final_share": 0.02,
    "clip": 1.0,
    "precision": "fp32",
    "checkpointing": False,
    "compile": False,
    "parallel": "none",
    "evaluate_every": 20,
    "checkpoint_every": 10,
}
SFT = {"model": "base", "guide": "base", "method": "sft", "records": "animals", "questions": 5, "samples": 2, **PLAN}
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
DETOUR = {"rank": 4, "alpha": 8, "dropout": 0.0, "targets": ALL, "chat_tokens": False}
WITH_TOKENS = {**DETOUR, "chat_tokens": True}
LORA = {**SFT, "method": "lora", "lora": WITH_TOKENS}
QLORA = {**SFT, "method": "qlora", "model": "base_nf4", "guide": "base_nf4", "lora": WITH_TOKENS}

NAMES = ("cat", "dog", "owl", "fox", "hen", "bee", "ant", "cow", "pig", "emu")
KINDS = ("mammal", "bird", "insect")


def animals() -> list[Document]:
    return [
        Document(
            id=f"{name}-{number}",
            title=f"{name} {number}",
            text=f"The {name} {number} is a {KINDS[place % 3]} of size {number}. It eats.\n",
            description=f"{KINDS[place % 3]} of size {number}",
            topic="Animals" if place % 2 else "Beasts",
        )
        for place, name in enumerate(NAMES)
        for number in range(6)
    ]


@pytest.fixture(scope="module")
def words() -> BpeTokenizer:
    return train_bpe((document.text for document in animals()), 320)


@pytest.fixture
def base(words: BpeTokenizer) -> Llama:
    return tiny_llama(words, width=32, hidden=48)


@pytest.fixture
def packed(words: BpeTokenizer) -> Llama:
    """A tiny Llama in 4 bits; nf4 works on rows of whole blocks of 64."""
    return quantize(tiny_llama(words, width=64, hidden=64), "nf4")  # type: ignore[return-value]


def tiny_llama(words: BpeTokenizer, width: int, hidden: int) -> Llama:
    """A Llama whose blocks are not the identity, as they are when untrained."""
    torch.manual_seed(0)
    shape = LlamaParams(
        architecture="llama",
        context=64,
        width=width,
        layers=2,
        heads=4,
        kv_heads=2,
        hidden=hidden,
        rope_theta=10000.0,
        qk_norm=False,
        copying=0.0,
    )
    model = build(shape, words.vocab_size)
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.1) if weight.dim() == 2 else None
    assert isinstance(model, Llama)
    return model.eval()


def parse(section: dict[str, Any]) -> Any:
    return TypeAdapter(FinetuneParams).validate_python(section)


def examples(words: BpeTokenizer) -> Examples:
    return encode_records(records(animals(), seed=1), words, context=64)


def trained(model: torch.nn.Module) -> int:
    return sum(weight.numel() for weight in model.parameters() if weight.requires_grad)


def shaken(model: torch.nn.Module) -> Any:
    """As if trained: the second matrix of each detour no longer zero, and the rows of the tokens that learn moved."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.2, generator=generator)
            if "trainable_tokens_delta" in name:
                weight.add_(torch.randn(weight.shape, generator=generator), alpha=0.3)
    return model


def ids() -> torch.Tensor:
    """Of a vocabulary of 320, the last four of them the tokens of a chat, which are among these too."""
    drawn = torch.randint(300, (2, 16), generator=torch.Generator().manual_seed(3))
    drawn[:, ::4] = torch.tensor([316, 317, 318, 319])
    return drawn


# Parameters


def test_a_method_has_the_parameters_it_needs_and_no_others():
    assert parse(SFT).method == "sft"
    assert parse(LORA).lora.rank == 4
    with pytest.raises(ValidationError, match="lora"):
        parse({**SFT, "lora": DETOUR})
    with pytest.raises(ValidationError, match="lora"):
        parse({**SFT, "method": "lora"})
    with pytest.raises(ValidationError, match="union_tag_invalid"):
        parse({**SFT, "method": "magic"})


def test_every_method_of_the_params_is_one_that_can_be_run():
    methods = [get_args(each.model_fields["method"].annotation)[0] for each in get_args(get_args(FinetuneParams)[0])]
    assert sorted(methods) == sorted(METHODS)


# Batches


def test_the_loss_counts_the_answer_and_the_end_of_its_turn_and_nothing_else(words: BpeTokenizer):
    record: ChatRecord = {
        "id": "a",
        "kind": "read",
        "messages": [*question_messages("What is it?", ["A cat."]), {"role": "assistant", "content": "mammal"}],
    }
    [(inputs, targets)] = encode_records([record], words, context=64).pairs
    scored = targets[targets != UNSCORED].tolist()
    assert scored == [*words.encode("mammal"), words.special["<|end|>"]]
    first = int((targets != UNSCORED).nonzero()[0])
    assert inputs[first] == words.special["<|assistant|>"]
    assert inputs[1:].tolist()[first:] == targets[first:-1].tolist()
    assert words.decode(inputs[:first].tolist()) == "A cat.What is it?"


def test_both_answers_of_a_longer_conversation_are_learned(words: BpeTokenizer):
    turns = [("user", "Hi"), ("assistant", "cat"), ("user", "And?"), ("assistant", "dog")]
    record: Any = {"id": "a", "kind": "talk", "messages": [{"role": role, "content": content} for role, content in turns]}
    [(_, targets)] = encode_records([record], words, context=64).pairs
    assert words.decode([token for token in targets.tolist() if token != UNSCORED]) == "catdog"


def test_a_record_that_is_too_long_loses_the_end_of_its_passage(words: BpeTokenizer):
    passage = "The owl is a bird. " * 20
    record: ChatRecord = {
        "id": "a",
        "kind": "read",
        "messages": [*question_messages("What is it?", [passage]), {"role": "assistant", "content": "bird"}],
    }
    found = encode_records([record], words, context=48)
    [(inputs, targets)] = found.pairs
    text = words.decode(inputs.tolist())
    assert (found.cut, found.skipped, len(inputs)) == (1, 0, 48)
    assert text.startswith("The owl is a bird. The owl")
    assert text.endswith("What is it?bird")
    assert inputs[0] == words.special["<|system|>"]
    assert words.decode([token for token in targets.tolist() if token != UNSCORED]) == "bird"


def test_a_record_without_a_passage_to_cut_is_skipped_and_counted(words: BpeTokenizer):
    long: Any = {"id": "a", "kind": "talk", "messages": [*question_messages("Why? " * 50, []), {"role": "assistant", "content": "cat"}]}
    short: Any = {"id": "b", "kind": "talk", "messages": [*question_messages("Why?", []), {"role": "assistant", "content": "cat"}]}
    found = encode_records([long, short], words, context=32)
    assert (len(found.pairs), found.cut, found.skipped) == (1, 0, 1)
    with pytest.raises(ValueError, match="none of 1 chat records fits a context of 32 tokens"):
        encode_records([long], words, context=32)


def test_the_batch_of_a_step_depends_on_the_step_and_the_seed_alone(words: BpeTokenizer):
    one, again, other = (chat_batches(examples(words), batch=8, seed=seed) for seed in (1, 1, 2))
    ahead = [one(step) for step in range(50)]
    back = [again(step) for step in reversed(range(50))][::-1]
    assert all(torch.equal(a, b) for first, second in zip(ahead, back, strict=True) for a, b in zip(first, second, strict=True))
    assert any(ahead[step][0].shape != other(step)[0].shape for step in range(50))


def test_an_epoch_shows_every_conversation_once_and_the_next_in_another_order(words: BpeTokenizer):
    found = examples(words)
    steps = -(-len(found.pairs) // 8)

    def rows(epoch: int) -> list[tuple[int, ...]]:
        shown = chat_batches(found, batch=8, seed=1)
        batches = [shown(step) for step in range(epoch * steps, (epoch + 1) * steps)]
        return [tuple(row[row != UNSCORED].tolist()) for _, targets in batches for row in targets]

    answers_of = sorted(tuple(targets[targets != UNSCORED].tolist()) for _, targets in found.pairs)
    assert sorted(rows(0)) == sorted(rows(1)) == answers_of
    assert rows(0) != rows(1)


def test_conversations_of_like_length_share_a_batch_so_little_is_padding(words: BpeTokenizer):
    found = examples(words)
    at = chat_batches(found, batch=8, seed=1)
    shown = sum(at(step)[0].numel() for step in range(-(-len(found.pairs) // 8)))
    assert shown < 1.15 * sum(len(inputs) for inputs, _ in found.pairs)


def test_the_held_out_loss_is_the_mean_over_answer_tokens_however_they_are_batched(words: BpeTokenizer, base: Llama):
    found = examples(words)
    some = Examples(found.pairs[:7], 0, 0, found.eot, found.end)
    nats = 0.0
    for inputs, targets in some.pairs:
        logs = base(inputs[None])[0].log_softmax(-1).detach()
        nats -= sum(float(logs[place, token]) for place, token in enumerate(targets.tolist()) if token != UNSCORED)
    slow = nats / some.answer_tokens
    assert answer_loss(base, some, batch=3) == pytest.approx(slow, rel=1e-5)
    assert answer_loss(base, some, batch=7) == pytest.approx(slow, rel=1e-5)


# LoRA


def test_lora_starts_as_the_base_and_trains_the_detours_alone(base: Llama):
    with torch.no_grad():
        before = base(ids())
        attached = lora.attach(base, LoraParams(**DETOUR), seed=1)
        assert torch.equal(attached(ids()), before)
    # q and o 32→32, k and v 32→16, gate and up 32→48, down 48→32; a detour of rank 4 has 4 * (in + out) numbers; two layers.
    assert trained(attached) == 2 * 4 * (2 * 64 + 2 * 48 + 3 * 80) == 3712
    assert all("lora_" in name for name, weight in attached.named_parameters() if weight.requires_grad)


def test_the_detour_is_scaled_by_the_root_of_its_rank(base: Llama):
    frozen = base.model.layers[0].self_attn.q_proj
    attached = shaken(lora.attach(base, LoraParams(**{**DETOUR, "targets": ["q_proj"]}), seed=1))
    layer = attached.get_submodule("base_model.model.model.layers.0.self_attn.q_proj")
    down, up = layer.get_submodule("lora_A.default").weight, layer.get_submodule("lora_B.default").weight
    x = torch.randn(3, 32)
    torch.testing.assert_close(layer(x), frozen(x) + 8 / 4**0.5 * x @ down.T @ up.T)


def test_an_adapter_depends_on_its_seed_and_neither_reads_nor_moves_other_randomness(base: Llama):
    def first(model: Llama, seed: int) -> torch.Tensor:
        attached = lora.attach(model, LoraParams(**DETOUR), seed)
        return next(weight for name, weight in attached.named_parameters() if "lora_A" in name)

    models = [Llama(base.shape) for _ in range(3)]
    one = first(models[0], 7)
    torch.manual_seed(99)
    state = torch.get_rng_state()
    assert torch.equal(first(models[1], 7), one)
    assert not torch.equal(first(models[2], 8), one)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("tokens", [(), range(316, 320)], ids=["detours", "and tokens"])
def test_merged_the_adapter_says_the_same_and_leaves_the_attached_one_alone(base: Llama, tokens: range):
    attached = shaken(lora.attach(base, LoraParams(**DETOUR), seed=1, tokens=tokens)).eval()
    with torch.no_grad():
        said = attached(ids())
        merged = lora.merge(attached)
        assert isinstance(merged, Llama)
        assert sum(weight.numel() for weight in merged.parameters()) == 2 * (32 * 32 * 2 + 32 * 16 * 2 + 32 * 48 * 3 + 64) + 32 + 320 * 32
        torch.testing.assert_close(merged(ids()), said, atol=1e-5, rtol=1e-5)
        assert torch.equal(attached(ids()), said)


GPT = GptParams(architecture="gpt", context=64, width=32, layers=2, heads=4, dropout=0.0)
EVERYWHERE = {"llama": ALL, "gpt2": ["c_attn", "c_proj", "c_fc"]}


@pytest.fixture(params=EVERYWHERE)
def exported(request: pytest.FixtureRequest, words: BpeTokenizer, base: Llama, tmp_path: Path) -> tuple[Path, list[str]]:
    """The folder of a base, as transformers opens it, and all the layers that a detour can stand beside."""
    model: Any = base
    if request.param == "gpt2":
        torch.manual_seed(1)
        model = build(GPT, words.vocab_size)
        for weight in model.parameters():
            torch.nn.init.normal_(weight, std=0.1)
    (tmp_path / "base").mkdir()
    save_model(model.eval(), tmp_path / "base", eot=words.eot)
    return tmp_path / "base", EVERYWHERE[request.param]


@pytest.mark.parametrize("tokens", [(), range(316, 320)], ids=["detours", "and tokens"])
def test_an_adapter_is_the_same_to_transformers_and_peft_as_to_us(exported: tuple[Path, list[str]], tokens: range, tmp_path: Path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    folder, targets = exported
    (tmp_path / "adapter").mkdir()
    attached = shaken(lora.attach(opened(folder), LoraParams(**{**DETOUR, "targets": targets}), seed=1, tokens=tokens)).eval()
    lora.save_adapter(attached, tmp_path / "adapter", "artifacts/models/base")

    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), str(tmp_path / "adapter")).eval()
    ours = lora.load_adapter(opened(folder), tmp_path / "adapter").eval()
    with torch.no_grad():
        said = attached(ids())
        assert not torch.allclose(said, opened(folder)(ids()), atol=0.1)
        assert torch.equal(ours(ids()), said)
        torch.testing.assert_close(theirs(input_ids=ids()).logits, said, atol=1e-5, rtol=1e-5)
    assert trained(ours) == 0
    assert theirs.generate(input_ids=ids(), max_new_tokens=2, do_sample=False).shape == (2, 18)


@pytest.mark.parametrize("tokens", [None, [316, 319]], ids=["detours", "and tokens"])
def test_an_adapter_that_peft_trained_on_the_transformers_model_says_the_same_on_ours(
    exported: tuple[Path, list[str]], tokens: list[int] | None, tmp_path: Path
):
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import AutoModelForCausalLM

    folder, targets = exported
    torch.manual_seed(2)
    config = LoraConfig(
        r=3, lora_alpha=5, target_modules=targets, trainable_token_indices=tokens, task_type="CAUSAL_LM", fan_in_fan_out="c_fc" in targets
    )
    theirs: PeftModel = get_peft_model(AutoModelForCausalLM.from_pretrained(folder), config)
    optimizer = torch.optim.AdamW((weight for weight in theirs.parameters() if weight.requires_grad), lr=0.05)
    for _ in range(3):
        theirs(input_ids=ids(), labels=ids()).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    theirs.eval().save_pretrained(str(tmp_path / "adapter"))

    ours = lora.load_adapter(opened(folder), tmp_path / "adapter").eval()
    with torch.no_grad():
        said = theirs(input_ids=ids()).logits
        assert not torch.allclose(said, opened(folder)(ids()), atol=0.1)
        torch.testing.assert_close(ours(ids()), said, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(lora.merge(ours)(ids()), said, atol=1e-5, rtol=1e-5)


def opened(folder: Path) -> Any:
    return load_model(folder)


def test_the_tokens_of_a_chat_learn_in_the_embedding_and_the_head_and_no_other_row_moves(words: BpeTokenizer, base: Llama):
    told, before = parse(LORA), base.model.embed_tokens.weight.clone()
    job = METHODS["lora"](base, examples(words), told)
    assert trained(job.model) == 3712 + 4 * 32
    fit(job.model, job.batches, job.loss, told)
    after = job.plain().model.embed_tokens.weight
    assert words.eot == 315
    assert torch.equal(after[:316], before[:316])
    assert (after[316:] - before[316:]).abs().amax(1).min() > 0.01


def test_a_head_of_its_own_learns_the_tokens_of_a_chat_too(base: Llama):
    untied = Llama(replace(base.shape, tied=False))
    attached = lora.attach(untied, LoraParams(**{**DETOUR, "targets": ["q_proj"]}), seed=1, tokens=range(316, 320))
    assert trained(attached) == 2 * 4 * 64 + 2 * 4 * 32
    said = shaken(attached).eval()(ids())
    torch.testing.assert_close(lora.merge(attached)(ids()), said, atol=1e-5, rtol=1e-5)


def test_an_adapter_that_is_no_lora_is_refused_by_name(base: Llama, tmp_path: Path):
    from peft import IA3Config, get_peft_model

    get_peft_model(copy.deepcopy(base), IA3Config(target_modules=["q_proj"], feedforward_modules=[])).save_pretrained(str(tmp_path))
    with pytest.raises(ValueError, match=r"adapter_config.json: the adapter is of type IA3, and only LORA is read"):
        lora.load_adapter(base, tmp_path)


def test_the_same_adapter_is_always_the_same_bytes(base: Llama, tmp_path: Path):
    attached = lora.attach(base, LoraParams(**DETOUR), seed=1)
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        lora.save_adapter(attached, tmp_path / name, "base")
    config = json.loads((tmp_path / "one" / lora.CONFIG).read_text())
    assert (tmp_path / "one" / lora.CONFIG).read_bytes() == (tmp_path / "two" / lora.CONFIG).read_bytes()
    assert config["target_modules"] == sorted(ALL)
    assert config["use_rslora"] is True


def test_an_adapter_of_another_shape_is_refused(base: Llama, words: BpeTokenizer, tmp_path: Path):
    wider = Llama(replace(base.shape, width=48))
    lora.save_adapter(lora.attach(wider, LoraParams(**DETOUR), seed=1), tmp_path, "wider")
    with pytest.raises(BundleError, match=r"does not fit this model: .*lora_B.weight is \(48, 4\) there and \(32, 4\) here"):
        lora.load_adapter(base, tmp_path)


def test_a_target_that_matches_no_layer_is_refused_rather_than_ignored(base: Llama):
    with pytest.raises(ValueError, match=r"lora.targets: c_attn matched no layer of this Llama; its Linear layers are down_proj"):
        lora.attach(base, LoraParams(**{**DETOUR, "targets": ["q_proj", "c_attn"]}), seed=1)
    with pytest.raises(ValueError, match="lm_head matched no layer"):
        lora.attach(base, LoraParams(**{**DETOUR, "targets": ["lm_head"]}), seed=1)


def test_a_layer_that_shares_its_weight_is_refused_because_merging_would_change_both():
    shape = LlamaShape(
        vocab_size=64,
        context=16,
        width=8,
        layers=1,
        heads=2,
        kv_heads=2,
        head_dim=4,
        hidden=8,
        rope_theta=1e4,
        qk_norm=False,
        tied=False,
        norm_eps=1e-6,
    )
    model = Llama(shape)
    assert model.lm_head is not None
    lora.attach(Llama(shape), LoraParams(**{**DETOUR, "targets": ["lm_head"]}), seed=1)
    model.lm_head.weight = model.model.embed_tokens.weight
    with pytest.raises(ValueError, match=r"lm_head shares its weight with model.embed_tokens"):
        lora.attach(model, LoraParams(**{**DETOUR, "targets": ["lm_head"]}), seed=1)


# QLoRA


def plain_of(packed: Llama) -> Llama:
    """The model that a packed one stands for, in plain layers: its oracle."""
    plain = Llama(packed.shape)
    state = {name: tensor for name, tensor in packed.state_dict().items() if name in plain.state_dict()}
    plain.load_state_dict(state | {f"{name}.weight": dequantized(layer) for name, layer in quantized_layers(packed).items()})
    return plain.eval()


def test_unpacked_a_base_says_the_same_and_all_its_parameters_can_be_counted(packed: Llama):
    plain, oracle = qlora.unpacked(packed), plain_of(packed)
    with torch.no_grad():
        torch.testing.assert_close(plain(ids()), packed(ids()), atol=1e-5, rtol=1e-5)
        assert torch.equal(plain(ids()), oracle(ids()))
    assert parameters(plain) == parameters(oracle) > parameters(packed)
    assert not plain.is_loaded_in_4bit
    assert packed.is_loaded_in_4bit


def test_qlora_starts_as_its_base_and_trains_the_adapter_alone(packed: Llama):
    from peft.tuners.lora.bnb import Linear4bit

    with torch.no_grad():
        before = packed(ids())
        attached = lora.attach(packed, LoraParams(**DETOUR), seed=1)
        assert torch.equal(attached(ids()), before)
    assert sum(isinstance(part, Linear4bit) for part in attached.modules()) == 14
    assert trained(attached) == 2 * 4 * (2 * 128 + 2 * 96 + 3 * 128)


def test_the_gradient_through_packed_weights_is_that_through_the_numbers_they_stand_for(packed: Llama):
    gradients = []
    for model in (packed, plain_of(packed)):
        attached = shaken(lora.attach(model, LoraParams(**DETOUR), seed=1, tokens=range(316, 320))).train()
        attached(ids()).square().mean().backward()
        gradients.append({name: weight.grad for name, weight in attached.named_parameters() if weight.requires_grad})
    assert len(gradients[0]) == 2 * 14 + 1
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], atol=1e-6, rtol=1e-4)


def test_qlora_leaves_the_packed_weights_as_they_were(words: BpeTokenizer, packed: Llama):
    told, before = parse(QLORA), {name: layer.weight.data.clone() for name, layer in quantized_layers(packed).items()}
    job = METHODS["qlora"](packed, examples(words), told)
    fit(job.model, job.batches, job.loss, told)
    after = {name.removeprefix("base_model.model.").removesuffix(".base_layer"): part for name, part in quantized_layers(job.model).items()}
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name].weight.data, weight) for name, weight in before.items())


def test_over_a_packed_base_too_the_merged_adapter_says_what_the_attached_one_does(packed: Llama):
    attached = shaken(lora.attach(packed, LoraParams(**DETOUR), seed=1, tokens=range(316, 320))).eval()
    with torch.no_grad():
        said = attached(ids())
        merged = qlora.merge(attached)
        assert not quantized_layers(merged)
        torch.testing.assert_close(merged(ids()), said, atol=1e-5, rtol=1e-5)
        assert torch.equal(attached(ids()), said)


def test_merging_over_four_bits_unpacks_adds_and_packs_again_and_says_how_far_that_rounds(
    packed: Llama, words: BpeTokenizer, tmp_path: Path
):
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    (tmp_path / "plain").mkdir()
    save_model(plain_of(packed), tmp_path / "plain", words.eot)
    attached = shaken(lora.attach(packed, LoraParams(**DETOUR), seed=1)).eval()
    found = qlora.merge_quantized(attached)

    moved = rounded = whole = 0.0
    for name, layer in quantized_layers(found.model).items():
        beside = attached.get_submodule(f"base_model.model.{name}")
        before = dequantize_4bit(beside.base_layer.weight.data, beside.base_layer.weight.quant_state)
        wanted = before + 8 / 4**0.5 * beside.lora_B["default"].weight @ beside.lora_A["default"].weight
        after = dequantize_4bit(*quantize_4bit(wanted.detach(), blocksize=64, compress_statistics=True, quant_type="nf4"))
        torch.testing.assert_close(dequantized(layer), after, atol=1e-6, rtol=0)
        whole, moved, rounded = (
            total + float(part.square().sum()) for total, part in ((whole, before), (moved, wanted - before), (rounded, after - wanted))
        )
    assert found.learned == pytest.approx((moved / whole) ** 0.5, rel=1e-4)
    assert found.rounding == pytest.approx((rounded / whole) ** 0.5, rel=1e-4)
    assert f"training moved the weights by {found.learned:.2%}, rounding by {found.rounding:.2%}" in str(found)

    (tmp_path / "again").mkdir()
    save_quantized(found.model, tmp_path / "plain", tmp_path / "again")
    assert scheme_of(load_bundle(tmp_path / "again")) == "nf4"


def test_an_adapter_over_four_bits_is_the_same_to_transformers_as_to_us(packed: Llama, words: BpeTokenizer, tmp_path: Path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    for name in ("plain", "packed", "adapter"):
        (tmp_path / name).mkdir()
    save_model(plain_of(packed), tmp_path / "plain", words.eot)
    save_quantized(packed, tmp_path / "plain", tmp_path / "packed")
    attached = shaken(lora.attach(packed, LoraParams(**DETOUR), seed=1, tokens=range(316, 320))).eval()
    lora.save_adapter(attached, tmp_path / "adapter", "base_nf4")

    base = in_float32(AutoModelForCausalLM.from_pretrained(tmp_path / "packed", dtype=torch.float32))
    theirs = PeftModel.from_pretrained(base, str(tmp_path / "adapter")).eval()
    ours = lora.load_adapter(load_bundle(tmp_path / "packed"), tmp_path / "adapter").eval()
    with torch.no_grad():
        assert torch.equal(ours(ids()), attached(ids()))
        torch.testing.assert_close(theirs(input_ids=ids()).logits, attached(ids()), atol=1e-4, rtol=1e-4)


def test_lora_wants_plain_weights_and_qlora_packed_ones(words: BpeTokenizer, base: Llama, packed: Llama):
    with pytest.raises(ValueError, match="method qlora wants a base in 4 bits; name a quantize entry of scheme nf4"):
        METHODS["qlora"](base, examples(words), parse(QLORA))
    for scheme in ("int8", "nf4"):
        with pytest.raises(ValueError, match=r"method lora wants a base of plain weights, .* packed in few bits; use method qlora"):
            METHODS["lora"](quantize(plain_of(packed), scheme), examples(words), parse(LORA))
    with pytest.raises(ValueError, match="method qlora wants a base in 4 bits"):
        METHODS["qlora"](quantize(plain_of(packed), "int8"), examples(words), parse(QLORA))


# Training


SECTIONS = pytest.mark.parametrize("section", [SFT, LORA, QLORA], ids=["sft", "lora", "qlora"])


def start_of(section: dict[str, Any], base: Llama, packed: Llama) -> Llama:
    return packed if section["method"] == "qlora" else base


@SECTIONS
def test_fine_tuning_lowers_the_loss_on_answers(section: dict[str, Any], words: BpeTokenizer, base: Llama, packed: Llama):
    told, found, model = parse(section), examples(words), start_of(section, base, packed)
    before = answer_loss(model, found, batch=8)
    job = METHODS[told.method](model, found, told)
    fit(job.model, job.batches, job.loss, told)
    assert answer_loss(job.plain(), found, batch=8) < 0.7 * before


def test_lora_leaves_the_base_as_it_was(words: BpeTokenizer, base: Llama):
    told, before = parse(LORA), {name: weight.clone() for name, weight in base.named_parameters()}
    job = METHODS["lora"](base, examples(words), told)
    fit(job.model, job.batches, job.loss, told)
    unwrapped = {name.replace(".base_layer", "").replace(".token_adapter", ""): weight for name, weight in job.model.named_parameters()}
    after = {name.removeprefix("base_model.model."): weight for name, weight in unwrapped.items()}
    assert all(torch.equal(after[name], weight) for name, weight in before.items())


def test_fine_tuning_in_parts_ends_where_whole_batches_do(words: BpeTokenizer, base: Llama):
    """Answers differ in length, so the rows of a batch hold unlike numbers of scored targets."""
    found, ends = examples(words), []
    for micro_batch in (0, 3):
        model = copy.deepcopy(base).double()
        told = parse({**SFT, "steps": 5, "micro_batch": micro_batch})
        job = METHODS["sft"](model, found, told)
        fit(job.model, job.batches, job.loss, told)
        ends.append(list(job.model.parameters()))
    for whole, parts in zip(*ends, strict=True):
        torch.testing.assert_close(parts, whole, atol=1e-4, rtol=0)


class Stopped(Exception):
    """What a killed process would be."""


@SECTIONS
@pytest.mark.parametrize("optimizer", ["adamw", "muon", "adamw_8bit"])
def test_a_fine_tuning_that_was_interrupted_ends_as_one_that_was_not(
    section: dict[str, Any], optimizer: str, words: BpeTokenizer, base: Llama, packed: Llama, tmp_path: Path
):
    told, found = parse({**section, "optimizer": optimizer}), examples(words)
    model = start_of(section, base, packed)

    def fresh() -> sft.Job:
        return METHODS[told.method](copy.deepcopy(model), found, told)

    def interrupted(step: int, metrics: Any) -> None:
        if step == 40:
            raise Stopped

    whole, halved, resumed = fresh(), fresh(), fresh()
    fit(whole.model, whole.batches, whole.loss, told)
    with pytest.raises(Stopped):
        fit(halved.model, halved.batches, halved.loss, told, interrupted, Journal(tmp_path / "run"))
    fitted = fit(resumed.model, resumed.batches, resumed.loss, told, journal=Journal(tmp_path / "run"))
    assert fitted.resumed_at == 30
    ends = zip(whole.plain().state_dict().items(), resumed.plain().state_dict().values(), strict=True)
    assert all(torch.equal(weight, other) for (_, weight), other in ends)


def test_moments_in_eight_bits_learn_as_those_in_thirty_two_do_and_take_a_quarter_of_the_room(words: BpeTokenizer, base: Llama):
    found, sizes, losses = examples(words), {}, {}
    for kind in ("adamw", "adamw_8bit"):
        told, model = parse({**SFT, "optimizer": kind}), copy.deepcopy(base)
        job = METHODS["sft"](model, found, told)
        fit(job.model, job.batches, job.loss, told)
        losses[kind] = answer_loss(model, found, batch=8)
        [part] = (optimizer := build_optimizer(model, told)).parts
        next_token(model, job.batches(0)).backward()
        optimizer.step()
        table = part.state[model.model.embed_tokens.weight]
        sizes[kind] = sum(tensor.nbytes for name, tensor in table.items() if name not in ("step", "qmap1", "qmap2"))
    assert losses["adamw_8bit"] == pytest.approx(losses["adamw"], rel=0.05)
    assert sizes["adamw"] == 2 * 4 * 320 * 32
    assert sizes["adamw_8bit"] == 2 * 320 * 32 + 2 * 4 * 320 * 32 / 256  # and a scale for each 256 of them


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a card it can page")
def test_a_paged_optimizer_is_refused_where_there_is_nothing_to_page_to(words: BpeTokenizer, packed: Llama):
    told = parse({**QLORA, "optimizer": "paged_adamw_8bit"})
    job = METHODS["qlora"](packed, examples(words), told)
    with pytest.raises(ValueError, match=r"paged_adamw_8bit moves moments .*, and this is a CPU; set it to adamw_8bit"):
        fit(job.model, job.batches, job.loss, told)


# Answers


@pytest.mark.parametrize(
    ("found", "wanted", "exact", "f1"),
    [
        ("The Cat.", "cat", True, 1.0),
        ("English theologian (1328-1384)", "English theologian", False, 2 * (2 / 3) * 1 / (2 / 3 + 1)),
        ("a b b c", "b b b d", False, 2 * (2 / 3) * (2 / 4) / (2 / 3 + 2 / 4)),
        ("", "cat", False, 0.0),
        ("the", "", True, 1.0),
        ("dog", "cat", False, 0.0),
    ],
)
def test_answers_are_scored_as_squad_does(found: str, wanted: str, exact: bool, f1: float):
    assert exact_match(found, wanted) is exact
    assert token_f1(found, wanted) == pytest.approx(f1)


def test_a_task_waits_for_the_answer_that_it_does_not_show():
    question = questions(animals(), 1, choices=3, seed=1)[0]
    assert [message["role"] for message in task_of(question, with_passage=True).messages] == ["system", "user"]
    assert task_of(question, with_passage=True).messages[0]["content"] == question.passage
    assert task_of(question, with_passage=False) == Task(question_messages(question.question, []), question.answer)
    record = records(animals(), seed=1)[0]
    assert task_of_record(record) == Task(record["messages"][:-1], record["messages"][-1]["content"])


def test_a_question_whose_prompt_leaves_no_room_for_an_answer_is_not_asked(words: BpeTokenizer, base: Llama):
    short, long = (Task(question_messages("Why? " * times, []), "") for times in (1, 30))
    assert fitting([short, long], Engine(base, words), max_tokens=16) == [short]


def test_a_model_that_learned_its_answers_by_heart_gives_them(words: BpeTokenizer, base: Llama):
    one = animals()[8]
    told, task = parse(SFT), task_of_record(records([one], seed=1)[0])
    job = METHODS["sft"](base, encode_records(records([one], seed=1)[:1], words, 64), told)
    fit(job.model, job.batches, job.loss, told)
    exam = examine(Engine(job.plain(), words), [task, task], max_tokens=32)
    assert exam.answers == [one.description] * 2
    assert (exam.exact_match, exam.f1) == (1.0, 1.0)
    assert answers(Engine(base, words), [task], max_tokens=1)[0] != one.description


# The stage


@pytest.fixture
def project(words: BpeTokenizer, base: Llama, tmp_path: Path) -> Path:
    """A root with a corpus of animals and a base model, as download and train leave them."""
    corpus, folder = tmp_path / "artifacts/raw/wikipedia", tmp_path / "artifacts/models/base"
    corpus.mkdir(parents=True)
    folder.mkdir(parents=True)
    write_documents(corpus / "documents.jsonl", with_splits(animals(), 0.3))
    seal(corpus, "corpus", "download@wikipedia")
    save_model(base, folder, words.eot)
    words.save(folder)
    seal(folder, "model", "train@base", architecture="llama")
    return tmp_path


def tiny(name: str, **changes: Any) -> Params:
    """The two sections that the stage reads: the source as in params.yaml, the entry of `finetune` made small."""
    tree: Any = read_yaml(Path(__file__).parent.parent / "params.yaml")
    section = tree["finetune"][name] | PLAN | {"questions": 5, "samples": 2} | changes
    source = TypeAdapter(Source).validate_python(tree["sources"][section["records"]])
    return Params.model_construct(sources={section["records"]: source}, finetune={name: parse(section)})


def test_the_stage_makes_a_chat_model_that_transformers_opens_and_stops(project: Path, words: BpeTokenizer):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    stage.run(tiny("sft"), "sft", project)

    folder, logs = project / "artifacts/models/sft", project / "artifacts/logs/finetune/sft"
    manifest = verify(folder, "model")
    assert manifest.parents["base"] == verify(project / "artifacts/models/base").digest
    metrics = json.loads((logs / "metrics.json").read_text())
    assert metrics["val_loss"] < metrics["val_loss_before"]
    assert metrics["share"] == 1.0
    assert {"exact_match", "exact_match_before", "f1", "f1_before", "seconds", "tok_per_s", "records"} <= metrics.keys()
    rows = json.loads((logs / "answers.json").read_text())
    assert len(rows) == 2
    assert all(row.keys() == {"prompt", "before", "after", "wanted"} for row in rows)
    assert "val_loss" in (logs / "curve.csv").read_text().splitlines()[0]
    assert "transformers" in (folder / "README.md").read_text()
    assert not any((project / "runs").glob("*"))

    theirs, tokens = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    ours = load_model(folder)
    assert isinstance(ours, Llama)
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids()).logits, ours(ids()), atol=1e-5, rtol=1e-5)
    assert theirs.generation_config.eos_token_id == [words.eot, words.special["<|end|>"]]
    assert tokens.chat_template


def test_the_stage_makes_an_adapter_for_the_base_it_names(project: Path):
    stage.run(tiny("lora"), "lora", project)
    folder = project / "artifacts/models/lora"
    manifest = verify(folder, "adapter")
    assert manifest.parents["base"] == verify(project / "artifacts/models/base").digest
    assert not (folder / "model.safetensors").exists()
    base = load_model(project / "artifacts/models/base")
    assert isinstance(base, Llama)
    metrics = json.loads((project / "artifacts/logs/finetune/lora/metrics.json").read_text())
    assert metrics["total_parameters"] == parameters(base)
    assert metrics["trained_parameters"] == sum(tensor.numel() for tensor in load_tensors(folder / lora.WEIGHTS).values())
    assert metrics["share"] == metrics["trained_parameters"] / metrics["total_parameters"]
    assert lora.merge(lora.load_adapter(base, folder))(ids()).shape == (2, 16, 320)


def test_the_stage_makes_an_adapter_for_a_base_in_four_bits_and_counts_all_its_parameters(
    project: Path, words: BpeTokenizer, packed: Llama
):
    models = project / "artifacts/models"
    for name in ("plain64", "base_nf4"):
        (models / name).mkdir()
    save_model(plain_of(packed), models / "plain64", words.eot)
    words.save(models / "plain64")
    save_quantized(packed, models / "plain64", models / "base_nf4")
    seal(models / "base_nf4", "quantized", "quantize@base_nf4")

    stage.run(tiny("qlora"), "qlora", project)
    assert verify(models / "qlora", "adapter").parents["base"] == verify(models / "base_nf4").digest
    metrics = json.loads((project / "artifacts/logs/finetune/qlora/metrics.json").read_text())
    assert metrics["total_parameters"] == parameters(plain_of(packed))
    assert metrics["trained_parameters"] == sum(tensor.numel() for tensor in load_tensors(models / "qlora" / lora.WEIGHTS).values())
    assert metrics["val_loss"] < metrics["val_loss_before"]
    assert qlora.merge(lora.load_adapter(load_bundle(models / "base_nf4"), models / "qlora"))(ids()).shape == (2, 16, 320)


def test_the_same_fine_tuning_gives_the_same_bundle(project: Path):
    stage.run(tiny("lora"), "lora", project)
    first = verify(project / "artifacts/models/lora").digest
    stage.run(tiny("lora"), "lora", project)
    assert verify(project / "artifacts/models/lora").digest == first


def test_nothing_that_is_held_out_or_asked_is_learned(project: Path):
    learnable, held_out, tasks = conversations(project / "artifacts/raw/wikipedia", share=0.3, seed=1)
    titles = [document.title for document in with_splits(animals(), 0.3) if document.split == "validation"]
    assert 5 < len(titles) < 40
    assert len(held_out) == 3 * len(titles)
    assert len(tasks) == len(titles)
    told = json.dumps(learnable)
    assert not [title for title in titles if f"{title} " in told or f"{title}?" in told]


def test_a_corpus_of_chat_records_is_learned_as_it_stands_and_one_bad_record_stops_it_all(project: Path):
    corpus = project / "artifacts/raw/wikipedia"
    (corpus / "documents.jsonl").unlink()
    write_records(corpus / "mine.jsonl", records(animals(), seed=1))
    seal(corpus, "corpus", "download@wikipedia")
    stage.run(tiny("sft"), "sft", project)
    digest = verify(project / "artifacts/models/sft").digest

    with (corpus / "mine.jsonl").open("a") as file:
        file.write('{"id": "x", "kind": "talk", "messages": [{"role": "bot", "content": "hi"}]}\n')
    seal(corpus, "corpus", "download@wikipedia")
    with pytest.raises(RecordError, match=r"mine.jsonl: 1 of 181 records are bad: line 181: messages\[0\].role: found 'bot'"):
        stage.run(tiny("sft"), "sft", project)
    assert verify(project / "artifacts/models/sft").digest == digest
    assert not (project / "runs").exists() or not any((project / "runs").iterdir())


def test_a_batch_may_not_be_longer_than_the_base_sees(project: Path):
    with pytest.raises(ValueError, match=r"finetune.sft.context is 128, but base sees 64 tokens; lower it"):
        stage.run(tiny("sft", context=128), "sft", project)
