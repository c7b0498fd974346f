"""Tiny runs for drills: started as processes forked from this one, which has imported all that they need, and
compared with a run that nothing disturbed."""

import contextlib
import hashlib
import importlib
import json
import os
import shutil
import signal
import socket
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from raylib import checkpoint
from raylib.engine import Engine, TorchEngine
from raylib.engine_zero import DeepSpeedEngine
from raylib.packed import Ragged, Sentences
from tests.conftest import MINI, QUICK
from tests.drills.tracer import end_after, redirect_output

Work = Callable[[], int]
# of result.json: what is another number each time
VOLATILE = (
    *("seconds", "times", "samples_per_second", "peak_memory_gb", "evaluation_seconds"),
    *("evaluated_per_second", "time", "code", "git"),
)
LOGGED = ("step", "lr", "epoch", "loss/", "eval/", "skipped")  # what of metrics.jsonl is compared


class Data(NamedTuple):
    """What all drills train on: a pretraining corpus, images with captions for its evaluation, miniature
    IGLUE, a model to fine-tune."""

    corpus: Path
    retrieval: Path
    scenes: Path
    model: Path


def build_data(folder: Path) -> Data:
    """Write all of it below `folder`."""
    from pretrain.corpora import build_sample_corpus
    from raylib.sample import DATA, read_concept_captions, read_images
    from raylib.sample.scenes.writer import ScenesConfig, write_scenes
    from tests.factories import make_model

    data = Data(
        build_sample_corpus(folder / "cache"), *(folder / name for name in ("retrieval", "scenes", "model"))
    )
    data.retrieval.mkdir()
    records = []
    for key, image in list(read_images("fluent").items())[:20]:
        (data.retrieval / f"{key}.png").write_bytes(image)
        captions = {language: read_concept_captions(language)[key].name for language in ("en", "de")}
        records.append({"image": f"{key}.png", "captions": captions})
    (data.retrieval / "captions.json").write_text(json.dumps(records, ensure_ascii=False), encoding="utf-8")
    write_scenes(data.scenes, ScenesConfig(train=60, dev=12, test=60, shots=5))
    make_model(vocabulary=12000, positions=64, dropout=0.1).float().save(data.model)
    shutil.copy2(DATA / "tokenizer.model", data.model)
    return data


class Case(NamedTuple):
    """A kind of run: `python -m STAGE ARGUMENTS`; `steps` in all, of which every `epoch` go through the same
    samples (0: none comes twice)."""

    stage: str
    arguments: tuple[str, ...]
    steps: int
    epoch: int

    def command(self, runs: Path, *settings: str) -> list[str]:
        """Return its words after `python -m`, for a run in the folder `runs`/run."""
        return [self.stage, *self.arguments, f"runs={runs}", "name=run", *settings]

    def workers(self, runs: Path, *settings: str, world: int = 1, notes: Path | None = None) -> list[Work]:
        """Return what each of `world` workers does, in a process of its own, as torchrun would start it. The
        samples that it trains on are logged in the folder `notes`, or in `runs`."""
        port = free_port()
        words = self.command(runs, *settings)

        def work(rank: int) -> int:
            if world > 1:
                size = {"WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
                place = {"RANK": rank, "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
                os.environ.update(
                    {k: str(v) for k, v in {**size, **place, "GLOO_SOCKET_IFNAME": "lo"}.items()}
                )
            _log_samples((notes or runs) / f"samples-{rank}.jsonl")
            main = importlib.import_module(f"{self.stage}.__main__").main
            return main(words[1:])

        return [lambda rank=rank: work(rank) for rank in range(world)]


def pretraining(data: Data, *settings: str) -> Case:
    """Return six steps of `tiny`, of a small model, with a checkpoint and an evaluation every two."""
    own = ["fit.eval_every=2", "fit.keep=1", "data.dev=false", "runtime=local", "workers=1"]
    paths = [f"corpus={data.corpus}", f"data.retrieval={data.retrieval}"]
    return Case("pretrain", ("tiny", *MINI, *own, *paths, *settings), 6, 0)


def finetuning(data: Data, *settings: str) -> Case:
    """Return three epochs of three steps of `scenes_xvnli`, a checkpoint and an evaluation after each."""
    own = ["epochs=3", "fit.keep=1", 'languages=["en","ru"]', "last_batch=keep", "batch=20"]
    paths = [f"model={data.model}", f"data={data.scenes}"]
    return Case("finetune", ("scenes_xvnli", *QUICK, *own, *paths, *settings), 9, 3)


class Group:
    """Forked processes of a run: one a worker."""

    def __init__(self, works: Sequence[Work], log: Path):
        self.log, self.codes = log, {}
        self.pids = [self._fork(work) for work in works]

    def _fork(self, work: Work) -> int:
        if pid := os.fork():
            return pid

        def begin() -> int:
            os.setpgid(0, 0)
            redirect_output(self.log)
            return work()

        end_after(begin)

    def signal(self, number: int) -> None:
        """Send every worker that runs a signal."""
        for pid in self.pids:
            if pid not in self.codes:
                os.kill(pid, number)

    def wait(self, seconds: float = 120.0) -> list[int]:
        """Return the exit codes of all workers; -9 of a worker that was killed.

        Raises:
            AssertionError: they did not end in time; they are killed.
        """
        end = time.monotonic() + seconds
        while not self.has_ended():
            if time.monotonic() > end:
                self.signal(signal.SIGKILL)
                raise AssertionError(f"no end after {seconds:.0f} s; {last_lines(self.log)}")
            time.sleep(0.01)
        return [self.codes[pid] for pid in self.pids]

    def has_ended(self) -> bool:
        """Return whether every worker has ended."""
        for pid in self.pids:
            if pid not in self.codes:
                ended, status = os.waitpid(pid, os.WNOHANG)
                if ended:
                    self.codes[pid] = os.waitstatus_to_exitcode(status)
        return len(self.codes) == len(self.pids)

    def __enter__(self) -> "Group":
        return self

    def __exit__(self, *error: object) -> None:
        self.signal(signal.SIGKILL)
        for pid in self.pids:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)
            if pid not in self.codes:
                os.waitpid(pid, 0)


def run_to_end(
    case: Case,
    runs: Path,
    *settings: str,
    world: int = 1,
    notes: Path | None = None,
    seconds: float = 120.0,
) -> str:
    """Run a case in forked processes; return what it printed, which is in log.txt of `notes`, or `runs`.

    Raises:
        AssertionError: it did not end well.
    """
    log = (notes or runs) / "log.txt"
    start = log.stat().st_size if log.exists() else 0
    with Group(case.workers(runs, *settings, world=world, notes=notes), log) as group:
        codes = group.wait(seconds)
    assert codes == [0] * world, f"exit codes {codes}; {last_lines(log)}"
    return log.read_bytes()[start:].decode()


def preload(case: Case, folder: Path) -> None:
    """Run a case once in a forked process, and import here what it imported: those forked later need not."""
    names = folder / "modules.json"

    def work() -> int:
        code = case.workers(folder)[0]()
        names.write_text(json.dumps(sorted(sys.modules)))
        return code

    with Group([work], folder / "log.txt") as group:
        codes = group.wait()
    assert codes == [0], last_lines(folder / "log.txt")
    for name in json.loads(names.read_text()):
        if name not in sys.modules:
            # some exist only while another module is imported
            with contextlib.suppress(ImportError, AttributeError):
                importlib.import_module(name)


def outcome(run: Path) -> dict[str, Any]:
    """Return what a finished run came to: all of it must be equal in a run that was disturbed."""
    newest = checkpoint.find_newest(run)
    assert newest is not None, f"{run}: no checkpoint"
    best, record = checkpoint.find_best(run), checkpoint.read_registry(run).best
    result = json.loads((run / "result.json").read_text())
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    kept = [folder for name in ("predictions", "dev") for folder in run.rglob(name)]
    return {
        "log of losses": [{k: v for k, v in line.items() if k.startswith(LOGGED)} for line in lines],
        "checkpoint": newest.name,
        "weights": tensors_of(newest),
        "best": record and (*record, checkpoint.verify(best)["score"], tensors_of(best)),
        "result": {k: v for k, v in result.items() if k not in VOLATILE},
        "tokenizer": {path.name: _sha256(path) for path in run.glob("*.model")},
        "predictions": {
            str(path.relative_to(run)): _sha256(path)
            for folder in kept
            for path in sorted(filter(Path.is_file, folder.rglob("*")))
        },
        # scores of a checkpoint that was saved before its evaluation have a file of their own
        "files": sorted(str(path.relative_to(run)) for path in run.rglob("*") if path.name != "scores.json"),
    }


def require_equal(found: dict[str, Any], expected: dict[str, Any], *but: str) -> None:
    """Compare the outcome of a run with that of one undisturbed, apart from the parts `but`.

    Raises:
        AssertionError: names the first part that differs.
    """
    for part in expected:
        if part not in but and found[part] != expected[part]:
            raise AssertionError(f"{part}: {_first_difference(found[part], expected[part])}")


def tensors_of(folder: Path) -> dict[str, str]:
    """{file: hash} of a checkpoint's weights and optimizer states."""
    found = {str(path.relative_to(folder)): _sha256(path) for path in folder.rglob("*.safetensors")}
    if (folder / "optimizer.pt").is_file():  # whose bytes are a zip's, with times
        state = torch.load(folder / "optimizer.pt", weights_only=True)["state"]
        values = [value.numpy().tobytes() for _, one in sorted(state.items()) for value in one.values()]
        found["optimizer.pt"] = hashlib.sha256(b"".join(values)).hexdigest()
    return found


def samples_of(runs: Path, world: int = 1) -> dict[int, list[int]]:
    """{step: hashes of the samples that all workers took}, of the steps that count: those of each start up to
    the next start's first.

    Raises:
        AssertionError: a step that was done again took other samples.
    """
    steps: dict[int, list[int]] = {}
    for rank in range(world):
        own: dict[int, list[int]] = {}
        for line in (runs / f"samples-{rank}.jsonl").read_text().splitlines():
            step, ids = json.loads(line)
            assert own.setdefault(step, ids) == ids, f"step {step} took other samples the second time"
        for step, ids in own.items():
            steps[step] = sorted([*steps.get(step, []), *ids])
    return steps


def require_each_sample_once(case: Case, samples: dict[int, list[int]]) -> None:
    """Raises AssertionError: a step is missing; a sample came twice, or, where there are epochs, one of them
    lacks some."""
    assert sorted(samples) == list(range(case.steps)), f"steps {sorted(samples)}"
    span = case.epoch or case.steps
    epochs = [
        [sample for step in range(first, first + span) for sample in samples[step]]
        for first in range(0, case.steps, span)
    ]
    for epoch in epochs:
        assert sorted(epoch) == sorted(epochs[0]), "epochs of other samples"
    if not case.epoch:
        assert len(set(epochs[0])) == len(epochs[0]), "a sample came twice"


def _log_samples(path: Path) -> None:
    """Let the engine of this process, a forked one, log the samples that it trains on."""

    def logging(take_step: Callable[..., Any]) -> Callable[..., Any]:
        def step(self: Engine, batch: dict, number: int, lr: float) -> dict:
            line = json.dumps([number, _row_hashes(batch)]) + "\n"
            out = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.write(out, line.encode())
            os.close(out)
            return take_step(self, batch, number, lr)

        return step

    for engine in (TorchEngine, DeepSpeedEngine):
        engine.step = logging(engine.step)


def _row_hashes(batch: dict) -> list[int]:
    """A hash of the tokens of each row of each stream, and of its image."""
    hashes = []
    for stream, part in batch.items():
        if isinstance(part, dict):
            texts = [value for value in part.values() if isinstance(value, Sentences | Ragged)]
            images = part.get("image_id", torch.zeros(len(part["index"]), dtype=torch.int64)).tolist()
            columns = [text[0].split(text.lengths.tolist()) for text in texts]
            for image, *rows in zip(images, *columns, strict=True):
                row = zlib.crc32(f"{stream} {image}".encode())
                for tokens in rows:
                    row = zlib.crc32(tokens.numpy().tobytes(), row)
                hashes.append(row)
    return hashes


def _first_difference(found: Any, expected: Any) -> str:
    if isinstance(found, dict) and isinstance(expected, dict):
        for key in {**expected, **found}:
            if found.get(key) != expected.get(key):
                return f"{key}: {_first_difference(found.get(key), expected.get(key))}"
    if isinstance(found, list) and isinstance(expected, list) and all(isinstance(x, str) for x in found):
        missing, more = sorted({*expected} - {*found}), sorted({*found} - {*expected})
        return f"missing {missing[:4]}, more {more[:4]}"
    if isinstance(found, list) and isinstance(expected, list):
        for i, (one, other) in enumerate(zip(found, expected, strict=False)):
            if one != other:
                return f"[{i}] {_first_difference(one, other)}"
        return f"{len(found)} in place of {len(expected)}"
    return f"{str(found)[:100]} in place of {str(expected)[:100]}"


def last_lines(log: Path, count: int = 3) -> str:
    """Return the end of a log, in one line."""
    lines = log.read_text(errors="replace").strip().splitlines() if log.exists() else []
    return " / ".join(lines[-count:])[-500:]


def free_port() -> int:
    """Return a port that nobody listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def scratch(parent: Path) -> Iterator[Path]:
    """An empty folder below `parent`, removed after the block; kept if it fails."""
    folder = Path(tempfile.mkdtemp(dir=parent))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
