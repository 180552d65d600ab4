"""``watch(loader)``: the batches of a loader, and where the training stands with each of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Generic, TypeVar

from memtrack.errors import SettingsError
from memtrack.training import Training, step_reached
from memtrack_pytorch._workers import Named

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

Batch = TypeVar("Batch", covariant=True)

TRAIN = "train"


class _Progress:
    """How far the loops of this process have come. They share phases, which follow each other and do not nest."""

    def __init__(self) -> None:
        self.training: Training | None = None
        self.step = -1
        self.epoch = -1
        self._has_begun = False

    def begin(self) -> Training | None:
        """What is to be told where the training stands; None if nothing is monitoring."""
        # again only where nothing is: it begins the next row
        if self.training is not None and (not self._has_begun or step_reached() is None):
            self._has_begun = self.training.begin()
        return self.training if self._has_begun else None


_progress = _Progress()


class Watched(Generic[Batch]):
    """What ``watch`` gives: iterate over it instead of the loader, as often as you like."""

    def __init__(self, loader: Iterable[Batch], phase: str, epoch: int | None, step: int | None) -> None:
        self.loader = loader
        self.phase = phase
        self.epoch = epoch
        """Number of the epoch that runs, or ran last; None before the first."""
        self.step = step
        """Number of the batch, counted from 0 over all epochs; None before the first."""
        self._next = (epoch, step)

    def __len__(self) -> int:
        return len(self.loader)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[Batch]:
        training = _progress.begin()
        if training is None:
            yield from self.loader
            return
        is_train = self.phase == TRAIN
        if is_train:
            epoch, step = self._next
            self._next = (None, None)
            self.epoch = _progress.epoch = _progress.epoch + 1 if epoch is None else epoch
            if step is not None:
                _progress.step = step - 1
        training.enter(self.phase)
        try:
            if is_train:
                training.epoch(_progress.epoch)
            mark = training.step
            for batch in self._batches():
                if is_train:
                    self.step = _progress.step = _progress.step + 1
                    mark(_progress.step)
                yield batch
        finally:
            training.leave(self.phase)

    def row(self) -> dict[str, float]:
        """Memory figures for your own row, since the last: ``mlflow.log_metrics({..., **batches.row()}, step=...)``.

        ``memory/step/rss_peak_mib`` is the highest resident memory since then, in MiB; what torch's allocator says of a
        GPU comes along. Empty if memtrack does not run.
        """
        return {} if _progress.training is None else _progress.training.row()

    def _batches(self) -> Iterator[Batch]:
        # accelerate's loader keeps the one that starts the workers inside
        loader: Any = getattr(self.loader, "base_dataloader", self.loader)
        if not getattr(loader, "num_workers", 0) or not hasattr(loader, "worker_init_fn"):
            yield from self.loader
            return
        before = loader.worker_init_fn
        loader.worker_init_fn = Named(before)
        try:
            # some loaders start their workers when they are asked for the first batch
            batches = iter(self.loader)
            first = next(batches)
        except StopIteration:
            return
        finally:
            loader.worker_init_fn = before
        yield first
        yield from batches


def watch(
    loader: Iterable[Batch], *, phase: str = TRAIN, epoch: int | None = None, step: int | None = None, **settings: Any
) -> Watched[Batch]:
    """The batches of ``loader``, with memory joined to them: ``for batch in watch(loader): ...``.

    Marks the step at the beginning of each batch, the epoch at the first, and the phase. Steps are batches, counted on
    over epochs and loaders; only those of the phase ``train`` count. Workers of a DataLoader are called by numbers.

    Args:
        loader: A DataLoader, or anything that can be iterated over.
        phase: What the loop does: ``"train"``, ``"validation"``, ``"test"`` or a word of your own.
        epoch: Number of the first epoch; by default it goes on from the last one, from 0 in the beginning.
        step: Number of the first batch, for a training that is resumed; by default it goes on from the last one.
        settings: Those of :func:`memtrack.autolog`, which need not be called then, for a process that nothing monitors.

    Raises:
        SettingsError: A setting is wrong, or ``loader`` cannot be iterated over.
    """
    training = Training(**settings)
    if not hasattr(loader, "__iter__") and not hasattr(loader, "__getitem__"):
        raise SettingsError("loader", loader, "give a DataLoader, or something else to iterate over")
    if _progress.training is None:
        _progress.training = training
    return Watched(loader, phase, epoch, step)
