"""Code-mixing (CoSDA, Qin et al. 2020; paper 0): words of English training texts become words of other
languages."""

from pathlib import Path
from typing import Literal

from pydantic import Field, PrivateAttr

from finetune.examples import Captioned, Example
from finetune.lexicon.dictionaries import open_dictionaries
from finetune.lexicon.mixing import mix
from finetune.strategies.base import Context, Strategy
from raylib.cache import cached, file_fingerprint
from raylib.randomness import Key


class CodeMixing(Strategy):
    """`dictionaries`: folder of MUSE files, default: `dictionaries` in the data folder; `languages`: which,
    default: the targets. A text is mixed with probability `ratio`, then each of its words with `probability`
    (the paper's public code: 1, 0.9). `stages`: with sparse fine-tuning, in the rounds that find the mask, in
    the training after them, or in both (paper 0 found the rounds harmful)."""

    hidden = ("dictionaries",)

    stages: Literal["last", "rounds", "both"] = "last"
    dictionaries: str | None = None
    languages: tuple[str, ...] = ()
    ratio: float = Field(1.0, ge=0, le=1)
    probability: float = Field(0.9, ge=0, le=1)
    _opened: object = PrivateAttr(None)

    def files(self, data: Path) -> tuple[Path, ...]:
        return (Path(self.dictionaries or data / "dictionaries"),)

    def prepare(self, context: Context) -> "CodeMixing":
        """Read the dictionaries; says how many lines of them were odd.

        Raises:
            UserError: a language without a dictionary, a file that is no dictionary.
        """
        languages = self.languages or tuple(code for code in context.languages if code != "en")
        (folder,) = self.files(context.data)
        opened, report = cached(
            "dictionaries",
            (file_fingerprint(folder), languages),
            lambda: open_dictionaries(folder, languages),
        )
        context.log(f"strategies.code_mixing: {report}")
        ready = self.model_copy()
        ready._opened = opened
        return ready

    def example(self, example: Example | Captioned, *key: Key) -> Example | Captioned:
        """Every text of the example, each from draws of its own."""
        return example.map_texts(
            lambda text, i: mix(text, self._opened, self.ratio, self.probability, *key, "mix", i)
        )
