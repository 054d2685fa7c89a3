"""The neural rungs: promises that all keep, then what each adds, by hand or against a slower way."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pydantic import TypeAdapter, ValidationError
from torch import Tensor, nn

from llm_from_scratch.model.attention import Attention, AttentionParams, MultiHead, SingleHead, waves
from llm_from_scratch.model.bigram import Bigram, BigramParams
from llm_from_scratch.model.causal import attend, attention_weights
from llm_from_scratch.model.gpt import Gpt, GptParams, GptShape
from llm_from_scratch.model.llama import Llama, LlamaParams, rotate, rotation_tables
from llm_from_scratch.model.mlp import Mlp, MlpParams
from llm_from_scratch.model.ngram import NgramParams
from llm_from_scratch.model.positions import cos_sin
from llm_from_scratch.model.registry import LADDER, ModelParams, build, parameters
from llm_from_scratch.model.rung import Rung

V = 23
LLAMA = LlamaParams(
    architecture="llama", context=16, width=24, layers=2, heads=4, kv_heads=2, hidden=40, rope_theta=10000.0, qk_norm=False, copying=0.0
)
RUNGS: dict[str, ModelParams] = {
    "bigram": BigramParams(architecture="bigram"),
    "mlp": MlpParams(architecture="mlp", window=3, width=8, hidden=16),
    "attention": AttentionParams(architecture="attention", context=16, width=24, layers=2, heads=3),
    "gpt": GptParams(architecture="gpt", context=16, width=24, layers=2, heads=3, dropout=0.1),
    "llama": LLAMA,
    "llama_qk_norm": LLAMA.model_copy(update={"qk_norm": True}),
    "llama_one_kv_head": LLAMA.model_copy(update={"kv_heads": 1}),
}
CACHED = ["gpt", "llama", "llama_qk_norm", "llama_one_kv_head"]
SHOWING = ["attention", *CACHED]


def rung(name: str) -> Rung:
    """A rung in eval mode with noise on every weight: as built, a Llama block adds nothing, and a promise about it would be empty."""
    torch.manual_seed(0)
    model = build(RUNGS[name], V).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight) * 0.2)
    return model


def tokens(batch: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(V, (batch, length), generator=torch.Generator().manual_seed(seed))


class GrowingCache:
    """The obvious cache: a list a layer, one more piece each time."""

    lengths = None
    mask = None

    def __init__(self) -> None:
        self.length = 0
        self.stored: dict[int, list[tuple[Tensor, Tensor]]] = {}

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        self.stored.setdefault(layer, []).append((k, v))
        keys, values = zip(*self.stored[layer], strict=True)
        return torch.cat(keys, 2), torch.cat(values, 2)

    def advance(self, tokens: int) -> None:
        self.length += tokens


# --- what every rung promises -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RUNGS)
def test_a_later_token_never_changes_an_earlier_prediction(name: str) -> None:
    model, ids = rung(name), tokens(2, 12)
    for place in range(12):
        changed = ids.clone()
        changed[:, place] = (changed[:, place] + 1) % V
        before, after = model(ids), model(changed)
        assert torch.allclose(before[:, :place], after[:, :place], atol=1e-6)
        assert not torch.allclose(before[:, place], after[:, place], atol=1e-3), "and the token itself always matters"


@pytest.mark.parametrize("name", RUNGS)
def test_a_text_means_the_same_alone_and_in_a_batch(name: str) -> None:
    model, ids = rung(name), tokens(3, 9)
    alone = torch.cat([model(row[None]) for row in ids])
    assert model(ids).shape == (3, 9, V)
    assert torch.allclose(model(ids), alone, atol=1e-5)


@pytest.mark.parametrize("name", RUNGS)
def test_an_untrained_rung_is_about_as_unsure_as_a_uniform_guess(name: str) -> None:
    torch.manual_seed(0)
    ids = tokens(8, 13)
    loss = F.cross_entropy(build(RUNGS[name], V).eval()(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
    assert loss.item() == pytest.approx(torch.log(torch.tensor(float(V))).item(), abs=0.45)


@pytest.mark.parametrize("name", RUNGS)
def test_every_weight_learns(name: str) -> None:
    model, ids = rung(name).train(), tokens(4, 12)
    F.cross_entropy(model(ids).flatten(0, 1), ids.roll(-1).flatten()).backward()  # type: ignore[no-untyped-call]
    assert [weight for weight, value in model.named_parameters() if value.grad is None or not value.grad.any()] == []


@pytest.mark.parametrize("name", ["attention", "gpt", "llama"])
def test_a_text_longer_than_the_context_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="found 17 tokens, the context holds 16; give the last 16 only"):
        rung(name)(tokens(1, 17))


@pytest.mark.parametrize("name", ["bigram", "mlp", "attention"])
def test_a_rung_without_keys_refuses_a_cache(name: str) -> None:
    model = rung(name)
    assert not model.supports_cache
    with pytest.raises(ValueError, match=f"{type(model).__name__} has no keys and values to cache"):
        model(tokens(1, 2), GrowingCache())


def test_the_ladder_names_itself_when_a_rung_is_unknown() -> None:
    adapter: TypeAdapter[ModelParams] = TypeAdapter(ModelParams)
    with pytest.raises(ValidationError, match="no rung 'mini_gtp'; the ladder is ngram < bigram < mlp < attention < gpt < llama"):
        adapter.validate_python({"architecture": "mini_gtp"})
    with pytest.raises(ValidationError, match="window"):
        adapter.validate_python({"architecture": "mlp", "window": 0, "width": 8, "hidden": 8})
    assert {adapter.validate_python(params.model_dump()).architecture for params in RUNGS.values()} == set(LADDER) - {"ngram"}
    with pytest.raises(ValueError, match=r"NGram\.train counts one"):
        build(NgramParams(architecture="ngram", order=3), V)


# --- bigram -------------------------------------------------------------------------------------------------------------------------


def test_the_bigram_learns_by_gradient_what_counting_gives() -> None:
    pairs = torch.tensor([(0, 1), (0, 1), (0, 1), (0, 2), (1, 0), (2, 2), (2, 0)])
    model = Bigram(BigramParams(architecture="bigram"), vocab_size=3)
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=200)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(pairs[:, :1]).squeeze(1), pairs[:, 1])
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    counted = torch.tensor([[0, 3 / 4, 1 / 4], [1, 0, 0], [1 / 2, 0, 1 / 2]])
    assert torch.allclose(model(torch.arange(3)[None])[0].softmax(-1), counted, atol=1e-3)


# --- mlp ----------------------------------------------------------------------------------------------------------------------------


def test_the_mlp_sees_its_window_and_nothing_before_it() -> None:
    model, ids = rung("mlp"), tokens(1, 10)
    base = model(ids)
    for back in range(5):
        changed = ids.clone()
        changed[0, 9 - back] = (changed[0, 9 - back] + 1) % V
        assert torch.equal(model(changed)[0, 9], base[0, 9]) == (back >= 3), f"{back} tokens back, with a window of 3"


def test_the_mlp_gives_each_place_of_the_window_weights_of_its_own() -> None:
    model = rung("mlp")
    assert not torch.allclose(model(torch.tensor([[1, 2, 5]]))[0, -1], model(torch.tensor([[2, 1, 5]]))[0, -1], atol=1e-3)
    assert isinstance(model, Mlp)
    window = torch.cat([model.tokens.weight[token] for token in (1, 2, 5)]).view(3, -1).T.flatten()
    by_hand = model.head(F.gelu(model.places(window)))
    assert torch.allclose(model(torch.tensor([[1, 2, 5]]))[0, -1], by_hand, atol=1e-6)


# --- attention ----------------------------------------------------------------------------------------------------------------------


def test_a_single_head_worked_by_hand() -> None:
    """Two tokens, width 2, all three matrices the identity: x1 = (1, 0), x2 = (0, sqrt 2 · ln 3).

    Token 1 sees itself alone. Token 2 scores x2·x1 = 0 and x2·x2 / sqrt 2 = sqrt 2 (ln 3)², so its weights are 1 : exp of that.
    """
    head = SingleHead(2, 2)
    for layer in (head.query, head.key, head.value):
        nn.init.eye_(layer.weight)
    log3 = torch.log(torch.tensor(3.0))
    x = torch.stack((torch.tensor([1.0, 0.0]), torch.tensor([0.0, 2**0.5 * log3])))[None]

    odds = torch.exp(2**0.5 * log3**2)
    assert torch.allclose(head.weights(x)[0], torch.tensor([[1, 0], [1 / (1 + odds), odds / (1 + odds)]]), atol=1e-6)
    assert torch.allclose(head(x)[0, 0], x[0, 0])
    assert torch.allclose(head(x)[0, 1], (x[0, 0] + odds * x[0, 1]) / (1 + odds), atol=1e-6)


def test_many_heads_are_single_heads_side_by_side() -> None:
    torch.manual_seed(0)
    many, x, answers = MultiHead(12, 3), torch.randn(2, 5, 12), []
    for number in range(3):
        one, rows = SingleHead(12, 4), slice(4 * number, 4 * number + 4)
        for part in ("query", "key", "value"):
            getattr(one, part).weight.data = getattr(many, part).weight[rows].detach()
        answers.append(one(x))
    assert torch.allclose(many(x), many.project(torch.cat(answers, -1)), atol=1e-6)


def test_learned_positions_start_as_waves_in_which_one_step_is_the_same_rotation_everywhere() -> None:
    start = waves(context=30, width=6)
    assert start[1, 0] == pytest.approx(torch.sin(torch.tensor(1.0)).item())
    assert torch.allclose(start[7] @ start[4], start[26] @ start[23], atol=1e-5)
    assert waves(context=3, width=5).shape == (3, 5)


@pytest.mark.parametrize("name", SHOWING)
def test_attention_maps_are_distributions_over_the_past(name: str) -> None:
    model, ids = rung(name), tokens(1, 9)
    maps = model.attention_maps(ids)  # type: ignore[operator]
    assert (maps.shape[0], maps.shape[2:]) == (2, (9, 9))
    assert torch.allclose(maps.sum(-1), torch.ones(maps.shape[:-1]))
    assert maps.triu(1).abs().max() == 0
    assert torch.equal(maps, model.attention_maps(ids[0])), "a text without a batch will do"  # type: ignore[operator]


@pytest.mark.parametrize("name", SHOWING)
def test_the_maps_shown_are_the_weights_used(name: str) -> None:
    """Each layer's answers, rebuilt from its map and the values alone, are what it put into the stream."""
    model, ids = rung(name), tokens(1, 9)
    maps, seen = model.attention_maps(ids), attention_layers(model, ids)  # type: ignore[operator]
    for weights, (values, into_projection) in zip(maps, seen, strict=True):
        rebuilt = weights @ values.repeat_interleave(weights.size(0) // values.size(0), 0)
        assert torch.allclose(rebuilt.transpose(0, 1).flatten(1), into_projection, atol=1e-5)


def attention_layers(model: Rung, ids: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Of each layer: values (K, T, D) and what went into its output projection (T, C), caught on the way."""
    heads = {Attention: 3, Gpt: 3, Llama: getattr(getattr(model, "shape", None), "kv_heads", 0)}[type(model)]
    values: list[Tensor] = []
    answers: list[Tensor] = []
    for name, module in model.named_modules():
        last = name.split(".")[-1]
        if last in ("value", "v_proj", "c_attn"):
            thirds = 3 if last == "c_attn" else 1
            module.register_forward_hook(
                lambda _, __, out, thirds=thirds: values.append(out[0].chunk(thirds, -1)[-1].unflatten(-1, (heads, -1)).transpose(0, 1))
            )
        if last in ("project", "o_proj") or name.endswith("attn.c_proj"):
            module.register_forward_pre_hook(lambda _, inputs: answers.append(inputs[0][0]))
    with torch.no_grad():
        model(ids)
    return list(zip(values, answers, strict=True))


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("past", [0, 3])
def test_fused_attention_is_the_softmax_spelled_out(kv_heads: int, past: int) -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 4, 5, 6), torch.randn(2, kv_heads, 5 + past, 6), torch.randn(2, kv_heads, 5 + past, 6)
    spelled_out = attention_weights(q, k) @ v.repeat_interleave(4 // kv_heads, 1)
    assert torch.allclose(attend(q, k, v), spelled_out, atol=1e-6)


# --- gpt and llama ------------------------------------------------------------------------------------------------------------------


def test_gpt_at_gpt2s_size_has_gpt2s_parameters() -> None:
    with torch.device("meta"):
        shape = GptShape(vocab_size=50257, context=1024, width=768, layers=12, heads=12, hidden=3072, dropout=0.1, norm_eps=1e-5)
        assert parameters(Gpt(shape)) == 124_439_808


def test_llama_parameters_counted_by_hand() -> None:
    attention = 24 * 24 + 2 * (24 * 12) + 24 * 24
    assert parameters(rung("llama")) == V * 24 + 2 * (attention + 3 * 24 * 40 + 2 * 24) + 24


def test_gpt_starts_as_gpt2_does() -> None:
    """0.02 everywhere, and the projections into the residual stream smaller by the root of how many add up there."""
    torch.manual_seed(0)
    wide = build(GptParams(architecture="gpt", context=64, width=128, layers=8, heads=4, dropout=0.0), 512)
    std = {name: weight.std().item() for name, weight in wide.named_parameters() if weight.dim() == 2}
    for name, found in std.items():
        assert found == pytest.approx(0.02 / 4 if name.endswith("c_proj.weight") else 0.02, rel=0.05)
    assert all(not weight.any() for name, weight in wide.named_parameters() if name.endswith("bias"))


def test_dropout_acts_in_training_alone() -> None:
    model, ids = rung("gpt"), tokens(1, 8)
    assert torch.equal(model(ids), model(ids))
    model.train()
    assert not torch.equal(model(ids), model(ids))


def test_positions_have_the_cosines_of_float64_so_that_no_race_inside_torch_cos_reaches_the_weights() -> None:
    angles = torch.outer(torch.arange(300.0), 10000.0 ** (-torch.arange(0, 64, 2) / 64))
    cos, sin = cos_sin(angles)
    assert cos.tolist() == [[float(np.float32(math.cos(angle))) for angle in row] for row in angles.tolist()]
    assert sin.tolist() == [[float(np.float32(math.sin(angle))) for angle in row] for row in angles.tolist()]


def test_rotation_keeps_lengths_and_makes_scores_depend_on_distance_alone() -> None:
    cos, sin = rotation_tables(context=40, head_dim=8, theta=10000.0)
    torch.manual_seed(0)
    q, k = (torch.randn(1, 1, 1, 8).expand(1, 40, 1, 8) for _ in range(2))
    turned_q, turned_k = rotate(q, cos, sin)[0, :, 0], rotate(k, cos, sin)[0, :, 0]

    assert torch.allclose(turned_q.norm(dim=-1), q[0, :, 0].norm(dim=-1), atol=1e-5)
    assert torch.allclose(turned_q[7] @ turned_k[4], turned_q[33] @ turned_k[30], atol=1e-4)
    assert not torch.allclose(turned_q[7] @ turned_k[4], turned_q[7] @ turned_k[6], atol=1e-2)
    angle = torch.tensor(1.0)
    assert torch.allclose(turned_q[1, 0], q[0, 1, 0, 0] * angle.cos() - q[0, 1, 0, 4] * angle.sin()), "pairs are half a head apart"


@pytest.mark.parametrize("pieces", [[12], [1] * 12, [5, 1, 1, 5], [1, 11], [7, 5]])
@pytest.mark.parametrize("name", CACHED)
@torch.no_grad()
def test_reading_in_pieces_through_a_cache_equals_reading_at_once(name: str, pieces: list[int]) -> None:
    """Pieces of more than one token behind a filled cache are the hard case: `is_causal` alone would show them only the first keys."""
    model, ids, cache = rung(name), tokens(2, 12), GrowingCache()
    pieced = torch.cat([model(piece, cache) for piece in torch.split(ids, pieces, dim=1)], 1)
    assert torch.allclose(pieced, model(ids), atol=1e-5)
    assert cache.length == 12
    with pytest.raises(ValueError, match="found 17 tokens, the context holds 16"):
        model(tokens(2, 5), cache)


@pytest.mark.parametrize("name", ["gpt", "llama"])
def test_checkpointing_gives_the_same_gradients(name: str) -> None:
    model, ids = rung(name).train(), tokens(2, 10)
    gradients = []
    for model.checkpointing in (False, True):
        torch.manual_seed(1)  # the same dropout both times
        model.zero_grad()
        model(ids).logsumexp(-1).mean().backward()
        gradients.append([weight.grad.clone() for weight in model.parameters() if weight.grad is not None])
    assert all(torch.allclose(kept, again, atol=1e-6) for kept, again in zip(*gradients, strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"width": 26}, "width 26 is not a multiple of heads 4"),
        ({"kv_heads": 3}, "heads 4 is not a multiple of kv_heads 3"),
        ({"width": 20}, "the head width 5 is odd"),
    ],
)
def test_a_shape_that_does_not_divide_is_refused(change: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(LLAMA.model_copy(update=change), V)
    if "width" in change and change["width"] == 26:
        with pytest.raises(ValueError, match="width 26 is not a multiple of heads 3"):
            build(GptParams(architecture="gpt", context=8, width=26, layers=1, heads=3, dropout=0.0), V)
