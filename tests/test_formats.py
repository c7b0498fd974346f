"""Readers against small files in the official formats."""

import gzip
import json
import pickle
import tracemalloc

import pytest

from finetune.formats import (
    Captioned,
    Example,
    answers,
    read_coco,
    read_coco_cn,
    read_flickr,
    read_karpathy,
    read_multi30k,
    read_wit,
    stream_list,
    stream_members,
)
from raylib.errors import UserError


def lines(path, *records):
    path.write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
    return path


def write(path, value):
    path.write_text(json.dumps(value), encoding="utf-8")
    return path


GQA = {
    "02": {
        "question": "Is it?",
        "answer": "yes",
        "imageId": "n16",
        "isBalanced": True,
        "types": {"structural": "verify"},
    }
}
XVNLI = {
    "gold_label": "neutral",
    "sentence1": "A man.",
    "sentence2": "Ein Mann.",
    "captionID": "1.jpg#0",
    "pairID": "1.jpg#0r1n",
    "Flikr30kID": "1",
}
MARVL = {
    "concept": "1-Angsa",
    "language": "id",
    "caption": "Dua.",
    "left_img": "1-5.jpg",
    "right_img": "1-6.jpg",
    "chapter": "Animal",
    "id": "id-0",
    "label": False,
}
NLVR2 = {"sentence": "Two dogs.", "identifier": "dev-850-0-1", "label": "True"}
FLICKR = {"sentences": ["a", "b"], "id": "7", "img_path": "7.jpg"}
WIT = {
    "wit_ix": 12,
    "caption_reference_description": "A church",
    "image_url": "u",
    "page_url": "p",
    "language": "et",
}


def test_gqa_dict_and_list_forms_are_read(tmp_path):
    assert list(answers.read_gqa(write(tmp_path / "a.json", GQA))) == [
        Example("02", ("Is it?",), ("n16",), {"yes": 1.0}, "verify")
    ]
    listed = [
        {"img_id": "n1", "label": {"cat": 1, "dog": 0.3}, "question_id": 5, "sent": "What?"},
        {"img_id": "n2", "question_id": 6, "sent": "Who?"},
    ]
    found = list(answers.read_gqa(write(tmp_path / "b.json", listed)))
    assert found == [
        Example("5", ("What?",), ("n1",), {"cat": 1.0, "dog": 0.3}),
        Example("6", ("Who?",), ("n2",), {}),
    ]


def test_nli_formats_are_read(tmp_path):
    found = list(answers.read_xvnli(lines(tmp_path / "x.jsonl", XVNLI, {**XVNLI, "gold_label": "-"})))
    assert (
        found[0] == Example("1.jpg#0r1n", ("Ein Mann.",), ("1",), {"neutral": 1.0}) and found[1].labels == {}
    )
    snli = {"gold_label": "entailment", "sentence1": "A", "sentence2": "B", "pairID": "p"}
    assert list(answers.read_snli(lines(tmp_path / "s.jsonl", snli))) == [
        Example("p", ("A", "B"), (), {"entailment": 1.0})
    ]
    table = (
        "language\tgold_label\tsentence1\tsentence2\tpairID\n"
        "ar\tneutral\tA\tB\t1\nde\tcontradiction\tC\tD\t2\n"
    )
    (tmp_path / "xnli.tsv").write_text(table)
    assert list(answers.read_xnli(tmp_path / "xnli.tsv", "de")) == [
        Example("2", ("C", "D"), (), {"contradiction": 1.0})
    ]
    with pytest.raises(UserError, match="no row in language 'sw'"):
        list(answers.read_xnli(tmp_path / "xnli.tsv", "sw"))
    (tmp_path / "multi.tsv").write_text("premise\thypo\tlabel\nA\tB\tcontradictory\n")
    assert next(answers.read_multinli(tmp_path / "multi.tsv")).labels == {"contradiction": 1.0}


def test_nlvr2_and_marvl_pairs_are_read(tmp_path):
    assert list(answers.read_nlvr2(lines(tmp_path / "n.jsonl", NLVR2))) == [
        Example("dev-850-0-1", ("Two dogs.",), ("dev-850-0-img0", "dev-850-0-img1"), {"True": 1.0})
    ]
    assert list(answers.read_marvl(lines(tmp_path / "m.jsonl", MARVL), "id")) == [
        Example("id-0", ("Dua.",), ("id/1-5.jpg", "id/1-6.jpg"), {"False": 1.0}, "Animal")
    ]


def test_flickr_and_wit_captions_are_read(tmp_path):
    assert list(read_flickr(lines(tmp_path / "f.jsonl", FLICKR))) == [Captioned("7.jpg", ("a", "b"))]
    assert list(read_wit(lines(tmp_path / "w.jsonl", WIT))) == [Captioned("12", ("A church",), source="u")]


READERS = [
    (answers.read_gqa, "a.json", {"02": GQA["02"]}),
    (answers.read_xvnli, "x.jsonl", XVNLI),
    (answers.read_marvl, "m.jsonl", MARVL),
    (answers.read_nlvr2, "n.jsonl", NLVR2),
    (read_flickr, "f.jsonl", FLICKR),
    (read_wit, "w.jsonl", WIT),
]
NEEDED = {
    "a.json": "imageId",
    "x.jsonl": "gold_label",
    "m.jsonl": "left_img",
    "n.jsonl": "identifier",
    "f.jsonl": "img_path",
    "w.jsonl": "caption_reference_description",
}


@pytest.mark.parametrize(("read", "name", "record"), READERS)
def test_readers_missing_field_is_named_with_file_and_line(tmp_path, read, name, record):
    field, path = NEEDED[name], tmp_path / name
    if name == "a.json":
        write(path, {"02": {k: v for k, v in record["02"].items() if k != field}})
    else:
        lines(path, record, {k: v for k, v in record.items() if k != field})
    with pytest.raises(UserError) as e:
        list(read(path))
    assert f"'{field}'" in str(e.value) and ("02" if name == "a.json" else f"{name}:2") in str(e.value)


def test_readers_unknown_label_is_named(tmp_path):
    with pytest.raises(UserError, match=r"x.jsonl:1: unknown label 'entailed'"):
        list(answers.read_xvnli(lines(tmp_path / "x.jsonl", {**XVNLI, "gold_label": "entailed"})))
    with pytest.raises(UserError, match="neither True nor False"):
        list(answers.read_nlvr2(lines(tmp_path / "n.jsonl", {**NLVR2, "label": "maybe"})))


@pytest.mark.parametrize("text", ['{"1": {"a": 1}, "2": {', '{"1" 2}', "[1, 2", "3", '{"1": 2} '[:7]])
def test_json_stream_broken_file_is_one_line_error(tmp_path, text):
    (tmp_path / "b.json").write_text(text)
    with pytest.raises(UserError, match="b.json: (broken JSON after|not to be read as JSON)"):
        list(stream_members(tmp_path / "b.json"))


def test_json_stream_equals_json_load(tmp_path, monkeypatch):
    monkeypatch.setattr("raylib.fileio.CHUNK", 7)  # members across many chunks
    values = {f"k{i}": {"text": "ä" * (i % 23), "number": i * 1.5, "list": [1, [], {}]} for i in range(50)}
    (tmp_path / "o.json").write_text(json.dumps(values, indent=1), encoding="utf-8")
    assert {key: value for _, key, value in stream_members(tmp_path / "o.json")} == values
    with gzip.open(tmp_path / "l.json.gz", "wt") as file:
        json.dump([1, 22, 333, 4444444444], file)
    assert [v for _, _, v in stream_members(tmp_path / "l.json.gz")] == [1, 22, 333, 4444444444]
    write(tmp_path / "empty.json", {})
    assert list(stream_members(tmp_path / "empty.json")) == []


def test_json_stream_says_where_by_file(tmp_path):
    array, members = write(tmp_path / "a.json", [{"n": 1}, 2]), write(tmp_path / "m.json", {"k": [{"n": 1}]})
    first = next(stream_list(array))
    assert first == (f"{array}, item 0", {"n": 1})
    with pytest.raises(UserError, match=r"a\.json, item 1: wanted a JSON object, found int"):
        list(stream_list(array))
    assert list(stream_list(members, "k")) == [(f"{members}, k[0]", {"n": 1})]
    assert list(stream_members(members)) == [(f"{members}, member k", "k", [{"n": 1}])]


def test_json_stream_reads_list_inside_object(tmp_path, monkeypatch):
    monkeypatch.setattr("raylib.fileio.CHUNK", 5)
    path = write(
        tmp_path / "o.json", {"a": [9], "x": {"b": [8]}, "b": [{"n": 1}, {"n": 22}], "c": [], "d": 3}
    )
    assert [(w.rpartition(", ")[2], r) for w, r in stream_list(path, "b")] == [
        ("b[0]", {"n": 1}),
        ("b[1]", {"n": 22}),
    ]
    assert list(stream_list(path, "c")) == []
    for name, words in (("e", "no list 'e'"), ("d", "no list 'd'")):
        with pytest.raises(UserError, match=f"o.json: .*{words}"):
            list(stream_list(path, name))
    path.write_text('{"b": [{"n": 1}, {"n": ')
    with pytest.raises(UserError, match="broken JSON after item 0"):
        list(stream_list(path, "b"))
    with pytest.raises(UserError, match="none.json: no such file"):
        list(stream_list(tmp_path / "none.json", "b"))


def test_vqa_reader_streams_and_accepts_another_order(tmp_path):
    count = 20_000
    people = [{"answer": "yes", "answer_id": i} for i in range(10)]
    questions = [{"question_id": i, "image_id": i, "question": "What is it?"} for i in range(count)]
    annotations = [
        {"question_id": i, "image_id": i, "answers": people, "answer_type": "other"} for i in range(count)
    ]
    write(tmp_path / "q.json", {"info": {}, "questions": questions})
    write(tmp_path / "a.json", {"info": {}, "annotations": annotations})
    write(tmp_path / "b.json", {"info": {}, "annotations": annotations[::-1]})
    del questions, annotations
    tracemalloc.start()
    ids = [example.id for example in answers.read_vqa_v2(tmp_path / "q.json", "a.json")]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (
        ids == [str(i) for i in range(count)] and peak < 5e6
    )  # the ids themselves are 1.2 MB; the files 14 MB of text
    assert [example.id for example in answers.read_vqa_v2(tmp_path / "q.json", "b.json")] == ids


def test_gqa_reader_memory_is_bounded(tmp_path):
    with open(tmp_path / "big.json", "w") as file:
        file.write("{" + ",".join(json.dumps({str(i): GQA["02"]})[1:-1] for i in range(100_000)) + "}")
    tracemalloc.start()
    count = sum(1 for _ in answers.read_gqa(tmp_path / "big.json"))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 100_000 and peak < 3e6


def test_answers_are_read_from_json_and_pickle(tmp_path):
    (tmp_path / "a.pkl").write_bytes(pickle.dumps({"no": 1, "yes": 0}))
    (tmp_path / "l.pkl").write_bytes(pickle.dumps(["yes", "no"], protocol=2))
    for path in (tmp_path / "a.pkl", tmp_path / "l.pkl", write(tmp_path / "l.json", ["yes", "no"])):
        assert answers.read_answers(path) == ("yes", "no")
    with pytest.raises(UserError, match=r"not 0 ... 1"):
        answers.read_answers(write(tmp_path / "bad.json", {"yes": 0, "no": 2}))


class Evil:
    def __reduce__(self):
        import os

        return os.system, ("touch evil",)


def test_answers_pickle_with_code_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "evil.pkl").write_bytes(pickle.dumps([Evil()]))
    with pytest.raises(UserError, match="only plain values and arrays are read"):
        answers.read_answers(tmp_path / "evil.pkl")
    assert not (tmp_path / "evil").exists()


def test_nli_labels_in_another_order_are_both_named():
    answers.check_labels(answers.LABELS, list(answers.LABELS), "x")
    with pytest.raises(
        UserError, match="config.json: the same labels in another order.*contradiction, entailment, neutral"
    ):
        answers.check_labels(answers.LABELS, ("contradiction", "entailment", "neutral"), "config.json")


def test_multi30k_lines_are_paired_with_images(tmp_path):
    (tmp_path / "raw").mkdir()
    (tmp_path / "splits").mkdir()
    (tmp_path / "splits" / "val.txt").write_text("1.jpg\n2.jpg\n")
    for part in "12":
        with gzip.open(tmp_path / "raw" / f"val.{part}.de.gz", "wt", encoding="utf-8") as file:
            file.write(f"eins {part}\nzwei {part}\n")
    one = list(read_multi30k(tmp_path / "raw" / "val.1.de.gz", "../splits/val.txt"))
    assert one == [Captioned("1.jpg", ("eins 1",)), Captioned("2.jpg", ("zwei 1",))]
    two = list(read_multi30k(tmp_path / "raw" / "val.?.de.gz", "../splits/val.txt"))
    assert two == [Captioned("1.jpg", ("eins 1", "eins 2")), Captioned("2.jpg", ("zwei 1", "zwei 2"))]
    (tmp_path / "splits" / "val.txt").write_text("1.jpg\n")
    with pytest.raises(UserError, match="2 captions for the 1 images"):
        list(read_multi30k(tmp_path / "raw" / "val.1.de.gz", "../splits/val.txt"))


def test_coco_captions_are_read_in_three_languages(tmp_path):
    images = [
        {
            "filename": f"COCO_val2014_00000000000{i}.jpg",
            "split": split,
            "sentences": [{"raw": f"{x} {i}"} for x in "ab"],
        }
        for i, split in ((1, "test"), (2, "restval"), (3, "test"))
    ]
    write(tmp_path / "dataset_coco.json", {"images": images, "dataset": "coco"})
    assert [i.image[-5] for i in read_karpathy(tmp_path / "dataset_coco.json", "test")] == ["1", "3"]
    train = list(read_karpathy(tmp_path / "dataset_coco.json", "train"))
    assert train == [Captioned("COCO_val2014_000000000002.jpg", ("a 2", "b 2"))]
    stair = {
        "images": [{"id": i, "file_name": f"COCO_val2014_00000000000{i}.jpg"} for i in (1, 2)],
        "annotations": [
            {"image_id": 1, "caption": "x"},
            {"image_id": 2, "caption": "y"},
            {"image_id": 1, "caption": "z"},
        ],
    }
    found = list(read_coco(write(tmp_path / "stair.json", stair), "dataset_coco.json", "test"))
    assert found == [Captioned("COCO_val2014_000000000001.jpg", ("x", "z"))]
    (tmp_path / "cn.txt").write_text("COCO_val2014_1#0\tA\nCOCO_val2014_2#0\tB\nCOCO_val2014_1#1\tC\n")
    (tmp_path / "test.txt").write_text("COCO_val2014_1\n")
    assert list(read_coco_cn(tmp_path / "cn.txt", "test.txt")) == [Captioned("COCO_val2014_1", ("A", "C"))]


def test_vqa_free_answers_get_soft_scores(tmp_path):
    write(tmp_path / "q.json", {"questions": [{"question_id": 10, "image_id": 1, "question": "What?"}]})
    people = [{"answer": "cat"}] * 7 + [{"answer": "dog"}] * 2 + [{"answer": "cow"}]
    write(
        tmp_path / "a.json",
        {"annotations": [{"question_id": 10, "image_id": 1, "answers": people, "answer_type": "other"}]},
    )
    (found,) = answers.read_vqa_v2(tmp_path / "q.json", "a.json")
    assert found == Example(
        "10", ("What?",), ("000000000001",), {"cat": 1.0, "dog": 2 / 3, "cow": 1 / 3}, "other"
    )
    write(tmp_path / "none.json", {"annotations": []})
    with pytest.raises(UserError, match="question 10 has no annotation"):
        list(answers.read_vqa_v2(tmp_path / "q.json", "none.json"))
    ja = [{"id": 5, "qas": [{"qa_id": 7, "question": "何?", "answer": "猫"}]}]
    assert list(answers.read_ja_vqa(write(tmp_path / "ja.json", ja))) == [
        Example("7", ("何?",), ("5",), {"猫": 1.0}, ("nani (what)",))
    ]
    fm = {"train": [{"question_id": 3, "image_id": 4, "Question": "什么?", "Answer": "猫"}], "val": []}
    assert list(answers.read_fm_iqa(write(tmp_path / "fm.json", fm), "train")) == [
        Example("3", ("什么?",), ("000000000004",), {"猫": 1.0})
    ]
    write(tmp_path / "answers.json", ["yes", "cat"])
    line = {"en": "What?", "hi": "H", "ja": "J", "an": [1], "s": [0.9], "img_id": 4, "q_id": 6}
    path = lines(tmp_path / "c.jsonl", line)
    (found,) = answers.read_cvil(path, "hi", "answers.json")
    assert found == Example("6", ("H",), ("4",), {"cat": 0.9}, "other")
    with pytest.raises(UserError, match=r"c.jsonl:1: answers \[2\]"):
        list(answers.read_cvil(lines(path, {**line, "an": [2]}), "hi", "answers.json"))
