"""vLLM's plugin entry point: registers the method for sparse weights.

vLLM calls `register` in its API process, engine core and every worker, so it is idempotent, and
nothing heavy is imported before it is called (an ImportError at module top would be swallowed).
An exception here would end every vLLM of the environment, whatever model it serves.
"""

from contextlib import suppress
from typing import Any

from cast_serve.engine.claims import METHOD, claims
from cast_serve.errors import UsageError


def register() -> None:
    """Registers the method ``cast_sparse24``; claims.py says which checkpoints are its own.

    If vLLM's interfaces are not those that we use, the method refuses its checkpoints with the
    reason, and all other models are served as if the plugin were not installed. The parent process
    alone logs that, or that vLLM's version was not tested.
    """
    import logging
    import multiprocessing

    from cast_serve.engine.interfaces import PLUGIN, TESTED, installed, refusal

    _request_tiles()
    is_parent = multiprocessing.parent_process() is None
    logger = logging.getLogger(f"vllm.{__name__}")  # vLLM shows what is logged there
    if why := refusal("cast-serve's plugin", PLUGIN):
        if is_parent:
            logger.warning("%s. Sparse models cannot be served; others are not affected", why)
        with suppress(Exception):  # what this needs of vLLM may be what differs
            _register_refusal(why)
        return
    if is_parent and not installed().startswith(f"{TESTED}."):
        logger.warning(
            "cast-serve's plugin was tested with vLLM %s; this is %s, which has all the "
            "interfaces that it uses",
            TESTED,
            installed(),
        )
    import cast_serve.engine.config  # noqa: F401, registers on first import


def _request_tiles() -> None:
    """Asks Linux for the tiles of AMX for this process; does nothing on a CPU without them.

    vLLM's attention uses them without asking. oneDNN asks, and so do our kernels, but neither runs
    in a dense model with small linears: its first request would end the engine with SIGILL.
    """
    import torch

    with suppress(AttributeError):  # private to torch
        torch.cpu._init_amx()


def _register_refusal(why: str) -> None:
    """Has vLLM end with `why` where it is to serve a sparse checkpoint.

    Without it vLLM would name a format that it does not know, or tensors that it does not expect.
    """
    from vllm.model_executor.layers.quantization import register_quantization_config
    from vllm.model_executor.layers.quantization.base_config import QuantizationConfig

    class Refused(QuantizationConfig):
        @classmethod
        def override_quantization_method(
            cls, hf_quant_cfg: dict[str, Any], user_quant: str | None, *_: Any, **__: Any
        ) -> None:
            if claims(hf_quant_cfg, user_quant):
                raise UsageError(f"this model is sparse and cannot be served: {why}")

    register_quantization_config(METHOD)(Refused)
