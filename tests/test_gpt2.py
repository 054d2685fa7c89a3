"""GPT-2, 124 M: OpenAI's names and shapes, transformers' logits at the real size, and the arithmetic of its speed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from llm_from_scratch.bundle import BundleError
from llm_from_scratch.evaluation.speed import card_peak, flops_per_token, mfu, peak_flops, peak_memory_mb
from llm_from_scratch.model.bigram import BigramParams
from llm_from_scratch.model.gpt import Gpt, GptParams, GptShape, with_vocabulary
from llm_from_scratch.model.huggingface import weight_files
from llm_from_scratch.model.llama import Llama, LlamaParams, LlamaShape
from llm_from_scratch.model.registry import build, export_state, import_state, load_model, parameters, save_model

ROOT = Path(__file__).parent.parent
SMALL = GptShape(vocab_size=50257, context=1024, width=768, layers=12, heads=12, hidden=3072, dropout=0.0, norm_eps=1e-5)
TOY = GptParams(architecture="gpt", context=32, width=16, layers=2, heads=2, dropout=0.0)


def ids(vocab_size: int, count: int = 40) -> torch.Tensor:
    return torch.randint(vocab_size, (2, count), generator=torch.Generator().manual_seed(1))


# --- the real size ----------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@torch.inference_mode()
def test_at_124_million_parameters_both_directions_give_transformers_logits() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    theirs = GPT2LMHeadModel(GPT2Config(attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0)).eval()
    assert sum(weight.numel() for weight in theirs.parameters()) == 124_439_808
    with torch.random.fork_rng():
        ours = Gpt(SMALL).eval()
    assert parameters(ours) == 124_439_808
    asked = ids(50257)

    before = ours(asked)
    assert not torch.allclose(before, theirs(asked).logits, atol=1e-2)

    import_state(ours, theirs.state_dict())
    assert torch.allclose(ours(asked), theirs(asked).logits, atol=1e-4), "theirs, loaded here"

    for weight in ours.parameters():
        weight.mul_(1.1)
    found = theirs.load_state_dict(export_state(ours), strict=False)
    assert found.missing_keys == ["lm_head.weight"], "the tied head, and nothing else"
    assert not found.unexpected_keys
    theirs.tie_weights()
    assert torch.allclose(ours(asked), theirs(asked).logits, atol=1e-4), "ours, loaded there"


# --- OpenAI's checkpoint ----------------------------------------------------------------------------------------------------------


def published(folder: Path) -> Gpt:
    """A folder in the form of openai-community/gpt2, with weights of our own: bare names, (in, out) matrices, masks, an old config."""
    torch.manual_seed(2)
    model = build(TOY, 97)
    assert isinstance(model, Gpt)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight) * 0.3)
    tensors = {name.removeprefix("transformer."): tensor.contiguous() for name, tensor in export_state(model).items()}
    masks = {f"h.{layer}.attn.bias": torch.ones(1, 1, 32, 32).tril() for layer in range(2)}
    config = {
        "activation_function": "gelu_new", "architectures": ["GPT2LMHeadModel"], "attn_pdrop": 0.1, "bos_token_id": 96,
        "embd_pdrop": 0.1, "eos_token_id": 96, "initializer_range": 0.02, "layer_norm_epsilon": 1e-05, "model_type": "gpt2",
        "n_ctx": 32, "n_embd": 16, "n_head": 2, "n_layer": 2, "n_positions": 32, "resid_pdrop": 0.1, "summary_activation": None,
        "summary_first_dropout": 0.1, "summary_proj_to_labels": True, "summary_type": "cls_index", "summary_use_proj": True,
        "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}}, "vocab_size": 97,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors | masks, folder / "model.safetensors")
    return model.eval()


@torch.inference_mode()
def test_openais_names_are_those_of_the_published_file(tmp_path: Path) -> None:
    model = published(tmp_path)
    names = load_file(tmp_path / "model.safetensors")
    assert {"wte.weight", "wpe.weight", "ln_f.bias", "h.0.attn.c_attn.weight", "h.1.mlp.c_proj.bias", "h.0.attn.bias"} <= names.keys()
    assert "lm_head.weight" not in names
    assert names["h.0.attn.c_attn.weight"].shape == (16, 48), "(in, out), as Conv1D has it"

    from transformers import GPT2LMHeadModel

    theirs = GPT2LMHeadModel.from_pretrained(tmp_path).eval()
    loaded = load_model(tmp_path)
    assert isinstance(loaded, Gpt)
    assert torch.allclose(loaded(ids(97, 32)), theirs(ids(97, 32)).logits, atol=1e-4)
    assert torch.equal(loaded(ids(97, 32)), model(ids(97, 32)))


@torch.inference_mode()
def test_openais_checkpoint_opens_in_shards_too(tmp_path: Path) -> None:
    model = published(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    where = {name: f"model-{1 + place % 2:05d}-of-00002.safetensors" for place, name in enumerate(sorted(tensors))}
    for shard in set(where.values()):
        save_file({name: tensors[name] for name in where if where[name] == shard}, tmp_path / shard)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))

    assert [path.name for path in weight_files(tmp_path)] == sorted(set(where.values()))
    loaded = load_model(tmp_path)
    assert isinstance(loaded, Gpt)
    assert torch.equal(loaded(ids(97, 32)), model(ids(97, 32)))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model.bin.index.json", "model.pt"])
def test_a_pickle_is_refused_and_never_opened(tmp_path: Path, name: str) -> None:
    published(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / name).write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")
    wanted = rf"{name} is a pickle, which runs code when it is opened; fetch model\.safetensors of the same model$"
    with pytest.raises(BundleError, match=wanted) as refusal:
        weight_files(tmp_path)
    assert "\n" not in str(refusal.value)


def test_a_pickle_beside_safetensors_is_left_alone(tmp_path: Path) -> None:
    published(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")
    assert weight_files(tmp_path) == [tmp_path / "model.safetensors"]


# --- the vocabulary ---------------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def test_room_for_chat_tokens_changes_no_old_logit_and_opens_in_transformers(tmp_path: Path) -> None:
    """GPT-2 has 50,257 tokens, the last of them <|endoftext|>, at the id where ours puts it; the four of a chat come after."""
    from transformers import AutoModelForCausalLM

    model = published(tmp_path)
    before = torch.random.get_rng_state()
    grown = with_vocabulary(model, 101)
    assert torch.equal(torch.random.get_rng_state(), before)

    logits = grown(ids(97, 32))
    assert logits.shape[-1] == grown.vocab_size == grown.shape.vocab_size == 101
    assert torch.allclose(logits[..., :97], model(ids(97, 32)), atol=1e-5)
    assert torch.allclose(logits[..., 97:], logits[..., :97].mean(-1, keepdim=True).expand(-1, -1, 4), atol=1e-4)
    assert not grown.training

    (tmp_path / "grown").mkdir()
    save_model(grown, tmp_path / "grown", eot=96)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opened: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "grown").eval()
    assert torch.allclose(opened(ids(101, 32)).logits, grown(ids(101, 32)), atol=1e-4)
    with pytest.raises(ValueError, match="the model has 97 tokens, and 96 would cut some off"):
        with_vocabulary(model, 96)


# --- speed ------------------------------------------------------------------------------------------------------------------------


def test_the_operations_of_gpt2_worked_by_hand() -> None:
    """6 · (124,439,808 parameters without the 1024 x 768 positions) + 12 · 12 layers · 1024 tokens · 768 = 855,166,464."""
    with torch.device("meta"):
        model = Gpt(SMALL)
    assert 6 * (124_439_808 - 1024 * 768) + 12 * 12 * 1024 * 768 == 855_166_464
    assert flops_per_token(model, 1024) == 855_166_464
    assert flops_per_token(model, 512) == 855_166_464 - 12 * 12 * 512 * 768


def test_only_what_is_multiplied_counts() -> None:
    """One llama layer, 8 wide, 2 heads of 4, one key-value head, 12 hidden, 10 tokens: 8·8 + 2·8·4 + 8·8 + 3·8·12 + 3 norms of 8."""
    shape = LlamaShape(
        vocab_size=10, context=16, width=8, layers=1, heads=2, kv_heads=1, head_dim=4, hidden=12, rope_theta=1e4, qk_norm=False,
        tied=True, norm_eps=1e-6,
    )  # fmt: skip
    untied = LlamaShape(**{**vars(shape), "tied": False})
    inside = 64 + 64 + 64 + 288 + 24
    assert flops_per_token(Llama(shape), 16) == 6 * (inside + 80) + 12 * 1 * 16 * 8
    assert flops_per_token(Llama(untied), 16) == flops_per_token(Llama(shape), 16), "a token table apart from the head is looked up"


def test_a_model_whose_operations_nobody_counted_is_refused() -> None:
    with pytest.raises(ValueError, match="the operations of a Bigram are not counted; give a gpt or a llama"):
        flops_per_token(build(BigramParams(architecture="bigram"), 9), 16)


def test_mfu_is_the_share_of_the_peak() -> None:
    """The A100's 312 TFLOP/s at 171,000 tokens/s of GPT-2: 171,000 · 855,166,464 / 312e12 = 0.4687."""
    assert mfu(171_000, 855_166_464, 312e12) == pytest.approx(0.4687, abs=5e-5)
    assert mfu(171_000, 855_166_464, None) is None


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H200", 989.0),
        ("NVIDIA H100 80GB HBM3", 989.0),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA H100 NVL", 835.0),
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA A10", 125.0),
        ("NVIDIA A10G", 70.0),
        ("NVIDIA L4", 121.0),
        ("NVIDIA L40S", 362.0),
        ("NVIDIA GeForce RTX 4090", 165.2),
    ],
)
def test_a_card_is_known_by_the_words_of_its_name(name: str, tflops: float) -> None:
    assert card_peak(name) == tflops * 1e12


@pytest.mark.parametrize("name", ["Tesla T4", "NVIDIA GeForce RTX 2080", "A1000"])
def test_a_card_without_a_data_sheet_has_no_peak(name: str) -> None:
    assert card_peak(name) is None


def test_a_cpus_peak_is_measured_and_its_memory_is_the_process() -> None:
    found = peak_flops(torch.device("cpu"))
    assert found is not None
    assert 1e8 < found < 1e14
    assert peak_memory_mb(torch.device("cpu")) > 50


def test_a_llama_of_gpt2s_size_is_of_its_size(shipped_gpu: dict[str, Any]) -> None:
    """The profile compares the two at equal size: within 3%."""
    llama = build(LlamaParams(architecture="llama", **shipped_gpu["train"]["base"]["model"]), 50_261)
    with torch.device("meta"):
        gpt = build(GptParams(architecture="gpt", **shipped_gpu["train"]["gpt_bpe"]["model"]), 50_261)
    assert isinstance(gpt, Gpt)
    assert gpt.shape == GptShape(**{**vars(SMALL), "vocab_size": 50_261})
    assert parameters(llama) == pytest.approx(parameters(gpt), rel=0.03)


@pytest.fixture
def shipped_gpu() -> dict[str, Any]:
    from ruamel.yaml import YAML

    content: dict[str, Any] = YAML(typ="safe", pure=True).load(ROOT / "profiles/gpu.yaml")
    return content


# --- the benchmark ----------------------------------------------------------------------------------------------------------------


def benchmark(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks.gpu_pretraining", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""})


@pytest.mark.slow
def test_the_benchmark_of_the_card_runs_at_toy_width_and_can_be_had_in_two_parts(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("\n\n".join(f"The cat number {number} sat on a mat and saw {number} dogs." for number in range(300)))
    problem = {"ctx": "The cat", "endings": [" sat on a mat.", " mat", " dogs dogs", " a"], "label": 0}
    (tmp_path / "hs.jsonl").write_text(json.dumps(problem) + "\n" + json.dumps(problem | {"label": 2}) + "\n")
    shared = (
        "--quick",
        "--text",
        tmp_path / "text.txt",
        "--hellaswag",
        tmp_path / "hs.jsonl",
        "--parts",
        tmp_path / "parts",
        "--out",
        tmp_path,
    )

    first = benchmark(*shared, "--only", "llama")
    assert first.returncode == 0, first.stderr
    assert first.stdout == "no table yet: gpt2 is to come, with --only gpt2 and the same --parts\n"
    both = benchmark(*shared)
    assert both.returncode == 0, both.stderr

    found = json.loads((tmp_path / "gpu_pretraining.json").read_text())
    assert [row["model"] for row in found["rows"]] == ["GPT-2, AdamW", "Llama-shaped, Muon"]
    for row in found["rows"]:
        assert row["tokens"] == 8 * 4 * 32
        assert row["accuracy_norm"] in (0, 0.5, 1)
        assert 0 < row["MFU"] < 1
    curves = json.loads((tmp_path / "gpu_pretraining_curves.json").read_text())
    assert [point["step"] for point in curves["gpt2"]] == [4, 8]
    assert all("val_bpb" in point and "val_ppl" in point for curve in curves.values() for point in curve)
    assert str(tmp_path) not in (tmp_path / "gpu_pretraining.md").read_text()


def test_the_benchmark_without_a_card_says_so(tmp_path: Path) -> None:
    run = benchmark("--out", tmp_path)
    assert run.returncode == 2
    assert run.stderr.endswith("error: no CUDA card here, and two models of 124 M need one; --quick shows at toy size that it runs\n")
