"""A loaded vLLM model -> which layers run sparse or dense, their bytes, and the kernel.

`check_reports` joins the reports of all ranks and refuses a model that is not wholly sparse.
"""

from collections.abc import Collection, Sequence
from typing import Any

from torch import Tensor, nn
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

from cast_serve.checkpoint.record import kept_in_words
from cast_serve.errors import FailedError
from cast_serve.kernels.cpu import tuning
from cast_serve.kernels.gpu import dispatch


def report(model: nn.Module) -> dict[str, Any]:
    """Counts the layers of a loaded vLLM model by what they run.

    Returns:
        num_sparse_layers (linears as on disk, so a qkv that vLLM merged counts three) and
        num_dense_layers (a merged qkv counts three, however it is stored),
        weight_bytes of all linears in memory, dense_weight_bytes if all were dense (the head counts
        in neither), kernel (the op that sparse layers run), isa (the CPU kernel and its
        settings, or the GPU's architecture), pattern and head (``int8`` or ``int4``, else "");
        kernel, isa and pattern are None if no layer is sparse. Where linears keep different numbers
        of 64, the pattern is of all of them: 28-40:64.
    """
    num_sparse = num_dense = weight_bytes = dense_weight_bytes = 0
    runs_on = kernel = None
    kept: set[int | None] = set()
    head = ""
    for module in model.modules():
        if isinstance(module, ParallelLMHead) and hasattr(module, "packed"):
            head = "int4" if hasattr(module, "cast_scale_group") else "int8"
        if not isinstance(module, LinearBase):
            continue
        packed = getattr(module, "packed", None)
        # engine/linear.py sets both on a layer whose weight it has packed.
        if packed is not None and hasattr(module, "cast_num_linears"):
            num_sparse += module.cast_num_linears
            weight_bytes += packed.nbytes
            if hasattr(module, "scale"):
                weight_bytes += module.scale.nbytes
            kernel, runs_on = kernel_of(module)
            kept.add(module.cast_kept)
            itemsize = module.params_dtype.itemsize
            dense_weight_bytes += module.cast_out_features * module.cast_in_features * itemsize
        else:
            num_dense += len(getattr(module, "output_sizes", [0]))
            num_bytes = _dense_bytes(module)
            weight_bytes += num_bytes
            dense_weight_bytes += num_bytes
    return {
        "num_sparse_layers": num_sparse,
        "num_dense_layers": num_dense,
        "weight_bytes": weight_bytes,
        "dense_weight_bytes": dense_weight_bytes,
        "kernel": kernel,
        "isa": runs_on,
        "pattern": _pattern(kept),
        "head": head,
    }


def check_reports(reports: Sequence[dict[str, Any]], expected: int, of: str = "") -> dict[str, Any]:
    """Refuses a model of which a layer fell back to dense.

    A tensor-parallel rank holds a share of every layer and a pipeline rank some whole layers, so
    the numbers of layers are added over the pipeline ranks.

    Args:
        reports: `SparseReport.cast_report` of every rank.
        expected: linears that are compressed on disk.
        of: which model, to begin the error with.

    Returns:
        one report: the layers of the whole model, the bytes of all ranks.

    Raises:
        FailedError: if another number of layers runs the sparse kernel at any tensor-parallel
            rank.
    """
    shares: dict[int, list[dict[str, Any]]] = {}
    for report in reports:
        shares.setdefault(report["tensor_rank"], []).append(report)
    for tensor_rank, stages in shares.items():
        if _sum(stages, "num_sparse_layers") != expected:
            found = ", ".join(
                f"{stage['num_sparse_layers']} at pipeline rank {stage['pipeline_rank']}"
                for stage in stages
            )
            raise FailedError(
                f"{of}{expected} layers are sparse on disk, but at tensor-parallel rank "
                f"{tensor_rank} the sparse kernel runs {found}; is cast-serve installed in vLLM's "
                "environment and its plugin not switched off by VLLM_PLUGINS?"
            )
    return {
        "num_sparse_layers": _sum(shares[0], "num_sparse_layers"),
        "num_dense_layers": _sum(shares[0], "num_dense_layers"),
        "weight_bytes": _sum(reports, "weight_bytes"),
        "dense_weight_bytes": _sum(reports, "dense_weight_bytes"),
        "kernel": next((report["kernel"] for report in reports if report["kernel"]), None),
        "isa": next((report["isa"] for report in reports if report["isa"]), None),
        "pattern": next((report["pattern"] for report in reports if report["pattern"]), None),
        "head": next((report["head"] for report in reports if report["head"]), ""),
    }


def kernel_of(layer: nn.Module) -> tuple[str, str]:
    """What `report` calls kernel and isa, of one layer.

    Args:
        layer: a linear that engine/linear.py has packed.
    """
    op = "cast::linear24_int8" if hasattr(layer, "scale") else "cast::linear24"
    if hasattr(layer, "cast_scale_group"):
        op = "cast::linear24_int4"
    if layer.cast_kept is not None:
        op = "cast::linear64"
    packed: Tensor = layer.packed
    if not packed.is_cuda:
        return op, tuning.description()
    card = dispatch.properties(packed.device.index)
    return op, f"sm_{card.major}{card.minor}"


def _pattern(kept: Collection[int | None]) -> str | None:
    """Of the sparse linears' `cast_kept`; a directory is 2:4 or N:64."""
    of_64 = [n for n in kept if n is not None]
    return kept_in_words(of_64) if of_64 else "2:4" if kept else None


def _dense_bytes(module: LinearBase) -> int:
    out_features = getattr(module, "output_size_per_partition", module.output_size)
    in_features = getattr(module, "input_size_per_partition", module.input_size)
    return int(out_features * in_features * module.params_dtype.itemsize)


def _sum(reports: Sequence[dict[str, Any]], key: str) -> int:
    return sum(report[key] for report in reports)
