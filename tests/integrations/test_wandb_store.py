"""The store of artifacts in W&B: real offline runs, what W&B notes of them, and what is restored from their folder."""

from __future__ import annotations

import functools
import os
import shutil
from base64 import b64encode
from pathlib import Path

import pytest

from memtrack import registry
from memtrack.artifacts.contract import MANIFEST, SCRIPT, StoreContract
from memtrack.artifacts.store import PACKS, Pack
from memtrack.errors import ArtifactFormatError, ArtifactNotFoundError, DeliveryError, RejectedError, SettingsError
from tests.integrations.wandb_lab import SETTINGS, read_run

wandb = pytest.importorskip("wandb")

from memtrack_wandb import active_store, open_store  # noqa: E402
from memtrack_wandb._files import md5_of  # noqa: E402
from memtrack_wandb._store import artifact_of  # noqa: E402


@pytest.fixture(scope="module", autouse=True)
def _settings():
    """W&B as the scripts have it, in this process."""
    before = dict(os.environ)
    os.environ.update(SETTINGS)
    yield
    wandb.teardown()
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture
def start(tmp_path):
    """``start()`` makes a run in ``tmp_path``; what is not finished at the end is finished."""
    started = []

    def init(**kwargs):
        quiet = wandb.Settings(console="off", x_disable_stats=True, x_disable_meta=True, x_save_requirements=False)
        run = wandb.init(project="p", dir=str(tmp_path), reinit="create_new", settings=quiet, **kwargs)
        started.append(run)
        return run

    yield init
    for run in started:
        run.finish()


class TestWandbStore(StoreContract):
    @pytest.fixture(autouse=True)
    def _run(self, start, tmp_path):
        self.run = start()
        self.root, self.folder = tmp_path, ""

    def make_store(self):
        return active_store()

    def open_again(self, store):
        self.run.finish()
        assert read_run(self.root, self.run.id).exit_codes
        found, name = open_store(f"{self.run.settings.sync_dir}/model/step-00000040")
        assert name == "model/step-00000040"
        return found

    def make_broken_store(self):
        """A file is where the folder has to be."""
        self.folder = self.root
        (Path(self.run.settings.sync_dir) / "memtrack").write_text("")
        return active_store()

    def _file(self, store, tmp_path, content):
        return super()._file(self if self.folder else store, tmp_path, content)


def files_of(run, root):
    """``[{path: (size, digest, local path)}]``: what W&B has noted of the artifacts of a run, in order."""
    found = read_run(root, run.id).of("artifact")
    return [
        (
            one["name"],
            one["aliases"],
            {f["path"]: (int(f["size"]), f["local_path"]) for f in one["manifest"]["contents"]},
        )
        for one in found
    ]


def log(store, name, contents, tmp_path, text=b"manifest"):
    """Log an artifact of packs with these contents."""
    packs = {}
    os.makedirs(store.folder, exist_ok=True)
    for content in contents:
        path = os.path.join(store.folder, f"{content:024x}.mtz")
        if not os.path.exists(path):
            with open(path, "wb") as file:
                file.write(b"%d" % content * 1000)
            store.put(path, f"{PACKS}{content:024x}.mtz", md5_of(path))
        packs[f"{PACKS}{content:024x}.mtz"] = Pack(os.path.getsize(path), md5_of(path), "")
    (tmp_path / "made.mtz").write_bytes(text)
    store.commit(str(tmp_path / "made.mtz"), name, md5_of(str(tmp_path / "made.mtz")), packs)


def test_each_version_has_all_it_needs(start, tmp_path):
    """A version has its manifest, restore.py and every pack, in files that stay; nothing is copied to W&B's cache."""
    run = start()
    store = active_store()
    (tmp_path / "restore.py").write_text("print()")
    store.put(str(tmp_path / "restore.py"), SCRIPT, md5_of(str(tmp_path / "restore.py")))
    log(store, "memtrack/model/step-00000040.mtz", [1, 2], tmp_path, b"forty")
    log(store, "memtrack/model/step-00000080.mtz", [1, 2, 3], tmp_path, b"eighty")
    log(store, "memtrack/data.mtz", [4], tmp_path, b"old")
    log(store, "memtrack/data.mtz", [5], tmp_path, b"newer")
    run.finish()
    versions = files_of(run, tmp_path)
    model, data = f"run-{run.id}-model", f"run-{run.id}-data"
    assert [(name, sorted(aliases)) for name, aliases, _ in versions] == [
        (model, ["latest", "step-40"]),
        (model, ["latest", "step-80"]),
        (data, ["latest"]),
        (data, ["latest"]),
    ]
    assert [len(files) for *_, files in versions] == [4, 5, 3, 3]
    for *_, files in versions:
        assert SCRIPT in files
        for size, path in files.values():
            assert path.startswith(f"{run.settings.sync_dir}/memtrack/")
            assert os.path.getsize(path) == size
    # the second one has not taken the place of the first
    contents = [Path(files["memtrack/data.mtz"][1]).read_bytes() for *_, files in versions[2:]]
    assert contents == [b"old", b"newer"]
    restored = open_store(f"{run.settings.sync_dir}/data")[0]
    restored.get("memtrack/data.mtz", str(tmp_path / "back"))
    assert (tmp_path / "back").read_bytes() == b"newer"


def test_the_digests_are_those_that_wandb_would_compute(start, tmp_path):
    """What is handed over as the digest is what W&B computes of the file when it is asked to."""
    run = start()
    log(active_store(), MANIFEST, [1], tmp_path)
    run.finish()
    (record,) = read_run(tmp_path, run.id).of("artifact")
    for one in record["manifest"]["contents"]:
        other = wandb.Artifact("other", type="memtrack")
        assert other.add_file(one["local_path"]).digest == one["digest"]
        assert one["skip_cache"]


def test_steps_stay_the_users(start, tmp_path):
    """Storing in the middle of a row of the history neither ends it nor moves the step: it is as without memtrack."""
    histories = []
    for storing in (False, True):
        run = start()
        store = active_store()
        for step in range(3):
            run.log({"loss": step}, step=step)
            if storing:
                log(store, f"memtrack/model/step-{step:08}.mtz", [step], tmp_path)
            run.log({"accuracy": step}, step=step)
        for step in (3, 4):
            run.log({"loss": step})
            if storing:
                log(store, f"memtrack/model/step-{step:08}.mtz", [step], tmp_path)
        histories.append(run.step)
        run.finish()
        histories.append(read_run(tmp_path, run.id).history)
    assert histories[:2] == histories[2:]
    assert {"loss": "1", "accuracy": "1"} in [
        {key: str(value) for key, value in row.items()} for _, row in histories[3]
    ]


def test_damage_is_found(start, tmp_path):
    """A file that is not what W&B has noted is refused, one that is gone is named; nothing is left behind."""
    run = start()
    log(active_store(), MANIFEST, [1, 2], tmp_path)
    run.finish()
    assert files_of(run, tmp_path)
    folder = f"{run.settings.sync_dir}/memtrack/packs"
    store = open_store(f"{run.settings.sync_dir}/model/step-00000040")[0]
    with open(f"{folder}/{1:024x}.mtz", "r+b") as file:
        file.write(b"damaged")
    os.unlink(f"{folder}/{2:024x}.mtz")
    with pytest.raises(ArtifactFormatError, match="MD5"):
        store.get(f"{PACKS}{1:024x}.mtz", str(tmp_path / "back"))
    with pytest.raises(ArtifactNotFoundError, match=f"{2:024x}"):
        store.get(f"{PACKS}{2:024x}.mtz", str(tmp_path / "back"))
    assert not (tmp_path / "back").exists()


def test_a_folder_that_was_moved_and_what_was_never_noted(start, tmp_path):
    """The folder is restored from wherever it is, also what a kill has kept W&B from noting."""
    run = start()
    log(active_store(), MANIFEST, [1], tmp_path)
    run.finish()
    assert files_of(run, tmp_path)
    moved = tmp_path / "moved"
    shutil.move(run.settings.sync_dir, moved)
    for content in ("whole", "torn"):
        store = open_store(f"{moved}/model/step-00000040")[0]
        for name in (MANIFEST, f"{PACKS}{1:024x}.mtz"):
            store.get(name, str(tmp_path / content))
        assert (tmp_path / content).read_bytes() == b"1" * 1000
        (moved / f"run-{run.id}.wandb").write_bytes(b"")


def test_a_resumed_run_finds_the_packs_of_its_first_part(start, tmp_path):
    """W&B makes a new folder when a run is resumed: a version there has packs of the older one."""
    run = start(id="again")
    log(active_store(), MANIFEST, [1], tmp_path)
    run.finish()
    again = start(id="again", resume="allow")
    store = active_store()
    assert store.key == "wandb:again"
    assert f"{PACKS}{1:024x}.mtz" in store.names()
    path = f"{run.settings.sync_dir}/memtrack/packs/{1:024x}.mtz"
    packs = {f"{PACKS}{1:024x}.mtz": Pack(1000, md5_of(path), "")}
    (tmp_path / "made.mtz").write_bytes(b"second")
    store.commit(
        str(tmp_path / "made.mtz"), "memtrack/model/step-00000080.mtz", md5_of(str(tmp_path / "made.mtz")), packs
    )
    with pytest.raises(RejectedError, match="log it again without a base"):
        store.commit(
            str(tmp_path / "made.mtz"),
            MANIFEST,
            md5_of(str(tmp_path / "made.mtz")),
            {f"{PACKS}{7:024x}.mtz": Pack(1, "00", "")},
        )
    again.finish()
    restored = open_store(f"{again.settings.sync_dir}/model/step-00000080")[0]
    restored.get(f"{PACKS}{1:024x}.mtz", str(tmp_path / "back"))
    assert (tmp_path / "back").read_bytes() == b"1" * 1000


def test_where_wandb_has_other_digests(start, tmp_path, monkeypatch):
    """An MD5 is not passed off as a digest of another kind: W&B computes that itself, and all comes back."""
    run = start()
    monkeypatch.setattr(wandb, "Artifact", functools.partial(wandb.Artifact, digest_algorithm="XXH128"))
    log(active_store(), MANIFEST, [1], tmp_path)
    run.finish()
    (record,) = read_run(tmp_path, run.id).of("artifact")
    digests = {one["digest"] for one in record["manifest"]["contents"]}
    assert b64encode(bytes.fromhex(md5_of(str(tmp_path / "made.mtz")))).decode() not in digests
    open_store(f"{run.settings.sync_dir}/x")[0].get(MANIFEST, str(tmp_path / "back"))
    assert (tmp_path / "back").read_bytes() == b"manifest"


def test_runs_that_are_over_or_disabled(start, tmp_path):
    """A finished run takes nothing, a disabled one has no store."""
    run = start()
    store = active_store()
    assert active_store in registry.load_active_stores("wandb")
    run.finish()
    assert active_store() is None
    (tmp_path / "x").write_bytes(b"x")
    with pytest.raises(RejectedError, match="finished"):
        store.put(str(tmp_path / "x"), MANIFEST, "")
    start(mode="disabled")
    assert active_store() is None
    assert registry.load_store("wandb") is open_store


@pytest.mark.parametrize("reference", ["", "/", "a/b/c/d", "/tmp/offline-run-none/x", "../x", "a//b", "a/b/"])
def test_references(reference):
    """What is neither an artifact of W&B's nor in a folder of a run is refused, with both ways to name one."""
    with pytest.raises(SettingsError, match="wandb:ENTITY/PROJECT/NAME:VERSION"):
        open_store(reference)


def test_no_server(monkeypatch):
    """Without a key W&B's server cannot be asked, which is said."""
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    with pytest.raises(DeliveryError, match="W&B does not give out"):
        open_store("entity/project/name:v1")


def test_names():
    """A name keeps to W&B's alphabet and length, and different names stay different."""
    assert artifact_of("r1", "memtrack/model.mtz") == ("run-r1-model", ["latest"])
    assert artifact_of("r1", "memtrack/a b/step-00000007.mtz")[1] == ["latest", "step-7"]
    names = [artifact_of("r1", f"memtrack/{name}.mtz")[0] for name in ("a b", "a-b", "a/b", "ü" * 200, "ü" * 201)]
    assert len({*names}) == 5
    for name in names:
        assert len(wandb.Artifact(name, type="memtrack").name) <= 128
