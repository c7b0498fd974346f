"""A run goes on with the data that it began with, or says which file changed."""

import json
import os
import shutil

import pytest

from finetune.train import evaluate_run
from pretrain.__main__ import main as pretrain_main
from pretrain.train import run as run_pretraining
from raylib import identity, provenance
from raylib.errors import UserError
from raylib.identity import DataFile, changed, data_hash, record, settle
from raylib.launch import config_hash, run_folder


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    return folder


def write(path, content: bytes, time: int | None = None):
    """Write a file with a time of change of its own."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    if time is not None:
        os.utime(path, ns=(time, time))
    return path


def test_identity_other_content_of_the_same_size_is_refused(run, tmp_path):
    shard = write(tmp_path / "data/en-000000.tar", b"a" * 100, 1)
    assert settle(run, [DataFile(shard)]) == []
    write(shard, b"b" * 100, 2)
    with pytest.raises(UserError, match="data changed since this run began: .*en-000000.tar .other content.; restore it"):
        settle(run, [DataFile(shard)])
    write(shard, b"a" * 100, 3)  # restored: the content decides, not the time
    assert settle(run, [DataFile(shard)]) == []


def test_identity_a_copy_with_kept_times_needs_verify(run, tmp_path):
    shard = write(tmp_path / "shard.tar", b"a" * 100, 1)
    settle(run, [DataFile(shard)])
    write(shard, b"b" * 100, 1)
    assert settle(run, [DataFile(shard)]) == []  # size and time first
    with pytest.raises(UserError, match="other content"):
        settle(run, [DataFile(shard)], verify=True)


def test_identity_a_file_in_a_folder_is_changed_added_or_gone(run, tmp_path):
    folder = tmp_path / "dictionaries"
    write(folder / "de2.txt", b"dog Hund\n", 1)
    write(folder / "ru2.txt", b"dog x\n", 1)
    settle(run, [DataFile(folder)])
    (folder / "ru2.txt").unlink()
    with pytest.raises(UserError, match="dictionaries .other content"):
        settle(run, [DataFile(folder)])
    write(folder / "ru2.txt", b"dog x\n", 5)
    write(folder / "zh2.txt", b"dog y\n", 1)
    with pytest.raises(UserError, match="dictionaries .other content"):
        settle(run, [DataFile(folder)])
    (folder / "zh2.txt").unlink()
    assert settle(run, [DataFile(folder)]) == []


def test_identity_large_files_are_not_read_but_their_size_and_time_count(run, tmp_path, monkeypatch):
    store = write(tmp_path / "features.mdb", b"a" * 10, 1)
    monkeypatch.setattr(identity, "content_hash", lambda path: pytest.fail(f"{path} was read"))
    settle(run, [DataFile(store, large=True)])
    settle(run, [DataFile(store, large=True)])
    write(store, b"b" * 10, 2)
    with pytest.raises(UserError, match="features.mdb .changed since: its time differs"):
        settle(run, [DataFile(store, large=True)])
    write(store, b"b" * 11, 2)
    with pytest.raises(UserError, match="features.mdb .11 bytes, 10 before"):
        settle(run, [DataFile(store, large=True)])


def test_identity_verify_compares_with_the_manifest_too(run, tmp_path):
    shard = write(tmp_path / "shard.tar", b"a" * 100, 1)
    with pytest.raises(UserError, match="SHA-256 is not its manifest's"):
        settle(run, [DataFile(shard, sha256="0" * 64, large=True)], verify=True)
    settle(run, [DataFile(shard, sha256=identity.content_hash(shard), large=True)], verify=True)


def test_identity_a_missing_file_and_a_damaged_record_are_one_line(run, tmp_path):
    with pytest.raises(UserError, match="gone.tar: this file of the run's data is missing"):
        settle(run, [DataFile(tmp_path / "gone.tar")])
    (run / identity.FILE).write_text("{")
    with pytest.raises(UserError, match="identity.json: not to be read"):
        settle(run, [])


def test_identity_changed_code_is_told_and_kept(run, monkeypatch):
    assert settle(run, []) == [] and settle(run, []) == []
    first = provenance.code_version()
    monkeypatch.setattr(identity, "code_version", lambda: "0123 source 4567")
    assert settle(run, []) == [f"note: this run began with code {first} and goes on with 0123 source 4567"]
    assert json.loads((run / identity.FILE).read_text())["code"] == [first, "0123 source 4567"]


def test_data_hash_is_the_same_in_another_folder_and_for_other_times(tmp_path):
    hashes = []
    for name, time in (("a", 1), ("b", 2)):
        run = tmp_path / name
        settle_file = write(run / "data/train.json", b"[]", time)
        settle(run, [DataFile(settle_file)])
        hashes.append(data_hash(run))
    assert hashes[0] == hashes[1] and len(hashes[0]) == 64
    settle(run, [DataFile(write(run / "data/test.json", b"[1]"))])
    assert data_hash(run) != hashes[0]
    assert data_hash(tmp_path) is None


def test_record_takes_hashes_over_and_changed_compares_what_both_have(tmp_path):
    file = write(tmp_path / "a", b"1", 1)
    before = record([DataFile(file)], {})
    assert record([DataFile(file)], before) == before
    assert changed(before, {}) == [] and changed({}, before) == []


def test_provenance_names_code_libraries_device_and_time():
    import torch

    made = provenance.provenance(torch.device("cpu"))
    assert made["libraries"]["torch"] == torch.__version__.partition("+")[0] or made["libraries"]["torch"] == torch.__version__
    assert "source" in made["code"] and made["device"] and made["time"].endswith("+00:00")


@pytest.fixture
def stopped(mini, corpus, tmp_path):
    """`stopped(*settings)` -> the config of a run of 6 steps on a corpus of its own, stopped after 2."""
    own = tmp_path / "corpus"
    shutil.copytree(corpus, own)
    settings = ("runtime=local", "workers=1", f"corpus={own}", "data.retrieval=null")

    def build(*more):
        run_pretraining(mini(*settings, "fit.stop_after=2"))
        return mini(*settings, *more)

    return own, build


def shards(folder):
    return sorted(folder.rglob("image_text/*.tar"))


def test_resume_with_a_shard_of_other_content_is_refused(stopped):
    corpus, build = stopped
    config = build()
    shard = shards(corpus)[0]
    data = bytearray(shard.read_bytes())
    data[700:710] = b"0123456789"
    shard.write_bytes(data)
    with pytest.raises(UserError, match=f"data changed since this run began: {shard} .other content"):
        run_pretraining(config)


def test_resume_with_other_content_and_the_old_times_is_found_by_verify(stopped):
    corpus, build = stopped
    config = build("data.verify=true")
    shard = shards(corpus)[0]
    time = shard.stat().st_mtime_ns
    data = bytearray(shard.read_bytes())
    data[700:710] = b"0123456789"
    write(shard, bytes(data), time)
    with pytest.raises(UserError, match="SHA-256 is not its manifest's"):
        run_pretraining(config)


def test_resume_with_another_manifest_is_refused(stopped):
    corpus, build = stopped
    config = build()
    manifest = corpus / "text/manifest.json"
    values = json.loads(manifest.read_text())
    values["shards"].pop()
    manifest.write_text(json.dumps(values))
    with pytest.raises(UserError, match="text/manifest.json .other content"):
        run_pretraining(config)


def test_resume_with_the_same_data_copied_goes_on_and_result_says_what_made_it(stopped):
    corpus, build = stopped
    config = build()
    for shard in shards(corpus):
        os.utime(shard)
    run_pretraining(config)
    folder = run_folder(config)
    result = json.loads((folder / "result.json").read_text())
    assert result["code"] == provenance.code_version() and result["device"] and result["time"]
    assert result["data_sha256"] == data_hash(folder) and result["config_sha256"] == config_hash(config)
    assert result["samples_per_second"] > 0 and result["peak_memory_gb"] > 0 and result["libraries"]["torch"]
    assert result["config_sha256"] == config_hash(config.model_copy(update={"name": "other", "runs": "elsewhere"}))
    assert result["config_sha256"] != config_hash(config.model_copy(update={"corpus": "other"}))


def test_a_run_whose_config_lacks_a_newer_setting_goes_on(stopped):
    _, build = stopped
    config = build()
    stored = run_folder(config) / "config.json"
    values = json.loads(stored.read_text())
    del values["data"]["bad_limit"], values["optim"]["clip"]
    stored.write_text(json.dumps(values))
    run_pretraining(config)


@pytest.mark.parametrize(("recipe", "settings", "file"), [
    ("scenes_xgqa", (), "gqa/annotations/valid.json"),
    ("scenes_xgqa", (), "xGQA/annotations/few_shot/ru/test.json"),
    ("scenes_xgqa", (), "gqa/annotations/trainval_label2ans.json"),
    ("scenes_xgqa", ("strategies.prior.alpha=1",), "vectors.txt"),
    ("scenes_xgqa", ("strategies.code_mixing.probability=0.5",), "dictionaries/ru2.txt"),
    ("scenes_xflickrco", (), "flickr30k/annotations/valid_ann.jsonl"),
])  # fmt: skip
def test_fine_tuning_with_a_changed_file_is_refused(finetune, scenes, tmp_path, recipe, settings, file):
    data = tmp_path / "data"
    shutil.copytree(scenes, data)
    first = (recipe, f"data={data}", *settings)
    code, _ = finetune(*first, "fit.stop_after=1")
    assert code == 0
    with open(data / file, "ab") as changed:
        changed.write(b"cat 0 0\n" if file == "vectors.txt" else b" \n")
    code, out = finetune(*first)
    assert code == 2 and "the data changed since this run began" in out and str(data / file.partition("/")[0]) in out


def test_fine_tuning_result_says_what_made_it(finetune, tmp_path):
    code, _ = finetune("scenes_xgqa")
    folder = tmp_path / "scenes_xgqa"
    result = json.loads((folder / "result.json").read_text())
    assert code == 0 and result["code"] == provenance.code_version() and result["device"] and result["libraries"]["torch"]
    assert result["data_sha256"] == data_hash(folder) and len(result["config_sha256"]) == 64
    assert result["peak_memory_gb"] > 0 and result["samples_per_second"] > 0 and result["evaluated_per_second"] > 0
    assert result["items_skipped"] == {"train": 0, "en": 0, "ru": 0} and result["skipped_steps"] == 0


def test_evaluating_again_on_changed_data_is_refused(finetune, scenes, tmp_path):
    """Else result.json would give the hash of the data that it was trained with to a score of other test items."""
    data = shutil.copytree(scenes, tmp_path / "scenes")
    assert finetune("scenes_xvnli", "name=x", f"data={data}", "epochs=1")[0] == 0
    before = json.loads((tmp_path / "x" / "result.json").read_text())
    again = evaluate_run(tmp_path / "x")
    assert again["data_sha256"] == before["data_sha256"] and again["accuracy"] == before["accuracy"]
    test = data / "XVNLI" / "annotations" / "ru" / "test.jsonl"
    test.write_text("".join(test.read_text().splitlines(keepends=True)[:-1]))
    with pytest.raises(UserError, match=r"x: the data changed since this run began: .*ru/test.jsonl \(other content\)"):
        evaluate_run(tmp_path / "x")
    assert json.loads((tmp_path / "x" / "result.json").read_text())["time"] == again["time"]


def test_an_evaluation_of_an_export_says_what_made_it(model, retrieval_set, tmp_path, capsys):
    def evaluated(data):
        assert pretrain_main(["evaluate", str(model), str(data), "--json", str(tmp_path / "e.json")]) == 0
        return json.loads((tmp_path / "e.json").read_text())

    result = evaluated(retrieval_set)
    assert result["code"] == provenance.code_version() and result["libraries"]["torch"] and result["device"] and result["time"]
    assert result["peak_memory_gb"] > 0 and result["evaluated_per_second"] > 0 and result["seconds"] > 0
    assert result["items_skipped"] == {"de": 1, "en": 0, "zh": 0} and set(result["interval"]) == {"de", "en", "zh"}
    assert len(result["config_sha256"]) == 64
    copied = shutil.copytree(retrieval_set, tmp_path / retrieval_set.name)
    assert evaluated(copied)["data_sha256"] == result["data_sha256"]
    captions = copied / "captions.json"
    captions.write_text(captions.read_text() + "\n")
    assert evaluated(copied)["data_sha256"] != result["data_sha256"]


@pytest.mark.parametrize("command", ["evaluate", "overlap"])
def test_a_file_of_results_that_cannot_be_written_is_told_at_once(model, retrieval_set, tmp_path, capsys, command):
    for path, words in ((tmp_path / "no" / "e.json", "No such file or directory"), (tmp_path, "Is a directory")):
        assert pretrain_main([command, str(model), str(retrieval_set), "--json", str(path)]) == 2
        printed = capsys.readouterr()
        assert printed.err.startswith(f"error: {path}: not written ({words})") and printed.out == ""
