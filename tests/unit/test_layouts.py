"""Layouts of files: whole ones exactly; of whatever else, runs that cover it, and nothing is executed."""

from __future__ import annotations

import io
import json
import os
import pickle
import string
import struct
import time
import tracemalloc
import zipfile

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memtrack.artifacts.layouts import Run, Tensor, layout_of, tensors_of
from memtrack.artifacts.layouts.joining import LARGE
from memtrack.artifacts.layouts.parts import ITEM_BYTES

MIB = 1 << 20
RANDOM = np.random.default_rng(0)
WEIGHTS = (RANDOM.standard_normal(MIB // 2) * 0.02).astype("<f4")
BFLOATS = (WEIGHTS.view("<u4") >> 16).astype("<u2")


class Careful(io.BytesIO):
    """A file that is only asked for what may be in it: a real one refuses to go to places far beyond its end."""

    def seek(self, offset, whence=0):
        if not 0 <= offset <= len(self.getbuffer()):
            raise OSError(f"asked to go to {offset}")
        return super().seek(offset, whence)

    def read(self, size=-1):
        if not 0 <= size <= 16 * MIB:
            raise OSError(f"asked for {size} bytes")
        return super().read(size)


def layout(data: bytes):
    """The layout, and that it is sound: runs cover the file in order, none is empty or ends within an item."""
    found = layout_of(Careful(data), len(data))
    end = 0
    for run in found.runs:
        assert run.offset == end
        assert run.length > 0
        assert run.length % ITEM_BYTES[run.dtype] == 0
        assert bool(run.key) == bool(run.dtype)
        end += run.length
    assert end == len(data)
    assert all(one.dtype or other.dtype for one, other in zip(found.runs, found.runs[1:], strict=False))
    for tensor in tensors_of(Careful(data), len(data)):
        assert 0 <= tensor.offset <= tensor.offset + tensor.length <= len(data)
    return found


def numbers_in(data: bytes):
    """The runs that are not plain bytes."""
    return [run for run in layout(data).runs if run.dtype]


def safetensors(*tensors: tuple[str, str, int], item_bytes: int = 4, **header) -> bytes:
    """A file of tensors, each given as name, dtype, and number of elements."""
    end = 0
    for name, dtype, count in tensors:
        length = count * (item_bytes if dtype not in SAFETENSORS else ITEM_BYTES[SAFETENSORS[dtype]])
        header[name] = {"dtype": dtype, "shape": [count], "data_offsets": [end, end + length]}
        end += length
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + bytes(end)


SAFETENSORS = {
    "F64": "f64", "F32": "f32", "F16": "f16", "BF16": "bf16", "F8_E4M3": "f8", "F8_E5M2": "f8", "F8_E8M0": "f8",
    "I64": "i64", "I32": "i32", "I16": "i16", "I8": "i8", "U64": "u64", "U32": "u32", "U16": "u16", "U8": "u8",
    "BOOL": "bool", "C64": "c64",
}  # fmt: skip


class Storage:
    """Stands for a torch storage where a pickle is written: ``kind`` is the name of its class in torch."""

    def __init__(self, kind: str, key: str, count: int) -> None:
        self.kind, self.key, self.count = kind, key, count


def instructions(value) -> bytes:
    """The pickle of a value as torch writes it, without STOP: dicts by name, storages as tensors of one side."""
    if isinstance(value, dict):
        return b"}(" + b"".join(instructions(part) for item in value.items() for part in item) + b"u"
    if isinstance(value, Storage):
        kind = f"ctorch\n{value.kind}\n".encode()
        identity = b"(" + instructions("storage") + kind + instructions(value.key) + instructions("cpu")
        whole = b"J" + struct.pack("<i", value.count)
        return (
            b"ctorch._utils\n_rebuild_tensor_v2\n((" + identity[1:] + whole + b"tQK\0" + whole + b"\x85K\1\x85\x89NtR"
        )
    return pickle.dumps(value, 2)[2:-1]


def torch_zip(top: str, state, storages: dict[str, bytes], *, pickled: bytes | None = None, **records: bytes) -> bytes:
    """An archive as torch writes it: numbers begin at multiples of 64."""
    file = io.BytesIO()
    records = {"byteorder": b"little", **records}
    parts = {"data.pkl": pickled if pickled is not None else b"\x80\2" + instructions(state) + b"."}
    parts |= records | {f"data/{key}": content for key, content in storages.items()}
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in parts.items():
            info = zipfile.ZipInfo(f"{top}/{name}")
            padding = -(file.tell() + 30 + len(info.filename) + 4) % 64
            info.extra = struct.pack("<HH", 0x4246, padding) + b"Z" * padding
            archive.writestr(info, content)
    return file.getvalue()


def large_zip(data: bytes, offset: int = 0) -> bytes:
    """The same archive with a directory as those of more than 4 GiB have it, which says where ``a/data/0`` begins."""
    at = data.rindex(b"PK\5\6")
    (begin,) = struct.unpack_from("<L", data, at + 16)
    directory = bytearray(data[begin:at])
    place = directory.index(b"a/data/0") - 46
    header = offset or struct.unpack_from("<L", directory, place + 42)[0]
    struct.pack_into("<L", directory, place + 42, 0xFFFFFFFF)
    name_length, extra_length = struct.unpack_from("<HH", directory, place + 28)
    extra = struct.pack("<HHQ", 1, 8, header)
    struct.pack_into("<H", directory, place + 30, len(extra))
    directory[place + 46 + name_length : place + 46 + name_length + extra_length] = extra
    end = struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 45, 45, 0, 0, 9, 9, len(directory), begin)
    locator = struct.pack("<4sLQL", b"PK\6\7", 0, begin + len(directory), 1)
    last = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0)
    return data[:begin] + directory + end + locator + last


def npz(**arrays) -> bytes:
    """What ``np.savez`` writes."""
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


def npy(array) -> bytes:
    """What ``np.save`` writes."""
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


# -- safetensors ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("spelled", "dtype"), SAFETENSORS.items())
def test_safetensors_dtypes(spelled, dtype):
    """Each dtype of the format is known, and large tensors are runs of their own."""
    data = safetensors(("a", spelled, LARGE), ("b", spelled, LARGE))
    length = LARGE * ITEM_BYTES[dtype]
    begin = len(data) - 2 * length
    assert layout(data) == (
        "safetensors", [Run(0, begin, "", ""), Run(begin, length, dtype, "a"), Run(begin + length, length, dtype, "b")]
    )  # fmt: skip
    assert tensors_of(io.BytesIO(data), len(data)) == [
        Tensor("a", spelled, (LARGE,), begin, length), Tensor("b", spelled, (LARGE,), begin + length, length),
    ]  # fmt: skip


def test_safetensors_unknown_dtype():
    """A dtype that is not known is bytes; what lies beside it is not."""
    data = safetensors(("a", "F32", LARGE), ("b", "F4", LARGE), ("c", "F32", LARGE), __metadata__={"format": "pt"})
    assert [run.key for run in numbers_in(data)] == ["a", "c"]
    assert [tensor.name for tensor in tensors_of(io.BytesIO(data), len(data))] == ["a", "b", "c"]


@pytest.mark.parametrize(
    "change",
    [
        {"data_offsets": [0, 1]}, {"data_offsets": [2 * LARGE, 6 * LARGE]}, {"data_offsets": [-4 * LARGE, 0]},
        {"data_offsets": [0.0, 4.0 * LARGE]}, {"data_offsets": [4 * LARGE, 0]}, {"shape": [-1, -LARGE]},
        {"data_offsets": [2**70, 2**70 + 4 * LARGE]}, {"shape": [LARGE, 10**4000]}, {"shape": None}, {"dtype": []},
    ],
)  # fmt: skip
def test_safetensors_with_a_wrong_tensor(change):
    """One tensor that overlaps another, lies outside, or is none: then nothing of the header is believed."""
    data = safetensors(("a", "F32", LARGE), ("b", "F32", LARGE))
    header = json.loads(data[8 : data.rindex(b"}") + 1])
    header["b"] |= change
    text = json.dumps(header).encode()
    data = struct.pack("<Q", len(text)) + text + bytes(8 * LARGE)
    assert layout(data).kind == "bytes"
    assert tensors_of(io.BytesIO(data), len(data)) == []


# -- small tensors --------------------------------------------------------------------------------------------------


def test_small_tensors_share_a_run():
    """A thousand small tensors are one run under the name of the first, one of another dtype among them or not."""
    many = [(f"layer.{number}", "F32", 100) for number in range(1000)]
    many[500] = ("steps", "I64", 1)
    (run,) = numbers_in(safetensors(*many))
    assert (run.dtype, run.key, run.length) == ("f32", "layer.0", 4 * 100 * 999 + 8)


def test_stretches_of_two_dtypes_are_two_runs():
    """What is worth a run of its own has one, however small each tensor is."""
    halves = [(f"a{number}", "F32", 500) for number in range(20)] + [
        (f"b{number}", "BF16", 500) for number in range(20)
    ]
    assert [(run.dtype, run.key) for run in numbers_in(safetensors(*halves))] == [("f32", "a0"), ("bf16", "b0")]


def test_no_tensor_is_split_by_a_shifted_one():
    """Floats that do not lie at a multiple of their length from the others are not in their run."""
    shifted = safetensors(("a", "F32", 9000), ("flag", "BOOL", 1), ("b", "F32", 9000))
    assert [(run.key, run.length) for run in numbers_in(shifted)] == [("a", 36000), ("b", 36000)]


# -- torch ----------------------------------------------------------------------------------------------------------


def test_torch_runs_have_the_same_key_whatever_the_file_is_called():
    """The top folder's name moves all storages, but they keep key and length."""
    state = {"w": Storage("FloatStorage", "0", LARGE), "b": Storage("BFloat16Storage", "17", LARGE)}
    layouts = [
        layout(torch_zip(top, state, {"0": bytes(4 * LARGE), "17": bytes(2 * LARGE)}))
        for top in ("a", "checkpoint_" * 9)
    ]
    assert [found.kind for found in layouts] == ["torch", "torch"]
    one, other = ([run[1:] for run in found.runs if run.dtype] for found in layouts)
    assert one == other == [(4 * LARGE, "f32", "data/0"), (2 * LARGE, "bf16", "data/17")]


def test_torch_of_many_gigabytes():
    """Offsets of 64 bits are read; those that lead out of the file are not followed."""
    data = torch_zip("a", {"w": Storage("FloatStorage", "0", LARGE)}, {"0": bytes(4 * LARGE)})
    assert numbers_in(large_zip(data)) == numbers_in(data)
    assert zipfile.ZipFile(io.BytesIO(large_zip(data))).read("a/data/0") == bytes(4 * LARGE)
    for offset in (2**32, 2**62, 2**64 - 1, 1, len(data)):
        assert layout(large_zip(data, offset)).kind == "bytes"


def test_torch_tensors_by_path():
    """Tensors in dicts have the path of their keys; storages that none names are flat."""
    state = {"model": {"fc.weight": Storage("FloatStorage", "0", 6)}, "step": 3}
    hidden = b"(" + instructions(Storage("LongStorage", "1", 2)) + b"l0"
    data = torch_zip(
        "a", None, {"0": bytes(range(24)), "1": bytes(16)}, pickled=b"\x80\2" + hidden + instructions(state) + b"."
    )
    found = tensors_of(io.BytesIO(data), len(data))
    assert [tensor[:3] for tensor in found] == [("model/fc.weight", "float32", (6,)), ("data/1", "int64", (2,))]
    assert data[found[0].offset :][: found[0].length] == bytes(range(24))


def test_torch_compressed_records_are_bytes():
    """A record that is deflated holds no numbers that could be split."""
    file = io.BytesIO(torch_zip("a", {"w": Storage("FloatStorage", "0", 4)}, {}))
    with zipfile.ZipFile(file, "a") as archive:
        archive.writestr("a/data/0", bytes(4 * LARGE), compress_type=zipfile.ZIP_DEFLATED)
    assert numbers_in(file.getvalue()) == []


def test_torch_big_endian_is_not_believed():
    """Storages of another byte order are not what their class says."""
    data = torch_zip("a", {"w": Storage("FloatStorage", "0", LARGE)}, {"0": bytes(4 * LARGE)}, byteorder=b"big")
    assert layout(data).kind == "bytes"


class Evil:
    """Its pickle makes a folder."""

    def __init__(self, path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("protocol", range(6))
def test_pickles_are_never_executed(tmp_path, protocol):
    """What a pickle would call is not called, whatever the protocol it was written with."""
    pickled = pickle.dumps(
        {"w": Evil(tmp_path / "made"), "v": [(), {1}, 2.0, None, b"x" * (3000 if protocol else 30)]}, protocol
    )
    data = torch_zip("a", None, {"0": bytes(LARGE)}, pickled=pickled)
    assert layout(data).kind == "torch"
    assert tensors_of(io.BytesIO(data), len(data)) == []
    assert not (tmp_path / "made").exists()
    pickle.loads(pickled)
    assert (tmp_path / "made").exists()


# -- NumPy ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "array",
    [np.zeros((3, LARGE), "<f4"), np.asfortranarray(np.zeros((LARGE, 2), "<u2")), np.zeros(LARGE, "<c8"), np.zeros(5)],
)
def test_npy(array):
    """One array, which has no name."""
    data = npy(array)
    begin = len(data) - array.nbytes
    (tensor,) = tensors_of(io.BytesIO(data), len(data))
    assert tensor == ("", array.dtype.str, array.shape, begin, array.nbytes)
    assert layout(data).kind == "npy"
    if array.nbytes >= LARGE:
        dtype = f"{array.dtype.kind}{8 * array.itemsize}"
        assert numbers_in(data) == [Run(begin, array.nbytes, dtype, dtype)]


@pytest.mark.parametrize("dtype", [">f4", "S7", "U3", "O", "<M8[s]", [("a", "<f4"), ("b", "<i8")]])
def test_npy_of_other_things_is_bytes(dtype):
    """Objects, texts, records, times and big-endian numbers."""
    assert layout(npy(np.zeros(100, dtype))).kind == "bytes"


def test_npz():
    """Members that are stored are known by their names, whatever lies between."""
    data = npz(data=np.ones(LARGE, "<f4"), indices=np.ones(LARGE, "<i4"), format=np.array("csr"))
    assert [(run.key, run.dtype) for run in numbers_in(data)] == [("data.npy", "f32"), ("indices.npy", "i32")]
    file = io.BytesIO()
    np.savez_compressed(file, data=np.ones(LARGE))
    assert numbers_in(file.getvalue()) == []


# -- probing --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "data"),
    [
        ("f32", WEIGHTS), ("f32", WEIGHTS * WEIGHTS * np.float32(1e-6)), ("bf16", BFLOATS),
        ("f16", WEIGHTS.astype("<f2")),
        ("f64", RANDOM.standard_normal(MIB // 4)), ("i32", RANDOM.integers(0, 10**6, MIB // 2).astype("<i4")),
    ],
)  # fmt: skip
@pytest.mark.parametrize("before", range(3))
def test_numbers_without_a_format(dtype, data, before):
    """Floats and integers are told from each other, and where a float begins is seen."""
    data = b"\n" * before + data.tobytes() + b"end"
    found = layout(data)
    (run,) = (run for run in found.runs if run.dtype)
    assert (found.kind, run.dtype, run.key) == ("raw", dtype, "raw")
    if dtype[0] != "i":
        assert run.offset % ITEM_BYTES[dtype] == before % ITEM_BYTES[dtype]


def texts():
    """What must be cut where its content says: texts, data sets and what is compressed."""
    words = ["".join(RANDOM.choice(list(string.ascii_lowercase), 5)) for _ in range(999)]
    picked = [words[index % 999] for index in RANDOM.zipf(1.4, MIB)]
    rows = RANDOM.standard_normal((40000, 4))
    yield "words", " ".join(picked).encode()
    yield "utf-16", " ".join(picked).encode("utf-16")
    yield "cyrillic", "".join(chr(0x430 + number % 32) for number in RANDOM.zipf(1.2, MIB)).encode()
    yield "chinese", "".join(chr(0x4E00 + int(number % 3000)) for number in RANDOM.zipf(1.2, MIB)).encode()
    yield "csv", "\n".join(",".join(f"{value:.6f}" for value in row) for row in rows).encode()
    yield "fixed", b"".join(b"%07d,%07d\n" % (row, row * 7919 % 10**7) for row in range(90000))
    yield (
        "jsonl",
        b"\n".join(json.dumps({"id": row, "w": picked[row], "x": rows[row, 0]}).encode() for row in range(30000)),
    )
    yield "hex", RANDOM.bytes(MIB).hex().encode()
    yield "random", RANDOM.bytes(2 * MIB)
    yield "zeros", bytes(2 * MIB)
    yield "pickle", pickle.dumps([{"id": row, "x": rows[row, 0], "w": picked[row]} for row in range(40000)])


@pytest.mark.parametrize(("name", "data"), [pytest.param(*text, id=text[0]) for text in texts()])
def test_texts_are_bytes(name, data):
    """Splitting these would cost what cutting them by content saves."""
    assert len(data) > MIB
    assert layout(data).kind == "bytes"


def test_parquet_is_bytes():
    """Columns of floats that are not compressed are bytes, too: the file changes as tables do."""
    pandas = pytest.importorskip("pandas")
    pytest.importorskip("pyarrow")
    file = io.BytesIO()
    pandas.DataFrame(RANDOM.standard_normal((90000, 4)), columns=list("abcd")).to_parquet(file, compression=None)
    assert len(file.getvalue()) > MIB
    assert layout(file.getvalue()).kind == "bytes"


def test_probing_takes_no_time():
    """Some samples are looked at, however large the file is."""
    data = WEIGHTS.tobytes()
    times_s = []
    for _ in range(9):
        begin_s = time.process_time()
        layout_of(io.BytesIO(data), len(data))
        times_s.append(time.process_time() - begin_s)
    assert sorted(times_s)[4] < 0.05  # 7 ms on an idle machine


# -- hostile files --------------------------------------------------------------------------------------------------

SEEDS = [
    safetensors(
        ("a", "F32", LARGE // 4), ("b", "BF16", 30), ("c", "I64", 3), ("d", "F32", 5000), __metadata__={"k": "{"}
    ),
    torch_zip(
        "a",
        {"w": Storage("FloatStorage", "0", LARGE // 4), "o": {0: Storage("HalfStorage", "1", 5000)}},
        {"0": bytes(LARGE), "1": bytes(10000), "2": bytes(77)},
    ),
    large_zip(torch_zip("a", {"w": Storage("FloatStorage", "0", 300)}, {"0": bytes(1200)})),
    npy(np.zeros((300, 11), "<f8")),
    npz(a=np.zeros(9000, "<f2"), b=np.zeros((0, 3)), c=np.zeros(LARGE, "<i1")),
]


@st.composite
def broken(draw) -> bytes:
    """A valid file of which some bytes are changed, most of them where its structure stands, and which may be cut."""
    data = bytearray(draw(st.sampled_from(SEEDS)))
    near = st.integers(0, 1200) | st.integers(-1200, -1).map(lambda place: place + len(data))
    for place in draw(st.lists(near | st.integers(0, len(data) - 1), max_size=6)):
        if place < len(data):
            data[place] ^= draw(st.sampled_from([1, 2, 0x80, 0xFF]) | st.integers(1, 255))
    if draw(st.booleans()):
        del data[draw(st.integers(0, len(data))) :]
    if draw(st.booleans()):
        place = draw(st.integers(0, min(len(data), 1200)))
        data[place:place] = draw(st.binary(max_size=40))
    return bytes(data)


@settings(max_examples=400, deadline=None)
@given(broken())
def test_broken_files_are_covered(data):
    """Bits that flipped, files that were cut or got something in between."""
    layout(data)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=300), st.sampled_from([b"", b"PK\3\4", b"\x93NUMPY\1\0", struct.pack("<Q", 200) + b"{"]))
def test_any_bytes_are_covered(data, magic):
    """Whatever stands behind the first bytes of a format."""
    layout(magic + data)


@settings(max_examples=200, deadline=None)
@given(
    st.binary(max_size=200) | st.lists(st.sampled_from(b"(}]).N\x85\x86\x87tuRbQ2h\0q\0sK\1"), max_size=99).map(bytes)
)
def test_any_pickle_is_covered(pickled):
    """Instructions in any order."""
    layout(torch_zip("a", None, {"0": bytes(40)}, pickled=pickled))


@pytest.mark.parametrize("seed", range(len(SEEDS)))
def test_cut_anywhere(seed):
    """A file that ends too soon, wherever."""
    data = SEEDS[seed]
    for end in [*range(min(1500, len(data))), *range(len(data) - 700, len(data) + 1, 7)]:
        layout(data[:end])


def bombs():
    """Small files that ask for much."""

    def header(text: bytes) -> bytes:
        return struct.pack("<Q", len(text)) + text

    yield "length", struct.pack("<Q", 2**63) + b"{}"
    yield "lists", header(b'{"a":[' + b"[]," * 5_000_000 + b"[]]}")
    yield "deep", header(b'{"a":' + b"[" * 1_000_000 + b"}")
    yield "digits", header(b'{"a":' + b"9" * 9_000_000 + b"}")
    yield (
        "tensors",
        header(
            b"{"
            + b",".join(b'"t%d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}' % number for number in range(200_000))
            + b"}"
        ),
    )
    local = struct.pack("<4s22xHH", b"PK\3\4", 0, 0)
    entry = struct.pack("<4s4xHH8xLLHHH8xL", b"PK\1\2", 0, 0, 0, 0, 1, 0, 0, 0) + b"a"
    yield "members", local + entry * 200_000 + struct.pack("<4s4xHHLLH", b"PK\5\6", 0, 0, len(entry) * 200_000, 30, 0)
    pickles = {
        "marks": b"(" * 10**5,
        "nested": b")" + b"\x85" * 30_000 + b".",
        "itself": b"}q\0" + b"".join(b"X\3\0\0\0%03dh\0s" % number for number in range(900)) + b".",
        "uses": b"".join(b"j" + struct.pack("<L", number) + b"0" for number in range(10**5)) + b".",
        "dicts": (b"}" * 60_000 + b"(") * 4 + b".",
        "globals": b"\x80\4X\xf4\1\0\0" + b"x" * 500 + b"\x94" + b"h\0h\0\x93" * 60_000 + b".",
        "text": b"\x8d" + struct.pack("<Q", 2**62) + b"x",
    }
    for name, pickled in pickles.items():
        yield name, torch_zip("a", None, {}, pickled=pickled)


@pytest.mark.parametrize("data", [pytest.param(data, id=name) for name, data in bombs()])
def test_bombs(data):
    """No more memory than a large honest file takes."""
    tracemalloc.start()
    try:
        layout(data)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak_bytes < 64 * MIB


def test_endless_pickle():
    """Of a pickle with millions of instructions the first are read."""
    data = torch_zip("a", None, {}, pickled=b"N0" * (8 * MIB))
    begin_s = time.process_time()
    assert layout(data).kind == "bytes"
    assert time.process_time() - begin_s < 15  # 2 s on an idle machine


def test_errors_of_the_file_are_raised():
    """That a file cannot be read is not the same as that it holds bytes."""

    class Failing(io.BytesIO):
        def read(self, size=-1):
            raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        layout_of(Failing(), 100)
