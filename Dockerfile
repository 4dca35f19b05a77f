# es_megatron on a CUDA base image, by the README's steps. Written for
#     docker build --build-arg BASE=nvidia/cuda:12.8.1-devel-ubuntu24.04 --tag es_megatron .
# The base must bring Python 3.11 or newer by apt. Its compiler is for the operations that DeepSpeed builds when it needs them.
ARG BASE=nvidia/cuda:12.8.1-devel-ubuntu24.04
FROM ${BASE}

SHELL ["/bin/bash", "-euo", "pipefail", "-c"]
ENV PIP_NO_CACHE_DIR=1

RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ openssh-client pdsh python3 python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /opt/es_megatron
RUN python3 -m venv .venv \
    && source .venv/bin/activate \
    && pip install torch==2.13.0

COPY . .
RUN source .venv/bin/activate \
    && pip install ".[report,deepspeed]" \
    && es-megatron --help

RUN useradd --create-home trainer
USER trainer
WORKDIR /home/trainer
ENV PATH=/opt/es_megatron/.venv/bin:${PATH}
ENTRYPOINT ["es-megatron"]
CMD ["doctor"]
