"""Host columns to a device."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def upload(column: np.ndarray, device: torch.device) -> Tensor:
    """A host column on `device`, without waiting for what the device is doing."""
    tensor = torch.from_numpy(column)
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor
