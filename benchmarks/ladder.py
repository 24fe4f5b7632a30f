"""What is each fix worth? The original hybrid (../shared/specs/hybrid.md), its faults taken away one by one, on P-seed.

    python benchmarks/ladder.py [--data ml-100k] [--rungs 0,1,2,3,4,4b,5] [--seeds 0,1,2] [--out runs/ladder]
                                [--epochs 50 --patience 10] [--no-graph] [--workers 1] [--threads 1] [--max-users N]
    python benchmarks/ladder.py --table [--out runs/ladder]

Every rung is the one before with one change, and a run directory for each seed; a finished run is not run again, an interrupted one
continues. --no-graph also runs every rung without the graph (the same SASRec), which is what "+3.7 %, short +42 %" is a claim about.
Then OUT/ladder.json has every rung's settings, results with and without the seen items (overall and by length, each seed and the
mean), what the rung adds to the one before and the graph to SASRec (the same users, paired), epochs, seconds, commit and fingerprint.

What all rungs share and the original does not: the best epoch is picked on *masked* validation NDCG@10, ties are ranked in
expectation, and a BPR negative is never in the window (the original: never in the user's whole training history).
Rungs 0 to 4 train on every prefix and change one thing each, in one piece of code (`AsPublished`); without its faults that is the
library's HybridSASRecGNN with norm='post', d_inner=256, max_len=50, alpha_per='user' (tests/test_ladder.py: equal scores from equal
weights). The last two rungs change several things at once, and say which. An epoch shows every target once on rungs 0 to 4b; on 4b
and 5 it has so few steps that epochs, patience and the time between validations are four times as large.
"""
import argparse, json, signal, subprocess, sys, time
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from statistics import fmean
import numpy as np, torch
import torch.nn.functional as F
from torch import nn
from seqrec_nb.core import Out, unknown
from seqrec_nb.blocks.attention import TransformerBlock
from seqrec_nb.blocks.dropout import Dropout
from seqrec_nb.blocks.fusion import DiscreteFusion, FixedFusion
from seqrec_nb.blocks.graph import LightGCN
from seqrec_nb.data import EvalLoader
from seqrec_nb.data.graph import item_graph
from seqrec_nb.evaluate import rankings
from seqrec_nb.experiment import Interrupted, is_finished, load_run, read_metrics, run
from seqrec_nb.files import write_json
from seqrec_nb.metrics import GROUPS, Ranks, describe, members
from seqrec_nb.models.base import SeqModel, register_model
from seqrec_nb.record import RECIPES, Experiment, get_data
from seqrec_nb.analysis.significance import contrast

# ---- the original model ----

READOUTS = ('published', 'right')

def readout_shares(lengths, max_len: int = 50) -> dict:
    "Of histories of these lengths: how many are read, at column lengths-1 of a left-padded window, on padding, too early, or right"
    n = np.minimum(np.asarray(lengths), max_len)
    pad, right = 2 * n <= max_len, n == max_len          # items stand in the columns max_len-n … max_len-1
    found = dict(pad=pad & ~right, stale=~pad & ~right, right=right)
    return {k: dict(count=int(v.sum()), share=float(v.mean())) for k, v in found.items()}

def prefixes(lengths) -> np.ndarray:
    "Lengths of all prefixes of histories of these lengths that have a next item"
    return np.concatenate([np.arange(1, n) for n in lengths])

def left_padded(items, n, max_len: int, lo: int, hi: int):
    "(B,hi-lo+1) columns lo … hi of the window whose last item stands in column max_len-1; items (B,L) start in column 0"
    at = torch.arange(lo, hi + 1, device=items.device) - (max_len - n)[:, None]
    return items.gather(1, at.clamp(0, items.shape[1] - 1)) * (at >= 0)

def post_norm(block, asking, x, may=None, real=None):
    """A post-norm block: `asking` (B,Q,D) look at x (B,C,D) where `may` (B,Q,C) allows; None: all at themselves and what is before.
    A mask that fills all scores of a row with one number makes its softmax uniform: a query that is not `real` (B,Q) has no say."""
    (wq, wk, wv), (bq, bk, bv) = block.att.qkv.weight.chunk(3), block.att.qkv.bias.chunk(3)
    heads = lambda v, w, b: F.linear(v, w, b).unflatten(-1, (block.att.n_heads, -1)).transpose(1, 2)
    q = heads(asking, wq, bq)
    if may is None: y = F.scaled_dot_product_attention(q, heads(x, wk, bk), heads(x, wv, bv), is_causal=True)
    else: y = F.scaled_dot_product_attention(q * real[:, None, :, None], heads(x, wk, bk), heads(x, wv, bv), may[:, None])
    y = block.norm1(asking + block.drop(block.att.out(y.transpose(1, 2).flatten(2))))
    return block.norm2(y + block.drop(block.ffn(y)))

@register_model
class AsPublished(SeqModel):
    "HybridSASRecGNN as published: left-padded windows, one α a user, read at column lengths-1"
    causal = False       # padding looks at everything, and may be what is read: train on prefixes
    threadsafe = True
    def __init__(self, n_items: int, graph=None,
                 readout: str = 'published', # column lengths-1 of the left-padded window; right: the last column
                 gnn_norm: str = 'legacy',   # counts over unweighted degrees; weighted: spectral radius 1
                 with_graph: bool = True,    # False: SASRec as published
                 d_model: int = 64, n_blocks: int = 2, n_heads: int = 2, d_inner: int = 256, gnn_layers: int = 2,
                 max_len: int = 50, dropout: float = .2):
        super().__init__(n_items, d_model, max_len)
        if readout not in READOUTS: raise ValueError(unknown('readout', readout, READOUTS))
        self.readout, self.drop = readout, Dropout(dropout)
        self.position = nn.Embedding(max_len, d_model)
        self.blocks = nn.ModuleList(TransformerBlock(d_model, n_heads, d_inner, dropout, 0., 'post') for _ in range(n_blocks))
        self.gnn = LightGCN(graph, d_model, gnn_layers, gnn_norm) if with_graph else None
        if with_graph: self.project = nn.Linear(d_model, d_model)
        self.fusion = DiscreteFusion(10, 50) if with_graph else FixedFusion(1.)
        with torch.no_grad():      # linear layers keep torch's own start
            for w in (self.item.weight[1:], self.position.weight, *([self.gnn.item.weight[1:]] if with_graph else [])):
                nn.init.xavier_normal_(w)
            self.item.weight[0] = 0
    @classmethod
    def from_data(cls, data, make=None, **kw):
        "The model on the graph of the training histories"
        return cls(data.n_items, item_graph(data) if kw.get('with_graph', True) else None, **kw)
    def table(self):
        "(V,D), with a graph (V,2D): own vectors and the graph's. Padding's are learned there: the original mixes whole tables"
        return self.item.weight if self.gnn is None else torch.cat([self.item.weight, self.project(self.gnn())], 1)
    def output_table(self, E): return E[:, :self.d_model]
    def alpha(self, length):
        "The weight of SASRec's vectors: of the length after the cut, so that no history is ever long"
        return self.fusion(length.clamp_max(self.max_len))
    def forward(self, b, E=None):
        "What is read of each row, at every position of it (so that wherever a caller looks, it finds that)"
        if b.items.shape[1] > self.max_len: raise ValueError(f'a window of {b.items.shape[1]} items for max_len {self.max_len}')
        E = self.table() if E is None else E
        n, T = b.mask.sum(1).clamp_min(1), self.max_len
        p = n - 1 if self.readout == 'published' else torch.full_like(n, T - 1)
        pad = p < T - n
        h = E.new_zeros(len(b), self.d_model)
        for rows in (pad.nonzero()[:, 0], (~pad).nonzero()[:, 0]):
            if not len(rows): continue
            m, at = n[rows], p[rows]
            whole = bool(pad[rows[0]])                # padding sees all columns; an item only the items up to itself
            lo, hi = (0, T - 1) if whole else (T - int(m.max()), int(at.max()))
            h = h.index_copy(0, rows, self.read(b.items[rows], m, at, lo, hi, E).to(h.dtype))
        return Out(h[:, None].expand(-1, b.items.shape[1], -1), self.output_table(E))

def read(self, items, n, p, lo: int, hi: int, E):
    "(B,D) what stands in column p (B,) of windows of which the columns lo … hi matter; the last block is computed there alone"
    w = left_padded(items, n, self.max_len, lo, hi)
    if self.gnn is None: x = F.embedding(w, E, padding_idx=0)
    else:
        (seq, gnn), a = F.embedding(w, E).chunk(2, -1), self.alpha(n)[:, None, None]
        x = a * seq + (1 - a) * gnn
    x = self.drop(x + self.position.weight[lo:hi + 1])
    real, at, rows = w > 0, torch.arange(w.shape[1], device=w.device), torch.arange(len(w), device=w.device)
    see = lambda q: (at <= q[..., None]) & real[:, None] | ~real.gather(1, q)[..., None]       # (B,Q,C) for queries at q (B,Q)
    may = None if real.all() else see(at.expand(len(w), -1))
    for block in self.blocks[:-1]: x = post_norm(block, x, x, may, real)
    q = (p - lo)[:, None]
    return post_norm(self.blocks[-1], x[rows, q[:, 0]][:, None], x, see(q), real.gather(1, q))[:, 0]
AsPublished.read = read

# ---- the rungs ----

@dataclass
class Rung:
    key: str
    title: str
    settings: dict      # of the experiment
    masked: bool = True # which of the two results is the rung's
    scale: int = 1      # times the epochs, the patience and the epochs between validations
    note: str = ''
    def without_graph(self) -> dict:
        "The same experiment for SASRec alone"
        if self.settings['model'] != 'aspublished': return {**self.settings, 'model': 'sasrec'}
        return {k: v for k, v in self.settings.items() if k != 'gnn_norm'} | dict(with_graph=False)

def rungs(data: str = 'ml-100k') -> dict:
    "{key: Rung}, from the original to the library's model"
    s0 = dict(model='aspublished', max_len=50, dropout=.2, batch_size=256, lr=1e-3, samples='prefix', loss='bpr', negatives=1)
    s1 = {**s0, 'readout': 'right'}
    s3 = {**s1, 'gnn_norm': 'weighted'}
    s4 = {k: v for k, v in s3.items() if k != 'negatives'} | dict(loss='ce')
    users = RECIPES.get(('sasrec', data), {}).get('batch_size', 128)
    s5 = dict(model='hybrid_discrete', dropout=.2, batch_size=users, lr=1e-3, samples='all', loss='ce')
    s4b = {**s5, 'max_len': 50, 'norm': 'post', 'd_inner': 256, 'window': 'every'}
    both = f'the initial weights, a step of {users} users instead of 256 prefixes'
    found = [Rung('0', 'as published', s0, masked=False), Rung('1', 'reads the last item', s1, masked=False),
             Rung('2', 'seen items masked', s1, note='the runs of rung 1'),
             Rung('3', 'graph normalised by weighted degrees', s3), Rung('4', 'full cross-entropy', s4),
             Rung('4b', 'all positions in one pass', s4b, scale=4,
                  note=f'changes at once: one pass, α of every position by its true length (.7 beyond 50), {both}'),
             Rung('5', "the library's default", s5, scale=4,
                  note='changes at once: pre-norm with a last norm, d_inner 64, a window of 200 (its last 200 targets)')]
    return {r.key: r for r in found}

@dataclass
class Job:
    out: Path
    settings: dict # of the experiment

def jobs(a) -> dict:
    "{(key, with graph, seed): Job}; rungs with the same settings share a run"
    table, place, found = rungs(a.data), {}, {}
    for r in table.values():                                   # all of them, so that names do not depend on the choice
        for graph in (True, False):
            s = r.settings if graph else r.without_graph()
            name = place.setdefault(json.dumps(s, sort_keys=True), r.key + ('' if graph else '-sasrec'))
            if r.key not in a.rungs or not (graph or a.no_graph): continue
            budget = dict(epochs=a.epochs * r.scale, patience=a.patience * r.scale, eval_every=r.scale)
            for seed in a.seeds:
                where = dict(data=a.data, protocol='P-seed', seed=seed, max_users=a.max_users, device=a.device, threads=a.threads)
                found[r.key, graph, seed] = Job(a.out/f'{name}-s{seed}', {**s, **budget, **where, 'name': f'ladder-{name}-s{seed}'})
    return found

def is_done(job: Job) -> bool:
    "Is there nothing left to do?"
    e = Experiment(**job.settings)
    return (job.out/'unmasked.npz').exists() and is_finished(e, get_data(e), job.out)

def work(job: Job):
    "Train and test a run, unless that is done; then rank its test users once more, this time among all items"
    out = run(Experiment(**job.settings), job.out)
    file = out/'unmasked.npz'
    if file.exists() and file.stat().st_mtime >= (out/'metrics.json').stat().st_mtime: return
    e, data, model = load_run(out)
    device = next(model.parameters()).device
    rankings(model, EvalLoader(data.test, e.max_len, device=device))['unmasked'].save(file)

def work_all(todo: list, workers: int):
    "Some runs at a time, each a process of its own; who stops this one stops them, and they save first"
    if workers < 2: return [work(j) for j in todo]
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
    todo, live, failed = [j for j in todo if not is_done(j)][::-1], [], []
    start = lambda j: subprocess.Popen([sys.executable, __file__, '--job', json.dumps([str(j.out), j.settings])])
    try:
        while todo or live:
            while todo and len(live) < workers: live.append(start(todo.pop()))
            time.sleep(.2)
            failed += [p.returncode for p in live if p.poll()]
            live = [p for p in live if p.returncode is None]
            if 75 in failed: raise Interrupted('a run was interrupted; everything is saved')
    finally:
        for p in live: p.terminate()
        for p in live: p.wait()
        signal.signal(signal.SIGTERM, before)
    if failed: sys.exit(f'{len(failed)} runs failed; the others are done')

# ---- results ----

SIDES, SHOWN = ('masked', 'unmasked'), ('HR@10', 'NDCG@10')

@cache
def ranks_of(out: Path, side: str, n_items: int) -> Ranks:
    "Of a run, as if all had the same candidates, so that masked and unmasked ranks can be compared user by user"
    r = Ranks.load(out/dict(masked='ranks.npz', unmasked='unmasked.npz')[side])
    return replace(r, n_candidates=0 * r.n_candidates + n_items)

def outcome(out: Path, seed: int) -> dict:
    "One run"
    m = read_metrics(out)
    found = {k: m[k] for k in ('best_epoch', 'stopped', 'commit', 'protocol', 'fingerprint', 'parameters', 'warnings')}
    for side in SIDES:
        r = ranks_of(out, side, m['n_items'])
        of = {g: describe(r.where(rows)) for g, rows in members(r).items()}
        found[side] = {g: {k: d[k] for k in (*SHOWN, 'count')} for g, d in of.items()}
    return dict(seed=seed, run=out.name, epochs=m['timings']['epochs'], seconds=m['timings']['train_s'], **found)

def mean(runs: list) -> dict:
    "Means over seeds: side -> group -> metric"
    average = lambda x: None if None in x else fmean(x)      # nobody in a group
    return {side: {g: {k: average([r[side][g][k] for r in runs]) for k in SHOWN} for g in (*GROUPS, 'overall')} for side in SIDES}

def difference(a: list, b: list, sides) -> dict: # outs of the seeds; which of the two results of a, of b
    "a minus b by group, as numbers and relative to b; the same users, means over seeds"
    n = read_metrics(a[0])['n_items']
    A, B = ([ranks_of(o, side, n) for o in outs] for outs, side in zip((a, b), sides))
    found = {}
    for g, rows in members(A[0]).items():
        if not rows.any(): continue
        at = [[r.where(rows) for r in x] for x in (A, B)]
        found[g] = {m: contrast(*at, m) for m in SHOWN}
        for m, c in found[g].items():
            base = fmean(describe(r)[m] for r in at[1])
            c['relative'] = c['difference'] / base if base else None
    return found

def report(a) -> dict:
    "Everything of the finished runs"
    todo = {k: j for k, j in jobs(a).items() if (j.out/'metrics.json').exists() and (j.out/'unmasked.npz').exists()}
    outs = lambda key, graph: {s: j.out for (k, g, s), j in todo.items() if (k, g) == (key, graph)}
    both = lambda x, y: [[d[s] for s in sorted({*x} & {*y})] for d in (x, y)]   # seeds that both have
    lines, before = [], None
    for r in rungs(a.data).values():
        mine, plain, side = outs(r.key, True), outs(r.key, False), SIDES[not r.masked]
        if not mine: continue
        runs = [outcome(o, s) for s, o in mine.items()]
        line = dict(rung=r.key, title=r.title, note=r.note, side=side, settings=r.settings, seeds=list(mine), runs=runs, mean=mean(runs))
        if plain:
            alone = [outcome(o, s) for s, o in plain.items()]
            line['sasrec'] = dict(settings=r.without_graph(), seeds=list(plain), runs=alone, mean=mean(alone))
            x, y = both(mine, plain)
            if x: line['graph'] = {s: difference(x, y, (s, s)) for s in SIDES}
        if before:
            x, y = both(mine, before[1])
            if x: line['fix'] = dict(over=before[0], **difference(x, y, (side, before[2])))
        lines.append(line); before = r.key, mine, side
    data = get_data(Experiment(model='aspublished', data=a.data, protocol='P-seed', max_users=a.max_users))
    shares = {s: readout_shares(n) for s, n in (('train', prefixes(data.train.length)), ('test', data.test.length))}
    return dict(data=a.data, protocol='P-seed', fingerprint=data.fingerprint, users=len(data.test), items=data.n_items,
                epochs=a.epochs, patience=a.patience, max_users=a.max_users, readout_shares=shares, rungs=lines)

def text(found: dict) -> str:
    "ladder.json as a table"
    show = lambda x, form='.4f': '' if x is None else format(x, form)
    out = [f"{found['data']}, {found['protocol']}, fingerprint {found['fingerprint'][:12]}: {found['users']:,} test users, "
           f"{found['items']:,} items; at most {found['epochs']} epochs, patience {found['patience']}"]
    if found['max_users']: out.append(f"only {found['max_users']} users: a smoke test, no result")
    for split, s in found['readout_shares'].items():
        out.append(f'{split}: ' + ', '.join(f"{k} {v['count']:,} ({v['share']:.1%})" for k, v in s.items()) + ' read at lengths-1')
    out.append(f"\n{'rung':5}{'':38}{'':10}{'HR@10':>7}{'NDCG':>7}{'short':>7}{'medium':>7}{'long':>7}  {'fix: HR@10 [95 %]':26}"
               f"{'seeds':>5}{'epochs':>7}{'s/epoch':>8}  graph over SASRec alone: HR@10, short")
    for r in found['rungs']:
        m, runs = r['mean'][r['side']], r['runs']
        fix, graph = r.get('fix', {}).get('overall', {}).get('HR@10'), r.get('graph', {}).get(r['side'])
        change = lambda c: '' if c is None else f"{c['difference']:+.4f}" + (
            f" [{c['interval'][0]:+.4f}, {c['interval'][1]:+.4f}]" if c['interval'] else '')
        percent = lambda g: show(graph.get(g, {}).get('HR@10', {}).get('relative'), '+.1%') if graph else ''
        out.append(f"{r['rung']:5}{r['title']:38}{r['side']:10}{m['overall']['HR@10']:7.4f}{m['overall']['NDCG@10']:7.4f}"
                   + ''.join(f"{show(m[g]['HR@10']):>7}" for g in GROUPS) + f"  {change(fix):26}{len(runs):5}"
                   f"{fmean(x['epochs'] for x in runs):7.0f}{fmean(x['seconds'] / x['epochs'] for x in runs):8.1f}"
                   f"  {percent('overall')} {percent('short')}")
    notes = [f"{r['rung']}: {r['note']}" for r in found['rungs'] if r['note']]
    return '\n'.join(out + [''] * bool(notes) + notes)

def arguments(given=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    several = lambda kind: lambda s: [kind(x) for x in s.split(',') if x]
    p.add_argument('--data', default='ml-100k'); p.add_argument('--out', type=Path, help='default: runs/ladder, and the data set')
    p.add_argument('--rungs', type=several(str), default=[*rungs()]); p.add_argument('--seeds', type=several(int), default=[0, 1, 2])
    p.add_argument('--no-graph', action='store_true', help='also every rung without the graph')
    p.add_argument('--epochs', type=int, default=50); p.add_argument('--patience', type=int, default=10)
    p.add_argument('--workers', type=int, default=1, help='runs at a time'); p.add_argument('--threads', type=int, default=1)
    p.add_argument('--device', default='auto'); p.add_argument('--max-users', type=int)
    p.add_argument('--job', type=json.loads, help=argparse.SUPPRESS)
    p.add_argument('--table', action='store_true', help='only print what OUT/ladder.json says')
    a = p.parse_args(given)
    a.out = a.out or Path('runs')/('ladder' if a.data == 'ml-100k' else f'ladder-{Path(a.data).stem}')
    for k in a.rungs:
        if k not in rungs(): p.error(unknown('rung', k, rungs()))
    return a

def main(given=None):
    a = arguments(given)
    todo = [Job(Path(a.job[0]), a.job[1])] if a.job else [] if a.table else [*{j.out: j for j in jobs(a).values()}.values()]
    try: work_all(todo, a.workers)
    except Interrupted as e: print(e); sys.exit(75)
    if a.job: return
    if not a.table:
        write_json(a.out/'ladder.json', report(a))
    print(text(json.loads((a.out/'ladder.json').read_text(encoding='utf-8'))))


if __name__ == '__main__': main()
