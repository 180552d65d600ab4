"""The allocators' figures: from statistics as the frameworks give them, and what is remembered between readings."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace

import pytest

from memtrack import metrics
from memtrack.allocators import Allocators, figures, jax_, tensorflow_, torch_

MIB = 1 << 20

# memory_stats() of a GPU in a JAX program that has reserved all it may
JAX_GPU = {
    "num_allocs": 222, "bytes_in_use": 3897557504, "peak_bytes_in_use": 32087482368, "largest_alloc_size": 25232940032,
    "bytes_limit": 35714334720, "bytes_reserved": 0, "peak_bytes_reserved": 0, "largest_free_block_bytes": 0,
    "pool_bytes": 35714334720, "peak_pool_bytes": 35714334720,
}  # fmt: skip

# and of a TPU, which has no pool
JAX_TPU = {
    "bytes_in_use": 76288, "bytes_limit": 33014415360, "bytes_reservable_limit": 33014415360, "bytes_reserved": 0,
    "largest_alloc_size": 40960, "largest_free_block_bytes": 33014338560, "num_allocs": 3, "peak_bytes_in_use": 76800,
    "peak_bytes_reserved": 0,
}  # fmt: skip


def pools(current, peak):
    """A statistic of torch, in bytes; all of it in the large pool."""
    stat = {"current": current, "peak": peak, "allocated": peak, "freed": peak - current}
    return {"all": stat, "small_pool": dict.fromkeys(stat, 0), "large_pool": stat}


def torch_stats(allocated=600, peak=900, reserved=1000, split=250, retries=3, ooms=1, segments=10):
    """What ``torch.cuda.memory_stats_as_nested_dict`` gives; sizes in MiB."""
    return {
        "allocation": pools(7, 9),
        "segment": pools(segments, segments),
        "active": pools(7, 9),
        "inactive_split": pools(4, 5),
        "allocated_bytes": pools(allocated * MIB, peak * MIB),
        "reserved_bytes": pools(reserved * MIB, reserved * MIB),
        "active_bytes": pools(allocated * MIB, peak * MIB),
        "inactive_split_bytes": pools(split * MIB, split * MIB),
        "requested_bytes": pools(allocated * MIB - 999, peak * MIB),
        "oversize_allocations": pools(0, 0)["all"],
        "oversize_segments": pools(0, 0)["all"],
        "max_split_size": -1,
        "num_alloc_retries": retries,
        "num_ooms": ooms,
        "num_sync_all_streams": 1,
        "num_device_alloc": 12,
        "num_device_free": 2,
    }


def test_torch():
    """The three that are charted, and what is there on request, with its formulas."""
    assert figures.of_torch(torch_stats()) == {
        "allocated_mib": 600.0,
        "allocated_peak_mib": 900.0,
        "reserved_mib": 1000.0,
        "slack_pct": 40.0,
        "inactive_split_mib": 250.0,
        "unusable_pct": 25.0,
        "alloc_retries": 3.0,
        "ooms": 1.0,
    }


def test_torch_that_does_not_report():
    """Zeros are no figures: of all, with another library's allocator; of the rest, with the driver's own pool."""
    assert figures.of_torch({}) == {}
    assert figures.of_torch(torch_stats(0, 0, 0, 0, 0, 0, 0)) == {}
    pool = torch_stats(split=0, retries=0, ooms=0, segments=0)
    assert figures.of_torch(pool) == {
        "allocated_mib": 600.0, "allocated_peak_mib": 900.0, "reserved_mib": 1000.0, "slack_pct": 40.0
    }  # fmt: skip


def test_jax():
    """As recorded of a GPU and of a TPU; -1, 0 and None stand for what a backend does not know."""
    assert figures.of_jax(JAX_GPU) == {
        "allocated_mib": 3717.00048828125,
        "allocated_peak_mib": 30601.0078125,
        "reserved_mib": 34059.84375,
        "limit_mib": 34059.84375,
        "slack_pct": pytest.approx(100 * (34059.84375 - 3717.00048828125) / 34059.84375),
    }
    assert figures.of_jax(JAX_TPU) == {
        "allocated_mib": 76288 / MIB,
        "allocated_peak_mib": 76800 / MIB,
        "limit_mib": 33014415360 / MIB,
        "largest_free_mib": 33014338560 / MIB,
    }
    assert figures.of_jax(None) == figures.of_jax({}) == figures.of_jax(dict.fromkeys(JAX_TPU, -1)) == {}
    assert figures.of_jax({**JAX_TPU, "bytes_limit": -1, "largest_free_block_bytes": -1}).keys() == {
        "allocated_mib", "allocated_peak_mib"
    }  # fmt: skip


def test_tensorflow():
    """Zeros, as a CPU has them, are no figures."""
    assert figures.of_tensorflow({"current": 512 * MIB, "peak": 768 * MIB}) == {
        "allocated_mib": 512.0, "allocated_peak_mib": 768.0
    }  # fmt: skip
    assert figures.of_tensorflow({"current": 0, "peak": 0}) == {}


def test_beyond_the_framework():
    """What a process has on a device besides the allocator; two readings of different moments give no negative one."""
    assert figures.non_framework_mib(1500.0, 1000.0) == 500.0
    assert figures.non_framework_mib(1000.0, 1004.0) == 0.0
    assert figures.cache_slack_pct(0.0, 0.0) == figures.unusable_pct(0.0, 0.0) == 0.0


# -- who is asked -----------------------------------------------------------------------------------------------------


class FakeTorch:
    """``torch.cuda`` of a machine with two devices, of which the process uses the second; it notes what is called."""

    def __init__(self, monkeypatch, *, contexts=(False, True), **modules):
        self.calls = []
        self.initialised = True
        self.stats = torch_stats()
        self.torch = ModuleType("torch")
        self.torch.version = SimpleNamespace(hip=None)
        self.torch._C = SimpleNamespace(_cuda_hasPrimaryContext=lambda device: contexts[device])
        self.cuda = ModuleType("torch.cuda")
        self.cuda.is_initialized = lambda: self.initialised
        self.cuda.device_count = lambda: self.note("device_count", len(contexts))
        self.cuda.current_device = lambda: self.note("current_device", 0)
        self.cuda.memory_stats_as_nested_dict = lambda device: self.note(device, self.stats)
        for name in [name for name in sys.modules if name.partition(".")[0] in ("torch", "jax", "tensorflow")]:
            monkeypatch.delitem(sys.modules, name)
        for name, module in {"torch": self.torch, "torch.cuda": self.cuda, **modules}.items():
            monkeypatch.setitem(sys.modules, name, module)

    def note(self, call, value):
        self.calls.append(call)
        return value


@pytest.fixture
def fake(monkeypatch):
    return FakeTorch(monkeypatch)


def test_only_devices_in_use_are_asked(fake):
    """Of two devices the one on which the process has a context; with its number."""
    assert {name for name, _ in torch_.read()} == {"torch_cuda1"}
    assert fake.calls == ["device_count", 1]


def test_nothing_is_asked_before_the_program_has_initialised_it(fake):
    """Nor counted: device_count may initialise the driver."""
    fake.initialised = False
    assert list(torch_.read()) == []
    assert fake.calls == []


def test_without_the_private_name_the_current_device_is_asked(fake):
    """Other versions of torch, and ROCm, where the answer is another."""
    fake.torch.version.hip = "6.2"
    assert [name for name, _ in torch_.read()] == ["torch_cuda0"]
    fake.torch.version.hip = None
    del fake.torch._C._cuda_hasPrimaryContext
    assert [name for name, _ in torch_.read()] == ["torch_cuda0"]


def test_torch_that_is_being_imported(fake):
    """By another thread: its modules are there without their contents."""
    del fake.cuda.is_initialized
    assert list(torch_.read()) == []


def test_xpu(monkeypatch):
    """Intel's devices have a module like CUDA's."""
    fake = FakeTorch(monkeypatch)
    monkeypatch.setitem(sys.modules, "torch.xpu", fake.cuda)
    monkeypatch.delitem(sys.modules, "torch.cuda")
    assert [name for name, _ in torch_.read()] == ["torch_xpu0"]


def test_other_accelerators(monkeypatch):
    """What torch.accelerator knows and has no module here; only once its allocator is initialised."""
    accelerator = ModuleType("torch.accelerator")
    accelerator.current_accelerator = lambda: SimpleNamespace(type="npu")
    accelerator.current_device_index = lambda: 2
    fake = FakeTorch(monkeypatch, **{"torch.accelerator": accelerator})
    fake.initialised = False
    assert list(torch_.read()) == []  # an older torch has no statistics there
    fake.torch._C._accelerator_isAllocatorInitialized = lambda: False
    fake.torch._C._accelerator_getDeviceStats = lambda device: fake.note(device, fake.stats)
    assert list(torch_.read()) == []
    fake.torch._C._accelerator_isAllocatorInitialized = lambda: True
    assert dict(torch_.read()) == {"torch_npu2": figures.of_torch(fake.stats)}
    assert fake.calls == [2]
    accelerator.current_accelerator = lambda: SimpleNamespace(type="cuda")  # which has been asked already
    assert list(torch_.read()) == []


class Backend:
    """A client of XLA with as many devices as there are statistics."""

    def __init__(self, platform, *stats):
        self.platform = platform
        self.asked = 0
        self._stats = stats

    def local_devices(self):
        return [SimpleNamespace(memory_stats=lambda stats=stats: self._ask(stats)) for stats in self._stats]

    def _ask(self, stats):
        self.asked += 1
        if isinstance(stats, Exception):
            raise stats
        return stats


def test_jax_backends(monkeypatch):
    """Those that exist are asked; one that has no figures, or cannot, once."""
    bridge = ModuleType("jax._src.xla_bridge")
    monkeypatch.setitem(sys.modules, "jax._src.xla_bridge", bridge)
    read = jax_.Reader().read
    assert list(read()) == []  # another version, without that name
    bridge._backends = {}
    assert list(read()) == []
    cpu, odd = Backend("cpu", *[None] * 512), Backend("odd", RuntimeError("UNIMPLEMENTED"), JAX_TPU)
    bridge._backends = {"cpu": cpu, "odd": odd, "gpu": Backend("gpu", JAX_GPU, dict.fromkeys(JAX_GPU, 0), JAX_GPU)}
    for _ in range(3):
        assert [name for name, _ in read()] == ["jax_0", "jax_2"]
    assert (cpu.asked, odd.asked) == (1, 1)


def test_tensorflow_context(monkeypatch):
    """Devices of a context that is initialised; host memory is not asked for."""
    asked = []

    def info(device):
        asked.append(device)
        return {"current": 5 * MIB, "peak": 9 * MIB}

    devices = [
        SimpleNamespace(name=f"/device:{kind}:{number}", device_type=kind)
        for kind, number in (("CPU", 0), ("GPU", 0), ("GPU", 1))
    ]
    context = SimpleNamespace(_initialized=False, _logical_devices=None)
    framework = SimpleNamespace(config=SimpleNamespace(experimental=SimpleNamespace(get_memory_info=info)))
    monkeypatch.setitem(sys.modules, "tensorflow", framework)
    monkeypatch.setitem(sys.modules, "tensorflow.python.eager.context", SimpleNamespace(_context=None))
    assert list(tensorflow_.read()) == []
    sys.modules["tensorflow.python.eager.context"]._context = context
    assert list(tensorflow_.read()) == []
    context._initialized, context._logical_devices = True, devices
    assert list(tensorflow_.read()) == [
        (name, {"allocated_mib": 5.0, "allocated_peak_mib": 9.0}) for name in ("tf_0", "tf_1")
    ]
    assert asked == ["GPU:0", "GPU:1"]


# -- what is remembered -----------------------------------------------------------------------------------------------


class Marks:
    """Notes what is left in a recording."""

    def __init__(self):
        self.gauges, self.events = {}, []

    def gauge(self, name, value):
        self.gauges[name] = value

    def mark(self, name, value):
        self.events.append((name, value))


def test_names_and_gauges(fake):
    """Charted by default are three; all are gauges, which are known to the table by their names, with their units."""
    allocators, marks = Allocators(), Marks()
    charted = allocators.publish(marks)
    assert charted == {
        "memory/torch_cuda1/allocated_mib": 600.0,
        "memory/torch_cuda1/allocated_peak_mib": 900.0,
        "memory/torch_cuda1/reserved_mib": 1000.0,
    }
    assert len(marks.gauges) == 8
    for name, value in marks.gauges.items():
        assert metrics.find(name) is not None, name
        assert metrics.selected(name, "default") == (name in charted)
        assert {**charted, **allocators.details}[name] == value
    assert metrics.unit_of("memory/torch_xpu11/unusable_pct") == "%"
    for other in ("memory/jax_0/limit_mib", "memory/tf_3/allocated_mib", "memory/torch_npu0/ooms"):
        assert metrics.find(other) is not None
    for own in ("memory/torch_cache/allocated_mib", "memory/tf_data1/used_mib", "memory/jax/limit_mib"):
        assert metrics.find(own) is None


def test_all_that_is_told_has_a_name_in_the_table():
    """Of each framework, with everything that it may tell: a gauge that is not in the table would be a chart."""
    for scope, found in (("torch_cuda0", figures.of_torch(torch_stats())), ("jax_0", figures.of_jax(JAX_TPU))):
        for quantity in (*found, *figures.of_jax(JAX_GPU), figures.PEAK_RESETS):
            known = metrics.find(f"memory/{scope}/{quantity}")
            assert known is not None
            assert known.default == (quantity in figures.CHARTED)


def test_gauges_are_set_once_a_second(fake, monkeypatch):
    """Rows may come a thousand times a second; each of them has the figures."""
    now_ns = 5_000_000_000
    monkeypatch.setattr("memtrack.allocators.monotonic_ns", lambda: now_ns)
    allocators, marks = Allocators(), Marks()
    name = "memory/torch_cuda1/allocated_mib"
    assert allocators.publish(marks)[name] == 600.0
    fake.stats = torch_stats(allocated=700)
    now_ns += 900_000_000
    assert allocators.publish(marks)[name] == 700.0
    assert marks.gauges[name] == 600.0
    now_ns += 100_000_000
    allocators.publish(marks)
    assert marks.gauges[name] == 700.0


def test_foreign_reset_of_the_peak(fake):
    """It is told once, with the height that was; from then on what is told carries the sign."""
    allocators, marks = Allocators(), Marks()
    sign = "memory/torch_cuda1/peak_resets"
    fake.stats = torch_stats(ooms=0)
    assert sign not in allocators.publish(marks)
    fake.stats = torch_stats(peak=650, ooms=0)
    for _ in range(2):
        assert allocators.publish(marks)[sign] == 1.0
    assert marks.events == [("peak of torch_cuda1 was reset, MiB before", 900.0)]
    assert marks.gauges[sign] == 1.0
    fake.stats = torch_stats(peak=800, ooms=0)
    assert allocators.publish(marks)[sign] == 1.0
    fake.stats = torch_stats(peak=700, ooms=0)
    assert allocators.publish(marks)[sign] == 2.0
    assert marks.events[1:] == [("peak of torch_cuda1 was reset, MiB before", 800.0)]


def test_out_of_memory(fake):
    """Each rise of the count is an event with figures, which come as gauges at the same moment; no text without end."""
    fake.stats = torch_stats(ooms=0)
    allocators, marks = Allocators(), Marks()
    allocators.publish(marks)
    assert marks.events == []
    fake.stats = torch_stats(allocated=990, reserved=1010, ooms=1)
    for _ in range(3):
        allocators.publish(marks)
    assert marks.events == [("out of memory on cuda1: 990 MiB allocated, 1010 reserved", 1.0)]
    assert marks.gauges["memory/torch_cuda1/allocated_mib"] == 990.0
    for count in range(2, 100):
        fake.stats = torch_stats(allocated=900 + count, ooms=count)
        allocators.publish(marks)
    assert [value for _, value in marks.events] == list(range(1, 100))
    assert len({name for name, _ in marks.events}) == 9
    assert all(len(name) <= 63 for name, _ in marks.events)


def test_many_devices(monkeypatch):
    """There is room for 60 gauges: of eight devices all three are there, the rest of two."""
    FakeTorch(monkeypatch, contexts=(True,) * 12)
    allocators, marks = Allocators(), Marks()
    for _ in range(2):
        assert len(allocators.publish(marks)) == 24
    assert len(marks.gauges) == 24 + 2 * 5


def test_what_fails_is_not_asked_again(fake, notices):
    """One warning; other frameworks go on."""
    fake.cuda.device_count = lambda: 1 / 0
    bridge = ModuleType("jax._src.xla_bridge")
    bridge._backends = {"gpu": Backend("gpu", JAX_GPU)}
    sys.modules["jax"], sys.modules["jax._src.xla_bridge"] = ModuleType("jax"), bridge
    try:
        allocators = Allocators()
        for _ in range(2):
            assert allocators.read()["memory/jax_0/allocated_mib"] == 3717.00048828125
    finally:
        del sys.modules["jax"], sys.modules["jax._src.xla_bridge"]
    assert [text.partition(".")[0] for text in notices] == [
        "memtrack has no figures of torch's allocator (ZeroDivisionError: division by zero)"
    ]
