"""Selects the attention kernel of transformers backbones: FlashAttention if installed, else SDPA."""

import logging
from functools import cache
from importlib.util import find_spec
from typing import Any, Literal

import torch
from torch import nn

from roadwork_dist.common.errors import ConfigError

logger = logging.getLogger(__name__)

Attention = Literal["auto", "sdpa", "flash"]
SDPA = "sdpa"
FLASH = {
    "flash_attention_4": ("flash_attn.cute", (9, 0)),
    "flash_attention_3": ("flash_attn_interface", (9, 0)),
    "flash_attention_2": ("flash_attn", (8, 0)),
}
"""FlashAttention versions, newest first: name in transformers → module, and lowest compute capability with
kernels. Version 3 supports only Hopper (arXiv 2407.08608), version 4 Hopper and Blackwell."""


def attention_in_use(
    attention: Attention = "auto", *, device: torch.device | None = None, dtype: str = "bf16"
) -> str:
    """The transformers name of the attention that a backbone would use on this machine.

    With bf16, ``auto`` is the newest installed FlashAttention (4, 3, 2) that has kernels for the GPU.
    Otherwise it is torch's scaled dot product attention, which chooses among its own fused kernels.

    Raises:
        ConfigError: flash attention is requested but cannot be used; the message says why.
    """
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    versions = usable_versions(device)
    obstacles = []
    if not versions:
        obstacles.append(
            "no FlashAttention for this device is installed (`pip install flash-attn`; version 3 from source)"
        )
    if device.type != "cuda":
        obstacles.append(f"the device is {device.type}, not a GPU")
    if dtype != "bf16":
        obstacles.append(f"backbone.dtype is {dtype}, not bf16")
    if attention == "flash" and obstacles:
        raise ConfigError(
            f"backbone.attention is 'flash', but {' and '.join(obstacles)}: fix that, or set it to auto"
        )
    return SDPA if attention == "sdpa" or obstacles else versions[0]


def usable_versions(device: torch.device) -> list[str]:
    """Installed FlashAttention versions that have kernels for a GPU, newest first; on another device, all."""
    if device.type != "cuda":
        return [name for name, (module, _) in FLASH.items() if _is_installed(module)]
    capability = torch.cuda.get_device_capability(device)
    return [
        name
        for name, (module, least) in FLASH.items()
        if _is_installed(module)
        and capability >= least
        and (name != "flash_attention_3" or capability[0] == least[0])
    ]


def _is_installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ImportError:  # the parent package is missing, or was built for another torch
        return False


def choose_attention(network: nn.Module, attention: Attention, device: torch.device, dtype: str) -> str:
    """Set the attention of a transformers network and log the choice once.

    Raises:
        ConfigError: flash attention is requested but cannot be used on this machine or by this network.
    """
    net: Any = network
    chosen = attention_in_use(attention, device=device, dtype=dtype)
    if chosen != SDPA:
        errors = _set_first(net, usable_versions(device))
        if errors and attention == "flash":
            raise ConfigError(
                f"backbone.attention is 'flash', but {type(network).__name__} cannot use it "
                f"({'; '.join(errors)}): set it to auto or sdpa"
            )
    used: str = net.config._attn_implementation
    _log_once(type(network).__name__, used)
    return used


def _set_first(net: Any, versions: list[str]) -> list[str]:
    """Set the first version that the network accepts; returns the errors if it accepts none."""
    errors = []
    for version in versions:
        try:
            net.set_attn_implementation(version)
        except (ImportError, ValueError) as error:
            errors.append(f"{version}: {error}")
        else:
            return []
    return errors


@cache
def _log_once(network: str, used: str) -> None:
    logger.info("attention of %s: %s", network, used)
