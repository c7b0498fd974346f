"""The folder of a benchmark: files, images, and beside them the tests in another style and the translations
with errors, which link to all that they share with it."""

import io
import json
import os
import tarfile
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from raylib.sample import UNSEEN_VENDOR, decode_drawings, draw_webp
from raylib.sample.scenes.statements import Scene, make_scene
from raylib.sample.scenes.translators import Translator, Wording, with_errors

ERRORS = {"errors10": 0.1, "errors30": 0.3}  # folders of translations: how many sentences are wrong
STYLE = "test_style"  # folder of the test sets in a style that training has not
TEST_FILES = (
    "xGQA/annotations/few_shot/*/test.json",
    "xGQA/annotations_machine-translate/few_shot/*/test.json",
    "XVNLI/annotations/*/test.jsonl",
    "XVNLI/annotations_machine-translate/*/test.jsonl",
    "xFlickrCO/annotations/*/test.jsonl",
    "xFlickrCO/annotations_machine-translate/*/test_gmt.jsonl",
    "nlvr2/annotations/test.jsonl",
    "marvl/zero_shot/annotations/*.jsonl",
    "marvl/zero_shot/annotations_machine-translate/*.jsonl",
)
# what a test needs besides its own files
SHARED_FILES = (
    "gqa/annotations/trainval_label2ans.json",
    "relations.json",
    "settings.json",
    "baselines.json",
    "vectors.txt",
    "wordnet",
    "dictionaries",
)


class Images:
    """Scenes and their images: `images.tar` and `scenes.jsonl` of a folder."""

    def __init__(self, folder: Path, size: int):
        folder.mkdir(exist_ok=True)
        self.folder, self.size = folder, size
        self.tar = tarfile.open(folder / "images.tar", "w")  # noqa: SIM115
        self.scenes: list[Scene] = []

    def add(self, scene: Scene) -> None:
        """Draw the scene; its image is in the tar as ID.webp."""
        placements = [placement for _, placement in scene.objects]
        data = draw_webp(placements, decode_drawings(scene.vendor), self.size)
        info = tarfile.TarInfo(f"{scene.id}.webp")
        info.size = len(data)
        self.tar.addfile(info, io.BytesIO(data))
        self.scenes.append(scene)

    def close(self) -> None:
        """End the tar, write the ground truth."""
        self.tar.close()
        with (self.folder / "scenes.jsonl").open("w", encoding="utf-8") as file:
            for scene in self.scenes:
                objects = [
                    {"label": label} | {k: v for k, v in placement._asdict().items() if k != "key"}
                    for label, placement in scene.objects
                ]
                record = {"id": scene.id, "vendor": scene.vendor, "objects": objects}
                file.write(json.dumps(record, ensure_ascii=False) + "\n")


class Writer:
    """Files under `out`: JSON, JSON lines, and every scene that is asked for, once, into `images.tar`; the
    tests' in the unseen style too."""

    def __init__(self, out: Path, size: int, seed: int):
        self.out, self.size, self.seed = out, size, seed
        self.images, self.style = Images(out, size), Images(out / STYLE, size)

    def scene(
        self, name: str, split: str, count: int, required: Sequence[str] = (), avoid: Sequence[str] = ()
    ) -> Scene:
        """Make a scene as `make_scene` does, and draw it."""
        scene = make_scene(name, split, self.size, self.seed, count, required, avoid)
        self.draw(scene, split)
        return scene

    def draw(self, scene: Scene, split: str) -> None:
        """Draw a scene."""
        self.images.add(scene)
        if split == "test":
            self.style.add(scene._replace(vendor=UNSEEN_VENDOR))

    def translations(self, translator: Translator, language: str) -> Iterator[tuple[str, Wording]]:
        """(beginning of the path, wording) of each variant of the translations: without errors, and with."""
        yield "", translator(language, self.seed)
        for folder, share in ERRORS.items():
            yield f"{folder}/", with_errors(translator, share)(language, self.seed)

    def json(self, path: str, value: Any) -> None:
        """Write a JSON file."""
        self.text(path, json.dumps(value, ensure_ascii=False, separators=(",", ":")) + "\n")

    def lines(self, path: str, records: Iterable[dict[str, Any]]) -> None:
        """Write a file of JSON lines."""
        self.text(path, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))

    def text(self, path: str, text: str) -> None:
        """Write a file, or the one member of a .zip, where IGLUE has one."""
        file = self.out / path
        file.parent.mkdir(parents=True, exist_ok=True)
        if file.suffix != ".zip":
            file.write_text(text, encoding="utf-8")
            return
        with zipfile.ZipFile(file, "w") as archive:
            # a ZipInfo is of 1980: the same bytes each time
            archive.writestr(zipfile.ZipInfo(file.stem), text, zipfile.ZIP_DEFLATED)

    def close(self) -> None:
        """End the tars; complete the other trees by links to the files here."""
        self.images.close()
        self.style.close()
        for pattern in (*TEST_FILES, *SHARED_FILES):
            for source in sorted(self.out.glob(pattern)):
                _link(source, self.out / STYLE / source.relative_to(self.out))
        for folder in ERRORS:
            self._complete(self.out / folder, self.out)

    def _complete(self, tree: Path, source: Path) -> None:
        """Link to all in `source` that `tree` has not."""
        for entry in sorted(source.iterdir()):
            if entry.name in (*ERRORS, STYLE):
                continue
            if not (tree / entry.name).exists():
                _link(entry, tree / entry.name)
            elif entry.is_dir():
                self._complete(tree / entry.name, entry)


def _link(source: Path, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(os.path.relpath(source, path.parent))
