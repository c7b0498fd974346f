"""The objective once more, slow and obvious: float64, one sentence at a time, no padding, no sharing of
passes.

It uses the model's parameters and nothing else of the model's code.
"""

import math

import torch
import torch.nn.functional as F


def attend(attention, x, context):
    """Multi-head attention of x (q, d) over context (s, d), head by head."""
    d = x.shape[1]
    key, value = F.linear(context, attention.key_value.weight, attention.key_value.bias).split(d, 1)
    query = F.linear(x, attention.query.weight, attention.query.bias)
    e = d // attention.heads
    heads = []
    for h in range(attention.heads):
        part = slice(h * e, (h + 1) * e)
        scores = query[:, part] @ key[:, part].T / math.sqrt(e)
        heads.append(scores.softmax(1) @ value[:, part])
    return F.linear(torch.cat(heads, 1), attention.output.weight, attention.output.bias)


def norm(layer, x):
    return F.layer_norm(x, x.shape[-1:], layer.weight, layer.bias, layer.eps)


def feed(block, x):
    return F.linear(
        F.gelu(F.linear(x, block.intermediate.weight, block.intermediate.bias)),
        block.output.weight,
        block.output.bias,
    )


def text_block(block, x, condition=None):
    x = norm(block.attention_norm, x + attend(block.attention, x, x))
    if condition is not None:
        x = norm(block.cross_norm, x + attend(block.cross_attention, x, condition))
    return norm(block.output_norm, x + feed(block, x))


def image_states(model, image):
    """uint8 (H, W, 3) -> (M + 1, d), patch by patch."""
    vision, p = model.vision, model.vision.patch
    pixels = image.double() / 127.5 - 1.0
    rows = [vision.cls]
    for top in range(0, image.shape[0], p):
        for left in range(0, image.shape[1], p):
            patch = pixels[top : top + p, left : left + p].reshape(-1)
            rows.append(F.linear(patch, vision.patch_embedding.weight, vision.patch_embedding.bias))
    x = torch.stack(rows) + vision.position
    for block in vision.blocks:
        inner = norm(block.attention_norm, x)
        x = x + attend(block.attention, inner, inner)
        x = x + feed(block, norm(block.output_norm, x))
    x = norm(vision.norm, x)
    return x if vision.output is None else F.linear(x, vision.output.weight, vision.output.bias)


def text_states(model, ids):
    e = model.embedding
    x = norm(e.norm, e.word.weight[ids] + e.position.weight[: len(ids)])
    for block in model.text.blocks:
        x = text_block(block, x)
    return x


def fused_states(model, x, condition=None):
    length = len(x)
    if condition is not None and not model.fusion.cross:
        x, condition = torch.cat([x, condition]), None
    for block in model.fusion.blocks:
        x = text_block(block, x, condition)
    return x[:length]


def sentences(side):
    """[(clean ids, masked ids, [(column, label)])] of a stream's sentences."""
    out, start = [], 0
    labels = dict(zip(side.positions.tolist(), side.labels.tolist(), strict=True))
    for n in side.lengths.tolist():
        masked = [(p - start, label) for p, label in labels.items() if start <= p < start + n]
        out.append((side.clean[start : start + n], side.masked[start : start + n], masked))
        start += n
    return out


def masked_loss(model, rows):
    """Mean over all masked positions of [(states, [(column, label)])]."""
    losses, head = [], model.masked_head
    for states, masked in rows:
        for column, label in masked:
            hidden = norm(head.norm, F.gelu(F.linear(states[column], head.dense.weight, head.dense.bias)))
            logits = model.embedding.word.weight @ hidden + head.bias
            losses.append(logits.logsumexp(0) - logits[label])
    return torch.stack(losses).mean() if losses else torch.zeros((), dtype=torch.float64)


def unit(layer, cls):
    x = F.linear(cls, layer.weight, layer.bias)
    return x / x.norm()


def group_of(i, n, config):
    return i * config.contrast_groups // n


def infonce(left, right, left_id, right_id, temperature, config, true=frozenset()):
    """Sum of both directions, each a mean over pairs; equal content, what is of another group, and what is
    `true` (left, right), is no negative. Also the (n, n) similarities."""
    n, losses = len(left), []
    scores = torch.stack(
        [torch.stack([left[i] @ right[j] / temperature for j in range(n)]) for i in range(n)]
    )
    for table, false in ((scores, true), (scores.T, {(b, a) for a, b in true})):
        for i in range(n):
            others = [
                j
                for j in range(n)
                if j == i
                or (
                    (i, j) not in false
                    and left_id[i] != left_id[j]
                    and right_id[i] != right_id[j]
                    and group_of(i, n, config) == group_of(j, n, config)
                )
            ]
            losses.append(table[i, others].logsumexp(0) - table[i, i])
    return torch.stack(losses).sum() / n, scores


def draw_negative(scores, allowed, draw):
    """The key at which the running chance passes the draw."""
    if not allowed:
        return None
    chances = torch.tensor([float(scores[j].detach()) for j in allowed], dtype=torch.float64).softmax(0)
    running = 0.0
    for j, chance in zip(allowed, chances.tolist(), strict=True):
        running += chance
        if running > float(draw):
            return j
    return allowed[-1]


def slow_terms(model, batch, config, true=frozenset()):
    """{term: value} of one global batch, and the accuracy of ITM. `true`: (image, caption) of different pairs
    that are known to go together."""
    terms, temperature = {}, model.temperature.clamp(*config.temperature)[0]
    half = 0.5 if config.directions == "mean" else 1.0
    if "image_text" in batch:
        part = batch["image_text"]
        rows, images = sentences(part["text"]), [image_states(model, image) for image in part["images"]]
        clean = [text_states(model, ids) for ids, _, _ in rows]
        masked = [text_states(model, ids) for _, ids, _ in rows]
        text = clean if config.ucl_text == "clean" else masked
        left = [unit(model.image_projection, states[0]) for states in images]
        right = [unit(model.text_projection, states[0]) for states in text]
        image_id, text_id = part["image_id"].tolist(), part["text"].text_id.tolist()
        loss, scores = infonce(left, right, image_id, text_id, temperature, config, true)
        terms["ucl_image"] = half * loss
        fused = [i for i, place in enumerate(part["index"].tolist()) if place % config.fuse_every == 0]
        terms["vlm"] = masked_loss(
            model, [(fused_states(model, masked[i], images[i]), rows[i][2]) for i in fused]
        )
        seen = clean if config.itm_text == "clean" else masked
        matched = matching(model, seen, images, scores, part, text_id, fused, config, true)
        terms["itm"], terms["itm_accuracy"] = matched
    if "parallel" in batch:
        sides = [sentences(batch["parallel"][name]) for name in ("source", "target")]
        clean = [[text_states(model, r[0]) for r in side] for side in sides]
        masked = [[text_states(model, r[1]) for r in side] for side in sides]
        text = clean if config.ucl_text == "clean" else masked
        vectors = [[unit(model.text_projection, x[0]) for x in side] for side in text]
        ids = [batch["parallel"][name].text_id.tolist() for name in ("source", "target")]
        terms["ucl_translation"] = half * infonce(*vectors, *ids, temperature, config)[0]
        seen = clean if config.tlm_source == "clean" else masked
        index = batch["parallel"]["index"].tolist()
        fused = [i for i, place in enumerate(index) if place % config.fuse_every == 0]
        terms["tlm"] = (0.5 if config.tlm_directions == "mean" else 1.0) * sum(
            masked_loss(
                model, [(fused_states(model, masked[a][i], seen[1 - a][i]), sides[a][i][2]) for i in fused]
            )
            for a in (0, 1)
        )
    if "text" in batch:
        rows = sentences(batch["text"]["text"])
        terms["xmlm"] = masked_loss(
            model, [(fused_states(model, text_states(model, r[1])), r[2]) for r in rows]
        )
    return terms


def matching(model, text, images, scores, part, text_id, fused, config, true):
    n = len(text)
    positives, negatives = [], []
    image_id = part["image_id"].tolist()
    for i in fused:
        allowed = [
            j
            for j in fused
            if image_id[i] != image_id[j]
            and text_id[i] != text_id[j]
            and group_of(i, n, config) == group_of(j, n, config)
        ]
        positives.append(match(model, text[i], images[i]))
        captions = [j for j in allowed if (i, j) not in true]
        j = draw_negative(scores[i], captions, part["negative_uniforms"][i, 0])
        if j is not None:
            negatives.append(match(model, text[j], images[i]))
        others = [j for j in allowed if (j, i) not in true]
        j = draw_negative(scores[:, i], others, part["negative_uniforms"][i, 1])
        if j is not None:
            negatives.append(match(model, text[i], images[j]))
    accuracy = sum(bool(p[1] > p[0]) for p in positives) / len(positives) / 2
    accuracy += sum(bool(p[0] >= p[1]) for p in negatives) / max(1, len(negatives)) / 2
    right, wrong = [-p[1] for p in positives], [-p[0] for p in negatives]
    if config.itm_weighting == "pairs":
        loss = torch.stack(right + wrong).mean()
    else:
        loss = torch.stack(right).mean() + (torch.stack(wrong).mean() if wrong else 0.0)
    return loss, torch.tensor(accuracy, dtype=torch.float64)


def match(model, text, image):
    cls = fused_states(model, text, image)[0]
    return F.linear(cls, model.match_head.weight, model.match_head.bias).log_softmax(0)
