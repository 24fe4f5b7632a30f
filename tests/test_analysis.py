"α of the tested users, groups of users, wins and losses, changes in per cent."
import json
import numpy as np, pytest, torch
from matplotlib.figure import Figure
from conftest import needs_data
from seqrec_nb.analysis.fusion import alpha_curve, alpha_stats, describe_alpha, draw_alpha
from seqrec_nb.analysis.groups import (by_group, change, changes, draw_gaps, draw_groups, draw_win_loss, gaps,
                                       quantile_groups, terciles, win_loss)
from seqrec_nb.blocks.fusion import FUSIONS, make_fusion
from seqrec_nb.metrics import GROUPS, Ranks, averages, members

def made(n=300, seed=0, better_until=0, longest=400):
    "Ranks of n users; the same targets for every seed"
    length = np.minimum(np.random.default_rng(7).geometric(.02, n) + 2, longest)
    above = np.random.default_rng(seed).geometric(.012, n) - 1
    above = np.minimum(np.where(length <= better_until, above // 3, above), 900)
    return Ranks(np.arange(n), length, 1 + length, above, 0 * above, 0 * above + 950)

class Model(torch.nn.Module):
    def __init__(self, *args, **kw): super().__init__(); self.fusion = make_fusion(*args, **kw)
    def alpha(self, length): return self.fusion(length)

# ---- α ----

def test_alpha_of_a_fixed_fusion_has_no_spread():
    stats = alpha_stats(Model('fixed', fixed_alpha=.3), made())
    assert list(stats) == ['short', 'medium', 'long', 'overall']
    for x in stats.values(): assert x['std'] == 0 and np.isclose(x['mean'], .3) and x['min'] == x['max'] == x['mean']

@pytest.mark.parametrize('name', FUSIONS)
def test_alpha_stats_are_those_of_the_tested_users(name):
    torch.manual_seed(0)
    model, ranks = Model(name), made()
    stats, a = alpha_stats(model, ranks), alpha_curve(model, ranks.length)
    for g, m in members(ranks).items():
        assert stats[g]['count'] == m.sum() and np.isclose(stats[g]['mean'], a[m].mean())
        assert np.isclose(stats[g]['std'], a[m].std(), atol=1e-6) and stats[g]['min'] <= stats[g]['max']
    assert json.loads(json.dumps(stats, allow_nan=False)) == stats
    assert (alpha_curve(model.fusion, ranks.length) == a).all()

def test_alpha_of_one_user_and_of_none():
    one = made(1, longest=5)
    stats = alpha_stats(Model('learnable'), one)
    assert stats['short']['std'] == 0 and stats['short']['count'] == 1
    assert stats['long'] == dict(mean=None, std=None, min=None, max=None, count=0) == describe_alpha([])

def test_alpha_keeps_no_gradient_and_a_model_without_it_has_none():
    assert alpha_stats(torch.nn.Linear(2, 2), made()) is None
    model = Model('piecewise'); alpha_stats(model, made())
    assert all(p.grad is None for p in model.parameters())

def test_lengths_are_the_true_ones():
    "Cut to 50 items, nobody would be long"
    stats = alpha_stats(Model('discrete'), made())
    assert stats['long']['count'] > 0 and np.isclose(stats['long']['mean'], .7)

# ---- groups ----

def test_quantile_groups():
    ranks = made(3000)
    groups = terciles(ranks)
    sizes = [m.mean() for g, m in members(ranks, groups).items() if g != 'overall']
    assert len(sizes) == 3 and np.allclose(sizes, 1 / 3, atol=.03) and sum(sizes) == pytest.approx(1)
    assert len(quantile_groups(ranks, 5)) == 5
    assert quantile_groups(ranks.where(ranks.length == ranks.length[0])) == {'all': np.inf}
    assert quantile_groups(ranks.where(slice(0, 0))) == {'all': np.inf}
    two = ranks.where(np.isin(ranks.length, [5, 9]))
    assert sum(m.sum() for g, m in members(two, terciles(two)).items() if g != 'overall') == len(two)

@needs_data
def test_terciles_of_the_seed_protocol(data_dir):
    "hybrid.md 1.12: cuts at 35 and 94 items"
    from seqrec_nb.data.splits import load
    r = load('ml-1m', 'P-seed').test
    zero = np.zeros(len(r), int)
    assert list(terciles(Ranks(r.user, r.length, r.target, zero, zero, zero + 9)).values()) == [35, 94, np.inf]

def test_groups_add_up_and_seeds_are_averaged():
    a, b = made(seed=1), made(seed=2)
    found = by_group({'x': [a, b], 'y': a}, 'HR@10')
    for name, runs in (('x', [a, b]), ('y', [a])):
        each = [averages(r)['HR@10'] for r in runs]
        assert np.isclose(found['overall'][name]['mean'], np.mean(each))
        whole = sum(found[g][name]['mean'] * found[g][name]['n'] for g in GROUPS)
        assert np.isclose(whole, found['overall'][name]['mean'] * len(a))
    assert json.dumps(found, allow_nan=False)

def test_an_empty_group_has_no_value():
    ranks = made(longest=40)
    found = by_group({'x': ranks})['long']['x']
    assert found['n'] == 0 and found['mean'] is found['interval'] is None
    assert win_loss(ranks, ranks)['long'] == dict(better=None, equal=None, worse=None, count=0, difference=None)
    assert changes(ranks, ranks)['long'] == dict(percent=None, interval=None, n=0)

def test_wins_and_losses_mirror_each_other():
    a, b = made(seed=1, better_until=20), made(seed=2)
    there, back = win_loss(a, b), win_loss(b, a)
    for g in there:
        assert there[g]['better'] == back[g]['worse'] and there[g]['equal'] == back[g]['equal']
        assert np.isclose(there[g]['difference'], -back[g]['difference'])
        assert np.isclose(there[g]['better'] + there[g]['equal'] + there[g]['worse'], 1)
    assert not gaps([a, b], [b, a]).any()

def test_rankings_of_other_users_are_refused():
    a, b = made(), made(200)
    for f in (gaps, win_loss, changes):
        with pytest.raises(ValueError): f(a, b)

# ---- per cent ----

def test_change_is_the_ratio_of_means_with_a_paired_interval():
    rng = np.random.default_rng(0)
    b = (rng.random(2000) < .2).astype(float); a = np.where(rng.random(2000) < .9, b, rng.random(2000) < .3)
    found = change(a, b)
    assert np.isclose(found['percent'], 100 * (a.sum() / b.sum() - 1))
    k = np.random.default_rng(1).integers(2000, size=(1000, 2000))
    slow = np.quantile(100 * (a[k].sum(1) / b[k].sum(1) - 1), [.025, .975])
    assert np.allclose(found['interval'], slow, atol=2.)
    same = change(b, b)
    assert same['percent'] == 0 and same['interval'] == [0, 0] and change(a, b) == found

def test_no_percentage_without_a_base():
    a = np.array([1., 0, 1])
    assert change(a, 0 * a)['percent'] is None and change(a[:0], a[:0])['n'] == 0
    few = change(np.eye(1, 50)[0], np.eye(1, 50, 3)[0])
    assert few['percent'] == 0 and few['interval'] is None      # some resamples have no hit of the base

# ---- pictures ----

def test_pictures_are_drawn_and_leave_pyplot_alone():
    import matplotlib.pyplot as plt
    before, settings = plt.get_fignums(), dict(plt.rcParams)
    a, b = made(seed=1, better_until=20, longest=40), made(seed=2, longest=40)
    axs = Figure().subplots(4)
    draw_groups(axs[0], by_group({'a': a, 'b': [b, b]})); draw_gaps(axs[1], gaps(a, b))
    draw_win_loss(axs[2], win_loss(a, b)); draw_win_loss(axs[3], win_loss(a, a))
    draw_alpha(axs[1], {'x': ([1, 2], [.1, .2])})
    assert plt.get_fignums() == before and dict(plt.rcParams) == settings
    assert len(axs[2].get_yticks()) == 4 and axs[0].get_ylabel()   # the group without users stays
