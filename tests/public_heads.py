"""Heads, losses and small modules of public code, small, as `tests/data/public_heads.npz` keeps them.

Made with clones of e-bug/volta 62f78cd, FudanDISC/weakly-supervised-mVLP (branch master), zengyan-97/X2-VLM
and thunlp/OpenDelta, in an environment with transformers 4.36 and what they import:

    python tests/public_heads.py VOLTA MVLP X2VLM OPENDELTA tests/data/public_heads.npz

A head NAME has NAME/x (b, inputs), NAME/KEY of its state_dict, NAME/y its logits in evaluation mode,
NAME/target, NAME/loss, and NAME/grad/x, the gradient of the loss at x. params/NAME is its number of
parameters at the public width, std/NAME/KEY the deviation of its first weights there.
"""

import importlib.util
import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

WIDTH, LABELS, ROWS = 12, 7, 5
GQA_LABELS, MVLP_LABELS = 1842, 1853


def main(volta: str, mvlp: str, x2vlm: str, opendelta: str, out: str) -> None:
    found: dict[str, Any] = {}
    torch.manual_seed(0)
    for name, head, inputs, loss in [*_volta(Path(volta)), *_mvlp(mvlp), *_x2vlm(Path(x2vlm))]:
        _record(found, name, head, inputs, loss)
    _compacter(found, opendelta)
    _decoder(found, Path(x2vlm))
    np.savez_compressed(out, **found)


def _record(found: dict[str, Any], name: str, head: nn.Module, inputs: int, loss: Any) -> None:
    if loss is None:
        found[f"params/{name}"] = sum(p.numel() for p in head.parameters())
        for key, value in head.state_dict().items():
            found[f"std/{name}/{key}"] = value.float().std().numpy()
        return
    # norms and biases away from 1 and 0
    for parameter in head.parameters():
        nn.init.normal_(parameter, std=0.5)
    x = torch.randn(ROWS, inputs, requires_grad=True)
    logits = head.eval()(x)
    target = torch.randint(logits.shape[1], (ROWS,))
    value = loss(logits, target)
    value.backward()
    arrays = {**head.state_dict(), "x": x, "y": logits, "target": target, "loss": value, "grad/x": x.grad}
    found |= {f"{name}/{key}": array.detach().numpy() for key, array in arrays.items()}


def _volta(folder: Path) -> list:
    """`BertForVLTasks.clfs_dict` as VOLTA makes it, after its own `init_weights`; its losses."""
    sys.path.insert(0, str(folder))
    from volta import encoders
    from volta.config import BertConfig, M3PConfig

    tasks = {
        "TASK15": {"type": "VL-classifier-GQA", "num_labels": GQA_LABELS},
        "TASK19": {"type": "VL-tri-classifier", "num_labels": 3},
        "TASK12": {"type": "VL-binary-classifier", "num_labels": 2},
    }

    class Empty(nn.Module):
        def __init__(self, *_: Any):
            super().__init__()

    # heads alone: the stack below them has hundreds of millions of parameters
    encoders.BertModel = encoders.M3PModel = Empty  # type: ignore[misc]

    def bce(times: int, logits: Tensor, target: Tensor) -> Tensor:
        one_hot = nn.functional.one_hot(target, logits.shape[1]).float()
        return nn.BCEWithLogitsLoss(reduction="mean")(logits, one_hot).mean() * times

    heads = []
    for kind, file in (
        ("uc2", "uc2_base"),
        ("m3p", "m3p_base"),
        ("muniter", "ctrl_muniter_base"),
        ("xuniter", "ctrl_xuniter_base"),
    ):
        values = json.loads((folder / "config" / f"{file}.json").read_text())
        make, model = (
            (M3PConfig, encoders.M3PForVLTasks) if kind == "m3p" else (BertConfig, encoders.BertForVLTasks)
        )
        for width in (values["pooler_size"], WIDTH):
            ratio = values["clf_hidden_size"] / values["pooler_size"]
            labels = {} if width != WIDTH else {"num_labels": LABELS}
            config = make.from_dict({**values, "pooler_size": width, "clf_hidden_size": round(ratio * width)})
            each = {name: {**task, **labels} for name, task in tasks.items()}
            clfs = model(config, each, list(each)).clfs_dict
            small = width == WIDTH
            heads += [
                (f"{kind}/xgqa", clfs["TASK15"], width, partial(bce, LABELS) if small else None),
                (f"{kind}/xvnli", clfs["TASK19"], width, partial(bce, 1) if small else None),
                (f"{kind}/marvl", clfs["TASK12"], 2 * width, partial(bce, 1) if small else None),
            ]
    return heads


def _mvlp(folder: str) -> list:
    """xGQA's `BertQAPredictionHead`; the linear map of XVNLI and the layers of MaRVL as model_vqa.py makes
    them."""
    sys.path.insert(0, folder)
    from albef.modeling.xbert import BertConfig, BertQAPredictionHead

    heads = []
    for width, labels in ((768, MVLP_LABELS), (WIDTH, LABELS)):
        config = BertConfig.from_json_file(f"{folder}/albef/configs/config_xlm-r.json")
        config.hidden_size = width
        layers = _block(
            Path(folder) / "albef/modeling/model_vqa.py", "class ALBEF_NLVR2", "self.cls_head = ", width
        )
        loss = nn.CrossEntropyLoss() if width == WIDTH else None
        heads += [
            ("mvlp/xgqa", BertQAPredictionHead(config, labels), width, loss),
            ("mvlp/xvnli", nn.Linear(width, 3), width, loss),
            ("mvlp/marvl", layers, 2 * width, loss),
        ]
    return heads


def _x2vlm(folder: Path) -> list:
    """`build_mlp`, of XVNLI, of NLVR2 and MaRVL, and of the matching head."""
    source = (folder / "models/xvlm.py").read_text()
    body = source[source.index("def build_mlp") : source.index("def build_vision_encoder")]
    names: dict[str, Any] = {"nn": nn}
    exec(body, names)
    heads = []
    for width in (768, WIDTH):
        loss = nn.CrossEntropyLoss() if width == WIDTH else None
        heads += [
            ("cclm/xvnli", names["build_mlp"](width, 3), width, loss),
            ("cclm/marvl", names["build_mlp"](2 * width, 2), 2 * width, loss),
            ("cclm/itm", names["build_mlp"](width, 2), width, loss),
        ]
    return heads


def _block(file: Path, start: str, assignment: str, width: int) -> nn.Module:
    """The module of the first `assignment` after `start` in the source, at a width of the text."""
    source = file.read_text()
    source = source[source.index(start) :]
    source = source[source.index(assignment) + len(assignment) :]
    end = next(
        i
        for i in range(len(source))
        if source[i] == ")" and source[: i + 1].count("(") == source[: i + 1].count(")")
    )
    expression = " ".join(source[: end + 1].split()).replace(
        "self.text_encoder.config.hidden_size", str(width)
    )
    return eval(expression, {"nn": nn})


def _compacter(found: dict[str, Any], folder: str) -> None:
    """A Compacter, an Adapter and a LoRA of OpenDelta behind one linear layer, from their default configs."""
    sys.path.insert(0, folder)
    from opendelta import AutoDeltaConfig, AutoDeltaModel

    width, bottleneck = 32, 6
    kinds = {
        "compacter": {"reduction_factor": 4},
        "adapter": {"bottleneck_dim": bottleneck},
        "lora": {"lora_r": 2},
    }
    for kind, settings in kinds.items():
        torch.manual_seed(1)
        backbone = _Layers(width)
        config = AutoDeltaConfig.from_dict({"delta_type": kind, "modified_modules": ["dense"], **settings})
        AutoDeltaModel.from_config(config, backbone).freeze_module(set_state_dict=False)
        backbone(torch.randn(2, width))
        inserted = {
            n: p for n, p in backbone.named_parameters() if not n.endswith(("dense.weight", "dense.bias"))
        }
        for name, parameter in inserted.items():
            found[f"std/delta/{kind}/{name}"] = parameter.detach().std().numpy()
            nn.init.normal_(parameter, std=0.3)
        x = torch.randn(ROWS, width, requires_grad=True)
        y = backbone.eval()(x)
        y.square().sum().backward()
        arrays = {**dict(backbone.named_parameters()), "x": x, "y": y, "grad/x": x.grad}
        found |= {f"delta/{kind}/{name}": value.detach().numpy() for name, value in arrays.items()}
        found[f"params/delta/{kind}"] = sum(p.numel() for p in inserted.values())


def _decoder(found: dict[str, Any], folder: Path) -> None:
    """`text_decoder` of `XVLMPlusForVQA`, two layers: loss of answers, and the scores of `rank_answer` before
    its softmax."""
    spec = importlib.util.spec_from_file_location("xbert", folder / "models/xbert.py")
    assert spec and spec.loader
    xbert = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(xbert)
    torch.manual_seed(2)
    config = xbert.BertConfig(
        vocab_size=19,
        hidden_size=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=20,
        max_position_embeddings=8,
        type_vocab_size=1,
        pad_token_id=1,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    config.fusion_layer, config.encoder_width, config.embedding_dim = 0, WIDTH, WIDTH
    decoder = xbert.BertLMHeadModel(config).eval()
    for parameter in decoder.parameters():
        nn.init.normal_(parameter, std=0.4)
    # <s> 0, padding 1, </s> 2, as XLM-R's
    answers = torch.tensor([[0, 5, 2, 1], [0, 6, 7, 2], [0, 8, 2, 1], [0, 6, 9, 2]])
    atts = (answers != 1).long()
    states, lengths = torch.randn(2, 3, WIDTH, requires_grad=True), torch.tensor([3, 2])
    mask = (torch.arange(3) < lengths[:, None]).long()

    def losses(ids: Tensor, states: Tensor, mask: Tensor) -> Tensor:
        labels = ids.masked_fill(ids == 1, -100)
        out = decoder(
            ids,
            attention_mask=(ids != 1).long(),
            encoder_hidden_states=states,
            encoder_attention_mask=mask,
            labels=labels,
            return_dict=True,
            reduction="none",
        )
        return out.loss

    # of question 0 answer 1 at weight 1, of question 1 answers 0 and 3 at 0.7 and 0.3
    weights = torch.tensor([1.0, 0.7, 0.3])
    rows = torch.tensor([0, 1, 1])
    each = losses(answers[[1, 0, 3]], states[rows], mask[rows])
    loss = (weights * each).sum() / 2
    loss.backward()
    start = decoder(
        answers[:1, :1].expand(2, 1),
        encoder_hidden_states=states,
        encoder_attention_mask=mask,
        return_dict=True,
        reduction="none",
    ).logits[:, 0]
    first = start.softmax(1)[:, answers[:, 1]]
    tiled = [x.repeat_interleave(4, 0) for x in (states, mask)]
    rest = losses(answers.repeat(2, 1), *tiled).view(2, 4)
    arrays = {
        **decoder.state_dict(),
        "states": states,
        "lengths": lengths,
        "answers": answers,
        "atts": atts,
        "loss": loss,
        "grad/states": states.grad,
        "scores": first.log() - rest,
    }
    found |= {f"decoder/{name}": value.detach().numpy() for name, value in arrays.items()}
    found["decoder/is_tied"] = np.array(
        decoder.cls.predictions.decoder.weight is decoder.bert.embeddings.word_embeddings.weight
    )


class _Layers(nn.Module):
    """Two linear layers, as modules that OpenDelta finds by name."""

    def __init__(self, width: int):
        super().__init__()
        self.first, self.second = (nn.ModuleDict({"dense": nn.Linear(width, width)}) for _ in range(2))
        self.device = torch.device("cpu")

    @property
    def dummy_inputs(self) -> dict[str, Tensor]:
        return {"x": torch.zeros(1, self.first["dense"].in_features)}

    def forward(self, x: Tensor) -> Tensor:
        return self.second["dense"](torch.tanh(self.first["dense"](x)))


if __name__ == "__main__":
    main(*sys.argv[1:])
