import timm

import nvit

model = timm.create_model("deit_tiny_patch16_224", pretrained=True)
loader = nvit.image_folder("imagenet/train", model, batch_size=64)
table = nvit.LatencyTable.measure(model, batch_size=8, device="cpu", seconds=10)
config = nvit.PruneConfig(latency_target=0.8, train=False, refit=True, images=128)
result = nvit.prune(model, loader, config, table)
print(result.snapshots[0].in_words())  # met or missed, as measured
result.save("deit_tiny_0.8")
small = nvit.load("deit_tiny_0.8")  # anywhere, no training code: an nn.Module in eval mode
