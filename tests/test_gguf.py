"""GGUF: what we write, transformers and llama.cpp read as the same model; what others write opens here or is refused by name."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf as library
import numpy as np
import pytest
import torch
from torch import Tensor

from llm_from_scratch.inference.sampling import Sampling, generate
from llm_from_scratch.model import gguf, imports
from llm_from_scratch.model.gpt import Gpt, GptShape
from llm_from_scratch.model.llama import Llama, LlamaShape
from llm_from_scratch.tokenizer import CharTokenizer, ImportedTokenizer
from llm_from_scratch.tokenizer import gguf as words_gguf
from llm_from_scratch.tokenizer.bpe import BpeTokenizer, train_bpe
from llm_from_scratch.tokenizer.char import train_char
from tests.tiny import SENTENCES

ROOT = Path(__file__).parent.parent
LLAMA_CPP = os.environ.get("LLM_TEST_LLAMA_CPP", "")
CHILD = ROOT / "benchmarks/llama_cpp_child.py"

BPE = train_bpe(SENTENCES, 300)
CHAR = train_char([*SENTENCES, "naïve – 東\n"])
LLAMA = LlamaShape(
    vocab_size=BPE.vocab_size, context=64, width=64, layers=2, heads=4, kv_heads=2, head_dim=16, hidden=96, rope_theta=5000.0,
    qk_norm=False, tied=True, norm_eps=1e-5,
)  # fmt: skip
GPT = GptShape(vocab_size=BPE.vocab_size, context=1024, width=64, layers=2, heads=4, hidden=256, dropout=0.0, norm_eps=1e-5)
"""Of the context and the inner width that transformers takes for granted in a gpt2."""
MODELS: dict[str, Callable[[], Gpt | Llama]] = {
    "llama": lambda: Llama(LLAMA),
    "llama_untied_with_wide_heads": lambda: Llama(replace(LLAMA, tied=False, head_dim=32, kv_heads=4)),
    "qwen3": lambda: Llama(replace(LLAMA, qk_norm=True, heads=2, kv_heads=1, head_dim=128)),  # transformers knows no other head width
    "gpt2": lambda: Gpt(GPT),
}
TEXTS = [*SENTENCES, "  two  spaces, it's we'll\n\n 12 345 naïve 東京", "<|end|>"]


def noisy(name: str) -> Gpt | Llama:
    """Every weight moved, so that no two could be swapped unnoticed."""
    torch.manual_seed(0)
    model = MODELS[name]()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight) * 0.3)
    return model.eval()


def halved(model: Gpt | Llama) -> Gpt | Llama:
    """Every matrix as half precision has it."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 2 and "wpe" not in name:
                weight.copy_(weight.half())
    return model


@torch.no_grad()
def logits(model: Any, vocab_size: int) -> Tensor:
    out = model(torch.randint(vocab_size, (2, 20), generator=torch.Generator().manual_seed(1)))
    return out if isinstance(out, Tensor) else out.logits


def exported(folder: Path, model: Gpt | Llama, kind: Any = "f16", words: Any = BPE, **changes: Any) -> Path:
    """A file of ours, with fields changed."""
    path = folder / f"model.{kind}.gguf"
    gguf.write(path, model, kind, words_gguf.fields(words) | {f"{name.replace('__', '.')}": value for name, value in changes.items()})
    return path


# --- out and in again -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_half_precision_comes_back_as_the_rounded_weights_exactly(name: str, tmp_path: Path) -> None:
    model = noisy(name)
    path = exported(tmp_path, model)
    found = imports.read_gguf(path).model
    assert found.shape == replace(model.shape, norm_eps=pytest.approx(model.shape.norm_eps, rel=1e-6))
    wanted = halved(model).state_dict()
    for key, weight in found.state_dict().items():
        assert torch.equal(weight, wanted[key]), key


@pytest.mark.parametrize("name", MODELS)
def test_q8_0_comes_back_within_half_a_step(name: str, tmp_path: Path) -> None:
    """A block of 32 weights of a row shares a scale, a 127th of the largest; the scale itself is rounded to half precision."""
    model = noisy(name)
    found = imports.read_gguf(exported(tmp_path, model, "q8_0")).model.state_dict()
    for key, weight in model.state_dict().items():
        if weight.dim() < 2 or "wpe" in key:
            assert torch.equal(found[key], weight), key
            continue
        blocks = weight.unflatten(-1, (-1, 32))
        step = blocks.abs().amax(-1, keepdim=True) / 127
        error = (found[key].unflatten(-1, (-1, 32)) - blocks).abs()
        assert bool((error <= step * (0.5 + 127 * 2**-11) + 1e-7).all()), key
        assert not torch.equal(found[key], weight), key


@pytest.mark.parametrize("name", MODELS)
def test_transformers_reads_our_file_as_the_same_model(name: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = noisy(name)
    exported(tmp_path, model)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.f16.gguf", dtype=torch.float32).eval()
    assert torch.allclose(logits(theirs, BPE.vocab_size), logits(halved(model), BPE.vocab_size), atol=1e-4)


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "BF16"])
def test_other_peoples_blocks_are_unpacked_as_transformers_does(kind: str, tmp_path: Path) -> None:
    """The matrices of a file of ours, packed by llama.cpp's own code."""
    from transformers import AutoModelForCausalLM

    packed = library.GGMLQuantizationType[kind]
    reader = library.GGUFReader(exported(tmp_path, noisy("llama")))
    writer = library.GGUFWriter(tmp_path / "packed.gguf", "llama")
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture":
            writer.add_key_value(name, field.contents(), field.types[0], field.types[-1] if len(field.types) > 1 else None)
    for tensor in reader.tensors:
        data = library.quants.dequantize(tensor.data, tensor.tensor_type)
        stored = packed if data.ndim == 2 else library.GGMLQuantizationType.F32
        writer.add_tensor(tensor.name, library.quants.quantize(data, stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="packed.gguf", dtype=torch.float32).state_dict()
    for name, weight in imports.read_gguf(tmp_path / "packed.gguf").model.state_dict().items():
        assert torch.equal(weight, theirs[name]), name


def test_a_weight_that_half_precision_cannot_hold_is_not_exported(tmp_path: Path) -> None:
    model = noisy("llama")
    with torch.no_grad():
        model.state_dict()["model.layers.0.mlp.up_proj.weight"][0, 0] = 70000
    with pytest.raises(ValueError, match=r"ffn_up.weight holds 7e\+04, and half precision ends at 65504; it cannot be exported"):
        exported(tmp_path, model)


# --- tokenizers -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", [BPE, CHAR], ids=["bpe", "char"])
def test_our_tokenizers_come_back_as_they_were(words: BpeTokenizer | CharTokenizer, tmp_path: Path) -> None:
    model = Llama(replace(LLAMA, vocab_size=words.vocab_size)).eval()
    source = imports.read_gguf(exported(tmp_path, model, words=words))
    found = words_gguf.from_fields(source.metadata)
    assert type(found) is type(words)
    assert found.document() == words.document()
    assert source.ends == {"bos_token_id": words.eot, "eos_token_id": [words.eot, words.end_of_turn], "pad_token_id": words.eot}


def test_a_stranger_reads_our_tokenizer_from_the_file_alone(tmp_path: Path) -> None:
    """transformers, and our own import without our mark."""
    from transformers import AutoTokenizer

    path = exported(tmp_path, noisy("llama"))
    theirs = AutoTokenizer.from_pretrained(tmp_path, gguf_file=path.name)
    found = words_gguf.from_fields({name: value for name, value in imports.read_gguf(path).metadata.items() if name != words_gguf.MARK})
    assert isinstance(found, ImportedTokenizer)
    for text in TEXTS:
        assert found.encode(text) == BPE.encode(text)
        assert found.decode(BPE.encode(text)) == text
        if "<|" not in text:
            assert theirs(text, add_special_tokens=False).input_ids == BPE.encode(text)
    assert (found.special, found.eot, found.vocab_size) == (BPE.special, BPE.eot, BPE.vocab_size)
    asked = [{"role": "user", "content": "The cat?"}, {"role": "assistant", "content": "An animal."}]
    assert theirs.apply_chat_template(asked, return_dict=False) == found_ids(found, asked)


def found_ids(words: Any, messages: Any) -> list[int]:
    from llm_from_scratch.tokenizer.chat import render

    ids = render(messages, words, prompt=False)[0]
    assert ids == render(messages, BPE, prompt=False)[0]
    return ids


# --- refusals ---------------------------------------------------------------------------------------------------------------------

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "scaled_rotations": ({"llama__rope__scaling__type": "yarn"}, "llama.rope.scaling.type is 'yarn', which is not computed here"),
    "part_of_a_head": (
        {"llama__rope__dimension_count": 8},
        "llama.rope.dimension_count is 8, and only the head width, 16, is computed here",
    ),
    "experts": ({"llama__expert_count": 8}, "llama.expert_count is 8, which is not computed here"),
    "uneven_layers": ({"llama__attention__head_count_kv": [2, 4]}, "llama.attention.head_count_kv differs from layer to layer"),
    "sentencepiece": ({"tokenizer__ggml__model": "llama"}, "tokenizer.ggml.model is 'llama', and only byte-level BPE .* not pieces"),
    "unknown_split": ({"tokenizer__ggml__pre": "tekken"}, "tokenizer.ggml.pre is 'tekken', a split pattern not known here; gpt-2, smollm"),
    "added_tokens": ({"tokenizer__ggml__add_bos_token": True}, "tokenizer.ggml.add_bos_token is set, and nothing is put around a text"),
    "merges": ({"tokenizer__ggml__merges": ["a b"]}, "its merges do not give its tokens; export it again"),
    "tokens": ({"tokenizer__ggml__token_type": [1]}, "zip\\(\\) argument 2 is shorter"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_computed_here_is_refused_by_name(case: str, tmp_path: Path) -> None:
    changes, complaint = REFUSED[case]
    path = exported(tmp_path, noisy("llama"), **changes)
    with pytest.raises(ValueError, match=complaint) as refusal:
        words_gguf.from_fields(imports.read_gguf(path).metadata)
    assert "\n" not in str(refusal.value)


def test_a_tensor_without_a_place_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    writer = library.GGUFWriter(path, "llama")
    for name, value in {
        "attention.head_count": 4,
        "embedding_length": 64,
        "context_length": 8,
        "block_count": 1,
        "feed_forward_length": 8,
    }.items():
        writer.add_uint32(f"llama.{name}", value)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    for name in ("token_embd.weight", "rope_freqs.weight"):
        writer.add_tensor(name, np.ones((4, 64), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ValueError, match=r"model.gguf: the tensor rope_freqs.weight has no place in a llama as it is computed here"):
        gguf.read(path)


@pytest.mark.parametrize("share", [0.0, 0.02, 0.9])
def test_half_a_file_is_refused_in_one_line(share: float, tmp_path: Path) -> None:
    path = exported(tmp_path, noisy("llama"))
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(ValueError, match=r"model.f16.gguf is not a whole GGUF file \(.*\); fetch it again$") as refusal:
        gguf.read(path)
    assert "\n" not in str(refusal.value)


def test_another_architecture_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    writer = library.GGUFWriter(path, "mamba")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(ValueError, match=r"general.architecture is 'mamba', and only llama, qwen3, gpt2 are read"):
        gguf.read(path)


# --- llama.cpp --------------------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not LLAMA_CPP, reason="needs an interpreter that has llama-cpp-python: name it in LLM_TEST_LLAMA_CPP")
@pytest.mark.parametrize("kind", ["f16", "q8_0"])
@pytest.mark.parametrize("words", [BPE, CHAR], ids=["bpe", "char"])
@pytest.mark.parametrize("name", MODELS)
def test_llama_cpp_runs_our_file_and_says_the_same(name: str, words: BpeTokenizer | CharTokenizer, kind: str, tmp_path: Path) -> None:
    """Greedily, in half precision token by token; Q8_0 rounds activations too, so there the first token must do."""
    model = noisy(name)
    model = imports.fitted(model, words.vocab_size) if words.vocab_size <= model.shape.vocab_size else model
    path = exported(tmp_path, model, kind, words)
    prompts = [words.encode(text) for text in SENTENCES[:2]]
    texts = TEXTS if isinstance(words, BpeTokenizer) else [*SENTENCES, "naïve – 東\n"]
    question = {"file": str(path), "threads": 1, "texts": texts, "prompts": prompts, "tokens": 12, "rounds": 1}
    run = subprocess.run([LLAMA_CPP, str(CHILD)], input=json.dumps(question), capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-2000:]
    answer = json.loads(run.stdout)

    assert answer["tokenized"] == [words.encode(text) for text in texts]
    ours = halved(model) if kind == "f16" else imports.read_gguf(path).model
    for prompt, found in zip(prompts, answer["continued"][0], strict=True):
        wanted = list(generate(ours, prompt, Sampling(temperature=0, max_tokens=12), words.eot))
        known = len(wanted) if kind == "f16" else 1
        assert found["ids"][:known] == wanted[:known]
