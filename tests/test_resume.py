"""A run that is killed and resumed ends with the bits of one that was left in peace.

Runs happen in children of `python test_resume.py`, which imports torch once and forks: a kill -9 is real and costs milliseconds.
"""
import hashlib, json, os, random, resource, shutil, signal, subprocess, sys, tempfile, traceback, warnings
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

def build(run, fault=None, at=0, epochs=4, patience=2, d_model=8, resume='auto', every_steps=3, on_save_error='stop',
          size=2_000, until=0, die=0, graceful=True):
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
        if t.step == until > 0: limit(resource.RLIM_INFINITY)
        if t.step == die > 0: kill()
        if t.step == at and fault in DURING_A_STEP and not done:
            done.append(fault)   # a step may have several batches
            return DURING_A_STEP[fault](model, value, size)
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
    callbacks = [*[GracefulStop()] * graceful, Validate(score), History(run/'history.jsonl', on_save_error), Progress(), EarlyStopping(patience),
                 Checkpoint(run, identity, resume, every_seconds=0, every_steps=every_steps, on_save_error=on_save_error), Killer()]
    t = Trainer(model, Loader(data.train, max_len=8, batch_size=16), loss, lr=.02, callbacks=callbacks)
    if fault == 'disk': count_disk_calls(at)
    return t, epochs

def without_guard(fault):
    "Take one guard away: what the twins of the tests look at"
    from seqrec_nb import checkpoint
    if fault == 'unprobed': checkpoint.check_writable = lambda folder: None
    if fault == 'forget_stop': checkpoint.EarlyStopping = type('Nobody', (), {})
    if fault in ('readonly', 'unprobed') and not os.geteuid(): os.setresuid(65534, 65534, 65534)   # root may write anywhere

def limit(size): resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

def nan_gradient(model, value, size):
    next(p for k, p in model.named_parameters() if 'norm' in k).register_hook(lambda g: g * float('nan'))
    return value

def full_disk(model, value, size):
    limit(size)
    return value

DURING_A_STEP = dict(step=lambda m, v, _: kill(), term=lambda m, v, _: (os.kill(os.getpid(), signal.SIGTERM), v)[1],
                     ctrl_c=lambda m, v, _: (os.kill(os.getpid(), signal.SIGINT), v)[1],
                     nan=lambda m, v, _: v * float('nan'), nan_gradient=nan_gradient, full=full_disk,
                     term_full=lambda m, v, size: (full_disk(m, v, size), os.kill(os.getpid(), signal.SIGTERM), v)[2])
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
        without_guard(kw.get('fault'))
        t, epochs = build(run, **kw)
        try: t.fit(epochs)
        finally: limit(resource.RLIM_INFINITY)
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

def test_a_run_of_the_first_version_continues(train, tmp_path):
    "Stopped by 0.1.0 in step 7: a later version takes it up there"
    run = tmp_path/'run'
    shutil.copytree(ROOT/'tests'/'assets'/'checkpoint-0.1.0', run)
    assert train(run, d_model=4, resume='must', patience=0) == FINISHED, out(run)
    rows = [json.loads(line) for line in (run/'history.jsonl').read_text().splitlines()]
    assert [r['epoch'] for r in rows] == [2, 3, 4] and state(run)['step'] == 20 and rows[-1]['loss'] < 2.96

def test_a_time_budget_ends_with_75_and_the_command_that_resumes(tmp_path, monkeypatch, capsys):
    import numpy as np
    from seqrec_nb import callbacks, cli, training
    rng = np.random.default_rng(0)
    rows = [f'{u},{(u + k * rng.integers(1, 3)) % 12},{10**9 + u * 100 + k}' for u in range(30) for k in range(6)]
    (tmp_path/'log.csv').write_text('\n'.join(['user,item,timestamp', *rows]))
    monkeypatch.chdir(tmp_path)
    args = 'train sasrec log.csv --epochs 2 --patience 0 --max_len 5 --d_model 4 --n_blocks 1 --n_heads 1 --batch_size 8 --device cpu --threads 1'.split()
    with monkeypatch.context() as m:
        m.setattr(training, 'GracefulStop', lambda *a: callbacks.GracefulStop(budget=1e-9))
        assert cli.main([*args, '--out', 'part']) == 75
    told = capsys.readouterr().err
    assert state(tmp_path/'part')['step'] == 1 and 'time budget; everything is saved in part' in told
    line = next(l for l in told.splitlines() if l.startswith('resume with: seqrec '))
    assert cli.main(line.removeprefix('resume with: seqrec ').split()) == 0
    assert state(tmp_path/'part')['epoch'] == 2 and (tmp_path/'part'/'metrics.json').exists()

# ---- what the guards are for: the same without one

def test_without_the_handler_a_signal_is_a_kill(train, whole, tmp_path):
    run = tmp_path/'run'
    assert train(run, fault='term', at=13, every_steps=0, graceful=False) == -signal.SIGTERM
    assert state(run)['step'] == 10, 'all steps since the last save are lost'
    assert train(run) == FINISHED
    assert result(run) == whole['result'], 'but the result is not'

def test_without_the_decision_in_the_checkpoint_a_stopped_run_goes_on(train, tmp_path):
    run, kw = tmp_path/'run', dict(patience=1, epochs=40)
    assert train(run, **kw) == FINISHED and 'stop: early stopping' in out(run)
    before = state(run)['step']
    assert train(run, fault='forget_stop', **kw) == FINISHED
    assert state(run)['step'] > before

@pytest.fixture
def readonly():
    "A folder that only its owner may enter, and nobody may write to"
    run = Path(tempfile.mkdtemp(dir='/tmp'))   # not below pytest's folders or TMPDIR, which others may not be able to enter
    run.chmod(0o555)
    yield run
    run.chmod(0o755)
    shutil.rmtree(run)

def test_a_read_only_folder_fails_before_the_first_step(train, readonly):
    if os.geteuid(): pytest.skip('only root can open the log of this test there')
    assert train(readonly, fault='readonly') == REFUSED
    assert f'CheckpointError cannot write to {readonly}' in out(readonly) and 'epoch' not in out(readonly)

def test_without_the_probe_an_epoch_is_trained_first(train, readonly):
    if os.geteuid(): pytest.skip('only root can open the log of this test there')
    assert train(readonly, fault='unprobed', every_steps=0) == REFUSED
    assert 'epoch 1 not recorded' in out(readonly)

# ---- on_save_error='warn'

FULL = dict(fault='full', at=11, on_save_error='warn')
NOT_SAVED = 'not saved, the newest checkpoint is of step'

@pytest.mark.parametrize('size', [2_000, 100], ids=['no room for weights', 'no room for a line of history'])
def test_training_goes_on_without_a_disk_and_saves_when_it_is_back(train, whole, tmp_path, size):
    run, until = tmp_path/'run', whole['steps'] - 2
    assert train(run, **FULL, size=size, until=until) == FINISHED, out(run)
    assert result(run) == whole['result']
    if size == 2_000: assert f'! step 12 {NOT_SAVED} 10; training goes on' in out(run)

def test_what_was_not_saved_at_the_end_fails(train, whole, tmp_path):
    run = tmp_path/'run'
    assert train(run, **FULL) == REFUSED
    assert 'could not save' in out(run).splitlines()[-1] and state(run)['step'] == 10
    assert train(run) == FINISHED
    assert result(run) == whole['result']

def test_killed_while_nothing_could_be_saved(train, whole, tmp_path):
    for size in (2_000, 100):
        run = tmp_path/f'{size}'
        assert train(run, **FULL, size=size, die=whole['steps'] - 1) == KILLED
        assert state(run)['step'] == 10
        assert train(run) == FINISHED
        assert result(run) == whole['result']

def test_an_interrupted_run_that_is_not_saved_does_not_say_so(train, tmp_path):
    "Exit code 75 means that everything is saved"
    run = tmp_path/'run'
    assert train(run, fault='term_full', at=10, every_steps=0, on_save_error='warn') == REFUSED

if __name__ == '__main__': serve()
