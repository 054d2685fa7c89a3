"""Folders: what we save opens in transformers with the same logits, what transformers saves opens here, and bad folders say why."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from llm_from_scratch.bundle import BundleError
from llm_from_scratch.model.attention import AttentionParams
from llm_from_scratch.model.bigram import BigramParams
from llm_from_scratch.model.gpt import Gpt, GptParams
from llm_from_scratch.model.llama import Llama, LlamaParams, LlamaShape
from llm_from_scratch.model.mlp import MlpParams
from llm_from_scratch.model.registry import ModelParams, build, export_state, import_state, load_model, save_model
from llm_from_scratch.model.rung import Rung

V, EOT = 37, 36
LLAMA = LlamaParams(
    architecture="llama", context=32, width=32, layers=2, heads=4, kv_heads=2, hidden=48, rope_theta=5000.0, qk_norm=False, copying=0.0
)
GPT = GptParams(architecture="gpt", context=32, width=32, layers=2, heads=4, dropout=0.1)
FAMILIES: dict[str, ModelParams] = {"gpt": GPT, "llama": LLAMA, "qwen3": LLAMA.model_copy(update={"qk_norm": True})}
OURS: dict[str, ModelParams] = {
    "bigram": BigramParams(architecture="bigram"),
    "mlp": MlpParams(architecture="mlp", window=3, width=8, hidden=16),
    "attention": AttentionParams(architecture="attention", context=32, width=24, layers=2, heads=3),
}


def noisy(model: Rung) -> Rung:
    """Every weight moved, so that no two could be swapped unnoticed."""
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight) * 0.3)
    return model.eval()


def ids() -> Tensor:
    return torch.randint(V, (2, 20), generator=torch.Generator().manual_seed(1))


def theirs(kind: str, **changes: Any) -> nn.Module:
    """A model made by transformers, with random weights and nothing of ours in it."""
    import transformers as hf

    torch.manual_seed(3)
    small = {"vocab_size": V, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 32}
    llama = small | {"intermediate_size": 48, "num_key_value_heads": 2, "initializer_range": 0.3}
    made: dict[str, Callable[[], nn.Module]] = {
        "gpt2": lambda: hf.GPT2LMHeadModel(
            hf.GPT2Config(vocab_size=V, n_embd=32, n_layer=2, n_head=4, n_positions=32, initializer_range=0.3, **changes)
        ),
        "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**llama | changes)),
        "qwen3": lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**llama | {"head_dim": 16} | changes)),
    }
    return made[kind]().eval()


def save_theirs(model: nn.Module, folder: Path, **options: Any) -> None:
    model.save_pretrained(folder, **options)  # type: ignore[operator]


@torch.no_grad()
def logits(model: Any) -> Tensor:
    out = model(ids())
    return out if isinstance(out, Tensor) else out.logits


def config(folder: Path, **changes: Any) -> dict[str, Any]:
    """config.json of a folder, changed in place; a change to None takes the field away."""
    path = folder / "config.json"
    fields = {
        name: value for name, value in {**json.loads(path.read_text()), **changes}.items() if name not in changes or value is not None
    }
    path.write_text(json.dumps(fields))
    return fields


# --- ours to theirs ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_what_we_save_opens_in_transformers_with_our_logits(name: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = noisy(build(FAMILIES[name], V))
    save_model(model, tmp_path, eot=EOT)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opened, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)

    assert {key: list(found) for key, found in report.items() if found} == {}, "nothing missing, unexpected or mismatched"
    assert torch.allclose(logits(opened.eval()), logits(model), atol=1e-4)
    assert (opened.generation_config.eos_token_id, opened.generation_config.pad_token_id) == (EOT, EOT)
    assert opened.dtype == torch.float32


def test_an_untied_llama_brings_its_head_along(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    shape = LlamaShape(
        vocab_size=V, context=32, width=32, layers=1, heads=4, kv_heads=4, head_dim=16, hidden=48, rope_theta=1e6, qk_norm=False,
        tied=False, norm_eps=1e-5,
    )  # fmt: skip
    model = noisy(Llama(shape))
    save_model(model, tmp_path, eot=EOT)

    assert "lm_head.weight" in load_file(tmp_path / "model.safetensors")
    assert torch.allclose(logits(AutoModelForCausalLM.from_pretrained(tmp_path).eval()), logits(model), atol=1e-4)
    assert torch.equal(logits(load_model(tmp_path)), logits(model))


def test_a_chat_model_stops_at_the_end_of_a_message_too(tmp_path: Path) -> None:
    save_model(build(LLAMA, V), tmp_path, eot=36, end=35)
    generation = json.loads((tmp_path / "generation_config.json").read_text())
    assert generation == {"bos_token_id": 36, "eos_token_id": [36, 35], "pad_token_id": 36}


# --- theirs to ours ---------------------------------------------------------------------------------------------------------------

CHANGES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("gpt2", {}),
    "gpt2_narrow_mlp": ("gpt2", {"n_inner": 40}),
    "llama_untied": ("llama", {}),
    "llama_tied_and_turned_slowly": (
        "llama",
        {"tie_word_embeddings": True, "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}},
    ),
    "llama_without_sharing": ("llama", {"num_key_value_heads": 4, "rms_norm_eps": 1e-3}),
    "qwen3_wide_heads": ("qwen3", {"head_dim": 24, "tie_word_embeddings": True}),
}


@pytest.mark.parametrize("case", CHANGES)
def test_what_transformers_saves_opens_here_with_its_logits(case: str, tmp_path: Path) -> None:
    kind, changes = CHANGES[case]
    model = theirs(kind, **changes)
    save_theirs(model, tmp_path)
    opened = load_model(tmp_path)
    assert isinstance(opened, Gpt | Llama)
    assert not opened.training
    assert torch.allclose(logits(opened), logits(model), atol=1e-4)


def test_a_sharded_checkpoint_is_read_through_its_index(tmp_path: Path) -> None:
    model = theirs("llama")
    save_theirs(model, tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    assert torch.allclose(logits(load_model(tmp_path)), logits(model), atol=1e-4)


def test_openais_checkpoint_opens_though_its_names_are_bare_and_its_masks_saved(tmp_path: Path) -> None:
    """The openai-community/gpt2 files say `h.0.attn…` where GPT2LMHeadModel says `transformer.h.0.attn…`, and hold the causal mask."""
    model = theirs("gpt2")
    save_theirs(model, tmp_path)
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in load_file(tmp_path / "model.safetensors").items()}
    masks = {f"h.{layer}.attn.bias": torch.ones(32, 32).tril()[None, None] for layer in range(2)}
    save_file({**tensors, **masks}, tmp_path / "model.safetensors")
    config(tmp_path, n_inner=None, tie_word_embeddings=None, activation_function="gelu_new", scale_attn_weights=None)
    assert torch.allclose(logits(load_model(tmp_path)), logits(model), atol=1e-4)


def test_an_old_llama_config_with_a_bare_rope_theta_is_understood(tmp_path: Path) -> None:
    model = theirs("llama", rope_parameters={"rope_type": "default", "rope_theta": 77.0})
    save_theirs(model, tmp_path)
    config(tmp_path, rope_parameters=None, rope_theta=77.0, rope_scaling=None, head_dim=None)
    assert torch.allclose(logits(load_model(tmp_path)), logits(model), atol=1e-4)


def test_half_precision_weights_are_read_as_full(tmp_path: Path) -> None:
    from transformers import LlamaForCausalLM

    save_theirs(theirs("llama").bfloat16(), tmp_path)
    opened = load_model(tmp_path)
    assert isinstance(opened, Llama)
    assert {weight.dtype for weight in opened.parameters()} == {torch.float32}
    assert torch.allclose(logits(opened), logits(LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()), atol=1e-4)


# --- round trips ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*OURS, *FAMILIES])
def test_every_rung_comes_back_from_its_folder_alone(name: str, tmp_path: Path) -> None:
    model = noisy(build({**OURS, **FAMILIES}[name], V))
    save_model(model, tmp_path, eot=EOT)

    torch.manual_seed(9)
    before = torch.random.get_rng_state()
    loaded = load_model(tmp_path)

    assert torch.equal(torch.random.get_rng_state(), before), "loading draws none of the caller's random numbers"
    assert isinstance(loaded, Rung)
    assert type(loaded) is type(model)
    assert torch.equal(logits(loaded), logits(model))
    assert loaded.context == model.context
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "generation_config.json", "model.safetensors"}


@pytest.mark.parametrize("name", [*OURS, *FAMILIES])
def test_exported_tensors_import_into_a_fresh_model(name: str) -> None:
    params = {**OURS, **FAMILIES}[name]
    model, fresh = noisy(build(params, V)), build(params, V).eval()
    import_state(fresh, export_state(model))
    assert torch.equal(logits(fresh), logits(model))


# --- what is refused --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_model(build(LLAMA, V), tmp_path, eot=EOT)
    return tmp_path


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "mini_gtp"}, "no rung 'mini_gtp'; the ladder is ngram < bigram < mlp < attention < gpt < llama"),
        ({"model_type": "llm_from_scratch_mini"}, "no rung 'llm_from_scratch_mini'; the ladder is"),
        ({"intermediate_size": 50}, r"mlp\.down_proj\.weight: found shape \(32, 48\), config\.json wants \(32, 50\)"),
        ({"num_hidden_layers": 3}, r"model\.layers\.2\.\S+ is missing \(9 such names\)"),
        ({"num_hidden_layers": 1}, r"model\.layers\.1\.\S+ has no place in the model \(9 such names\)"),
        ({"tie_word_embeddings": False}, r"lm_head\.weight is missing"),
        ({"hidden_size": None}, "has no 'hidden_size'"),
        ({"vocab_size": None}, "has no 'vocab_size'"),
        ({"hidden_act": "relu"}, "hidden_act is 'relu', and this rung computes only 'silu'"),
        ({"attention_bias": True}, "attention_bias is True, and this rung computes only False"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "rope_type is 'llama3', and this rung computes only 'default'"),
        ({"model_type": "llm_from_scratch_mlp"}, r"config\.json of a mlp: .*as save_model wrote it"),
    ],
)
def test_a_folder_that_does_not_fit_is_refused_in_one_line(folder: Path, changes: dict[str, Any], message: str) -> None:
    config(folder, **changes)
    with pytest.raises(ValueError, match=message) as refusal:
        load_model(folder)
    assert "\n" not in str(refusal.value)
    assert str(folder) in str(refusal.value)


def test_a_gpt2_with_another_function_is_refused(tmp_path: Path) -> None:
    save_model(build(GPT, V), tmp_path, eot=EOT)
    config(tmp_path, activation_function="relu")
    with pytest.raises(ValueError, match="activation_function is 'relu', and this rung computes only 'gelu_new' or 'gelu_pytorch_tanh'"):
        load_model(tmp_path)


def test_a_folder_without_its_files_says_which(folder: Path, tmp_path: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-40])
    with pytest.raises(BundleError, match=r"model\.safetensors: not a whole safetensors file"):
        load_model(folder)
    weights.unlink()
    with pytest.raises(BundleError, match=r"model\.safetensors"):
        load_model(folder)
    config(folder, model_type=None)
    with pytest.raises(BundleError, match="has no model_type"):
        load_model(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(BundleError, match="is not JSON"):
        load_model(folder)
    with pytest.raises(BundleError, match=r"no config\.json in"):
        load_model(tmp_path / "nowhere")


def test_an_index_cannot_point_outside_its_folder(folder: Path) -> None:
    inside = folder / "inner"
    inside.mkdir()
    (inside / "config.json").write_bytes((folder / "config.json").read_bytes())
    (inside / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"model.norm.weight": "../model.safetensors"}}))
    with pytest.raises(BundleError, match=r"inner/model\.safetensors"):
        load_model(inside)
