# A server for any machine: docker build -t manylora . && docker run -p 8000:8000 -v $PWD/adapters:/adapters manylora \
#   serve --model /models/base --adapter-dir /adapters --host 0.0.0.0 --admin-key "$ADMIN_KEY"

FROM python:3.12-slim AS build
WORKDIR /src
RUN python -m venv /venv
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY server server
COPY kernels kernels
COPY adapters adapters
COPY deploy deploy
# --build-arg TORCH="--index-url ..." takes torch from elsewhere, a CPU build for instance.
ARG TORCH=""
# --build-arg EXTRAS="[ray]" for a fleet: docs/deploy-ray.md.
ARG EXTRAS=""
RUN /venv/bin/pip install --no-cache-dir --constraint constraints.txt ${TORCH} torch==2.13.0 \
 && /venv/bin/pip install --no-cache-dir --constraint constraints.txt ".${EXTRAS}"

FROM python:3.12-slim
# The namespace package must win over folders of the working directory; see docs/architecture.md.
ENV PATH=/venv/bin:$PATH PYTHONSAFEPATH=1 PYTHONUNBUFFERED=1 \
    XDG_CACHE_HOME=/data/cache XDG_STATE_HOME=/data/state PORT=8000
COPY --from=build /venv /venv
# KubeRay's probes of a Ray node call wget.
ARG EXTRAS=""
RUN if [ -n "$EXTRAS" ]; then apt-get update && apt-get install -y --no-install-recommends wget \
 && rm -rf /var/lib/apt/lists/*; fi
RUN useradd --create-home --uid 10001 manylora && mkdir -p /data/cache /data/state && chown -R manylora /data
USER manylora
VOLUME /data
EXPOSE 8000
# Loading a large base takes minutes; /ready answers 200 once requests are served.
HEALTHCHECK --interval=10s --timeout=5s --start-period=10m --retries=3 \
    CMD python -c "import os, urllib.request as u; u.urlopen(f'http://127.0.0.1:{os.environ[\"PORT\"]}/ready', timeout=4)"
STOPSIGNAL SIGTERM
ENTRYPOINT ["manylora"]
CMD ["serve", "--help"]
