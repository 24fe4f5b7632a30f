"""What a hybrid costs beside SASRec at the same shape: a training step, a full-ranking evaluation, memory of the fusion.

    python benchmarks/hybrid_cost.py [--data ml-1m --protocol P-seed --steps 12 --threads 2] [--out FILE]

The models take turns on the same batches, step by step, so that whatever else the machine does falls on all of them alike; the ratio is that
of the median times. One JSON line per model goes to --out.
"""
import argparse, json, time
import numpy as np, torch
from seqrec_nb.core import reseed
from seqrec_nb.data import EvalLoader, Loader, load
from seqrec_nb.device import describe, tune_allocator
from seqrec_nb.evaluate import ranks
from seqrec_nb.experiment import commit
from seqrec_nb.losses import make_loss
from seqrec_nb.models import MODELS
from seqrec_nb.train import Trainer, backward, update

WAYS = {'sasrec': ('sasrec', {}), 'hybrid_discrete': ('hybrid_discrete', {}), 'hybrid_continuous': ('hybrid_continuous', {}),
        'hybrid_discrete, 4 layers': ('hybrid_discrete', dict(gnn_layers=4)), 'hybrid_gat': ('hybrid_gat', {}),
        'hybrid_discrete, fused scores': ('hybrid_discrete', dict(score_with='fused')),
        'hybrid_discrete, output': ('hybrid_discrete', dict(fusion_level='output'))}


def largest(t, parts):
    "Elements of the largest tensor that a step keeps for its backward pass"
    sizes = [0]
    with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()) or x, lambda x: x):
        b = parts[0]; E = t.model.table(); t.loss(t.model, t.model(b, E), b)
    return max(sizes)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--data', default='ml-1m'); p.add_argument('--protocol', default='P-seed'); p.add_argument('--batch-size', type=int, default=128)
    p.add_argument('--steps', type=int, default=12); p.add_argument('--threads', type=int, default=2); p.add_argument('--out')
    a = p.parse_args()
    torch.set_num_threads(a.threads); tune_allocator()
    data = load(a.data, a.protocol)
    loader, test = Loader(data.train, 200, a.batch_size), EvalLoader(data.test, 200)
    trainers = {}
    for way, (name, kw) in WAYS.items():
        reseed(0, 'bench'); trainers[way] = Trainer(MODELS[name].from_data(data, **kw), loader, make_loss('ce'))
    clock = {way: [] for way in WAYS}
    for k, parts in zip(range(a.steps + 2), loader.steps(0)):
        for way, t in trainers.items():
            start = time.perf_counter(); value, _ = backward(t, parts); update(t, value); float(value); t.step += 1
            if k > 1: clock[way].append(time.perf_counter() - start)          # two steps warm up
    passes = {way: [] for way in WAYS}
    for k in range(4):
        for way, t in trainers.items():
            start = time.perf_counter(); ranks(t.model, test)
            if k: passes[way].append(time.perf_counter() - start)
    parts = next(iter(loader.steps(0)))
    step, once = ({w: float(np.median(x)) for w, x in c.items()} for c in (clock, passes))
    rows = [dict(model=w, step_s=step[w], step_ratio=step[w] / step['sasrec'], eval_s=once[w], eval_ratio=once[w] / once['sasrec'],
                 largest_saved=largest(trainers[w], parts), rows_times_items=len(parts[0]) * (data.n_items + 1) * 64, data=a.data, protocol=a.protocol,
                 batch_size=a.batch_size, threads=a.threads, steps=a.steps, commit=commit(), hardware=describe()['hardware'], torch=torch.__version__)
            for w in WAYS]
    print(f"{'model':32}{'step':>9}{'ratio':>7}{'evaluation':>12}{'ratio':>7}{'largest tensor kept':>21}")
    for r in rows: print(f"{r['model']:32}{r['step_s'] * 1e3:7.0f}ms{r['step_ratio']:7.2f}{r['eval_s']:11.2f}s{r['eval_ratio']:7.2f}{r['largest_saved']:21,}")
    if a.out:
        with open(a.out, 'a') as f: f.writelines(json.dumps(r) + '\n' for r in rows)


if __name__ == '__main__': main()
