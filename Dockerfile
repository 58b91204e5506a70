# syntax=docker/dockerfile:1
# sidecar in a container: built in one stage, run in another, as a user without rights. Written and linted, not run by our
# tests. The tape and a SQLite store live in the volume /var/lib/sidecar; the configuration is mounted at
# /etc/sidecar/sidecar.toml; secrets are files that it names, at /run/secrets.

FROM python:3.11-slim-bookworm AS build
WORKDIR /build
COPY requirements.lock ./
# Only what the lock names is fetched, each file known by its hash.
RUN pip wheel --no-cache-dir --no-deps --require-hashes -r requirements.lock --wheel-dir /wheels \
    && pip install --no-cache-dir --no-index --find-links /wheels setuptools
COPY . .
# From here on nothing is fetched: what running needs is taken from there.
RUN pip wheel --no-cache-dir --no-deps --no-build-isolation --wheel-dir /wheels . \
    && python -m venv /opt/sidecar \
    && /opt/sidecar/bin/pip install --no-cache-dir --no-index --find-links /wheels "sidecar[cassandra]"

FROM python:3.11-slim-bookworm
RUN groupadd --system --gid 10001 sidecar \
    && useradd --system --uid 10001 --gid sidecar --home-dir /var/lib/sidecar --create-home sidecar
COPY --from=build /opt/sidecar /opt/sidecar
ENV PATH="/opt/sidecar/bin:$PATH" PYTHONUNBUFFERED=1
USER sidecar
WORKDIR /var/lib/sidecar
VOLUME ["/var/lib/sidecar"]
# Exit 1 when halted: a person is needed then, a restart would not help; see `sidecar status`.
HEALTHCHECK --interval=15s --timeout=10s --start-period=30s --retries=3 CMD ["sidecar", "status", "--json"]
STOPSIGNAL SIGTERM
ENTRYPOINT ["sidecar"]
CMD ["run"]
