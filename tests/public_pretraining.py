"""Losses and gradients of paper 2's public pretraining code on small random weights, as
`tests/data/mvlp_pretraining.npz` keeps them (tests/test_follow.py).

Made with a clone of FudanDISC/weakly-supervised-mVLP (branch master, f6700a7), in an environment with
transformers 4.30, timm 0.6 and torch; its imports of `turtle`, which wants a display, and of `oscar` are put
out of the way:

    python tests/public_pretraining.py MVLP tests/data/mvlp_pretraining.npz

weight/NAME are the weights. gpuN/ is a batch of one of two GPUs, between which nothing is gathered: images,
STREAM/ids, STREAM/masked, STREAM/labels, uniforms (the middle of the chance that `torch.multinomial` drew, of
the caption and of the image), loss/TERM; gpu0/gradient/NAME.
"""

import sys
from functools import partial
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

WIDTH, WORDS, MASK, PAD = 16, 40, 4, 1
masks: list[tuple[Tensor, Tensor]] = []
draws: list[Tensor] = []


def main(mvlp: str, out: str) -> None:
    # with 0 a random word is once the padding, whose embedding gets no gradient there
    torch.manual_seed(2)
    torch.set_default_dtype(torch.float64)
    model = _make_model(mvlp)
    weights = {name: x for name, x in model.state_dict().items() if "position_ids" not in name}
    found = {f"weight/{k}": v.float().numpy() for k, v in weights.items() if "predictions.decoder" not in k}
    for gpu in range(2):
        _record(found, model, gpu)
    np.savez_compressed(out, **found)


def _make_model(mvlp: str) -> Any:
    sys.path.insert(0, mvlp)
    sys.modules["turtle"] = ModuleType("turtle")
    sys.modules["turtle"].pos = None
    for name in ("oscar", "oscar.utils", "oscar.utils.misc"):
        sys.modules[name] = ModuleType(name)
    sys.modules["oscar.utils.misc"].mkdir = sys.modules["oscar.utils.misc"].get_rank = lambda *_: 0
    from albef.modeling import model_pretrain
    from albef.modeling.vit import VisionTransformer
    from albef.modeling.xbert import BertConfig, BertForMaskedLM

    sizes = BertConfig(
        hidden_size=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        vocab_size=WORDS,
        max_position_embeddings=12,
        type_vocab_size=1,
        layer_norm_eps=1e-12,
        hidden_act="gelu",
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        pad_token_id=PAD,
        fusion_layer=1,
        encoder_width=WIDTH,
    )
    # its constructor has the sizes of the base model written out, and downloads one
    model = model_pretrain.ALBEF_Stage1.__new__(model_pretrain.ALBEF_Stage1)
    nn.Module.__init__(model)
    norm = partial(nn.LayerNorm, eps=1e-6)
    vision: dict[str, Any] = {"mlp_ratio": 1.5, "qkv_bias": True, "norm_layer": norm}
    model.visual_encoder = VisionTransformer(16, 8, embed_dim=WIDTH, depth=1, num_heads=2, **vision)
    model.text_encoder = BertForMaskedLM(config=sizes)
    model.vision_proj, model.text_proj = nn.Linear(WIDTH, 8), nn.Linear(WIDTH, 8)
    model.temp, model.itm_head = nn.Parameter(torch.tensor(0.07)), nn.Linear(WIDTH, 2)
    model.tokenizer = SimpleNamespace(pad_token_id=PAD, cls_token_id=0, bos_token_id=0, mask_token_id=MASK)
    model.mlm_probability = model.cond_mlm_probability = 0.3
    model.avoid_nan, model.half_mlm_head = True, None
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.numel() > 1:
                parameter.add_(torch.randn_like(parameter) * 0.15)
            parameter.copy_(parameter.float().double())  # what is stored is exact
        head = model.text_encoder.cls.predictions
        head.decoder.weight = model.text_encoder.bert.embeddings.word_embeddings.weight
    model.freeze("vis_encoder")
    _watch(model_pretrain.ALBEF_Stage1)
    return model.train()


def _watch(kind: Any) -> None:
    """Keep what the model masks and draws."""
    mask, multinomial = kind.mask, torch.multinomial

    def masked(*args: Any, **settings: Any) -> Any:
        found = mask(*args, **settings)
        masks.append(tuple(x.clone() for x in found))
        return found

    def drawn(chances: Tensor, count: int) -> Tensor:
        index, shares = multinomial(chances, count), chances / chances.sum(1, keepdim=True)
        draws.append((shares.cumsum(1) - shares / 2).gather(1, index).squeeze(1).detach())
        return index

    kind.mask, torch.multinomial = masked, drawn


def _record(found: dict[str, Any], model: Any, gpu: int) -> None:
    masks.clear()
    draws.clear()
    model.zero_grad()
    images = torch.rand(4, 3, 16, 16).float().double() * 4 - 2
    texts = {"captions": _draw(4, 9), "source": _draw(5, 10), "target": _draw(5, 10), "text": _draw(3, 12)}
    vlm, ucl_image, itm = model(image=images, text=texts["captions"], mode="img-txt-full")
    (vlm + ucl_image + itm).backward()
    pair = {"text": texts["source"], "text_trans": texts["target"]}
    ucl_translation, forth, back = model(**pair, mode="para_txt_full")
    (ucl_translation + forth + back).backward()
    (xmlm,) = model(text=texts["text"], mode="mono_txt")
    xmlm.backward()
    at = f"gpu{gpu}/"
    found |= {f"{at}images": images.float().numpy(), f"{at}uniforms": torch.stack(draws[::-1], 1).numpy()}
    for (name, text), (ids, labels) in zip(texts.items(), masks, strict=True):
        arrays = {"ids": text.input_ids, "masked": ids, "labels": labels}
        found |= {f"{at}{name}/{key}": value.numpy().astype(np.int16) for key, value in arrays.items()}
    losses = {"vlm": vlm, "ucl_image": ucl_image, "itm": itm, "ucl_translation": ucl_translation}
    losses |= {"tlm": forth + back, "xmlm": xmlm}
    found |= {f"{at}loss/{name}": value.detach().numpy() for name, value in losses.items()}
    if gpu == 0:
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        found |= {f"{at}gradient/{name}": value.float().numpy() for name, value in gradients.items()}


def _draw(rows: int, longest: int) -> SimpleNamespace:
    lengths = torch.randint(4, longest, (rows,)).tolist()
    ids = torch.full((rows, max(lengths)), PAD)
    for row, length in enumerate(lengths):
        ids[row, :length] = torch.tensor([0, *torch.randint(5, WORDS, (length - 2,)).tolist(), 2])
    return SimpleNamespace(input_ids=ids, attention_mask=(ids != PAD).long())


if __name__ == "__main__":
    main(*sys.argv[1:])
