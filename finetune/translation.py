"""Translations made in advance, by a translation model's folder (paper 4, section 4): `finetune
translate`."""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NotRequired

from pydantic import Field, PositiveInt
from typing_extensions import TypedDict

from finetune.formats import get_field, shorten, stream_jsonl
from raylib.config import Config, differing_paths
from raylib.display import progress
from raylib.errors import UserError, hub_hint, reading, require
from raylib.fileio import (
    append_jsonl,
    file_lock,
    read_json_object,
    read_jsonl,
    repair_jsonl,
    sha256_file,
    write_atomically,
    write_json,
)
from raylib.textfile import open_bytes, open_text

if TYPE_CHECKING:
    from finetune.tasks.base import Task

CAPTIONS = ("sentences", "caption_reference_description")  # fields of JSON lines that hold them


class TranslateConfig(Config):
    """Captions translated in advance by a translation model's folder (paper 4, section 4), for alignment and
    translate-test.

    Whole files are translated, line by line, and written where the task's records look for them: `*_to_en`,
    `*_from_en`, and of a test `translated`. What is done so far lies in FILE.partial, by its text, and is not
    done again; .FILE.run.json says by which model and settings a file was made.
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
        UserError: no such data or model; the task has no place for such translations; a file, or a part of
            one, was made by another model, or with other settings.
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
    digest = hash_model(model) if model.is_dir() else ""
    for language, (source, target) in zip(config.languages, files, strict=True):
        codes = (language, "en") if to_english else ("en", language)
        output = Output(source, target, digest, codes, config)
        if target.is_file():
            output.require_same()
            log(f"{target}: there already")
            continue
        translator = translator or Translator(model, config)
        _translate_file(translator, output, log)
    return [target for _, target in files]


def _name(paths: Sequence[str]) -> str:
    """Settings as an error's line has them, whatever a damaged file calls them."""
    return ascii(", ".join(paths))[1:-1][:100]


class Batch(TypedDict):
    """A line of what is done; the first has the "identity" of what made it."""

    texts: list[str]
    translations: list[str]
    identity: NotRequired[dict[str, Any]]


class Output:
    """A file of translations that is made, what it is made of, and what is done of it so far.

    FILE.partial holds JSON lines {"texts", "translations"}, a batch each, after a first one with the
    "identity" of what made them: model, settings, languages. A translation is found by its text, never by its
    place. .FILE.run.json is the identity of the whole file, its source among it.
    """

    def __init__(
        self, source: Path, target: Path, digest: str, codes: tuple[str, str], config: TranslateConfig
    ):
        self.source, self.target, self.codes = source, target, codes
        self.partial = target.with_name(f"{target.name}.partial")
        self.note = target.with_name(f".{target.name}.run.json")
        names = {code: config.codes[code] for code in codes if code in config.codes}
        settings = {"num_beams": config.num_beams, "length": config.length, "codes": names}
        self.identity = {"model": digest, **settings, "languages": list(codes)}

    def require_same(self) -> None:
        """Check that the file, which is there, is what this command would make of its source, where the note
        beside it says.

        Raises:
            UserError: it is not; says in what.
        """
        if os.path.lexists(self.note):
            now = {**self.identity, "source": sha256_file(self.source)}
            if changed := differing_paths(read_json_object(self.note), now):
                raise UserError(
                    f"{self.target} was made with another {_name(changed)}; remove it to translate anew"
                )

    def read_partial(self, log: Callable[[str], None]) -> dict[str, str]:
        """Return {text: translation} of what is done.

        Raises:
            UserError: it was done by another model, with other settings, or by a version that did not say.
        """
        self.target.parent.mkdir(parents=True, exist_ok=True)
        if self.partial.exists():
            with open_bytes(self.partial) as (file, _):
                first = next((line for line in file if line.strip(b"\0 \r\n")), b"{")
        else:
            first = b"{"
        if not first.lstrip(b"\0 ").startswith(b"{"):
            raise UserError(
                f"{self.partial} was begun by an earlier version, which does not say by which model; remove "
                "it to translate anew"
            )
        for note in repair_jsonl(self.partial, "texts"):
            log(note)
        records = read_jsonl(self.partial, Batch)
        for number, record in enumerate(records, 1):
            if len(record["texts"]) != len(record["translations"]):
                raise UserError(
                    f"{self.partial}:{number}: as many translations as texts are needed; remove it"
                )
        if not records:
            append_jsonl(self.partial, {"texts": [], "translations": [], "identity": self.identity})
        elif changed := differing_paths(records[0].get("identity", {}), self.identity):
            raise UserError(
                f"{self.partial} was begun with another {_name(changed)}; give the same, or remove it to "
                "translate anew"
            )
        pairs = (zip(r["texts"], r["translations"], strict=True) for r in records)
        return dict(pair for batch in pairs for pair in batch)

    def finish(self, lines: Iterable[str]) -> None:
        """Write the whole file."""
        # the note first: a crash between the two leaves a note of no file, never a file without one
        write_json(self.note, {**self.identity, "source": sha256_file(self.source)})
        write_atomically(self.target, "".join(f"{line}\n" for line in lines))
        self.partial.unlink()


def _translate_file(translator: "Translator", output: Output, log: Callable[[str], None]) -> None:
    records = list(_records(output.source))
    texts = [text for record in records for text in _texts(record)]
    lock = output.target.with_name(f".{output.target.name}.lock")
    with file_lock(lock, wait=False) as is_free:
        if not is_free:
            raise UserError(f"{output.target}: another process is writing it; wait for its end")
        _translate_texts(translator, output, records, texts, log)
        lock.unlink()


def _translate_texts(
    translator: "Translator",
    output: Output,
    records: Sequence[Any],
    texts: Sequence[str],
    log: Callable[[str], None],
) -> None:
    known = output.read_partial(log)
    # An equal text has an equal translation. Batches are cut from all texts, not from those that remain: each
    # is then padded as it would have been without the interruption.
    unique = [text for text in dict.fromkeys(texts) if text.strip()]
    size, num_before = translator.config.batch, sum(text in known for text in texts)
    batches = [unique[start : start + size] for start in range(0, len(unique), size)]
    missing = [batch for batch in batches if not all(text in known for text in batch)]
    for batch in progress(missing, f"translate to {output.codes[1]}", sum(map(len, missing)), "texts", len):
        outputs = translator(batch, *output.codes)
        append_jsonl(output.partial, {"texts": batch, "translations": outputs}, durable=True)
        known |= zip(batch, outputs, strict=True)
    num_empty = sum(bool(text.strip()) and not known[text] for text in texts)
    empty = f"; {num_empty} came out empty, and stay as they were" if num_empty else ""
    before = f", {num_before} of them from before" if num_before else ""
    log(f"{output.target}: {len(texts)} texts{before}{empty}")
    # a text that stays may have line breaks in it, which a plain file would take for the end of its line
    translations = iter([known.get(text) or " ".join(text.split()) for text in texts])
    output.finish(_with_texts(record, [next(translations) for _ in _texts(record)]) for record in records)


def hash_model(folder: Path) -> str:
    """Return a hash over the files of a model's folder."""
    files = [p for p in sorted(folder.iterdir()) if p.is_file() and p.suffix != ".md" and p.name[0] != "."]
    return hashlib.sha256("".join(f"{p.name} {sha256_file(p)}\n" for p in files).encode()).hexdigest()


def _records(path: Path) -> Iterator[dict[str, Any] | str]:
    """JSON lines as objects, other files as lines, also those that are empty: line i is about image i."""
    if ".jsonl" in path.suffixes:  # or in a .gz, a .zip
        for where, record in stream_jsonl(path):
            field = next((name for name in CAPTIONS if name in record), None)
            if field is None:
                raise UserError(f"{where}: no captions ({' or '.join(CAPTIONS)}): {shorten(record)}")
            captions = get_field(record, field, (str, list), where)
            if any(type(caption) is not str for caption in captions):
                raise UserError(f"{where}: field '{field}' is {shorten(captions)}; wanted captions")
            yield record
        return
    with open_text(path, has_lines=True) as file:
        for line in file:
            yield line.rstrip("\r\n")


def _caption_field(record: dict[str, Any]) -> str:
    return next(name for name in CAPTIONS if name in record)


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
        from raylib.models.hf_folders import library_output_off, load_by_library
        from raylib.weights import limit_model, require_no_misfits

        transformers = require("transformers", "transfer")
        if not folder.is_dir():
            raise UserError(
                f"{folder}: no such folder; give a translation model's, as transformers saves it"
                f"{hub_hint(folder)}"
            )
        with limit_model(folder / "config.json", folder):
            model, report = load_by_library(
                folder,
                transformers.AutoConfig,
                transformers.AutoModelForSeq2SeqLM,
                "a translation model's folder",
            )
        with reading(folder, "a translation model's folder"), library_output_off():
            self.tokenizer = transformers.AutoTokenizer.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False
            )
        if (folder / "generation_config.json").is_file():
            with reading(folder / "generation_config.json", "JSON: how a model writes"):
                model.generation_config = transformers.GenerationConfig.from_pretrained(
                    folder, local_files_only=True
                )
        # the library would take random numbers
        require_no_misfits(folder, [f"missing {name}" for name in report["missing_keys"]])
        self.model = model.eval()
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
