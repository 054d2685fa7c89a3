"""llama.cpp in an interpreter of its own, which has llama-cpp-python and nothing of ours: JSON on stdin, JSON on stdout.

It is run as a file: `PYTHON benchmarks/llama_cpp_child.py < question.json`. The question names a .gguf `file`, a number of `threads`,
`texts` to tokenize, and `prompts` (ids) to go on from greedily for `tokens`, `rounds` times; the answer has the ids of each text, the ids
and the spelled text of each continuation, and the milliseconds of every step of it.
"""

from __future__ import annotations

import json
import sys
from time import perf_counter
from typing import Any


def main() -> None:
    asked = json.load(sys.stdin)
    import llama_cpp
    import numpy as np

    room = max([1, *map(len, asked["prompts"])]) + asked["tokens"]
    threads = {"n_threads": asked["threads"], "n_threads_batch": asked["threads"]}
    model = llama_cpp.Llama(asked["file"], n_ctx=max(room, 64), verbose=False, **threads)

    def step(ids: list[int]) -> int:
        model.eval(ids)
        return int(np.ctypeslib.as_array(model._ctx.get_logits(), shape=(model.n_vocab(),)).argmax())

    def go_on(prompt: list[int]) -> dict[str, Any]:
        model.reset()
        ids, times = [step(prompt)], []
        for _ in range(asked["tokens"] - 1):
            started = perf_counter()
            ids.append(step(ids[-1:]))
            times.append(1000 * (perf_counter() - started))
        return {"ids": ids, "text": model.detokenize(ids).decode("utf-8", errors="replace"), "ms": times}

    answer = {
        "version": llama_cpp.__version__,
        "tokenized": [model.tokenize(text.encode(), add_bos=False, special=False) for text in asked["texts"]],
        "continued": [[go_on(prompt) for prompt in asked["prompts"]] for _ in range(asked["rounds"])],
        "template": model.metadata.get("tokenizer.chat_template", ""),
    }
    json.dump(answer, sys.stdout)


if __name__ == "__main__":
    main()
