"""Captions translated in advance by a translation model's folder (paper 4, section 4), for alignment and
translate-test.

    python -m finetune translate TASK MODEL data=FOLDER languages='["de"]' [split=shots shots=50
                                  direction=to_en ...]

Whole files are translated, line by line, and written where the task's records look for them: `*_to_en`,
`*_from_en`, and of a test `translated`. What is done so far lies in FILE.partial, and is not done again.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, PositiveInt

from finetune.build import load_task
from finetune.formats import stream_jsonl, stream_lines
from raylib.config import Config
from raylib.errors import UserError, require
from raylib.fileio import write_atomically
from raylib.finite import require_finite_file

CAPTIONS = ("sentences", "caption_reference_description")  # fields of JSON lines that hold them


class TranslateConfig(Config):
    """Settings of a translation: of the `split` of these `languages`, into English or from it.

    codes: what the model calls a language, where it wants to be told (NLLB, mBART, M2M-100): {"de":
    "deu_Latn", ...}.
    """

    data: str = ""
    languages: tuple[str, ...] = ()
    split: Literal["train", "shots", "test"] = "train"
    shots: int | str = 5
    direction: Literal["to_en", "from_en"] = "to_en"
    codes: Mapping[str, str] = Field(default_factory=dict)
    batch: PositiveInt = 32
    num_beams: PositiveInt = 4
    length: PositiveInt = 128


def translate(
    task_name: str, model: Path, config: TranslateConfig, log: Callable[[str], None] = print
) -> list[Path]:
    """Make the files; returns them. One that is there is left as it is.

    Raises:
        UserError: no such task, data or model; the task has no place for such translations.
    """
    task = load_task(task_name)
    if not config.data:
        raise UserError("data= is missing: give the folder of the task's annotations")
    if not config.languages:
        raise UserError("""languages= is missing: give those to translate, such as languages='["de","ru"]'""")
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
        while len(translations) < len(texts):
            batch = texts[len(translations) : len(translations) + translator.config.batch]
            outputs = translator(batch, *codes)
            num_empty += outputs.count("")
            outputs = [output or text for output, text in zip(outputs, batch, strict=True)]
            file.write("".join(f"{text}\n" for text in outputs))
            file.flush()
            translations += outputs
            empty = f"; {num_empty} came out empty, and stay as they were" if num_empty else ""
            log(f"{target}: {len(translations)} of {len(texts)}{empty}")
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
        transformers = require("transformers", "transfer")
        if not folder.is_dir():
            raise UserError(f"{folder}: no such folder; give a translation model's, as transformers saves it")
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
        self.config = config

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
        with torch.inference_mode():
            output_ids = self.model.generate(
                **inputs, num_beams=self.config.num_beams, max_new_tokens=self.config.length, **options
            )
        return [
            " ".join(text.split())
            for text in self.tokenizer.batch_decode(output_ids, skip_special_tokens=True)
        ]
