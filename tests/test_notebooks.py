"Every notebook runs from top to bottom with nbdev's runner: offline, without data sets, where it lies."
import json, re, socket, sys
import pytest
from conftest import NBS, NOTEBOOKS, ROOT
from nbdev.config import get_config
from nbdev.test import test_nb as run_notebook

run_notebook.__test__ = False   # nbdev's function, not a test of ours

def offline(connect):
    "`socket.connect` that reaches this machine only"
    def guarded(self, address):
        internet = self.family in (socket.AF_INET, socket.AF_INET6)
        if internet and address[0] not in ('127.0.0.1', '::1', 'localhost'):
            raise OSError(f'a notebook may not use the network: {address}')
        return connect(self, address)
    return guarded

def failure(nb, error):
    "What went wrong, with the cell in which it did"
    error = re.sub(r'\x1b\[[0-9;]*m', '', error)
    number = re.search(r'While Executing Cell #(\d+)', error)
    cells = json.loads((NBS/nb).read_text(encoding='utf-8'))['cells']
    return f"nbs/{nb}\n{''.join(cells[int(number[1]) - 1]['source']) if number else ''}\n{error}"

@pytest.fixture
def own_library():
    "The library is imported anew, so that what another page has registered or patched is out of sight"
    def ours(): return {name: module for name, module in sys.modules.items() if name.partition('.')[0] == 'seqrec_nb'}
    before = ours()
    for name in before: del sys.modules[name]
    yield
    for name in ours(): del sys.modules[name]
    sys.modules.update(before)

@pytest.mark.parametrize('nb', NOTEBOOKS)
def test_notebook_runs(nb, request, monkeypatch, tmp_path, capfd, own_library):
    "Cells marked slow or gpu run if --nb-flags names them; only then are data sets and network there"
    flags = request.config.getoption('--nb-flags').split()
    if not flags:
        monkeypatch.delenv('SEQREC_DATA', raising=False)
        monkeypatch.setenv('SEQREC_CACHE', str(tmp_path/'cache'))
        monkeypatch.setattr(socket.socket, 'connect', offline(socket.socket.connect))
    monkeypatch.setenv('IN_TEST', '1')   # the runner sets it too, and would leave it set
    monkeypatch.chdir(NBS)
    skip = get_config(path=ROOT).tst_flags.split()
    passed, _ = run_notebook(NBS/nb, skip_flags=skip, force_flags=flags, basepath=ROOT)
    if not passed: pytest.fail(failure(nb, capfd.readouterr().err), pytrace=False)
