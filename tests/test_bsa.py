"""The protocol of BSARec, WEARec and PSWRec (P-bsa, samples='prefix_bsa'), point by point, against plain Python.

Points of the protocol that hold for every other one as well are tested where they belong: hand-made ranks in
test_metrics.py::test_by_hand, ties in ::test_ties_are_the_mean_over_every_place, masks in test_evaluate.py, patience and the
strict > in test_callbacks.py::test_early_stopping and ::test_best_epoch_is_the_first_of_the_highest, the best weights in
test_experiment.py::test_early_stopping_keeps_the_best."""
import json, math
from collections import Counter
from functools import cache
import numpy as np, pytest, torch
from conftest import needs_data
from seqrec_nb.checkpoint import CheckpointError
from seqrec_nb.core import generator, reseed
from seqrec_nb.data.loader import EvalLoader, Loader
from seqrec_nb.data.sequences import Sequences
from seqrec_nb.data.splits import leave_one_out, load
from seqrec_nb.evaluate import rankings
from seqrec_nb.experiment import Experiment, read_metrics, run
from seqrec_nb.losses import CrossEntropy, make_loss
from seqrec_nb.memory import estimate_memory
from seqrec_nb.metrics import averages
from seqrec_nb.models.base import SeqModel
from seqrec_nb.models.sasrec import SASRec
from seqrec_nb.train import Trainer

load = cache(load)

# ---- the protocol in plain Python: lists of items, one for each user ----

def training(histories, L):
    "(user, input, target) of every training sample, in the order of the published code"
    cut = {u: h[-(L + 2):-2] for u, h in enumerate(histories)}
    return [(u, t[:i + 1][:-1], t[:i + 1][-1]) for u, t in cut.items() for i in range(len(t))]

def held_out(histories, L, back):
    "(user, input, target) of validation (back=2) or test (back=1)"
    return [(u, h[:-back][-L:], h[-back]) for u, h in enumerate(histories)]

def rows(batches):
    "The same of batches"
    lists = lambda b: zip(b.user.tolist(), b.items.tolist(), b.target.tolist())
    return [(u, [i for i in x if i], t) for b in batches for u, x, t in lists(b)]

def epoch(loader, number=0): return [b for step in loader.steps(number) for b in step]
def counted(samples): return Counter((u, tuple(x), t) for u, x, t in samples)

def some_histories(users=40, longest=24, n_items=30, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(1, n_items + 1, n).tolist() for n in [3, 4, 5, *rng.integers(3, longest, users)]]

def dataset(histories, n_items=None):
    flat, offsets = np.concatenate(histories).astype(np.int32), np.r_[0, np.cumsum([len(h) for h in histories])]
    return leave_one_out(Sequences(flat, offsets, None, np.arange(len(histories)), np.arange(n_items or flat.max())), 'P-bsa')

# ---- samples and splits ----

@pytest.mark.parametrize('L', [1, 2, 5, 9, 50])
@pytest.mark.parametrize('parts', [None, 1])
def test_training_samples(L, parts):
    h = some_histories(); d = dataset(h); loader = Loader(d.train, L, 16, 'prefix_bsa', parts=parts)
    want = training(h, L)
    assert counted(rows(epoch(loader))) == counted(want)
    assert len(loader) == loader.n_targets == len(want) == sum(min(len(x) - 2, L) for x in h)
    assert loader.n_steps == math.ceil(len(want) / 16)               # the last, smaller batch is kept

def test_the_first_sample_of_every_user_is_empty():
    h = some_histories(); L = 6; d = dataset(h)
    empty = {u: t for u, x, t in rows(epoch(Loader(d.train, L, 16, 'prefix_bsa'))) if not x}
    assert empty == {u: x[-(L + 2):-2][0] for u, x in enumerate(h)}

@pytest.mark.parametrize('L', [1, 5, 50])
def test_validation_and_test(L):
    "Inputs are the last L items before the target; the test input holds the validation item"
    h = some_histories(); d = dataset(h)
    assert counted(rows(EvalLoader(d.valid, L, 7))) == counted(held_out(h, L, 2))
    assert counted(rows(EvalLoader(d.test, L, 7))) == counted(held_out(h, L, 1))
    assert all(x[-1] == h[u][-2] for u, x, _ in rows(EvalLoader(d.test, L, 7)))

@pytest.mark.parametrize('L', [4, 50])
def test_no_held_out_item_is_trained_on(L):
    "Every interaction gets a number of its own: none of the last two of a user is in any training batch"
    h = some_histories(); ends = np.cumsum([len(x) for x in h])
    d = dataset([list(range(e - len(x) + 1, e + 1)) for x, e in zip(h, ends)])
    seen = {i for _, x, t in rows(epoch(Loader(d.train, L, 16, 'prefix_bsa'))) for i in (*x, t)}
    assert seen == {i for x, e in zip(h, ends) for i in range(e - min(len(x), L + 2) + 1, e - 1)}
    assert not seen & {int(t) for s in (d.valid, d.test) for t in s.target}

def test_how_it_differs_from_prefix():
    "Of histories that fit into the window only the empty sample is new; of longer ones there are fewer, shorter ones"
    h = some_histories(longest=20); d = dataset(h)
    new, old = (counted(rows(epoch(Loader(d.train, 50, 16, s)))) for s in ('prefix_bsa', 'prefix'))
    assert sum((old - new).values()) == 0 and all(not x for _, x, _ in new - old) and sum((new - old).values()) == len(h)
    new, old = (rows(epoch(Loader(d.train, 5, 16, s))) for s in ('prefix_bsa', 'prefix'))
    assert max(len(x) for _, x, _ in new) == 4 and max(len(x) for _, x, _ in old) == 5 and len(new) < len(old)

def test_users_who_are_only_trained_on():
    "Fewer than three interactions: no validation, no test, and every item is a target, as for the other samples"
    h = [[1, 2, 3, 4], [5], [6, 7]]; d = dataset(h)
    assert d.test.user.tolist() == [0] and counted(rows(epoch(Loader(d.train, 50, 16, 'prefix_bsa')))) == counted(
        [(0, [], 1), (0, [1], 2), (1, [], 5), (2, [], 6), (2, [6], 7)])

# ---- the files ----

FILES = {'lastfm': ('LastFM', 1090, 3646, 52551, 25726, 101), 'beauty': ('Beauty', 22363, 12101, 198502, 150258, 587),
         'sports': ('Sports_and_Outdoors', 35598, 18357, 296337, 223464, 873),
         'toys': ('Toys_and_Games', 19412, 11924, 167597, 125896, 492), 'ml-1m-bsa': ('ML-1M', 6040, 3416, 999611, 267884, 1047)}
SHAPE = {'lastfm': (5, 19, 899), 'beauty': (5, 6, 204), 'sports': (5, 6, 296), 'toys': (5, 6, 550), 'ml-1m-bsa': (18, 96, 2277)}

@needs_data
@pytest.mark.parametrize('name', FILES)
def test_sizes_of_the_files(name):
    "Users, items, interactions, lengths; published numbers of samples and of batches of 256 rows"
    _, users, items, n, samples, batches = FILES[name]; d = load(name, 'P-bsa')
    assert (d.n_users, d.n_items, d.n_interactions) == (users, items, n) and len(d.valid) == len(d.test) == users
    low, middle, high = SHAPE[name]; lengths = d.seqs.lengths
    assert (lengths.min(), lengths.max()) == (low, high) and abs(np.median(lengths) - middle) <= .5
    loader = Loader(d.train, 50, 256, 'prefix_bsa')
    assert (len(loader), loader.n_steps) == (samples, batches) and (loader.n == 0).sum() == users
    assert samples == np.minimum(lengths - 2, 50).sum() and loader.padding() < 1.05

@needs_data
@pytest.mark.parametrize('name', FILES)
def test_items_of_the_files(name, data_dir):
    "One line a user, in order: its number and its items, oldest first"
    numbers = [np.array(line.split(), int) for line in (data_dir/'sequences'/f'{FILES[name][0]}.txt').open()]
    s = load(name, 'P-bsa').seqs
    assert np.array_equal(s.user_ids.astype(int), [x[0] for x in numbers]) and np.array_equal(s.lengths, [len(x) - 1 for x in numbers])
    assert np.array_equal(np.asarray(s.item_ids).astype(int)[s.items - 1], np.concatenate([x[1:] for x in numbers]))

@needs_data
def test_samples_of_a_file():
    "The whole of LastFM: the same inputs and targets as in plain Python, in training, validation and test"
    d = load('lastfm', 'P-bsa'); h = [d.seqs[u].tolist() for u in range(d.n_users)]
    assert counted(rows(epoch(Loader(d.train, 50, 256, 'prefix_bsa')))) == counted(training(h, 50))
    for split, back in ((d.valid, 2), (d.test, 1)): assert counted(rows(EvalLoader(split, 50))) == counted(held_out(h, 50, back))

# ---- evaluation ----

class Given(SeqModel):
    "Scores that are given"
    def __init__(self, s): super().__init__(s.shape[1] - 1, None); self.s = s
    def table(self): return self.s
    def scores(self, b, E=None): return self.s[b.row].clone()

def test_metrics_of_a_sorted_list():
    "The best 20 of all items by sorting, seen ones and padding left out: what the published code does, with -inf for its 0"
    h = some_histories(users=200, n_items=60, longest=30); d = dataset(h, 60)
    s = torch.rand(len(h), 61, generator=generator(0)); s[:, 0] = 9.
    want = {'masked': Counter(), 'unmasked': Counter()}
    for kind, seen in (('masked', True), ('unmasked', False)):
        for u, x in enumerate(h):
            out = {0} | (set(x[:-1]) - {x[-1]} if seen else set())
            best = sorted(set(range(61)) - out, key=lambda i: -s[u, i])[:20]
            assert 0 not in best and not (seen and set(best) & (set(x[:-1]) - {x[-1]}))
            for k in (5, 10, 20):
                if x[-1] in best[:k]: want[kind] += Counter({f'HR@{k}': 1, f'NDCG@{k}': 1 / math.log2(best.index(x[-1]) + 2)})
    got = rankings(Given(s), EvalLoader(d.test, 50))
    for kind in want:
        found = averages(got[kind])
        for k, v in want[kind].items(): assert found[k] == pytest.approx(v / len(h), abs=1e-12), (kind, k)
    assert averages(got['masked']) != averages(got['unmasked'])

# ---- training ----

def trained(seed=0, samples='prefix_bsa', loss='ce', precision='fp32', L=12, threads=1, live=False):
    d = dataset(some_histories()); reseed(seed, 'weights')
    model = type('Live', (SASRec,), dict(first_id=0))(30, 8, 1, 1, L) if live else SASRec(30, 8, 1, 1, L)
    fit = Loader(d.train, L, 32, samples, seed=seed)
    return Trainer(model, fit, make_loss(loss), lr=.01, precision=precision, seed=seed, threads=threads).fit(1)

@pytest.mark.parametrize('threads', [1, 2])
def test_one_seed_one_loss(threads):
    "Bit by bit, whatever was drawn before; another seed gives another loss"
    a = trained(threads=threads); torch.rand(5); np.random.rand(5)
    b, c = trained(threads=threads), trained(seed=1, threads=threads)
    assert a.record['loss'] == b.record['loss'] != c.record['loss']
    assert all(torch.equal(x, y) for x, y in zip(a.model.state_dict().values(), b.model.state_dict().values()))

@pytest.mark.parametrize('loss', ['ce', 'ss', 'gbce', 'bce', 'bpr'])
@pytest.mark.parametrize('precision', ['fp32', 'bf16'])
def test_every_loss_trains_on_empty_rows(loss, precision):
    t = trained(loss=loss, precision=precision)
    assert math.isfinite(t.record['loss']) and all(p.isfinite().all() for p in t.model.parameters())

def test_who_moves_the_padding_row():
    "Every target where it is a class (`first_id = 0`), empty rows where they look it up, and nothing else"
    row = lambda **kw: trained(**kw).model.item.weight[0].any()
    assert not row(samples='prefix') and row(samples='prefix', live=True) and row(samples='prefix_bsa')

@pytest.mark.parametrize('L', [1, 12])
def test_memory_of_such_a_training_is_known(L):
    d = dataset(some_histories())
    for rows_ in (1, 32, 10**4):
        e = estimate_memory(SASRec(30, 8, 1, 1, L), Loader(d.train, L, rows_, 'prefix_bsa'), CrossEntropy(), threads=1)
        assert e.total > 0 and all(v >= 0 for v in e.parts.values())

# ---- a run, and the metric that stops it ----

TINY = dict(model='sasrec', protocol='P-bsa', samples='prefix_bsa', d_model=8, n_blocks=1, n_heads=1, max_len=50, batch_size=256,
            dropout=.1, threads=1, lr=.01)

def histories_of(out): return [json.loads(line) for line in (out/'history.jsonl').read_text().splitlines()]

@pytest.mark.parametrize('monitor', ['NDCG@10', 'NDCG@20'])
def test_the_metric_that_picks_the_epoch_is_recorded(monitor, tmp_path):
    "BSARec and WEARec stop by NDCG@20, PSWRec by NDCG@10: a record says by which, and another one is another experiment"
    log = tmp_path/'toy.txt'
    log.write_text('\n'.join(' '.join(map(str, (u, *x))) for u, x in enumerate(some_histories(), 1)))
    e = Experiment(**{**TINY, 'max_len': 8}, data=log, monitor=monitor, epochs=6, patience=2)
    out = run(e, tmp_path/'run'); m, seen = read_metrics(out), histories_of(out)
    value = [h['valid'][monitor] for h in seen]
    assert m['monitor'] == monitor == m['identity']['monitor'] == json.loads((out/'experiment.json').read_text())['monitor']
    assert m['best_val_metric'] == max(value) == m['valid_metrics'][monitor] and m['best_epoch'] == 1 + value.index(max(value))
    assert len(seen) == min(6, m['best_epoch'] + 2) and m['protocol'] == 'P-bsa' and m['identity']['samples'] == 'prefix_bsa'
    other = 'NDCG@10' if monitor == 'NDCG@20' else 'NDCG@20'
    with pytest.raises(CheckpointError, match='monitor'): run(Experiment(**{**e.to_dict(), 'monitor': other}), tmp_path/'run')

@needs_data
def test_from_the_file_to_the_metrics(tmp_path):
    out = run(Experiment(**TINY, data='lastfm', monitor='NDCG@20', epochs=1, max_users=100), tmp_path/'run')
    m, (first,) = read_metrics(out), histories_of(out)
    d = load('lastfm', 'P-bsa')
    assert first['targets'] == np.minimum(d.seqs.lengths[:100] - 2, 50).sum()
    assert m['best_val_metric'] == first['valid']['NDCG@20'] and m['grouped_metrics']['overall']['count'] == 100
    assert m['fingerprint'] == d.fingerprint and m['n_items'] == 3646 and set(m['baselines']) >= {'popularity'}
