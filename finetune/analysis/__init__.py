"""Figures of a finished run, each a PNG with the numbers behind it as JSON: `python -m finetune analyse RUN`.

1. `similarity`: CLS states of parallel items, language by language (paper 1, figure 4); `parallel` finds the
   items.
2. `curves`: accuracy after each epoch, by language and by question type (paper 1, figures 2 and 3).
3. `confused`: accuracy with synonyms counted right, the most confused labels (paper 0, tables 2 and 3).
4. `attention`: where in the picture a word looks, in each language (paper 2, figure 3); `words` finds the
   word, `maps` draws.
5. `tsne`: states of words and of the regions that they name, in one plane (paper 3's t-SNE picture);
   `objects` finds both.

`run` does them all; `figures` is what they share.
"""
