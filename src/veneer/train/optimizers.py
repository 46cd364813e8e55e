"""AdamW on what trains: matrices decay as said, biases and scales do not."""

import torch
from torch import nn

from veneer.train.settings import TrainSettings


def optimizer(model: nn.Module, settings: TrainSettings) -> torch.optim.Optimizer:
    """Fused AdamW (Loshchilov & Hutter 2017, arXiv:1711.05101) over the parameters that require gradients."""
    trains = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trains if p.ndim >= 2], "weight_decay": settings.weight_decay},
        {"params": [p for p in trains if p.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    return torch.optim.AdamW(groups, lr=settings.lr, betas=settings.betas, fused=True)
