"""Files of strangers: what is refused and by which words, and that every result of our own is read as it was saved."""

from __future__ import annotations

import io
import random
import time

import h5py
import numpy as np
import pytest
import xarray as xr

from mechhier import netcdf, results

SECRET = b"the secret of this machine, 0123456789 abcdef"


def _result() -> xr.Dataset:
    return xr.Dataset(
        {
            "score": (("layer", "word"), np.array([[1, np.nan], [3, 4]]), {"long_name": "score", "units": "accuracy"}),
            "nothing": (("layer", "none"), np.zeros((2, 0))),
            "whether": ("layer", [True, False]),
            "note": ("layer", ["long text", "é"]),
            "short": ("layer", ["", ""]),
            "alone": ((), np.nan),
            "small": ("layer", np.array([1, 2], np.int8)),
        },
        coords={"layer": [5, 6], "word": ["aa", "bbb"], "weights_hash": ("layer", ["p", "q"]), "seed": 7},
        attrs={"phenomenon": "none", "empty": "", "seed": 3, "share": 1.5, "parts": [1, 2]},
    )


def _tree() -> xr.DataTree:
    whole = _result()
    return xr.DataTree.from_dict(
        {
            "/": whole.drop_vars("nothing"),
            "/arm/induction": whole[["score", "note"]],
            "/b": xr.Dataset({"q": ("x", [1.0])}),
        }
    )


RESULTS = {
    "dataset": _result,
    "tree": _tree,
    "tree of a sweep": lambda: xr.DataTree.from_dict({"a/induction": _result(), "b/induction": _result()}),
    "empty": xr.Dataset,
    "dimensions alone": lambda: xr.Dataset(coords={"x": [1, 2]}),
    "dates": lambda: xr.Dataset({"t": ("x", np.array(["2020-01-01", "2021-01-01"], "datetime64[ns]"))}),
    "bytes": lambda: xr.Dataset({"t": ("x", np.array([b"ab", b"cde"]))}),
    "a dimension and a variable of one name": lambda: xr.Dataset({"x": (("y", "z"), np.eye(2)), "y": ("y", [1, 2])}),
}


@pytest.mark.parametrize("made", RESULTS.values(), ids=RESULTS)
def test_what_results_saves_is_read_as_xarray_reads_it(made, tmp_path):
    saved = results.save(made(), tmp_path / "r.nc")
    found = netcdf.read(saved.read_bytes(), "r.nc")
    if isinstance(found, xr.DataTree):
        expected = xr.load_datatree(saved, engine="h5netcdf")
        assert found.identical(expected)
        pairs = [(found[path].ds, expected[path].ds) for path in expected.groups]
    else:
        pairs = [(found, xr.load_dataset(saved, engine="h5netcdf"))]
    for one, other in pairs:
        xr.testing.assert_identical(one, other)
        assert list(one.variables) == list(other.variables)
        assert list(one.attrs) == list(other.attrs)
        assert {name: each.dtype.kind for name, each in one.variables.items()} == {
            name: "U" if each.dtype.kind == "O" else each.dtype.kind for name, each in other.variables.items()
        }


@pytest.mark.parametrize(
    "options",
    [
        {"encoding": {"score": {"zlib": True, "shuffle": True, "fletcher32": True}, "note": {"chunksizes": (1,)}}},
        {"unlimited_dims": ["layer"]},
    ],
)
def test_compressed_and_growing_files_are_read(options):
    buffer = io.BytesIO()
    _result().to_netcdf(buffer, engine="h5netcdf", **options)
    content = bytes(buffer.getbuffer())
    xr.testing.assert_identical(netcdf.read(content, "r.nc"), xr.load_dataset(io.BytesIO(content), engine="h5netcdf"))


def test_one_attribute_is_read_without_the_rest(tmp_path):
    content = results.save(_result(), tmp_path / "r.nc").read_bytes()
    assert netcdf.attribute(content, "r.nc", "phenomenon") == "none"
    assert netcdf.attribute(content, "r.nc", "seed") == 3
    assert netcdf.attribute(content, "r.nc", "share") == 1.5
    assert netcdf.attribute(content, "r.nc", "absent") is None
    with pytest.raises(
        netcdf.ForeignFileError, match=r"r\.nc has an attribute 'parts' that is neither text nor a number"
    ):
        netcdf.attribute(content, "r.nc", "parts")
    with pytest.raises(netcdf.ForeignFileError):
        netcdf.attribute(content[:100], "r.nc", "seed")


def _external_link(file, secret):
    file["stolen"] = h5py.ExternalLink(secret.with_suffix(".h5"), "data")


def _soft_link(file, secret):
    file["stolen"] = h5py.SoftLink("/score")


def _external_storage(file, secret):
    file.create_dataset("stolen", (len(SECRET),), "u1", external=[(str(secret), 0, len(SECRET))])


def _virtual(file, secret):
    layout = h5py.VirtualLayout((len(SECRET),), "u1")
    layout[:] = h5py.VirtualSource(secret.with_suffix(".h5"), "data", (len(SECRET),))
    file.create_virtual_dataset("stolen", layout)


def _growing_virtual(file, secret):
    layout = h5py.VirtualLayout((len(SECRET),), "u1", maxshape=(None,))
    source = h5py.VirtualSource(secret.with_suffix(".h5"), "data", (len(SECRET),), maxshape=(None,))
    layout[: h5py.h5s.UNLIMITED] = source[: h5py.h5s.UNLIMITED]
    file.create_virtual_dataset("stolen", layout)


def _cycle(file, secret):
    file.create_group("a")["again"] = file["/"]


def _two_names(file, secret):
    file["other"] = file["score"]


def _references(file, secret):
    file.create_dataset("refs", data=[file["score"].ref], dtype=h5py.ref_dtype)


def _regions(file, secret):
    file.create_dataset("refs", data=[file["score"].regionref[:1]], dtype=h5py.regionref_dtype)


def _reference_attribute(file, secret):
    file["score"].attrs["ref"] = file["layer"].ref


def _other_reference_list(file, secret):
    file["note"].attrs["REFERENCE_LIST"] = [1, 2]


def _records(file, secret):
    file["records"] = np.zeros(2, [("a", "i4"), ("b", "f8")])


def _lists(file, secret):
    file.create_dataset("lists", (2,), h5py.vlen_dtype(np.int32))


def _opaque(file, secret):
    file["opaque"] = np.zeros(2, "V8")


def _named_type(file, secret):
    file["kind"] = np.dtype("f8")


def _of_a_named_type(file, secret):
    file["kind"] = np.dtype("f8")
    file.create_dataset("a", (2,), file["kind"])
    del file["kind"]


def _filter(file, secret):
    file.create_dataset("filtered", data=np.zeros(100), chunks=(10,), compression="lzf")


def _twice_compressed(file, secret):
    created = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    created.set_chunk((100,))
    created.set_deflate(9)
    created.set_deflate(9)
    h5py.h5d.create(file.id, b"twice", h5py.h5t.NATIVE_DOUBLE, h5py.h5s.create_simple((100,)), created)


def _too_large(file, secret):
    file.create_dataset("large", (2**30,), "f8", chunks=(2**16,))


def _too_many_times(file, secret):
    file.create_dataset("zeros", (2**24,), "f8", chunks=(2**16,), compression="gzip")


def _large_by_parts(file, secret):
    for part in range(9):
        file.create_dataset(f"part{part}", (2**20,), "f8", chunks=(2**16,))


def _large_chunk(file, secret):
    file.create_dataset("chunk", (1,), "f8", chunks=(2**28,), maxshape=(None,))


def _shared_text(file, secret):
    file.create_dataset("text", data=["x" * 50_000] + ["y"] * 20_000, dtype=h5py.string_dtype())


def _unpacks_to_more(file, secret):
    import zlib

    packed = file.create_dataset("packed", (10,), "f8", chunks=(10,), compression="gzip")
    packed.id.write_direct_chunk((0,), zlib.compress(bytes(2**22)))


def _deep(file, secret):
    file.create_group("/".join("g" * (netcdf.MOST_LEVELS + 2)))


def _long_attributes(file, secret):
    for number in range(netcdf.MOST_ATTRIBUTE_BYTES // 2**20 + 1):
        file.attrs[f"a{number}"] = "x" * 2**20


def _no_shape(file, secret):
    file.create_dataset("void", data=h5py.Empty("f8"))


def _no_names(file, secret):
    file["plain"] = np.zeros(3)


HOSTILE = {
    _external_link: "'/stolen' is a link to another file",
    _soft_link: "'/stolen' is a link to another part",
    _external_storage: "'/stolen' is stored in another file",
    _virtual: "'/stolen' is a virtual array",
    _growing_virtual: "'/stolen' is a virtual array",
    _cycle: "'/a/again' is '/' under another name",
    _two_names: "'/score' is '/other' under another name|'/other' is '/score' under another name",
    _references: "'/refs' holds references",
    _regions: "'/refs' holds references",
    _reference_attribute: "'/score/@ref' holds references",
    _other_reference_list: "'/note' has an attribute 'REFERENCE_LIST' that is not netCDF's",
    _records: "'/records' holds records",
    _lists: "'/lists' holds lists",
    _opaque: "'/opaque' holds bytes",
    _named_type: "'/kind' is a type by itself",
    _of_a_named_type: "'/a' has a type that is stored by itself",
    _filter: r"'/filtered' has filters \[32000\]",
    _twice_compressed: r"'/twice' has filters \[1, 1\]",
    _too_large: "'/large' brings the arrays to more than 4096 MiB",
    _too_many_times: "'/zeros' brings the arrays to .* times the file's size, 128 MiB",
    _large_by_parts: "'/part7' brings the arrays to .* times the file's size, 64 MiB",
    _large_chunk: "'/chunk' brings the arrays to .* times",
    _shared_text: "'/text' brings the arrays to",
    _unpacks_to_more: "'/packed' unpacks to more than its shape holds",
    _deep: "lies in more than",
    _long_attributes: "brings the attributes to more than 64 MiB",
    _no_shape: "'/void' is an array without a shape",
}


@pytest.fixture
def hostile(tmp_path):
    """A result with something added, and a secret beside it."""
    secret = tmp_path / "secret.txt"
    secret.write_bytes(SECRET)
    with h5py.File(secret.with_suffix(".h5"), "w") as file:
        file["data"] = np.frombuffer(SECRET, "u1")

    def made(add):
        path = results.save(_result(), tmp_path / "hostile.nc")
        with h5py.File(path, "r+") as file:
            add(file, secret)
        return path.read_bytes()

    return made


@pytest.mark.parametrize(("add", "words"), HOSTILE.items(), ids=[add.__name__ for add in HOSTILE])
def test_a_hostile_file_is_refused_by_name_within_two_seconds(hostile, add, words):
    content, start = hostile(add), time.monotonic()
    for look in (netcdf.check, netcdf.read):
        with pytest.raises(netcdf.ForeignFileError, match=words) as error:
            look(content, "hostile.nc")
        message = str(error.value)
        assert message.startswith("hostile.nc")
        assert "results.save" in message
        assert "\n" not in message
        assert "secret" not in message
    assert time.monotonic() - start < 4


def test_an_array_without_dimensions_of_netcdf_is_refused_when_read(hostile):
    with pytest.raises(netcdf.ForeignFileError, match="'/plain' has a dimension without a name"):
        netcdf.read(hostile(_no_names), "hostile.nc")


def test_names_cannot_write_to_a_terminal(hostile):
    def add(file, _):
        file["\x1b[2J\nred"] = h5py.SoftLink("/score")

    with pytest.raises(netcdf.ForeignFileError) as error:
        netcdf.check(hostile(add), "hostile.nc")
    assert str(error.value).isprintable()


@pytest.mark.parametrize("bound", ["MOST_OBJECTS", "MOST_ATTRIBUTES"])
def test_groups_and_attributes_are_counted(monkeypatch, tmp_path, bound):
    content = results.save(_tree(), tmp_path / "r.nc").read_bytes()
    netcdf.check(content, "r.nc")
    monkeypatch.setattr(netcdf, bound, 10)
    with pytest.raises(netcdf.ForeignFileError, match="more than 10"):
        netcdf.check(content, "r.nc")


def test_an_array_that_was_never_written_shows_no_memory(tmp_path):
    path = results.save(_result(), tmp_path / "r.nc")
    with h5py.File(path, "r+") as file:
        created = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        created.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
        space = h5py.h5s.create_simple((2,))
        h5py.h5d.create(file.id, b"unwritten", h5py.h5t.NATIVE_INT64, space, created)
        file["unwritten"].dims[0].attach_scale(file["layer"])
    assert netcdf.read(path.read_bytes(), "r.nc")["unwritten"].values.tolist() == [0, 0]


def test_a_store_of_texts_without_sizes_is_refused_instead_of_read_without_end(tmp_path):
    content = bytearray(results.save(_result(), tmp_path / "r.nc").read_bytes())
    place = content.index(b"GCOL") + 16
    content[place : place + 64] = bytes(64)
    with pytest.raises(netcdf.ForeignFileError, match="store of texts"):
        netcdf.check(bytes(content), "r.nc")


def test_a_store_of_names_that_goes_round_is_refused_instead_of_read_without_end():
    buffer = io.BytesIO()
    with h5py.File(buffer, "w") as file:
        file.create_group("a")
    content = bytearray(buffer.getbuffer())
    place = content.index(b"HEAP\0")
    data = int.from_bytes(content[place + 24 : place + 32], "little")
    content[place + 16 : place + 24] = (16).to_bytes(8, "little")
    content[data + 16 : data + 32] = (16).to_bytes(8, "little") * 2
    with pytest.raises(netcdf.ForeignFileError, match="store of names"):
        netcdf.check(bytes(content), "r.nc")


def test_an_index_that_goes_round_is_refused_instead_of_read_without_end():
    buffer = io.BytesIO()
    with h5py.File(buffer, "w") as file:
        file["a"] = 1
    content = bytearray(buffer.getbuffer())
    place = content.index(b"TREE")
    content[place + 16 : place + 24] = place.to_bytes(8, "little")
    with pytest.raises(netcdf.ForeignFileError, match="its index"):
        netcdf.check(bytes(content), "r.nc")


@pytest.mark.parametrize("made", [_result, _tree])
def test_damaged_bytes_end_in_one_error(made, tmp_path):
    content = results.save(made(), tmp_path / "r.nc").read_bytes()
    drawn = random.Random(0)
    damaged = [b"", b"\x89HDF\r\n\x1a\n", drawn.randbytes(5000), content[:8] + drawn.randbytes(5000), SECRET]
    damaged += [content[: drawn.randrange(len(content))] for _ in range(20)]
    for _ in range(60):
        one = bytearray(content)
        for _ in range(drawn.randint(1, 40)):
            one[drawn.randrange(len(one))] = drawn.randrange(256)
        damaged.append(bytes(one))
    said = []
    for each in damaged:
        try:
            netcdf.read(each, "r.nc")
        except netcdf.ForeignFileError as error:
            said.append(str(error))
    assert len(said) >= 25
    assert all(message.startswith("r.nc") and message.isprintable() for message in said)
