"Files, names and surroundings that are not ours: nothing of them runs, leaves its place, or is believed; and what is ours tells no secret."
import ast, gzip, io, json, os, re, shutil, struct, zipfile
from pathlib import Path
import numpy as np, pandas as pd, pyarrow as pa, pyarrow.parquet as pq, pytest, torch
from safetensors.torch import save as tensor_bytes
from conftest import NBS, NOTEBOOKS, ROOT
from seqrec_nb import device, experiment, manifest, untrusted
from seqrec_nb.callbacks import read_history
from seqrec_nb.checkpoint import CheckpointError, Damaged, load
from seqrec_nb.cli import main
from seqrec_nb.data.formats import DataError
from seqrec_nb.data.interactions import Interactions
from seqrec_nb.evaluate import EvaluationError
from seqrec_nb.experiment import Experiment, evaluate_run, load_run, read_metrics, run, run_name
from seqrec_nb.files import dumps
from seqrec_nb.grid import TableError, read_table
from seqrec_nb.metrics import Ranks
from seqrec_nb.report import load_metrics, report
from seqrec_nb.runs import check_run, check_text, write_comparisons
from seqrec_nb.untrusted import Refused, read_object, safe_name

TINY = dict(d_model=8, n_blocks=1, n_heads=1, max_len=10, batch_size=64, epochs=1, patience=0, threads=1)
TOKENS = {k: k.lower().replace('_', '') + 'Q7' * 9 for k in    # shaped like nothing, so that this file does not look like a leak
          ('KAGGLE_KEY', 'KAGGLE_API_TOKEN', 'HF_TOKEN', 'WANDB_API_KEY', 'AWS_SECRET_ACCESS_KEY', 'AWS_SESSION_TOKEN', 'GITHUB_TOKEN', 'SOME_PASSWORD')}

@pytest.fixture(scope='module')
def csv(tmp_path_factory):
    rng = np.random.default_rng(0); n = rng.integers(4, 20, 30)
    path = tmp_path_factory.mktemp('data')/'ring.csv'
    pd.DataFrame(dict(user=np.repeat(np.arange(30), n), item=rng.integers(0, 20, n.sum()), timestamp=np.arange(n.sum()) + 10**9)).to_csv(path, index=False)
    return path

@pytest.fixture(scope='module')
def made(csv, tmp_path_factory):
    "A finished run, made while the environment was full of tokens"
    with pytest.MonkeyPatch.context() as m:
        for k, v in TOKENS.items(): m.setenv(k, v)
        return run(Experiment(data=csv, **TINY), tmp_path_factory.mktemp('made')/'run')

@pytest.fixture
def own(made, tmp_path): return shutil.copytree(made, tmp_path/'own')

# ---- names ----

NAMES = ['../x', '../../.ssh/x', '/etc/x', 'a/b', 'a\\b', 'C:x', '', ' ', '.', '..', '.lock', 'a\0b', 'a\nb', 'x' * 300, 'é' * 150, 'nul', 'CON.csv', 'com1',
         'x.', 'x ', '-rf', 'txt\u202eexe', 'a\u200bb', '\ud800', 'a*b', 'a|b']

@pytest.mark.parametrize('name', NAMES, ids=ascii)
def test_a_name_stays_in_its_folder(name, csv):
    with pytest.raises(Refused, match='cannot be used'): safe_name(name)
    with pytest.raises(Refused, match='name of a run'): Experiment(data=csv, name=name)
    if name == name.strip(): pytest.raises(TableError, read_table, pd.DataFrame(dict(name=[name], model='markov', data=str(csv)), dtype=object)).match('name')

@pytest.mark.parametrize('name', ['sasrec-ml-100k', 'lr=1e-3,d=8', 'Modèle_é', '模型', 'a.b', '2024', 'console', 'x' * 200], ids=ascii)
def test_a_good_name_is_taken(name, csv):
    assert safe_name(name) == name == Experiment(data=csv, name=name).name

def test_only_the_check_of_names_keeps_a_run_in_its_folder(csv, tmp_path, monkeypatch):
    (tmp_path/'work').mkdir(); monkeypatch.chdir(tmp_path/'work')
    with pytest.raises(Refused): run(Experiment(model='markov', data=csv, name='../../escaped'))
    assert main(['train', 'markov', str(csv), '--name', '../../escaped']) == 2
    assert [p.name for p in tmp_path.rglob('*')] == ['work']
    monkeypatch.setattr('seqrec_nb.record.safe_name', lambda name, what='': name)       # the guard taken away
    run(Experiment(model='markov', data=csv, name='../../escaped'))
    assert (tmp_path/'escaped').is_dir()

def test_a_record_of_a_stranger_names_no_place(own):
    e = json.loads((own/'experiment.json').read_text())
    (own/'experiment.json').write_text(json.dumps(e | dict(name='../../x')))
    with pytest.raises(Refused, match='a name is no path'): load_run(own)

@pytest.mark.parametrize('stem', ['a:b', '.hidden', 'x' * 240, 'a b', 'ü', 'a\nb', '-rf'], ids=ascii)
def test_whatever_a_file_is_called_its_run_has_a_name(stem):
    e = Experiment(data=f'/data/{stem}.csv')
    assert safe_name(run_name(e)) and Experiment(data=e.data, name=run_name(e))

def test_names_of_groups_are_no_paths(tmp_path):
    m = dict(test_metrics={}, grouped_metrics={'../../x': {'count': 1}})
    with pytest.raises(Refused): write_comparisons([({'Model': 'm'}, m)], tmp_path)

# ---- JSON ----

JSON = {'deep': '{"a": ' * 99_999, 'deep list': '[' * 99_999, 'NaN': '{"a": NaN}', 'Infinity': '{"a": -Infinity}', 'too large a number': '{"a": 1e999}', 'too long a number': '{"a": ' + '9' * 5000 + '}',
        'a name twice': '{"a": 1, "a": 2}', 'a list': '[1]', 'a number': '1', 'null': 'null', 'nothing': '', 'half': '{"a": ', 'more': '{} {}', 'no text': b'\xff\xfe\x00', 'lone surrogate bytes': b'{"a": "\xed\xa0\x80"}'}

def put(path, content): path.write_bytes(content.encode() if isinstance(content, str) else content)

@pytest.mark.parametrize('kind', JSON)
def test_json_of_a_stranger(own, kind):
    "Whoever reads it raises Refused (a ValueError) with a sentence, and an examination says that the run has a gap"
    put(own/'x.json', JSON[kind])
    with pytest.raises(Refused, match='x.json .*'): read_object(own/'x.json')
    for name, readers in {'metrics.json': [read_metrics, load_metrics], 'experiment.json': [load_run, evaluate_run]}.items():
        kept = (own/name).read_bytes(); put(own/name, JSON[kind])
        for read in readers:
            with pytest.raises(Refused, match=name): read(own)
        if name == 'metrics.json': assert not check_run(own)[0].ok
        put(own/name, kept)
    put(own/'history.jsonl', JSON[kind].encode() + b'\n' if isinstance(JSON[kind], str) else JSON[kind] + b'\n')
    assert all(isinstance(row, dict) for row in read_history(own/'history.jsonl'))

def test_without_the_reader_json_is_believed(own):
    put(own/'x.json', '{"HR@10": NaN, "a": 1, "a": 2, "b": 1e999}')
    found = json.loads((own/'x.json').read_text())      # what the standard reader says of it
    assert found['HR@10'] != found['HR@10'] and found['a'] == 2 and found['b'] == float('inf')
    with pytest.raises(RecursionError): json.loads(JSON['deep'])

def test_a_large_json_file_is_not_read(own, monkeypatch):
    with open(own/'metrics.json', 'wb') as f: f.truncate(65 << 20)      # no block of it is on the disk
    with pytest.raises(Refused, match='at most 67,108,864 are read'): read_metrics(own)

# ---- a checkpoint of a stranger: they can seal what they like ----

def forge(folder, new=None, **changes):
    "Write files into a checkpoint, and a manifest that is in good order about them"
    for name, data in (new or {}).items(): (folder/name).write_bytes(data)
    m = {k: v for k, v in json.loads((folder/'MANIFEST.json').read_text()).items() if k != 'seal'}
    m['files'] |= {name: manifest.entry(data) for name, data in (new or {}).items()}
    put(folder/'MANIFEST.json', dumps(manifest.seal(m | changes)))
    return m['files']

def test_forging_works(own):
    "What `forge` makes is accepted, so the tests below fail for their own reasons"
    forge(own/'best', {'state.json': (own/'best/state.json').read_bytes()})
    assert load(own/'best', fallback=False).state['epoch'] == 1

@pytest.mark.parametrize('name', ['../../outside.safetensors', '/etc/passwd', 'a/../../x', 'sub/x.safetensors', '..', '.', '', 'a\0b', 'a\\b'], ids=ascii)
def test_a_manifest_names_nothing_outside_its_folder(own, name, monkeypatch):
    put(own.parent/'outside.safetensors', 'x')
    files = forge(own/'best')
    forge(own/'best', files=files | {name: manifest.entry(b'x')})
    with pytest.raises(Damaged, match='cannot be used'): manifest.verify(own/'best')
    with pytest.raises(CheckpointError): load(own/'best', fallback=False)
    if name != '../../outside.safetensors': return
    monkeypatch.setattr(manifest, 'member_of', lambda folder, name: Path(folder)/name)      # the guard taken away
    assert manifest.verify(own/'best'), 'a file outside of the run was taken for a part of it'

def test_links_in_a_checkpoint_are_refused(own, tmp_path, monkeypatch):
    shutil.move(own/'best/model.safetensors', tmp_path/'elsewhere')
    (own/'best/model.safetensors').symlink_to(tmp_path/'elsewhere')
    with pytest.raises(Damaged, match='is a link'): manifest.verify(own/'best')
    monkeypatch.setattr(manifest, 'member_of', lambda folder, name: Path(folder)/name)
    assert manifest.verify(own/'best')

FORMS = [dict(files=[]), dict(files={'a': 1}), dict(files={'a': {}}), dict(files={'a': {'size': '1', 'sha256': 'x'}}), dict(format='1'), dict(format=None), dict(files=None)]

@pytest.mark.parametrize('change', FORMS, ids=str)
def test_a_manifest_of_another_form(own, change):
    forge(own/'best', **change)
    with pytest.raises(Damaged, match='not a manifest'): manifest.verify(own/'best')

@pytest.mark.parametrize('kind', JSON)
def test_json_of_a_stranger_in_a_checkpoint(own, kind):
    data = JSON[kind] if isinstance(JSON[kind], bytes) else JSON[kind].encode()
    forge(own/'best', {'state.json': data})
    with pytest.raises(Damaged, match='state.json'): load(own/'best', fallback=False)
    put(own/'best/MANIFEST.json', data)
    with pytest.raises(Damaged, match='MANIFEST.json'): manifest.verify(own/'best')

def test_a_state_that_the_manifest_does_not_list_is_not_read(own):
    files = forge(own/'best'); del files['state.json']
    forge(own/'best', files=files)
    put(own/'best/state.json', '{"epoch": 99}')
    with pytest.raises(Damaged, match='state.json'): load(own/'best', fallback=False)

def headed(header, body=b'', length=None):
    "A safetensors file with any header"
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack('<Q', len(text) if length is None else length) + text + body

def spec(start, stop, shape=(1,), dtype='F32'): return dict(dtype=dtype, shape=list(shape), data_offsets=[start, stop])
TENSORS = {'offsets beyond the end': headed({'w': spec(0, 4 << 30, [1 << 30])}, bytes(8)), 'offsets before the beginning': headed({'w': spec(-4, 0)}, bytes(8)),
           'overlapping': headed({'w': spec(0, 8, [2]), 'v': spec(4, 12, [2])}, bytes(12)), 'a hole': headed({'w': spec(4, 8)}, bytes(8)), 'shape and offsets differ': headed({'w': spec(0, 8, [1 << 40])}, bytes(8)),
           'an unknown type': headed({'w': spec(0, 4, dtype='PICKLE')}, bytes(4)), 'a header of 100 MB': headed(b'{}', length=101 << 20) + bytes(64), 'an endless header': headed(b'{}', length=(1 << 64) - 1),
           'no JSON': headed(b'\x80\x04\x95cos\nsystem\n'), 'a name twice': headed(b'{"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"w":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}', bytes(8)),
           'a pickle': b'\x80\x04\x95\x0b\x00\x00\x00\x00\x00\x00\x00cos\nsystem\n', 'nothing': b'', 'deep': headed(b'{"a":' * 9999)}

@pytest.mark.parametrize('kind', TENSORS)
def test_tensors_of_a_stranger(own, kind):
    forge(own/'best', {'model.safetensors': TENSORS[kind]})
    with pytest.raises((Damaged, CheckpointError), match='tensors that cannot be read|does not fit'): load_run(own)
    assert not torch.cuda.is_initialized()

def weights(folder): return load(folder, fallback=False).tensors['model']
OTHERS = {'one more': lambda w: w | {'extra': torch.ones(2)}, 'one less': lambda w: dict([*w.items()][1:]), 'none': lambda w: {}, 'another shape': lambda w: {k: torch.zeros(*v.shape, 2) for k, v in w.items()}}

@pytest.mark.parametrize('kind', OTHERS)
def test_weights_that_do_not_fit_are_refused_by_name(own, kind):
    forge(own/'best', {'model.safetensors': tensor_bytes(OTHERS[kind](weights(own/'best')))})
    with pytest.raises(CheckpointError, match='does not fit the model'): evaluate_run(own)

@pytest.mark.parametrize('value', [float('nan'), float('inf')])
def test_weights_that_are_no_numbers_give_no_metric(own, value):
    forge(own/'best', {'model.safetensors': tensor_bytes({k: torch.full_like(v, value) for k, v in weights(own/'best').items()})})
    with pytest.raises(EvaluationError, match='NaN or infinite'): evaluate_run(own)

def test_a_last_checkpoint_that_does_not_fit_cannot_be_continued(own, csv):
    state = json.loads((own/'last/state.json').read_text())
    for change in ({'trainer': {}}, {'trainer': []}, {'trainer': None}):
        forge(own/'last', {'state.json': dumps(state | change).encode()})
        (own/'metrics.json').unlink(missing_ok=True)
        with pytest.raises(CheckpointError): run(Experiment(data=csv, **{**TINY, 'epochs': 2}), own)

# ---- arrays ----

class Evil:
    "Pickled, it makes a folder when it is loaded"
    def __init__(self, path): self.path = str(path)
    def __reduce__(self): return os.mkdir, (self.path,)

def npy(shape, kind='<i4', body=b'', version=1):
    "A .npy file with any header"
    text = f"{{'descr': '{kind}', 'fortran_order': False, 'shape': {shape}, }}".encode()
    return b'\x93NUMPY' + bytes([version, 0]) + struct.pack('<H' if version == 1 else '<I', len(text)) + text + body

def npz(path, **arrays):
    with zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED) as z:
        for k, v in arrays.items(): z.writestr(f'{k}.npy', v)

BODY = bytes(8)
ARRAYS = {'a header bomb': npy('(1000000000000,)'), 'another': npy('(1073741824,)', body=BODY), 'a negative shape': npy('(-2,)', body=BODY), 'floats': npy('(2,)', '<f4', BODY), 'texts': npy('(2,)', '<U1', BODY),
          'objects': npy('(2,)', '|O', b'\x80\x04K\x01.'), 'two dimensions': npy('(2, 1)', body=BODY), 'no dimension': npy('()', body=BODY[:4]), 'too few': npy('(3,)', body=BODY), 'too many': npy('(1,)', body=BODY),
          'records': npy('(2,)', body=BODY).replace(b"'<i4'", b"[('a', '<i4')]"), 'a header that runs': b'\x93NUMPY\x01\x00' + struct.pack('<H', 30) + b"__import__('os').getcwd()      " + BODY,
          'a huge header': b'\x93NUMPY\x02\x00' + struct.pack('<I', 1 << 31) + b'{' * 99, 'version 9': npy('(2,)', body=BODY, version=9), 'no array': b'hello', 'nothing': b''}

@pytest.mark.parametrize('kind', ARRAYS)
def test_ranks_of_a_stranger(own, kind):
    good = {k: npy('(2,)', body=bytes(8)) for k in ('user', 'length', 'target', 'above', 'ties')} | dict(n_candidates=npy('(2,)', body=struct.pack('<2i', 5, 5)))
    npz(own/'ranks.npz', **good)
    assert len(Ranks.load(own/'ranks.npz')) == 2
    npz(own/'ranks.npz', **good | dict(above=ARRAYS[kind]))
    with pytest.raises(Refused, match='ranks.npz'): Ranks.load(own/'ranks.npz')
    assert dict((c.name, c.ok) for c in check_run(own))['ranks'] is False

def test_pickled_objects_are_refused_and_nothing_runs(own, tmp_path):
    np.savez(own/'ranks.npz', **{k: np.array([Evil(tmp_path/'ran')], object) for k in ('user', 'length', 'target', 'above', 'ties', 'n_candidates')})
    with pytest.raises(Refused, match='object'): Ranks.load(own/'ranks.npz')
    assert not (tmp_path/'ran').exists()
    with np.load(own/'ranks.npz', allow_pickle=True) as z: z['user']       # the guard taken away: it runs
    assert (tmp_path/'ran').exists()

def test_what_is_no_npz(own):
    good = (own/'ranks.npz').read_bytes()
    for data in (b'', b'\x80\x04.', npy('(2,)', body=BODY), good[:len(good) // 2], bytes(99)):
        put(own/'ranks.npz', data)
        with pytest.raises(Refused): Ranks.load(own/'ranks.npz')
    npz(own/'ranks.npz', user=npy('(2,)', body=BODY))
    with pytest.raises(Refused, match='lacks an array'): Ranks.load(own/'ranks.npz')

# ---- logs in archives, parquet ----

ROWS = 'userId,movieId,timestamp\n' + ''.join(f'{u},{i},{10**9 + u + i}\n' for u in range(5) for i in range(5))

def test_a_gzip_bomb_is_stopped(tmp_path, monkeypatch):
    "A gzip file does not say how large it gets; the reader counts"
    with gzip.open(tmp_path/'x.csv.gz', 'wb') as f:
        f.write(ROWS.encode())
        for _ in range(4): f.write(b'1,1,1000000000\n' * 70_000)
    monkeypatch.setattr(untrusted, 'SMALL', 1 << 10)      # so that a small bomb is one
    assert (tmp_path/'x.csv.gz').stat().st_size < 20_000
    with pytest.raises(DataError, match='unfolds to more than'): Interactions.read(tmp_path/'x.csv.gz')
    monkeypatch.setattr(untrusted, 'RATIO', 10**6)
    assert len(Interactions.read(tmp_path/'x.csv.gz')) == 280_025
    with gzip.open(tmp_path/'y.csv.gz', 'wb') as f: f.write(ROWS.encode() * 1)
    monkeypatch.undo()
    assert len(Interactions.read(tmp_path/'y.csv.gz')) == 25

def zipped(name='ratings.csv', data=ROWS.encode(), flag=0, **info):
    out = io.BytesIO(); i = zipfile.ZipInfo(name)
    i.compress_type = zipfile.ZIP_DEFLATED
    for k, v in info.items(): setattr(i, k, v)
    with zipfile.ZipFile(out, 'w') as z: z.writestr(i, data)
    b = bytearray(out.getvalue()); b[6] |= flag; b[b.index(b'PK\1\2') + 8] |= flag
    return bytes(b)

@pytest.mark.parametrize('data, why', [(zipped(flag=1), 'encrypted'), (zipped(external_attr=0o120777 << 16), 'is a link'), (zipped(data=bytes(20_000_000)), 'refused'), (zipped(data=zipped(), name='inner.zip'), 'x.zip: .')],
                         ids=['encrypted', 'link', 'bomb', 'nested'])
def test_a_zipped_log_of_a_stranger(tmp_path, data, why):
    put(tmp_path/'x.zip', data)
    with pytest.raises(DataError, match=why): Interactions.read(tmp_path/'x.zip')
    assert os.listdir(tmp_path) == ['x.zip']

@pytest.mark.parametrize('name', ['../../ratings.csv', '/etc/ratings.csv', 'C:\\ratings.csv', 'rat\u202engs.csv', 'ratings.csv'], ids=ascii)
def test_a_zipped_log_is_read_where_it_lies_whatever_it_is_called(tmp_path, name):
    put(tmp_path/'x.zip', zipped(name))
    assert len(Interactions.read(tmp_path/'x.zip')) == 25 and os.listdir(tmp_path) == ['x.zip']

def test_a_tar_is_no_log(tmp_path):
    import tarfile
    with tarfile.open(tmp_path/'x.tar', 'w') as t:
        info = tarfile.TarInfo('../evil'); info.size = len(ROWS); t.addfile(info, io.BytesIO(ROWS.encode()))
    with pytest.raises(DataError): Interactions.read(tmp_path/'x.tar')
    assert os.listdir(tmp_path) == ['x.tar']

class Foreign(pa.ExtensionType):
    "A type of somebody's program; pyarrow keeps its name and a text in the file"
    def __init__(self): super().__init__(pa.int64(), 'h5.foreign')
    def __arrow_ext_serialize__(self): return b'\x80\x04cos\nsystem\n'
    @classmethod
    def __arrow_ext_deserialize__(cls, storage, data): raise RuntimeError('the code of a stranger ran')

def test_parquet_of_a_stranger(tmp_path):
    "Foreign types, columns of objects, and dictionaries larger than the data: read as plain values, or refused by name"
    n = 30; item = pa.array(range(n), pa.int64())
    base = dict(user=pa.array([k % 5 for k in range(n)]), time=pa.array(range(10**9, 10**9 + n)))
    pq.write_table(pa.table(base | dict(item=pa.ExtensionArray.from_storage(Foreign(), item))), tmp_path/'foreign.parquet')
    assert Interactions.read(tmp_path/'foreign.parquet').items.tolist() == list(range(n)), 'not registered, so not run'
    words = pa.DictionaryArray.from_arrays(pa.array([0] * n), pa.array([f'w{k}' for k in range(50_000)]))
    pq.write_table(pa.table(base | dict(item=words)), tmp_path/'words.parquet')
    assert Interactions.read(tmp_path/'words.parquet').items.tolist() == ['w0']
    for kind, values in dict(binary=pa.array([b'\x80\x04cos\n'] * n), nested=pa.array([{'a': [k]} for k in range(n)]), lists=pa.array([[k] for k in range(n)])).items():
        pq.write_table(pa.table(base | dict(item=values)), tmp_path/f'{kind}.parquet')
        with pytest.raises(DataError): Interactions.read(tmp_path/f'{kind}.parquet')
    data = (tmp_path/'words.parquet').read_bytes()
    for bad in (b'PAR1', data[:99], data[:-9] + b'\xff\xff\xff\x7fPAR1', b'PAR1' + bytes(64) + b'PAR1'):
        put(tmp_path/'bad.parquet', bad)
        with pytest.raises(DataError): Interactions.read(tmp_path/'bad.parquet')

# ---- secrets ----

def told(*folders) -> str:
    "Everything that files below some folders hold, packed arrays too"
    out = []
    for p in (p for f in folders for p in Path(f).rglob('*') if p.is_file()):
        out.append(str(p) + p.read_bytes().decode('latin-1'))
        if p.suffix == '.npz':
            with zipfile.ZipFile(p) as z: out += [z.read(n).decode('latin-1') for n in z.namelist()]
    return '\n'.join(out)

def leaks(text): return [k for k, v in TOKENS.items() if v in text]

def test_a_run_tells_no_secret(made, csv, tmp_path, monkeypatch, capfd):
    "Not in its files, nor on the screen, nor in the text of an error"
    for k, v in TOKENS.items(): monkeypatch.setenv(k, v)
    monkeypatch.chdir(tmp_path)
    codes = [main(line.split()) for line in (f'train markov {csv} --out m', f'evaluate {made}', f'runs {made} --save-csv', 'doctor', f'train sasrec {csv} --n-heads 3 --out bad', f'runs --check {made}')]
    assert codes[:4] == [0, 0, 0, 0] and codes[4] == 1
    seen = ''.join(capfd.readouterr()) + told(made, tmp_path) + report(made)
    assert leaks(seen) == [] and 'NDCG@10' in seen
    assert {*read_metrics(made)['environment']} == {'device', 'hardware', 'threads', 'torch', 'python', 'platform'}, 'facts are listed, not copied'

def test_a_leak_would_be_seen(csv, tmp_path, monkeypatch):
    "A record that copies the environment is what the test above is for"
    for k, v in TOKENS.items(): monkeypatch.setenv(k, v)
    monkeypatch.setattr(experiment, 'describe', lambda device: dict(os.environ))
    assert leaks(told(run(Experiment(model='markov', data=csv), tmp_path/'r'))) == [*TOKENS]

def test_files_with_secrets_are_ignored_by_git():
    names = (ROOT/'.gitignore').read_text().split()
    assert {'kaggle.json', 'access_token', '.env', '.netrc', '*.pem', '*.key'} <= {*names}

SHAPES = {'kaggle.json': '{"username":"me","key":"' + '0f' * 16 + '"}', 'the same as a dict': "{'username': 'me', 'key': '" + '0f' * 16 + "'}", 'a Kaggle token': 'KGAT_' + '0f' * 16,
          'exported': 'KAGGLE_KEY=' + '0f' * 16, 'Hugging Face': 'hf_' + 'Ab' * 17, 'GitHub': 'ghp_' + 'a1' * 18, 'GitHub, fine': 'github_pat_' + 'a1' * 20, 'OpenAI': 'sk-proj-' + 'aB3_' * 8, 'AWS': 'AKIA' + 'Z7' * 8,
          'AWS secret': 'aws_secret_access_key = ' + 'aB3/' * 10, 'W&B': 'WANDB_API_KEY=' + '0f' * 20, 'W&B login': 'wandb login ' + '0f' * 20, 'W&B in Python': 'wandb.login(key="' + '0f' * 20 + '")',
          'a key file': '-----BEGIN OPENSSH PRIVATE ' + 'KEY-----', 'an address with a password': 'https://me:' + 'pa55w0rd@host/x', 'PyPI': 'pypi-' + 'AgEIc' * 10}
HARMLESS = ['sha256 ' + '0f' * 32, 'commit ' + '0f' * 20, 'token = None', 'key: user', 'https://user@host/', 'hf_transfer', 'sk-learn', 'mask = tokens == 0', 'ssh-keygen', 'hashlib.sha1 ' + '0f' * 20]

@pytest.mark.parametrize('kind', SHAPES)
@pytest.mark.parametrize('where', ['source', 'stream', 'html', 'json', 'error', 'metadata'])
def test_a_notebook_with_a_token_fails(kind, where, tmp_path, monkeypatch):
    "Row 38: a made-up token, put into a copy of a page, in every place that a notebook has"
    import test_project
    nb = json.loads((NBS/'00_core.ipynb').read_text()); cell = [c for c in nb['cells'] if c['cell_type'] == 'code'][-1]; secret = SHAPES[kind]
    if where == 'source': cell['source'] = ['x = 1\n', f'# {secret}']
    if where == 'metadata': cell['metadata'] = {'kernel': secret}
    cell['outputs'] = dict(stream=[dict(output_type='stream', name='stdout', text=['a\n', secret])], html=[dict(output_type='display_data', data={'text/html': [f'<b>{secret}']}, metadata={})],
        json=[dict(output_type='display_data', data={'application/json': {'x': [secret]}}, metadata={})], error=[dict(output_type='error', ename='E', evalue=secret, traceback=['\x1b[31m', secret])]).get(where, [])
    (tmp_path/'page.ipynb').write_text(json.dumps(nb))
    monkeypatch.setattr(test_project, 'NBS', tmp_path); monkeypatch.setattr(test_project, 'NOTEBOOKS', ['page.ipynb']); monkeypatch.setattr(test_project, 'repository_texts', lambda: [])
    with pytest.raises(AssertionError, match='page.ipynb'): test_project.test_no_secrets()
    (tmp_path/'page.ipynb').write_text((NBS/'00_core.ipynb').read_text())
    test_project.test_no_secrets()

def test_harmless_text_is_no_secret():
    from test_project import SECRET
    assert [t for t in HARMLESS if SECRET.search(t)] == []

# ---- unsafe calls, by the syntax tree ----

MODULES = {'pickle', 'cPickle', '_pickle', 'dill', 'cloudpickle', 'joblib', 'shelve', 'marshal', 'telnetlib', 'ftplib', 'imp', 'xmlrpc', 'pty'}
CALLS = {'eval', 'exec', 'compile', '__import__', 'os.system', 'os.popen', 'subprocess.getoutput', 'subprocess.getstatusoutput', 'tempfile.mktemp', 'torch.load', 'torch.save', 'torch.hub.load', 'torch.jit.load',
         'yaml.load', 'yaml.load_all', 'yaml.full_load', 'yaml.unsafe_load', 'pandas.read_pickle', 'shutil.unpack_archive', 'ssl._create_unverified_context', 'urllib.request.urlopen', 'urllib.request.urlretrieve',
         'numpy.core.multiarray._reconstruct', 'numpy.fromregex'}
METHODS = {'extractall', 'to_pickle', 'read_pickle', 'trust_env_off'}
KEYWORDS = {'allow_pickle': True, 'shell': True, 'verify': False, 'check_hostname': False, 'weights_only': False, 'trust_remote_code': True, 'i_trust_this': True}   # the unsafe value; one that is not written out counts too

def aliases(nodes):
    "name -> what it was imported as"
    found = {}
    for node in nodes:
        if isinstance(node, ast.Import): found |= {a.asname or a.name.partition('.')[0]: a.name if a.asname else a.name.partition('.')[0] for a in node.names}
        if isinstance(node, ast.ImportFrom) and not node.level: found |= {a.asname or a.name: f'{node.module}.{a.name}' for a in node.names}
    return found

def dotted(node):
    if isinstance(node, ast.Name): return node.id
    if isinstance(node, ast.Attribute): return (inner := dotted(node.value)) and f'{inner}.{node.attr}'

def unsafe(text):
    "Every unsafe import, call and argument in a piece of code"
    nodes = [*ast.walk(ast.parse(re.sub(r'^\s*[!%].*$', '', text, flags=re.M)))]; names = aliases(nodes)
    for node in nodes:
        if isinstance(node, ast.Import): yield from (a.name for a in node.names if a.name.partition('.')[0] in MODULES)
        if isinstance(node, ast.ImportFrom) and (node.module or '').partition('.')[0] in MODULES: yield node.module
        if isinstance(node, ast.Attribute) and node.attr in ('CERT_NONE', '_create_unverified_context'): yield node.attr
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and re.match(r'(http|ftp)://(?!127\.|localhost|www\.w3\.org|example\.org)\w', node.value): yield node.value[:60]
        if not isinstance(node, ast.Call): continue
        first, _, rest = (dotted(node.func) or '').partition('.')
        full = names.get(first, first) + ('.' + rest if rest else '')
        if full in CALLS: yield full
        if isinstance(node.func, ast.Attribute) and node.func.attr in METHODS: yield node.func.attr
        yield from (f'{k.arg}={ast.unparse(k.value)}' for k in node.keywords if k.arg in KEYWORDS and not (isinstance(k.value, ast.Constant) and k.value.value is (not KEYWORDS[k.arg])))

EXEMPT = {('tests/test_security.py', 'allow_pickle=True')}        # the negative twin of Ranks.load

def test_no_unsafe_calls():
    "In the package, the scripts, the tests, and the code cells that are not in the package"
    texts = [(p.relative_to(ROOT).as_posix(), p.read_text(encoding='utf-8')) for folder in ('seqrec_nb', 'kaggle', 'benchmarks', 'tests') for p in (ROOT/folder).rglob('*.py') if 'build' not in p.parts]
    texts += [(nb, ''.join(c['source'])) for nb in NOTEBOOKS for c in json.loads((NBS/nb).read_text(encoding='utf-8'))['cells'] if c['cell_type'] == 'code' and '#| export' not in ''.join(c['source'])]
    found = {(where, what) for where, text in texts for what in unsafe(text)}
    assert found - EXEMPT == set() and len(texts) > 300

BAD = ['import pickle', 'from pickle import loads as l', 'import _pickle as p', 'import dill', 'eval("1")', 'exec(x)', 'import os\nos.system("x")', 'from os import system as s\ns("x")', 'import os as o\no.popen("x")',
       'import subprocess\nsubprocess.run("x", shell=True)', 'from subprocess import run\nrun(x, shell=flag)', 'import tempfile as t\nt.mktemp()', 'import torch\ntorch.load(p)', 'from torch import load\nload(p)', 'import torch\ntorch.save(x, p)',
       'import torch\ntorch.hub.load("a", "b")', 'import yaml\nyaml.load(f)', 'import yaml\nyaml.load(f, Loader=yaml.Loader)', 'z.extractall(d)', 'import numpy as np\nnp.load(p, allow_pickle=True)', 'np.load(p, allow_pickle=x)', 'import requests\nrequests.get(u, verify=False)',
       'import ssl\nc = ssl._create_unverified_context()', 'import ssl\nc.verify_mode = ssl.CERT_NONE', 'from urllib.request import urlopen\nurlopen(u)', 'import urllib.request\nurllib.request.urlretrieve(u)', 'df.to_pickle(p)', 'import pandas as pd\npd.read_pickle(p)', 'import shutil\nshutil.unpack_archive(p)',
       'a = "http://data.org/x"', 'f(trust_remote_code=True)', '__import__("os")', 'load(p, weights_only=False)']
GOOD = ['model.eval()', 'from ast import literal_eval\nliteral_eval(x)', 'import yaml\nyaml.safe_load(f)', 'import numpy as np\nnp.load(p, allow_pickle=False)', 'import re\nre.compile("x")', 'import subprocess\nsubprocess.run(["a"], shell=False)', 'load(p)', 'import json\njson.load(f)', 'a = "https://x.org"', 'torch.compile(m)', '"pickle"']

@pytest.mark.parametrize('code', BAD)
def test_unsafe_calls_are_seen(code): assert [*unsafe(code)]

@pytest.mark.parametrize('code', GOOD)
def test_safe_calls_are_let_through(code): assert not [*unsafe(code)]

# ---- what we build on ----

def test_no_lower_bound_is_known_to_be_unsafe_here():
    "Findings of the audit that our calls reach: the version that settings.ini allows at least is past them"
    from packaging.requirements import Requirement
    from packaging.version import Version
    audit = json.loads((ROOT/'nbs/_results/faults/audit.json').read_text(encoding='utf-8'))['packages']
    text = (ROOT/'settings.ini').read_text(encoding='utf-8')
    bounds = {}
    for r in re.findall(r"'([a-z_-]+[<>=][^']*)'", text):
        r = Requirement(r); bounds[r.name] = next((Version(s.version) for s in r.specifier if s.operator in ('>=', '==')), None)
    reached = [(name, f) for name, p in audit.items() for f in p['findings'] if f['reached']]
    assert [(name, f['id']) for name, f in reached if bounds[name] < Version(f['fixed'])] == []
    assert reached and bounds['pyarrow'] and Version('14.0.0') < Version(reached[0][1]['fixed']), 'the bound of 14 would be seen'

# ---- a GPU that is there and does not work (row 33) ----

@pytest.fixture
def p100(monkeypatch):
    "A P100 and a build of torch without kernels for it"
    real = torch.ones
    def ones(*a, device=None, **kw):
        if str(device).startswith('cuda'): raise RuntimeError('CUDA error: no kernel image is available for execution on the device\nCUDA kernel errors might be asynchronous')
        return real(*a, device=device, **kw)
    monkeypatch.setattr(torch, 'ones', ones)
    for k, v in dict(is_available=lambda: True, get_device_capability=lambda *a: (6, 0), get_arch_list=lambda: ['sm_75', 'sm_80', 'sm_90', 'sm_120'], get_device_name=lambda *a: 'Tesla P100-PCIE-16GB').items(): monkeypatch.setattr(torch.cuda, k, v)

def test_auto_falls_back_to_the_cpu_and_says_why(p100, monkeypatch):
    with pytest.warns(UserWarning, match='the CPU is used: .*no kernel image.*P100.*sm_60.*built for sm_75, sm_80.*Take another GPU') as w: assert device.pick_device().type == 'cpu'
    assert len(w) == 1 and 'asynchronous' not in str(w[0].message)
    monkeypatch.setattr(device, 'probe', lambda name: None)                        # the guard taken away
    assert device.pick_device().type == 'cuda', 'a card that fails at the first step'

def test_cuda_that_was_asked_for_must_work(p100, csv, tmp_path, capfd):
    with pytest.raises(device.DeviceError, match="'cuda' cannot be used.*sm_60"): device.pick_device('cuda')
    assert main(['train', 'sasrec', str(csv), '--epochs', '1', '--device', 'cuda', '--out', str(tmp_path/'r')]) == 1
    assert 'sm_60' in capfd.readouterr().err and not (tmp_path/'r/last').exists()

def test_doctor_says_it(p100, capfd, recwarn):
    "In a line of the report, and not also as a warning"
    assert main(['doctor']) == 0
    out = capfd.readouterr().out
    assert re.search(r'NO +cuda +is there, but does not work.*sm_60', out) and re.search(r'ok +device auto +cpu', out) and not [w for w in recwarn if 'CPU' in str(w.message)]

@pytest.mark.parametrize('built, capability, works', [('sm_75', (7, 5), True), ('sm_75', (6, 0), False), ('sm_80', (8, 9), True), ('sm_80', (9, 0), False), ('sm_90a', (9, 0), True), ('compute_50', (6, 0), True), ('compute_90', (6, 0), False), ('sm_120', (12, 0), True), ('sm_120', (10, 0), False)])
def test_which_kernels_run_where(built, capability, works): assert device.runs_on(built, *capability) is works

def test_other_reasons_get_no_such_advice(p100, monkeypatch):
    monkeypatch.setattr(torch.cuda, 'get_arch_list', lambda: ['sm_60'])
    assert 'sm_60' not in device.probe('cuda') and 'no kernel image' in device.probe('cuda')
    def dead(*a): raise RuntimeError('the driver does not answer')
    monkeypatch.setattr(torch.cuda, 'get_device_capability', dead)
    assert 'no kernel image' in device.probe('cuda'), 'a question that fails hides no reason'
