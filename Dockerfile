# nvit in a container, by the commands of README's Install and of the Makefile. Nobody has built it where it was written
# (there was no Docker): tests/docs/test_container.py keeps its commands to theirs, and that is all that is known of it.
#
#   docker build -t nvit .                                                                             on a CPU
#   docker build -t nvit --build-arg BASE=nvidia/cuda:13.0.1-devel-ubuntu24.04 .                       with a CUDA toolkit
#   docker run --rm -v "$PWD:/work" nvit demo                                                          (--gpus all)
ARG BASE=python:3.12-slim
FROM ${BASE}

RUN apt-get update && apt-get install -y --no-install-recommends python3 python3-venv python3-dev g++ \
    && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /opt/nvit
ENV PATH=/opt/nvit/bin:$PATH

COPY . /src
WORKDIR /src
RUN pip install --upgrade pip 'setuptools>=77' wheel
RUN pip install 'torch>=2.11'
RUN pip install -e '.[hf]'
RUN pip install -e . --no-build-isolation
RUN python -c "import nvit; print(nvit.describe())"

WORKDIR /work
ENTRYPOINT ["nvit"]
