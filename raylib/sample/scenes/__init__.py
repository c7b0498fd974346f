"""The miniature IGLUE: emoji scenes with questions, entailment, captions and two-image statements in eleven
languages.

1. `labels`: labels, their WordNet relations, their names in each language; templates become sentences.
2. `world`: makes scenes, and what is asked and said of them.
3. `writer`: the official formats of xGQA, XVNLI, xFlickrCO and MaRVL, so that one reader serves both.

`subset` made the WordNet and the word vectors that come along.
"""
