"""Before CUDA starts: deterministic matrix products need a fixed workspace."""

import os

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
