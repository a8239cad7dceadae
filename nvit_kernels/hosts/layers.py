"""Drop-in timm layers: the host's own submodules and parameters, computed by `nvit_kernels.functional`.

A layer has no state but the host's, so its state dict is the host's. Kept lists are buffers that are not saved.
`nvit_kernels.fuse` puts these layers in and takes them out again.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nvit_kernels import functional
from nvit_kernels.kept import Kept


class Fused(nn.Module):
    """What the layers share: the host they stand for, kept lists by kind, score buffers by kind.

    Attributes:
        widths: dense width of each kind that can be pruned here.
        scores: float32 buffer by kind, to which the backward adds; None or missing: no scores.
    """

    def __init__(self, host: nn.Module, widths: dict[str, int]):
        super().__init__()
        self._host = (host,)  # in a tuple, so that it is no submodule
        self.widths = widths
        self.scores: dict[str, Tensor] = {}
        self.train(host.training)
        for name, module in host.named_children():
            self.add_module(name, module)
        for name, parameter in host.named_parameters(recurse=False):
            self.register_parameter(name, parameter)

    @property
    def host(self) -> nn.Module:
        """The module this layer stands for; it shares every parameter."""
        return self._host[0]

    def keep_(self, kind: str, mask: Tensor | None) -> None:
        """Keep the units of bool `mask` in the width `kind`; None keeps all and drops the list.

        A new mask goes into the list there is, so it changes no shape and recompiles nothing.
        """
        if mask is None:
            for part in ("index", "count", "mask"):
                self._buffers.pop(f"{kind}_{part}", None)
        elif (kept := self.kept(kind)) is not None:
            kept.update_(mask.to(kept.mask.device))
        else:
            new = Kept.from_mask(mask.to(next(self.parameters()).device))
            if new.width != self.widths[kind]:
                raise ValueError(f"mask for {kind} has {new.width} entries, this layer has {self.widths[kind]} units")
            for part in ("index", "count", "mask"):
                self.register_buffer(f"{kind}_{part}", getattr(new, part), persistent=False)

    def kept(self, kind: str) -> Kept | None:
        """The list of width `kind`, None where all is kept."""
        index = self._buffers.get(f"{kind}_index")
        return None if index is None else Kept(index, self._buffers[f"{kind}_count"], self._buffers[f"{kind}_mask"])


class LayerNorm(Fused):
    """For timm's and torch's LayerNorm over the last dim: statistics over kept channels, kind `emb`."""

    def __init__(self, host: nn.LayerNorm):
        super().__init__(host, {"emb": host.normalized_shape[0]})
        self.normalized_shape, self.eps = host.normalized_shape, host.eps

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """`x`, or `x + residual` and then that sum too."""
        return functional.kept_layer_norm(x, self.weight, getattr(self, "bias", None), self.kept("emb"), self.eps,
                                          residual, self.scores.get("emb"))  # fmt: skip


class Attention(Fused):
    """For `timm.layers.Attention` without dropout on its weights: kinds `heads`, `qk_dim`, `v_dim`."""

    def __init__(self, host: nn.Module):
        super().__init__(host, {"heads": host.num_heads, "qk_dim": host.head_dim, "v_dim": host.head_dim})
        self.num_heads, self.head_dim, self.attn_dim = host.num_heads, host.head_dim, host.attn_dim
        self.scale, self.fused_attn = host.scale, host.fused_attn

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        if attn_mask is not None or is_causal:
            raise ValueError("the fused attention takes no mask; call nvit_kernels.unfuse(model) for masked attention")
        batch, tokens, _ = x.shape
        qkv = self.qkv(x).view(batch, tokens, 3, self.num_heads, self.head_dim)
        q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))
        q, k = self.q_norm(q), self.k_norm(k)
        out = functional.attention(q, k, v, self.scale, self.kept("heads"), self.kept("qk_dim"), self.kept("v_dim"),
                                   self.scores.get("heads"), self.scores.get("qk_dim"),
                                   self.scores.get("v_dim"))  # fmt: skip
        return self.proj_drop(self.proj(out.transpose(1, 2).reshape(batch, tokens, self.attn_dim)))


class Mlp(Fused):
    """For `timm.layers.Mlp` with the exact GELU and no dropout on hidden units: kind `mlp`."""

    def __init__(self, host: nn.Module):
        super().__init__(host, {"mlp": host.fc1.out_features})

    def forward(self, x: Tensor) -> Tensor:
        return self.drop2(functional.mlp(x, self.fc1.weight, self.fc1.bias, self.fc2.weight, self.fc2.bias,
                                         self.kept("mlp"), self.scores.get("mlp")))  # fmt: skip


class SwiGLU(Fused):
    """For `timm.layers.SwiGLU` and the packed `GluMlp` with SiLU on its first half: kind `mlp`."""

    def __init__(self, host: nn.Module):
        super().__init__(host, {"mlp": host.fc2.in_features})

    def forward(self, x: Tensor) -> Tensor:
        if hasattr(self, "fc1_g"):
            gate, value = (self.fc1_g.weight, self.fc1_g.bias), (self.fc1_x.weight, self.fc1_x.bias)
        else:
            weights, bias = self.fc1.weight.chunk(2), self.fc1.bias
            gate, value = zip(weights, (None, None) if bias is None else bias.chunk(2), strict=True)
        return self.drop2(functional.swiglu(x, *gate, *value, self.fc2.weight, self.fc2.bias, self.kept("mlp"),
                                            self.scores.get("mlp")))  # fmt: skip


class Block(Fused):
    """For timm's pre-norm `Block`: its first residual add runs inside the second norm where nothing stands between."""

    def __init__(self, host: nn.Module):
        super().__init__(host, {})

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        branch = self.drop_path1(self.ls1(self.attn(self.norm1(x), attn_mask=attn_mask, is_causal=is_causal)))
        if isinstance(self.norm2, LayerNorm):
            normed, x = self.norm2(branch, residual=x)
        else:
            x = x + branch
            normed = self.norm2(x)
        return x + self.drop_path2(self.ls2(self.mlp(normed)))


def is_layer_norm(module: nn.Module) -> bool:
    """A LayerNorm with a weight over the last dim alone, of torch's class or timm's (not its conv-layout cousins)."""
    plain = type(module) is nn.LayerNorm or (type(module).__name__ == "LayerNorm" and isinstance(module, nn.LayerNorm))
    return plain and len(module.normalized_shape) == 1 and torch.is_tensor(module.weight)
