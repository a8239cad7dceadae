"""What decoders of other libraries read of a pruned timm model: intermediates and features_only, as a masked one's."""

import pytest
import torch
from timm.models._features import FeatureGetterNet

from nvit.structure import snapshot
from nvit.structure.compact import compact
from tests.hosts import images, masked


@pytest.mark.parametrize("host", ["plain", "deit_distilled", "registers"])
def test_intermediates_of_a_pruned_model_are_the_masked_ones(host, tmp_path):
    model, groups, masks = masked(host)
    small = snapshot.load(snapshot.save(tmp_path / "s", compact(model, groups, masks)))
    x, emb = images(model), int(masks["emb"].sum())
    with torch.no_grad():
        for more in ({}, {"norm": True}, {"indices": [0], "output_fmt": "NLC", "return_prefix_tokens": True}):
            (final, found), (same, expected) = (m.forward_intermediates(x, **more) for m in (small, model))
            torch.testing.assert_close(final, same, rtol=0, atol=1e-4)
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
        features = FeatureGetterNet(small, out_indices=(0, 1))
        for info, map_, expected in zip(features.feature_info, features(x), found_of(model, x), strict=True):
            assert map_.shape[1] == info["num_chs"] == emb and map_.shape[-2:] == model.patch_embed.grid_size
            torch.testing.assert_close(map_, expected, rtol=0, atol=1e-4)


def found_of(model, x) -> list[torch.Tensor]:
    return model.forward_intermediates(x, intermediates_only=True)
