"""Small random models and batches."""

import contextlib
import json
import os
import socket
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import torch
import transformers

from raylib.data.index import json_path
from raylib.distributed import worker_rows
from raylib.models.unified import ModelConfig, UnifiedModel
from raylib.packed import Sentences

SMALL = ModelConfig(
    vocabulary=60,
    width=16,
    heads=2,
    feedforward=24,
    text_layers=2,
    fusion_layers=2,
    vision_layers=2,
    image_size=16,
    patch=8,
    positions=16,
    embedding=8,
    dropout=0.0,
)


def make_model(seed: int = 0, dtype=torch.float64, **changes) -> UnifiedModel:
    """A small model whose weights are large enough that no term is near its value at initialisation."""
    torch.manual_seed(seed)
    model = UnifiedModel(SMALL.model_copy(update=changes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * (0.15 if parameter.numel() > 1 else 0.0))
    return model.to(dtype)


def xlmr_config(**sizes: Any) -> transformers.XLMRobertaConfig:
    """Sizes of a small XLM-R in `transformers`; `sizes` in place of these."""
    small = dict(
        vocab_size=90,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=1,
        intermediate_size=96,
        max_position_embeddings=34,
        type_vocab_size=1,
        layer_norm_eps=1e-5,
    )
    return transformers.XLMRobertaConfig(**{**small, **sizes})


CLIP_VISION = dict(
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=2,
    patch_size=8,
    image_size=16,
)


def make_clip(vocabulary: int = 40) -> transformers.CLIPModel:
    """A small CLIP of `transformers`, whose vectors have 24 numbers."""
    text = dict(
        vocab_size=vocabulary,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    config = transformers.CLIPConfig(text_config=text, vision_config=CLIP_VISION, projection_dim=24)
    return transformers.CLIPModel(config).eval()


def write_mclip(
    folder: Path, text: transformers.PreTrainedModel, mapped: torch.nn.Linear, **described
) -> None:
    """Write a text encoder and its map to CLIP's space as Multilingual-CLIP is published, with the encoder's
    own config.json beside it, unless `described` names one by `modelBase`."""
    folder.mkdir()
    weights = {f"transformer.{k}": v for k, v in text.state_dict().items()}
    weights |= {f"LinearTransformation.{k}": v.detach() for k, v in mapped.state_dict().items()}
    torch.save(weights, folder / "pytorch_model.bin")
    (folder / "config.json").write_text(json.dumps({"model_type": "M-CLIP", **described}))
    if "modelBase" not in described:
        (folder / "base_config.json").write_text(text.config.to_json_string())


def make_sentences(lengths, generator, share: float = 0.3) -> Sentences:
    """Random sentences of these lengths, specials included, with about `share` of the inner tokens masked."""
    lengths = torch.as_tensor(lengths)
    tokens = int(lengths.sum())
    ids = torch.randint(5, SMALL.vocabulary, (tokens,), generator=generator)
    ends = lengths.cumsum(0)
    ids[ends - lengths], ids[ends - 1] = 0, 2
    special = torch.zeros(tokens, dtype=torch.bool)
    special[ends - lengths] = special[ends - 1] = True
    chosen = (torch.rand(tokens, generator=generator) < share) & ~special
    masked = torch.where(chosen, 4, ids)
    text_id = torch.tensor([hash(tuple(row.tolist())) for row in ids.split(lengths.tolist())])
    return Sentences(ids, masked, lengths, chosen.nonzero().squeeze(1), ids[chosen], text_id)


def make_batch(seed: int = 0, pairs: int = 5, translations: int = 7, mono: int = 3) -> dict:
    """A global batch of odd sizes and unequal lengths."""
    g = torch.Generator().manual_seed(seed)

    def lengths(n):
        return torch.randint(3, 12, (n,), generator=g)

    return {
        "step": 0,
        "image_text": {
            "size": pairs,
            "index": torch.arange(pairs),
            "images": torch.randint(0, 256, (pairs, 16, 16, 3), dtype=torch.uint8, generator=g),
            "image_id": torch.arange(pairs) + 100,
            "text": make_sentences(lengths(pairs), g),
            "negative_uniforms": torch.rand(pairs, 2, generator=g),
        },
        "parallel": {
            "size": translations,
            "index": torch.arange(translations),
            "source": make_sentences(lengths(translations), g),
            "target": make_sentences(lengths(translations), g),
        },
        "text": {"size": mono, "index": torch.arange(mono), "text": make_sentences(lengths(mono), g)},
    }


def take_sentences(sentences: Sentences, rows) -> Sentences:
    """Some rows of a stream's sentences."""
    pieces, start = [], 0
    labels = dict(zip(sentences.positions.tolist(), sentences.labels.tolist(), strict=True))
    for n in sentences.lengths.tolist():
        masked = [(p - start, labels[p]) for p in sentences.positions.tolist() if start <= p < start + n]
        pieces.append((sentences.clean[start : start + n], sentences.masked[start : start + n], masked))
        start += n
    chosen, positions, expected, offset = [pieces[i] for i in rows], [], [], 0
    for clean, _, masked in chosen:
        positions += [offset + p for p, _ in masked]
        expected += [label for _, label in masked]
        offset += len(clean)
    return Sentences(
        torch.cat([c for c, _, _ in chosen]),
        torch.cat([m for _, m, _ in chosen]),
        sentences.lengths[list(rows)],
        torch.tensor(positions, dtype=torch.int64),
        torch.tensor(expected, dtype=torch.int64),
        sentences.text_id[list(rows)],
    )


def take_rows(batch: dict, rank: int, world: int) -> dict:
    """Worker `rank`'s part of a global batch."""

    def take(value):
        if isinstance(value, int):
            return value
        rows = worker_rows(len(value.lengths if isinstance(value, Sentences) else value), rank, world)
        return take_sentences(value, rows) if isinstance(value, Sentences) else value[rows.start : rows.stop]

    return {
        name: {k: take(v) for k, v in stream.items()} if isinstance(stream, dict) else stream
        for name, stream in batch.items()
    }


def extract_stored_runs(folder: Path) -> None:
    """Extract the runs that an earlier version stored, and the scenes that they read."""
    for name in ("runs", "scenes"):
        with tarfile.open(Path(__file__).parent / "data" / f"{name}_2026_11.tar.xz") as tar:
            tar.extractall(folder, filter="data")


@contextlib.contextmanager
def search_cluster(num_cpus: int) -> Iterator[None]:
    """A local Ray cluster, started as a search starts its own."""
    import ray

    from raylib.ray_cluster import RAY_ENV, private_ray

    for name, value in RAY_ENV.items():
        os.environ.setdefault(name, value)
    with private_ray():
        ray.init(
            address="local",
            num_cpus=num_cpus,
            include_dashboard=True,
            dashboard_port=0,
            object_store_memory=10**8,
            runtime_env={"env_vars": RAY_ENV},
        )
    yield
    ray.shutdown()


def free_port() -> int:
    """Return a port that nobody listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def listening(pid: int, port: int | None = None) -> list[tuple[str, str]]:
    """(address, name) of each socket at which a process or one that descends from it takes connections, or
    datagrams; of one `port` alone."""
    found = []
    root = psutil.Process(pid)
    for process in (root, *root.children(recursive=True)):
        with contextlib.suppress(psutil.NoSuchProcess):  # it has ended
            name, sockets = process.name(), process.net_connections("inet")
            found += [
                (each.laddr.ip, name)
                for each in sockets
                if (each.status == psutil.CONN_LISTEN or (each.type == socket.SOCK_DGRAM and not each.raddr))
                and port in (None, each.laddr.port)
            ]
    return found


def forget_hashes(shard: Path) -> None:
    """Put JSON of the first format in the place of a shard's: without hashes of images."""
    path = json_path(shard)
    stored = json.loads(path.read_text())
    del stored["format"]
    for _, members, _ in stored["samples"]:
        members.update({extension: place[:2] for extension, place in members.items()})
    path.write_text(json.dumps(stored))
