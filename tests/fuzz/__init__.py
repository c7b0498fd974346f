"""Damaged, foreign and hostile files, read by every reader of the product: `python -m tests.fuzz --help`.

`reader.py` is the record of a reader, `readers/` has them all, `mutate.py` damages examples, `child.py` reads
one damaged file and judges what came of it, `pool.py` gives it to processes that may die of it.
"""
