"""Use a trained model on many images, texts or questions, and write a line of JSON for each.

    python -m raylib.api.predict MODEL --images DIR --texts FILE [--by texts]
    python -m raylib.api.predict MODEL --images DIR | --texts FILE
    python -m raylib.api.predict MODEL --questions FILE.jsonl [--images DIR]

The first writes the texts that fit each image best, or the images that fit each text; the second embeddings;
the third answers, or entailment.

DIR is a folder or a URL (s3://bucket/images), with all that is below; or embeddings that this command wrote.
A text file has a text a line. Questions are JSON lines {"image", "question"}; of two images {"images": [LEFT,
RIGHT], ...}; of a pair of sentences {"premise", "hypothesis"}. Their images lie in DIR, else beside the file.

What cannot be read has an "error" in its line. Started again, the command goes on after the lines of --out
that are there. With --ray, workers of a Ray cluster share the work, and --out is a folder or a URL that gets
a file for each 1,000 inputs.
"""

import hashlib
import itertools
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Literal

import numpy as np

from finetune.formats import get_field, parse_number, shorten, stream_jsonl, stream_lines
from raylib.command import command_parser, entry_point, local_path
from raylib.config import Config, differing_paths, validate
from raylib.data.images import is_image, load_image
from raylib.display import progress
from raylib.errors import UserError, name_errors, name_some, reading
from raylib.fileio import is_unicode, read_json_object, require_unicode
from raylib.processes import try_lock
from raylib.settings import MaxPixels
from raylib.strict_json import check_shape, parse_json

if TYPE_CHECKING:  # PyTorch, which help needs not
    from raylib.api.model import Model

BATCH, PART = 64, 1000  # inputs at a time, by default; in a file of a Ray worker's
QUESTIONS = ("question", "hypothesis", "statement", "text")  # what a line may call its text


class PredictConfig(Config):
    """All that a worker must know. images: the folder or URL that names of images are in; texts: those that
    images are compared with."""

    takes_urls = ("images", "texts")
    model: str
    device: str | None = None
    dtype: str | None = None
    language: str | None = None
    backbone: str = "unified"
    vision: str | None = None
    task: Literal["images", "texts", "similarity", "questions"]
    images: str | None = None
    regions: str | None = None
    texts: tuple[str, ...] = ()
    top: int = 5
    batch: int = BATCH
    max_pixels: MaxPixels | None = None


class Predictor:
    """A loaded model; `predictor(items)` are the lines of some inputs."""

    def __init__(self, config: PredictConfig):
        from finetune.stores.regions import open_regions

        self.config, self.model = config, open_model(config)
        self.regions = open_regions(config.regions) if config.regions else None
        if self.regions:
            self.regions.width = self.model.region_dim
        self.texts = self.model.encode_text(config.texts) if config.task == "similarity" else np.empty(0)

    def __call__(self, items: Iterable[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
        """Lines of the items, a batch at a time, in their order."""
        from raylib.data.loading import batched, prefetch

        for batch, images in prefetch(map(self._read, batched(items, self.config.batch))):
            good = [i for i, found in enumerate(images) if not isinstance(found, UserError)]
            values = self._predict([batch[i] for i in good], [images[i] for i in good]) if good else []
            known = dict(zip(good, values, strict=True))
            yield [
                {**item, **(known[i] if i in known else {"error": str(images[i])})}
                for i, item in enumerate(batch)
            ]

    def _predict(self, items: list[dict[str, Any]], images: list[Any]) -> list[dict[str, Any]]:
        c, model = self.config, self.model
        size = {"batch_size": c.batch}
        if c.task == "texts":
            return [
                {"embedding": _floats(v)} for v in model.encode_text([item["text"] for item in items], **size)
            ]
        if c.task == "questions":
            premises = [item["premise"] for item in items] if "premise" in items[0] else None
            about = None if premises else [each if len(each) > 1 else each[0] for each in images]
            texts = [item[name_of_text(item)] for item in items]
            found = model.classify(texts, about, premise=premises, top=c.top or len(model.labels), **size)
            return [{"answers": [answer._asdict() for answer in answers]} for answers in found]
        vectors = model.encode_image([each[0] for each in images], **size)
        if c.task == "images":
            return [{"embedding": _floats(vector)} for vector in vectors]
        return [{"texts": found} for found in best(vectors @ self.texts.T, c.texts, c.top, "text")]

    def _read(self, batch: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[tuple | UserError]]:
        """The batch, and the images of each of its items, or the reason why there are none."""
        # one of which several questions are asked is read once, and encoded once
        names = dict.fromkeys(name for item in batch for name in names_of_images(item))
        with ThreadPoolExecutor() as threads:
            found = dict(zip(names, threads.map(self._image, names), strict=True))
        images = [tuple(found[name] for name in names_of_images(item)) for item in batch]
        return batch, [next((i for i in each if isinstance(i, UserError)), each) for each in images]

    def _image(self, name: str) -> Any:
        try:
            if self.regions:
                return self.regions.read(name)
            is_whole = "://" in name or Path(name).is_absolute()
            path = name if is_whole else f"{(self.config.images or '.').rstrip('/')}/{name}"
            image = load_image(path, max_pixels=self.model.max_pixels)
        except UserError as error:
            return error
        # as small as the model takes it, so that a batch of large ones is not kept in memory
        return self.model.prepare(image)


def open_model(config: PredictConfig) -> "Model":
    """Load the model.

    Raises:
        UserError: it is none, or cannot do what is asked.
    """
    from raylib.api.loading import load_model

    c = config
    model = load_model(
        c.model,
        c.device,
        c.dtype,
        language=c.language,
        backbone=c.backbone,
        vision=c.vision,
        max_pixels=c.max_pixels,
    )
    methods = {"questions": "classify", "texts": "encode_text"}
    model.require(methods.get(c.task, "encode_image"))
    model.show_progress = False  # the command shows that of all inputs
    model.less_memory = f"lower --batch {c.batch}, or set --dtype bfloat16"
    return model


class PartWorker:
    """A worker of Ray Data's: `worker(part)` writes the file of a part, and returns what it counted."""

    def __init__(self, config: PredictConfig, out: str):
        self.predictor, self.out = Predictor(config), out

    def __call__(self, part: dict[str, Any]) -> dict[str, int]:
        import fsspec

        lines = list(itertools.chain.from_iterable(self.predictor(part["items"])))
        files, path = fsspec.core.url_to_fs(f"{self.out}/{part_name(part['number'])}")
        # of a worker that is killed nothing is there
        with files.transaction, files.open(path, "wb") as file:
            file.write(_encode_lines(lines))
        return {"lines": len(lines), "errors": sum("error" in line for line in lines)}


def part_name(number: int) -> str:
    """The name of a part's file."""
    return f"part-{number:06d}.jsonl"


def names_of_images(item: dict[str, Any]) -> tuple[str, ...]:
    """The images that an input is about."""
    return tuple(item["images"]) if "images" in item else (item["image"],) if "image" in item else ()


def name_of_text(item: dict[str, Any]) -> str:
    """The field of a question's text; "" if it has none."""
    return next((name for name in QUESTIONS if name in item), "")


def best(scores: np.ndarray, names: Sequence[str], top: int, field: str) -> list[list[dict[str, Any]]]:
    """Of each row of `scores` (n, names), its best `top`, or all for 0, as [{field: name, "score"}]."""
    import torch

    count = min(top or len(names), len(names))
    values, places = torch.as_tensor(scores).topk(count, dim=1)
    return [
        [{field: names[j], "score": round(v, 7)} for j, v in zip(row, found, strict=True)]
        for row, found in zip(places.tolist(), values.tolist(), strict=True)
    ]


def _floats(vector: np.ndarray) -> list[float]:
    return [round(value, 8) for value in vector.tolist()]


def _encode_lines(lines: Iterable[dict[str, Any]]) -> bytes:
    text = (json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n" for line in lines)
    return "".join(text).encode()


def read_questions(path: Path) -> list[dict[str, Any]]:
    """The records of a file of questions.

    Raises:
        UserError: there are none; one has no text, neither an image nor a premise, other fields than the
            first, or what UTF-8 or JSON cannot write.
    """
    records, kind = [], None
    expected = f"wanted image, images or premise, and {', '.join(QUESTIONS[:-1])} or {QUESTIONS[-1]}"
    for where, record in stream_jsonl(path):
        images = record.get("images", [])
        if not isinstance(images, list):
            raise UserError(f"{where}: images is no list; give [LEFT, RIGHT], or one as image")
        names = [record.get("image"), *images, record.get("premise")]
        if not name_of_text(record) or not any(names):
            raise UserError(f"{where}: {expected}; found {shorten(list(record)) if record else 'nothing'}")
        if any(not isinstance(name, str) for name in (*filter(None, names), record[name_of_text(record)])):
            raise UserError(f"{where}: a field is no string; {expected}")
        about = "premise" if "premise" in record else f"images ({len(names_of_images(record))})"
        if kind not in (None, about):
            raise UserError(f"{where}: about its {about}, after others about their {kind}; split the file")
        kind = about
        # a file of lines that this command wrote may be asked again
        record = {key: value for key, value in record.items() if key not in ("answers", "error")}
        try:
            _encode_lines([record])
        except ValueError as error:
            raise UserError(f"{where}: a number that is not finite, or no Unicode ({error})") from None
        records.append(record)
    if not records:
        raise UserError(f"{path}: no questions in it")
    return records


def list_images(root: str) -> list[dict[str, Any]]:
    """{"image": name} of each image below a folder or a URL, in order.

    Raises:
        UserError: no such folder, no images in it, a package for its scheme is missing.
    """
    import fsspec

    try:
        files, path = fsspec.core.url_to_fs(root)
        found, is_folder = files.find(path), files.isdir(path)
    except (ImportError, ValueError, OSError) as error:
        raise UserError(f"{root}: {' '.join(str(error).split())}") from None
    if not is_folder:
        raise UserError(f"{root}: no such folder; give one with images, or embeddings that predict wrote")
    images = (name for name in found if is_image(name.rpartition("/")[2].lower()))
    names = [require_unicode(name.removeprefix(path).lstrip("/"), root) for name in images]
    if not names:
        raise UserError(f"{root}: no images in it")
    return [{"image": name} for name in sorted(names)]


def read_embeddings(path: Path) -> tuple[list[str], np.ndarray]:
    """Names and vectors of the images that this command wrote into a file, or with --ray into a folder."""
    names: list[str] = []
    vectors: list[np.ndarray] = []
    for file in sorted(path.glob("part-*.jsonl")) if path.is_dir() else [path]:
        for where, line in stream_jsonl(file):
            if "error" in line:
                continue
            if "image" not in line or "embedding" not in line:
                raise UserError(f"{where}: no image with its embedding, as --images alone writes them")
            names.append(get_field(line, "image", str, where))
            vector = get_field(line, "embedding", list, where)
            if not vector or len(vector) != len(vectors[0] if vectors else vector):
                raise UserError(f"{where}: {len(vector)} numbers, as no other image has; predict them anew")
            numbers = [parse_number(value, where, "a number of the embedding") for value in vector]
            with np.errstate(over="ignore"):
                vectors.append(np.array(numbers, np.float32))
            if not np.isfinite(vectors[-1]).all():
                raise UserError(f"{where}: a number of an embedding is not finite; predict it anew")
    if not names:
        raise UserError(f"{path}: no embeddings in it")
    return names, np.stack(vectors)


def _by_texts(predictor: Predictor, texts: list[str], embeddings: Path | None) -> Iterator[list[dict]]:
    """A line for each text, with the images that fit it best."""
    from raylib.data.loading import batched

    config = predictor.config
    if embeddings:
        names, vectors = read_embeddings(embeddings)
    else:
        items = list_images(str(config.images))
        shown = progress(items, "encode images", unit="images")
        lines = list(itertools.chain.from_iterable(predictor(shown)))
        good = [line for line in lines if "error" not in line]
        if bad := [line["error"] for line in lines if "error" in line]:
            summary = f"{len(bad):,} of {len(lines):,} images could not be read; the first: {bad[0]}"
            if not good:
                raise UserError(summary)
            print(f"{summary}; they are left out", file=sys.stderr)
        names, vectors = [line["image"] for line in good], np.array([line["embedding"] for line in good])
    for batch in batched(texts, config.batch):
        scores = predictor.model.encode_text(batch) @ vectors.T.astype(np.float32)
        found = best(scores, names, config.top, "image")
        yield [{"text": text, "images": images} for text, images in zip(batch, found, strict=True)]


def hold_checkpoint(config: PredictConfig) -> PredictConfig:
    """Let all parts of a prediction, and its note, be of one checkpoint of a run that is under way."""
    from raylib.api.loading import language_part
    from raylib.models.finetuned import hold_model

    model = language_part(Path(config.model), config.language)
    held = hold_model(model)
    return config if held == model else config.model_copy(update={"model": str(held), "language": None})


def hash_model(config: PredictConfig) -> dict[str, str]:
    """Digests of the weights and of the tokenizer, which tell a model from others."""
    from raylib.api.loading import language_part
    from raylib.models.finetuned import tokenizer_at, weights_of
    from raylib.provenance import hash_path

    model = language_part(Path(config.model), config.language)
    return {"weights": hash_path(weights_of(model)), "tokenizer": hash_path(tokenizer_at(model))}


def require_same_model(embeddings: Path, config: PredictConfig) -> None:
    """Check that embeddings are of this model, as far as the note beside them says.

    Raises:
        UserError: they are of another; cosines with them would mean nothing.
    """
    note = Path(f"{str(embeddings).rstrip('/')}.run.json")
    if not os.path.lexists(note):
        return
    stored = read_json_object(note, ("weights",), advice="encode the images anew")
    if stored["weights"] != hash_model(config)["weights"]:
        raise UserError(
            f"{embeddings}: embeddings of another model than {config.model}; encode the images anew"
        )


def open_output(out: str, config: PredictConfig, inputs: Any, preprocessing: dict[str, Any] | None) -> None:
    """Note beside `out` what it is made of. preprocessing: of images.

    Raises:
        UserError: it was begun with another model, other inputs or settings; something else lies there; it
            cannot be written.
    """
    exclude = {"model", "device", "images", "batch"} | (set() if config.max_pixels else {"max_pixels"})
    now = {
        "settings": config.model_dump(mode="json", exclude=exclude),
        **hash_model(config),
        "inputs": hashlib.sha256(json.dumps(inputs).encode()).hexdigest(),
        "preprocessing": preprocessing,
    }
    try:
        with name_errors(out):
            _note(out, now)
    except (OSError, ImportError, ValueError) as error:
        reason = (isinstance(error, OSError) and error.strerror) or " ".join(str(error).split())
        raise UserError(f"{out}: not written ({reason}); give another --out") from error


def _note(out: str, now: dict[str, Any]) -> None:
    import fsspec

    files, path = fsspec.core.url_to_fs(f"{out}.run.json")
    output = path.removesuffix(".run.json")
    # of a start that failed before its first line nothing is lost
    is_begun = bool(files.ls(output) if files.isdir(output) else files.exists(output) and files.size(output))
    if is_begun and files.exists(path):
        with reading(f"{out}.run.json", "the record of what its file is made of", "give another --out"):
            if not files.isfile(path):  # a pipe would be waited for
                raise ValueError("no plain file")
            before = parse_json(files.cat_file(path))
            check_shape(before, dict[str, Any])
        before.setdefault("preprocessing", now["preprocessing"])  # older versions did not note it
        if changed := differing_paths(before, now):
            raise UserError(f"{out} was begun with other {name_some(changed)}; give another --out")
        return
    if is_begun:
        raise UserError(f"{out} is there, without the {out}.run.json of this command; give another --out")
    files.makedirs(files._parent(path), exist_ok=True)
    files.pipe_file(path, (json.dumps(now, ensure_ascii=False, indent=2) + "\n").encode())


@contextmanager
def locked_output(out: Path | None) -> Iterator[BinaryIO | None]:
    """The file to append to, which this process alone writes in the block; None: no file is written here.

    Raises:
        UserError: another process is writing it.
    """
    if out is None:
        yield None
        return
    if out.is_symlink():
        raise UserError(f"--out {out}: a link; give the file that it leads to")
    try:
        with name_errors(out):
            out.parent.mkdir(parents=True, exist_ok=True)
            file = open(out, "a+b")  # noqa: SIM115 - closed below
    except OSError as error:
        raise UserError(f"{out}: not written ({error.strerror or error}); give another --out") from error
    with file:
        if try_lock(file.fileno()) is False:
            raise UserError(f"{out}: another process is writing it; wait for its end, or give another --out")
        try:
            yield file
        except BaseException:
            if not file.seek(0, os.SEEK_END):  # it was made here, or says nothing
                out.unlink(missing_ok=True)
            raise


def write_local(
    file: BinaryIO | None,
    lines_from: Callable[[int], Iterable[list[dict[str, Any]]]],
    inputs: Sequence[dict[str, Any]],
    batch: int,
) -> tuple[int, int]:
    """Append the lines of the inputs from the first on that a file lacks, or write all to stdout. Returns how
    many there are then, and how many of them have an error."""
    done, errors = (0, 0) if file is None else _keep_whole_batches(file, inputs, batch)
    out = sys.stdout.buffer if file is None else file
    for lines in progress(lines_from(done), "predict", len(inputs) - done, "inputs", len):
        out.write(_encode_lines(lines))
        out.flush()
        done, errors = done + len(lines), errors + sum("error" in line for line in lines)
    return done, errors


def _keep_whole_batches(file: BinaryIO, inputs: Sequence[dict[str, Any]], batch: int) -> tuple[int, int]:
    """Cut off what follows the last batch whose lines are whole, each of its own input: a crash may have cut
    it off, or left zero bytes. Returns how many lines are left, and how many of them have an error."""
    file.seek(0)
    done = errors = end = kept = kept_errors = kept_end = 0
    for item, line in zip(inputs, file, strict=False):
        try:
            record = parse_json(line) if line.endswith(b"\n") else {}
        except ValueError:
            break
        if not isinstance(record, dict) or any(record.get(name) != value for name, value in item.items()):
            break
        done, errors, end = done + 1, errors + ("error" in record), end + len(line)
        # a batch that is begun is predicted again as a whole: others would be other batches than without the
        # interruption
        if done % batch == 0 or done == len(inputs):
            kept, kept_errors, kept_end = done, errors, end
    if file.seek(0, os.SEEK_END) > end:
        print(f"{file.name}: line {done + 1} was cut off by a crash and is predicted again", file=sys.stderr)
    file.truncate(kept_end)
    return kept, kept_errors


def write_on_ray(
    config: PredictConfig, items: list[dict[str, Any]], out: str, workers: int
) -> tuple[int, int]:
    """Write the files of parts that are not there yet, on `workers` of a Ray cluster."""
    import fsspec

    from raylib.data.loading import batched
    from raylib.launch import map_parts

    files, path = fsspec.core.url_to_fs(out)
    files.makedirs(path, exist_ok=True)
    existing = {name.rpartition("/")[2] for name in files.ls(path, detail=False)}
    parts: list[dict[str, Any]] = [
        {"number": i, "items": batch} for i, batch in enumerate(batched(items, PART))
    ]
    missing = [part for part in parts if part_name(part["number"]) not in existing]
    # workers may stand elsewhere
    places = {
        name: _absolute(value) for name, value in config if name in ("model", "images", "regions", "vision")
    }
    config, out = config.model_copy(update=places), str(_absolute(out))
    counts = map_parts(PartWorker, (config, out), missing, workers)
    errors = 0
    for count in progress(counts, "predict", len(items), "inputs", lambda count: count["lines"]):
        errors += count["errors"]
    return len(items), errors


def _absolute(path: str | None) -> str | None:
    return str(Path(path).absolute()) if path and "://" not in path else path


@entry_point("the same command goes on")
def main(arguments: Sequence[str]) -> int:
    """Run a command line."""
    given = _parse(arguments)
    texts = [line.strip() for _, line in stream_lines(given.texts)] if given.texts else []
    if given.texts and not texts:
        raise UserError(f"{given.texts}: no texts in it; give a text a line")
    by_texts = given.by == "texts"
    embeddings = Path(given.images) if by_texts and _holds_embeddings(given.images) else None
    task: Literal["images", "texts", "similarity", "questions"] = "texts"
    items: list[dict[str, Any]] = [{"text": text} for text in texts]
    if given.questions:
        task, items = "questions", read_questions(given.questions)
    elif given.images and not embeddings:
        task, items = "similarity" if texts and not by_texts else "images", list_images(given.images)
    fields = {name: value for name, value in vars(given).items() if name in PredictConfig.model_fields}
    if given.questions and not given.images:
        fields["images"] = str(given.questions.parent)
    fields |= {"task": task, "texts": tuple(texts) if task == "similarity" else ()}
    config = hold_checkpoint(validate(PredictConfig, fields, "the command line"))
    if embeddings:
        require_same_model(embeddings, config)
    # what is wrong with the model is told before a file is made, or Ray starts
    predictor = None if given.ray else Predictor(config)
    model = predictor.model if predictor else open_model(config.model_copy(update={"device": "cpu"}))
    preprocessing = model.backbone.describe_preprocessing()
    with locked_output(None if given.ray or not given.out else Path(given.out)) as file:
        if given.out:
            from raylib.provenance import hash_path

            open_output(
                given.out, config, [items, texts, embeddings and hash_path(embeddings)], preprocessing
            )
        if predictor is None:
            done, errors = write_on_ray(config, items, given.out, given.workers)
        elif by_texts:
            inputs = [{"text": text} for text in texts]
            done, errors = write_local(
                file, lambda done: _by_texts(predictor, texts[done:], embeddings), inputs, config.batch
            )
        else:
            done, errors = write_local(file, lambda done: predictor(items[done:]), items, config.batch)
    if given.out:
        print(f"{given.out}: {done:,} lines")
    if errors:
        print(f'{errors:,} of them could not be read: they have an "error"', file=sys.stderr)
    return 0


def _holds_embeddings(images: str) -> bool:
    return Path(images).suffix == ".jsonl" or any(Path(images).glob("part-*.jsonl"))


def _parse(arguments: Sequence[str]) -> Any:
    parser = command_parser("raylib.api.predict", __doc__)
    parser.add_argument("model", help="a run, an export, a checkpoint, or published weights")
    parser.add_argument("--images", metavar="DIR", help="a folder or URL of images, or embeddings of them")
    parser.add_argument("--texts", type=local_path, metavar="FILE", help="a text a line")
    parser.add_argument("--questions", type=local_path, metavar="FILE", help="JSON lines")
    parser.add_argument("--regions", metavar="STORE", help="region features, for models that read these")
    parser.add_argument("--out", metavar="FILE", help="instead of stdout; with --ray a folder or a URL")
    parser.add_argument(
        "--by", choices=("images", "texts"), default="images", help="a line for each of these"
    )
    parser.add_argument("--top", type=int, default=5, help="how many are named, the best first; 0: all (5)")
    parser.add_argument("--batch", type=int, default=BATCH, help=f"inputs at a time ({BATCH})")
    parser.add_argument("--language", help="of a run that trained a model for each")
    parser.add_argument("--backbone", default="unified", help="what published weights become")
    parser.add_argument("--vision", help="the folder of their image encoder")
    parser.add_argument("--device", help="such as cuda:1 (a GPU if there is one)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="(as the model was evaluated)")
    parser.add_argument(
        "--max-pixels", type=int, help="of an image; a larger one has an error (as the run had it)"
    )
    parser.add_argument(
        "--ray", action="store_true", help="on the cluster of RAY_ADDRESS, or one started here"
    )
    parser.add_argument("--workers", type=int, default=2, help="of Ray, each with a GPU if there are any (2)")
    given = parser.parse_args(arguments)
    if given.out == "":
        raise UserError("--out has no name; give a file")
    if bool(given.questions) == bool(given.texts) and (given.questions or not given.images):
        raise UserError("give --questions, or --images, --texts or both")
    if given.by == "texts" and not (given.images and given.texts):
        raise UserError("--by texts needs --images and --texts")
    if given.ray and (given.by == "texts" or not given.out):
        raise UserError("--ray wants --out DIR, and no --by texts, which reads what it writes of --images")
    if given.out and "://" in given.out and not given.ray:
        raise UserError(f"--out {given.out}: only --ray writes to a URL; give a file, or --ray")
    if given.out and not given.ray and Path(given.out).exists() and not Path(given.out).is_file():
        raise UserError(f"--out {given.out}: no plain file; give another, or --ray for a folder")
    for path in filter(None, (given.model, given.images, given.regions, given.vision, given.out)):
        if not is_unicode(path):
            raise UserError(f"{path}: its name is not in UTF-8; rename it")
    if given.top < 0 or given.workers < 1 or given.batch < 1:
        raise UserError("--top is 0 or more, --workers and --batch 1 or more")
    return given


if __name__ == "__main__":
    sys.exit(main())
