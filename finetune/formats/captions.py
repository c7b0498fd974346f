"""Pictures with captions."""

from collections.abc import Iterator
from pathlib import Path

from finetune.examples import Captioned
from finetune.formats.stream import field, read_jsonl
from raylib.errors import UserError


def read_flickr(path: Path) -> Iterator[Captioned]:
    """JSON lines {sentences, id, img_path}: Flickr30K and xFlickrCO as IGLUE has them."""
    for where, record in read_jsonl(path):
        sentences = field(record, "sentences", list, where)
        if not sentences or not all(isinstance(s, str) and s.strip() for s in sentences):
            raise UserError(f"{where}: field 'sentences' must hold captions, and no empty one")
        yield Captioned(field(record, "img_path", str, where), tuple(sentences))


def read_wit(path: Path) -> Iterator[Captioned]:
    """JSON lines {wit_ix, caption_reference_description}: WIT as IGLUE has it; pictures are called by their wit_ix."""
    for where, record in read_jsonl(path):
        caption = field(record, "caption_reference_description", str, where)
        yield Captioned(str(field(record, "wit_ix", (str, int), where)), (caption,))
