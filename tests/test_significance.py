"Tests over users against their definitions, and p values that are what a p value promises."
import json
import numpy as np, pytest
from scipy import stats
from seqrec_nb.analysis.significance import contrast, gap, holm, level, mcnemar, mean_test, over_seeds, per_seed, same_question
from seqrec_nb.metrics import Ranks, bootstrap, detectable, paired, wilson

def made(seeds=5, users=300, lift=0., seed=0, ties=0):
    "Ranks of one model under several seeds; users share their difficulty with every other model"
    noise = np.random.default_rng(1 + seed).normal(0, .8, (seeds, users))
    above = np.exp(np.random.default_rng(0).normal(4, 2, users) + noise - lift).clip(0, 900).astype(int)
    u = np.arange(users)
    return [Ranks(u, 0*u + 20, 0*u + 1, x, 0*u + ties, 0*u + 1000) for x in above]

def uniform(p): return stats.kstest(p, 'uniform').pvalue

# users

@pytest.mark.parametrize('better, worse', [(0, 0), (5, 0), (0, 5), (3, 3), (12, 4), (1, 9), (40, 60)])
def test_mcnemar_is_the_exact_binomial(better, worse):
    a = np.r_[np.ones(better), np.zeros(worse), np.ones(7), np.zeros(9)]
    b = np.r_[np.zeros(better), np.ones(worse), np.ones(7), np.zeros(9)]
    n, k = better + worse, min(better, worse)
    want = min(1, 2 * stats.binom.cdf(k, n, .5)) if better != worse else 1
    got = mcnemar(a, b)
    assert got == dict(p=pytest.approx(want), better=better, worse=worse) and mcnemar(b, a)['p'] == got['p']

def test_sign_test_of_several_seeds():
    "The sign of each user's mean difference counts, not the number of seeds"
    a, b = np.array([[1, 1, 0, 1], [1, 0, 0, 0.]]), np.array([[0, 0, 1, 1], [0, 1, 0, 0.]])
    assert gap(a, b).tolist() == [1, 0, -.5, 0] and mcnemar(a, b) == dict(p=1., better=1, worse=1)
    once = np.random.default_rng(0).integers(0, 2, (2, 80))
    assert mcnemar([once[0]] * 5, [once[1]] * 3) == mcnemar(*once)
    third = np.full((3, 9), 1/3); assert gap(third, np.full(9, third.mean())).tolist() == [0] * 9    # rounding is no difference

def test_a_model_against_itself():
    A = made()
    for metric in ('HR@10', 'NDCG@10', 'MRR@20'):
        c = contrast(A, A, metric)
        assert c['p'] == 1 and c['difference'] == 0 and c['interval'] is None and c['better'] == c['worse'] == 0
        assert contrast(A[0], A[0], metric)['p'] == 1

def test_mean_test_is_the_paired_t_test():
    x, y = (per_seed(made(seed=s), 'NDCG@10').mean(0) for s in (1, 2))
    assert mean_test(gap(x, y)) == pytest.approx(stats.ttest_rel(x, y).pvalue)
    assert mean_test([]) == mean_test([.3]) == mean_test([0, 0, 0]) == 1 and mean_test([.1] * 5) < 1e-9

def exchanged(seeds, seed, users=500):
    "Two models whose names were exchanged at random for each user: truly alike"
    x, y = (per_seed(made(seeds, users, lift, seed=s), 'NDCG@10') for s, lift in ((1, .2), (2, 0)))
    swap = np.random.default_rng(seed).random(users) < .5
    return np.where(swap, x, y), np.where(swap, y, x)

@pytest.mark.parametrize('seeds', [1, 4])
def test_p_is_uniform_under_permuted_labels(seeds):
    p = [mean_test(gap(*exchanged(seeds, k))) for k in range(400)]
    assert uniform(p) > .01 and .02 < np.mean(np.array(p) < .05) < .09

@pytest.mark.parametrize('seeds', [1, 5])
def test_p_of_hits_under_permuted_labels(seeds):
    "An exact test of counts is a little careful: never more than the level; uniform up to its steps"
    p, mid = [], []
    for k in range(400):
        m = mcnemar(*(x > .3 for x in exchanged(seeds, k)))
        n, worse = m['better'] + m['worse'], max(m['better'], m['worse'])
        p.append(m['p']); mid.append(min(1, m['p'] - np.random.default_rng(k).random() * 2 * stats.binom.pmf(worse, n, .5)))
    assert uniform(np.clip(mid, 0, 1)) > .01
    for x in (.01, .05, .1, .3): assert np.mean(np.array(p) <= x) < x + 3 * (x / 400) ** .5

def test_t_test_agrees_with_permutations():
    d = gap(*(per_seed(made(1, 162, lift, seed=s), 'NDCG@10') for s, lift in ((3, .2), (4, 0))))
    flips = np.random.default_rng(0).choice([-1., 1.], (20_000, len(d))) @ d
    assert abs((np.abs(flips) >= abs(d.sum()) - 1e-9).mean() - mean_test(d)) < .02

def test_the_size_of_an_effect_is_not_its_p():
    "The same improvement, for few users and for many"
    few, many = (contrast(made(1, n, .15, seed=1), made(1, n, seed=2)) for n in (60, 6000))
    assert few['p'] > .05 > 1e-6 > many['p']

# corrections

def holm_by_definition(p):
    order = sorted(range(len(p)), key=lambda i: p[i]); out, most = [0] * len(p), 0
    for rank, i in enumerate(order): most = max(most, min(1, (len(p) - rank) * p[i])); out[i] = most
    return out

def test_holm():
    for n in (0, 1, 2, 7, 30):
        p = (np.random.default_rng(n).random(n) ** 3).tolist()
        assert np.allclose(holm(p), holm_by_definition(p))
    assert holm([.01, .01, .5]) == pytest.approx([.03, .03, .5]) and holm([1, 1]) == [1, 1]
    for bad in ([-.1], [1.1], [float('nan')]):
        with pytest.raises(ValueError, match='p values'): holm(bad)

def test_holm_keeps_the_family_at_its_level():
    p = np.random.default_rng(0).random((2000, 8))
    assert np.mean([min(holm(x)) < .05 for x in p]) < .05 + 3 * (.05 / 2000) ** .5 < np.mean((p < .05).any(1))

# seeds

def test_over_seeds_is_the_t_interval():
    x, y = np.random.default_rng(0).random((2, 5, 40))
    each, got = x.mean(1) - y.mean(1), over_seeds(x, y)
    want = stats.t.interval(.95, 4, each.mean(), stats.sem(each))
    assert np.allclose(got['each'], each) and np.allclose(got['interval'], want)
    assert over_seeds(x[:1], y[:1])['interval'] is None and len(over_seeds(x, y[:1])['each']) == 5
    assert over_seeds(x, y[:2]) == dict(each=None, interval=None)

def test_level():
    A = made(4); x = per_seed(A, 'NDCG@10'); l = level(x, 'NDCG@10')
    assert l['mean'] == pytest.approx(x.mean()) and l['spread'] == pytest.approx(x.mean(1).std(ddof=1))
    assert l['interval'] == bootstrap(x.mean(0)) and l['n'] == 300 and len(l['each']) == 4
    one = per_seed(A[0], 'HR@10'); l = level(one, 'HR@10')
    assert l['interval'] == wilson(one.mean(), 300) and l['spread'] is None

# contrast

def test_contrast():
    A, B = made(5, 800, .3, seed=1), made(5, 800, seed=2)
    c = contrast(A, B); d = gap(per_seed(A, 'NDCG@10'), per_seed(B, 'NDCG@10'))
    assert c['difference'] == pytest.approx(d.mean()) and c['interval'] == bootstrap(d) and c['p'] == mean_test(d)
    assert c['detectable'] == detectable(800, d.std(ddof=1)) and c['test'] == 't test' and c['seeds'] == [5, 5]
    assert (c['better'], c['worse']) == ((d > 0).sum(), (d < 0).sum())
    h = contrast(A, B, 'HR@10')
    assert h['test'] == 'sign test' and h['p'] == mcnemar(per_seed(A, 'HR@10'), per_seed(B, 'HR@10'))['p']
    assert contrast(A[0], B[0], 'HR@5')['test'] == contrast(A[:1], B[:1], 'HR@5')['test'] == 'McNemar'
    assert json.loads(json.dumps([c, h], allow_nan=False)) == [c, h]

def test_one_seed_is_the_paired_difference_of_metrics():
    (a,), (b,) = made(1, seed=1), made(1, seed=2, ties=3)
    c, p = contrast(a, b, 'MRR@10'), paired(a, b, 'MRR@10')
    assert all(c[k] == p[k] for k in ('difference', 'interval', 'n', 'better', 'worse'))

def test_a_difference_of_detectable_size_is_found_as_often_as_promised():
    rng, sd, n = np.random.default_rng(0), .1, 900
    found = [mean_test(rng.normal(detectable(n, sd), sd, n)) < .05 for _ in range(400)]
    assert .73 < np.mean(found) < .87

def test_unpaired_rankings_are_refused():
    a, = made(1)
    with pytest.raises(ValueError, match='300 users and 200 users'): same_question(a, a.where(slice(200)))
    for column, delta in (('user', 1), ('target', 3), ('n_candidates', 5)):
        other = Ranks(a.user, a.length, a.target, a.above, a.ties, a.n_candidates)
        setattr(other, column, np.where(np.arange(300) < 40, getattr(a, column) + delta, getattr(a, column)))
        with pytest.raises(ValueError, match=f'40 of 300 rows differ in {column}'): contrast(a, other)
        with pytest.raises(ValueError, match='unpaired'): per_seed([a, other], 'HR@10')
    with pytest.raises(ValueError, match='no rankings'): per_seed([], 'HR@10')
