"""Measures everything that needs a GPU, in parts of at most ten minutes: `uv run python -m benchmarks.gpu`."""

import os

from benchmarks.gpu.options import Options

from labs_common.cli import run_command

if __name__ == "__main__":
    # Before torch is imported: whether there is a GPU is then asked without starting CUDA, which no forked process
    # would survive.
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    run_command("benchmarks.gpu.running:run", Options, module="benchmarks.gpu")
