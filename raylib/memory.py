"""Memory of a pretraining step on a GPU, from settings alone: for plans, and for the advice of an error.

`estimate_memory` sums closed formulas of what PyTorch keeps; tests/test_memory.py holds them against counted
bytes. A step goes through its parts forward, and keeps of each what backward reads, then backward from the
last part to the first: memory is highest where what is kept up to a part, and what computing that part takes
besides (`Part`), come together.

No PyTorch is imported here. Bytes throughout. Shape legend: T tokens in all, R tokens that come out of an
encoder, C tokens of a memory, d width, V vocabulary.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from raylib.settings import Checkpointing, ModelConfig, ObjectiveConfig, Residual, Sharding

GB = 10**9
# Tokens of a text with its specials: captions, translations, sentences, as `benchmarks.step` draws them
MEAN_TOKENS = {"image_text": 13, "parallel": 30, "text": 25}
MASKED = 0.15  # of the tokens between the specials
BUCKET = 25 * 2**20  # gradients on their way (`raylib.engine.BUCKET_MB`)
LOGITS_SHARE = 1 / 20  # of a GPU's memory (`raylib.models.heads.MEMORY_SHARE`)
MIN_LOGIT_ROWS = 256
# CUDA itself and its libraries take about so much, and PyTorch's blocks of memory do not fit without gaps
RESERVED, FRAGMENTS = 1.2 * GB, 0.05


@dataclass(frozen=True)
class StepSize:
    """One worker's part of a batch: rows of each stream, and their tokens; `workers` that share the rest."""

    pairs: int
    caption_tokens: int
    translations: int
    source_tokens: int
    target_tokens: int
    sentences: int
    text_tokens: int
    workers: int = 1

    @classmethod
    def of_rows(
        cls, rows: Mapping[str, int], workers: int, tokens: Mapping[str, float] = MEAN_TOKENS
    ) -> "StepSize":
        """Of a batch of so many `rows` of each stream over all workers, with `tokens` a text in the mean."""
        pairs, translations, sentences = (
            -(-rows.get(name, 0) // workers) for name in ("image_text", "parallel", "text")
        )
        each = {name: round(tokens[name]) for name in MEAN_TOKENS}
        both = translations * each["parallel"]
        return cls(
            *(pairs, pairs * each["image_text"], translations, both, both),
            *(sentences, sentences * each["text"], workers),
        )

    @classmethod
    def of_batch(cls, batch: Mapping[str, Any], workers: int) -> "StepSize":
        """Of a worker's own batch, as its step gets it."""

        def size(stream: str, text: str) -> tuple[int, int]:
            lengths = batch[stream][text].lengths if stream in batch else ()
            return len(lengths), int(sum(lengths))

        (pairs, captions), (translations, source) = size("image_text", "text"), size("parallel", "source")
        target, (sentences, tokens) = size("parallel", "target")[1], size("text", "text")
        return cls(pairs, captions, translations, source, target, sentences, tokens, workers)


@dataclass(frozen=True)
class Part:
    """A part of a step: what it keeps for backward, and what computing it takes besides, for a time."""

    name: str
    kept: float
    working: float


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on one GPU: weights, gradients and optimizer states; the parts of a step in their order."""

    weights: float
    gradients: float
    optimizer: float
    parts: tuple[Part, ...]

    @property
    def kept(self) -> dict[str, float]:
        """Bytes kept for backward, by part."""
        return {part.name: part.kept for part in self.parts}

    @property
    def states(self) -> float:
        """Bytes of the model and its optimizer."""
        return self.weights + self.gradients + self.optimizer

    @property
    def peak(self) -> float:
        """The most bytes at a time."""
        highest = kept = 0.0
        for part in self.parts:
            kept += part.kept
            highest = max(highest, kept + part.working)
        return self.states + highest

    @property
    def needed(self) -> float:
        """Bytes that a GPU must have."""
        return RESERVED + (1 + FRAGMENTS) * self.peak


def count_parameters(c: ModelConfig) -> dict[str, int]:
    """Count the parameters of each part of a model."""
    d, ff = c.width, c.feedforward

    def block(width: int, feedforward: int, cross: bool = False) -> int:
        attention = 4 * width**2 + 4 * width + 2 * width  # with the norm behind it
        return attention * (2 if cross else 1) + 2 * width * feedforward + feedforward + 3 * width

    vd = c.vision_width or d
    if c.swin:
        vision = _swin_parameters(c)
    else:
        side = (c.vision_window or c.image_size) // c.patch
        vision = c.vision_layers * block(vd, ff * vd // d) + 3 * c.patch**2 * vd + vd
        vision += vd + (1 + side**2) * vd + 2 * vd  # CLS, positions, the last norm
        vision += (c.image_size // c.vision_window) ** 2 * vd if c.vision_window else 0
        vision += vd * d + d if vd != d else 0
    return {
        "embedding": c.vocabulary * d + c.positions * d + 2 * d,
        "text": c.text_layers * block(d, ff),
        "vision": vision,
        "fusion": c.fusion_layers * block(d, ff, c.fusion == "cross"),
        "heads": 2 * (d * c.embedding + c.embedding) + d**2 + 3 * d + c.vocabulary + 2 * d + 2 + 1,
    }


def _swin_parameters(c: ModelConfig) -> int:
    """Of a Swin, but for the biases of relative positions, which are few."""
    assert c.swin is not None
    total = 3 * c.patch**2 * c.swin.width
    for stage, layers in enumerate(c.swin.layers):
        width = c.swin.width * 2**stage
        total += layers * (12 * width**2 + 13 * width)
        total += 8 * width**2 if stage < len(c.swin.layers) - 1 else 0
    return total + (c.swin.width * c.swin.merges + 1) * c.width


@dataclass(frozen=True)
class _Formats:
    """Bytes of a number: of activations in linear layers and attention, of the residual stream, of a mask of
    dropout; what is computed again."""

    activation: int
    stream: int
    mask: int
    checkpointing: Checkpointing
    micro_batches: int

    @property
    def is_split(self) -> bool:
        """True if encoders keep no more than what goes in and comes out."""
        return self.checkpointing == "all" or self.micro_batches > 1


@dataclass(frozen=True)
class _Call:
    """A call of an encoder of `layers` blocks: T tokens in, R of them out, C tokens of a memory."""

    f: _Formats
    layers: int
    width: int
    heads: int
    feedforward: int
    tokens: float
    outputs: float
    memory: float = 0.0

    def block(self, outputs: float, share: float = 1.0) -> float:
        """Kept by a block whose queries are `outputs`, for a `share` of the rows."""
        f, d, tokens = self.f, self.width, self.tokens
        # queries, attention's output, the input of two linear layers, the feed-forward's two sides
        query = f.activation * (4 * d + 2 * self.feedforward) + 4 * self.heads
        query += 2 * d * (f.stream + f.mask)  # inputs of the norms, dropout's masks
        if outputs < tokens:
            query += d * f.activation  # the states of those tokens, selected
        if self.memory:
            query += d * (3 * f.activation + f.stream + f.mask) + 4 * self.heads
        keys = 2 * d * f.activation * tokens
        # a memory in another format is cast for each block
        cast = d * f.activation if f.activation != f.stream else 0
        return share * (query * outputs + keys + self.memory * (2 * d * f.activation + cast))

    def part(self, name: str, kept: float = 0.0) -> Part:
        """The call as a part of a step, which keeps `kept` besides."""
        if not self.tokens or not self.layers:
            return Part(name, kept, 0.0)
        f, d, n = self.f, self.width, self.layers
        share = 1 / f.micro_batches
        full = self.block(self.tokens)
        # gradients of states; those inside of a block take the place of what it had kept
        temporary = 2 * d * f.activation * self.tokens * share
        states = d * f.stream
        if f.is_split:
            inputs = (n - 1) * states * self.tokens * share  # of the blocks of a piece
            blocks = full * share + inputs if f.checkpointing != "none" else self._kept(full) * share
            kept += states * (self.tokens + self.memory)
            # gradients of all that comes out, and piece by piece of all that goes in
            return Part(name, kept, blocks + temporary + states * (self.tokens + self.outputs))
        if f.checkpointing == "blocks":
            kept += states * ((n - 1) * self.tokens + self.memory)
            return Part(name, kept, full + temporary)
        return Part(name, kept + self._kept(full) + states * self.memory, temporary)

    def _kept(self, full: float) -> float:
        return (self.layers - 1) * full + self.block(self.outputs)


def estimate_memory(
    model: ModelConfig,
    objective: ObjectiveConfig,
    size: StepSize,
    *,
    sharding: Sharding = "none",
    micro_batches: int = 1,
    bf16: bool = True,
    residual: Residual | None = None,
    gpu: float = 80 * GB,
) -> MemoryEstimate:
    """Estimate the memory of a step on one worker's GPU of `gpu` bytes; `residual`: as of `FitConfig`."""
    f = _Formats(
        activation=2 if bf16 else 4,
        stream=2 if bf16 and residual != "float32" else 4,
        mask=1 if model.dropout else 0,
        checkpointing=model.checkpointing,
        micro_batches=micro_batches,
    )
    parameters = count_parameters(model)
    states = _states(parameters, objective, model, size.workers, sharding)
    return MemoryEstimate(*states, _parts(model, objective, size, f, parameters, gpu))


def _states(
    parameters: Mapping[str, int], o: ObjectiveConfig, c: ModelConfig, workers: int, sharding: Sharding
) -> tuple[float, float, float]:
    """Bytes of weights, of gradients, of the optimizer, in float32."""
    frozen = 0.0 if o.train_vision else parameters["vision"]
    frozen += 0.0 if o.train_image_projection else c.width * c.embedding + c.embedding
    frozen += 0.0 if o.train_embeddings else parameters["embedding"]
    frozen += parameters["text"] * min(1.0, o.frozen_text_layers / max(1, c.text_layers))
    weights = 4.0 * sum(parameters.values())
    trained = weights - 4 * frozen
    if sharding == "none":
        return weights, trained, 2 * trained
    # a share of the gradients and their buckets; a matrix larger than a bucket travels alone, and whole. Of
    # the optimizer a share of the moments, and of the weights that it steps
    whole = 4.0 * c.vocabulary * c.width if o.train_embeddings else 0.0
    return weights, trained / workers + 2 * BUCKET + whole, 3 * trained / workers


def _parts(
    c: ModelConfig, o: ObjectiveConfig, s: StepSize, f: _Formats, parameters: Mapping[str, int], gpu: float
) -> tuple[Part, ...]:
    """The parts of a step in their order."""
    text, d = _text_encoder(o, s), c.width
    sizes: dict[str, Any] = dict(f=f, width=d, heads=c.heads, feedforward=c.feedforward)
    # bf16 copies of the weights, which linear layers keep
    is_copied = f.activation == 2 and f.checkpointing == "none" and not f.is_split
    copies = 2.0 * (sum(parameters.values()) - parameters["embedding"]) if is_copied else 0.0
    states = text[0] * d * f.stream
    embedding = 0.0 if f.is_split else 2 * states + text[0] * d * f.mask
    # The CLS states that are contrasted are a view of all that comes out of the text encoder; but of one in
    # pieces that all tokens come out of, all that is read are copies.
    in_pieces = f.micro_batches > 1
    is_kept = text[1] < text[0] if in_pieces else f.checkpointing != "none"
    outputs = text[1] * d * f.stream if is_kept else 0.0
    parts = [
        Part("weights in bf16", copies, 0.0),
        Part("embedding", embedding, 4.0 * c.vocabulary * d if o.train_embeddings else 0.0),
        _Call(**sizes, layers=c.text_layers, tokens=text[0], outputs=text[1]).part("text", outputs),
        _vision_part(c, o, s, f),
        Part("contrast", _contrast_bytes(o, s), 0.0),
    ]
    for name, (tokens, outputs, memory) in _fusion_calls(c, o, s).items():
        call = _Call(**sizes, layers=c.fusion_layers, tokens=tokens, outputs=outputs, memory=memory)
        # rows are selected, and put together for the call
        parts.append(call.part(f"fusion of {name}", 0.0 if f.is_split else tokens * d * f.stream))
    masked = _masked_tokens(o, s)
    table = c.vocabulary * d * f.activation
    rows = max(MIN_LOGIT_ROWS, gpu * LOGITS_SHARE / (2 * f.activation * c.vocabulary))
    head = masked * d * (2 * f.stream + (0 if f.is_split else 3 * f.activation))
    logits = 2 * f.activation * c.vocabulary * min(masked, rows)
    if masked > rows:  # the gradients of several chunks add up in float32
        logits += 2 * table
        table = 4 * c.vocabulary * d
    # the gradient of the vocabulary takes the place of its copy
    return (*parts, Part("head", head + table, logits))


def _text_encoder(o: ObjectiveConfig, s: StepSize) -> tuple[float, float]:
    """Tokens that go into the text encoder, and those that come out."""
    w = o.weights
    tokens = outputs = float(s.text_tokens if w.xmlm else 0)
    translations: set[str] = {"masked", o.tlm_source} if w.tlm else set()
    both = s.source_tokens + s.target_tokens
    for versions, count, rows, is_contrasted in (
        (_fused_captions(o), s.caption_tokens, s.pairs, w.ucl_image or w.itm),
        (translations, both, 2 * s.translations, w.ucl_translation),
    ):
        for version in ("clean", "masked"):
            is_embedded, is_fused = is_contrasted and o.ucl_text == version, version in versions
            # all are contrasted, by their CLS; every n-th is fused, with all tokens
            tokens += count if is_embedded else count / o.fuse_every if is_fused else 0
            outputs += count / o.fuse_every if is_fused else rows if is_embedded else 0
    return tokens, outputs


def _fused_captions(o: ObjectiveConfig) -> set[str]:
    """Versions of captions that the unified encoder reads beside their image."""
    return ({"masked"} if o.weights.vlm else set()) | ({o.itm_text} if o.weights.itm else set())


def _fusion_calls(c: ModelConfig, o: ObjectiveConfig, s: StepSize) -> dict[str, tuple[float, float, float]]:
    """Calls of the unified encoder: tokens in, tokens out, tokens of the memory."""
    w, every = o.weights, o.fuse_every
    rows = len(_fused_captions(o)) + (2 if w.itm else 0)  # and two wrong pairs of each right one
    captions, pairs, both = (
        s.caption_tokens / every,
        s.pairs / every,
        (s.source_tokens + s.target_tokens) / every,
    )
    read = (MASKED * captions if w.vlm else 0) + (3 * pairs if w.itm else 0)
    # wrong images are mostly other workers'
    images = pairs * (1 + (1 - 1 / s.workers if w.itm else 0)) if rows else 0
    texts = s.text_tokens if w.xmlm else 0
    calls = {
        "captions": (rows * captions, read, images * image_tokens(c), rows * pairs * image_tokens(c)),
        "translations": (both, MASKED * both, both, both) if w.tlm else (0, 0, 0, 0),
        "sentences": (texts, MASKED * texts, 0, 0),
    }
    # entangled, the memory is appended to each row that attends to it
    apart = c.fusion == "cross"
    return {
        name: (tokens + (0 if apart else appended), outputs, memory if apart else 0)
        for name, (tokens, outputs, memory, appended) in calls.items()
    }


def _masked_tokens(o: ObjectiveConfig, s: StepSize) -> float:
    """Masked positions of all streams, which the head predicts."""
    w = o.weights
    tokens = (s.caption_tokens - 2 * s.pairs) / o.fuse_every if w.vlm else 0
    tokens += (s.source_tokens + s.target_tokens - 4 * s.translations) / o.fuse_every if w.tlm else 0
    return MASKED * (tokens + (s.text_tokens - 2 * s.sentences if w.xmlm else 0))


def image_tokens(c: ModelConfig) -> int:
    """Count the states that an image becomes."""
    windows = (c.image_size // c.vision_window) ** 2 if c.vision_window else 0
    patch = c.patch * (c.swin.merges if c.swin else 1)
    return 1 + windows + (c.image_size // patch) ** 2


def _vision_part(c: ModelConfig, o: ObjectiveConfig, s: StepSize, f: _Formats) -> Part:
    if not o.train_vision or not (o.weights.ucl_image or o.weights.itm or o.weights.vlm):
        return Part("vision", 0.0, 0.0)
    if c.swin:
        return _swin_part(c, s, f)
    vd = c.vision_width or c.width
    share = vd / c.width
    windows = (c.image_size // c.vision_window) ** 2 if c.vision_window else 1
    f = replace(f, mask=1 if c.vision_dropout else 0)
    patches = (c.image_size // c.patch) ** 2
    tokens = s.pairs * (patches + windows)
    call = _Call(f, c.vision_layers, vd, round(c.heads * share), round(c.feedforward * share), tokens, tokens)
    # pixels for the embedding of patches, its mask, the input of the last norm
    pixels = s.pairs * patches * 3 * c.patch**2 * f.activation
    ends = pixels + tokens * vd * (2 * f.stream + f.mask)
    if not f.is_split:
        return call.part("vision", ends)
    # what goes in are pixels, which the batch has in any case
    return Part("vision", 0.0, call.part("vision").working + ends / f.micro_batches)


def _swin_part(c: ModelConfig, s: StepSize, f: _Formats) -> Part:
    """Swin from `transformers`, a call for each of its stages."""
    assert c.swin is not None
    kept = working = 0.0
    for stage, layers in enumerate(c.swin.layers):
        width, tokens = c.swin.width * 2**stage, s.pairs * (c.image_size // (c.patch * 2**stage)) ** 2
        part = _Call(f, layers, width, c.swin.heads[stage], 4 * width, tokens, tokens).part("vision")
        kept, working = kept + part.kept, max(working, part.working)
    return Part("vision", kept, working)


def _contrast_bytes(o: ObjectiveConfig, s: StepSize) -> float:
    """Logits of both directions, and what is made of them."""
    w, rows = o.weights, 0.0
    rows += s.pairs**2 if w.ucl_image or w.itm else 0
    rows += s.translations**2 if w.ucl_translation else 0
    return 24.0 * s.workers * rows


def next_settings(name: str, checkpointing: Checkpointing, micro_batches: int) -> str:
    """Settings that take less memory and change no result; `name`: of the stage's checkpointing."""
    first = [f"{name}=blocks"] if checkpointing == "none" else []
    return " or ".join([*first, f"fit.micro_batches={2 * micro_batches}"])


def find_settings(
    model: ModelConfig,
    objective: ObjectiveConfig,
    size: StepSize,
    gpu: float,
    **settings: Any,
) -> list[tuple[Checkpointing, int, MemoryEstimate]]:
    """Return (`model.checkpointing`, `fit.micro_batches`, estimate) with which a step needs no more than
    `gpu` bytes: those that cost the fewest forward passes, first without any change of a bit; none if nothing
    does. `settings`: of `estimate_memory`."""
    pieces = [2**i for i in range(1, 8) if 2**i <= max(size.pairs, size.translations, size.sentences)]
    none: list[tuple[Checkpointing, int]] = [("none", 1)]
    once: list[tuple[Checkpointing, int]] = [("blocks", 1), *(("none", n) for n in pieces)]
    twice: list[tuple[Checkpointing, int]] = [("blocks", n) for n in pieces]
    found: dict[str, tuple[Checkpointing, int, MemoryEstimate]] = {}
    for options in (none, once, twice):
        for checkpointing, micro_batches in options:
            changed = model.model_copy(update={"checkpointing": checkpointing})
            estimate = estimate_memory(
                changed, objective, size, gpu=gpu, micro_batches=micro_batches, **settings
            )
            if estimate.needed <= gpu:
                found.setdefault(checkpointing, (checkpointing, micro_batches, estimate))
        if found:
            break
    return list(found.values())
