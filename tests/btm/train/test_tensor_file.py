import pytest
import torch
from safetensors.torch import load_file

from btm.errors import CheckpointError
from btm.train.tensor_file import damage_of, read_tensors, write_tensors


def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "matrix": torch.randn(7, 5, generator=generator),
        "vector": torch.randn(3, generator=generator),
        "empty": torch.zeros(0, 4),
        "scalar": torch.randn((), generator=generator),
    }


def test_the_safetensors_library_reads_what_we_write(tmp_path):
    write_tensors(tmp_path / "a.safetensors", tensors())
    loaded = load_file(tmp_path / "a.safetensors")
    assert loaded.keys() == tensors().keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors().items())


def test_reading_fills_the_destination_bit_by_bit(tmp_path):
    digest = write_tensors(tmp_path / "a.safetensors", tensors())
    assert damage_of(tmp_path / "a.safetensors", digest) is None
    destination = {name: torch.full_like(tensor, 9.0) for name, tensor in tensors().items()}
    read_tensors(tmp_path / "a.safetensors", destination)
    assert all(torch.equal(destination[name], tensor) for name, tensor in tensors().items())


def test_views_of_one_buffer_are_written_in_place(tmp_path):
    buffer = torch.arange(10.0)
    write_tensors(tmp_path / "a.safetensors", {"a": buffer[2:4], "b": buffer[4:10].view(2, 3)})
    loaded = load_file(tmp_path / "a.safetensors")
    assert torch.equal(loaded["b"], torch.tensor([[4.0, 5.0, 6.0], [7.0, 8.0, 9.0]]))


@pytest.mark.parametrize("tensor", [torch.zeros(3, dtype=torch.bfloat16), torch.zeros(3, 4).t()])
def test_other_types_and_strides_are_refused(tmp_path, tensor):
    with pytest.raises(ValueError, match="only contiguous fp32"):
        write_tensors(tmp_path / "a.safetensors", {"x": tensor})


def test_a_file_of_another_model_names_the_differences(tmp_path):
    write_tensors(tmp_path / "a.safetensors", tensors())
    destination = {"matrix": torch.zeros(5, 7), "vector": torch.zeros(3), "other": torch.zeros(1)}
    with pytest.raises(
        CheckpointError, match=r"other is missing.*empty is not in the model.*matrix has shape \(7, 5\)"
    ):
        read_tensors(tmp_path / "a.safetensors", destination)
