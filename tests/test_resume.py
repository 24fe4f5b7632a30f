"""A run that is killed and resumed ends with the bits of one that was left in peace.

Runs happen in children of `python test_resume.py`, which imports torch once and forks: a kill -9 is real and costs milliseconds.
"""
import hashlib, json, os, random, resource, shutil, signal, subprocess, sys, traceback, warnings
from pathlib import Path
import pytest

ROOT = Path(__file__).resolve().parents[1]
FINISHED, INTERRUPTED, REFUSED, NONFINITE, KILLED = 0, 75, 3, 4, -signal.SIGKILL
TIMED = ('seconds', 'targets_per_s', 'memory_mb')

# ---------------------------------------------------------------- in the child

def toy_data():
    "80 users whose next item usually follows the last one"
    import numpy as np
    from seqrec_nb.data.sequences import Sequences
    from seqrec_nb.data.splits import leave_one_out
    rng = np.random.default_rng(0)
    n = rng.integers(4, 12, 80)
    jump = np.where(rng.random(n.sum()) < .7, 1, rng.integers(1, 20, n.sum()))
    items = (np.cumsum(jump) % 20 + 1).astype(np.int32)
    return leave_one_out(Sequences(items, np.r_[0, n.cumsum()], None, np.arange(80), np.arange(20)))

def kill(): os.kill(os.getpid(), signal.SIGKILL)

def build(run, fault=None, at=0, epochs=4, patience=2, d_model=8, resume='auto', every_steps=3):
    "The trainer of a small run, with a fault in it"
    import torch
    from seqrec_nb.callbacks import EarlyStopping, GracefulStop, History, Progress, Validate
    from seqrec_nb.checkpoint import Checkpoint
    from seqrec_nb.data.loader import EvalLoader, Loader
    from seqrec_nb.evaluate import ranks
    from seqrec_nb.losses import CrossEntropy
    from seqrec_nb.metrics import ndcg
    from seqrec_nb.models.sasrec import SASRec
    from seqrec_nb.train import Callback, Trainer
    data = toy_data()
    torch.manual_seed(0)
    model = SASRec(data.n_items, d_model=d_model, n_blocks=1, n_heads=2, max_len=8, dropout=.3)
    ce, valid, done = CrossEntropy(), EvalLoader(data.valid, max_len=8), []
    def loss(model, out, b):
        value = ce(model, out, b)
        if t.step == at and fault in DURING_A_STEP and not done:
            done.append(fault)   # a step may have several batches
            return DURING_A_STEP[fault](model, value)
        return value
    def score(model):
        found = ranks(model, valid)
        if fault == 'score' and t.epoch == at: kill()
        return {'NDCG@10': float(ndcg(found).mean())}
    class Killer(Callback):
        def on_fit_start(self, t):
            if fault == 'forget': t.step = 0   # what a trainer would do that restored its weights only
        def on_fit_end(self, t):
            if fault == 'end': kill()
    identity = dict(model=dict(d_model=d_model), data=data.fingerprint)
    callbacks = [GracefulStop(), Validate(score), History(run/'history.jsonl'), Progress(), EarlyStopping(patience),
                 Checkpoint(run, identity, resume, every_seconds=0, every_steps=every_steps), Killer()]
    t = Trainer(model, Loader(data.train, max_len=8, batch_size=16), loss, lr=.02, callbacks=callbacks)
    if fault == 'disk': count_disk_calls(at)
    return t, epochs

def nan_gradient(model, value):
    next(p for k, p in model.named_parameters() if 'norm' in k).register_hook(lambda g: g * float('nan'))
    return value

def full_disk(model, value):
    resource.setrlimit(resource.RLIMIT_FSIZE, (2_000, resource.RLIM_INFINITY))
    return value

DURING_A_STEP = dict(step=lambda m, v: kill(), term=lambda m, v: (os.kill(os.getpid(), signal.SIGTERM), v)[1],
                     ctrl_c=lambda m, v: (os.kill(os.getpid(), signal.SIGINT), v)[1],
                     nan=lambda m, v: v * float('nan'), nan_gradient=nan_gradient, full=full_disk)
DISK = ('mkdir', 'fsync', 'rename', 'replace', 'truncate', 'unlink', 'rmdir')

def count_disk_calls(at):
    "Die in front of the at-th call that changes the disk, counted over the whole run; their number is left in DISK_CALLS"
    global DISK_CALLS
    DISK_CALLS = 0
    def dying(call):
        def counted(*a, **k):
            global DISK_CALLS
            DISK_CALLS += 1
            if DISK_CALLS == at: kill()
            return call(*a, **k)
        return counted
    for name in DISK: setattr(os, name, dying(getattr(os, name)))

def child(run, **kw):
    "Train in this process; its exit code"
    from seqrec_nb.checkpoint import CheckpointError
    from seqrec_nb.train import NonFinite
    run = Path(run)
    run.mkdir(parents=True, exist_ok=True)
    os.fsync = lambda fd: None   # a kill does not need it, and a slow disk would make the tests slow
    sys.stdout = sys.stderr = log = open(run/'out.txt', 'a')
    warnings.simplefilter('always')
    try:
        t, epochs = build(run, **kw)
        t.fit(epochs)
        print('stop:', t.stop, 'step:', t.step, 'disk calls:', globals().get('DISK_CALLS'))
        return INTERRUPTED if t.stop == 'interrupted' else FINISHED
    except (CheckpointError, NonFinite) as e:
        print(type(e).__name__, e)
        return REFUSED if isinstance(e, CheckpointError) else NONFINITE
    except BaseException:
        traceback.print_exc()
        return 1
    finally: log.flush()

def save_step(run, step, at=-1):
    "Save a small checkpoint of this step, and die in front of the at-th change of the disk"
    import torch
    from seqrec_nb.checkpoint import save
    if at >= 0: count_disk_calls(at)
    save(Path(run)/'last', dict(model=dict(w=torch.full((5,), step))), dict(step=step))
    return FINISHED

def serve():
    "Read one job a line, run it in a forked child, answer with its exit code"
    import torch
    torch.set_num_threads(1)
    build(Path('none'))   # imports all that the children need
    for line in sys.stdin:
        pid = os.fork()
        job = json.loads(line)
        if not pid: os._exit(save_step(**job) if 'step' in job else child(**job))
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)

# --------------------------------------------------------------- in the tests

@pytest.fixture(scope='module')
def train():
    "train(run, **kw) -> exit code"
    p = subprocess.Popen([sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                         env=os.environ | dict(PYTHONPATH=os.pathsep.join([str(ROOT), os.environ.get('PYTHONPATH', '')])))
    def train(run, **kw):
        p.stdin.write(json.dumps(dict(run=str(run), **kw)) + '\n')
        p.stdin.flush()
        return int(p.stdout.readline())
    yield train
    p.stdin.close()
    p.wait()

def out(run): return (run/'out.txt').read_text()

def result(run):
    "All that must not depend on interruptions: weights, optimizer, history, best epoch"
    sha = lambda name: hashlib.sha256((run/name).read_bytes()).hexdigest()
    rows = [json.loads(line) for line in (run/'history.jsonl').read_text().splitlines()]
    best = json.loads((run/'best'/'state.json').read_text())
    return dict(weights=sha('last/model.safetensors'), optimizer=sha('last/optim.safetensors'), best=sha('best/model.safetensors'),
                history=[{k: v for k, v in r.items() if k not in TIMED} for r in rows], best_state=best)

@pytest.fixture(scope='module')
def whole(train, tmp_path_factory):
    "The run that nobody disturbs"
    run = tmp_path_factory.mktemp('whole')/'run'
    assert train(run, fault='disk', at=-1) == FINISHED, out(run)
    found = result(run)
    found_rows = found['history']
    assert [r['epoch'] for r in found_rows] == list(range(1, len(found_rows) + 1)) and found_rows[-1]['loss'] < found_rows[0]['loss']
    words = out(run).split()
    return dict(result=found, run=run, steps=found_rows[-1]['step'], disk_calls=int(words[words.index('calls:') + 1]))

def steps(whole, n, seed=0): return sorted(random.Random(seed).sample(range(1, whole['steps']), n))

def state(run): return json.loads((run/'last'/'state.json').read_text())['trainer']

def test_a_run_is_a_function_of_its_settings(train, whole, tmp_path):
    assert train(tmp_path/'again', every_steps=0) == FINISHED
    assert result(tmp_path/'again') == whole['result'], 'the frequency of saving leaves no trace'
    assert train(tmp_path/'other', d_model=4) == FINISHED
    assert result(tmp_path/'other') != whole['result'], 'and this test can see a difference'

def test_kill_at_random_steps(train, whole, tmp_path):
    for at in steps(whole, 6):
        run = tmp_path/f'{at}'
        assert train(run, fault='step', at=at) == KILLED
        assert train(run) == FINISHED, out(run)
        assert result(run) == whole['result'], f'killed in step {at}'

def test_killed_again_and_again(train, whole, tmp_path):
    run = tmp_path/'run'
    for at in steps(whole, 4, seed=1): assert train(run, fault='step', at=at) == KILLED
    assert train(run) == FINISHED
    assert result(run) == whole['result']

def test_kill_at_any_change_of_the_disk(train, whole, tmp_path):
    "Saves of last/ and best/, history lines, and what lies between them"
    n = whole['disk_calls']
    assert n > 100
    for at in sorted(random.Random(2).sample(range(1, n + 1), 12)):
        run = tmp_path/f'{at}'
        assert train(run, fault='disk', at=at) == KILLED
        assert train(run) == FINISHED, out(run)
        assert result(run) == whole['result'], f'killed at disk call {at} of {n}'
        assert not list(run.glob('.*-next')) and not list(run.glob('.*.new')), 'temporary folders are swept'

def test_kill_at_every_point_of_one_save(train, tmp_path):
    "The completed save before is never lost, and the next save works on whatever is left"
    from seqrec_nb.checkpoint import load
    points = returned = 0
    for at in range(1, 100):
        run = tmp_path/f'{at}'
        for step in (1, 2): assert train(run, step=step) == FINISHED
        if train(run, step=3, at=at) == FINISHED: break
        found = load(run/'last').state['step']
        points, returned = points + 1, returned + (found == 3)
        assert found in (2, 3), f'killed at point {at}'
        assert train(run, step=4) == FINISHED
        found = load(run/'last')
        assert found.state['step'] == 4 and found.tensors['model']['w'].tolist() == [4] * 5
        assert sorted(p.name for p in run.iterdir()) == ['.last-previous', 'last']
    assert points >= 12 and 0 < returned < points

def test_kill_in_the_evaluation(train, whole, tmp_path):
    for at in (1, 2):
        run = tmp_path/f'{at}'
        assert train(run, fault='score', at=at) == KILLED
        assert train(run) == FINISHED
        assert result(run) == whole['result']

@pytest.mark.parametrize('kw', [dict(), dict(patience=1, epochs=40)], ids=['all epochs', 'early stopping'])
def test_kill_after_the_last_step_then_resume_is_a_no_op(train, tmp_path, kw):
    run = tmp_path/'run'
    assert train(run, fault='end', **kw) == KILLED
    before, times = result(run), {p: p.stat().st_mtime_ns for p in run.rglob('*') if p.is_file() and p.name not in ('out.txt', '.probe')}
    stop = 'early stopping' if kw else 'None'
    for _ in range(2):
        assert train(run, **kw) == FINISHED
        assert f"stop: {stop} step: {before['history'][-1]['step']}" in out(run).splitlines()[-1]
    assert result(run) == before
    assert {p: p.stat().st_mtime_ns for p in times} == times, 'nothing is written again'

@pytest.mark.parametrize('fault', ['term', 'ctrl_c'])
def test_a_signal_finishes_the_step_and_saves(train, whole, tmp_path, fault):
    (at,) = steps(whole, 1, seed=5)
    run = tmp_path/'run'
    assert train(run, fault=fault, at=at, every_steps=0) == INTERRUPTED
    assert state(run)['step'] == at + 1 and f'step: {at + 1}' in out(run)
    assert train(run) == FINISHED
    assert result(run) == whole['result']

@pytest.mark.parametrize('fault', ['nan', 'nan_gradient'])
def test_nan_stops_before_the_step(train, whole, tmp_path, fault):
    (at,) = steps(whole, 1, seed=6)
    run = tmp_path/'run'
    assert train(run, fault=fault, at=at, every_steps=1) == NONFINITE
    assert state(run)['step'] == at, 'the last checkpoint is from before the bad step'
    message = out(run)
    assert 'NonFinite' in message and str(at) in message
    if fault == 'nan_gradient': assert 'norm' in message, message
    assert train(run) == FINISHED
    assert result(run) == whole['result']

def test_a_full_disk_stops_the_run_and_keeps_the_checkpoint(train, whole, tmp_path):
    run = tmp_path/'run'
    assert train(run, fault='full', at=10) == REFUSED
    assert 'CheckpointError could not save' in out(run) and state(run)['step'] == 10
    assert train(run) == FINISHED
    assert result(run) == whole['result']

def test_a_damaged_checkpoint_is_passed_over_with_a_warning(train, whole, tmp_path):
    run = tmp_path/'run'
    assert train(run, fault='step', at=14) == KILLED
    path = run/'last'/'optim.safetensors'
    path.write_bytes(path.read_bytes()[:-5])
    assert train(run) == FINISHED
    assert 'optim.safetensors has' in out(run) and '.last-previous' in out(run)
    assert result(run) == whole['result']

def test_nothing_sound_is_refused_unless_told_to_start_afresh(train, whole, tmp_path):
    run = tmp_path/'run'
    assert train(run, fault='step', at=14) == KILLED
    for folder in ('last', '.last-previous'): (run/folder/'state.json').write_text('{}')
    assert train(run) == REFUSED and 'no sound checkpoint' in out(run)
    assert train(run, resume='never') == FINISHED
    assert result(run) == whole['result']

def test_another_run_is_refused(train, whole, tmp_path):
    run = tmp_path/'run'
    assert train(run, fault='step', at=9) == KILLED
    assert train(run, d_model=4) == REFUSED
    assert 'model.d_model: 8 then, 4 now' in out(run)
    assert train(tmp_path/'empty', resume='must') == REFUSED and 'there is none' in out(tmp_path/'empty')
    assert train(run) == FINISHED
    assert result(run) == whole['result']

def test_a_file_in_place_of_the_folder_fails_before_the_first_step(train, tmp_path):
    run = tmp_path/'run'
    run.mkdir()
    (run/'last').write_text('')
    assert train(run) == REFUSED
    assert not (run/'history.jsonl').exists()

def test_without_the_counter_the_bits_would_differ(train, whole, tmp_path):
    run = tmp_path/'run'
    assert train(run, fault='step', at=9) == KILLED
    assert train(run, fault='forget') == FINISHED
    assert result(run)['weights'] != whole['result']['weights'], 'so the other tests do look at the randomness of the steps'

def test_another_environment_is_announced(train, tmp_path):
    from seqrec_nb.checkpoint import seal
    from seqrec_nb.files import dumps
    run = tmp_path/'run'
    assert train(run, fault='step', at=9) == KILLED
    path = run/'last'/'MANIFEST.json'
    m = json.loads(path.read_text())
    del m['seal']
    m['environment']['threads'] = 7
    path.write_text(dumps(seal(m)))
    assert train(run) == FINISHED
    assert 'not to the same bits: threads: 7 then, 1 now' in out(run)

if __name__ == '__main__': serve()
