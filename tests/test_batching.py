"""Continuous batching: whoever is beside it, a request gets what it would get alone. Against one request at a time, and transformers."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from llm_from_scratch.inference import batching as steps
from llm_from_scratch.inference.batching import Batcher, Batching
from llm_from_scratch.inference.decoding import decoder, last_logits
from llm_from_scratch.inference.engine import Engine, Piece, PromptTooLong
from llm_from_scratch.inference.forward import forward_of
from llm_from_scratch.inference.kv_cache import CacheFull, SlotCache
from llm_from_scratch.inference.lookup import Lookup
from llm_from_scratch.inference.quantize import quantize
from llm_from_scratch.inference.sampling import Sampling, generate
from llm_from_scratch.model.gpt import GptParams
from llm_from_scratch.model.llama import LlamaParams
from llm_from_scratch.model.ngram import NGram
from llm_from_scratch.model.registry import build, save_model
from llm_from_scratch.tokenizer import BpeTokenizer
from tests import tiny

VOCAB, EOT, CONTEXT = 61, 60, 48
LLAMA = LlamaParams(
    architecture="llama",
    context=CONTEXT,
    width=32,
    layers=2,
    heads=4,
    kv_heads=2,
    hidden=48,
    rope_theta=10000.0,
    qk_norm=False,
    copying=0.0,
)
SHAPES = {
    "llama": LLAMA,
    "qwen3": LLAMA.model_copy(update={"qk_norm": True}),
    "gpt": GptParams(architecture="gpt", context=CONTEXT, width=32, layers=2, heads=2, dropout=0.5),
}
BATCHING = Batching(slots=4, prefill_chunk=8)
BYTES = BpeTokenizer([])
"""A token a byte, and the five special tokens."""


def drawn(name: str, vocab: int = VOCAB, seed: int = 2) -> nn.Module:
    """A model whose every weight matters, what starts at zero too, and that learns no more."""
    torch.manual_seed(seed)
    model = build(SHAPES[name], vocab)
    for weight in model.parameters():
        if weight.dim() == 2:
            nn.init.normal_(weight, std=weight.shape[1] ** -0.5)
    return model.eval().requires_grad_(False)


def prompts(count: int) -> list[list[int]]:
    """Of all lengths up to the context."""
    generator = torch.Generator().manual_seed(7)
    lengths = torch.randint(1, CONTEXT + 1, (count,), generator=generator).tolist()
    return [torch.randint(0, EOT, (length,), generator=generator).tolist() for length in lengths]


def settings(count: int) -> list[Sampling]:
    """Greedy and seeded, short ones and some that outgrow the context."""
    kinds = (
        Sampling(temperature=0, max_tokens=20),
        Sampling(temperature=1.0, max_tokens=15, top_k=20, top_p=0.95, seed=4),
        Sampling(temperature=0.8, max_tokens=70, repetition_penalty=1.2, seed=9),
        Sampling(temperature=1.3, max_tokens=1, min_p=0.05, presence_penalty=0.5, seed=1),
    )
    return [kinds[place % len(kinds)] for place in range(count)]


def together(batcher: Batcher, asked: Sequence[tuple[list[int], Sampling]]) -> list[list[int]]:
    """Each from a thread of its own."""
    found: dict[int, list[int]] = {}

    def ask(place: int) -> None:
        found[place] = [token for token, _ in batcher.tokens(*asked[place], {EOT})]

    in_threads(len(asked), ask)
    return [found[place] for place in range(len(asked))]


def in_threads(count: int, work: object) -> None:
    threads = [threading.Thread(target=work, args=(place,), daemon=True) for place in range(count)]  # type: ignore[arg-type]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)


# Sharing steps


@pytest.mark.parametrize("same_bits", [False, True], ids=["", "same_bits"])
@pytest.mark.parametrize("name", SHAPES)
def test_forty_requests_in_four_slots_get_what_each_gets_alone(name: str, same_bits: bool) -> None:
    model = drawn(name)
    asked = list(zip(prompts(40), settings(40), strict=True))
    alone = [list(generate(model, prompt, sampling, EOT)) for prompt, sampling in asked]
    batcher = Batcher(model, Batching(slots=4, prefill_chunk=8, same_bits=same_bits))
    assert together(batcher, asked) == alone
    stats = batcher.stats()
    assert (stats.running, stats.waiting, stats.cache_tokens_used) == (0, 0, 0)
    assert stats.generated_tokens == sum(map(len, alone))


@pytest.mark.parametrize("scheme", ["int8_weight", "int8_dynamic"])
def test_quantized_models_share_steps_too(scheme: str) -> None:
    model = quantize(drawn("llama"), scheme)  # type: ignore[arg-type]
    asked = list(zip(prompts(12), settings(12), strict=True))
    one_by_one = Batcher(model, Batching(slots=4, prefill_chunk=8, same_bits=True))
    alone = [[token for token, _ in one_by_one.tokens(*each, {EOT})] for each in asked]
    assert together(Batcher(model, Batching(slots=4, prefill_chunk=8, same_bits=True)), asked) == alone


def test_with_same_bits_even_the_last_digit_of_a_log_probability_is_independent_of_the_company() -> None:
    model = drawn("llama")
    sampling = Sampling(temperature=1.0, max_tokens=25, seed=3, logprobs=3)
    batcher = Batcher(model, Batching(slots=4, prefill_chunk=8, same_bits=True))
    alone = list(batcher.tokens([5, 6, 7], sampling, {EOT}))
    found: dict[int, list[steps.Drawn]] = {}
    others = prompts(8)

    def ask(place: int) -> None:
        prompt = [5, 6, 7] if place % 2 else others[place]
        found[place] = list(batcher.tokens(prompt, sampling, {EOT}))

    in_threads(8, ask)
    assert [found[place] for place in range(1, 8, 2)] == [alone] * 4


def test_a_request_that_joins_later_is_read_in_the_same_steps() -> None:
    model = drawn("llama")
    forwards: list[tuple[int, ...]] = []
    batcher = Batcher(model, BATCHING)
    inner = batcher._forward
    batcher._forward = lambda ids, rows, every: (forwards.append(tuple(ids.shape)), inner(ids, rows, every))[1]
    long = Sampling(temperature=0, max_tokens=30)
    first = batcher.tokens([1], long, ())
    taken = [next(first)[0] for _ in range(5)]
    second = batcher.tokens([2], long, ())
    other = [token for token, _ in second]  # its steps are the first one's as well
    taken += [token for token, _ in first]
    assert forwards[:5] == [(1, 1)] * 5
    assert forwards[5:30] == [(2, 1)] * 25
    assert len(forwards) == 35
    assert (taken, other) == tuple(list(generate(model, prompt, long, -1)) for prompt in ([1], [2]))


def test_a_long_prompt_is_read_in_chunks_while_the_others_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps, "BURST", 0)
    batcher = Batcher(drawn("llama"), BATCHING)
    short = batcher.tokens([1], Sampling(temperature=0, max_tokens=30), ())
    next(short)
    long = batcher.tokens(list(range(CONTEXT)), Sampling(temperature=0, max_tokens=2), ())
    next(long)
    request = next(request for request in batcher._slots if request is not None and request.prompt == 1)
    assert len(request.drawn) == CONTEXT // 8  # a token for each chunk of the other's prompt


def test_two_iterators_of_one_thread_do_not_wait_for_each_other_though_there_is_one_slot() -> None:
    model = drawn("gpt")
    batcher = Batcher(model, Batching(slots=1, prefill_chunk=8))
    sampling = Sampling(temperature=1.0, max_tokens=10, seed=1)
    first, second = batcher.tokens([1, 2], sampling, {EOT}), batcher.tokens([3], sampling, {EOT})
    pairs = list(zip(first, second, strict=False))
    assert [one[0] for one, _ in pairs] == list(generate(model, [1, 2], sampling, EOT))[: len(pairs)]
    assert [other[0] for _, other in pairs] == list(generate(model, [3], sampling, EOT))[: len(pairs)]


def test_closing_an_iterator_frees_its_slot() -> None:
    batcher = Batcher(drawn("llama"), Batching(slots=1, prefill_chunk=8))
    left = batcher.tokens([1, 2, 3], Sampling(temperature=0, max_tokens=40), ())
    next(left)
    assert batcher.stats().running == 1
    assert batcher.stats().cache_tokens_used == 3
    left.close()
    assert batcher.stats().running == 0
    assert len(list(batcher.tokens([4], Sampling(temperature=0, max_tokens=3), ()))) == 3


def test_a_request_that_is_never_iterated_holds_nothing() -> None:
    batcher = Batcher(drawn("llama"), Batching(slots=1, prefill_chunk=8))
    idle = batcher.tokens([1], Sampling(temperature=0, max_tokens=40), ())
    assert len(list(batcher.tokens([4], Sampling(temperature=0, max_tokens=3), ()))) == 3
    assert (batcher.stats().running, batcher.stats().waiting) == (0, 0)
    idle.close()


def test_what_fails_in_one_request_is_raised_there_and_the_others_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    model = drawn("llama")
    inner = steps.pick

    def picky(logits: Tensor, sampling: Sampling, *rest: object) -> int:
        if sampling.seed == 13:
            raise FloatingPointError("thirteen")
        return inner(logits, sampling, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(steps, "pick", picky)
    batcher = Batcher(model, BATCHING)
    outcomes: dict[int, object] = {}

    def ask(place: int) -> None:
        try:
            sampling = Sampling(temperature=1.0, max_tokens=20, seed=13 if place == 2 else place)
            outcomes[place] = [token for token, _ in batcher.tokens([place], sampling, {EOT})]
        except FloatingPointError as error:
            outcomes[place] = str(error)

    in_threads(6, ask)
    assert outcomes.pop(2) == "thirteen"
    for place, found in outcomes.items():
        assert found == list(generate(model, [place], Sampling(temperature=1.0, max_tokens=20, seed=place), EOT))


def test_a_step_that_fails_is_raised_by_all_that_were_in_it_and_the_next_request_is_served() -> None:
    batcher = Batcher(drawn("llama"), BATCHING)
    inner = batcher._forward
    broken = True

    def forward(ids: Tensor, rows: object, every: bool) -> Tensor:
        if broken and len(ids) > 1:
            raise MemoryError("no room")
        return inner(ids, rows, every)  # type: ignore[arg-type]

    batcher._forward = forward
    started = threading.Barrier(3)
    outcomes: list[str] = []

    def ask(place: int) -> None:
        started.wait()
        try:
            for _ in batcher.tokens([place], Sampling(temperature=0, max_tokens=500), ()):
                time.sleep(0.001)
        except MemoryError as error:
            outcomes.append(str(error))

    in_threads(3, ask)
    assert "no room" in outcomes
    broken = False
    assert len(list(batcher.tokens([1], Sampling(temperature=0, max_tokens=3), ()))) == 3


def test_a_closed_batcher_breaks_off_and_takes_nothing_more() -> None:
    batcher = Batcher(drawn("llama"), BATCHING)
    going = batcher.tokens([1], Sampling(temperature=0, max_tokens=30), ())
    next(going)
    batcher.close()
    with pytest.raises(RuntimeError, match="the engine was closed"):
        list(going)
    with pytest.raises(RuntimeError, match="the engine was closed"):
        next(batcher.tokens([1], Sampling(temperature=0, max_tokens=30), ()))


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"slots": 0}, "batching.slots: found 0, wanted at least 1"),
        ({"prefill_chunk": 0}, "batching.prefill_chunk: found 0"),
        ({"capacity": 1}, "batching.capacity: found 1, wanted at least 2"),
        ({"lookup": -1}, "batching.lookup: found -1"),
        ({"lookup": 4, "same_bits": True}, "same_bits rules that out"),
        ({"draft": -1}, "batching.draft: found -1"),
        ({"draft": 4, "same_bits": True}, "draft of 4 reads several tokens when a request is alone; same_bits rules that out"),
    ],
)
def test_settings_out_of_range_are_refused(values: dict[str, int], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Batching(**{"slots": 2, "prefill_chunk": 4} | values)  # type: ignore[arg-type]


# Slots


def test_a_slot_smaller_than_the_context_is_all_that_a_text_can_look_back_on() -> None:
    model = drawn("llama")
    batcher = Batcher(model, Batching(slots=2, prefill_chunk=5, capacity=16))
    assert batcher.stats().cache_tokens_capacity == 32
    ids, start = [3, 4, 5], 0
    for token, _ in batcher.tokens([3, 4, 5], Sampling(temperature=0, max_tokens=40), ()):
        start = len(ids) - 8 if len(ids) - start > 16 else start
        assert token == int(last_logits(model, ids[start:]).argmax())
        ids.append(token)


def test_memory_is_what_was_taken_at_the_start() -> None:
    cache = SlotCache(drawn("llama"), slots=3, capacity=CONTEXT)
    assert sum(part.nbytes for part in (*cache.keys, *cache.values)) == 2 * 2 * 3 * 64 * 2 * 8 * 4  # 48 tokens in a block of 64
    cache.lengths[1] = 46
    cache.rows(0, 3, 2, [1])
    with pytest.raises(CacheFull, match="49 tokens, but a slot was made for 48"):
        cache.rows(0, 3, 3, [1])


@pytest.mark.parametrize("name", SHAPES)
def test_rows_of_different_lengths_have_the_logits_of_each_alone(name: str) -> None:
    model = drawn(name)
    cache, forward = SlotCache(model, 4, CONTEXT), forward_of(model)
    texts = [torch.randint(0, EOT, (length,), generator=torch.Generator().manual_seed(length)).tolist() for length in (7, 30, 1, 19)]
    with torch.inference_mode():
        for slot, ids in enumerate(texts):
            for begin in range(0, len(ids) - 1, 8):
                chunk = ids[begin : min(begin + 8, len(ids) - 1)]
                forward(torch.tensor([chunk]), cache.rows(slot, 1, len(chunk), [slot]), False)
        ends = torch.tensor([[ids[-1]] for ids in texts])
        found = [run(ends, cache.rows(0, 4, 1, ()), False)[:, -1] for run in (forward, lambda ids, rows, _: model(ids, rows))]
    expected = torch.stack([last_logits(model, ids) for ids in texts])
    for logits in found:
        assert torch.allclose(logits, expected, atol=2e-5)


def test_a_step_takes_all_the_threads_that_there_were_when_the_engine_was_opened() -> None:
    """torch gives a thread as many as the process had when it began, and while another thread chose tokens that was one."""
    before, found = torch.get_num_threads(), []
    torch.set_num_threads(2)
    try:
        batcher = Batcher(drawn("gpt", vocab=40_000), BATCHING)
        inner = batcher._forward
        batcher._forward = lambda ids, rows, every: (found.append(torch.get_num_threads()), inner(ids, rows, every))[1]

        def ask(place: int) -> None:
            torch.set_num_threads(1)
            list(batcher.tokens([1, 2], Sampling(temperature=0, max_tokens=3), ()))
            in_threads(1, lambda place: found.append(torch.get_num_threads()))

        in_threads(1, ask)
    finally:
        torch.set_num_threads(before)
    assert found == [2, 2, 2, 2]


def test_small_steps_are_done_several_at_a_time_before_anybody_is_woken(monkeypatch: pytest.MonkeyPatch) -> None:
    batcher = Batcher(drawn("llama"), BATCHING)
    greedy = Sampling(temperature=0, max_tokens=9)
    first, second = (batcher.tokens([start], greedy, ()) for start in (1, 2))
    monkeypatch.setattr(steps, "BURST", 0)
    next(first)
    in_threads(1, lambda place: next(second))
    monkeypatch.setattr(steps, "BURST", 60)
    [next(first) for _ in range(2)]  # the one that was drawn beside the other's, and one of a turn of its own
    assert batcher.stats().generated_tokens >= 2 * 9 - 1  # until one is alone
    assert len(list(first)) == 9 - 3


def test_closing_ends_a_burst(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps, "BURST", 60)
    batcher = Batcher(drawn("llama"), BATCHING)
    inner, forwards = batcher._forward, []
    batcher._forward = lambda ids, rows, every: (forwards.append(1), len(forwards) == 6 and batcher.close(), inner(ids, rows, every))[2]
    endless = Sampling(temperature=0, max_tokens=10**6)

    def ask(place: int) -> None:
        with pytest.raises(RuntimeError, match="closed"):
            list(batcher.tokens([place], endless, ()))

    in_threads(2, ask)
    assert len(forwards) < 12


# Looking up


def test_a_guess_is_what_followed_the_last_time() -> None:
    lookup = Lookup()
    assert lookup.guess([1, 2, 3], 4) == []
    assert lookup.guess([1, 2, 3, 9, 1, 2, 3], 2) == [9, 1]
    assert Lookup().guess([4, 5, 4, 5], 5) == [4, 5, 4, 5, 4]  # and round again
    assert lookup.guess([1, 2, 3, 9, 1, 2, 3, 8, 7, 2, 3], 1) == [8]  # the newest place, by two tokens
    assert lookup.guess([1, 2, 3, 9, 1, 2, 3, 8, 7, 2, 3, 3], 4) == []


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("sampling", [*settings(3), Sampling(temperature=0, max_tokens=200)], ids=["greedy", "seeded", "long", "very long"])
def test_looking_up_changes_no_token(name: str, sampling: Sampling) -> None:
    model = drawn(name)
    text = [5, 6, 7, 8, 9, 10, 5, 6, 7, 8, 9]
    alone = list(generate(model, text, sampling, EOT))
    batcher = Batcher(model, Batching(slots=1, prefill_chunk=8, lookup=4))
    assert [token for token, _ in batcher.tokens(text, sampling, {EOT})] == alone


def test_looking_up_takes_fewer_forwards_where_a_text_repeats() -> None:
    batcher = Batcher(drawn("llama"), Batching(slots=1, prefill_chunk=CONTEXT, lookup=4))
    inner, forwards = batcher._forward, []
    batcher._forward = lambda ids, rows, every: (forwards.append(ids.size(1)), inner(ids, rows, every))[1]
    again = [(3, 100.0), (4, 100.0)]  # nothing but these two, so it soon repeats itself
    tokens = list(batcher.tokens([3, 4, 3, 4], Sampling(temperature=0, max_tokens=40, logit_bias=tuple(again)), ()))
    assert len(tokens) == 40
    assert len(forwards) < 20
    assert max(forwards) == 5


# Drafting


@pytest.mark.parametrize("name", ["llama", "qwen3"])
@pytest.mark.parametrize("sampling", [*settings(4), Sampling(temperature=0, max_tokens=200)])
@pytest.mark.parametrize("lookup", [0, 3])
def test_drafting_changes_no_token(name: str, sampling: Sampling, lookup: int) -> None:
    model = drawn(name)
    text = [5, 6, 7, 8, 9, 10, 5, 6, 7, 8, 9]
    alone = list(generate(model, text, sampling, EOT))
    batcher = Batcher(model, Batching(slots=2, prefill_chunk=8, draft=4, lookup=lookup))
    assert [token for token, _ in batcher.tokens(text, sampling, {EOT})] == alone
    asked = [(text, sampling), ([1, 2], Sampling(temperature=0, max_tokens=9))]  # two read a token each, then one is alone
    assert together(batcher, asked) == [alone, list(generate(model, *asked[1], EOT))]


@pytest.mark.parametrize("sampling", [Sampling(temperature=0, max_tokens=40), Sampling(temperature=1.0, max_tokens=40, seed=5)])
def test_most_of_what_an_8_bit_copy_drafts_is_right_also_where_the_text_is_drawn(sampling: Sampling) -> None:
    """Five tokens a forward at best, so eight for forty; a guess of the likeliest token would seldom be what temperature 1 draws."""
    model = drawn("llama")
    batcher = Batcher(model, Batching(slots=1, prefill_chunk=CONTEXT, draft=4))
    inner, forwards = batcher._forward, []
    batcher._forward = lambda ids, rows, every: (forwards.append(ids.size(1)), inner(ids, rows, every))[1]
    assert len(list(batcher.tokens([3, 4], sampling, ()))) == 40
    assert len(forwards) <= 14


def test_a_draft_holds_a_copy_of_the_layers_and_the_embedding_of_the_model_itself() -> None:
    model = drawn("llama")
    batcher = Batcher(model, Batching(slots=1, prefill_chunk=8, draft=4))
    assert batcher._draft is not None
    copied = batcher._draft._model
    assert copied.get_parameter("model.embed_tokens.weight") is model.get_parameter("model.embed_tokens.weight")
    assert copied.get_buffer("model.layers.0.mlp.up_proj.weight").dtype == torch.int8


def test_a_model_without_a_quicker_copy_is_not_drafted_for() -> None:
    with pytest.raises(ValueError, match=r"batching\.draft: a Gpt has no 8-bit copy that is quicker; 0 is off"):
        Batcher(drawn("gpt"), Batching(slots=1, prefill_chunk=8, draft=4))


# The engine


@pytest.fixture(scope="module")
def bytes_model() -> nn.Module:
    return drawn("llama", BYTES.vocab_size)


def asks(engine: Engine, count: int) -> list[list[Piece]]:
    found: dict[int, list[Piece]] = {}

    def ask(place: int) -> None:
        sampling = Sampling(temperature=1.0, max_tokens=25, seed=place, logprobs=place % 3 or None)
        found[place] = list(engine.complete("hello"[: place % 5], sampling))

    in_threads(count, ask)
    return [found[place] for place in range(count)]


def test_pieces_from_many_threads_are_those_of_one_at_a_time(bytes_model: nn.Module) -> None:
    alone = asks(Engine(bytes_model, BYTES), 20)
    batched = asks(Engine(bytes_model, BYTES, Batching(slots=6, prefill_chunk=4)), 20)
    for ours, theirs in zip(batched, alone, strict=True):
        assert [(piece.text, piece.token_ids, piece.finish_reason) for piece in ours] == [
            (piece.text, piece.token_ids, piece.finish_reason) for piece in theirs
        ]
        for one, other in zip(_logprobs(ours), _logprobs(theirs), strict=True):
            assert one == pytest.approx(other, abs=1e-4)


def _logprobs(pieces: Sequence[Piece]) -> Iterator[float]:
    return (found.logprob for piece in pieces for found in piece.logprobs)


def test_a_prompt_longer_than_a_slot_is_refused_at_the_call(bytes_model: nn.Module) -> None:
    engine = Engine(bytes_model, BYTES, Batching(slots=2, prefill_chunk=4, capacity=10))
    with pytest.raises(PromptTooLong, match="11 tokens, the model reads at most 10"):
        engine.complete("x" * 11, Sampling(temperature=0, max_tokens=1))
    with pytest.raises(PromptTooLong):
        engine.score([1] * 11)
    assert engine.prompt_limit == 10


def test_a_piece_has_the_log_probability_of_each_of_its_tokens(bytes_model: nn.Module) -> None:
    engine = Engine(bytes_model, BYTES)
    sampling = Sampling(temperature=0.7, max_tokens=12, top_k=5, logit_bias=((65, 3.0),), seed=2, logprobs=4)
    ids = BYTES.encode("abc")
    for piece in engine.complete("abc", sampling):
        assert [found.token_id for found in piece.logprobs] == list(piece.token_ids)
        for found in piece.logprobs:
            expected = last_logits(bytes_model, ids).log_softmax(-1)  # the model's own: no bias, temperature or top-k in it
            assert found.logprob == pytest.approx(float(expected[found.token_id]), abs=1e-4)
            best = expected.topk(4)
            assert [token for token, _ in found.top] == best.indices.tolist()
            assert [value for _, value in found.top] == pytest.approx(best.values.tolist(), abs=1e-4)
            ids.append(found.token_id)
    assert len(ids) > 3


def test_scores_are_those_of_transformers(tmp_path: object, bytes_model: nn.Module) -> None:
    from transformers import AutoModelForCausalLM

    save_model(bytes_model, tmp_path, BYTES.eot)  # type: ignore[arg-type]
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = list(b"The cat sat on the mat.")
    with torch.no_grad():
        expected = theirs(torch.tensor([ids])).logits[0].log_softmax(-1)
    found = Engine(bytes_model, BYTES, Batching(slots=2, prefill_chunk=5)).score(ids, top=2)
    assert found[0] is None
    for place, one in enumerate(found[1:], 1):
        assert one is not None
        assert one.token_id == ids[place]
        assert one.logprob == pytest.approx(float(expected[place - 1, ids[place]]), abs=1e-4)
        assert [token for token, _ in one.top] == expected[place - 1].topk(2).indices.tolist()
    assert Engine(bytes_model, BYTES).score([]) == []
    assert Engine(bytes_model, BYTES).score([7]) == [None]


def test_rungs_without_a_cache_score_and_give_log_probabilities_too() -> None:
    model = NGram.train(BYTES.encode("abcabcabd"), BYTES.vocab_size, order=3)
    engine = Engine(model, BYTES, BATCHING)
    a, b, c = BYTES.encode("abc")
    [_, _, third] = engine.score([a, b, c], top=1)
    assert third is not None
    assert third.logprob == pytest.approx(math.log(model.next_probs([a, b])[c]), abs=1e-5)
    piece = next(engine.complete("ab", Sampling(temperature=0, max_tokens=1, logprobs=0)))
    assert [found.token_id for found in piece.logprobs] == [c]
    assert engine.stats().running <= 1
    engine.close()
    with pytest.raises(RuntimeError, match="closed"):
        list(engine.complete("ab", Sampling(temperature=0, max_tokens=1)))


def test_a_model_that_is_opened_to_answer_learns_no_more_and_one_that_is_lent_goes_on(tmp_path: Path) -> None:
    opened = Engine.open(tiny.tiny_model(tmp_path / "model")).model
    assert isinstance(opened, nn.Module)
    assert not any(weight.requires_grad for weight in opened.parameters())
    lent = drawn("llama", BYTES.vocab_size).requires_grad_(True)
    Engine(lent, BYTES)
    assert all(weight.requires_grad for weight in lent.parameters())


def test_an_engine_of_one_slot_reads_as_the_decoder_does(bytes_model: nn.Module) -> None:
    ids = BYTES.encode("hello")
    next_logits = decoder(bytes_model, 40)
    for piece in Engine(bytes_model, BYTES).complete("hello", Sampling(temperature=0, max_tokens=20)):
        for token in piece.token_ids:
            assert token == int(next_logits(ids).argmax())
            ids.append(token)
