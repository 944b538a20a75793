import pytest

from ewa.foreign import foreign


def test_a_complaint_of_another_library_is_one_line():
    with pytest.raises(ValueError, match='--this 3 is wrong: two lines$') as e, foreign('--this 3 is wrong'):
        raise RuntimeError('two\n  lines')
    assert isinstance(e.value.__cause__, RuntimeError)
    with pytest.raises(ValueError, match='^m: AssertionError$'), foreign('m', AssertionError):
        raise AssertionError
    with pytest.raises(KeyError), foreign('m', AssertionError, TypeError):
        raise KeyError('another error than was asked for')
