"""What README and docs say of the lines of `benchmarks.gpu` in results/gpu.jsonl and results/dry.jsonl."""

from typing import Any

from raylib.display import markdown_table, percent

FORMAT = 2  # of a line in results/gpu.jsonl; older ones have none


def measured_lines(records: list[dict]) -> list[dict]:
    """The lines that `benchmarks.gpu` has written, in which a whole step was measured."""
    lines = [record for record in records if record.get("format") == FORMAT]
    return [line for line in lines if "ms" in line["parts"].get("step", {}).get("base", {})]


def sentence(record: dict) -> str:
    """What one GPU reaches, for the README."""
    parts = record["parts"]
    figures, (pairs, translations, mono) = parts["step"]["base"], parts["step"]["base"]["batch"]
    text = (
        f"On one {parts['machine']['device']}, a training step of `base` with {pairs} pairs, {translations} "
        f"translations and {mono} sentences (one of eight GPUs' share of the paper's batch; bf16, loader and "
        f"optimizer included) takes {figures['ms']:.0f} ms: {figures['samples_per_second']:,.0f} samples a "
        f"second, {_shares(figures)}"
    )
    if ratio := parts.get("twin", {}).get("ratio"):
        text += f"; forward and backward {ratio:.1f}x as fast as its padded twin in bf16"
    if ratio := parts.get("open_clip", {}).get("ratio"):
        text += f"; the contrastive part alone {ratio:.1f}x as fast as open_clip with equal towers and batch"
    return text + "."


def _shares(figures: dict[str, Any]) -> str:
    shares = [f"{figures['share_of_measured_peak']:.0%} of the machine's own bf16 matrix products"]
    if "share_of_data_sheet" in figures:
        shares.insert(0, f"{figures['share_of_data_sheet']:.0%} of its data sheet's bf16 rate")
    return " and ".join(shares)


def tables(record: dict) -> str:
    """Markdown of one measurement: the machine, then a table of steps, one of peers, the profile."""
    parts = record["parts"]
    machine = parts["machine"]
    rates = f"bf16 products {machine['matmul_tflops']:.0f} TFLOP/s, copies {machine['copy_tb_s']:.2f} TB/s"
    versions = ", ".join(
        f"{name} {machine[key]}"
        for name, key in (("torch", "torch"), ("CUDA", "cuda"), ("driver", "driver"))
        if key in machine
    )
    lines = [f"{record['date']}, commit {record['commit']}: {machine['device']}, {versions}; {rates}.", ""]
    rows = [
        [
            "training step",
            "batch",
            "ms",
            "samples/s",
            "% of data sheet",
            "% of products here",
            "GB",
            "estimated",
        ]
    ]
    for label, figures in _steps(parts):
        batch = "/".join(map(str, figures.get("batch", parts["step"]["base"]["batch"])))
        rates_of = (figures.get("share_of_data_sheet"), figures.get("share_of_measured_peak"))
        memory = "" if figures["peak_gb"] is None else f"{figures['peak_gb']:.1f}"
        row = [label, batch, f"{figures['ms']:.1f}", f"{figures['samples_per_second']:,.0f}"]
        rows.append([*row, *map(percent, rates_of), memory, f"{figures['estimated_gb']:.1f}"])
    lines += [markdown_table(rows, words=2), ""]
    peers = [["beside peers", "ours, ms", "peer, ms", "ratio"]]
    for part, names in parts.items():
        for name, figures in names.items() if "ratio" in names and "ours" in names else ():
            if "ms" in (figures if isinstance(figures, dict) else {}) and not name.startswith("ours"):
                ours = min(f["ms"] for n, f in names.items() if n.startswith("ours") and "ms" in f)
                label = f"{part.replace('_', ' ')}: {name}"
                peers.append([label, f"{ours:.1f}", f"{figures['ms']:.1f}", f"{figures['ms'] / ours:.2f}x"])
    if len(peers) > 1:
        lines += [markdown_table(peers), ""]
    return "\n".join([*lines, _profile(parts["step"])]).rstrip()


def _steps(parts: dict[str, Any]) -> list[tuple[str, dict]]:
    """(label, figures) of all whole steps."""
    named = [("base", parts["step"]["base"])]
    for part in ("sizes", "levers", "growth"):
        for name, figures in parts.get(part, {}).items():
            if isinstance(figures, dict) and "samples_per_second" in figures:
                named.append((name if part == "sizes" else f"base, {name}", figures))
    return named


def _profile(step: dict[str, Any]) -> str:
    """One line: kernels of a step, the time of each kind, waits."""
    profile, waits = step.get("profile", {}), step.get("waits", {})
    if "kernels" not in profile:
        return ""
    kinds = ", ".join(f"{kind} {ms:.1f}" for kind, ms in profile["kinds_ms"].items())
    where = f": {', '.join(waits)}" if waits else ""
    return (
        f"A step of `base` under the profiler: {profile['kernels']:,} kernels, busy {profile['busy_ms']:.1f} "
        f"of {profile['ms']:.1f} ms, the host {profile['host_ms']:.1f} ms without its waits; ms by kind of "
        f"kernel: {kinds}. The host waits {sum(waits.values())} times{where}."
    )


def dry_table(records: list[dict]) -> str:
    """Markdown of what `--dry` has counted, a row a record."""
    rows = [["step of `base`, 64/256/256", "operators", "attention calls", "GB", "TFLOP", "waits"]]
    for line in records:
        counts = sum(line["operators"].values()), line["attention_calls"]
        row = [f"{line['name']} ({line['commit']})", *(f"{n:,}" for n in counts)]
        rows.append([*row, f"{line['gb']:.1f}", f"{line['tflop']:.1f}", str(sum(line["waits"].values()))])
    return markdown_table(rows)
