"""`polyglance predict`: lines of JSON for many images, texts and questions, which equal the library's."""

import json
import shutil

import numpy as np
import pytest

import raylib.api as polyglance
from raylib.api import predict
from raylib.errors import UserError

TEXTS = ["ein Hund", "一只狗", "a house", "gato"]


@pytest.fixture
def folder(library, tmp_path, monkeypatch):
    """The library's folder, with files of texts and questions."""
    shutil.copytree(library, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "texts.txt").write_text("\n".join(TEXTS) + "\n", encoding="utf-8")
    (tmp_path / "images" / "deeper").mkdir()
    shutil.copy(tmp_path / "cat.png", tmp_path / "images" / "deeper" / "Cat.PNG")
    names = sorted(str(p.relative_to(tmp_path / "images")) for p in (tmp_path / "images").rglob("*.*"))
    questions = [{"id": i, "image": name, "question": f"is it {i}?"} for i, name in enumerate(names)]
    write("questions.jsonl", questions)
    return tmp_path


def write(name, records):
    with open(name, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)


def read(name):
    with open(name, encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def run(capsys, *arguments, code=0):
    assert predict.main([*map(str, arguments)]) == code
    return capsys.readouterr()


def test_predict_names_the_texts_that_fit_each_image(folder, capsys):
    run(
        capsys,
        "runs/sample",
        "--images",
        "images",
        "--texts",
        "texts.txt",
        "--out",
        "out.jsonl",
        "--top",
        "2",
    )
    lines = read("out.jsonl")
    assert [line["image"] for line in lines] == sorted(line["image"] for line in lines) and len(lines) == 9
    model = polyglance.load("runs/sample", "cpu")
    scores = model.similarity([f"images/{line['image']}" for line in lines], TEXTS)
    for line, row in zip(lines, scores, strict=True):
        order = row.argsort()[::-1][:2]
        assert [found["text"] for found in line["texts"]] == [TEXTS[i] for i in order]
        assert [found["score"] for found in line["texts"]] == pytest.approx(row[order].tolist(), abs=1e-6)


def test_predict_names_the_images_that_fit_each_text(folder, capsys):
    both = ("runs/sample", "--texts", "texts.txt", "--by", "texts", "--top", "0")
    run(capsys, "runs/sample", "--images", "images", "--out", "vectors.jsonl")
    run(capsys, *both, "--images", "images", "--out", "a.jsonl")
    run(capsys, *both, "--images", "vectors.jsonl", "--out", "b.jsonl")
    lines, names = read("a.jsonl"), [line["image"] for line in read("vectors.jsonl")]
    scores = polyglance.load("runs/sample", "cpu").similarity([f"images/{name}" for name in names], TEXTS)
    assert [line["text"] for line in lines] == TEXTS == [line["text"] for line in read("b.jsonl")]
    for i, (line, other) in enumerate(zip(lines, read("b.jsonl"), strict=True)):
        found = {image["image"]: image["score"] for image in line["images"]}
        assert found == pytest.approx(dict(zip(names, scores[:, i].tolist(), strict=True)), abs=1e-6)
        assert [f["score"] for f in line["images"]] == pytest.approx(
            [f["score"] for f in other["images"]], abs=1e-6
        )
        assert [f["score"] for f in line["images"]] == sorted(found.values(), reverse=True)


def test_predict_writes_embeddings_to_stdout(folder, capsysbinary):
    assert predict.main(["runs/sample", "--texts", "texts.txt"]) == 0
    lines = [json.loads(line) for line in capsysbinary.readouterr().out.splitlines()]
    assert [line["text"] for line in lines] == TEXTS
    expected = polyglance.load("runs/sample", "cpu").encode_text(TEXTS)
    np.testing.assert_allclose([line["embedding"] for line in lines], expected, atol=1e-7)


def test_predict_answers_questions(folder, capsys):
    run(
        capsys,
        "runs/sample_xgqa",
        "--questions",
        "questions.jsonl",
        "--images",
        "images",
        "--out",
        "out.jsonl",
    )
    lines, questions = read("out.jsonl"), read("questions.jsonl")
    model = polyglance.load("runs/sample_xgqa", "cpu")
    found = model.answer(
        [f"images/{q['image']}" for q in questions], [q["question"] for q in questions], top=5
    )
    for line, question, answers in zip(lines, questions, found, strict=True):
        assert {name: line[name] for name in question} == question
        assert [answer["text"] for answer in line["answers"]] == [answer.text for answer in answers]
        assert line["answers"][0]["probability"] == pytest.approx(answers[0].probability, abs=1e-6)


def test_predict_reads_pairs_of_images_and_of_sentences(folder, capsys):
    (folder / "blank.txt").write_text(" \n\n")
    write("pairs.jsonl", [{"images": ["cat.png", "dog.png"], "statement": "left is a cat"}])
    run(capsys, "runs/sample_marvl", "--questions", "pairs.jsonl", "--out", "pairs.out")
    expected = polyglance.load("runs/sample_marvl", "cpu").answer(("cat.png", "dog.png"), "left is a cat")
    assert read("pairs.out")[0]["answers"][0]["text"] == expected[0].text
    write("nli.jsonl", [{"premise": "a cat sleeps", "hypothesis": "an animal sleeps"}])
    run(capsys, "runs/sample_xvnli", "--questions", "nli.jsonl", "--out", "nli.out")
    relation = polyglance.load("runs/sample_xvnli", "cpu").entails(None, "a cat sleeps", "an animal sleeps")
    found = {answer["text"]: answer["probability"] for answer in read("nli.out")[0]["answers"]}
    assert found == pytest.approx(relation, abs=1e-6)


def test_predict_reads_region_features_from_a_store(folder, capsys, model):
    import torch

    from raylib.models import BACKBONES
    from raylib.models.finetuned import FinetuneModel

    torch.manual_seed(0)
    uc2 = BACKBONES["uc2"](BACKBONES["uc2"].sizes["tiny"])
    uc2.set_region_dim(6)
    FinetuneModel(uc2, ("yes", "no"), 1, 0.1, regions=6).save(folder / "uc2")
    shutil.copy(model / "tokenizer.model", folder / "uc2")
    (folder / "store").mkdir()
    regions = {"features": np.eye(3, 6, dtype=np.float32), "boxes": np.ones((3, 4)), "img_h": 8, "img_w": 8}
    np.savez(folder / "store" / "cat.npz", **regions)
    write("q.jsonl", [{"image": "cat.png", "question": "a?"}, {"image": "dog.png", "question": "a?"}])
    run(capsys, "uc2", "--questions", "q.jsonl", "--regions", "store", "--out", "out.jsonl")
    cat, dog = read("out.jsonl")
    expected = polyglance.load("uc2", "cpu").answer(regions, "a?")
    assert [answer["text"] for answer in cat["answers"]] == [answer.text for answer in expected]
    assert "no regions of image 'dog.png'" in dog["error"]


def test_predict_goes_on_after_whole_lines(folder, capsys):
    command = ("runs/sample", "--images", "images", "--texts", "texts.txt", "--out", "out.jsonl")
    run(capsys, *command)
    whole = (folder / "out.jsonl").read_bytes()
    lines = whole.splitlines(keepends=True)
    (folder / "out.jsonl").write_bytes(b"".join(lines[:4]) + lines[4][:17])  # killed in the fifth
    assert "out.jsonl: 9 lines" in run(capsys, *command).out
    assert (folder / "out.jsonl").read_bytes() == whole
    swapped = lines[:2] + lines[3:4] + lines[2:3] + lines[4:]  # a line of another input
    for damaged in (b"".join(lines[:5]) + b"\0" * 40, b"\0" * 40 + whole[40:], b"".join(swapped)):
        (folder / "out.jsonl").write_bytes(damaged)
        said = run(capsys, *command)
        assert (folder / "out.jsonl").read_bytes() == whole
        assert "was cut off by a crash and is predicted again" in said.err


def test_predict_predicts_a_batch_that_is_begun_as_a_whole(folder, capsys, monkeypatch):
    command = (
        "runs/sample",
        "--images",
        "images",
        "--texts",
        "texts.txt",
        "--out",
        "out.jsonl",
        "--batch",
        "4",
    )
    run(capsys, *command)
    whole = (folder / "out.jsonl").read_bytes()
    (folder / "out.jsonl").write_bytes(b"".join(whole.splitlines(keepends=True)[:6]))
    sizes = []
    predict_batch = predict.Predictor._predict
    monkeypatch.setattr(
        predict.Predictor, "_predict", lambda self, *a: sizes.append(len(a[0])) or predict_batch(self, *a)
    )
    run(capsys, *command)
    assert (folder / "out.jsonl").read_bytes() == whole and sizes == [4, 1]


def test_predict_refuses_to_go_on_with_something_else(folder, capsys):
    command = ("runs/sample", "--images", "images", "--texts", "texts.txt", "--out", "out.jsonl")
    run(capsys, *command)
    whole = (folder / "out.jsonl").read_bytes()
    for changed, line in (
        ([*command, "--top", "1"], "other settings.top"),
        (["runs/sample_xflickrco", *command[1:]], "other weights"),
    ):
        assert line in run(capsys, *changed, code=2).err
    (folder / "texts.txt").write_text("another\n")
    assert "other inputs, settings.texts" in run(capsys, *command, code=2).err
    (folder / "mine.jsonl").write_text("precious\n")
    assert "is there, without" in run(capsys, *command[:-1], "mine.jsonl", code=2).err
    assert (folder / "out.jsonl").read_bytes() == whole
    assert (folder / "mine.jsonl").read_text() == "precious\n"


def test_predict_refuses_embeddings_of_another_model(folder, capsys):
    run(capsys, "runs/sample", "--images", "images", "--out", "vectors.jsonl")
    by_texts = ("--images", "vectors.jsonl", "--texts", "texts.txt", "--by", "texts")
    run(capsys, "runs/sample_model", *by_texts)  # an export of the same weights
    assert "embeddings of another model" in run(capsys, "runs/sample_xflickrco", *by_texts, code=2).err


def test_predict_by_texts_names_images_that_are_left_out(folder, capsys):
    (folder / "few").mkdir()
    (folder / "few" / "bad.png").write_bytes(b"no image")
    command = ("runs/sample", "--images", "few", "--texts", "texts.txt", "--by", "texts")
    assert "1 of 1 images could not be read; the first: few/bad.png" in run(capsys, *command, code=2).err
    shutil.copy(folder / "cat.png", folder / "few")
    printed = run(capsys, *command)
    assert "1 of 2 images could not be read; the first: few/bad.png" in printed.err
    assert all(
        [i["image"] for i in json.loads(line)["images"]] == ["cat.png"] for line in printed.out.splitlines()
    )


def test_predict_begins_anew_where_nothing_was_written(folder, capsys):
    write("q.jsonl", [{"images": ["cat.png", "dog.png"], "question": "which?"}])
    command = ("runs/sample_xgqa", "--questions", "q.jsonl", "--out", "answers.jsonl")
    assert "with one image" in run(capsys, *command, code=2).err
    assert "cannot encode_text" in run(capsys, command[0], "--texts", "texts.txt", "--out", "x", code=2).err
    assert not [*folder.glob("x*")]
    write(
        "q.jsonl",
        [{"image": "cat.png", "question": "which?", "answers": ["red"], "error": "of a run before"}],
    )
    assert run(capsys, *command).err == ""
    (line,) = read("answers.jsonl")
    assert set(line) == {"image", "question", "answers"} and line["answers"][0]["text"] != "red"


def test_predict_has_a_line_for_a_broken_image(folder, capsys):
    broken = folder / "images" / "0broken.png"
    broken.write_bytes((folder / "cat.png").read_bytes()[:50])
    printed = run(capsys, "runs/sample", "--images", "images", "--out", "out.jsonl")
    lines = read("out.jsonl")
    (line,) = [line for line in lines if "embedding" not in line]
    assert len(lines) == 10 and line["image"] == "0broken.png" and "does not decode" in line["error"]
    assert printed.err == '1 of them could not be read: they have an "error"\n'
    write("questions.jsonl", [{"image": "none.png", "question": "what?"}])
    run(capsys, "runs/sample_xgqa", "--questions", "questions.jsonl", "--out", "answers.jsonl")
    assert "No such file" in read("answers.jsonl")[0]["error"]


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["runs/sample"], "give --questions, or --images, --texts or both"),
        (["runs/sample", "--questions", "q", "--texts", "t"], "give --questions, or --images"),
        (["runs/sample", "--texts", "texts.txt", "--by", "texts"], "--by texts needs --images and --texts"),
        (["runs/sample", "--texts", "texts.txt", "--ray"], "--ray wants --out DIR"),
        (["runs/sample", "--images", "images", "--texts", "blank.txt"], "blank.txt: no texts in it"),
        (["runs/sample", "--texts", "texts.txt", "--out", "s3://bucket/a"], "only --ray writes to a URL"),
        (["runs/sample", "--texts", "texts.txt", "--out", "images"], "--out images: no plain file"),
        (["runs/sample", "--texts", "texts.txt", "--out", "cat.png/a"], "cat.png/a: not written (File"),
        (["runs/sample", "--questions", "questions.jsonl"], "cannot classify; it can encode_image"),
        (["runs/sample_xgqa", "--images", "images"], "cannot encode_image; it can answer, classify"),
        (["runs/sample", "--images", "empty"], "empty: no images in it"),
        (["runs/sample", "--images", "nowhere"], "nowhere: no such folder; give one with images"),
        (["runs/sample", "--images", "cat.png"], "cat.png: no such folder; give one with images"),
        (["runs/sample_xgqa", "--questions", "pairs.jsonl"], "reads a text with one image, not with several"),
        (["runs/sample_marvl", "--questions", "premise.jsonl"], "reads a text with 2 images"),
        (["runs/sample_xgqa", "--questions", "none.jsonl"], "none.jsonl: no questions in it"),
        (["runs/sample_xgqa", "--questions", "word.jsonl"], "word.jsonl:1: images is no list; give [LEFT"),
        (["runs/sample_xgqa", "--questions", "nan.jsonl"], "nan.jsonl:2: a number that is not finite, or no"),
        (["runs/sample_xgqa", "--questions", "half.jsonl"], "half.jsonl:1: no JSON (half of a surrogate"),
        (["runs/sample_xgqa", "--questions", "bad.jsonl"], "bad.jsonl:2: wanted image, images or premise"),
        (["runs/sample_xgqa", "--questions", "mixed.jsonl"], "about its premise, after others"),
    ],
)  # fmt: skip
def test_predict_tells_mistakes_in_one_line(folder, capsys, arguments, line):
    (folder / "empty").mkdir()
    good = {"image": "cat.png", "question": "what?"}
    write("bad.jsonl", [good, {"image": "cat.png"}])
    (folder / "blank.txt").write_text(" \n\n")
    write("pairs.jsonl", [{"images": ["cat.png", "dog.png"], "question": "which?"}])
    write("premise.jsonl", [{"premise": "a", "hypothesis": "b"}])
    write("none.jsonl", [])
    write("word.jsonl", [{"images": "cat.png", "question": "what?"}])
    write("nan.jsonl", [good, {**good, "weight": float("nan")}])
    write("half.jsonl", [{**good, "question": "\ud83d"}])
    write("mixed.jsonl", [good, {"premise": "a", "hypothesis": "b"}])
    error = run(capsys, *arguments, code=2).err
    assert line in error and error.count("\n") == 1


@pytest.mark.slow
def test_predict_on_ray_writes_parts_and_goes_on(folder, capsys, monkeypatch):
    """A real local Ray: actors load the model, parts hold the lines of a run without Ray, and one that is
    missing is written again, the others are not."""
    monkeypatch.setattr(predict, "PART", 4)
    command = ("runs/sample", "--images", "images", "--texts", "texts.txt")
    run(capsys, *command, "--out", "alone.jsonl")
    (folder / "images" / "broken.png").write_bytes(b"nothing")
    assert "parts: 10 lines" in run(capsys, *command, "--out", "parts", "--ray").out
    files = sorted((folder / "parts").iterdir())
    assert [file.name for file in files] == [predict.part_name(i) for i in range(3)]
    lines = [line for file in files for line in read(file)]
    good = [line for line in lines if "error" not in line]
    for line, other in zip(good, read("alone.jsonl"), strict=True):
        assert line["image"] == other["image"]
        assert [t["score"] for t in line["texts"]] == pytest.approx([t["score"] for t in other["texts"]])
    times = [file.stat().st_mtime_ns for file in files]
    files[1].unlink()
    printed = run(capsys, *command, "--out", "parts", "--ray")
    assert "parts: 10 lines" in printed.out
    assert [line for file in files for line in read(file)] == lines
    assert [file.stat().st_mtime_ns for file in (files[0], files[2])] == [times[0], times[2]]


def test_predict_refuses_a_file_that_another_process_writes(tmp_path):
    out, inputs = tmp_path / "folder" / "out.jsonl", [{"text": "a"}, {"text": "b"}]
    with predict.locked_output(out) as file:
        with (
            pytest.raises(UserError, match="out.jsonl: another process is writing it"),
            predict.locked_output(out),
        ):
            pass
        assert predict.write_local(file, lambda done: iter([inputs[done:]]), inputs, 1) == (2, 0)
    assert read(out) == inputs
    with pytest.raises(UserError, match="refused"), predict.locked_output(tmp_path / "b.jsonl"):
        raise UserError("refused")
    assert not (tmp_path / "b.jsonl").exists(), "what was refused leaves no file"


@pytest.mark.parametrize(
    "content",
    [b"", b"[1]", b"null", b'{"a": 1, "a": 2}', b"[" * 5000, b"\xff", b"version https://git-lfs.github"],
)
def test_predict_record_beside_its_output_that_is_damaged_is_a_line(content, folder, capsys):
    command = ["runs/sample", "--texts", "texts.txt", "--out", "out.jsonl"]
    assert predict.main(command) == 0
    (folder / "out.jsonl.run.json").write_bytes(content)
    before = (folder / "out.jsonl").read_bytes()
    capsys.readouterr()
    assert predict.main(command) == 2
    line = capsys.readouterr().err
    assert (
        line.startswith("error: out.jsonl.run.json: not to be read as the record of ")
        and line.count("\n") == 1
    )
    assert (folder / "out.jsonl").read_bytes() == before
