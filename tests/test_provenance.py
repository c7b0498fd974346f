"""A run goes on with the data that it began with, or says which file changed."""

import json
import os
import shutil
from pathlib import Path

import pytest

from finetune.__main__ import main as finetune_main
from pretrain.__main__ import main as pretrain_main
from pretrain.train import run as run_pretraining
from raylib import provenance
from raylib.data.sources import Source
from raylib.errors import UserError
from raylib.launch import config_hash, run_folder
from raylib.provenance import DataFile, data_hash, fingerprint_files, list_changed_files, record_identity


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


def test_identity_changed_content_of_same_size_is_refused(run, tmp_path):
    shard = write(tmp_path / "data/en-000000.tar", b"a" * 100, 1)
    assert record_identity(run, [DataFile(shard)]) == []
    write(shard, b"b" * 100, 2)
    with pytest.raises(
        UserError, match="data changed since this run began: .*en-000000.tar .other content.; restore it"
    ):
        record_identity(run, [DataFile(shard)])
    write(shard, b"a" * 100, 3)  # restored: the content decides, not the time
    assert record_identity(run, [DataFile(shard)]) == []


def test_identity_of_a_run_without_checkpoint_may_be_removed(run, tmp_path):
    shard = write(tmp_path / "mine.py", b"a", 1)
    record_identity(run, [DataFile(shard)])
    write(shard, b"b", 2)
    with pytest.raises(UserError, match="or remove the folder: it holds no checkpoint yet$"):
        record_identity(run, [DataFile(shard)])
    (run / "de/checkpoints/step_000004").mkdir(parents=True)
    with pytest.raises(UserError, match="to begin a run with what is there now$"):
        record_identity(run, [DataFile(shard)])


def test_identity_changed_content_with_old_times_needs_verify(run, tmp_path):
    shard = write(tmp_path / "shard.tar", b"a" * 100, 1)
    record_identity(run, [DataFile(shard)])
    write(shard, b"b" * 100, 1)
    assert record_identity(run, [DataFile(shard)]) == []  # size and time first
    with pytest.raises(UserError, match="other content"):
        record_identity(run, [DataFile(shard)], verify=True)


def test_identity_changed_added_or_removed_file_in_folder_is_named(run, tmp_path):
    folder = tmp_path / "dictionaries"
    write(folder / "de2.txt", b"dog Hund\n", 1)
    write(folder / "ru2.txt", b"dog x\n", 1)
    record_identity(run, [DataFile(folder)])
    (folder / "ru2.txt").unlink()
    with pytest.raises(UserError, match="dictionaries .other content"):
        record_identity(run, [DataFile(folder)])
    write(folder / "ru2.txt", b"dog x\n", 5)
    write(folder / "zh2.txt", b"dog y\n", 1)
    with pytest.raises(UserError, match="dictionaries .other content"):
        record_identity(run, [DataFile(folder)])
    (folder / "zh2.txt").unlink()
    assert record_identity(run, [DataFile(folder)]) == []


def test_identity_large_files_count_by_size_and_time(run, tmp_path, monkeypatch):
    store = write(tmp_path / "features.mdb", b"a" * 10, 1)
    monkeypatch.setattr(provenance, "hash_path", lambda path: pytest.fail(f"{path} was read"))
    record_identity(run, [DataFile(store, large=True)])
    record_identity(run, [DataFile(store, large=True)])
    write(store, b"b" * 10, 2)
    with pytest.raises(UserError, match="features.mdb .changed since: its time differs"):
        record_identity(run, [DataFile(store, large=True)])
    write(store, b"b" * 11, 2)
    with pytest.raises(UserError, match="features.mdb .11 bytes, 10 before"):
        record_identity(run, [DataFile(store, large=True)])


def test_identity_files_behind_linked_folder_count(run, tmp_path):
    image = write(tmp_path / "disk/train/1.jpg", b"a", 1)
    (tmp_path / "images").mkdir()
    (tmp_path / "images/train").symlink_to(tmp_path / "disk/train")
    record_identity(run, [DataFile(tmp_path / "images", large=True)])
    write(image, b"bb", 2)
    with pytest.raises(UserError, match="images .2 bytes, 1 before"):
        record_identity(run, [DataFile(tmp_path / "images", large=True)])


def test_identity_appeared_or_vanished_files_are_refused(run, tmp_path, monkeypatch):
    """An optional file, such as a list of answers, of which the first that is there is read."""
    first, second = (write(tmp_path / name, b"x", 1) for name in ("first.json", "second.json"))
    record_identity(run, [DataFile(first)])
    with pytest.raises(UserError, match="first.json .not read any more., .*second.json .not read before"):
        record_identity(run, [DataFile(second)])
    with pytest.raises(UserError, match="began: .*second.json .not read before"):
        record_identity(run, [DataFile(first), DataFile(second)])
    first.unlink()
    with pytest.raises(UserError, match="first.json .missing"):
        record_identity(run, [])
    first.write_bytes(b"x")
    monkeypatch.setattr(provenance, "code_version", lambda: "0123 source 4567")  # which reads other files
    assert len(record_identity(run, [DataFile(second)])) == 1
    assert len(json.loads((run / provenance.IDENTITY).read_text())["data"]) == 2


def test_identity_of_moved_files_is_name_and_content(run, tmp_path, monkeypatch):
    """A relative path, read from another folder: the content decides, of large files the size."""
    for folder, content in (("a", b"1"), ("b", b"1"), ("c", b"2")):
        for name in ("train.json", "images.tar"):
            write(tmp_path / folder / "data" / name, content)
    files = [DataFile(Path("data/train.json")), DataFile(Path("data/images.tar"), large=True)]
    monkeypatch.chdir(tmp_path / "a")
    record_identity(run, files)
    before = data_hash(run)
    monkeypatch.chdir(tmp_path / "b")
    assert record_identity(run, files) == [] and data_hash(run) == before
    monkeypatch.chdir(tmp_path / "c")
    with pytest.raises(
        UserError, match="b/data/train.json .not read any more., .*c/data/train.json .not read before"
    ):
        record_identity(run, files)


def test_identity_of_remote_manifest_is_its_address(run, corpus, tmp_path):
    shutil.copytree(corpus / "image_text", tmp_path / "source")
    manifest = tmp_path / "source/manifest.json"

    def files(cache):
        return Source(f"file://{tmp_path}/source", cache=tmp_path / cache).files()

    record_identity(run, files("one"))
    assert record_identity(run, files("two")) == []
    values = json.loads(manifest.read_text())
    values["shards"].pop()
    manifest.write_text(json.dumps(values))
    with pytest.raises(UserError, match="file://.*/source/manifest.json .other content"):
        record_identity(run, files("three"))


def test_identity_verify_reports_what_it_cannot_compare(run, tmp_path):
    store = write(tmp_path / "images.tar", b"a" * 10, 1)
    record_identity(run, [DataFile(store, large=True)])
    (note,) = record_identity(run, [DataFile(store, large=True)], verify=True)
    assert "the content of 1 files" in note and str(store) in note
    assert record_identity(run, [DataFile(store, large=True)], verify=True) == []
    write(store, b"b" * 10, 1)
    with pytest.raises(UserError, match="images.tar .other content"):
        record_identity(run, [DataFile(store, large=True)], verify=True)


def test_identity_verify_also_compares_with_manifest(run, tmp_path):
    shard = write(tmp_path / "shard.tar", b"a" * 100, 1)
    with pytest.raises(UserError, match="SHA-256 is not its manifest's"):
        record_identity(run, [DataFile(shard, sha256="0" * 64, large=True)], verify=True)
    record_identity(run, [DataFile(shard, sha256=provenance.hash_path(shard), large=True)], verify=True)


def test_identity_missing_file_or_damaged_record_is_one_line_error(run, tmp_path):
    with pytest.raises(UserError, match="gone.tar: this file of the run's data is missing"):
        record_identity(run, [DataFile(tmp_path / "gone.tar")])
    (run / provenance.IDENTITY).write_text("{")
    with pytest.raises(UserError, match="identity.json: not to be read"):
        record_identity(run, [])


def test_identity_changed_code_is_reported_and_kept(run, monkeypatch):
    assert record_identity(run, []) == [] and record_identity(run, []) == []
    first = provenance.code_version()
    monkeypatch.setattr(provenance, "code_version", lambda: "0123 source 4567")
    assert record_identity(run, []) == [
        f"note: this run began with code {first} and goes on with 0123 source 4567"
    ]
    assert json.loads((run / provenance.IDENTITY).read_text())["code"] == [first, "0123 source 4567"]


def test_data_hash_ignores_folder_and_times(tmp_path):
    hashes = []
    for name, time in (("a", 1), ("b", 2)):
        run = tmp_path / name
        settle_file = write(run / "data/train.json", b"[]", time)
        record_identity(run, [DataFile(settle_file)])
        hashes.append(data_hash(run))
    assert hashes[0] == hashes[1] and len(hashes[0]) == 64
    (tmp_path / "c").mkdir()
    record_identity(
        tmp_path / "c",
        [DataFile(write(tmp_path / "c/data" / name, b"[]", 1)) for name in ("train.json", "test.json")],
    )
    assert data_hash(tmp_path / "c") not in hashes
    assert data_hash(tmp_path) is None


def test_identity_record_keeps_hashes_and_compares_shared_ones(tmp_path):
    file = write(tmp_path / "a", b"1", 1)
    before = fingerprint_files([DataFile(file)], {})
    assert fingerprint_files([DataFile(file)], before) == before
    assert list_changed_files(before, {}) == [] and list_changed_files({}, before) == []


def test_provenance_names_code_libraries_device_and_time():
    import torch

    made = provenance.provenance(torch.device("cpu"))
    assert (
        made["libraries"]["torch"] == torch.__version__.partition("+")[0]
        or made["libraries"]["torch"] == torch.__version__
    )
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


def test_resume_with_changed_shard_is_refused(stopped):
    corpus, build = stopped
    config = build()
    shard = shards(corpus)[0]
    data = bytearray(shard.read_bytes())
    data[700:710] = b"0123456789"
    shard.write_bytes(data)
    with pytest.raises(UserError, match=f"data changed since this run began: {shard} .other content"):
        run_pretraining(config)


def test_resume_with_changed_content_and_old_times_is_found_by_verify(stopped):
    corpus, build = stopped
    config = build("data.verify=true")
    shard = shards(corpus)[0]
    time = shard.stat().st_mtime_ns
    data = bytearray(shard.read_bytes())
    data[700:710] = b"0123456789"
    write(shard, bytes(data), time)
    with pytest.raises(UserError, match="SHA-256 is not its manifest's"):
        run_pretraining(config)


def test_resume_with_changed_manifest_is_refused(stopped):
    corpus, build = stopped
    config = build()
    manifest = corpus / "text/manifest.json"
    values = json.loads(manifest.read_text())
    values["shards"].pop()
    manifest.write_text(json.dumps(values))
    with pytest.raises(UserError, match="text/manifest.json .other content"):
        run_pretraining(config)


def test_resume_with_copied_data_goes_on_and_result_has_provenance(stopped):
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
    assert result["config_sha256"] == config_hash(
        config.model_copy(update={"name": "other", "runs": "elsewhere"})
    )
    assert result["config_sha256"] != config_hash(config.model_copy(update={"corpus": "other"}))


def test_resume_of_config_without_newer_setting_goes_on(stopped):
    _, build = stopped
    config = build()
    stored = run_folder(config) / "config.json"
    values = json.loads(stored.read_text())
    del values["data"]["bad_limit"], values["optim"]["clip"]
    stored.write_text(json.dumps(values))
    run_pretraining(config)


@pytest.mark.parametrize(
    ("recipe", "settings", "file"),
    [
        ("scenes_xgqa", (), "gqa/annotations/valid.json"),
        ("scenes_xgqa", (), "xGQA/annotations/few_shot/ru/test.json"),
        ("scenes_xgqa", (), "gqa/annotations/trainval_label2ans.json"),
        ("scenes_xgqa", ("strategies.prior.alpha=1",), "vectors.txt"),
        ("scenes_xgqa", ("strategies.code_mixing.probability=0.5",), "dictionaries/ru2.txt"),
        ("scenes_xflickrco", (), "flickr30k/annotations/valid_ann.jsonl"),
    ],
)
def test_finetune_resume_with_changed_file_is_refused(finetune, scenes, tmp_path, recipe, settings, file):
    data = tmp_path / "data"
    shutil.copytree(scenes, data)
    first = (recipe, f"data={data}", *settings)
    code, _ = finetune(*first, "fit.stop_after=1")
    assert code == 0
    with open(data / file, "ab") as changed:
        changed.write(b"cat 0 0\n" if file == "vectors.txt" else b" \n")
    code, out = finetune(*first)
    assert (
        code == 2
        and "the data changed since this run began" in out
        and str(data / file.partition("/")[0]) in out
    )


def test_finetune_result_has_provenance(finetune, tmp_path):
    code, _ = finetune("scenes_xgqa")
    folder = tmp_path / "scenes_xgqa"
    result = json.loads((folder / "result.json").read_text())
    assert (
        code == 0
        and result["code"] == provenance.code_version()
        and result["device"]
        and result["libraries"]["torch"]
    )
    assert result["data_sha256"] == data_hash(folder) and len(result["config_sha256"]) == 64
    assert (
        result["peak_memory_gb"] > 0
        and result["samples_per_second"] > 0
        and result["evaluated_per_second"] > 0
    )
    assert result["items_skipped"] == {"train": 0, "en": 0, "ru": 0} and result["skipped_steps"] == 0


@pytest.mark.parametrize(
    ("settings", "file"),
    [
        ((), "tokenizer.model"),
        ((), "model.safetensors"),
        (
            (
                "strategies.distillation.teacher={copy}",
                'strategies.distillation.tokens=["cls"]',
                "select=last",
            ),
            "model.safetensors",
        ),
        (("wordnet={copy}/wordnet",), "wordnet"),
    ],
)
def test_finetune_resume_with_changed_model_teacher_or_wordnet_is_refused(
    finetune, scenes, model, tmp_path, settings, file
):
    copy = tmp_path / "copy"
    shutil.copytree(model, copy)
    shutil.copytree(scenes / "wordnet", copy / "wordnet")
    first = [setting.format(copy=copy) for setting in settings] or [f"model={copy}"]
    code, out = finetune("scenes_xgqa", *first, "fit.stop_after=1")
    assert code == 0, out
    changed = copy / file if file != "wordnet" else copy / "wordnet/index.noun"
    data = bytearray(changed.read_bytes())
    data[-1] ^= 1
    changed.write_bytes(data)
    code, out = finetune("scenes_xgqa", *first)
    assert (
        code == 2
        and "the data changed since this run began" in out
        and f"{copy / file} (other content)" in out
    )


def test_finetune_resume_with_appeared_or_vanished_file_is_refused(finetune, scenes, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(scenes, data)
    code, _ = finetune("scenes_xgqa", f"data={data}", "fit.stop_after=1")
    assert code == 0
    (data / "wordnet").rename(tmp_path / "wordnet")
    code, out = finetune("scenes_xgqa", f"data={data}")
    assert code == 2 and f"{data}/wordnet (missing)" in out
    (tmp_path / "wordnet").rename(data / "wordnet")
    code, out = finetune("scenes_xgqa", f"data={data}")
    assert code == 0, out


def test_evaluate_on_changed_data_says_so_and_stores_its_hash(finetune, scenes, tmp_path, capsys):
    data, result = tmp_path / "data", tmp_path / "scenes_xgqa/result.json"
    shutil.copytree(scenes, data)
    assert finetune("scenes_xgqa", f"data={data}", "epochs=1")[0] == 0
    before = json.loads(result.read_text())["data_sha256"]
    for content, same in ((b"", True), (b" \n", False)):
        with open(data / "xGQA/annotations/few_shot/ru/test.json", "ab") as changed:
            changed.write(content)
        assert finetune_main(["evaluate", str(result.parent)]) == 0
        out = capsys.readouterr().out
        line = [
            part for part in out.splitlines() if "evaluates on other data than the run began with" in part
        ]
        assert ["few_shot/ru/test.json (other content)" in part for part in line] == ([] if same else [True])
        assert (json.loads(result.read_text())["data_sha256"] == before) is same


def test_evaluate_of_an_export_has_provenance(model, retrieval_set, tmp_path, capsys):
    def evaluated(data):
        assert pretrain_main(["evaluate", str(model), str(data), "--json", str(tmp_path / "e.json")]) == 0
        return json.loads((tmp_path / "e.json").read_text())

    result = evaluated(retrieval_set)
    assert (
        result["code"] == provenance.code_version()
        and result["libraries"]["torch"]
        and result["device"]
        and result["time"]
    )
    assert result["peak_memory_gb"] > 0 and result["evaluated_per_second"] > 0 and result["seconds"] > 0
    assert result["items_skipped"] == {"de": 1, "en": 0, "zh": 0} and set(result["interval"]) == {
        "de",
        "en",
        "zh",
    }
    assert len(result["config_sha256"]) == 64
    copied = shutil.copytree(retrieval_set, tmp_path / retrieval_set.name)
    assert evaluated(copied)["data_sha256"] == result["data_sha256"]
    captions = copied / "captions.json"
    captions.write_text(captions.read_text() + "\n")
    assert evaluated(copied)["data_sha256"] != result["data_sha256"]


@pytest.mark.parametrize("command", ["evaluate", "overlap"])
def test_evaluate_unwritable_results_file_is_reported_at_once(
    model, retrieval_set, tmp_path, capsys, command
):
    for path, words in (
        (tmp_path / "no" / "e.json", "No such file or directory"),
        (tmp_path, "Is a directory"),
    ):
        assert pretrain_main([command, str(model), str(retrieval_set), "--json", str(path)]) == 2
        printed = capsys.readouterr()
        assert printed.err.startswith(f"error: {path}: not written ({words})") and printed.out == ""
