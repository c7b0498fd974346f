"""Every method on every kind of task: it changes what is trained, or is refused before anything starts; never
dropped."""

import json
import pickle

import pytest
from safetensors.torch import load_file

from finetune.__main__ import main
from finetune.config import FinetuneConfig
from finetune.lineage import load_run_config, read_lineage, runs_behind
from finetune.strategies import STRATEGIES
from raylib.config import change_settings, load_config
from raylib.monitoring import read_metrics
from tests.conftest import QUICK as SMALL
from tests.test_strategies_run import SETTINGS
from tune_spaces.jobs import FinetuneSearchJob

QUICK = ["epochs=1", "train_limit=32", "test_limit=8", "select=last", "candidates=3", "length=24"]
KINDS = {
    "classifier": ["scenes_xgqa"],
    "decoder": ["scenes_xgqa", "head=decoder", "decoder.candidates=9"],
    "two images": ["scenes_marvl"],
    "matching": ["scenes_xflickrco"],
    "contrast": ["scenes_xflickrco", "use_itm_head=false"],
}
FEW = [
    "setting=few_shot",
    "shots=5",
    'languages=["ru"]',
    "batch=5",
]  # alignment draws other languages to English
MORE = {"head_first": ['freeze=["vision"]'], "alignment": FEW}  # what a method needs that is none itself
OWN = {
    **SETTINGS,
    "alignment": ["strategies.alignment={}"],
    "distillation": ['strategies.distillation.tokens=["cls"]', "strategies.distillation.task=1"],
}
REFUSED = {
    ("prior", "decoder"): "needs a classifier's logits",
    ("prior", "two images"): "has a vector for none of the 2 labels",  # "True" and "False"
    **{("prior", kind): "needs a task with answers" for kind in ("matching", "contrast")},
    **{("distillation", kind): "needs a task with answers" for kind in ("matching", "contrast")},
    ("distillation", "decoder"): "needs the hidden states of a classifier",
    ("distillation", "two images"): "needs texts about one image",
    **{("alignment", kind): "needs a retrieval task" for kind in ("classifier", "decoder", "two images")},
}


def weights(folder):
    newest = max(path for path in folder.rglob("model.safetensors") if path.parent.name.startswith("step_"))
    return load_file(newest)


@pytest.fixture(scope="session")
def bases():
    """{(kind, further settings): weights after training without a method}."""
    return {}


@pytest.fixture(scope="session")
def teacher(model, scenes, tmp_path_factory):
    runs = tmp_path_factory.mktemp("teacher")
    assert (
        main(
            [
                "scenes_xgqa",
                "name=english",
                f"model={model}",
                f"data={scenes}",
                f"runs={runs}",
                "epochs=1",
                *SMALL,
                *QUICK,
                'languages=["en"]',
                "optim.lr=0.01",
            ]
        )
        == 0
    )
    return runs / "english"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", STRATEGIES)
def test_strategies_change_training_or_are_refused_on_every_task(
    finetune, tmp_path, bases, teacher, name, kind
):
    recipe, *settings = KINDS[kind]
    more = [*settings, *MORE.get(name, ())]
    own = [*OWN[name], *([f"strategies.distillation.teacher={teacher}"] if name == "distillation" else [])]
    if (name, kind) == ("prior", "two images"):
        own = ["strategies.prior.k=2"]
    if (name, kind) == ("alignment", "two images"):
        more = [*more, "shots=4"]
    code, printed = finetune(recipe, "name=run", *QUICK, *more, *own)
    if (name, kind) in REFUSED:
        assert code == 2 and REFUSED[name, kind] in printed and not (tmp_path / "run").exists(), printed
        return
    assert code == 0, printed
    if (key := (kind, *more)) not in bases:
        assert finetune(recipe, "name=base", *QUICK, *more)[0] == 0
        bases[key] = weights(tmp_path / "base")
    trained, base = weights(tmp_path / "run"), bases[key]
    assert trained.keys() != base.keys() or any(
        not value.equal(base[part]) for part, value in trained.items()
    )


@pytest.mark.parametrize("loss", ["mse", "pivot", "image"])
def test_alignment_beside_matching_is_logged_and_weighted(finetune, tmp_path, loss):
    """The term is told in the log, and its weight decides what is learnt."""
    found = {}
    for weight in (0.0, 0.5, 5.0):
        code, printed = finetune(
            "scenes_xflickrco",
            f"name=w{weight}",
            *QUICK,
            *FEW,
            f"strategies.alignment.loss={loss}",
            f"strategies.alignment.weight={weight}",
        )
        assert code == 0, printed
        found[weight] = weights(tmp_path / f"w{weight}")
        losses = {key for line in read_metrics(tmp_path / f"w{weight}" / "ru") for key in line}
        assert {"loss/ucl_image", "loss/itm"} <= losses and ("loss/alignment" in losses) == (weight > 0)
    for one, other in ((0.0, 0.5), (0.5, 5.0)):
        assert not found[one]["text_projection.weight"].equal(found[other]["text_projection.weight"])


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["strategies.code_mixing.stages=rounds"], "needs rounds that look for a pruning mask"),
        (
            ["strategies.code_mixing.stages=rounds", "strategies.sparse.mask=none"],
            "needs rounds that look for a pruning mask",
        ),
        (
            [
                "strategies.distillation.epochs=1",
                "strategies.distillation.teacher=T",
                "strategies.sparse.rounds=1",
            ],
            "leave one of",
        ),
    ],
)
def test_strategies_of_absent_stages_are_refused(finetune, settings, words):
    code, printed = finetune("scenes_xgqa", "name=wrong", *settings)
    assert code == 2 and words in printed and printed.strip().count("\n") == 0


L2_SP = '''"""L2-SP (Li et al. 2018): weights stay near those that training starts from."""

from torch import nn

from finetune.strategies import Context, Strategy, StrategyConfig, Term


class L2SPConfig(StrategyConfig):
    weight: float = 0.01

    def build(self, context: Context) -> "L2SP":
        return L2SP(self.weight)


class L2SP(Strategy):
    def __init__(self, weight: float):
        self.weight = weight

    def terms(self, model: nn.Module) -> dict[str, Term]:
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        start = {name: p.detach().clone() for name, p in trained.items()}

        def distance(outputs, batch):
            return sum((p - start[name]).square().sum() for name, p in trained.items())

        return {"l2_sp": Term(self.weight, distance)}
'''


@pytest.fixture
def l2_sp(tmp_path):
    (tmp_path / "my_strategy.py").write_text(L2_SP)
    return f"strategies.my={tmp_path}/my_strategy.py"


@pytest.mark.parametrize("kind", KINDS)
def test_user_strategy_trains_on_every_kind_of_task(finetune, tmp_path, l2_sp, kind):
    """The same term, more of it: the weights stay nearer to where they began."""
    recipe, *settings = KINDS[kind]
    moved = {}
    for weight in (0.0, 100.0):
        own = [l2_sp, f"strategies.my.weight={weight}", "epochs=4"]
        code, printed = finetune(recipe, f"name=w{weight}", *QUICK, *settings, *own)
        assert code == 0, printed
        lines = [line["loss/l2_sp"] for line in read_metrics(tmp_path / f"w{weight}") if "loss/l2_sp" in line]
        moved[weight] = lines[-1]
    assert 0 < moved[100.0] < moved[0.0]


def test_user_strategy_is_stored_resumed_evaluated_and_part_of_identity(finetune, tmp_path, l2_sp, capsys):
    settings = [*QUICK, l2_sp, "strategies.my.weight=0.5", "strategies.unfreezing.layers=2"]
    assert finetune("scenes_xgqa", "name=whole", *settings)[0] == 0
    code, printed = finetune("scenes_xgqa", "name=parts", *settings, "fit.stop_after=1")
    assert code == 0 and "stopped before the end" in printed
    assert finetune("scenes_xgqa", "name=parts", *settings)[0] == 0
    whole, parts = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert all(value.equal(parts[name]) for name, value in whole.items())
    assert json.loads((tmp_path / "whole" / "result.json").read_text())["method"] == (
        "unfreezing (layers 2) + my (weight 0.5)"
    )
    config = load_config(FinetuneConfig, tmp_path / "whole" / "config.json")
    assert pickle.loads(pickle.dumps(config)) == config  # as Ray sends it to workers
    varied = change_settings(config, {"strategies.my.weight": 0.25})  # as a search does
    assert "my (weight 0.25)" in varied.display_name
    assert main(["evaluate", str(tmp_path / "whole")]) == 0
    file = tmp_path / "my_strategy.py"
    file.write_text(L2_SP.replace("start[name]", "0"))
    code, printed = finetune("scenes_xgqa", "name=parts", *settings)
    assert code == 2 and "my_strategy.py" in printed
    file.unlink()
    capsys.readouterr()
    assert main(["evaluate", str(tmp_path / "whole")]) == 0  # by the copy in its folder, of what ran
    assert "other data" not in capsys.readouterr().out
    (tmp_path / "whole" / "my_strategy.py").unlink()
    assert main(["evaluate", str(tmp_path / "whole")]) == 2
    run = tmp_path / "whole" / "config.json"
    assert capsys.readouterr().err.strip() == f"error: {run}: strategies.my={file}: no such file"
    assert main(["compare", str(tmp_path / "whole")]) == 0
    assert "my_strategy.py: no such file; its settings are compared as they were stored" in (
        capsys.readouterr().out
    )


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("strategies.my=my_strategy.txt", "unknown setting 'strategies.my'"),
        ("strategies.my=FILE:Prior", "no class Prior derived from StrategyConfig; it has: L2SPConfig"),
        ('strategies.my={"file": "FILE", "wieght": 1}', "did you mean weight"),
    ],
)
def test_user_strategy_mistakes_are_one_line(finetune, tmp_path, l2_sp, setting, words):
    file = l2_sp.partition("=")[2]
    code, printed = finetune("scenes_xgqa", "name=wrong", setting.replace("FILE", file))
    assert code == 2 and words in printed and printed.strip().count("\n") == 0


EXTRA = """from finetune.strategies import Strategy, StrategyConfig, Term


class Extra(StrategyConfig):
    def build(self, context):
        return Doubled()


class Doubled(Strategy):
    def batch_inputs(self):
        return count_rows

    def terms(self, model):
        return {"rows": Term(1.0, lambda outputs, batch: batch["row"])}


def count_rows(examples, visual, batch):
    return {"row": batch["index"] * 0.0 + len(examples)}
"""


@pytest.mark.parametrize("kind", ["classifier", "contrast"])
def test_user_strategy_adds_to_batches_of_every_task(finetune, tmp_path, kind):
    (tmp_path / "extra.py").write_text(EXTRA)
    recipe, *settings = KINDS[kind]
    code, printed = finetune(recipe, *QUICK, *settings, f"strategies.my={tmp_path}/extra.py", "name=run")
    assert code == 0, printed
    assert {line["loss/rows"] for line in read_metrics(tmp_path / "run") if "loss/rows" in line} == {16.0}


def test_strategy_that_asks_for_states_must_need_them(finetune, tmp_path):
    (tmp_path / "extra.py").write_text(
        EXTRA.replace("def batch_inputs", "task_weight = 0.5\n\n    def batch_inputs")
    )
    code, printed = finetune("scenes_xflickrco", *QUICK, f"strategies.my={tmp_path}/extra.py", "name=run")
    assert code == 2 and 'it must need "states"' in printed


def test_user_strategy_with_an_unknown_need_is_refused(finetune, tmp_path):
    needs = EXTRA.replace("    def build", '    needs = frozenset({"logit"})\n\n    def build')
    (tmp_path / "extra.py").write_text(needs)
    code, printed = finetune("scenes_xgqa", f"strategies.my={tmp_path}/extra.py", "name=run")
    assert code == 2 and "'logit'; did you mean logits?" in printed and printed.strip().count("\n") == 0


PENALTY = """from finetune.strategies import Strategy, StrategyConfig, Term


class PenaltyConfig(StrategyConfig):
    needs_any = frozenset({"logits", "embeddings"})

    weight: float = 0.1

    def build(self, context):
        return Penalty(self.weight)


class Penalty(Strategy):
    def __init__(self, weight):
        self.weight = weight

    def terms(self, model):
        return {"penalty": Term(self.weight, self.values)}

    def values(self, outputs, batch):
        if "logits" in outputs:
            log_p = outputs.logits.log_softmax(1)
        else:
            log_p = outputs.scores(outputs.image_embeddings, outputs.text_embeddings).log_softmax(1)
        return (log_p.exp() * log_p).sum(1)
"""


@pytest.mark.parametrize("kind", KINDS)
def test_user_strategy_reads_logits_or_else_scores(finetune, tmp_path, kind):
    """The entropy of answers, or of texts given an image: the same term on both, weighted."""
    (tmp_path / "penalty.py").write_text(PENALTY)
    recipe, *settings = KINDS[kind]
    penalties = {}
    for weight in (0.0, 10.0):
        own = [f"strategies.my={tmp_path}/penalty.py", f"strategies.my.weight={weight}", "epochs=4"]
        code, printed = finetune(recipe, f"name=w{weight}", *QUICK, *settings, *own)
        if kind == "decoder":
            assert (
                code == 2 and "needs the embeddings of a retrieval task or a classifier's logits" in printed
            )
            assert "head=decoder has none" in printed and not (tmp_path / f"w{weight}").exists()
            return
        assert code == 0, printed
        lines = read_metrics(tmp_path / f"w{weight}")
        penalties[weight] = [line["loss/penalty"] for line in lines if "loss/penalty" in line]
    assert all(value < 0 for values in penalties.values() for value in values)
    assert penalties[0.0][-1] != penalties[10.0][-1]
    if kind == "classifier":
        assert penalties[0.0][-1] > penalties[10.0][-1]


ANY, NEEDS = 'needs_any = frozenset({"logits", "embeddings"})', 'needs = frozenset({"logits"})'
OTHERS = f"class Penalty(Strategy):\n    {NEEDS}\n"
ASK = 'needs = frozenset({"embeddings"}) on the StrategyConfig class'


@pytest.mark.parametrize(
    ("recipe", "change", "words"),
    [
        ("scenes_xflickrco", (ANY, NEEDS), ["task=xflickrco", "setting=zero_shot has none"]),
        ("scenes_xgqa", (ANY, 'needs = "logits"'), [f"penalty.py:4: TypeError: {NEEDS.split()[0]}", NEEDS]),
        ("scenes_xgqa", ("class Penalty(Strategy):", OTHERS), ["needs belongs to the StrategyConfig class"]),
        ("scenes_xflickrco", (ANY, ""), ["strategies.my: term 'penalty' reads outputs.scores", ASK]),
        ("scenes_xgqa", (").sum(1)", ")"), ["strategies.my: term 'penalty' has values of shape (16, "]),
    ],
    ids=["retrieval has no logits", "text", "of the strategy", "not asked for", "shape"],
)
def test_user_strategy_mistakes_in_terms_are_one_line(finetune, tmp_path, recipe, change, words):
    assert change[0] in PENALTY
    (tmp_path / "penalty.py").write_text(PENALTY.replace(*change))
    code, printed = finetune(recipe, *QUICK, f"strategies.my={tmp_path}/penalty.py", "name=run")
    assert code == 2 and all(word in printed for word in words), printed


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("strategies.penalty.weight=0.2", "or name your file: strategies.penalty=FILE.py"),
        ("strategies.lora=penalty.py", "strategies.lora=penalty.py: this name is taken"),
        ("strategies.my=none.py", "strategies.my=none.py: no such file"),
    ],
)
def test_user_strategy_without_its_file_or_name_is_one_line(finetune, setting, words):
    code, printed = finetune("scenes_xgqa", setting)
    assert code == 2 and words in printed and printed.strip().count("\n") == 0


DECLARING = """
from finetune.strategies import Context, Strategy, StrategyConfig


class TaughtConfig(StrategyConfig):
    mutable_fields = ("weight",)
    run_fields = ("teacher",)
    file_fields = ("words",)

    weight: float = 0.01
    teacher: str = ""
    words: str = ""

    def build(self, context: Context) -> Strategy:
        assert not self.words or open(self.words).read() == "words"
        return Strategy()
"""


def test_user_strategy_declares_mutable_settings_and_paths(finetune, tmp_path, model, monkeypatch):
    """A population may change one, lineage follows the other; the folder of the start counts for both."""
    (tmp_path / "my_strategy.py").write_text(DECLARING)
    (tmp_path / "words.txt").write_text("words")
    monkeypatch.chdir(tmp_path)
    assert finetune("scenes_xvnli", "name=teacher", *QUICK, "epochs=1")[0] == 0
    own = ["strategies.my=my_strategy.py", "strategies.my.teacher=teacher", "strategies.my.words=words.txt"]
    code, printed = finetune("scenes_xvnli", "name=taught", *QUICK, "epochs=1", *own)
    assert code == 0, printed
    config = load_config(FinetuneConfig, tmp_path / "taught" / "config.json")
    assert config.display_name == "my"  # paths are not shown
    job = FinetuneSearchJob()
    assert "strategies.my.weight" in job.mutable_paths_of(config)
    assert "strategies.my.weight" not in job.mutable_paths_of(FinetuneConfig(task="xvnli"))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    settings = read_lineage(tmp_path / "taught").settings
    assert settings["strategies"]["my"]["teacher"]["task"] == "xvnli"
    assert tmp_path / "teacher" in [folder for folder, _ in runs_behind(load_run_config(tmp_path / "taught"))]
    assert main(["evaluate", "../taught"]) == 0


def test_evaluate_finds_files_from_where_the_run_was_started(model, scenes, tmp_path, monkeypatch, capsys):
    """Relative data=, images= and model= of a stored run, read from another folder; hashes and what the
    result says stay."""
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "data").symlink_to(scenes)
    (tmp_path / "home" / "model").symlink_to(model)
    monkeypatch.chdir(tmp_path / "home")
    paths = ["data=data", "images=data/images.tar", "model=model", "runs=runs", 'languages=["en"]']
    settings = [*paths, *SMALL, *QUICK, "setting=untrained"]
    assert main(["scenes_xflickrco", "name=here", *settings]) == 0
    run = tmp_path / "home" / "runs" / "here"
    before = json.loads((run / "result.json").read_text())
    monkeypatch.chdir(tmp_path)
    assert main(["evaluate", str(run)]) == 0
    after = json.loads((run / "result.json").read_text())
    same = ("retrieval", "model", "config_sha256", "data_sha256", "method")
    assert {name: after[name] for name in same} == {name: before[name] for name in same}
    assert "other data" not in capsys.readouterr().out and not (tmp_path / "runs").exists()
    # a run of before the folder was recorded resolves from the working folder, as it did
    identity = json.loads((run / "identity.json").read_text())
    del identity["folder"]
    (run / "identity.json").write_text(json.dumps(identity))
    assert main(["evaluate", str(run)]) == 2
    monkeypatch.chdir(tmp_path / "home")
    assert main(["evaluate", str(run)]) == 0
