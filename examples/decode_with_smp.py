"""A pruned ViT as the encoder of segmentation_models_pytorch's DPT: which pixels are ink, and of which digit.

pip install nvit segmentation-models-pytorch
python examples/decode_with_smp.py        # half a minute on a CPU; `nvit.load` takes a snapshot of yours as well
"""

import segmentation_models_pytorch as smp
import timm
import torch
from torch.utils.data import DataLoader

import nvit
from nvit.data import Digits

BACKGROUND, EPOCHS = 10, 10


@timm.models.register_model
def pruned_vit(pretrained=False, in_chans=1, **more):
    """smp makes its encoder by a name of timm's, so the pruned model gets one."""
    return nvit.load("digits-0.6")


def pixels(images, labels):
    """The digit's number where there is ink, the background's elsewhere: `(batch, 8, 8)`."""
    return torch.where(images[:, 0] > 0, labels[:, None, None], BACKGROUND)


dense = nvit.load(nvit.BUNDLED)
config = nvit.PruneConfig(latency_target=0.6, train=False, refit=True)
loader = DataLoader(Digits(training=True), batch_size=64, shuffle=True)
nvit.prune(dense, loader, config, nvit.LatencyTable.analytic(dense)).save("digits-0.6")

torch.manual_seed(0)
stages = {
    "encoder_depth": 2,
    "decoder_intermediate_channels": (32, 32),
    "decoder_fusion_channels": 32,
}  # 8 × 8
model = smp.DPT("tu-pruned_vit", encoder_weights=None, in_channels=1, classes=11, **stages)
optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
for _ in range(EPOCHS):
    for images, labels in loader:
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model.train()(images), pixels(images, labels)).backward()
        optimizer.step()

with torch.no_grad():
    images, labels = next(iter(DataLoader(Digits(training=False), batch_size=360)))
    found, right = model.eval()(images).argmax(1), pixels(images, labels)
counts = smp.metrics.get_stats(found, right, mode="multiclass", num_classes=11)
print(f"mIoU {100 * smp.metrics.iou_score(*(c.sum(0, keepdim=True) for c in counts), reduction='macro'):.1f} %")
