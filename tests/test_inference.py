"""Drawing tokens, remembering what was read, and showing text: against transformers, the slow obvious way, and values worked by hand."""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as some
from torch import Tensor, nn

from llm_from_scratch import bundle
from llm_from_scratch.bundle import BundleError
from llm_from_scratch.inference.decoding import last_logits
from llm_from_scratch.inference.engine import Engine, Piece, PromptTooLong
from llm_from_scratch.inference.kv_cache import CacheFull, KVCache
from llm_from_scratch.inference.sampling import (
    Sampling,
    discouraged,
    generate,
    likeliest,
    log_probability,
    nucleus,
    penalized,
    pick,
    probabilities,
)
from llm_from_scratch.inference.streaming import TextStream
from llm_from_scratch.model.attention import AttentionParams
from llm_from_scratch.model.bigram import Bigram, BigramParams
from llm_from_scratch.model.gpt import GptParams
from llm_from_scratch.model.llama import LlamaParams
from llm_from_scratch.model.mlp import MlpParams
from llm_from_scratch.model.ngram import NGram
from llm_from_scratch.model.registry import build, save_model
from llm_from_scratch.tokenizer import BpeTokenizer
from llm_from_scratch.tokenizer.chat import render

VOCAB = 37
EOT = 36
CONTEXT = 16
LLAMA = LlamaParams(
    architecture="llama",
    context=CONTEXT,
    width=16,
    layers=2,
    heads=4,
    kv_heads=2,
    hidden=24,
    rope_theta=10000.0,
    qk_norm=False,
    copying=0.0,
)
CACHED = {
    "llama": LLAMA,
    "qwen3": LLAMA.model_copy(update={"qk_norm": True}),
    "gpt": GptParams(architecture="gpt", context=CONTEXT, width=16, layers=2, heads=2, dropout=0.5),
}
NEURAL = CACHED | {
    "bigram": BigramParams(architecture="bigram"),
    "mlp": MlpParams(architecture="mlp", window=3, width=8, hidden=16),
    "attention": AttentionParams(architecture="attention", context=CONTEXT, width=16, layers=2, heads=2),
}
GREEDY = Sampling(temperature=0, max_tokens=10)
SEEDED = Sampling(temperature=0.9, max_tokens=10, top_k=20, top_p=0.95, repetition_penalty=1.1, seed=5)


def drawn(name: str) -> nn.Module:
    """A model whose every weight matters: what starts at zero is drawn too."""
    torch.manual_seed(2)
    model = build(NEURAL[name], VOCAB)
    for weight in model.parameters():
        if weight.dim() == 2:
            nn.init.normal_(weight, std=weight.shape[1] ** -0.5)
    return model.eval()


def slow(model: nn.Module, prompt: Sequence[int], sampling: Sampling) -> list[int]:
    """The oracle: read everything again for every token; past the context, everything since the last jump of half a context."""
    ids, start = list(prompt), 0
    generator = torch.Generator().manual_seed(sampling.seed)
    for _ in range(sampling.max_tokens):
        if len(ids) - start > CONTEXT:
            start = len(ids) - CONTEXT // 2
        token = pick(last_logits(model, ids[start:]), sampling, generator, ids)
        if token == EOT:
            break
        ids.append(token)
    return ids[len(prompt) :]


# Drawing


def test_the_nucleus_is_the_fewest_tokens_that_hold_the_mass() -> None:
    logits = torch.tensor([0.05, 0.5, 0.15, 0.3]).log()
    assert nucleus(logits, 0.7).softmax(-1).tolist() == pytest.approx([0, 0.625, 0, 0.375])
    assert nucleus(logits, 0.01).softmax(-1).tolist() == [0, 1, 0, 0]  # never none


def test_a_penalty_makes_what_was_said_less_likely_whatever_its_sign() -> None:
    assert penalized(torch.tensor([2.0, -2.0, 2.0]), 2.0, [0, 1, 1]).tolist() == [1.0, -4.0, 2.0]
    assert penalized(torch.tensor([2.0]), 2.0, []).tolist() == [2.0]


@pytest.mark.parametrize(
    ("top_k", "top_p", "min_p", "penalty"),
    [
        (0, 1.0, 0.0, 1.0),
        (5, 1.0, 0.0, 1.0),
        (0, 0.8, 0.0, 1.0),
        (0, 1.0, 0.0, 1.7),
        (0, 1.0, 0.1, 1.0),
        (9, 0.6, 0.0, 1.3),
        (20, 0.95, 0.2, 1.1),
    ],
)
def test_the_same_settings_mean_the_same_distribution_as_in_transformers(top_k: int, top_p: float, min_p: float, penalty: float) -> None:
    import transformers as peer

    generator = torch.Generator().manual_seed(1)
    for _ in range(20):
        logits = 3 * torch.randn(VOCAB, generator=generator)
        history = torch.randint(0, VOCAB, (1, 8), generator=generator)
        theirs = peer.RepetitionPenaltyLogitsProcessor(penalty)(history, logits[None])
        theirs = peer.TemperatureLogitsWarper(0.7)(history, theirs)
        theirs = peer.TopKLogitsWarper(top_k)(history, theirs) if top_k else theirs
        theirs = peer.TopPLogitsWarper(top_p)(history, theirs) if top_p < 1 else theirs
        theirs = peer.MinPLogitsWarper(min_p)(history, theirs) if min_p else theirs
        sampling = Sampling(temperature=0.7, max_tokens=1, top_k=top_k, top_p=top_p, min_p=min_p)
        ours = probabilities(penalized(logits, penalty, history[0].tolist()), sampling)
        assert torch.allclose(ours, theirs[0].softmax(-1), atol=1e-6)


def test_a_nucleus_of_a_large_vocabulary_is_that_of_transformers_however_flat_it_is() -> None:
    from transformers import TopPLogitsWarper

    generator = torch.Generator().manual_seed(1)
    for spread in (0.1, 1.0, 8.0):  # thousands of tokens, hundreds, a few
        logits = spread * torch.randn(5000, generator=generator)
        theirs = TopPLogitsWarper(0.9)(torch.tensor([[0]]), logits[None])[0]
        different = (nucleus(logits, 0.9).isinf() != theirs.isinf()).sum()
        assert different <= 1  # sums in another order: where the mass is met, one token may be in or out


def test_a_bias_is_that_of_transformers_and_comes_before_the_penalty() -> None:
    from transformers import RepetitionPenaltyLogitsProcessor, SequenceBiasLogitsProcessor

    logits = torch.tensor([1.0, 0.5, -1.0, 0.2])
    history = torch.tensor([[1, 2]])
    for biases in ({0: -2.0}, {2: 2.5, 1: -0.3}, {3: 100.0}):
        theirs = SequenceBiasLogitsProcessor({(token,): value for token, value in biases.items()})(history, logits[None])
        theirs = RepetitionPenaltyLogitsProcessor(2.0)(history, theirs)
        sampling = Sampling(temperature=0, max_tokens=1, repetition_penalty=2.0, logit_bias=tuple(biases.items()))
        assert pick(logits, sampling, torch.Generator(), [1, 2]) == int(theirs.argmax())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_likeliest_are_torchs_and_the_first_of_those_that_tie(dtype: torch.dtype) -> None:
    logits = torch.randn(4, 3000, generator=torch.Generator().manual_seed(0)).to(dtype)[:, ::2]
    logits[2], logits[3, [7, 90]] = 0.0, 100.0
    assert likeliest(logits) == logits.argmax(-1).tolist()
    assert likeliest(logits)[2:] == [0, 7]


def test_openai_penalties_count_what_was_generated_and_not_the_prompt() -> None:
    logits = torch.tensor([2.0, 1.9, 0.0, 0.0])
    assert discouraged(logits, 0.25, 0.5, [0, 0, 2]).tolist() == pytest.approx([0.75, 1.9, -0.75, 0.0])
    sampling = Sampling(temperature=0, max_tokens=1, presence_penalty=0.2)
    assert pick(logits, sampling, torch.Generator(), [0, 0], prompt=2) == 0
    assert pick(logits, sampling, torch.Generator(), [0, 0], prompt=1) == 1


def test_a_log_probability_is_of_the_logits_as_they_came_and_its_alternatives_are_the_likeliest() -> None:
    logits = torch.tensor([0.1, 0.2, 0.7]).log() + 5
    found = log_probability(logits, 1, top=2)
    assert (found.token_id, [token for token, _ in found.top]) == (1, [2, 1])
    assert found.logprob == pytest.approx(math.log(0.2), abs=1e-6)
    assert [value for _, value in found.top] == pytest.approx([math.log(0.7), math.log(0.2)], abs=1e-6)
    assert log_probability(logits, 0, top=0).top == ()


def test_what_is_drawn_often_is_what_is_likely() -> None:
    logits = torch.tensor([0.7, 0.2, 0.1]).log()
    generator = torch.Generator().manual_seed(0)
    drawn = [pick(logits, Sampling(temperature=1.0, max_tokens=1), generator, []) for _ in range(4000)]
    assert [drawn.count(token) / 4000 for token in range(3)] == pytest.approx([0.7, 0.2, 0.1], abs=0.03)


def test_temperature_zero_takes_the_likeliest_and_a_tiny_one_nearly_does() -> None:
    logits = torch.tensor([1.0, 3.0, 2.0])
    for temperature in (0.0, 1e-30):
        generator = torch.Generator().manual_seed(0)
        assert pick(logits, Sampling(temperature=temperature, max_tokens=1), generator, []) == 1


@pytest.mark.parametrize(
    ("name", "value", "wanted"),
    [
        ("temperature", -0.1, "from 0"),
        ("temperature", float("nan"), "from 0"),
        ("max_tokens", 0, "at least 1"),
        ("top_k", -1, "0"),
        ("top_p", 0.0, "above 0"),
        ("top_p", 1.1, "at most 1"),
        ("repetition_penalty", 0.0, "above 0"),
        ("min_p", 1.5, "from 0"),
        ("presence_penalty", float("inf"), "a number"),
        ("frequency_penalty", float("nan"), "a number"),
        ("logit_bias", ((-1, 2.0),), "a token id and a number"),
        ("logit_bias", {3: 2.0}, "a tuple of pairs"),
        ("logprobs", -1, "from 0 up"),
        ("stop", ("",), "none of them empty"),
        ("stop", "END", "a tuple of strings"),
        ("seed", -1, "from 0"),
    ],
)
def test_settings_out_of_range_are_refused_in_one_line(name: str, value: object, wanted: str) -> None:
    settings: dict[str, object] = {"temperature": 1.0, "max_tokens": 1} | {name: value}
    with pytest.raises(ValueError, match=rf"^sampling\.{name}: found .*{wanted}.*$"):
        Sampling(**settings)  # type: ignore[arg-type]


# Remembering


@pytest.mark.parametrize("sampling", [GREEDY, SEEDED], ids=["greedy", "seeded"])
@pytest.mark.parametrize("name", CACHED)
def test_cached_generation_equals_reading_everything_again(name: str, sampling: Sampling) -> None:
    model = drawn(name)
    assert list(generate(model, [1, 2, 3], sampling, EOT)) == slow(model, [1, 2, 3], sampling)


@pytest.mark.parametrize("prompt", [[1, 2, 3], list(range(CONTEXT)), [i % 30 for i in range(CONTEXT + 9)]], ids=len)
@pytest.mark.parametrize("name", CACHED)
def test_a_text_longer_than_the_context_goes_on_from_its_newest_half(name: str, prompt: list[int]) -> None:
    model, long = drawn(name), Sampling(temperature=1.0, max_tokens=60, seed=3)
    assert list(generate(model, prompt, long, EOT)) == slow(model, prompt, long)


def test_generation_equals_that_of_transformers(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    for name in CACHED:
        model = drawn(name)
        save_model(model, tmp_path, EOT)
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path)
        expected = theirs.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=10, do_sample=False)[0, 3:].tolist()
        assert list(generate(model, [1, 2, 3], GREEDY, EOT)) == [token for token in expected if token != EOT]


@pytest.mark.parametrize("name", CACHED)
def test_a_cache_filled_in_pieces_gives_the_logits_of_one_forward(name: str) -> None:
    model = drawn(name)
    ids = torch.randint(0, VOCAB, (2, CONTEXT), generator=torch.Generator().manual_seed(0))
    cache = KVCache.of(model, CONTEXT, batch=2)
    with torch.no_grad():
        pieces = [model(part, cache) for part in ids.split([5, 1, 1, 9], dim=1)]
        assert torch.allclose(torch.cat(pieces, 1), model(ids), atol=1e-5)
    assert cache.length == CONTEXT


def test_a_full_cache_says_so_and_a_cleared_one_starts_again() -> None:
    cache = KVCache(layers=1, batch=1, kv_heads=1, capacity=3, head_dim=2)
    two = torch.ones(1, 1, 2, 2)
    cache.update(0, two, two)
    cache.advance(2)
    with pytest.raises(CacheFull, match="4 tokens, but it was made for 3"):
        cache.update(0, two, two)
    cache.clear()
    keys, values = cache.update(0, 5 * two, 7 * two)
    assert keys.unique().tolist() == [5]
    assert values.unique().tolist() == [7]


@pytest.mark.parametrize("name", NEURAL)
def test_a_seed_fixes_the_text_whatever_else_is_drawn_meanwhile(name: str) -> None:
    model = drawn(name)
    alone = list(generate(model, [1, 2], SEEDED, EOT))
    first, second = (generate(model, [1, 2], SEEDED, EOT) for _ in range(2))
    together = []
    for token in first:
        torch.rand(3)
        assert next(second) == token
        together.append(token)
    assert together == alone
    other = Sampling(temperature=2.0, max_tokens=10, seed=6)
    assert list(generate(model, [1, 2], other, EOT)) != alone


def test_rungs_without_a_cache_see_their_last_context_of_tokens() -> None:
    model = drawn("attention")
    ids = [3]
    for token in generate(model, ids, Sampling(temperature=0, max_tokens=3 * CONTEXT), EOT):
        assert token == int(last_logits(model, ids[-CONTEXT:]).argmax())
        ids.append(token)


def test_an_ngram_writes_its_likeliest_successors() -> None:
    model = NGram.train([0, 1, 2, 3, 0, 1, 2, 4, 0, 1, 2, 3, 0, 1, 5], VOCAB, order=3)
    ids = [0]
    for token in generate(model, ids, Sampling(temperature=0, max_tokens=6), EOT):
        assert token == model.next_probs(ids).argmax()
        ids.append(token)
    assert ids[:3] == [0, 1, 2]


def test_the_end_of_a_document_ends_the_text_and_is_not_part_of_it() -> None:
    model = chain([4, 5, 6, EOT], VOCAB)
    assert list(generate(model, [4], GREEDY, EOT)) == [5, 6]
    assert list(generate(model, [4], GREEDY, EOT, stop_ids=[6])) == [5]
    assert list(generate(model, [4], Sampling(temperature=0, max_tokens=1), EOT)) == [5]


def test_an_empty_prompt_is_the_beginning_of_a_document() -> None:
    model = chain([EOT, 7, 8], VOCAB)
    assert list(generate(model, [], Sampling(temperature=0, max_tokens=2), EOT)) == [7, 8]


def test_a_sample_in_the_middle_of_training_is_without_dropout_and_leaves_training_on() -> None:
    model = drawn("gpt")
    expected = list(generate(model, [1], GREEDY, EOT))
    model.train()
    assert list(generate(model, [1], GREEDY, EOT)) == expected
    assert model.training
    assert model(torch.tensor([[1, 2]])).requires_grad


def chain(ids: Sequence[int], vocab_size: int) -> Bigram:
    """A bigram sure that each of `ids` is followed by the next one."""
    model = Bigram(BigramParams(architecture="bigram"), vocab_size)
    with torch.no_grad():
        for one, following in pairwise(ids):
            model.table.weight[one, following] = 50
    return model


# Showing


def feed(stream: TextStream, pieces: Sequence[bytes]) -> list[str]:
    return [*(stream.feed(piece) for piece in pieces), stream.finish()]


def test_half_a_character_waits_for_its_other_half() -> None:
    assert feed(TextStream(()), [b"a\xc3", b"\xa9", b"\xf0\x9f", b"\x99\x82"]) == ["a", "é", "", "🙂", ""]
    assert feed(TextStream(()), [b"a\xc3"]) == ["a", "\ufffd"]


def test_what_could_begin_a_stop_string_waits_until_it_cannot() -> None:
    stream = TextStream(("END", "\n\n"))
    assert feed(stream, [b"the E", b"N", b"T", b"\n", b"x E"]) == ["the ", "", "ENT", "", "\nx ", "E"]
    assert not stream.stopped
    stream = TextStream(("END", "\n\n"))
    assert feed(stream, [b"the E", b"N", b"D of", b" it"]) == ["the ", "", "", "", ""]
    assert stream.stopped


@given(
    text=some.text(alphabet="ab\né🙂", max_size=30),
    stop=some.lists(some.text(alphabet="ab\né", min_size=1, max_size=4), max_size=3),
    cuts=some.sets(some.integers(min_value=0, max_value=80)),
)
def test_how_text_is_cut_into_tokens_changes_nothing_that_is_shown(text: str, stop: list[str], cuts: set[int]) -> None:
    whole, places = text.encode(), sorted(cuts)
    pieces = [whole[start:end] for start, end in zip([0, *places], [*places, len(whole)], strict=True)]
    shown = feed(TextStream(stop), pieces)

    ends = (n for n in range(len(text) + 1) if any(text[:n].endswith(word) for word in stop))
    end = next(ends, None)
    longest = max((len(word) for word in stop if end is not None and text[:end].endswith(word)), default=0)
    assert "".join(shown) == (text if end is None else text[: end - longest])
    for count in range(len(shown)):
        assert not any(word in "".join(shown[:count]) for word in stop)


# The engine

BYTES = BpeTokenizer([])
"""A token a byte, and the five special tokens."""


def reciting(text: str, *after: int) -> Engine:
    """An engine that knows one text by heart, and which special tokens come after it."""
    ids = [*BYTES.encode(text), *after]
    return Engine(NGram.train(ids, BYTES.vocab_size, order=min(12, len(ids))), BYTES)


def whole(pieces: Sequence[Piece]) -> str:
    return "".join(piece.text for piece in pieces)


def test_pieces_make_the_text_and_count_its_tokens() -> None:
    engine = reciting("One café, two cafés 🙂.", BYTES.eot)
    pieces = list(engine.complete("One", Sampling(temperature=0, max_tokens=99)))
    assert whole(pieces) == " café, two cafés 🙂."
    assert [piece.finish_reason for piece in pieces] == [None] * (len(pieces) - 1) + ["stop"]
    assert pieces[-1].prompt_tokens == 3
    assert pieces[-1].completion_tokens == len(" café, two cafés 🙂.".encode())
    ids = [token for piece in pieces for token in piece.token_ids]
    assert BYTES.decode(ids) == whole(pieces)
    assert [piece.text for piece in pieces if "é" in piece.text] == ["é", "é"]


def test_length_is_the_reason_when_the_tokens_run_out() -> None:
    pieces = list(reciting("abcdefgh", BYTES.eot).complete("a", Sampling(temperature=0, max_tokens=3)))
    assert (whole(pieces), pieces[-1].finish_reason, pieces[-1].completion_tokens) == ("bcd", "length", 3)


def test_a_stop_string_is_never_shown_though_its_tokens_are_counted() -> None:
    engine = reciting("Q: why? A: so. Q: how?", BYTES.eot)
    pieces = list(engine.complete("Q: why?", Sampling(temperature=0, max_tokens=99, stop=(" Q:", "never"))))
    assert (whole(pieces), pieces[-1].finish_reason) == (" A: so.", "stop")
    assert pieces[-1].completion_tokens == len(" A: so. Q:")
    assert sum(len(piece.token_ids) for piece in pieces) == pieces[-1].completion_tokens


@pytest.mark.parametrize("special", ["<|end|>", "<|user|>", "<|endoftext|>"])
def test_a_turn_ends_at_any_special_token(special: str) -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi?"}]
    prompt, _ = render(messages, BYTES, prompt=True)
    known = [*prompt, *BYTES.encode("Hello."), BYTES.special[special], *BYTES.encode("And more")]
    engine = Engine(NGram.train(known, BYTES.vocab_size, order=12), BYTES)
    pieces = list(engine.chat(messages, Sampling(temperature=0, max_tokens=50)))
    assert (whole(pieces), pieces[-1].finish_reason, pieces[-1].prompt_tokens) == ("Hello.", "stop", len(prompt))


def llama_of_bytes() -> nn.Module:
    torch.manual_seed(0)
    model = build(LLAMA, BYTES.vocab_size)
    for weight in model.parameters():
        if weight.dim() == 2:
            nn.init.normal_(weight, std=weight.shape[1] ** -0.5)
    return model


def test_a_prompt_too_long_is_refused_at_the_call_with_both_numbers() -> None:
    engine = Engine(llama_of_bytes(), BYTES)
    with pytest.raises(PromptTooLong, match=r"the prompt is 17 tokens, the model reads at most 16") as refused:
        engine.complete("x" * 17, GREEDY)
    assert (refused.value.found, refused.value.limit) == (17, 16)
    assert list(engine.complete("x" * 16, GREEDY))[-1].prompt_tokens == 16


def test_ids_that_are_no_tokens_are_refused_at_the_call() -> None:
    with pytest.raises(ValueError, match="token id 261 is not one of the vocabulary's 261"):
        Engine(llama_of_bytes(), BYTES).complete([0, 261], GREEDY)


def test_a_model_with_another_tokenizer_is_refused() -> None:
    with pytest.raises(ValueError, match="the model has 37 tokens, the tokenizer 261; open both from the same bundle"):
        Engine(drawn("llama"), BYTES)


def test_threads_get_what_each_would_get_alone() -> None:
    engine = Engine(llama_of_bytes(), BYTES)
    settings = [Sampling(temperature=1.0, max_tokens=12, seed=seed) for seed in range(6)]
    alone = [list(engine.complete("hello", sampling)) for sampling in settings]
    together: dict[int, list[Piece]] = {}

    def ask(place: int) -> None:
        together[place] = list(engine.complete("hello", settings[place]))

    threads = [threading.Thread(target=ask, args=(place,)) for place in range(len(settings))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [together[place] for place in range(len(settings))] == alone


def test_an_opened_bundle_writes_what_was_saved_and_a_damaged_one_does_not_open(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    model = llama_of_bytes()
    with bundle.writing(folder) as partial:
        save_model(model, partial, BYTES.eot)
        BYTES.save(partial)
        bundle.seal(partial, "model", "train@tiny")
    assert list(Engine.open(folder).complete("hi", SEEDED)) == list(Engine(model, BYTES).complete("hi", SEEDED))

    weights = folder / "model.safetensors"
    damaged = bytearray(weights.read_bytes())
    damaged[-1] ^= 1
    weights.write_bytes(damaged)
    with pytest.raises(BundleError, match=r"model\.safetensors: sha256 is .*dvc repro --force --single-item train@tiny"):
        Engine.open(folder)
    assert isinstance(Engine.open(folder, verify=False), Engine)


def test_a_logit_row_is_that_of_the_last_token() -> None:
    model = drawn("mlp")
    expected: Tensor = model(torch.tensor([[1, 2, 3, 4]]))[0, -1]
    assert torch.equal(last_logits(model, [1, 2, 3, 4]), expected)
