"""Names of the parts of a model in each format of published single-stream weights
(`raylib.models.single_stream_weights`)."""

import re
from typing import Any, NamedTuple

from raylib.models.hf_weights import TIED, UNUSED_TEXT

# of pretraining, generation and alignment; VOLTA adds no language embeddings either
M3P_UNUSED = (
    "cross_lang_embeddings",
    "image_embeddings.image_distbution_embeddings",
    "refine_embeddings",
    "cross_alignment",
    "encoder_attn",
    "layer_norm15",
    "latent_transforms",
    "original_transforms",
    "pooled_layer2",
    "seq_relationship",
    "seq_relationship2",
    "mrfr_dense",
    "transformer_obj",
    "pred_layer",
    "pred_obj_layer",
)


class Type(NamedTuple):
    """A token type: row `row` of the tensor `name`."""

    name: str
    row: int


class Names(NamedTuple):
    """Names of the parts of a model in a format; "": it has none, or they are not to be used.

    Of a layer i: `{i}` is i, `{a}` and `{f}` are VOLTA's numbers of its attention and its feed-forward.
    first: row of the position embeddings that a text starts at. unused: regular expressions of further names.
    """

    word: str
    position: str
    norm: str
    query: str
    key: str
    value: str
    attended: str
    attention_norm: str
    intermediate: str
    output: str
    output_norm: str
    first: int
    unused: list[str]
    text_type: Type | None = None
    region_type: Type | None = None
    feature: str = ""
    location: str = ""
    feature_norm: str = ""
    location_norm: str = ""
    region_norm: str = ""
    pooler: str = ""
    region_pooler: str = ""


def layer_part_name(name: str, i: int) -> str:
    """The name of a part of layer i."""
    # VOLTA counts sub-layers: attention and feed-forward of layer i are its 2i and 2i + 1
    return name.format(i=i, a=2 * i, f=2 * i + 1)


def _bert_layer(prefix: str) -> dict[str, Any]:
    # the number of the layer stays open here: `layer_part_name` fills it in
    at = f"{prefix}encoder.layer.{{i}}"
    return {
        "query": f"{at}.attention.self.query",
        "key": f"{at}.attention.self.key",
        "value": f"{at}.attention.self.value",
        "attended": f"{at}.attention.output.dense",
        "attention_norm": f"{at}.attention.output.LayerNorm",
        "intermediate": f"{at}.intermediate.dense",
        "output": f"{at}.output.dense",
        "output_norm": f"{at}.output.LayerNorm",
    }


def text_names(first: int) -> Names:
    """XLM-R's and BERT's, without `roberta.` or `bert.` before them."""
    return Names(
        word="embeddings.word_embeddings",
        position="embeddings.position_embeddings",
        norm="embeddings.LayerNorm",
        text_type=Type("embeddings.token_type_embeddings", 0),
        **_bert_layer(""),
        first=first,
        unused=[*UNUSED_TEXT, *TIED, r"lm_head\.", r"cls\."],
    )


UC2_NAMES = Names(
    word="roberta.embeddings.word_embeddings",
    position="roberta.embeddings.position_embeddings",
    norm="roberta.embeddings.LayerNorm",
    text_type=Type("roberta.embeddings.new_token_type_embeddings", 0),
    region_type=Type("roberta.embeddings.new_token_type_embeddings", 1),
    feature="roberta.img_embeddings.img_linear",
    location="roberta.img_embeddings.pos_linear",
    feature_norm="roberta.img_embeddings.img_layer_norm",
    location_norm="roberta.img_embeddings.pos_layer_norm",
    region_norm="roberta.img_embeddings.LayerNorm",
    pooler="roberta.pooler.dense",
    **_bert_layer("roberta."),
    first=2,
    # of masked regions, and the heads of its pretraining and tasks
    unused=[
        r"roberta\.img_embeddings\.mask_embedding\.",
        r"cls\.",
        r"vis_cls\.",
        r"feat_regress\.",
        r"region_classifier\.",
        r"itm_output\.",
        r"rank_output\.",
        r"vqa_output\.",
    ],
)


def m3p_names(prefix: str) -> Names:
    """M3P's own, after `prefix`."""
    unused = [rf"{re.escape(prefix + name)}\." for name in M3P_UNUSED]
    return Names(
        word=f"{prefix}embeddings",
        position=f"{prefix}position_embeddings",
        norm=f"{prefix}layer_norm_emb",
        query=f"{prefix}attentions.{{i}}.q_lin",
        key=f"{prefix}attentions.{{i}}.k_lin",
        value=f"{prefix}attentions.{{i}}.v_lin",
        attended=f"{prefix}attentions.{{i}}.out_lin",
        attention_norm=f"{prefix}layer_norm1.{{i}}",
        intermediate=f"{prefix}ffns.{{i}}.lin1",
        output=f"{prefix}ffns.{{i}}.lin2",
        output_norm=f"{prefix}layer_norm2.{{i}}",
        feature=f"{prefix}image_embeddings.image_embeddings",
        location=f"{prefix}image_embeddings.image_location_embeddings",
        region_norm=f"{prefix}image_embeddings.LayerNorm",
        pooler=f"{prefix}pooled_layer.dense",
        first=0,
        # `bert.pooler` is VOLTA's second name of `pooled_layer`
        unused=[*unused, r"bert\.pooler\.dense\.", r"clfs_dict\."],
    )


def volta_names(layout: str) -> Names:
    """VOLTA's, of any of the layouts: each layer is two, attention and feed-forward."""
    at, embeddings = "bert.encoder.layer", "bert.embeddings"
    # where the type of regions stands: UC2's table was made longer by a row, and xUNITER has one of its own,
    # for XLM-R's has a single row
    types = {
        "uc2": ("new_token_type_embeddings", 1),
        "muniter": ("token_type_embeddings", 1),
        "xuniter": ("image_token_type_embeddings", 0),
    }
    region_table, row = types.get(layout, ("", 0))
    text = "new_token_type_embeddings" if layout == "uc2" else "token_type_embeddings"
    return Names(
        word=f"{embeddings}.word_embeddings",
        position=f"{embeddings}.position_embeddings",
        norm=f"{embeddings}.LayerNorm",
        text_type=Type(f"{embeddings}.{text}", 0) if region_table else None,
        region_type=Type(f"{embeddings}.{region_table}", row) if region_table else None,
        feature=f"{embeddings}.image_embeddings",
        location=f"{embeddings}.image_location_embeddings",
        feature_norm=f"{embeddings}.image_layer_norm",
        location_norm=f"{embeddings}.image_location_layer_norm",
        region_norm=f"{embeddings}.v_LayerNorm",
        query=f"{at}.{{a}}.attention_self.query",
        key=f"{at}.{{a}}.attention_self.key",
        value=f"{at}.{{a}}.attention_self.value",
        attended=f"{at}.{{a}}.attention_output.dense",
        attention_norm=f"{at}.{{a}}.attention_output.LayerNorm",
        intermediate=f"{at}.{{f}}.intermediate.dense",
        output=f"{at}.{{f}}.output.dense",
        output_norm=f"{at}.{{f}}.output.LayerNorm",
        pooler="bert.t_pooler.dense",
        region_pooler="bert.v_pooler.dense" if layout in ("muniter", "xuniter") else "",
        first=2 if layout in ("uc2", "xuniter") else 0,
        # the second names of what text and regions share; pretraining's and tasks' heads
        unused=[
            r"bert\.encoder\.layer\.\d+\.\w+\.v_",
            r"cls\.",
            r"clfs_dict\.",
            *([] if layout == "xuniter" else [r"bert\.embeddings\.image_token_type_embeddings\."]),
        ],
    )
