"""A real open model and one of ours, token by token for one reader: our engine beside transformers' generate and llama.cpp."""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import cpuinfo
import numpy as np
import torch

from benchmarks import table
from llm_from_scratch import bundle, tokenizer
from llm_from_scratch.data.shards import open_shards
from llm_from_scratch.evaluation.likelihood import score
from llm_from_scratch.inference.batching import Batching
from llm_from_scratch.inference.engine import ALONE, Engine
from llm_from_scratch.inference.quantize import Scheme, load_bundle, quantize
from llm_from_scratch.inference.sampling import Sampling
from llm_from_scratch.model import gguf, registry
from llm_from_scratch.model.gpt import Gpt
from llm_from_scratch.model.llama import Llama, LlamaParams
from llm_from_scratch.tokenizer import Tokenizer
from llm_from_scratch.tokenizer import gguf as words_gguf
from llm_from_scratch.tokenizer.bpe import train_bpe

CHILD = Path(__file__).with_name("llama_cpp_child.py")
PROMPT = "The river is"
FP32, DRAFTING, TRANSFORMERS = "ours, fp32", "ours, fp32, drafting", "transformers, fp32"
DRAFT, SCORED, CONTEXT = 3, 2048, 256
"""Tokens written ahead; tokens of held-out text, and what a window of it shows."""
LLAMA_CPP = {"llama.cpp, F16": "f16", "llama.cpp, Q8_0": "q8_0"}
TOY = LlamaParams(
    architecture="llama", context=2048, width=64, layers=2, heads=4, kv_heads=2, hidden=128, rope_theta=10000.0, qk_norm=False, copying=0.0
)

Run = tuple[list[int], float]
"""The ids that were written, and the milliseconds of a token after the first."""


@dataclass(frozen=True)
class Peers:
    """What a bundle is run by, under the names of the rows, and the bits a byte of held-out text costs ours."""

    runs: dict[str, Callable[[], Run]]
    bits: dict[str, float]
    parameters: int


def main() -> None:
    parser = table.parser(__doc__ or "")
    parser.add_argument("--model", type=Path, default=Path("artifacts/models/smollm2"), help="a bundle made by python -m stages import")
    parser.add_argument("--ours", type=Path, default=Path("artifacts/models/base"), help="a bundle of kind model, trained here")
    parser.add_argument(
        "--llama-cpp", metavar="PYTHON", default="", help="an interpreter that has llama-cpp-python; without, its rows are left out"
    )
    parser.add_argument("--tokens", type=int, default=64, help="written in each run")
    parser.add_argument(
        "--text", type=Path, default=Path("artifacts/tokens/wikipedia_bpe"), help="a tokens bundle: its held-out text is scored"
    )
    parser.add_argument("--rounds", type=int, default=5, help="how often each is run, in turn")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.tokens, arguments.rounds = 8, 1

    text = "The sea is water, and the river is water. " * 9 if arguments.quick else held_out(arguments.text)
    with tempfile.TemporaryDirectory() as work:
        chosen = (
            {"toy": toy(Path(work) / "toy")} if arguments.quick else {folder.name: folder for folder in (arguments.model, arguments.ours)}
        )
        rows: list[dict[str, Any]] = []
        for name, folder in chosen.items():
            bundle.verify(folder, "model")
            peers = prepare(folder, text, arguments, Path(work))
            rows += rows_of(name, peers, measured(peers.runs, arguments.rounds))
    settings = {
        "tokens": arguments.tokens,
        "held_out_tokens": SCORED,
        "rounds": arguments.rounds,
        "prompt": PROMPT,
        **table.packages("transformers"),
        **({"llama-cpp-python": version_of(arguments.llama_cpp)} if arguments.llama_cpp else {}),
    }
    said = [] if arguments.llama_cpp else ["llama.cpp was not run: no interpreter that has llama-cpp-python was named by `--llama-cpp`."]
    table.write(
        arguments.out, "open_model", "One reader: our engine, transformers and llama.cpp, on a CPU", rows, settings, [*NOTES, *said]
    )


NOTES = [
    "`ms` is a token's, after the first, in a greedy text of one reader: the median over the rounds, in which all take turns. `speed` is "
    "the time of transformers' `generate` by the row's, `of llama.cpp` that of llama.cpp at Q8_0 by the row's, round by round.",
    "`same ids` counts how many tokens from the start are those of our fp32. llama.cpp at Q8_0 rounds activations to eight bits as well, "
    "so it may leave at a near tie; at F16 it rounds the weights alone.",
    "An open model becomes a bundle by `python -m stages import`; llama.cpp's rows want `--llama-cpp`, an interpreter that has it.",
    "llama.cpp runs in a process of its own with as many threads as torch. It is timed around one evaluation and the choice of the "
    "likeliest token, without its samplers; ours is timed at the engine's public `complete`, text and all.",
    "Ours at int8 looks tokens up in float32 and multiplies by an 8-bit copy of the same matrix where it is large; Q8_0 does both in eight "
    "bits. `loss` is by how much the bits a byte of held-out Wikipedia text costs rise by it, head and all.",
    f"`{DRAFTING}`: an 8-bit copy of the model writes {DRAFT} tokens ahead, and a forward in fp32 checks all of them.",
]


def toy(folder: Path) -> Path:
    """A bundle of no meaning."""
    torch.manual_seed(0)
    words = train_bpe([PROMPT, "The sea is water."], 280)
    model = registry.build(TOY, words.vocab_size)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight) * 0.2)
    with bundle.writing(folder) as partial:
        registry.save_model(model, partial, words.eot)
        words.save(partial)
        bundle.seal(partial, "model", "toy")
    return folder


def held_out(tokens: Path) -> str:
    """The text that no model here was trained on, as a tokens bundle holds it. Raises BundleError where there is none."""
    bundle.verify(tokens, "tokens")
    words = tokenizer.load(tokens)
    return words.decode([token for token in open_shards(tokens).val[: 4 * SCORED].tolist() if token not in words.special.values()])


def prepare(folder: Path, text: str, arguments: argparse.Namespace, work: Path) -> Peers:
    """Everything opened, scored on the beginning of `text`, and the files of llama.cpp written."""
    words, model = tokenizer.load(folder), load_bundle(folder)
    if not isinstance(model, Gpt | Llama):
        raise ValueError(f"{folder} holds a {type(model).__name__}; give a gpt or a llama")
    model.requires_grad_(False)
    prompt, tokens = words.encode(PROMPT), arguments.tokens
    runs: dict[str, Callable[[], Run]] = {FP32: engine_run(model, words, prompt, tokens, ALONE)}
    if isinstance(model, Llama):
        runs[DRAFTING] = engine_run(model, words, prompt, tokens, replace(ALONE, draft=DRAFT))
    ids = np.array(words.encode(text)[:SCORED])
    bits = {FP32: score(model, ids, words.token_bytes(), min(CONTEXT, model.context)).val_bpb}
    for scheme in int8_schemes():
        small, name = quantize(model, scheme), f"ours, {scheme}"
        runs[name] = engine_run(small, words, prompt, tokens, ALONE)
        bits[name] = score(small, ids, words.token_bytes(), min(CONTEXT, model.context)).val_bpb
    runs[TRANSFORMERS] = transformers_run(folder, prompt, tokens)
    if arguments.llama_cpp:
        for name, kind in LLAMA_CPP.items():
            path = work / f"{folder.name}.{kind}.gguf"
            gguf.write(path, model, kind, words_gguf.fields(words))  # type: ignore[arg-type]
            runs[name] = llama_cpp_run(arguments.llama_cpp, path, prompt, tokens)
    return Peers(runs, bits, registry.parameters(model))


def int8_schemes() -> list[Scheme]:
    """Without VNNI, torch's product of whole numbers is a plain loop."""
    return ["int8_dynamic", "int8_weight"] if "avx512_vnni" in cpuinfo.get_cpu_info().get("flags", []) else ["int8_weight"]


def engine_run(model: Any, words: Tokenizer, prompt: list[int], tokens: int, batching: Batching) -> Callable[[], Run]:
    """By the public door, and without the tokens that would end the text."""
    engine = Engine(model, words, batching)
    sampling = Sampling(temperature=0, max_tokens=tokens, logit_bias=tuple((token, -1e4) for token in words.special.values()))

    def run() -> Run:
        ids: list[int] = []
        seen: list[tuple[int, float]] = []
        for piece in engine.complete(prompt, sampling):
            ids += piece.token_ids
            seen.append((piece.completion_tokens, perf_counter()))
        (first, started), (last, ended) = seen[0], next(one for one in seen if one[0] == seen[-1][0])
        return ids, 1000 * (ended - started) / (last - first)

    return run


def transformers_run(folder: Path, prompt: list[int], tokens: int) -> Callable[[], Run]:
    """`generate`, whose streamer is called after each step."""
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ends = dict.fromkeys(("eos_token_id", "temperature", "top_k", "top_p"))
    model.generation_config.update(**ends, pad_token_id=0)

    def run() -> Run:
        clock = Clock()
        given = torch.tensor([prompt])
        ids = model.generate(given, attention_mask=torch.ones_like(given), max_new_tokens=tokens, do_sample=False, streamer=clock)
        return ids[0, len(prompt) :].tolist(), 1000 * (clock.times[-1] - clock.times[1]) / (len(clock.times) - 2)

    return run


class Clock:
    """A streamer that keeps when it was called: for the prompt, then for each token."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Any) -> None:
        self.times.append(perf_counter())

    def end(self) -> None:
        """Nothing is held back."""


def version_of(python: str) -> str:
    """The llama-cpp-python that an interpreter has."""
    asked = [python, "-c", "import llama_cpp; print(llama_cpp.__version__)"]
    return subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()


def llama_cpp_run(python: str, path: Path, prompt: list[int], tokens: int) -> Callable[[], Run]:
    question = {"file": str(path), "threads": torch.get_num_threads(), "texts": [], "prompts": [prompt], "tokens": tokens, "rounds": 1}

    def run() -> Run:
        done = subprocess.run([python, str(CHILD)], input=json.dumps(question), capture_output=True, text=True, check=False)
        if done.returncode:
            raise ValueError(f"--llama-cpp {python} ends with: {done.stderr.strip().splitlines()[-1]}")
        found = json.loads(done.stdout)["continued"][0][0]
        return found["ids"], sum(found["ms"]) / len(found["ms"])

    return run


def measured(runs: dict[str, Callable[[], Run]], rounds: int) -> dict[str, list[Run]]:
    """Round after round, each in turn; the first is not counted (caches, lazy set-up)."""
    found: dict[str, list[Run]] = {name: [] for name in runs}
    for turn in range(rounds + 1):
        for name, run in runs.items():
            made = run()
            if turn:
                found[name].append(made)
    return found


def rows_of(name: str, peers: Peers, found: dict[str, list[Run]]) -> list[dict[str, Any]]:
    q8_0 = found.get("llama.cpp, Q8_0")
    rows = []
    for runner, runs in found.items():
        time = table.middle([ms for _, ms in runs])
        rows.append(
            {
                "model": name,
                "parameters, M": round(peers.parameters / 1e6, 2),
                "by": runner,
                "ms": time["median"],
                "from … to": f"{time['low']:.2f} … {time['high']:.2f}",
                "tokens/s": 1000 / time["median"],
                "speed": times(found[TRANSFORMERS], runs),
                "of llama.cpp": times(q8_0, runs) if q8_0 else "",
                "loss": f"{peers.bits[runner] / peers.bits[FP32] - 1:+.3%}" if runner in peers.bits else "",
                "same ids": f"{agreeing(found[FP32][0][0], runs[0][0])} of {len(runs[0][0])}",
            }
        )
    return rows


def times(theirs: Sequence[Run], ours: Sequence[Run]) -> float:
    return median(peer / own for (_, peer), (_, own) in zip(theirs, ours, strict=True))


def agreeing(wanted: Sequence[int], found: Sequence[int]) -> int:
    return next((place for place, pair in enumerate(zip(wanted, found, strict=False)) if pair[0] != pair[1]), min(len(wanted), len(found)))


if __name__ == "__main__":
    main()
