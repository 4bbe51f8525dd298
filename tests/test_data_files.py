"""Data files: what is read, what is inferred and said, and what is refused."""

import errno
import gzip
import os
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import hesscli
from hesscli.errors import (
    FileError,
    HesscliError,
    MismatchError,
    NumericalError,
    ResourceError,
    UsageError,
)
from hesscli.files import arrow_files, npy
from hesscli.files.arrays import load_arrays
from hesscli.files.data import load_data
from hesscli.files.digest import sha256
from hesscli.files.sniff import Kind
from hesscli.files.torch_files import reading
from hesscli.files.unusable import DECIMALS

X = np.arange(6, dtype=np.float32).reshape(3, 2)
Y = np.array([0, 1, 1])


def refused(error: type[HesscliError], path: object, **options: object) -> HesscliError:
    with pytest.raises(error) as caught:
        load_data(path, **options)
    assert "\n" not in caught.value.message
    return caught.value


def save(path, arrays, form):
    if form == "npz":
        with open(path, "wb") as file:
            np.savez(file, **arrays)
        return
    tensors = {name: torch.from_numpy(np.asarray(a)) for name, a in arrays.items()}
    if form == "safetensors":
        save_file(tensors, path)
    else:
        torch.save(tensors, path, _use_new_zipfile_serialization=form == "pt")


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("form", ["npz", "safetensors", "pt", "legacy"])
def test_every_form_gives_the_same(tmp_path, form):
    path = tmp_path / "data"
    save(path, {"x": X, "y": Y, "class_weights": np.ones(2)}, form)
    data = load_data(path)
    assert torch.equal(data.inputs["x"], torch.from_numpy(X))
    assert data.targets is not None
    assert data.targets[0] == "y"
    assert torch.equal(data.targets[1], torch.from_numpy(Y))
    assert set(data.arrays) == {"x", "y", "class_weights"}
    assert (data.samples, len(data.sha256), list(data.inputs)) == (3, 64, ["x"])
    assert data.notes == (
        "inputs: x (float32 [3, 2]), inferred from its name",
        "targets: y (int64 [3]), inferred from its name",
    )


@pytest.mark.parametrize("pair", [tuple, list])
def test_a_pair_of_tensors(tmp_path, pair):
    torch.save(pair([torch.from_numpy(X), torch.from_numpy(Y)]), tmp_path / "data")
    data = load_data(tmp_path / "data")
    assert list(data.arrays) == ["inputs", "targets"]
    assert data.samples == 3


# --- which array is which ---------------------------------------------------------------------


@pytest.mark.parametrize("inputs", ["x", "X", "input", "inputs", "data", "images", "features"])
@pytest.mark.parametrize("targets", ["y", "Y", "target", "targets", "label", "labels"])
def test_known_names(tmp_path, inputs, targets):
    np.savez(tmp_path / "d.npz", **{targets: Y, inputs: X, "other": X, "more": X})
    data = load_data(tmp_path / "d.npz")
    assert list(data.inputs) == [inputs]
    assert data.targets is not None
    assert data.targets[0] == targets


@pytest.mark.parametrize(
    ("names", "options", "inputs", "targets"),
    [
        ("x foo", {}, ["x"], "foo"),
        ("foo y", {}, ["foo"], "y"),
        ("x", {}, ["x"], None),
        ("x foo bar", {}, ["x"], None),
        ("a b", {"inputs": ["b"]}, ["b"], "a"),
        ("a b", {"targets": "a"}, ["b"], "a"),
        ("a b c", {"inputs": ["c", "a"]}, ["c", "a"], None),
        ("a y c", {"inputs": ["c", "a"]}, ["c", "a"], "y"),
        ("x y label", {"targets": "label"}, ["x"], "label"),
        ("x data y", {"inputs": ["data"]}, ["data"], "y"),
        ("x", {"inputs": ["x"], "targets": "x"}, ["x"], "x"),
    ],
)
def test_inference(tmp_path, names, options, inputs, targets):
    np.savez(tmp_path / "d.npz", **dict.fromkeys(names.split(), X))
    data = load_data(tmp_path / "d.npz", **options)
    assert list(data.inputs) == inputs
    assert (data.targets[0] if data.targets else None) == targets
    named = len(options.get("inputs", ())) > 0, options.get("targets") is not None
    expected = (not named[0]) + (targets is not None and not named[1])
    left = [f"{n} (float32 [3, 2])" for n in names.split() if n not in (*inputs, targets)]
    unused = [f"not used: {', '.join(left)}"] if left and not named[0] else []
    assert len(data.notes) == expected + len(unused)
    assert list(data.notes[expected:]) == unused


def test_arrays_that_are_not_used(tmp_path):
    """Those with an entry for each sample, that nothing else takes."""
    mask, scale = np.ones(3, bool), np.float32(1)
    np.savez(tmp_path / "d.npz", x=X, y=Y, mask=mask, weight=mask, x_test=np.ones((2, 2)), s=scale)
    notes = load_data(tmp_path / "d.npz", others=["weight"]).notes
    assert notes[2:] == ("not used: mask (bool [3])",)


def test_columns_that_are_not_used(tmp_path):
    columns = {"ids": [[1, 2], [3, 4]], "mask": [[1, 0], [1, 1]], "types": [[0, 0], [0, 1]]}
    table = pa.table(columns | {"label": [0, 1], "__index_level_0__": [0, 1]})
    pq.write_table(table, tmp_path / "d.parquet")
    data = load_data(tmp_path / "d.parquet", model_names=["ids", "mask"])
    assert list(data.inputs) == ["ids", "mask"]
    assert data.notes[2:] == ("not used: types (int64 [2, 2])",)


def test_the_only_other_array_is_said_to_be(tmp_path):
    np.savez(tmp_path / "d.npz", x=X, foo=X)
    assert load_data(tmp_path / "d.npz").notes[1] == (
        "targets: foo (float32 [3, 2]), inferred as the only other array"
    )


@pytest.mark.parametrize(
    ("names", "options", "words", "hint"),
    [
        ("a b", {}, "the names do not tell the inputs", "--inputs a --targets b"),
        ("a", {}, "the names do not tell the inputs", "--inputs KEY --targets KEY"),
        ("y", {}, "the names do not tell the inputs", "--inputs KEY --targets KEY"),
        ("y label", {}, "the names do not tell the inputs", "--inputs KEY --targets KEY"),
        ("a b y", {}, "the names do not tell the inputs", "--inputs a --targets y"),
        ("a b c", {"targets": "a"}, "the names do not tell the inputs", "--inputs b --targets a"),
        ("x data y", {}, "x and data may all be the inputs", "--inputs x --targets y"),
        ("x y label", {}, "y and label may all be the targets", "--inputs x --targets label"),
        ("x y", {"inputs": ["z"]}, "no array of numbers is called z", "--inputs x"),
        ("x y", {"targets": "z"}, "no array of numbers is called z", "--targets y"),
    ],
)
def test_names_that_do_not_tell(tmp_path, monkeypatch, names, options, words, hint):
    monkeypatch.chdir(tmp_path)
    np.savez("d.npz", **dict.fromkeys(names.split(), X))
    error = refused(UsageError, "d.npz", **options)
    listed = ", ".join(f"{name} (float32 [3, 2])" for name in names.split())
    assert error.exit_code == 2
    assert error.message == f"d.npz: {words}; it holds {listed}"
    assert error.hint == hint


def test_an_array_named_twice(tmp_path):
    np.savez(tmp_path / "d.npz", x=X, y=Y)
    assert "twice" in refused(UsageError, tmp_path / "d.npz", inputs=["x", "x"]).message


# --- samples ----------------------------------------------------------------------------------


def test_unequal_numbers_of_samples(tmp_path):
    path = tmp_path / "d.npz"
    np.savez(path, x=X, y=Y[:2])
    error = refused(MismatchError, path)
    assert error.exit_code == 4
    assert "inputs x [3, 2] and targets y [2] differ in the number of samples" in error.message
    assert error.hint is None
    assert load_data(path, unbatched=True).samples == 1
    error = refused(MismatchError, path, inputs=["x", "y"])
    assert "inputs x [3, 2] and inputs y [2]" in error.message
    assert error.hint == "--unbatched"  # nodes and edges, say


def test_empty_lines_of_a_table_are_no_samples(tmp_path):
    (tmp_path / "d.csv").write_text("a,b,y\n\n1,2,0\n\n3,4,1\n\n")
    assert load_data(tmp_path / "d.csv").samples == 2


def test_no_samples(tmp_path):
    np.savez(tmp_path / "d.npz", x=X[:0], y=Y[:0])
    error = refused(MismatchError, tmp_path / "d.npz")
    assert "inputs x [0, 2] holds no samples" in error.message


def test_single_numbers(tmp_path):
    path = tmp_path / "d.npz"
    np.savez(path, x=np.float32(2), y=np.float32(1))
    error = refused(MismatchError, path)
    assert "a single number without an axis for samples" in error.message
    assert error.hint == "--unbatched"
    data = load_data(path, unbatched=True)
    assert data.inputs["x"].shape == ()
    assert data.samples == 1


@pytest.mark.parametrize("name", ["", "Unnamed: 0"])
def test_the_index_of_a_table_is_left_out(tmp_path, name):
    (tmp_path / "d.csv").write_text(f"{name},a,y\n0,1,2\n1,3,4\n")
    data = load_data(tmp_path / "d.csv")
    assert data.inputs["columns"].tolist() == [[1], [3]]
    assert f"column {name!r} left out: an index, by its name" in data.notes
    taken = load_data(tmp_path / "d.csv", inputs=(name, "a"))
    assert taken.inputs["columns"].tolist() == [[0, 1], [1, 3]]


@pytest.mark.parametrize("names", [("0", "1", "2"), ("1", "2", "3"), ("2019", "2020", "2021")])
@pytest.mark.parametrize("index", [False, True])
def test_numbers_that_are_names_of_columns(tmp_path, names, index):
    lines = [",".join(names), "1.5,2.5,3.5", "4.5,5,6"]
    if index:
        lines = [f"{field},{line}" for field, line in zip(("", "0", "1"), lines, strict=True)]
    (tmp_path / "d.csv").write_text("\n".join(lines))
    data = load_data(tmp_path / "d.csv", targets=names[2])
    assert data.inputs["columns"].tolist() == [[1.5, 2.5], [4.5, 5]]
    assert data.targets is not None
    assert data.targets[1].tolist() == [3.5, 6]
    first = f"the first line, {names[0]} to {names[2]}, is taken as the names of the columns"
    assert data.notes[0] == first
    assert ("column '' left out: an index, by its name" in data.notes) == index


@pytest.mark.parametrize(
    ("first", "below", "name", "samples"),
    [("0,1,2", "7,8,9", "1", 1), ("1,2,3", "7,8,9", "0", 2), ("1,2,3", "red,8,9", "2", 1)],
)
def test_a_first_line_over_columns_of_integers(tmp_path, first, below, name, samples):
    """Ids of words may begin with 1, 2, 3, where all are integers; the names that pandas gives begin with 0."""
    (tmp_path / "d.csv").write_text(f"{first}\n{below}\n")
    assert load_data(tmp_path / "d.csv", inputs=(name,), targets="2").samples == samples


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("0,1,3", "0.5,1.5,2.5"),
        ("1,0,1,2", "0.5,1.5,2.5,3.5"),
        ("0,1", "0.5,1.5"),
        ("2019,2021,2023", "0.5,1.5,2.5"),
        ("2,1,0", "0.5,1.5,2.5"),
        ("-1,0,1", "0.5,1.5,2.5"),
        ("0.0,1.0,2.0", "0.5,1.5,2.5"),
    ],
)
def test_a_first_line_of_numbers_is_a_sample(tmp_path, first, second):
    (tmp_path / "d.csv").write_text(f"{first}\n0,{second.partition(',')[2]}\n{second}\n")
    data = load_data(tmp_path / "d.csv", inputs=("1",), targets="1")
    values = [float(line.split(",")[1]) for line in (first, second, second)]
    assert data.inputs["columns"].flatten().tolist() == values
    last = first.count(",")
    assert f"no line of names: the columns are called 0 to {last}" in data.notes


def test_a_series_of_pandas(tmp_path):
    (tmp_path / "d.csv").write_text(",0\n0,1.5\n1,2.5\n")
    data = load_data(tmp_path / "d.csv", inputs=("0",))
    assert data.inputs["columns"].tolist() == [[1.5], [2.5]]


def test_a_single_column_of_numbers_has_no_name(tmp_path):
    (tmp_path / "d.csv").write_text("0\n1\n")
    data = load_data(tmp_path / "d.csv")
    assert data.inputs["columns"].tolist() == [[0], [1]]
    assert data.notes[0] == "no line of names: the column is called 0"


def test_a_table_of_many_columns(tmp_path):
    count = 20_000
    names, values = (f"gene{i}" for i in range(count)), ("1" for _ in range(count))
    (tmp_path / "d.csv").write_text(f"{','.join(names)}\n{','.join(values)}\n")
    data = load_data(tmp_path / "d.csv", targets="gene0")
    assert data.inputs["columns"].shape == (1, count - 1)


# --- values and types -------------------------------------------------------------------------


def test_integers_of_a_table_may_be_negative(tmp_path):
    """As the classes are that a loss ignores."""
    (tmp_path / "d.csv").write_text("a,y\n1,0\n2,-100\n3,+1\n")
    data = load_data(tmp_path / "d.csv")
    assert data.targets is not None
    assert data.targets[1].dtype is torch.int64
    assert data.targets[1].tolist() == [0, -100, 1]


def test_integers_of_a_table_beyond_all_numbers(tmp_path):
    (tmp_path / "d.csv").write_text(f"a,y\n{'9' * 400},0\n3,1\n")
    name, found = load_data(tmp_path / "d.csv").not_finite()
    assert name == "a"
    assert "NaN or infinity in 1 place, the first at [0]" in found


def test_truth_values_of_a_table_are_classes(tmp_path):
    (tmp_path / "d.csv").write_text("a,y\n1,True\n2,FALSE\n")
    assert load_data(tmp_path / "d.csv").targets[1].tolist() == [True, False]
    assert load_data(tmp_path / "d.csv").targets[1].dtype is torch.bool


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite(tmp_path, value):
    arrays = {"x": X.copy(), "y": np.ones((3, 2), np.float16), "unused": np.array([value])}
    np.savez(tmp_path / "d.npz", **arrays)
    assert load_data(tmp_path / "d.npz").not_finite() is None
    arrays["x"][1, 0] = value
    np.savez(tmp_path / "d.npz", **arrays)
    with pytest.raises(NumericalError) as caught:
        hesscli.compute(nn.Linear(2, 2), tmp_path / "d.npz", loss="mse")
    error = caught.value
    assert error.exit_code == 5
    assert "array x (" in error.message
    assert "holds NaN or infinity in 1 place, the first at [1, 0]" in error.message
    assert "np.nan_to_num(x)" in error.hint


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("stored", "loaded"),
    [
        ("<f4", torch.float32),
        (">f4", torch.float32),
        (">f8", torch.float64),
        ("f2", torch.float16),
        ("u1", torch.uint8),
        ("i1", torch.int8),
        (">i4", torch.int32),
        ("i8", torch.int64),
        ("?", torch.bool),
        (">u2", torch.int64),
        ("u4", torch.int64),
        ("u8", torch.int64),
        ("c8", torch.complex64),
    ],
)
@pytest.mark.parametrize("order", ["C", "F"])
def test_types(tmp_path, stored, loaded, order):
    array = np.asarray(np.arange(6).reshape(3, 2) % 2, dtype=stored, order=order)
    np.savez(tmp_path / "d.npz", x=array, y=Y)
    x = load_data(tmp_path / "d.npz").inputs["x"]
    assert x.dtype is loaded
    assert np.array_equal(x.numpy(), array)


@pytest.mark.parametrize("stored", [torch.uint8, torch.int8, torch.bool])
def test_small_types_of_torch(tmp_path, stored):
    torch.save({"x": torch.ones(3, 2, dtype=stored), "y": torch.from_numpy(Y)}, tmp_path / "d")
    assert load_data(tmp_path / "d").inputs["x"].dtype is stored


@pytest.mark.parametrize("stored", [torch.uint16, torch.uint32, torch.uint64])
def test_unsigned_integers_of_torch(tmp_path, stored):
    """torch can neither index with them nor compute on them."""
    torch.save(
        {"x": torch.from_numpy(X), "y": torch.tensor([0, 1, 1], dtype=stored)}, tmp_path / "d"
    )
    _, y = load_data(tmp_path / "d").targets
    assert torch.equal(y, torch.tensor([0, 1, 1]))


def test_an_empty_array_has_its_type(tmp_path):
    save_file({"x": torch.zeros(0, 2, dtype=torch.int32)}, tmp_path / "d")
    x = load_arrays(tmp_path / "d").numbers["x"]
    assert (x.dtype, x.shape) == (torch.int32, (0, 2))


def test_a_type_to_convert_for_which_there_is_no_memory(tmp_path, monkeypatch):
    np.savez(tmp_path / "d.npz", x=X.astype(">f4"), y=Y)
    monkeypatch.setattr(npy, "available_memory", lambda: X.nbytes - 1)
    error = refused(ResourceError, tmp_path / "d.npz")
    assert "its float32 must be converted in memory, which does not suffice" in error.message


def test_bfloat16(tmp_path):
    save_file({"x": torch.ones(2, 3, dtype=torch.bfloat16)}, tmp_path / "d")
    assert load_data(tmp_path / "d").inputs["x"].dtype is torch.bfloat16


def test_gradients_do_not_come_along(tmp_path):
    torch.save({"x": torch.ones(2, 3, requires_grad=True).t()}, tmp_path / "d")
    x = load_data(tmp_path / "d").inputs["x"]
    assert not x.requires_grad


def test_arrays_that_are_not_numbers_are_skipped_and_said(tmp_path):
    names = np.array(["a", "b"])
    np.savez(tmp_path / "d.npz", x=X, y=Y, names=names, big=np.array([2**64 - 1], np.uint64))
    data = load_data(tmp_path / "d.npz")
    assert set(data.arrays) == {"x", "y"}
    assert data.notes[:2] == (
        "array names skipped: not numbers (str32)",
        "array big skipped: integers too large for int64",
    )
    error = refused(UsageError, tmp_path / "d.npz", inputs=["names"])
    assert "no array of numbers is called names; it holds x (" in error.message
    assert "; array names skipped: not numbers (str32); array big skipped: " in error.message
    torch.save({"x": torch.ones(2), "epoch": 3}, tmp_path / "d.pt")
    assert load_data(tmp_path / "d.pt").notes[0] == "array epoch skipped: not a tensor (int)"
    with zipfile.ZipFile(tmp_path / "d.npz", "a") as archive:
        archive.writestr("README", "about them")
    assert "array README skipped: not numbers (a file)" in load_data(tmp_path / "d.npz").notes
    with zipfile.ZipFile(tmp_path / "d.npz", "a") as archive:
        archive.writestr("x", "once more")
    assert "holds two arrays called x" in refused(FileError, tmp_path / "d.npz").message


@pytest.mark.parametrize("stored", [np.longdouble, np.clongdouble])
def test_numbers_wider_than_those_of_torch(tmp_path, stored):
    np.savez(tmp_path / "d.npz", x=X, y=Y, wide=np.ones(3, stored))
    name = np.dtype(stored).name
    note = f"array wide skipped: wider than any torch number ({name})"
    assert load_data(tmp_path / "d.npz").notes[0] == note


def test_numbers_that_nothing_computes_with(tmp_path):
    save_file({"x": torch.ones(3, 2).to(torch.float8_e4m3fn), "y": torch.ones(3)}, tmp_path / "d")
    message = refused(UsageError, tmp_path / "d").message
    assert message.endswith("array x skipped: of a type that nothing computes with (F8_E4M3)")


@pytest.mark.parametrize(
    ("x", "why"),
    [
        (torch.ones(3, 2).to_sparse(), "sparse, nested or quantised"),
        (
            torch.quantize_per_tensor(torch.ones(3, 2), 1.0, 0, torch.quint8),
            "sparse, nested or quantised",
        ),
        pytest.param(
            torch.nested.nested_tensor([torch.ones(2), torch.ones(1)]),
            "sparse, nested or quantised",
            marks=pytest.mark.skipif(
                torch.__version__ >= (2, 15), reason="PyTorch does not read it"
            ),
        ),
        (torch.ones(3, 2, device="meta"), "on the meta device, which holds no values"),
        *(
            (
                torch.ones(3, 2).to(getattr(torch, name)),
                f"of a type that nothing computes with ({name})",
            )
            for name in ("float8_e4m3fn", "float8_e5m2", "float8_e8m0fnu")
        ),
        (
            torch.zeros(3, 2, dtype=torch.uint8).view(torch.float4_e2m1fn_x2),
            "of a type that nothing computes with (float4_e2m1fn_x2)",
        ),
    ],
)
def test_inputs_that_are_skipped(tmp_path, monkeypatch, x, why):
    monkeypatch.chdir(tmp_path)
    torch.save({"x": x, "y": torch.from_numpy(Y)}, "d.pt")
    error = refused(UsageError, "d.pt")
    said = "d.pt: the names do not tell the inputs; it holds y (int64 [3]); array x skipped: "
    assert error.message == said + why


def test_nested_tensors_that_pytorch_does_not_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refuses = "Unsupported global: GLOBAL torch._utils._rebuild_nested_tensor was not allowed"

    def load(*_args: object, **_keywords: object) -> None:
        raise pickle.UnpicklingError(f"Weights only load failed.\n{refuses}")

    torch.save({"x": torch.ones(3, 2), "y": torch.from_numpy(Y)}, "d.pt")
    monkeypatch.setattr(torch, "load", load)
    error = refused(FileError, "d.pt")
    assert error.message == "d.pt: holds a nested tensor; expected dense ones"
    assert error.hint == "torch.nested.to_padded_tensor(nested, 0.0)"


def test_inputs_are_not_taken_for_targets(tmp_path):
    np.save(tmp_path / "x.npy", X)
    assert refused(UsageError, tmp_path / "x.npy", targets="y").hint == "--targets KEY"


@pytest.mark.parametrize(
    ("field", "why"), [("1,5", "numbers with decimal commas"), ("1_5", "not numbers")]
)
def test_columns_that_are_skipped(tmp_path, field, why):
    (tmp_path / "d.csv").write_text(f"a;y\n{field};0\n2;1\n")
    message = refused(UsageError, tmp_path / "d.csv").message
    assert message.endswith(f"; array a skipped: {why} ({field!r} in line 2)")


def test_a_first_line_of_numbers_over_words(tmp_path):
    (tmp_path / "d.csv").write_text("1,2\n3,a\n")
    message = refused(UsageError, tmp_path / "d.csv", targets="0").message
    assert message.endswith("; array 1 skipped: not numbers ('a' in line 2)")


@pytest.mark.parametrize("kind", [pa.list_, pa.large_list, lambda value: pa.list_(value, 2)])
def test_columns_of_lists(tmp_path, kind):
    x = pa.array(X.tolist(), kind(pa.float32()))
    pq.write_table(pa.table({"x": x, "y": Y}), tmp_path / "d.parquet")
    assert torch.equal(load_data(tmp_path / "d.parquet").inputs["x"], torch.from_numpy(X))


def test_columns_of_one_name(tmp_path):
    pq.write_table(pa.table([[1.0], [2.0], [0]], ["a", "a", "y"]), tmp_path / "d.parquet")
    message = refused(FileError, tmp_path / "d.parquet").message
    assert message.endswith("two columns are called 'a'")


def _write_arrow(path, table, parts):
    with pa.ipc.new_file(path, table.schema) as file:
        for _ in range(parts):
            file.write(table)


def test_a_table_in_one_part_takes_no_memory(tmp_path, monkeypatch):
    _write_arrow(tmp_path / "d", pa.table({"a": np.ones(4), "y": np.ones(4)}), 1)
    monkeypatch.setattr(arrow_files, "available_memory", lambda: 0)
    assert load_data(tmp_path / "d").samples == 4


@pytest.mark.parametrize(("parts", "free"), [(1, 20), (2, 60)])
def test_a_table_for_which_there_is_no_memory(tmp_path, monkeypatch, parts, free):
    """To unpack it; or, where it is mapped, to join the parts of its largest column."""
    table = pa.table({"a": np.ones(4), "y": np.ones(4)})
    if parts == 1:
        pq.write_table(table, tmp_path / "d")
    else:
        _write_arrow(tmp_path / "d", table, parts)
    monkeypatch.setattr(arrow_files, "available_memory", lambda: free)
    words = refused(ResourceError, tmp_path / "d").message
    assert words.endswith(f"bytes; {free} bytes of memory are free")
    monkeypatch.setattr(arrow_files, "available_memory", lambda: 1000)
    assert load_data(tmp_path / "d").samples == 4 * parts


WORDS = "classes are whole numbers from 0 on: table.y = table.y.astype('category').cat.codes"
ROWS = "drop these samples: table = table.dropna(subset=['y'])"


@pytest.mark.parametrize(
    ("y", "why", "hint"),
    [
        (pa.array(["a", "b"]), "not numbers (string)", WORDS),
        (pa.array(["a", "b"], pa.large_string()), "not numbers (large_string)", WORDS),
        (pa.array(["a", "b"]).dictionary_encode(), "not numbers (dictionary<", WORDS),
        (pa.array([[1, 2], None]), "missing in 1 of 2 places", ROWS),
        (pa.array([[1], [2, 3]]), "rows of different lengths: pad them", None),
        (pa.array([0, 1], pa.timestamp("ms")), "not numbers (timestamp[ms])", None),
    ],
)
def test_targets_that_cannot_be_used(tmp_path, y, why, hint):
    pq.write_table(pa.table({"a": [1.0, 2.0], "y": y}), tmp_path / "d.parquet")
    for targets in (None, "y"):
        error = refused(FileError, tmp_path / "d.parquet", targets=targets)
        assert f"d.parquet: the targets y are {why}" in error.message
        assert error.hint == hint


@pytest.mark.parametrize("kind", [pa.float32(), pa.int64(), pa.bool_()])
def test_what_is_missing_is_nan(tmp_path, kind):
    """As in a `.csv`: a model, or a loss of one's own, may know what is missing."""
    table = pa.table({"a": [1.0, 2.0], "y": pa.array([1, None], pa.int8()).cast(kind)})
    pq.write_table(table, tmp_path / "d.parquet")
    (tmp_path / "d.csv").write_text("a,y\n1,1\n2,\n")
    for name in ("d.parquet", "d.csv"):
        _, targets = load_data(tmp_path / name, targets="y").targets
        assert targets[0] == 1
        assert targets[1].isnan()
        column, found = load_data(tmp_path / name, inputs=["y"], targets="a").not_finite()
        assert column == "y"
        assert "NaN or infinity in 1 place, the first at [1" in found


@pytest.mark.parametrize(
    ("y", "why", "hint"),
    [
        *((word, "not numbers", WORDS) for word in ("cat", "it's", ">50K")),
        ("1/5", "not numbers", None),
        ("1,5", "numbers with decimal commas", DECIMALS),
    ],
)
def test_fields_of_targets_that_are_not_numbers(tmp_path, y, why, hint):
    (tmp_path / "d.csv").write_text(f"a;y\n1;{y}\n2;{y}\n")
    error = refused(FileError, tmp_path / "d.csv")
    assert f"the targets y are {why} ({y!r} in line 2)" in error.message
    assert error.hint == hint


# --- refusals ---------------------------------------------------------------------------------


def test_object_arrays(tmp_path):
    np.savez(tmp_path / "d.npz", x=np.array([[1], [2, 3]], dtype=object), y=Y)
    error = refused(FileError, tmp_path / "d.npz")
    assert error.exit_code == 3
    assert "array x holds Python objects, which run code when loaded" in error.message
    assert "dtype=float" in error.hint


def test_pickled_objects(tmp_path):
    torch.save({"x": nn.Linear(1, 1)}, tmp_path / "d.pt")
    error = refused(FileError, tmp_path / "d.pt")
    assert "(torch.nn.modules.linear.Linear), which run code when loaded" in error.message
    assert error.hint == "torch.save({'x': x, 'y': y}, 'data.pt')"


@pytest.mark.parametrize("content", [[torch.ones(1)] * 3, torch.ones(2), "text"])
def test_other_contents(tmp_path, content):
    torch.save(content, tmp_path / "d.pt")
    error = refused(FileError, tmp_path / "d.pt")
    assert "expected a dict or a pair of tensors" in error.message
    assert error.hint == "torch.save({'x': x, 'y': y}, 'data.pt')"


def test_files_without_arrays(tmp_path):
    np.savez(tmp_path / "empty.npz")
    np.savez(tmp_path / "text.npz", x=np.array(["a"]))
    assert "holds no numeric arrays" in refused(FileError, tmp_path / "empty.npz").message
    assert "array x skipped: not numbers" in refused(FileError, tmp_path / "text.npz").message


def test_an_input_without_arrays(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.savez("data.npz", x=np.ones((2, 3)))
    with open("e.npy", "wb") as file:
        np.savez(file)
    assert "e.npy: holds no arrays" in str(refused(UsageError, "data.npz", inputs=["e.npy"]))


def test_a_folder_of_arrays_with_something_else(tmp_path):
    np.save(tmp_path / "x.npy", X)
    (tmp_path / "y.npy").write_text("0,1,1")
    error = refused(FileError, tmp_path)
    assert error.message.endswith("y.npy: a text file; expected an npy array")


def test_without_pyarrow(tmp_path, monkeypatch):
    pq.write_table(pa.table({"x": [1.0], "y": [0]}), tmp_path / "d")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    error = refused(UsageError, tmp_path / "d")
    assert "d: reading it needs pyarrow: " in error.message
    assert error.hint == "pip install --upgrade pyarrow numpy"


def test_with_a_pyarrow_that_refuses_what_is_installed(tmp_path, monkeypatch):
    pq.write_table(pa.table({"x": [1.0], "y": [0]}), tmp_path / "d")
    reason = "pyarrow requires NumPy 2.0 or newer, found 1.26.0"
    (tmp_path / "pyarrow.py").write_text(f"raise ImportError({reason!r})")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "pyarrow")
    error = refused(UsageError, tmp_path / "d")
    assert error.message.endswith(f"d: reading it needs pyarrow: {reason}")
    assert error.hint == "pip install --upgrade pyarrow numpy"


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes."),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_file_for_which_there_is_no_memory(tmp_path, monkeypatch, error):
    def load(*_args, **_keywords):
        raise error

    torch.save({"x": torch.ones(2)}, tmp_path / "d")
    monkeypatch.setattr(torch, "load", load)
    message = refused(ResourceError, tmp_path / "d").message
    assert message.endswith("d: not enough memory to load it")


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (RuntimeError("\n  first:\nsecond"), "first"),
        (KeyError("k" * 300), f"KeyError: '{'k' * 196}..."),
        (EOFError("x"), "it is damaged or cut off"),
        (ValueError(""), "it is damaged or cut off"),
    ],
)
def test_what_a_reader_raises_is_one_line(error, said):
    with pytest.raises(FileError) as caught, reading("d", Kind.NPY):
        raise error
    assert caught.value.message == f"d: an npy array that cannot be read: {said}"


def test_a_digest_of_what_cannot_be_read(tmp_path):
    with pytest.raises(FileError, match="cannot be read: Is a directory"):
        sha256(tmp_path)


def test_other_kinds(tmp_path):
    torch.jit.script(nn.Linear(2, 2)).save(str(tmp_path / "net.pt"))
    error = refused(FileError, tmp_path / "net.pt")
    assert error.hint == "the data comes second: hesscli compute MODEL DATA"
    torch.export.save(
        torch.export.export(nn.Linear(2, 2), (torch.ones(1, 2),)), tmp_path / "net.pt2"
    )
    (tmp_path / "net.onnx").write_bytes(b"\x08\x07\x12\x07pytorch")
    (tmp_path / "folder").mkdir()
    save_file({"w": torch.ones(2)}, tmp_path / "folder" / "model.safetensors")
    for name in ("net.pt2", "net.onnx", "folder"):
        assert refused(FileError, tmp_path / name).hint == error.hint
    (tmp_path / "d.txt").write_text("one,two\nthree,four\n")
    assert "a text file; expected data as .npz" in refused(FileError, tmp_path / "d.txt").message
    os.mkfifo(tmp_path / "pipe")
    assert "not a regular file" in refused(FileError, tmp_path / "pipe").message
    assert refused(UsageError, tmp_path / "no.npz").message.endswith("no.npz: no such file")


@pytest.mark.parametrize("form", ["npz", "safetensors", "pt", "legacy"])
@pytest.mark.parametrize("part", [0.1, 0.5, 0.8, 0.98])
def test_files_cut_off(tmp_path, form, part):
    path = tmp_path / "data"
    save(path, {"x": np.ones((50, 3)), "y": np.ones(50)}, form)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * part)])
    error = refused(FileError, path)
    assert error.exit_code == 3
    assert "cut off" in error.message


@pytest.mark.parametrize("rows", [50, 100_000])
@pytest.mark.parametrize("form", ["npz", "pt"])
def test_flipped_bits(tmp_path, form, rows):
    path = tmp_path / "data"
    save(path, {"x": np.full((rows, 3), 1.5), "y": np.ones(rows)}, form)
    content = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        end = "data/0" if form == "pt" else "x.npy"
        member = next(m for m in archive.infolist() if m.filename.endswith(end))
    content[content.index(np.full(3, 1.5).tobytes(), member.header_offset)] ^= 1
    path.write_bytes(content)
    assert refused(FileError, path).message.endswith(f"{end} is not what was written")


def test_a_table_that_is_compressed_or_in_utf_16(cli, tmp_path):
    """The hint makes one that is read; a path with a blank is quoted."""
    torch.jit.script(torch.nn.Linear(2, 1)).save("m.pt")
    text = "a,b,y\n1,2,3.5\n4,5,6\n"
    Path("my t.csv.gz").write_bytes(gzip.compress(text.encode()))
    Path("u.csv").write_bytes(text.encode("utf-16"))
    for name, made in (("my t.csv.gz", "my t.csv.gz.unpacked"), ("u.csv", "u.csv.utf8")):
        ran = cli("compute", "m.pt", name)
        assert ran.code == 3
        subprocess.run(ran.hint, shell=True, check=True)
        assert Path(made).read_text().lstrip("\ufeff") == text
        assert cli("compute", "m.pt", made, "--targets", "y").code == 0
