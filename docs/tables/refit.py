"""What a refit gives back: by target, kind, calibration size and labels, and beside Torch-Pruning."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from docs.tables.base import Row, gain, rows, table

REFITS = ("none", "logits, 1 turn", "logits, 3 turns", "logits, 10 turns", "layers")
PEERS = ("Torch-Pruning, Taylor", "Torch-Pruning, magnitude", "Torch-Pruning, isomorphic Taylor")
OURS = ("ours", "ours, refitted")
KINDS = {"emb": "EMB", "heads": "H (one of three)", "qk_dim": "QK", "v_dim": "V", "mlp": "MLP"}
MODELS = {"deit_tiny_patch16_224": "DeiT-Ti", "vit_tiny_patch16_224": "ViT-Ti"}
LABELS = {"none": "none", "true": "true", "sampled": "drawn from the model", "argmax": "the model's answer"}


def pairs(found: Sequence[Row]) -> list[tuple[Row, Row]]:
    """Rows of one choice without and with a refit, in the order of the file; the dense model's row has none."""
    chosen = [r for r in found if r["case"] != "dense"]
    plain, refitted = ([r for r in chosen if r["refit"] == way] for way in ("False", "True"))
    return list(zip(plain, refitted, strict=True))


def top1(row: Row, key: str = "top1") -> str:
    return f"{float(row[key]):.1f}"


def logits() -> str:
    """KL and top-1 of narrowed queries and keys, by basis and refit."""
    by = {(r["removed"], r["basis"], r["refit"]): r for r in rows("refit_logits_cpu")}
    lines = []
    for removed, basis in dict.fromkeys((r, b) for r, b, _ in by if float(r)):
        cells = [by[removed, basis, refit] for refit in REFITS]
        numbers = [f"{float(r['kl']):.3f} ({top1(r)})" for r in cells]
        lines.append([f"{100 * float(removed):g} %", basis, *numbers])
    head = ["removed", "basis", "no refit", "logits, 1 turn", "3 turns", "10 turns", "all linear layers"]
    return table(head, lines)


def measured() -> str:
    """All structures at four targets, and hidden units by two criteria."""

    def line(what: str, plain: Row, refitted: Row) -> list[str]:
        every = [top1(plain), top1(refitted), gain(refitted, "gain", "low", "high")]
        fresh = [top1(plain, "top1_fresh"), top1(refitted, "top1_fresh")]
        return [what, *every, *fresh, gain(refitted, "gain_fresh", "low_fresh", "high_fresh")]

    lines = []
    for plain, refitted in pairs(rows("refit_global_cpu")):
        what = f"to {float(plain['target']):.2f}"
        lines.append(line(what if lines else f"all structures {what} of dense MACs", plain, refitted))
    for plain, refitted in pairs(rows("refit_mlp_cpu")):
        share = f"{100 * float(plain['removed']):g} %"
        other = plain["criterion"] != "remaining"
        what = f"{share}, chosen by `{plain['criterion']}`" if other else f"{share} of all hidden units"
        lines.append(line(what, plain, refitted))
    head = ["removed", "no refit", "refit", "gain", "900 fresh images: no refit", "refit", "gain"]
    return table(head, lines)


def kinds() -> str:
    """Each kind alone, without and with a refit, by the share that is gone."""
    shares = ("10", "20", "30", "50")
    cells: dict[str, dict[str, str]] = {kind: {} for kind in KINDS}
    for plain, refitted in pairs(rows("refit_kinds_cpu")):
        share = f"{10 * round(10 * float(plain['removed']))}"
        cells[plain["case"]][share] = f"{top1(plain)} → {top1(refitted)}"
    lines = [[KINDS[kind], *(mine.get(share, "") for share in shares)] for kind, mine in cells.items()]
    return table(["kind", *(f"{share} %" for share in shares)], lines)


def peers() -> str:
    """Top-1 at equal MACs beside Torch-Pruning's importances; ours for all kinds together from the refit's own file."""
    found = {(r["case"], f"{float(r['target']):g}", r["method"]): r for r in rows("refit_peers_cpu") if r["target"]}
    lines = []
    for case in ("all", "mlp"):
        targets = sorted({t for c, t, _ in found if c == case}, key=float, reverse=True)
        for target in targets:
            cells = {m: found.get((case, target, m)) for m in (*PEERS, *OURS)}
            numbers = [top1(r) if r else "" for r in cells.values()]
            ahead = gain(cells["ours, refitted"], "gain", "low", "high")
            lines.append(["MLP" if case == "mlp" else case, f"{float(target):.3g}", *numbers, ahead])
    head = ["what", "MACs", "Taylor", "magnitude", "isomorphic Taylor", "ours, no refit", "ours", "ahead of their best"]
    return table(head, lines)


def images() -> str:
    """One target by calibration size."""
    lines = []
    for plain, refitted in pairs(rows("refit_images_cpu")):
        lines.append([plain["images"], top1(plain), top1(refitted), f"{float(refitted['cpu_s']):.0f}"])
    return table(["images", "no refit", "refit", "refit, CPU s"], lines)


def labels() -> str:
    """One target by what chose."""
    lines = []
    for plain, refitted in pairs(rows("refit_labels_cpu")):
        lines.append([f"`{plain['criterion']}`", LABELS[plain["labels"]], top1(plain), top1(refitted)])
    return table(["criterion", "labels", "no refit", "refit"], lines)


def costs() -> str:
    """Points lost by prices, at each target of both models, and what measuring gains over predicting."""
    lines = []
    for r in (r for r in rows("refit_costs_cpu") if r["cost"] != "both" and r["right"]):
        gained = gain(r, "gain", "low", "high") if r["gain"] else ""
        name = MODELS[r["model"]]
        distance = f"{float(r['distance']):.3f}" if r["distance"] else ""
        points = (f"{float(r[k]):.1f}" for k in ("lost", "lost_odd"))
        lines.append([name, r["calibration"], r["target"], r["cost"], *points, gained, distance])
    head = ["model", "images", "MACs", "groups priced", "points lost", "on every second image", "gain over predicted"]
    return table([*head, "KL when chosen"], lines)


def coarse() -> str:
    """What a refit on coarser images gives on images as they calibrate, and on upscaled ones."""
    lines = []
    for r in rows("refit_coarse_cpu"):
        gained = gain(r, "gain", "gain_low", "gain_high") if r["gain"] else ""
        kept = "{:.1f} ({:.1f} to {:.1f})".format(*(float(r[k]) for k in ("kept", "kept_low", "kept_high")))
        lines.append([MODELS[r["model"]], r["target"], r["coarse"], f"{float(r['lost']):.1f}", gained, kept])
    head = ["model", "MACs", "`--coarse`", "points lost", "gain over 0"]
    return table([*head, "Tiny-ImageNet: % of dense kept"], lines)


TABLES: dict[str, Callable[[], str]] = {
    "measured": measured,
    "peers": peers,
    "images": images,
    "costs": costs,
    "coarse": coarse,
}
"""What it gives."""

METHOD: dict[str, Callable[[], str]] = {"logits": logits, "kinds": kinds, "labels": labels}
"""How it works."""
