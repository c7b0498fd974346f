"""Rows: shards that are truncated, missing, changed or slow; numbers that are not finite; other numbers of
workers."""

import contextlib
import functools
import http.server
import json
import os
import shutil
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from safetensors.torch import load_file

from raylib import checkpoint
from tests.drills.disks import require_one_line, require_whole
from tests.drills.harness import Drill, row
from tests.drills.kills import kill_at_random
from tests.drills.runs import (
    Case,
    Group,
    finetuning,
    free_port,
    last_lines,
    outcome,
    pretraining,
    require_equal,
    run_to_end,
    samples_of,
)
from tests.drills.tracer import Operation, trace
from tests.factories import make_model

# what does not depend on where the data lie
NUMBERS = ("log of losses", "checkpoint", "weights", "best")
# of each kind of shard, one that a run reads in every step; text is read through a memory map
SHARDS = ("image_text/en-000000.tar", "parallel/de-000000.tar", "text/de-000000.tar")


def truncate(path: Path) -> None:
    """Cut a file in half."""
    os.truncate(path, path.stat().st_size // 2)


def remove(path: Path) -> None:
    """Remove a file."""
    path.unlink()


def change(path: Path) -> None:
    """Put another file of the same size in the place of one."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 255
    other = path.with_suffix(".other")
    other.write_bytes(data)
    other.replace(path)


def damaged_at_start(
    drill: Drill, case: Callable[[Path], Case], folder: Path, files: tuple[str, ...]
) -> None:
    """Stop runs, damage a file of a copy of `folder`, and start: it is named, and when it is mended the run
    goes on."""
    for name in files:
        for damage in drill.some([truncate, remove, change], few=1):

            def disturb(runs: Path, name: str = name, damage: Callable[[Path], None] = damage) -> None:
                copy = runs / "data"
                shutil.copytree(folder, copy)
                this = case(copy)
                run_to_end(this, runs, f"fit.stop_after={this.steps // 2}")
                damage(copy / name)
                drill.count += 1
                with Group(this.workers(runs), runs / "damaged.txt") as group:
                    codes = group.wait()
                require_one_line((runs / "damaged.txt").read_text(), codes, (2,), Path(name).name)
                (copy / name).unlink(missing_ok=True)
                shutil.copy2(folder / name, copy / name)
                run_to_end(this, runs)
                reference = drill.workshop.reference(case(folder))
                require_equal(
                    {k: outcome(runs / "run")[k] for k in NUMBERS}, {k: reference.outcome[k] for k in NUMBERS}
                )
                assert samples_of(runs) == reference.samples, "other samples"

            drill.attempt(f"{damage.__name__} {name}", disturb)


@row
def damaged_shards(drill: Drill) -> None:
    """A shard that is truncated, missing, or of other content, found at a start in mid-run. It is named in
    one line; when it is back, the run goes on to what it comes to undisturbed."""

    def case(corpus: Path) -> Case:
        return pretraining(drill.data._replace(corpus=corpus))

    damaged_at_start(drill, case, drill.data.corpus, SHARDS)
    drill.finish()


@row
def damaged_files_of_finetuning(drill: Drill) -> None:
    """An annotation file, or the tar of the images, that is truncated, missing, or of other content, found at
    a start in mid-run. As of shards."""

    def case(scenes: Path) -> Case:
        return finetuning(drill.data._replace(scenes=scenes))

    files = ("XVNLI/annotations/en/train.jsonl.zip", "XVNLI/annotations/ru/test.jsonl", "images.tar")
    damaged_at_start(drill, case, drill.data.scenes, files)
    drill.finish()


@row
def shards_damaged_under_way(drill: Drill) -> None:
    """A shard that is truncated, removed, or replaced while the run reads it, by itself or by a loader
    process. The run ends with one line that names it, or as undisturbed; mended, it goes on."""
    for loaders in (0, 1):
        for name in SHARDS:
            for damage in drill.some([truncate, remove, change], few=1):

                def disturb(
                    runs: Path,
                    loaders: int = loaders,
                    name: str = name,
                    damage: Callable[[Path], None] = damage,
                ) -> None:
                    corpus = runs / "data"
                    shutil.copytree(drill.data.corpus, corpus)
                    case = pretraining(drill.data._replace(corpus=corpus), f"fit.loader_workers={loaders}")
                    names = [path for path in (corpus / name).parent.glob("*.tar")]
                    point = (0, Operation("write", "metrics.jsonl", 2))
                    log = runs / "log.txt"
                    done = trace(
                        case.workers(runs),
                        runs / "run",
                        log,
                        point,
                        lambda _: [damage(path) for path in names],
                    )
                    drill.count += 1
                    assert done.reached
                    if done.codes != [0]:
                        require_one_line(log.read_text(), done.codes, (1, 2), str((corpus / name).parent))
                        assert "shared memory" not in log.read_text(), "shared memory is blamed"
                        require_whole(runs / "run")
                    for path in names:
                        path.unlink(missing_ok=True)
                        shutil.copy2(drill.data.corpus / path.relative_to(corpus), path)
                    run_to_end(case, runs)
                    reference = drill.workshop.reference(pretraining(drill.data))
                    require_equal(
                        {k: outcome(runs / "run")[k] for k in NUMBERS},
                        {k: reference.outcome[k] for k in NUMBERS},
                    )

                drill.attempt(f"{damage.__name__} {name}, {loaders} loaders", disturb)
    drill.finish()


class _SlowFiles(http.server.SimpleHTTPRequestHandler):
    """Files in drips; one whose name is in `cut` breaks off in the middle the first time."""

    protocol_version = "HTTP/1.1"
    cut: set[str] = set()  # noqa: RUF012

    def log_message(self, *_) -> None: ...

    def copyfile(self, source, outputfile) -> None:
        data = source.read()
        name = Path(self.path).name
        if name in self.cut:
            self.cut.discard(name)
            outputfile.write(data[: len(data) // 2])
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        for start in range(0, len(data), max(1, len(data) // 8 + 1)):
            outputfile.write(data[start : start + len(data) // 8 + 1])
            outputfile.flush()
            time.sleep(0.05)


@contextmanager
def slow_server(folder: Path, cut: set[str]) -> Iterator[str]:
    """An HTTP server of `folder`, in a process of its own; its address."""
    port = free_port()

    def serve() -> int:
        _SlowFiles.cut = cut
        handler = functools.partial(_SlowFiles, directory=str(folder))
        http.server.ThreadingHTTPServer(("127.0.0.1", port), handler).serve_forever()
        return 0

    with Group([serve], Path(os.devnull)):
        yield f"http://127.0.0.1:{port}"


@row
def slow_shards(drill: Drill) -> None:
    """Shards that come in drips from an HTTP server, one of which breaks off in the middle. That one is named
    in one line; started again, the run says how long it waited, and comes to the same numbers."""
    reference = drill.workshop.reference(pretraining(drill.data))

    def disturb(runs: Path) -> None:
        cut = {"en-000002.tar"}
        with slow_server(drill.data.corpus, cut) as address:
            remote = [
                f"data.{stream}.folder={address}/{stream}" for stream in ("image_text", "parallel", "text")
            ]
            case = pretraining(drill.data, *remote, f"data.cache={runs}/cache")
            with Group(case.workers(runs), runs / "log.txt") as group:
                codes = group.wait()
            drill.count += 1
            require_one_line((runs / "log.txt").read_text(), codes, (1, 2), "en-000002.tar")
            run_to_end(case, runs)
        require_equal(
            {k: outcome(runs / "run")[k] for k in NUMBERS}, {k: reference.outcome[k] for k in NUMBERS}
        )
        lines = [json.loads(line) for line in (runs / "run" / "metrics.jsonl").read_text().splitlines()]
        waiting = max(line.get("waiting", 0.0) for line in lines)
        assert waiting > 0.3, f"the log tells of no waiting ({waiting:.0%})"

    drill.attempt("slow", disturb)
    drill.finish()


NAN_TERM = """
from raylib.objectives import LossPart, term

@term("parallel", reads=("embeddings",), trains=("text_projection",))
def sometimes_nan(step):
    states = step.model.embed_text_states(step.source.cls(), normalize=False)
    is_bad = int(step.batch["source"].text_id.sum()) % 2 == 0
    return [LossPart(states.square().sum() * (float("nan") if is_bad else 1.0), len(states))]
"""


@row
def steps_that_are_not_finite(drill: Drill) -> None:
    """A loss that is NaN in some steps, and SIGKILLs at random moments. These steps are skipped and counted,
    and all is as in the run without kills."""
    term = drill.folder / "nan_term.py"
    term.write_text(NAN_TERM)
    case = pretraining(drill.data, f"objective.terms.nan={term}")
    skipped = drill.workshop.reference(case).outcome["result"]["skipped_steps"]
    assert 0 < skipped < case.steps, f"{skipped} steps were skipped: the drill shows nothing"
    kill_at_random(drill, case, few=True)


@row
def losses_that_explode(drill: Drill) -> None:
    """A learning rate at which pretraining and fine-tuning explode. The run ends with one line; the
    checkpoint that stays is whole and finite."""
    for case in (pretraining(drill.data, "fit.save_every=1"), finetuning(drill.data)):

        def disturb(runs: Path, case: Case = case) -> None:
            wild = ("optim.lr=1e30", "optim.clip=1e30", "optim.warmup=0", "fit.max_skipped=2")
            with Group(case.workers(runs, *wild), runs / "log.txt") as group:
                codes = group.wait()
            drill.count += 1
            require_one_line((runs / "log.txt").read_text(), codes, (2,), "not finite")
            require_whole(runs / "run")
            if newest := checkpoint.find_newest(runs / "run"):
                weights = load_file(newest / "model.safetensors")
                assert all(value.isfinite().all() for value in weights.values()), f"{newest}: not finite"

        drill.attempt(case.stage, disturb)
    drill.finish()


def other_worlds(drill: Drill, case: Case, worlds: tuple[int, ...], per_world: tuple[str, ...] = ()) -> None:
    """Run parts of a run on other numbers of workers: losses as on one but for rounding, the same samples."""
    reference = drill.workshop.reference(case)

    def disturb(runs: Path) -> None:
        part = case.steps // len(worlds)
        for number, world in enumerate(worlds):
            stop = ["fit.stop_after=" + str(part * (number + 1))] if number + 1 < len(worlds) else []
            run_to_end(case, runs, *stop, *per_world[number : number + 1], world=world)
            drill.count += 1
        found = outcome(runs / "run")
        for one, other in zip(found["log of losses"], reference.outcome["log of losses"], strict=True):
            assert one.keys() == other.keys()
            for key in one:
                assert one[key] == pytest.approx(other[key], rel=2e-3, abs=1e-6), f"step {one['step']}: {key}"
        assert found["checkpoint"] == reference.outcome["checkpoint"]
        assert samples_of(runs, max(worlds)) == reference.samples, "other samples"

    drill.attempt(" -> ".join(map(str, worlds)), disturb)


@row
def other_numbers_of_workers(drill: Drill) -> None:
    """Pretraining and fine-tuning that go on with other numbers of workers: 2, 1, 3; 5, 1; 1, 3, 2. Losses
    are those of one worker but for rounding, the samples the same."""
    plain = ("fit.eval_every=0", "model.dropout=0", "fit.save_every=1")
    model = drill.folder / "model"
    make_model(vocabulary=12000, positions=64).float().save(model)  # without dropout
    shutil.copy2(drill.data.model / "tokenizer.model", model)
    data = drill.data._replace(model=model)
    for worlds in drill.some([(2, 1, 3), (1, 3, 2), (5, 1)], few=2):
        other_worlds(drill, pretraining(drill.data, *plain), worlds)
        # dropout is drawn for each worker: without it, numbers are equal but for rounding
        other_worlds(drill, finetuning(data, "select=last", "head_dropout=0"), worlds)
    drill.finish()


@row
def zero_and_back(drill: Drill) -> None:
    """Pretraining on 2 workers under DeepSpeed ZeRO-2, then one worker without it, then 3 with it. As with
    other numbers of workers."""
    case = pretraining(drill.data, "fit.eval_every=0", "model.dropout=0", "fit.save_every=1")
    sharding = ("fit.sharding=zero2", "fit.sharding=none", "fit.sharding=zero2")
    other_worlds(drill, case, (2, 1, 3), sharding)
    drill.finish()


def stop_and_go(pid: int, seconds: float, share: float) -> None:
    """Let a process run only a share of the time for so many seconds."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGSTOP)
        time.sleep(0.05 * (1 - share))
        with contextlib.suppress(ProcessLookupError):  # it has ended
            os.kill(pid, signal.SIGCONT)
        time.sleep(0.05 * share)


@row
def straggler(drill: Drill) -> None:
    """One of 2 workers that runs a tenth of the time. The log names it."""
    settings = ("fit.steps=40", "fit.save_every=0", "fit.eval_every=0", "fit.log_every=5")
    case = pretraining(drill.data, *settings)._replace(steps=40)
    for slow in (0, 1):

        def disturb(runs: Path, slow: int = slow) -> None:
            log = runs / "log.txt"
            with Group(case.workers(runs, world=2), log) as group:
                while (
                    not (runs / "run" / "metrics.jsonl").exists()
                    or not (runs / "run" / "metrics.jsonl").stat().st_size
                ):
                    assert not group.has_ended(), last_lines(log)
                    time.sleep(0.02)
                while not group.has_ended():
                    stop_and_go(group.pids[slow], 0.2, 0.1)
                codes = group.wait()
            drill.count += 1
            assert codes == [0, 0], f"exit codes {codes}; {last_lines(log)}"
            assert f"worker {slow}" in log.read_text(), "the log does not name the slow worker"

        drill.attempt(f"worker {slow}", disturb)
    drill.finish()
