"""Every entrypoint of the supported timm modules is pruned, or refused with a reason; the page in docs says which."""

import pytest
import timm
import torch

from docs import fill_tables
from docs.tables import models as models_page
from nvit import adapters
from nvit.spec import KINDS, ViTSpec
from nvit.structure.compact import compact
from nvit.structure.masks import full_masks, widths
from nvit.structure.skeleton import skeleton

ENTRYPOINTS = models_page.entrypoints()
FOUND: dict[str, str | None] = {}
"""Refusals by entrypoint, filled in by the tests below."""


@pytest.mark.parametrize("name", ENTRYPOINTS)
def test_an_entrypoint_is_pruned_or_refused(name):
    model = models_page.skeleton(name)
    reason = FOUND[name] = adapters.refusal(model)
    if reason is not None:
        assert reason.strip()
        with pytest.raises(ValueError, match="is not supported") as e:
            adapters.find(model)
        assert reason in str(e.value) and "\n" not in str(e.value)
        return
    before = {n: p.shape for n, p in model.state_dict().items()}
    adapter = adapters.find(model)
    model = adapter.prepare(model)
    assert {n: p.shape for n, p in model.state_dict().items()} == before
    assert adapters.find(model) is adapter, "a prepared model is known as well"
    groups = adapter.groups(model)
    blocks = widths(groups, full_masks(groups))
    assert sorted((b, g.kind) for g in groups for b in g.blocks) == sorted(
        (b, k) for b in range(len(blocks)) for k in KINDS
    )
    masks = {g.name: torch.arange(g.size) < (g.size + 1) // 2 for g in groups}
    small = compact(model, groups, masks)
    assert list(small.state_dict()) == list(before)
    assert sum(p.numel() for p in small.parameters()) < 0.6 * sum(s.numel() for s in before.values())
    images = torch.empty(1, *adapter.preprocess(model)["input_size"], device="meta")
    narrow, wide = (m.to("meta").eval()(images) for m in (small, model))
    assert narrow.shape == wide.shape or model.num_classes == 0
    spec = ViTSpec.from_json(adapter.spec(model, widths(groups, masks)).to_json())
    rebuilt = skeleton(spec)
    assert {n: p.shape for n, p in rebuilt.state_dict().items()} == {n: p.shape for n, p in small.state_dict().items()}
    adapters.changes_of(small, rebuilt)


def test_the_page_is_current():
    """Filled by docs/fill_tables.py; run it after an adapter or timm changed."""
    text = (fill_tables.DOCS / "models.md").read_text()
    if f"| in timm {timm.__version__} |" not in text:
        pytest.skip(f"docs/models.md was written for another timm than {timm.__version__}")
    found = {n: FOUND[n] if n in FOUND else adapters.refusal(models_page.skeleton(n)) for n in ENTRYPOINTS}
    assert text == fill_tables.filled(text, models_page.tables(lambda: found))


@pytest.mark.parametrize(
    "name",
    [
        "deit_tiny_patch16_224",
        "deit_base_distilled_patch16_224",
        "deit3_small_patch16_224",
        "vit_small_patch14_dinov2",
        "vit_giant_patch14_dinov2",
        "vit_small_patch14_reg4_dinov2",
        "vit_base_patch16_clip_224",
        "vit_tiny_patch16_224",
    ],
)
def test_what_the_readme_promises_is_supported(name):
    assert adapters.refusal(models_page.skeleton(name)) is None


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("vit_base_patch16_rpn_224", "block type ResPostBlock"),
        ("vit_pwee_patch16_reg1_gap_256", "block type ParallelScalingBlock"),
        ("vit_dwee_patch16_reg1_gap_256", "attention type DiffAttention"),
    ],
)
def test_what_is_unknown_is_refused_with_its_reason(name, reason):
    if not timm.is_model(name):
        pytest.skip(f"timm {timm.__version__} has no {name}")
    assert adapters.refusal(models_page.skeleton(name)) is not None
    with pytest.raises(ValueError, match=reason):
        adapters.find(models_page.skeleton(name))


@pytest.mark.parametrize("name", ["resnet18", "swinv2_tiny_window8_256", "davit_tiny"])
def test_other_families_are_refused(name):
    with torch.device("meta"):
        model = timm.create_model(name)
    with pytest.raises(
        ValueError, match=rf"{type(model).__name__} is not supported: .*Supported families: .*docs/models\.md"
    ):
        adapters.find(model)


def test_a_subclass_is_not_taken_for_its_parent():
    class Changed(timm.models.vision_transformer.VisionTransformer):
        def forward(self, x):
            return -super().forward(x)

    model = Changed(img_size=16, patch_size=8, embed_dim=16, depth=1, num_heads=2)
    with pytest.raises(ValueError, match="a subclass of VisionTransformer, which may compute something else"):
        adapters.find(model)


def test_full_widths_of_deit_b_are_its_own():
    with torch.device("meta"):
        model = timm.create_model("deit_base_distilled_patch16_224")
    adapter = adapters.find(model)
    groups = adapter.groups(adapter.prepare(model))
    blocks = widths(groups, full_masks(groups))
    assert len(blocks) == 12 and len({*blocks}) == 1
    assert tuple(getattr(blocks[0], kind) for kind in KINDS) == (768, 12, 64, 64, 3072)
    assert [g.divisor for g in groups[:5]] == [12, 12, 2, 2, 1]
    assert [g.multiple for g in groups[:5]] == [16, 2, 8, 8, 16]
    assert adapter.tokens(model) == 198
