"Every metric is a function of two integers per user: hand examples, ties, groups, intervals, files."
import json
import numpy as np, pytest
from seqrec_nb.metrics import (GROUPS, Ranks, averages, bootstrap, describe, detectable, hr, members, mrr,
                               ndcg, paired, per_user, summary, wilson)

def made(above, ties=0, n=1000, length=20, target=1):
    above = np.asarray(above); full = lambda x: np.broadcast_to(x, above.shape)
    return Ranks(np.arange(len(above)), full(length), full(target), above, full(ties), full(n))

@pytest.fixture
def some():
    rng = np.random.default_rng(3); n = 500
    ties = rng.integers(0, 5, n) * (rng.random(n) < .3)
    return made(rng.geometric(.02, n) - 1, ties, length=rng.integers(1, 120, n))

def test_by_hand():
    r = made([0, 3, 9, 10, 40])
    assert hr(r, 10).tolist() == [1, 1, 1, 0, 0] and hr(r, 5).tolist() == [1, 1, 0, 0, 0]
    np.testing.assert_allclose(ndcg(r, 10), [1, 1 / np.log2(5), 1 / np.log2(11), 0, 0])
    np.testing.assert_allclose(mrr(r, 20), [1, 1/4, 1/10, 1/11, 0])

GAIN = {'HR@10': lambda r: 1., 'NDCG@10': lambda r: 1 / np.log2(r + 2), 'MRR@10': lambda r: 1 / (r + 1)}

@pytest.mark.parametrize('metric,gain', GAIN.items())
def test_ties_are_the_mean_over_every_place(metric, gain):
    "The closed form equals the average over the ranks above … above+ties, one by one"
    for above in (0, 1, 5, 8, 9, 10, 30):
        for ties in (0, 1, 2, 7, 50):
            slow = np.mean([gain(r) if r < 10 else 0. for r in range(above, above + ties + 1)])
            assert per_user(made([above], ties), metric)[0] == pytest.approx(slow, abs=1e-14)

@pytest.mark.parametrize('k', [1, 5, 10, 20, 200])
def test_a_constant_scorer_gets_k_of_n(k):
    N = 137
    assert (hr(made([0] * 9, ties=N - 1, n=N), k) == min(k / N, 1)).all()

def test_settling_ties_bounds_the_expectation(some):
    for m in ('HR@10', 'NDCG@10', 'MRR@10'):
        assert (per_user(some.settle('worst'), m) <= per_user(some, m) + 1e-12).all()
        assert (per_user(some, m) <= per_user(some.settle('best'), m) + 1e-12).all()
    with pytest.raises(ValueError, match='worst'): some.settle('wurst')

@pytest.mark.parametrize('name', ['NDGC@10', 'NDCG', 'HR@0', 'HR@ten'])
def test_metric_names(name, some):
    with pytest.raises(ValueError): per_user(some, name)

@pytest.mark.parametrize('columns', [dict(above=[-1]), dict(above=[1000]), dict(above=[500], ties=500),
                                     dict(above=[0], ties=-1)])
def test_impossible_rows_are_refused(columns):
    with pytest.raises(ValueError, match='impossible'): made(**columns)

def test_columns_of_one_length():
    with pytest.raises(ValueError, match='differ'): Ranks([1, 2], [1, 2], [1, 2], [0, 0], [0], [9, 9])

def test_groups_and_their_borders():
    r = made([0] * 8, length=[0, 1, 10, 11, 50, 51, 200, 10**6])
    m = members(r)
    assert list(m) == ['short', 'medium', 'long', 'overall']
    assert [g.sum() for g in m.values()] == [3, 2, 3, 8]
    m = members(r, {'rest': np.inf, 'tiny': 1})
    assert list(m) == ['tiny', 'rest', 'overall'] and m['tiny'].sum() == 2
    with pytest.raises(ValueError, match='no group'): members(r, {'short': 10})

def test_overall_is_the_count_weighted_mean(some):
    g = summary(some)['grouped_metrics']
    assert sum(g[n]['count'] for n in GROUPS) == g['overall']['count'] == len(some)
    for m in averages(some):
        mean = sum(g[n][m] * g[n]['count'] for n in GROUPS) / len(some)
        assert mean == pytest.approx(g['overall'][m], rel=1e-12)
    assert summary(some)['test_metrics'] == {m: g['overall'][m] for m in averages(some)}

def test_an_empty_group_stays():
    "Requirement 004: long users vanished from the table; here they stay, with count 0"
    s = summary(made([0, 30, 2], length=[5, 20, 50]))
    long = s['grouped_metrics']['long']
    assert long['count'] == 0 and long['HR@10'] is None and long['interval']['NDCG@10'] is None
    assert list(s['grouped_metrics']) == ['short', 'medium', 'long', 'overall']

@pytest.mark.parametrize('above', [[], [4], [3, 3, 3], [900] * 5])
def test_json_has_no_nan(above):
    s = summary(made(above))
    assert json.loads(json.dumps(s, allow_nan=False)) == s
    assert set(s['test_metrics']) == {f'{m}@{k}' for m in ('HR', 'NDCG', 'MRR') for k in (5, 10, 20)}

def test_wilson_known_values():
    "Two published rows of 162 users, 38 and 40 hits"
    assert wilson(38 / 162, 162) == pytest.approx([.1758, .3053], abs=2e-4)
    assert wilson(0, 10)[0] == pytest.approx(0) and wilson(1, 10)[1] == pytest.approx(1)

def test_wilson_covers():
    rng = np.random.default_rng(0); p, n = .1, 160
    lo, hi = np.array([wilson(x / n, n) for x in rng.binomial(n, p, 2000)]).T
    assert .93 < ((lo <= p) & (p <= hi)).mean() < .975

def test_bootstrap_is_the_slow_bootstrap(some):
    x = ndcg(some)
    slow = np.quantile(np.random.default_rng(0).choice(x, (4000, len(x))).mean(1), [.025, .975])
    assert bootstrap(x, draws=4000) == pytest.approx(slow, abs=.1 * (slow[1] - slow[0]))
    assert bootstrap(x, seed=1) == bootstrap(x, seed=1) != bootstrap(x, seed=2)
    assert bootstrap(np.zeros(5)) is None and bootstrap(np.zeros(0)) is None

def test_intervals_hold_their_mean(some):
    d = describe(some)
    for m, (lo, hi) in d['interval'].items(): assert 0 <= lo < d[m] < hi <= 1

def test_a_model_against_itself(some):
    p = paired(some, some)
    assert p['difference'] == p['better'] == p['worse'] == 0
    assert p['n'] == len(some) and p['interval'] is None

def test_paired_sign_and_interval(some):
    better = Ranks(some.user, some.length, some.target, some.above // 2, some.ties, some.n_candidates)
    p, q = paired(better, some), paired(some, better)
    assert p['difference'] == pytest.approx(-q['difference']) and p['interval'][0] > 0 and p['worse'] == 0
    assert p['difference'] == pytest.approx(ndcg(better).mean() - ndcg(some).mean())
    shuffled = some.where(np.random.default_rng(0).permutation(len(some)))
    same = Ranks(some.user, some.length, some.target, shuffled.above, shuffled.ties, some.n_candidates)
    lo, hi = paired(some, same)['interval']
    assert lo < 0 < hi

@pytest.mark.parametrize('column', ['user', 'target', 'n_candidates'])
def test_paired_refuses_another_question(column, some):
    other = Ranks(**{**vars(some), column: getattr(some, column) + 1})
    with pytest.raises(ValueError, match=column): paired(some, other)
    with pytest.raises(ValueError, match='user'): paired(some, some.where(np.arange(10)))

def test_detectable():
    assert detectable(1090, .1) == pytest.approx(2.8016 * .1 / 1090 ** .5, rel=1e-4)
    rng, n = np.random.default_rng(0), 300
    x = rng.normal(detectable(n, 1.), 1, (4000, n))
    found = np.abs(x.mean(1) / x.std(1) * n ** .5) > 1.96
    assert .77 < found.mean() < .83

def test_file_round_trip(some, tmp_path):
    p = tmp_path / 'ranks.npz'
    some.save(p); some.where(slice(0, 9)).save(p)
    again = Ranks.load(p)
    assert len(again) == 9 and all((v == vars(some)[k][:9]).all() for k, v in vars(again).items())
    assert [f.name for f in tmp_path.iterdir()] == ['ranks.npz']
    with np.load(p, allow_pickle=False) as z:
        assert {'user', 'length', 'target', 'above', 'ties'} <= set(z.files)

def test_a_failed_save_leaves_the_old_file(some, tmp_path, monkeypatch):
    p = tmp_path / 'ranks.npz'; some.save(p); before = p.read_bytes()
    monkeypatch.setattr('os.fsync', lambda fd: (_ for _ in ()).throw(OSError('disk full')))
    with pytest.raises(OSError): made([1]).save(p)
    assert p.read_bytes() == before

def test_no_pickle_inside(tmp_path):
    np.savez(tmp_path / 'x.npz', user=np.array([{}], dtype=object))
    with pytest.raises((ValueError, KeyError)): Ranks.load(tmp_path / 'x.npz')
