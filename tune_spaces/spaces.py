"""Spaces by name: what is worth turning of each method, around what the papers published. A space of your own
is a file alike.

P0 is Nooralahzadeh and Sennrich 2023, P1 Reinhardt et al. 2024, P2 Li et al. 2023, P3 cViL, P4
translation-based alignment. Grids are the papers', where they print one.
"""

from collections.abc import Mapping
from typing import Any

from finetune.config import UNIMODAL
from finetune.recipes import FEW_SHOT_RATES, P4_FULL_RATES, P4_SMALL_RATES
from raylib.search.space import Choice, Each, Float, Int, OneOf, Space

# P4's learning rates of small modules, and of all weights; its lambda
MODULE_RATES = Float(min(P4_SMALL_RATES), max(P4_SMALL_RATES), log=True)
FULL_RATES = Float(min(P4_FULL_RATES), max(P4_FULL_RATES), log=True)
P4_LAMBDA = Float(0.001, 10, log=True)
P4_LAMBDAS = (0.001, 0.01, 0.1, 1.0, 10.0)


def _p4_grid(what: str, recipe: str, rates: tuple[float, ...], has_lambda: bool) -> Space:
    """The grid that P4 goes through for each row and language (appendix A): learning rate and, where a row
    aligns, lambda."""
    weight = "strategies.alignment.weight"
    knobs = {"optim.lr": Float(min(rates), max(rates), log=True)} | (
        {weight: P4_LAMBDA} if has_lambda else {}
    )
    chosen = {"optim.lr": rates[1]} | ({weight: 1.0} if has_lambda else {})
    return Space(
        f"P4's grid for {what}; of one language, chosen by R@1 on its dev set",
        recipe,
        knobs,
        published=(chosen,),
        grid={"optim.lr": rates} | ({weight: P4_LAMBDAS} if has_lambda else {}),
    )


def _best_of_all(
    recipe: str, summary: str, layers: int, training: Mapping[str, Any] = {}, usual: Mapping[str, Any] = {}
) -> Space:
    """Methods that go together; `layers`: at most so many are unfrozen in an epoch. training: knobs beside
    the methods; usual: their values in what is published."""
    space = _methods(recipe, summary, layers)
    published = tuple({**usual, **setting} for setting in space.published)
    return space._replace(knobs={**training, **space.knobs}, published=published)


def _methods(recipe: str, summary: str, layers: int) -> Space:
    return Space(
        summary,
        recipe,
        {
            "frozen": OneOf(no={}, encoders={"freeze": UNIMODAL}),
            "prior": OneOf(
                no={},
                yes={
                    "strategies.prior.alpha": Float(1, 100, log=True),
                    "strategies.prior.k": Int(2, 50, log=True),
                },
            ),
            "code_mixing": OneOf(no={}, yes={"strategies.code_mixing.probability": Float(0.05, 1)}),
            "sparse": OneOf(
                no={}, yes={"strategies.sparse.rate": Float(0.05, 0.5), "strategies.sparse.rounds": Int(1, 5)}
            ),
            "layers": OneOf(
                all={},
                unfreezing={"strategies.unfreezing.layers": Int(1, layers)},
                decay={"strategies.layer_decay.factor": Float(0.5, 1.0)},
                top={"strategies.top_layers.layers": Int(1, layers)},
            ),
        },
        published=(
            {
                "frozen": "no",
                "prior": "yes",
                "strategies.prior.alpha": 10.0,
                "strategies.prior.k": 10,
                "code_mixing": "yes",
                "strategies.code_mixing.probability": 0.9,
                "sparse": "yes",
                "strategies.sparse.rate": 0.1,
                "strategies.sparse.rounds": 5,
                "layers": "all",
            },  # P0's best
            {
                "frozen": "encoders",
                "prior": "no",
                "code_mixing": "no",
                "sparse": "no",
                "layers": "all",
            },  # P2's
            {
                "frozen": "no",
                "prior": "no",
                "code_mixing": "no",
                "sparse": "no",
                "layers": "unfreezing",
                "strategies.unfreezing.layers": (layers + 1) // 2,
            },  # P1's
        ),
    )


SPACES: dict[str, Space] = {
    "prior": Space(
        "linguistic prior (P0): weight, labels it looks at, where distances come from",
        "p0_uc2_prior_em",
        {
            "strategies.prior.alpha": Float(1, 100, log=True),
            "strategies.prior.k": Int(2, 50, log=True),
            "source": OneOf(
                vectors={"strategies.prior.source": "vectors"},
                wordnet={
                    "strategies.prior.source": "wordnet",
                    "strategies.prior.d1": Float(0.05, 0.95),
                    "strategies.prior.d2": Float(0.05, 0.95),
                },
            ),
        },
        published=(
            {"strategies.prior.alpha": 10.0, "strategies.prior.k": 10, "source": "vectors"},
            {
                "strategies.prior.alpha": 10.0,
                "strategies.prior.k": 10,
                "source": "wordnet",
                "strategies.prior.d1": 0.8,
                "strategies.prior.d2": 0.8,
            },
        ),
        grid={"strategies.prior.alpha": (1.0, 5.0, 10.0, 50.0), "strategies.prior.k": (5, 10, 20)},
    ),
    "sparse": Space(
        "sparse fine-tuning (P0): pruning rate, epochs before a pruning, how often",
        "p0_uc2_prior_em_sft",
        {
            "strategies.sparse.rate": Float(0.05, 0.5),
            "strategies.sparse.epochs": Int(1, 3),
            "strategies.sparse.rounds": Int(1, 5),
        },
        published=(
            {"strategies.sparse.rate": 0.1, "strategies.sparse.epochs": 1, "strategies.sparse.rounds": 5},
        ),
        grid={"strategies.sparse.rate": (0.1, 0.2, 0.3), "strategies.sparse.epochs": (1, 2)},
    ),
    "code_mixing": Space(
        "code-mixing (P0): how many texts, how many of their words",
        "p0_uc2_prior_em_cdm",
        {"strategies.code_mixing.ratio": Float(0.1, 1), "strategies.code_mixing.probability": Float(0.05, 1)},
        published=({"strategies.code_mixing.ratio": 1.0, "strategies.code_mixing.probability": 0.9},),
        grid={"strategies.code_mixing.probability": (0.3, 0.6, 0.9)},
    ),
    "unfreezing": Space(
        "scheduled unfreezing (P1): layers an epoch",
        "p1_uc2_suf_xgqa",
        {"strategies.unfreezing.layers": Int(1, 6)},
        published=({"strategies.unfreezing.layers": 3},),
        grid={"strategies.unfreezing.layers": (1, 2, 3, 4, 5, 6)},
    ),
    "layer_decay": Space(
        "layer-wise decay of the learning rate (P1)",
        "p1_cclm_decay88_xgqa",
        {"strategies.layer_decay.factor": Float(0.5, 1.0)},
        published=({"strategies.layer_decay.factor": 0.88},),
        grid={"strategies.layer_decay.factor": (0.98, 0.95, 0.88, 0.75)},
    ),
    "alignment": Space(
        "alignment through translations (P4): weight, routine, loss, and what is tuned, each with a rate "
        "that fits it",
        "p4_xtd_few_framework",
        {
            "strategies.alignment.weight": P4_LAMBDA,
            "strategies.alignment.routine": Choice(1, 2, 3),
            "strategies.alignment.loss": Choice("mse", "pivot", "image"),
            "tuned": OneOf(
                full={"strategies.lora": None, "optim.lr": FULL_RATES},
                lora={"strategies.lora.rank": Int(2, 64, log=True), "optim.lr": MODULE_RATES},
                adapter={
                    "strategies.lora": None,
                    "strategies.adapter.bottleneck": Int(8, 128, log=True),
                    "optim.lr": MODULE_RATES,
                },
                compacter={
                    "strategies.lora": None,
                    "strategies.compacter.reduction": Choice(8, 16, 32),
                    "optim.lr": MODULE_RATES,
                },
                soft_prompt={
                    "strategies.lora": None,
                    "strategies.soft_prompt.words": "",
                    "strategies.soft_prompt.tokens": Int(2, 32),
                    "optim.lr": MODULE_RATES,
                },
            ),
        },
        published=(
            {
                "strategies.alignment.weight": 1.0,
                "strategies.alignment.routine": 3,
                "strategies.alignment.loss": "mse",
                "tuned": "lora",
                "strategies.lora.rank": 8,
                "optim.lr@lora": 1e-4,
            },
            {
                "strategies.alignment.weight": 1.0,
                "strategies.alignment.routine": 3,
                "strategies.alignment.loss": "mse",
                "tuned": "full",
                "optim.lr@full": 3e-6,
            },
        ),
        grid={
            "strategies.alignment.weight": P4_LAMBDAS,
            "optim.lr@lora": P4_SMALL_RATES,
        },
    ),
    "p4_small": _p4_grid(
        "rows with alignment and small modules", "p4_xtd_few_framework", P4_SMALL_RATES, True
    ),
    "p4_full": _p4_grid(
        "rows with alignment that tune all weights", "p4_xtd_few_routine3", P4_FULL_RATES, True
    ),
    "p4_small_rates": _p4_grid("rows with small modules alone", "p4_xtd_few_lora", P4_SMALL_RATES, False),
    "p4_full_rates": _p4_grid(
        "rows that tune all weights, without alignment", "p4_xtd_few_full", P4_FULL_RATES, False
    ),
    "distillation": Space(
        "distillation (P3): weight of each layer's states, which layers, how many words are mixed in",
        "p3_kd_classify",  # trials of step 1 alone would be ranked by a head that nothing trains
        {
            "strategies.distillation.share": Float(0.05, 0.5),
            "layers": OneOf(
                quarters={
                    "strategies.distillation.layers": (3, 6, 9, 12),
                    "strategies.distillation.weights": Each(4, Float(0.1, 10, log=True)),
                },
                halves={
                    "strategies.distillation.layers": (6, 12),
                    "strategies.distillation.weights": Each(2, Float(0.1, 10, log=True)),
                },
                last={
                    "strategies.distillation.layers": (12,),
                    "strategies.distillation.weights": Each(1, Float(0.1, 10, log=True)),
                },
            ),
        },
        published=(
            {
                "strategies.distillation.share": 0.15,
                "layers": "quarters",
                **{f"strategies.distillation.weights@quarters[{i}]": 1.0 for i in range(4)},
            },
            {
                "strategies.distillation.share": 0.15,
                "layers": "last",
                "strategies.distillation.weights@last[0]": 1.0,
            },
        ),
        grid={"strategies.distillation.share": (0.1, 0.15, 0.3)},
    ),
    "few_shot": Space(
        "few-shot by IGLUE's protocol: its learning rates; of one language and number of shots, as it "
        "chooses them",
        "iglue_few_shot_xvnli",
        {"optim.lr": Choice(*FEW_SHOT_RATES)},
        published=({"optim.lr": FEW_SHOT_RATES[1]},),
        grid={"optim.lr": FEW_SHOT_RATES},
    ),
    "pretrain_mix": Space(
        "pretraining's mixture (P2): how far rare languages are raised, how many samples of each stream a "
        "step has",
        "tiny",
        {
            "data.text.alpha": Float(0, 1),
            "data.parallel.alpha": Float(0, 1),
            "data.image_text.batch": Choice(256, 512),
            "data.parallel.batch": Choice(256, 512, 1024),
            "data.text.batch": Choice(16, 32, 64, 128),
        },
        published=(
            {
                "data.text.alpha": 0.3,
                "data.parallel.alpha": 0.3,
                "data.image_text.batch": 512,
                "data.parallel.batch": 1024,
                "data.text.batch": 16,
            },
            {
                "data.text.alpha": 0.3,
                "data.parallel.alpha": 1.0,
                "data.image_text.batch": 512,
                "data.parallel.batch": 1024,
                "data.text.batch": 16,
            },  # the paper's exponents: WikiMatrix as it is
        ),
        grid={"data.text.alpha": (0.3, 0.5, 0.7, 1.0), "data.parallel.alpha": (0.3, 0.5, 0.7, 1.0)},
    ),
    "best_of_all": _best_of_all("p0_uc2_baseline", "which methods together, and how much of each", 6),
    "best_of_scenes": _best_of_all(
        "scenes_xgqa",
        "the same for models of two layers, as `make run`'s, with rate, decay, dropout and batch",
        2,
        {
            "optim.lr": Float(1e-4, 2e-3, log=True),
            "optim.weight_decay": Float(1e-3, 0.3, log=True),
            "head_dropout": Float(0.0, 0.4),
            "batch": Choice(32, 64, 128),
        },
        {"optim.lr": 5e-4, "optim.weight_decay": 0.05, "head_dropout": 0.1, "batch": 64},
    ),
}
