"""The miniature IGLUE: emoji scenes with questions, entailment, captions and two-image statements in eleven
languages.

1. `names`: labels, their WordNet relations, their names in each language; templates become sentences.
2. `world`: draws scenes, and what is asked and said of them.
3. `write`: the official formats of xGQA, XVNLI, xFlickrCO and MaRVL, so that one reader serves both.
"""
