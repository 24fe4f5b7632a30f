"""Two processes train like one: the same losses, exactly the same metrics, one directory, one decision to stop.

`python test_parallel.py` imports torch once and forks the processes of each job, with the environment that torchrun would give them.
"""
import json, os, random, signal, socket, subprocess, sys, traceback, warnings
from pathlib import Path
import pytest

ROOT = Path(__file__).resolve().parents[1]

# ------------------------------------------------------------ in the processes

def log():
    "60 users on a ring of 40 items, histories of many lengths"
    import numpy as np, pandas as pd
    rng = np.random.default_rng(0)
    n = rng.integers(4, 30, 60)
    jump = np.where(rng.random(n.sum()) < .7, 1, rng.integers(1, 40, n.sum()))
    return pd.DataFrame(dict(user=np.repeat(np.arange(60), n), item=np.cumsum(jump) % 40, timestamp=10**9 + np.arange(n.sum())))

def steps(out, model='sasrec', loss='ce', dropout=0., fault=None, threads=1, n=20):
    "Losses of 20 steps, and what this process ends with"
    import torch
    from seqrec_nb.all import Callback, EvalLoader, Loader, Trainer, load, ranks, reseed
    from seqrec_nb.losses import make_loss
    from seqrec_nb.models.base import model_class
    from seqrec_nb.parallel import World, join
    torch.set_num_threads(threads)
    world, data, losses = join('cpu'), load(log()), []
    reseed(0, 'two')
    m = model_class(model).from_data(data, max_len=12, d_model=8, dropout=dropout)
    class Watch(Callback):
        def on_step_end(self, t):
            losses.append(float(t.last_loss))
            if t.step == n: t.stop = 'enough'
            if fault == 'drift' and t.step == 3 and world.rank: next(t.model.parameters()).data[1, 0] += 1e-6
            if fault == 'leave' and t.step == 3 and world.rank: t.stop = 'a signal came'
    if fault == 'unweighted': Loader.steps = mean_of_means(Loader.steps)
    if fault == 'blind': World.check_same = lambda *_: None
    if fault in ('blind', 'drift'): fault = 'drift'
    loader = Loader(data.train, max_len=12, batch_size=16, samples='cloze' if m.cloze else 'all')
    t = Trainer(m, loader, make_loss(loss), lr=.01, callbacks=[Watch()], world=world).fit(10)
    loader = EvalLoader(data.valid, max_len=12, batch_size=7)
    r, alone = ranks(m, loader, world=world), ranks(m, loader)
    weights = torch.cat([p.detach().flatten() for p in m.parameters()])
    return dict(losses=losses, weights=weights.tolist(), stop=t.stop, step=t.step,
                ranks=[r.user.tolist(), r.above.tolist(), r.ties.tolist()], alone=[alone.user.tolist(), alone.above.tolist(), alone.ties.tolist()])

def mean_of_means(steps):
    "Steps whose parts count alike, whatever their numbers of targets"
    def same(*a):
        for parts in steps(*a):
            for b in parts: b.n_targets = 10
            yield parts
    return same

def whole(out, kill_at=0, term_at=0, term_epoch=0, seed=0, epochs=3, resume='auto', items=40, **kw):
    "A run of an experiment"
    from seqrec_nb.all import Callback, Experiment, run
    from seqrec_nb.parallel import rank
    from seqrec_nb.train import Trainer
    frame = log()
    csv = Path(out).with_name(f'log{items}.csv')
    if rank() == 0: frame[frame.item < 40].to_csv(csv, index=False)
    if items != 40: csv = Path(out).with_name(f'other{rank()}.csv'); frame[frame.item < 40 - rank()].to_csv(csv, index=False)
    call = Trainer._call
    def hurt(t, hook):
        call(t, hook)
        if hook == 'on_step_end' and t.step == kill_at and rank() == 1: os.kill(os.getpid(), signal.SIGKILL)
        if hook == 'on_step_end' and t.step == term_at and rank() == 1: os.kill(os.getpid(), signal.SIGTERM)
        if hook == 'on_epoch_end' and t.epoch == term_epoch and rank() == 1: os.kill(os.getpid(), signal.SIGTERM)
    Trainer._call = hurt
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter('always')
        run(Experiment(data=str(csv), d_model=8, max_len=12, batch_size=16, epochs=epochs, device='cpu', threads=1, seed=seed, save_every=1e-6, **kw), out, resume)
    return dict(said=[str(w.message) for w in said])

def process(job, out, **kw):
    "Do a job; the exit code"
    sys.stdout = sys.stderr = open(f"{out}.{os.environ.get('RANK', 0)}.txt", 'a', buffering=1)
    from seqrec_nb.experiment import Interrupted
    from seqrec_nb.parallel import leave, rank
    try: found = globals()[job](out, **kw)
    except Interrupted: return 75
    except BaseException: traceback.print_exc(); return 1
    leave()
    Path(f'{out}.{rank()}.json').write_text(json.dumps(found))
    return 0

def serve():
    import torch
    import seqrec_nb.all, torch._dynamo, torch.distributed      # what the children would import one by one
    torch.set_num_threads(1)
    for line in sys.stdin:
        size, job = json.loads(line)
        with socket.socket() as s: s.bind(('127.0.0.1', 0)); port = s.getsockname()[1]
        pids = []
        for r in range(size):
            if not (pid := os.fork()):
                if size > 1: os.environ.update(RANK=str(r), LOCAL_RANK=str(r), WORLD_SIZE=str(size), MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port))
                os._exit(process(**job))
            pids.append(pid)
        print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(p, 0)[1]) for p in pids]), flush=True)

# ------------------------------------------------------------------- the tests

@pytest.fixture(scope='module')
def start():
    "start(processes, job, out, …) -> exit codes"
    p = subprocess.Popen([sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                         env=os.environ | dict(PYTHONPATH=os.pathsep.join([str(ROOT), os.environ.get('PYTHONPATH', '')])))
    def start(size, job, out, **kw):
        p.stdin.write(json.dumps([size, dict(job=job, out=str(out), **kw)]) + '\n')
        p.stdin.flush()
        return json.loads(p.stdout.readline())
    yield start
    p.stdin.close()
    p.wait()

def found(out, rank=0): return json.loads(Path(f'{out}.{rank}.json').read_text())
def text(out, rank=0): return Path(f'{out}.{rank}.txt').read_text()
def gap(a, b): return max(abs(x - y) for x, y in zip(a, b, strict=True))

@pytest.mark.parametrize('kw', [dict(), dict(loss='ss', dropout=.3), dict(model='hybrid_learnable', loss='bpr', dropout=.2), dict(model='bert4rec', dropout=.1)],
                         ids=lambda kw: '-'.join(map(str, kw.values())) or 'sasrec-ce')
def test_two_processes_compute_what_one_computes(kw, start, tmp_path):
    "Also with dropout and negatives: both are functions of (seed, step, part)"
    assert start(1, 'steps', tmp_path/'one', **kw) == [0], text(tmp_path/'one')
    assert start(2, 'steps', tmp_path/'two', **kw) == [0, 0], text(tmp_path/'two')
    one, two, other = found(tmp_path/'one'), found(tmp_path/'two'), found(tmp_path/'two', 1)
    assert len(set(one['losses'])) > 10 and len(one['losses']) == 20
    assert gap(one['losses'], two['losses']) < 1e-6 and two['losses'] == other['losses']
    assert two['weights'] == other['weights'] and gap(one['weights'], two['weights']) < 1e-3
    assert two['ranks'] == two['alone'] == other['ranks'] and len(two['ranks'][0]) == 60      # nobody twice, nobody missing

def test_three_processes_and_threads(start, tmp_path):
    "Of four parts one process takes two; then two threads in each of two processes"
    assert start(1, 'steps', tmp_path/'one') == [0] and start(3, 'steps', tmp_path/'three') == [0, 0, 0], text(tmp_path/'three')
    assert start(2, 'steps', tmp_path/'threads', threads=2, n=6) == [0, 0], text(tmp_path/'threads')
    losses = found(tmp_path/'one')['losses']
    assert gap(losses, found(tmp_path/'three', 2)['losses']) < 1e-6 and gap(losses[:6], found(tmp_path/'threads')['losses']) < 1e-6

def test_without_the_weights_by_targets_the_losses_part(start, tmp_path):
    assert start(1, 'steps', tmp_path/'one') == [0] and start(2, 'steps', tmp_path/'two', fault='unweighted') == [0, 0], text(tmp_path/'two')
    assert gap(found(tmp_path/'one')['losses'], found(tmp_path/'two')['losses']) > 1e-3

def test_processes_that_drift_apart_are_stopped(start, tmp_path):
    assert start(2, 'steps', tmp_path/'two', fault='drift') == [1, 1]
    assert 'Drift: 1 of ' in text(tmp_path/'two') and 'first item.weight' in text(tmp_path/'two', 1)

def test_without_the_check_two_models_would_be_trained(start, tmp_path):
    assert start(2, 'steps', tmp_path/'two', fault='blind') == [0, 0]
    assert found(tmp_path/'two')['weights'] != found(tmp_path/'two', 1)['weights']

def test_all_leave_together(start, tmp_path):
    assert start(2, 'steps', tmp_path/'two', fault='leave') == [0, 0]
    a, b = found(tmp_path/'two'), found(tmp_path/'two', 1)
    assert (a['step'], a['stop']) == (3, 'interrupted') and (b['step'], b['stop']) == (3, 'a signal came')

def metrics(run):
    m = json.loads((run/'metrics.json').read_text())
    return {k: m[k] for k in ('test_metrics', 'grouped_metrics', 'best_epoch', 'valid_metrics', 'checkpoint')} | dict(sha=m['checkpoint']['sha256'], checkpoint=0)

def rows(run): return [{k: r[k] for k in ('epoch', 'step', 'loss', 'targets', 'valid')} for r in map(json.loads, (run/'history.jsonl').read_text().splitlines())]

def test_one_directory_one_test(start, tmp_path):
    "The run of two processes looks like that of one, and continues to the same bits when one of them was told to stop"
    assert start(1, 'whole', tmp_path/'one') == [0], text(tmp_path/'one')
    assert start(2, 'whole', tmp_path/'two') == [0, 0], text(tmp_path/'two')
    assert {p.name for p in (tmp_path/'one').iterdir()} == {p.name for p in (tmp_path/'two').iterdir()}
    a, b = rows(tmp_path/'one'), rows(tmp_path/'two')
    assert [r['epoch'] for r in b] == [1, 2, 3] and gap([r['loss'] for r in a], [r['loss'] for r in b]) < 1e-6
    assert 'epoch 3/3' in text(tmp_path/'two') and not text(tmp_path/'two', 1)                 # one of them speaks
    assert start(2, 'whole', tmp_path/'cut', term_at=5) == [75, 75], text(tmp_path/'cut')
    assert json.loads((tmp_path/'cut/last/state.json').read_text())['trainer']['step'] == 5
    assert start(2, 'whole', tmp_path/'cut') == [0, 0] and metrics(tmp_path/'cut') == metrics(tmp_path/'two') and rows(tmp_path/'cut') == b
    assert start(2, 'whole', tmp_path/'cut') == [0, 0] and 'is finished' in text(tmp_path/'cut')
    assert start(2, 'whole', tmp_path/'late', term_epoch=3) == [75, 75], 'after the last epoch one would test and the other leave'
    assert start(2, 'whole', tmp_path/'late') == [0, 0] and metrics(tmp_path/'late') == metrics(tmp_path/'two')

def test_a_process_dies(start, tmp_path):
    "The others stop, the checkpoint stands, and one process alone continues, to other bits, and says so"
    codes = start(2, 'whole', tmp_path/'run', kill_at=6)
    assert codes[1] == -signal.SIGKILL and codes[0] == 1, text(tmp_path/'run')
    assert json.loads((tmp_path/'run/last/state.json').read_text())['trainer']['step'] in (5, 6)
    assert start(1, 'whole', tmp_path/'run') == [0], text(tmp_path/'run')
    assert [r['epoch'] for r in rows(tmp_path/'run')] == [1, 2, 3] and metrics(tmp_path/'run')['best_epoch']
    said = ' '.join(found(tmp_path/'run')['said'])
    assert 'not to the same bits' in said and 'processes: 2 then, 1 now' in said

def test_other_data_are_refused(start, tmp_path):
    assert start(2, 'whole', tmp_path/'run', items=1) == [1, 1]
    assert 'process 1 would train another experiment' in text(tmp_path/'run', 1) and 'fingerprint' in text(tmp_path/'run', 1)

def test_another_run_in_the_directory_stops_all(start, tmp_path):
    assert start(1, 'whole', tmp_path/'run', epochs=1) == [0]
    assert start(2, 'whole', tmp_path/'run', epochs=1, seed=1) == [1, 1]
    assert 'CheckpointError' in text(tmp_path/'run') and 'seed: 0 then, 1 now' in text(tmp_path/'run')

def test_too_many_processes_for_a_step():
    from seqrec_nb.all import CrossEntropy, Loader, Trainer, create, load
    from seqrec_nb.parallel import World
    data = load(log())
    with pytest.raises(ValueError, match=r'8 processes cannot share steps of 4 parts: Loader\(parts=8\)'):
        Trainer(create('sasrec', data.n_items, d_model=8), Loader(data.train, parts=4), CrossEntropy(), world=World(0, 8))

def test_no_launcher(monkeypatch):
    from seqrec_nb.parallel import join
    assert join().size == 1
    monkeypatch.setenv('WORLD_SIZE', '2')
    monkeypatch.delenv('MASTER_ADDR', raising=False)
    with pytest.raises(RuntimeError, match='MASTER_ADDR.* not set: start with torchrun'): join()

def test_grid_starts_its_own_processes(monkeypatch):
    from seqrec_nb.commands import grid
    from seqrec_nb.flags import UsageError
    monkeypatch.setenv('WORLD_SIZE', '2')
    with pytest.raises(UsageError, match='without a launcher'): grid(['quick', '--dry-run'])

def test_torchrun(tmp_path):
    "The documented line, with the launcher itself"
    log().to_csv(tmp_path/'log.csv', index=False)
    line = f'-m torch.distributed.run --nproc-per-node 2 -m seqrec_nb.cli train sasrec log.csv --epochs 2 --max_len 12 --d_model 8 --device cpu --out run'
    done = subprocess.run([sys.executable, *line.split()], cwd=tmp_path, capture_output=True, text=True,
                          env=os.environ | dict(PYTHONPATH=str(ROOT), OMP_NUM_THREADS='1'))
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count('sasrec on log') == 1 and done.stdout.count('epoch 2/2') == 1
    assert 'not to the same bits' not in done.stderr and (tmp_path/'run'/'metrics.json').exists()

if __name__ == '__main__': serve()
