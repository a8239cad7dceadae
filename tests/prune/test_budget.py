"""Limited memory: scores of a batch in parts, checkpointed blocks, rehearsals against reality, what a run reports."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import nvit
from nvit import adapters
from nvit.cli import main as cli
from nvit.criteria.gates import GateRecorder
from nvit.criteria.registry import CRITERIA
from nvit.prune.budget import Budget, parse
from nvit.prune.plan import Plan
from nvit.prune.pruner import Pruner
from nvit.prune.rehearse import most_images, rehearse_forward, rehearse_scoring
from nvit.prune.scoring import score
from nvit.structure.masks import full_masks
from nvit.utils.memory import LiveBytes, Meter
from tests.hosts import TINY_HOSTS, images, labels, make, prepared
from tests.runs import arguments, config, table

PLANS = [
    Plan(images=1),
    Plan(images=3),
    Plan(checkpoint=True),
    Plan(images=4, checkpoint=True),
]


class Fixed:
    """A budget that has picked its plan."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan

    def choose(self, *_, gradients, **__):
        return dataclasses.replace(self.plan, weight_gradients=gradients)

    def allow(self, later) -> None:
        pass


def scores(model, batches, plan: Plan | None = None, **more) -> dict[str, torch.Tensor]:
    settings = config(**{"train": False, "criterion": "fisher"} | more)
    pruner = Pruner(model, table(model, settings), settings)
    score(pruner, batches, None if plan is None else Fixed(plan))
    return pruner.mean.value()


def assert_same_scores(got, expected, rel=1e-9):
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert got[name].shape == value.shape
        torch.testing.assert_close(got[name], value, rtol=rel, atol=rel * float(value.abs().max()))


@pytest.mark.parametrize(
    ("text", "count"),
    [("8GB", 8e9), ("500MB", 5e8), ("20 GiB", 20 * 2**30), (" 1.5gb ", 1.5e9), ("64k", 64e3), ("2TiB", 2 * 2**40)],
)
def test_amounts_of_memory(text, count):
    assert parse(text) == count


@pytest.mark.parametrize("text", ["8", "GB", "eight GB", "-1GB", "0GB", "8 PB", "8GB or so", ""])
def test_nonsense_is_no_amount(text):
    with pytest.raises(ValueError, match=r"is not an amount of memory; give it as 8GB"):
        parse(text)


@pytest.mark.parametrize(("batch", "at_once"), [(1, 0), (8, 3), (7, 2), (5, 5), (5, 9), (64, 1)])
def test_parts_are_the_batch_and_even(batch, at_once):
    rows = [range(batch)[p] for p in Plan(images=at_once).parts(batch)]
    assert [i for r in rows for i in r] == list(range(batch))
    sizes = {len(r) for r in rows}
    assert max(sizes) <= (at_once or batch) and max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("criterion", [name for name, c in CRITERIA.items() if c.capabilities.budget])
def test_a_batch_in_parts_scores_as_one(criterion):
    """Two batches, 7 and 5 images: parts are uneven, and squares are taken of a whole batch's sums."""
    host = make("deit_distilled", torch.float64)
    batches = [(images(host, n, seed=n), labels(host, n)) for n in (7, 5)]
    expected = scores(host, batches, criterion=criterion)
    for plan in PLANS:
        assert_same_scores(scores(host, batches, plan, criterion=criterion), expected)


@pytest.mark.parametrize("host", [h for h in TINY_HOSTS if h != "no_classifier"])
def test_every_host_scores_alike_in_parts_and_checkpointed(host):
    """A checkpointed block runs forward twice; each gate is still counted once."""
    model = make(host, torch.float64)
    batches = [(images(model, 3), labels(model, 3))]
    expected = scores(model, batches)
    assert_same_scores(scores(model, batches, Plan(images=2, checkpoint=True)), expected)


def test_a_checkpointed_block_runs_twice_and_is_itself_again():
    model, groups = prepared("plain")
    model.requires_grad_(False)
    runs, blocks = [], list(model.blocks)
    handle = model.blocks[0].mlp.register_forward_pre_hook(lambda *_: runs.append(1))
    plan = Plan(checkpoint=True)
    with GateRecorder(model, groups, full_masks(groups)):
        with plan.running(model):
            loss = F.cross_entropy(model(images(model)), labels(model, 3))
        assert len(runs) == 1 and list(model.blocks) == blocks
        loss.backward()
    handle.remove()
    assert len(runs) == 2


def test_drawn_labels_do_not_depend_on_the_parts():
    model = make("plain", torch.float64)
    batches = [(images(model, 6), labels(model, 6))]
    expected = scores(model, batches, labels="sampled")
    assert_same_scores(scores(model, batches, Plan(images=4), labels="sampled"), expected)


def test_bf16_scores_are_close_and_leave_the_weights_alone():
    """bfloat16 has 8 bits: a unit's sum over hundreds of products is right to a few percent of the group's largest."""
    model = make("plain")
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    batches = [(images(model, 6), labels(model, 6))]
    expected = scores(model, batches, criterion="abs")
    got = scores(model, batches, Plan(images=2, checkpoint=True, bf16=True), criterion="abs")
    for name, value in expected.items():
        assert got[name].dtype == torch.float32
        assert (got[name] - value).abs().max() < 0.1 * value.max(), name
    assert any(not torch.equal(got[n], expected[n]) for n in expected), "bfloat16 was not used"
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


# --- rehearsals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("plan", [Plan(), Plan(checkpoint=True), Plan(checkpoint=True, bf16=True)], ids=str)
def test_a_rehearsal_foretells_what_tensors_hold(plan, gradients):
    model, groups = prepared("plain", img_size=64, embed_dim=96, depth=3)
    model.requires_grad_(gradients)
    plan, x, y = dataclasses.replace(plan, weight_gradients=gradients), images(model, 8), labels(model, 8)
    expected = rehearse_scoring(model, groups, x.shape[1:], 8, plan)
    with LiveBytes([*model.parameters(), x, y]) as counted:
        recorder = GateRecorder(model, groups, full_masks(groups))
        if not gradients:
            recorder.__enter__()
        with plan.running(model):
            loss = F.cross_entropy(model(x), y)
        loss.backward()
    recorder.__exit__()
    assert counted.peak <= expected <= 1.1 * counted.peak + x.nbytes


def test_checkpointing_and_parts_need_less():
    model, groups = prepared("plain", img_size=64, embed_dim=96, depth=6)
    model.requires_grad_(False)
    size = (3, 64, 64)
    whole, kept, part = (
        rehearse_scoring(model, groups, size, n, p)
        for n, p in ((8, Plan()), (8, Plan(checkpoint=True)), (2, Plan(checkpoint=True)))
    )
    assert kept < 0.5 * whole and part < 0.3 * kept
    with_gradients = rehearse_scoring(model, groups, size, 8, Plan(weight_gradients=True))
    assert with_gradients > whole
    assert rehearse_forward(model, size, 8) < kept


@pytest.mark.parametrize("room", [0, 99, 100, 350, 1000, 10**6])
def test_most_images_is_the_largest_that_fits(room):
    def need(n):
        return 50 + 50 * n + n * n

    best = max([n for n in range(1, 33) if need(n) <= room], default=0)
    assert most_images(room, 32, need) == best


@dataclasses.dataclass
class Still:
    """A meter that stands still."""

    held: int = 10**9


def test_the_first_plan_that_fits_is_picked():
    """With ever less room: as it is, checkpointed, in parts; then one line says what would be needed."""
    model, groups = prepared("plain", img_size=64, embed_dim=96)
    model.requires_grad_(False)
    shape, budget = (32, 3, 64, 64), Budget("1TB", "cpu")
    budget.meter = Still()

    def needed(count: int, plan: Plan) -> float:
        return 1.05 * rehearse_scoring(model, groups, shape[1:], count, plan)

    assert budget.choose(model, groups, shape, gradients=False, statistics=0, later=0.0) == Plan()
    fixed = budget.estimate - needed(32, Plan())
    for count, plan in ((32, Plan()), (32, Plan(checkpoint=True)), (5, Plan(images=5, checkpoint=True))):
        budget.allowed = int(fixed + needed(count, plan)) + 1000
        assert budget.choose(model, groups, shape, gradients=False, statistics=0, later=0.0) == plan
        assert 0 <= budget.allowed - budget.estimate < 10**6
    budget.allowed = int(fixed)
    with pytest.raises(ValueError, match=r"budget 1.* is too small: at least 1.* GB are needed; 1 GB are held already"):
        budget.choose(model, groups, shape, gradients=False, statistics=0, later=0.0)
    budget.allowed = 10**12
    with pytest.raises(ValueError, match="compact models will take about 2 TB"):
        budget.allow(2e12)


# --- runs -------------------------------------------------------------------------------------------------------------


def test_a_run_within_a_budget_decides_as_one_without(tmp_path):
    def run(**more):
        model, data, settings, analytic = arguments(train=False, criterion="fisher", latency_target=(0.8, 0.5), **more)
        return nvit.prune(model, data, settings, analytic), model

    free, _ = run()
    held = Meter("cpu").held
    bound, model = run(budget=f"{held / 1e6 + 400:.0f}MB")
    assert all(torch.equal(m, bound.masks[n]) for n, m in free.masks.items())
    assert free.memory is None and bound.dense is None
    assert {"budget", "picked", "estimate", "peak"} == bound.memory.keys()
    assert held * 0.9 < bound.memory["peak"] <= bound.memory["estimate"] <= bound.memory["budget"]
    x = images(model)
    with torch.no_grad():
        expected = model(x)
        torch.testing.assert_close(bound.model(x), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


def test_a_real_run_in_less_memory_than_whole_batches_take():
    """In a process of its own: one that has run other tests has memory in pieces that no run gave back."""
    code = "from tests.prune.test_budget import score_in_less_memory; score_in_less_memory()"
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]


def score_in_less_memory() -> None:
    """Resident memory, measured: a batch that would add 160 MB is scored within 110 MB, of which 70 are set aside."""
    model = adapters.find(m := make("plain", img_size=64, embed_dim=192, num_heads=3, depth=4)).prepare(m)
    settings = config(train=False, criterion="fisher", latency_target=(0.7,), batch_size=96)
    batches = [(images(model, 96), labels(model, 96))]
    groups = adapters.find(model).groups(model)
    held, size = Meter("cpu").held, (3, 64, 64)
    whole = rehearse_scoring(model, groups, size, 96, Plan())
    allowed = held + 110e6
    assert held + whole > allowed + 50e6
    settings = dataclasses.replace(settings, budget=f"{allowed / 1e6:.0f}MB")
    found = nvit.prune(model, batches, settings, table(model, settings)).memory
    assert "checkpointing" in found["picked"]
    # What tensors hold is rehearsed; the allocator of a process this small adds a hundredth of its own.
    assert found["peak"] <= 1.01 * found["budget"]


def test_a_budget_with_training_is_refused_in_one_line():
    for more in ({}, {"train": False, "finetune_epochs": 1.0}):
        with pytest.raises(ValueError, match="budget 8GB holds scoring and pruning only; give --no-train"):
            nvit.PruneConfig(budget="8GB", **more).check()


QUICK = ("--no-train", "--finetune-epochs", "0", "--device", "cpu", "--table", "analytic", "--latency-seconds", "0.5")


def test_the_command_reports_plan_and_peak(tmp_path, capsys):
    out = tmp_path / "run"
    assert cli.main(["demo", *QUICK, "--latency-batch", "4", "--budget", "40GB", "--out", str(out)]) == 0
    said = capsys.readouterr()
    assert "budget: without weight gradients, whole batches" in said.err
    assert "of 40GB; without weight gradients, whole batches" in said.out
    result = json.loads((out / "result.json").read_text())
    assert result["memory"]["picked"] == "without weight gradients, whole batches"
    assert 1e8 < result["memory"]["peak"] < result["memory"]["budget"] == 40e9
    free = tmp_path / "free"
    assert cli.main(["demo", *QUICK, "--latency-batch", "4", "--criterion", "fisher", "--out", str(free)]) == 0
    without = json.loads((free / "result.json").read_text())
    assert "memory" not in without
    for key in ("top1", "params", "macs"):
        assert result["dense"][key] == without["dense"][key]
        assert [s[key] for s in result["snapshots"]] == [s[key] for s in without["snapshots"]]


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (("--budget", "much"), "budget 'much' is not an amount of memory"),
        (("--budget", "10MB", "--latency-batch", "1"), "budget 10MB does not hold 1 images while latency is measured"),
        (("--img-size", "16"), "--data is missing"),  # the bundled digits are 8 × 8
    ],
)
def test_wrong_input_is_one_line(flags, says, tmp_path, capsys):
    assert cli.main(["demo", *QUICK, *flags, "--out", str(tmp_path / "o")]) in (1, 2)
    said = capsys.readouterr().err
    assert says in said and said.count("\n") == 1
    assert not (tmp_path / "o").exists()
