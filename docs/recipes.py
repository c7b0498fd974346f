"""Write the list of all recipes into recipes.md, from the code: `python docs/recipes.py`."""

from pathlib import Path

from finetune.recipes import FAMILIES as FINETUNE_FAMILIES
from finetune.recipes import RECIPES as FINETUNE
from pretrain.recipes import FAMILIES as PRETRAIN_FAMILIES
from pretrain.recipes import RECIPES as PRETRAIN

PAGE = Path(__file__).resolve().parent / "recipes.md"
HEAD = """# Recipes

Each row of the papers' tables and the recipe that runs it: `polyglance finetune RECIPE model=... data=...`,
`polyglance pretrain RECIPE ...`. `RECIPE --print-config` shows all settings, and under `deviations` those
that are not as published, each with the reason. What is in brackets says which checkpoint is evaluated. The
chains of commands of paper 4 and of IGLUE are in [fine-tuning](finetuning.md#rows-of-published-tables).

(Made by `python docs/recipes.py`.)
"""


def page() -> str:
    """Return the page as the recipes have it."""
    parts = [HEAD]
    for stage, recipes, families in (
        ("finetune", FINETUNE, FINETUNE_FAMILIES),
        ("pretrain", PRETRAIN, PRETRAIN_FAMILIES),
    ):
        groups: dict[str, list[str]] = {family: [] for family in families}
        for name, recipe in recipes.items():
            family = max((f for f in families if name.startswith(f)), key=len)
            row = " ".join((recipe.__doc__ or "").split()).replace("|", "/")
            groups[family].append(f"| `{name}` | {row} |")
        for family, rows in groups.items():
            if rows:
                parts += [f"\n## `{stage}`: {families[family]}\n\n| recipe | row |\n|---|---|", *rows]
    return "\n".join(parts) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
