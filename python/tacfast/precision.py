"""The precision of forward passes that need not be exact. May import: torch."""

from __future__ import annotations

import torch


def mixed_precision(device: torch.device) -> torch.autocast:
    """bfloat16 in forward passes where the hardware multiplies it faster than float32; its range needs no scaling of gradients."""
    if device.type == "cuda":
        faster = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        # No public function tells; where this one is gone, everything stays in float32.
        faster = device.type == "cpu" and getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)()
    return torch.autocast(device.type, torch.bfloat16, enabled=faster)
