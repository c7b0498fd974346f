"""Pictures and text that live in the repository: emoji by three vendors, their names in 22 languages, the
Universal Declaration of Human Rights.

1. `packages` builds `data/` from public packages (`python -m raylib.sample`; only when the sample itself
   changes).
2. `concepts` reads `data/` and says what training may see.

`data/README.md` tells where everything came from, under which licence.
"""
