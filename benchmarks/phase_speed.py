"""A training step of the frequency and phase family: this library against the published arithmetic written plainly, in one run.

    python benchmarks/phase_speed.py [--repeats 9] [--only bank wearec] [--tiny] [--out nbs/_results/phase_speed.jsonl]

The plain side is `tests/published.py`, which equals the published models to the last digit: torch's own layers, one depthwise convolution
a band and channel, (L,L) masks of -10000, left-padded batches of 256 x 50, a scan that lays all decays and inflows out in memory and goes
through them step by step, all columns of every layer, and the last one read at the end; dropout .5 and torch's Adam. Our side is the trainer
on the same rows. Both run in one process with one thread and the same allocator, step by step in turn, so that whatever else the machine
does falls on both; figures are medians. Run it alone on the machine. An epoch of the plain side is its step times the number of steps.
"""
import argparse, json, os, sys, time
from pathlib import Path
sys.path.insert(0, str(Path(__file__).resolve().parents[1]/'tests'))
import numpy as np, torch
import published as ref
from seqrec_nb.blocks.phase import PhaseBank
from seqrec_nb.core import reseed
from seqrec_nb.data import Loader, load, synthetic
from seqrec_nb.device import describe, peak_memory, tune_allocator
from seqrec_nb.experiment import commit
from seqrec_nb.losses import make_loss
from seqrec_nb.models import MODELS, create
from seqrec_nb.train import Trainer, backward, update

STEPS = {  # name: (published family, our model, settings of ours, settings of the plain one, wanted ratio)
    'sasrec': ('sasrec', 'sasrec_bsa', dict(n_heads=2), dict(n_heads=2), None),
    'fmlprec': ('fmlprec', 'fmlprec', {}, {}, None),
    'bsarec': ('bsarec', 'bsarec', dict(n_heads=1), dict(n_heads=1, alpha=.9, c=3), None),
    'wearec': ('wearec', 'wearec', dict(n_heads=2, alpha=.3), dict(alpha=.3), 1.5),
    'v13': ('pswrecv13', 'pswrec_v13', {}, {}, None),
    'v13_norot': ('pswrecv13_norot', 'pswrec_v13_norot', {}, {}, None),
    'softmag': ('pswrecv13_softmag', 'pswrec_softmag', {}, {}, None),
    'v1111': ('pswrecv1111_residual_dynamic', 'pswrec_v1111', {}, {}, None),
    'vmamba': ('vmamba', 'pswrec_vmamba', {}, {}, 12.)}
EPOCHS = 'sasrec', 'v13', 'v13_norot', 'softmag', 'v1111', 'vmamba'     # causal ones: all positions at once
HEADS = dict(sasrec=2, bsarec=1, wearec=2)


class Plain:
    "A published model and torch's Adam"
    def __init__(self, family, data, L, D, heads, settings, dropout=.5):
        fresh = ref.random_params(family, n_items=data.n_items, L=L, D=D, n_heads=heads)
        self.params = {k: torch.nn.Parameter(v) for k, v in fresh.items()}
        for k in ('item_embeddings.weight', 'position_embeddings.weight'): torch.nn.init.normal_(self.params[k], std=.02)
        self.family, self.L = family, L
        self.settings = dict(settings, drop=torch.nn.Dropout(dropout))
        self.opt = torch.optim.Adam(self.params.values(), 1e-3)
    def step(self, ids, answers):
        loss = ref.loss(self.family, self.params, ids, answers, **self.settings)
        self.opt.zero_grad(); loss.backward(); self.opt.step()
        return float(loss.detach())


def windows(parts, L):
    "The rows of a step as the published loader gives them: (B,L) left-padded ids, and their targets"
    ids = torch.zeros(sum(map(len, parts)), L, dtype=torch.long)
    rows = [row[row > 0] for b in parts for row in b.items]
    for out, row in zip(ids, rows): out[L - len(row):] = row
    return ids, torch.cat([b.target for b in parts])


def ours(name, data, L, D, loader, **kw):
    reseed(0, 'bench')
    return Trainer(create(name, data.n_items, d_model=D, max_len=L, dropout=.5, **kw), loader, make_loss('ce'), threads=1)

def step(t, parts):
    value, _ = backward(t, parts); update(t, value); t.step += 1
    return float(value)

def seconds(f, *args):
    start = time.perf_counter(); f(*args)
    return time.perf_counter() - start


def figure(what, plain, own, wanted=None, **more):
    p, o = float(np.median(plain)), float(np.median(own))
    print(f"{what:28}{p * 1e3:11.1f}{o * 1e3:11.1f}{p / o:9.2f}{'' if wanted is None else f'   wanted {wanted:g}'}", flush=True)
    return dict(what=what, plain_s=p, ours_s=o, ratio=p / o, wanted=wanted, plain_all=plain, ours_all=own, **more)


def bank(a, L, D):
    "The filter bank alone, forward and backward, with the gradient of its input"
    reseed(0, 'bank')
    own, x = PhaseBank(D), torch.randn(a.batch_size, L, D, requires_grad=True)
    p = {f'{part}_convs.{s}.weight': w.detach()[:, None].clone().requires_grad_()
         for part, ws in (('real', own.real), ('imag', own.imag)) for s, w in enumerate(ws)}
    w = torch.randn(3, a.batch_size, L, len(own.kernels))
    def both(f):
        x.grad = None
        (torch.stack(f()) * w).sum().backward()
    def plain():
        phi, m = ref.phases(x, p)
        return [phi.cos(), phi.sin(), m]
    ways = [lambda: both(plain), lambda: both(lambda: list(own(x)[:3]))]
    for f in ways: f()
    times = [[seconds(f) for f in ways] for _ in range(3 * a.repeats)]
    return figure('filter bank', *map(list, zip(*times)), wanted=3.)


def one_step(name, a, data, loader, L, D):
    "A training step on the same rows in turn; the first of each warms up"
    family, model, kw, settings, wanted = STEPS[name]
    plain = Plain(family, data, L, D, HEADS.get(name, 4), settings)
    sides = {'corrected': ours(model, data, L, D, loader, **kw), 'as published': ours(model, data, L, D, loader, as_published=True, **kw)}
    n = a.slow_repeats if name == 'vmamba' else a.repeats
    times = {k: [] for k in ('plain', *sides)}
    for k, parts in zip(range(n + 1), loader.steps(0)):
        ids, answers = windows(parts, L)
        taken = {'plain': seconds(plain.step, ids, answers)} | {w: seconds(step, t, parts) for w, t in sides.items()}
        if k:
            for w, s in taken.items(): times[w].append(s)
    return [figure(f'{name} step', times['plain'], times['corrected'], wanted, mode='corrected'),
            figure(f'{name} step, as published', times['plain'], times['as published'], mode='as_published')]


def epoch(name, a, data, loader, whole, L, D, plain):
    "Seconds of an epoch: prefixes the plain way, prefixes our way, all positions at once"
    _, model, kw, _, _ = STEPS[name]
    t, by_prefix = ours(model, data, L, D, whole, **kw), ours(model, data, L, D, loader, **kw)
    def all_steps(e):
        for parts in whole.steps(e): step(t, parts)
    all_steps(0)
    own = [seconds(all_steps, e + 1) for e in range(a.epoch_repeats)]
    prefix = [seconds(step, by_prefix, parts) for _, parts in zip(range(a.repeats + 1), loader.steps(0))][1:]
    n = len(loader) / a.batch_size
    return figure(f'{name} epoch, all positions', [s * n for s in plain], own, 10., our_prefix_epoch_s=float(np.median(prefix)) * n,
                  prefix_samples=len(loader), all_targets=whole.n_targets, all_steps=whole.n_steps)


def settings():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--repeats', type=int, default=9); p.add_argument('--slow-repeats', type=int, default=2, help='of the step of vmamba')
    p.add_argument('--epoch-repeats', type=int, default=3); p.add_argument('--batch-size', type=int, default=256)
    p.add_argument('--only', nargs='+', default=['bank', *STEPS], choices=['bank', *STEPS]); p.add_argument('--no-epochs', action='store_true')
    p.add_argument('--tiny', action='store_true', help='toy sizes: does it run?'); p.add_argument('--out', help='append the record to this file')
    a = p.parse_args()
    if a.tiny: a.repeats = a.slow_repeats = a.epoch_repeats = 1; a.batch_size = 16
    return a


def main():
    a = settings()
    torch.set_num_threads(1); tune_allocator()
    L, D, real = (12, 16, False) if a.tiny else (50, 64, 'SEQREC_DATA' in os.environ)
    data = load('lastfm', 'P-bsa') if real else synthetic(n_users=60 if a.tiny else 1000, n_items=120 if a.tiny else 3000)
    loader, whole = Loader(data.train, L, a.batch_size, samples='prefix_bsa'), Loader(data.train, L, a.batch_size)
    before, rows = os.getloadavg()[0], []
    print(f"{'LastFM' if real else 'synthetic'}: {len(loader):,} prefixes, {data.n_items:,} items; load {before:.1f}\n"
          f"{'':28}{'plain ms':>11}{'ours ms':>11}{'ratio':>9}")
    if 'bank' in a.only: rows.append(bank(a, L, D))
    for name in (n for n in STEPS if n in a.only):
        if STEPS[name][1] not in MODELS: print(f'{name}: {STEPS[name][1]} is not registered'); continue
        rows += one_step(name, a, data, loader, L, D)
        if name in EPOCHS and not a.no_epochs: rows.append(epoch(name, a, data, loader, whole, L, D, rows[-1]['plain_all']))
    record = dict(benchmark='phase_speed', commit=commit(), environment=describe(), load_before=before, load_after=os.getloadavg()[0],
                  data='lastfm' if real else 'synthetic', n_items=data.n_items, batch_size=a.batch_size, max_len=L, d_model=D, dropout=.5,
                  precision='fp32', repeats=a.repeats, slow_repeats=a.slow_repeats, epoch_repeats=a.epoch_repeats, parts=loader.parts,
                  peak_memory=peak_memory(), tiny=a.tiny, figures=rows)
    if a.out:
        with open(a.out, 'a') as f: f.write(json.dumps(record) + '\n')


if __name__ == '__main__': main()
