"""The switches of PyTorch's backends that a config has: CUDNN_BENCHMARK and FLOAT32_PRECISION, as detectron2 means
them."""

import torch

from fbn_plugin.engine.run.config import CfgNode

__all__ = ["set_backends"]


def set_backends(cfg: CfgNode, eval_only: bool) -> None:
    """Set the process's switches. An evaluation sees images of many sizes, for which benchmarking does not pay."""
    torch.backends.cudnn.benchmark = cfg.CUDNN_BENCHMARK and not eval_only
    if cfg.FLOAT32_PRECISION and torch.cuda.is_available():
        torch.set_float32_matmul_precision(cfg.FLOAT32_PRECISION)
        torch.backends.cudnn.allow_tf32 = cfg.FLOAT32_PRECISION != "highest"
