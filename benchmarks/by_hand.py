"""Sentences of the pages that tell a measurement made by hand once, written from results/by_hand.jsonl.

A record is one measurement:

    name                    unique
    page, part              the page, and between which of its comment lines the sentence stands
    commit                  the one that first told it
    machine, how, ...       what else is known of it
    figures                 {name: number}
    recorded                in their place: the files of results/ that have the figures (`_recorded_figures`)
    text                    Markdown, each figure a {placeholder} with its format
"""

import statistics
import textwrap
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from benchmarks.results import RESULTS, newest
from raylib.fileio import read_jsonl

FILE = RESULTS / "by_hand.jsonl"
WIDTH = 130  # of a written line


def records() -> list[dict[str, Any]]:
    """All records, those without figures of their own with the figures that other files of results/ have."""
    known = _recorded_figures()
    return [{"figures": known.get(record["name"], {}), **record} for record in read_jsonl(FILE)]


def pages() -> dict[str, dict[str, str]]:
    """Return {page: {part: text}}; a part is the texts of its records, in the order of the file."""
    found: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for record in records():
        text = record["text"].format(**{**record, **record["figures"]})
        found[record["page"]][record["part"]] += map(_wrapped, text.split("\n"))
    return {page: {part: "\n".join(lines) for part, lines in parts.items()} for page, parts in found.items()}


def _wrapped(line: str) -> str:
    """A paragraph or an item of a list in lines of `WIDTH`; a row of a table as it is."""
    if line.startswith("|"):
        return line
    indent = "  " if line.startswith("- ") else ""
    return textwrap.fill(
        line, WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )


def _recorded_figures() -> dict[str, Mapping[str, Any]]:
    """Return {name of a record: its figures} of what stands in other files of results/."""
    step, levers, guard = read_jsonl(RESULTS / "gpu.jsonl")[:3]  # before `benchmarks.gpu` wrote them
    cudnn, without = (step[f"step dropout=0.1 cudnn={way}"] for way in ("default", "off"))
    head, profile = levers["head_ms"], levers["profile"]
    dry = {line["name"]: line for line in newest(read_jsonl(RESULTS / "dry.jsonl"), "name")}
    before, after = dry["before"], dry["after"]
    guarded, plain, guarded_again, plain_again = guard[
        "ms a step of 100 M parameters: with guard, without, again"
    ]
    ratios = [
        statistics.median(line["seconds"]["twin, all positions"]) / statistics.median(line["seconds"]["ours"])
        for line in read_jsonl(RESULTS / "step.jsonl")
        if line["size"] == "tiny"
    ]
    # before freed memory stayed with the process
    saves = read_jsonl(RESULTS / "checkpoint.jsonl")[0]["ways"]
    tries = {
        record["what"]: 100 * record["runs"][0]["dev"]["en"]
        for record in read_jsonl(RESULTS / "scenes_base.jsonl")
        if record.get("what", "").startswith("scenes_xvnli")
    }
    pairs, translations, sentences = step["batch"]
    return {
        "twin_days": {"lowest": min(ratios), "highest": max(ratios), "records": len(ratios)},
        "checkpoint_trim": {**saves["ours"], "in_line": saves["ours, in line"]["stall"]},
        "dry_check": {
            "waits": sum(before["waits"].values()),
            "gpu_waits": step["syncs"]["in all"],
            "tflop": before["tflop"],
            "gpu_tflop": levers["tflop of a step"],
        },
        "cudnn": {
            "torch": step["machine"]["torch"].rpartition(".")[0],
            "pairs": pairs,
            "translations": translations,
            "sentences": sentences,
            "lowest": min(cudnn["wall_ms"]) / 1000,
            "highest": max(cudnn["wall_ms"]) / 1000,
            "without": without["median_ms"] / 1000,
        },
        "host_bound": {
            "first": without["median_ms"] / 1000,
            "second": levers["lever none (dropout 0)"]["median_ms"] / 1000,
            "busy": profile["busy_ms"] / 1000,
            "kernels": profile["kernels"],
            "attention": next(count for name, (count, _) in profile["top"].items() if "flash_fwd" in name),
            "waits": step["syncs"]["in all"],
            "varlen": levers["lever varlen_attn"]["median_ms"] / 1000,
            "eights": levers["lever lengths in steps of 8 (+8 % FLOP, half the ops)"]["median_ms"] / 1000,
            "head_chunks": head["V=250002 rows=256"],
            "head_once": head["V=250002 rows=3328"],
            "padded_chunks": head["V=250048 rows=256"],
            "padded_once": head["V=250048 rows=3328"],
        },
        "traffic": {
            "batch": "/".join(map(str, after["batch"])),
            "gb_before": before["gb"],
            "gb": after["gb"],
            "operators_before": sum(before["operators"].values()),
            "operators": sum(after["operators"].values()),
        },
        "skipped_steps": {"lowest": guarded_again - plain_again, "highest": guarded - plain},
        "few_questions": {
            "few": tries["scenes_xvnli, 4,000 items"],
            "more": tries["scenes_xvnli, 8,000 items"],
        },
    }
