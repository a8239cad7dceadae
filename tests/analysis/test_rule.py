"""The rule that fits pruned models, slopes of widths over the stream's, and both commands."""

import csv
import json
from dataclasses import replace

import pytest
import torch

from nvit import adapters, zoo
from nvit.analysis.rule import fit, in_words, slopes
from nvit.cli import main as cli
from nvit.spec import BlockWidths
from nvit.structure import snapshot
from nvit.structure.compact import compact
from nvit.structure.masks import full_masks


def test_a_rule_is_found_again_from_its_own_widths():
    rule = zoo.Rule(heads=1 / 32, qk_dim=1 / 16, v_dim=48, mlp=2.5, factor=1.6, middle=(2, 7), of=12)
    exact = replace(rule, multiples={"heads": 1, "qk_dim": 1, "mlp": 1})
    found, explained = fit([exact.widths(emb) for emb in (3200, 6400)])
    assert found.middle == (2, 7) and found.of == 12 and found.v_dim == 48
    for name in ("heads", "qk_dim", "mlp", "factor"):
        assert getattr(found, name) == pytest.approx(getattr(rule, name), rel=1e-3), name
    assert min(explained.values()) > 0.999


def test_the_papers_own_rule_is_one():
    found, _ = fit([zoo.revit_widths(emb) for emb in (400, 800)])
    assert found.middle == (3, 9) and found.factor == pytest.approx(2, rel=0.05) and found.v_dim == 64
    assert found.widths(800)[4].mlp == pytest.approx(zoo.revit_widths(800)[4].mlp, abs=48)
    assert in_words(zoo.REVIT) == (
        "heads = 0.01·emb, qk_dim = 0.05·emb, mlp = 3·emb, v_dim = 64; times 2.00 in blocks 2 to 3 of 4, but for v_dim"
    )


def test_a_narrow_middle_has_a_factor_below_one_and_widths_without_spread_are_explained():
    blocks = [BlockWidths(64, 4, 16, 32, mlp) for mlp in (128, 32, 32, 128)]
    found, explained = fit([blocks])
    assert found.factor < 1 and found.middle == (1, 3) and explained["heads"] == 1.0


def test_the_middle_of_other_depths_is_the_same_share_rounded_outwards():
    rule = zoo.Rule(heads=1, qk_dim=8, v_dim=8, mlp=16, factor=2, middle=(2, 7), of=12)
    assert [b.heads for b in rule.widths(1, 12)] == [1] * 2 + [2] * 5 + [1] * 5
    assert [b.heads for b in rule.widths(1, 5)] == [2, 2, 2, 1, 1]


def test_rules_go_through_the_disk_and_make_models(tmp_path):
    rule = zoo.Rule(heads=1 / 16, qk_dim=1 / 4, v_dim=16, mlp=1.5, factor=2, middle=(1, 2), of=3)
    rule.save(tmp_path / "rule.json")
    assert zoo.Rule.load(tmp_path / "rule.json") == rule
    model = zoo.revit(rule.widths(32, 3), img_size=32, num_classes=3)
    assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 3) and snapshot.spec_of(model).blocks[1].mlp == 96
    (tmp_path / "rule.json").write_text('{"heads": 1}')
    with pytest.raises(ValueError, match=r"rule\.json is not a rule of widths as `nvit analyze rule` writes one"):
        zoo.Rule.load(tmp_path / "rule.json")


@pytest.mark.parametrize(
    ("models", "says"),
    [
        ([zoo.revit_widths(100, 4), zoo.revit_widths(100, 6)], r"\[4, 6\] blocks; a rule is fitted to models of one"),
        ([zoo.revit_widths(100, 2)], "2 blocks; a rule with a middle needs three"),
    ],
)
def test_what_has_no_rule_is_refused(models, says):
    with pytest.raises(ValueError, match=says):
        fit(models)


def test_slopes_are_of_lines_through_the_origin_block_by_block():
    def blocks(emb, qk):
        return [BlockWidths(emb, 2, qk, 8, 3 * emb), BlockWidths(emb, 2, 8, 8, 16)]

    rows = {(r["block"], r["kind"]): r for r in slopes({"a": blocks(10, 8), "b": blocks(20, 24)})}
    assert rows[0, "mlp"] == {"block": 0, "kind": "mlp", "slope": 3.0, "r2": 1.0}
    qk = (10 * 8 + 20 * 24) / (100 + 400)
    assert rows[0, "qk_dim"]["slope"] == pytest.approx(qk)
    assert rows[0, "qk_dim"]["r2"] == pytest.approx(1 - ((8 - 10 * qk) ** 2 + (24 - 20 * qk) ** 2) / 128)
    assert rows[1, "mlp"]["r2"] is None, "nothing varies"
    with pytest.raises(ValueError, match="different numbers of blocks"):
        slopes({"a": blocks(10, 8), "b": blocks(10, 8)[:1]})


@pytest.fixture(scope="module")
def snapshots(tmp_path_factory):
    """Two snapshots of a model of three blocks, one of them narrower."""
    folder = tmp_path_factory.mktemp("rule")
    model = zoo.revit([BlockWidths(64, 2, 16, 16, m) for m in (64, 128, 64)], img_size=32, num_classes=3)
    groups = adapters.find(model).groups(model)
    masks = full_masks(groups)
    masks["emb"][32:] = False
    snapshot.save(folder / "wide", model)
    snapshot.save(folder / "narrow", compact(model, groups, masks))
    return folder


def test_a_run_is_every_snapshot_of_it_or_the_one_asked_for(snapshots, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    for name, target in (("wide", "0.8"), ("narrow", "0.5")):
        (tmp_path / f"target-{target}").symlink_to(snapshots / name)
    for asked, shown in (([], ["0.8", "0.5"]), (["--target", "0.5"], ["0.5"])):
        assert cli.main(["analyze", "widths", str(tmp_path), *asked, "--out", str(tmp_path / "w")]) == 0
        lines = [line for line in capsys.readouterr().out.splitlines() if "/target-" in line and ".csv" not in line]
        assert [line.split()[0].split("target-")[1] for line in lines] == shown
    assert lines[0].split()[1:] == ["32", "2", "16", "16", "64", "–", "128"]
    for what in (str(tmp_path / "w"), "deit_tiny_patch16_224"):
        assert cli.main(["analyze", "rule", what, "--out", str(tmp_path / "r")]) == 1
        assert f"{what} is neither a snapshot (spec.json is missing) nor a run" in capsys.readouterr().err
    assert cli.main(["analyze", "widths"]) == 2
    assert "nvit analyze widths needs folders of snapshots or runs" in capsys.readouterr().err


def test_a_rule_that_fits_worse_than_a_mean_says_so(tmp_path, capsys):
    """Heads that go against QK and MLP."""
    middle, ends = BlockWidths(64, 1, 32, 16, 128), BlockWidths(64, 4, 8, 16, 32)
    snapshot.save(tmp_path / "m", zoo.revit([ends, middle, ends], img_size=32, num_classes=3))
    assert cli.main(["analyze", "rule", str(tmp_path / "m"), "--out", str(tmp_path / "r")]) == 0
    assert "below 0: a mean over the blocks fits heads better" in capsys.readouterr().out


def test_command_of_the_rule(snapshots, tmp_path, capsys):
    names = [str(snapshots / "wide"), str(snapshots / "narrow")]
    assert cli.main(["analyze", "rule", *names, "--out", str(tmp_path)]) == 0
    shown, found = capsys.readouterr().out, json.loads((tmp_path / "result.json").read_text())
    assert found["rule"]["middle"] == [1, 2] and "in block 2 of 3" in shown
    assert f"nvit.zoo.Rule.load('{tmp_path}/rule.json')" in shown and zoo.Rule.load(tmp_path / "rule.json").of == 3
    with (tmp_path / "rule.csv").open() as f:
        assert {r["model"] for r in csv.DictReader(f)} == {*names, "rule at 32", "rule at 64"}
    assert (tmp_path / "rule.png").stat().st_size > 1000


def test_widths_of_several_streams_come_with_slopes(snapshots, tmp_path, capsys):
    names = [str(snapshots / "wide"), str(snapshots / "narrow")]
    assert cli.main(["analyze", "widths", *names, "--out", str(tmp_path)]) == 0
    assert "slopes.csv: heads, QK and MLP against EMB" in capsys.readouterr().out
    with (tmp_path / "slopes.csv").open() as f:
        assert len(list(csv.DictReader(f))) == 9
    assert cli.main(["analyze", "widths", names[0], "--out", str(tmp_path / "one")]) == 0
    assert not (tmp_path / "one" / "slopes.csv").exists() and "slopes" not in capsys.readouterr().out
