"What every test file needs: one thread a worker, no display, the project's pages, where the real data lie."
import os
os.environ['OMP_NUM_THREADS'] = '1'   # before torch is imported: workers of many threads each crawl
os.environ['MPLBACKEND'] = 'agg'

from pathlib import Path
import pytest

ROOT = Path(__file__).resolve().parents[1]
NBS = ROOT/'nbs'
NOTEBOOKS = sorted(nb for nb in (p.relative_to(NBS).as_posix() for p in NBS.rglob('*.ipynb'))
                   if not any(part.startswith(('.', '_')) for part in nb.split('/')))
DATA = os.environ.get('SEQREC_DATA')
MISSING = 'SEQREC_DATA does not name a folder of data sets'
needs_data = pytest.mark.skipif(not (DATA and Path(DATA).is_dir()), reason=MISSING)

def pytest_addoption(parser):
    parser.addoption('--nb-flags', default='', help="also run cells marked so: 'slow', 'gpu', 'slow gpu'")

@pytest.fixture(scope='session')
def data_dir() -> Path:
    "The folder of real data sets (mark the test with `needs_data`)"
    if not (DATA and Path(DATA).is_dir()): pytest.skip(MISSING)
    return Path(DATA).resolve()
