"""Weeks 11 and 12: how many tokens a second our engine writes, against itself without a cache, transformers.generate, and one request."""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
from torch import nn

from benchmarks import table
from llm_from_scratch import bundle
from llm_from_scratch.inference.batching import Batcher, Batching
from llm_from_scratch.inference.decoding import last_logits
from llm_from_scratch.inference.int8 import Int8Linear
from llm_from_scratch.inference.quantize import KINDS, load_bundle, quantize
from llm_from_scratch.inference.sampling import Sampling
from llm_from_scratch.model import registry
from llm_from_scratch.model.llama import Llama, LlamaShape

SMOLLM2_135M = LlamaShape(
    vocab_size=49152,
    context=2048,
    width=576,
    layers=30,
    heads=9,
    kv_heads=3,
    head_dim=64,
    hidden=1536,
    rope_theta=100000.0,
    qk_norm=False,
    tied=True,
    norm_eps=1e-5,
)
TOY = LlamaShape(
    vocab_size=96,
    context=64,
    width=32,
    layers=2,
    heads=4,
    kv_heads=2,
    head_dim=8,
    hidden=64,
    rope_theta=1e4,
    qk_norm=False,
    tied=True,
    norm_eps=1e-5,
)
PROMPT, CONCURRENT, LOOKUP, DRAFT = 16, (1, 4, 16), 6, 3
PEER, OURS, LAST = "transformers.generate, fp32", "fp32", "uncached, the last token"
STREAM = "weights read once"

NOTES = [
    "Greedy, without text or HTTP: ids in, ids out. `tokens/s` is all new tokens by the time from the call to the last of them, the prompt "
    "read too, the median of all rounds; ratios are medians of the ratios within a round. Peer and engine run in turn in one process.",
    "`transformers` is the faster of its two rows: as many threads as the machine has cores, and one. A small model is faster with "
    "one, so our engine takes one for it by itself; a large one is bound by reading its weights.",
    "`uncached` reads the whole text again for every token. For it, forwards at nine lengths were timed and summed up in between; "
    f"`{LAST}` is by the longest of them, the forward that a token costs at the end of the text.",
    f"`fp32, drafting` is fp32's own text: an 8-bit copy of the model writes {DRAFT} tokens ahead, and a forward in fp32 checks them all.",
    f"`{STREAM}` writes nothing: torch sums as many numbers as the weights that a token needs hold bytes (the embedding counts as the "
    "head), with all threads. An engine that reads every weight for every token is hardly faster, so its `× transformers` is about what "
    "there is to gain in fp32 without drafting; a little more is in asking for weights ahead of time. A small model's stay in the "
    "processor's caches.",
    "int8 takes the linear layers of the blocks, and the head where it is large (`quantize.LARGE_HEAD`). A few tokens' activations are "
    "multiplied as they are (`inference/kernels.py`); `int8_dynamic` rounds those of the MLPs to 8 bits first.",
    "`requests` come from as many threads and share steps (`Batching(slots=16)`); `× one` is against one request in the same engine.",
    f"`lookup` guesses {LOOKUP} tokens from the text itself, and `repeating` is the same without: one request whose prompt says the same "
    "twice. Its text is the same; how far it repeats depends on the model (untrained ones do so sooner or later).",
]


@dataclass(frozen=True)
class Effort:
    """New tokens, rounds, and at how many requests at once."""

    tokens: int
    rounds: int
    requests: tuple[int, ...]


def main() -> None:
    parser = table.parser(__doc__ or "")
    parser.add_argument("--model", type=Path, action="append", help="a bundle of a gpt or llama; may be given again")
    parser.add_argument("--tokens", type=int, default=256, help="new tokens of each request, as far as the context goes")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--without-large", action="store_true", help="leave out the untrained model of SmolLM2-135M's shape")
    arguments = parser.parse_args()
    effort = Effort(8, 1, (1, 4)) if arguments.quick else Effort(arguments.tokens, arguments.rounds, CONCURRENT)
    models = {"toy": untrained(TOY)} if arguments.quick else {}
    for folder in arguments.model or []:
        models[folder.name] = opened(folder)
    if not arguments.quick and not arguments.without_large:
        models["SmolLM2-135M's shape, untrained"] = untrained(SMOLLM2_135M)
    if not models:
        parser.error("no model; give --model FOLDER, such as artifacts/models/sft")
    rows = [row for name, model in models.items() for row in measured(name, model, effort)]
    settings = {
        "new_tokens": effort.tokens,
        "prompt_tokens": PROMPT,
        "rounds": effort.rounds,
        **table.waiting(),
        **table.packages("transformers"),
    }
    table.write(arguments.out, "decoding", "Tokens a second of the engine, on a CPU", rows, settings, NOTES)


def opened(folder: Path) -> nn.Module:
    """Raises BundleError where there is none, and ValueError for a rung that keeps no keys and values."""
    bundle.verify(folder, *KINDS)
    model = load_bundle(folder)
    if not isinstance(model, nn.Module) or not getattr(model, "supports_cache", False):
        raise ValueError(f"{folder} holds a {type(model).__name__}, which keeps no keys and values; give a gpt or llama")
    return model.requires_grad_(False)


def untrained(shape: LlamaShape) -> Llama:
    """Every weight drawn, also those that would start at zero."""
    torch.manual_seed(0)
    model = Llama(shape).eval().requires_grad_(False)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() == 2:
                weight.normal_(std=weight.size(1) ** -0.5)
    return model


def measured(name: str, model: Any, effort: Effort) -> list[dict[str, Any]]:
    """The rows of one model."""
    new = min(effort.tokens, model.context - PROMPT)
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(0, model.vocab_size, (max(effort.requests), PROMPT), generator=generator).tolist()
    repeating = prompts[0][: PROMPT // 2] * 2
    runs: dict[str, Callable[[], float]] = dict(peers(model, prompts[0], new))
    runs[STREAM] = reading(weight_bytes(model), new)
    runs[OURS] = writing(model, Batching(slots=1, prefill_chunk=512), [prompts[0]], new)
    if isinstance(model, Llama):
        runs[f"{OURS}, drafting"] = writing(model, Batching(slots=1, prefill_chunk=512, draft=DRAFT), [prompts[0]], new)
    for scheme in ("int8_weight", "int8_dynamic"):
        small = quantize(model, scheme)  # type: ignore[arg-type]
        runs[f"{STREAM}, {scheme}"] = reading(weight_bytes(small), new)
        runs[scheme] = writing(small, Batching(slots=1, prefill_chunk=512), [prompts[0]], new)
    shared = Batching(slots=max(effort.requests), prefill_chunk=512, capacity=PROMPT + new)
    for count in effort.requests:
        runs[f"requests: {count}"] = writing(model, shared, prompts[:count], new)
    runs["repeating"] = writing(model, Batching(slots=1, prefill_chunk=512), [repeating], new)
    runs["lookup"] = writing(model, Batching(slots=1, prefill_chunk=512, lookup=LOOKUP), [repeating], new)
    seconds: dict[str, list[float]] = {how: [] for how in runs}
    for turn in range(effort.rounds + 1):
        for how, run in runs.items():
            taken = run()
            if turn:  # the first round is not counted: caches, lazy set-up
                seconds[how].append(taken)
    whole, last = uncached(model, prompts[0], new)
    seconds |= {"uncached": [whole] * effort.rounds, LAST: [new * last] * effort.rounds}
    tokens = {how: new * (int(how.removeprefix("requests: ")) if how.startswith("requests") else 1) for how in seconds}
    return [row(name, how, seconds, tokens) for how in ("uncached", LAST, *runs)]


def peers(model: Any, prompt: list[int], new: int) -> dict[str, Callable[[], float]]:
    """transformers on the same weights, with all threads and with one."""
    from transformers import AutoModelForCausalLM

    with tempfile.TemporaryDirectory() as folder:
        registry.save_model(model, Path(folder), 0)
        peer: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    peer.generation_config.eos_token_id, peer.generation_config.pad_token_id = None, 0
    ids = torch.tensor([prompt])

    def run(threads: int) -> float:
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        started = perf_counter()
        with torch.inference_mode():
            made = peer.generate(ids, max_new_tokens=new, min_new_tokens=new, do_sample=False)
        taken = perf_counter() - started
        torch.set_num_threads(before)
        assert made.size(1) == len(prompt) + new
        return taken

    threads = torch.get_num_threads()
    return {PEER: lambda: run(threads), f"{PEER}, one thread": lambda: run(1)}


def writing(model: nn.Module, batching: Batching, prompts: Sequence[list[int]], new: int) -> Callable[[], float]:
    """Seconds until each of `prompts` has `new` tokens behind it, each asked for by a thread of its own."""
    batcher = Batcher(model, batching)
    sampling = Sampling(temperature=0, max_tokens=new)

    def ask(prompt: list[int]) -> None:
        assert sum(1 for _ in batcher.tokens(prompt, sampling, ())) == new

    def run() -> float:
        threads = [threading.Thread(target=ask, args=(prompt,)) for prompt in prompts[1:]]
        started = perf_counter()
        for thread in threads:
            thread.start()
        ask(prompts[0])
        for thread in threads:
            thread.join()
        return perf_counter() - started

    return run


def weight_bytes(model: nn.Module) -> int:
    """Of the matrices that a token is multiplied by; the embedding is the head, where that has no copy of its own."""
    matrices = {tensor.data_ptr(): tensor.nbytes for tensor in (*model.state_dict().values(), *model.buffers()) if tensor.dim() == 2}
    if isinstance(getattr(model, "lm_head", None), Int8Linear):
        del matrices[model.get_parameter("model.embed_tokens.weight").data_ptr()]
    return sum(matrices.values())


def reading(size: int, new: int) -> Callable[[], float]:
    """Seconds to read `size` bytes from memory `new` times, as told from a few."""
    numbers = torch.ones(size // 4)

    def run() -> float:
        times = []
        for _ in range(5):
            started = perf_counter()
            numbers.sum()
            times.append(perf_counter() - started)
        return new * median(times)

    return run


def uncached(model: nn.Module, prompt: list[int], new: int) -> tuple[float, float]:
    """Seconds of `new` forwards over a text that grows from `prompt`, and of the last: nine of them timed, the rest on straight lines."""
    places = sorted({round(place * (new - 1) / 8) for place in range(9)})
    found = []
    for place in places:
        ids = (prompt * new)[: len(prompt) + place]
        last_logits(model, ids)
        times = []
        for _ in range(3):
            started = perf_counter()
            last_logits(model, ids)
            times.append(perf_counter() - started)
        found.append(median(times))
    pairs = zip(places, places[1:], found, found[1:], strict=False)
    return found[0] + sum((end - start) * (first + last) / 2 for start, end, first, last in pairs), found[-1]


def row(name: str, how: str, seconds: Mapping[str, list[float]], tokens: Mapping[str, int]) -> dict[str, Any]:
    rate = table.middle([tokens[how] / taken for taken in seconds[how]])
    best = [min(times) for times in zip(*(seconds[other] for other in seconds if other.startswith(PEER)), strict=True)]
    found: dict[str, Any] = {"model": name, "how": how, "tokens/s": rate["median"], "from … to": f"{rate['low']:.4g} … {rate['high']:.4g}"}
    found["× transformers"] = median(tokens[how] / tokens[OURS] * theirs / ours for theirs, ours in zip(best, seconds[how], strict=True))
    found["× uncached"] = _times(seconds, how, "uncached") if how == OURS else ""
    found["× its last"] = _times(seconds, how, LAST) if how == OURS else ""
    base = "requests: 1" if how.startswith("requests") else "repeating" if how == "lookup" else None
    found["× one"] = "" if base is None else _times(seconds, how, base) * tokens[how] / tokens[base]
    return found


def _times(seconds: Mapping[str, list[float]], how: str, base: str) -> float:
    """How many times as fast as `base`."""
    return median(theirs / ours for theirs, ours in zip(seconds[base], seconds[how], strict=True))


if __name__ == "__main__":
    main()
