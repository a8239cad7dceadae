"""Train the small ViT that comes with the package, from scratch, on the bundled digits.

    python examples/make_digits_vit.py [OUT]        # nvit/bundled/digits_vit when left out; a few minutes on two cores

Seeded: the same machine and library versions give the same weights.
"""

import sys
from pathlib import Path

import torch
from timm.models.vision_transformer import VisionTransformer

import nvit
from nvit import snapshot
from nvit.data import Digits, TrainingData, evaluation_loader


def main(out: Path, epochs: float = 120) -> None:
    torch.manual_seed(0)
    model = VisionTransformer(
        img_size=8, patch_size=2, in_chans=1, num_classes=10, embed_dim=64, depth=4, num_heads=4, drop_path_rate=0.1
    )
    model.pretrained_cfg = {"architecture": "digits_vit", "input_size": (1, 8, 8), "mean": (0.5,), "std": (0.5,)}
    config = nvit.FinetuneConfig(
        epochs=epochs, lr=8e-3, batch_size=64, warmup_epochs=5, distill_weight=0.0, label_smoothing=0.1, train_mode=True
    )
    train = TrainingData(Digits(training=True, augment=True), config.batch_size, config.seed)
    model = nvit.finetune(model, train, config)
    found = nvit.accuracy(model, evaluation_loader(Digits(training=False), 360))
    snapshot.save(out, model, {"top1": found["top1"]})
    print(f"{out}: top-1 {found['top1']:.2f} % of {found['images']} digits")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else nvit.BUNDLED)
