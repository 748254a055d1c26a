"""Where Triton kernels are tested: through Triton's interpreter on the CPU, and natively where there is a GPU."""

import importlib.util
import os

import pytest
import torch


@pytest.fixture(params=["interpreter", pytest.param("cuda", marks=pytest.mark.gpu)])
def triton_device(request) -> torch.device:
    """Device of the tensors that kernels get."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed")
    if request.param == "cuda":
        if not torch.cuda.is_available():
            pytest.skip("needs CUDA")
        return torch.device("cuda")
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("kernels run natively here: pytest -m gpu")
    return torch.device("cpu")
