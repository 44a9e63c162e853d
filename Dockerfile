# An image with this repository and its packages, for CPUs or for NVIDIA GPUs. docs/running.md shows how to use it:
#
#   docker build -t hard-negatives .                          # for GPUs
#   docker build -t hard-negatives --build-arg VARIANT=cpu .  # for CPUs, several gigabytes smaller
#
# Neither image has been built yet. Tests check this file. Its pip commands were run in a virtual environment, except that of the
# CPU variant, which needs PyTorch's own index.
ARG VARIANT=cuda

FROM python:3.12-slim AS base
# --compile needs a C++ compiler
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore PYTHONUNBUFFERED=1

# PyTorch, the largest package, has its own layer, so that changes of the code do not install it again.
FROM base AS cpu
RUN pip install --no-cache-dir --index-url https://download.pytorch.org/whl/cpu "torch>=2.6" "torchvision>=0.21"

# The default packages contain CUDA. The machine needs only NVIDIA's driver and its container toolkit.
FROM base AS cuda
RUN pip install --no-cache-dir "torch>=2.6" "torchvision>=0.21"

# hadolint ignore=DL3006
FROM ${VARIANT} AS final
WORKDIR /opt/hard-negatives
COPY . .
# runs/ is writable for every user, because `docker run --user` may name any
RUN pip install --no-cache-dir -e ".[decoding,parquet]" \
    && useradd --create-home --uid 1000 user \
    && install --directory --mode=1777 runs
USER 1000
ENTRYPOINT ["python"]
CMD ["main_synco.py", "--help"]
