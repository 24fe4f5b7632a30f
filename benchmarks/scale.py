"""Memory and time at scale: `python benchmarks/scale.py [rows|catalogue|estimate ...] [--rows 2e6 20e6]` writes nbs/_results/faults/scale.json.

rows       a csv generated like MovieLens (benchmarks/ingest.py) is read, split and cut into windows, then a small SASRec
           (d 16, L 50, sampled softmax) trains for one epoch, or for `--steps` steps with the epoch's time projected from them
catalogue  one million items: sampled softmax and sliced cross-entropy, full ranking of some hundred users, baselines
estimate   what the pre-flight estimate says against what a training really takes

Every stage runs in a child process; its peak is the resident high-water mark, put back to the present size when a stage begins.
"""
import argparse, json, os, platform, subprocess, sys, tempfile, time
from contextlib import contextmanager
from itertools import count
from pathlib import Path
import numpy as np
sys.path.insert(0, str(Path(__file__).resolve().parent))
from ingest import write

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT/'nbs/_results/faults/scale.json'
GIB, LIMIT, AS = 2**30, 2., 6        # GiB: the limit of the ingest, and the address space of a stage
found = {}

def status(key: str) -> int:
    "Bytes of a line of /proc/self/status: VmRSS now, VmHWM at the highest"
    with open('/proc/self/status') as f: return next(int(l.split()[1]) for l in f if l.startswith(key)) * 1024

@contextmanager
def stage(name: str):
    "Seconds and peak memory of what happens inside"
    with open('/proc/self/clear_refs', 'w') as f: f.write('5')          # the high-water mark begins again
    before, t, cpu = status('VmRSS'), time.perf_counter(), time.process_time()
    yield
    found[name] = dict(seconds=round(time.perf_counter() - t, 2), cpu_seconds=round(time.process_time() - cpu, 2),
                       gib_before=round(before / GIB, 3), peak_gib=round(status('VmHWM') / GIB, 3))

def child(what: str, *args, gib=None) -> dict:
    "Run a function of this file in a process of its own, with a limit on its address space"
    import resource
    cap = (lambda: resource.setrlimit(resource.RLIMIT_AS, (int(gib * GIB),) * 2)) if gib else None
    env = dict(os.environ, PYTHONPATH=str(ROOT), OMP_NUM_THREADS='1')
    p = subprocess.run([sys.executable, __file__, '--child', what, *map(str, args)], capture_output=True, text=True,
                       env=env, preexec_fn=cap)
    if p.returncode: raise SystemExit(f'{what}{args}: exit {p.returncode}\n{p.stderr[-3000:]}')
    return json.loads(p.stdout.splitlines()[-1])

def ingest(path, folder):
    "Read a csv and lay it out under P-raw; the arrays go to `folder` for the training stage"
    with stage('import'):
        from seqrec_nb.data import Interactions
        from seqrec_nb.data.splits import as_protocol
    with stage('read'): x = Interactions.read(path)
    raw = x.user.nbytes + x.item.nbytes + x.time.nbytes
    with stage('split'): data = as_protocol('P-raw').apply(x)
    found.update(rows=len(x), users=data.n_users, items=data.n_items, raw_bytes=raw, fingerprint=data.fingerprint)
    del x
    for k in ('items', 'offsets', 'times', 'user_ids', 'item_ids'): np.save(Path(folder)/f'{k}.npy', getattr(data.seqs, k))

def dataset(folder):
    from seqrec_nb.data.sequences import Sequences
    from seqrec_nb.data.splits import leave_one_out
    return leave_one_out(Sequences(**{k: np.load(Path(folder)/f'{k}.npy') for k in
                                      ('items', 'offsets', 'times', 'user_ids', 'item_ids')}))

def held(*objects) -> int:
    "Bytes of all arrays and tensors that the objects hold, memory that they share counted once"
    import torch
    seen, stack = {}, list(objects)
    while stack:
        o = stack.pop()
        if isinstance(o, torch.Tensor): o = o.detach().cpu().numpy()
        if isinstance(o, np.ndarray):
            while isinstance(o.base, np.ndarray): o = o.base
            seen[o.__array_interface__['data'][0]] = max(o.nbytes, seen.get(o.__array_interface__['data'][0], 0))
        elif hasattr(o, '__dict__'): stack += vars(o).values()
    return sum(seen.values())

def training(folder, raw, steps):
    "Windows over the arrays, and an epoch or some steps of a small model"
    with stage('import'):
        from seqrec_nb.core import reseed
        from seqrec_nb.data import Loader
        from seqrec_nb.losses import SampledSoftmax
        from seqrec_nb.models import SASRec
        from seqrec_nb.train import Trainer, backward, update
    data, steps = dataset(folder), int(steps)
    with stage('window'): loader = Loader(data.train, 50, 128, window='every', time=True)
    ratio = lambda *objects: round(held(*objects) / int(raw), 3)
    found['arrays'] = dict(bytes=held(data, loader), ratio=ratio(data, loader))
    if data.n_interactions < 3e6: found['arrays']['ratio_prefix'] = ratio(data, Loader(data.train, 50, 128, 'prefix', time=True))
    reseed(0, 'scale')
    t = Trainer(SASRec(data.n_items, 16, 1, 1, 50), loader, SampledSoftmax(64), threads=1)
    steps, targets, clock = min(steps or loader.n_steps, loader.n_steps), 0, time.process_time()
    with stage('train'):
        for k, parts in zip(range(steps), loader.steps(0)):
            loss, n = backward(t, parts); update(t, loss); t.step += 1; targets += n
            if k == 0: clock, first = time.process_time(), n
    per_target = (time.process_time() - clock) / max(1, targets - first)
    found['epoch'] = dict(steps=loader.n_steps, steps_run=steps, targets=loader.n_targets, loss=round(float(loss), 4),
        cpu_seconds=round(per_target * loader.n_targets, 1), seconds_are_projected=steps < loader.n_steps)

def rows(n: int, steps: int) -> dict:
    "The whole way from a csv to a trained epoch"
    with tempfile.TemporaryDirectory() as d:
        size = write(Path(d)/'ratings.csv', n)
        a = child('ingest', f'{d}/ratings.csv', d, gib=AS)
        b = child('training', d, a['raw_bytes'], steps, gib=AS)
    peak = max(a[k]['peak_gib'] for k in ('read', 'split'))
    out = dict(file_mb=round(size / 1e6, 1), ingest=a, training=b, ingest_peak_gib=peak)
    return out | dict(ok=peak <= LIMIT and b['arrays']['ratio'] <= 1.2)

def catalogue_data(V: int, users: int = 20_000):
    "Histories over a large catalogue: log-normal lengths, Zipf items"
    from seqrec_nb.data.sequences import Sequences
    from seqrec_nb.data.splits import leave_one_out
    rng = np.random.default_rng(0)
    n = np.clip(rng.lognormal(3.2, .8, users).astype(np.int64), 5, 400)
    items = (rng.zipf(1.2, n.sum()) * 7919 % V + 1).astype(np.int32)
    return leave_one_out(Sequences(items, np.r_[0, n.cumsum()], None, np.arange(users), np.arange(V)))

PHASES = {'a training step': ('a forward pass', 'a backward pass'), 'an evaluation': ('an evaluation',), 'a save': ('a save',)}

def phases(V, D, L, loss, steps, threads=1, save=1):
    "Training steps, a save and a ranking, each beside the estimate of its peak"
    import torch
    from seqrec_nb.checkpoint import save as save_checkpoint
    from seqrec_nb.core import reseed
    from seqrec_nb.data import EvalLoader, Loader
    from seqrec_nb.evaluate import ranks
    from seqrec_nb.losses import make_loss
    from seqrec_nb.memory import available_memory, check_memory
    from seqrec_nb.models import SASRec
    from seqrec_nb.train import Trainer, backward, update
    V, D, L, steps, threads = map(int, (V, D, L, steps, threads))
    torch.set_num_threads(threads); reseed(0, 'scale')
    data = catalogue_data(V); model, loss = SASRec(V, D, max_len=L), make_loss(loss)
    loader, ranking = Loader(data.train, L, 128), EvalLoader(data.test.take(slice(0, 300)), L)
    warm = Trainer(SASRec(100, D, max_len=L), Loader(catalogue_data(100, 200).train, L, 128), make_loss('ss'), threads=threads)
    for parts in warm.loader.steps(0): update(warm, backward(warm, parts)[0])      # libraries load and make their work space
    clock = time.process_time(); e = check_memory(model, loader, loss, available=2**60); clock = time.process_time() - clock
    base, done = status('VmRSS') - e.held, {}
    t = Trainer(model, loader, loss, threads=threads)
    with stage('a training step'):
        for _, parts in zip(range(steps), (parts for epoch in count() for parts in loader.steps(epoch))):
            value, _ = backward(t, parts); update(t, value); t.step += 1
            first = float(value) if t.step == 1 else first
    with stage('an evaluation'): ranks(model, ranking)
    if int(save):
        with tempfile.TemporaryDirectory() as d, stage('a save'): save_checkpoint(d + '/last', t.tensors(), {})
    for name, s in found.items():
        want = sum(e.always.values()) + max(sum(v.values()) for k, v in e.phases.items() if k in PHASES[name])
        got = s['peak_gib'] - base / GIB
        done[name] = dict(**s, needed_gib=round(got, 3), estimate_gib=round(want / GIB, 3), ratio=round(want / GIB / got, 2))
    parts = {k: round(n / 2**20, 1) for k, n in e.parts.items()}
    found.clear(); found.update(items=V, d_model=D, max_len=L, loss=type(loss).__name__, threads=threads, parts=loader.parts, steps=steps,
        first_loss=round(first, 4), last_loss=round(float(value), 4), check_cpu_ms=round(clock * 1e3, 1), phases=done, estimate_mib=parts)

def baselines(V, users):
    "The counted models over a large catalogue, and a ranking by each"
    from seqrec_nb.data import EvalLoader
    from seqrec_nb.evaluate import ranks
    from seqrec_nb.models import create  # registers the baselines
    from seqrec_nb.models.base import model_class
    data = catalogue_data(int(V), int(users))
    loader = EvalLoader(data.test.take(slice(0, 100)), 50)
    found['rows'], found['items'] = data.n_interactions, data.n_items
    for name in ('popularity', 'markov', 'cooccurrence'):
        with stage(f'{name}, counting'): model = model_class(name).from_data(data)
        with stage(f'{name}, ranking 100 users'): ranks(model, loader)
        del model

ESTIMATES = ['3416 64 200 ce 8', '100000 64 50 ss 4', '100000 64 50 ss 4 2', '200000 64 50 ce 2', '1000000 64 50 ss 3']
CATALOGUE = ['1000000 16 20 ss 200 1 0', '1000000 64 20 ss 20 1 0', '1000000 16 20 ce 2 1 0']

def growth(runs: list) -> dict:
    "How much the CPU seconds of a row grow from the fewest rows to the most"
    a, b = runs[0], runs[-1]
    per = lambda r, k: r['ingest'][k]['cpu_seconds'] / r['ingest']['rows']
    whole = lambda r: (per(r, 'read') + per(r, 'split'))
    return dict({k: round(per(b, k) / per(a, k), 2) for k in ('read', 'split')}, ingest=round(whole(b) / whole(a), 2),
                epoch=round(b['training']['epoch']['cpu_seconds'] / b['training']['epoch']['targets'] /
                            (a['training']['epoch']['cpu_seconds'] / a['training']['epoch']['targets']), 2))

def keep(**parts):
    "Put results into the file, beside those of other parts"
    import torch
    old = json.loads(OUT.read_text()) if OUT.exists() else {}
    git = subprocess.run(['git', 'describe', '--always', '--dirty'], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    about = dict(commit=git, python=platform.python_version(), torch=torch.__version__, numpy=np.__version__,
                 cpus=os.cpu_count(), load=[round(x, 1) for x in os.getloadavg()], seconds='wall clock; cpu_seconds: of the process')
    for k, v in parts.items(): old[k] = dict(about=about, **v)
    OUT.parent.mkdir(parents=True, exist_ok=True)
    OUT.write_text(json.dumps(old, indent=1) + '\n')

def main():
    if sys.argv[1:2] == ['--child']:
        globals()[sys.argv[2]](*sys.argv[3:])
        return print(json.dumps(found))
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('what', nargs='*', default=['rows', 'estimate', 'catalogue'])
    p.add_argument('--rows', nargs='+', type=float, default=[2e6, 20e6]); p.add_argument('--steps', type=int, default=0, help='0: the epoch')
    a = p.parse_args()
    if 'rows' in a.what:
        runs = [rows(int(n), a.steps) for n in a.rows]
        keep(rows=dict(limit_gib=LIMIT, address_space_gib=AS, runs=runs, growth_of_seconds_a_row=growth(runs)))
    if 'estimate' in a.what: keep(estimate=dict(runs=[child('phases', *e.split()) for e in ESTIMATES]))
    if 'catalogue' in a.what:
        keep(catalogue=dict(runs=[child('phases', *e.split()) for e in CATALOGUE], baselines=child('baselines', 1_000_000, 20_000)))
    print(OUT.read_text())

if __name__ == '__main__': main()
