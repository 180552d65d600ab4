"""The judge: which evidence makes which verdict."""

from __future__ import annotations

import signal

import pytest

from memtrack.agent.evidence import Case, growth
from memtrack.agent.kernel_log import Kill
from memtrack.agent.verdict import judge, signal_name
from memtrack.agent.witness import OtherKill
from memtrack.recording.records import CONFIDENCES, KINDS, Stack
from memtrack.sampling.window import Place

NOW_NS = 100 * 10**9
SOURCE = "cgroup v2 /job memory.max"


def exited(code):
    return code << 8


def samples(headroom_pct=40.0, usage_mib=180.0):
    """Half a second of growth by 200 MiB/s, the last sample 20 ms before the end."""
    return [
        (NOW_NS - (20 + 100 * back) * 10**6, 290.0 - 20.0 * back, usage_mib, headroom_pct) for back in range(5, -1, -1)
    ]


def case(**known):
    """A process that was killed by SIGKILL with plenty of room, in phase train, in a cgroup whose count stood still."""
    made = Case()
    made.now_ns, made.samples, made.status = NOW_NS, samples(known.pop("headroom_pct", 40.0)), signal.SIGKILL.value
    made.phase, made.epoch, made.step = "train", 2, 41
    made.limit_mib, made.limit_source = 300.0, SOURCE
    made.counter, made.counted = "/cg/memory.events.local", (0, 0)
    for name, value in known.items():
        assert hasattr(made, name), name
        setattr(made, name, value)
    return made


def own_kill():
    kill = Kill(4242, "python", 280.5, 291.0)
    kill.cgroup, kill.limited = "/job", "/job"
    return kill


def worker(seconds=2.0, pid=77, *, is_member=True):
    return OtherKill(
        NOW_NS - int(seconds * 1e9), pid, "pt_data_worker" if pid else "", 55.0, is_member=is_member, certain=True
    )


def raised(name, module="builtins"):
    return {"how": "exception", "type": name, "module": module, "where": "train.py:12 step"}


LOW = {"headroom_pct": 0.8}
NO_COUNTER = {"counted": None, "counter": ""}

CASES = {
    "exit 0": ({"status": 0}, "clean", "certain"),
    "exit 0 after an exception in a notebook": ({"status": 0, "farewell": raised("ValueError")}, "clean", "certain"),
    "exit 3": ({"status": exited(3), "farewell": {"how": "exit"}}, "failed", "certain"),
    "os._exit(3)": ({"status": exited(3)}, "failed", "certain"),
    "exception": ({"status": exited(1), "farewell": raised("ValueError")}, "failed", "certain"),
    "MemoryError": ({"status": exited(1), "farewell": raised("MemoryError")}, "memory_error", "certain"),
    "numpy": (
        {"status": exited(1), "farewell": raised("_ArrayMemoryError", "numpy._core._exceptions")},
        "memory_error",
        "certain",
    ),
    "torch": (
        {"status": exited(1), "farewell": raised("OutOfMemoryError", "torch")},
        "device_out_of_memory",
        "certain",
    ),
    "old torch": (
        {"status": exited(1), "farewell": raised("OutOfMemoryError", "torch.cuda")},
        "device_out_of_memory",
        "certain",
    ),
    "cupy": (
        {"status": exited(1), "farewell": raised("OutOfMemoryError", "cupy.cuda.memory")},
        "device_out_of_memory",
        "certain",
    ),
    "jax": (
        {"status": exited(1), "farewell": raised("XlaRuntimeError", "jaxlib.xla_extension")},
        "device_out_of_memory",
        "likely",
    ),
    "tensorflow": (
        {
            "status": exited(1),
            "farewell": raised("ResourceExhaustedError", "tensorflow.python.framework.errors_impl"),
        },
        "device_out_of_memory",
        "likely",
    ),
    "a class of that name elsewhere": (
        {"status": exited(1), "farewell": raised("ResourceExhaustedError", "mine")},
        "failed",
        "certain",
    ),
    "SIGTERM": ({"status": 15}, "killed", "certain"),
    "SIGSEGV with core dump": ({"status": 11 | 0x80}, "killed", "certain"),
    "SIGBUS": ({"status": 7}, "killed", "certain"),
    "Ctrl-C": ({"status": 2, "farewell": raised("KeyboardInterrupt")}, "killed", "certain"),
    "the log names it": ({"kill": own_kill(), "log_readable": True}, "out_of_memory", "confirmed"),
    "the log names it, no count": (
        {"kill": own_kill(), "log_readable": True, **NO_COUNTER},
        "out_of_memory",
        "confirmed",
    ),
    "the count moved": ({"was_counted": True, "counted": (0, 1)}, "out_of_memory", "confirmed"),
    "the count moved before it vanished": (
        {"was_counted": True, "counter_gone": True, **NO_COUNTER},
        "out_of_memory",
        "confirmed",
    ),
    "signs only": ({**LOW, "host_risen": 1, **NO_COUNTER}, "out_of_memory", "likely"),
    "by hand": ({}, "unknown_sigkill", "none"),
    "by hand, memory short": (LOW, "unknown_sigkill", "none"),
    "by hand, OOM kill elsewhere": ({"host_risen": 1}, "unknown_sigkill", "none"),
    "by hand, memory short, OOM kill elsewhere": ({**LOW, "host_risen": 1}, "unknown_sigkill", "none"),
    "by hand, no count, OOM kill elsewhere": ({"host_risen": 1, **NO_COUNTER}, "unknown_sigkill", "none"),
    "by hand, no count, memory short": ({**LOW, **NO_COUNTER}, "unknown_sigkill", "none"),
    "by hand, no count, memory short, OOM kill elsewhere, the log does not name it": (
        {**LOW, "host_risen": 1, "log_readable": True, **NO_COUNTER},
        "unknown_sigkill",
        "none",
    ),
    "by hand, a neighbour was killed": (
        {"counted": (0, 1), "others": [worker(is_member=False)], **LOW},
        "unknown_sigkill",
        "none",
    ),
    "systemd-oomd": ({"oomd_risen": 3}, "userspace_killer", "confirmed"),
    "earlyoom": ({"headroom_pct": 8.0, "killers": ["earlyoom"]}, "userspace_killer", "likely"),
    "earlyoom asks first": ({"status": 15, **LOW, "killers": ["earlyoom"]}, "userspace_killer", "likely"),
    "earlyoom has no reason": ({"killers": ["earlyoom"]}, "unknown_sigkill", "none"),
    "SIGTERM, earlyoom has no reason": ({"status": 15, "killers": ["earlyoom"]}, "killed", "certain"),
    "Dask": ({**LOW, "nanny": "dask-worker"}, "userspace_killer", "likely"),
    "the kernel comes before earlyoom": (
        {**LOW, "killers": ["earlyoom"], "was_counted": True, "counted": (0, 1)},
        "out_of_memory",
        "confirmed",
    ),
    "SIGTERM is never the kernel": ({"status": 15, **LOW, "host_risen": 1, **NO_COUNTER}, "killed", "certain"),
    "no status, orderly": ({"status": None, "farewell": {"how": "exit"}}, "clean", "likely"),
    "no status, exception": ({"status": None, "farewell": raised("ValueError")}, "failed", "certain"),
    "no status, nothing said": ({"status": None}, "unknown", "none"),
    "no status, the log names it": (
        {"status": None, "kill": own_kill(), "log_readable": True},
        "out_of_memory",
        "confirmed",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_case(name):
    """Kind and confidence; in a word of evidence for everything but a clean end; a sentence that is one line."""
    known, kind, confidence = CASES[name]
    verdict = judge(case(**known))
    assert (verdict.kind, verdict.confidence) == (kind, confidence)
    assert verdict.kind in KINDS
    assert verdict.confidence in CONFIDENCES
    assert verdict.text.startswith("the process ")
    assert all(line and "\n" not in line for line in [verdict.text, *verdict.evidence])
    assert bool(verdict.evidence) is (kind != "clean")
    assert len(verdict.pack(1)) <= 4096


@pytest.mark.parametrize("name", [name for name in CASES if name.startswith("by hand")])
def test_kill_by_hand_never_reads_like_an_oom_kill(name):
    """Not even as a possibility in the sentence."""
    verdict = judge(case(**CASES[name][0]))
    assert "OOM" not in verdict.text
    assert "memory" not in verdict.text


def test_every_kind_has_a_case():
    """The table is complete."""
    assert {kind for _, kind, _ in CASES.values()} == set(KINDS)


def test_status_is_told():
    """Exit code and signal are numbers of their own, and named in the sentence."""
    failed, killed = judge(case(status=exited(3))), judge(case(status=11 | 0x80))
    assert (failed.exit_code, failed.signal) == (3, None)
    assert (killed.exit_code, killed.signal) == (None, 11)
    assert "SIGSEGV" in killed.text
    assert "exit code 3" in failed.text
    assert signal_name(6) == "SIGABRT"
    assert signal_name(200) == ""


def test_out_of_memory_names_limit_and_place():
    """What people ask first is in the sentence; the figures of the kernel log come first in the evidence."""
    verdict = judge(case(kill=own_kill(), log_readable=True, counted=(2, 3), was_counted=True, headroom_pct=0.4))
    assert verdict.text.endswith(f"at the limit of 300.0 MiB ({SOURCE}), in phase train, epoch 2, step 41")
    evidence = "\n".join(verdict.evidence)
    assert "280.5 MiB of private memory (anon-rss)" in verdict.evidence[0]
    assert "oom_kill in /cg/memory.events.local rose from 2 to 3" in verdict.evidence[1]
    assert "180.0 MiB in use, 0.4 % left at the last sample, 20 ms before the end" in evidence
    assert "RSS 230.0, 250.0, 270.0, 290.0 MiB in the last 300 ms" in evidence
    assert "RSS grew by 200 MiB/s over the last 0.5 s" in evidence


def test_usage_of_the_cgroup_is_not_that_of_the_machine():
    """Where physical memory is the limit, what the cgroup uses says little, and is not told."""
    verdict = judge(case(limit_source="physical memory"))
    assert not any("in use" in line for line in verdict.evidence)


def test_cgroup_that_has_gone_is_said():
    """Why nobody knows."""
    verdict = judge(case(counter_gone=True, **NO_COUNTER))
    assert "the cgroup was gone before its count of kills could be read" in verdict.evidence


def test_low_headroom_is_said():
    """A SIGKILL at low headroom is not explained, but the reader learns of it."""
    assert any("memory was short all the same" in line for line in judge(case(**LOW)).evidence)
    assert not any("memory was short" in line for line in judge(case()).evidence)


def test_failure_after_a_worker_was_killed():
    """What PyTorch raises then says nothing of memory; the verdict does, with the limit."""
    verdict = judge(case(status=exited(1), farewell=raised("RuntimeError"), others=[worker(2.0)]))
    assert verdict.kind == "failed"
    assert verdict.text.endswith(
        "; 2.0 s before, its worker DataLoader worker (77) was killed out of memory (confirmed)"
        f" at the limit of 300.0 MiB ({SOURCE})"
    )
    told = "its process DataLoader worker (77), last 55.0 MiB, was killed out of memory 2.0 s before"
    assert told in verdict.evidence


@pytest.mark.parametrize("other", [worker(61.0), worker(2.0, is_member=False)], ids=["long ago", "a neighbour's"])
def test_failure_that_is_not_laid_to_a_worker(other):
    """Neither a kill more than a minute ago nor one of a stranger explains the failure."""
    verdict = judge(case(status=exited(1), farewell=raised("RuntimeError"), others=[other]))
    assert "worker" not in verdict.text


def test_worker_that_nobody_could_name():
    """It is said that it was one of them."""
    verdict = judge(case(status=exited(1), others=[worker(2.0, pid=0)]))
    assert "one of its workers was killed out of memory" in verdict.text


def test_shells_say_it_in_their_way():
    """137 is what a shell makes of SIGKILL."""
    assert any("SIGKILL" in line for line in judge(case(status=exited(137))).evidence)


def test_refused_memory_names_the_limit():
    """RLIMIT_AS is the usual cause."""
    told = raised("MemoryError")
    with_limit = judge(case(status=exited(1), farewell=told, address_space_mib=512.0))
    without = judge(case(status=exited(1), farewell=told))
    assert any(line.startswith("RLIMIT_AS was 512.0 MiB") for line in with_limit.evidence)
    assert any("no RLIMIT_AS was set" in line for line in without.evidence)


def test_stack_and_neighbours():
    """The newest stack by the frame of the user's own code, and who else was there."""
    stack = Stack(3, NOW_NS - 10**8, Place(), 280.0, 280.0, 5.0, "site-packages/numpy/a.py:3 zeros\ntrain.py:9 load")
    known = {"stack": stack, "neighbours": [(9, "postgres", 120.0)], "neighbours_of": "in the cgroup"}
    evidence = judge(case(**known)).evidence
    assert "0.1 s before, at 280.0 MiB, it stood at train.py:9 load" in evidence
    assert "the largest other processes in the cgroup: postgres (9) 120.0 MiB" in evidence


def test_watched_from_outside_no_farewell_is_missed():
    """``memtrack run`` is not in the process: that it says nothing means nothing."""
    inside, outside = judge(case(status=exited(3))), judge(case(status=exited(3), uses_memtrack=False))
    assert "os._exit" in "".join(inside.evidence)
    assert "os._exit" not in "".join(outside.evidence)


def test_growth_of_little():
    """One sample has no rate; a process that stands still does not grow."""
    assert growth([]) == []
    assert growth([(NOW_NS, 10.0, None, None)]) == ["RSS 10.0 MiB at the last sample"]
    still = [(NOW_NS + number * 10**8, 10.0, None, None) for number in range(20)]
    assert growth(still) == ["RSS 10.0, 10.0, 10.0, 10.0 MiB in the last 300 ms"]
