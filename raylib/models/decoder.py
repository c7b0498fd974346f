"""The head that generates an answer token by token (ALBEF, CCLM): a decoder over the states of the grounded
question. It ranks the answers of a list by their probability, and so chooses among classes as a classifier
does.

Its layers start as copies of the unified encoder's, their self-attention causal, their cross-attention to the
question. Its embedding, and its way to the vocabulary, are the backbone's (`embedding`, `masked_head`, the
word embedding), or copies of these, or random ones, trained apart (`decoder.embeddings`).

Shape legend: b questions, C answers (labels), k candidates of a question, T tokens in all, d width, V
vocabulary.
"""

import copy
import logging
from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raylib.errors import UserError
from raylib.models.heads import head_rows, vocabulary_loss
from raylib.models.layers import Memory, TextEmbedding, init_weights
from raylib.models.unified import MaskedLanguageHead, UnifiedModel
from raylib.packed import Ragged, first_tokens, upload
from raylib.settings import DecoderConfig
from raylib.text import Tokenizer

log = logging.getLogger(__name__)


def encode_answers(labels: Sequence[str], tokenizer: Tokenizer) -> list[list[int]]:
    """`<s> ids </s>` of each label. Labels with equal ids are named in a warning: the first of them is always
    preferred."""
    answers = [[tokenizer.cls, *ids.tolist(), tokenizer.sep] for ids in tokenizer.encode(labels)]
    first_label: dict[tuple[int, ...], str] = {}
    for label, ids in zip(labels, answers, strict=True):
        other = first_label.setdefault(tuple(ids), label)
        if other != label:
            log.warning(
                "answers '%s' and '%s' are the same tokens; the second is never predicted", other, label
            )
    return answers


class AnswerDecoder(nn.Module):
    """A causal stack over `answers` (token ids of each label, specials included). `backbone` is passed to
    each call: its parameters are its own."""

    input_ids: Tensor
    target_ids: Tensor

    def __init__(self, backbone: UnifiedModel, answers: Sequence[Sequence[int]], config: DecoderConfig):
        """Raises UserError: a backbone without cross-attention, an answer longer than its positions."""
        super().__init__()
        if not backbone.has_cross_attention:
            raise UserError(
                f"head=decoder: backbone {backbone.kind} has no layers with cross-attention; set "
                "backbone=cclm"
            )
        longest = max(map(len, answers)) - 1
        if longest > backbone.config.positions:
            raise UserError(
                f"head=decoder: an answer has {longest} tokens, the model {backbone.config.positions} "
                "positions"
            )
        self.config = config
        # trained apart from the unified encoder, which goes on reading the question
        self.layers = copy.deepcopy(backbone.fusion)
        self.layers.causal = True
        self.embedding: TextEmbedding | None = None
        self.masked_head: MaskedLanguageHead | None = None
        if config.embeddings != "shared":
            self.embedding = copy.deepcopy(backbone.embedding)
            self.masked_head = copy.deepcopy(backbone.masked_head)
        if config.embeddings == "random":
            for part in (self.embedding, self.masked_head):
                cast(nn.Module, part).apply(_reset)
        self.answers = answers
        # on the CPU, as all lengths (`raylib.packed`)
        self.lengths = torch.tensor([len(ids) - 1 for ids in answers], device="cpu")
        # the tokens that are read, <s> first, and those that are to be predicted, </s> last; the model's
        # config.json keeps them
        for name in ("input_ids", "target_ids"):
            self.register_buffer(
                name, torch.empty(int(self.lengths.sum()), dtype=torch.int64), persistent=False
            )
        self.fill_ids()

    @torch.no_grad()
    def fill_ids(self) -> None:
        """Fill the buffers with the ids of `answers`: no file has them, and `transformers` loads a model into
        empty ones."""
        for buffer, part in ((self.input_ids, slice(None, -1)), (self.target_ids, slice(1, None))):
            ids = [token for ids in self.answers for token in ids[part]]
            buffer.copy_(torch.tensor(ids, dtype=torch.int64, device=buffer.device))

    def loss(self, backbone: UnifiedModel, question: Ragged, scores: Tensor) -> Tensor:
        """-log p of every answer with a score, summed over tokens, answers and questions, each answer
        weighted by its score.

        Args:
            question: states (T, d) of b grounded questions.
            scores: (b, C), 0 where an answer is wrong.
        """
        # to count what is not 0, and to copy it, the host waits for a GPU
        where = scores.nonzero(as_tuple=True)
        rows, answers = torch.stack(where).cpu()
        states = self._states(backbone, question, rows, answers)
        lengths = self.lengths[answers]
        weights = scores[where].repeat_interleave(
            upload(lengths, scores.device), output_size=int(lengths.sum())
        )
        target_ids = Ragged(self.target_ids, self.lengths).select_rows(answers).values
        embedding, head = self._words(backbone)
        return vocabulary_loss(head(states), embedding.word.weight, head.bias, target_ids, weights)[0]

    def rank(self, backbone: UnifiedModel, question: Ragged) -> Tensor:
        """log p of each of the k candidates of each question, at its label; -inf at all others.

        Args:
            question: states (T, d) of b grounded questions.
        Returns:
            (b, C).
        """
        b, answers = len(question.lengths), len(self.lengths)
        first = self._first_token(backbone, question)
        candidates = first.topk(min(self.config.candidates, answers), dim=1).indices  # (b, k)
        k = candidates.shape[1]
        answers_index, rows = candidates.flatten().cpu(), torch.arange(b).repeat_interleave(k)
        states, lengths = self._states(backbone, question, rows, answers_index), self.lengths[answers_index]
        # the first token's is known already
        later = (~first_tokens(lengths)).nonzero().squeeze(1)
        is_later = torch.arange(int(lengths.max()) - 1) < (lengths - 1)[:, None]
        later, is_later = upload((later, is_later), states.device)
        target_ids = Ragged(self.target_ids, self.lengths).select_rows(answers_index).values
        logs = self._log_probabilities(
            backbone, states.index_select(0, later), target_ids.index_select(0, later)
        )
        # into a table with a row for each candidate: sums in an order of their own, on a GPU too
        rest = logs.new_zeros(is_later.shape).masked_scatter(is_later, logs).sum(1).view(b, k)
        whole = first.gather(1, candidates) * (2 if self.config.count_first_twice else 1) + rest
        return first.new_full((b, answers), -torch.inf).scatter(1, candidates, whole)

    def _states(self, backbone: UnifiedModel, question: Ragged, rows: Tensor, answers: Tensor) -> Tensor:
        """States (T, d) of the given tokens of `answers` (n,), each after the question in its place of `rows`
        (n,)."""
        text = Ragged(self.input_ids, self.lengths).select_rows(answers)
        embedding, _ = self._words(backbone)
        return self.layers(text.with_values(embedding(text)), memory=Memory(question, rows))

    def _first_token(self, backbone: UnifiedModel, question: Ragged) -> Tensor:
        """log p of the first token of each answer: (b, C)."""
        b = len(question.lengths)
        start = Ragged(self.input_ids[:1].expand(b), torch.ones(b, dtype=torch.int64))
        embedding, _ = self._words(backbone)
        states = self.layers(start.with_values(embedding(start)), memory=Memory(question, torch.arange(b)))
        tokens = Ragged(self.target_ids, self.lengths).first()
        return torch.cat(
            [
                self._vocabulary(backbone, part).index_select(1, tokens)
                for part in _in_chunks(backbone, states)
            ]
        )

    def _words(self, backbone: UnifiedModel) -> "tuple[TextEmbedding, MaskedLanguageHead]":
        """Return the embedding of answers, and what comes before the product with it."""
        return self.embedding or backbone.embedding, self.masked_head or backbone.masked_head

    def _log_probabilities(self, backbone: UnifiedModel, states: Tensor, target_ids: Tensor) -> Tensor:
        """log p of the token `wanted` (T,) after each state (T, d), for some at a time: (T,)."""
        parts = zip(_in_chunks(backbone, states), _in_chunks(backbone, target_ids), strict=True)
        return torch.cat(
            [self._vocabulary(backbone, part).gather(1, tokens[:, None]).squeeze(1) for part, tokens in parts]
        )

    def _vocabulary(self, backbone: UnifiedModel, states: Tensor) -> Tensor:
        """States (T, d) -> log-probabilities (T, V), in float32 or better."""
        embedding, head = self._words(backbone)
        logits = F.linear(head(states), embedding.word.weight, head.bias)
        return F.log_softmax(logits, -1, dtype=torch.promote_types(logits.dtype, torch.float32))


def _in_chunks(backbone: UnifiedModel, rows: Tensor) -> tuple[Tensor, ...]:
    """Rows (T, ...), in chunks whose logits are held at a time, in float32, twice."""
    return rows.split(head_rows(rows.device, len(backbone.embedding.word.weight), 8))


def _reset(module: nn.Module) -> None:
    """Begin anew: weights as of `init_weights`, layer norms 1 and 0, other biases 0."""
    if isinstance(module, nn.LayerNorm):
        module.reset_parameters()
    elif isinstance(module, MaskedLanguageHead):
        nn.init.zeros_(module.bias)
    init_weights(module)
