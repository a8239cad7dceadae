"""2:4 compression on a CPU beside torch's conversion; what the choice of two of four costs in accuracy."""

from __future__ import annotations

from docs.tables.base import Row, rows, table

MODEL = "compress all blocks of DeiT-B float16"
LINES = {
    "compress 768 x 768": ("compress proj 768x768 float16", "ours, prune + compress + bitmask"),
    "compress 3072 x 768": ("compress fc1 3072x768 float16", "ours, prune + compress + bitmask"),
    "compress 768 x 3072": ("compress fc2 768x3072 float16", "ours, prune + compress + bitmask"),
    "decompress 3072 x 768": ("decompress fc1 3072x768 float16", "ours"),
    "compress all blocks of DeiT-B": (MODEL, "ours, one call"),
    "the same from float32 masters": (MODEL, "ours, one call, from float32 masters"),
}


def cpu() -> str:
    """Milliseconds of torch and ours, by threads."""
    found: dict[tuple[str, str, str], Row] = {}
    for r in rows("sparse24_cpu"):
        name = r["provider"] if r["provider"].startswith("ours") else "torch"
        found[r["threads"], r["case"], name] = r
    lines = []
    for threads in ("1", "2"):
        for what, (case, provider) in LINES.items():
            theirs, ours = (found[threads, case, name] for name in ("torch", provider))
            values = [float(v) for v in (theirs["median_ms"], ours["median_ms"], ours["times_peer"])]
            numbers = [f"{v:.0f}" if v >= 1000 else f"{v:.3g}" for v in values]
            lines.append([f"{what}, {threads} thread{'s' if threads != '1' else ''}", *numbers])
    return table(["", "torch", "ours", "times"], lines)


MODELS = {"deit_tiny_patch16_224": "DeiT-Ti", "vit_tiny_patch16_224": "ViT-Ti (AugReg)"}


def choice() -> str:
    """Top-1 by model, choice and channel order, whole and by halves."""
    lines = []
    for r in rows("sparse24_choice_cpu"):
        if r["half"] != "all":
            continue
        what = "dense" if r["choice"] == "dense" else f"{r['choice']}, {r['order']} order"
        numbers = [f"{float(r[key]):.2f}" for key in ("top1", "top1_even", "top1_odd")]
        divergence = f"{float(r['kl']):.3f}" if r.get("kl") else ""
        gain = f"{float(r['gain']):+.1f} [{float(r['low']):.1f}, {float(r['high']):.1f}]" if r.get("gain") else ""
        seconds = f"{float(r['seconds']):.0f}" if r.get("seconds") else ""
        lines.append([MODELS[r["model"]], what, *numbers, gain, divergence, seconds])
    head = ["", "2:4 by", "top-1 %", "even places", "odd places", "gain, points", "KL, nats", "CPU s"]
    return table(head, lines)


TABLES = {"cpu": cpu, "choice": choice}
