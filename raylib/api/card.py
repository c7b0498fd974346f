"""The model card of an export, README.md: what its run recorded, and nothing else."""

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from finetune.report import scores_of
from finetune.report import table as finetuning_table
from raylib import __version__
from raylib.api.model import Model
from raylib.display import markdown_table, percent
from raylib.metrics import mean_or_zero, mean_recall_at_1
from raylib.models.finetuned import FinetuneModel

NOT_RECORDED = "not recorded"
SAMPLE_DATA = """\
| part | licence |
|-|-|
| training images: Noto Emoji, Google LLC | Apache-2.0 |
| training images: Twemoji, Twitter, Inc and other contributors | CC-BY-4.0 |
| test images: Fluent Emoji, Microsoft Corporation | MIT |
| captions in 21 languages: CLDR 48 annotations, Unicode, Inc. | Unicode-3.0 |
| sentences in 21 languages: Universal Declaration of Human Rights | free of copyright; its packaging MIT |"""
SCENES_DATA = """\
| sentences in 21 languages: Scratch, Massachusetts Institute of Technology | BSD-3-Clause |
| sentences in 21 languages: LibreOffice | MPL-2.0 |
| synonyms and relations: WordNet 3.0, Princeton University | WordNet's |"""
SAMPLE_NAME = re.compile(r"(sample|scenes)(-[0-9a-f]{16})?")


class RunFacts(NamedTuple):
    """Of the run that a model is of: its settings and result, as far as there are any; its step; how many
    parameters it has."""

    settings: dict[str, Any]
    result: dict[str, Any]
    step: int | None
    parameters: int

    @property
    def languages(self) -> list[str]:
        """Those that the result is about, English first."""
        found = self.result.get("retrieval") or self.result.get("accuracy") or {}
        return sorted(found, key=lambda code: (code != "en", code))

    @property
    def corpus(self) -> str:
        """The name of the data: a folder's, without where it lay."""
        return Path(str(self.settings.get("corpus") or self.settings.get("data") or "")).name


def write_card(
    folder: Path, model: Model, facts: RunFacts, gap: str | None, license_name: str | None
) -> None:
    """Write README.md into an export. `gap`: why `transformers` cannot read it; None: it can."""
    name = str(facts.settings.get("name") or folder.name.strip(".").removesuffix(".partial"))
    front = yaml.safe_dump(
        _front_matter(name, model, facts, gap, license_name), sort_keys=False, allow_unicode=True
    )
    parts = [
        f"---\n{front}---\n\n# {name}",
        _summary(model, facts),
        _usage(model, gap),
        _training(facts),
        "## Data\n\n" + _data(facts),
        "## Results\n\n" + _results(facts),
        "## Limits\n\n" + _limits(model, facts),
        "## Licence\n\n" + _licence(license_name),
    ]
    (folder / "README.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def _front_matter(
    name: str, model: Model, facts: RunFacts, gap: str | None, license_name: str | None
) -> dict[str, Any]:
    values = {
        "license": license_name,
        "language": facts.languages or None,
        "library_name": "polyglance" if gap else "transformers",
        "pipeline_tag": _pipeline(model),
        "tags": ["polyglance", "vision-language", "multilingual", model.backbone.kind],
        "datasets": [part for part in (facts.settings.get("task"), facts.corpus) if part] or None,
        "model-index": [{"name": name, "results": found}] if (found := _model_index(model, facts)) else None,
    }
    return {key: value for key, value in values.items() if value is not None}


def _pipeline(model: Model) -> str:
    """The task of the Hub that is nearest."""
    if not isinstance(model.network, FinetuneModel):
        return "zero-shot-image-classification"
    return "text-classification" if "entails" in model.capabilities else "visual-question-answering"


def _model_index(model: Model, facts: RunFacts) -> list[dict[str, Any]]:
    """Each language's score, as the Hub lists results."""
    dataset = str(facts.settings.get("task") or facts.corpus or "unknown")
    return [
        {
            "task": {"type": _pipeline(model)},
            "dataset": {"type": dataset, "name": f"{dataset} ({code})", "config": code, "split": "test"},
            "metrics": [{"type": metric, "value": round(100 * value, 2), "name": f"{metric}, %"}],
        }
        for metric, scores in _scores(facts).items()
        for code, value in scores.items()
    ]


def _scores(facts: RunFacts) -> dict[str, dict[str, float]]:
    if not facts.result:
        return {}
    if "task" in facts.result:
        metric = "accuracy" if "accuracy" in facts.result else "mean_recall"
        return {metric: {code: scores_of(facts.result)[code] for code in facts.languages}}
    return {
        "recall_at_1": {code: mean_recall_at_1(facts.result["retrieval"][code]) for code in facts.languages}
    }


def _summary(model: Model, facts: RunFacts) -> str:
    backbone = model.backbone
    task = facts.settings.get("task")
    what = f"fine-tuned on {task}, " if task else "pretrained, "
    size = (
        f"images of {backbone.image_size} x {backbone.image_size} pixels"
        if backbone.image_size
        else "regions"
    )
    return (
        f"A vision-language model with {facts.parameters:,} parameters, {what}exported by Polyglance "
        f"{__version__}. Backbone `{backbone.kind}`: {backbone.summary or 'defined by its user'}. It reads "
        f"{size}, and texts of {model.length} tokens at most, and can: "
        f"{', '.join(sorted(model.capabilities)) or NOT_RECORDED}."
    )


def _usage(model: Model, gap: str | None) -> str:
    finetuned = isinstance(model.network, FinetuneModel)
    can = model.capabilities
    if "similarity" in can:
        call = 'model.similarity(["cat.jpg"], ["a cat", "ein Hund"])'
    elif "entails" in can:
        call = 'model.entails("cat.jpg", None, "Ein Tier schläft.")'
    else:
        call = 'model.answer("cat.jpg", "Welche Farbe hat die Katze?", top=3)'
    ours = f'import polyglance\n\nmodel = polyglance.load("FOLDER")\nprint({call})'
    text = f"## Use\n\n```python\n{ours}\n```"
    if gap:
        return f"{text}\n\n`transformers` does not read it: {gap}."
    if finetuned:
        score = "logits = model(**inputs).logits\nprint(model.config.id2label[int(logits[0].argmax())])"
    else:
        score = "print(model(**inputs).logits_per_image)"
    theirs = (
        "import torch\nfrom transformers import AutoModel, AutoProcessor\n\n"
        'model = AutoModel.from_pretrained("FOLDER", trust_remote_code=True)\n'
        'processor = AutoProcessor.from_pretrained("FOLDER", trust_remote_code=True)\n'
        'inputs = processor(images="cat.jpg", text=["ein Hund"], padding=True, truncation=True, '
        'return_tensors="pt")\n'
        f"with torch.no_grad():\n    {score}".replace("\nprint", "\nprint")
    )
    return (
        f"{text}\n\nOr with `transformers` 5 alone; the folder's code, `modeling_polyglance.py`, needs "
        f"`pydantic`, `opencv-python-headless` and `pillow`:\n\n```python\n{theirs}\n```"
    )


def _training(facts: RunFacts) -> str:
    if not facts.settings:
        return f"## Training\n\nThe run: {NOT_RECORDED}."
    result, fit = facts.result, facts.settings.get("fit", {})
    rows = [["", ""], ["run", str(facts.settings["name"])], ["steps", str(facts.step or NOT_RECORDED)]]
    rows += [["seed", str(fit.get("seed", NOT_RECORDED))]]
    rows += [
        [key, str(result[key])] for key in ("method", "setting", "code", "device", "time") if result.get(key)
    ]
    settings = json.dumps(_without_absent(facts.settings), indent=1, ensure_ascii=False)
    return (
        f"## Training\n\n{markdown_table(rows)}\n\n<details><summary>All settings (folders by their names "
        f"alone)</summary>\n\n```json\n{settings}\n```\n\n</details>"
    )


def without_places(value: Any) -> Any:
    """Settings or results with the last part of each absolute path alone: where data lay is nobody's
    business."""
    if isinstance(value, dict):
        return {key: without_places(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [without_places(inner) for inner in value]
    return Path(value).name if isinstance(value, str) and value.startswith(("/", "~")) else value


def _without_absent(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings without those that are off."""
    plain = {k: _without_absent(v) if isinstance(v, dict) else v for k, v in settings.items()}
    return {key: value for key, value in plain.items() if value not in (None, {}, [], "")}


def _data(facts: RunFacts) -> str:
    lines = []
    if base := facts.settings.get("model") if facts.settings.get("task") else None:
        lines.append(
            f"It began with `{Path(str(base)).name}`, whose data and licence are those of that model."
        )
    if (found := SAMPLE_NAME.fullmatch(facts.corpus)) and "corpus" in facts.settings:
        scenes = f"\n{SCENES_DATA}" if found[1] == "scenes" else ""
        lines.append(f"Polyglance's sample corpus (`{facts.corpus}`):\n\n{SAMPLE_DATA}{scenes}")
    else:
        lines.append(f"`{facts.corpus or NOT_RECORDED}`; licence: {NOT_RECORDED}.")
    if digest := facts.result.get("data_sha256"):
        lines.append(f"SHA-256 over all files: `{digest}`.")
    return "\n\n".join(lines)


def _results(facts: RunFacts) -> str:
    if not facts.result:
        return f"{NOT_RECORDED.capitalize()}: the run was not evaluated, or went on after this checkpoint."
    if "task" in facts.result:
        return finetuning_table(facts.result)
    result = facts.result
    columns = ("i2t_r1", "i2t_r5", "i2t_r10", "t2i_r1", "t2i_r5", "t2i_r10")
    rows = [["language", "R@1", "95 % interval", *(c.replace("_r", " R@") for c in columns), "chance R@1"]]
    for code in facts.languages:
        figures, ends = result["retrieval"][code], (result.get("interval") or {}).get(code)
        interval = f"[{', '.join(map(percent, ends))}]" if ends else ""
        values = [percent(figures[c]) for c in columns]
        rows.append(
            [code, percent(mean_recall_at_1(figures)), interval, *values, percent(figures["chance_r1"])]
        )
    apart = ("en", *result.get("heldout_languages", ()))  # the latter in no training text
    others = [mean_recall_at_1(result["retrieval"][code]) for code in facts.languages if code not in apart]
    if others:
        mean = percent(mean_or_zero(others))
        rows.append([f"mean of {len(others)} others", mean, *[""] * (len(columns) + 2)])
    return f"Zero-shot retrieval, % (R@1: mean of both ways).\n\n{markdown_table(rows)}"


def _limits(model: Model, facts: RunFacts) -> str:
    lines = [
        "Languages beside those of the table were not measured."
        if facts.result
        else "Nothing was measured in any language.",
        "Intervals say what other test images would change, not what other seeds would; this is one seed."
        if facts.result
        else "",
        f"Texts are cut after {model.length} tokens.",
        _describe_shapes(model.backbone),
        "Nothing was measured about bias, safety, or images unlike those of its data.",
    ]
    return "\n".join(f"- {line}" for line in lines if line)


def _licence(license_name: str | None) -> str:
    code = "`modeling_polyglance.py` is Polyglance's code: Apache-2.0."
    return f"Weights: {license_name or NOT_RECORDED}. {code}"


def _describe_shapes(backbone: Any) -> str:
    """Say what an image loses of its shape; "" of a model that takes none."""
    if not backbone.image_size:
        return ""
    if backbone.preprocess.resize == "square":
        return "The whole image is squeezed into a square."
    return "Of an image that is no square, the centre alone is seen."
