"The file format: what is damaged is found, what is refused says why, and an old checkpoint outlives a save that fails."
import json, os, random, resource, stat, subprocess, sys, warnings
from pathlib import Path
import pytest, torch
from safetensors.torch import load_file
import seqrec_nb
from seqrec_nb import checkpoint as C, files as F

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
