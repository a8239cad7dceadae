"""Several ranks are one run: the same decisions on each and in one process, and a lost rank costs little."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from timm.data import Mixup

import nvit
from nvit import adapters, parallel
from nvit.cli import main as cli
from nvit.layers import Attention
from nvit.parallel import collectives
from nvit.parallel import shards as shards_module
from nvit.structure.run_state import load_run_state
from nvit.tasks.classification import Classification
from nvit.training.data import TrainingData, seed_draws
from tests.families import HOSTS, ONE_OF_EACH
from tests.ranks import PLAYED
from tests.runs import NoisyImages

ROOT = Path(__file__).parents[2]
ENV = os.environ | {"OMP_NUM_THREADS": "1"}
SEVERAL = [(count, name) for count, names in PLAYED.items() for name in names if count > 1]


@pytest.fixture(scope="module")
def played(once):
    """The folder in which `tests.ranks` has played its scenarios."""

    def play(folder):
        command = [sys.executable, "-m", "tests.ranks", str(folder)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=1500, cwd=ROOT, env=ENV)
        assert done.returncode == 0, done.stderr

    return once("ranks", play)


def codes(played: Path, name: str) -> list[int]:
    return json.loads((played / "codes.json").read_text())[name]


def said(played: Path, name: str) -> str:
    return "".join(p.read_text() for p in sorted((played / f"said-{name}").iterdir()))


def of_rank(monkeypatch, rank: int, count: int) -> None:
    monkeypatch.setattr(collectives, "rank", lambda: rank)
    monkeypatch.setattr(collectives, "world", lambda: count)


# --- decisions --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "name"), SEVERAL)
def test_every_rank_decides_as_one_process_does(count, name, played):
    """Masks bit for bit, at every decision; weights to rounding, of the model and of what was cut from it."""
    assert codes(played, f"decisions-{count}") == [0] * count, said(played, f"decisions-{count}")
    alone = name.partition("-")[0] + "-copies"
    expected = json.loads((played / "decided-0-of-1.json").read_text())[alone]
    weights = load_file(played / f"{alone}-0-of-1.safetensors")
    assert len(expected["decided"]) > (10 if name.startswith(("train", "frozen")) else 2), (
        "the dense masks, and decisions"
    )
    for rank in range(count):
        found = json.loads((played / f"decided-{rank}-of-{count}.json").read_text())[name]
        assert found["decided"] == expected["decided"]
        mine = load_file(played / f"{name}-{rank}-of-{count}.safetensors")
        assert mine.keys() == weights.keys()
        for n, w in weights.items():
            torch.testing.assert_close(mine[n], w, rtol=0, atol=1e-12, msg=lambda m, n=n: f"{n}: {m}")


def test_the_variants_differ_in_what_they_decide(played):
    found = json.loads((played / "decided-0-of-1.json").read_text())
    last = {name: v["decided"][-1] for name, v in found.items()}
    assert len(set(last.values())) == len(last), "two recipes prune the same: one of them does not test anything"


def test_a_rank_that_decides_otherwise_stops_all_of_them(played):
    assert codes(played, "disagreeing") == [3, 3, 3]
    for line in said(played, "disagreeing").splitlines():
        assert line.startswith("the decision at step 3 differs between ranks: 1 have not what rank 0 has")


def test_finetuning_is_the_same_in_copies_and_in_shards(played):
    """With a teacher and a moving average, which is what comes back."""
    alone = load_file(played / "finetuned-1-0.safetensors")
    for count in (2, 3):
        assert codes(played, f"finetuned-{count}") == [0] * count, said(played, f"finetuned-{count}")
        for rank in range(count):
            found = load_file(played / f"finetuned-{count}-{rank}.safetensors")
            for n, w in alone.items():
                torch.testing.assert_close(found[n], w, rtol=0, atol=1e-12)


def test_a_checkpointed_block_may_lie_in_shards(played):
    """Gradients of every family as one process has them without either."""
    assert codes(played, "checkpointed") == [0, 0], said(played, "checkpointed")


def test_a_nan_on_one_rank_ends_all_with_the_same_words(played):
    assert codes(played, "nan") == [3, 3]
    assert set(said(played, "nan").splitlines()) == {
        "the loss is nan at step 1; lower the learning rate or check the data"
    }


# --- lost ranks -------------------------------------------------------------------------------------------------------


def test_killed_ranks_end_the_run_which_goes_on_with_others_to_the_same_end(played):
    """Two ranks with copies, one killed: rank 0 saves what it has. Three with shards, one killed: the state on disk is
    of the last save. Then four ranks to the end."""
    assert codes(played, "killed-copies") == [1, -signal.SIGKILL], said(played, "killed-copies")
    assert codes(played, "first-state") == 4, "all four steps that were complete, though no save was due"
    assert codes(played, "killed-shards") == [1, 1, -signal.SIGKILL], said(played, "killed-shards")
    assert 4 < codes(played, "second-state") <= 8
    assert "rank 0 lost another of 2 ranks" in said(played, "killed-copies")
    assert codes(played, "seconds") < 600, "a lost rank was waited for; by itself it is noticed after 30 minutes"
    assert codes(played, "resumed") == [0] * 4, said(played, "resumed")
    whole, resumed = (json.loads((played / f"ended-{n}.json").read_text()) for n in ("whole", "killed"))
    assert resumed["steps"] == whole["steps"] - codes(played, "second-state"), "it began anew"
    assert [h["predicted_ratio"] for h in resumed["history"]] == [h["predicted_ratio"] for h in whole["history"]]
    a, b = (load_file(played / f"ended-{n}.safetensors") for n in ("whole", "killed"))
    for n, t in a.items():
        if n.startswith("mask."):
            assert torch.equal(t, b[n])
        else:
            torch.testing.assert_close(b[n], t, rtol=0, atol=1e-12)


def _ranks_of(launcher: int) -> dict[int, int]:
    """Rank -> process of a torchrun's children."""
    found = {}
    for pid in Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split():
        env = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        found |= {int(v.partition(b"=")[2]): int(pid) for v in env if v.startswith(b"RANK=")}
    return found


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the ranks' processes in /proc")
def test_torchrun_with_a_killed_rank_leaves_a_state_that_one_process_ends(tmp_path):
    prune = ["demo", "--table", "analytic", "--latency-target", "0.9", "--finetune-epochs", "0", "--device", "cpu"]
    prune += ["--interval", "10", "--bundles-per-step", "3", "--batch-size", "16", "--latency-batch", "2"]
    prune += ["--latency-seconds", "0.1", "--out", str(tmp_path / "o")]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    with open(tmp_path / "said", "w") as out:
        run = subprocess.Popen([*torchrun, "-m", "nvit", *prune], stdout=out, stderr=out, cwd=ROOT, env=ENV)
    try:
        end = time.monotonic() + 300
        while "prune:" not in (tmp_path / "said").read_text():
            assert run.poll() is None and time.monotonic() < end, (tmp_path / "said").read_text()
            time.sleep(0.05)
        ranks = _ranks_of(run.pid)
        os.kill(ranks[1], signal.SIGKILL)
        assert run.wait(timeout=300) != 0
    finally:
        run.terminate()
    assert not any(Path(f"/proc/{pid}").exists() for pid in ranks.values()), "an orphan"
    words = (tmp_path / "said").read_text()
    # One line at most: the launcher may end rank 0 as it is about to speak, its state already saved.
    assert sum(line.startswith("nvit: ") for line in words.splitlines()) <= 1, words
    _, values = load_run_state(tmp_path / "o" / "run_state.safetensors")
    assert values["trainer"]["step"] > 0, "saved by rank 0 once it knew: no save was due within five minutes"
    assert cli.main([*prune, "--resume"]) == 0
    assert nvit.load(tmp_path / "o" / "target-0.9")


# --- the command ------------------------------------------------------------------------------------------------------


def test_commands_of_several_ranks(played):
    assert codes(played, "command") == [0, 0], said(played, "command")
    result = json.loads((played / "run" / "result.json").read_text())
    assert result["snapshots"][0]["predicted_ratio"] <= 0.5 and result["recipe"]["fsdp"]
    assert said(played, "command").count("result.json written") == 1, "rank 0 alone speaks"
    assert codes(played, "tuned") == [0, 0], said(played, "tuned")
    tuned = json.loads((played / "tuned" / "result.json").read_text())
    assert tuned["top1"] > 80 and nvit.load(played / "tuned")


@pytest.mark.parametrize(
    ("name", "code", "says"),
    [("bad-flag", 2, "not in (0, 1)"), ("bad-group", 1, "matches no group"), ("one-process", 2, "without torchrun")],
)
def test_wrong_input_is_one_line_of_one_rank(name, code, says, played):
    assert codes(played, name) == [code, code]
    lines = [line for line in said(played, name).splitlines() if line.startswith("nvit: ")]
    assert len(lines) == 1 and says in lines[0]


def test_what_ranks_say_to_each_other(played):
    assert codes(played, "words") == [0, 0, 0], said(played, "words")
    shares = [json.loads(line) for line in said(played, "words").splitlines()]
    assert sorted(i for mine in shares for i in mine) == list(range(11))


# --- shares -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "count"), [(8, 2), (8, 4), (9, 3), (10, 4), (64, 3), (7, 1)])
def test_shares_are_a_partition_closed_under_what_mixup_pairs(size, count, monkeypatch):
    shares = []
    for rank in range(count):
        of_rank(monkeypatch, rank, count)
        shares.append(parallel.share(size))
    assert sorted(i for mine in shares for i in mine) == list(range(size))
    even = size - size % 2
    for mine in shares:
        paired = [i for i in mine if i < even]
        assert paired == [even - 1 - i for i in reversed(paired)] or count == 1


@pytest.mark.parametrize("cutmix", [0.0, 1.0])
def test_mixup_on_shares_makes_the_images_of_the_whole_batch(cutmix, monkeypatch):
    x, y = torch.randn(10, 3, 16, 16), torch.randint(7, (10,))
    mix = Mixup(0.8, cutmix, num_classes=7)
    seed_draws(5)
    images, labels = mix(x.clone(), y)
    for rank in range(4):
        of_rank(monkeypatch, rank, 4)
        seed_draws(5)
        mine, theirs = mix(*(t.clone() for t in parallel.take((x, y))))
        assert torch.equal(mine, images[parallel.share(10)]) and torch.equal(theirs, labels[parallel.share(10)])


def test_training_data_of_a_rank_is_its_share_of_the_same_batches(monkeypatch):
    whole = list(TrainingData(NoisyImages(), 9, seed=4).epoch(2, start=1))
    for rank in range(3):
        of_rank(monkeypatch, rank, 3)
        for (x, y), (mine, theirs) in zip(whole, TrainingData(NoisyImages(), 9, seed=4).epoch(2, start=1), strict=True):
            assert torch.equal(mine, x[parallel.share(9)]) and torch.equal(theirs, y[parallel.share(9)])


def test_labels_drawn_for_rows_are_those_of_the_whole_batch():
    logits = torch.randn(12, 7, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(1)
    whole = Classification(7).draw(logits)
    rows = [1, 4, 5, 11]
    torch.manual_seed(1)
    assert torch.equal(Classification(7).draw(logits[rows], rows, 12), whole[rows])


def test_no_more_than_a_few_parameters_are_whole_at_a_time():
    shards = {str(i): torch.full((2,), i) for i in range(9)}
    whole = shards_module._Gathered(shards)
    for name, t in whole.items():
        assert torch.equal(t, shards[name]) and len(whole.last) <= 4
    assert list(whole) == list(shards) and len(whole) == 9


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_blocks_are_what_is_gathered_at_once(name, monkeypatch):
    """And nothing else, in the order in which they run; the rest of the model with the call."""
    host, wrapped = HOSTS[name](), []
    adapter = adapters.find(host)
    model = adapter.prepare(host)
    monkeypatch.setattr(shards_module, "init_device_mesh", lambda *_: None)
    monkeypatch.setattr(shards_module, "fully_shard", lambda module, mesh: wrapped.append(module) or module)
    call = shards_module.shard(model, adapter.logits)
    assert wrapped == [*adapter.blocks(call.model), call]
    assert all(any(isinstance(layer, Attention) for layer in block.modules()) for block in wrapped)


def test_a_single_process_is_left_alone():
    assert (parallel.rank(), parallel.world(), parallel.main()) == (0, 1, True)
    tensors = {"a": torch.ones(3)}
    assert parallel.mean(tensors)["a"] is tensors["a"] and parallel.gathered(tensors) is tensors
    assert parallel.share(5) == [0, 1, 2, 3, 4] and parallel.from_main(lambda: 7) == 7
    with pytest.raises(RuntimeError, match="gloo"), parallel.watch():
        raise RuntimeError("gloo: not a lost rank, there is none")
