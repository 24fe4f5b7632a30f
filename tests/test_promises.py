"The table of forty promises names tests that exist, for every row"
import ast, json, re
from pathlib import Path
import pytest
from conftest import ROOT

TABLE = ROOT/'tests'/'PROMISES.md'

def rows(text: str) -> list[list[str]]:
    "Cells of the table's rows, its head left out"
    lines = [re.split(r'(?<!\\)\|', l.strip())[1:-1] for l in text.splitlines() if l.startswith('|')]
    return [[c.strip() for c in l] for l in lines if l[0].strip().isdigit()]

def named(cell: str) -> list[tuple[str, str]]:
    "(file, test) of everything that looks like a test in a cell"
    return re.findall(r'(tests/\w+\.py)::(\w+)', cell)

def functions(file: str) -> set[str]:
    "Test functions of a file"
    path = ROOT/file
    return {n.name for n in ast.walk(ast.parse(path.read_text()))  if isinstance(n, ast.FunctionDef) and n.name.startswith('test_')} if path.exists() else set()

def faults(text: str):
    "What is wrong with a table"
    found = rows(text)
    if (numbers := [int(r[0]) for r in found]) != list(range(1, 41)): yield f'the rows are not 1 to 40: {numbers}'
    for number, promise, tests, *figure in found:
        if len(figure) != 1: yield f'row {number} has not four cells'
        if not promise: yield f'row {number} promises nothing'
        if not named(tests): yield f'row {number} names no test'
        for file, test in named(tests):
            if test not in functions(file): yield f'row {number}: {file}::{test} does not exist'

def test_every_promise_names_its_tests():
    assert not list(faults(TABLE.read_text(encoding='utf-8')))

@pytest.mark.parametrize('change, fault', [(lambda t: t.replace('| 7 |', '| 77 |'), 'the rows are not 1 to 40'),
    (lambda t: re.sub(r'^\| 9 \|.*$', '| 9 | kept | somewhere | – |', t, flags=re.M), 'row 9 names no test'),
    (lambda t: t.replace('.py::test_kill_at_random_steps', '.py::test_kill_at_no_step'), 'test_kill_at_no_step does not exist')])
def test_faults_of_the_table_are_seen(change, fault):
    text = TABLE.read_text(encoding='utf-8')
    assert change(text) != text and any(fault in f for f in faults(change(text)))

def test_figures_are_those_of_the_stored_campaigns():
    "Figures in the table are typed; the records are not"
    record = lambda name: json.loads((ROOT/'nbs/_results/faults'/f'{name}.json').read_text())
    figure = {int(r[0]): r[3] for r in rows(TABLE.read_text(encoding='utf-8'))}
    k, flips, rank, fuzz = map(record, ('kills', 'flips', 'rank', 'fuzz'))
    assert k['kills'] >= 100 and f"{k['kills_bit_identical']} of {k['kills']} kills bit-identical ({k['runs_bit_identical']} of {k['runs']} runs" in figure[1]
    assert f"{k['in_phase']['save last'] + k['in_phase']['save best']} kills inside a save" in figure[2]
    assert f"{k['in_phase']['after the last step'] + k['in_phase']['test']} kills there" in figure[3] and f"{k['in_phase']['evaluation']} kills in the evaluation" in figure[4]
    for part in ('checkpoints', 'run_files'):
        tried = flips[part]['tried']
        assert flips[part]['silent'] == 0 and f'{tried} of {tried}' in figure[9]
    assert f"{rank['job_stopped']} of {rank['kills']} killed jobs stopped" in figure[39]
    assert f"{fuzz['executions']:,} fuzzed inputs" in figure[17] and not fuzz['campaigns'][-1]['findings']
