"""Data-parallel training against one process: `python benchmarks/parallel.py [--steps N] [--out FILE]` prints JSON.

The same steps of SASRec on ml-1m (or, without it, on a synthetic log of its size) are trained by one process with one thread, one process with
two threads, and two processes (torchrun, gloo) with one thread each; each in children of its own, in turn. Reported: seconds a step, the bytes that
a step sends, the time of that exchange alone, and how far the losses and the ranks of the first users differ from those of one process."""
import argparse, hashlib, json, os, subprocess, sys, time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WAYS = {'1 process, 1 thread': (1, 1), '1 process, 2 threads': (1, 2), '2 processes, 1 thread each': (2, 1)}

def work(steps: int, threads: int, out: str):
    "In each process: train, evaluate, and let process 0 write what was found"
    import torch
    torch.set_num_threads(threads)
    from seqrec_nb.all import Callback, CrossEntropy, EvalLoader, Loader, SASRec, Trainer, load, ranks, reseed
    from seqrec_nb.device import tune_allocator
    from seqrec_nb.parallel import join
    tune_allocator()
    world, data = join('cpu'), load('ml-1m', 'P-sas')
    reseed(0, 'benchmark')
    model, losses, clock = SASRec(data.n_items, dropout=.2), [], []
    class Watch(Callback):
        def on_step_end(self, t):
            losses.append(float(t.last_loss)); clock.append(time.perf_counter())
            if t.step == steps + 4: t.stop = 'enough'                     # four warm up
    t = Trainer(model, Loader(data.train, batch_size=128), CrossEntropy(), callbacks=[Watch()], world=world).fit(99)
    parameters = sum(p.numel() for p in t.params)
    for p in t.params: p.grad = torch.ones_like(p)
    start = time.perf_counter()
    for _ in range(50): world.add_up(torch.tensor(1.), t.params)
    exchange = (time.perf_counter() - start) / 50
    valid = EvalLoader(data.valid.take(data.valid.user < 1000), batch_size=128)
    together, alone = ranks(model, valid, world=world), ranks(model, valid)
    if world.rank: return
    Path(out).write_text(json.dumps(dict(
        seconds=(clock[-1] - clock[3]) / steps, losses=losses, sent_mb=4 * parameters / 1e6 * (world.size > 1), exchange_s=exchange * (world.size > 1),
        ranks_equal=bool((together.above == alone.above).all() and (together.ties == alone.ties).all()), users=len(alone.above),
        ranks=hashlib.sha256(alone.above.tobytes()).hexdigest()[:12])))

def measure(way: str, steps: int, out: Path) -> dict:
    size, threads = WAYS[way]
    start = ['-m', 'torch.distributed.run', '--nproc-per-node', str(size)] if size > 1 else []
    subprocess.run([sys.executable, *start, __file__, '--work', str(out), '--steps', str(steps), '--threads', str(threads)], check=True,
                   env=os.environ | dict(PYTHONPATH=str(ROOT), OMP_NUM_THREADS=str(threads)))
    return json.loads(out.read_text())

def main():
    a = argparse.ArgumentParser()
    for name, default in (('--steps', 20), ('--threads', 1), ('--repeats', 3)): a.add_argument(name, type=int, default=default)
    a.add_argument('--work'); a.add_argument('--out', type=Path)
    a = a.parse_args()
    if a.work: return work(a.steps, a.threads, a.work)
    from tempfile import TemporaryDirectory
    import torch
    sys.path.insert(0, str(ROOT))
    from seqrec_nb.device import describe
    from seqrec_nb.experiment import commit
    with TemporaryDirectory() as d:
        found = [{w: measure(w, a.steps, Path(d)/'found.json') for w in WAYS} for _ in range(a.repeats)]      # in turn, so that load hits all alike
    first, rows = found[0]['1 process, 1 thread'], {}
    for w in WAYS:
        best = min(f[w]['seconds'] for f in found)
        rows[w] = dict({k: v for k, v in found[0][w].items() if k != 'losses'}, seconds=round(best, 4), exchange_s=round(min(f[w]['exchange_s'] for f in found), 5),
                       ratio=round(min(f['1 process, 1 thread']['seconds'] for f in found) / best, 3),
                       loss_gap=max(abs(x - y) for x, y in zip(first['losses'], found[0][w]['losses'], strict=True)))
    result = dict(data='ml-1m', protocol='P-sas', model='sasrec', batch_size=128, steps=a.steps, repeats=a.repeats, commit=commit(), **describe(), ways=rows)
    print(json.dumps(result, indent=1))
    if a.out: a.out.parent.mkdir(parents=True, exist_ok=True); a.out.write_text(json.dumps(result, indent=1) + '\n')

if __name__ == '__main__': main()
