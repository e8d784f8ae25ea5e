"""One model directory -> one vLLM OpenAI server for one variant, on its own cores.

vLLM's own ``vllm`` command fails with the CPU wheel (it asks for a distribution named vllm), so
this starts the same server through vLLM's launcher. After loading it compares the number of layers
that run sparse with the number that are sparse on disk, and refuses to serve if they differ. It
listens only once the engine has answered (see warmup.py).
"""

import argparse
import asyncio
import ctypes
import json
import os
import shutil
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import AsyncExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
import yaml

from cast_serve import worker_key
from cast_serve.checkpoint import hub
from cast_serve.checkpoint.inspect import count_sparse
from cast_serve.checkpoint.record import CAST_JSON, is_gated, read_record
from cast_serve.cores import cores_of_ranks
from cast_serve.engine.claims import METHOD
from cast_serve.engine.draft import (
    CPU_MAX_REQUESTS,
    NUM_TOKENS,
    check_vocabularies,
    publish_acceptance,
    speculate,
)
from cast_serve.engine.interfaces import PLUGIN, SERVER, refusal
from cast_serve.engine.warmup import WarmUp, warm_up
from cast_serve.errors import CastError, FailedError, UsageError
from cast_serve.latency import BUCKETS_S

KV_CACHE_BYTES = 1 << 30
# A step of more tokens may take a CPU longer than the gateway's hang limit.
CPU_STEP_TOKENS = 512


class SparseReport:
    """Methods that vLLM adds to its worker class; the server calls them on each rank."""

    def cast_report(self) -> dict[str, Any]:
        """`report` of this rank's part of model and draft, with its place among the ranks."""
        from vllm.distributed.parallel_state import (
            get_pipeline_model_parallel_rank,
            get_tensor_model_parallel_rank,
        )

        from cast_serve.engine.report import report

        runner: Any = self.model_runner  # type: ignore[attr-defined]
        place = {
            "pipeline_rank": get_pipeline_model_parallel_rank(),
            "tensor_rank": get_tensor_model_parallel_rank(),
        }
        draft = runner.get_draft_model()
        of_draft = None if draft is None else {**place, **report(draft)}
        return {**place, **report(runner.model), "draft": of_draft}

    def cast_prepare_runner(self) -> None:
        """`mend_sampling` of sampling.py, on a CPU, and `rest` of resting.py."""
        from cast_serve.engine.resting import rest
        from cast_serve.engine.sampling import mend_sampling

        runner: Any = self.model_runner  # type: ignore[attr-defined]
        if runner.device.type == "cpu":
            mend_sampling(runner)
        rest(runner)

    def cast_make_stage_input(self) -> None:
        """Makes the tensors in which a pipeline stage receives the previous stage's output.

        vLLM 0.32 makes them in its dummy step, which its CPU worker skips with --enforce-eager;
        the first request then fails ("assert self.intermediate_tensors is not None"). To be removed
        once `CPUModelRunner.warming_up_model` runs, or vLLM makes them elsewhere.
        """
        from vllm.distributed.parallel_state import get_pp_group

        runner: Any = self.model_runner  # type: ignore[attr-defined]
        if get_pp_group().is_first_rank or runner.intermediate_tensors is not None:
            return
        runner.intermediate_tensors = runner.model.make_empty_intermediate_tensors(
            batch_size=runner.max_num_tokens, dtype=runner.model_config.dtype, device=runner.device
        )


def run(
    model: Path,
    name: str,
    host: str = "127.0.0.1",
    port: int = 8001,
    cores: Sequence[int] | None = None,
    vllm_flags: Sequence[str] = (),
    draft: Path | None = None,
    draft_tokens: int | None = None,
    draft_requests: int | None = None,
) -> None:
    """Serves until SIGTERM or Ctrl-C.

    Args:
        model: dense or compressed directory, or its name on a hub.
        name: the variant's name, which requests put in ``model``.
        host: address to listen on.
        port: TCP port to listen on.
        cores: CPU ids for this server only, distributed to its ranks; None leaves binding to
            vLLM.
        vllm_flags: any flags of vLLM's server; they override ours.
        draft: directory, or name on a hub, of the model that proposes tokens; None: none does.
        draft_tokens: that it proposes at once, 1 or more; None: `NUM_TOKENS` of draft.py.
        draft_requests: at a time up to which it proposes, 1 or more; None: `CPU_MAX_REQUESTS` of
            draft.py on a CPU, however many there are on a GPU.

    Raises:
        UsageError: if a directory holds no model or a gated one, the draft does not belong to the
            model, there are fewer cores than ranks, this vLLM lacks an interface that we use, or
            the key is wrong or among the flags.
        FailedError: if a target layer did not get the sparse kernel, or the engine does not
            answer its first requests.
    """
    model, expected, has_zeros = _checked(model, name)
    of_draft, draft_has_zeros = None, False
    if draft is not None:
        try:
            draft, of_draft, draft_has_zeros = _checked(draft, name)
        except UsageError as error:
            raise UsageError(f"--draft: {error}") from error
        check_vocabularies(model, draft)
    else:
        given = {"--draft-tokens": draft_tokens, "--draft-requests": draft_requests}
        for flag, value in given.items():
            if value is not None:
                raise UsageError(f"{flag} {value} has no effect without --draft; name one")
    if expected and "--enable-lora" in vllm_flags:
        raise UsageError(
            f"--enable-lora: vLLM cannot apply LoRA to the sparse linears of {model}; serve it "
            "dense"
        )
    _end_with_parent()
    if cores is not None:
        os.sched_setaffinity(0, cores)
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    set_cpu_defaults()
    if lacks_compiler(vllm_flags):
        print(
            f"cast-serve worker {name}: no C++ compiler {compiler()!r} found, which torch.compile "
            "needs: serving with --enforce-eager, whose steps take longer; install one (Debian: "
            "apt-get install g++) or name it in CXX",
            file=sys.stderr,
        )
        os.environ["TORCH_COMPILE_DISABLE"] = "1"  # of what vLLM compiles in eager mode too
        vllm_flags = ["--enforce-eager", *vllm_flags]
    # This imports vllm, which reads the environment.
    if (expected or of_draft) and (why := refusal("cast-serve's plugin", PLUGIN)):
        raise UsageError(f"{model if expected else draft} is sparse and cannot be served: {why}")
    if why := refusal("this worker", SERVER):
        raise UsageError(f"{why}, or serve with vLLM's own `vllm serve {model}`")
    quantization = METHOD if has_zeros else None
    with _vllms_refusals():
        args = _arguments(all_flags(model, name, host, port, vllm_flags, quantization))
    guard(args, name)
    if draft is not None:
        if draft_requests is None and not torch.cuda.is_available():
            draft_requests = CPU_MAX_REQUESTS
        speculate(args, draft, draft_tokens or NUM_TOKENS, draft_requests, draft_has_zeros)
    if has_zeros and args.quantization != METHOD:
        expected = 0  # the user's --quantization asks for one of vLLM's own methods
    num_ranks = args.tensor_parallel_size * args.pipeline_parallel_size // args.nnodes
    if num_ranks == args.nnodes == args.data_parallel_size == 1:
        compute_in_engine(args, cores)
    if cores is not None:
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", cores_of_ranks(cores, num_ranks))
    if args.headless:
        _run_headless(args)
    else:
        asyncio.run(_serve(args, name, expected, of_draft))


def _checked(model: Path, name: str) -> tuple[Path, int, bool]:
    """A directory that can be served, its sparse linears, and whether their zeros are stored too.

    Raises:
        UsageError: if it holds no model or a gated one.
    """
    model = hub.fetch(model)
    if not (model / "config.json").is_file():
        raise UsageError(f"{model} holds no model: there is no config.json; name an HF directory")
    if is_gated(model):
        raise UsageError(f"{model} is gated: convert it first (cast-serve convert {model} OUT)")
    expected, has_zeros = count_sparse(model)
    has_record = (model / CAST_JSON).is_file()
    if has_record and not expected and read_record(model).get("kind") == "pruned":
        print(
            f"cast-serve worker {name}: {model} stores its zeros, so it is served dense; convert "
            f"it (cast-serve convert {model} OUT) and serve OUT",
            file=sys.stderr,
        )
    return model, expected, has_zeros


def all_flags(
    model: Path,
    name: str,
    host: str,
    port: int,
    vllm_flags: Sequence[str],
    quantization: str | None = None,
) -> list[str]:
    """Our defaults for vLLM's flags, followed by the user's, which replace them.

    The user gives flags on the command line or in the YAML file of --config. As vLLM prefers the
    command line, a default is left out if the file has that flag. Model, name and address always
    win over the file.

    Args:
        model, name, host, port, vllm_flags: as `run` takes them.
        quantization: vLLM's method for weights that are stored with their zeros, which config.json
            does not name; None: config.json decides.

    Returns:
        words for vLLM's argument parser.
    """
    families = ("request_latency", "time_to_first_token", "inter_token_latency")
    own = {
        "--model": str(model),
        "--served-model-name": name,
        "--host": host,
        "--port": str(port),
    }
    ours = {
        "--custom-histogram-buckets": json.dumps(dict.fromkeys(families, BUCKETS_S)),
        "--worker-extension-cls": "cast_serve.engine.worker.SparseReport",
        "--kv-cache-memory-bytes": str(KV_CACHE_BYTES),
        # It bounds its work; vLLM's own choice, xgrammar, holds the engine up for seconds over a
        # regex of 70 characters (benchmarks/log.md).
        "--structured-outputs-config": '{"backend": "guidance"}',
    }
    # The gateway logs requests, and a line for each of its probes of /health would fill the log.
    ours["--uvicorn-log-level"] = "warning"
    if quantization:
        ours["--quantization"] = quantization
    if not torch.cuda.is_available():
        ours["--max-num-batched-tokens"] = str(CPU_STEP_TOKENS)
    # vLLM reads the file only where its name is a word of its own.
    vllm_flags = [
        word
        for flag in vllm_flags
        for word in (flag.split("=", 1) if flag.startswith("--config=") else [flag])
    ]
    given = {flag.split("=")[0].replace("_", "-") for flag in vllm_flags}
    in_file = _in_file(vllm_flags)
    if "--gpu-memory-utilization" in given | in_file:  # which bytes of the KV cache would override
        del ours["--kv-cache-memory-bytes"]
    wanted = own | {flag: value for flag, value in ours.items() if flag not in in_file}
    missing = {flag: value for flag, value in wanted.items() if flag not in given}
    defaults = [part for default in missing.items() for part in default]
    return [*defaults, *vllm_flags]


def _in_file(vllm_flags: Sequence[str]) -> set[str]:
    """The flags in the file of --config; a file that cannot be read is left for vLLM to refuse."""
    if "--config" not in vllm_flags[:-1]:
        return set()
    try:
        file = Path(vllm_flags[vllm_flags.index("--config") + 1])
        content = yaml.safe_load(file.read_text("utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return set()
    return {f"--{key}".replace("_", "-") for key in content} if isinstance(content, dict) else set()


def lacks_compiler(vllm_flags: Sequence[str]) -> bool:
    """Whether torch.compile, on a CPU, would find no C++ compiler.

    Raises:
        UsageError: if so, and --no-enforce-eager asks for it.
    """
    if torch.cuda.is_available() or shutil.which(compiler()):
        return False
    if {"--no-enforce-eager", "--no_enforce_eager"} & set(vllm_flags):
        raise UsageError(
            f"--no-enforce-eager makes vLLM call the C++ compiler {compiler()!r}, which was not "
            "found; install one (Debian: apt-get install g++), name it in CXX, or leave it out"
        )
    return True


def guard(args: argparse.Namespace, name: str) -> None:
    """Makes vLLM's server require the environment's key on every path, if there is one.

    Raises:
        UsageError: if the key is wrong, or among the flags.
    """
    if args.api_key:
        raise UsageError(
            "--api-key shows the key in `ps`, and vLLM checks it only under /v1; set "
            f"{worker_key.VARIABLE} or {worker_key.FILE_VARIABLE} in the environment"
        )
    if key := worker_key.key_of_environment():
        os.environ[worker_key.VLLM_VARIABLE] = key
        # Here and not in `all_flags`, where the user's would replace it; the last is the outermost.
        args.middleware = [*args.middleware, f"{worker_key.__name__}.WorkerKeyCheck"]
    elif not (args.headless or worker_key.is_loopback(args.host)):
        print(
            f"cast-serve worker {name}: listens on {args.host} without a key, so anyone who "
            f"can reach it can use it; set {worker_key.VARIABLE} ({worker_key.HOW_TO_MAKE})",
            file=sys.stderr,
        )


def compiler() -> str:
    """The C++ compiler that torch.compile calls."""
    return os.environ.get("CXX", "g++")


def set_cpu_defaults() -> None:
    """Sets what vLLM's processes should find in the environment on a CPU, unless the user did.

    Memory in pages of 2 MB: the weights are read once a token, with an address lookup for every
    page of 4 KB. Linux gives large pages to all processes or to those that ask, as
    /sys/kernel/mm/transparent_hugepage/enabled says (``always`` or ``madvise``). glibc 2.35 and
    later asks if this variable is set when the process starts, as it then is for the engine's;
    earlier ones ignore it.

    No store of vLLM's own for compiled models: 0.32 cannot load from it on CPUs ("'function' object
    has no attribute 'finalize_loading'") and compiles again at every start. Without it torch's
    cache serves (TORCHINDUCTOR_CACHE_DIR). To be removed once vLLM loads what it stored.
    """
    if not torch.cuda.is_available():
        os.environ.setdefault("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")
        os.environ.setdefault("VLLM_USE_AOT_COMPILE", "0")


def compute_in_engine(args: argparse.Namespace, cores: Sequence[int] | None) -> None:
    """Has the engine's process do the computing itself, unless the user chose another way.

    On CPUs vLLM 0.32 starts a second process for that, since OpenMP reads its threads' cores from
    the environment a process starts with. The engine then waits for each step in a loop that never
    sleeps, on one of the cores that compute it, and exchanges two messages with it. Here the
    engine's process starts with the environment that vLLM would give the second one or, if threads
    are not to be bound, with the user's.

    Args:
        args: of vLLM's server, for one rank; changed in place.
        cores: CPU ids of this server; None: vLLM binds threads, unless its variable says not to.
    """
    if torch.cuda.is_available() or args.distributed_executor_backend is not None:
        return
    if cores is not None:
        os.environ.setdefault("OMP_NUM_THREADS", str(len(cores)))
        os.environ.setdefault("GOMP_CPU_AFFINITY", " ".join(str(core) for core in cores))
    elif os.environ.get("VLLM_CPU_OMP_THREADS_BIND") != "nobind":
        return
    args.distributed_executor_backend = "uni"
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # else vLLM takes "mp" for "uni"


def _arguments(flags: list[str]) -> argparse.Namespace:
    from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
    from vllm.entrypoints.serve.utils.api_utils import cli_env_setup
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    cli_env_setup()
    args: argparse.Namespace = make_arg_parser(FlexibleArgumentParser()).parse_args(flags)
    validate_parsed_serve_args(args)
    return args


def _run_headless(args: argparse.Namespace) -> None:
    """Runs this node's ranks (--nnodes, --node-rank above 0); rank 0's node has the HTTP server."""
    from vllm.entrypoints.cli.serve import run_headless

    args.api_server_count = 0  # as `vllm serve --headless` sets it
    with _vllms_refusals():
        run_headless(args)


@contextmanager
def _vllms_refusals() -> Iterator[None]:
    """Turns vLLM's errors about flags, model or machine into ours; its log has the traceback.

    Raises:
        UsageError: in place of a ValueError or OSError.
        FailedError: in place of a RuntimeError.
    """
    try:
        yield
    except CastError:
        raise
    except (ValueError, OSError) as error:
        raise UsageError(str(error)) from error
    except RuntimeError as error:
        raise FailedError(str(error)) from error


async def _serve(args: argparse.Namespace, name: str, expected: int, of_draft: int | None) -> None:
    from vllm.entrypoints.launchers.api_server.entry import (
        build_and_serve,
        build_async_engine_client,
    )
    from vllm.entrypoints.launchers.launcher import setup_server

    from cast_serve.engine.report import check_reports

    is_stopped = False

    def stop_loading(*_: object) -> None:  # until uvicorn installs its own handlers
        nonlocal is_stopped
        is_stopped = True
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop_loading)
    async with AsyncExitStack() as stack:
        with _vllms_refusals():
            listen_address, sock = setup_server(args, reuse_port=False)
            engine = await stack.enter_async_context(build_async_engine_client(args))
        reports = await engine.collective_rpc("cast_report")
        report = check_reports(reports, expected)
        if of_draft is not None:  # its last pipeline stage has it
            drafts = [each["draft"] for each in reports if each["draft"] is not None]
            found = check_reports(drafts, of_draft, "of the draft, ")
            print(f"cast-serve worker {name}: the draft: {json.dumps(found)}", flush=True)
            report["draft"] = found["pattern"] or "dense"
            publish_acceptance(name)
        _publish(name, report, str(engine.model_config.dtype).removeprefix("torch."))
        await engine.collective_rpc("cast_make_stage_input")
        await engine.collective_rpc("cast_prepare_runner")
        warmed_up = await warm_up(engine)
        _publish_limits(name, engine.model_config.get_vocab_size(), warmed_up)
        if is_stopped:  # where Python ignored the exception, as in a destructor
            raise KeyboardInterrupt
        shutdown = await build_and_serve(engine, listen_address, sock, args)
    try:
        await shutdown
    finally:
        sock.close()


def _publish(name: str, report: dict[str, Any], dtype: str) -> None:
    """Puts the report into this process's Prometheus registry, which vLLM's /metrics shows."""
    from prometheus_client import Gauge

    labels = {
        "variant": name,
        "pattern": report["pattern"] or "dense",
        "kernel": report["kernel"] or "vllm",
        "isa": report["isa"] or "",
        "dtype": dtype,
        "head": report["head"] or dtype,
        "draft": report.get("draft", ""),
        "num_sparse_layers": str(report["num_sparse_layers"]),
        "num_dense_layers": str(report["num_dense_layers"]),
        "weight_bytes": str(report["weight_bytes"]),
        "dense_weight_bytes": str(report["dense_weight_bytes"]),
    }
    gauge = Gauge("cast_variant_info", "What the variant actually runs", list(labels))
    gauge.labels(**labels).set(1)
    print(f"cast-serve worker {name}: {json.dumps(labels)}", flush=True)


def _publish_limits(name: str, vocabulary_size: int, warmed_up: WarmUp) -> None:
    """Publishes what the gateway must know about this worker.

    Token ids at or above the vocabulary's size crash vLLM's engine, so the gateway refuses them. An
    engine sends nothing during a step, so the gateway's hang limit must be longer than a step.
    """
    from prometheus_client import Gauge

    Gauge("cast_worker_vocabulary_size", "Token ids are below this").set(vocabulary_size)
    text = f"Seconds of one full step at start, of {warmed_up.step_tokens} tokens"
    Gauge("cast_worker_step_seconds", text).set(warmed_up.step_s)
    print(
        f"cast-serve worker {name}: the first request took {warmed_up.first_s:.2f} s, a full step "
        f"of {warmed_up.step_tokens} tokens takes {warmed_up.step_s:.2f} s",
        flush=True,
    )


def _end_with_parent() -> None:
    """Asks Linux to terminate this process when the gateway that started it ends."""
    if os.environ.get("CAST_PARENT_PID") == str(os.getppid()):
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)
