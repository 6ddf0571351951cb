"""Which attention kernel transformers backbones use: flash where it is installed, else SDPA."""

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
FLASH = "flash_attention_2"


def attention_in_use(
    attention: Attention = "auto", *, device: torch.device | None = None, dtype: str = "bf16"
) -> str:
    """Name that transformers gives to the attention a backbone would use on this machine.

    ``auto`` is flash attention where the package ``flash_attn`` is installed, the device is a GPU
    and the arithmetic is bf16; else torch's scaled dot product attention, which chooses among its
    own fused kernels.

    Raises:
        ConfigError: flash attention is asked for and cannot be used; the message says why.
    """
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    obstacles = []
    if find_spec("flash_attn") is None:
        obstacles.append("the package flash_attn is not installed (`pip install flash-attn`)")
    if device.type != "cuda":
        obstacles.append(f"the device is {device.type}, not a GPU")
    if dtype != "bf16":
        obstacles.append(f"backbone.dtype is {dtype}, not bf16")
    if attention == "flash" and obstacles:
        raise ConfigError(
            f"backbone.attention is 'flash', but {' and '.join(obstacles)}: mend that, or set it to auto"
        )
    return SDPA if attention == "sdpa" or obstacles else FLASH


def choose_attention(network: nn.Module, attention: Attention, device: torch.device, dtype: str) -> str:
    """Set the attention of a transformers network and log once which it is.

    Raises:
        ConfigError: flash attention is asked for and cannot be used, here or by this network.
    """
    net: Any = network
    chosen = attention_in_use(attention, device=device, dtype=dtype)
    if chosen == FLASH:
        try:
            net.set_attn_implementation(FLASH)
        except (ImportError, ValueError) as error:
            if attention == "flash":
                raise ConfigError(
                    f"backbone.attention is 'flash', but {type(network).__name__} cannot use it ({error}): "
                    "set it to auto or sdpa"
                ) from error
    used: str = net.config._attn_implementation
    _log_once(type(network).__name__, used)
    return used


@cache
def _log_once(network: str, used: str) -> None:
    logger.info("attention of %s: %s", network, used)
