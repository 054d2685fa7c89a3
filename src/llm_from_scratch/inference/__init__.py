"""Writing with a finished model: draw tokens (`sampling`), remember what was read (`decoding`, `kv_cache`), write many texts at once
(`batching`; in machine code: `forward`, `kernels`; with guesses: `lookup`, `draft`), show text (`engine`, `streaming`) and take less room
(`quantize`). Nothing here learns.
"""
