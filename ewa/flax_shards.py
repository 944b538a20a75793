"""The sharded checkpoints of google-research/vmoe: `NAME.index` and `NAME.data-00000-of-00008`, ... Read without jax.

Both are msgpack with flax's and vmoe's own types (vmoe/checkpoints/serialization.py). The index is the tree of arrays
with their shapes; a data file maps an array's number, its place in the tree flattened by sorted keys, to pieces of it
and where they go. Nothing in a file is executed.
"""
import mmap
import re
import struct
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Tuple

import torch
from torch import Tensor

VERSIONS = ('20220622', None)  # None: before there were versions
_CHUNKS = '__msgpack_array_chunk_a87ca2__'  # marks a data file
_NUMBERS = {
    0xca: 'f', 0xcb: 'd', 0xcc: 'B', 0xcd: 'H', 0xce: 'I', 0xcf: 'Q', 0xd0: 'b', 0xd1: 'h', 0xd2: 'i', 0xd3: 'q'}
_CONSTANTS = {0xc0: None, 0xc2: False, 0xc3: True}


class _Array(NamedTuple):
    shape: Tuple[int, ...]
    dtype: str
    buffer: memoryview

    def tensor(self) -> Tensor:
        return torch.frombuffer(bytearray(self.buffer), dtype=_dtype(self.dtype)).reshape(self.shape)


class _Index(NamedTuple):
    shape: Tuple[int, ...]
    dtype: str
    places: List[Tuple[slice, ...]]  # of its pieces


def _dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f'Arrays of type {name} can\'t be read.')
    return dtype


class _Reader:
    """msgpack (https://github.com/msgpack/msgpack/blob/master/spec.md), as far as these files use it."""

    def __init__(self, data: memoryview) -> None:
        self.data, self.at = data, 0

    def take(self, count: int) -> memoryview:
        part = self.data[self.at:self.at + count]
        if len(part) < count:
            raise ValueError(f'It ends after {len(self.data)} bytes, in the middle of something.')
        self.at += count
        return part

    def number(self, form: str) -> Any:
        return struct.unpack(f'>{form}', self.take(struct.calcsize(f'>{form}')))[0]

    def read(self) -> Any:
        code = self.number('B')
        if code < 0x80 or code >= 0xe0:
            return code if code < 0x80 else code - 0x100
        if code in _CONSTANTS:
            return _CONSTANTS[code]
        if code in _NUMBERS:
            return self.number(_NUMBERS[code])
        read: Callable[[int], Any]
        # what may have its length in the code itself (from, to), or in a number after it (first code, its types)
        for read, low, high, first, forms in (
                (self.mapping, 0x80, 0x8f, 0xde, 'HI'), (self.sequence, 0x90, 0x9f, 0xdc, 'HI'),
                (self.text, 0xa0, 0xbf, 0xd9, 'BHI'), (self.take, 1, 0, 0xc4, 'BHI'),
                (self.extension, 1, 0, 0xc7, 'BHI')):
            if low <= code <= high:
                return read(code - low)
            if first <= code < first + len(forms):
                return read(self.number(forms[code - first]))
        if 0xd4 <= code <= 0xd8:
            return self.extension(1 << code - 0xd4)
        raise ValueError(f'It is no msgpack: byte {code:#x} begins nothing.')

    def mapping(self, count: int) -> Dict[Any, Any]:
        return {self.read(): self.read() for _ in range(count)}

    def sequence(self, count: int) -> List[Any]:
        return [self.read() for _ in range(count)]

    def text(self, count: int) -> str:
        return bytes(self.take(count)).decode()

    def extension(self, count: int) -> Any:
        code = self.number('b')
        content = _Reader(self.take(count)).read()
        if code == 1:  # an array: shape, type, bytes
            return _Array(tuple(content[0]), content[1], content[2])
        if code == 6:  # a piece's place: start, stop, step by axis
            return _place(content)
        if code == 8:  # an array of the index: shape and type, places of its pieces, their files
            shape, dtype, *_ = _Reader(content[0]).read()
            return _Index(tuple(shape), dtype, [_place(_Reader(part).read()) for part in content[1]])
        return content


def _place(parts: List[memoryview]) -> Tuple[slice, ...]:
    return tuple(slice(*_Reader(part).read()) for part in parts)


def _read(path: Path) -> Any:
    """The content of a file; arrays stay on disk until they are asked for.

    Raises:
        ValueError: It is missing or damaged.
    """
    if not path.is_file():
        raise ValueError(f'{path} is missing.')
    with _what_is_wrong_with(path), path.open('rb') as file:
        content = _Reader(memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))).read()
        if not isinstance(content, dict):
            raise ValueError(f'It holds a {type(content).__name__}.')
        return content


@contextmanager
def _what_is_wrong_with(path: Path) -> Iterator[None]:
    """Name the file in what bytes of any kind can cause while they are decoded."""
    try:
        yield
    except (ValueError, TypeError, LookupError, AttributeError, RuntimeError) as e:
        raise ValueError(f'{path} can\'t be read as a checkpoint of vmoe: {" ".join(str(e).split())}') from e


def _leaves(tree: Any, fields: bool, path: str = '') -> Iterator[Tuple[str, _Index]]:
    """Name and entry of each array, in the order in which jax numbers them: dictionaries by key.

    A training state without a version was numbered by its fields, of which `step` and `params` are the first two.
    """
    if isinstance(tree, dict):
        for key in sorted(tree, key=lambda key: (fields and (key != 'step', key != 'params'), key)):
            yield from _leaves(tree[key], False, f'{path}/{key}' if path else key)
    elif isinstance(tree, _Index):
        yield path, tree
    elif tree is not None:
        raise ValueError(f'The index has no array at {path}.')


def read_shards(path: Path) -> Dict[str, Tensor]:
    """The parameters of a checkpoint.

    Args:
        path: `NAME`, `NAME.index`, or a folder with one such checkpoint.

    Returns:
        Names joined by `/`, below `params` if the checkpoint is a whole training state, to tensors.

    Raises:
        ValueError: A file is missing or damaged, or of another version.
    """
    if path.is_dir():
        names = sorted(path.glob('*.index'))
        if len(names) != 1:
            raise ValueError(f'{path} must hold one checkpoint, NAME.index and NAME.data-..., and has '
                             f'{", ".join(p.name for p in names) or "none"}.')
        path = names[0]
    prefix = path.with_name(re.sub(r'\.(index|data-\d+-of-\d+)$', '', path.name))
    index = _read(prefix.with_name(f'{prefix.name}.index'))
    version = index.get('version')
    if version not in VERSIONS:
        raise ValueError(f'{prefix}.index is of version {version}, which is not known; {VERSIONS[0]} is.')
    with _what_is_wrong_with(prefix.with_name(f'{prefix.name}.index')):
        count = int(index['shard_count'])
        leaves = list(_leaves(index['index'], fields=version is None))
        whole = any(name.startswith('params/') for name, _ in leaves)
        arrays = {number: torch.empty(entry.shape, dtype=_dtype(entry.dtype))
                  for number, (name, entry) in enumerate(leaves) if not whole or name.startswith('params/')}
    missing = {number: array.numel() for number, array in arrays.items()}
    for shard in range(count):
        file = prefix.with_name(f'{prefix.name}.data-{shard:05d}-of-{count:05d}')
        data = _read(file)
        if data.pop(_CHUNKS, None) is None:
            raise ValueError(f'{file} holds no arrays.')
        with _what_is_wrong_with(file):
            for key, pieces in data.items():
                number = int(key)
                for parts, place in pieces if number in arrays else ():
                    if place not in leaves[number][1].places:
                        raise ValueError(f'The index has no piece {place} of {leaves[number][0]}.')
                    piece = arrays[number][place]
                    piece.copy_(torch.cat([part.tensor().flatten() for part in parts]).reshape(piece.shape))
                    missing[number] -= piece.numel()
    names = {number: name.removeprefix('params/') if whole else name for number, (name, _) in enumerate(leaves)}
    incomplete = next((names[number] for number, count in missing.items() if count), None)
    if incomplete is not None:
        raise ValueError(f'{prefix} is incomplete: parts of {incomplete} are in none of its files.')
    return {names[number]: array for number, array in arrays.items()}
