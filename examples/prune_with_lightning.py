"""Prune inside Lightning's training loop, here a small ViT on the bundled digits: half a minute on a CPU.

pip install 'nvit[lightning]'
python examples/prune_with_lightning.py
"""

import lightning
import torch
from torch import nn

import nvit
from nvit.data import Digits, evaluation_loader
from nvit.integrations.lightning import PrunerCallback


class Classifier(lightning.LightningModule):
    """Any LightningModule of yours with a timm model in it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def training_step(self, batch, index):
        images, labels = batch
        return nn.functional.cross_entropy(self.model(images), labels)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


model = nvit.load(nvit.BUNDLED)
loader = torch.utils.data.DataLoader(Digits(training=True, augment=True), batch_size=64, shuffle=True)
table = nvit.LatencyTable.analytic(model)  # LatencyTable.measure(model, batch_size) for milliseconds of this machine
config = nvit.PruneConfig(latency_target=(0.7, 0.5), interval=4)

pruning = PrunerCallback(table, config)
quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
trainer = lightning.Trainer(max_epochs=20, accelerator="cpu", callbacks=[pruning], **quiet)
trainer.fit(Classifier(model), loader)

for pruned in pruning.snapshots:
    found = nvit.accuracy(pruned.model, evaluation_loader(Digits(training=False), 360))
    print(f"{pruned}: top-1 {found['top1']:.1f} %")
pruning.snapshots[-1].save("digits-lightning")
