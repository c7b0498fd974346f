"""Figures of a finished run, each a PNG with the numbers behind it as JSON: `python -m finetune analyse RUN`.

1. `languages`: similarity of CLS states of parallel items, language by language (paper 1, figure 4); accuracy
   after each epoch, by language and by question type (paper 1, figures 2 and 3); accuracy with synonyms
   counted right, the most confused labels (paper 0, tables 2 and 3).
2. `attention`: where in the image a word looks, in each language (paper 2, figure 3).
3. `tsne`: states of words and of the regions that they name, in one plane (paper 3's t-SNE figure).

`run` does them all; `parallel` has the items, their words, and what the figures share.
"""
