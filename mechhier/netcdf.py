"""NetCDF files from anywhere: bytes that are looked at before they are read, and that reach no other file.

A netCDF file is HDF5, in which a stranger can name other files: by links, as the storage of an array, as parts of a
virtual one. `check` refuses all of that by name, and what would not fit memory, before any array is read; `read` then
reads what was checked and nothing else. Both look at bytes in memory, never at a path.
"""

from __future__ import annotations

import struct
import uuid
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import prod
from typing import Any

import numpy as np
import xarray as xr
from h5py import h5, h5a, h5d, h5f, h5g, h5l, h5o, h5p, h5r, h5s, h5t, h5z  # pyright: ignore[reportAttributeAccessIssue]

MOST_BYTES = 2**32
"""Most bytes that all arrays of a file may have in memory."""
MOST_TIMES = 100
"""Most bytes in memory for each byte of a file, beyond `FREE_BYTES`. Measured numbers compress to a tenth at best, and
results are saved uncompressed; a file that unpacks to a hundred times its size holds next to nothing."""
FREE_BYTES = 2**26
MOST_OBJECTS = 10_000
"""Most groups and arrays: a sweep of twenty runs over every phenomenon has half."""
MOST_ATTRIBUTES = 50_000
MOST_ATTRIBUTE_BYTES = 2**26
MOST_LEVELS = 16
"""Most groups inside one another."""

_SIGNATURE = b"\x89HDF\r\n\x1a\n"
_NUMBERS = (h5t.TypeIntegerID, h5t.TypeFloatID, h5t.TypeEnumID)
_FILTERS = [h5z.FILTER_SHUFFLE, h5z.FILTER_DEFLATE, h5z.FILTER_FLETCHER32]
"""In the order in which they are applied; others are plugins, which are code."""
_REFERRING = {b"REFERENCE_LIST": h5t.TypeCompoundID, b"DIMENSION_LIST": h5t.TypeVlenID}
"""Attributes of netCDF's own, by which arrays and their dimensions name each other."""
_HIDDEN = {
    "REFERENCE_LIST",
    "DIMENSION_LIST",
    "CLASS",
    "NAME",
    "_Netcdf4Dimid",
    "_Netcdf4Coordinates",
    "_nc3_strict",
    "_NCProperties",
}
_REFERENCE_TIMES = 8
"""Bytes in memory for each byte of a list of references."""
_NO_VARIABLE = "This is a netCDF dimension but not a netCDF variable"
_NO_COORDINATE = "_nc4_non_coord_"
_TEXT_REFERENCE = np.dtype([("length", "<u4"), ("address", "<u8"), ("index", "<u4")])
"""How HDF5 stores one text of any length: the text itself is elsewhere in the file, and can be shared."""

_STORE = b"GCOL\x01"
_STORED = struct.Struct("<HHIQ")
"""Before each text of a store: its number (0: what is free), its uses, nothing, its size."""

_NAMES = b"HEAP\x00"
_FREE = struct.Struct("<QQ")
"""In each free part of a store of names: where the next is, its size."""
_FREE_END = 1
_NODE = b"TREE"


class ForeignFileError(ValueError):
    """A netCDF file that is damaged, or holds what no result holds; the message says where, and what to do."""


def check(content: bytes, name: str) -> None:
    """Refuse a netCDF file that reaches outside itself, does not fit memory, or is damaged; no array is read.

    Args:
        content: All bytes of the file.
        name: Of the file, for the message.

    Raises:
        ForeignFileError: It links to other files or within itself, stores arrays elsewhere, has types or filters that
            results do not have, is larger in memory than the bounds of this module, or is not whole.

    Cost: some 0.1 ms for each array.
    """
    _Check(content, name).whole()


def read(content: bytes, name: str) -> xr.Dataset | xr.DataTree:
    """The result in a netCDF file's bytes, in memory: a tree if there are groups, as a sweep's, else a dataset.

    What xarray's engine "h5netcdf" reads from such a file, from what was checked alone and in a fifth of the time.

    Raises:
        ForeignFileError: As `check`, and if the arrays are no dataset.
    """
    checking = _Check(content, name)
    checking.whole()
    with checking.damage():
        groups = {found.path: found.dataset(checking) for found in checking.found if isinstance(found, _Group)}
        return groups["/"] if len(groups) == 1 else xr.DataTree.from_dict(groups)


def attribute(content: bytes, name: str, key: str) -> str | int | float | None:
    """One attribute of a result, without a look at the rest of its file; None if there is no such attribute.

    Raises:
        ForeignFileError: The bytes are damaged, or the attribute is neither text nor a number.
    """
    checking = _Check(content, name)
    with checking.damage():
        root = checking.opened()
        if not h5a.exists(root, key.encode()):
            return None
        found = checking.attribute(root, key.encode(), "/")
    if not isinstance(found, str | int | float | np.number):
        raise checking.refused("/", f"has an attribute {key!r} that is neither text nor a number")
    return found.item() if isinstance(found, np.number) else found


@dataclass
class _Array:
    path: str
    stored: h5d.DatasetID
    place: int
    shape: tuple[int, ...]
    type: h5t.TypeID
    attributes: dict[str, Any] = field(default_factory=dict)

    def dimensions(self, checking: _Check) -> tuple[str, ...]:
        """Names, from the three ways in which netCDF says them."""
        hidden = self.attributes
        numbers = np.atleast_1d(hidden.get("_Netcdf4Coordinates", ()))
        if len(numbers) == len(self.shape) and all(int(number) in checking.dimensions for number in numbers):
            return tuple(checking.dimensions[int(number)] for number in numbers)
        if "DIMENSION_LIST" in hidden:
            names = [checking.scales.get(address) for address in hidden["DIMENSION_LIST"]]
            if len(names) == len(self.shape) and None not in names:
                return tuple(str(name) for name in names)
        elif hidden.get("CLASS") == "DIMENSION_SCALE" and len(self.shape) == 1:
            return (_own_name(self.path),)
        elif not self.shape:
            return ()
        raise checking.refused(self.path, "has a dimension without a name")

    def values(self) -> np.ndarray:
        text = isinstance(self.type, h5t.TypeStringID) and self.type.is_variable_str()
        # Not `empty`: HDF5 leaves as they are the values of an array that was never written.
        values = np.zeros(self.shape, self.type.dtype)
        if values.size:
            self.stored.read(h5s.ALL, h5s.ALL, values)
        if text:
            return np.array([_text(each) for each in values.reshape(-1)], dtype=str).reshape(self.shape)
        return values.astype(np.dtype(values.dtype.str), copy=False)  # without what h5py notes in a type

    def variable(self, checking: _Check) -> xr.Variable:
        attributes = {key: value for key, value in self.attributes.items() if key not in _HIDDEN}
        return xr.Variable(self.dimensions(checking), self.values(), attributes)


@dataclass
class _Group:
    path: str
    stored: h5g.GroupID
    attributes: dict[str, Any] = field(default_factory=dict)
    arrays: dict[str, _Array] = field(default_factory=dict)

    def dataset(self, checking: _Check) -> xr.Dataset:
        arrays = {
            _own_name(name): array.variable(checking)
            for name, array in self.arrays.items()
            if not str(array.attributes.get("NAME", "")).startswith(_NO_VARIABLE)
        }
        attributes = {key: value for key, value in self.attributes.items() if key not in _HIDDEN}
        return xr.decode_cf(xr.Dataset(arrays, attrs=attributes)).load()


class _Check:
    """One look at a file: what it has in all, and what was seen of it."""

    def __init__(self, content: bytes, name: str) -> None:
        self.content, self.name = content, name
        self.bytes = self.attribute_bytes = self.n_attributes = 0
        self.longest = 0
        """Most bytes of what is stored in one piece: of a text, or of a list of references."""
        self.found: list[_Array | _Group] = []
        self.seen: dict[int, str] = {}
        """Path of each object, by its place in the file."""
        self.scales: dict[int, str] = {}
        """Name of each dimension, by its place in the file."""
        self.dimensions: dict[int, str] = {}
        """Name of each dimension, by netCDF's number of it."""

    def refused(self, path: str, what: str) -> ForeignFileError:
        where = "" if path == "/" else f": {path!r}"
        return ForeignFileError(
            f"{self.name}{where} {what}; measure again, or ask for a file that `results.save` wrote"
        )

    @contextmanager
    def damage(self) -> Iterator[None]:
        """Say of whatever is raised within that the file is damaged: which errors damage ends in is not foreseen."""
        try:
            yield
        except ForeignFileError:
            raise
        except Exception as error:
            said = "".join(each if each.isprintable() else " " for each in str(error))
            said = " ".join(said.split()) or type(error).__name__
            raise self.refused("/", f"is not a whole netCDF file ({said})") from error

    def opened(self) -> h5g.GroupID:
        if not self.content.startswith(_SIGNATURE):
            raise self.refused("/", "is not a netCDF file: it does not begin as one")
        sizes = slice(9, 11) if self.content[8:9] > b"\x01" else slice(13, 15)
        if self.content[sizes] != b"\x08\x08":  # of addresses and lengths, everywhere in the file
            raise self.refused("/", "is not a whole netCDF file: it has no usable header")
        at = {b"\x00": 24, b"\x01": 28}.get(self.content[8:9], 12)
        if any(self.content[at : at + 8]):
            raise self.refused("/", "is not a whole netCDF file: its addresses do not count from its beginning")
        self.text_stores()
        self.name_stores()
        self.indices()
        memory = h5p.create(h5p.FILE_ACCESS)
        memory.set_fapl_core(2**16, False)
        memory.set_file_image(self.content)
        # HDF5 looks whether there is a file of this name, and fails if there is.
        return h5g.open(h5f.open(f"no-file-{uuid.uuid4().hex}".encode(), h5f.ACC_RDONLY, memory), b"/")

    def text_stores(self) -> None:
        """Refuse damaged stores of texts ("global heaps"): HDF5 walks one without end where a part has no size.

        Each place that HDF5 could take for one is walked, within a number of steps that stores side by side cannot need.
        """
        left = len(self.content) // _STORED.size + 1
        place = self.content.find(_STORE)
        while place >= 0:
            here, end = place + 16, place + int.from_bytes(self.content[place + 8 : place + 16], "little")
            if end > len(self.content):
                raise self.refused("/", "is not a whole netCDF file: a store of texts goes beyond its end")
            while here + _STORED.size <= end:
                index, _, _, size = _STORED.unpack_from(self.content, here)
                step, left = (_STORED.size + (size + 7) // 8 * 8 if index else size), left - 1
                if not 0 < step <= end - here or left < 0:
                    raise self.refused(
                        "/", f"is not a whole netCDF file: its store of texts at byte {place} is damaged"
                    )
                self.longest = max(self.longest, size if index else 0)
                here += step
            place = self.content.find(_STORE, place + 1)

    def name_stores(self) -> None:
        """Refuse a store of names ("local heap") whose list of what is free has no end: HDF5 would go on until memory has."""
        left = len(self.content) // _FREE.size + 1
        place = self.content.find(_NAMES)
        while place >= 0:
            head = self.content[place + 8 : place + 32]
            size, here, data = (int.from_bytes(head[start : start + 8], "little") for start in (0, 8, 16))
            while here < size and here != _FREE_END and data + here + _FREE.size <= len(self.content):
                here, left = _FREE.unpack_from(self.content, data + here)[0], left - 1
                if left < 0:
                    raise self.refused(
                        "/", f"is not a whole netCDF file: its store of names at byte {place} is damaged"
                    )
            place = self.content.find(_NAMES, place + 1)

    def indices(self) -> None:
        """Refuse an index ("B-tree") whose nodes go round, each the right neighbour of one before: HDF5 would, too."""
        right: dict[int, int] = {}
        place = self.content.find(_NODE)
        while place >= 0:
            right[place] = int.from_bytes(self.content[place + 16 : place + 24], "little")
            place = self.content.find(_NODE, place + 1)
        while right:
            place, passed = next(iter(right)), set()
            while place in right:
                passed.add(place)
                place = right.pop(place)
            if place in passed:
                raise self.refused("/", f"is not a whole netCDF file: its index at byte {place} is damaged")

    def whole(self) -> None:
        with self.damage():
            self.group(self.opened(), "/", 0)
            # After all are counted, as this takes longest.
            for found in self.found:
                found.attributes = self.attributes(found)
                if isinstance(found, _Array) and "CLASS" in found.attributes:
                    self.scales[found.place] = _own_name(found.path)
                    number = found.attributes.get("_Netcdf4Dimid")
                    if number is not None:
                        self.dimensions[int(number)] = _own_name(found.path)

    def see(self, found: Any, path: str) -> int:
        about = h5o.get_info(found)
        place = int(about.addr)
        if place in self.seen:
            raise self.refused(path, f"is {self.seen[place]!r} under another name")
        self.seen[place] = path
        self.n_attributes += about.num_attrs
        if self.n_attributes > MOST_ATTRIBUTES:
            raise self.refused(path, f"brings the attributes to more than {MOST_ATTRIBUTES}")
        return place

    def group(self, group: h5g.GroupID, path: str, level: int) -> None:
        if level > MOST_LEVELS:
            raise self.refused(path, f"lies in more than {MOST_LEVELS} groups")
        self.see(group, path)
        if len(self.seen) + group.get_num_objs() > MOST_OBJECTS:
            raise self.refused(path, f"brings the groups and arrays to more than {MOST_OBJECTS}")
        found = _Group(path, group)
        self.found.append(found)
        for link in group:
            name = link.decode("utf-8", "surrogateescape")
            inner = f"{path.rstrip('/')}/{name}"
            if "/" in name or name in ("", ".", ".."):
                raise self.refused(path, f"has a part named {name!r}, which is a path")
            kind = group.links.get_info(link).type
            if kind != h5l.TYPE_HARD:
                what = {h5l.TYPE_EXTERNAL: "a link to another file", h5l.TYPE_SOFT: "a link to another part"}
                raise self.refused(inner, f"is {what.get(kind, 'a link of an unknown kind')}")
            one = h5o.open(group, link)
            if isinstance(one, h5g.GroupID):
                self.group(one, inner, level + 1)
            elif isinstance(one, h5d.DatasetID):
                found.arrays[name] = self.array(one, inner)
            else:
                raise self.refused(inner, "is a type by itself, neither group nor array")

    def array(self, array: h5d.DatasetID, path: str) -> _Array:
        place = self.see(array, path)
        # Before anything is asked that could make HDF5 open what the array is stored in.
        created = array.get_create_plist()
        layout = created.get_layout()
        if layout == h5d.VIRTUAL:
            raise self.refused(path, "is a virtual array, put together from other files")
        if created.get_external_count():
            raise self.refused(path, "is stored in another file")
        filters = [created.get_filter(each)[0] for each in range(created.get_nfilters())]
        if filters != [each for each in _FILTERS if each in filters]:
            raise self.refused(path, f"has filters {filters}, which are not shuffle, gzip and fletcher32 in that order")
        kind = array.get_type()
        self.plain(kind, path)
        if array.get_space().get_simple_extent_type() not in (h5s.SIMPLE, h5s.SCALAR):
            raise self.refused(path, "is an array without a shape")
        shape = tuple(array.shape)
        n, part, n_parts = prod(shape), 0, 0
        if layout == h5d.CHUNKED:
            chunk = created.get_chunk()
            part, n_parts = prod(chunk), prod(-(-size // length) for size, length in zip(shape, chunk, strict=True))
        self.expanded(max(n, part, part * n_parts) * kind.get_size(), path)
        if isinstance(kind, h5t.TypeStringID) and kind.is_variable_str():
            self.expanded(self.text_bytes(array, n, layout, bool(filters)), path)
        if h5z.FILTER_DEFLATE in filters:
            self.deflated(array, filters, part * kind.get_size(), n_parts, path)
        found = _Array(path, array, place, shape, kind)
        self.found.append(found)
        return found

    def plain(self, kind: h5t.TypeID, path: str) -> None:
        if kind.committed():
            raise self.refused(path, "has a type that is stored by itself")
        if not isinstance(kind, (*_NUMBERS, h5t.TypeStringID)):
            what = {
                h5t.TypeReferenceID: "references to other parts",
                h5t.TypeCompoundID: "records",
                h5t.TypeVlenID: "lists",
                h5t.TypeOpaqueID: "bytes without a meaning",
            }
            raise self.refused(path, f"holds {what.get(type(kind), 'values')}, neither numbers nor text")

    def expanded(self, size: int, path: str) -> None:
        self.bytes += size
        if self.bytes > MOST_BYTES:
            raise self.refused(path, f"brings the arrays to more than {MOST_BYTES >> 20} MiB in memory")
        if self.bytes > max(FREE_BYTES, MOST_TIMES * len(self.content)):
            times = self.bytes // len(self.content)
            raise self.refused(path, f"brings the arrays to {times} times the file's size, {self.bytes >> 20} MiB")

    def text_bytes(self, array: h5d.DatasetID, n: int, layout: int, filtered: bool) -> int:
        """Most bytes of the texts of an array in memory, where all are as long as the longest.

        Many can share one of the file, so that they can have more than the file has.
        """
        places: list[tuple[int | None, int]] = []
        longest = 0
        if layout == h5d.CONTIGUOUS and n:
            places = [(array.get_offset(), n * _TEXT_REFERENCE.itemsize)]
        elif layout == h5d.CHUNKED and not filtered:
            array.chunk_iter(lambda chunk: places.append((chunk.byte_offset, chunk.size)))
        elif n:
            longest = self.longest
        for place, size in places:
            if place is not None:
                stored = np.frombuffer(self.content, _TEXT_REFERENCE, size // _TEXT_REFERENCE.itemsize, place)
                longest = max(longest, int(stored["length"].max(initial=0)))
        return n * longest * np.dtype("U1").itemsize

    def deflated(self, array: h5d.DatasetID, filters: list[int], most: int, n_parts: int, path: str) -> None:
        """Refuse compressed parts that unpack to more than they should hold: HDF5 would unpack them whole."""
        chunks: list[Any] = []
        array.chunk_iter(chunks.append)
        if len(chunks) > n_parts:
            raise self.refused(path, f"has {len(chunks)} parts, where its shape has {n_parts}")
        skipped = 1 << filters.index(h5z.FILTER_DEFLATE)
        for chunk in chunks:
            if chunk.filter_mask & skipped:
                continue
            packed = self.content[chunk.byte_offset : chunk.byte_offset + chunk.size]
            if len(zlib.decompressobj().decompress(packed, most + 1)) > most:
                raise self.refused(path, "unpacks to more than its shape holds")

    def attributes(self, found: _Array | _Group) -> dict[str, Any]:
        path, stored = found.path, found.stored
        rank = len(found.shape) if isinstance(found, _Array) else 0
        names: list[bytes] = []
        ordered = stored.get_create_plist().get_attr_creation_order() & h5p.CRT_ORDER_TRACKED
        h5a.iterate(stored, names.append, index_type=h5.INDEX_CRT_ORDER if ordered else h5.INDEX_NAME)
        # Which arrays use a dimension is nothing to us; most arrays have the numbers of their dimensions, which are enough,
        # and a number of their own that means nothing unless they are a dimension.
        unread = {b"REFERENCE_LIST", b"_NCProperties"}
        unread |= {b"DIMENSION_LIST"} if b"_Netcdf4Coordinates" in names else set()
        unread |= set() if b"CLASS" in names else {b"_Netcdf4Dimid"}
        values = {}
        for name in names:
            if name in _REFERRING and not isinstance(h5a.open(stored, name).get_type(), _REFERRING[name]):
                raise self.refused(path, f"has an attribute {name.decode()!r} that is not netCDF's")
            if name not in unread:
                values[name.decode("utf-8", "surrogateescape")] = self.attribute(stored, name, path, rank)
        return values

    def attribute(self, found: Any, name: bytes, path: str, rank: int = 0) -> Any:
        stored = h5a.open(found, name)
        kind = stored.get_type()
        shape = stored.shape
        if name == b"DIMENSION_LIST":
            if shape != (rank,):
                raise self.refused(path, "names more or fewer dimensions than it has")
            self.spendable(rank * self.longest * _REFERENCE_TIMES, path)
            values: Any = np.zeros(shape, kind.dtype)
            stored.read(values)
            self.spent(sum(map(len, values)) * 8 * _REFERENCE_TIMES, path)
            return [self.address(found, each) for each in values]
        where = f"{path.rstrip('/')}/@{name.decode('utf-8', 'surrogateescape')}"
        self.plain(kind, where)
        if shape is None:
            return "" if isinstance(kind, h5t.TypeStringID) else np.zeros(0, kind.dtype)
        n = prod(shape)
        text = isinstance(kind, h5t.TypeStringID)
        shared = text and kind.is_variable_str()
        self.spent(n * kind.get_size(), where)
        if shared and n > 1 and n * self.longest > MOST_BYTES:
            raise self.refused(where, f"is a list of {n} texts in so large a file")
        values = np.zeros(shape, kind.dtype)
        if n:
            stored.read(values)
        if not text:
            return values.reshape(-1)[0] if n == 1 else values
        texts = [_text(each) for each in values.reshape(-1)]
        self.spent(sum(map(len, texts)) if shared else 0, where)
        return texts[0] if n == 1 else texts

    def spent(self, size: int, where: str) -> None:
        self.spendable(size, where)
        self.attribute_bytes += size

    def spendable(self, size: int, where: str) -> None:
        if self.attribute_bytes + size > MOST_ATTRIBUTE_BYTES:
            raise self.refused(where, f"brings the attributes to more than {MOST_ATTRIBUTE_BYTES >> 20} MiB")

    def address(self, found: Any, references: np.ndarray) -> int | None:
        """Place of the last array that a dimension refers to, as netCDF takes it."""
        return int(h5o.get_info(h5r.dereference(references[-1], found)).addr) if len(references) else None


def _own_name(path: str) -> str:
    return path.rsplit("/", 1)[-1].removeprefix(_NO_COORDINATE)


def _text(stored: Any) -> str:
    return stored if isinstance(stored, str) else bytes(stored or b"").decode("utf-8", "surrogateescape")
