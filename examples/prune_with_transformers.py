"""Prune inside the Trainer of transformers, here a small ViT of its own on the bundled digits: half a minute on a CPU.

pip install 'nvit[hf]'
python examples/prune_with_transformers.py
"""

import torch
from transformers import Trainer, TrainingArguments, ViTConfig, ViTForImageClassification

import nvit
from nvit.data import Digits, evaluation_loader
from nvit.integrations.hf import PrunerCallback

EPOCHS = 8


class Dicts(Digits):
    """The digits as the Trainer wants them."""

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        image, label = super().__getitem__(index)
        return {"pixel_values": image, "labels": label}


def arguments(epochs: float, **more) -> TrainingArguments:
    quiet = {"use_cpu": True, "save_strategy": "no", "report_to": [], "disable_tqdm": True}
    folder = {"output_dir": "digits-transformers", "per_device_train_batch_size": 64}
    return TrainingArguments(**folder, **quiet, num_train_epochs=epochs, **more)


torch.manual_seed(0)
tiny = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
model = ViTForImageClassification(ViTConfig(**tiny, image_size=8, patch_size=2, num_channels=1, num_labels=10))
digits = Dicts(training=True)
Trainer(model, arguments(EPOCHS, learning_rate=3e-3, warmup_steps=20), train_dataset=digits).train()

table = nvit.LatencyTable.analytic(model)  # LatencyTable.measure(model, batch_size) for milliseconds of this machine
pruning = PrunerCallback(table, nvit.PruneConfig(latency_target=(0.8, 0.6), interval=4))
settings = arguments(20, learning_rate=1e-3, max_grad_norm=0)  # saliency reads gradients that are not clipped
Trainer(model, settings, train_dataset=digits, callbacks=[pruning]).train()

for pruned in pruning.snapshots:
    found = nvit.accuracy(pruned.model, evaluation_loader(Digits(training=False), 360))
    print(f"{pruned}: top-1 {found['top1']:.1f} %")
pruning.snapshots[-1].save("digits-transformers/pruned")
