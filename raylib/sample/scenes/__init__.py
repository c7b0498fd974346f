"""The miniature IGLUE: emoji scenes with questions, entailment, captions and two-image statements in eleven
languages.

1. `world`: labels, their WordNet relations, their names in each language; scenes, and what is asked and
   said of them, by templates that become sentences.
2. `writer`: the official formats of xGQA, XVNLI, xFlickrCO and MaRVL, so that one reader serves both.

`subset` made the WordNet and the word vectors that come along.
"""
