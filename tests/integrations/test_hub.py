"""Snapshots to the hub and back, with the hub's client faked where it would call out; cards that say what is known."""

import json
import re
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import timm
import torch
import yaml
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

import nvit
from nvit.cli import main as cli
from nvit.structure import hub as store
from nvit.structure import snapshot

REVISION = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def repositories(tmp_path, monkeypatch):
    """A hub that is a folder: repositories by name, each with a folder for its one commit."""
    root = tmp_path / "hub"

    def of(repo):
        return root / repo.replace("/", "--") / REVISION

    def download(repo, name, revision=None):
        if revision not in (None, REVISION) or not of(repo).exists():
            raise LocalEntryNotFoundError(f"{repo} at {revision} is nowhere")
        if not (of(repo) / name).is_file():
            raise EntryNotFoundError(f"{name} is not in {repo}")
        return str(of(repo) / name)

    def commit(api, repo, operations, *, commit_message, revision=None):
        for operation in operations:
            of(repo).mkdir(parents=True, exist_ok=True)
            with operation.as_file() as f:
                (of(repo) / operation.path_in_repo).write_bytes(f.read())

    made = []
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda repo, revision, allow_patterns: str(of(repo)))
    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", lambda api, repo, **how: made.append((repo, how)))
    monkeypatch.setattr(huggingface_hub.HfApi, "create_commit", commit)
    store.snapshot_at.cache_clear()
    yield of
    store.snapshot_at.cache_clear()
    assert all(how == {"private": None, "exist_ok": True} for _, how in made)


def test_there_and_back(repositories, tmp_path, capsys):
    name = nvit.hub.push_to_hub(nvit.BUNDLED, "me/digits", license="cc-by-4.0")
    assert name == "hf-hub:me/digits"
    assert sorted(p.name for p in repositories("me/digits").iterdir()) == [
        "README.md", "manifest.json", "metrics.json", "spec.json", "weights.safetensors",
    ]  # fmt: skip
    images = torch.randn(2, 1, 8, 8)
    for where in (name, f"{name}@{REVISION}"):
        assert torch.equal(nvit.load(where)(images), nvit.load(nvit.BUNDLED)(images))
    assert cli.main(["evaluate", name, "--data", "digits", "--device", "cpu", "--out", str(tmp_path / "e")]) == 0
    assert json.loads((tmp_path / "e" / "result.json").read_text())["top1"] > 95


def test_what_cannot_be_had_is_one_line(repositories, tmp_path):
    for repo, files in {"me/timm": {"config.json": '{"architecture": "vit"}'}, "me/empty": {"a": ""}}.items():
        repositories(repo).mkdir(parents=True)
        for file, text in files.items():
            (repositories(repo) / file).write_text(text)
    for name, says in {
        "hf-hub:me/nowhere": "hf-hub:me/nowhere: the hub cannot be asked, and it is not in the cache",
        "hf-hub:me/empty": "hf-hub:me/empty holds no snapshot: spec.json is missing",
        "hf_hub:me/timm": "hf_hub:me/timm holds no snapshot: spec.json is missing, and config.json is not of nvit",
    }.items():
        with pytest.raises(ValueError) as e:
            nvit.load(name)
        assert str(e.value).startswith(says) and "\n" not in str(e.value)


def test_a_command_tells_a_hub_that_says_no_from_one_that_says_nothing(repositories, capsys, monkeypatch):
    repositories("me/other").mkdir(parents=True)
    for name, says in {
        "me/nowhere": ": the hub cannot be asked,",
        "me/other": " holds no snapshot, nor a timm model",
    }.items():
        assert cli.main(["compare", f"hf-hub:{name}", "--device", "cpu"]) == 1
        err = capsys.readouterr().err
        assert f"hf-hub:{name}{says}" in err and err.count("\n") == 1
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda repo, file, revision: f"/cache/{file}")
    assert store.snapshot_at("hf-hub:me/nowhere") is None, "timm has it, though nobody can be asked"


def test_only_whole_snapshots_go_up(repositories, tmp_path):
    with pytest.raises(ValueError, match="is not a snapshot"):
        nvit.hub.push_to_hub(tmp_path, "me/x")
    bad = shutil.copytree(nvit.BUNDLED, tmp_path / "bad")
    (bad / "metrics.json").write_text("{}")
    with pytest.raises(ValueError, match=r"metrics\.json is damaged"):
        nvit.hub.push_to_hub(bad, "me/x")
    (bad / "manifest.json").unlink()
    with pytest.raises(ValueError, match=r"has no manifest\.json"):
        nvit.hub.push_to_hub(bad, "me/x")
    assert not repositories("me/x").exists()


def test_a_pruned_model_of_transformers_comes_from_the_hub(repositories):
    transformers = pytest.importorskip("transformers")
    from nvit import hf
    from tests.integrations.test_hf_models import answers, images_of, pruned

    transformers.utils.logging.disable_progress_bar()
    small = pruned()
    hf.save_pretrained(small, repositories("me/vit"))
    images = images_of(small)
    assert torch.equal(answers(nvit.load("hf-hub:me/vit"), images).cls, answers(small, images).cls)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run's folder, pruned and measured."""
    out = tmp_path_factory.mktemp("run") / "digits-run"
    said = ["prune", "digits", "--data", "digits", "--latency-target", "0.8", "--no-train", "--images", "64"]
    quick = ["--latency-seconds", "2", "--latency-batch", "64", "--eval-images", "64", "--device", "cpu"]
    assert cli.main([*said, *quick, "--measure-seconds", "0.1", "--out", str(out)]) == 0
    return out


def test_the_card_says_what_the_run_found(run):
    result = json.loads((run / "result.json").read_text())
    (row,) = result["snapshots"]
    table = nvit.LatencyTable.load(run / "latency_table.json")
    card = nvit.hub.model_card(run / "target-0.8", "me/small", license="apache-2.0", base_model="me/digits-dense")
    _, head, text = str(card).split("---\n", 2)
    about = yaml.safe_load(head)
    assert about["license"] == "apache-2.0" and about["base_model"] == "me/digits-dense"
    assert about["library_name"] == "nvit" and about["pipeline_tag"] == "image-classification"
    dense = result["dense"]
    top1 = [f"{r['top1']:.2f} ± {r['top1_se']:.2f}" for r in (dense, row)]
    assert f"| top-1 % | {top1[0]} | {top1[1]} |" in text
    assert f"| ms | {dense['latency_ms']:.2f} | {row['latency_ms']:.2f} |" in text
    assert f"a batch of 64 images, float32, eager, on {table.setting.device}" in text
    assert "criterion curvature" in text and "| `latency_target` | &#91;0.8&#93; |" in text
    assert 'nvit.load("hf-hub:me/small")' in text and "80 % of its latency, " in text
    blocks = snapshot.load_spec(run / "target-0.8").blocks
    assert f"| 0 | {blocks[0].emb} of 64 | {blocks[0].heads} of 4 |" in text
    assert str(run.parent) not in text, "nobody's paths"


def test_what_nobody_knows_is_said_to_be_unknown(tmp_path):
    card = nvit.hub.model_card(nvit.BUNDLED)
    assert card.data.license == "unknown" and "unknown: nobody named it when this card was made" in card.text
    assert "Latency: not measured" in card.text and "Nobody kept the recipe" in card.text
    odd = snapshot.load(nvit.BUNDLED)
    path = snapshot.save(tmp_path / "a | b <script>", odd)
    text = str(nvit.hub.model_card(path))
    assert "<script>" not in text and "a &#124; b &#60;script&#62;" in text and "its metrics are empty" in text


def test_a_card_in_the_folder_leaves_the_snapshot_whole_and_goes_up_as_it_is(repositories, tmp_path):
    folder = shutil.copytree(nvit.BUNDLED, tmp_path / "digits")
    file = nvit.hub.write_card(folder, "me/digits", license="cc-by-4.0")
    nvit.load(folder)
    again = huggingface_hub.ModelCard.load(file)
    assert again.data.license == "cc-by-4.0"
    file.write_text(str(again) + "\nMy own words.\n")
    nvit.hub.push_to_hub(folder, "me/digits")
    assert (repositories("me/digits") / "README.md").read_text().endswith("My own words.\n")


def test_timm_does_not_open_a_snapshot_and_is_not_misled():
    """It reads `config.json`, of which it would build the dense model: a snapshot has none."""
    assert not (nvit.BUNDLED / "config.json").exists()
    with pytest.raises(FileNotFoundError, match="Config file not found"):
        timm.create_model(f"local-dir:{nvit.BUNDLED}", pretrained=True)


def test_the_page_shows_what_there_is():
    page = (Path(__file__).parents[2] / "docs" / "hub.md").read_text()
    named = set(re.findall(r"nvit\.hub\.(\w+)", page))
    assert named == set(nvit.hub.__all__)
