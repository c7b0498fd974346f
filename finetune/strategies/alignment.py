"""Translation-based alignment (paper 4, section 3.1): the text of a target language is drawn to what English
says of the same image, the pivot.

| routine | trained on and compared with images | pivot | in a test |
| --- | --- | --- | --- |
| 1 | the target's caption | the English caption | as it is |
| 2 | the target's caption | the English caption, translated into the target | as it is |
| 3 | the target's caption, translated into English | the English caption | translated into English |

`translate` writes such translations in advance, by a translation model's folder (section 4).
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, NonNegativeFloat, PositiveInt

from finetune.formats import Captioned, stream_jsonl, stream_lines
from finetune.strategies.base import Captions, Context, Need, Outputs, Strategy, StrategyConfig, Term
from raylib.config import Config
from raylib.display import progress
from raylib.errors import UserError, hub_hint, require
from raylib.fileio import write_atomically
from raylib.randomness import Key

if (
    TYPE_CHECKING
):  # tasks import this room; settings of strategies are read without PyTorch (`raylib.settings`)
    from torch import Tensor

    from finetune.tasks.base import Task

Pivots = dict[tuple[str, str], tuple[str, str]]  # (image, caption) -> (what is trained on, its pivot)
CAPTIONS = ("sentences", "caption_reference_description")  # fields of JSON lines that hold them


class TranslationAlignmentConfig(StrategyConfig):
    """Translation-based alignment (paper 4). Translations are files made before, `finetune translate`: the
    task's splits `*_to_en` and `*_from_en`."""

    needs = frozenset({"captions", "embeddings"})
    display_fields = ("routine", "loss", "weight")
    mutable_fields = ("weight",)
    translations = ("_to_en", "_from_en")

    routine: Literal[1, 2, 3] = 3
    """Pairs that are drawn together (paper 4, section 3): 1, English and foreign captions; 2, translations of
    the English ones and foreign captions; 3, English captions and translations of the foreign ones, which
    tests then are too."""
    loss: Literal["mse", "pivot", "image"] = "mse"
    """Draw text and pivot together by the mean squared error of their vectors, not of unit length (equation
    7), by contrast of text and pivot (equation 8), or of pivot and image."""
    weight: NonNegativeFloat = 1.0
    """Weight of the alignment term (lambda of equation 9); 0 with routine 3 trains on translations alone, the
    paper's "MT"."""

    @property
    def tests_translations(self) -> bool:
        return self.routine == 3

    def provides(self) -> frozenset[Need]:
        return frozenset({"english_texts"}) if self.routine == 3 else frozenset()

    def build(self, context: Context) -> "TranslationAlignment":
        """Find the pivot of every training caption.

        Raises:
            UserError: an image without English; translations of another number.
        """
        assert context.captions is not None  # `needs` has been checked
        pivots: Pivots = {}
        for language in context.languages:
            pivots |= _pivots_of(self.routine, context.captions, language)
        return TranslationAlignment(pivots, self.loss, self.weight)


class TranslationAlignment(Strategy):
    """Texts drawn to their pivots by a `loss`."""

    def __init__(self, pivots: Pivots, loss: str, weight: float):
        self.pivots, self.loss, self.weight = pivots, loss, weight

    def example(self, example: Any, *key: Key) -> Captioned:
        text, pivot = self.pivots[example.image, example.captions[0]]
        return example._replace(captions=(text,), pivots=(pivot,))

    def terms(self, model: Any) -> dict[str, Term]:
        if not self.weight:
            return {}
        # contrast is a sum over the worker's rows
        divisor = None if self.loss == "mse" else _rows
        return {"alignment": Term(self.weight, self._values, divisor)}

    def _values(self, outputs: Outputs, part: dict) -> "Tensor":
        import torch.nn.functional as F

        text, pivot = outputs.text_embeddings, outputs.pivot_embeddings
        if self.loss == "mse":
            return F.mse_loss(text, pivot, reduction="none").mean(1)
        return outputs.contrast(pivot, text if self.loss == "pivot" else outputs.image_embeddings)


def _pivots_of(routine: int, read: Captions, language: str) -> Pivots:
    """{(image, caption): (what is trained on, pivot)}; an English caption is its own pivot."""
    captions = read("", language)
    if language == "en":
        return {(image, text): (text, text) for image, texts in captions.items() for text in texts}
    english = pivots = read("", "en")
    if routine == 2:
        pivots = read("_from_en", language)
        _same_number(pivots, english, f"translations from English into '{language}'")
    trained = captions
    if routine == 3:
        trained = read("_to_en", language)
        _same_number(trained, captions, f"translations from '{language}' into English")
    missing = [image for image in captions if image not in pivots]
    if missing:
        raise UserError(
            f"strategies.alignment: no English caption of {len(missing)} images, such as {missing[0]}"
        )
    # captions that are no translations of each other take the English ones in turn
    return {
        (image, text): (trained[image][i], pivots[image][i % len(pivots[image])])
        for image, texts in captions.items()
        for i, text in enumerate(texts)
    }


def _rows(part: dict) -> "Tensor":
    import torch

    return torch.full((), float(len(part["image_id"])), device=part["text"].clean.device)


def _same_number(
    translations: Mapping[str, tuple[str, ...]], source: Mapping[str, tuple[str, ...]], what: str
) -> None:
    """Raises UserError where an image has another number of translations than of captions."""
    for image, texts in source.items():
        if (number := len(translations.get(image, ()))) != len(texts):
            raise UserError(
                f"strategies.alignment: {what}: {number} for the {len(texts)} captions of {image}; make them "
                "anew (python -m finetune translate)"
            )


class TranslateConfig(Config):
    """Captions translated in advance by a translation model's folder (paper 4, section 4), for alignment and
    translate-test.

    Whole files are translated, line by line, and written where the task's records look for them: `*_to_en`,
    `*_from_en`, and of a test `translated`. What is done so far lies in FILE.partial, and is not done again.
    """

    data: str = ""
    """Data folder of the task."""
    languages: tuple[str, ...] = ()
    """Languages to translate."""
    split: Literal["train", "shots", "test"] = "train"
    """Texts to translate."""
    shots: int | str = 5
    """Number of shots, of split=shots."""
    direction: Literal["to_en", "from_en"] = "to_en"
    """Into English, or from it."""
    codes: Mapping[str, str] = Field(default_factory=dict)
    """The model's names of languages, where it wants to be told (NLLB, mBART, M2M-100): {"de": "deu_Latn",
    ...}."""
    batch: PositiveInt = 32
    """Texts at a time."""
    num_beams: PositiveInt = 4
    """Beams of the search for a translation."""
    length: PositiveInt = 128
    """Longest text and translation, in the model's tokens."""


def translate(
    task: "Task", model: Path, config: TranslateConfig, log: Callable[[str], None] = print
) -> list[Path]:
    """Make the files; returns them. One that is there is left as it is.

    Raises:
        UserError: no such data or model; the task has no place for such translations.
    """
    if not config.data:
        raise UserError("data= is missing: give the folder of the task's annotations")
    if not config.languages:
        raise UserError("languages= is missing: give those to translate, such as languages=de,ru")
    to_english = config.direction == "to_en"
    target_split = f"{config.split}_{config.direction}"
    if config.split == "test" and to_english:
        target_split = "translated"
    files = []
    for language in config.languages:
        spoken = language if to_english else "en"
        source = task.path(Path(config.data), config.split, spoken, config.shots)
        target = task.path(Path(config.data), target_split, language, config.shots)
        if not source.is_file():
            raise UserError(
                f"{source}: no such file ({config.split} in '{spoken}'); check data=, languages=, shots="
            )
        files.append((source, target))
    translator = None
    for language, (source, target) in zip(config.languages, files, strict=True):
        if target.is_file():
            log(f"{target}: there already")
            continue
        translator = translator or Translator(model, config)
        codes = (language, "en") if to_english else ("en", language)
        _translate_file(translator, source, target, codes, log)
    return [target for _, target in files]


def _translate_file(
    translator: "Translator", source: Path, target: Path, codes: tuple[str, str], log: Callable[[str], None]
) -> None:
    records = list(_records(source))
    texts = [text for record in records for text in _texts(record)]
    partial = target.with_name(f"{target.name}.partial")
    target.parent.mkdir(parents=True, exist_ok=True)
    # what an interrupted translation has left is not translated again; its last line may be cut off
    translations = partial.read_text(encoding="utf-8").split("\n")[:-1] if partial.is_file() else []
    num_empty = 0
    with partial.open("a", encoding="utf-8") as file:
        remaining, size = texts[len(translations) :], translator.config.batch
        batches = [remaining[start : start + size] for start in range(0, len(remaining), size)]
        for batch in progress(batches, f"translate to {codes[1]}", len(remaining), "texts", len):
            outputs = translator(batch, *codes)
            num_empty += outputs.count("")
            outputs = [output or text for output, text in zip(outputs, batch, strict=True)]
            file.write("".join(f"{text}\n" for text in outputs))
            file.flush()
            translations += outputs
    empty = f"; {num_empty} came out empty, and stay as they were" if num_empty else ""
    before = f", {len(texts) - len(remaining)} of them from before" if len(remaining) < len(texts) else ""
    log(f"{target}: {len(texts)} texts{before}{empty}")
    rest = iter(translations)
    lines = [_with_texts(record, [next(rest) for _ in _texts(record)]) for record in records]
    write_atomically(target, "".join(f"{line}\n" for line in lines))
    partial.unlink()


def _records(path: Path) -> Iterator[dict[str, Any] | str]:
    """JSON lines as objects, other files as lines."""
    read = stream_jsonl if ".jsonl" in path.suffixes else stream_lines  # or in a .gz, a .zip
    return (record for _, record in read(path))


def _caption_field(record: dict[str, Any]) -> str:
    found = next((name for name in CAPTIONS if name in record), None)
    if found is None:
        raise UserError(f"a record without captions ({' or '.join(CAPTIONS)}): {json.dumps(record)[:80]}")
    return found


def _texts(record: dict[str, Any] | str) -> list[str]:
    captions = record if isinstance(record, str) else record[_caption_field(record)]
    return captions if isinstance(captions, list) else [captions]


def _with_texts(record: dict[str, Any] | str, texts: list[str]) -> str:
    """The line of a record with other captions."""
    if isinstance(record, str):
        return texts[0]
    field = _caption_field(record)
    new = texts if isinstance(record[field], list) else texts[0]
    return json.dumps({**record, field: new}, ensure_ascii=False)


class Translator:
    """A translation model of `transformers`: an encoder and a decoder, with its own tokenizer."""

    def __init__(self, folder: Path, config: TranslateConfig):
        import torch

        from raylib.finite import require_finite_file

        transformers = require("transformers", "transfer")
        if not folder.is_dir():
            raise UserError(
                f"{folder}: no such folder; give a translation model's, as transformers saves it"
                f"{hub_hint(folder)}"
            )
        try:
            self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
            self.model = transformers.AutoModelForSeq2SeqLM.from_pretrained(
                folder, local_files_only=True
            ).eval()
        except (OSError, ValueError, KeyError) as e:
            raise UserError(
                f"{folder}: no translation model can be read there ({' '.join(str(e).split())[:200]})"
            ) from None
        require_finite_file(folder, self.model.state_dict())
        self.model.to("cuda" if torch.cuda.is_available() else "cpu")
        self.config, self.inference_mode = config, torch.inference_mode

    def __call__(self, texts: Sequence[str], source: str, target: str) -> list[str]:
        """The texts in the language `target`, a line each."""
        options, codes = {}, self.config.codes
        if codes:
            missing = [code for code in (source, target) if code not in codes]
            if missing:
                raise UserError(f"""codes= says nothing of '{missing[0]}'; give what the model calls it""")
            self.tokenizer.src_lang = codes[source]
            options["forced_bos_token_id"] = self.tokenizer.convert_tokens_to_ids(codes[target])
        inputs = self.tokenizer(
            list(texts), return_tensors="pt", padding=True, truncation=True, max_length=self.config.length
        )
        inputs = {name: inputs[name].to(self.model.device) for name in ("input_ids", "attention_mask")}
        with self.inference_mode():
            output_ids = self.model.generate(
                **inputs, num_beams=self.config.num_beams, max_new_tokens=self.config.length, **options
            )
        return [
            " ".join(text.split())
            for text in self.tokenizer.batch_decode(output_ids, skip_special_tokens=True)
        ]
