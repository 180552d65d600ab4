"""The callback: what Lightning's hooks tell becomes marks and phases, and figures go into the row that it logs."""

from __future__ import annotations

import sys
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from memtrack.notices import warn_once
from memtrack.training import Training
from memtrack_lightning._runs import feed_runs

if TYPE_CHECKING:
    from collections.abc import Callable

    from memtrack_lightning._runs import Fed

_Base: Any = object
"""Any, to those who check types: an instance derives from the ``Callback`` of the package that is in use."""


def _phase(name: str) -> tuple[Callable[..., None], Callable[..., None]]:
    """The hooks at the start and at the end of a phase."""

    def enter(self: MemoryCallback, *_: Any) -> None:
        self._enter(name)

    def leave(self: MemoryCallback, *_: Any) -> None:
        self._leave(name)

    return enter, leave


class MemoryCallback(_Base):  # type: ignore[misc]
    """For ``Trainer(callbacks=[MemoryCallback()])`` of ``lightning.pytorch`` or ``pytorch_lightning``.

    Marks steps, epochs and phases, and adds ``memory/step/rss_peak_mib``, the peak since the row before in MiB, to each
    row that Lightning logs of a training step: every ``log_every_n_steps``, on rank 0, where there is a logger. Steps
    carry the number under which loggers show them. The run of an ``MLFlowLogger`` gets the charts from ``setup`` to
    ``teardown``; those of ``mlflow.start_run``, W&B and Comet are followed anyway. ``memtrack.autolog()`` need not be
    called; a callback that the program has added counts, one that autolog has does nothing beside it then.

    Args:
        automatic: Of a callback that autolog has put there.
        checkpoints: Store what Lightning saves with the run, see ``memtrack.log_checkpoint``: True, or where to.
        settings: Those of ``memtrack.autolog``, for a process in which nothing is monitoring yet.

    Raises:
        SettingsError: A setting is wrong.
    """

    def __new__(cls, **_: Any) -> MemoryCallback:
        """An instance of the class for the package that the program has imported by now."""
        kind = import_module(f"memtrack_lightning.{_in_use()}").MemoryCallback if cls is MemoryCallback else cls
        made: MemoryCallback = object.__new__(kind)
        return made

    def __init__(self, *, automatic: bool = False, **settings: Any) -> None:
        self._automatic = automatic
        self._settings = settings
        self._training = Training(automatic=automatic, **settings)
        self._step = self._training.step
        self._on = False
        self._saving_step: int | None = None
        self._loop: Any = None
        self._is_row_of_step = False
        """Whether the next row that Lightning logs is of the training step that is over."""
        self._tensor: Any = None
        self._fed: list[Fed] = []
        self._restores: list[Callable[[], None]] = []

    def __reduce__(self) -> Any:
        # into another process goes what it was made from: strategies that spawn pickle all callbacks
        return partial(type(self), automatic=self._automatic, **self._settings), ()

    # -- a fit, a validation, a test or a prediction, from its setup to its teardown ----------------------------------

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """The loggers have begun their runs."""
        ours = [callback for callback in trainer.callbacks if isinstance(callback, MemoryCallback)]
        # one that the program has added comes before one of autolog's. There may be two of these: Lightning adds to the
        # very list that it is given, which may be given again
        self._on = min(ours, key=lambda callback: callback._automatic, default=self) is self and self._training.begin()
        if self._on:
            try:
                self._fed = feed_runs(trainer)
                self._replace(trainer, "save_checkpoint", self._save)
            except Exception as exc:
                warn_once("lightning setup", f"memtrack sees less of this ({type(exc).__name__}: {exc}).")

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """It went well."""
        self._over("FINISHED")

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """It did not, and there will be no teardown."""
        self._over("FAILED")

    def _over(self, status: str) -> None:
        if self._on:
            self._on, self._loop = False, None
            while self._restores:
                self._restores.pop()()
            self._training.end()
            while self._fed:
                self._fed.pop().end(status)

    # -- training -----------------------------------------------------------------------------------------------------

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """The first epoch is about to begin."""
        self._enter("train")
        if self._on:
            try:
                self._prepare(trainer)
            except Exception as exc:
                warn_once("lightning steps", f"memtrack marks no steps here ({type(exc).__name__}: {exc}).")

    def _prepare(self, trainer: Any) -> None:
        loop = trainer.fit_loop.epoch_loop
        # All loggers get this as the step of their rows; Lightning's own callbacks read it here, too. The public
        # `global_step` counts steps of optimizers: another number as soon as there are two of them, or a batch is
        # skipped. Counting batches would mean to know about gradient accumulation, restarts and what strategies do.
        loop._batches_that_stepped  # noqa: B018 - raises here, once, rather than at each step
        self._loop = loop
        self._training.row()  # what setting up and the sanity check took is no step's
        if trainer.loggers and trainer.is_global_zero:
            torch = import_module("torch")
            # tensors, as all that Lightning logs; of the CPU, whatever the default device is. `torch.tensor` takes
            # twice as long
            self._tensor = partial(torch.scalar_tensor, device=torch.device("cpu"), dtype=torch.float32)
            # `log` of the module would do as well, for ten times the price: Lightning looks up who may log what from
            # which hook, and looks at each value again in each step to come
            self._replace(trainer._logger_connector, "log_metrics", self._log_row)

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """An epoch begins."""
        if self._on:
            self._training.epoch(trainer.current_epoch)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """A step begins, or goes on with another batch if gradients accumulate."""
        loop = self._loop
        if loop is not None:
            self._step(loop._batches_that_stepped)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """If Lightning has a row for this step, that is the next that it logs."""
        self._is_row_of_step = True

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """What is logged now is of the epoch."""
        self._is_row_of_step = False

    def _log_row(self, log: Callable[..., Any], metrics: Any, *args: Any, **kwargs: Any) -> Any:
        """The row, with the peak since the last one if it is of a training step."""
        if self._is_row_of_step and not args and not kwargs:  # others tell a step of their own
            self._is_row_of_step = False
            metrics = self._with_figures(metrics)
        return log(metrics, *args, **kwargs)

    def _with_figures(self, metrics: Any) -> Any:
        try:
            tensor, row = self._tensor, dict(metrics)
            for name, value in self._training.row().items():
                row[name] = tensor(value)
            return row
        except Exception as exc:
            warn_once("lightning row", f"memtrack adds nothing to this row ({type(exc).__name__}: {exc}).")
            return metrics

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """The last epoch is over."""
        self._loop, self._is_row_of_step = None, False
        self._leave("train")

    # -- the other phases ---------------------------------------------------------------------------------------------

    on_sanity_check_start, on_sanity_check_end = _phase("sanity check")
    on_test_start, on_test_end = _phase("test")
    on_predict_start, on_predict_end = _phase("predict")

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        """Validation, in a training or alone; it is also told of in the sanity check."""
        self._is_row_of_step = False
        if not trainer.sanity_checking:
            self._enter("validation")

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """What was before goes on."""
        self._leave("validation")

    def _enter(self, phase: str) -> None:
        if self._on:
            self._training.enter(phase)

    def _leave(self, phase: str) -> None:
        if self._on:
            self._training.leave(phase)

    def _replace(self, owner: Any, name: str, ours: Callable[..., Any]) -> None:
        """Let calls of a method of this one object come to ``ours``, which gets the method as its first argument."""
        own = vars(owner)
        before, put = own.get(name), partial(ours, getattr(owner, name))

        def restore() -> None:
            if own.get(name) is put:
                del own[name]
                if before is not None:
                    own[name] = before

        own[name] = put
        self._restores.append(restore)

    def _save(self, save: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Let the saving of checkpoints be a phase, whoever asks for it.

        Of hooks there is one in the middle of it, before anything is written, and none at its end.
        """
        self._enter("checkpoint")
        self._saving_step = None
        try:
            found = save(*args, **kwargs)
        finally:
            self._leave("checkpoint")
        if self._saving_step is not None:
            self._training.saved(args[0] if args else kwargs.get("filepath"), self._saving_step)
        return found

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """The checkpoint is about to be written, by the first rank."""
        if trainer.is_global_zero:
            self._saving_step = int(checkpoint.get("global_step", trainer.global_step))


def _in_use() -> str:
    """The module with the class for the package that the program uses, which it has imported for its Trainer."""
    is_new, is_old = "lightning.pytorch" in sys.modules, "pytorch_lightning" in sys.modules
    if is_new and is_old:
        return "_both"
    return "_lightning" if is_new or (not is_old and find_spec("lightning") is not None) else "_pytorch_lightning"
