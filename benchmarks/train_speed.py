"""Training speed of SASRec on this machine: this library against a plain PyTorch loop, in one run.

    python benchmarks/train_speed.py [--data ml-1m --protocol P-sas --steps 24] [--precision fp32 bf16] [--loss ce ss]

Prints, for each way of training, the loss targets a second, the seconds of an epoch, and the share of the measured matrix-product
ceiling that the step's arithmetic reaches; then the ratio to the plain loop (a DataLoader that pads every row to L, and a
cross-entropy over all scores at once). Run it alone on the machine: on two busy cores every figure is several times too low.
One JSON line per row goes to --out. The shape is that of ../shared/bench: B 128, L 200, d 64, 2 blocks, 2 heads, dropout .2.
"""
import argparse, json, time
import numpy as np, torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, Dataset
from seqrec_nb.core import Batch, reseed
from seqrec_nb.data import EvalLoader, Loader, load
from seqrec_nb.device import describe, peak_memory, tune_allocator
from seqrec_nb.evaluate import ranks
from seqrec_nb.losses import make_loss
from seqrec_nb.models import SASRec
from seqrec_nb.device import autocast
from seqrec_nb.train import Trainer, backward, update


class Padded(Dataset):
    "One row a user, cut to the last L + 1 items and padded to L: what most code does"
    def __init__(self, split, L): self.rows, self.L = [split.history(r)[-L - 1:] for r in range(len(split)) if split.length[r] > 1], L
    def __len__(self): return len(self.rows)
    def __getitem__(self, r):
        s, out = self.rows[r], np.zeros((2, self.L), np.int64)
        out[0, :len(s) - 1], out[1, :len(s) - 1] = s[:-1], s[1:]
        return torch.from_numpy(out)


def gemm_ceiling(dtype, n=1024, seconds=.5):
    "FLOP/s of a large square product with all threads: what the machine can do at best"
    a, b = torch.randn(n, n).to(dtype), torch.randn(n, n).to(dtype)
    a @ b; k, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds: a @ b; k += 1
    return k * 2 * n ** 3 / (time.perf_counter() - start)


def flops_per_target(n_items, L, d, blocks, d_inner, loss, k):
    "Forward and backward arithmetic of one real target (speed.md section 3)"
    linear, attention = blocks * (8 * d * d + 4 * d * d_inner), blocks * 2 * L * d
    return 3 * (linear + 2 * d * (n_items if loss == 'ce' else k + 1)) + 3.5 * attention


def ours(data, a, precision, loss, attn):
    reseed(0, 'bench')
    model = SASRec(data.n_items, a.d, 2, 2, a.max_len, dropout=a.dropout, attn_dropout=attn)
    loader = Loader(data.train, a.max_len, a.batch_size)
    t = Trainer(model, loader, make_loss(loss), precision=precision)
    def steps():
        for parts in loader.steps(0):
            value, n = backward(t, parts); update(t, value); t.step += 1
            yield n
    return timed(steps, a.steps), loader


def plain(data, a, precision, attn):
    "The textbook loop: pads to L, keeps all scores"
    reseed(0, 'bench')
    model = SASRec(data.n_items, a.d, 2, 2, a.max_len, dropout=a.dropout, attn_dropout=attn)
    opt = torch.optim.Adam(model.parameters(), 1e-3)
    batches = DataLoader(Padded(data.train, a.max_len), a.batch_size, shuffle=True)
    def steps():
        for b in batches:
            x, y = b[:, 0], b[:, 1]
            with autocast(torch.device('cpu'), precision):
                logits = model(Batch(x)).h @ model.table().T
                loss = F.cross_entropy(logits.float().flatten(0, 1), y.flatten(), ignore_index=0)
            opt.zero_grad(); loss.backward(); opt.step()
            yield int((y > 0).sum())
    return timed(steps, max(4, a.steps // 4))


def evaluation(data, a):
    "Seconds to rank every test target in the full catalogue, after the model is loaded; the second of two passes"
    model, loader = SASRec(data.n_items, a.d, 2, 2, a.max_len), EvalLoader(data.test, a.max_len)
    for _ in range(2):
        start = time.perf_counter(); ranks(model, loader); seconds = time.perf_counter() - start
    return seconds


def timed(steps, n):
    "Targets a second over n steps after two that warm up"
    it = steps(); next(it); next(it)
    start, targets = time.perf_counter(), 0
    for _, k in zip(range(n), it): targets += k
    return targets / (time.perf_counter() - start)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--data', default='ml-1m'); p.add_argument('--protocol', default='P-sas')
    p.add_argument('--max-len', type=int, default=200); p.add_argument('--batch-size', type=int, default=128)
    p.add_argument('--d', type=int, default=64); p.add_argument('--dropout', type=float, default=.2)
    p.add_argument('--steps', type=int, default=24); p.add_argument('--threads', type=int, default=2)
    p.add_argument('--precision', nargs='+', default=['fp32', 'bf16']); p.add_argument('--loss', nargs='+', default=['ce', 'ss'])
    p.add_argument('--out', help='append JSON lines to this file')
    a = p.parse_args()
    torch.set_num_threads(a.threads)
    data, machine = load(a.data, a.protocol), describe()
    ceiling = {q: gemm_ceiling(dict(fp32=torch.float32, bf16=torch.bfloat16)[q]) for q in a.precision}
    print(f"{data!r}\n{machine['hardware']}, {a.threads} threads, torch {machine['torch']}; matrix products reach "
          + ', '.join(f'{v / 1e9:.0f} GFLOP/s in {q}' for q, v in ceiling.items()))
    reference = plain(data, a, 'fp32', 0.)               # with the default allocator, as anyone would run it
    tune_allocator()
    rows = [dict(way='plain loop', precision='fp32', loss='ce', attn_dropout=0., targets_per_s=reference)]
    for q in a.precision:
        for loss in a.loss:
            for attn in ((0., a.dropout) if loss == 'ce' else (0.,)):
                speed, loader = ours(data, a, q, loss, attn)
                rows.append(dict(way='seqrec_nb', precision=q, loss=loss, attn_dropout=attn, targets_per_s=speed))
    mean_context = float((loader.n.astype(float) ** 2).sum() / loader.n.sum())
    print(f'{loader.n_targets:,} targets an epoch, {loader.padding():.3f} cells a token\n')
    print(f"{'way':12}{'precision':10}{'loss':5}{'att.drop':>9}{'targets/s':>11}{'s/epoch':>9}{'of ceiling':>11}{'ratio':>7}")
    for r in rows:
        work = flops_per_target(data.n_items, mean_context, a.d, 2, a.d, r['loss'], 256)
        r |= dict(epoch_s=loader.n_targets / r['targets_per_s'], ceiling_share=r['targets_per_s'] * work / ceiling.get(r['precision'], np.nan),
                  ratio=r['targets_per_s'] / reference, data=a.data, protocol=a.protocol, batch_size=a.batch_size, max_len=a.max_len, d=a.d,
                  threads=a.threads, hardware=machine['hardware'], torch=machine['torch'], peak_memory=peak_memory())
        print(f"{r['way']:12}{r['precision']:10}{r['loss']:5}{r['attn_dropout']:9.1f}{r['targets_per_s']:11,.0f}{r['epoch_s']:9.1f}"
              f"{r['ceiling_share']:11.0%}{r['ratio']:7.1f}")
    print(f"\nfull ranking of {len(data.test):,} users x {data.n_items:,} items: {evaluation(data, a):.2f} s")
    if a.out:
        with open(a.out, 'a') as f: f.writelines(json.dumps(r) + '\n' for r in rows)


if __name__ == '__main__': main()
