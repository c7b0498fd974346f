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
from finetune.translator import Devices, load_tokenizer
from raylib.config import Config, differing_paths
from raylib.display import progress
from raylib.errors import UserError
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
from raylib.randomness import permutation
from raylib.textfile import open_bytes, open_text

if TYPE_CHECKING:
    from finetune.tasks.base import Task

# fields of JSON lines that hold texts: captions; the statements of XVNLI, of MaRVL, of NLVR2
CAPTIONS = ("sentences", "caption_reference_description", "sentence2", "caption", "sentence")


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
    split: Literal["train", "dev", "shots", "test"] = "train"
    """Texts to translate; dev: the language's own development set, where the task has one."""
    shots: int | str = 5
    """Number of shots, of split=shots."""
    direction: Literal["to_en", "from_en"] = "to_en"
    """Into English, or from it."""
    codes: Mapping[str, str] = Field(default_factory=dict)
    """The model's names of languages, where it is told them (NLLB, mBART, M2M-100, MADLAD, Marian of many
    languages) and calls them otherwise: {"de": "deu_Latn", "en": "eng_Latn"}."""
    prefix: str = ""
    """Words before each text, of a T5: "translate German to English: "."""
    batch: PositiveInt = 32
    """Texts at a time."""
    num_beams: PositiveInt = 4
    """Beams of the search for a translation."""
    length: PositiveInt = 128
    """Longest text and translation, in the model's tokens."""
    bf16: bool | None = None
    """Compute in bfloat16; null: on a GPU that has it."""
    devices: PositiveInt | None = None
    """Processes that translate, one a GPU; null: all GPUs, or one process on a CPU."""


def translate(
    task: "Task", model: Path, config: TranslateConfig, log: Callable[[str], None] = print
) -> list[Path]:
    """Make the files; returns them. One that is there is left as it is.

    Raises:
        UserError: no such data or model; the task has no place for such translations; a language that the
            model does not know; a file, or a part of one, was made by another model, or with other settings.
    """
    if not config.data:
        raise UserError("data= is missing: give the folder of the task's annotations")
    if not config.languages:
        raise UserError("languages= is missing: give those to translate, such as languages=de,ru")
    if "en" in config.languages:
        raise UserError(
            f"languages=en: direction={config.direction} leads to or from English; give the other languages"
        )
    files = [_source_and_target(task, config, language) for language in config.languages]
    _, known = load_tokenizer(model)
    pairs = [(code, "en") if config.direction == "to_en" else ("en", code) for code in config.languages]
    tokens = [known.tokens_of(*pair, config) for pair in pairs]
    config, digest = _with_devices(config), hash_model(model)
    with Devices(model, config) as devices:
        for pair, told, (source, target, only_first) in zip(pairs, tokens, files, strict=True):
            output = Output(source, target, digest, pair, told, config)
            if target.is_file():
                output.require_same()
                log(f"{target}: there already")
                continue
            _translate_file(devices, output, only_first, log)
    return [target for _, target, _ in files]


def _source_and_target(task: "Task", config: TranslateConfig, language: str) -> tuple[Path, Path, bool]:
    """(file to translate, file to write, whether the first caption of an image alone is in the language).

    Raises:
        UserError: the task has no such splits, or the first file is missing.
    """
    to_english = config.direction == "to_en"
    name: str = config.split
    spoken, folder = language if to_english else "en", Path(config.data)
    if name == "dev" and spoken != "en" and task.source("dev", spoken) == task.source("dev", "en"):
        name = "target_dev"  # the one called "dev" is English
    target_split = "translated" if name == "test" and to_english else f"{name}_{config.direction}"
    target = task.path(folder, target_split, language, config.shots)
    source = task.path(folder, name, spoken, config.shots)
    if not source.is_file():
        raise UserError(f"{source}: no such file ({name} in '{spoken}'); check data=, languages=, shots=")
    places = task.split(name, spoken).places(spoken, config.shots)
    split = next(split for place, split in places if folder / place == source)
    return source, target, split.options.get("sentences") == "first"


def _with_devices(config: TranslateConfig) -> TranslateConfig:
    """`config` with what this machine has: the number of devices, and whether they compute in bfloat16."""
    import torch

    from raylib.runtime import has_bf16

    num_gpus, device = torch.cuda.device_count(), torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if num_gpus and config.devices and config.devices > num_gpus:
        raise UserError(f"devices={config.devices}, but this machine has {num_gpus} GPUs")
    is_fast = device.type == "cuda" and has_bf16(device)
    bf16 = is_fast if config.bf16 is None else config.bf16
    return config.model_copy(update={"devices": config.devices or num_gpus or 1, "bf16": bf16})


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
        self,
        source: Path,
        target: Path,
        digest: str,
        languages: tuple[str, str],
        tokens: Mapping[str, str],
        config: TranslateConfig,
    ):
        self.source, self.target, self.languages = source, target, languages
        self.partial = target.with_name(f"{target.name}.partial")
        self.note = target.with_name(f".{target.name}.run.json")
        settings = {"num_beams": config.num_beams, "length": config.length, "codes": dict(tokens)}
        # settings that came later: a file from before has none of them, and what it has is what they leave
        later = {"prefix": config.prefix, "bf16": config.bf16}
        settings |= {name: value for name, value in later.items() if value}
        self.identity = {"model": digest, **settings, "languages": list(languages)}

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


def _translate_file(devices: Devices, output: Output, only_first: bool, log: Callable[[str], None]) -> None:
    records = [_first_text(record) if only_first else record for record in _records(output.source)]
    texts = [text for record in records for text in _texts(record)]
    lock = output.target.with_name(f".{output.target.name}.lock")
    with file_lock(lock, wait=False) as is_free:
        if not is_free:
            raise UserError(f"{output.target}: another process is writing it; wait for its end")
        _translate_texts(devices, output, records, texts, log)
        lock.unlink()


def _translate_texts(
    devices: Devices,
    output: Output,
    records: Sequence[Any],
    texts: Sequence[str],
    log: Callable[[str], None],
) -> None:
    known = output.read_partial(log)
    batches, num_before = cut_batches(texts, devices.config.batch), sum(text in known for text in texts)
    missing = [batch for batch in batches if not all(text in known for text in batch)]
    done = devices.translate(missing, *output.languages)
    total = sum(map(len, missing))
    shown = progress(done, f"translate to {output.languages[1]}", total, "texts", lambda pair: len(pair[0]))
    for batch, outputs in shown:
        append_jsonl(output.partial, {"texts": batch, "translations": outputs}, durable=True)
        known |= zip(batch, outputs, strict=True)
    num_empty = sum(bool(text.strip()) and not known[text] for text in texts)
    empty = f"; {num_empty} came out empty, and are stored as empty" if num_empty else ""
    before = f", {num_before} of them from before" if num_before else ""
    log(f"{output.target}: {len(texts)} texts{before}{empty}")
    translations = iter([known.get(text, "") for text in texts])
    output.finish(_with_texts(record, [next(translations) for _ in _texts(record)]) for record in records)


def cut_batches(texts: Sequence[str], size: int) -> list[list[str]]:
    """Batches of the different texts that are not blank, each of texts about equally long, so that little is
    padded: the longest first, whose memory is the most, then the others in a fixed random order, so that the
    time of those that are done tells that of those that remain.

    They are cut from all texts, not from those that an interruption left: each is padded as it would have
    been without it.
    """
    unique = sorted({text for text in texts if text.strip()}, key=lambda text: (-len(text), text))
    batches = [unique[start : start + size] for start in range(0, len(unique), size)]
    return batches[:1] + [batches[1 + i] for i in permutation(len(batches[1:]), "translate")]


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
    if ".json" in path.suffixes:
        raise UserError(
            f"{path}: one JSON value; wanted plain lines, or JSON lines with {' or '.join(CAPTIONS)}"
        )
    with open_text(path, has_lines=True) as file:
        for line in file:
            yield line.rstrip("\r\n")


def _first_text(record: dict[str, Any] | str) -> dict[str, Any] | str:
    """The record with the first of its captions."""
    if isinstance(record, str):
        return record
    return {**record, _caption_field(record): _texts(record)[:1]}


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
