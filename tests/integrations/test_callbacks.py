"""Callbacks: the same masks as a loop written by hand, compact models at the targets, resuming, refusals in a line."""

import copy
import importlib
import sys
import warnings

import pytest
import torch
from torch import nn

import nvit
from nvit import parallel
from nvit.integrations.following import Following
from tests.hosts import make
from tests.runs import NoisyImages, config, table

CONFIG = config(latency_target=(0.8, 0.6))
SLOW = config(latency_target=(0.95, 0.85), only=("mlp",), bundle_mlp=8, bundles_per_step=2)


class Still(NoisyImages):
    """The same images at every look, so that two loops see the same."""

    def __getitem__(self, i: int):
        return self.images[i], self.labels[i]


def batches():
    return torch.utils.data.DataLoader(Still(), batch_size=8)


def by_hand(model, steps: int | None = None, clip: float = 0.0):
    """The README's loop: its pruner, and a compact model at each target."""
    pruner = nvit.Pruner(model, table(model, CONFIG), CONFIG)
    optimizer, found = torch.optim.SGD(model.parameters(), lr=0.05), []
    while not pruner.done:
        for images, labels in batches():
            nn.functional.cross_entropy(model(images), labels).backward()
            pruner.observe()
            if clip:
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            pruner.project()
            found += [pruner.compact() for _ in pruner.advance()]
            optimizer.zero_grad()
            if pruner.done or pruner.steps == steps:
                return pruner, found
    return pruner, found


def assert_same(callback, pruner, compact):
    mine = callback.following.pruner
    assert mine.met == pruner.met and mine.steps == pruner.steps
    assert all(torch.equal(mine.masks[n], m) for n, m in pruner.masks.items())
    for ours, theirs in zip(callback.snapshots, compact, strict=True):
        for (name, a), b in zip(ours.model.named_parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7, msg=name)


class TestLightning:
    @pytest.fixture(autouse=True)
    def there(self):
        self.lightning = pytest.importorskip("lightning")
        from nvit.integrations.lightning import PrunerCallback

        self.Callback = PrunerCallback

    def module(self, model):
        class Module(self.lightning.LightningModule):
            def __init__(self):
                super().__init__()
                self.net = model

            def training_step(self, batch, index):
                return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

            def configure_optimizers(self):
                return torch.optim.SGD(self.parameters(), lr=0.05)

        return Module()

    def fit(self, model, callback, folder, ckpt_path=None, **settings):
        quiet = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary"), False)
        settings = {"max_epochs": 40, "accelerator": "cpu", "enable_checkpointing": False} | quiet | settings
        trainer = self.lightning.Trainer(default_root_dir=folder, callbacks=[callback], **settings)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trainer.fit(self.module(model), batches(), ckpt_path=ckpt_path)
        return trainer

    @pytest.mark.parametrize("clip", [0.0, 1e-2])
    def test_it_prunes_as_the_loop_by_hand(self, tmp_path, clip):
        """Scores read gradients before clipping."""
        model = make("plain")
        pruner, compact = by_hand(copy.deepcopy(model), clip=clip)
        callback = self.Callback(table(model, CONFIG), CONFIG, model="net", out=tmp_path / "run")
        trainer = self.fit(model, callback, tmp_path, gradient_clip_val=clip or None)
        assert_same(callback, pruner, compact)
        assert trainer.global_step == pruner.steps, "training ends when every target is met"
        assert not callback.following.pruner.criterion.open, "captures are off"
        x = torch.randn(2, 3, 16, 16)
        torch.testing.assert_close(nvit.load(tmp_path / "run" / "target-0.6")(x), compact[1](x))

    def test_accumulated_batches_are_one_step(self, tmp_path):
        model = make("plain")
        callback = self.Callback(table(model, CONFIG), CONFIG, model="net", stop=False)
        trainer = self.fit(model, callback, tmp_path, accumulate_grad_batches=2, max_epochs=2)
        assert callback.following.pruner.steps == trainer.global_step == 6

    def test_a_checkpoint_goes_on_as_if_never_interrupted(self, tmp_path):
        whole = self.Callback(table(make("plain"), CONFIG), CONFIG, model="net")
        self.fit(make("plain"), whole, tmp_path)
        first = self.Callback(whole.following.table, CONFIG, model="net", out=tmp_path / "run")
        trainer = self.fit(make("plain"), first, tmp_path, max_epochs=1)
        trainer.save_checkpoint(tmp_path / "some.ckpt")
        assert first.following.pruner.met == [0.8]
        again = self.Callback(whole.following.table, CONFIG, model="net", out=tmp_path / "run")
        self.fit(make("plain"), again, tmp_path, ckpt_path=tmp_path / "some.ckpt")
        assert_same(again, whole.following.pruner, [p.model for p in whole.snapshots])
        lost = self.Callback(whole.following.table, CONFIG, model="net")
        with pytest.raises(ValueError, match="kept no files of it"):
            self.fit(make("plain"), lost, tmp_path, ckpt_path=tmp_path / "some.ckpt")

    def test_a_model_that_is_not_there_is_named(self, tmp_path):
        model = make("plain")
        with pytest.raises(ValueError, match=r"Module has no model 'model'; it has net\. Name it"):
            self.fit(model, self.Callback(table(model, CONFIG), CONFIG), tmp_path)


class TestTransformers:
    @pytest.fixture(autouse=True)
    def there(self):
        self.transformers = pytest.importorskip("transformers")
        from nvit.integrations.hf import PrunerCallback

        self.Callback = PrunerCallback

    def model(self):
        torch.manual_seed(0)
        tiny = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 96}
        config = self.transformers.ViTConfig(**tiny, image_size=16, patch_size=8, num_labels=7)
        return self.transformers.ViTForImageClassification(config)

    def train(self, model, callback, folder, resume=None, **settings):
        more = {"max_steps": 60, "per_device_train_batch_size": 8, "max_grad_norm": 0, "optim": "sgd"} | settings
        more |= {"lr_scheduler_type": "constant", "learning_rate": 0.05, "report_to": [], "disable_tqdm": True}
        arguments = self.transformers.TrainingArguments(output_dir=str(folder), use_cpu=True, **more)
        data = [{"pixel_values": x, "labels": y} for x, y in zip(Still().images, Still().labels, strict=True)]
        trainer = self.transformers.Trainer(model, arguments, train_dataset=data, callbacks=[callback])
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    def test_it_prunes_to_the_targets_and_ends(self, tmp_path):
        model = self.model()
        callback = self.Callback(table(model, SLOW), SLOW)
        trainer = self.train(model, callback, tmp_path, save_strategy="no")
        assert [p.target for p in callback.snapshots] == [0.95, 0.85]
        assert trainer.state.global_step == callback.following.pruner.steps < 60
        x = torch.randn(2, 3, 16, 16)
        small = callback.snapshots[-1].model
        torch.testing.assert_close(small(x).logits, model.eval()(x).logits, rtol=1e-4, atol=1e-5)

    def test_a_checkpoint_goes_on_as_if_never_interrupted(self, tmp_path):
        often, saved = {"save_strategy": "steps", "save_steps": 2}, tmp_path / "checkpoint-6"
        whole = self.Callback(table(self.model(), SLOW), SLOW, out=tmp_path / "run")
        self.train(self.model(), whole, tmp_path, **often)
        again = self.Callback(whole.following.table, SLOW, out=tmp_path / "run")
        self.train(self.model(), again, tmp_path, resume=str(saved), **often)
        assert_same(again, whole.following.pruner, [p.model for p in whole.snapshots])
        (saved / "nvit_pruner.safetensors").unlink()
        with pytest.raises(ValueError, match=r"goes on at step 6, and .* is not there"):
            self.train(self.model(), again, tmp_path, resume=str(saved), **often)

    def test_clipped_gradients_are_said(self, tmp_path):
        model = self.model()
        with pytest.warns(UserWarning, match="clips gradients to 1 before saliency reads them"):
            callback = self.Callback(table(model, SLOW), SLOW, stop=False)
            self.train(model, callback, tmp_path, max_steps=1, max_grad_norm=1.0, save_strategy="no")


def test_samples_cannot_be_told_apart_where_gradients_are_accumulated():
    model, settings = make("plain"), config(criterion="abs")
    following = Following(table(model, settings), settings)
    with pytest.raises(ValueError, match="criterion abs reads every sample of a step, and 4 backward passes"):
        following.begin(model, accumulated=4)
    assert not following.pruner.criterion.open


def test_one_shot_configs_and_several_processes_are_refused(monkeypatch):
    model = make("plain")
    with pytest.raises(ValueError, match="the config says train=False; use"):
        Following(table(model, CONFIG), config(train=False))
    monkeypatch.setattr(parallel, "world", lambda: 2)
    with pytest.raises(ValueError, match="prunes in one process and there are 2"):
        Following(table(model, CONFIG), CONFIG).begin(model)


def test_a_gradient_that_is_not_finite_is_not_scored():
    model = make("plain")
    following = Following(table(model, CONFIG), CONFIG)
    following.begin(model)
    model(torch.randn(2, 3, 16, 16)).sum().backward()
    assert following.observe() and following.pruner.mean.count == 1
    next(model.parameters()).grad.fill_(float("inf"))
    assert not following.observe() and following.pruner.mean.count == 1


@pytest.mark.parametrize(("name", "missing"), [("lightning", "lightning.pytorch"), ("hf", "transformers")])
def test_without_the_framework_one_line_says_what_to_install(name, missing, monkeypatch):
    monkeypatch.setitem(sys.modules, missing, None)
    monkeypatch.delitem(sys.modules, f"nvit.integrations.{name}", raising=False)
    with pytest.raises(ModuleNotFoundError, match=rf"which is not here; run `pip install nvit\[{name}\]`$"):
        importlib.import_module(f"nvit.integrations.{name}")
