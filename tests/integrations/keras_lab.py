"""What test_keras.py runs in a process for each backend: trainings with Keras without memtrack, by hand, by autolog."""

from __future__ import annotations

LAB = """
import contextlib, copy, csv, importlib.util, io
import numpy
import memtrack, memtrack_keras
report(lazy="keras" not in sys.modules)
import keras
import mlflow
from keras.callbacks import Callback, CallbackList, CSVLogger, LambdaCallback, ModelCheckpoint
from memtrack.recording.reader import RecordingReader

BACKEND = os.environ["KERAS_BACKEND"]
assert keras.backend.backend() == BACKEND
X = numpy.random.RandomState(0).rand(40, 4).astype("float32")
Y = X.sum(axis=1, keepdims=True)

def hold(mib):
    block = numpy.ones(mib << 17)
    time.sleep(0.3)
    return block[0]

class Holder(Callback):
    '''Holds memory, in MiB, in the batch of an epoch; the epoch of what is alone is -1.'''
    async_safe = True
    def __init__(self, **plan):
        super().__init__()
        self.plan, self.epoch = plan, -1
    def at(self, kind, batch):
        mib = self.plan.get(f"{kind}_{self.epoch}_{batch}")
        if mib:
            hold(mib)
    def on_epoch_begin(self, epoch, logs=None):
        self.epoch = epoch
    def on_train_batch_begin(self, batch, logs=None):
        self.at("train", batch)
    def on_test_batch_begin(self, batch, logs=None):
        self.at("test", batch)
    def on_predict_batch_begin(self, batch, logs=None):
        self.at("predict", batch)

class Dense(keras.layers.Dense):
    saves = held = 0
    def save_own_variables(self, store):
        Dense.saves += 1
        if Dense.saves == Dense.held:
            hold(200)
        super().save_own_variables(store)

EAGER = False
'''Compiling takes most of the time of so small a training.'''

def net(optimizer="sgd", **more):
    # not set_random_seed, which imports TensorFlow on every backend
    model = keras.Sequential([keras.Input((4,)), Dense(1, kernel_initializer=keras.initializers.Constant(0.1))])
    model.compile(optimizer, "mse", **{"run_eagerly": EAGER, **more})
    return model

# 5 steps an epoch, a validation of 2 batches
def fit(model, *callbacks, **more):
    arguments = {"batch_size": 8, "epochs": 3, "shuffle": False}
    arguments |= {"validation_data": (X[:16], Y[:16]), "validation_batch_size": 8}
    return model.fit(X, Y, callbacks=list(callbacks), **{**arguments, "verbose": 0, **more}).history

def whole(name, *ours):
    '''A fit with memory held in known places, then evaluate and predict; what its loggers have.'''
    t0 = time.time()
    model = net()
    Dense.saves, Dense.held = 0, 2
    plan = Holder(test_0_0=150, train_1_1=300)
    checkpoint = ModelCheckpoint(f"{name}.weights.h5", save_weights_only=True)
    history = fit(model, *ours, CSVLogger(f"{name}.csv"), *LOGGERS[name](), plan, checkpoint)
    model.evaluate(X, Y, verbose=0, callbacks=[*ours, Holder(**{"test_-1_0": 250})])
    model.predict(X, verbose=0, callbacks=[*ours, Holder(**{"predict_-1_0": 350})])
    with open(f"{name}.csv", newline="") as table:
        rows = list(csv.DictReader(table))
    report(**{name: history, f"{name}_time": [t0, time.time()], f"{name}_csv": rows, f"{name}_clean": clean(model)})

def clean(model):
    return not vars(model).keys() & {"save", "save_weights"}

def place():
    '''(step, epoch, open phases), as the agent sees them.'''
    with RecordingReader(memtrack.autologging.active.monitor.path) as reader:
        names, place = reader.names(), reader.place()
    return place.step, place.epoch, [names[number] for number in place.phases]

def iterations(model):
    return int(keras.ops.convert_to_numpy(model.optimizer.iterations))

class Places(Callback):
    '''Where memtrack stands in each batch, and where the optimizer stands when it is over.'''
    def __init__(self):
        super().__init__()
        self.seen, self.fails = [], None
    def on_train_batch_begin(self, batch, logs=None):
        self.now = place()[0]
        if batch == 2 and self.fails is not None:
            raise self.fails
    def on_train_batch_end(self, batch, logs=None):
        self.seen.append([self.now, iterations(self.model)])

def mlflow_callback():
    import mlflow.keras
    return [mlflow.keras.MlflowCallback()]

def mlflow_lambda():
    return [LambdaCallback(on_epoch_end=lambda epoch, logs: mlflow.log_metrics(logs, step=epoch))]

def mlflow_autolog():
    # which adds its callback to the list by itself, and one of TensorBoard's
    if importlib.util.find_spec("tensorboard") is None:
        return mlflow_lambda()
    import mlflow.tensorflow
    mlflow.tensorflow.autolog(log_models=False, log_datasets=False, silent=True)
    return []

def wandb_logger():
    from wandb.integration.keras import WandbMetricsLogger
    return [WandbMetricsLogger()]

LOGGERS = {
    "hand": {"jax": mlflow_callback, "torch": mlflow_lambda, "tensorflow": wandb_logger}[BACKEND],
    "auto": {"jax": mlflow_lambda, "torch": mlflow_callback, "tensorflow": mlflow_autolog}[BACKEND],
}
PARTS = [
    (owner, name)
    for kind in (CallbackList, *keras.Model.__mro__)
    for owner, name in [(kind, name) for name in ("set_model", "fit", "evaluate", "predict")]
    if name in vars(kind)
]

def originals():
    return [vars(owner)[name] for owner, name in PARTS]
"""

DISPATCH = """
# -- asynchronous dispatch ------------------------------------------------------------------------------------------

class Threads(Callback):
    '''Which threads Keras calls from at the end of a batch.'''
    async_safe = True
    def __init__(self):
        super().__init__()
        self.main = set()
    def on_train_batch_end(self, batch, logs=None):
        self.main.add(threading.current_thread() is threading.main_thread())
    on_test_batch_end = on_predict_batch_end = on_train_batch_end

class Unsafe(Callback):
    def on_train_batch_end(self, batch, logs=None):
        pass
    on_test_batch_end = on_predict_batch_end = on_train_batch_end

# each time that the main thread fetches a value, which waits for the device
waits = 0
def counted(fetch):
    def ours(value):
        global waits
        waits += threading.current_thread() is threading.main_thread()
        return fetch(value)
    return ours
from keras.src import backend
backend.convert_to_numpy = counted(backend.convert_to_numpy)
if BACKEND == "jax":
    from jax._src.array import ArrayImpl
    ArrayImpl._value = property(counted(ArrayImpl._value.fget))

def dispatch(*callbacks):
    '''Keras's own state, the threads, and how often the main thread waited in two fits, the second twice as long.'''
    states, threads, counts = [], Threads(), []
    for samples in (20, 40):
        global waits
        model = net()
        tell = dict(epochs=2, steps=samples // 4, verbose=0)
        found = CallbackList([*callbacks, threads], add_history=True, model=model, **tell)
        states.append([getattr(found, f"_async_{kind}", None) for kind in ("train", "test", "predict")])
        before = waits
        model.fit(X[:samples], Y[:samples], batch_size=4, epochs=2, verbose=0, shuffle=False, callbacks=found)
        counts.append(waits - before)
    return {"states": states, "threads": sorted(threads.main), "waits": counts}

is_async = hasattr(CallbackList([]), "_async_train") and BACKEND != "tensorflow"
report(is_async=is_async, without=dispatch(), unsafe=dispatch(Unsafe()))
"""

BY_HAND = """
# -- by hand --------------------------------------------------------------------------------------------------------

report(plain=fit(net()))
before = originals()
from memtrack.errors import SettingsError
try:
    memtrack_keras.MemoryCallback(interval="soon")
except SettingsError as exc:
    report(refused=str(exc))
mine = copy.deepcopy(memtrack_keras.MemoryCallback(interval=0.1, flush_interval=0.2))

if BACKEND == "tensorflow":
    import wandb
    run = wandb.init(project="keras")
    report(wandb=run.id)
else:
    mlflow.start_run(run_name="hand")
whole("hand", mine)
report(hand_recording=memtrack.autologging.active.monitor.path)
report(ours=dispatch(memtrack_keras.MemoryCallback()))
if BACKEND == "tensorflow":
    wandb.finish()
else:
    mlflow.flush_async_logging()
    mlflow.end_run()
memtrack.autolog(disable=True)
report(restored=originals() == before)

# without autolog nobody tells that a fit was broken off, until something else begins
with memtrack.start(interval=0.1):
    failing, model = Places(), net()
    failing.fails = ValueError("the loss is NaN")
    try:
        fit(model, mine, failing)
    except ValueError as caught:
        assert caught is failing.fails
    broken = [place()[2], clean(model)]
    looks = LambdaCallback()
    looks.on_test_begin = lambda logs=None: broken.append(place()[2])
    model.evaluate(X, Y, verbose=0, callbacks=[mine, looks])
    report(broken=[*broken, place()[2], clean(model)])
"""

BY_AUTOLOG = """
# -- autolog --------------------------------------------------------------------------------------------------------

memtrack.autolog(interval=0.1, flush_interval=0.2)
report(auto_recording=memtrack.autologging.active.monitor.path, hooked=originals() != before)
mlflow.start_run(run_name="auto")
whole("auto")
mlflow.flush_async_logging()
mlflow.end_run()
mlflow.autolog(disable=True, silent=True)
EAGER = True

# one that the program has added is the only one, in two fits
mine = memtrack_keras.MemoryCallback()
kept = []
for _ in range(2):
    found = CallbackList([Places(), mine], add_history=True, model=net(), epochs=1, steps=5, verbose=0)
    kept.append([one is mine for one in found.callbacks if isinstance(one, memtrack_keras.MemoryCallback)])
both = net()
report(kept=kept, both=[fit(both, mine), fit(both, mine)])

# what a callback of the program predicts and evaluates inside of a fit
class Looks(Callback):
    phases = []
    def look(self, logs=None):
        self.phases.append(place())
    on_test_begin = on_predict_begin = look
class Predicts(Callback):
    def on_epoch_end(self, epoch, logs=None):
        self.model.predict(X, verbose=0, callbacks=[Looks()])
        self.model.evaluate(X, Y, verbose=0, callbacks=[Looks()])
        Looks.phases.append(place())
nested = fit(net(), Predicts(), epochs=2, validation_data=None)
report(nested=Looks.phases, nested_peaks=len(nested["memory/epoch/rss_peak_mib"]), after_nested=place()[2])

# exceptions
ends = []
for error in (ValueError("the loss is NaN"), KeyboardInterrupt()):
    failing, model = Places(), net()
    failing.fails = error
    try:
        fit(model, failing)
    except BaseException as caught:
        assert caught is error
        ends.append([*place(), clean(model)])
def fails(*_):
    raise ValueError("stop")
alone = LambdaCallback()
alone.on_predict_begin = fails
try:
    net().predict(X, verbose=0, callbacks=[alone])
except ValueError:
    ends.append([*place(), True])
report(ends=ends)

# the progress bar
with contextlib.redirect_stdout(io.StringIO()) as bar:
    fit(net(), verbose=2)
report(bar=bar.getvalue())

# steps
def steps(*models_and_arguments):
    seen = []
    for model, arguments in models_and_arguments:
        places = Places()
        fit(model, places, **{"epochs": 2, "validation_data": None, **arguments})
        seen += places.seen
    return seen

model = net()
report(steps=steps((model, {}), (model, {"epochs": 4, "initial_epoch": 3})))
if BACKEND != "torch":
    report(steps_of_two=steps((net(steps_per_execution=2, run_eagerly=False), {})))
accumulating = net(keras.optimizers.SGD(gradient_accumulation_steps=2))
report(accumulated=isinstance(getattr(keras.optimizers.Optimizer, "iterations", None), property))
report(steps_accumulated=steps((accumulating, {})))

def batches():
    for number in range(3):
        yield X[:8], Y[:8]
class Counts(Places):
    pass
model = net()
seen = []
for _ in range(2):
    places = Places()
    model.fit(batches(), verbose=0, callbacks=[places])
    seen += places.seen
report(steps_of_unknown=seen)

if BACKEND != "jax":
    still = net()
    still.layers[-1].trainable = False
    still.compile("sgd", "mse", run_eagerly=True)
    report(steps_still=steps((still, {})))

# a loop of the program's own
model, loop = net(), []
own = CallbackList([Holder()], model=model, epochs=1, steps=2, verbose=0)
own.on_train_begin()
own.on_epoch_begin(7)
for batch in range(2):
    own.on_train_batch_begin(batch)
    model.train_on_batch(X, Y)
    own.on_train_batch_end(batch)
    loop.append(place())
own.on_epoch_end(7)
own.on_train_end()
report(loop=loop, after_loop=place())
own.on_train_begin()
left = place()[2]
look = Places()
fit(net(), look, epochs=1)
report(broken_loop=[left, place()[2], look.seen])

import gc, weakref
dead = weakref.ref(net())
fit(dead() or model)
there = weakref.ref(model)
del model, own
gc.collect()
report(model_is_freed=there() is None)
memtrack.autolog(disable=True)
report(restored_again=originals() == before)
"""
