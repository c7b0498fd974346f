"""Heads, losses and small modules of public code, small, as `tests/data/public_heads.npz` keeps them.

Made with clones of e-bug/volta 62f78cd, FudanDISC/weakly-supervised-mVLP (branch master), zengyan-97/X2-VLM
and thunlp/OpenDelta, in an environment with transformers 4.36 and what they import:

    python tests/public_heads.py VOLTA MVLP X2VLM OPENDELTA tests/data/public_heads.npz

A head NAME has NAME/x (b, inputs), NAME/KEY of its state_dict, NAME/y its logits in evaluation mode,
NAME/target, NAME/loss, and NAME/grad/x, the gradient of the loss at x. params/NAME is its number of
parameters at the public width, std/NAME/KEY the deviation of its first weights there.
"""

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
