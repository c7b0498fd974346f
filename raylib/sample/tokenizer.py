"""The sample's tokenizer: a SentencePiece unigram model of the text that training sees."""

import io
from pathlib import Path

import sentencepiece

from raylib.sample.concepts import LANGUAGES, training_sentences

PIECES = 12_000


def train_tokenizer(path: Path, pieces: int = PIECES) -> None:
    """Train on the sentences of all languages and write the model file. One thread: the same bytes every
    time."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(sentence for language in LANGUAGES for sentence in training_sentences(language)),
        model_writer=model,
        model_type="unigram",
        vocab_size=pieces,
        character_coverage=0.9998,
        normalization_rule_name="nmt_nfkc",
        bos_id=0,
        pad_id=1,
        eos_id=2,
        unk_id=3,
        control_symbols=["<mask>"],
        num_threads=1,
        minloglevel=1,
    )
    path.write_bytes(model.getvalue())
