"""The ladder: ngram < bigram < mlp < attention < gpt < llama, each rung one idea more than the one before.

`registry` builds, saves and loads any of them; `rung` is the skeleton that the neural ones share.
"""
