"""Language codes: which words are one, and which the name of a shard begins with.

A code is a language of two or three letters, perhaps with a script, a region or a variant: "de", "zh-Hans",
"pt-BR", "bn_rom". Whoever names a language may name any such code. Guessing is another matter:
"cc3m-train-0000.tar" or "wit-000.tar" (Wintu, by ISO 639-3) name data sets, so a name is believed only if it
begins with one of `KNOWN`.
"""

import re

CODE = re.compile(r"[a-z]{2,3}(?:[-_][A-Za-z0-9]{2,8})*")
# ISO 639-1; of the three-letter codes, those of large corpora that are no common word or data set: "mul" is
# many languages
CODES = (
    "aa ab ae af ak am an ar as av ay az ba be bg bh bi bm bn bo br bs ca ce ch co cr cs cu cv cy da de "
    "dv dz ee el en eo es et eu fa ff fi fj fo fr fy ga gd gl gn gu gv ha he hi ho hr ht hu hy hz ia id "
    "ie ig ii ik io is it iu ja jv ka kg ki kj kk kl km kn ko kr ks ku kv kw ky la lb lg li ln lo lt lu "
    "lv mg mh mi mk ml mn mr ms mt my na nb nd ne ng nl nn no nr nv ny oc oj om or os pa pi pl ps pt qu "
    "rm rn ro ru rw sa sc sd se sg si sk sl sm sn so sq sr ss st su sv sw ta te tg th ti tk tl tn to tr "
    "ts tt tw ty ug uk ur uz ve vi vo wa wo xh yi yo za zh zu arz ast ceb ckb fil nds nso yue mul"
)
KNOWN = frozenset(CODES.split())
# ShardWriter's own names, "zh-Hans-000017.tar"
NUMBERED = re.compile(r"([a-z]{2,3}(?:-[A-Z][a-z]{3})?(?:-[A-Z]{2})?(?:_[a-z]{3})?)-\d+\.tar")


def is_language_code(word: str) -> bool:
    """True for what may be a language's code, "en" or "zh-Hans"; not for "00000", "cc3m", "train",
    "English"."""
    return CODE.fullmatch(word) is not None


def language_of(name: str, loose: bool) -> str | None:
    """The language that the name of a shard says: that of LANGUAGE-NUMBER.tar; if `loose`, also what stands
    before the first "-" of any other name, or the whole name. None if that is no known code."""
    if (numbered := NUMBERED.fullmatch(name)) and re.split("[-_]", numbered[1])[0] in KNOWN:
        return numbered[1]
    first = name.removesuffix(".tar").split("-")[0]
    return first if loose and first in KNOWN else None
