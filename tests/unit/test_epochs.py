"""Epochs: how the sampler tells them apart, and how any number of them finds room in a recording."""

from __future__ import annotations

import os
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memtrack import metrics
from memtrack.analysis.summary import figures_of, summarise
from memtrack.recording import layout
from memtrack.recording.epochs import Epoch, EpochWriter, unpack_epochs
from memtrack.recording.reader import RecordingReader
from memtrack.recording.writer import RecordingWriter
from memtrack.sampling.window import BOUND, ESTIMATED, EXACT, SAMPLED, Cell, Place, Row
from tests.unit.test_sampler import SECOND_NS, Bench, Clock, Curve

# -- told apart -----------------------------------------------------------------------------------------------------


def epochs_of(bench):
    """What is left of each epoch: its number, peak, label, and growth."""
    found = []
    for (_, epoch), row in sorted(bench.epochs.items()):
        rss, growth = row.cells[metrics.RSS], row.cells.get(metrics.GROWTH)
        found.append((epoch, rss.max, rss.label, None if growth is None else growth.last))
    return found


def test_an_epoch_a_row():
    """Three epochs of two seconds, in each of which the process grows by 10 MiB: the peaks and growths are theirs."""
    bench = Bench(Curve(Clock(), lambda t: 100.0 + 5.0 * t))
    bench.run(6.3, script=[(2.0 * n, lambda n=n: bench.marks.move(1, step=n, epoch=n)) for n in range(3)])
    bench.marks.move(epoch=-1)
    bench.finish()
    epochs, peaks, labels, growths = zip(*epochs_of(bench), strict=True)
    assert epochs == (0, 1, 2)
    assert peaks == pytest.approx((110.0, 120.0, 131.0), abs=1.0)
    assert all(label in (SAMPLED, EXACT) for label in labels)
    assert growths == pytest.approx((10.0, 10.0, 10.0), abs=1.0)
    assert sum(growths) == pytest.approx(bench.phases[1].cells[metrics.GROWTH].last)


def test_the_same_number_again():
    """A second training counts from 0 again: that is another epoch, not the first going on."""
    bench = Bench(Curve(Clock(), lambda t: 300.0 if t < 2.0 else 100.0))
    bench.run(4.0, script=[(at, lambda epoch=epoch: bench.marks.move(epoch=epoch)) for at, epoch in
                           ((0.1, 0), (1.0, 1), (2.05, -1), (2.5, 0), (3.2, 1))])  # fmt: skip
    bench.finish()
    assert [(epoch, peak) for epoch, peak, *_ in epochs_of(bench)] == [(0, 300.0), (1, 300.0), (0, 100.0), (1, 100.0)]


def test_a_spike_between_two_epochs():
    """A spike that nobody saw, around the change of epochs: in neither is it said to be the peak, but for a bound."""
    bench = Bench(Curve(Clock(), lambda t: 100.0, peaks=[(1.04, 900.0)]))
    bench.run(3.0, script=[(0.0, lambda: bench.marks.move(epoch=0)), (1.05, lambda: bench.marks.move(epoch=1))])
    bench.finish()
    assert [(epoch, peak, label) for epoch, peak, label, _ in epochs_of(bench)] == [
        (0, 900.0, BOUND),
        (1, 900.0, BOUND),
    ]
    whole = bench.phases[0].cells[metrics.RSS]
    assert (whole.max, whole.label) == (900.0, EXACT)


def test_an_epoch_between_two_samples():
    """Epochs of a millisecond are there all the same, at what was sampled next, which the label says."""
    bench = Bench(Curve(Clock(), lambda t: 100.0))
    script = [(1.0 + 0.001 * n, lambda n=n: bench.marks.move(epoch=n)) for n in range(20)]
    bench.run(3.0, script=script)
    bench.finish()
    found = epochs_of(bench)
    assert [epoch for epoch, *_ in found] == list(range(20))
    assert {(peak, label) for _, peak, label, _ in found[:-1]} <= {(100.0, ESTIMATED), (100.0, SAMPLED)}


def test_growth_up_to_the_sample_after():
    """What a phase has allocated right before its end is its growth, though only the sample after its end shows it."""
    clock = Clock()
    bench = Bench(Curve(clock, lambda t: 100.0 if t < 1.999 else 400.0))
    bench.run(4.0, script=[(1.0, lambda: bench.marks.move(1)), (2.0, lambda: bench.marks.move(2))])
    bench.finish()
    assert bench.phases[1].cells[metrics.GROWTH].last == 300.0
    assert bench.phases[2].cells[metrics.GROWTH].last == 0.0


# -- kept -----------------------------------------------------------------------------------------------------------


def row_of(number, peak_mib, growth_mib=1.0):
    """The row of an epoch of a second."""
    row = Row(~number, number * SECOND_NS)
    row.end_ns = (number + 1) * SECOND_NS
    row.cells[metrics.RSS] = Cell(peak_mib, row.end_ns, Place(10 * number, number, (3,)), 1.0)
    row.cells[metrics.GROWTH] = Cell(growth_mib, row.end_ns, Place())
    row.cells[metrics.CONTAINER_HEADROOM] = Cell(100.0 - peak_mib / 100.0, row.end_ns, Place())
    return row


def test_any_number_of_epochs(make_recording):
    """Each is stored twice, as while it runs; of thousands, ranges are left that cover all, with exact peaks."""
    path = make_recording()
    writer, kept = RecordingWriter(path), random.Random(5)
    peaks = []
    with RecordingReader(path) as reader:
        for number in range(3000):
            peak = kept.uniform(100, 1000)
            peaks.append(peak)
            for mib in (peak / 2, peak):
                writer.put_epoch(row_of(number, mib), number, number)
            if number in (0, 63, 64, 65, 127, 128, 1000, 2999):
                check(reader.epochs(), peaks)
    writer.close()


def check(epochs, peaks):
    assert [epoch.first for epoch in epochs] == [0, *(epoch.last + 1 for epoch in epochs[:-1])]
    assert epochs[-1].last == len(peaks) - 1
    assert len(peaks) < 65 or 32 <= len(epochs) <= 64
    for epoch in epochs:
        part = peaks[epoch.first : epoch.last + 1]
        assert (epoch.peak_mib, epoch.step) == (max(part), 10 * (epoch.first + part.index(max(part))))
        assert epoch.growth_mib == len(part)
        assert epoch.headroom_min_pct == pytest.approx(100.0 - max(part) / 100.0)
        assert epoch.seconds == len(part)


@pytest.mark.parametrize("stop", [1, 63, 64, 65, 200, 201])
def test_another_writer_goes_on(make_recording, stop):
    """An agent that takes over finds the epochs as they are, and goes on with the next."""
    path = make_recording()
    peaks = [100.0 + (number * 37) % 50 for number in range(stop + 70)]
    writer = RecordingWriter(path)
    for number in range(stop):
        writer.put_epoch(row_of(number, peaks[number]), number, number)
    writer.close()
    writer = RecordingWriter(path)
    with RecordingReader(path) as reader:
        writer.go_on(reader)
        for number in range(stop, len(peaks)):
            writer.put_epoch(row_of(number, peaks[number]), number, number)
        check(reader.epochs(), peaks)
    writer.close()


def test_killed_while_pairs_are_merged(tmp_path):
    """After each single write of a doubling, every epoch is told of once, with its peak."""
    path = tmp_path / "epochs"
    for writes in range(34):
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
        writer = EpochWriter(fd)
        for number in range(64):
            writer.put(Epoch(row_of(number, 100.0 + number), number, number))
        done = []

        def pwrite(fd, data, at, done=done, writes=writes, real=os.pwrite):
            if len(done) >= writes:
                raise KeyboardInterrupt
            done.append(at)
            return real(fd, data, at)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "pwrite", pwrite)
            try:
                writer.put(Epoch(row_of(64, 164.0), 64, 64))
            except KeyboardInterrupt:
                pass
        table = os.pread(fd, layout.EPOCH_COUNT * layout.EPOCH_SIZE, layout.EPOCHS)
        os.close(fd)
        epochs = unpack_epochs(table)
        assert [epoch.first for epoch in epochs] == [0, *(epoch.last + 1 for epoch in epochs[:-1])]
        assert epochs[-1].last == (64 if writes == 34 else epochs[-1].last)
        assert epochs[-1].last >= 63
        assert all(epoch.peak_mib == 100.0 + epoch.last for epoch in epochs)


@given(st.binary(min_size=layout.EPOCH_SIZE, max_size=layout.EPOCH_SIZE), st.integers(0, layout.EPOCH_SIZE * 8 - 65))
def test_damage(noise, bit):
    """Noise is no epoch, nor is one with a flipped bit; a whole one comes back as it was."""
    assert Epoch.unpack(noise) is None or noise[:4] != bytes(4)
    epoch = Epoch(row_of(7, 512.5), 7, 3)
    record = epoch.pack()
    again = Epoch.unpack(record)
    same = {name: getattr(epoch, name) for name in Epoch.__slots__ if getattr(epoch, name) == getattr(epoch, name)}
    assert {name: getattr(again, name) for name in same} == same
    broken = bytearray(record)
    broken[bit // 8] ^= 1 << bit % 8
    assert Epoch.unpack(bytes(broken)) is None


# -- told -----------------------------------------------------------------------------------------------------------


def test_parts_of_a_run(make_recording):
    """A run gets the epochs and phases of its time. What was open before it as well has a bound, and no growth."""
    path = make_recording()
    writer = RecordingWriter(path)
    for number in range(6):
        writer.put_epoch(row_of(number, 100.0 + number), number % 3, number)
    writer.close()
    with RecordingReader(path) as reader:
        everything = summarise(reader)
        second = figures_of(reader, 3 * SECOND_NS, 6 * SECOND_NS)
        late = figures_of(reader, 4 * SECOND_NS + SECOND_NS // 2, 6 * SECOND_NS)
        later = figures_of(reader, 5 * SECOND_NS + SECOND_NS // 2, 60 * SECOND_NS)
    assert [epoch.name for epoch in everything.epochs] == ["0", "1", "2", "0", "1", "2"]
    assert [(epoch.name, epoch.peak_rss_mib, epoch.growth_mib) for epoch in second.epochs] == [
        ("0", 103.0, 1.0), ("1", 104.0, 1.0), ("2", 105.0, 1.0)
    ]  # fmt: skip
    assert second.epochs[0].limit_pct == pytest.approx(1.03)
    assert [(epoch.name, epoch.peak_label) for epoch in late.epochs] == [("1", "sampled"), ("2", "sampled")]
    assert [(epoch.name, epoch.growth_mib) for epoch in later.epochs] == [("2", 1.0)]
    assert str(second.epochs[1]) == "1: 104.0 MiB (sampled), +1.0 MiB, 1.0 % of the limit in use"


def test_open_before_the_run(make_recording):
    """An epoch that began two seconds before a run may have peaked before it."""
    path = make_recording()
    writer = RecordingWriter(path)
    row = row_of(0, 300.0)
    row.end_ns = 10 * SECOND_NS
    writer.put_epoch(row, 0, 0)
    writer.close()
    with RecordingReader(path) as reader:
        (epoch,) = figures_of(reader, 2 * SECOND_NS, 10 * SECOND_NS).epochs
    assert (epoch.peak_label, epoch.growth_mib) == ("bound", None)


def test_many_epochs_in_few_lines(make_recording):
    """The text shows the first and the last; the table has them all."""
    path = make_recording()
    writer = RecordingWriter(path)
    for number in range(40):
        writer.put_epoch(row_of(number, 100.0 + number), number, number)
    writer.put_phase(whole_row())
    writer.close()
    with RecordingReader(path) as reader:
        summary = summarise(reader)
    lines = str(summary).splitlines()
    at = lines.index("  epochs")
    names = [line.split()[0] for line in lines[at + 1 : at + 14]]
    assert names == ["0", "1", "2", "3", "...", *map(str, range(32, 40))]
    columns, rows = summary.figures.table()
    assert len(rows) == 40
    assert dict(zip(columns, rows[-1], strict=True))["peak_rss_mib"] == 139.0


def whole_row():
    row = Row(0, 0)
    row.end_ns, row.cells[metrics.RSS] = 40 * SECOND_NS, Cell(139.0, SECOND_NS, Place(), 40.0)
    return row
