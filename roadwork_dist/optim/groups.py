"""Which parameters are decayed."""

from typing import Any

from torch import nn

_NO_DECAY = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.Embedding, nn.modules.batchnorm._BatchNorm)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Split the trainable parameters into decayed and not decayed ones.

    Biases, other vectors and scalars, and everything inside norms and embeddings are not decayed.

    Returns:
        One or two optimizer groups, each parameter once, in the order of ``model.parameters()``.
    """
    exempt = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, _NO_DECAY)
        for parameter in module.parameters(recurse=False)
    }
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    decayed = [p for p in trainable if p.ndim > 1 and id(p) not in exempt]
    others = [p for p in trainable if p.ndim <= 1 or id(p) in exempt]
    groups = [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
