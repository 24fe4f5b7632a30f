"""Coverage-guided fuzzing of the readers: `python benchmarks/fuzz.py [--seconds 60] [--engine auto|atheris|own] [--save DIR]` prints JSON.

Bytes come in, and only two things may come out: an `Interactions` that is consistent, or a `DataError` that names the file. Everything
else is a finding: it is made small and written to `--save`. The first two bytes of an input choose the container (plain, gzip, zip, a raw
archive, parquet, a file of titles) and the arguments of `read`; the rest is the file. `atheris` (libFuzzer for Python) is used where it is
installed; without it a small loop of the same kind does the work: keep what reaches new lines, mutate bytes and tokens, repeat."""
import argparse, gzip, hashlib, io, json, os, platform, random, re, subprocess, sys, tempfile, time, traceback, warnings, zipfile
from pathlib import Path
import numpy as np, pandas as pd

T = 978_300_760
OPTIONS = [{}, dict(on_bad='drop'), dict(user=0, item=1), dict(user=0, item=1, time=2), dict(layout='sequences'), dict(layout='table'),
           dict(unit='order'), dict(unit='s', on_bad='drop'), dict(unit='ns'), dict(user=0, item=1, rating=2, time=3),
           dict(dedupe=True), dict(user='user', item='item', on_bad='drop', dedupe=True)]
CONTAINERS = ['a.csv'] * 8 + ['a.csv.gz', 'a.zip', 'raw.gz', 'raw.zip', 'titles.csv', 'frame', 'a.txt', 'a.tsv']
TOKENS = [',', ';', '\t', '::', ':', '|', ' ', '\n', '\r\n', '\r', '"', '""', "'", '\0', '\x1f', '\x85', '\u2028', '\ufeff', 'user', 'item',
          'time', 'rating', 'timestamp', 'user_id:token', 'item_id:token', 'movieId', 'title', 'field 1', 'nan', 'null', 'NaT', '<NA>', 'inf',
          '0', '-1', '007', '12.0', '1e5', '1e999', '-0', '+5', '0x10', str(T), str(T * 1000), str(T * 10**6), str(T * 10**9), '9' * 18,
          '9' * 19, '9' * 30, str(2**63), str(-2**63), str(2**53 + 1), f'{T}.25', f'{T}.0', '2003-12-24', '2003-12-24 18:30:00',
          '2003-12-24T18:30:00Z', '2003-12-24T18:30:00.123456789+01:00', '9999-12-31', '0001-01-01', '20031224', '03/04/05', 'caf\u00e9',
          'cafe\u0301', '\U0001F600', '\u05e9\u05dc', '\u0663']
TOKENS = [t.encode() for t in TOKENS] + [b'\xff', b'\xfe\xff', b'\xff\xfe', b'\xc3', b'\xed\xa0\x80', b'\xf8', b'\x80', b'PAR1', b'PK\3\4', b'\x1f\x8b']

def seeds() -> list[bytes]:
    "One small file of every kind that the readers know, each with every container"
    rows = [(u, 10 * u + k, 1 + k % 5, T + 60 * k) for u in (1, 2, 7) for k in range(3)]
    df = pd.DataFrame(rows, columns=['userId', 'movieId', 'rating', 'timestamp'])
    csv = lambda **kw: df.to_csv(index=False, lineterminator='\n', **kw).encode()
    dates = df.assign(timestamp=pd.to_datetime(df.timestamp, unit='s').astype(str)).to_csv(index=False).encode()
    texts = [csv(), csv(sep='\t'), csv(sep=';'), csv(sep='|'), csv(sep=' '), csv(sep='\t', header=False), csv(quoting=1), dates,
             csv(sep=';', header=False).replace(b';', b'::'), csv().replace(b'\n', b'\r\n'), csv().replace(b'\n', b'\r'),
             b'\xef\xbb\xbf' + csv(), csv().decode().encode('utf-16'), csv() + b'8,caf\xe9,1,978300760\n', b'1 5 6 7\n2 9\n3 5\n', b'1 5\n2 6\n',
             b'user_id:token\titem_id:token\ttimestamp:float\na\tb\t978300760.0\n', b'user,item\n007,caf\xc3\xa9\n7,cafe\xcc\x81\n',
             b'item_id:token\ttitle:token_seq\trelease_year:token\n7\tTen\t1979\n', b'7|Ten (1979)|x||\n', b'movieId,title\n7,"Ten, the"\n',
             b'user,item\n', b'', b'\n\n', b'1,5,2003-12-24T18:30:00+01:00\n2,6,2003-12-24T18:30:00Z\n']
    out = [bytes([c, k % len(OPTIONS)]) + t for k, t in enumerate(texts) for c in (0, k % len(CONTAINERS))]
    parquet = io.BytesIO(); df.to_parquet(parquet)
    zipped = io.BytesIO()
    with zipfile.ZipFile(zipped, 'w') as z: z.writestr('README', 'x'); z.writestr('ratings.csv', csv())
    number = CONTAINERS.index
    return out + [bytes([0, 0]) + parquet.getvalue(), bytes([number('raw.gz'), 0]) + gzip.compress(csv(), mtime=0),
                  bytes([number('raw.zip'), 0]) + zipped.getvalue()]

def store(name: str, data: bytes, folder: Path) -> Path:
    "The file that an input stands for; files called raw are archives as they are"
    path = folder / name
    if name == 'a.csv.gz': data = gzip.compress(data, 1, mtime=0)
    if name == 'a.zip':
        with zipfile.ZipFile(path, 'w') as z: z.writestr('a.csv', data)
    else: path.write_bytes(data)
    return path

def frame(data: bytes) -> pd.DataFrame:
    "A data frame of odd cells: the tokens of the input, some of them as numbers"
    cells = [c.decode('utf-8', 'surrogateescape' if len(data) % 2 == 0 else 'replace') for c in data.replace(b'\n', b',').split(b',')][:60]
    def cell(c):
        kind, rest = c[:1], c[1:]
        try: return {'i': int, 'f': float, 'b': bool, 'd': pd.Timestamp, 'n': lambda _: None, 'y': str.encode, 'l': list}[kind](rest)
        except Exception: return c
    values, width = [cell(c) for c in cells], 2 + len(data) % 3
    values = values[:len(values) // width * width] or [1] * width
    columns = {n: values[i::width] for i, n in enumerate(['user', 'item', 'time', 'rating'][:width])}
    return pd.DataFrame({k: pd.Series(v, dtype=None if len(data) % 2 else object) for k, v in columns.items()})

def consistent(x):
    "Assert that what came out is whole: codes in range, ids sorted and distinct, types as promised, the report printable"
    assert x.user.dtype == x.item.dtype == np.int32 and len(x.user) == len(x.item) == len(x)
    for codes, ids in [(x.user, x.users), (x.item, x.items)]:
        assert ids.dtype in (np.int64, object) and sorted(set(ids.tolist())) == ids.tolist()
        assert np.array_equal(np.unique(codes), np.arange(len(ids))), 'every id has a row and every row an id'
        assert ids.dtype != object or all(type(i) is str and i and '\0' not in i for i in ids)
    assert x.time is None or x.time.dtype == np.int64 and len(x.time) == len(x)
    assert (x.time is None) <= (x.unit == 'order') and x.unit in ('s', 'ms', 'us', 'ns', 'day', 'order')
    assert x.rating is None or x.rating.dtype == np.float32 and np.isfinite(x.rating).all() and len(x.rating) == len(x)
    assert sorted(x.order.tolist()) == list(range(len(x))) and len(x.fingerprint) == 64
    r = x.report
    assert r.kept == len(x) == r.read - sum(n for _, n, *_ in r.rejected) - r.dropped and str(r) and r._repr_markdown_()
    json.dumps(r.to_dict()).encode()
    assert np.array_equal(x.decode_items(x.item), x.items[x.item])

def same_cells(x, data: bytes):
    "A second reading with `split` alone, of a plain file without quotes: the same ids and whole times in the same rows"
    f, r = x.reading.facts, x.reading
    if f['layout'] != 'table' or f['encoding'] != 'utf-8' or b'"' in data or f['separator'] not in (',', ';', '|', 'tab', '::') or r.rejected or r.dropped: return
    sep = '\t' if f['separator'] == 'tab' else f['separator']
    rows = [l.split(sep) for l in re.split('\r\n|\n|\r', data.decode('utf-8-sig'))]
    rows = [row for row in rows if any(row)] or [[]]
    names = [c.strip() for c in rows.pop(0)] if f['header'] else [f'field {k + 1}' for k in range(max(map(len, rows)))]
    if not any(rows): return
    at = {role: names.index(c) for role, c in f['columns'].items()}
    for role, ids in [('user', x.users[x.user]), ('item', x.items[x.item])]:
        if names.count(names[at[role]]) == 1: assert [row[at[role]].strip(' \t') for row in rows] == list(map(str, ids.tolist())), f'another {role}'
    cells = [row[at['time']].strip() for row in rows] if x.time is not None else []
    if cells and all(re.fullmatch('-?[0-9]{1,15}', c) for c in cells): assert list(map(int, cells)) == x.time.tolist(), 'another time'

def one(data: bytes, folder: Path):
    "Read one input and hold it against the promise; raises what is a finding"
    from seqrec_nb.data.formats import DataError
    from seqrec_nb.data.interactions import Interactions
    from seqrec_nb.data.titles import read_titles
    if len(data) < 2: return
    name, options, body = CONTAINERS[data[0] % len(CONTAINERS)], OPTIONS[data[1] % len(OPTIONS)], data[2:]
    try:
        if name == 'titles.csv':
            titles = read_titles(store(name, body, folder))
            assert all(type(k) is type(v) is str for k, v in titles.items())
        else:
            x = Interactions.read(frame(body) if name == 'frame' else store(name, body, folder), **options)
            consistent(x)
            if name == 'a.csv': same_cells(x, body)
    except DataError as e:
        source = 'DataFrame' if name == 'frame' else name
        assert str(e).startswith(f'{source}: ') and len(str(e)) > len(source) + 10, f'the error does not name the file: {e}'

def site(e: BaseException) -> str:
    "A finding by its kind and the innermost line of ours"
    ours = [f for f in traceback.extract_tb(e.__traceback__) if 'seqrec_nb' in f.filename or f.filename.endswith('fuzz.py')]
    return f'{type(e).__name__} in {Path(ours[-1].filename).name}:{ours[-1].name}: {ours[-1].line}'

def fails(data: bytes, folder: Path) -> str | None:
    "The site of the finding that `data` makes, or None"
    try: one(data, folder)
    except BaseException as e:
        if isinstance(e, (KeyboardInterrupt, SystemExit)): raise
        return site(e)

def shrink(data: bytes, folder: Path, tries=400) -> bytes:
    "Cut pieces out of `data` as long as the same finding stays"
    want, step = fails(data, folder), len(data) // 2
    while step and tries:
        at = 2
        while at < len(data) and tries:
            shorter, tries = data[:at] + data[at + step:], tries - 1
            if fails(shorter, folder) == want: data = shorter
            else: at += step
        step //= 2
    return data

def mutate(data: bytes, other: bytes, rng: random.Random) -> bytes:
    "Between one and six changes: of bytes, of tokens, of lines, or a piece of another input"
    for _ in range(rng.randint(1, 6)):
        i, j = sorted((rng.randint(2, len(data)), rng.randint(2, len(data))))
        token = rng.choice(TOKENS)
        kind = rng.randrange(9)
        if kind == 0: data = data[:i] + token + data[i:]
        elif kind == 1: data = data[:i] + token + data[i + len(token):]
        elif kind == 2: data = data[:i] + data[j:] if j - i < 40 else data[:i] + data[i + 1:]
        elif kind == 3: data = data[:i] + bytes([rng.randrange(256)]) + data[i + 1:]
        elif kind == 4: data = data[:j] + data[i:j] * rng.choice((1, 1, 2, 8)) + data[j:]
        elif kind == 5: data = data[:i] + other[rng.randint(2, len(other)):][:60] + data[i:]
        elif kind == 6: data = bytes([rng.randrange(256), data[1]]) + data[2:] if rng.random() < .5 else bytes([data[0], rng.randrange(256)]) + data[2:]
        elif kind == 7 and data[2:].count(b',') > 1:
            cells = data[2:].split(b','); cells[rng.randrange(len(cells))] = token
            data = data[:2] + b','.join(cells)
        elif kind == 8:
            lines = data[2:].splitlines(True); rng.shuffle(lines)
            data = data[:2] + b''.join(lines)
    return data[:4000]

class Edges:
    "Pairs of neighbouring lines of `seqrec_nb.data` that an execution reaches"
    def __init__(self): self.seen, self.new, self.last = set(), 0, 0
    def trace(self, frame, event, arg):
        if '/seqrec_nb/data/' not in frame.f_code.co_filename: return None
        if event == 'line':
            here = hash((frame.f_code, frame.f_lineno))
            edge, self.last = (self.last, here), here
            if edge not in self.seen: self.seen.add(edge); self.new += 1
        return self.trace
    def run(self, call, *args):
        "The result of a call, and how many edges were new"
        self.new, self.last = 0, 0
        sys.settrace(self.trace)
        try: return call(*args), self.new
        finally: sys.settrace(None)

def own(seconds: float, seed: int, save: Path, folder: Path) -> dict:
    "The loop without atheris"
    rng, edges, corpus, findings, n, end = random.Random(seed), Edges(), [], {}, 0, time.monotonic() + seconds
    queue = seeds()
    while time.monotonic() < end or queue:
        data = queue.pop() if queue else mutate(rng.choice(corpus[-40:] if rng.random() < .5 else corpus), rng.choice(corpus), rng)
        found, new = edges.run(fails, data, folder)
        n += 1
        if new: corpus.append(data)
        if found and found not in findings: findings[found] = keep(shrink(data, folder), found, save)
    return dict(engine='own', executions=n, edges=len(edges.seen), corpus=len(corpus), findings=findings)

def keep(data: bytes, found: str, save: Path) -> str:
    "Write a finding down; returns it as text"
    save.mkdir(parents=True, exist_ok=True)
    (save / f'{hashlib.sha256(found.encode()).hexdigest()[:12]}.bin').write_bytes(data)
    return repr(data[:300])

def with_atheris(seconds: float, seed: int, save: Path, folder: Path) -> dict:
    "atheris in a child, since it ends the process; findings are collected, not fatal"
    corpus = folder / 'corpus'; corpus.mkdir()
    for k, s in enumerate(seeds()): (corpus / f'seed{k}').write_bytes(s)
    words = folder / 'tokens.txt'
    words.write_text(''.join('"' + ''.join(f'\\x{b:02x}' for b in t) + '"\n' for t in TOKENS))
    command = [sys.executable, __file__, '--child', str(folder), '--save', str(save), f'-max_total_time={int(seconds)}', f'-seed={seed + 1}',
               '-max_len=4000', f'-dict={words}', '-rss_limit_mb=4096', '-timeout=60', '-print_final_stats=1', f'-artifact_prefix={save}/crash-', str(corpus)]
    save.mkdir(parents=True, exist_ok=True)
    out = subprocess.run(command, capture_output=True, text=True, errors='replace')
    log = out.stderr.splitlines()
    stat = lambda key: next((int(l.split()[-1]) for l in log if l.startswith(f'stat::{key}')), 0)
    status = [l for l in log if ' cov: ' in l]
    edges = int(status[-1].split(' cov: ')[1].split()[0]) if status else 0
    findings = json.loads((folder / 'findings.json').read_text()) if (folder / 'findings.json').exists() else {}
    if out.returncode: findings[f'the process ended with {out.returncode}'] = '\n'.join(log[-15:])
    return dict(engine='atheris', executions=stat('number_of_executed_units'), edges=edges, corpus=len(list(corpus.iterdir())), findings=findings)

def child(folder: Path, save: Path, rest: list):
    "What runs under atheris: only our own modules are instrumented"
    import atheris
    with atheris.instrument_imports(include=['seqrec_nb.data']):
        import seqrec_nb.data.interactions
    findings, work = {}, Path(tempfile.mkdtemp(dir=folder))
    def test(data: bytes):
        found = fails(data, work)
        if found and found not in findings:
            findings[found] = keep(shrink(data, work), found, save)
            (folder / 'findings.json').write_text(json.dumps(findings))
    atheris.Setup([sys.argv[0], *rest], test)
    atheris.Fuzz()

def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('--seconds', type=float, default=60); p.add_argument('--seed', type=int, default=0)
    p.add_argument('--engine', choices=['auto', 'atheris', 'own'], default='auto')
    p.add_argument('--save', type=Path, default=Path(tempfile.gettempdir()) / 'seqrec_fuzz')
    p.add_argument('--child', type=Path, help=argparse.SUPPRESS)
    a, rest = p.parse_known_args()
    warnings.simplefilter('ignore')
    if a.child: return child(a.child, a.save, rest)
    if rest: p.error(f'unknown: {rest}')
    engine = a.engine
    if engine == 'auto':
        from importlib.util import find_spec
        engine = 'atheris' if find_spec('atheris') else 'own'
    with tempfile.TemporaryDirectory(dir='/dev/shm' if os.path.isdir('/dev/shm') else None) as d:
        t = time.monotonic()
        out = (with_atheris if engine == 'atheris' else own)(a.seconds, a.seed, a.save.resolve(), Path(d))
        out['seconds'] = round(time.monotonic() - t, 1)
    import pyarrow
    out['versions'] = dict(python=platform.python_version(), numpy=np.__version__, pandas=pd.__version__, pyarrow=pyarrow.__version__)
    print(json.dumps(out, indent=1))
    return 1 if out['findings'] else 0

if __name__ == '__main__': sys.exit(main())
