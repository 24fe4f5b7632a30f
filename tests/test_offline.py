"No network, no home, nothing writable but the run directory, a clock that runs backwards, a terminal without umlauts: what is local works (row 36)."
import ast, json, os, shutil, subprocess, sys
import numpy as np, pandas as pd, pytest
from conftest import ROOT

# runs in a process of its own: the hook cannot be taken off again
CHILD = r'''
import errno, importlib, json, os, sys, time
place, steps = sys.argv[1], json.loads(sys.argv[2])
refused, strays, ever = [], [], set()
CHANGES = dict.fromkeys('os.mkdir os.rmdir os.remove os.rename os.link os.symlink os.truncate os.chmod os.utime shutil.rmtree'.split())

def inside(path):
    if isinstance(path, int): return True
    path = os.path.realpath(os.fsdecode(path))
    # torch asks for a temporary directory when it is imported; the system's is one, and only tried out
    return path.startswith((place + os.sep, '/dev/', '/proc/')) or path == place or os.path.dirname(path) == '/tmp'

def hook(event, args):
    "A machine without network, on which only `place` can be written to"
    if event in ('socket.connect', 'socket.getaddrinfo', 'socket.gethostbyname', 'socket.bind', 'socket.sendto'):
        refused.append(event)
        raise OSError(errno.ENETUNREACH, 'Network is unreachable')
    writes = event == 'open' and (args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)) or event in CHANGES
    if not writes: return
    paths = [a for a in args[:2 if event in ('os.rename', 'os.link') else 1]]
    if all(map(inside, paths)): return
    if '__pycache__' not in str(paths[0]): strays.append((event, str(paths[0])))
    raise OSError(errno.EROFS, 'Read-only file system', str(paths[0]))

sys.addaudithook(hook)
real, calls = time.time, []
def backwards(): calls.append(1); return 2e9 - 60. * len(calls)
time.time = backwards

import pwd, pathlib
def nobody(uid): raise KeyError(uid)
pwd.getpwuid = nobody
from datetime import datetime
class Backwards(datetime):
    @classmethod
    def now(cls, tz=None): return datetime.fromtimestamp(backwards(), tz)

def attempt(f):
    try: f(); return None
    except Exception as e: return type(e).__name__
facts = dict(write=attempt(lambda: open('x', 'w')), mkdir=attempt(lambda: os.mkdir(os.path.join(sys.prefix, 'x'))), home=attempt(pathlib.Path.home), umlaut=attempt(lambda: print('\u2264')),
             temp=__import__('tempfile').gettempdir(), backwards=time.time() - time.time() > 0, net=attempt(lambda: __import__('socket').create_connection(('127.0.0.1', 9), 1)), encoding=sys.stdout.encoding)
refused.clear(); strays.clear()

from seqrec_nb.cli import main
import seqrec_nb.experiment, seqrec_nb.recommend
for m in [m for n, m in sys.modules.items() if n.startswith('seqrec_nb.')]:
    if getattr(m, 'datetime', None) is datetime: m.datetime = Backwards
codes = [main(s) for s in steps]
from seqrec_nb.recommend import recommend
answer = recommend(os.path.join(place, 'run'), ['caf\u00e9 1', 'caf\u00e9 2'], 3)
json.dump(dict(facts=facts, codes=codes, refused=refused, strays=strays, answer=str(answer), clock=len(calls)), open(os.path.join(place, 'found.json'), 'w'))
'''

TINY = '--d-model 8 --n-blocks 1 --n-heads 1 --max-len 10 --batch-size 32 --epochs 2 --patience 0 --threads 1'.split()

@pytest.fixture(scope='module')
def found(tmp_path_factory):
    "What happens on such a machine"
    there, place = tmp_path_factory.mktemp('read-only'), tmp_path_factory.mktemp('place')
    rng = np.random.default_rng(0); n = rng.integers(4, 20, 30)
    pd.DataFrame(dict(user=np.repeat(np.arange(30), n), item=[f'café {k}' for k in rng.integers(0, 20, n.sum())], timestamp=np.arange(n.sum()) + 10**9)).to_csv(there/'log.csv', index=False)
    run = str(place/'run')
    steps = [['train', 'sasrec', 'log.csv', *TINY, '--out', run], ['train', 'sasrec', 'log.csv', *TINY, '--out', run, '--resume', 'must'], ['evaluate', run], ['runs', str(place)], ['runs', '--check', run], ['data', 'log.csv'], ['doctor'],
             ['train', 'markov', 'log.csv', '--out', str(place/'markov')], ['compare', run, str(place/'markov')], ['train', 'sasrec', 'ml-1m', '--out', str(place/'far')]]
    env = dict(PATH=os.environ['PATH'], PYTHONPATH=str(ROOT), OMP_NUM_THREADS='1', MPLBACKEND='agg', LC_ALL='C', LANG='C', PYTHONUTF8='0', PYTHONCOERCECLOCALE='0', TMPDIR='/no/such/folder', SEQREC_CACHE=str(place/'cache'))
    command = [sys.executable, '-c', CHILD, str(place.resolve()), json.dumps(steps)]
    if shutil.which('unshare') and not subprocess.run(['unshare', '-n', 'true'], capture_output=True).returncode: command = ['unshare', '-n', *command]
    os.chmod(there, 0o555)
    done = subprocess.run(command, cwd=there, env=env, capture_output=True)
    os.chmod(there, 0o755)
    err = done.stderr.decode('utf-8', 'replace')
    assert (place/'found.json').exists(), err[-4000:]
    return json.loads((place/'found.json').read_text()) | dict(out=done.stdout.decode('ascii'), err=err, place=place, there=there, steps=steps)

def test_the_machine_is_as_bad_as_we_say(found):
    "Without this, the tests below would pass on a machine where nothing is wrong"
    assert found['facts'] == dict(write='OSError', mkdir='OSError', home='RuntimeError', umlaut='UnicodeEncodeError', temp='/tmp', backwards=True, net='OSError', encoding='ascii')

def test_everything_local_works(found):
    "Train, resume, evaluate, list, examine, look at data, doctor, a baseline, compare, recommend"
    codes = dict(zip((' '.join(s[:2]) for s in found['steps']), found['codes'])); gap = 'runs --check'
    assert [c for c in found['codes'][:-1]] == [0, 0, 0, 0, codes[gap], 0, 0, 0, 0], found['err'][-3000:]
    assert 'is finished' in found['out'] and 'computed again' in found['out'] and 'NDCG@10' in found['out']
    assert 'caf' in found['answer']
    m = json.loads((found['place']/'run/metrics.json').read_text())
    assert 0 <= m['test_metrics']['NDCG@10'] <= 1 and m['n_users'] == 30

def test_a_set_from_the_network_is_missed_by_name(found):
    assert found['codes'][-1] == 1 and found['refused']
    for part in ('ml-1m is not on this machine', 'Fetch it by hand', 'SEQREC_DATA'): assert part in found['err']

def test_nothing_is_written_outside_the_run_directory(found):
    assert found['strays'] == []
    assert os.listdir(found['there']) == ['log.csv']

def test_durations_do_not_follow_the_clock_on_the_wall(found):
    m = json.loads((found['place']/'run/metrics.json').read_text())
    rows = [json.loads(line) for line in (found['place']/'run/history.jsonl').read_text().splitlines()]
    assert found['clock'] > 3, 'the clock was asked, for dates in logs'
    assert [r['epoch'] for r in rows] == [1, 2] and all(0 < r['seconds'] < 60 and r['targets_per_s'] > 0 for r in rows)
    assert all(0 <= v < 60 for k, v in m['timings'].items() if k.endswith('_s'))
    log = (found['place']/'run/run.log').read_text(encoding='utf-8').splitlines()
    assert log[0][:19] > log[-1][:19], 'dates run backwards, as the clock did'

def clock_calls(text):
    "Calls of the clock on the wall for anything but a date"
    return [n.lineno for n in ast.walk(ast.parse(text)) if isinstance(n, ast.Attribute) and n.attr in ('time', 'time_ns') and isinstance(n.value, ast.Name) and n.value.id == 'time']

def test_no_duration_is_measured_with_the_clock_on_the_wall():
    wrong = {p.name: n for p in (ROOT/'seqrec_nb').rglob('*.py') if (n := clock_calls(p.read_text(encoding='utf-8')))}
    assert wrong == {} and clock_calls('import time\nt = time.time()') == [2] and not clock_calls('time.monotonic(); b.time')
