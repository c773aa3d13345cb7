# A worker, or a head, in a container: the versions of constraints.txt, and no root. PyTorch brings CUDA; the host has
# NVIDIA's driver and container toolkit.
#
#   docker build -t cggr-ray --build-arg CGGR_RAY_COMMIT=$(git rev-parse --short=10 HEAD) .
#   docker run --gpus all --network host --shm-size 4g -v /mnt/results:/mnt/results \
#     -v ~/.ray/auth_token:/home/racer/.ray/auth_token:ro cggr-ray ray start --address=HEAD:6379 --block
FROM python:3.12-slim

# Triton compiles with gcc.
RUN apt-get update \
    && apt-get install -y --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*

RUN useradd --create-home --uid 1000 racer
WORKDIR /home/racer/cggr_ray
COPY constraints.txt pyproject.toml README.md LICENSE ./
COPY cggr_ray cggr_ray
COPY trainables trainables
COPY search_spaces search_spaces
COPY analysis analysis
COPY races races
RUN pip install --no-cache-dir -c constraints.txt .

# What runs say of their code, where there is no checkout.
ARG CGGR_RAY_COMMIT=""
ENV CGGR_RAY_COMMIT=${CGGR_RAY_COMMIT} \
    RAY_AUTH_MODE=token \
    RAY_USAGE_STATS_ENABLED=0
# Ray's folder is made here, so that a token mounted into it leaves the folder its user's.
RUN install -d -o racer -g racer /home/racer/.ray
USER racer
CMD ["cggr-ray", "--help"]
