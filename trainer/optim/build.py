"""The optimizer of a run: AdamW (https://arxiv.org/abs/1711.05101) in one fused kernel, on GPU and on CPU."""

from __future__ import annotations

import logging
from typing import Any

import torch

from trainer.config.resolve import Device
from trainer.config.schema import RunConfig
from trainer.errors import LaunchError

logger = logging.getLogger(__name__)


def build_optimizer(groups: list[dict[str, Any]], config: RunConfig, device: Device) -> torch.optim.Optimizer:
    """AdamW over `groups` (dicts of `params`, `weight_decay`, `name`), with the peak learning rate.

    torch's fused kernel on both kinds of device: on the CPU its result does not depend on the number of threads nor on
    how ZeRO cuts the parameters. Optimizer states that are offloaded from a GPU are updated by DeepSpeed's CPU Adam,
    which is compiled at first use; on the CPU there is nothing to offload from, and the option has no effect here.

    Raises:
        LaunchError: DeepSpeed's CPU Adam is needed and cannot be compiled.
    """
    if config.zero.offload == "none" or device == "cpu":
        if config.zero.offload != "none":
            logger.warning(
                "zero.offload=%s has no effect on the optimizer: it is in host memory anyway", config.zero.offload
            )
        optim = config.optim
        return torch.optim.AdamW(groups, lr=optim.lr, betas=optim.betas, eps=optim.eps, fused=True)
    return _cpu_adam(groups, config)


def _cpu_adam(groups: list[dict[str, Any]], config: RunConfig) -> torch.optim.Optimizer:
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    optim = config.optim
    try:
        optimizer: torch.optim.Optimizer = DeepSpeedCPUAdam(
            groups, lr=optim.lr, betas=optim.betas, eps=optim.eps, adamw_mode=True
        )
    except RuntimeError as error:
        # another optimizer in its place would end with other bits on this node than on the next
        raise LaunchError(
            f"zero.offload={config.zero.offload} needs DeepSpeed's CPU Adam, which cannot be compiled on this machine: "
            "install ninja and g++ with the Python headers, or set zero.offload=none"
        ) from error
    return optimizer
