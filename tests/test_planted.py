"The planted data: the law is a law, the oracle reaches the computed optimum, and nobody else passes it."
import numpy as np, pytest, torch
from seqrec_nb.data.loader import EvalLoader
from seqrec_nb.data.planted import BORDERS, DAY, Oracle, synthetic
from seqrec_nb.evaluate import rankings
from seqrec_nb.metrics import hr, members, ndcg, paired
from seqrec_nb.models.baselines import Cooccurrence, Markov, Popularity

WORLDS = {'default': {}, 'order 2': dict(order=2), 'no pauses': dict(long_gaps=0),
          'graph by length': dict(graph=(.8, .4, .1)), 'noise': dict(noise=1),
          'small': dict(n_items=60, longest=55)}

def test_same_seed_same_data():
    a, b, c = synthetic(100, seed=1), synthetic(100, seed=1), synthetic(100, seed=2)
    assert a.fingerprint == b.fingerprint != c.fingerprint

def test_sizes_and_groups():
    d = synthetic(600, n_items=150, shares=(.2, .3, .5), longest=90)
    assert (d.n_users, d.n_items, len(d.test)) == (600, 150, 600)
    n = d.test.length
    assert n.min() >= 3 and n.max() <= 90
    assert np.allclose(np.bincount(np.searchsorted(BORDERS, n)) / 600, (.2, .3, .5), atol=.06)
    assert d.seqs.times.dtype == np.int64
    assert all((np.diff(d.seqs.times[a:b]) > 0).all() for a, b in zip(d.seqs.offsets, d.seqs.offsets[1:]))
    assert 'synthetic' in repr(d)

def test_nobody_has_an_item_twice():
    d = synthetic(200, n_items=60, longest=58)     # nearly everything is consumed: the exact draw is needed
    for u in range(d.n_users): assert len(np.unique(d.seqs[u])) == len(d.seqs[u])
    assert d.seqs.items.min() >= 1 and d.seqs.items.max() <= 60

@pytest.mark.parametrize('longest', [50, 199, 300])
def test_impossible_lengths_are_refused(longest):
    with pytest.raises(ValueError, match='longest'): synthetic(10, n_items=200, longest=longest)

@pytest.mark.parametrize('bad', [dict(order=3), dict(noise=0), dict(neighbours=3)])
def test_impossible_laws_are_refused(bad):
    with pytest.raises(ValueError, match=next(iter(bad))): synthetic(10, **bad)

@pytest.mark.parametrize('world', WORLDS)
def test_the_oracle_reaches_the_best_and_nobody_passes_it(world):
    d = synthetic(1500, seed=3, **WORLDS[world])
    oracle = rankings(d.oracle, EvalLoader(d.test, time=True))
    for m, f in (('HR', hr), ('NDCG', ndcg)):
        for k in (5, 10):
            value, error = d.best(k)[f'{m}@{k}']
            for r in oracle.values(): assert abs(f(r, k).mean() - value) < 4 * error
    assert np.array_equal(oracle['masked'].above, oracle['unmasked'].above)   # no repeats: nothing to mask
    for cls in (Popularity, Markov, Cooccurrence):
        r = rankings(cls.from_data(d), EvalLoader(d.test))['masked']
        p = paired(r, oracle['masked'])
        assert p['interval'] is None or p['interval'][0] < 0 or p['difference'] == 0

def test_time_and_order_are_worth_something():
    d = synthetic(1000, seed=0)
    assert d.best(10)['NDCG@10'][0] > d.best(10, time=False)['NDCG@10'][0] + .05
    blind = rankings(d.oracle, EvalLoader(d.test))['masked']
    value, error = d.best(10, time=False)['NDCG@10']
    assert abs(ndcg(blind).mean() - value) < 4 * error
    flat = synthetic(1000, long_gaps=0, seed=0)
    assert flat.best(10)['NDCG@10'][0] == pytest.approx(flat.best(10, time=False)['NDCG@10'][0])

def test_graph_by_length():
    "With neighbour steps for short histories alone, the share of such transitions falls with the length"
    d = synthetic(1500, n_items=400, graph=(1., .5, 0.), noise=.01, long_gaps=0., seed=0)
    near, r = d.oracle.near.numpy(), np.arange(len(d.test))
    last, target = d.seqs.items[d.test.stop - 1], d.test.target
    friend = (near[last] == target[:, None]).any(1)
    group = np.searchsorted(BORDERS, d.test.length)
    share = [friend[group == g].mean() for g in range(3)]
    assert share[0] > .97 and .35 < share[1] < .7 and share[2] < .2

def test_the_law_is_what_was_drawn():
    "Drawn targets agree with the probabilities, by rank (chi-square per degree of freedom near 1)"
    d = synthetic(4000, n_items=60, shares=(0, 1, 0), longest=55, noise=.3, seed=5)
    rows = d.test
    p = _probabilities(d, rows)
    hit = p[np.arange(len(rows)), rows.target]
    assert (hit > 0).all()
    order = np.argsort(np.argsort(-p, 1), 1)[np.arange(len(rows)), rows.target]   # the target's rank
    expected = np.sort(p, 1)[:, ::-1].sum(0)[:20]
    seen = np.bincount(order, minlength=20)[:20]
    chi = ((seen - expected) ** 2 / expected).sum() / 20
    assert chi < 2

def _probabilities(d, rows):
    T = lambda x: torch.as_tensor(np.asarray(x).astype(np.int64))
    i, s = d.seqs.items, rows.stop
    pause = d.seqs.times[s] - d.seqs.times[s - 1]
    p = d.oracle.probability(T(i[s - 1]), T(i[s - 2]), T(rows.length), T(pause)).numpy()
    for r in range(len(rows)): p[r, rows.history(r)] = 0
    return p / p.sum(1, keepdims=True)

def test_order_two_needs_the_item_before():
    d = synthetic(200, order=2, seed=0)
    last = torch.full((2,), 9)
    previous = torch.stack([(d.oracle.kind[1:] == k).nonzero()[0, 0] + 1 for k in (0, 1)])
    p = d.oracle.probability(last, previous, torch.tensor([20, 20]), torch.tensor([60, 60]))
    assert not torch.allclose(p[0], p[1])
    one = synthetic(200, seed=0).oracle
    p = one.probability(last, previous, torch.tensor([20, 20]), torch.tensor([60, 2 * DAY]))
    assert not torch.allclose(p[0], p[1]) and torch.allclose(p.sum(1), torch.ones(2, dtype=torch.float64))
    assert isinstance(one, Oracle) and not one.trainable
