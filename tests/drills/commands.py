"""Rows: every command, where the system refuses what it needs: one line, and the right exit code."""

import ctypes
import importlib
import os
import resource
import shutil
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

from tests.drills.disks import fill, mount, require_one_line, small_disk
from tests.drills.harness import Drill, row
from tests.drills.runs import Group, finetuning, pretraining, run_to_end

PR_CAPBSET_DROP, CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH = 24, 1, 2  # capabilities(7)
CAPABILITY_VERSION = 0x20080522
OPEN_FILES = 8  # so many more may be open: less than any command needs
LONG = "a" * 300


class Command(NamedTuple):
    """`python -m MODULE WORDS`, which writes into the folder OUT: a new one in a place PLACE, or a run.

    run: name of the run of the workshop that it works in, a copy of which OUT is then.
    """

    module: str
    words: tuple[str, ...]
    run: str = ""

    def main(self, out: Path) -> int:
        """Run it in this process, which ends with it."""
        words = [word.replace("OUT", str(out)) for word in self.words]
        return importlib.import_module(self.module).main(words)


def commands(drill: Drill, shared: Path) -> dict[str, Command]:
    """Return all commands that need no cluster and nothing from elsewhere, by what they do."""
    data = drill.data
    train, tune = pretraining(data), finetuning(data)
    (shared / "texts.txt").write_text("a cat\na dog\n")
    (shared / "text.de.txt").write_text("ein Hund\n" * 40)
    tokenizer = str(data.model / "tokenizer.model")
    pretrained, tuned = str(shared / "pretrain" / "run"), str(shared / "finished" / "run")
    return {
        "pretrain": Command("pretrain.__main__", (*train.arguments, "runs=OUT", "name=run")),
        "pretrain, on": Command("pretrain.__main__", (*train.arguments, "runs=OUT", "name=run"), "pretrain"),
        "convert": Command("pretrain.__main__", ("convert", "OUT/run"), "pretrain"),
        "evaluate": Command(
            "pretrain.__main__", ("evaluate", pretrained, str(data.retrieval), "--json", "OUT/file")
        ),
        "export": Command("pretrain.__main__", ("export", pretrained, "OUT/export")),
        "overlap": Command(
            "pretrain.__main__",
            ("overlap", str(data.corpus), str(data.retrieval), "--json", "OUT/file"),
        ),
        "corpora": Command(
            "pretrain.corpora",
            ("OUT/corpus", "--tokenizer", tokenizer, "--text", f"de={shared}/text.de.txt"),
        ),
        "index": Command("raylib.data.shards", ("OUT/text", "text"), "corpus"),
        "scenes": Command("raylib.sample.scenes.__main__", ("OUT/scenes", "train=4", "dev=2", "test=4")),
        "predict": Command(
            "raylib.api.predict", (pretrained, "--texts", f"{shared}/texts.txt", "--out", "OUT/f")
        ),
        "finetune": Command("finetune.__main__", (*tune.arguments, "runs=OUT", "name=run")),
        "finetune, on": Command("finetune.__main__", (*tune.arguments, "runs=OUT", "name=run"), "finetune"),
        "evaluate a run": Command("finetune.__main__", ("evaluate", "OUT/run"), "finetune"),
        "analyse": Command("finetune.__main__", ("analyse", "OUT/run"), "finished"),
        "compare": Command("finetune.__main__", ("compare", tuned, "--csv", "OUT/file")),
        "search": Command(
            "tune_spaces.__main__",
            ("layer_decay", "recipe=scenes_xvnli", "runs=OUT", "name=run", *tune.arguments[1:]),
        ),
    }


def prepare(drill: Drill) -> Path:
    """Make what the commands read: a run that has stopped half-way of each stage, and shards."""
    shared = drill.folder / "shared"
    for case, steps in ((pretraining(drill.data), 4), (finetuning(drill.data), 6)):
        (shared / case.stage).mkdir(parents=True)
        run_to_end(case, shared / case.stage, f"fit.stop_after={steps}", notes=drill.folder)
    (shared / "finished").mkdir()
    run_to_end(finetuning(drill.data), shared / "finished", notes=drill.folder)
    shutil.copytree(
        drill.data.corpus, shared / "corpus", ignore=shutil.ignore_patterns("manifest.json", "*.index")
    )
    return shared


def obey_permissions() -> None:
    """Let this process, should it be root's, obey the permissions of files, as anybody's does."""
    libc, header = ctypes.CDLL(None), (ctypes.c_uint32 * 2)(CAPABILITY_VERSION, 0)
    sets = (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable: of 32 capabilities, then of 32 more
    libc.capget(header, sets)
    for capability in (CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH):
        libc.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0)  # for programs that it starts
        for i in range(3):
            sets[i] &= ~(1 << capability)
    assert libc.capset(header, sets) == 0


def with_few_files() -> None:
    """Let this process open few more files than it has."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + OPEN_FILES,) * 2)


def attempt(
    drill: Drill,
    name: str,
    command: Command,
    shared: Path,
    breaks: Callable[[Path], object],
    limits: Callable[[], object] = lambda: None,
    allowed: tuple[int, ...] = (1,),
    inside: str = "",
) -> None:
    """Run a command whose place `breaks` has broken, in a process that `limits` limits."""

    def work(folder: Path) -> None:
        with ExitStack() as stack:
            disk = stack.enter_context(small_disk(folder))
            place = disk / "place"
            if command.run:
                shutil.copytree(shared / command.run, place)
            else:
                place.mkdir()
            breaks(place)
            log = folder / "log.txt"
            log.touch()

            def child() -> int:
                limits()
                return command.main(place / inside if inside else place)

            with Group([child], log) as group:
                codes = group.wait()
            drill.count += 1
            text = log.read_text()
            with open(drill.folder / "lines.txt", "a") as lines:  # for people: what they would read
                last = text.strip().splitlines()[-1:] if codes != [0] else ["ended well"]
                lines.write(f"{name}: {codes[0]} {''.join(last)}\n")
            if codes != [0]:  # it may need nothing of what is broken
                require_one_line(text, codes, allowed)

    drill.attempt(name, work)


def each_command(drill: Drill, **options) -> None:
    shared = prepare(drill)
    for name, command in commands(drill, shared).items():
        if drill.only in name:
            attempt(drill, name, command, shared, **options)
    drill.finish()


def _deny(place: Path) -> None:
    for path in (place, *place.rglob("*")):
        path.chmod(0o555 if path.is_dir() else 0o444)


def _hide(place: Path) -> None:
    for path in (*place.rglob("*"), place):
        if not path.is_dir() or not any(path.iterdir()):
            path.chmod(0)
    place.chmod(0)


def _make_read_only(place: Path) -> None:
    mount("--bind", place, place)
    mount("-o", "remount,ro,bind", place)


def _put_file(place: Path) -> None:
    shutil.rmtree(place)
    place.write_text("a file\n")


@row
def commands_on_a_full_disk(drill: Drill) -> None:
    """Every command, where its disk is full. It ends with exit code 1 and one line, or needs no room."""
    each_command(drill, breaks=lambda place: fill(place.parent))


@row
def commands_on_a_read_only_disk(drill: Drill) -> None:
    """Every command, where its disk is read-only. It ends with exit code 1 and one line."""
    each_command(drill, breaks=_make_read_only)


@row
def commands_without_permission(drill: Drill) -> None:
    """Every command, as a user who may write nothing there. It ends with exit code 1 and one line."""
    each_command(drill, breaks=_deny, limits=obey_permissions)


@row
def commands_that_may_not_read(drill: Drill) -> None:
    """Every command, as a user who may not even read there. It ends with exit code 1 or 2 and one line."""
    each_command(drill, breaks=_hide, limits=obey_permissions, allowed=(1, 2))


@row
def commands_with_few_open_files(drill: Drill) -> None:
    """Every command in a process that may open few files. It ends with exit code 1 and one line."""
    each_command(drill, breaks=lambda place: None, limits=with_few_files)


@row
def commands_where_a_file_lies(drill: Drill) -> None:
    """Every command, where a file lies in the place of its folder. It ends with exit code 2 and one line."""
    each_command(drill, breaks=_put_file, allowed=(2,))


@row
def commands_with_a_name_that_is_too_long(drill: Drill) -> None:
    """Every command, with a folder whose name is too long. It ends with exit code 2 and one line."""
    each_command(drill, breaks=lambda place: None, allowed=(2,), inside=LONG)
