"""Quantized models: what is packed, what is left alone, and that transformers reads what we write."""

from __future__ import annotations

import json
import logging
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from llm_from_scratch import bundle, config
from llm_from_scratch.bundle import BundleError, load_tensors, save_tensors
from llm_from_scratch.config import Params
from llm_from_scratch.data.shards import write_shards
from llm_from_scratch.evaluation.compare import compare
from llm_from_scratch.evaluation.latency import batch_latency, latency, prefill, step_seconds
from llm_from_scratch.evaluation.speed import resident_mb, size_mb
from llm_from_scratch.inference import int8
from llm_from_scratch.inference import quantize as quantizing
from llm_from_scratch.inference.decoding import decoder
from llm_from_scratch.inference.int8 import Dynamic, WeightOnly
from llm_from_scratch.inference.kv_cache import KVCache
from llm_from_scratch.inference.quantize import (
    QuantizeParams,
    dequantized,
    linear_mb,
    load_bundle,
    quantize,
    quantized_layers,
    save_quantized,
    scheme_of,
)
from llm_from_scratch.inference.sampling import Sampling, generate
from llm_from_scratch.model.bigram import Bigram, BigramParams
from llm_from_scratch.model.gpt import GptParams
from llm_from_scratch.model.llama import LlamaParams
from llm_from_scratch.model.registry import build, load_model, save_model
from llm_from_scratch.model.rung import Rung
from llm_from_scratch.tokenizer import BpeTokenizer
from stages import quantize as stage
from stages.__main__ import read_yaml
from tests.tiny import in_float32

VOCAB = 61
EOT = 60
SCHEMES = ("bf16", "int8", "int8_dynamic", "int8_weight", "nf4")
EIGHT_BITS = ("int8", "int8_dynamic", "int8_weight")
SAME_KERNEL = ("bf16", "int8", "nf4")
"""Schemes that transformers multiplies by as we do."""
LLAMA = LlamaParams(
    architecture="llama", context=32, width=64, layers=2, heads=4, kv_heads=2, hidden=128, rope_theta=10000.0, qk_norm=False, copying=0.0
)
SHAPES = {
    "llama": LLAMA,
    "qwen3": LLAMA.model_copy(update={"qk_norm": True}),
    "gpt2": GptParams(architecture="gpt", context=32, width=64, layers=2, heads=4, dropout=0.0),
}


def trained(shape: str) -> Rung:
    """A model whose every weight matters: what starts at zero is drawn too."""
    torch.manual_seed(3)
    model = build(SHAPES[shape], VOCAB)
    for weight in model.parameters():
        if weight.dim() == 2:
            nn.init.normal_(weight, std=weight.shape[1] ** -0.5)
    return model.eval()


@pytest.fixture(params=SHAPES)
def shape(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def plain(shape: str, tmp_path: Path) -> Path:
    """A plain bundle on disk."""
    folder = tmp_path / "plain"
    folder.mkdir()
    save_model(trained(shape), folder, EOT)
    (folder / "tokenizer.json").write_text("{}", encoding="utf-8")
    return folder


def written(source: Path, scheme: str) -> tuple[nn.Module, Path]:
    """A quantized model and the folder it was saved to."""
    model = quantize(load_model(source), scheme)
    folder = source.with_name(scheme)
    folder.mkdir()
    save_quantized(model, source, folder)
    return model, folder


def ids_of(count: int) -> Tensor:
    return torch.randint(0, VOCAB, (3, count), generator=torch.Generator().manual_seed(7))


@torch.no_grad()
def logits_of(model: nn.Module, ids: Tensor) -> Tensor:
    return model(ids)


@pytest.mark.parametrize("scheme", SAME_KERNEL)
def test_transformers_opens_the_folder_and_gives_our_logits(plain: Path, scheme: str) -> None:
    from transformers import AutoModelForCausalLM

    model, folder = written(plain, scheme)
    theirs = in_float32(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))
    with torch.no_grad():
        assert torch.allclose(logits_of(model, ids_of(20)), theirs(ids_of(20)).logits, atol=1e-4)


@pytest.mark.parametrize("scheme", SAME_KERNEL)
def test_the_file_is_byte_for_byte_what_transformers_would_have_written(plain: Path, scheme: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    four_bits = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": torch.float32}
    asked = {
        "bf16": {"dtype": torch.bfloat16},
        "int8": {"dtype": torch.float32, "quantization_config": BitsAndBytesConfig(load_in_8bit=True)},
        "nf4": {"dtype": torch.float32, "quantization_config": BitsAndBytesConfig(load_in_4bit=True, **four_bits)},
    }
    AutoModelForCausalLM.from_pretrained(plain, **asked[scheme]).save_pretrained(tmp_path / "theirs")
    _, ours = written(plain, scheme)

    expected, found = load_tensors(tmp_path / "theirs" / "model.safetensors"), load_tensors(ours / "model.safetensors")
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert tensor.dtype == found[name].dtype, name
        assert torch.equal(tensor, found[name]), name


def test_three_kernels_share_one_file_and_transformers_runs_each_as_llm_int8(plain: Path) -> None:
    from transformers import AutoModelForCausalLM

    folders = {scheme: written(plain, scheme)[1] for scheme in EIGHT_BITS}
    assert len({(folder / "model.safetensors").read_bytes() for folder in folders.values()}) == 1
    configs = {scheme: json.loads((folder / "config.json").read_text(encoding="utf-8")) for scheme, folder in folders.items()}
    assert [config.pop("llm_from_scratch_kernel", None) for config in configs.values()] == [None, "int8_dynamic", "int8_weight"]
    assert configs["int8"] == configs["int8_dynamic"] == configs["int8_weight"]

    theirs = AutoModelForCausalLM.from_pretrained(folders["int8_weight"], dtype=torch.float32)
    with torch.no_grad():
        logits = theirs(ids_of(20)).logits
    models = {scheme: load_bundle(folder) for scheme, folder in folders.items()}
    assert [scheme_of(model) for model in models.values() if isinstance(model, nn.Module)] == list(EIGHT_BITS)
    assert torch.allclose(logits_of(models["int8"], ids_of(20)), logits, atol=1e-4)
    for scheme in ("int8_dynamic", "int8_weight"):
        gap = (logits_of(models[scheme], ids_of(20)) - logits).abs().mean() / logits.std()
        assert 1e-6 < gap < 0.05, scheme


@pytest.mark.parametrize("scheme", SCHEMES)
def test_saving_and_loading_changes_nothing(plain: Path, scheme: str) -> None:
    model, folder = written(plain, scheme)
    again = load_bundle(folder)
    assert isinstance(again, nn.Module)
    assert not again.training
    assert torch.equal(logits_of(again, ids_of(20)), logits_of(model, ids_of(20)))

    second = folder.with_name("second")
    second.mkdir()
    save_quantized(again, folder, second)  # after a forward too, which moves int8's scales elsewhere in memory
    for name in ("model.safetensors", "config.json", "generation_config.json", "tokenizer.json"):
        assert (second / name).read_bytes() == (folder / name).read_bytes()


@pytest.mark.parametrize("scheme", EIGHT_BITS)
def test_an_int8_weight_is_a_whole_number_times_its_rows_scale_as_in_bitsandbytes(plain: Path, scheme: str) -> None:
    import bitsandbytes as bnb

    model, folder = written(plain, scheme)
    tensors = load_tensors(folder / "model.safetensors")
    originals = dict(load_model(plain).named_modules())
    for name, layer in quantized_layers(model).items():
        weight, scale, original = tensors[f"{name}.weight"], tensors[f"{name}.SCB"], originals[name].weight.detach()
        theirs, their_scale, _ = bnb.functional.int8_vectorwise_quant(original.half())
        assert torch.equal(weight, theirs)
        assert torch.equal(scale, their_scale)
        assert torch.equal(dequantized(layer), bnb.functional.int8_vectorwise_dequant(weight, scale))
        half_a_step = scale[:, None] / 127 / 2 + 1e-3 * original.abs()  # weights pass through float16 on the way
        assert ((original - dequantized(layer)).abs() <= half_a_step).all()


def test_an_nf4_weight_is_a_level_times_a_scale_that_is_itself_quantized_as_in_bitsandbytes(plain: Path) -> None:
    import bitsandbytes as bnb

    model, _ = written(plain, "nf4")
    for layer in quantized_layers(model).values():
        assert torch.equal(dequantized(layer), bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state))


def test_a_bf16_weight_keeps_eight_of_its_bits_of_precision(plain: Path) -> None:
    model, folder = written(plain, "bf16")
    assert all(tensor.dtype == torch.bfloat16 for tensor in load_tensors(folder / "model.safetensors").values())
    originals = dict(load_model(plain).named_modules())
    for name, layer in quantized_layers(model).items():
        assert torch.allclose(dequantized(layer), originals[name].weight, rtol=2**-8, atol=0)


def test_rounding_a_row_by_hand() -> None:
    weight, largest = int8.round_rows(torch.tensor([[2.0, -1.0, 0.5, 0.0], [0.0, 0.0, 0.0, 0.0], [-4.0, 4.0, 0.03125, 1.0]]))
    assert weight.tolist() == [[127, -64, 32, 0], [0, 0, 0, 0], [-127, 127, 1, 32]]  # -63.5 to even; 31.75; 0.99; 31.75
    assert largest.tolist() == [2.0, 0.0, 4.0]
    assert int8.dequantize(weight, largest)[0].tolist() == pytest.approx([2.0, -2 * 64 / 127, 2 * 32 / 127, 0.0])


@pytest.mark.parametrize("inputs", [64, 37])
@pytest.mark.parametrize("tokens", [1, 2, int8.FEW, int8.FEW + 1, 40])
def test_the_weight_only_product_is_that_of_the_dequantized_weights(tokens: int, inputs: int) -> None:
    """torch's kernel reads sixteen inputs at once, and would add to a row of 37 what lies behind it in memory."""
    torch.manual_seed(0)
    layer, x = WeightOnly.of(nn.Linear(inputs, 37)), torch.randn(tokens, inputs)
    assert layer.bias is not None
    wanted = x.bfloat16().double() @ dequantized(layer).double().T
    assert torch.allclose((layer(x) - layer.bias).double(), wanted, rtol=2**-8, atol=1e-5)


def test_the_weight_only_product_is_rounded_alike_for_few_tokens_and_for_many() -> None:
    """So that what scoring measures, window by window, is what answers token by token."""
    torch.manual_seed(0)
    layer, x = WeightOnly.of(nn.Linear(64, 48)), torch.randn(int8.FEW + 1, 64)
    few, many = layer(x[:-1]), layer(x)[:-1]
    assert (few == many).float().mean() > 0.95  # the others were near the middle of two numbers of bfloat16
    assert torch.allclose(few, many, rtol=2**-7, atol=1e-4)


def test_the_dynamic_product_by_hand() -> None:
    """Activations 1 and -0.25 are 127 and -32 steps of 1 / 127; the weights 2 and 1 are 127 and 64 steps of 2 / 127."""
    linear = nn.Linear(2, 1, bias=False)
    nn.init.constant_(linear.weight, 1.0)
    with torch.no_grad():
        linear.weight[0, 0] = 2.0
    layer = Dynamic.of(linear)
    found = layer(torch.tensor([[1.0, -0.25], [0.0, 0.0], [-100.0, 0.0]]))
    assert found.flatten().tolist() == pytest.approx([(127 * 127 - 32 * 64) * 2 / 127**2, 0.0, -200.0])


def test_the_dynamic_product_multiplies_whole_numbers_exactly_also_at_their_extremes() -> None:
    """Where pairs of products are added up in 16 bits, as some kernels without VNNI do, these would overflow."""
    layer = Dynamic.of(nn.Linear(512, 8, bias=False))
    layer.weight.fill_(127)
    layer.weight[1::2] = -127
    x = torch.ones(3, 512)
    expected = 512 * 127 * 127 * (1 / 127) * layer.scale * torch.tensor([1.0, -1.0] * 4)
    assert torch.allclose(layer(x), expected.expand(3, -1), rtol=1e-6)


def test_a_token_does_not_depend_on_the_fifteen_it_is_read_with() -> None:
    torch.manual_seed(0)
    x = torch.randn(16, 64) * torch.logspace(-2, 2, 16)[:, None]
    linear = nn.Linear(64, 48)
    dynamic, weight_only = Dynamic.of(linear), WeightOnly.of(linear)
    assert torch.equal(dynamic(x), torch.cat([dynamic(row) for row in x.split(1)]))
    assert torch.allclose(weight_only(x), torch.cat([weight_only(row) for row in x.split(1)]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scheme", ["int8_dynamic", "int8_weight"])
def test_sixteen_requests_in_step_get_what_each_gets_alone(shape: str, scheme: str) -> None:
    model = quantize(trained(shape), scheme)
    ids = torch.randint(0, VOCAB, (16, 12), generator=torch.Generator().manual_seed(5))
    with torch.inference_mode():
        cache = KVCache.of(model, 12, batch=16)
        together = torch.cat([model(ids[:, :4], cache), *(model(ids[:, step : step + 1], cache) for step in range(4, 12))], 1)
        for row in range(16):
            alone = decoder(model, 12)
            for length in (4, 8, 12):
                logits = alone(ids[row, :length].tolist())
                gap = (together[row, length - 1] - logits).abs().max()  # float32 sums in another order tip a rounding here and there
                assert gap < 0.1 * logits.std(), (row, length)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_only_the_linear_layers_of_the_blocks_are_replaced_and_the_original_stays(shape: str, scheme: str) -> None:
    model = trained(shape)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    small = quantize(model, scheme)

    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    layers = quantized_layers(small)
    assert len(layers) == 2 * (4 if shape == "gpt2" else 7)
    if scheme == "bf16":
        assert all(torch.equal(small.state_dict()[name], weight.bfloat16().float()) for name, weight in before.items())
        return
    untouched = {name for name in before if name.rpartition(".")[0] not in layers}
    assert any("wte" in name or "embed_tokens" in name for name in untouched)
    assert all(torch.equal(small.state_dict()[name], before[name]) for name in untouched)


def test_int8_dynamic_rounds_the_activations_of_the_mlps_and_not_of_attention(shape: str) -> None:
    small = quantize(trained(shape), "int8_dynamic")
    kinds = {name.split(".")[-2]: type(layer) for name, layer in quantized_layers(small).items()}
    assert kinds == {"attn" if shape == "gpt2" else "self_attn": WeightOnly, "mlp": Dynamic}
    assert scheme_of(small) == "int8_dynamic"


def test_nf4_refuses_rows_that_do_not_divide_into_its_blocks() -> None:
    """bitsandbytes 0.50's CPU kernel unpacks them with their neighbours' scales: the weights came out wrong, and nothing said so."""
    torch.manual_seed(0)
    model = build(LLAMA.model_copy(update={"hidden": 96}), VOCAB)
    with pytest.raises(ValueError, match="nf4 works on blocks of 64 weights and found 96 inputs; choose int8"):
        quantize(model, "nf4")
    assert quantized_layers(quantize(model, "int8"))


@pytest.fixture
def every_head_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantizing, "LARGE_HEAD", VOCAB * 64)


@pytest.mark.usefixtures("every_head_is_large")
@pytest.mark.parametrize("scheme", ["int8_dynamic", "int8_weight"])
def test_a_large_tied_head_is_an_8_bit_copy_of_the_embedding_which_is_looked_up_as_it_was(tmp_path: Path, scheme: str) -> None:
    plain = trained("llama")
    model = quantize(plain, scheme)
    head, table = model.get_submodule("lm_head"), plain.get_parameter("model.embed_tokens.weight")
    assert isinstance(head, int8.Int8Linear)
    assert torch.equal(model.get_parameter("model.embed_tokens.weight"), table)
    assert torch.equal(int8.dequantize(head.weight, head.SCB), int8.dequantize(*int8.round_rows(table.detach())))
    assert "lm_head" not in quantized_layers(model)

    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(1))
    wanted = x @ int8.dequantize(head.weight, head.SCB).T
    gap = (head(x) - wanted).abs().max() / wanted.std()
    assert gap < 0.05, "activations are rounded, to 8 bits or to bfloat16"


@pytest.mark.usefixtures("every_head_is_large")
def test_a_copied_head_is_in_no_file_and_is_there_again_after_loading(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    source = tmp_path / "plain"
    source.mkdir()
    save_model(trained("llama"), source, EOT)
    folders = {scheme: written(source, scheme)[1] for scheme in EIGHT_BITS}
    assert len({(folder / "model.safetensors").read_bytes() for folder in folders.values()}) == 1
    for scheme in ("int8_dynamic", "int8_weight"):
        again = load_bundle(folders[scheme])
        assert isinstance(again, nn.Module)
        assert isinstance(again.get_submodule("lm_head"), int8.Int8Linear)
        assert torch.equal(logits_of(again, ids_of(9)), logits_of(quantize(load_model(source), scheme), ids_of(9)))
    theirs = AutoModelForCausalLM.from_pretrained(folders["int8_dynamic"], dtype=torch.float32)
    assert torch.equal(theirs.lm_head.weight, load_model(source).get_parameter("model.embed_tokens.weight"))


def test_marks_that_peft_asks_for_are_set() -> None:
    assert quantize(trained("llama"), "int8").is_loaded_in_8bit
    assert quantize(trained("llama"), "nf4").is_loaded_in_4bit


def test_megabytes_are_those_of_the_packed_tensors() -> None:
    weights = 2 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 128 * 64)  # q and o, k and v, the three of the MLP, in two layers
    rows = 2 * (2 * 64 + 2 * 32 + 2 * 128 + 64)
    packed, unpacked = linear_mb(quantize(trained("llama"), "int8"))
    assert unpacked == 4 * weights / 1e6
    assert packed == (weights + 4 * rows + 14) / 1e6  # a byte a weight, a scale a row, a byte a layer that says "row by row"
    assert linear_mb(quantize(trained("llama"), "int8_weight")) == (packed, unpacked)
    assert linear_mb(quantize(trained("llama"), "bf16")) == (unpacked / 2, unpacked)
    assert linear_mb(quantize(trained("llama"), "nf4"))[0] > weights / 2 / 1e6


def test_resident_megabytes_are_those_of_what_is_held_and_bf16_is_widened() -> None:
    model = trained("llama")
    tables = 2 * 32 * 16  # cosines and sines of 32 places and 16 dimensions
    plain = 4 * (sum(weight.numel() for weight in model.parameters()) + tables) / 1e6
    assert resident_mb(model) == pytest.approx(plain)
    assert resident_mb(quantize(model, "bf16")) == pytest.approx(plain)
    packed, unpacked = linear_mb(quantize(model, "int8"))
    rows = 2 * (2 * 64 + 2 * 32 + 2 * 128 + 64)
    for scheme, extra in (("int8", 0), ("int8_weight", 6 * rows / 1e6)):  # ours holds scales for the kernel, too
        small = quantize(model, scheme)
        logits_of(small, ids_of(3))
        assert resident_mb(small) == pytest.approx(plain - unpacked + packed + extra, abs=2e-5)


def test_an_outlier_in_one_token_changes_how_int8_reads_the_others() -> None:
    """Its column is taken out of the rounding for all tokens read together, so a step behind a cache is near, not equal."""
    import bitsandbytes as bnb

    torch.manual_seed(0)
    layer = bnb.nn.Linear8bitLt(64, 64, bias=False, has_fp16_weights=False, threshold=6.0).to("cpu").eval()
    x = torch.randn(1, 4, 64).clamp(-3, 3)
    calm = layer(x)
    assert torch.equal(calm[:, :1], layer(x[:, :1]))
    x[0, 3, 5] = 9.0
    assert not torch.equal(layer(x)[:, :1], calm[:, :1])
    assert torch.allclose(layer(x)[:, :1], calm[:, :1], atol=0.02)


def test_int8_says_nothing_at_every_step(caplog: pytest.LogCaptureFixture) -> None:
    """bitsandbytes used to warn at every layer and token that float32 becomes float16."""
    with caplog.at_level(logging.WARNING):
        logits_of(quantize(trained("llama"), "int8"), ids_of(4))
    assert not caplog.records


def test_a_quantized_model_still_writes_and_stays_near_its_original() -> None:
    model = trained("llama")
    ids = ids_of(300).flatten().numpy()
    found = {scheme: compare(model, quantize(model, scheme), ids, context=32, batch=4) for scheme in SCHEMES}
    assert 0 < found["bf16"].kl < found["int8_weight"].kl < min(found["int8"].kl, found["int8_dynamic"].kl)  # weights alone cost least
    assert max(agreement.kl for scheme, agreement in found.items() if scheme != "nf4") < found["nf4"].kl < 0.2
    assert 0.5 < found["nf4"].top1 < found["int8"].top1 < 1
    new = list(generate(quantize(model, "nf4"), [1, 2, 3], Sampling(temperature=0, max_tokens=40), EOT))
    assert 0 < len(new) <= 40  # past the context of 32 too, behind a cache
    assert EOT not in new


def test_a_model_without_such_layers_is_refused() -> None:
    with pytest.raises(ValueError, match="no linear layer inside the blocks of Bigram; only a plain gpt or llama"):
        quantize(Bigram(BigramParams(architecture="bigram"), VOCAB), "int8")
    for scheme in ("int8", "int8_weight"):
        with pytest.raises(ValueError, match="no linear layer"):
            quantize(quantize(trained("llama"), scheme), "nf4")


def test_an_unknown_scheme_and_an_unknown_kernel_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no scheme 'int2'; there is bf16, int8, int8_dynamic, int8_weight, nf4"):
        quantize(trained("llama"), "int2")
    _, folder = written_beside(tmp_path, "int8_weight")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps(config | {"llm_from_scratch_kernel": "int8_magic"}), encoding="utf-8")
    with pytest.raises(ValueError, match="llm_from_scratch_kernel is 'int8_magic', and there is int8_weight, int8_dynamic"):
        load_bundle(folder)


def test_a_model_that_is_not_quantized_is_not_saved_as_one(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="this Llama is not quantized; call quantize first"):
        save_quantized(trained("llama"), tmp_path, tmp_path)


def test_our_kernels_need_no_bitsandbytes_and_its_own_name_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    model, folder = written_beside(tmp_path, "int8_weight")
    again = load_bundle(folder)
    assert isinstance(again, nn.Module)
    assert torch.equal(logits_of(again, ids_of(5)), logits_of(model, ids_of(5)))
    with pytest.raises(ValueError, match=r"need bitsandbytes; pip install 'llm-from-scratch\[quantize\]'"):
        quantize(trained("llama"), "int8")


def test_of_what_bitsandbytes_says_on_import_only_the_kernel_that_nobody_wants_is_kept_quiet(caplog: pytest.LogCaptureFixture) -> None:
    """It stood in the output of every stage, on CPUs with bf16 units."""
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    logger.warning("Failed to load CPU gemm_4bit_forward from kernels-community: %s.", "No module named 'kernels'")
    logger.warning("another %s", "word")
    assert caplog.messages == ["another word"]


@pytest.mark.parametrize(
    ("scheme", "lost"),
    [("int8", "SCB"), ("int8_weight", "weight"), ("nf4", "weight.absmax"), ("nf4", "weight.quant_state.bitsandbytes__nf4")],
)
def test_a_file_that_lost_a_tensor_is_refused_by_the_layers_name(tmp_path: Path, scheme: str, lost: str) -> None:
    _, folder = written_beside(tmp_path, scheme)
    tensors = load_tensors(folder / "model.safetensors")
    del tensors[f"model.layers.1.mlp.up_proj.{lost}"]
    save_tensors(folder / "model.safetensors", tensors)
    with pytest.raises(BundleError, match=r"model\.layers\.1\.mlp\.up_proj cannot be unpacked"):
        load_bundle(folder)


def written_beside(source: Path, scheme: str) -> tuple[nn.Module, Path]:
    plain = source / "plain"
    plain.mkdir()
    save_model(trained("llama"), plain, EOT)
    return written(plain, scheme)


def test_left_over_and_missing_tensors_are_named(tmp_path: Path) -> None:
    _, folder = written_beside(tmp_path, "int8")
    tensors = load_tensors(folder / "model.safetensors")
    save_tensors(folder / "model.safetensors", tensors | {"model.extra.weight": torch.zeros(1)})
    with pytest.raises(BundleError, match=r"model\.extra\.weight has no place"):
        load_bundle(folder)
    del tensors["model.norm.weight"]
    save_tensors(folder / "model.safetensors", tensors)
    with pytest.raises(BundleError, match=r"model\.norm\.weight is missing"):
        load_bundle(folder)


@pytest.mark.parametrize("scheme", EIGHT_BITS)
def test_an_int8_weight_of_another_shape_is_refused(tmp_path: Path, scheme: str) -> None:
    _, folder = written_beside(tmp_path, scheme)
    tensors = load_tensors(folder / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight"
    save_tensors(folder / "model.safetensors", tensors | {name: tensors[name][:, :32]})
    with pytest.raises(
        BundleError, match=r"q_proj cannot be unpacked \(found torch.int8 \(64, 32\) with \(64,\) scales, wanted int8 \(64, 64\)"
    ):
        load_bundle(folder)


def test_another_quantization_and_a_lone_adapter_are_refused(tmp_path: Path) -> None:
    _, folder = written_beside(tmp_path, "nf4")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"] = {"quant_method": "gptq"}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(ValueError, match="quantized with 'gptq', and only bitsandbytes' int8 and nf4 are read"):
        load_bundle(folder)

    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}", encoding="utf-8")
    with pytest.raises(ValueError, match="holds an adapter"):
        load_bundle(adapter)


def test_divergence_is_what_it_is_by_hand() -> None:
    """Two bigrams over two tokens: one says 3/4 and 1/4, the other half and half."""
    one, other = (Bigram(BigramParams(architecture="bigram"), 2) for _ in range(2))
    nn.init.constant_(one.table.weight[:, 0], math.log(3))
    found = compare(one, other, np.array([0, 1, 1, 0, 1]), context=2, batch=1)
    assert found.kl == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5), rel=1e-6)
    assert (found.top1, found.tokens) == (1.0, 4)
    assert compare(one, one, np.array([0, 1]), context=2, batch=1).kl == 0
    with pytest.raises(ValueError, match="1 held-out tokens, wanted at least one window of 2"):
        compare(one, other, np.array([0]), context=2, batch=1)


def test_latency_times_every_token_and_size_counts_the_weights(plain: Path) -> None:
    model = load_model(plain)
    assert isinstance(model, nn.Module)
    steps = step_seconds(model, [1, 2, 3], 5)
    assert len(steps) == 5
    assert min(steps) > 0
    found = latency(model, [1, 2, 3], tokens=5, repeats=2)
    assert found.p50_ms > 0
    assert found.tok_per_s > 0
    assert size_mb(plain) == (plain / "model.safetensors").stat().st_size / 1e6


def test_requests_in_step_and_a_prompt_at_once_are_timed_too(plain: Path) -> None:
    model = load_model(plain)
    assert isinstance(model, nn.Module)
    found = batch_latency(model, [1, 2, 3], tokens=5, repeats=1, batch=4)
    assert found.tok_per_s == pytest.approx(4000 / found.p50_ms, rel=2)  # four tokens a step, and steps take alike
    assert prefill(model, [1, 2, 3], repeats=1) > 0
    with pytest.raises(ValueError, match="context holds 32"):
        batch_latency(model, [1] * 30, tokens=5, repeats=1, batch=2)


# The stage

WORDS = BpeTokenizer([])
"""A token a byte, and the special tokens."""


def rebuilt(root: Path, texts: list[str]) -> Params:
    """A root as the stages before leave it, with a small `base`, and the params that go with it."""
    params = config.parse(read_yaml(Path(__file__).parent.parent / "params.yaml"), "params.yaml")
    evaluate = params.evaluate.model_copy(update={"latency_tokens": 3, "latency_repeats": 1, "kl_tokens": 200})
    entries = {
        f"base_{scheme}": QuantizeParams(model="base", scheme=scheme, tokens="wikipedia_bpe", evaluate_tokens=300) for scheme in SCHEMES
    }
    with bundle.writing(root / "artifacts/tokens/wikipedia_bpe") as folder:
        facts = write_shards(folder, {"train": texts, "validation": texts}, WORDS.encode_batch, WORDS.eot, WORDS.vocab_size)
        WORDS.save(folder)
        bundle.seal(folder, "tokens", "tokenize@wikipedia_bpe", **facts)
    torch.manual_seed(0)
    with bundle.writing(root / "artifacts/models/base") as folder:
        save_model(build(LLAMA, WORDS.vocab_size), folder, WORDS.eot)
        WORDS.save(folder)
        bundle.seal(folder, "model", "train@base")
    return params.model_copy(update={"evaluate": evaluate, "quantize": entries})


def test_the_stage_leaves_a_sealed_bundle_of_its_parent_and_keeps_the_clock_out_of_it(tmp_path: Path) -> None:
    params = rebuilt(tmp_path, ["Held-out text that both models are asked to predict. " * 9])
    stage.run(params, "base_nf4", tmp_path)

    folder = tmp_path / "artifacts/models/base_nf4"
    manifest = bundle.verify(folder, "quantized")
    assert manifest.parents == {"model": bundle.read_manifest(tmp_path / "artifacts/models/base").digest}
    assert manifest.facts["replaced_layers"] == 14
    assert manifest.facts["tokenizer_digest"] == manifest.files["tokenizer.json"]
    stage.run(params, "base_nf4", tmp_path)
    assert bundle.read_manifest(folder).digest == manifest.digest

    metrics = json.loads((tmp_path / "artifacts/logs/quantize/base_nf4/metrics.json").read_text(encoding="utf-8"))
    loss, room = {"val_loss", "val_bpb", "val_ppl"}, {"size_mb", "linear_mb", "resident_mb"}
    speed = {"p50_ms", "tok_per_s", "p50_ms_batch16", "tok_per_s_batch16", "prefill_tok_per_s"}
    pairs = loss | room | speed
    assert metrics.keys() >= {"kl", "top1", "model", "scheme", "parameters", *pairs, *(f"{name}_fp32" for name in pairs)}
    assert metrics["size_mb"] < metrics["size_mb_fp32"]
    assert metrics["linear_mb"] < metrics["linear_mb_fp32"] / 5
    sample = (tmp_path / "artifacts/logs/quantize/base_nf4/sample.txt").read_text(encoding="utf-8")
    assert sample.startswith("base:\nHeld-out text th")
    assert "\nbase_nf4:\nHeld-out text th" in sample


@pytest.mark.parametrize("scheme", ["bf16", "int8_dynamic", "int8_weight"])
def test_the_stage_says_on_the_card_what_multiplies(tmp_path: Path, scheme: str) -> None:
    params = rebuilt(tmp_path, ["Held-out text that both models are asked to predict. " * 9])
    stage.run(params, f"base_{scheme}", tmp_path)
    card = (tmp_path / "artifacts/models" / f"base_{scheme}" / "README.md").read_text(encoding="utf-8")
    assert "`base` with the 14 linear layers of its blocks in" in card
    said = {"bf16": "the model in memory is not", "int8_dynamic": "rounded token by token", "int8_weight": "activations in bfloat16"}
    assert said[scheme] in card
    metrics = json.loads((tmp_path / f"artifacts/logs/quantize/base_{scheme}/metrics.json").read_text(encoding="utf-8"))
    assert metrics["scheme"] == scheme
    assert metrics["replaced_layers"] == 14
    assert metrics["size_mb"] < metrics["size_mb_fp32"]
    assert (metrics["resident_mb"] < metrics["resident_mb_fp32"]) == (scheme != "bf16")


def test_the_stage_refuses_a_model_of_another_tokenizer_and_what_is_no_model(tmp_path: Path) -> None:
    params = rebuilt(tmp_path, ["Some text. " * 60])
    with bundle.writing(tmp_path / "artifacts/tokens/wikipedia_bpe") as folder:
        other = BpeTokenizer([(0, 1)])
        facts = write_shards(folder, {"train": ["a b"], "validation": ["a b"]}, other.encode_batch, other.eot, other.vocab_size)
        other.save(folder)
        bundle.seal(folder, "tokens", "tokenize@wikipedia_bpe", **facts)
    with pytest.raises(ValueError, match=r"base has another tokenizer than .*wikipedia_bpe, which tokenize@wikipedia_bpe made"):
        stage.run(params, "base_int8", tmp_path)
    bundle.seal(tmp_path / "artifacts/models/base", "adapter", "finetune@lora")
    with pytest.raises(BundleError, match="found a bundle of kind 'adapter', wanted model"):
        stage.run(params, "base_int8", tmp_path)
