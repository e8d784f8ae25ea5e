# Sources -> one image for gateway and workers, for CPUs or for NVIDIA GPUs:
#   docker build -t cast-serve:0.1.0 .
#   docker build -t cast-serve:0.1.0-gpu --build-arg EXTRA=gpu .
# For a release give BASE by digest: --build-arg BASE=docker.io/library/python:3.11-slim-bookworm@sha256:...
#
# No container engine was available: no image has been built of it. Its steps for CPUs were run one by one
# as uid 10001 and gave a worker and a gateway that answer; /opt/cast takes 3.3 GB, of which triton (1.0 GB),
# torch (0.65) and vLLM (0.5) are the largest.
# Python packages come from a lock file with hashes; g++ and libnuma are those of the base image's release.
ARG BASE=docker.io/library/python:3.11-slim-bookworm

# g++ stays in the final image. vLLM's torch.compile (and triton, on GPUs) calls it when a worker starts,
# and the kernel cache is filed under the compiler's version, so build and run need the same one.
# vLLM's CPU wheel links against libnuma. CUDA's libraries come with the wheels, the driver from the host.
FROM ${BASE} AS base
# No versions: they are the ones of the base image's release.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ libnuma1 \
    && rm -rf /var/lib/apt/lists/*
ENV PATH=/opt/cast/venv/bin:$PATH \
    CAST_KERNEL_CACHE=/opt/cast/kernels

FROM base AS builder
ARG EXTRA=cpu
# Where PyTorch keeps CPU builds of torch, as the cpu lock names one. Only files that the lock knows by
# hash are taken.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
WORKDIR /src
COPY deploy/requirements/ deploy/requirements/
RUN python -m venv /opt/cast/venv \
    && pip install --no-cache-dir --no-deps --require-hashes \
        --extra-index-url "${TORCH_INDEX}" --requirement "deploy/requirements/${EXTRA}.txt"
COPY pyproject.toml README.md LICENSE ./
COPY cast_train/ cast_train/
COPY cast_serve/ cast_serve/
COPY loadtest/ loadtest/
# The lock has setuptools, so nothing is fetched here.
RUN pip install --no-cache-dir --no-deps --no-build-isolation .
WORKDIR /
# For every instruction set; which one runs is decided where it runs.
RUN python -m cast_serve.kernels.cpu.build

FROM base
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="cast-serve" \
      org.opencontainers.image.description="Serves 2:4-sparse language models through vLLM, next to the dense model" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
RUN groupadd --gid 10001 cast \
    && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /tmp --shell /usr/sbin/nologin cast
COPY --from=builder /opt/cast /opt/cast
# The root file system may be read-only: whatever is written goes below /tmp, a mount of your own.
ENV HOME=/tmp \
    XDG_CACHE_HOME=/tmp/cache \
    VLLM_CACHE_ROOT=/tmp/cache/vllm \
    TORCHINDUCTOR_CACHE_DIR=/tmp/cache/inductor \
    TRITON_CACHE_DIR=/tmp/cache/triton \
    HF_HUB_OFFLINE=1 \
    VLLM_NO_USAGE_STATS=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1
WORKDIR /tmp
USER 10001:10001
EXPOSE 8000
# For the gateway. A worker listens on 8001, so whoever runs it overrides this (see deploy/).
HEALTHCHECK --interval=10s --timeout=5s --start-period=30s --retries=3 \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/livez', timeout=4)"]
ENTRYPOINT ["cast-serve"]
CMD ["--help"]
