# Sources -> the image of the workers, for CPUs or for NVIDIA GPUs, and that of the gateway:
#   docker build -t cast-serve:0.1.0 .
#   docker build -t cast-serve:0.1.0-gpu --build-arg EXTRA=gpu .
#   docker build -t cast-serve-gateway:0.1.0 --target gateway .
# The first two hold the gateway too (`cast-serve up`); the third has no torch, no vLLM and no compiler.
# For a release give BASE by digest: --build-arg BASE=docker.io/library/python:3.11-slim-bookworm@sha256:...
#
# Python packages come from a lock file with hashes; g++ and libnuma are those of the base image's release.
# Docker has no field for it: stop the containers with a grace of 75 s (`docker stop -t 75`), so that
# running requests are answered.
ARG BASE=docker.io/library/python:3.11-slim-bookworm

FROM ${BASE} AS base
# The root file system may be read-only: whatever is written goes below /tmp, a mount of your own. A volume
# at /tmp/cache keeps what was compiled and measured.
RUN groupadd --gid 10001 cast \
    && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /tmp --shell /usr/sbin/nologin cast \
    && install --directory --owner=10001 --group=10001 /tmp/cache
ENV PATH=/opt/cast/venv/bin:$PATH \
    HOME=/tmp \
    XDG_CACHE_HOME=/tmp/cache \
    CAST_KERNEL_CACHE=/tmp/cache/kernels \
    VLLM_CACHE_ROOT=/tmp/cache/vllm \
    TORCHINDUCTOR_CACHE_DIR=/tmp/cache/inductor \
    TRITON_CACHE_DIR=/tmp/cache/triton \
    HF_HUB_OFFLINE=1 \
    VLLM_NO_USAGE_STATS=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1
LABEL org.opencontainers.image.title="cast-serve" \
      org.opencontainers.image.description="Serves 2:4-sparse language models through vLLM, next to the dense model" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="0.1.0"

# g++ stays in the workers' image: vLLM's torch.compile (and triton, on GPUs) calls it when a worker starts.
# vLLM's CPU wheel links against libnuma. CUDA's libraries come with the wheels, the driver from the host.
FROM base AS compiler
# No versions: they are the ones of the base image's release.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ libnuma1 \
    && rm -rf /var/lib/apt/lists/*

# What the gateway needs, and our package as a wheel. aiohttp and others bring 13 MB of a debugger's symbols;
# numpy's libraries have few.
FROM compiler AS package
COPY deploy/requirements/ /requirements/
RUN python -m venv /opt/cast/venv \
    && pip install --no-cache-dir --no-deps --require-hashes --requirement /requirements/gateway.txt
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY cast_train/ cast_train/
COPY cast_serve/ cast_serve/
COPY loadtest/ loadtest/
# The lock has setuptools, so nothing is fetched here.
RUN pip wheel --no-cache-dir --no-deps --no-build-isolation --wheel-dir /wheels . \
    && pip install --no-cache-dir --no-deps --no-index /wheels/*.whl \
    && pip uninstall --yes setuptools pip \
    && find /opt/cast/venv/lib -type d -name tests -prune -exec rm -r {} + \
    && find /opt/cast/venv/lib -name '*.so' -not -path '*/numpy*' -exec strip --strip-unneeded {} +

FROM base AS gateway
COPY --from=package /opt/cast /opt/cast
ARG REVISION=unknown
LABEL org.opencontainers.image.revision="${REVISION}"
WORKDIR /tmp
USER 10001:10001
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=30s --retries=3 \
    CMD ["python", "-m", "cast_serve.health", "http://127.0.0.1:8000/livez"]
ENTRYPOINT ["cast-serve"]
CMD ["--help"]

FROM compiler AS packages
ARG EXTRA=cpu
# Where PyTorch keeps CPU builds of torch, as the cpu lock names one. Only files that the lock knows by
# hash are taken.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
COPY deploy/requirements/ /requirements/
# Three quarters of vLLM's libraries for CPUs are what a debugger reads.
RUN python -m venv /opt/cast/venv \
    && { pip install --no-cache-dir --no-deps --require-hashes \
            --extra-index-url "${TORCH_INDEX}" --requirement "/requirements/${EXTRA}.txt" \
        || { echo "If pip found no file with a locked hash, the index has another build of that version than" \
                "the lock knows: run deploy/requirements/lock where that index is, and build again." >&2; exit 1; }; } \
    && find /opt/cast/venv/lib -path '*/vllm/_C*.so' -exec strip --strip-unneeded {} +

# The package is a layer of its own: a change of it leaves the packages where they are.
FROM packages
# The kernels are compiled for every instruction set; which one runs is decided where it runs.
RUN --mount=type=bind,from=package,source=/wheels,target=/wheels \
    pip install --no-cache-dir --no-deps --no-index /wheels/*.whl \
    && CAST_KERNEL_CACHE=/tmp/kernels python -m cast_serve.kernels.cpu.build --into-package \
    && rm -r /tmp/kernels
ARG REVISION=unknown
LABEL org.opencontainers.image.revision="${REVISION}"
WORKDIR /tmp
USER 10001:10001
EXPOSE 8001
# For a worker at its own port; whoever runs a gateway of this image overrides it.
HEALTHCHECK --interval=10s --timeout=5s --start-period=10m --retries=3 \
    CMD ["python", "-m", "cast_serve.health", "http://127.0.0.1:8001/health"]
ENTRYPOINT ["cast-serve"]
CMD ["--help"]
