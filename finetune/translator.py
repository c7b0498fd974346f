"""Translation models of `transformers`: how each family is told the languages, and how it is run.

| family | source language | target language |
| --- | --- | --- |
| M2M-100 | `src_lang` | `forced_bos_token_id`, the id of `get_lang_id` |
| NLLB-200, mBART-50 | `src_lang` | `forced_bos_token_id`, the id of the code |
| mBART | `src_lang` | `decoder_start_token_id`, the id of the code |
| MADLAD-400 (`<2de>`), Marian of many targets (`>>deu<<`) | - | a token before each text |
| T5 | words before each text, in its config.json (`task_specific_params`) or `prefix=` | |
| other Marian | - | - |
"""

import difflib
import multiprocessing
import os
import re
import signal
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from raylib.errors import MachineError, UserError, hub_hint, reading, require
from raylib.fileio import read_json_object
from raylib.processes import end_with_parent

if TYPE_CHECKING:
    from finetune.translation import TranslateConfig

FOLDER = "a translation model's folder"
TOLD_FAMILIES = ("m2m_100", "nllb-moe", "mbart")  # model types that must be told both languages
# codes of the tasks' languages as three letters, by which NLLB and Marian begin theirs
THREE_LETTERS = {
    code: letters
    for code, letters in re.findall(
        "(..)=(...)",
        "ar=arb bg=bul bn=ben cs=ces da=dan de=deu el=ell en=eng es=spa et=est fr=fra hi=hin id=ind it=ita "
        "ja=jpn jp=jpn ko=kor pl=pol pt=por ru=rus sw=swh ta=tam th=tha tr=tur vi=vie zh=zho",
    )
}
OTHER_NAMES = {"jp": "ja"}  # of languages in data sets: XTD's Japanese
MARKS = (re.compile("<2(.+)>"), re.compile(">>(.+)<<"))  # tokens before a text: MADLAD's, Marian's
CODE = re.compile("[a-z]{2,3}_[A-Z][A-Za-z]+")  # NLLB's and mBART's


class Languages(NamedTuple):
    """The languages that a model knows.

    tokens: {code: token}, of those that have one. ids: {code: its id}.
    told_by: "forced_bos_token_id" or "decoder_start_token_id", where `src_lang` tells the source; "mark",
        a token before each text that tells the target; "words", of `prefixes`; "": none is told.
    prefixes: {(source, target): words before each text}, of T5.
    """

    folder: Path
    told_by: str = ""
    tokens: Mapping[str, str] = {}
    ids: Mapping[str, int] = {}
    prefixes: Mapping[tuple[str, str], str] = {}

    def code(self, language: str, codes: Mapping[str, str]) -> str:
        """Return the model's name of a language: that of `codes`, or the language itself.

        Raises:
            UserError: the model knows none of that name; those most like it are named.
        """
        code = codes.get(language, language)
        if code not in self.tokens and language not in codes:
            code = OTHER_NAMES.get(code, code)
        if code in self.tokens:
            return code
        like = _similar(code, language, list(self.tokens))
        raise UserError(
            f"{self.folder}: this model knows no language '{code}'; give '{language}' in codes= one of its "
            f"{len(self.tokens)}, such as {', '.join(like)}"
        )

    def tokens_of(self, source: str, target: str, config: "TranslateConfig") -> dict[str, str]:
        """Return {language: the token that tells it}, of those that are told by tokens.

        Raises:
            UserError: a language that the model does not know; settings that it cannot be told.
        """
        if self.told_by in ("", "words") and config.codes:
            raise UserError(
                f"{self.folder}: this model is told no language by a token; leave codes= out"
                + (", or give prefix=" if self.told_by else "")
            )
        if self.told_by == "words" and not config.prefix and (source, target) not in self.prefixes:
            pairs = ", ".join(f"{a} to {b}" for a, b in self.prefixes)
            raise UserError(
                f"{self.folder}: its config.json has no words for '{source}' to '{target}', but for {pairs}; "
                "give them as prefix="
            )
        told = {"": (), "words": (), "mark": (target,)}.get(self.told_by, (source, target))
        return {language: self.tokens[self.code(language, config.codes)] for language in told}


def _similar(code: str, language: str, known: list[str]) -> list[str]:
    """The known codes most like a wrong one, or the first few."""
    same = [name for name in (language, OTHER_NAMES.get(language, ""), code[:2]) if name in known]
    beginnings = tuple({code[:3].lower(), THREE_LETTERS.get(language, "-"), f"{language}_"})
    like = [name for name in known if name.lower().startswith(beginnings)]
    near = difflib.get_close_matches(code.lower(), [name.lower() for name in known], 3, 0.5)
    return (
        list(dict.fromkeys([*same, *like, *(name for name in known if name.lower() in near)]))[:4]
        or known[:4]
    )


def load_tokenizer(folder: Path) -> tuple[Any, Languages]:
    """(the tokenizer, the languages that it and the model are told).

    Raises:
        UserError: no such folder, no tokenizer in it, or one that cannot be told a source language.
    """
    transformers = require("transformers", "transfer")
    from raylib.models.hf_folders import library_output_off
    from raylib.text import load_tokenizer_json

    if not folder.is_dir():
        raise UserError(
            f"{folder}: no such folder; give a translation model's, as transformers saves it"
            f"{hub_hint(folder)}"
        )
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder}: no config.json; give a checkpoint folder in Hugging Face format")
    if os.path.lexists(file := folder / "tokenizer.json"):
        load_tokenizer_json(file)  # the library would take regular expressions that never end
    with reading(folder, FOLDER), library_output_off():
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    return tokenizer, _languages(transformers, tokenizer, folder)


def _languages(transformers: Any, tokenizer: Any, folder: Path) -> Languages:
    config = read_json_object(folder / "config.json")
    vocabulary = {token: id for token, id in tokenizer.get_vocab().items() if id != tokenizer.unk_token_id}
    if isinstance(tokenizer, transformers.M2M100Tokenizer):
        # its codes are no tokens: convert_tokens_to_ids makes <unk> of each
        tokens = {code: tokenizer.get_lang_token(code) for code in tokenizer.lang_code_to_id}
        return Languages(folder, "forced_bos_token_id", tokens, tokenizer.lang_code_to_id)
    named = {token: id for token, id in vocabulary.items() if CODE.fullmatch(token)}
    tokens = {token: token for token in named}
    if isinstance(tokenizer, (transformers.NllbTokenizer, transformers.MBart50Tokenizer)):
        return Languages(folder, "forced_bos_token_id", tokens, named)
    if isinstance(tokenizer, transformers.MBartTokenizer):
        return Languages(folder, "decoder_start_token_id", tokens, named)
    if config.get("model_type") in TOLD_FAMILIES:
        raise UserError(
            f"{folder}: a {config['model_type']} model, whose tokenizer is read as {type(tokenizer).__name__}"
            ", which cannot be told a source language; give the folder with its tokenizer_config.json"
        )
    for mark in MARKS:
        if found := {match[1]: token for token in vocabulary if (match := mark.fullmatch(token))}:
            return Languages(
                folder, "mark", found, {code: vocabulary[token] for code, token in found.items()}
            )
    prefixes = {}
    tasks = config.get("task_specific_params")
    for name, task in tasks.items() if isinstance(tasks, dict) else ():
        if match := re.fullmatch("translation_(.+)_to_(.+)", name):
            prefixes[match[1], match[2]] = str(task.get("prefix", "")) if isinstance(task, dict) else ""
    return Languages(folder, "words" if prefixes else "", prefixes=prefixes)


class Translator:
    """A translation model of `transformers`: an encoder and a decoder, with its own tokenizer.

    device: number of its GPU, where there are any.
    """

    def __init__(self, folder: Path, config: "TranslateConfig", device: int = 0):
        import torch

        from raylib.finite import require_finite_file
        from raylib.models.hf_folders import load_by_library
        from raylib.weights import limit_model, require_no_misfits

        transformers = require("transformers", "transfer")
        self.tokenizer, self.languages = load_tokenizer(folder)
        with limit_model(folder / "config.json", folder):
            model, report = load_by_library(
                folder, transformers.AutoConfig, transformers.AutoModelForSeq2SeqLM, FOLDER
            )
        if (folder / "generation_config.json").is_file():
            with reading(folder / "generation_config.json", "JSON: how a model writes"):
                model.generation_config = transformers.GenerationConfig.from_pretrained(
                    folder, local_files_only=True
                )
        # the library would take random numbers
        require_no_misfits(folder, [f"missing {name}" for name in report["missing_keys"]])
        require_finite_file(folder, model.state_dict())
        place = f"cuda:{device}" if torch.cuda.is_available() else "cpu"
        self.model = model.eval().to(place, torch.bfloat16 if config.bf16 else torch.float32)
        self.config, self.inference_mode = config, torch.inference_mode

    def __call__(self, texts: Sequence[str], source: str, target: str) -> list[str]:
        """The texts in the language `target`, a line each."""
        told_by, options = self.languages.told_by, {}
        self.languages.tokens_of(source, target, self.config)
        prefix = self.config.prefix
        forced = None
        if told_by.endswith("_token_id"):
            self.tokenizer.src_lang = self.languages.code(source, self.config.codes)
            forced = options[told_by] = self._target_id(target)
        elif told_by == "mark":
            self._target_id(target)
            # Marian's tokenizer takes off a mark that the text goes on after at once
            prefix = self.languages.tokens[self.languages.code(target, self.config.codes)] + " " + prefix
        elif told_by == "words":
            prefix = prefix or self.languages.prefixes[source, target]
        inputs = self.tokenizer(
            [prefix + text for text in texts],
            return_tensors="pt",
            padding=True,
            truncation=True,
            max_length=self.config.length,
        )
        inputs = {name: inputs[name].to(self.model.device) for name in ("input_ids", "attention_mask")}
        with self.inference_mode():
            output_ids = self.model.generate(
                **inputs, num_beams=self.config.num_beams, max_new_tokens=self.config.length, **options
            )
        # M2M-100's tokenizer does not count tokens of languages among the specials that it leaves out
        rows = [[id for id in row if id != forced] for row in output_ids.tolist()]
        outputs = self.tokenizer.batch_decode(rows, skip_special_tokens=True)
        return [" ".join(text.split()) for text in outputs]

    def _target_id(self, target: str) -> int:
        """Return the id of the token that tells the target language.

        Raises:
            UserError: the model, which may be another's than the tokenizer, has fewer.
        """
        code = self.languages.code(target, self.config.codes)
        token_id, size = self.languages.ids[code], self.model.config.vocab_size
        if token_id >= size:
            raise UserError(
                f"{self.languages.folder}: '{code}' is token {token_id} of the tokenizer, but the model has "
                f"{size}; take both from the same place"
            )
        return token_id


class Devices:
    """A translation model on each of `config.devices` devices, in a process each; of one, in this process.
    It is loaded when the first batch comes."""

    def __init__(self, folder: Path, config: "TranslateConfig"):
        self.folder, self.config = folder, config
        self.translator: Translator | None = None
        self.pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> "Devices":
        return self

    def __exit__(self, *_: Any) -> None:
        if self.pool is not None:
            self.pool.shutdown(cancel_futures=True)

    def translate(
        self, batches: Sequence[list[str]], source: str, target: str
    ) -> Iterator[tuple[list[str], list[str]]]:
        """Yield (texts, translations) of each batch, as they are done.

        Raises:
            MachineError: a process died.
        """
        if self.config.devices == 1:
            self.translator = self.translator or Translator(self.folder, self.config)
            for batch in batches:
                yield batch, self.translator(batch, source, target)
            return
        pool, rest = self._open_pool(), iter(batches)
        waiting: dict[Future, list[str]] = {}
        try:
            while True:
                # a few at a time, so that an end of the command loses no more
                for batch in islice(rest, 2 * (self.config.devices or 1) - len(waiting)):
                    waiting[pool.submit(_translate_here, batch, source, target)] = batch
                if not waiting:
                    return
                for future in wait(waiting, return_when=FIRST_COMPLETED).done:
                    yield waiting.pop(future), future.result()
        except BrokenProcessPool:
            raise MachineError(
                f"{self.folder}: a process that translates has died (memory?); the same command goes on, "
                "with a smaller devices= or batch= in less memory"
            ) from None

    def _open_pool(self) -> ProcessPoolExecutor:
        if self.pool is None:
            # spawned, not forked: CUDA does not work in a forked process
            context, count = multiprocessing.get_context("spawn"), self.config.devices or 1
            numbers = context.SimpleQueue()
            for number in range(count):
                numbers.put(number)
            threads = max(1, (os.cpu_count() or 1) // count)
            arguments = (self.folder, self.config, numbers, threads)
            self.pool = ProcessPoolExecutor(count, context, _load_here, arguments)
        return self.pool


_translators: list[Translator] = []  # the one of this process, of `Devices`


def _load_here(folder: Path, config: "TranslateConfig", numbers: Any, threads: int) -> None:
    import torch

    end_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the command, which ends its processes
    torch.set_num_threads(threads)
    number = numbers.get()
    _translators.append(Translator(folder, config, number % max(1, torch.cuda.device_count())))


def _translate_here(texts: Sequence[str], source: str, target: str) -> list[str]:
    return _translators[0](texts, source, target)
