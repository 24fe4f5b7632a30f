"""Peak memory and time of `Interactions.read` on a big csv: `python benchmarks/ingest.py [ROWS ...]` prints JSON.

Rows are generated like MovieLens (userId,movieId,rating,timestamp; users in order, times within a user rising in bursts),
written to a temporary folder, and read in a child process whose peak resident set is measured. Limit of the design: 2 GiB for 20 M rows."""
import json, os, subprocess, sys, tempfile
from pathlib import Path
import numpy as np
import pyarrow as pa, pyarrow.csv as pacsv

LIMIT_GIB = 2.

def rows(n: int, first_user: int, rng) -> pa.Table:
    "About `n` rows of whole users, beginning with `first_user`"
    lengths = np.clip(rng.lognormal(4.2, 1.1, max(n // 140, 1)).astype(np.int64), 20, 9000)
    lengths = lengths[np.cumsum(lengths) <= max(n, lengths[0])]
    user = np.repeat(np.arange(first_user, first_user + len(lengths)), lengths)
    item = (rng.zipf(1.2, len(user)) * 7919) % 27_000 + 1
    start = np.repeat(rng.integers(850_000_000, 1_420_000_000, len(lengths)), lengths)
    steps = np.cumsum(rng.integers(0, 30, len(user)))
    time = start + steps - np.repeat(steps[np.cumsum(lengths) - lengths], lengths)
    return pa.table(dict(userId=user, movieId=item, rating=rng.integers(1, 11, len(user)) / 2, timestamp=time))

def write(path: Path, n: int, seed=0) -> int:
    "A csv of exactly `n` rows; returns its size in bytes"
    rng, done, user, writer = np.random.default_rng(seed), 0, 1, None
    with open(path, 'wb') as f:
        while done < n:
            t = rows(1_000_000, user, rng).slice(0, n - done)
            writer = writer or pacsv.CSVWriter(f, t.schema, write_options=pacsv.WriteOptions(quoting_style='none'))
            writer.write_table(t)
            done, user = done + len(t), t.column('userId')[-1].as_py() + 1
        writer.close()
    return path.stat().st_size

CHILD = """
import json, resource, sys, time
from seqrec_nb.data.interactions import Interactions
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
imports = peak(); t = time.perf_counter()
x = Interactions.read(sys.argv[1]); read = time.perf_counter() - t; at_read = peak()
x.report; report = time.perf_counter() - t - read
arrays = sum(a.nbytes for a in (x.user, x.item, x.time, x.rating)) / 2**30
print(json.dumps(dict(rows=len(x), users=len(x.users), items=len(x.items), imports_gib=round(imports, 3), arrays_gib=round(arrays, 3),
    read_seconds=round(read, 2), peak_gib_read=round(at_read, 3), report_seconds=round(report, 2), peak_gib=round(peak(), 3),
    fingerprint=x.fingerprint)))
"""

def measure(n: int) -> dict:
    "Generate, read in a child, and report"
    with tempfile.TemporaryDirectory() as d:
        size = write(Path(d)/'ratings.csv', n)
        child = subprocess.run([sys.executable, '-c', CHILD, f'{d}/ratings.csv'], capture_output=True, text=True,
                               env=dict(os.environ, PYTHONPATH=str(Path(__file__).parents[1])))
    if child.returncode: raise SystemExit(child.stderr)
    r = json.loads(child.stdout)
    return dict(file_mb=round(size / 1e6, 1), **r, limit_gib=LIMIT_GIB, ok=r['peak_gib'] <= LIMIT_GIB)

if __name__ == '__main__':
    for n in [int(float(a)) for a in sys.argv[1:]] or [2_000_000, 20_000_000]: print(json.dumps(measure(n)), flush=True)
