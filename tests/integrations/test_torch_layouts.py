"""Layouts of what PyTorch and safetensors really write: which bytes are which tensor's, and nothing is left out."""

from __future__ import annotations

import io
import warnings

import pytest

from memtrack.artifacts.layouts import layout_of, tensors_of

torch = pytest.importorskip("torch", reason="PyTorch is not installed")

LARGE = 256 << 10


def model():
    """A few layers, large and small."""
    torch.manual_seed(0)
    layers = [torch.nn.Conv2d(3, 64, 3), torch.nn.BatchNorm2d(64), torch.nn.Flatten(), torch.nn.Linear(1024, 300)]
    return torch.nn.Sequential(*layers)


def saved(value, **options) -> bytes:
    """What ``torch.save`` makes of it."""
    file = io.BytesIO()
    torch.save(value, file, **options)
    return file.getvalue()


def layout(data: bytes):
    """The layout, which must cover the file."""
    found = layout_of(io.BytesIO(data), len(data))
    end = 0
    for run in found.runs:
        assert run.offset == end
        end += run.length
    assert end == len(data)
    return found


def content(tensor) -> bytes:
    """The bytes of its elements, in order."""
    return bytes(tensor.detach().contiguous().flatten().view(torch.uint8).numpy())


def check(data: bytes, expected) -> None:
    """Each tensor that is told of has the bytes of the real one, and none is missing."""
    found = {tensor.name: tensor for tensor in tensors_of(io.BytesIO(data), len(data))}
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        place = found[name]
        assert place.shape == tuple(tensor.shape)
        assert data[place.offset : place.offset + place.length] == content(tensor)


def dtypes(data: bytes) -> dict[str, str]:
    """The dtype of each run that is one."""
    return {run.key: run.dtype for run in layout(data).runs if run.dtype}


def test_state_dict():
    """Each parameter by its name, large ones as runs of their own, whatever the file is called."""
    state = model().state_dict()
    data = saved(state)
    check(data, state)
    assert layout(data).kind == "torch"
    large = [run for run in layout(data).runs if run.length >= LARGE]
    assert [(run.dtype, run.length) for run in large] == [("f32", 4 * 300 * 1024)]


def test_names_of_files(tmp_path):
    """Keys and lengths of runs stay when only the file's name changes."""
    runs = []
    for name in ("a.pt", "checkpoint-of-a-long-name-000100.pt"):
        torch.save(model().state_dict(), tmp_path / name)
        runs.append(
            {(run.key, run.length) for run in layout((tmp_path / name).read_bytes()).runs if run.length >= LARGE}
        )
    assert runs[0] == runs[1]


def test_full_checkpoint():
    """Model, optimizer and all that stands beside them."""
    net = model()
    optimizer = torch.optim.Adam(net.parameters())
    net[3](net[2](torch.randn(2, 1024))).sum().backward()
    optimizer.step()
    data = saved(
        {"model": net.state_dict(), "optimizer": optimizer.state_dict(), "epoch": 3, "rng": torch.get_rng_state()}
    )
    expected = {f"model/{name}": tensor for name, tensor in net.state_dict().items()}
    for number, state in optimizer.state_dict()["state"].items():
        expected |= {f"optimizer/state/{number}/{name}": tensor for name, tensor in state.items()}
    check(data, expected | {"rng": torch.get_rng_state()})


def test_dtypes():
    """Each dtype that a storage can have, also those which have no class of their own."""
    names = {
        "float64": "f64", "float32": "f32", "float16": "f16", "bfloat16": "bf16", "float8_e4m3fn": "f8",
        "float8_e5m2": "f8", "int8": "i8", "int16": "i16", "int32": "i32", "int64": "i64", "uint8": "u8",
        "uint16": "u16", "uint32": "u32", "uint64": "u64", "bool": "bool", "complex64": "c64", "complex128": "c128",
    }  # fmt: skip
    state = {name: torch.zeros(LARGE, dtype=getattr(torch, name)) for name in names}
    data = saved(state)
    assert list(dtypes(data).values()) == list(names.values())
    assert [tensor.dtype for tensor in tensors_of(io.BytesIO(data), len(data))] == list(names)


def test_shared_storages_and_views():
    """Two names of one storage are two tensors of one run; what does not lie in order is there as its storage."""
    weight = torch.randn(600, 400)
    data = saved({"a": weight, "b": weight, "row": weight[3], "turned": torch.randn(300, 500).T})
    found = {tensor.name: tensor for tensor in tensors_of(io.BytesIO(data), len(data))}
    assert set(found) == {"a", "b", "row", "data/1"}
    assert found["a"].offset == found["b"].offset
    assert found["row"][2:] == ((400,), found["a"].offset + 4 * 3 * 400, 1600)
    assert dtypes(data) == {"data/0": "f32", "data/1": "f32"}


def test_whole_model():
    """A pickled module: what calls its classes is not followed, its parameters are found."""
    data = saved(model())
    assert len(tensors_of(io.BytesIO(data), len(data))) == len(model().state_dict())
    assert "f32" in dtypes(data).values()


def test_legacy_format():
    """The format before 1.6 is no archive; its numbers are seen all the same."""
    net = torch.nn.Linear(1024, 1024)
    data = saved(net.bfloat16().state_dict(), _use_new_zipfile_serialization=False)
    assert (layout(data).kind, dtypes(data)) == ("raw", {"raw": "bf16"})


def test_torchscript(tmp_path):
    """What ``torch.jit.save`` writes has its storages in two folders."""

    class Scaled(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = torch.nn.Linear(512, 512)

        def forward(self, x):
            return self.inner(x)

    net = Scaled()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # newer versions would rather export
        torch.jit.save(torch.jit.trace(net, torch.zeros(1, 512)), tmp_path / "net.pt")
    data = (tmp_path / "net.pt").read_bytes()
    assert layout(data).kind == "torch"
    assert ("f32", 4 * 512 * 512) in [(run.dtype, run.length) for run in layout(data).runs]
    found = {tensor.name: tensor for tensor in tensors_of(io.BytesIO(data), len(data))}
    place = found["inner/weight"]
    assert data[place.offset : place.offset + place.length] == content(net.inner.weight)


def test_safetensors():
    """Each tensor by its name; a model's small ones are few runs."""
    safetensors = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")
    state = model().state_dict() | {
        "half": torch.randn(LARGE).bfloat16(),
        "eight": torch.zeros(99).to(torch.float8_e5m2),
    }
    data = safetensors.save(state, {"format": "pt"})
    check(data, state)
    assert layout(data).kind == "safetensors"
    assert len(layout(data).runs) < 9


def test_many_small_tensors():
    """Hundreds of layers of a few numbers are a handful of runs."""
    data = saved({f"layer.{number}": torch.randn(2000) for number in range(500)})
    assert len(layout(data).runs) <= 3
