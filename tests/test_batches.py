import json
import logging
import os
import pickle
import re
import time
from collections import Counter

import cv2
import numpy as np
import pytest
import sentencepiece
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pretrain.batches import DataConfig, StepBatches, StreamConfig
from raylib.config import override
from raylib.data.loading import CALIBRATION, BatchStream, StepDataset, _unpack, to_device
from raylib.data.shards import ShardWriter, index_folder
from raylib.errors import UserError
from raylib.packed import pack_tree, unpack_tree
from raylib.randomness import string_key
from raylib.settings import AugmentConfig
from raylib.text import Tokenizer

IMAGES, LANES = 41, 4
WORDS = ["red", "green", "blue", "cat", "dog", "house", "tree", "ball", "sun", "moon"]
PLAIN = AugmentConfig(scale=(1, 1), ratio=(1, 1), operations=0)
ROWS = {"bn": 11, "de": 300, "ru": 60}


def png(number, drawing):
    """A flat image that tells its sample and its drawing."""
    return cv2.imencode(".png", np.full((8, 8, 3), (drawing, 5 * number, 7), np.uint8))[1].tobytes()


def identity(number):
    """Of the sample's two drawings together."""
    hashes = sorted(string_key(png(number, drawing)) for drawing in (1, 2))
    return string_key(b"".join(h.to_bytes(8, "little") for h in hashes))


def caption(number):
    return " ".join([WORDS[number % 10], WORDS[number // 10]])


def record(number):
    return json.dumps(
        {"captions": {"en": [caption(number), f"a {caption(number)}"], "de": "ein Bild"}}
    ).encode()


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    corpus = root / "corpus.txt"
    corpus.write_text("\n".join(" ".join(WORDS) + " a" for _ in range(50)))
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus),
        model_prefix=str(root / "tokenizer"),
        vocab_size=60,
        hard_vocab_limit=False,
        minloglevel=2,
        bos_id=0,
        pad_id=1,
        eos_id=2,
        unk_id=3,
        control_symbols=["<mask>"],
    )
    tokenizer = Tokenizer.load(root / "tokenizer.model")
    with ShardWriter(root / "image_text", "image_text", max_samples=9) as writer:
        for number in range(IMAGES):
            members = {"json": record(number), "a.png": png(number, 1), "b.png": png(number, 2)}
            writer.write(f"k{number}", members)
    rng = np.random.default_rng(0)

    def sentence(number):  # the first ids spell the number, so that every row is told apart
        digits = [5 + number // 100, 5 + number // 10 % 10, 5 + number % 10]
        return np.array(digits + rng.integers(5, 25, rng.integers(1, 20)).tolist())

    for kind in ("text", "parallel"):
        with ShardWriter(root / kind, kind, tokenizer, max_samples=70) as writer:
            for language, count in ROWS.items():
                rows = [sentence(number) for number in range(count)]
                writer.write_rows(
                    language, [(row, row[::-1]) for row in rows] if kind == "parallel" else rows
                )
    return root


def configure(root, **changes):
    streams = {
        name: StreamConfig(folder=str(root / name), batch=batch, length=length, lanes=LANES, block=16)
        for name, batch, length in [("image_text", 8, 12), ("parallel", 12, 14), ("text", 20, 9)]
    }
    return DataConfig(**{"tokenizer": str(root / "tokenizer.model"), **streams, **changes})


def make(root, seed=1, rank=0, world=1, **changes):
    return StepBatches(configure(root, **changes), 16, seed, rank, world)


def rows_of(sentences):
    """Per sentence: clean ids, masked ids, {place: label}, text id."""
    clean, masked = (part.split(sentences.lengths.tolist()) for part in (sentences.clean, sentences.masked))
    owner = torch.repeat_interleave(torch.arange(len(sentences.lengths)), sentences.lengths)
    place = torch.arange(len(owner)) - (sentences.lengths.cumsum(0) - sentences.lengths)[owner]
    labels = [{} for _ in clean]
    for position, label in zip(sentences.positions.tolist(), sentences.labels.tolist(), strict=True):
        labels[owner[position]][int(place[position])] = label
    return [
        (tuple(c.tolist()), tuple(m.tolist()), tuple(label.items()), int(i))
        for c, m, label, i in zip(clean, masked, labels, sentences.text_id, strict=True)
    ]


def content(*batches):
    """{(stream, index): everything of that sample} over the parts of a global batch."""
    found = {}
    for batch in batches:
        for name in ("image_text", "parallel", "text"):
            stream = batch.get(name, {})
            columns = [
                rows_of(v) if hasattr(v, "_fields") else [x.numpy().tobytes() for x in v]
                for k, v in stream.items()
                if k != "size"
            ]
            for row, index in enumerate(stream.get("index", torch.empty(0)).tolist()):
                assert (name, index) not in found
                found[name, index] = tuple(column[row] for column in columns)
    return found


@pytest.fixture(scope="module")
def whole(root):
    batches = make(root)
    return [content(batches[step]) for step in range(6)]


@pytest.mark.parametrize("world", [1, 2, 3, 5, 8])
def test_step_batches_do_not_depend_on_number_of_workers(root, whole, world):
    ranks = [make(root, rank=rank, world=world) for rank in range(world)]
    for step in (5, 0, 3):  # any step, in any order, of fresh objects
        parts = [rank[step] for rank in ranks]
        assert content(*parts) == whole[step]
        assert {len(part["image_text"]["index"]) for part in parts} <= {8 // world, -(-8 // world)}
        assert all(part["step"] == step and part["samples"] == 40 and part["bad"] == 0 for part in parts)
    assert len(whole[0]) == 8 + 12 + 20 and whole[0] != whole[1]


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_loader_processes_give_same_batches_in_order(root, whole, workers):
    loaded = list(BatchStream(make(root), 2, 6, workers))
    assert [batch["step"] for batch in loaded] == [2, 3, 4, 5]
    assert [content(batch) for batch in loaded] == whole[2:]


class TimedBatches(StepDataset):
    """Batches that take `seconds` each, and tell which process made them."""

    def __init__(self, seconds):
        self.seconds = seconds

    def __getitem__(self, step):
        time.sleep(self.seconds)
        return {"step": step, "process": torch.tensor(os.getpid())}


@pytest.mark.parametrize(
    ("batch", "step", "cpus", "chosen", "words"),
    [
        (
            0.03,
            0.0,
            4,
            3,
            r"^3 loader processes: a batch takes \S+ ms, .*; \d+ would be needed, 4 CPUs",
        ),
        (0.03, 0.0, 1, 1, r"^1 loader process: .* would be needed, 1 CPUs are this worker's$"),
        (0.0, 0.03, 8, 1, r"^1 loader process: a batch takes \S+ ms, a step \d+(\.\d+)? ms$"),
    ],
)
def test_loader_processes_are_as_many_as_steps_need(capsys, batch, step, cpus, chosen, words):
    stream, processes = BatchStream(TimedBatches(batch), 3, 43, cpus=cpus), []
    for number, loaded in enumerate(stream, 3):
        assert loaded["step"] == number
        processes.append(int(loaded["process"]))
        time.sleep(step)
        stream.warn_of_waiting(number, 0.0)
    assert len(processes) == 40 and stream.workers == chosen
    assert len(set(processes[:CALIBRATION])) == 1 and os.getpid() not in processes
    assert len(set(processes)) == (1 + chosen if chosen > 1 else 1)
    (line,) = capsys.readouterr().out.splitlines()
    assert re.search(words, line), line


def test_loader_processes_that_are_given_are_kept(capsys):
    stream = BatchStream(TimedBatches(0.01), 0, 20, workers=2)
    for step, _ in enumerate(stream):
        stream.warn_of_waiting(step, 0.05)
    assert stream.workers == 2 and not capsys.readouterr().out
    for _ in range(2):  # told once
        stream.warn_of_waiting(20, 0.4)
    (line,) = capsys.readouterr().out.splitlines()
    assert re.match(r"step 20: steps wait 40 % of their time for data, of which a batch takes", line)
    assert int(re.search(r"set fit.loader_workers=(\d+) \(now 2\)", line)[1]) > 2


def test_loader_processes_do_not_outnumber_what_shared_memory_holds(capsys, monkeypatch):
    batches = TimedBatches(0.01)
    batches.batch_bytes = 1 << 20
    monkeypatch.setattr("raylib.data.loading._free_shared_memory", lambda: 2 * 4 << 20)
    stream = BatchStream(batches, 0, 20, cpus=16)
    assert len(list(stream)) == 20 and stream.workers == 2


@pytest.mark.parametrize(
    "device",
    [
        "meta",
        pytest.param(
            "cuda",
            marks=[
                pytest.mark.gpu,
                pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
            ],
        ),
    ],
)
def test_batch_reaches_the_device_in_one_copy_but_for_what_the_host_reads(root, device):
    class Copies(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, function, types, arguments=(), options=None):
            self.count += function is torch.ops.aten._to_copy.default
            return function(*arguments, **(options or {}))

    batch, other = make(root)[0], torch.device(device)
    with Copies() as copies:
        moved = _unpack(*pack_tree(batch), other)
    assert copies.count == 1
    text, pairs = moved["parallel"]["source"], moved["image_text"]
    for there, here in ((text.clean, batch["parallel"]["source"].clean), (pairs["images"], None)):
        assert there.device.type == device and (here is None or there.shape == here.shape)
    for host, name in ((text.lengths, "lengths"), (text.positions, "positions")):
        assert host.equal(getattr(batch["parallel"]["source"], name))
    assert pairs["index"].equal(batch["image_text"]["index"])
    if device == "cuda":
        assert content(to_device(moved, torch.device("cpu"))) == content(batch)


def test_step_batches_differ_with_seed(root, whole):
    assert content(make(root, seed=2)[0]) != whole[0]


def test_step_batches_have_documented_shapes_and_types(root):
    batch = make(root)[0]
    images = batch["image_text"]
    assert images["images"].shape == (8, 16, 16, 3) and images["images"].dtype == torch.uint8
    assert images["negative_uniforms"].shape == (8, 2) and images["negative_uniforms"].dtype == torch.float32
    assert 0 <= images["negative_uniforms"].min() and images["negative_uniforms"].max() < 1
    assert images["image_id"].dtype == torch.int64
    for stream, side, length in [("image_text", "text", 12), ("parallel", "source", 14), ("text", "text", 9)]:
        sentences = batch[stream][side]
        assert sentences.lengths.max() <= length and len(sentences.clean) == sentences.lengths.sum()
        assert (sentences.clean[sentences.positions] == sentences.labels).all()
        assert all(row[0][0] == 0 and row[0][-1] == 2 for row in rows_of(sentences))
    assert batch["text"]["text"].lengths.max() == 9  # long ones are cut


def test_step_batches_keep_image_caption_and_id_together(root):
    batches = make(root, augment=PLAIN)
    tokenizer = Tokenizer.load(root / "tokenizer.model")
    drawings, captions = Counter(), Counter()
    for step in range(40):
        batch = batches[step]["image_text"]
        for image, image_id, row in zip(
            batch["images"], batch["image_id"].tolist(), rows_of(batch["text"]), strict=True
        ):
            number, drawing = int(image[8, 8, 1]) // 5, int(image[8, 8, 2])
            assert image_id == identity(number) and (image[2:-2, 2:-2] == image[8, 8]).all()
            texts = [caption(number), f"a {caption(number)}"]
            ids = [[0, *ids.tolist()[:10], 2] for ids in tokenizer.encode(texts)]
            captions[ids.index(list(row[0]))] += 1
            drawings[drawing] += 1
    assert min(drawings.values()) > 100 and min(captions.values()) > 100


def test_step_batches_hold_each_sample_once_per_lane_epoch(root):
    """Every lane's epoch holds each sample once, whatever its drawing."""
    batches = make(root, augment=PLAIN)
    seen = {lane: [] for lane in range(LANES)}
    for step in range(15):
        batch = batches[step]["image_text"]
        for index, image_id in zip(batch["index"].tolist(), batch["image_id"].tolist(), strict=True):
            seen[index // 2].append(image_id)
    for lane, ids in seen.items():
        size = (lane + 1) * IMAGES // LANES - lane * IMAGES // LANES
        epochs = [ids[i : i + size] for i in range(0, len(ids), size)]
        assert len(epochs) > 2 and all(len(set(epoch)) == len(epoch) for epoch in epochs)


def test_text_streams_read_each_row_once_per_epoch_and_mix_languages(root):
    config = configure(root, text=StreamConfig(folder=str(root / "text"), batch=64, lanes=2, length=64))
    batches = StepBatches(config, 16, seed=3)
    counts = Counter(
        row[0] for step in range(32) for row in rows_of(batches[step]["text"]["text"])
    )  # two periods a lane
    by_language = Counter()
    for lane_and_language, times in Counter(
        batches.streams["text"].lanes.draw(k // 1024, k % 1024) for k in range(2048)
    ).items():
        by_language[lane_and_language[0]] += times
    shares = np.array([ROWS[language] for language in sorted(ROWS)]) ** 0.3
    for language, share in zip(sorted(ROWS), shares / shares.sum(), strict=True):
        assert abs(by_language[language] / 2048 - share) < 0.002
    rows = [(0, *batches.streams["text"].source.row("de", n)[0].tolist(), 2) for n in range(300)]
    times = [counts[row] for row in rows]
    assert sum(times) == by_language["de"] and max(times) - min(times) <= 1


def test_parallel_stream_keeps_translations_paired(root):
    for source, target in zip(
        *(rows_of(make(root)[3]["parallel"][side]) for side in ("source", "target")), strict=True
    ):
        inner = source[0][1:-1]
        assert len(target[0]) == len(source[0])
        if len(inner) < 12:  # not cut
            assert target[0][1:-1] == inner[::-1]
    sides = make(root)[3]["parallel"]
    assert not torch.equal(sides["source"].positions, sides["target"].positions)  # masked by different draws


def test_streams_and_languages_can_be_omitted(root):
    off = StreamConfig()
    batches = make(root, image_text=off, parallel=off)
    assert set(batches[0]) == {"step", "samples", "tokens", "bad", "text"}
    only = configure(root).text.model_copy(update={"languages": ("ru",)})
    assert make(root, text=only).streams["text"].lanes.languages == ["ru"]


def test_step_batches_pickle_small_and_unread(root, whole):
    batches = make(root)
    batches[0]
    data = pickle.dumps(batches)
    assert len(data) < 20_000 and content(pickle.loads(data)[2]) == whole[2]


def test_pack_and_unpack_restore_a_batch(root):
    batch = make(root)[0]
    plan, data = pack_tree(batch)
    assert content(unpack_tree(plan, data)) == content(batch) and data.dtype == torch.uint8
    tree = {"a": (torch.zeros(0), torch.ones(3, dtype=torch.bool)), "b": "text"}
    again = unpack_tree(*pack_tree(tree))
    assert again["b"] == "text" and again["a"][0].shape == (0,) and again["a"][1].all()


@pytest.mark.parametrize(
    ("assignments", "words"),
    [
        (["text.batch=22"], "4 lanes do not divide a batch of 22"),
        (["text.lanes=12", "text.batch=24"], "12 lanes but 11 samples of language 'bn'"),
        (['text.languages=["de", "sw"]'], "no data in language 'sw'"),
        (["caption_language=fr"], "no data in language 'fr'"),
        (["text.folder=null"], "no folder"),
        (["text.folder={root}/parallel"], "'parallel' where 'text' is needed"),
        (["tokenizer={root}/none"], "no such tokenizer"),
        (["text.batch=0", "parallel.batch=0", "image_text.batch=0"], "every stream has batch 0"),
    ],
)
def test_stream_bad_settings_are_one_line_errors(root, assignments, words):
    config = override(
        configure(root), [assignment.replace("{root}", str(root)) for assignment in assignments]
    )
    with pytest.raises(UserError, match=words) as error:
        StepBatches(config, 16, 1, 0, 2)
    assert "\n" not in str(error.value)


BAD = {
    "picture": {"json": record(1), "a.png": b"\x89PNG broken", "b.png": b""},
    "no picture": {"json": record(1)},
    "empty caption": {"json": b'{"captions": {"en": ["", " "]}}', "a.png": png(50, 1)},
    "no English": {"json": b'{"captions": {"de": "ein Bild"}}', "a.png": png(50, 1)},
    "not UTF-8": {"json": '{"captions": {"en": "caf\xe9"}}'.encode("latin-1"), "a.png": png(50, 1)},
    "not JSON": {"json": b"{", "a.png": png(50, 1)},
    "surrogate": {"json": b'{"captions": {"en": "a \\ud800"}}', "a.png": png(50, 1)},
    "no caption": {"a.png": png(50, 1)},
    "no token": {"json": '{"captions": {"en": "\u200b"}}'.encode(), "a.png": png(50, 1)},
}


def broken(root, tmp_path, members, **changes):
    with ShardWriter(tmp_path, "image_text") as writer:
        for number in range(IMAGES):
            good = {"json": record(number), "a.png": png(number, 1)}
            writer.write(f"k{number}", members if number == 20 else good)
    off = StreamConfig()
    stream = StreamConfig(folder=str(tmp_path), batch=8, lanes=LANES)
    return configure(root, image_text=stream, text=off, parallel=off, **changes)


@pytest.mark.parametrize("name", BAD)
def test_unusable_sample_is_replaced_counted_and_logged(root, tmp_path, name, caplog):
    config = broken(root, tmp_path, BAD[name], bad_limit=0.1)
    batches = StepBatches(config, 16, 1)
    steps = range(16)
    with caplog.at_level(logging.WARNING):
        loaded = [batches[step] for step in steps]
    assert sum(batch["bad"] for batch in loaded) >= 3  # one epoch is 5 steps
    assert (
        1 <= len([r for r in caplog.records if "k20" in r.getMessage()]) <= 2
    )  # told once a member, not each time
    again = [content(*(StepBatches(config, 16, 1, rank, 2)[step] for rank in range(2))) for step in steps]
    assert again == [content(batch) for batch in loaded]
    unusable = batches.streams["image_text"].source.sample("en", 20).identity
    assert unusable not in torch.cat([batch["image_text"]["image_id"] for batch in loaded])


@pytest.mark.parametrize(("workers", "such"), [(0, "k20"), (1, "those in the warnings above")])
def test_too_many_unusable_samples_are_those_of_all_that_were_read(root, tmp_path, workers, such):
    config = broken(root, tmp_path, BAD["picture"], bad_limit=0.01)
    batches = StepBatches(config, 16, 1)
    count = sum(batch["bad"] for batch in BatchStream(batches, 0, 40, workers))
    assert count > 0.01 * 40 * 8
    with pytest.raises(UserError, match=rf"of the samples read are unusable.*{such}") as error:
        batches.check_replaced(count, 40)
    assert "\n" not in str(error.value)
    batches.check_replaced(count, 40 * 100)  # of a long run they are few
    batches.check_replaced(1, 1)  # one of the first hundred
    with pytest.raises(UserError):
        batches.check_replaced(2, 1)


def test_stream_without_usable_samples_ends(root, tmp_path):
    with ShardWriter(tmp_path, "image_text") as writer:
        for number in range(8):
            writer.write(f"k{number}", BAD["not JSON"])
    config = configure(root, image_text=StreamConfig(folder=str(tmp_path), batch=4, lanes=4), bad_limit=1.0)
    with pytest.raises(UserError, match="20 unusable samples"):
        StepBatches(config, 16, 1)[0]


@pytest.mark.parametrize("beside", [{}, {"json": b'{"url": "https://example.org/1.png"}'}])
def test_foreign_tars_with_plain_captions_are_read(root, tmp_path, beside):
    import webdataset

    with webdataset.TarWriter(str(tmp_path / "en-0.tar"), encoder=False) as writer:
        for number in range(8):
            writer.write(
                {"__key__": f"{number}", "txt": caption(number).encode(), "png": png(number, 1), **beside}
            )
    index_folder(tmp_path, "image_text")
    batch = make(root, image_text=StreamConfig(folder=str(tmp_path), batch=8, lanes=4))[0]
    assert len(set(batch["image_text"]["image_id"].tolist())) == 8


def test_shared_memory_is_checked_before_workers_start(root, monkeypatch):
    batches = make(root)
    monkeypatch.setattr("raylib.data.loading.SHARED_MEMORY", "/no/such/folder")
    with pytest.raises(UserError, match="no shared memory.*loader_workers=0"):
        next(BatchStream(batches, 0, 2, 1))
    assert next(BatchStream(batches, 0, 2, 0))["step"] == 0
    monkeypatch.setattr("raylib.data.loading.SHARED_MEMORY", "/dev")
    batches.batch_bytes = 1 << 50
    with pytest.raises(UserError, match="MB free, loader processes need"):
        next(BatchStream(batches, 0, 2, 1))
