"""Exports as `transformers` reads them: by our classes after `import polyglance`, and by the code in the
folder where Polyglance is not installed. Both compute what evaluation computes."""

import functools
import gzip
import io
import json
import os
import random
import subprocess
import sys
import unicodedata
from pathlib import Path

import cv2
import numpy as np
import pytest
import sentencepiece
import tokenizers
import torch
from huggingface_hub import ModelCard
from PIL import Image
from safetensors import safe_open
from transformers import AutoImageProcessor, AutoModel, AutoProcessor, AutoTokenizer
from transformers.dynamic_module_utils import get_imports

import raylib.api as polyglance
from finetune.batches import encode_texts
from pretrain.__main__ import main as pretrain
from raylib.api import export as exporting
from raylib.api.export import export_model
from raylib.data.images import decode_image, resize_image
from raylib.errors import UserError
from raylib.models import BACKBONES
from raylib.models.base import RegionBackbone, RetrievalBackbone
from raylib.models.decoder import encode_answers
from raylib.models.finetuned import FinetuneModel
from raylib.models.unified import UnifiedModel
from raylib.models.vision import normalize_pixels
from raylib.sample import DATA
from raylib.text import Tokenizer, add_specials
from tests.factories import make_model
from tests.test_tuning import CONTEXT, METHODS

ROOT = Path(__file__).parent.parent
TEXTS = ["a dog", "Ein Hund läuft über die Straße.", "一只狗", "कुत्ता दौड़ रहा है", "<mask> </s> [SEP]"]
EXACT = dict(rtol=0, atol=1e-6)  # float32; measured: 0
HUB = {name for name, kind in BACKBONES.items() if issubclass(kind, RetrievalBackbone)}


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Files as people have them: odd sizes, grey, transparent, 16 bits, JPEG."""
    folder, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    smooth = cv2.resize(rng.integers(0, 256, (7, 9, 4), np.uint8), (131, 97), interpolation=cv2.INTER_CUBIC)
    for name, mode in (("rgb.png", "RGB"), ("grey.png", "L"), ("alpha.png", "RGBA"), ("photo.jpg", "RGB")):
        Image.fromarray(smooth).convert(mode).save(folder / name)
    Image.fromarray(smooth[:3, :5, :3]).save(folder / "tiny.png")
    cv2.imwrite(str(folder / "deep.png"), smooth[..., :3].astype(np.uint16) * 257)
    Image.fromarray(smooth).convert("L").save(folder / "grey.jpg")
    return sorted(map(str, folder.iterdir()))


def tiny(kind: str) -> torch.nn.Module:
    """A random model of a kind, with the sample's vocabulary."""
    torch.manual_seed(0)
    model = BACKBONES[kind](BACKBONES[kind].sizes["tiny"])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def save(model: torch.nn.Module, folder: Path) -> Path:
    model.float().save(folder)
    (folder / "tokenizer.model").write_bytes((DATA / "tokenizer.model").read_bytes())
    return folder


def finetuned(kind: str, **options) -> FinetuneModel:
    torch.manual_seed(1)
    return FinetuneModel(tiny(kind), ("no", "yes", "maybe"), 1, 0.1, **options).eval()


class Exports(dict):
    """{name: exported folder}, each made when it is asked for: a stored run, a random model of a kind, or
    one of `OTHERS`."""

    def __init__(self, folder: Path, stored: Path):
        self.folder, self.stored = folder, stored

    def __missing__(self, name: str) -> Path:
        if name in RUNS:
            source = self.stored / RUNS[name]
        else:
            source = save(tiny(name) if name in HUB else OTHERS[name](), self.folder / "models" / name)
        assert export_model(source, self.folder / name) is None
        self[name] = self.folder / name
        return self[name]


def tuned(method: str) -> FinetuneModel:
    model = finetuned("unified")
    METHODS[method].build(CONTEXT).adapt(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def generative() -> FinetuneModel:
    answers = encode_answers(("no", "yes", "maybe"), Tokenizer.load(DATA / "tokenizer.model"))
    return finetuned("cclm_swin", answers=answers)


RUNS = {
    "run": "runs/pretrained",
    "old_export": "model",
    "classified": "runs/classified",
    "retrieved": "runs/retrieved",
}
OTHERS = {
    "windows": lambda: make_model(
        vocabulary=12000, positions=64, image_size=32, vision_window=16, dtype=torch.float32
    ),
    "classifier": lambda: finetuned("cclm"),
    "decoder": generative,
    **{method: functools.partial(tuned, method) for method in METHODS},
}
FEW = ("run", "windows", "cclm_swin", "clip", "decoder", "compacter")
ALL = tuple(dict.fromkeys((*RUNS, *sorted(HUB), *OTHERS)))
MODELS = pytest.mark.parametrize(
    "names", [FEW, pytest.param(ALL, marks=pytest.mark.slow)], ids=["few", "all"]
)


@pytest.fixture(scope="module")
def exports(tmp_path_factory, stored):
    return Exports(tmp_path_factory.mktemp("exports"), stored)


def expected(folder: Path, images: list[str]) -> dict[str, torch.Tensor]:
    """What our own classes compute of images and `TEXTS`, text i about image i."""
    model = polyglance.load(folder, "cpu", "float32")
    ids = encode_texts(TEXTS, model.tokenizer, model.length)
    size = model.backbone.image_size
    arrays = [resize_image(decode_image(Path(path).read_bytes()), size) for path in images]
    network = model.network
    with torch.no_grad():
        pixels = torch.from_numpy(np.stack(arrays))
        if isinstance(network, FinetuneModel):
            return {"logits": network({"text": ids, "images": pixels})}
        states = network.encode_images(pixels)
        found = {
            "image_embeds": network.embed_images(states, normalize=True),
            "text_embeds": network.embed_text(ids, normalize=True),
        }
        if network.has_match_head:
            logits = network.match_head(network.fused_cls(ids, states))
            found["match"] = logits[:, 1] - logits[:, 0]
    return found


@MODELS
def test_automodel_computes_what_our_classes_compute(exports, images, names):
    for name in names:
        folder = exports[name]
        model, processor = AutoModel.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
        assert type(model).__module__ == "raylib.api.huggingface"
        batch = processor(images=images[:5], text=TEXTS, padding=True, truncation=True, return_tensors="pt")
        with torch.no_grad():
            output = dict(model(**batch))
            if "logits" not in output and model.model.has_match_head:
                output["match"] = model.match(**batch)
        for key, value in expected(folder, images[:5]).items():
            torch.testing.assert_close(
                output[key], value, **EXACT, msg=lambda m, n=name, k=key: f"{n} {k}: {m}"
            )


@MODELS
def test_exports_are_read_by_their_own_code_without_polyglance(exports, images, tmp_path, names):
    folders = {name: exports[name] for name in names}
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    env |= {
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(tmp_path / "home"),
        "HF_MODULES_CACHE": str(tmp_path / "code"),
    }
    command = [sys.executable, str(ROOT / "tests/remote_models.py"), *map(str, folders.values())]
    given = json.dumps({"images": images[:5], "texts": TEXTS})
    done = subprocess.run(command, input=given, capture_output=True, text=True, cwd=tmp_path, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    for name, folder in folders.items():
        for key, value in expected(folder, images[:5]).items():
            output = torch.tensor(found[str(folder)][key])
            torch.testing.assert_close(output, value, **EXACT, msg=lambda m, n=name, k=key: f"{n} {k}: {m}")


def test_saved_automodel_is_read_by_polyglance_and_by_automodel(exports, images, tmp_path):
    for name in ("run", "decoder", "compacter"):
        model, processor = (
            AutoModel.from_pretrained(exports[name]),
            AutoProcessor.from_pretrained(exports[name]),
        )
        folder = tmp_path / name
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        (folder / "tokenizer.model").write_bytes((exports[name] / "tokenizer.model").read_bytes())
        before, after = expected(exports[name], images[:5]), expected(folder, images[:5])
        assert all(torch.equal(value, after[key]) for key, value in before.items())
        again = AutoModel.from_pretrained(folder).state_dict()
        assert all(torch.equal(value, again[key]) for key, value in model.state_dict().items())
        assert (folder / "modeling_polyglance.py").is_file()


def test_export_in_float16_is_half_as_large_and_read_as_float32(tmp_path, images):
    source = save(tiny("unified"), tmp_path / "model")
    for name, float16 in (("whole", False), ("half", True)):
        export_model(source, tmp_path / name, float16=float16)
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("half", "whole")]
    assert sizes[0] < 0.6 * sizes[1]
    whole, half = (polyglance.load(tmp_path / name, "cpu").network for name in ("whole", "half"))
    automodel = AutoModel.from_pretrained(tmp_path / "half")
    for other in (half, automodel.model):
        for (name, x), (_, y) in zip(whole.named_parameters(), other.named_parameters(), strict=True):
            assert y.dtype == torch.float32 and x.half().float().equal(y), name
    weights = {"a": torch.tensor([1e5]), "b": torch.tensor([1])}
    with pytest.raises(UserError, match="model: a is beyond the range of float16; leave out --float16"):
        exporting.halve(weights, source)
    assert exporting.halve({"b": weights["b"]}, source)["b"].dtype == torch.int64


def test_classifier_takes_premises_pairs_of_images_and_labels(exports, tmp_path):
    folder = save(FinetuneModel(tiny("unified"), ("false", "true"), 2, 0.0).eval(), tmp_path / "model")
    export_model(folder, tmp_path / "pairs")
    model, ours = AutoModel.from_pretrained(tmp_path / "pairs"), FinetuneModel.from_pretrained(folder).eval()
    ids = encode_texts(TEXTS[:3], Tokenizer.load(DATA / "tokenizer.model"), 40)
    padded, mask = ids.padded(20, fill=1)
    pixels = torch.randint(0, 256, (6, 16, 16, 3), dtype=torch.uint8)
    floats = normalize_pixels(pixels, 127.5, 127.5, torch.float32).permute(0, 3, 1, 2)
    with torch.no_grad():
        nested = model(padded, mask, floats.view(3, 2, 3, 16, 16), labels=torch.tensor([0, 1, 1]))
        logits = ours({"text": ids, "images": pixels})
        torch.testing.assert_close(nested.logits, logits, **EXACT)
        loss = torch.nn.functional.cross_entropy(logits, torch.tensor([0, 1, 1]))
        torch.testing.assert_close(nested.loss, loss, **EXACT)
        assert model(padded, mask, floats, return_dict=False)[0].equal(nested.logits)
        entailment = AutoModel.from_pretrained(exports["classified"])
        reference = polyglance.load(exports["classified"], "cpu", "float32").network
        premise = entailment(padded, mask, premise_ids=padded, premise_attention_mask=mask).logits
        torch.testing.assert_close(premise, reference({"text": ids, "premise": ids}), **EXACT)


def test_wrong_input_is_a_line(exports):
    model = AutoModel.from_pretrained(exports["run"])
    with pytest.raises(ValueError, match=r"\(1, 3, 8, 8\): this model reads \(..., 3, 16, 16\)"):
        model(pixel_values=torch.zeros(1, 3, 8, 8))
    with pytest.raises(ValueError, match="no image-text matching head"):
        AutoModel.from_pretrained(exports["clip"]).match(torch.zeros(1, 2, dtype=torch.long), torch.zeros(1))
    processor = AutoImageProcessor.from_pretrained(exports["run"])
    with pytest.raises(ValueError, match="do_resize: this model reads images as its folder says"):
        processor(np.zeros((4, 4, 3), np.uint8), do_resize=False)


@pytest.mark.parametrize("name", ["run", "clip", "windows"])
def test_processor_gives_the_pixels_of_evaluation(exports, images, name):
    processor = AutoProcessor.from_pretrained(exports[name])
    backbone = polyglance.load(exports[name], "cpu").backbone
    files = [Path(path).read_bytes() for path in images]
    arrays = np.stack([resize_image(decode_image(data), backbone.image_size) for data in files])
    ours = backbone.pixel_values(torch.from_numpy(arrays))
    given = {
        "paths": images,
        "bytes": files,
        "PIL": [Image.open(io.BytesIO(data)) for data in files],
        "arrays": [decode_image(data) for data in files],
        "colours first": [torch.from_numpy(decode_image(data)).permute(2, 0, 1) for data in files[:-1]],
    }
    for what, batch in given.items():
        pixels = processor(images=batch, return_tensors="pt")["pixel_values"]
        assert torch.equal(pixels, ours[: len(batch)]), what
    assert torch.equal(processor(images=images[0], return_tensors="pt")["pixel_values"], ours[:1])


def sample_lines() -> dict[str, list[str]]:
    """{language: lines of the sample corpus}, captions and declaration."""
    lines: dict[str, list[str]] = {}
    for path in (*sorted(DATA.glob("captions/*.gz")), *sorted(DATA.glob("udhr/*.gz"))):
        with gzip.open(path, "rt", encoding="utf-8") as file:
            for line in file:
                fields = line.rstrip("\n").split("\t")
                lines.setdefault(path.name.split(".")[0], []).extend(filter(None, fields[1:] or fields))
    return lines


def assert_equal_ids(theirs, ours: Tokenizer, texts: list[str], length: int) -> None:
    found = theirs(texts, truncation=True, max_length=length)["input_ids"]
    rows = add_specials(ours.encode(texts), ours, length)
    for text, ids, row in zip(texts, found, np.split(rows.values, np.cumsum(rows.lengths)[:-1]), strict=True):
        assert ids == row.tolist(), repr(text)


ODD = [
    "",
    " ",
    "\u3000\u00a0\u200d  two  \t words\n",
    "▁▁a ▁",
    "<s>a</s><pad> <unk><mask></ s>",
    "\u0651\u064e شدّة",  # Arabic marks in the order in which they are typed
    "e\u0301\u0323 ế Việt",
    "한국어",
    "が ｶﾞ ﬁ ① Å",
    "🏳️‍🌈👩‍👩‍👧 \U000e0041",
    "\x00\x07\ufeff\u2028x",
    # marks, and final consonants, behind what rules replace, but not together with them
    "▁\u0301 Ⅻ\u0340x ﬁ\u0308 ŉ\u0340 ℀\u0301 \ufffd\u0323",
    "가\u11a8 호\u11a8 i\u0344 \u0344",
]


def test_autotokenizer_gives_our_ids_in_22_languages(exports):
    theirs, ours = AutoTokenizer.from_pretrained(exports["windows"]), Tokenizer.load(DATA / "tokenizer.model")
    lines, rng = sample_lines(), random.Random(0)
    assert len(lines) == 22
    texts = [text for code in lines for text in rng.sample(lines[code], 150)]
    for texts_of in (texts, [unicodedata.normalize("NFD", text) for text in texts], ODD):
        for length in (64, 9):
            assert_equal_ids(theirs, ours, texts_of, length)
    batch = theirs(TEXTS, padding=True, truncation=True, return_tensors="pt")
    rows = encode_texts(TEXTS, ours, 64)
    padded, mask = rows.padded(batch["input_ids"].shape[1], fill=ours.pad)
    assert batch["input_ids"].equal(padded) and batch["attention_mask"].bool().equal(mask)
    assert theirs.model_max_length == 64
    assert (theirs.pad_token_id, theirs.cls_token_id, theirs.sep_token_id) == (ours.pad, ours.cls, ours.sep)
    assert (theirs.unk_token_id, theirs.mask_token_id, len(theirs)) == (ours.unk, ours.mask, ours.vocabulary)
    assert theirs.decode(theirs("Ein Hund läuft").input_ids, skip_special_tokens=True) == "Ein Hund läuft"


@pytest.mark.slow
def test_autotokenizer_gives_our_ids_for_all_lines_and_characters(exports):
    theirs, ours = AutoTokenizer.from_pretrained(exports["windows"]), Tokenizer.load(DATA / "tokenizer.model")
    lines = [text for texts in sample_lines().values() for text in texts]
    characters = [chr(c) for c in range(sys.maxunicode + 1) if not 0xD800 <= c < 0xE000]  # no surrogates
    for texts in (
        lines,
        [unicodedata.normalize("NFD", t) for t in lines],
        [f"a{c}b {c}" for c in characters],
    ):
        for start in range(0, len(texts), 20_000):
            assert_equal_ids(theirs, ours, texts[start : start + 20_000], 64)
    # letters with up to two marks, and marks alone, drawn from all of Unicode
    rng, marks = random.Random(0), [c for c in characters if unicodedata.category(c)[0] == "M"]
    letters = [*(c for text in rng.sample(lines, 3000) for c in text), ""]
    odd = [
        "".join(rng.choice(letters) + "".join(rng.choices(marks, k=rng.randint(0, 2))) for _ in range(4))
        for _ in range(20_000)
    ]
    assert_equal_ids(theirs, ours, [*odd, *("".join(rng.choices(marks, k=5)) for _ in range(5000))], 64)


@pytest.mark.parametrize("fast", [True, False])
def test_exports_for_polyglance_alone_have_a_tokenizer_with_our_ids(tmp_path, fast):
    """`transformers` reads no model of regions, but makes a tokenizer of any tokenizer.model that it sees."""
    assert export_model(save(tiny("uc2"), tmp_path / "model"), tmp_path / "out") is not None
    theirs, ours = (
        AutoTokenizer.from_pretrained(tmp_path / "out", use_fast=fast),
        Tokenizer.load(tmp_path / "out"),
    )
    lines, rng = sample_lines(), random.Random(1)
    odd = [*ODD, "ＦＵＬＬ　ｗｉｄｔｈ　１２", "a\r\n\n b\tc", "नमस्ते", "ำ กำ", "word " * 3000]
    for texts in ([text for code in lines for text in rng.sample(lines[code], 30)], odd):
        assert_equal_ids(theirs, ours, texts, 64)
        for text, ids in zip(texts, ours.encode(texts), strict=True):
            assert theirs(text, add_special_tokens=False)["input_ids"] == ids.tolist()
    assert (theirs.model_max_length, theirs.padding_side, theirs.truncation_side) == (40, "right", "right")
    pair = theirs("ein Hund", "eine Katze")["input_ids"]
    first, second = (row.tolist() for row in ours.encode(["ein Hund", "eine Katze"]))
    assert pair == [ours.cls, *first, ours.sep, ours.sep, *second, ours.sep]


def test_tokenizer_that_cannot_be_converted_is_hidden_from_autotokenizer(tmp_path):
    """A BPE model, of which `transformers` would make a tokenizer with other ids."""
    source, out = save(tiny("unified"), tmp_path / "model"), tmp_path / "out"
    lines = [text for texts in sample_lines().values() for text in texts[:20]]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_prefix=str(tmp_path / "bpe"),
        model_type="bpe",
        vocab_size=900,
        bos_id=0,
        pad_id=1,
        eos_id=2,
        unk_id=3,
        control_symbols="<mask>",
        minloglevel=2,
    )
    (tmp_path / "bpe.model").replace(source / "tokenizer.model")
    assert "its tokenizer has no equal there" in (export_model(source, out) or "")
    with pytest.raises(ValueError, match="instantiate the backend tokenizer"):
        AutoTokenizer.from_pretrained(out)
    ours, before = polyglance.load(out, "cpu").tokenizer, Tokenizer.load(source)
    assert ours.sha256 == before.sha256 and ours.encode(lines)[0].tolist() == before.encode(lines)[0].tolist()
    again = tmp_path / "again"
    export_model(out, again)
    assert Tokenizer.load(again).sha256 == before.sha256


def test_json_tokenizer_is_exported_with_our_specials(tmp_path):
    """A WordPiece file with a template, a length and padding of its own, and `<mask>` that eats spaces."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "ein", "hund", "##e", ".", "[", "]", "mask"]
    made = tokenizers.Tokenizer(
        tokenizers.models.WordPiece({w: i for i, w in enumerate(words)}, unk_token="[UNK]")
    )
    made.normalizer = tokenizers.normalizers.BertNormalizer()
    made.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    made.add_special_tokens([tokenizers.AddedToken(w, special=True, lstrip=w == "[MASK]") for w in words[:5]])
    made.post_processor = tokenizers.processors.TemplateProcessing(
        single="$A [SEP]", pair="$A $B [SEP]", special_tokens=[("[SEP]", 3)]
    )
    made.enable_truncation(4)
    made.enable_padding(length=9)
    source, out = save(tiny("unified"), tmp_path / "model"), tmp_path / "out"
    (source / "tokenizer.model").unlink()
    made.save(str(source / "tokenizer.json"))
    export_model(source, out)
    ours, theirs = polyglance.load(out, "cpu").tokenizer, AutoTokenizer.from_pretrained(out)
    assert ours.sha256 == Tokenizer.load(source).sha256
    texts = ["Ein Hund.", "ein  [MASK] hunde", "", "x", "ein " * 90, "[CLS]ein[SEP]"]
    assert_equal_ids(theirs, ours, texts, 64)


def test_xlmr_and_json_tokenizers_give_our_ids(tmp_path):
    from raylib.api.tokenizer_json import write_tokenizer

    texts = [*(text for texts in sample_lines().values() for text in texts[:20]), *ODD, *TEXTS]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_prefix=str(tmp_path / "xlmr"), vocab_size=900, minloglevel=2
    )
    xlmr = (tmp_path / "xlmr.model").rename(tmp_path / "sentencepiece.bpe.model")
    for number, path in enumerate((xlmr, tmp_path / "0" / "tokenizer.json")):
        ours, folder = Tokenizer.load(path), tmp_path / str(number)
        folder.mkdir()
        write_tokenizer(ours, 32, folder)
        assert_equal_ids(AutoTokenizer.from_pretrained(folder), ours, texts, 32)


def test_prompt_before_every_text_is_part_of_the_tokenizer(tmp_path):
    from raylib.api.tokenizer_json import write_tokenizer
    from raylib.text import PromptedTokenizer

    plain = Tokenizer.load(DATA / "tokenizer.model")
    for prompted in (
        PromptedTokenizer(plain, ids=(12000, 12001)),
        PromptedTokenizer(plain, words="a photo of"),
    ):
        write_tokenizer(prompted, 12, tmp_path)
        assert_equal_ids(AutoTokenizer.from_pretrained(tmp_path), prompted, TEXTS + ODD[2:], 12)


def test_regions_are_exported_for_polyglance_alone(tmp_path, capsys):
    kind = next(name for name, kind in BACKBONES.items() if issubclass(kind, RegionBackbone))
    folder = save(FinetuneModel(tiny(kind), ("no", "yes"), 1, 0.1).eval(), tmp_path / "model")
    assert pretrain(["export", str(folder), str(tmp_path / "out")]) == 0
    assert "read by polyglance.load alone: it reads region features" in capsys.readouterr().out
    assert not (tmp_path / "out/modeling_polyglance.py").exists()
    assert polyglance.load(tmp_path / "out", "cpu").labels == ("no", "yes")
    assert "`transformers` does not read it" in (tmp_path / "out/README.md").read_text(encoding="utf-8")


def test_export_says_how_its_run_read(exports, stored):
    before, after = (
        polyglance.load(path, "cpu") for path in (stored / "runs/classified", exports["classified"])
    )
    assert (after.length, after.task, after.capabilities) == (before.length, before.task, before.capabilities)


def test_weights_carry_metadata(exports, stored):
    with safe_open(exports["run"] / "model.safetensors", "pt") as file:
        metadata = file.metadata()
    assert metadata["format"] == "pt" and metadata["polyglance"] == polyglance.__version__
    assert (metadata["kind"], metadata["run"], metadata["step"]) == ("unified", "pretrained", "2")


def test_model_card_tells_what_the_run_recorded(exports, stored):
    card = ModelCard.load(exports["classified"] / "README.md")
    result = json.loads((stored / "runs/classified/result.json").read_text(encoding="utf-8"))
    assert card.data.language == ["en", "ru"] and card.data.library_name == "transformers"
    assert card.data.pipeline_tag == "text-classification" and card.data.license is None
    scores = {found.dataset_config: found.metric_value for found in card.data.eval_results}
    assert scores == {code: round(100 * value, 2) for code, value in result["accuracy"].items()}
    for code, (low, high) in result["interval"].items():
        row = next(line for line in card.text.splitlines() if line.startswith(f"| {code} |"))
        assert f"[{100 * low:.1f}, {100 * high:.1f}]" in row
    assert "Weights: not recorded" in card.text and "/home/" not in card.text
    unfinished = ModelCard.load(exports["run"] / "README.md")  # a run that stopped has no result
    assert "Not recorded: the run was not evaluated" in unfinished.text and unfinished.data.language is None


def test_model_card_names_the_samples_licences(mini, tmp_path):
    from pretrain.train import run
    from raylib.config import override

    run(override(mini("name=trained", "runtime=local", "workers=1", "fit.steps=1"), ["fit.save_every=1"]))
    assert (
        pretrain(["export", str(tmp_path / "trained"), str(tmp_path / "out"), "--license", "apache-2.0"]) == 0
    )
    card = ModelCard.load(tmp_path / "out/README.md")
    assert card.data.license == "apache-2.0" and card.data.language[0] == "en"
    assert "CC-BY-4.0" in card.text and "| de |" in card.text
    assert len(card.data.eval_results) == len(card.data.language)


def test_export_is_written_whole_or_not_at_all(stored, tmp_path, monkeypatch, capsys):
    def interrupt(*_) -> None:
        raise KeyboardInterrupt

    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").touch()
    assert pretrain(["export", str(stored / "model"), str(tmp_path / "full")]) == 2
    assert "full: not empty; give a new folder" in capsys.readouterr().err
    monkeypatch.setattr(exporting, "write_card", interrupt)
    assert pretrain(["export", str(stored / "model"), str(tmp_path / "out")]) == 130
    assert not (tmp_path / "out").exists()
    monkeypatch.undo()
    (tmp_path / "out").mkdir()  # an empty folder is as good as none
    assert pretrain(["export", str(stored / "model"), str(tmp_path / "out")]) == 0


def test_part_of_a_run_is_exported_by_its_language(stored, tmp_path):
    with pytest.raises(UserError, match="has a model for each language: give language="):
        export_model(stored / "runs/few_shot", tmp_path / "out")
    assert export_model(stored / "runs/few_shot", tmp_path / "out", "ru") is None
    card = ModelCard.load(tmp_path / "out/README.md")
    assert card.data.language == ["ru"] and card.data.model_name == "few_shot_ru"


def test_backbone_of_a_users_file_travels_in_the_code(tmp_path, images):
    (tmp_path / "mine.py").write_text(
        "from raylib.models.unified import TINY, UnifiedModel\n\n\n"
        "class Mine(UnifiedModel):\n    kind = 'mine'\n    stored_kinds = ('mine',)\n"
        "    sizes = {'tiny': TINY}\n"
    )
    from raylib.models import find_backbone

    kind = find_backbone(str(tmp_path / "mine.py"))
    folder = save(kind(kind.sizes["tiny"]).eval(), tmp_path / "model")
    model = polyglance.load(folder, "cpu", backbone=str(tmp_path / "mine.py"))
    code = exporting.modeling_code(model, folder)
    assert "class Mine(UnifiedModel)" in code and "return Mine" in code
    assert "import raylib" not in code and "from raylib" not in code
    compile(code, "modeling_polyglance.py", "exec")


def test_code_of_an_export_needs_few_packages(exports):
    standard = set(sys.stdlib_module_names)
    needed = set(get_imports(exports["run"] / "modeling_polyglance.py")) - standard
    assert needed == {"PIL", "cv2", "numpy", "pydantic", "torch", "transformers"}


def test_old_exports_are_read_as_before(stored):
    assert isinstance(polyglance.load(stored / "model", "cpu").network, UnifiedModel)


def test_automodel_knows_our_classes_without_importing_transformers_before_it_is_asked(exports, tmp_path):
    # this module has imported `transformers` first; Ray imports accelerate, which asks whether it is there
    code = (
        "import raylib.api, importlib.util, sys\nassert importlib.util.find_spec('transformers')\n"
        "import transformers\nassert 'transformers.modeling_utils' not in sys.modules\n"
        "from transformers import AutoModel\n"
        "print(type(AutoModel.from_pretrained(sys.argv[1])).__module__)"
    )
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code, str(exports["run"])]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=env)
    assert done.stdout.strip() == "raylib.api.huggingface", done.stderr[-2000:]


ORDERS = {  # of imports, and what may come between them
    "transformers before": "import transformers, raylib.api",
    "class before": "from transformers import AutoModel\nimport raylib.api",
    "module before": "import transformers.models.auto.configuration_auto, raylib.api",
    "package after": "import raylib.api\nfrom transformers.models.auto import AutoModel",
    "module after": "import raylib.api\nfrom transformers.models.auto.modeling_auto import AutoModel",
    "pipeline": "import raylib.api\nfrom transformers.pipelines import pipeline",
    "another model": "import raylib.api\nfrom transformers import CLIPModel",
    "ours": "import raylib.api.huggingface",
    # accelerate does, whom Ray imports
    "probe": "import raylib.api\nassert importlib.util.find_spec('transformers')",
    "reload": "import raylib.api, transformers\nimportlib.reload(transformers)",
    "failure": "import raylib.api\nwithout('huggingface_hub', 'transformers')",
    "failure of ours": "import raylib.api\nwithout('cv2', 'transformers.models.auto.modeling_auto')",
    "two at once": "import raylib.api\nat_once('modeling_auto', 'processing_auto')",
}
EACH_ORDER = """
import importlib.util, json, os, sys, threading
import torch  # once, for all of them


def without(missing, module):
    sys.modules[missing] = None
    try:
        importlib.import_module(module)
    except ImportError:
        del sys.modules[missing]
    importlib.import_module(module)


def at_once(*modules):
    names = [f"transformers.models.auto.{module}" for module in modules]
    threads = [threading.Thread(target=importlib.import_module, args=[name]) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


for name, code in json.loads(sys.argv[1]).items():
    if not os.fork():
        exec(code)
        from transformers.models.auto.configuration_auto import AutoConfig
        print(name, type(AutoConfig.for_model("polyglance")).__module__, sep=": ", flush=True)
        os._exit(0)
    os.wait()
"""


@pytest.mark.slow
def test_automodel_knows_our_classes_in_every_order_of_imports():
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", EACH_ORDER, json.dumps(ORDERS)]
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    expected = [f"{name}: raylib.api.huggingface" for name in ORDERS]
    assert done.stdout.splitlines() == expected and "Traceback" not in done.stderr, done.stderr[-2000:]


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["soft_prompt", "hard_prompt", "lora"])
def test_runs_with_prompts_and_small_modules_answer_alike(finetune, tmp_path, images, strategy):
    code, printed = finetune("scenes_xvnli", "name=tuned", "runtime=local", f"strategies.{strategy}={{}}")
    assert code == 0, printed
    assert export_model(tmp_path / "tuned", tmp_path / "out") is None
    ours = polyglance.load(tmp_path / "tuned", "cpu", "float32")
    again = polyglance.load(tmp_path / "out", "cpu", "float32")
    model = AutoModel.from_pretrained(tmp_path / "out")
    processor = AutoProcessor.from_pretrained(tmp_path / "out")
    for image, text in zip(images, TEXTS, strict=False):
        batch = processor(images=image, text=text, truncation=True, return_tensors="pt")
        with torch.no_grad():
            chances = model(**batch).logits.softmax(1)[0]
        theirs = dict(zip(model.config.id2label.values(), chances.tolist(), strict=True))
        for loaded in (ours, again):
            assert loaded.entails(image, None, text) == pytest.approx(theirs, abs=1e-6)
