"""What dictionaries, WordNet and word vectors know of words: pure functions for the strategies of paper 0.

1. `wordnet`, `vectors`: relations and vectors of answer labels; `distances` makes a label x label matrix of
   either.
2. `dictionaries` reads MUSE's files; `mixing` replaces words by translations.
3. `confusions` says which labels a model takes for which, and what they are to each other.
"""
