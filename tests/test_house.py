"""The floor plan of CONTRIBUTING.md, held to the code."""
import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = {path.stem: ast.parse(path.read_text()) for path in (ROOT / 'ewa').glob('*.py') if path.stem != '__init__'}
MATHEMATICS = ('partition', 'routing', 'pull', 'gathering', 'refit')
SCRIPTS = ('train.py', 'convert.py')


def imports(tree):
    """Modules that are imported anywhere in a file, inside functions too: those of the package as `.name`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            if node.level and node.module is None:
                yield from (f'.{alias.name}' for alias in node.names)
            else:
                yield '.' * node.level + (node.module or '')


def names(tree):
    """Names that are imported from other files, as (module, name)."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            yield from ((node.module or '', alias.name) for alias in node.names)


def python_files(*folders):
    return sorted(path for folder in folders for path in (
        [ROOT / folder] if folder.endswith('.py') else (ROOT / folder).rglob('*.py')))


def test_every_room_is_in_the_floor_plan_and_imports_point_downward():
    plan = (ROOT / 'CONTRIBUTING.md').read_text()
    floors = re.findall(r'^ +((?:[a-z_]+\.py,? ?)+) {2,}', plan, re.MULTILINE)
    order = [name.removesuffix('.py') for floor in floors for name in re.findall(r'[a-z_]+\.py', floor)]
    assert sorted(order) == sorted(ROOMS) and len(set(order)) == len(order)
    for room, tree in ROOMS.items():
        below = order[:order.index(room)]
        for module in imports(tree):
            assert module.split('.')[0] != 'ewa', f'{room} imports {module} by its full name'
            if module.startswith('.'):
                assert module[1:] in below, f'{room} imports {module[1:]}, which is not below it'


def test_the_mathematics_imports_torch_alone():
    for room in MATHEMATICS:
        libraries = {module.split('.')[0] for module in imports(ROOMS[room]) if not module.startswith('.')}
        at_top = ast.Module([node for node in ROOMS[room].body if isinstance(node, (ast.Import, ast.ImportFrom))], [])
        assert libraries <= {'torch', 'typing', 'dataclasses', 'warnings', 'math', 'scipy'}
        assert not any(module.startswith('scipy') for module in imports(at_top))
        assert all(module[1:] in MATHEMATICS for module in imports(ROOMS[room]) if module.startswith('.'))


def test_accelerate_is_known_to_those_who_train():
    assert {room for room, tree in ROOMS.items() if any(m.split('.')[0] == 'accelerate' for m in imports(tree))} == {
        'checkpoint', 'logbook', 'sharded'}


@pytest.mark.parametrize('path', python_files('ewa', 'experiments', 'benchmarks', 'examples', *SCRIPTS),
                         ids=lambda path: str(path.relative_to(ROOT)))
def test_private_names_stay_in_their_file_and_nothing_is_patched(path):
    tree = ast.parse(path.read_text())
    ours = [name for module, name in names(tree) if name.startswith('_') and not name.startswith('__')
            and not module.startswith('timm')]
    assert not ours
    assert not any('mock' in module for module in imports(tree)) and not any('mock' in name for _, name in names(tree))


@pytest.mark.parametrize('room', sorted(set(ROOMS) - {'version'}))
def test_every_room_has_its_tests(room):
    assert (ROOT / 'tests' / f'test_{room}.py').is_file()


@pytest.mark.parametrize('script', SCRIPTS)
def test_functions_of_the_scripts_are_short(script):
    for node in ast.walk(ast.parse((ROOT / script).read_text())):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 100, node.name
