"""The precision of forward passes that need not be exact. May import: torch."""

from __future__ import annotations

import torch
from torch import nn


def strided_depthwise(model: nn.Module) -> bool:
    """Whether a network has depthwise convolutions with a stride, as MobileNets and EfficientNets do: on CPUs, their gradients take ten
    times as long in bfloat16 as in float32, and the whole network takes half as long again unless the channels come last."""
    convolutions = (m for m in model.modules() if isinstance(m, nn.Conv2d))
    return any(m.groups == m.in_channels > 1 and max(m.stride) > 1 for m in convolutions)


def mixed_precision(device: torch.device, model: nn.Module | None = None) -> torch.autocast:
    """bfloat16 in forward passes where the hardware multiplies it faster than float32; its range needs no scaling of gradients. With a
    model, only where its gradients are faster too."""
    if device.type == "cuda":
        faster = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        # No public function tells; where this one is gone, everything stays in float32.
        faster = device.type == "cpu" and getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)()
        faster = faster and (model is None or not strided_depthwise(model))
    return torch.autocast(device.type, torch.bfloat16, enabled=faster)
