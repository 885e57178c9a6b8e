# ModularForge with the versions of constraints.txt: `docker build -t modularforge .`; docs/operations.md says how a run
# uses it. modularforge.def makes the same for Apptainer: tests/unit/test_containers.py holds the two together.
FROM python:3.11-slim
ARG EXTRAS=gguf,tensorboard
ENV PYTHONNOUSERSITE=1
COPY pyproject.toml constraints.txt README.md LICENSE /opt/modularforge/
COPY checkpoints /opt/modularforge/checkpoints
COPY configs /opt/modularforge/configs
COPY launcher /opt/modularforge/launcher
COPY modularforge /opt/modularforge/modularforge
# torch.compile calls a compiler.
RUN apt-get update && apt-get install --yes --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
RUN python3 -m pip install --no-cache-dir --constraint /opt/modularforge/constraints.txt "/opt/modularforge[$EXTRAS]"
RUN useradd --create-home --uid 1000 forge
USER forge
WORKDIR /home/forge
ENTRYPOINT ["modularforge"]
CMD ["--help"]
