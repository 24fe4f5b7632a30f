"Edges of data and scores: what must not turn into a good-looking number, each with the fault that only its guard catches."
import warnings
from dataclasses import replace
from functools import cache
import numpy as np, pandas as pd, pytest, torch
from conftest import needs_data
from torch import nn
import seqrec_nb.data.interactions as interactions_page
import seqrec_nb.evaluate as evaluate_page
import seqrec_nb.metrics as metrics_page
import seqrec_nb.models                     # fills the registry
from seqrec_nb.analysis.groups import by_group, draw_win_loss, win_loss
from seqrec_nb.analysis.ties import (follows, mixed, over, redraw, scores_of, maker, tie_counts, tie_report)
from seqrec_nb.core import generator, reseed
from seqrec_nb.data.formats import DataError
from seqrec_nb.data.interactions import Interactions
from seqrec_nb.data.loader import EvalLoader, Loader, Windows
from seqrec_nb.data.planted import synthetic
from seqrec_nb.data.sequences import Sequences
from seqrec_nb.data.splits import cut_date, leave_one_out, load
from seqrec_nb.device import autocast
from seqrec_nb.evaluate import EvaluationError, cold, rankings, ranks
from seqrec_nb.metrics import Ranks, averages, gains, hr, members, ndcg, per_user, summary
from seqrec_nb.models.base import MODELS, SeqModel, create
from seqrec_nb.models.baselines import Markov, Popularity
from seqrec_nb.report import groups as group_table, split_report

read, T = Interactions.read, 10**9

class Given(nn.Module):
    "A model with a score for every row of the split"
    def __init__(self, s):
        super().__init__()
        self.s, self.n_items = torch.as_tensor(s), np.shape(s)[1] - 1
    def table(self): return None
    def scores(self, b, E=None): return self.s[b.row]

def sequences(histories, n_items=None, times=None):
    "These histories as a table; item ids are what they say"
    items = np.concatenate(histories).astype(np.int32)
    offsets = np.r_[0, np.cumsum([len(h) for h in histories])].astype(np.int64)
    return Sequences(items, offsets, times, np.arange(len(histories)), np.arange(1, (n_items or items.max()) + 1))

# ---- row 14: scores that are not numbers ----

def naive_hits(s, target, k=10):
    "The evaluator of the repository behind seed requirement 003: rank = number of scores >= that of the target"
    rank = (s[:, 1:] >= s.gather(1, target[:, None])).sum(1)
    return (rank <= k).double().mean().item()

@pytest.mark.parametrize('value', [np.nan, np.inf, -np.inf])
def test_broken_scores_are_an_error_and_never_a_metric(value, monkeypatch):
    "Every rival of the target is broken: nothing stands above it, and that must not be a hit"
    data = synthetic(60, n_items=120, seed=0)
    target = torch.as_tensor(data.test.target.astype(int))
    s = torch.full((60, 121), value).scatter(1, target[:, None], 1.)
    with pytest.raises(EvaluationError, match='60 of 60 rows have NaN or infinite'): ranks(Given(s), EvalLoader(data.test))
    monkeypatch.setattr(evaluate_page, 'unusable', lambda s, target: torch.zeros(len(s), dtype=torch.bool))
    passed = hr(ranks(Given(s), EvalLoader(data.test))).mean()       # without the guard
    assert passed == (0 if value == np.inf else 1)

def test_a_model_of_nothing_but_nan(monkeypatch):
    "The published way calls it perfect. Here two guards stand: the check of scores, and behind it that of ranks"
    data = synthetic(60, n_items=120, seed=0)
    s = torch.full((60, 121), torch.nan)
    assert naive_hits(s, torch.as_tensor(data.test.target.astype(int))) == 1
    with pytest.raises(EvaluationError, match='NaN'): ranks(Given(s), EvalLoader(data.test))
    monkeypatch.setattr(evaluate_page, 'unusable', lambda s, target: torch.zeros(len(s), dtype=torch.bool))
    with pytest.raises(ValueError, match='impossible rank'): ranks(Given(s), EvalLoader(data.test))
    monkeypatch.setattr(Ranks, '__post_init__', lambda self: None)
    assert (ranks(Given(s), EvalLoader(data.test)).above == 0).all()

def test_a_model_that_diverged_is_named_by_its_own_scores():
    "Weights of NaN, through a real model and the real loader"
    data = synthetic(40, n_items=110, seed=0)
    reseed(0); model = create('sasrec', 110, d_model=8, max_len=10)
    assert len(ranks(model, EvalLoader(data.test, max_len=10))) == 40
    with torch.no_grad(): model.item.weight[7, 0] = torch.nan
    with pytest.raises(EvaluationError, match='NaN'): ranks(model, EvalLoader(data.test, max_len=10))

# ---- row 15: constant scores ----

def silent(n_items, max_len=10):
    "A transformer all of whose weights are 0: every item gets the same score"
    model = create('sasrec', n_items, d_model=8, max_len=max_len)
    with torch.no_grad():
        for p in model.parameters(): p.zero_()
    return model

@pytest.mark.parametrize('k', [1, 5, 10, 20])
def test_a_model_of_zeros_gets_k_of_n_exactly(k, monkeypatch):
    data = synthetic(50, n_items=160, seed=0)
    r = rankings(silent(160), EvalLoader(data.test, max_len=10))
    assert (hr(r['unmasked'], k) == k / 160).all()
    assert np.array_equal(hr(r['masked'], k), k / r['masked'].n_candidates)
    assert hr(r['unmasked'].settle('best'), k).mean() == 1 and hr(r['unmasked'].settle('worst'), k).mean() == 0
    place, seen = evaluate_page.place, evaluate_page.seen_place
    monkeypatch.setattr(evaluate_page, 'place', lambda *a: (place(*a)[0], 0 * place(*a)[1]))   # without the count of ties
    monkeypatch.setattr(evaluate_page, 'seen_place', lambda *a: (seen(*a)[0], 0 * seen(*a)[1], seen(*a)[2]))
    passed = rankings(silent(160), EvalLoader(data.test, max_len=10))['unmasked']
    assert hr(passed, k).mean() == 1

@pytest.mark.parametrize('seed', range(3))
def test_other_item_numbers_leave_every_rank(seed):
    "Scores of four values, so nearly all is a tie; an evaluator that sorts would give the order of the ids"
    data = synthetic(80, n_items=120, seed=0)
    s = torch.randint(4, (80, 121), generator=generator(seed)).double()
    perm = np.r_[0, np.random.default_rng(seed).permutation(120) + 1]
    renamed = over(data, replace(data.seqs, items=perm[data.seqs.items].astype(np.int32)))
    moved = torch.empty_like(s); moved[:, perm] = s
    a, b = rankings(Given(s), EvalLoader(data.test)), rankings(Given(moved), EvalLoader(renamed.test))
    for k in a:
        assert np.array_equal(a[k].above, b[k].above) and np.array_equal(a[k].ties, b[k].ties) and averages(a[k]) == averages(b[k])
    def sorting(s, d):
        "HR@10 by a sort, where the order of equal scores is that of the ids"
        first = s[:, 1:].argsort(dim=1, descending=True, stable=True)[:, :10] + 1
        return (first == torch.as_tensor(d.test.target.astype(int))[:, None]).any(1).double().mean().item()
    assert sorting(s, data) != sorting(moved, renamed), 'the twin must depend on the ids'

# ---- row 16: nobody to beat ----

def full_houses():
    "User 0 has seen all but the target, user 1 all and the target too, user 2 some, user 3 all but two"
    return leave_one_out(sequences([[1, 2, 3, 4, 5, 6], [2, 3, 4, 5, 6, 1, 1], [1, 2, 3], [1, 2, 3, 4, 5]], 6))

def test_a_user_with_nothing_left_is_a_miss_and_is_listed(monkeypatch):
    data = full_houses()
    for s in (torch.rand(4, 7, generator=generator(0)), torch.zeros(4, 7)):
        r = ranks(Given(s), EvalLoader(data.test))
        assert r.n_candidates.tolist() == [1, 1, 4, 2] and (r.above[:2] == 0).all()
        for m in ('HR@1', 'HR@10', 'NDCG@10', 'MRR@5'): assert per_user(r, m)[:2].tolist() == [0, 0]
        found = summary(r)
        assert found['alone'] == dict(count=2, users=[0, 1], policy='a miss') and found['certain'] == 4
        assert found['grouped_metrics']['overall']['count'] == 4 and found['test_metrics']['HR@10'] == 2 / 4
    def gain_only(ranks, metric):
        G = np.r_[0., gains(metric).cumsum()]
        top = lambda x: np.minimum(x, len(G) - 1)
        return (G[top(ranks.above + ranks.ties + 1)] - G[top(ranks.above)]) / (ranks.ties + 1)
    monkeypatch.setattr(metrics_page, 'per_user', gain_only)         # without the guard
    assert averages(r)['HR@10'] == 1, 'two users without a choice would be hits of a model of zeros'

def test_nobody_else_is_touched():
    "The guard leaves every figure of users who have a choice, to the last bit"
    rng = np.random.default_rng(0); n = 400
    r = Ranks(np.arange(n), rng.integers(1, 90, n), rng.integers(1, 50, n), rng.geometric(.05, n), rng.integers(0, 4, n), 0 * np.arange(n) + 500)
    for m in ('HR@10', 'NDCG@10', 'MRR@20'):
        G = np.r_[0., gains(m).cumsum()]
        top = lambda x: np.minimum(x, len(G) - 1)
        assert np.array_equal(per_user(r, m), (G[top(r.above + r.ties + 1)] - G[top(r.above)]) / (r.ties + 1))
    assert summary(r)['alone'] == dict(count=0, users=[], policy='a miss')

def test_a_long_list_of_such_users_is_cut():
    n = np.arange(500)
    found = summary(Ranks(n, n, 0 * n + 1, 0 * n, 0 * n, 0 * n + 1))['alone']
    assert found['count'] == 500 and found['users'] == list(range(100))

@needs_data
@pytest.mark.parametrize('name, protocol', [('ml-100k', 'P-raw'), ('ml-100k', 'P-seed'), ('lastfm', 'P-bsa')])
def test_no_user_of_the_real_sets_is_concerned(name, protocol, data_dir):
    data = load(name, protocol)
    assert data.n_items - data.seqs.lengths.max() > 900

# ---- row 20: duplicated timestamps ----

def log(seed=0, n=300, users=12, moments=12):
    "A log in which most rows are in ties, and a column that knows the order"
    rng = np.random.default_rng(seed)
    time = T + rng.integers(0, moments, n)
    order = rng.permutation(n)
    return pd.DataFrame(dict(user=rng.integers(0, users, n), item=rng.integers(0, 40, n), time=time, seq=order))

def shuffled(df, seed): return df.sample(frac=1, random_state=seed).reset_index(drop=True)
def histories(x): return load(x).seqs
FORMS = {'number': lambda q: q, 'float': lambda q: q / 8, 'text': lambda q: [f'{v:05}' for v in q], 'digits': lambda q: [str(v) for v in q],
         'date': lambda q: pd.Timestamp('2001-01-01') + pd.to_timedelta(q, 's')}

@pytest.mark.parametrize('form', FORMS)
@pytest.mark.parametrize('file', [False, True])
def test_a_tiebreak_makes_the_order_of_rows_irrelevant(form, file, tmp_path):
    df = log(); df['seq'] = FORMS[form](df.seq)
    want = df.sort_values(['user', 'time', 'seq'], key=lambda c: c.astype(int) if form == 'digits' and c.name == 'seq' else c)
    found = []
    for seed in range(3):
        d = shuffled(df, seed)
        if file: d.to_csv(tmp_path/'a.csv', index=False); d = tmp_path/'a.csv'
        found.append(read(d, tiebreak='seq'))
    assert len({x.fingerprint for x in found}) == len({histories(x).fingerprint for x in found}) == 1
    assert found[0].items[found[0].item[found[0].order]].tolist() == want.item.tolist()
    assert found[0].rule == found[0].report.rule == 'user-time-[seq]-row'
    twins = [read(shuffled(df, seed)) for seed in range(3)]          # without the column the file decides
    assert len({histories(x).fingerprint for x in twins}) == 3 and twins[0].rule == 'user-time-row'

def test_ties_are_said_in_every_report():
    "Rows of one user and time in another order: other histories, and a line that says so; without ties neither"
    df = log()
    one, two = (read(d).report for d in (df, shuffled(df, 1)))
    tied, who = int(df.duplicated(['user', 'time'], keep=False).sum()), df[df.duplicated(['user', 'time'], keep=False)].user.nunique()
    for r in (one, two): assert f'{tied:,} rows of {who:,} users share user and time: their order is that of the file' in str(r)
    assert one.fingerprint != two.fingerprint and 'tie_report()' in str(one) and 'tiebreak=' in str(one)
    apart = df.assign(time=T + np.arange(len(df)))
    assert 'is that of the file' not in str(read(apart).report)
    assert read(apart).fingerprint == read(shuffled(apart, 1)).fingerprint
    assert 'is that of the file' not in str(read(df, tiebreak='seq').report)

def test_reports_do_not_collect_lines():
    x = read(log())
    assert len(x.report.notes) == len(x.where(np.ones(len(x), bool)).report.notes) - 1 and x.reading.notes == []

def test_several_tiebreaks_and_what_they_leave():
    df = log(); df['day'], df['seq'] = df.seq // 20, df.seq % 20
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        a, b = (read(shuffled(df, s), tiebreak=['day', 'seq']) for s in (0, 1))
    assert a.fingerprint == b.fingerprint and a.rule == 'user-time-[day, seq]-row'
    assert a.items[a.item[a.order]].tolist() == df.sort_values(['user', 'time', 'day', 'seq']).item.tolist()
    with pytest.warns(UserWarning, match='pairs of rows share user, time and tiebreak'): c = read(df, tiebreak='day')
    assert any('share user, time and tiebreak' in n for n in c.report.notes)
    with pytest.warns(UserWarning): d = read(shuffled(df, 1), tiebreak='day')
    assert c.fingerprint != d.fingerprint                            # so the warning was right

def test_rows_equal_in_everything_leave_nothing_to_warn_of():
    df = pd.concat([log(n=50)] * 2)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert len({read(shuffled(df, s), tiebreak='seq').fingerprint for s in range(3)}) == 1

def test_a_tiebreak_orders_a_log_without_times():
    df = log().drop(columns='time')
    a, b = (read(shuffled(df, s), tiebreak='seq') for s in (0, 1))
    assert a.fingerprint == b.fingerprint and a.time is None

@pytest.mark.parametrize('tiebreak, message', [('sec', "did you mean 'seq'"), (['seq', 'nope'], 'tiebreak 2='), (9, 'numbered from 0'),
                                               ('item', 'two roles|no item column'), ('user', 'two roles|no user column')])
def test_impossible_tiebreaks(tiebreak, message):
    with pytest.raises(DataError, match=message): read(log(), tiebreak=tiebreak)

def test_a_column_has_one_role():
    for column in ('time', 'item', 'user'):
        with pytest.raises(DataError, match='two roles'): read(log(), user='user', item='item', time='time', tiebreak=column)

def test_missing_tiebreaks_are_bad_rows(tmp_path):
    df = log(); df.loc[[3, 70], 'seq'] = np.nan
    with pytest.raises(DataError, match='2 × tiebreak is empty.*row 3, 70'): read(df, tiebreak='seq')
    assert len(read(df, tiebreak='seq', on_bad='drop')) == len(df) - 2
    (tmp_path/'s.txt').write_text('1 5 6 5 7\n2 9 3\n')
    with pytest.raises(DataError, match='no tiebreak'): read(tmp_path/'s.txt', layout='sequences', tiebreak=0)

def test_a_tiebreak_is_part_of_the_rule_but_not_of_the_histories():
    "Rows that lie in order already: the same histories, and so the same fingerprint of a run; the log says how it was read"
    df = log().sort_values(['user', 'time', 'seq']).reset_index(drop=True)
    a, b = read(df), read(df, tiebreak='seq')
    assert histories(a).fingerprint == histories(b).fingerprint and a.fingerprint != b.fingerprint

def test_dedupe_keeps_the_first_by_tiebreak():
    df = log(n=80); df = pd.concat([df, df.assign(seq=df.seq + 1000)])
    a, b = (read(shuffled(df, s), tiebreak='seq', dedupe=True) for s in (0, 1))
    assert a.fingerprint == b.fingerprint and len(a) <= 80

# ---- row 20: what the order of ties is worth ----

@cache
def coarse(step=3600, users=150):
    d = synthetic(users, n_items=110, seed=3)
    return over(d, replace(d.seqs, times=d.seqs.times // step * step))

def test_redrawing_moves_items_within_their_tie_only():
    d = coarse(); s = d.seqs
    user = np.repeat(np.arange(s.n_users), s.lengths)
    frame = lambda x: pd.DataFrame(dict(u=user, t=x.times, i=x.items)).sort_values(['u', 't', 'i']).to_numpy().tolist()
    for k in range(4):
        other = redraw(s, k)
        assert (other.times == s.times).all() and frame(other) == frame(s) and (other.items != s.items).any()
        assert (other.items[~mixed(s)] == s.items[~mixed(s)]).all()
        remade = leave_one_out(other)
        for name in ('train', 'valid', 'test'):
            a, b = getattr(over(d, other), name), getattr(remade, name)
            assert all(np.array_equal(getattr(a, k), getattr(b, k)) for k in ('user', 'start', 'stop'))
    assert redraw(s, 1).fingerprint == redraw(s, 1).fingerprint != redraw(s, 2).fingerprint

def test_every_order_of_a_tie_is_as_likely():
    s = sequences([[1, 2, 3]] * 3000, times=np.full(9000, T))
    _, n = np.unique(redraw(s, 0).items.reshape(-1, 3), axis=0, return_counts=True)
    assert len(n) == 6 and abs(n - 500).max() < 5 * (500 * 5 / 6) ** .5

def test_a_cut_by_date_stays_where_it_is():
    s = coarse().seqs
    a, b = (int(q) for q in np.quantile(s.times, [.7, .85]))
    d, other = cut_date(s, a, b), redraw(s, 0)
    remade, mine = cut_date(other, a, b), over(d, other)
    for name in ('train', 'valid', 'test'):
        assert all(np.array_equal(getattr(getattr(mine, name), k), getattr(getattr(remade, name), k)) for k in ('user', 'start', 'stop'))

def test_counts_against_a_loop():
    d = coarse(); s, c = d.seqs, tie_counts(d)
    rows = [(u, int(t), int(i)) for u in range(s.n_users) for t, i in zip(s.times[s.offsets[u]:s.offsets[u + 1]], s[u])]
    peers = {}
    for u, t, i in rows: peers.setdefault((u, t), []).append(i)
    assert c['tied'] == sum(len(peers[u, t]) > 1 for u, t, _ in rows)
    assert c['mixed'] == sum(len(set(peers[u, t])) > 1 for u, t, _ in rows) == mixed(s).sum()
    assert c['gaps_zero'] == sum(len(p) - 1 for p in peers.values()) == follows(s).sum()
    for name in ('test', 'valid'):
        stop = getattr(d, name).stop
        assert c[f'{name}_arbitrary'] == sum(len(set(peers[rows[k][0], rows[k][1]])) > 1 for k in stop) > 0

def test_report_of_ties():
    r = tie_report(coarse(), n=4)
    f = r.frame.set_index(['model', 'metric'])
    assert len(f) == 6 and r.n == 4 and 0 < r.moved < r.counts['test_arbitrary'] / r.counts['test']
    by_hand = [float(scores_of(over(coarse(), redraw(coarse().seqs, 0, k)), [maker('markov')], ('HR@10',), 200)['markov', 'HR@10'].mean()) for k in range(4)]
    row = f.loc[('markov', 'HR@10')]
    assert row['mean'] == pytest.approx(np.mean(by_hand)) and row['sd'] == pytest.approx(np.std(by_hand, ddof=1)) and row['sd'] > 0
    assert (row['min'], row['max']) == (min(by_hand), max(by_hand))
    each = hr(ranks(Markov.from_data(coarse()), EvalLoader(coarse().test)))
    assert row['file'] == pytest.approx(each.mean()) and row['users'] == pytest.approx(each.std(ddof=1) / 150 ** .5)
    assert row['share'] == pytest.approx(row['sd'] / row['users'])
    assert row['file'] > row['max']                                  # the file knew an order that the clock has lost
    assert r.to_dict() == tie_report(coarse(), n=4).to_dict() != tie_report(coarse(), n=4, seed=1).to_dict()
    assert 'sampling error over users' in str(r) and f"{r.counts['test_arbitrary']:,} of 150" in str(r)

def test_without_ties_nothing_moves():
    "The twin: one order exists, so every spread is 0"
    r = tie_report(synthetic(60, n_items=110, seed=3), ['popularity', 'markov'], n=3)
    assert r.moved == 0 == r.counts['mixed'] and r.counts['ascending'] is None and (r.frame.sd < 1e-12).all()

def test_a_file_that_is_sorted_by_item_is_noticed():
    s = coarse().seqs
    user = np.repeat(np.arange(s.n_users), s.lengths)
    asc = replace(s, items=s.items[np.lexsort((s.items, s.times, user))])
    for table, word in ((asc, 'ascends'), (replace(s, items=s.items[np.lexsort((-s.items, s.times, user))]), 'descends')):
        assert f'item id {word} in nearly all ties' in str(tie_report(over(coarse(), table), 'popularity', n=2))
    assert 'item id' not in str(tie_report(coarse(), 'popularity', n=2))

def test_models_of_ones_own():
    def trained(data):
        reseed(0); return create('sasrec', data.n_items, d_model=4, max_len=8)
    r = tie_report(coarse(), [trained, 'popularity'], n=2, metrics=('MRR@10',), max_len=8)
    assert r.frame.model.tolist() == ['trained', 'popularity'] and (r.frame['max'] <= 1).all()
    with pytest.raises(ValueError, match='give a function'): tie_report(coarse(), 'sasrec')
    with pytest.raises(ValueError, match='rows that another order tests'): tie_report(coarse(), trained(coarse()))
    with pytest.raises(ValueError, match='at least 2'): tie_report(coarse(), n=1)
    with pytest.raises(ValueError, match='no times'): tie_report(over(coarse(), replace(coarse().seqs, times=None)), n=2)

def test_ties_of_interactions_and_frames():
    a, b = tie_report(log(), 'popularity', n=2), tie_report(read(log()), 'popularity', n=2, protocol='P-sas')
    assert a.protocol == 'P-raw' and b.protocol == 'P-sas' and a.fingerprint == load(log()).fingerprint

@needs_data
def test_ties_of_ml_100k(data_dir):
    "The facts of users.md (U-facts), and what they are worth"
    r = tie_report('ml-100k', 'markov', n=4)
    c = r.counts
    assert (c['tied'], c['rows'], c['test_arbitrary'], c['test']) == (75_772, 100_000, 415, 943) and c['users_mixed'] == 943
    assert round(c['gaps_zero'] / c['gaps'], 3) == .510 and abs(c['ascending'] - .5) < .01
    x = r.rows[0]
    assert round(x['file'], 4) == .1448 and .001 < x['sd'] < 415 ** .5 / 2 / 943 * 1.5

@needs_data
def test_an_order_by_item_makes_a_model_look_better(data_dir):
    "Why the item is refused as a tiebreak: the same events of ML-100K, sorted by descending id within a second"
    s = load('ml-100k').seqs
    by_item = replace(s, items=s.items[np.lexsort((-s.items, s.times, np.repeat(np.arange(s.n_users), s.lengths)))])
    figure = lambda d: ndcg(ranks(Markov.from_data(d), EvalLoader(d.test))).mean()
    assert figure(leave_one_out(by_item)) > 1.5 * figure(leave_one_out(s))

# ---- row 21: exact duplicates ----

def test_exact_duplicates_stay_are_counted_and_can_go(monkeypatch):
    df = pd.DataFrame(dict(user=[1, 1, 1, 2, 1], item=[5, 6, 5, 5, 6], time=T + np.array([0, 1, 0, 0, 2]), rating=[3, 4, 3, 3, 4]))
    x, y = read(df), read(df, dedupe=True)
    assert (len(x), x.report.duplicates, x.report.dropped) == (5, 1, 0) and '1 rows equal an earlier one' in str(x.report)
    assert (len(y), y.report.duplicates, y.report.dropped) == (4, 0, 1) and '1 duplicates dropped' in str(y.report)
    assert [histories(r)[0].tolist() for r in (x, y)] == [[1, 1, 2, 2], [1, 2, 2]], 'a later visit of the same item is no duplicate'
    assert read(df.assign(rating=[3, 4, 2, 3, 4])).report.duplicates == 0
    monkeypatch.setattr(interactions_page, 'duplicated', lambda *c: np.zeros(0, int))   # without the search
    z = read(df, dedupe=True)
    assert len(z) == 5 and z.report.duplicates == 0 and z.fingerprint == x.fingerprint

# ---- row 22: gaps from nothing to decades ----

GAPS = np.r_[0, 0, 1, 59, 3600, 86_400, 10**6, 10**7, 10**8, 10**9 - 1, 10**9]

@cache
def decades(users=24):
    "Histories whose gaps run from 0 to 1e9 s, from the years before 1970 on: no float32 holds these times"
    rng = np.random.default_rng(0)
    n = rng.integers(3, 14, users)
    gaps = rng.choice(GAPS, n.sum())
    start = np.repeat(rng.integers(-2**31, 2**31, users), n)
    first = np.r_[0, n.cumsum()[:-1]]
    since = gaps.cumsum(); since -= np.repeat(since[first], n)
    items = np.concatenate([rng.permutation(30)[:k] + 1 for k in n])
    return leave_one_out(Sequences(items.astype(np.int32), np.r_[0, n.cumsum()], start + since, np.arange(users), np.arange(1, 31)))

def wrong_times(d, loader):
    "Cells of a loader's times that are not those of the table, to the second"
    wrong = 0
    for b in loader:
        assert b.time.dtype == torch.int64 and b.time.shape[1] == b.items.shape[1] + 1
        for r in range(len(b)):
            k, end = int((b.items[r] > 0).sum()), d.test.stop[b.row[r]]
            wrong += int((b.time[r, :k + 1].numpy() != d.seqs.times[end - k:end + 1]).sum())
    return wrong

def test_times_arrive_to_the_second(monkeypatch):
    d = decades()
    assert np.diff(d.seqs.times).max() >= 10**9 and wrong_times(d, EvalLoader(d.test, max_len=8, time=True)) == 0
    for parts in Loader(d.train, max_len=8, batch_size=8, time=True).steps(0):
        for b in parts:
            gap = b.time.diff(dim=1)
            assert gap.min() >= 0 and (gap[:, -1] >= 0).all() and set(gap.unique().tolist()) <= {0, *GAPS.tolist()}
    exact = Windows._time
    rounded = lambda self, at, hi: None if self.times is None else exact(self, at, hi).float().long()
    monkeypatch.setattr(Windows, '_time', rounded)                   # the twin: seconds in single precision
    assert wrong_times(d, EvalLoader(d.test, max_len=8, time=True)) > 50

def made(name, d):
    "A small model of every registered kind, with a graph where it wants one"
    f = MODELS[name]
    reseed(0)
    return f.from_data(d, **({} if not getattr(f, 'trainable', True) else dict(max_len=12)))

def worst(model, d, precision):
    "What is not finite: in forward, in scores, in the loss's gradient"
    found = []
    for b in EvalLoader(d.test, max_len=12, batch_size=8, time=True):
        with torch.no_grad(), autocast('cpu', precision):
            s = model.scores(b)
            if not s[:, 1:].isfinite().all(): found.append('scores')
            if model.d_model and not model(b).h[b.mask].isfinite().all(): found.append('forward')
    return found

@pytest.mark.parametrize('precision', ['fp32', 'bf16'])
@pytest.mark.parametrize('name', MODELS)
def test_every_model_is_finite_on_gaps_of_decades(name, precision):
    assert worst(made(name, decades()).eval(), decades(), precision) == []

class Raw(SeqModel):
    "A model of the kind to come, that feeds its gaps in as they are: a power of them leaves every float"
    uses_time = True
    def squash(self, gap): return gap
    def embed(self, E, b):
        gap = self.squash(b.time.diff(dim=1).to(E.dtype))[..., None]
        return nn.functional.embedding(b.items, E) * gap ** 5
    def body(self, x, b): return x.cumsum(1)

class Squashed(Raw):
    def squash(self, gap): return gap.log1p().clamp(max=20)

def test_the_check_of_gaps_sees_a_model_that_breaks():
    "The negative twin; and log1p with a clip, which time-aware models will have to bring, is enough"
    d = decades()
    assert 'scores' in worst(Raw(30, 8).eval(), d, 'fp32') and worst(Squashed(30, 8).eval(), d, 'fp32') == []
    assert worst(Squashed(30, 8).eval(), d, 'bf16') == []

# ---- row 25: users of one, two and three rows ----

def short_users():
    return pd.DataFrame(dict(user=['one'] + ['three'] * 3 + ['two'] * 2, item=['a', 'a', 'b', 'c', 'b', 'c'], time=T + np.arange(6)))

def test_short_users_are_trained_on_and_never_tested():
    d = load(short_users())
    name = lambda ids: [str(d.seqs.item_ids[i - 1]) for i in ids]
    assert d.seqs.user_ids.tolist() == ['one', 'three', 'two']
    assert [name(d.train.history(r)) for r in range(3)] == [['a'], ['a'], ['b', 'c']]
    assert (d.valid.user.tolist(), d.test.user.tolist()) == ([1], [1])
    assert (name(d.valid.history(0)), name(d.valid.target)) == (['a'], ['b'])
    assert (name(d.test.history(0)), name(d.test.target)) == (['a', 'b'], ['c'])
    assert '3 training, 1 validation, 1 test rows' in ' '.join(split_report(d).split())
    steps = [b for s in Loader(d.train, 4, 2, parts=1).steps(0) for b in s]
    assert sum(b.n_targets for b in steps) == 1, 'one row alone teaches nothing, two rows one step'
    assert Popularity.from_data(d).pop.tolist() == [0, 2, 1, 1], 'but it is counted'

def test_short_users_would_be_tested_on_nothing():
    "The twin: the published rule 'last item, whoever it is' tests a user on an empty history"
    d = load(short_users())
    s, stop = d.seqs, d.seqs.offsets[1:] - 1
    empty = replace(d.test, user=np.arange(3), start=s.offsets[:-1], stop=stop)
    assert empty.length.tolist() == [0, 2, 1] and d.test.length.min() >= 2 and d.valid.length.min() >= 1

# ---- row 26: targets that training never saw ----

def test_a_target_that_training_never_saw_is_kept_and_counted_both_ways():
    d = leave_one_out(sequences([[1, 2, 3, 4], [5, 6, 2, 3], [1, 2, 1, 3], [1, 4]], 6))     # training: 1 2, 5 6, 1 2, 1 4
    r = ranks(Popularity.from_data(d), EvalLoader(d.test))
    unseen = cold(r, d)
    assert r.target.tolist() == [4, 3, 3] and unseen.tolist() == [False, True, True] and len(r) == 3, 'kept'
    found = summary(r, cold=unseen)
    assert found['cold']['count'] == 2 and found['cold']['policy'] == 'kept'
    assert found['test_metrics'] == averages(r), 'the headline is over all users'
    assert found['cold']['test_metrics_without'] == averages(r.where([0])) != found['test_metrics']
    assert 'cold' not in summary(r)

def test_dropping_cold_targets_makes_a_figure_better():
    "The twin: why the policy has to be stated"
    d = synthetic(300, n_items=110, seed=0)
    rare = np.bincount(d.train.flat()[0], minlength=111).argsort()[1:40]
    keep = ~np.isin(d.seqs.items, rare); keep[d.test.stop] = True                      # 39 items left in test targets only
    n = np.add.reduceat(keep, d.seqs.offsets[:-1])
    d = leave_one_out(Sequences(d.seqs.items[keep], np.r_[0, n.cumsum()], None, d.seqs.user_ids, d.seqs.item_ids))
    r = ranks(Markov.from_data(d), EvalLoader(d.test))
    found = summary(r, cold=cold(r, d))
    assert found['cold']['count'] > 10 and found['cold']['test_metrics_without']['NDCG@10'] > found['test_metrics']['NDCG@10']

# ---- row 27: a declared group without users ----

def test_an_empty_group_stays_in_every_place():
    r = Ranks(np.arange(3), [5, 8, 20], [1, 2, 3], [0, 30, 2], [0] * 3, [900] * 3)
    found = summary(r)['grouped_metrics']
    assert list(found) == ['short', 'medium', 'long', 'overall'] and found['long']['count'] == 0
    assert all(v is None for k, v in found['long'].items() if '@' in k and not k.startswith('hits')) and found['long']['hits@10'] == 0
    row = {x[0]: x for x in group_table(dict(grouped_metrics=found))[1]}['long (> 50)']
    assert row == ['long (> 50)', '0', '–', '–', '–', '–', '–']
    assert by_group({'x': r})['long']['x'] == dict(mean=None, interval=None, spread=None, each=[], n=0)
    from matplotlib.figure import Figure
    ax = Figure().subplots(); draw_win_loss(ax, win_loss(r, r))
    assert any(t.get_text() == 'long\n0 users' for t in ax.get_yticklabels())

def test_a_short_window_does_not_empty_the_long_group():
    "U1: the published code measured histories after truncation, and its long users vanished from the table"
    d = synthetic(120, n_items=110, seed=0)
    true = {g: int(m.sum()) for g, m in members(ranks(Popularity.from_data(d), EvalLoader(d.test, max_len=200))).items()}
    count = lambda L: {g: v['count'] for g, v in summary(ranks(Popularity.from_data(d), EvalLoader(d.test, max_len=L)))['grouped_metrics'].items()}
    assert true['long'] > 10 and count(5) == count(50) == true
    class Cut(EvalLoader):
        def __iter__(self):
            for b in super().__iter__(): yield replace(b, length=b.mask.sum(1))
        def seen(self, b): return super().seen(replace(b, length=torch.as_tensor(d.test.length)[b.row]))
    gone = summary(ranks(Popularity.from_data(d), Cut(d.test, max_len=50)))['grouped_metrics']
    assert gone['long']['count'] == 0 and gone['long']['HR@10'] is None, 'the twin; and even then the group is said'
