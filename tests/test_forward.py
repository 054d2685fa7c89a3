"""The compiled forward is the model's own: against torch, for shapes that divide into nothing, any number of cores, and 8-bit weights."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numba
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from llm_from_scratch.inference import forward as forwards
from llm_from_scratch.inference import int8, intrinsics, kernels
from llm_from_scratch.inference.forward import SEVERAL, CompiledLlama, forward_of
from llm_from_scratch.inference.kv_cache import SlotCache
from llm_from_scratch.inference.quantize import Scheme, dequantized, quantize, quantized_layers
from llm_from_scratch.inference.team import Team
from llm_from_scratch.model.gpt import GptParams
from llm_from_scratch.model.llama import Llama, LlamaParams
from llm_from_scratch.model.registry import build

ODD = LlamaParams(
    architecture="llama",
    context=48,
    width=36,
    layers=2,
    heads=6,
    kv_heads=2,
    hidden=50,
    rope_theta=10000.0,
    qk_norm=False,
    copying=0.0,
)
SHAPES = {
    "odd": ODD,
    "qwen3": ODD.model_copy(update={"qk_norm": True}),
    "even": ODD.model_copy(update={"width": 64, "heads": 4, "hidden": 128}),
}
TEXT = 20
ROOT = Path(__file__).parent.parent


@pytest.fixture(params=[1, 2, 3], ids=lambda cores: f"{cores} cores")
def cores(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """So many of them, however small the model is."""
    monkeypatch.setattr(forwards, "SMALL", 0)
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def drawn(name: str = "odd", vocab: int = 61, seed: int = 3) -> Llama:
    """Every weight matters, the norms' too."""
    torch.manual_seed(seed)
    model = build(SHAPES[name], vocab)
    assert isinstance(model, Llama)
    for weight in model.parameters():
        if weight.dim() == 2:
            nn.init.normal_(weight, std=weight.shape[1] ** -0.5)
        else:
            nn.init.normal_(weight, mean=1.0, std=0.2)
    return model.eval().requires_grad_(False)


def ids_of(rows: int, tokens: int, vocab: int = 61) -> Tensor:
    return torch.randint(0, vocab, (rows, tokens), generator=torch.Generator().manual_seed(rows * tokens))


@torch.inference_mode()
def stepwise(model: nn.Module, ids: Tensor, sizes: list[int], slots: int = 3, slot: int = 1) -> Tensor:
    """The logits (T, V) of ids (1, T), read so many at a time into one of several slots."""
    cache, read = SlotCache(model, slots, ids.size(1)), CompiledLlama(model)  # type: ignore[arg-type]
    found = [read(part, cache.rows(slot, 1, part.size(1), [slot]), True)[0] for part in ids.split(sizes, 1)]
    assert cache.lengths[slot] == ids.size(1)
    return torch.cat(found)


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("sizes", [[1] * TEXT, [2, 3, 4, 5, 6], [16, 3, 1]], ids=["singly", "mixed", "many"])
def test_a_text_has_the_logits_of_the_models_own_forward_however_it_is_cut(name: str, sizes: list[int], cores: int) -> None:
    model, ids = drawn(name), ids_of(1, TEXT)
    assert torch.allclose(stepwise(model, ids, sizes), model(ids)[0], atol=1e-5)


def test_rows_of_different_lengths_are_read_at_once_each_at_its_own_place(cores: int) -> None:
    model = drawn()
    cache, read = SlotCache(model, 6, TEXT), CompiledLlama(model)
    texts = [ids_of(1, length) for length in (1, 9, 20, 4, 13, 2)]
    with torch.inference_mode():
        for slot, ids in enumerate(texts):
            for part in ids[:, :-1].split(8, 1):
                if part.numel():
                    read(part, cache.rows(slot, 1, part.size(1), [slot]), False)
        last = torch.cat([ids[:, -1:] for ids in texts])
        found = read(last, cache.rows(0, 6, 1, range(6)), False)
        expected = torch.stack([model(ids)[0, -1:] for ids in texts])
    assert found.shape == (6, 1, 61)
    assert torch.allclose(found, expected, atol=1e-5)
    assert cache.lengths == [ids.size(1) for ids in texts]


def test_of_several_tokens_the_last_places_logits_alone_are_made_where_nobody_asks_for_more(cores: int) -> None:
    model, ids = drawn(), ids_of(2, 5)
    with torch.inference_mode():
        found = CompiledLlama(model)(ids, SlotCache(model, 2, TEXT).rows(0, 2, 5, range(2)), False)
        assert torch.allclose(found, model(ids)[:, -1:], atol=1e-5)


@pytest.mark.parametrize("tokens", [1, 2, 3, 7])
def test_a_tokens_bits_depend_neither_on_the_number_of_cores_nor_on_its_neighbours(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forwards, "SMALL", 0)
    model, before = drawn(), torch.get_num_threads()
    ids, others = ids_of(tokens, 1), ids_of(tokens, 1).flip(0)
    found = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            with torch.inference_mode():
                found.append(CompiledLlama(model)(ids, SlotCache(model, tokens, 8).rows(0, tokens, 1, ()), False))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
    with torch.inference_mode():
        turned = CompiledLlama(model)(others, SlotCache(model, tokens, 8).rows(0, tokens, 1, ()), False)
    assert torch.equal(turned.flip(0), found[0])


@pytest.mark.parametrize("head", ["its own", "large"])
@pytest.mark.parametrize("name", ["odd", "even"])
def test_8_bit_weights_are_multiplied_as_the_numbers_that_they_stand_for(
    name: str, head: str, cores: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llm_from_scratch.inference.quantize.LARGE_HEAD", 0 if head == "large" else 2**22)
    model, plain, ids = quantize(drawn(name), "int8_weight"), unpacked(drawn(name), "int8_weight"), ids_of(1, TEXT)
    assert torch.allclose(stepwise(model, ids, [1] * 12 + [8]), plain(ids)[0], atol=1e-5)


@pytest.mark.parametrize("name", ["odd", "even"])
def test_activations_are_rounded_where_the_scheme_rounds_them(name: str, cores: int) -> None:
    """Against float32 products of activations that were rounded before."""
    model, plain, ids = quantize(drawn(name), "int8_dynamic"), unpacked(drawn(name), "int8_dynamic"), ids_of(1, TEXT)
    unrounded = plain(ids)[0]
    for part in plain.modules():
        if part in mlps(plain):
            part.register_forward_pre_hook(lambda _, inputs: (rounded(inputs[0]),))
    wanted = plain(ids)[0]
    found = stepwise(model, ids, [1] * 12 + [8])
    apart = (found - wanted).abs().amax(1) / wanted.std(1)
    assert apart.median() < 1e-4
    assert apart.max() < 0.1, "a sum in another order may tip a rounding"
    assert (unrounded - wanted).abs().max() > 1e-3


def unpacked(model: Llama, scheme: Scheme) -> Llama:
    """The same model with the numbers that its 8-bit weights stand for, its head's too where that was copied."""
    small = quantize(model, scheme)
    for name, layer in quantized_layers(small).items():
        model.get_parameter(f"{name}.weight").data = dequantized(layer)
    copied = getattr(small, "lm_head", None)
    if copied is not None:
        model.lm_head = nn.Linear(copied.in_features, copied.out_features, bias=False)
        model.lm_head.weight.data = int8.dequantize(copied.weight, copied.SCB)
    return model


def mlps(model: Llama) -> set[nn.Module]:
    return {layer for block in model.model.layers for layer in block.get_submodule("mlp").children()}


def rounded(x: Tensor) -> Tensor:
    step = x.abs().amax(-1, keepdim=True) / 127
    return (x / step).round() * step


def test_training_goes_on_in_place_and_is_seen() -> None:
    model, ids = drawn().requires_grad_(True), ids_of(1, 6)
    read = CompiledLlama(model)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.1)
    with torch.inference_mode():
        assert torch.allclose(read(ids, SlotCache(model, 1, 8).rows(0, 1, 6, ()), True), model(ids), atol=1e-5)


def test_what_is_no_plain_llama_in_float32_and_many_tokens_are_read_by_the_model_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    inner = CompiledLlama.__call__
    monkeypatch.setattr(CompiledLlama, "__call__", lambda self, ids, *rest: (read.append(ids.numel()), inner(self, ids, *rest))[1])
    gpt = build(GptParams(architecture="gpt", context=48, width=32, layers=1, heads=2, dropout=0.0), 61).eval()
    for model, expected in ((gpt, []), (drawn().bfloat16(), []), (quantize(drawn("even"), "int8"), []), (drawn(), [1, SEVERAL])):
        read.clear()
        forward = forward_of(model)
        with torch.inference_mode():
            for tokens in (SEVERAL, SEVERAL + 1):
                found = forward(ids_of(1, tokens), SlotCache(model, 1, 48).rows(0, 1, tokens, ()), False)
                assert torch.allclose(found, model(ids_of(1, tokens))[:, -1:], atol=1e-5)
        assert read == expected


@pytest.mark.parametrize("scheme", [None, "int8_weight"])
def test_compiling_is_done_when_a_model_is_opened_and_not_when_the_first_request_waits(
    scheme: Scheme | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    inner, types = kernels.forward, list[tuple[Any, ...]]()
    monkeypatch.setattr(kernels, "forward", lambda *given: (types.append(tuple(map(numba.typeof, given))), inner(*given))[1])
    model = quantize(drawn(), scheme) if scheme else drawn()
    read, cache = CompiledLlama(model), SlotCache(model, 3, 24)  # type: ignore[arg-type]
    assert len(types) == 1
    with torch.inference_mode():
        for tokens in (1, 2, 5, 12):
            read(ids_of(1, tokens), cache.rows(1, 1, tokens, [1]), tokens == 5)
        read(ids_of(3, 1), cache.rows(0, 3, 1, ()), False)
    assert len(types) == 6
    assert len(set(types)) == 1


def test_a_head_of_its_own_is_read_whatever_the_blocks_are() -> None:
    model, ids = drawn(), ids_of(1, TEXT)
    model.lm_head = nn.Linear(36, 61, bias=False).requires_grad_(False)
    assert torch.allclose(stepwise(model, ids, [1, 4, 15]), model(ids)[0], atol=1e-5)
    small, plain = quantize(model, "int8_weight"), unpacked(drawn(), "int8_weight")
    plain.lm_head = model.lm_head
    assert torch.allclose(stepwise(small, ids, [1, 4, 15]), plain(ids)[0], atol=1e-5)


def test_a_model_that_is_converted_afterwards_leaves_the_engine_the_weights_that_it_had() -> None:
    """Its layers let go of their memory then, and the engine would have gone on reading there."""
    model, ids = drawn(), ids_of(1, 6)
    expected, read = model(ids), CompiledLlama(model)
    cache = SlotCache(model, 1, 8)
    model.double()
    rubbish = [torch.full((36, 36), torch.nan) for _ in range(400)]
    with torch.inference_mode():
        assert torch.allclose(read(ids, cache.rows(0, 1, 6, ()), True), expected, atol=1e-5)
    assert len(rubbish) == 400


def test_more_tokens_than_the_context_holds_are_refused() -> None:
    """The tables of rotations end there."""
    model = drawn()
    cache = SlotCache(model, 1, 100)
    cache.lengths[0] = 48
    with pytest.raises(ValueError, match="found 49 tokens, the context holds 48"):
        CompiledLlama(model)(ids_of(1, 1), cache.rows(0, 1, 1, [0]), False)


@pytest.mark.parametrize("change", ["a bias", "bfloat16", "by columns", "a wrapped embedding"])
def test_what_the_kernels_do_not_compute_is_not_given_to_them(change: str) -> None:
    model = drawn()
    layer = model.get_submodule("model.layers.1.mlp.up_proj")
    assert isinstance(layer, nn.Linear)
    if change == "a bias":
        layer.bias = nn.Parameter(torch.randn(50))
    elif change == "bfloat16":
        model.bfloat16()
    elif change == "by columns":
        layer.weight.data = layer.weight.data.t().contiguous().t()
    else:
        model.model.embed_tokens = type("Wrapped", (nn.Embedding,), {})(61, 36)
    assert not forwards._is_compilable(model)


@pytest.mark.parametrize("odd", [-1, 61])
@pytest.mark.usefixtures("cores")
def test_an_id_that_is_none_of_the_vocabularys_is_refused_before_anything_is_read(odd: int) -> None:
    """A word of memory beyond the table would be taken for an embedding."""
    model = drawn()
    read, cache = CompiledLlama(model), SlotCache(model, 2, TEXT)
    with pytest.raises(IndexError, match="not one of the vocabulary's"):
        read(torch.tensor([[5, odd]]), cache.rows(0, 1, 2, [0]), True)
    assert cache.lengths == [0, 0]
    assert torch.allclose(read(ids_of(1, 9), cache.rows(0, 1, 9, [0]), True), model(ids_of(1, 9)), atol=1e-5)


def test_a_function_that_cannot_be_kept_on_disk_is_compiled_all_the_same() -> None:
    """As in a container of which nothing can be written: there is no file beside which this one's machine code could lie."""
    made: dict[str, Any] = {}
    exec("def double(x):\n    return 2 * x", made)
    assert kernels._kept(made["double"])(21) == 42


def test_the_exponential_is_right_to_float32s_last_bits_and_nothing_is_lost_at_its_ends() -> None:
    x = np.linspace(-87, 88, 100_001).astype(np.float32)
    found = np.array([intrinsics.exp(value) for value in x])
    assert np.abs(found / np.exp(x.astype(np.float64)) - 1).max() < 2e-7
    assert intrinsics.exp(np.float32(0)) == 1
    assert 0 <= intrinsics.exp(np.float32(-1e30)) < 2e-38
    assert intrinsics.exp(np.float32(1e30)) > 1e38
    assert np.isnan(intrinsics.exp(np.float32(np.nan)))


def test_forwards_from_many_threads_take_turns_and_each_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forwards, "SMALL", 0)
    models, before, found = [drawn(seed=seed) for seed in range(4)], torch.get_num_threads(), {}
    torch.set_num_threads(2)

    def read(place: int) -> None:
        found[place] = stepwise(models[place], ids_of(1, TEXT), [1] * TEXT)

    try:
        threads = [threading.Thread(target=read, args=(place,)) for place in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    finally:
        torch.set_num_threads(before)
    for place, model in enumerate(models):
        assert torch.allclose(found[place], model(ids_of(1, TEXT))[0], atol=1e-5)


@pytest.mark.parametrize("broken", [0, 1])
def test_a_core_that_breaks_off_is_said_and_the_others_do_not_wait_for_it(broken: int) -> None:
    team = Team()

    def work(core: int, meeting: np.ndarray[Any, Any]) -> None:
        if core == broken:
            raise ValueError("no more")
        while not meeting[1]:
            pass

    with pytest.raises(ValueError, match="no more"):
        team.run(work, 2)
    assert sorted(those_that_came(team)) == [0, 1]


def those_that_came(team: Team) -> list[int]:
    """Each waits for the other, so one alone would never be done."""
    both, came = threading.Barrier(2, timeout=20), []

    def work(core: int, meeting: object) -> None:
        both.wait()
        came.append(core)
        both.wait()

    team.run(work, 2)
    return came


FORKING = """
import os
from llm_from_scratch.inference.team import TEAM
from tests.test_forward import those_that_came

assert len(those_that_came(TEAM)) == 2
child = os.fork()
if child == 0:
    os._exit(len(those_that_came(TEAM)) - 2)
assert os.waitpid(child, 0)[1] == 0
"""


def test_a_process_that_was_forked_has_a_team_of_its_own() -> None:
    """It would have waited for threads that stayed behind. (In an interpreter of its own: what else runs in this one has threads too.)"""
    subprocess.run([sys.executable, "-c", FORKING], cwd=ROOT, check=True, timeout=60)
