"The file format: what is damaged is found, what is refused says why, and an old checkpoint outlives a save that fails."
import errno, importlib.util, json, os, random, resource, shutil, stat, subprocess, sys, warnings
from pathlib import Path
from types import SimpleNamespace
import numpy as np, pytest, torch
from safetensors.torch import load_file
import seqrec_nb
from seqrec_nb import checkpoint as C, files as F, manifest as M
from seqrec_nb.callbacks import Validate

ROOT = Path(seqrec_nb.__file__).parents[1]

def tensors(step, n=40):
    g = torch.Generator().manual_seed(step)
    return dict(model=dict(w=torch.randn(n, generator=g), b=torch.randn(3, generator=g)), optim={'w.exp_avg': torch.randn(n, generator=g)})

@pytest.fixture
def last(tmp_path):
    "A checkpoint of step 2 with one of step 1 behind it"
    for step in (1, 2): C.save(tmp_path/'last', tensors(step), dict(step=step, identity=dict(model=dict(dim=4), data='a')))
    return tmp_path/'last'

def loaded_step(folder):
    "The step that `load` returns and its warnings; the tensors must be those of that step"
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter('always')
        found = C.load(folder)
    want = tensors(found.state['step'])
    assert all(torch.equal(found.tensors[g][k], t) for g in want for k, t in want[g].items())
    return found.state['step'], [str(w.message) for w in seen]

def test_round_trip(last):
    assert loaded_step(last) == (2, [])
    found = C.load(last)
    assert set(found.tensors) == {'model', 'optim'} and found.path == last
    assert {p.name for p in last.iterdir()} == {'model.safetensors', 'optim.safetensors', 'state.json', 'MANIFEST.json'}
    m = json.loads((last/'MANIFEST.json').read_text())
    assert m['format'] == C.FORMAT and m['environment']['torch'] == torch.__version__ and m['environment']['threads'] == torch.get_num_threads()
    assert m['files']['model.safetensors'] == dict(size=(last/'model.safetensors').stat().st_size, sha256=F.sha256(last/'model.safetensors'))

def test_every_dtype_and_tied_and_strided_tensors(tmp_path):
    w = torch.randn(4, 6)
    group = dict(tied=w, again=w, turned=w.T, one=torch.tensor(3.), none=torch.zeros(0, 5), half=w.bfloat16(), n=torch.arange(3), yes=torch.tensor([True]))
    C.save(tmp_path/'x', dict(model=group), {})
    found = C.load(tmp_path/'x').tensors['model']
    assert found.keys() == group.keys() and all(torch.equal(found[k], v) and found[k].dtype == v.dtype for k, v in group.items())

def test_same_content_gives_the_same_bytes(tmp_path):
    for name in ('a', 'b'): C.save(tmp_path/name, tensors(1), dict(step=1))
    assert all(F.sha256(tmp_path/'a'/f) == F.sha256(tmp_path/'b'/f) for f in ('model.safetensors', 'optim.safetensors', 'state.json'))

def test_files_have_the_usual_mode(last):
    old = os.umask(0o022)
    try: C.save(last, tensors(3), {})
    finally: os.umask(old)
    assert {stat.S_IMODE(p.stat().st_mode) for p in last.iterdir()} == {0o644}

def test_loaded_tensors_outlive_the_files(last):
    found = C.load(last)
    for p in last.iterdir(): p.write_bytes(b'\0' * p.stat().st_size)
    assert torch.equal(found.tensors['model']['w'], tensors(2)['model']['w'])

def test_three_hundred_bit_flips_none_silent(last):
    rng, names = random.Random(0), sorted(p.name for p in last.iterdir())
    silent = 0
    for _ in range(300):
        path = last/rng.choice(names)
        good = path.read_bytes()
        bit = rng.randrange(8 * len(good))
        path.write_bytes(good[:bit // 8] + bytes([good[bit // 8] ^ 1 << bit % 8]) + good[bit // 8 + 1:])
        try: C.verify(last); silent += 1
        except C.Damaged as e: assert path.name in str(e)
        path.write_bytes(good)
    assert silent == 0
    assert loaded_step(last) == (2, [])

def test_without_the_manifest_a_flip_would_be_silent(last):
    path, rng, silent = last/'model.safetensors', random.Random(0), 0
    good, body = path.read_bytes(), 4 * sum(t.numel() for t in tensors(2)['model'].values())
    for _ in range(50):
        bit = rng.randrange(8 * (len(good) - body), 8 * len(good))
        path.write_bytes(good[:bit // 8] + bytes([good[bit // 8] ^ 1 << bit % 8]) + good[bit // 8 + 1:])
        got = load_file(path)
        silent += not all(torch.equal(got[k], t) for k, t in tensors(2)['model'].items())
    assert silent == 50, 'safetensors alone reads every one of these wrong weights without an error'

@pytest.mark.parametrize('name', ['model.safetensors', 'optim.safetensors', 'state.json', 'MANIFEST.json'])
def test_truncation_falls_back_and_says_so(last, name):
    path = last/name
    good = path.read_bytes()
    for size in sorted({*range(0, len(good), max(1, len(good) // 15)), len(good) - 1}):
        path.write_bytes(good[:size])
        step, (warning,) = loaded_step(last)
        assert step == 1 and name in warning and '.last-previous' in warning
    path.unlink()
    step, (warning,) = loaded_step(last)
    assert step == 1 and f'{name} is missing' in warning
    path.write_bytes(good)
    assert loaded_step(last) == (2, [])

def test_none_sound_is_an_error_that_names_every_fault(last):
    (last/'state.json').write_text('')
    (C.beside(last, 'previous')/'model.safetensors').unlink()
    with pytest.raises(C.CheckpointError, match=r'(?s)last/state.json has 0 bytes.*-previous/model.safetensors is missing'): C.load(last)
    with pytest.raises(C.CheckpointError, match='there is none'): C.load(last.parent/'other')
    assert C.exists(last) and not C.exists(last.parent/'other')

def test_a_damaged_checkpoint_is_replaced_by_the_next_save(last):
    (last/'state.json').write_text('')
    C.save(last, tensors(3), dict(step=3))
    assert loaded_step(last) == (3, [])

def test_killed_saves_are_swept_or_finished(last):
    new = C.beside(last, 'next')
    new.mkdir()
    (new/'model.safetensors').write_bytes(b'half')
    assert loaded_step(last) == (2, [])
    C.settle(last)
    assert not new.exists() and loaded_step(last) == (2, [])
    C.save(last.parent/'x', tensors(3), dict(step=3))
    (last.parent/'x').rename(new)
    assert loaded_step(last) == (3, []), 'a finished next checkpoint is the newest one, whether or not it is in place'
    C.settle(last)
    assert not new.exists() and json.loads((last/'state.json').read_text())['step'] == 3
    assert json.loads((C.beside(last, 'previous')/'state.json').read_text())['step'] == 2

def test_another_run_is_refused_with_the_difference(last):
    assert C.load(last, identity=dict(model=dict(dim=4), data='a')).state['step'] == 2
    with pytest.raises(C.CheckpointError) as e: C.load(last, identity=dict(model=dict(dim=5, heads=2), data='a'))
    assert 'model.dim: 4 then, 5 now' in str(e.value) and 'model.heads: absent then, 2 now' in str(e.value) and 'data' not in str(e.value)
    with pytest.raises(C.CheckpointError, match="data: a then, b now"): C.load(last, identity=dict(model=dict(dim=4), data='b'))

def test_another_format_is_refused_and_says_who_reads_it(last):
    m = json.loads((last/'MANIFEST.json').read_text())
    del m['seal']
    (last/'MANIFEST.json').write_text(F.dumps(C.seal(m | dict(format=C.FORMAT + 1, seqrec_nb='9.9.9'))))
    with pytest.raises(C.CheckpointError, match=r'format 2.*reads format 1.*seqrec_nb==9\.9\.9'): C.load(last)

def test_disk_full_leaves_the_old_checkpoint(last):
    big, limits = tensors(3, n=60_000), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(C.CheckpointError, match='(?s)could not save.*intact'): C.save(last, big, dict(step=3))
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert loaded_step(last) == (2, []) and not C.beside(last, 'next').exists()
    C.save(last, tensors(3), dict(step=3))
    assert loaded_step(last) == (3, [])

# ---- twins: what a save would be without its order of operations

class Killed(BaseException): "In place of a kill -9"

def write_over(folder, tensors, state):
    "A save without a second folder: the new files replace the old ones, one after the other"
    C.fill(folder, tensors, state)

@pytest.mark.parametrize('fault', [Killed(), OSError(errno.ENOSPC, 'No space left on device')], ids=['killed', 'disk full'])
@pytest.mark.parametrize('how, kept', [(C.save, True), (write_over, False)], ids=['save', 'twin: writing over'])
def test_a_save_that_ends_half_way(how, kept, fault, last, monkeypatch):
    "In front of any file of it: the checkpoint before is still there, because it was not written over"
    C.save(last.parent/'new', tensors(3), dict(step=3))
    def after(n):
        def write(path, data):
            nonlocal n
            n -= 1
            if n < 0: raise fault
            path.write_bytes(data)
        return write
    for n in range(1, 4):
        with monkeypatch.context() as m:
            m.setattr(C, 'write', after(n))
            m.setattr(M, 'write', after(0 if n == 3 else 9))
            with pytest.raises((Killed, OSError, C.CheckpointError)): how(last, tensors(3), dict(step=3))
        if kept: assert C.load(last, fallback=False).state['step'] == 2
        else:
            with pytest.raises(C.CheckpointError, match='no sound checkpoint'): C.load(last, fallback=False)

def test_twin_without_a_fallback_a_damaged_checkpoint_is_the_end(last):
    (last/'optim.safetensors').write_bytes(b'')
    assert loaded_step(last)[0] == 1
    with pytest.raises(C.CheckpointError, match='optim.safetensors has 0 bytes'): C.load(last, fallback=False)
    shutil.rmtree(C.beside(last, 'previous'))
    with pytest.raises(C.CheckpointError, match='optim.safetensors has 0 bytes'): C.load(last)

def test_twin_without_the_identity_other_weights_are_taken(last):
    other = dict(model=dict(dim=4), data='b')
    with pytest.raises(C.CheckpointError, match='data: a then, b now'): C.load(last, identity=other)
    found = C.load(last)
    assert torch.equal(found.tensors['model']['w'], tensors(2)['model']['w']), 'they fit: as many numbers, of other items'

# ---- best/ is the best

def best(run, *epochs):
    for n in epochs: C.save(run/'best', dict(model=dict(w=torch.tensor(n))), dict(epoch=n))
    return run/'best'

def chosen(epoch):
    v = Validate(None)
    v.best_epoch = epoch
    return v

def test_a_best_that_is_not_the_chosen_epoch_is_not_tested(tmp_path, monkeypatch):
    C.check_best(best(tmp_path, 1, 2), chosen(2))
    C.check_best(tmp_path/'none', None)
    C.check_best(tmp_path/'none', chosen(0))
    with pytest.raises(C.CheckpointError, match='best epoch is 3, but .*best holds epoch 2'): C.check_best(tmp_path/'best', chosen(3))
    (tmp_path/'best'/'state.json').write_text('{}')
    with pytest.raises(C.CheckpointError, match='best epoch is 2, but .* no sound checkpoint'): C.check_best(tmp_path/'best', chosen(2))

def test_a_best_of_an_abandoned_future_is_taken_back(tmp_path):
    "Killed between best/ and last/, and continued from last/"
    folder = best(tmp_path, 1, 2)
    with pytest.raises(C.CheckpointError): C.check_best(folder, chosen(1))   # what the end would say without it
    C.settle_best(folder, chosen(2))
    assert C.epoch_in(folder) == 2
    C.settle_best(folder, chosen(1))
    C.check_best(folder, chosen(1))
    C.settle_best(folder, chosen(7))
    assert C.epoch_in(folder) == 1, 'what is nowhere cannot be taken back'

class Saver:
    "Counters, tensors and callbacks of a trainer"
    def __init__(self, run, **kw):
        self.v, self.w = chosen(0), torch.zeros(2)
        self.callbacks = [self.v, C.Checkpoint(run, every_seconds=0, **kw)]
        self.epoch = self.step = self.step_in_epoch = 0
        self.stop = self.error = None
        self.device, self.record = 'cpu', dict(valid={})
        self.callbacks[1].on_fit_start(self)
    def tensors(self): return dict(model=dict(w=self.w))
    def state(self): return dict(epoch=self.epoch)
    def end_epoch(self):
        self.epoch, self.step = self.epoch + 1, self.step + 5
        self.w += 1   # in place, as an optimizer does
        self.v.best, self.v.best_epoch, self.v.improved = self.epoch, self.epoch, self.epoch < 3
        if not self.v.improved: self.v.best_epoch = 2
        self.callbacks[1].on_epoch_end(self)

@pytest.fixture
def full(monkeypatch):
    "A switch that fills the disk"
    def fill(folder, *a): raise OSError(errno.ENOSPC, 'No space left on device')
    def switch(on): monkeypatch.setattr(C, 'fill', fill if on else real)
    real = C.fill
    return switch

def test_a_best_that_could_not_be_saved_is_kept_until_it_can(tmp_path, full):
    t = Saver(tmp_path, on_save_error='warn')
    t.end_epoch()
    full(True)
    with pytest.warns(UserWarning, match=r'step 10 and the best weights of epoch 2 not saved, the newest checkpoint is of step 5'): t.end_epoch()
    with pytest.warns(UserWarning, match='step 15 and the best weights of epoch 2'): t.end_epoch()
    assert C.load(tmp_path/'last').state['trainer']['epoch'] == 1, 'last/ does not go ahead of best/'
    with pytest.raises(C.CheckpointError, match='could not save'): t.callbacks[1].on_fit_end(t)
    full(False)
    t.callbacks[1].on_fit_end(t)
    found = C.load(tmp_path/'best')
    assert found.state['epoch'] == 2 and found.tensors['model']['w'].tolist() == [2, 2], 'the weights of then, not of now'
    assert C.load(tmp_path/'last').tensors['model']['w'].tolist() == [3, 3]

def test_twin_without_the_last_check_an_older_best_would_be_tested(tmp_path, full, monkeypatch):
    t = Saver(tmp_path, on_save_error='warn')
    t.end_epoch()
    full(True)
    with pytest.warns(UserWarning): t.end_epoch()
    full(False)
    t.callbacks[1].best = None   # forgotten
    with pytest.raises(C.CheckpointError, match='best epoch is 2, but .*best holds epoch 1'): t.callbacks[1].on_fit_end(t)
    monkeypatch.setattr(C, 'check_best', lambda *_: None)
    t.callbacks[1].on_fit_end(t)
    assert C.load(tmp_path/'best', fallback=False).state['epoch'] == 1, 'epoch 1, in silence'

def test_a_full_disk_stops_unless_told_otherwise(tmp_path, full):
    with pytest.raises(ValueError, match="on_save_error 'wran'.*did you mean"): C.Checkpoint(tmp_path, on_save_error='wran')
    t = Saver(tmp_path)
    full(True)
    with pytest.raises(C.CheckpointError): t.end_epoch()

# ---- versions and places

ASSET = ROOT/'tests'/'assets'/'checkpoint-0.1.0'

def by_hand(path):
    "name -> array, read from the bytes of a safetensors file"
    data = path.read_bytes()
    n = int.from_bytes(data[:8], 'little')
    header = {k: v for k, v in json.loads(data[8:8 + n]).items() if k != '__metadata__'}
    part = lambda v: data[8 + n + v['data_offsets'][0]:8 + n + v['data_offsets'][1]]
    kinds = dict(F32=np.float32, F64=np.float64, I64=np.int64, BOOL=bool)
    return {k: np.frombuffer(part(v), kinds[v['dtype']]).reshape(v['shape']) for k, v in header.items()}

@pytest.mark.parametrize('folder', ['last', 'best'])
def test_checkpoints_of_the_first_version_are_read_exactly(folder):
    found = C.load(ASSET/folder)
    assert found.manifest['seqrec_nb'] == '0.1.0' and found.manifest['format'] == 1
    assert found.tensors.keys() == ({'model', 'optim'} if folder == 'last' else {'model'})
    for group, tensors in found.tensors.items():
        want = by_hand(ASSET/folder/f'{group}.safetensors')
        assert tensors.keys() == want.keys() and all(np.array_equal(t.numpy(), want[k]) for k, t in tensors.items())
    if folder == 'last': assert (found.state['trainer']['step'], found.state['trainer']['callbacks']['Validate']['best_epoch']) == (7, 1)
    else: assert found.state['value'] == 0.552648150178794

def test_twin_a_changed_fixture_is_not_read(tmp_path):
    shutil.copytree(ASSET/'best', tmp_path/'best')
    text = (tmp_path/'best'/'state.json').read_text()
    (tmp_path/'best'/'state.json').write_text(text.replace('0.552648150178794', '0.552648150178795'))
    with pytest.raises(C.CheckpointError, match='state.json has changed'): C.load(tmp_path/'best')

def test_the_number_of_processes_is_part_of_the_environment(monkeypatch):
    alone = C.environment()
    monkeypatch.setenv('WORLD_SIZE', '2')
    assert M.elsewhere(C.environment(), alone) == ['processes: 2 then, 1 now'] and M.elsewhere(alone, alone) == []
    monkeypatch.setenv('WORLD_SIZE', '1')
    assert C.environment() == alone, 'and one process leaves no trace'

def test_a_full_or_read_only_disk_is_found_by_the_probe(tmp_path, monkeypatch):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))
    try:
        with pytest.raises(C.CheckpointError, match='cannot write to'): C.check_writable(tmp_path)
        (tmp_path/'twin').write_bytes(b'')   # an empty probe would have passed
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    def denied(self, data): raise PermissionError(errno.EACCES, 'Permission denied', str(self))
    monkeypatch.setattr(Path, 'write_bytes', denied)
    with pytest.raises(C.CheckpointError, match='cannot write to .*Permission denied'): C.check_writable(tmp_path)

def test_two_may_probe_at_the_same_time(tmp_path, monkeypatch):
    "Seen in 1 of 20 races: the loser found its probe gone and said that the folder could not be written"
    real = Path.write_bytes
    def gone(self, data): real(self, data); self.unlink()
    monkeypatch.setattr(Path, 'write_bytes', gone)
    C.check_writable(tmp_path)

@pytest.mark.parametrize('name', ['last', 'best'])
def test_a_file_in_place_of_a_checkpoint_fails_early(name, tmp_path):
    (tmp_path/name).write_text('')
    with pytest.raises(C.CheckpointError, match=f'{name} is a file'): C.prepare(tmp_path, afresh=False)

def test_what_cannot_be_written_fails_early(tmp_path, monkeypatch):
    C.check_writable(tmp_path/'new'/'run')
    assert (tmp_path/'new'/'run').is_dir() and not list((tmp_path/'new'/'run').iterdir())
    (tmp_path/'file').write_text('x')
    with pytest.raises(C.CheckpointError, match='cannot write'): C.check_writable(tmp_path/'file')
    if os.geteuid():   # root may write anywhere
        (tmp_path/'new').chmod(0o555)
        with pytest.raises(C.CheckpointError, match='cannot write'): C.check_writable(tmp_path/'new'/'other')

def test_nan_never_reaches_a_json_file(tmp_path):
    F.write_json(tmp_path/'a.json', dict(x=torch.tensor(2), path=tmp_path, word='ключ'))
    assert json.loads((tmp_path/'a.json').read_text(encoding='utf-8')) == dict(x=2, path=str(tmp_path), word='ключ')
    for bad in (float('nan'), float('inf')):
        with pytest.raises(ValueError): F.write_json(tmp_path/'a.json', dict(x=bad))
    with pytest.raises(TypeError, match='set'): F.write_json(tmp_path/'a.json', dict(x={1}))
    assert json.loads((tmp_path/'a.json').read_text(encoding='utf-8'))['x'] == 2 and len(list(tmp_path.iterdir())) == 1

HOLDER = "import sys, time\nfrom seqrec_nb.files import RunLock\nwith RunLock(sys.argv[1]): print('held', flush=True); time.sleep(60)"

def test_a_second_process_is_refused_until_the_first_is_dead(tmp_path):
    p = subprocess.Popen([sys.executable, '-c', HOLDER, str(tmp_path)], stdout=subprocess.PIPE, cwd=ROOT, text=True)
    try:
        assert p.stdout.readline() == 'held\n'
        with pytest.raises(F.Locked, match=rf'in use by process {p.pid} on .* since 20'):
            with C.RunLock(tmp_path): pass
    finally:
        p.kill()
        p.wait()
    with F.RunLock(tmp_path): pass   # kill -9 has released it
    with F.RunLock(tmp_path): pass

def test_the_lock_goes_when_the_block_fails(tmp_path):
    with pytest.raises(ZeroDivisionError):
        with F.RunLock(tmp_path): 1 / 0
    with F.RunLock(tmp_path): pass

def test_twin_without_the_lock_a_second_enters(tmp_path, monkeypatch):
    with F.RunLock(tmp_path):
        with pytest.raises(F.Locked): F.RunLock(tmp_path).__enter__()
        monkeypatch.setattr(F, 'take', lambda file: None)
        with F.RunLock(tmp_path): pass

@pytest.mark.parametrize('goes', [False, True], ids=['comes in', 'goes out'])
def test_a_process_between_lock_and_name_is_waited_for(goes, tmp_path, monkeypatch):
    "Seen in the campaign: the loser of a race read the lock before the winner had written its name"
    other = open(tmp_path/'.lock', 'a+')
    F.take(other)
    def meanwhile(seconds):
        if goes: other.close()
        else: print('process 7 on moon since 1969', end='', file=other, flush=True)
    monkeypatch.setattr(F.time, 'sleep', meanwhile)
    if goes:
        with F.RunLock(tmp_path): pass
    else:
        with pytest.raises(F.Locked, match='in use by process 7 on moon since 1969'): F.RunLock(tmp_path).__enter__()
        other.truncate(0)
        monkeypatch.setattr(F.time, 'sleep', lambda seconds: None)
        with pytest.raises(F.Locked, match='in use by another process'): F.RunLock(tmp_path).__enter__()

def test_a_lock_file_without_a_process_is_no_lock(tmp_path):
    "What a dead process has left, also one whose number another process has now"
    (tmp_path/'.lock').write_text(f'process {os.getpid()} on here since 2020-01-01 00:00:00')
    with F.RunLock(tmp_path): assert '2020' not in (tmp_path/'.lock').read_text()

# ---- the campaigns of benchmarks/faults.py can fail

@pytest.fixture(scope='module')
def faults():
    spec = importlib.util.spec_from_file_location('faults', ROOT/'benchmarks'/'faults.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

def test_the_campaign_sees_a_silent_flip(faults, last, monkeypatch):
    path = last/'model.safetensors'
    good = path.read_bytes()
    path.write_bytes(faults.flipped(good, 8 * len(good) - 2))
    assert (faults.told_by_load(path, None), faults.told_by_format(path, good)) == ('fallback', 'wrong')
    monkeypatch.setattr(C, 'verify', M.read_manifest)
    assert faults.told_by_load(path, None) == 'silent'

def test_the_campaign_sees_a_difference(faults):
    assert faults.untimed(dict(loss=1., seconds=2., valid=[dict(mtime=3, x=4)])) == dict(loss=1., valid=[dict(x=4)])
    known = dict(step=(10, .5))
    for seed in range(20):
        phase, n, delay = faults.moment(random.Random(seed), 'step', known, 9.)
        assert phase == 'step' and 1 <= n <= 10 and 0 <= delay <= .5
    assert len({faults.moment(random.Random(s), 'step', known, 9.) for s in range(20)}) == 20

# ---- the manifest of any folder

def test_a_folder_of_files_under_a_manifest(tmp_path):
    files = {'a.json': b'{"x": 1}', 'b.bin': bytes(300)}
    for name, data in files.items(): (tmp_path/name).write_bytes(data)
    M.write_manifest(tmp_path, {name: M.entry(data) for name, data in files.items()})
    assert M.verify(tmp_path)['files']['b.bin']['size'] == 300
    (tmp_path/'a.json').write_bytes(b'{"x": 2}')
    with pytest.raises(M.Damaged, match='a.json has changed'): M.verify(tmp_path)
    assert json.loads((tmp_path/'a.json').read_text()) == dict(x=2), 'the reader alone sees nothing'
    (tmp_path/'a.json').unlink()
    (tmp_path/'a.json').mkdir()
    with pytest.raises(M.Damaged, match='a.json is missing'): M.verify(tmp_path)
