import re

import pytest
import torch

from ewa.flax_shards import read_shards
from released_reference import Ext, pack, write_v_moe

ARRAYS = {
    'a/kernel': torch.randn(5, 3, 2), 'a/10': torch.arange(7), 'a/9': torch.randn(4).bfloat16(), 'b': torch.tensor(2.5),
    'c/half': torch.randn(3, 1).half(), 'long name ' * 10: torch.randn(300, 3),
    **{f'many/{i}': torch.tensor([i]) for i in range(20)},
}


@pytest.mark.parametrize('shards', [1, 2, 5])
def test_arrays_come_back(tmp_path, shards):
    result = read_shards(write_v_moe(tmp_path / 'x', ARRAYS, shards))
    assert result.keys() == ARRAYS.keys()
    for key, value in ARRAYS.items():
        assert result[key].dtype == value.dtype and torch.equal(result[key], value), key


def test_of_a_training_state_the_parameters_come_back(tmp_path):
    state = {'params/w': torch.randn(3, 2), 'opt_state/0/mu/w': torch.randn(3, 2), 'step': torch.tensor(7),
             'rngs/dropout': torch.tensor([1, 2]).to(torch.uint32)}
    result = read_shards(write_v_moe(tmp_path / 'x', state, 3))
    assert result.keys() == {'w'} and torch.equal(result['w'], state['params/w'])


def cut(path):
    path.write_bytes(path.read_bytes()[:-5])


def empty(path):
    path.write_bytes(b'')


def noise(path):
    path.write_bytes(b'\xc1' + path.read_bytes())


def other(path):
    path.write_bytes(pack({'x': 1}))


INDEX, DATA = 'x.index', 'x.data-00000-of-00001'
DAMAGED = {
    'a data file that ends early': (DATA, cut, 'ends after'),
    'an index that ends early': (INDEX, cut, 'ends after'),
    'an empty file': (DATA, empty, 'can\'t be read as a checkpoint'),
    'no msgpack': (INDEX, noise, 'begins nothing'),
    'a data file of something else': (DATA, other, 'holds no arrays'),
    'an index of something else': (INDEX, other, 'shard_count'),
    'no arrays for the index': (
        DATA, lambda p: p.write_bytes(pack({'__msgpack_array_chunk_a87ca2__': True})), 'parts of'),
    'a place that is none': (DATA, lambda p: p.write_bytes(pack({
        '__msgpack_array_chunk_a87ca2__': True, '1': [[[], 3]]})), 'can\'t be read as a checkpoint'),
    'a type that is none': (DATA, lambda p: p.write_bytes(pack({'__msgpack_array_chunk_a87ca2__': True, '1': [[
        [Ext(1, pack(((2,), 'os', b'1234')))], Ext(6, pack((pack((0, 2, None)),)))]]})), 'type os'),
}


@pytest.mark.parametrize('name, damage, words', DAMAGED.values(), ids=DAMAGED)
def test_damaged_files_are_refused_by_name(tmp_path, name, damage, words):
    write_v_moe(tmp_path / 'x', ARRAYS, 1)
    damage(tmp_path / name)
    with pytest.raises(ValueError, match=words) as e:
        read_shards(tmp_path / 'x')
    assert re.search(rf'{tmp_path}/x', str(e.value)) and '\n' not in str(e.value)


def test_a_version_that_is_not_known_is_refused(tmp_path):
    with pytest.raises(ValueError, match='of version 20300101, which is not known'):
        read_shards(write_v_moe(tmp_path / 'x', ARRAYS, version='20300101'))


def test_before_there_were_versions_a_training_state_was_numbered_by_its_fields(tmp_path):
    result = read_shards(write_v_moe(tmp_path / 'x', ARRAYS, version=None))
    assert all(torch.equal(result[key], value) for key, value in ARRAYS.items())
    state = {'params/b': torch.randn(3, 2), 'params/a/w': torch.randn(4), 'opt_state/0/mu/w': torch.randn(3, 2),
             'opt_state/0/nu/w': torch.randn(3, 2), 'rngs/x': torch.ones(2), 'step': torch.tensor(7)}
    result = read_shards(write_v_moe(tmp_path / 'y', state, version=None, fields=('step', 'params')))
    assert result.keys() == {'a/w', 'b'} and torch.equal(result['a/w'], state['params/a/w'])
    with pytest.raises(ValueError, match='The index has no piece'):  # numbered otherwise
        read_shards(write_v_moe(tmp_path / 'z', state, version=None))
