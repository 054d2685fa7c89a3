"""Writing with a finished model: draw tokens (`sampling`), remember what was read (`decoding`, `kv_cache`), show text (`engine`,
`streaming`) and take less room (`quantize`). Nothing here learns.
"""
